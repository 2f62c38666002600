"""The grid trainer is TRL's trainer: same losses, margins and gradients on the same pairs, with fewer sequences."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from cpt_ray import grid
from cpt_ray.grid import GridTrainer, StepSampler, collate, make_cells, sequence_id
from tests.tiny_model import SENTENCES, make_tiny_model

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "ipo": {},
    "hinge": {},
    "robust": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "sigmoid_norm": {},
    "sigmoid+sft": {"loss_weights": [1.0, 0.3]},
}
CELLS = {"two": 2, "three": 3, "five": 5, "ragged": 4}
"""Cells by number of answers; of the ragged one's pairs only some are there."""
MISSING = {(0, 1), (1, 0), (2, 3), (3, 0), (3, 1), (3, 2)}


def make_pairs(cell: str, k: int, missing: set[tuple[int, int]] | None = None) -> list[dict[str, Any]]:
    """The ordered pairs of one cell of k answers of unlike lengths, in TRL's format."""
    words = random.Random(cell)
    vocabulary = " ".join(SENTENCES).split()
    answers = [" ".join(words.choices(vocabulary, k=words.randint(2, 18))) for _ in range(k)]
    systems = [" ".join(words.choices(vocabulary, k=words.randint(3, 9))) for _ in range(k)]
    return [
        {
            "cell_id": cell,
            "prompt": [
                {"role": "system", "content": systems[i]},
                {"role": "user", "content": f"Tell me about {cell}."},
            ],
            "chosen": [{"role": "assistant", "content": answers[i]}],
            "rejected": [{"role": "assistant", "content": answers[j]}],
        }
        for i in range(k)
        for j in range(k)
        if i != j and (i, j) not in (missing or set())
    ]


def all_pairs() -> list[dict[str, Any]]:
    return [one for name, k in CELLS.items() for one in make_pairs(name, k, MISSING if name == "ragged" else None)]


def arguments(folder: Path, **settings: Any) -> DPOConfig:
    given = {"per_device_train_batch_size": 64, "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no"}
    given |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "beta": 0.1, "disable_tqdm": True}
    given |= {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "max_length": 200, "log_level": "error"}
    return DPOConfig(output_dir=str(folder / "out"), **(given | settings))


def make_trainer(
    kind: type[DPOTrainer],
    path: Path,
    lora: bool,
    pairs: list[dict[str, Any]],
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """A trainer whose policy is already some way from its reference."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
    trainer = kind(
        model=str(path),
        args=arguments(path, **settings),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=config if lora else None,
        **(extra or {}),
    )
    return trainer


def move_away(trainer: Any) -> None:
    """The same small change of all trained weights, by name."""
    for name, value in sorted(trainer.model.named_parameters()):
        if value.requires_grad:
            noise = torch.Generator().manual_seed(sum(name.encode()))
            value.data += 0.02 * torch.randn(value.shape, generator=noise)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module", params=["lora", "full"])
def trainers(request: pytest.FixtureRequest, policy: Path) -> tuple[Any, Any]:
    """TRL's trainer and the grid trainer on the same pairs."""
    both = tuple(make_trainer(one, policy, request.param == "lora", all_pairs()) for one in (DPOTrainer, GridTrainer))
    for one in both:
        move_away(one)
    return both  # type: ignore[return-value]


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[list[float]]]:
    """Records each reward margin: the fourth of the per-pair tensors that TRL's loss gathers."""

    def record(trainer: Any) -> list[list[float]]:
        seen: list[list[float]] = []

        def gather(*values: torch.Tensor) -> torch.Tensor:
            if values[-1].ndim:  # not the sums over tokens
                seen.append(values[-1].tolist())
            return values[-1]

        owner = grid._Alone if isinstance(trainer, GridTrainer) else trainer.accelerator
        monkeypatch.setattr(owner, "gather", gather)
        return seen

    return record


def measure(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients by parameter name."""
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.item(), {
        name: one.grad.clone() for name, one in trainer.model.named_parameters() if one.grad is not None
    }


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("cells", [["two"], ["two", "three"], ["five"], ["ragged"]], ids="+".join)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_margins_and_gradients_are_trls(
    trainers: tuple[Any, Any], margins: Any, loss: str, cells: list[str]
) -> None:
    reference, trainer = trainers
    for one in trainers:
        one.loss_types = loss.split("+")
        one.loss_weights = LOSSES[loss].get("loss_weights", [1.0] * len(one.loss_types))
        one.label_smoothing = LOSSES[loss].get("label_smoothing", 0.0)
    rows = [one for one in reference.train_dataset if one["cell_id"] in cells]
    names = list(dict.fromkeys(one["cell_id"] for one in reference.train_dataset))
    wanted_margins, found_margins = margins(reference), margins(trainer)
    wanted, wanted_gradients = measure(reference, reference.data_collator(rows))
    batch = trainer.data_collator([trainer.train_dataset[names.index(one)] for one in cells])
    found, gradients = measure(trainer, batch)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert found_margins[3] == pytest.approx(wanted_margins[3], abs=1e-5)
    assert len(found_margins[3]) == len(rows)
    assert max(map(abs, found_margins[3])) > 1e-3
    assert_same(gradients, wanted_gradients)


class KeepGradients(TrainerCallback):  # type: ignore[misc]
    """The gradients of the first optimizer step, and what was logged."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        model = getattr(model, "module", model)
        self.gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.logs = dict(logs)


def train(kind: type[DPOTrainer], path: Path, pairs: list[dict[str, Any]], **settings: Any) -> KeepGradients:
    mixed = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}
    trainer = make_trainer(kind, path, True, pairs, **(settings if "loss_type" in settings else mixed | settings))
    move_away(trainer)
    kept = KeepGradients()
    trainer.add_callback(kept)
    trainer.train()
    return kept


METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_step_is_trls_step_on_all_its_pairs_whatever_the_micro_batches(policy: Path, micro_batch: int) -> None:
    wanted = train(DPOTrainer, policy, all_pairs())
    accumulation = math.ceil(len(CELLS) / micro_batch)
    found = train(
        GridTrainer,
        policy,
        all_pairs(),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=accumulation,
    )
    assert_same(found.gradients, wanted.gradients)
    assert [found.logs[one] for one in METRICS] == pytest.approx([wanted.logs[one] for one in METRICS], abs=1e-4)


def test_two_workers_take_trls_step_on_all_their_pairs(policy: Path, tmp_path: Path) -> None:
    wanted = train(DPOTrainer, policy, all_pairs())
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    context = multiprocessing.get_context("fork")  # the imports alone would take most of this test's time
    workers = [context.Process(target=_work, args=(rank, port, policy, tmp_path)) for rank in (0, 1)]
    for one in workers:
        one.start()
    for one in workers:
        one.join(timeout=120)
    assert [one.exitcode for one in workers] == [0, 0]
    assert_same(torch.load(tmp_path / "gradients.pt"), wanted.gradients)
    logs = json.loads((tmp_path / "logs.json").read_text(encoding="utf-8"))
    assert [logs[one] for one in METRICS] == pytest.approx([wanted.logs[one] for one in METRICS], abs=1e-4)


def _work(rank: int, port: int, policy: Path, folder: Path) -> None:
    """One of two workers: four ragged cells, one at a time."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    kept = train(GridTrainer, policy, all_pairs(), per_device_train_batch_size=1, gradient_accumulation_steps=2)
    if rank == 0:
        torch.save(kept.gradients, folder / "gradients.pt")
        (folder / "logs.json").write_text(json.dumps(kept.logs), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lora", [True, False])
def test_the_first_loss_is_ln_2(policy: Path, lora: bool) -> None:
    trainer = make_trainer(GridTrainer, policy, lora, all_pairs())
    loss, _ = measure(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_a_cells_log_probabilities_do_not_depend_on_its_batch(trainers: tuple[Any, Any]) -> None:
    trainer = trainers[1]
    cells = list(trainer.train_dataset)

    def log_probs(chosen: list[Any], **settings: Any) -> list[float]:
        with torch.no_grad():
            return grid.run_grid(trainer.model, collate(chosen, **settings))["log_probs"].sum(1).tolist()  # type: ignore[no-any-return]

    alone = [value for one in cells for value in log_probs([one])]
    assert log_probs(cells) == pytest.approx(alone, abs=1e-4)
    assert log_probs(cells, share_prompts=False) == pytest.approx(alone, abs=1e-4)


def test_pairs_without_cell_id_are_cells_of_their_own(policy: Path) -> None:
    pairs = [{name: value for name, value in one.items() if name != "cell_id"} for one in make_pairs("plain", 3)]
    trainer = make_trainer(GridTrainer, policy, True, pairs)
    move_away(trainer)
    reference = make_trainer(DPOTrainer, policy, True, pairs)
    move_away(reference)
    assert [len(one["prompts"]) for one in trainer.train_dataset] == [1] * 6
    wanted, wanted_gradients = measure(reference, reference.data_collator(list(reference.train_dataset)))
    found, gradients = measure(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert_same(gradients, wanted_gradients)


def test_plain_text_pairs_train(policy: Path) -> None:
    pairs = [{"prompt": f"Tell me {one}", "chosen": " about the sea", "rejected": " the town"} for one in range(4)]
    trainer = make_trainer(GridTrainer, policy, True, pairs, per_device_train_batch_size=2, max_steps=-1)
    assert trainer.train().global_step == 6


def test_each_distinct_sequence_is_run_once_for_the_reference_and_a_given_table_is_used(
    policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    original = GridTrainer._reference_logps
    monkeypatch.setattr(
        GridTrainer,
        "_reference_logps",
        lambda self, model, cells: (
            run.append(sum(len(one["answers"]) for one in cells)) or original(self, model, cells)
        ),
    )
    pairs = make_pairs("sea", 3)
    again = [one | {"cell_id": "again"} for one in pairs]
    trainer = make_trainer(GridTrainer, policy, True, pairs + again)
    assert run == [9]
    table = {name: value - 1 for name, value in trainer.reference.items()}
    cell = trainer.train_dataset[0]
    assert cell["ref_logps"][0] == trainer.reference[sequence_id(cell["prompts"][0], cell["answers"][0])]
    given = GridTrainer(
        model=str(policy),
        args=arguments(policy),
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(policy),
        reference=table,
    )
    assert run == [9]
    assert given.train_dataset[0]["ref_logps"] == pytest.approx([one - 1 for one in cell["ref_logps"]])


def test_a_whole_training_ends_with_trls_weights(policy: Path) -> None:
    """Six steps of one cell each, in the grid trainer's order, with AdamW, clipping and a schedule."""
    pairs = {name: make_pairs(name, 3) for name in "abcdef"}
    settings = {"learning_rate": 1e-3, "max_steps": 6, "max_grad_norm": 1.0}
    trainer = make_trainer(
        GridTrainer,
        policy,
        True,
        [pair for cell in pairs.values() for pair in cell],
        per_device_train_batch_size=1,
        **settings,
    )
    order = [sorted(pairs)[at] for at in trainer._get_train_sampler()]
    ordered = [one for name in order for one in pairs[name]]
    settings |= {"per_device_train_batch_size": 6, "train_sampling_strategy": "sequential"}
    reference = make_trainer(DPOTrainer, policy, True, ordered, **settings)
    trainer.train()
    reference.train()
    wanted = dict(reference.model.named_parameters())
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=1e-4)
    assert order != sorted(order)


def test_gradient_checkpointing_changes_nothing(policy: Path) -> None:
    plain, saved = (
        train(GridTrainer, policy, all_pairs(), gradient_checkpointing=one).gradients for one in (False, True)
    )
    assert_same(saved, plain)


def test_evaluation_is_a_mean_over_pairs_and_equals_trls(trainers: tuple[Any, Any]) -> None:
    for one in trainers:
        one.loss_types, one.loss_weights, one.label_smoothing = ["sigmoid"], [1.0], 0.0
        one.args.per_device_eval_batch_size = 1
    wanted, found = (one.evaluate(Dataset.from_list(all_pairs())) for one in trainers)
    names = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    assert [found[one] for one in names] == pytest.approx([wanted[one] for one in names], abs=1e-5)


def test_sequences_are_cut_as_trl_cuts_them() -> None:
    pairs = [{"prompt_ids": [1, 2, 3], "chosen_ids": [4, 5, 6], "rejected_ids": [4, 5, 7]}]
    (cell,) = make_cells(pairs, max_length=5)
    assert cell["answers"] == [[4, 5]]
    assert (cell["chosen"], cell["rejected"]) == ([0], [0])


def test_a_batch_has_no_padding_and_no_token_twice() -> None:
    tokens: Iterator[int] = iter(range(100))
    prompts = [[next(tokens) for _ in range(3)] for _ in range(2)]
    answers = [[next(tokens) for _ in range(length)] for length in (2, 5)]
    pairs = [
        {"cell_id": 0, "prompt_ids": prompts[i], "chosen_ids": answers[i], "rejected_ids": answers[1 - i]}
        for i in range(2)
    ]
    (cell,) = make_cells(pairs, None)
    batch = collate([cell])
    assert batch["input_ids"].shape == (1, cell["length"])
    assert batch["labels"].tolist() == [[*answers[0], *answers[1], *answers[1], *answers[0]]]
    assert cell["length"] == 2 * 2 + 2 * (2 + 5)


def test_the_sampler_sees_each_cell_once_sorted_within_random_steps() -> None:
    lengths = list(range(102))
    epoch = 0
    sampler = StepSampler(lengths, step=8, seed=1, epoch=lambda: epoch)
    first = list(sampler)
    steps = [first[at : at + 8] for at in range(0, 102, 8)]
    assert sorted(first) == lengths
    assert steps == [sorted(one) for one in steps]
    assert first == list(sampler)
    epoch = 1
    assert list(sampler) != first


@pytest.mark.parametrize("setting", [{"ld_alpha": 0.5}, {"truncation_mode": "keep_end"}])
def test_what_cannot_be_done_on_cells_is_refused(policy: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not supported"):
        make_trainer(GridTrainer, policy, True, make_pairs("sea", 2), **setting)


def test_token_metrics_are_trls(policy: Path) -> None:
    settings: dict[str, Any] = {"loss_type": "sigmoid"}
    wanted = train(DPOTrainer, policy, all_pairs(), **settings).logs
    found = train(GridTrainer, policy, all_pairs(), extra={"token_metrics": True}, **settings).logs
    names = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
    assert [found[one] for one in names] == pytest.approx([wanted[one] for one in names], abs=1e-4)
    assert not set(names) & set(train(GridTrainer, policy, all_pairs(), **settings).logs)


def test_a_resumed_training_ends_with_the_same_weights(policy: Path) -> None:
    pairs = [one for name in "abc" for one in make_pairs(name, 2)]
    settings: dict[str, Any] = {"per_device_train_batch_size": 1, "learning_rate": 1e-3, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer(GridTrainer, policy, True, pairs, **settings)
    whole.train()
    resumed = make_trainer(GridTrainer, policy, True, pairs, **settings)
    resumed.train(resume_from_checkpoint=str(policy / "out" / "checkpoint-4"))
    wanted = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)

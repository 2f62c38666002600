"""The grid trainer is TRL's trainer: same losses, margins and gradients on the same pairs, with fewer sequences."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from cpt_ray.config import PreferencesConfig
from cpt_ray.logprobs import model as logprobs
from cpt_ray.logprobs.grid import collate
from cpt_ray.logprobs.model import answer_logps, by_row, prepare_model, reference_kl, token_logps
from cpt_ray.logprobs.rows import Row, Tokeniser
from cpt_ray.training.pairs import TokenPair, preference_pairs
from cpt_ray.training.row_making import make_rows
from cpt_ray.training.steps import StepBatches, StepPlan
from cpt_ray.training.trl_trainer import UNMEASURED, GridTrainer, _LocalAccelerator
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


def token_pairs(path: Path, pairs: list[dict[str, Any]]) -> list[TokenPair]:
    tokeniser = Tokeniser(AutoTokenizer.from_pretrained(path), {})
    return [
        TokenPair(
            pair_id=str(at),
            twin_id=str(at),
            prompt_id=str(at),
            cell_id=one["cell_id"],
            prompt_ids=tokeniser.prompt(one["prompt"]),
            chosen_ids=tokeniser.answer(one["prompt"], one["chosen"]),
            rejected_ids=tokeniser.answer(one["prompt"], one["rejected"]),
        )
        for at, one in enumerate(pairs)
    ]


def with_reference(path: Path, pairs: Sequence[TokenPair], max_pairs: int = 64) -> list[Row]:
    """The pairs' rows, with what the untuned policy gives to them."""
    rows = make_rows(pairs, max_pairs)
    model = AutoModelForCausalLM.from_pretrained(path).eval().requires_grad_(False)
    prepare_model(model)
    for row, logps in zip(rows, answer_logps(model, rows, batch_pairs=8), strict=True):
        row["ref_logps"] = logps
    return rows


def arguments(folder: Path, **settings: Any) -> DPOConfig:
    given = {"per_device_train_batch_size": 64, "max_grad_norm": 0.0, "report_to": [], "save_strategy": "no"}
    given |= {"bf16": False, "use_cpu": True, "gradient_checkpointing": False, "beta": 0.1, "disable_tqdm": True}
    given |= {"max_steps": 1, "learning_rate": 0.0, "logging_steps": 1, "max_length": 500, "log_level": "error"}
    return DPOConfig(output_dir=str(folder / "out"), **(given | settings))


def make_trainer(
    kind: type[DPOTrainer],
    path: Path,
    lora: bool,
    pairs: list[dict[str, Any]],
    extra: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """TRL's trainer on pairs, or the grid trainer on their rows, one step per epoch unless `extra` says otherwise."""
    extra = extra or {}
    data: list[Any] = pairs
    if kind is GridTrainer:
        extra = {"step_pairs": 10**6} | extra
        data = pairs if "ref_logps" in pairs[0] else with_reference(path, token_pairs(path, pairs))
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
    return kind(
        model=str(path),
        args=arguments(path, **settings),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=config if lora else None,
        **extra,
    )


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

        owner = _LocalAccelerator if isinstance(trainer, GridTrainer) else trainer.accelerator
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
    wanted_margins, found_margins = margins(reference), margins(trainer)
    wanted, wanted_gradients = measure(reference, reference.data_collator(rows))
    batch = trainer.data_collator([one for one in trainer.train_dataset if one["cell_id"] in cells])
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
        self.model = model
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


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_a_step_is_trls_step_on_all_its_pairs_whatever_the_micro_batches(policy: Path, micro_batch: int) -> None:
    wanted = train(DPOTrainer, policy, all_pairs())
    found = train(GridTrainer, policy, all_pairs(), per_device_train_batch_size=micro_batch)
    assert_same(found.gradients, wanted.gradients)
    assert [found.logs[one] for one in METRICS] == pytest.approx([wanted.logs[one] for one in METRICS], abs=1e-4)
    assert set(wanted.logs) - set(found.logs) == set(UNMEASURED)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_take_trls_step_on_all_their_pairs(policy: Path, tmp_path: Path, sharding: str) -> None:
    wanted = train(DPOTrainer, policy, all_pairs())
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a fork of a process that has had threads may hang
    workers = [
        context.Process(target=_work, args=(rank, port, policy, tmp_path, sharding), daemon=True) for rank in (0, 1)
    ]
    for one in workers:
        one.start()
    for one in workers:
        one.join(timeout=120)
    assert [one.exitcode for one in workers] == [0, 0]
    assert_same(torch.load(tmp_path / "gradients.pt"), wanted.gradients)
    logs = json.loads((tmp_path / "logs.json").read_text(encoding="utf-8"))
    assert [logs[one] for one in METRICS] == pytest.approx([wanted.logs[one] for one in METRICS], abs=1e-4)


def _work(rank: int, port: int, policy: Path, folder: Path, sharding: str) -> None:
    """One of two workers, one or two rows at a time."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    how = {"distributed_config": {"fsdp_size": 2}} if sharding == "fsdp" else {}
    kept = train(GridTrainer, policy, all_pairs(), per_device_train_batch_size=1, model_init_kwargs=how)
    frozen = [one for one in kept.model.parameters() if not one.requires_grad]
    assert any(isinstance(one, DTensor) for one in frozen) is (sharding == "fsdp")
    if rank == 0:
        torch.save(kept.gradients, folder / "gradients.pt")
        (folder / "logs.json").write_text(json.dumps(kept.logs), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way, which is not what is tested


@pytest.mark.parametrize("lora", [True, False])
def test_the_first_loss_is_ln_2(policy: Path, lora: bool) -> None:
    trainer = make_trainer(GridTrainer, policy, lora, all_pairs())
    loss, _ = measure(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert loss == pytest.approx(math.log(2), abs=1e-5)


def test_a_rows_log_probabilities_do_not_depend_on_its_batch(trainers: tuple[Any, Any]) -> None:
    trainer = trainers[1]
    rows = list(trainer.train_dataset)

    def log_probs(chosen: list[Any]) -> list[float]:
        with torch.no_grad():
            return [logp for row in by_row(token_logps(trainer.model, collate(chosen)), chosen) for logp in row]

    alone = [value for one in rows for value in log_probs([one])]
    assert log_probs(rows) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("form", ["text", "messages", "no prompt"])
def test_any_preference_set_trains_as_trl_trains_it(policy: Path, tmp_path: Path, form: str) -> None:
    turns = ([{"role": "user", "content": f"Tell me about {at // 2}."}] for at in range(6))
    answers = [(f"The sea, {at} times.", "A hill.") for at in range(6)]
    if form == "text":
        pairs: list[dict[str, Any]] = [
            {"prompt": f"Tell me {at // 2}", "chosen": f" about the sea {at}", "rejected": " the town"}
            for at in range(6)
        ]
    else:
        both = [[[{"role": "assistant", "content": one}] for one in pair] for pair in answers]
        pairs = [{"prompt": turn, "chosen": one, "rejected": two} for turn, (one, two) in zip(turns, both, strict=True)]
    if form == "no prompt":
        pairs = [{name: one["prompt"] + one[name] for name in ("chosen", "rejected")} for one in pairs]
    source = tmp_path / "pairs.jsonl"
    source.write_text("\n".join(json.dumps(one) for one in pairs), encoding="utf-8")
    tokeniser = Tokeniser(AutoTokenizer.from_pretrained(policy), {})
    rows: list[Any] = with_reference(policy, preference_pairs(PreferencesConfig(source=str(source)), tokeniser))
    assert [len(one["chosen"]) for one in rows] == [2, 2, 2]
    trainer, reference = (
        make_trainer(*one) for one in ((GridTrainer, policy, True, rows), (DPOTrainer, policy, True, pairs))
    )
    move_away(trainer)
    move_away(reference)
    wanted, wanted_gradients = measure(reference, reference.data_collator(list(reference.train_dataset)))
    found, gradients = measure(trainer, trainer.data_collator(list(trainer.train_dataset)))
    assert found == pytest.approx(wanted, abs=1e-5)
    assert_same(gradients, wanted_gradients)


def test_a_whole_training_ends_with_trls_weights(policy: Path) -> None:
    """Six steps of one pair each, in the grid trainer's order, with AdamW, clipping and a schedule."""
    pairs = [one for cell in "abc" for one in make_pairs(cell, 2)]
    settings = {"learning_rate": 1e-3, "max_steps": 6, "max_grad_norm": 1.0, "per_device_train_batch_size": 1}
    trainer = make_trainer(GridTrainer, policy, True, pairs, {"step_pairs": 1}, **settings)
    order = [row for batch in trainer.get_train_dataloader().batch_sampler for row in batch]
    ordered = [pairs[row] for row in order]
    settings |= {"train_sampling_strategy": "sequential"}
    reference = make_trainer(DPOTrainer, policy, True, ordered, **settings)
    trainer.train()
    reference.train()
    wanted = dict(reference.model.named_parameters())
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=1e-4)
    assert sorted(order) == list(range(6)) != order


def test_gradient_checkpointing_changes_nothing(policy: Path) -> None:
    plain, saved = (
        train(GridTrainer, policy, all_pairs(), gradient_checkpointing=one).gradients for one in (False, True)
    )
    assert_same(saved, plain)


def test_evaluation_is_a_mean_over_pairs_and_equals_trls(policy: Path, trainers: tuple[Any, Any]) -> None:
    for one in trainers:
        one.loss_types, one.loss_weights, one.label_smoothing = ["sigmoid"], [1.0], 0.0
    trainers[0].args.per_device_eval_batch_size = 1
    trainers[1].args.per_device_train_batch_size = 4
    trainers[1].eval_dataset = trainers[1].train_dataset
    wanted, found = trainers[0].evaluate(Dataset.from_list(all_pairs())), trainers[1].evaluate()
    names = ("eval_loss", "eval_rewards/margins", "eval_rewards/accuracies")
    assert [found[one] for one in names] == pytest.approx([wanted[one] for one in names], abs=1e-5)
    assert found["eval_pair_accuracy"] == pytest.approx(wanted["eval_rewards/accuracies"])


def test_kl_is_that_of_the_whole_vocabulary_at_every_answer_token(
    trainers: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, rows = trainers[1], list(trainers[1].train_dataset)
    monkeypatch.setattr(logprobs, "KL_TOKENS", 10**6)

    def logps(row: Any, answer: list[int]) -> torch.Tensor:
        ids = torch.tensor([row["prompt"] + answer])
        with torch.no_grad():
            found: torch.Tensor = trainer.model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        return found

    if not isinstance(trainer.model, PeftModel):
        trainer.eval_dataset = trainer.train_dataset
        assert "eval_kl" not in trainer.evaluate()
        return
    found = reference_kl(trainer.model, collate(rows))
    terms = []
    for row in rows:
        for answer in row["answers"]:
            tuned = logps(row, answer)
            with trainer.model.disable_adapter():
                terms.append((tuned.exp() * (tuned - logps(row, answer))).sum(-1))
    assert found == pytest.approx(torch.cat(terms).mean().item(), rel=1e-4)
    assert found > 1e-3
    trainer.eval_dataset = trainer.train_dataset
    assert trainer.evaluate()["eval_kl"] == pytest.approx(found, rel=0.5)  # there, batches count by their pairs


def test_a_batch_has_no_padding_and_no_token_twice() -> None:
    tokens: Iterator[int] = iter(range(100))
    prompts = [[next(tokens) for _ in range(3)] for _ in range(2)]
    answers = [[next(tokens) for _ in range(length)] for length in (2, 5)]
    both = [answers[0], answers[1]]
    rows: Any = [
        {"prompt": prompt, "answers": both, "chosen": [0], "rejected": [1], "ref_logps": []} for prompt in prompts
    ]
    batch = collate(rows)
    assert batch["input_ids"].shape == (1, 2 * 2 + 2 * (2 + 5))
    assert batch["labels"].tolist() == [[*answers[0], *answers[1], *answers[0], *answers[1]]]
    assert (batch["chosen"].tolist(), batch["rejected"].tolist()) == ([0, 2], [1, 3])


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_steps_are_the_same_for_any_number_of_workers_and_hold_each_row_once(num_workers: int) -> None:
    rows: Any = [{"cell_id": str(at // 3), "prompt": [0] * at, "answers": [[0]]} for at in range(102)]

    def steps(workers: int, epoch: int = 0) -> list[list[int]]:
        plan = StepPlan.make([2] * 102, step_pairs=16, batch_pairs=4, num_workers=workers)
        assert plan.num_steps == 12
        each = [list(StepBatches(rows, plan, rank, workers, 1, lambda: epoch)) for rank in range(workers)]
        assert all(0 < len(batch) <= 3 for one in each for batch in one)
        size = plan.num_batches
        return [
            sorted(row for one in each for batch in one[at : at + size] for row in batch)
            for at in range(0, 12 * size, size)
        ]

    found = steps(num_workers)
    assert sorted(row for step in found for row in step) == list(range(102))
    assert {len(step) for step in found} == {8, 9}
    assert found == steps(1)
    assert found != steps(num_workers, epoch=1)
    split = [cell for cell in range(34) if sum(3 * cell in step or 3 * cell + 2 in step for step in found) > 1]
    assert len(split) <= 11  # by one of the cuts between 12 steps


def test_too_few_rows_for_the_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for 3 workers"):
        StepPlan.make([4] * 4, step_pairs=8, batch_pairs=4, num_workers=3)


@pytest.mark.filterwarnings("ignore:The following .* keys did not match")  # peft's, of its own conversion
@pytest.mark.parametrize("lora", [True, False])
def test_a_mixture_of_experts_has_trls_losses(tmp_path: Path, lora: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "head_dim": 16}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 4}
    torch.manual_seed(0)
    config = Qwen3MoeConfig(vocab_size=len(tokenizer), num_experts_per_tok=2, **sizes, **counts)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    losses = []
    for kind in (DPOTrainer, GridTrainer):
        settings = {"learning_rate": 1e-3, "max_steps": 3}
        settings |= {"router_aux_loss_coef": 0.0} if kind is DPOTrainer else {}
        trainer = make_trainer(kind, tmp_path, lora, make_pairs("sea", 3), **settings)
        trainer.train()
        losses.append([one["loss"] for one in trainer.state.log_history if "loss" in one])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert losses[0][2] < losses[0][0]


def test_a_resumed_training_ends_with_the_same_weights(policy: Path) -> None:
    pairs = [one for name in "abc" for one in make_pairs(name, 2)]
    settings: dict[str, Any] = {"per_device_train_batch_size": 1, "learning_rate": 1e-3, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    whole, resumed = (make_trainer(GridTrainer, policy, True, pairs, {"step_pairs": 2}, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(policy / "out" / "checkpoint-4"))
    wanted = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)

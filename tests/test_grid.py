"""The grid trainer is TRL's trainer: same losses, margins and gradients on the same pairs, with fewer sequences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import DPOTrainer

from cpt_ray.config import PreferencesConfig
from cpt_ray.logprobs import model as logprobs
from cpt_ray.logprobs.grid import collate
from cpt_ray.logprobs.model import by_row, reference_kl, token_logps
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.training.pairs import preference_pairs
from cpt_ray.training.trl_trainer import GridTrainer, _LocalAccelerator
from tests.tiny_model import make_tiny_model
from tests.trl_trainers import all_pairs, assert_same, make_pairs, make_trainer, measure, move_away, with_reference

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

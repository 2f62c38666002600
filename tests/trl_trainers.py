"""TRL's trainer and the grid trainer on the same pairs, and what is compared of the two; for tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from cpt_ray.logprobs.model import answer_logps, prepare_model
from cpt_ray.logprobs.rows import Row, Tokeniser
from cpt_ray.training.pairs import TokenPair
from cpt_ray.training.row_making import make_rows
from cpt_ray.training.trl_trainer import GridTrainer
from tests.tiny_model import SENTENCES

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

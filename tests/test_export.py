"""What a training exports: weights that learned something, are finite and near the policy's own, or nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.config import LoraConfig, TrainConfig
from cpt_ray.errors import UserError
from cpt_ray.logprobs.rows import rows_path, write_rows
from cpt_ray.tables.rundir import CATALOG_FILE, MODEL_INFO_FILE, RunDir
from cpt_ray.training.checks import peft_config
from cpt_ray.training.export import export
from cpt_ray.training.row_making import make_rows
from tests.tiny_model import make_tiny_model
from tests.trainings import make_tokens


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str, float], Path]:
    """Makes a checkpoint of an adapter whose every B has the given value, on a policy of the given dtype."""

    def make(dtype: str, value: float) -> Path:
        import torch
        from peft import get_peft_model
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(make_tiny_model(tmp_path / "policy", dtype=dtype))
        adapted = get_peft_model(model, peft_config(LoraConfig()))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(weight, value)
        adapted.save_pretrained(tmp_path / "checkpoint")
        write_rows(RunDir(tmp_path / "run"), "rows", make_rows(make_tokens("a"), 4))
        return tmp_path / "checkpoint"

    return make


def exported(tmp_path: Path, checkpoint: Path) -> dict[str, Any]:
    run = RunDir(tmp_path / "run")
    return export(TrainConfig(), run, str(tmp_path / "policy"), str(rows_path(run, "rows")), checkpoint)


@pytest.mark.parametrize(
    ("dtype", "value", "problem"),
    [
        ("float32", 0.0, "the policy's own in 14 of 14 trained tensors: nothing was learned; train longer"),
        ("bfloat16", 1e-9, r"the policy's own in \d+ of 14 trained tensors: bfloat16 keeps \d% of what was learned"),
        ("float32", math.nan, r"the merged weights are not finite"),
        ("float16", 1e6, "not finite|changed by over 10 times"),
        ("float32", 100.0, "the weights changed by over 10 times their own size"),
    ],
)
def test_weights_that_are_the_policys_or_no_numbers_are_not_exported(
    checkpoint: Callable[[str, float], Path], tmp_path: Path, dtype: str, value: float, problem: str
) -> None:
    made = checkpoint(dtype, value)
    with pytest.raises(UserError, match=problem):
        exported(tmp_path, made)
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_what_marks_a_model_and_an_adapter_as_complete_is_gone_before_the_first_file_is_replaced(
    checkpoint: Callable[[str, float], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, weights = RunDir(tmp_path / "run"), checkpoint("bfloat16", 0.01)
    marks = [MODEL_INFO_FILE, f"adapter/{CATALOG_FILE}"]
    for mark in marks:
        run.write_json(mark, {})

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cpt_ray.training.export._replacing_folder", stopped)
    with pytest.raises(KeyboardInterrupt):
        exported(tmp_path, weights)
    assert [run.read_json(mark) for mark in marks] == [None, None]


def test_what_is_exported_is_measured_against_what_was_learned(
    checkpoint: Callable[[str, float], Path], tmp_path: Path
) -> None:
    made = exported(tmp_path, checkpoint("bfloat16", 0.01))
    assert (made["dtype"], made["trained"], made["unchanged"]) == ("bfloat16", 14, 0)
    assert 0.9 < made["kept_share"] < 1.1

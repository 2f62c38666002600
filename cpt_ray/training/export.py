"""From a training's last checkpoint to the weights that are served: merged, checked, and only then put in place."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cpt_ray.config import TrainConfig
from cpt_ray.errors import UserError, first_line
from cpt_ray.tables.rundir import CATALOG_FILE, MODEL_INFO_FILE, RunDir
from cpt_ray.tables.store_path import AnyPath, StorePath, path_of, readable, remove_tree

PROBE_TOKENS = 64
"""Tokens of a training row on which the exported weights are tried."""
MOST_GROWTH = 10
"""How far weights may move, in units of their own size; a model whose weights moved further gives nonsense."""
LEAST_KEPT = 0.1
"""Least share of the learned change that the exported weights must hold; with less, they are the base's."""


@dataclass
class _Change:
    """How far the exported weights differ from the policy's, against how far they were meant to."""

    kept: float = 0.0
    """Sum over weights of the actual times the intended change."""
    intended: float = 0.0
    """Sum of the intended change's squares."""
    size: float = 0.0
    """Sum of the squares of the policy's weights."""
    trained: int = 0
    """Tensors."""
    unchanged: int = 0

    def add(self, before: Any, after: Any, intended: Any) -> None:
        """One tensor's part; `before` and `after` in the exported dtype, `intended` in float32."""
        moved = after.float() - before.float()
        self.kept += float((moved * intended).sum())
        self.intended += float(intended.square().sum())
        self.size += float(before.float().square().sum())
        self.trained += 1
        self.unchanged += not bool(moved.any())

    @property
    def share(self) -> float:
        """1 if all of the intended change is there; rounding loses what is smaller than a step of the dtype."""
        return self.kept / self.intended if self.intended else 0.0


def export(settings: TrainConfig, run: RunDir, policy: str, rows: str, checkpoint: Path) -> dict[str, Any]:
    """`run.adapter` and `run.model` from a checkpoint, in the policy's own dtype, without what marks them as complete.

    UserError, and nothing is written, if the exported weights are (as good as) the policy's own, or are not finite, or
    give no finite probabilities on a training row.

    Returns:
        dtype, kept_share (of the change that was learned), trained and unchanged (numbers of tensors).
    """
    from transformers import AutoTokenizer

    change = _Change()
    model = (_merged if settings.lora else _whole)(policy, checkpoint, change)
    dtype = str(model.dtype).removeprefix("torch.")
    _check_finite(model, rows)
    if not change.intended <= MOST_GROWTH**2 * change.size:
        raise UserError(f"the weights changed by over {MOST_GROWTH} times their own size; {DIVERGED}")
    if change.share < LEAST_KEPT:
        why = f"{dtype} keeps {change.share:.0%} of what was learned" if change.intended else "nothing was learned"
        raise UserError(
            f"the exported weights are the policy's own in {change.unchanged} of {change.trained} trained tensors: "
            f"{why}; train longer, or with a higher train.learning_rate{' (' + ADAPTER + ')' if settings.lora else ''}"
        )
    for mark in (run.path / MODEL_INFO_FILE, run.adapter / CATALOG_FILE):  # the driver puts them when all is there
        mark.unlink(missing_ok=True)
    if settings.lora:
        with _replacing_folder(run, run.adapter) as folder:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                shutil.copy(checkpoint / name, folder)
    else:
        remove_tree(run.adapter)
    with _replacing_folder(run, run.model) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(policy).save_pretrained(folder)
    return {"dtype": dtype, "kept_share": change.share, "trained": change.trained, "unchanged": change.unchanged}


def _merged(policy: str, checkpoint: Path, change: _Change) -> Any:
    """The policy with the checkpoint's adapter in its weights."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    from cpt_ray.logprobs.model import load_policy

    model = PeftModel.from_pretrained(load_policy(policy, dtype="auto", device_map=None), str(checkpoint))
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):  # one at a time: the memory of all weights twice is not needed
            before = layer.get_base_layer().weight.detach().clone()
            intended = layer.get_delta_weight(layer.active_adapters[0]).detach().float()
            try:
                layer.merge(safe_merge=True)
            except ValueError as error:  # raised by PEFT if they are not finite
                raise UserError(f"the merged weights are not finite ({first_line(error)}); {DIVERGED}") from None
            change.add(before, layer.get_base_layer().weight.detach(), intended)
    return model.unload()


def _whole(policy: str, checkpoint: Path, change: _Change) -> Any:
    """The checkpoint's weights, which were all trained, in the policy's dtype."""
    import torch

    from cpt_ray.logprobs.model import load_policy

    untuned = load_policy(policy, dtype="auto", device_map=None)
    model = load_policy(str(checkpoint), dtype=torch.float32, device_map=None)
    before = dict(untuned.named_parameters())
    for name, weight in model.named_parameters():
        intended = weight.detach() - before[name].detach().float()
        change.add(before[name].detach(), weight.detach().to(untuned.dtype), intended)
    return model.to(untuned.dtype)


ADAPTER = "the adapter itself is whole, in the last checkpoint"
DIVERGED = "training has diverged; lower train.learning_rate"


def _check_finite(model: Any, rows: str) -> None:
    """UserError if a weight is not a finite number, or a training row's tokens have no finite probabilities."""
    import torch

    wrong = [name for name, weight in model.named_parameters() if not bool(torch.isfinite(weight).all())]
    if wrong:
        raise UserError(f"{len(wrong)} exported tensors are not finite, the first is {wrong[0]}; {DIVERGED}")
    row = next(pq.ParquetFile(readable(path_of(rows))).iter_batches(batch_size=1)).to_pylist()[0]
    ids = torch.tensor([[*row["prompt"], *row["answers"][0]][:PROBE_TOKENS]])
    with torch.no_grad():
        is_finite = bool(torch.isfinite(model.eval()(ids).logits).all())
    if not is_finite:
        raise UserError(f"the exported weights give no finite probabilities in {model.dtype}; {DIVERGED}")


def empty_folder(path: Path) -> Path:
    """The folder, made anew."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


@contextmanager
def _replacing_folder(run: RunDir, final: AnyPath) -> Iterator[Path]:
    """A folder to write to that then takes the place of `final`.

    By renaming, so that a folder of that name is always complete; in an object store file by file, where
    MODEL_INFO_FILE and the adapter's CATALOG_FILE, which are not there meanwhile, tell the same.
    """
    if isinstance(final, StorePath):
        with tempfile.TemporaryDirectory(prefix="cpt-export-") as folder:
            yield Path(folder)
            final.upload(Path(folder))
        return
    temporary = run.temporary_folder(final)
    assert isinstance(temporary, Path)
    yield empty_folder(temporary)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)

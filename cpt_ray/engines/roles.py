"""The roles of a run file on this machine: GGUF files converted, and the dtype of engines on CPUs chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel

from cpt_ray import gguf_model
from cpt_ray.config import ModelConfig, TuneConfig
from cpt_ray.console import say
from cpt_ray.errors import UserError, shown
from cpt_ray.tables.rundir import RUN_INFO_FILE, RunDir

CPU_DTYPE = "cpu_dtype"
"""Key in run.yaml of the dtype that the run's engines on CPUs have where the run file gives none."""
CpuDtype = Literal["bfloat16", "float32"]
Config = TypeVar("Config", bound=TuneConfig)


def roles_of(config: TuneConfig) -> dict[str, ModelConfig]:
    """Every model role, by its name in the run file."""
    roles: dict[str, ModelConfig] = {}

    def add(name: str, role: ModelConfig) -> ModelConfig:
        roles[name] = role
        return role

    _mapped(config, add)
    return roles


def _mapped(value: Any, change: Callable[[str, ModelConfig], ModelConfig], name: str = "") -> Any:
    """A section, with what `change` makes of each model role in it."""
    if isinstance(value, ModelConfig):
        return change(name, value)
    if isinstance(value, tuple):
        items = tuple(_mapped(inner, change, f"{name}[{at}]") for at, inner in enumerate(value))
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if not isinstance(value, BaseModel):
        return value
    prefix = f"{name}." if name else ""
    fields = {field: getattr(value, field) for field in type(value).model_fields}
    changed = {field: _mapped(inner, change, prefix + field) for field, inner in fields.items()}
    return value.model_copy(update={field: new for field, new in changed.items() if new is not fields[field]})


def convert_models(roles: Mapping[str, ModelConfig]) -> None:
    """Converts what GGUF files there are, once each; UserError for the first that is no model."""
    done: set[str] = set()
    for name, role in roles.items():
        try:
            if role.gguf and role.gguf not in done:
                _convert(role.gguf)
            _check_folder(role)
        except UserError as error:
            raise UserError(f"{name}.model: {error}") from error.__cause__
        done.add(role.gguf)


def is_here(role: ModelConfig) -> bool:
    """Whether the model can be opened without copying it from a store or converting its GGUF first."""
    return not role.is_stored and (not role.gguf or gguf_model.is_converted(role.gguf))


def _convert(name: str) -> None:
    is_kept = gguf_model.is_converted(name)
    folder = gguf_model.converted(name)
    if is_kept:
        say(f"model: {name}: converted before, in {folder}")


def _check_folder(role: ModelConfig) -> None:
    """UserError for a folder of GGUF files: it is one of them that is meant."""
    folder = Path(role.model)
    if role.endpoint or not folder.is_dir() or (folder / "config.json").exists():
        return
    if files := sorted(folder.glob("*.gguf")):
        more = f" (one of {len(files)} there)" if len(files) > 1 else ""
        raise UserError(f"{folder}: has no config.json but GGUF files; give the file: {files[0]}{more}")


def with_dtype(config: Config, run: RunDir, report: Callable[[str], object] = say) -> tuple[Config, CpuDtype | None]:
    """The config with a dtype for every engine and training on a CPU that has none, and that dtype, for run.yaml.

    It is chosen when a run begins and kept: on another CPU the run goes on with the same one, because another precision
    gives other answers. None if no engine and no training ever needed one.

    Args:
        report: gets a line on it where it is chosen now, or is not what this machine would choose.
    """
    kept = _kept(run)
    trains_here = config.train.dtype is None and not config.train.use_gpu
    if not trains_here and not any(_needs_dtype(role) for role in roles_of(config).values()):
        return config, kept
    fast: CpuDtype = "bfloat16" if computes_bfloat16() else "float32"
    dtype = kept or fast
    if kept is None:
        why = "computes in bfloat16" if fast == "bfloat16" else "has no instructions for bfloat16"
        report(f"dtype        {dtype}, since the run file gives none and this CPU {why}")
    elif kept != fast:
        report(f"dtype        {kept}, as this run began (a new one here would have {fast})")

    def fill(_name: str, role: ModelConfig) -> ModelConfig:
        return role.model_copy(update={"engine": {**role.engine, "dtype": dtype}}) if _needs_dtype(role) else role

    changed: Config = _mapped(config, fill)
    if trains_here:
        changed = changed.model_copy(update={"train": changed.train.model_copy(update={"dtype": dtype})})
    return changed, dtype


def _needs_dtype(role: ModelConfig) -> bool:
    return role.endpoint is None and role.num_gpus == 0 and role.engine.get("dtype") is None


def _kept(run: RunDir) -> CpuDtype | None:
    run_file = run.read_yaml(RUN_INFO_FILE)
    kept = run_file.get(CPU_DTYPE) if isinstance(run_file, dict) else None
    if kept is not None and kept not in get_args(CpuDtype):
        raise UserError(f"{run.path}/run.yaml: {CPU_DTYPE}: found {shown(kept)}; expected bfloat16 or float32")
    return kept


def computes_bfloat16(cpu: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this machine's CPU multiplies bfloat16 itself (AVX512-BF16, AMX-BF16, or BF16 of Arm).

    With it vLLM is about twice as fast in bfloat16 as in float32, without it four times slower. Read from the kernel's
    list, since torch, which knows as well, takes seconds to import.
    """
    try:
        text = cpu.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return flags is not None and not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags[1].split())

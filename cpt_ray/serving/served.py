"""What is served: checked before anything starts, and sent to the replicas."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.engines.vllm import check_template
from cpt_ray.engines.waiting import Pulse
from cpt_ray.errors import UserError, kind_of
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.serving.keys import Key
from cpt_ray.steering.inference import Candidates, make_candidates
from cpt_ray.tables.node_cache import local_copy
from cpt_ray.tables.rundir import CATALOG_FILE, MODEL_INFO_FILE, RunDir
from cpt_ray.tables.store_path import AnyPath, StorePath

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as max_lora_rank."""

if TYPE_CHECKING:  # torch, which it imports, takes seconds
    from cpt_ray.serving.conditioning import ConditionerSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """All that a replica is given."""

    model: ModelConfig
    name: str
    """The name of the engine's own model: the tuned one or, with adapters, the one that they change."""
    catalogs: dict[str, Catalog]
    """What each served model can be asked for, the default model first."""
    adapters: dict[str, str]
    """Name to folder or URI."""
    frontend: dict[str, Any]
    """Arguments of vLLM's OpenAI server."""
    run: RunDir
    fixed_keys: tuple[Key, ...] | None
    """Keys beside those of the run directory; None lets everyone in."""
    listing_extras: dict[str, Any]
    """Fields of `GET /v1/configurations` beside the catalog's."""
    untuned: dict[str, str] | None
    """Name of the untuned model, and its path behind the run's own, where it is an application of its own; or None."""
    candidates: Candidates | None
    """What preferences are inferred among; None: there are no preferences."""
    conditioning: ConditionerSettings | None = None
    """How users' adapters are made, where these and not directives steer; None: directives do."""
    pulse: Pulse | None = None
    """Where a replica that starts says that it gets on."""


def plan_serving(config: RunConfig, run: RunDir, model: AnyPath) -> Served:
    """What is served, checked as far as can be without starting it."""
    serve = config.serve
    name = untuned_name(config) if serve.adapters else config.name
    policy, data = _over_base(config) if serve.adapters else _tuned(config, run, model)
    conditioning = None if serve.preferences == "directive" else _plan_conditioning(config, run, policy)
    if template := serve.frontend.get("chat_template"):  # the model's own is one that it was tuned with
        check_template(policy, str(template))
    catalogs = {key: Catalog.from_json(entries).with_saved(serve.configurations) for key, entries in data.items()}
    base = None
    if serve.adapters:  # what is under the adapters is the untuned model, at this same address
        base = {"path": "", "model": name}
    elif serve.base:
        base = {"path": "/base", "model": untuned_name(config)}
    return Served(
        model=policy.model_copy(update={"engine": _evaluated_sampling(policy) | policy.engine}),
        name=name,
        catalogs=catalogs,
        adapters=dict(serve.adapters),
        frontend=dict(serve.frontend),
        run=run,
        fixed_keys=None,
        listing_extras={"model": next(iter(catalogs)), "base": base},
        untuned=None if serve.adapters else base,
        candidates=None if serve.adapters else make_candidates(config, catalogs[name], policy),
        conditioning=conditioning,
    )


def untuned_name(config: RunConfig) -> str:
    """Of the untuned model, and of its application where it has one."""
    return f"{config.name}-base"


def _tuned(config: RunConfig, run: RunDir, model: AnyPath) -> tuple[ModelConfig, dict[str, Any]]:
    """The tuned model and its catalog, by name."""
    if not (model / "config.json").exists():
        raise UserError(f"{model}: no model here; run `cpt train RUN_FILE` first")
    check_whole(run, str(model), model)
    catalog = _read_json(run.path / CATALOG_FILE, "run `cpt train RUN_FILE` first")
    return config.policy.model_copy(update={"model": str(model)}), {config.name: catalog}


def check_whole(run: RunDir, model: str, place: AnyPath) -> None:
    """UserError if `model` is the run's own in an object store and `place`, it or a copy of it, is not all of it.

    A training replaces its files there one by one. MODEL_INFO_FILE, which is removed first and put last, tells.
    """
    is_stored = isinstance(run.model, StorePath) and model == str(run.model)
    if is_stored and not (place / Path(MODEL_INFO_FILE).name).is_file():
        raise UserError(
            f"{model}: the model is not complete; a training is putting it there, or was stopped while it did; wait "
            "for it, or run `cpt train RUN_FILE` again"
        )


def _over_base(config: RunConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """The model under `serve.adapters`, and the catalog of each."""
    folders = {name: local_copy(where) for name, where in config.serve.adapters.items()}
    highest = max(_rank(name, folder) for name, folder in folders.items())
    rank = next((rank for rank in LORA_RANKS if rank >= highest), highest)
    lora = {"enable_lora": True, "max_loras": len(folders), "max_lora_rank": rank}
    catalogs = {name: _read_json(folder / CATALOG_FILE, _of_adapter(name)) for name, folder in folders.items()}
    return config.policy.model_copy(update={"engine": lora | config.policy.engine}), catalogs


def _plan_conditioning(config: RunConfig, run: RunDir, policy: ModelConfig) -> ConditionerSettings:
    from cpt_ray.serving.conditioning import FORM, ConditionerSettings
    from cpt_ray.steering.policy import SavedForm

    if config.serve.adapters:
        raise UserError("serve.preferences: only directives are offered beside serve.adapters; leave one out")
    embedder = config.steer.embedder or policy
    return ConditionerSettings(saved=SavedForm.read(run, FORM, policy, embedder), embedder=embedder)


def _evaluated_sampling(policy: ModelConfig) -> dict[str, Any]:
    """Engine arguments that make a request which says nothing of sampling get what evaluation measured.

    Without stop texts, which are no engine argument (`wrapped_generate` adds them), and without `max_tokens`, which
    vLLM would take as a limit for those who ask for more.
    """
    neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    asked = {"temperature": policy.sampling.temperature, "top_p": policy.sampling.top_p}
    return {"override_generation_config": {**neutral, **asked, "max_new_tokens": None}}


def _of_adapter(name: str) -> str:
    return f"serve.adapters.{name} takes the folder adapter/ of a run that is trained"


def _rank(name: str, folder: Path) -> int:
    """The rank of an adapter; UserError if its configuration has none."""
    path = folder / "adapter_config.json"
    rank = _read_json(path, _of_adapter(name)).get("r")
    if not isinstance(rank, int):
        raise UserError(f"{path}: no rank `r` there; {_of_adapter(name)}")
    return rank


def _read_json(path: AnyPath, remedy: str) -> Any:
    """The object in a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = "not there" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise UserError(f"{path}: {what}; {remedy}") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); {remedy}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {kind_of(data)}; {remedy}")
    return data

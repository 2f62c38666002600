"""Model cards, and where a tuned model goes: a folder, or the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpt_ray.config import PreferenceRunConfig, RunConfig, TuneConfig
from cpt_ray.console import say
from cpt_ray.errors import UserError, first_line
from cpt_ray.tables.rundir import MARK, RunDir

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

HUB = "hf://"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""Of a model; the Hub refuses a card whose `base_model` is none, such as a folder."""
CARD = """---
{base_line}library_name: {library}
pipeline_tag: text-generation
tags: [trl, dpo, configurable-preference-tuning]
---

# {name}

{what} It was tuned by DPO on {pairs} preference pairs ({steps} steps) with `cpt_ray`.

## Lineage

| | |
|---|---|
| tuned from | `{base}` (content {identity}) |
| pairs | {source} |
| held out | {held_out} |
| settings | `{settings}` |
| seed | {seed} |
| software | {software} |

## Measured while training

Loss {first_loss:.3f} at the first step, {last_loss:.3f} over the last tenth of the steps.

{metrics}
"""


def write_cards(config: TuneConfig, run: RunDir, summary: dict[str, Any]) -> None:
    """README.md beside the weights and beside the adapter."""
    measured = summary["held_out"][-1] if summary["held_out"] else {}
    held = f"whole prompts, never trained on; run.yaml in the run `{config.name}` has the hashes of all inputs"
    table = "\n".join(f"| {name} | {value:.3f} |" for name, value in sorted(measured.items()) if name != "step")
    metrics = f"On held-out prompts:\n\n| | |\n|---|---|\n{table}" if table else "Nothing was held out."
    own = f"table `pairs` of the run `{config.name}`, from the rubrics {', '.join(getattr(config, 'rubrics', ()))}"
    is_on_hub = not Path(config.policy.path).exists() and HUB_NAME.fullmatch(config.policy.model)
    fields = {
        "base": config.policy.model,
        "base_line": f"base_model: {config.policy.model}\n" if is_on_hub else "",
        "name": config.name,
        "identity": config.policy.identity,
        "source": f"`{config.preferences.source}`" if isinstance(config, PreferenceRunConfig) else own,
        "held_out": held if measured else "nothing",
        "settings": json.dumps(config.train.model_dump(mode="json", exclude_none=True)),
        "seed": config.seed,
        "software": ", ".join(f"{one} {version(one)}" for one in ("ray", "torch", "transformers", "trl", "peft")),
        "metrics": metrics,
        **{name: summary[name] for name in ("pairs", "steps", "first_loss", "last_loss")},
    }
    purpose = "A short system prompt, a *directive*, sets how it answers." if isinstance(config, RunConfig) else ""
    what = f"A language model tuned to preferences. {purpose}".strip()
    run.write_text("model/README.md", CARD.format(**fields, what=what, library="transformers"))
    if run.adapter.exists():
        note = f"A LoRA adapter for `{config.policy.model}`. {purpose}".strip()
        run.write_text("adapter/README.md", CARD.format(**fields, what=note, library="peft"))


def _refused(error: HfHubHTTPError | OSError) -> str:
    """What the Hub said, and what to do if it is about who asks."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or first_line(error)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub said no ({said}); log in with `hf auth login` as somebody who may write there"
    return f"not pushed ({said}); the same command tries again" if status is None else f"the Hub said no: {said}"


def push(run: RunDir, target: str) -> None:
    """The tuned model, its card, and its adapter in `adapter/`, to a folder or to hf://OWNER/NAME (made private)."""
    parts = {"": run.model} | ({"adapter": run.adapter} if run.adapter.exists() else {})
    if not (run.path / MARK).exists():
        found = "the tuned model is not complete" if run.model.exists() else "there is no tuned model"
        raise UserError(f"{run.model}: {found}; run `cpt train` with this run file first")
    if not target.startswith(HUB):
        folder = Path(target)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is not an empty folder; give another one, or {HUB}OWNER/NAME for the Hub")
        for name, source in parts.items():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        say(f"pushed       {folder}")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api, name = HfApi(), target.removeprefix(HUB)
    try:
        api.create_repo(name, private=True, exist_ok=True)
        for inside, source in parts.items():
            api.upload_folder(repo_id=name, folder_path=source, path_in_repo=inside or None)
    except HFValidationError as error:
        raise UserError(f"{target}: no name for a repository ({first_line(error)}); give {HUB}OWNER/NAME") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{target}: {_refused(error)}") from None
    say(f"pushed       {target}")

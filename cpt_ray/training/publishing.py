"""Model cards, and where a tuned model goes: a folder, or the Hugging Face Hub."""

from __future__ import annotations

import json
import re
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cpt_ray.config import PreferenceRunConfig, RunConfig, TuneConfig
from cpt_ray.console import say
from cpt_ray.errors import UserError, first_line
from cpt_ray.tables.node_cache import local_copy
from cpt_ray.tables.rundir import MODEL_INFO_FILE, RunDir
from cpt_ray.tables.store_path import StorePath, path_of

HUB = "hf://"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
"""Of a model; the Hub refuses a card whose `base_model` is none, such as a folder."""
TAGS = ["trl", "dpo", "configurable-preference-tuning"]
PACKAGES = ("ray", "torch", "transformers", "trl", "peft")
"""Named in a card with their versions."""
CARD = """---
{{ card_data }}
---

# {{ config.name }}

{{ what }} It was tuned by DPO on {{ pairs }} preference pairs ({{ steps }} steps) with `cpt_ray`.

## Lineage

| | |
|---|---|
| tuned from | `{{ config.policy.model }}` (content {{ config.policy.identity }}) |
| pairs | {{ source }} |
| held out | {{ "whole prompts, never trained on; run.yaml in the run `%s` has the hashes of all inputs" % config.name
    if measured else "nothing" }} |
| settings | `{{ settings }}` |
| seed | {{ config.seed }} |
| software | {{ software }} |

## Measured while training

Loss {{ "%.3f" % first_loss }} at the first step, {{ "%.3f" % last_loss }} over the last tenth of the steps.

{% if measured %}On held-out prompts:

| | |
|---|---|
{% for name, value in measured %}| {{ name }} | {{ "%.3f" % value }} |
{% endfor %}{% else %}Nothing was held out.
{% endif %}"""
"""A Jinja template, which huggingface_hub fills in; `card_data` is the part for the Hub, in YAML."""


def write_cards(config: TuneConfig, run: RunDir, summary: dict[str, Any]) -> None:
    """README.md beside the weights and beside the adapter."""
    from huggingface_hub import ModelCard, ModelCardData

    base = config.policy.model
    is_on_hub = not Path(config.policy.path).exists() and HUB_NAME.fullmatch(base)
    own = f"table `pairs` of the run `{config.name}`, from the rubrics {', '.join(getattr(config, 'rubrics', ()))}"
    purpose = "A short system prompt, a *directive*, sets how it answers." if isinstance(config, RunConfig) else ""
    last = summary["held_out"][-1] if summary["held_out"] else {}
    fields = {
        "config": config,
        "source": f"`{config.preferences.source}`" if isinstance(config, PreferenceRunConfig) else own,
        "settings": json.dumps(config.train.model_dump(mode="json", exclude_none=True)),
        "software": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
        "measured": sorted((name, value) for name, value in last.items() if name != "step"),
        **{name: summary[name] for name in ("pairs", "steps", "first_loss", "last_loss")},
    }
    cards = {"model": ("transformers", "A language model tuned to preferences.")}
    if run.adapter.exists():
        cards["adapter"] = ("peft", f"A LoRA adapter for `{base}`.")
    for folder, (library, what) in cards.items():
        data = ModelCardData(
            base_model=base if is_on_hub else None, library_name=library, pipeline_tag="text-generation", tags=TAGS
        )
        card = ModelCard.from_template(data, template_str=CARD, **fields, what=f"{what} {purpose}".strip())
        run.write_text(f"{folder}/README.md", str(card))


def _refusal(error: Exception) -> str:
    """What the Hub answered, and what to do if it is about who asks."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    answer = getattr(error, "server_message", None) or first_line(error)
    if status in (401, 403) or isinstance(error, LocalTokenNotFoundError):
        return f"the Hub refused ({answer}); log in with `hf auth login` as somebody who may write there"
    return f"not pushed ({answer}); the same command tries again" if status is None else f"the Hub refused: {answer}"


def push(run: RunDir, target: str) -> None:
    """The tuned model, its card, and its adapter in `adapter/`, to a folder (of this machine or an object store) or to
    hf://OWNER/NAME (made private)."""
    parts = {"": run.model} | ({"adapter": run.adapter} if run.adapter.exists() else {})
    if not (run.path / MODEL_INFO_FILE).exists():
        state = "the tuned model is not complete" if run.model.exists() else "there is no tuned model"
        raise UserError(f"{run.model}: {state}; run `cpt train` with this run file first")
    sources = {name: local_copy(part) for name, part in parts.items()}
    if not target.startswith(HUB):
        folder = path_of(target)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is not an empty folder; give another one, or {HUB}OWNER/NAME for the Hub")
        for name, source in sources.items():
            if isinstance(folder, StorePath):
                (folder / name if name else folder).upload(source)
            else:
                shutil.copytree(source, folder / name, dirs_exist_ok=True)
        say(f"pushed       {folder}")
        return
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api, name = HfApi(), target.removeprefix(HUB)
    try:
        api.create_repo(name, private=True, exist_ok=True)
        for inside, source in sources.items():
            api.upload_folder(repo_id=name, folder_path=source, path_in_repo=inside or None)
    except HFValidationError as error:
        raise UserError(f"{target}: not the name of a repository ({first_line(error)}); give {HUB}OWNER/NAME") from None
    except (HfHubHTTPError, OSError) as error:
        raise UserError(f"{target}: {_refusal(error)}") from None
    say(f"pushed       {target}")

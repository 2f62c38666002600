"""A small run and an engine that answers by a function, for tests of what the stages do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from cpt_ray.config import load_config
from cpt_ray.engines.engine import Completion, FakeEngine, Request
from cpt_ray.engines.pool import LocalRunner
from cpt_ray.plan import Plan, Shards, make_plan, plan_units
from cpt_ray.synthesis.stage import name_shards, synthesize
from cpt_ray.tables.rundir import RunDir
from tests.builders import LEVELS, rubric_dict


def make_run(
    tmp_path: Path, *overrides: str, second: dict[str, Any] | None = None, **rubric: Any
) -> tuple[Plan, RunDir]:
    """A run over one rubric (or two) and 20 prompts."""
    for name, one in (("rubric", rubric_dict(**rubric)), ("second", second)):
        if one:
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(one), encoding="utf-8")
    rows = [json.dumps({"prompt": f"Write about thing {at}."}) for at in range(20)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    model = {"model": "fake", "sampling": {"max_tokens": 20}}
    (tmp_path / "run.yaml").write_text(
        json.dumps(
            {
                "name": "t",
                "run_dir": str(tmp_path / "run"),
                "rubrics": [
                    str(tmp_path / f"{name}.yaml") for name in (("rubric", "second") if second else ("rubric",))
                ],
                "prompts": {"source": str(tmp_path / "prompts.jsonl"), "held_out": 0.3},
                "synthesis": {"shard_rows": 30, "paraphrases": 3, "samples": 1},
                "writer": model,
                "policy": model,
            }
        ),
        encoding="utf-8",
    )
    return make_plan(load_config(tmp_path / "run.yaml", overrides)), RunDir(tmp_path / "run")


def level_in(text: str) -> str:
    """The level a writer's or director's request names."""
    return text.split(" of 3, ")[1].split()[0].strip(".")


def answer(request: Request) -> Completion:
    """Writes what is asked (with the bangs that the measure wants); judges by the word it finds; errs now and then."""
    asked = request.messages[-1]["content"]
    if request.labels:
        found = next(at for at, level in enumerate(LEVELS) if f"{level} text" in asked)
        return Completion(label_logprobs=tuple(0.0 if at == found else -math.inf for at in range(3)))
    if " of 3, " not in asked:  # no rubric in front of it: the policy's own answer
        return Completion(text="mid text! B. C! Own.", num_tokens=4)
    level = level_in(asked)
    if "tell a writer" in asked:
        return Completion(text=f"Write the {level} way.")
    if "thing 7." in asked and level == "mid":
        return Completion(text="half", error="cut off", detail="not finished after 20 tokens")
    if "thing 8." in asked and level == "high":
        return Completion(text="low text. B.")
    bangs = {"low": ". B. C. D.", "mid": "! B. C! D.", "high": "! B! C! D!"}[level]
    return Completion(text=f"{level} text{bangs}", num_tokens=4)


def with_engine(reply: Callable[[Request], Completion]) -> LocalRunner:
    """A runner whose engine answers by a function, whatever the role."""
    return LocalRunner(lambda model: FakeEngine(reply))


def synthesized(plan: Plan, run: RunDir, reply: Callable[[Request], Completion] = answer) -> Shards:
    """A whole synthesis in this process; the names of its shards."""
    synthesize(plan, run, with_engine(reply))
    return name_shards(plan, plan_units(plan))


GIVEN = [
    {"name": name, "score": score, "directives": [f"Go {name} {kind}." for kind in ("now", "softly", "please")]}
    for name, score in zip(LEVELS, (10, 50, 90), strict=True)
]


MOOD = rubric_dict(
    id="mood",
    title="Mood",
    levels=[one | {"directives": [f"Feel {one['name']} {kind}." for kind in ("now", "softly")]} for one in GIVEN],
    criteria=[{"name": "feeling", "weight": 100, "descriptors": {name: f"{name} mood" for name in LEVELS}}],
)

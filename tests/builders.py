"""Small builders for tests: rubrics, generations, grades, run files with only what matters spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cpt_ray.config import RunConfig, load_config
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Directive, Generation, Grade
from tests import toy

LEVELS = ("low", "mid", "high")


def rubric_dict(**changes: Any) -> dict[str, Any]:
    """A valid rubric of three levels as plain data."""
    rubric: dict[str, Any] = {
        "id": "ornament",
        "version": 1,
        "title": "Ornament",
        "objective": "How rich the words are.",
        "principles": ["Look at the words."],
        "levels": [{"name": name, "score": score} for name, score in zip(LEVELS, (10, 50, 90), strict=True)],
        "criteria": [
            {"name": "words", "weight": 60, "descriptors": {name: f"{name} words" for name in LEVELS}},
            {
                "name": "bangs",
                "weight": 40,
                "descriptors": {name: f"{name} bangs" for name in LEVELS},
                "measure": {"name": "exclamation_density", "values": {"low": 0, "mid": 0.5, "high": 1}},
            },
        ],
    }
    return rubric | changes


def write(path: Path, content: Any) -> Path:
    """A file of YAML: of plain data, or a text as it is."""
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


def overridden(*overrides: str) -> RunConfig:
    """The toy run file with these entries."""
    return load_config(toy.RUN_FILE, overrides)


def make_rubric(**changes: Any) -> Rubric:
    return Rubric.model_validate(rubric_dict(**changes))


def make_generation(level: str, prompt: str = "p", sample: int = 0, text: str | None = None) -> Generation:
    return Generation(
        unit_id=f"{prompt}/{sample}/{level}",
        prompt_id=prompt,
        prompt=f"Write {prompt}.",
        rubric_id="ornament",
        level=level,
        sample=sample,
        text=f"A {level} answer to {prompt} ({sample})." if text is None else text,
        num_tokens=5,
        is_cut=False,
    )


def make_grade(unit_id: str, score: float | None) -> Grade:
    reason = "" if score is not None else "no verdict"
    return Grade(
        unit_id=unit_id,
        rubric_id="ornament",
        score=score,
        judged=score,
        measured=None,
        reason=reason,
        judge="fake",
        criteria=[],
    )


def make_directives(split: str = "train") -> list[Directive]:
    return [
        Directive(
            directive_id=f"{level}-{at}",
            rubric_id="ornament",
            level=level,
            text=f"Write in the {level} manner, please ({'abc'[at]}).",
            split=split,
            source="rubric",
        )
        for level in LEVELS
        for at in range(3)
    ]

"""Graded answers that come with the prompts' data, as UltraFeedback's do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_ray.config import AnswersConfig, PromptsConfig
from cpt_ray.console import say
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.prompts import read_rows
from cpt_ray.rubrics.grading import interpolate, measured_criterion, weighted
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Prompt, content_id


def read_answers(
    source: PromptsConfig, config: AnswersConfig, rubrics: Sequence[Rubric], prompts: Sequence[Prompt]
) -> dict[str, list[Answer]]:
    """Split to its prompts' answers; UserError that names the row and what is missing in it."""
    by_text = {one.text: one for one in prompts}
    known = {one.id: one for one in rubrics}
    for name in config.scores:
        if name not in known:
            raise UserError(f"steer.answers.scores: no rubric {name!r}{did_you_mean(name, known)}")
    points = {
        name: [(config.scale[0], known[name].levels[0].score), (config.scale[1], known[name].levels[-1].score)]
        for name in config.scores
    }
    found: dict[str, list[Answer]] = {"train": [], "held_out": []}
    ungraded = 0
    for number, row in enumerate(read_rows(source), start=1):
        prompt = by_text.get(str(row.get(source.column, "")).strip())
        if prompt is None:
            continue  # over prompts.limit
        where = f"{source.source}: row {number}"
        answers = row.get(config.list)
        if not isinstance(answers, list):
            raise UserError(f"{where}: column {config.list!r} holds no list of answers (steer.answers.list)")
        for one in answers:
            if not isinstance(one, Mapping) or not isinstance(one.get(config.text), str):
                raise UserError(f"{where}: an answer in {config.list!r} has no text {config.text!r}")
            grades = {name: _grade(_field(one, path, where), config, where) for name, path in config.scores.items()}
            ungraded += sum(grade is None for grade in grades.values())
            scores = {name: interpolate(grade, points[name]) for name, grade in grades.items() if grade is not None}
            found[prompt.split].append(make_answer(prompt.prompt_id, prompt.text, one[config.text], scores))
    if ungraded:
        total = sum(map(len, found.values())) * len(config.scores)
        say(f"note: {ungraded} of {total} grades are no numbers; choices by those rubrics leave these answers out")
    return found


def _field(answer: Mapping[str, Any], path: str, where: str) -> Any:
    value: Any = answer
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(f"{where}: an answer has no field {path!r} (steer.answers.scores)")
        value = value[name]
    return value


def _grade(value: Any, config: AnswersConfig, where: str) -> float | None:
    """None if it is no number; UserError if it is one that the scale does not have."""
    try:
        grade = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    if not math.isfinite(grade):
        return None
    if not config.scale[0] <= grade <= config.scale[1]:
        raise UserError(f"{where}: found the grade {grade:g}; steer.answers.scale is {list(config.scale)}")
    return grade


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A graded answer."""

    answer_id: str
    prompt_id: str
    prompt: str
    text: str
    scores: Mapping[str, float]
    """Rubric id to 0-100, of the rubrics that it is graded by."""


def make_answer(prompt_id: str, prompt: str, text: str, scores: Mapping[str, float]) -> Answer:
    """With the content's hash as its id."""
    return Answer(
        answer_id=content_id(prompt, text), prompt_id=prompt_id, prompt=prompt, text=text, scores=dict(scores)
    )


def grade_by_measures(rubrics: Iterable[Rubric], text: str) -> dict[str, float]:
    """Scores by the measured criteria alone, of the rubrics that have them and are defined for this text."""
    found = {
        one.id: weighted(one, [measured_criterion(one, criterion, text) for criterion in one.measured])
        for one in rubrics
    }
    return {name: score for name, score in found.items() if score is not None}

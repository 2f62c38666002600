"""Graded answers, which simulated users choose between; those that come with the prompts' data are read here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_ray.config import AnswersConfig, PromptsConfig
from cpt_ray.console import say
from cpt_ray.errors import UserError
from cpt_ray.prompts import read_rows
from cpt_ray.rubrics.grading import interpolate, measured_criterion, weighted
from cpt_ray.rubrics.rubric import Rubric, check_rubric_names
from cpt_ray.tables.records import Prompt, content_id


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
    """An answer whose id is the hash of its content."""
    answer_id = content_id(prompt, text)
    return Answer(answer_id=answer_id, prompt_id=prompt_id, prompt=prompt, text=text, scores=dict(scores))


def grade_by_measures(rubrics: Iterable[Rubric], text: str) -> dict[str, float]:
    """Scores by the measured criteria alone, of the rubrics that have them and are defined for this text."""
    scores = {
        rubric.id: weighted(rubric, [measured_criterion(rubric, criterion, text) for criterion in rubric.measured])
        for rubric in rubrics
    }
    return {name: score for name, score in scores.items() if score is not None}


# ---------------------------------------------------------------- answers in the prompts' data


def read_answers(
    source: PromptsConfig, config: AnswersConfig, rubrics: Sequence[Rubric], prompts: Sequence[Prompt]
) -> dict[str, list[Answer]]:
    """Split to its prompts' answers; UserError that names the row and what is missing in it."""
    prompt_of = {prompt.text: prompt for prompt in prompts}
    levels = {rubric.id: rubric.levels for rubric in rubrics}
    check_rubric_names("steer.answers.scores", config.scores, levels)
    low, high = config.scale
    points = {name: [(low, levels[name][0].score), (high, levels[name][-1].score)] for name in config.scores}
    answers: dict[str, list[Answer]] = {"train": [], "held_out": []}
    num_ungraded = 0
    for number, row in enumerate(read_rows(source), start=1):
        prompt = prompt_of.get(str(row.get(source.column, "")).strip())
        if prompt is None:
            continue  # it is beyond prompts.limit
        where = f"{source.source}: row {number}"
        for entry in _entries(row, config, where):
            grades = {name: _grade(_field(entry, path, where), config, where) for name, path in config.scores.items()}
            scores = {name: interpolate(grade, points[name]) for name, grade in grades.items() if grade is not None}
            num_ungraded += len(grades) - len(scores)
            answers[prompt.split].append(make_answer(prompt.prompt_id, prompt.text, entry[config.text], scores))
    if num_ungraded:
        total = sum(map(len, answers.values())) * len(config.scores)
        say(f"note: {num_ungraded} of {total} grades are no numbers; choices by those rubrics leave these answers out")
    return answers


def _entries(row: Mapping[str, Any], config: AnswersConfig, where: str) -> list[Mapping[str, Any]]:
    entries = row.get(config.list)
    if not isinstance(entries, list):
        raise UserError(f"{where}: column {config.list!r} holds no list of answers (steer.answers.list)")
    for entry in entries:
        if not isinstance(entry, Mapping) or not isinstance(entry.get(config.text), str):
            raise UserError(f"{where}: an answer in {config.list!r} has no text {config.text!r}")
    return entries


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

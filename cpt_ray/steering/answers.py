"""Graded answers that come with the prompts' data, as UltraFeedback's do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpt_ray.config import AnswersConfig, PromptsConfig
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.grading import interpolate
from cpt_ray.prompts import read_rows
from cpt_ray.records import Prompt
from cpt_ray.rubric import Rubric
from cpt_ray.steering.users import Answer, make_answer


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
            grades = {name: _number(_field(one, path, where)) for name, path in config.scores.items()}
            scores = {name: interpolate(grade, points[name]) for name, grade in grades.items() if grade is not None}
            found[prompt.split].append(make_answer(prompt.prompt_id, prompt.text, one[config.text], scores))
    return found


def _field(answer: Mapping[str, Any], path: str, where: str) -> Any:
    value: Any = answer
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise UserError(f"{where}: an answer has no field {path!r} (steer.answers.scores)")
        value = value[name]
    return value


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None

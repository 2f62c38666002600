"""From judges' token probabilities or rationales and measured values to a grade on 0-100. Pure arithmetic.

Nothing is made up: what cannot be graded has no score, and a reason.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.measures import measures, why_undefined
from cpt_ray.rubrics.rubric import Criterion, Rubric
from cpt_ray.tables.records import CriterionGrade, Grade

MIN_LABEL_MASS = 0.5
"""Least probability the judge must put on the level tokens together for its verdict to count."""


def interpolate(value: float, points: Sequence[tuple[float, float]]) -> float:
    """Piecewise linear through `points` (x strictly rising), flat outside them."""
    if value <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if value <= x1:
            return y0 + (y1 - y0) * (value - x0) / (x1 - x0)
    return points[-1][1]


def extended(value: float, points: Sequence[tuple[float, float]]) -> float:
    """`interpolate` between the ends, and beyond them a line with the points' mean slope."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    inside = min(max(value, x0), x1)
    return interpolate(inside, points) + (value - inside) * (y1 - y0) / (x1 - x0)


def judged_criterion(rubric: Rubric, criterion: Criterion, logprobs: Mapping[int, float]) -> CriterionGrade:
    """The expected level under the judge's distribution, as a score; none if it lies between two likelier levels.

    Args:
        logprobs: level number (1 = lowest) to the log-probability of its token under the full vocabulary.
    """
    count = len(rubric.levels)
    masses = [math.exp(logprobs[number]) if number in logprobs else 0.0 for number in range(1, count + 1)]
    total = sum(masses)
    if not total >= MIN_LABEL_MASS:  # NaN fails this as well
        return ungraded(criterion, f"judge put {total:.0%} of its probability on the level numbers")
    expected = sum(number * mass for number, mass in enumerate(masses, start=1)) / total
    anchors = [(float(number), level.score) for number, level in enumerate(rubric.levels, start=1)]
    return _verdict(rubric, criterion, interpolate(expected, anchors), masses, "")


def _verdict(
    rubric: Rubric, criterion: Criterion, score: float, masses: Sequence[float], reason: str
) -> CriterionGrade:
    """The judge's score; none if it lies between two levels that are both likelier than its own."""
    at = rubric.levels.index(nearest_level(rubric.levels, score))
    if masses[at] < min(max(masses[:at], default=0), max(masses[at + 1 :], default=0)):
        shares = zip(masses, rubric.levels, strict=True)
        shown = ", ".join(f"{mass / sum(masses):.0%} {level.name}" for mass, level in shares)
        return ungraded(criterion, f"judge is of two minds ({shown})")
    return CriterionGrade(criterion=criterion.name, measured=False, score=score, reason=reason)


def measured_criterion(rubric: Rubric, criterion: Criterion, text: str) -> CriterionGrade:
    """The registered measure's value of `text`, interpolated between the levels' values."""
    spec = criterion.measure
    assert spec is not None
    value = measures(text, spec.words, spec.against)[spec.name]
    if value is None:
        reason = f"{spec.name} is undefined for this text: {why_undefined(text)}"
        return CriterionGrade(criterion=criterion.name, measured=True, score=None, reason=reason)
    if isinstance(spec.values, str):
        score = extended(value, spec.points)
    else:
        score = interpolate(value, sorted((spec.values[level.name], level.score) for level in rubric.levels))
    return CriterionGrade(criterion=criterion.name, measured=True, score=score, reason="")


def weighted(rubric: Rubric, grades: Sequence[CriterionGrade]) -> float | None:
    """Mean score weighted by the criteria's percents; None if there is none or any is ungraded."""
    weights = {criterion.name: criterion.weight for criterion in rubric.criteria}
    if not grades or any(grade.score is None for grade in grades):
        return None
    total = sum(weights[grade.criterion] for grade in grades)
    return sum(weights[grade.criterion] * grade.score for grade in grades if grade.score is not None) / total


def ungraded(criterion: Criterion, reason: str) -> CriterionGrade:
    """No verdict, and why."""
    return CriterionGrade(criterion=criterion.name, measured=False, score=None, reason=reason)


def voted_criteria(rubric: Rubric, votes: Sequence[str]) -> list[CriterionGrade]:
    """The judged criteria's mean score over rationales, and the first one's reason.

    Rationales are JSON of `chat.conversations.rationale_schema`.

    A vote that cannot be read counts for nothing; with fewer than half of them left there is no verdict, nor where the
    mean lies between two levels that both have more votes than its own.
    """
    read = [verdict for verdict in map(_readable, votes) if verdict is not None]
    grades = []
    for criterion in rubric.judged:
        given = [_vote(rubric, verdicts.get(criterion.name)) for verdicts in read]
        cast = [vote for vote in given if vote is not None]
        if 2 * len(cast) < len(votes) or not cast:
            grades.append(ungraded(criterion, f"unreadable verdict ({len(votes) - len(cast)} of {len(votes)} votes)"))
        else:
            masses = [sum(score == level.score for score, _ in cast) for level in rubric.levels]
            score = sum(score for score, _ in cast) / len(cast)
            grades.append(_verdict(rubric, criterion, score, masses, cast[0][1]))
    return grades


def _readable(vote: str) -> dict[str, Any] | None:
    try:
        verdict = json.loads(vote, strict=False)  # engines let a text run over several lines
    except json.JSONDecodeError:
        return None
    return verdict if isinstance(verdict, dict) else None


def _vote(rubric: Rubric, verdict: Any) -> tuple[float, str] | None:
    """(score, reason), or None if it is not a verdict on this rubric."""
    if not isinstance(verdict, dict) or type(verdict.get("level")) is not int:
        return None
    number = verdict["level"]
    if not 1 <= number <= len(rubric.levels):
        return None
    return rubric.levels[number - 1].score, str(verdict.get("reason", ""))


def grade_answer(rubric: Rubric, unit_id: str, text: str, judged: Sequence[CriterionGrade], judge: str) -> Grade:
    """The whole verdict on one answer: `judged` criteria, and the measured ones."""
    measured = [measured_criterion(rubric, criterion, text) for criterion in rubric.measured]
    missing = [f"{grade.criterion}: {grade.reason}" for grade in (*judged, *measured) if grade.score is None]
    return Grade(
        unit_id=unit_id,
        rubric_id=rubric.id,
        score=weighted(rubric, [*judged, *measured]),
        judged=weighted(rubric, judged),
        measured=weighted(rubric, measured),
        reason="; ".join(missing),
        judge=judge,
        criteria=[*judged, *measured],
    )


def aggregate(rubric: Rubric, grades: Sequence[Grade], how: str) -> Grade:
    """One grade from several judges' grades of the same answer by the same rubric.

    Args:
        how: "mean", "median" or "min" of the scores; "majority": the mean of those in the level that over half chose.
    """
    if len(grades) == 1:
        return grades[0]
    names = "+".join(grade.judge for grade in grades)
    scores = [grade.score for grade in grades if grade.score is not None]
    if len(scores) < len(grades):
        reasons = "; ".join(f"{grade.judge}: {grade.reason}" for grade in grades if grade.score is None)
        return dataclasses.replace(grades[0], score=None, judged=None, reason=reasons, judge=names, criteria=[])
    if how == "majority":
        by_level = Counter(nearest_level(rubric.levels, score).name for score in scores)
        level, count = by_level.most_common(1)[0]
        if 2 * count <= len(scores):
            reason = "no majority: " + ", ".join(f"{number} {name}" for name, number in sorted(by_level.items()))
            return dataclasses.replace(grades[0], score=None, judged=None, reason=reason, judge=names, criteria=[])
        scores = [score for score in scores if nearest_level(rubric.levels, score).name == level]
    score = {"median": statistics.median(scores), "min": min(scores)}.get(how, statistics.fmean(scores))
    judged = [grade.judged for grade in grades if grade.judged is not None]
    return dataclasses.replace(
        grades[0],
        score=score,
        judged=statistics.fmean(judged) if judged else None,
        judge=names,
        criteria=[],
    )

"""From a judge's token probabilities and measured values to a grade on 0-100. Pure arithmetic.

Nothing is parsed and nothing is made up: what cannot be graded has no score, and a reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from cpt_ray.measures import MEASURES
from cpt_ray.records import CriterionGrade, Grade
from cpt_ray.rubric import Criterion, Rubric

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


def judged_criterion(rubric: Rubric, criterion: Criterion, logprobs: Mapping[int, float]) -> CriterionGrade:
    """The expected level under the judge's distribution, as a score.

    Args:
        logprobs: level number (1 = lowest) to the log-probability of its token under the full vocabulary.
    """
    count = len(rubric.levels)
    masses = [math.exp(logprobs[number]) if number in logprobs else 0.0 for number in range(1, count + 1)]
    total = sum(masses)
    if not total >= MIN_LABEL_MASS:  # NaN fails this as well
        reason = f"judge put {total:.0%} of its probability on the level numbers"
        return CriterionGrade(criterion=criterion.name, measured=False, score=None, reason=reason)
    expected = sum(number * mass for number, mass in enumerate(masses, start=1)) / total
    anchors = [(float(number), level.score) for number, level in enumerate(rubric.levels, start=1)]
    return CriterionGrade(criterion=criterion.name, measured=False, score=interpolate(expected, anchors), reason="")


def measured_criterion(rubric: Rubric, criterion: Criterion, text: str) -> CriterionGrade:
    """The registered measure's value of `text`, interpolated between the levels' values."""
    spec = criterion.measure
    assert spec is not None
    value = MEASURES[spec.name](text, spec.words, spec.against)
    if value is None:
        reason = f"{spec.name} is undefined for this text"
        return CriterionGrade(criterion=criterion.name, measured=True, score=None, reason=reason)
    points = sorted((spec.values[level.name], level.score) for level in rubric.levels)
    return CriterionGrade(criterion=criterion.name, measured=True, score=interpolate(value, points), reason="")


def weighted(rubric: Rubric, grades: Sequence[CriterionGrade]) -> float | None:
    """Mean score weighted by the criteria's percents; None if there is none or any is ungraded."""
    weights = {one.name: one.weight for one in rubric.criteria}
    if not grades or any(one.score is None for one in grades):
        return None
    total = sum(weights[one.criterion] for one in grades)
    return sum(weights[one.criterion] * one.score for one in grades if one.score is not None) / total


def grade_answer(
    rubric: Rubric, unit_id: str, text: str, verdicts: Mapping[str, Mapping[int, float]], judge: str
) -> Grade:
    """The whole verdict on one answer.

    Args:
        verdicts: per judged criterion's name, level number to log-probability.
    """
    judged = [judged_criterion(rubric, one, verdicts.get(one.name, {})) for one in rubric.judged]
    measured = [measured_criterion(rubric, one, text) for one in rubric.measured]
    ungraded = [f"{one.criterion}: {one.reason}" for one in (*judged, *measured) if one.score is None]
    return Grade(
        unit_id=unit_id,
        score=weighted(rubric, [*judged, *measured]),
        judged=weighted(rubric, judged),
        measured=weighted(rubric, measured),
        reason="; ".join(ungraded),
        judge=judge,
        criteria=[*judged, *measured],
    )


def confirms(rubric: Rubric, level: str, score: float) -> bool:
    """Whether a score falls in the target level's bin."""
    return rubric.nearest_level(score).name == level

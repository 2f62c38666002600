"""Which level a score is: the one whose anchor is nearest, so that bins end half-way between anchors.

Where a level has to be named, a score half-way between two goes up. Where a level is claimed (an answer is to stand
for it), a score about half-way is at neither.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol, TypeVar

from cpt_ray.rubrics.rubric import Rubric


class Anchored(Protocol):
    """A level of a rubric or of a catalog."""

    @property
    def score(self) -> float:
        """Its anchor, 0-100."""


AnyLevel = TypeVar("AnyLevel", bound=Anchored)


def _around(levels: Sequence[AnyLevel], score: float) -> tuple[AnyLevel, AnyLevel]:
    """The neighbouring levels around a score; beyond the ends, the last two there."""
    pairs = list(itertools.pairwise(levels))
    return next((pair for pair in pairs if score <= pair[1].score), pairs[-1])


def nearest_level(levels: Sequence[AnyLevel], score: float) -> AnyLevel:
    """The level in whose bin a score falls; half-way between two, the upper one."""
    return min(levels, key=lambda level: (abs(level.score - score), -level.score))


def level_at(rubric: Rubric, score: float, margin: float = 0.0) -> str | None:
    """Name of the level in whose bin a score falls; None if it is about half-way between two.

    Args:
        margin: how far from half-way still is, as a share of the way from one anchor to the next.
    """
    low, high = _around(rubric.levels, score)
    share = (score - low.score) / (high.score - low.score)
    return None if abs(share - 0.5) <= margin else nearest_level(rubric.levels, score).name


def confirms(rubric: Rubric, level: str, score: float) -> bool:
    """Whether the target level's anchor is the nearest to a score; half-way between two it confirms neither."""
    return level_at(rubric, score) == level


def bins(levels: Sequence[Anchored]) -> list[tuple[float, float]]:
    """The scores of each level, from 0 to 100, as (start, end)."""
    ends = [(low.score + high.score) / 2 for low, high in itertools.pairwise(levels)]
    return list(itertools.pairwise([0.0, *ends, 100.0]))

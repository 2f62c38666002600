"""How far two graders of the same answers agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.rubric import Rubric


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], dtype=np.float64)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho: Pearson's correlation of the ranks; None where one side is constant or empty."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def weighted_kappa(first: Sequence[int], second: Sequence[int], num_levels: int) -> float | None:
    """Cohen's kappa with quadratic weights (Cohen 1968): 1 - observed over chance disagreement.

    Args:
        first, second: level numbers from 0.
    """
    table = np.zeros((num_levels, num_levels))
    np.add.at(table, (list(first), list(second)), 1)
    weights = (np.arange(num_levels)[:, None] - np.arange(num_levels)) ** 2
    chance = float((weights * np.outer(table.sum(1), table.sum(0))).sum()) / max(1, len(first))
    return 1 - float((weights * table).sum()) / chance if chance else None


def agreement(rubric: Rubric, scores: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Of two graders' scores (0-100) of the same answers: same level, kappa, rho; and the first's mean per level of the
    second, where a calibrated grader has about the level's own score."""
    names = [level.name for level in rubric.levels]
    first = [names.index(nearest_level(rubric.levels, score).name) for score, _ in scores]
    second = [names.index(nearest_level(rubric.levels, other).name) for _, other in scores]
    by_level: dict[str, float] = {}
    for at, name in enumerate(names):
        own = [score for (score, _), level in zip(scores, second, strict=True) if level == at]
        if own:
            by_level[name] = round(math.fsum(own) / len(own), 1)
    same = [score == other for score, other in zip(first, second, strict=True)]
    return {
        "n": len(scores),
        "same_level": sum(same) / len(same) if same else None,
        "weighted_kappa": weighted_kappa(first, second, len(names)),
        "spearman_rho": spearman([score for score, _ in scores], [other for _, other in scores]),
        "mean_score_per_level": by_level,
    }

"""Intervals for answers that share prompts and directives: the two-way ("pigeonhole") bootstrap.

Answers to one prompt are not independent, nor are answers under one directive, and both prompts and directives are
samples of what a user may write. So a resample draws prompts with replacement and, independently, the directives of
each (rubric, level) with replacement; a row's weight is the product of how often its prompt and its directive were
drawn (1 for a row without a directive). All models and conditions get the same draws: differences are paired.
Owen (2007), "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), shows that this is conservative: it counts
the noise of a single row three times. Where a level has a single directive, the interval is over prompts alone. With
few prompts (under about 20) or directives (under about 6 a level) intervals are nevertheless somewhat too narrow.

Intervals are the 2.5th and 97.5th percentile over the resamples in which the statistic is defined; with fewer than
two prompts there is none.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cpt_ray.tables.records import Trial

MODELS = ("base", "tuned")
INTERVAL_PERCENT = 95
_BLOCK = 64
"""Resamples computed together: bounds the memory to a few arrays of rows x 64."""

Floats = NDArray[np.float64]


class Resamples:
    """The same draws for whatever is computed. Column 0 of all weights is the sample itself: each row once."""

    def __init__(self, trials: Sequence[Trial], resamples: int, seed: int) -> None:
        """`trials`: all that are ever looked at, in any order."""
        draw = np.random.default_rng(seed)
        self._columns = 1 + resamples
        prompts = sorted({trial.prompt_id for trial in trials})
        self._prompts = {name: at for at, name in enumerate(prompts)}
        self._prompt_counts = _draw_counts(draw, len(prompts), resamples)
        groups: dict[tuple[str, str, bool], set[str]] = defaultdict(set)
        for trial in trials:
            if trial.directive_id:
                groups[trial.rubric_id, trial.level, trial.is_trained].add(trial.directive_id)
        self._directives = {"": 0}
        counts = [np.ones((1, self._columns))]
        for _, names in sorted(groups.items()):
            for name in sorted(names):
                self._directives[name] = len(self._directives)
            counts.append(_draw_counts(draw, len(names), resamples))
        self._directive_counts = np.concatenate(counts)

    def statistics(self, trials: Sequence[Trial], compute: Callable[[Floats], Floats]) -> Floats:
        """(k, 1 + resamples): what `compute` makes of weights; NaN in resamples of fewer than two prompts.

        Args:
            compute: from weights (rows of `trials`, columns) to k statistics (k, columns), NaN where undefined.
        """
        prompts = np.array([self._prompts[trial.prompt_id] for trial in trials], dtype=np.int64)
        directives = np.array([self._directives[trial.directive_id] for trial in trials], dtype=np.int64)
        blocks = []
        for start in range(0, self._columns, _BLOCK):
            columns = slice(start, start + _BLOCK)
            weights = self._prompt_counts[prompts, columns] * self._directive_counts[directives, columns]
            blocks.append(compute(weights))
        values = np.concatenate(blocks, axis=1)
        if len(np.unique(prompts)) < 2:
            values[:, 1:] = np.nan
        return values


def _draw_counts(draw: np.random.Generator, size: int, resamples: int) -> Floats:
    """(size, 1 + resamples): how often each of `size` items is drawn; once each in column 0."""
    if not size:
        return np.ones((0, 1 + resamples))
    drawn = draw.multinomial(size, np.full(size, 1 / size), size=resamples)
    return np.vstack([np.ones((1, size)), drawn]).T


def estimate(columns: Floats) -> tuple[float | None, list[float] | None]:
    """The estimate (column 0) and its interval [low, high]; None where undefined."""
    value, resampled = float(columns[0]), columns[1:]
    if not math.isfinite(value):
        return None, None
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return value, None
    tail = (100 - INTERVAL_PERCENT) / 2
    return value, [float(end) for end in np.percentile(defined, [tail, 100 - tail])]


def named_estimate(name: str, columns: Floats) -> dict[str, float | list[float] | None]:
    """{name: estimate, name_ci: [low, high]}, as in results.json."""
    value, ends = estimate(columns)
    return {name: value, f"{name}_ci": ends}

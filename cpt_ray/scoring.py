"""How well the answers follow the requested level: accuracy, Kendall's tau-b and Spearman's rho, with intervals.

**The bootstrap.** The rows of one prompt are not independent, so a resample draws *prompts* with replacement and
takes all of a prompt's rows, in every arm at once: differences between models are paired. Intervals are the
2.5th and 97.5th percentile over the resamples in which the statistic is defined; with fewer than two prompts
there is none. With few prompts (under about 20) such intervals are somewhat too narrow.

**Rows are weighted, not copied.** A resample is a weight per prompt: how often it was drawn. All three statistics
are functions of weighted sums of signs, so that one matrix product computes them for all resamples, exactly as
if the rows had been copied, ties included. With dx = sign(x_i - x_j), dy = sign(y_i - y_j), weights w:

- tau-b = sum w_i w_j dx dy / sqrt(sum w_i w_j dx^2 * sum w_i w_j dy^2), Kendall (1945): concordant minus
  discordant pairs, over the geometric mean of the numbers of pairs not tied in x and not tied in y.
- rho is the Pearson correlation of the average ranks (Spearman 1904); the centred average rank of row i is
  half of sum_j w_j dx.

The estimate itself is the case where each prompt is drawn once. It agrees with scipy.stats' kendalltau
(variant b) and spearmanr. What is undefined (tau of constant scores) is None, never a number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_ray.agreement import spearman
from cpt_ray.grading import confirms
from cpt_ray.records import Trial
from cpt_ray.rubric import Rubric

MODELS = ("base", "tuned")
METRICS = ("accuracy", "kendall_tau", "spearman_rho")
INTERVAL_PERCENT = 95
_BLOCK = 64
"""Resamples computed together: bounds the memory to a few arrays of rows x 64."""

Floats = NDArray[np.float64]
Value = Callable[[Trial], float | None]
"""Which opinion on a trial is scored, on 0-100; None if ungraded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some rows as columns; only the graded ones are in the arrays."""

    prompt: NDArray[np.int64]
    """Index of the row's prompt among all prompts."""
    target: Floats
    """Requested anchor, 0-100."""
    score: Floats
    """0-100."""
    hit: Floats
    """1 if the score falls in the requested level's bin, else 0."""
    missed: NDArray[np.int64]
    """Prompt index of every row without an answer: at no level, so not at the requested one."""
    ungraded: int


class _Scorer:
    """Holds what all arms share: the rubrics and the same resampled prompts.

    `counts` is (prompts, 1 + resamples): how often each prompt is drawn; column 0 draws each once.
    """

    def __init__(self, trials: Sequence[Trial], rubrics: Sequence[Rubric], resamples: int, seed: int) -> None:
        self.rubrics = {rubric.id: rubric for rubric in rubrics}
        self.prompts = {name: index for index, name in enumerate(sorted({one.prompt_id for one in trials}))}
        size = max(len(self.prompts), 1)
        drawn = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), size=resamples)
        self.counts: Floats = np.vstack([np.ones((1, size)), drawn]).T

    def rows(self, trials: Sequence[Trial], value: Value) -> _Rows:
        """Columns of the trials that `value` grades."""
        graded = [(one, score) for one in trials if (score := value(one)) is not None]
        empty = [one for one in trials if not one.text and value(one) is None]
        hits = [confirms(self.rubrics[one.rubric_id], one.level, score) for one, score in graded]
        return _Rows(
            prompt=np.array([self.prompts[one.prompt_id] for one, _ in graded], dtype=np.int64),
            target=np.array([one.target for one, _ in graded], dtype=np.float64),
            score=np.array([score for _, score in graded], dtype=np.float64),
            hit=np.array(hits, dtype=np.float64),
            missed=np.array([self.prompts[one.prompt_id] for one in empty], dtype=np.int64),
            ungraded=sum(bool(one.text) and value(one) is None for one in trials),
        )

    def statistics(self, rows: _Rows) -> Floats:
        """(3, 1 + resamples): METRICS in every column of `counts`; NaN where undefined."""
        signs = _signs(rows, len(self.counts))
        columns = self.counts.shape[1]
        blocks = [self.counts[:, start : start + _BLOCK] for start in range(0, columns, _BLOCK)]
        made = np.concatenate([_weighted(rows, signs, block) for block in blocks], axis=1)
        if len(np.unique(rows.prompt)) < 2:
            made[:, 1:] = np.nan
        return made

    def arm(self, trials: Sequence[Trial], value: Value, rubric_ids: Sequence[str]) -> _Arm:
        """Overall and per rubric, over the trials of these rubrics."""
        groups = {name: [one for one in trials if one.rubric_id == name] for name in rubric_ids}
        rows = {name: self.rows(group, value) for name, group in groups.items()}
        overall = self.rows([one for group in groups.values() for one in group], value)
        return _Arm(
            rows=overall,
            statistics=self.statistics(overall),
            per_rubric={name: (rows[name], self.statistics(rows[name])) for name in rubric_ids},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """One model under one condition."""

    rows: _Rows
    statistics: Floats
    per_rubric: Mapping[str, tuple[_Rows, Floats]]

    def summary(self) -> dict[str, Any]:
        """As in results.json."""

        def entry(rows: _Rows, statistics: Floats) -> dict[str, Any]:
            return {
                **_summary(statistics),
                "n": len(rows.score),
                "ungraded": rows.ungraded,
                "unanswered": len(rows.missed),
            }

        per_rubric = {name: entry(rows, found) for name, (rows, found) in self.per_rubric.items()}
        return {**entry(self.rows, self.statistics), "per_rubric": per_rubric}


def _signs(rows: _Rows, num_prompts: int) -> Floats:
    """(5, rows, prompts): dx, dy, dx dy, dx^2, dy^2 summed over each prompt's rows j, per row i."""
    sums = np.zeros((5, len(rows.score), num_prompts))
    for prompt in np.unique(rows.prompt):
        of_prompt = rows.prompt == prompt
        dx = np.sign(rows.target[:, None] - rows.target[of_prompt])
        dy = np.sign(rows.score[:, None] - rows.score[of_prompt])
        for at, terms in enumerate((dx, dy, dx * dy, dx * dx, dy * dy)):
            sums[at, :, prompt] = terms.sum(axis=1)
    return sums


def _weighted(rows: _Rows, signs: Floats, counts: Floats) -> Floats:
    """(3, columns): METRICS under each column of prompt counts (prompts, columns)."""
    weights = counts[rows.prompt]
    rank_x, rank_y, both, apart_x, apart_y = signs @ counts

    def total(terms: Floats) -> Floats:
        return np.asarray((weights * terms).sum(axis=0))

    with np.errstate(invalid="ignore", divide="ignore"):
        accuracy = rows.hit @ weights / (weights.sum(axis=0) + counts[rows.missed].sum(axis=0))
        tau = total(both) / np.sqrt(total(apart_x) * total(apart_y))
        rho = total(rank_x * rank_y) / np.sqrt(total(rank_x**2) * total(rank_y**2))
    return np.stack([accuracy, np.clip(tau, -1, 1), np.clip(rho, -1, 1)])


def _summary(statistics: Floats) -> dict[str, Any]:
    """{metric: estimate, metric_ci: [low, high]} from (3, 1 + resamples)."""
    tail = (100 - INTERVAL_PERCENT) / 2
    made: dict[str, Any] = {}
    for name, (estimate, *resampled) in zip(METRICS, statistics, strict=True):
        defined = np.array(resampled)[np.isfinite(resampled)]
        known = len(defined) > 0 and math.isfinite(estimate)
        made[name] = float(estimate) if math.isfinite(estimate) else None
        made[f"{name}_ci"] = [float(end) for end in np.percentile(defined, [tail, 100 - tail])] if known else None
    return made


def _agreement(rubrics: Mapping[str, Rubric], trials: Sequence[Trial]) -> dict[str, Any]:
    """How far judge and measures agree over the rows that have both."""
    both = [
        (rubrics[one.rubric_id], one.judged, one.measured)
        for one in trials
        if one.judged is not None and one.measured is not None
    ]
    same = [rubric.nearest_level(judged) == rubric.nearest_level(measured) for rubric, judged, measured in both]
    return {
        "n": len(both),
        "spearman_rho": spearman([judged for _, judged, _ in both], [measured for _, _, measured in both]),
        "same_level": sum(same) / len(same) if same else None,
    }


def score_trials(trials: Sequence[Trial], rubrics: Sequence[Rubric], resamples: int, seed: int) -> dict[str, Any]:
    """The content of results.json.

    Per model ("base", "tuned"), over the rows with a directive: `accuracy` (share of rows whose score falls in the
    requested level's bin; a row without an answer is a miss, an answer without a grade is left out), `kendall_tau`
    and `spearman_rho` (requested anchor against score, rubrics pooled), each with `*_ci` [low, high]; `n` graded,
    `ungraded` and `unanswered` rows; `per_rubric` the same by rubric id. Then the same again as `without_directive`
    (the same requests, unseen by the model) and as `measured`: the measured criteria alone instead of the whole score,
    over the rubrics that have any, None if none has. `difference` is tuned minus base; `judge_agreement`
    compares judged with measured scores over all rows that have both.

    Args:
        resamples: bootstrap resamples of prompts behind each interval.
        seed: of the resampling.
    """
    scorer = _Scorer(trials, rubrics, resamples, seed)
    rubric_ids = [rubric.id for rubric in rubrics]
    measured_ids = [rubric.id for rubric in rubrics if rubric.measured]
    results: dict[str, Any] = {}
    arms: dict[str, _Arm] = {}
    for model in MODELS:
        directed = [one for one in trials if one.model == model and one.directive is not None]
        undirected = [one for one in trials if one.model == model and one.directive is None]
        arms[model] = scorer.arm(directed, lambda one: one.score, rubric_ids)
        without = scorer.arm(undirected, lambda one: one.score, rubric_ids)
        measured = scorer.arm(directed, lambda one: one.measured, measured_ids).summary() if measured_ids else None
        results[model] = {**arms[model].summary(), "without_directive": without.summary(), "measured": measured}
    base, tuned = arms["base"], arms["tuned"]
    results["difference"] = _summary(tuned.statistics - base.statistics) | {
        "per_rubric": {name: _summary(tuned.per_rubric[name][1] - base.per_rubric[name][1]) for name in rubric_ids}
    }
    of_rubric = {name: [one for one in trials if one.rubric_id == name] for name in rubric_ids}
    results["judge_agreement"] = _agreement(scorer.rubrics, trials) | {
        "per_rubric": {name: _agreement(scorer.rubrics, rows) for name, rows in of_rubric.items()}
    }
    return results

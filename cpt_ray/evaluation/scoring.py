"""How well the answers follow the requested level: accuracy, Kendall's tau-b and Spearman's rho, with intervals.

Intervals are from the two-way bootstrap of `resampling.py`. Trials are weighted, not copied: all three statistics are
functions of a table of weights by (requested anchor, score), which is exact for all resamples at once, as if they
had been copied, ties included. With dx = sign(x_i - x_j), dy = sign(y_i - y_j), weights w:

- tau-b = sum w_i w_j dx dy / sqrt(sum w_i w_j dx^2 * sum w_i w_j dy^2), Kendall (1945): concordant minus
  discordant pairs, over the geometric mean of the numbers of pairs not tied in x and not tied in y.
- rho is the Pearson correlation of the average ranks (Spearman 1904); the centred average rank of trial i is
  half of sum_j w_j dx.

The estimate itself is the case where each trial counts once. It agrees with scipy.stats' kendalltau (variant b) and
spearmanr. What is undefined (tau of constant scores) is None, never a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpt_ray.evaluation.dials import DialReadings, check_score, slope_gap
from cpt_ray.evaluation.perplexity import LogProbs, perplexities
from cpt_ray.evaluation.resampling import MODELS, Floats, Resamples, named_estimate
from cpt_ray.judging.agreement import agreement, spearman
from cpt_ray.judging.spread import Survey
from cpt_ray.rubrics.bins import confirms
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Trial

STATISTICS = ("accuracy", "kendall_tau", "spearman_rho")

Value = Callable[[Trial], float | None]
"""Takes the score (0-100) to evaluate from a trial: the whole score or the measured one; None if ungraded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _ScoredTrials:
    """Trials as columns; the arrays are of the graded trials, which come first in `trials`."""

    trials: Sequence[Trial]
    """The graded trials, then those without an answer: at no level, so not at the requested one."""
    target: NDArray[np.int64]
    """Rank of the requested anchor among the anchors."""
    score: NDArray[np.int64]
    """Rank of the score among the scores."""
    hit: Floats
    """1 if the score falls in the requested level's bin, else 0."""
    ungraded: int

    @property
    def unanswered(self) -> int:
        """Trials without an answer."""
        return len(self.trials) - len(self.score)

    def metrics(self, weights: Floats) -> Floats:
        """(3, columns): STATISTICS under each column of the trials' weights; NaN where undefined."""
        graded = weights[: len(self.score)]
        table = np.zeros((_size(self.target), _size(self.score), weights.shape[1]))
        np.add.at(table, (self.target, self.score), graded)
        by_target, by_score = table.sum(1), table.sum(0)
        rank_x, rank_y, total = _ranks(by_target), _ranks(by_score), graded.sum(0)
        both = (table * _ranks(_ranks(table, axis=1))).sum((0, 1))
        products = (table * rank_x[:, None] * rank_y).sum((0, 1))
        apart = [total**2 - (counts**2).sum(0) for counts in (by_target, by_score)]
        spread = [(counts * ranks**2).sum(0) for counts, ranks in ((by_target, rank_x), (by_score, rank_y))]
        with np.errstate(invalid="ignore", divide="ignore"):
            accuracy = self.hit @ graded / weights.sum(0)
            tau = both / np.sqrt(apart[0] * apart[1])
            rho = products / np.sqrt(spread[0] * spread[1])
        return np.stack([accuracy, np.clip(tau, -1, 1), np.clip(rho, -1, 1)])


def _size(ranks: NDArray[np.int64]) -> int:
    return int(ranks.max(initial=-1)) + 1


def _ranks(counts: Floats, axis: int = 0) -> Floats:
    """For each place along an axis, the weight below it less the weight above it."""
    below = counts.cumsum(axis) - counts
    return np.asarray(below - (counts.sum(axis, keepdims=True) - below - counts))


class _Scorer:
    """Holds what all arms share: the rubrics and the same resamples."""

    def __init__(self, rubrics: Sequence[Rubric], resamples: Resamples) -> None:
        self.rubrics, self.resamples = {rubric.id: rubric for rubric in rubrics}, resamples

    def scored(self, trials: Sequence[Trial], value: Value) -> _ScoredTrials:
        """Columns of the trials that `value` grades."""
        graded = [(trial, score) for trial in trials if (score := value(trial)) is not None]
        empty = [trial for trial in trials if not trial.text and value(trial) is None]
        hits = [confirms(self.rubrics[trial.rubric_id], trial.level, score) for trial, score in graded]
        return _ScoredTrials(
            trials=[*(trial for trial, _ in graded), *empty],
            target=np.unique([trial.target for trial, _ in graded], return_inverse=True)[1],
            score=np.unique([score for _, score in graded], return_inverse=True)[1],
            hit=np.array(hits, dtype=np.float64),
            ungraded=sum(bool(trial.text) and value(trial) is None for trial in trials),
        )

    def statistics(self, scored: _ScoredTrials) -> Floats:
        """(3, 1 + resamples): STATISTICS in every resample; NaN where undefined."""
        return self.resamples.statistics(scored.trials, scored.metrics)

    def arms(
        self, trials: Sequence[Trial], value: Value = lambda trial: trial.score, names: Sequence[str] | None = None
    ) -> dict[str, _Arm]:
        """Each model's arm, over the trials of the rubrics in `names` (all unless given)."""
        rubric_ids = list(self.rubrics) if names is None else names
        return {
            model: self._arm([trial for trial in trials if trial.model == model], value, rubric_ids) for model in MODELS
        }

    def perplexity(self, trials: Sequence[Trial], log_probs: LogProbs) -> dict[str, Any] | None:
        """Overall and per rubric."""
        overall = perplexities(trials, log_probs, self.resamples)
        if overall is None:
            return None
        groups = {name: [trial for trial in trials if trial.rubric_id == name] for name in self.rubrics}
        return overall | {
            "per_rubric": {name: perplexities(group, log_probs, self.resamples) for name, group in groups.items()}
        }

    def _arm(self, trials: Sequence[Trial], value: Value, rubric_ids: Sequence[str]) -> _Arm:
        """Overall and per rubric, over the trials of these rubrics."""
        groups = {name: [trial for trial in trials if trial.rubric_id == name] for name in rubric_ids}
        scored = {name: self.scored(group, value) for name, group in groups.items()}
        overall = self.scored([trial for group in groups.values() for trial in group], value)
        return _Arm(
            scored=overall,
            statistics=self.statistics(overall),
            per_rubric={name: (scored[name], self.statistics(scored[name])) for name in rubric_ids},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Arm:
    """One model under one condition."""

    scored: _ScoredTrials
    statistics: Floats
    per_rubric: Mapping[str, tuple[_ScoredTrials, Floats]]

    def summary(self) -> dict[str, Any]:
        """As in results.json."""

        def entry(scored: _ScoredTrials, statistics: Floats) -> dict[str, Any]:
            counts = {"n": len(scored.score), "ungraded": scored.ungraded, "unanswered": scored.unanswered}
            return _summary(statistics) | counts

        per_rubric = {name: entry(scored, statistics) for name, (scored, statistics) in self.per_rubric.items()}
        return {**entry(self.scored, self.statistics), "per_rubric": per_rubric}


def _summary(statistics: Floats) -> dict[str, Any]:
    """{metric: estimate, metric_ci: [low, high]} from (3, 1 + resamples)."""
    named = [named_estimate(name, columns) for name, columns in zip(STATISTICS, statistics, strict=True)]
    return {key: value for entry in named for key, value in entry.items()}


def _agreement(trials: Sequence[Trial], rubrics: Sequence[Rubric], written: Survey) -> dict[str, Any]:
    """How far judge and measures agree over the trials that have both; kappa needs levels, and so one rubric."""
    both = {rubric.id: _judged_and_measured(trials, rubric, written) for rubric in rubrics}
    per_rubric = {rubric.id: agreement(rubric, both[rubric.id]) for rubric in rubrics}
    pooled = [pair for pairs in both.values() for pair in pairs]
    same = sum(entry["same_level"] * entry["n"] for entry in per_rubric.values() if entry["n"])
    return {
        "n": len(pooled),
        "spearman_rho": spearman([judged for judged, _ in pooled], [measured for _, measured in pooled]),
        "same_level": same / len(pooled) if pooled else None,
        "per_rubric": per_rubric,
    }


def _judged_and_measured(trials: Sequence[Trial], rubric: Rubric, written: Survey) -> list[tuple[float, float]]:
    """(judged, measured) score of a rubric's trials that have both; where nothing is measured, by its check."""
    pairs = []
    for trial in trials:
        if trial.rubric_id == rubric.id and trial.judged is not None:
            measured = trial.measured
            if not rubric.measured:
                measured = check_score(rubric, written.get(rubric.id, {}), trial.text)
            if measured is not None:
                pairs.append((trial.judged, measured))
    return pairs


def score_trials(
    trials: Sequence[Trial],
    rubrics: Sequence[Rubric],
    resamples: int,
    seed: int,
    written: Survey = MappingProxyType({}),
    log_probs: LogProbs | None = None,
) -> dict[str, Any]:
    """The content of results.json.

    Per model ("base", "tuned"), over the trials with a held-out directive: `accuracy` (share whose score falls in the
    requested level's bin; a trial without an answer is a miss, an answer without a grade is left out), `kendall_tau`
    and `spearman_rho` (requested anchor against score, rubrics pooled), each with `*_ci` [low, high]; `n` graded,
    `ungraded` and `unanswered` trials; `per_rubric` the same by rubric id. Then the same again as `without_directive`
    (the same requests, unseen by the model) and as `measured`: the measured criteria alone instead of the whole score,
    over the rubrics that have any, None if none has. `difference` is tuned minus base; `judge_agreement` compares
    judged with measured scores over all trials that have both; per rubric with Cohen's kappa of the levels, in
    quadratic weights (`agreement.py`).

    Of the dials (`dials.py`), by rubric id: `chance` (of being at the requested level), `slope`, `check` (the slope by
    the second measure), `crosstalk` (by model, dial turned and dial moved) and `levels` (means, counts). Under the
    directives that were trained on, `trained_directives` has all of this, and as `gap` how much more the slope is
    there; None without such trials. `perplexity` is that of the answers under a held-out directive, by the base policy
    without a directive; None if it was not computed.

    Args:
        resamples: bootstrap resamples of prompts and directives behind each interval.
        seed: of the resampling.
        written: the survey of the writer's answers, if there is one.
    """
    scorer = _Scorer(rubrics, Resamples(trials, resamples, seed))
    directed = [trial for trial in trials if trial.directive is not None]
    held_out, trained = ([trial for trial in directed if trial.is_trained == which] for which in (False, True))
    arms = scorer.arms(held_out)
    results: dict[str, Any] = {model: arms[model].summary() for model in MODELS}
    measured = [rubric.id for rubric in rubrics if rubric.measured]
    without = scorer.arms([trial for trial in trials if trial.directive is None])
    by_measure = scorer.arms(held_out, lambda trial: trial.measured, measured)
    for model in MODELS:
        results[model]["without_directive"] = without[model].summary()
        results[model]["measured"] = by_measure[model].summary() if measured else None
    base, tuned = arms["base"], arms["tuned"]
    results["difference"] = _summary(tuned.statistics - base.statistics) | {
        "per_rubric": {name: _summary(tuned.per_rubric[name][1] - entry[1]) for name, entry in base.per_rubric.items()}
    }
    results["judge_agreement"] = _agreement(trials, rubrics, written)
    results["chance"] = {rubric.id: 1 / len(rubric.levels) for rubric in rubrics}
    readings = DialReadings(held_out, rubrics, scorer.resamples, written)
    results |= readings.summary()
    results["trained_directives"] = _trained(scorer, trained, readings, written) if trained else None
    results["perplexity"] = scorer.perplexity(held_out, log_probs) if log_probs else None
    return results


def _trained(scorer: _Scorer, trials: Sequence[Trial], held_out: DialReadings, written: Survey) -> dict[str, Any]:
    """The same under the directives that were trained on, and how much more the dials move there."""
    readings = DialReadings(trials, list(scorer.rubrics.values()), scorer.resamples, written)
    arms = {model: arm.summary() for model, arm in scorer.arms(trials).items()}
    return arms | readings.summary() | {"gap": slope_gap(readings, held_out)}

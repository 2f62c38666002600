"""What a dial does: how far its own measure moves when it is turned, and what else moves.

Each rubric is a dial. Its *value* in a text is what its measure gives, in the measure's own unit, if one measured
criterion is all of the rubric; else the score, in points. The levels' *anchors* are values as well. Then, between
the directives of a rubric's highest and of its lowest level:

    slope of dial j when dial i is turned = (mean of j at i's highest - mean of j at i's lowest level)
                                            / (anchor of j's highest - anchor of j's lowest level)

For i = j that is the dial's slope (at best 1), for others the crosstalk from i to j (at best 0): as much of j's own
range as moves with the whole range of i. Measured values need no grade, so every text counts for every such dial. A
judged score is known of the answers to its own rubric alone, and then there is no crosstalk on it.

The *second measure* (a rubric's `check`) selected nothing and labelled nothing. Its anchors are its own quantiles in
the written answers: at the levels' scores, or where the rubric gives values to its levels, at the share of the written
answers that measures less than these. So its slope is 1 as well if it moves as far as the first one should; it is
negative if it falls where the first one rises.

What the written answers are like is in the run's `spread.json` (`judging/spread.py`). Whatever is not there leaves out
what depends on it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt_ray.evaluation.resampling import MODELS, Floats, Resamples, estimate, named_estimate
from cpt_ray.judging.spread import CHECK, Survey
from cpt_ray.rubrics.grading import interpolate, measured_criterion, weighted
from cpt_ray.rubrics.measures import measures
from cpt_ray.rubrics.rubric import MeasureSpec, Rubric, ScoredMeasureSpec
from cpt_ray.tables.records import Trial

SCORE = "score"
"""In the place of a measure's name, where a dial's value is a score."""


class Dial:
    """A rubric's value in texts and at its levels, by the rubric's own measure or by its second one."""

    def __init__(self, rubric: Rubric, written: Mapping[str, Any], is_second: bool = False):
        """`written`: the rubric's entry of the survey."""
        self.rubric = rubric
        first, *others = rubric.criteria
        only = None if others else first.measure
        own, second = ({} if others else written.get(first.name, {})), written.get(CHECK, {})
        self._spec: ScoredMeasureSpec | MeasureSpec | None = rubric.check if is_second else only
        self.measure = self._spec.name if self._spec else SCORE
        self.anchors = _check_anchors(rubric, only, own, second) if is_second else _own_anchors(rubric, only)
        self.sd: float | None = (second if is_second else own).get("sd") if self._spec else None

    @property
    def span(self) -> float:
        """From the lowest level's anchor to the highest one's; below 0 for a measure that falls."""
        names = [level.name for level in self.rubric.levels]
        return self.anchors[names[-1]] - self.anchors[names[0]] if self.anchors else 0.0

    def value(self, trial: Trial) -> float:
        """NaN where it is undefined or not known."""
        if self._spec:
            value = measures(trial.text, self._spec.words, self._spec.against)[self._spec.name]
        elif self.rubric.judged:
            value = trial.score if trial.rubric_id == self.rubric.id else None
        else:
            grades = [measured_criterion(self.rubric, criterion, trial.text) for criterion in self.rubric.measured]
            value = weighted(self.rubric, grades)
        return float("nan") if value is None else value


def _own_anchors(rubric: Rubric, spec: ScoredMeasureSpec | None) -> dict[str, float]:
    if spec is None:
        return {level.name: level.score for level in rubric.levels}
    if spec.points:  # (value, score) by which it is graded
        values = [(score, value) for value, score in spec.points]
        return {level.name: interpolate(level.score, values) for level in rubric.levels}
    assert isinstance(spec.values, dict)
    return dict(spec.values)


def _check_anchors(
    rubric: Rubric, spec: ScoredMeasureSpec | None, own: Mapping[str, Any], second: Mapping[str, Any]
) -> dict[str, float]:
    """The second measure's quantiles where the written answers have the levels by the first one; empty if unknown."""
    if not second:
        return {}
    places = {level.name: level.score for level in rubric.levels}
    if spec and isinstance(spec.values, dict) and own:
        places = {name: _percentage_below(value, own["quantiles"]) for name, value in spec.values.items()}
    points = list(enumerate(second["quantiles"]))
    return {name: interpolate(place, points) for name, place in places.items()}


def _percentage_below(value: float, quantiles: Sequence[float]) -> float:
    """Percentage of the written answers that measure less than `value`; equal ones count half."""
    return 100 * statistics.fmean((quantile < value) + (quantile == value) / 2 for quantile in quantiles)


def check_score(rubric: Rubric, written: Mapping[str, Any], text: str) -> float | None:
    """The score (0-100) that a text has by the second measure: the quantile of its value among the written."""
    if rubric.check is None or CHECK not in written:
        return None
    value = measures(text, rubric.check.words, rubric.check.against)[rubric.check.name]
    return None if value is None else _percentage_below(value, written[CHECK]["quantiles"])


# ---------------------------------------------------------------- one model under one kind of directives


@dataclass(frozen=True)
class _Means:
    """Means (1 + resamples) of dials' values by the level that a rubric was turned to."""

    by_level: Mapping[tuple[str, str, int], Floats]
    """(rubric turned, level, number of the dial) to its means."""
    counts: Mapping[tuple[str, str, int], tuple[int, int]]
    """How many values are defined and undefined."""

    def moved(self, rubric: Rubric, dial: int) -> Floats:
        """How much higher a dial is at a rubric's highest than at its lowest level."""
        low, high = (self.by_level[rubric.id, rubric.levels[at].name, dial] for at in (0, -1))
        return high - low


def _means(trials: Sequence[Trial], rubrics: Sequence[Rubric], dials: Sequence[Dial], resamples: Resamples) -> _Means:
    by_level, counts = {}, {}
    for rubric in rubrics:
        for level in rubric.levels:
            rows = [trial for trial in trials if (trial.rubric_id, trial.level) == (rubric.id, level.name)]
            values = np.array([[dial.value(trial) for trial in rows] for dial in dials]).reshape(len(dials), len(rows))
            for at, columns in enumerate(_weighted_means(rows, values, resamples)):
                by_level[rubric.id, level.name, at] = columns
                defined = int(np.isfinite(values[at]).sum())
                counts[rubric.id, level.name, at] = (defined, len(rows) - defined)
    return _Means(by_level, counts)


def _weighted_means(rows: Sequence[Trial], values: Floats, resamples: Resamples) -> Floats:
    """(dials, 1 + resamples): means of values (dials, rows) over those that are defined."""
    is_defined = np.isfinite(values)

    def compute(weights: Floats) -> Floats:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray((np.where(is_defined, values, 0.0) @ weights) / (is_defined @ weights))

    return resamples.statistics(rows, compute)


# ---------------------------------------------------------------- results


class DialReadings:
    """What all dials of a run read under one kind of directives, base and tuned on the same resamples."""

    def __init__(self, trials: Sequence[Trial], rubrics: Sequence[Rubric], resamples: Resamples, written: Survey):
        """`trials`: those under a directive, all of one kind. `written`: of the writer's answers, as far as known."""
        self._rubrics = rubrics
        self._own = [Dial(rubric, written.get(rubric.id, {})) for rubric in rubrics]
        self._second = [Dial(rubric, written.get(rubric.id, {}), is_second=True) for rubric in rubrics if rubric.check]
        self._dials = [*self._own, *self._second]
        # sums of floats depend on their order, results should not
        ordered = sorted(trials, key=repr)
        self._means = {
            model: _means([trial for trial in ordered if trial.model == model], rubrics, self._dials, resamples)
            for model in MODELS
        }

    def slopes(self, is_second: bool = False) -> dict[str, dict[str, Floats]]:
        """{rubric id: {"base" | "tuned": (1 + resamples) slopes}}, by the rubrics' own or their second measures."""
        dials = self._second if is_second else self._own
        return {
            dial.rubric.id: {model: self._slope(model, dial.rubric, dial) for model in MODELS}
            for dial in dials
            if dial.span
        }

    def _slope(self, model: str, turned: Rubric, dial: Dial) -> Floats:
        return self._means[model].moved(turned, self._dials.index(dial)) / dial.span

    def summary(self) -> dict[str, Any]:
        """`slope`, `check`, `crosstalk` and `levels`, as in results.json."""
        return {
            "slope": self._slope_entries(self._own, is_second=False),
            "check": self._slope_entries(self._second, is_second=True),
            "crosstalk": {model: self._crosstalk(model) for model in MODELS},
            "levels": {dial.rubric.id: self._levels(dial) for dial in self._own},
        }

    def _slope_entries(self, dials: Sequence[Dial], is_second: bool) -> dict[str, Any]:
        slopes = self.slopes(is_second)
        return {
            dial.rubric.id: {"measure": dial.measure, "anchors": dial.anchors}
            | {model: self._moved(model, dial.rubric, dial) for model in MODELS}
            | {"change": _change(slopes[dial.rubric.id])}
            for dial in dials
            if dial.rubric.id in slopes
        }

    def _crosstalk(self, model: str) -> dict[str, Any]:
        """{turned: {moved: ...}} for pairs of different dials; entries that are not known are left out."""
        matrix: dict[str, Any] = {}
        for turned in self._rubrics:
            others = [dial for dial in self._own if dial.rubric.id != turned.id and dial.span]
            entries = {dial.rubric.id: self._moved(model, turned, dial) for dial in others}
            matrix[turned.id] = {name: entry for name, entry in entries.items() if entry["slope"] is not None}
        return matrix

    def _moved(self, model: str, turned: Rubric, dial: Dial) -> dict[str, Any]:
        columns = self._slope(model, turned, dial)
        entry: dict[str, Any] = named_estimate("slope", columns)
        if dial.sd and entry["slope"] is not None:
            # towards its highest level, in standard deviations of the written answers, which the key calls the pool
            entry["pool_sd"] = entry["slope"] * abs(dial.span) / dial.sd
        return entry

    def _levels(self, dial: Dial) -> dict[str, Any]:
        at, rubric = self._dials.index(dial), dial.rubric
        checks = [self._dials.index(check) for check in self._second if check.rubric.id == rubric.id]
        entry: dict[str, Any] = {"measure": dial.measure, "anchors": dial.anchors, "pool_sd": dial.sd}
        for model, means in self._means.items():
            entry[model] = {}
            for level in rubric.levels:
                defined, undefined = means.counts[rubric.id, level.name, at]
                mean, ends = estimate(means.by_level[rubric.id, level.name, at])
                entry[model][level.name] = {"mean": mean, "mean_ci": ends, "n": defined, "undefined": undefined}
                for number in checks:
                    entry[model][level.name]["check"] = estimate(means.by_level[rubric.id, level.name, number])[0]
        return entry


def _change(columns: Mapping[str, Floats]) -> dict[str, Any]:
    """Tuned minus base, resample by resample."""
    return named_estimate("slope", columns["tuned"] - columns["base"])


def slope_gap(trained: DialReadings, held_out: DialReadings) -> dict[str, Any]:
    """{rubric id: {"base" | "tuned": slope under trained directives less that under held-out ones}}."""
    first, second = trained.slopes(), held_out.slopes()
    return {
        name: {model: named_estimate("slope", first[name][model] - second[name][model]) for model in MODELS}
        for name in first
        if name in second
    }

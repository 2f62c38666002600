"""How a writer's own answers are spread over a measure, and the rubrics whose levels are set by it.

Nobody can say in advance how long a model's words are. A measured criterion with `values: spread` takes its values from
the first pass of the run: a score of 0 to 100 is the percentage of those answers that measure less. It is looked at
once and kept in the run directory, so that the levels of a run never move.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpt_ray.errors import UserError
from cpt_ray.rubrics.measures import OF_LENGTH, measures
from cpt_ray.rubrics.rubric import LEAST_ANSWERS, Criterion, MeasureSpec, Rubric
from cpt_ray.tables.records import Generation, content_id
from cpt_ray.tables.rundir import SPREAD_FILE, RunDir

CHECK = "check measure"
"""What a rubric's second measure is called among its criteria, none of which has a space in its name."""
Survey = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""What `survey` returns."""
MOST_SECONDS = 3600.0
"""How long to wait for the next shard of the first pass."""
MOST_SHARDS = 100
"""Shards of the first pass that are looked at, evenly spread, where there are more."""


def survey(rubrics: Sequence[Rubric], answers: Sequence[Generation]) -> dict[str, Any]:
    """{rubric id: {measured criterion, or CHECK: {"measure", "n", "sd", "quantiles"}}}: how the answers are spread.

    Quantiles are those of 0, 1 ... 100 percent. A measure of length is looked up in answers that are whole.
    """
    whole = [answer.text for answer in answers if not answer.is_cut]
    every = [answer.text for answer in answers]
    known: dict[str, Any] = {}
    for rubric in rubrics:
        specs: dict[str, MeasureSpec] = {each.name: each.measure for each in rubric.measured if each.measure}
        specs |= {CHECK: rubric.check} if rubric.check else {}
        texts = {
            name: whole if rubric.measures_length or spec.name in OF_LENGTH else every for name, spec in specs.items()
        }
        known[rubric.id] = {name: entry for name, spec in specs.items() if (entry := _entry(spec, texts[name]))}
    return known


def _entry(spec: MeasureSpec, texts: Sequence[str]) -> dict[str, Any] | None:
    values = [value for text in texts if (value := measures(text, spec.words, spec.against)[spec.name]) is not None]
    if not values:
        return None
    quantiles = np.percentile(values, np.arange(101)).round(6).tolist()
    return {"measure": spec.name, "n": len(values), "sd": round(statistics.pstdev(values), 6), "quantiles": quantiles}


def surveyed_shards(first_pass: Sequence[str]) -> Sequence[str]:
    """The shards of the first pass that are looked at."""
    return first_pass[:: math.ceil(len(first_pass) / MOST_SHARDS)]


def with_points(rubric: Rubric, entries: Mapping[str, Mapping[str, Any]]) -> Rubric:
    """The rubric with the values that the survey found; UserError if the writer has no spread on it."""
    criteria = tuple(_resolved(rubric, criterion, entries.get(criterion.name)) for criterion in rubric.criteria)
    return rubric.model_copy(update={"criteria": criteria})


def _resolved(rubric: Rubric, criterion: Criterion, entry: Mapping[str, Any] | None) -> Criterion:
    if criterion.measure is None or not criterion.is_spread:
        return criterion
    where = f"rubric {rubric.id}: {criterion.measure.name}"
    if entry is None or entry["n"] < LEAST_ANSWERS:
        count = entry["n"] if entry else 0
        raise UserError(
            f"{where}: `values: spread` takes {LEAST_ANSWERS} answers of the first pass that can be measured; found "
            f"{count}; raise synthesis.first_pass, or writer.sampling.max_tokens where answers are cut"
        )
    anchors = [level.score for level in rubric.levels]
    bounds = [(low + high) / 2 for low, high in itertools.pairwise(anchors)]
    scores = [anchors[0], *bounds, anchors[-1]]
    values = np.interp(scores, np.arange(101), entry["quantiles"]).tolist()
    if any(low >= high for low, high in itertools.pairwise(values)):
        shown = ", ".join(f"{score:.0f}%: {value:g}" for score, value in zip(scores, values, strict=True))
        raise UserError(
            f"{where}: the writer's answers are not spread enough for {len(anchors)} levels ({entry['n']} answers; "
            f"below {shown}); raise writer.sampling.temperature, give fewer levels, or give `values`"
        )
    points = tuple(zip(values, scores, strict=True))
    return criterion.model_copy(update={"measure": criterion.measure.model_copy(update={"points": points})})


@dataclass(frozen=True)
class Spread:
    """Where a run's levels come from, if the writer's own spread sets any: a look at the whole first pass."""

    rubrics: tuple[Rubric, ...]
    first_pass: tuple[str, ...]
    """Its shards of generations."""

    @functools.cached_property
    def key(self) -> str:
        """Changes when the levels could."""
        return content_id([rubric.content_hash for rubric in self.rubrics], list(self.first_pass))

    @property
    def _survey_key(self) -> str:
        """Changes when the survey could: it looks at second measures as well, which set no level."""
        checks = [rubric.check.model_dump(mode="json") if rubric.check else None for rubric in self.rubrics]
        return content_id(self.key, checks)

    def is_ready(self, run: RunDir) -> bool:
        """Whether the levels are known, or can be."""
        return self._read(run) is not None or run.names("generations") >= set(self.first_pass)

    def read_or_make(self, run: RunDir) -> dict[str, Any]:
        """The survey of the first pass, from spread.json; made and written there if it is not there yet."""
        known = self._read(run)
        if known is None:
            known = survey(self.rubrics, run.read("generations", surveyed_shards(self.first_pass), Generation))
            run.write_json(SPREAD_FILE, {"key": self._survey_key, "rubrics": known})
        return known

    def resolve(self, run: RunDir) -> tuple[Rubric, ...]:
        """The rubrics with their points; UserError if the writer has no spread."""
        known = self.read_or_make(run)
        return tuple(with_points(rubric, known.get(rubric.id, {})) for rubric in self.rubrics)

    def wait(self, run: RunDir) -> None:
        """Returns once the levels can be known; UserError if no further shard arrives within MOST_SECONDS.

        All shards of the first pass are under way when a later one waits for them (`engines/pool.py` starts them in
        order).
        """
        left, since = len(self.first_pass), time.monotonic()
        while not self.is_ready(run):
            now_left = len(set(self.first_pass) - run.names("generations"))
            if now_left < left:
                left, since = now_left, time.monotonic()
            if time.monotonic() - since > MOST_SECONDS:
                raise UserError(
                    f"no shard of the first pass was finished in {MOST_SECONDS / 60:.0f} minutes; {left} are missing"
                )
            time.sleep(0.5)

    def _read(self, run: RunDir) -> dict[str, Any] | None:
        known = run.read_json(SPREAD_FILE)
        return dict(known["rubrics"]) if known and known["key"] == self._survey_key else None

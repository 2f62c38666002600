"""Draws grids from a prompt's graded answers: one answer at each level of a rubric. Pure logic.

An answer's level is what its grade says, whatever it was asked to be. At each level the answer is drawn that is
farthest out on the rubric itself and most like the prompt's other answers on all other rubrics, so that a directive's
pairs differ in what the directive says and in little else. The differences that remain must not add up: their sum over
the grids so far pushes the next choice the other way (`PUSH`), and in the end the grids that add most to a mean
difference are dropped, if that balances the rest.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cpt_ray.rubrics.bins import level_at
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.by_hash import shuffled
from cpt_ray.tables.records import Generation, Grade

LENGTH = "tokens (log)"
"""What an answer's length is called among the rubrics, none of which can have this id; no rubric of length is balanced
against it."""
FAR = 1.5
"""Standard deviations from the prompt's median beyond which an answer of an end level gains nothing more."""
BALANCED = 0.1
"""Standard deviations by which a run's grids may differ, in the mean, in what they do not dial."""
PUSH = 0.3
"""How strongly a difference summed over the grids so far counts against adding to it, in costs per sd."""

LevelNames = tuple[str, ...]
"""The name of one level of each rubric that a grid is drawn for: one name, or several for combined rubrics."""
Grid = dict[LevelNames, Generation]


def levels_by_rubric(rubrics: Sequence[Rubric], names: LevelNames) -> list[tuple[Rubric, str]]:
    """Each rubric with its level's name."""
    return list(zip(rubrics, names, strict=True))


@dataclass(frozen=True)
class GradedAnswer:
    """A generation and its score by each rubric."""

    generation: Generation
    scores: Mapping[str, float]
    """By rubric id; rubrics by which it is ungraded are left out."""
    first_scores: Mapping[str, float] = field(default_factory=dict)
    """Where several judges graded it: the first one's scores. How far out an answer is on its own rubric is taken from
    them alone, so that the other judges' scores say without selection how far apart a grid's answers are."""

    def own_score(self, name: str) -> float | None:
        """The score by which it is drawn for a grid of this rubric."""
        return self.first_scores.get(name, self.scores.get(name))

    def level(self, rubrics: Sequence[Rubric], margin: float) -> LevelNames | None:
        """The level that it is at, by each rubric; None if it is between two, or not graded."""
        levels = []
        for rubric in rubrics:
            score = self.scores.get(rubric.id)
            if score is None or (self.generation.is_cut and rubric.measures_length):
                return None
            level = level_at(rubric, score, margin)
            if level is None:
                return None
            levels.append(level)
        return tuple(levels)


def answers_of(
    generations: Iterable[Generation], grades: Iterable[Grade], rubrics: Sequence[Rubric]
) -> dict[str, list[GradedAnswer]]:
    """Prompt id to its graded answers."""
    by_key = {(grade.unit_id, grade.rubric_id): grade for grade in grades}
    answers: dict[str, list[GradedAnswer]] = defaultdict(list)
    for generation in generations:
        given = {rubric.id: by_key.get((generation.unit_id, rubric.id)) for rubric in rubrics}
        scores = {name: grade.score for name, grade in given.items() if grade and grade.score is not None}
        answers[generation.prompt_id].append(GradedAnswer(generation, scores))
    return answers


def missing_levels(rubric: Rubric, answers: Iterable[GradedAnswer], wanted: int, margin: float) -> dict[str, int]:
    """How many answers a prompt still lacks at each level, of `wanted`; levels that lack none are left out."""
    count = dict.fromkeys((level.name for level in rubric.levels), wanted)
    for answer in answers:
        if level := answer.level([rubric], margin):
            count[level[0]] -= 1
    return {level: number for level, number in count.items() if number > 0}


@dataclass
class Shifts:
    """How far grids differ in what their rubric does not dial, in sd: the higher level less the lower, summed."""

    grids: int = 0
    taken: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By rubric, of the answers that were taken."""
    offered: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of all answers that could have been: the mean at each level."""
    gaps: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """`taken` less what the offset wants."""


@dataclass
class _DrawnGrid:
    """A grid and what it adds to the sums of `Shifts`."""

    prompt_id: str
    answers: dict[LevelNames, GradedAnswer]
    taken: dict[str, float]
    offered: dict[str, float]
    gaps: dict[str, float]


class GridMaker:
    """Draws the grids of some prompts, one prompt after the other, and then leaves out those that unbalance them."""

    def __init__(
        self,
        rubrics: Sequence[Rubric],
        pools: Mapping[str, Sequence[GradedAnswer]],
        margin: float,
        balance: bool,
        offset: Mapping[str, Mapping[str, float]] | None = None,
    ):
        """
        Args:
            pools: prompt id to answers; all of them say in which standard deviations differences are counted.
            offset: by rubric, the mean difference in another one that its grids are balanced to; 0 unless given.
        """
        self._pools, self._margin, self._is_balanced, self._offset = pools, margin, balance, offset or {}
        has_length = any(rubric.measures_length for rubric in rubrics)
        self._names = [rubric.id for rubric in rubrics] + ([] if has_length else [LENGTH])
        answers = [answer for pool in pools.values() for answer in pool]
        self._sd = {name: _sd(answers, name) for name in self._names}
        self.given_up: set[str] = set()
        """unit_ids of the answers in grids that were left out, since they unbalanced the others."""

    def draw(self, rubrics: Sequence[Rubric], most: int) -> tuple[dict[str, list[Grid]], Shifts]:
        """Prompt id to at most `most` grids, with two levels or more each; no answer is in two of them.

        Args:
            rubrics: one, or several whose levels are combined; only grids of one are balanced.
        """
        shifts, drawn = Shifts(), list[_DrawnGrid]()
        for prompt_id, pool in self._pools.items():
            free = [(answer, level) for answer in pool if (level := answer.level(rubrics, self._margin))]
            for _ in range(most):
                answers = self._joint(free) if len(rubrics) > 1 else self._single(rubrics[0], free, pool, shifts)
                if len(answers) < 2:
                    break
                drawn.append(_DrawnGrid(prompt_id, answers, *self._differences(rubrics, answers, free)))
                _add(shifts, drawn[-1])
                taken = {answer.generation.unit_id for answer in answers.values()}
                free = [(answer, level) for answer, level in free if answer.generation.unit_id not in taken]
        if self._is_balanced:
            kept = _balanced(drawn, self._offset.get(rubrics[0].id, {}))
            is_kept = set(map(id, kept))
            left_out = (answer for grid in drawn if id(grid) not in is_kept for answer in grid.answers.values())
            self.given_up |= {answer.generation.unit_id for answer in left_out}
            drawn = kept
        shifts, grids = Shifts(), defaultdict(list)
        for grid in drawn:
            _add(shifts, grid)
            grids[grid.prompt_id].append({level: answer.generation for level, answer in grid.answers.items()})
        return grids, shifts

    def _joint(self, free: Sequence[tuple[GradedAnswer, LevelNames]]) -> dict[LevelNames, GradedAnswer]:
        """Answers of which no two have the same level of any of the rubrics."""
        grid: dict[LevelNames, GradedAnswer] = {}
        used: set[tuple[int, str]] = set()
        for answer, level in shuffled(free, lambda pair: ("joint", pair[0].generation.unit_id)):
            parts = set(enumerate(level))
            if not parts & used:
                used |= parts
                grid[level] = answer
        return grid

    def _single(
        self,
        rubric: Rubric,
        free: Sequence[tuple[GradedAnswer, LevelNames]],
        pool: Sequence[GradedAnswer],
        shifts: Shifts,
    ) -> dict[LevelNames, GradedAnswer]:
        middle = {name: _median(_value(answer, name) for answer in pool) for name in self._names}
        middle[rubric.id] = _median(answer.own_score(rubric.id) for answer in pool)
        grid: dict[LevelNames, GradedAnswer] = {}
        for level in rubric.levels:
            some = [answer for answer, at in free if at == (level.name,)]
            if some and self._is_balanced:
                costs = [self._cost(rubric, answer, _side(rubric, level.name), middle, shifts) for answer in some]
                grid[level.name,] = some[costs.index(min(costs))]
            elif some:
                grid[level.name,] = shuffled(some, lambda answer: ("grid", answer.generation.unit_id))[0]
        return grid

    def _cost(
        self, rubric: Rubric, answer: GradedAnswer, side: float, middle: Mapping[str, float], shifts: Shifts
    ) -> float:
        """Small where an answer is far out on its own rubric and on the others in the prompt's middle, or where the
        offset wants it."""
        own = self._in_sd(answer.own_score(rubric.id), rubric.id, middle)
        cost = -min(own * side, FAR) if abs(side) == 1 else abs(own - side)
        for name in self._others([rubric]):
            offset = self._offset.get(rubric.id, {}).get(name, 0.0)
            away = self._in_sd(_value(answer, name), name, middle) - side * offset / 2
            cost += away * away / 2 + PUSH * shifts.gaps[name] * side * away
        return cost

    def _in_sd(self, value: float | None, name: str, middle: Mapping[str, float]) -> float:
        return 0.0 if value is None or not self._sd[name] else (value - middle[name]) / self._sd[name]

    def _others(self, rubrics: Sequence[Rubric]) -> list[str]:
        """What a grid of these rubrics should not differ in."""
        own = {rubric.id for rubric in rubrics}
        return [name for name in self._names if name not in own and self._sd[name]]

    def _differences(
        self,
        rubrics: Sequence[Rubric],
        grid: Mapping[LevelNames, GradedAnswer],
        free: Sequence[tuple[GradedAnswer, LevelNames]],
    ) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        """The highest level's answer less the lowest's, in what they should not differ; so of all at the levels; and
        the first less what the offset wants of these levels, which is half of it for neighbours of three."""
        if len(rubrics) > 1:
            return {}, {}, {}
        low, *_, high = grid  # in the rubric's order
        at = {name: [answer for answer, level in free if level == name] for name in (low, high)}
        others = self._others(rubrics)
        taken = {name: _difference([grid[low]], [grid[high]], name) / self._sd[name] for name in others}
        share = (_side(rubrics[0], high[0]) - _side(rubrics[0], low[0])) / 2
        offset = self._offset.get(rubrics[0].id, {})
        gaps = {name: value - share * offset.get(name, 0.0) for name, value in taken.items()}
        return taken, {name: _difference(at[low], at[high], name) / self._sd[name] for name in others}, gaps


def _add(shifts: Shifts, grid: _DrawnGrid) -> None:
    shifts.grids += 1
    for sums, more in ((shifts.taken, grid.taken), (shifts.offered, grid.offered), (shifts.gaps, grid.gaps)):
        for name, value in more.items():
            sums[name] += value


def _balanced(grids: Sequence[_DrawnGrid], offset: Mapping[str, float]) -> list[_DrawnGrid]:
    """Without those that add most to a mean gap beyond BALANCED, until there is none.

    Where more than half would have to go, the levels themselves differ in more than the rubric, or the offset is not to
    be had. Then what has an offset is left as it is and, if that does not do, all grids are kept.
    """
    for names in (grids[0].gaps.keys(), grids[0].gaps.keys() - offset.keys()) if grids else ():
        kept = list(grids)
        sums = {name: sum(grid.gaps[name] for grid in grids) for name in names}
        while len(kept) > math.ceil(len(grids) / 2):
            off = {name: total for name, total in sums.items() if abs(total) > BALANCED * len(kept)}
            if not off:
                return kept
            worst = max(kept, key=lambda grid: sum(math.copysign(1, off[name]) * grid.gaps[name] for name in off))
            kept.remove(worst)
            for name in names:
                sums[name] -= worst.gaps[name]
    return list(grids)


def _side(rubric: Rubric, name: str) -> float:
    """-1 for the lowest level, 1 for the highest, between them in equal steps."""
    at = [level.name for level in rubric.levels].index(name)
    return 2 * at / (len(rubric.levels) - 1) - 1


def _value(answer: GradedAnswer, name: str) -> float | None:
    return math.log(max(1, answer.generation.num_tokens)) if name == LENGTH else answer.scores.get(name)


def _sd(answers: Sequence[GradedAnswer], name: str) -> float:
    values = [value for answer in answers if (value := _value(answer, name)) is not None]
    return statistics.pstdev(values) if values else 0.0


def _median(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else 0.0


def _difference(low: Sequence[GradedAnswer], high: Sequence[GradedAnswer], name: str) -> float:
    """The mean of the high answers less that of the low ones; 0 where one has no value."""
    values = [[value for answer in some if (value := _value(answer, name)) is not None] for some in (low, high)]
    return statistics.fmean(values[1]) - statistics.fmean(values[0]) if all(values) else 0.0

"""Which of a prompt's answers make a grid: one answer at each level of a rubric. Pure logic.

What an answer was asked to be is a proposal; its grade says which level it stands for. Among the answers at a level
those are taken that are far out on the rubric that is dialled and like the prompt's other answers on all others, so
that a directive's pairs differ in what the directive says and in little else. What is left of the differences is kept
from adding up: a sum over all grids drawn so far pushes the next choice the other way, and grids that add most to what
is left in the end are given up, if that balances the rest.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cpt_ray.rubrics.bins import level_at
from cpt_ray.rubrics.measures import OF_LENGTH
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.choice import shuffled
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

Level = tuple[str, ...]
"""One level's name of each rubric that a grid is of."""
Grid = dict[Level, Generation]


def is_of_length(rubric: Rubric) -> bool:
    """Whether the rubric measures how long an answer is: then an answer that was cut says nothing."""
    return any(criterion.measure.name in OF_LENGTH for criterion in rubric.measured if criterion.measure)


@dataclass(frozen=True)
class Answer:
    """A generation with its score by each rubric that grades it."""

    generation: Generation
    scores: Mapping[str, float]
    """By rubric id; ungraded: not in it."""

    def level(self, rubrics: Sequence[Rubric], margin: float) -> Level | None:
        """The level that it is at, by each rubric; None if it is between two, or not graded."""
        levels = []
        for rubric in rubrics:
            score = self.scores.get(rubric.id)
            if score is None or (self.generation.is_cut and is_of_length(rubric)):
                return None
            level = level_at(rubric, score, margin)
            if level is None:
                return None
            levels.append(level)
        return tuple(levels)


def answers_of(
    generations: Iterable[Generation], grades: Mapping[tuple[str, str], Grade], rubrics: Sequence[Rubric]
) -> dict[str, list[Answer]]:
    """Prompt id to its graded answers; `grades` by (unit_id, rubric_id)."""
    answers: dict[str, list[Answer]] = defaultdict(list)
    for generation in generations:
        given = {rubric.id: grades.get((generation.unit_id, rubric.id)) for rubric in rubrics}
        scores = {name: grade.score for name, grade in given.items() if grade and grade.score is not None}
        answers[generation.prompt_id].append(Answer(generation, scores))
    return answers


def missing_levels(rubric: Rubric, answers: Iterable[Answer], wanted: int, margin: float) -> dict[str, int]:
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
    drawn: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By rubric, of the answers that were taken."""
    offered: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of all answers that could have been: the mean at each level."""


@dataclass
class _Drawn:
    """A grid and what it adds to the sums of `Shifts`."""

    prompt_id: str
    answers: dict[Level, Answer]
    drawn: dict[str, float]
    offered: dict[str, float]


class GridMaker:
    """Draws the grids of some prompts, one prompt after the other, and then leaves out those that unbalance them."""

    def __init__(self, rubrics: Sequence[Rubric], pools: Mapping[str, Sequence[Answer]], margin: float, balance: bool):
        """`pools`: prompt id to answers; all of them say in which standard deviations differences are counted."""
        self._pools, self._margin, self._is_balanced = pools, margin, balance
        has_length = any(map(is_of_length, rubrics))
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
        shifts, drawn = Shifts(), list[_Drawn]()
        for prompt_id, pool in self._pools.items():
            free = [(answer, level) for answer in pool if (level := answer.level(rubrics, self._margin))]
            for _ in range(most):
                grid = self._joint(free) if len(rubrics) > 1 else self._single(rubrics[0], free, pool, shifts)
                if len(grid) < 2:
                    break
                drawn.append(_Drawn(prompt_id, grid, *self._differences(rubrics, grid, free)))
                _add(shifts, drawn[-1])
                taken = {answer.generation.unit_id for answer in grid.values()}
                free = [(answer, level) for answer, level in free if answer.generation.unit_id not in taken]
        if self._is_balanced:
            kept = _balanced(drawn)
            is_kept = set(map(id, kept))
            left_out = (answer for grid in drawn if id(grid) not in is_kept for answer in grid.answers.values())
            self.given_up |= {answer.generation.unit_id for answer in left_out}
            drawn = kept
        shifts, grids = Shifts(), defaultdict(list)
        for left in drawn:
            _add(shifts, left)
            grids[left.prompt_id].append({level: answer.generation for level, answer in left.answers.items()})
        return grids, shifts

    def _joint(self, free: Sequence[tuple[Answer, Level]]) -> dict[Level, Answer]:
        """Answers of which no two have the same level of any of the rubrics."""
        grid: dict[Level, Answer] = {}
        used: set[tuple[int, str]] = set()
        for answer, level in shuffled(free, lambda pair: ("joint", pair[0].generation.unit_id)):
            parts = set(enumerate(level))
            if not parts & used:
                used |= parts
                grid[level] = answer
        return grid

    def _single(
        self, rubric: Rubric, free: Sequence[tuple[Answer, Level]], pool: Sequence[Answer], shifts: Shifts
    ) -> dict[Level, Answer]:
        middle = {name: _median(pool, name) for name in self._names}
        grid: dict[Level, Answer] = {}
        for level in rubric.levels:
            some = [answer for answer, at in free if at == (level.name,)]
            if some and self._is_balanced:
                costs = [self._cost(rubric, answer, _side(rubric, level.name), middle, shifts) for answer in some]
                grid[level.name,] = some[costs.index(min(costs))]
            elif some:
                grid[level.name,] = shuffled(some, lambda answer: ("grid", answer.generation.unit_id))[0]
        return grid

    def _cost(self, rubric: Rubric, answer: Answer, side: float, middle: Mapping[str, float], shifts: Shifts) -> float:
        """Small where an answer is far out on its own rubric and in the prompt's middle on the others."""
        own = self._in_sd(answer, rubric.id, middle)
        cost = -min(own * side, FAR) if abs(side) == 1 else abs(own - side)
        for name in self._others([rubric]):
            away = self._in_sd(answer, name, middle)
            cost += away * away / 2 + PUSH * shifts.drawn[name] * side * away
        return cost

    def _in_sd(self, answer: Answer, name: str, middle: Mapping[str, float]) -> float:
        value = _value(answer, name)
        return 0.0 if value is None or not self._sd[name] else (value - middle[name]) / self._sd[name]

    def _others(self, rubrics: Sequence[Rubric]) -> list[str]:
        """What a grid of these rubrics should not differ in."""
        own = {rubric.id for rubric in rubrics}
        return [name for name in self._names if name not in own and self._sd[name]]

    def _differences(
        self, rubrics: Sequence[Rubric], grid: Mapping[Level, Answer], free: Sequence[tuple[Answer, Level]]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The highest level's answer less the lowest's, in what they should not differ; and so of all at the levels."""
        if len(rubrics) > 1:
            return {}, {}
        low, *_, high = grid  # in the rubric's order
        at = {name: [answer for answer, level in free if level == name] for name in (low, high)}
        others = self._others(rubrics)
        drawn = {name: _difference([grid[low]], [grid[high]], name) / self._sd[name] for name in others}
        return drawn, {name: _difference(at[low], at[high], name) / self._sd[name] for name in others}


def _add(shifts: Shifts, grid: _Drawn) -> None:
    shifts.grids += 1
    for sums, more in ((shifts.drawn, grid.drawn), (shifts.offered, grid.offered)):
        for name, value in more.items():
            sums[name] += value


def _balanced(grids: Sequence[_Drawn]) -> list[_Drawn]:
    """Without those that add most to a mean difference beyond BALANCED, until there is none.

    All of them where more than half would have to go: then the levels themselves differ in more than the rubric.
    """
    kept, sums = list(grids), Shifts()
    for grid in grids:
        _add(sums, grid)
    while len(kept) > math.ceil(len(grids) / 2):
        off = {name: total for name, total in sums.drawn.items() if abs(total) > BALANCED * len(kept)}
        if not off:
            return kept
        worst = max(kept, key=lambda grid: sum(math.copysign(1, off[name]) * grid.drawn[name] for name in off))
        kept.remove(worst)
        for name, value in worst.drawn.items():
            sums.drawn[name] -= value
    return list(grids)


def _side(rubric: Rubric, name: str) -> float:
    """-1 for the lowest level, 1 for the highest, between them in equal steps."""
    at = [level.name for level in rubric.levels].index(name)
    return 2 * at / (len(rubric.levels) - 1) - 1


def _value(answer: Answer, name: str) -> float | None:
    return math.log(max(1, answer.generation.num_tokens)) if name == LENGTH else answer.scores.get(name)


def _sd(answers: Sequence[Answer], name: str) -> float:
    values = [value for answer in answers if (value := _value(answer, name)) is not None]
    return statistics.pstdev(values) if values else 0.0


def _median(answers: Sequence[Answer], name: str) -> float:
    values = [value for answer in answers if (value := _value(answer, name)) is not None]
    return statistics.median(values) if values else 0.0


def _difference(low: Sequence[Answer], high: Sequence[Answer], name: str) -> float:
    """The mean of the high answers less that of the low ones; 0 where one has no value."""
    values = [[value for answer in some if (value := _value(answer, name)) is not None] for some in (low, high)]
    return statistics.fmean(values[1]) - statistics.fmean(values[0]) if all(values) else 0.0

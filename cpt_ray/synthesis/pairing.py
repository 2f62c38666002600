"""From graded answers to pairs and their twins. Pure logic.

All answers to a prompt are one pool, whatever they were asked to be. Each rubric draws grids from it (`grids.py`): at
most one answer per level, each at the level that its grade says. Every ordered pair of a grid's answers becomes a pair,
so each pair's twin is there by construction. In a grid of several rubrics a level is one level of each; a control
answer (the policy's own) is one more level.
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.config import SynthesisConfig
from cpt_ray.grids import GradedAnswer, Grid, GridMaker, LevelNames, Shifts, levels_by_rubric
from cpt_ray.judging.judge import Grades, Gradings
from cpt_ray.rubrics.bins import confirms
from cpt_ray.rubrics.catalog import compose_directives
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.by_hash import picked
from cpt_ray.tables.records import (
    CONTROL,
    Directive,
    Generation,
    Grade,
    Message,
    Pair,
    Reject,
    content_id,
    joined,
    parts_of,
)
from cpt_ray.texts import same_text
from cpt_ray.units import cell_id_of, control_directive

CONTROL_LEVEL: LevelNames = (CONTROL,)


@dataclass
class Paired:
    """What became of a shard's answers."""

    pairs: list[Pair] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    at_level: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Answers by (rubric, level) that they are at."""
    hit: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Those that were asked to be there."""
    kept: dict[tuple[str, str], list[str]] = field(default_factory=lambda: defaultdict(list))
    """unit_ids of those that are in a pair of the rubric."""
    used: set[str] = field(default_factory=set)
    """unit_ids of the answers that are in a pair."""
    shifts: dict[str, Shifts] = field(default_factory=dict)
    """By rubric id (`joined`)."""

    def add(self, grid_pairs: _GridPairs, grid: Grid) -> None:
        """The pairs of one grid."""
        pairs, rejects = grid_pairs.pair(grid)
        self.pairs += pairs
        self.rejects += rejects
        self.used |= grid_pairs.used
        for level, answer in grid.items():
            if answer.unit_id in grid_pairs.used:
                self.kept[_rubric_ids(grid_pairs.rubrics), joined(level)].append(answer.unit_id)


def pair_answers(
    rubrics: Sequence[Rubric],
    generations: Iterable[Generation],
    gradings: Gradings,
    directives: Sequence[Directive],
    settings: SynthesisConfig,
    repeats: Mapping[str, str],
) -> Paired:
    """Pairs of all answers to some prompts, and each answer that is in none, with its reason.

    Args:
        gradings: an answer without a grade by a rubric is in none of its grids. Where several judges graded, the
            farthest answers are taken by the first one's grades.
        directives: only those of the train split are used.
        settings: which rubrics' directives are also given together, how many grids, the margin between levels, and
            what may keep two good answers apart.
        repeats: unit_id of an answer to the one that it nearly repeats.
    """
    of_prompt: dict[str, list[Generation]] = defaultdict(list)
    for generation in generations:
        of_prompt[generation.prompt_id].append(generation)
    usable: dict[tuple[str, str], list[Directive]] = defaultdict(list)
    for directive in sorted(directives, key=lambda row: row.directive_id):
        if directive.split == "train":
            usable[directive.rubric_id, directive.level].append(directive)
    by_id = {rubric.id: rubric for rubric in rubrics}
    groups = [[rubric] for rubric in rubrics] + [[by_id[name] for name in names] for names in settings.combine]
    pools = {name: _Pool(rubrics, some, gradings, repeats) for name, some in of_prompt.items()}
    answers = {name: pool.answers for name, pool in pools.items()}
    maker = GridMaker(rubrics, answers, settings.margin, settings.balance, settings.offset)
    paired = Paired()
    for group in groups:
        grids, paired.shifts[_rubric_ids(group)] = maker.draw(group, settings.grids)
        for prompt_id, number, grid in _numbered(grids):
            cell_id = cell_id_of(_rubric_ids(group), prompt_id, number)
            grid_pairs = _GridPairs(group, cell_id, gradings.combined, usable, settings)
            control = pools[prompt_id].control_of(_rubric_ids(group)) if number == 0 else None
            paired.add(grid_pairs, grid | ({CONTROL_LEVEL: control} if control else {}))
    for pool in pools.values():
        paired.rejects += pool.rejects + pool.unused(groups, settings.margin, paired.used, maker.given_up)
        _count_levels(paired, rubrics, pool.answers, settings.margin)
    return paired


def _numbered(grids: Mapping[str, Sequence[Grid]]) -> Iterator[tuple[str, int, Grid]]:
    for prompt_id, some in grids.items():
        for number, grid in enumerate(some):
            yield prompt_id, number, grid


def _rubric_ids(rubrics: Sequence[Rubric]) -> str:
    """Their ids as the tables hold them."""
    return joined(rubric.id for rubric in rubrics)


def _count_levels(paired: Paired, rubrics: Sequence[Rubric], answers: Sequence[GradedAnswer], margin: float) -> None:
    for answer in answers:
        asked = answer.generation.rubric_id, answer.generation.level
        for rubric in rubrics:
            if level := answer.level([rubric], margin):
                paired.at_level[rubric.id, level[0]] += 1
                paired.hit[rubric.id, level[0]] += asked == (rubric.id, level[0])


def _scores(grades: Iterable[Grade]) -> dict[str, float]:
    """By rubric id, of those that have one."""
    return {grade.rubric_id: grade.score for grade in grades if grade.score is not None}


class _Pool:
    """One prompt's answers: those that can be drawn, the policy's own, and what cannot be used."""

    def __init__(
        self,
        rubrics: Sequence[Rubric],
        generations: Sequence[Generation],
        gradings: Gradings,
        repeats: Mapping[str, str],
    ):
        self.prompt_id = generations[0].prompt_id
        self.answers: list[GradedAnswer] = []
        self.rejects: list[Reject] = []
        self._controls: dict[str, Generation] = {}
        for generation in generations:
            keys = [(generation.unit_id, rubric.id) for rubric in rubrics]
            verdicts = [gradings.combined[key] for key in keys if key in gradings.combined]
            scores = _scores(verdicts)
            first = _scores(gradings.first[key] for key in keys if key in gradings.first and key[1] in scores)
            problem = self._problem(generation, verdicts, scores, repeats)
            if generation.level == CONTROL and not problem:
                own = [rubric for rubric in rubrics if rubric.id in parts_of(generation.rubric_id)]
                problem = _problem_of_control(own, generation, verdicts, scores)
            if problem:
                self.rejects.append(Reject.of("pair", generation, generation.unit_id, *problem))
            elif generation.level == CONTROL:
                self._controls[generation.rubric_id] = generation
            else:
                self.answers.append(GradedAnswer(generation, scores, first))

    def control_of(self, rubric_id: str) -> Generation | None:
        """The policy's own answer that takes part in the rubric's first grid, if there is one."""
        return self._controls.get(rubric_id)

    def _problem(
        self,
        generation: Generation,
        verdicts: Sequence[Grade],
        scores: Mapping[str, float],
        repeats: Mapping[str, str],
    ) -> tuple[str, str] | None:
        """(reason, detail) why an answer cannot be in any grid, or None."""
        if not scores:
            why = "; ".join(dict.fromkeys(verdict.reason for verdict in verdicts))
            return "ungraded", why or "no verdict on this answer"
        same = [answer.generation for answer in self.answers] + list(self._controls.values())
        if any(same_text(generation.text, other.text) for other in same):
            return "same text", "another answer to this prompt is the same text"
        if original := repeats.get(generation.unit_id):
            return "near duplicate", f"of {original}"
        return None

    def unused(
        self, groups: Sequence[Sequence[Rubric]], margin: float, used: Set[str], given_up: Set[str]
    ) -> list[Reject]:
        """A reject for each answer that could have been in a grid and is in no pair."""
        rejects = []
        for answer in self.answers:
            generation = answer.generation
            if generation.unit_id not in used:
                reason = self._why_unused(answer, groups, margin, generation.unit_id in given_up)
                rejects.append(Reject.of("pair", generation, generation.unit_id, *reason))
        for control in self._controls.values():
            if control.unit_id not in used:
                rejects.append(
                    Reject.of("pair", control, control.unit_id, "no partner", "its prompt has no grid to add it to")
                )
        return rejects

    def _why_unused(
        self, answer: GradedAnswer, groups: Sequence[Sequence[Rubric]], margin: float, is_given_up: bool
    ) -> tuple[str, str]:
        if is_given_up:
            return "unbalanced", "its grid differs in more than its own rubric"
        levels = {_rubric_ids(group): answer.level(group, margin) for group in groups}
        if not any(levels.values()):
            scores = ", ".join(f"{name} {score:.1f}" for name, score in answer.scores.items())
            return "between two levels", f"graded {scores}"
        for group in groups:
            at = levels[_rubric_ids(group)]
            if at and any(other.level(group, margin) not in (None, at) for other in self.answers):
                return "not needed", f"other answers to this prompt were taken ({_rubric_ids(group)} {joined(at)})"
        shown = ", ".join(f"{name} {joined(level)}" for name, level in levels.items() if level)
        return "no partner", f"all answers to this prompt are at the same level ({shown})"


def _problem_of_control(
    rubrics: Sequence[Rubric], control: Generation, verdicts: Sequence[Grade], scores: Mapping[str, float]
) -> tuple[str, str] | None:
    """As for other answers, for an answer that is compared on these rubrics whatever its level."""
    if missing := [rubric.id for rubric in rubrics if rubric.id not in scores]:
        why = "; ".join(dict.fromkeys(verdict.reason for verdict in verdicts if verdict.rubric_id in missing))
        return "ungraded", why or f"no verdict by {', '.join(missing)}"
    if control.is_cut and any(rubric.measures_length for rubric in rubrics):
        return "between two levels", "it was cut, so its length is not known"
    return None


@dataclass
class _GridPairs:
    """Makes the pairs of one grid."""

    rubrics: Sequence[Rubric]
    cell_id: str
    grades: Grades
    usable: Mapping[tuple[str, str], list[Directive]]
    settings: SynthesisConfig
    used: set[str] = field(default_factory=set)
    """unit_ids of the answers that are in a pair."""

    def pair(self, grid: Grid) -> tuple[list[Pair], list[Reject]]:
        """All pairs of the grid's answers, and the pairs that are not made."""
        pairs: list[Pair] = []
        rejects: list[Reject] = []
        ready = {level: answer for level, answer in grid.items() if self._has_directive(level)}
        for (level, answer), (other_level, other) in itertools.combinations(ready.items(), 2):
            if problem := self._why_no_pair(level, answer, other_level, other):
                rejects.append(Reject.of("pair", answer, _pair_id(self.cell_id, answer, other), *problem))
            else:
                pairs += [self._make(level, answer, other_level, other), self._make(other_level, other, level, answer)]
                self.used |= {answer.unit_id, other.unit_id}
        order = {joined(level): at for at, level in enumerate(grid)}
        return sorted(pairs, key=lambda pair: (order[pair.level], order[pair.rejected_level])), rejects

    def _has_directive(self, level: LevelNames) -> bool:
        return level == CONTROL_LEVEL or all(
            self.usable.get((rubric.id, part)) for rubric, part in levels_by_rubric(self.rubrics, level)
        )

    def _why_no_pair(
        self, level: LevelNames, answer: Generation, other_level: LevelNames, other: Generation
    ) -> tuple[str, str] | None:
        """(reason, detail) why two answers of a grid do not make a pair, or None."""
        for control, level_names, other_names in ((answer, level, other_level), (other, other_level, level)):
            if level_names == CONTROL_LEVEL and all(
                confirms(rubric, name, self._score(control, rubric))
                for rubric, name in levels_by_rubric(self.rubrics, other_names)
            ):
                return "control has the level", f"the policy's own answer is {joined(other_names)} already"
        limit, (short, long) = self.settings.max_length_ratio, sorted((answer.num_tokens, other.num_tokens))
        if limit and long > limit * short:
            return "length ratio", f"{long} against {short} tokens"
        return None

    def _score(self, answer: Generation, rubric: Rubric) -> float:
        score = self.grades[answer.unit_id, rubric.id].score
        assert score is not None
        return score

    def _mean_score(self, answer: Generation) -> float:
        return sum(self._score(answer, rubric) for rubric in self.rubrics) / len(self.rubrics)

    def _directive(self, level: LevelNames) -> tuple[str, str | None]:
        """(id, text) of the directive for a level: one paraphrase, spread evenly over grids by hash."""
        if level == CONTROL_LEVEL:
            return "", control_directive(self.settings.neutral_directives, self.cell_id)
        directives = [
            picked(self.usable[rubric.id, part], self.cell_id, part)
            for rubric, part in levels_by_rubric(self.rubrics, level)
        ]
        texts = [directive.text for directive in directives]
        return joined(directive.directive_id for directive in directives), compose_directives(texts)

    def _make(self, level: LevelNames, winner: Generation, other_level: LevelNames, loser: Generation) -> Pair:
        directive_id, text = self._directive(level)
        prompt = policy_messages(text, winner.prompt)
        return Pair(
            pair_id=_pair_id(self.cell_id, winner, loser),
            twin_id=_pair_id(self.cell_id, loser, winner),
            cell_id=self.cell_id,
            prompt_id=winner.prompt_id,
            rubric_id=_rubric_ids(self.rubrics),
            level=joined(level),
            rejected_level=joined(other_level),
            directive_id=directive_id,
            prompt=[Message(role=message["role"], content=message["content"]) for message in prompt],
            chosen=[Message(role="assistant", content=winner.text)],
            rejected=[Message(role="assistant", content=loser.text)],
            chosen_score=self._mean_score(winner),
            rejected_score=self._mean_score(loser),
            chosen_is_cut=winner.is_cut,
            rejected_is_cut=loser.is_cut,
        )


def _pair_id(cell_id: str, winner: Generation, loser: Generation) -> str:
    return content_id(cell_id, winner.unit_id, loser.unit_id)

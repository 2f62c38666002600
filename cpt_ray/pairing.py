"""From graded answers to pairs and their twins. Pure logic.

A *cell* is one (prompt, rubric, sample): at most one answer per level. Every ordered pair of levels whose
answers' grades confirm their targets becomes a pair, so each pair's twin is there by construction. In a cell of
several rubrics a level is one level of each; a control answer (the policy's own) is one more level.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cpt_ray.config import SynthesisConfig
from cpt_ray.grading import confirms
from cpt_ray.prompting import compose_directives, policy_messages
from cpt_ray.records import CONTROL, Directive, Generation, Grade, Message, Pair, Reject, content_id
from cpt_ray.rubric import Rubric
from cpt_ray.texts import same_text

Grades = Mapping[tuple[str, str], Grade]
"""By (unit_id, rubric_id)."""


def targets_of(rubrics: Sequence[Rubric], level: str) -> list[tuple[Rubric, str]]:
    """(rubric, level) of each rubric in a cell, from a level's name."""
    return list(zip(rubrics, level.split("+"), strict=True))


def control_directive(neutral: Sequence[str], cell_id: str) -> str | None:
    """What a control answer of this cell is given as a system message: nothing in half of the cells."""
    number = int(content_id(cell_id, CONTROL), 16)
    return neutral[number // 2 % len(neutral)] if neutral and number % 2 else None


def cell_id_of(rubric_id: str, prompt_id: str, sample: int) -> str:
    """Id of a cell."""
    return content_id(rubric_id, prompt_id, sample)


def pair_cells(
    rubrics: Sequence[Rubric],
    generations: Iterable[Generation],
    grades: Grades,
    directives: Sequence[Directive],
    settings: SynthesisConfig,
    repeats: Mapping[str, str],
) -> tuple[list[Pair], list[Reject]]:
    """Pairs of the answers written to `rubrics` (one, or several at once), and all that is in none, with its reason.

    Args:
        grades: an answer without one by each of the rubrics is ungraded.
        directives: only those of these rubrics and of the train split are used.
        settings: the neutral directives, and what may keep two good answers apart.
        repeats: unit_id of an answer to the one that it nearly repeats.
    """
    cells: dict[tuple[str, int], list[Generation]] = defaultdict(list)
    for one in generations:
        cells[one.prompt_id, one.sample].append(one)
    usable: dict[tuple[str, str], list[Directive]] = defaultdict(list)
    for directive in sorted(directives, key=lambda one: one.directive_id):
        if directive.split == "train":
            usable[directive.rubric_id, directive.level].append(directive)
    pairs: list[Pair] = []
    rejects: list[Reject] = []
    for (prompt_id, sample), answers in cells.items():
        cell = _Cell(rubrics, cell_id_of(answers[0].rubric_id, prompt_id, sample), grades, usable, settings, repeats)
        made, dropped = cell.pair(answers)
        pairs += made
        rejects += dropped
    return pairs, rejects


@dataclass(frozen=True)
class _Cell:
    rubrics: Sequence[Rubric]
    cell_id: str
    grades: Grades
    usable: Mapping[tuple[str, str], list[Directive]]
    settings: SynthesisConfig
    repeats: Mapping[str, str]

    def pair(self, answers: Sequence[Generation]) -> tuple[list[Pair], list[Reject]]:
        """All pairs of one cell's answers, and what is in none."""
        kept: list[Generation] = []
        rejects: list[Reject] = []
        for one in answers:
            if problem := self._problem(one, kept):
                rejects.append(Reject.of("pair", one, one.unit_id, *problem))
            else:
                kept.append(one)
        pairs: list[Pair] = []
        for one, other in itertools.combinations(kept, 2):
            if problem := self._apart(one, other):
                rejects.append(Reject.of("pair", one, _pair_id(self.cell_id, one, other), *problem))
            else:
                pairs += [self._make(one, other), self._make(other, one)]
        paired = {pair.level for pair in pairs}
        for one in kept:
            if one.level not in paired:
                rejects.append(
                    Reject.of("pair", one, one.unit_id, "no partner", "no other answer of this cell to compare with")
                )
        order = {one.level: at for at, one in enumerate(kept)}
        return sorted(pairs, key=lambda pair: (order[pair.level], order[pair.rejected_level])), rejects

    def _problem(self, one: Generation, kept: Sequence[Generation]) -> tuple[str, str] | None:
        """(reason, detail) why an answer cannot be in a pair, or None."""
        verdicts = [self.grades.get((one.unit_id, rubric.id)) for rubric in self.rubrics]
        for verdict in verdicts:
            if verdict is None or verdict.score is None:
                return "ungraded", verdict.reason if verdict else "no verdict on this answer"
        if one.level != CONTROL:
            for rubric, level in targets_of(self.rubrics, one.level):
                score = self._score(one, rubric)
                if not confirms(rubric, level, score):
                    found = rubric.nearest_level(score).name
                    reason = "between two levels" if found == level else "other level"
                    return reason, f"graded {score:.1f} ({found}), target {level}"
                if not self.usable.get((rubric.id, level)):
                    return "no directive", f"no train directive for {rubric.id} {level}"
        if any(same_text(one.text, other.text) for other in kept):
            return "same text", "another level's answer in this cell is the same text"
        if original := self.repeats.get(one.unit_id):
            return "near duplicate", f"of {original}"
        return None

    def _apart(self, one: Generation, other: Generation) -> tuple[str, str] | None:
        """(reason, detail) why two good answers do not make a pair, or None."""
        for control, asked in ((one, other), (other, one)):
            if control.level == CONTROL and all(
                confirms(rubric, level, self._score(control, rubric))
                for rubric, level in targets_of(self.rubrics, asked.level)
            ):
                return "control has the level", f"the policy's own answer is {asked.level} already"
        limit, (short, long) = self.settings.max_length_ratio, sorted((one.num_tokens, other.num_tokens))
        if limit and long > limit * short:
            return "length ratio", f"{long} against {short} tokens"
        return None

    def _score(self, one: Generation, rubric: Rubric) -> float:
        score = self.grades[one.unit_id, rubric.id].score
        assert score is not None
        return score

    def _mean_score(self, one: Generation) -> float:
        return sum(self._score(one, rubric) for rubric in self.rubrics) / len(self.rubrics)

    def _directive(self, level: str) -> tuple[str, str | None]:
        """(id, text) of what the policy is told for a level: one paraphrase, spread evenly over cells by hash."""
        if level == CONTROL:
            return "", control_directive(self.settings.neutral_directives, self.cell_id)
        picked = []
        for rubric, part in targets_of(self.rubrics, level):
            choices = self.usable[rubric.id, part]
            picked.append(choices[int(content_id(self.cell_id, part), 16) % len(choices)])
        return "+".join(one.directive_id for one in picked), compose_directives([one.text for one in picked])

    def _make(self, winner: Generation, loser: Generation) -> Pair:
        directive_id, text = self._directive(winner.level)
        prompt = policy_messages(text, winner.prompt)
        return Pair(
            pair_id=_pair_id(self.cell_id, winner, loser),
            twin_id=_pair_id(self.cell_id, loser, winner),
            cell_id=self.cell_id,
            prompt_id=winner.prompt_id,
            rubric_id=winner.rubric_id,
            level=winner.level,
            rejected_level=loser.level,
            directive_id=directive_id,
            prompt=[Message(role=one["role"], content=one["content"]) for one in prompt],
            chosen=[Message(role="assistant", content=winner.text)],
            rejected=[Message(role="assistant", content=loser.text)],
            chosen_score=self._mean_score(winner),
            rejected_score=self._mean_score(loser),
            chosen_is_cut=winner.is_cut,
            rejected_is_cut=loser.is_cut,
        )


def _pair_id(cell_id: str, winner: Generation, loser: Generation) -> str:
    return content_id(cell_id, winner.unit_id, loser.unit_id)

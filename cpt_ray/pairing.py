"""From graded answers to pairs and their twins. Pure logic.

A *cell* is one (prompt, rubric, sample): at most one answer per level. Every ordered pair of levels whose
answers' grades confirm their targets becomes a pair, so each pair's twin is there by construction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from cpt_ray.grading import confirms
from cpt_ray.prompting import policy_messages
from cpt_ray.records import Directive, Generation, Grade, Message, Pair, Reject, content_id
from cpt_ray.rubric import Rubric


def pair_cells(
    rubric: Rubric,
    generations: Iterable[Generation],
    grades: Mapping[str, Grade],
    directives: Sequence[Directive],
) -> tuple[list[Pair], list[Reject]]:
    """Pairs of one rubric's answers, and every answer that is in none, with its reason.

    Args:
        grades: by unit_id; an answer without one is ungraded.
        directives: the rubric's; only those of the train split are used.
    """
    cells: dict[tuple[str, int], list[Generation]] = defaultdict(list)
    for one in generations:
        cells[one.prompt_id, one.sample].append(one)
    usable = {
        level.name: sorted(
            (one for one in directives if one.level == level.name and one.split == "train"),
            key=lambda one: one.directive_id,
        )
        for level in rubric.levels
    }
    pairs: list[Pair] = []
    rejects: list[Reject] = []
    for (prompt_id, sample), answers in cells.items():
        kept: list[Generation] = []
        for one in answers:
            grade = grades.get(one.unit_id)
            problem = _problem(rubric, one, grade, bool(usable[one.level]), kept)
            if problem:
                rejects.append(_reject(one, *problem))
            else:
                kept.append(one)
        if len(kept) == 1:
            rejects.append(_reject(kept[0], "no partner", "no other level of this cell was confirmed"))
            continue
        cell_id = content_id(rubric.id, prompt_id, sample)
        chosen_directives = {one.level: _pick(usable[one.level], cell_id) for one in kept}
        for winner in kept:
            for loser in kept:
                if winner is not loser:
                    pairs.append(_pair(cell_id, winner, loser, chosen_directives[winner.level], grades))
    return pairs, rejects


def _problem(
    rubric: Rubric, one: Generation, grade: Grade | None, has_directive: bool, kept: Sequence[Generation]
) -> tuple[str, str] | None:
    """(reason, detail) why an answer cannot be in a pair, or None."""
    if grade is None or grade.score is None:
        return "ungraded", grade.reason if grade else "no verdict on this answer"
    if not confirms(rubric, one.level, grade.score):
        found = rubric.nearest_level(grade.score).name
        return "other level", f"graded {grade.score:.1f} ({found}), target {one.level}"
    if not has_directive:
        return "no directive", f"no train directive for {rubric.id} {one.level}"
    if any(one.text == other.text for other in kept):
        return "same text", "another level's answer in this cell is the same text"
    return None


def _reject(one: Generation, reason: str, detail: str) -> Reject:
    return Reject(
        stage="pair", subject_id=one.unit_id, rubric_id=one.rubric_id, level=one.level, reason=reason, detail=detail
    )


def _pick(directives: Sequence[Directive], cell_id: str) -> Directive:
    """One paraphrase per (cell, level), spread evenly over cells by hash."""
    return directives[int(content_id(cell_id, directives[0].level), 16) % len(directives)]


def _pair_id(cell_id: str, winner: Generation, loser: Generation) -> str:
    return content_id(cell_id, winner.unit_id, loser.unit_id)


def _pair(
    cell_id: str, winner: Generation, loser: Generation, directive: Directive, grades: Mapping[str, Grade]
) -> Pair:
    prompt = policy_messages(directive.text, [{"role": "user", "content": winner.prompt}])
    chosen_score, rejected_score = grades[winner.unit_id].score, grades[loser.unit_id].score
    assert chosen_score is not None and rejected_score is not None
    return Pair(
        pair_id=_pair_id(cell_id, winner, loser),
        twin_id=_pair_id(cell_id, loser, winner),
        cell_id=cell_id,
        prompt_id=winner.prompt_id,
        rubric_id=winner.rubric_id,
        level=winner.level,
        rejected_level=loser.level,
        directive_id=directive.directive_id,
        prompt=[Message(role=one["role"], content=one["content"]) for one in prompt],
        chosen=[Message(role="assistant", content=winner.text)],
        rejected=[Message(role="assistant", content=loser.text)],
        chosen_score=chosen_score,
        rejected_score=rejected_score,
    )

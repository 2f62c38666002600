"""Answers per level: asked for, reached, in pairs, at what cost; and how grids' answers differ in other rubrics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from cpt_ray.engines.ledger import NOT_IN_LEDGER, counts_of
from cpt_ray.judging.judge import Gradings
from cpt_ray.plan import Plan, Shards
from cpt_ray.synthesis.pairing import Paired
from cpt_ray.tables.records import Generation, Unit
from cpt_ray.tables.rundir import RunDir

OFFSET_MISSED = 0.25
"""Standard deviations by which grids may miss their offset without a note; those without an end level aim at less."""
_COUNTED = ("asked", "hit", "at", "kept", "tokens")


def level_counts(
    paired: Paired, units: Sequence[Unit], rows: Sequence[Generation], gradings: Gradings
) -> dict[str, float]:
    """A shard's counts by rubric and level, to be kept with it and summed by `LevelCounts`.

    Among them, of the answers in pairs: the sums of the score that they were taken by, and of the score by the judges
    that had no part in taking them, with how many have one.
    """
    counts: dict[tuple[str, ...], float] = defaultdict(float)
    for unit in units:
        if unit.rubric_id:
            counts["asked", unit.rubric_id, unit.level] += 1
    for row in rows:
        counts["tokens", row.rubric_id, row.level] += row.num_tokens
    counts |= {("hit", *key): count for key, count in paired.hit.items()}
    counts |= {("at", *key): count for key, count in paired.at_level.items()}
    for key, ids in paired.kept.items():
        counts["kept", *key] = len(ids)
        for answer in ((unit_id, key[0]) for unit_id in ids):
            taken_by, other = gradings.first.get(answer) or gradings.combined.get(answer), gradings.others.get(answer)
            for what, grade in (("taken_by", taken_by), ("others", other)):
                if grade is not None and grade.score is not None:
                    counts[what, *key] += grade.score
                    counts[f"{what}_n", *key] += 1
    for rubric, shifts in paired.shifts.items():
        counts["grids", rubric] = shifts.grids
        counts |= {("drawn", rubric, other): total for other, total in shifts.taken.items()}
        counts |= {("offered", rubric, other): total for other, total in shifts.offered.items()}
    named = {f"{NOT_IN_LEDGER}{'/'.join(key)}": count for key, count in counts.items()}
    return {**named, "kept_answers": len(paired.used)}


class LevelCounts:
    """The sum over a run's shards of pairs."""

    def __init__(self, run: RunDir, pairs: Sequence[str]):
        self._total = counts_of(run, "pairs", pairs)

    def level(self, rubric: str, level: str) -> dict[str, int]:
        """`asked` to be there, `hit` by those, `at` it in all, `kept` in pairs, `tokens` of those asked for."""
        return {what: int(self._total[f"{NOT_IN_LEDGER}{what}/{rubric}/{level}"]) for what in _COUNTED}

    def shifts(self, rubric: str) -> dict[str, tuple[float, float]]:
        """Rubric (or `grids.LENGTH`) to the mean difference, in sd, between highest and lowest answer of a grid: of all
        answers that could have been drawn, and of those that were."""
        grids = self._total[f"{NOT_IN_LEDGER}grids/{rubric}"]
        prefix = f"{NOT_IN_LEDGER}offered/{rubric}/"
        names = [key.removeprefix(prefix) for key in self._total if key.startswith(prefix)]
        return {
            name: (self._total[f"{prefix}{name}"] / grids, self._total[f"{NOT_IN_LEDGER}drawn/{rubric}/{name}"] / grids)
            for name in names
        }

    def mean_scores(self, rubric: str, level: str) -> tuple[float | None, float | None]:
        """Of the answers in pairs: the mean score that they were taken by, and that of the judges which had no part in
        it (None where there are none)."""
        return self._mean_score("taken_by", rubric, level), self._mean_score("others", rubric, level)

    def _mean_score(self, what: str, rubric: str, level: str) -> float | None:
        count = self._total[f"{NOT_IN_LEDGER}{what}_n/{rubric}/{level}"]
        return self._total[f"{NOT_IN_LEDGER}{what}/{rubric}/{level}"] / count if count else None

    def grids(self, rubric: str) -> int:
        """Grids drawn of one rubric."""
        return int(self._total[f"{NOT_IN_LEDGER}grids/{rubric}"])

    def totals(self) -> dict[str, int]:
        """Answers in pairs, pairs, and grids of all rubrics."""
        grids = sum(value for key, value in self._total.items() if key.startswith(f"{NOT_IN_LEDGER}grids/"))
        kept, pairs = self._total["kept_answers"], self._total["rows_out"]
        return {"kept_answers": int(kept), "pairs": int(pairs), "grids": int(grids)}


def level_lines(plan: Plan, run: RunDir, shards: Shards, written_tokens: float) -> list[str]:
    """For the terminal: a line per rubric and level, levels that the writer does not reach, pairs per 1,000 tokens."""
    counts = LevelCounts(run, shards.pairs)
    head = f"{'level':<28}{'asked':>8}{'hit':>8}{'answers':>9}{'in pairs':>9}{'tokens each':>13}"
    lines, notes, asked_for = [head], [], []
    for rubric in plan.rubrics:
        for level in rubric.levels:
            row = counts.level(rubric.id, level.name)
            each = f"{row['tokens'] / row['kept']:.0f}" if row["tokens"] and row["kept"] else "-"
            asked, hit = (row["asked"], row["hit"]) if row["asked"] else ("-", "-")
            asked_for.append(bool(row["asked"]))
            name = f"{rubric.id} {level.name}"
            lines.append(f"{name:<28}{asked:>8}{hit:>8}{row['at']:>9}{row['kept']:>9}{each:>13}")
            if not row["at"]:
                why = ", or the judge does not tell it from others" if rubric.judged else ""
                notes.append(f"note: no answer is at {name}: this writer does not reach it{why}; it is in no pair")
        for other, wanted in plan.config.synthesis.offset.get(rubric.id, {}).items():
            _, taken = counts.shifts(rubric.id).get(other, (0.0, 0.0))
            if abs(taken - wanted) > OFFSET_MISSED:
                notes.append(
                    f"note: the grids of {rubric.id} differ in {other} by {taken:.2f} sd, where synthesis.offset wants "
                    f"{wanted:g}: these answers do not have it; give one nearer to 0"
                )
    if not all(asked_for):
        lines.append("(-: no answer was asked to be at the level; those that are were not asked for it)")
    total = counts.totals()
    if written_tokens:
        per_thousand = {name: 1000 * count / written_tokens for name, count in total.items()}
        lines.append(
            f"per 1,000 written tokens: {per_thousand['kept_answers']:.1f} answers in pairs, "
            f"{per_thousand['grids']:.1f} grids, {per_thousand['pairs']:.1f} ordered pairs"
        )
    return [*lines, *notes]

"""What is trained on: rows, made of pairs.

The K(K-1) ordered pairs of a grid's K answers need K x K log-probabilities: one per (directive, answer). Two rows of a
grid share nothing, since a directive comes first in its prompt; within a row, all answers follow the same prompt. So a
row is the unit of training: its prompt and each of its answers are run once, whichever pairs they are in. In any
other preference set, the pairs of one prompt are a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from cpt_ray.logprobs.rows import Row
from cpt_ray.training.pairs import TokenPair


def make_rows(pairs: Iterable[TokenPair], max_pairs: int) -> list[Row]:
    """Pairs grouped by grid and prompt, in order; what has more than `max_pairs` pairs becomes several rows."""
    groups: dict[tuple[str, tuple[int, ...]], list[TokenPair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.cell_id, pair.prompt_ids].append(pair)
    return [
        _make_row(group[start : start + max_pairs])
        for group in groups.values()
        for start in range(0, len(group), max_pairs)
    ]


def _make_row(pairs: Sequence[TokenPair]) -> Row:
    answers: dict[tuple[int, ...], tuple[int, str]] = {}

    def index(ids: tuple[int, ...], level: str) -> int:
        return answers.setdefault(ids, (len(answers), level))[0]

    first = pairs[0]
    chosen = [index(pair.chosen_ids, pair.level) for pair in pairs]
    rejected = [index(pair.rejected_ids, pair.rejected_level) for pair in pairs]
    return Row(
        cell_id=first.cell_id,
        rubric_id=first.rubric_id,
        level=first.level,
        prompt=list(first.prompt_ids),
        answers=[list(ids) for ids in answers],
        levels=[level for _, level in answers.values()],
        chosen=chosen,
        rejected=rejected,
        ref_logps=[],
    )


def steps_per_epoch(num_pairs: int, step_pairs: int) -> int:
    """Optimizer steps: a step has `step_pairs` pairs on average, or a little more."""
    return max(1, num_pairs // step_pairs)

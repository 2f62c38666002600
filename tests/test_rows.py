"""Pairs to rows, and what is measured on rows that are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.config import PreferencesConfig
from cpt_ray.errors import UserError
from cpt_ray.rows import Row, Tokeniser, held_out_metrics, make_rows, preference_pairs, sequence_ids
from tests.test_training import make_tokens

LENGTHS = {"high": 4, "low": 2}


def make_grid(cell: str) -> list[Row]:
    """The two rows of a cell of two answers: the high one of 4 tokens, the low one of 2."""
    ids = {level: (at,) * LENGTHS[level] for at, level in enumerate(LENGTHS)}
    pairs = [
        one.__class__(
            **{name: getattr(one, name) for name in one.__slots__}
            | {"prompt_ids": (9, len(one.level)), "chosen_ids": ids[one.level], "rejected_ids": ids[one.rejected_level]}
        )
        for one in make_tokens(cell)
    ]
    rows = make_rows(pairs, 4)
    for row in rows:
        row["ref_logps"] = [-8.0, -8.0]
    return rows


def test_a_row_runs_each_answer_once_and_rows_share_no_sequence() -> None:
    grid = make_grid("a") + make_grid("b")
    assert [(one["cell_id"], one["level"]) for one in grid] == [
        ("a", "high"),
        ("a", "low"),
        ("b", "high"),
        ("b", "low"),
    ]
    assert [len(one["answers"]) for one in grid] == [2, 2, 2, 2]
    assert len({name for row in grid[:2] for name in sequence_ids(row)}) == 4


def test_a_row_of_many_pairs_becomes_several() -> None:
    pairs = [make_tokens("a", prompt_ids=(1,), chosen_ids=(2,), rejected_ids=(3 + at,))[0] for at in range(5)]
    rows = make_rows(pairs, 2)
    assert [len(one["chosen"]) for one in rows] == [2, 2, 1]
    assert [one["answers"] for one in rows] == [[[2], [3], [4]], [[2], [5], [6]], [[2], [7]]]


def test_a_policy_that_ignores_its_directive_has_twin_accuracy_of_one_half_and_no_gap() -> None:
    rows = make_grid("a")  # answers in order of (own, other), so that of the second row are swapped
    found = held_out_metrics(rows, [[-3.0, -8.0], [-8.0, -3.0]])
    assert found["twin_accuracy"] == found["pair_accuracy"] == 0.5
    assert found["swap_gap"] == 0
    assert found["length_drift"] == 0.5  # it prefers the long answer, chosen in half of the pairs


def test_a_policy_that_reads_its_directive_has_twin_accuracy_of_one_and_a_gap_per_token() -> None:
    found = held_out_metrics(make_grid("a"), [[-4.0, -10.0], [-6.0, -12.0]])
    assert found["twin_accuracy"] == found["accuracy/ornament/high"] == found["accuracy/ornament/low"] == 1
    assert found["swap_gap"] == pytest.approx(((-4 + 12) / 4 + (-6 + 10) / 2) / 2)
    assert found["drift"] == pytest.approx((4 + 10 + 6 + 12 - 4 * 8) / 12)
    assert found["length_drift"] == 0


def test_without_its_twin_a_pair_counts_for_pair_accuracy_only() -> None:
    found = held_out_metrics(make_grid("a")[:1], [[-4.0, -10.0]])
    assert found["pair_accuracy"] == 1
    assert not {"twin_accuracy", "swap_gap"} & set(found)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "a", "answer": "b"}, "row 2: found question, answer; expected TRL's preference format"),
        ({"prompt": "a", "chosen": "b"}, "row 2: found prompt, chosen; expected"),
        (
            {"prompt": [{"role": "user"}], "chosen": [], "rejected": []},
            "row 2: found prompt, chosen, rejected; expected",
        ),
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path: Path, row: dict[str, Any], problem: str) -> None:
    class Words:
        eos_token = "."

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [ord(one) for one in text]}

    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "set.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=problem):
        preference_pairs(PreferencesConfig(source=str(tmp_path / "set.jsonl")), Tokeniser(Words(), {}))

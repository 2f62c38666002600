# ruff: noqa: RUF001  (characters that look alike are what is tested)
"""Which held-out prompts are trained on in another spelling."""

from __future__ import annotations

import pytest

from cpt_ray.errors import UserError
from cpt_ray.prompts import check_leakage
from cpt_ray.tables.records import Prompt


def check(train: str, held_out: str) -> None:
    check_leakage(
        [Prompt(prompt_id=at, text=at, split=split) for at, split in ((train, "train"), (held_out, "held_out"))]
    )


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("Draw a café.", "draw a cafe\u0301"),
        ("Write it, please!", "ｗｒｉｔｅ　ｉｔ ｐｌｅａｓｅ"),
        ("Don't stop", "Don’t stop…"),
        ("co\u00adoperate", "Cooperate"),
        ("Straße", "STRASSE"),
        ("今天天气很好", "今天，天气很好。"),
        ("สวัสดี ครับ", "สวัสดีครับ"),
        ("आज मौसम", "आज मौसम।"),
    ],
)
def test_the_same_words_are_found_in_every_spelling(train: str, held_out: str) -> None:
    with pytest.raises(UserError, match="is held out, but"):
        check(train, held_out)


@pytest.mark.parametrize(
    ("train", "held_out"),
    [
        ("कि", "की"),
        ("बाल काटो", "बेल काटो"),
        ("What is 2 + 3?", "What is 2 × 3?"),
        ("What is 2 + 3?", "What is 2 + 4?"),
        ("What does 👍 mean?", "What does 👎 mean?"),
        ("...", "?!"),
        ("ป่า", "ปา"),
        ("résumé", "resume"),
    ],
)
def test_other_words_are_no_leak(train: str, held_out: str) -> None:
    check(train, held_out)

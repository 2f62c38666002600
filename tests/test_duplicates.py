# ruff: noqa: RUF001  (characters that look alike are what is tested)
"""Which texts nearly repeat each other, in which script."""

from __future__ import annotations

import unicodedata

import pytest

from cpt_ray.synthesis.duplicates import NearDuplicates

CHINESE = "今天天气很好，我们去公园散步，看见很多花和小鸟。"
HINDI = "आज मौसम बहुत अच्छा है और हम सब लोग बाग में टहलने गए।"
THAI = "วันนี้อากาศดีมาก เราไปเดินเล่นในสวนสาธารณะด้วยกัน"


@pytest.mark.parametrize(
    ("text", "last"), [(CHINESE, "很"), (HINDI, " फिर"), (THAI, "นะ"), ("The été is gay, we say", " so")]
)
def test_a_text_with_a_word_more_is_a_near_duplicate(text: str, last: str) -> None:
    texts = NearDuplicates(0.5)
    assert texts.add("first", text) == ""
    assert texts.add("longer", text + last) == "first"
    assert texts.add("decomposed", unicodedata.normalize("NFD", text).upper()) == "first"


@pytest.mark.parametrize(
    ("text", "other"),
    [
        (CHINESE, "她昨晚写了一封长信，告诉妈妈城里的工作多么累。"),
        ("किताब की बात", "कताब का बत"),
        ("Answer 1", "Answer 2"),
        ("!!!", "???"),
        ("😀", "😂"),
    ],
)
def test_other_texts_are_none(text: str, other: str) -> None:
    texts = NearDuplicates(0.5)
    assert texts.add("first", text) == ""
    assert texts.add("other", other) == ""

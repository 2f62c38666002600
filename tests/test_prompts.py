"""Prompts that are split by topic: none is on both sides, and what is no topic is refused by row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.config import PromptsConfig
from cpt_ray.errors import UserError
from cpt_ray.prompts import Prompts, check_leakage, read_prompts
from cpt_ray.rubrics.rubric import load_rubrics

EVERYDAY = Path(__file__).parent.parent / "rubrics" / "everyday"
TOPICS = ["tea", "rain", "iron", "moss", "salt", "dusk", "the sea", "a kite"]


def read(path: Path, rows: list[dict[str, object]], topic: str | None = "topic") -> Prompts:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return read_prompts(PromptsConfig(source=str(path), topic=topic, held_out=0.5))


def rows_of(topics: list[str], forms: int = 3) -> list[dict[str, object]]:
    return [{"prompt": f"Form {form}: {topic}?", "topic": topic} for topic in topics for form in range(forms)]


@settings(max_examples=50, deadline=None)
@given(
    topics=st.lists(st.text(min_size=1, max_size=8).filter(str.isalnum), max_size=12, unique=True),
    order=st.randoms(use_true_random=False),
)
def test_no_topic_is_on_both_sides_whatever_stands_beside_it(
    tmp_path_factory: pytest.TempPathFactory, topics: list[str], order: object
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "a.jsonl"
    rows = rows_of([*TOPICS, *topics])
    order.shuffle(rows)  # type: ignore[attr-defined]
    side = {one.topic: one.split for one in read(path, rows_of(TOPICS))}
    found = read(path, rows)
    for prompt in found:
        assert side.setdefault(prompt.topic, prompt.split) == prompt.split
    assert len(found) == len(rows)


def test_a_topic_is_the_same_in_every_spelling(tmp_path: Path) -> None:
    spellings = ["The Sea", "the  sea", " THE SEA", "ｔｈｅ sea"]  # noqa: RUF001
    rows = rows_of(TOPICS) + [
        {"prompt": f"Number {at} is by the sea.", "topic": topic} for at, topic in enumerate(spellings)
    ]
    found = [one for one in read(tmp_path / "a.jsonl", rows) if "sea" in one.text]
    assert len(found) == 7
    assert {(one.topic, one.split) for one in found} == {("the sea", found[0].split)}


def test_without_the_setting_the_text_decides_and_there_is_no_topic(tmp_path: Path) -> None:
    rows = rows_of(TOPICS)
    found = read(tmp_path / "a.jsonl", rows, topic=None)
    alone = read(tmp_path / "b.jsonl", [{"prompt": row["prompt"]} for row in rows], topic=None)
    assert list(found) == list(alone)
    assert {one.topic for one in found} == {""}
    sides = {(row["topic"], one.split) for row, one in zip(rows, found, strict=True)}
    assert len(sides) > len(TOPICS)  # some topics are on both


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "x", "topics": "a"}, "row 25: no column 'topic' (did you mean \"topics\"?)"),
        ({"prompt": "x", "topic": " "}, "row 25: column 'topic' holds ' '; expected a non-empty text"),
        ({"prompt": "x", "topic": None}, "row 25: column 'topic' holds nothing; expected a non-empty text"),
        ({"prompt": "x", "topic": 3}, "row 25: column 'topic' holds 3; expected a non-empty text"),
        ({"prompt": "x", "topic": ["a"]}, "row 25: column 'topic' holds"),
    ],
)
def test_what_is_no_topic_is_refused_by_row(tmp_path: Path, row: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path / "a.jsonl", [*rows_of(TOPICS), row])
    assert said in str(caught.value)


def test_one_topic_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 distinct prompts of 1 topics, none of them \w+; give more topics"):
        read(tmp_path / "a.jsonl", rows_of(["tea"]))


def test_the_everyday_prompts_are_many_forms_of_many_topics() -> None:
    config = PromptsConfig(source=str(EVERYDAY / "prompts.jsonl"), topic="topic", held_out=0.2)
    found = read_prompts(config)
    assert (len(found), len({one.topic for one in found}), found.rejects) == (300, 100, [])
    held_out = {one.topic for one in found if one.split == "held_out"}
    assert 14 <= len(held_out) <= 26
    assert all(one.topic in one.text.lower() for one in found)
    check_leakage(found)


def test_the_everyday_directives_are_many_and_each_is_of_one_level() -> None:
    rubrics = load_rubrics([EVERYDAY])
    assert [rubric.id for rubric in rubrics] == ["length", "mood", "wording"]
    texts = [
        " ".join(text.lower().split()) for rubric in rubrics for level in rubric.levels for text in level.directives
    ]
    assert len(set(texts)) == len(texts)
    for rubric in rubrics:
        assert [level.score for level in rubric.levels] == [16.7, 50, 83.3]
        assert all(50 <= len(level.directives) <= 60 for level in rubric.levels)
        (criterion,) = rubric.criteria
        assert criterion.measure is not None
        assert criterion.measure.values == "spread"
        assert rubric.check is not None
        assert rubric.check.name != criterion.measure.name


def test_the_judged_everyday_rubric_has_a_measure_beside_the_judge() -> None:
    (rubric,) = load_rubrics([EVERYDAY / "judged"])
    assert (len(rubric.judged), len(rubric.measured)) == (1, 1)

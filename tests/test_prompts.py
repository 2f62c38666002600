"""Prompts: which files and rows they are read from, and how they are split, by text or by topic."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.config import PromptsConfig
from cpt_ray.errors import UserError
from cpt_ray.prompts import Prompts, check_leakage, read_prompts
from cpt_ray.rubrics.rubric import load_rubrics

SHIPPED = Path(__file__).parent.parent / "rubrics"
EVERYDAY = SHIPPED / "everyday"
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


def prompts(tmp_path: Path, name: str, text: str, column: str = "prompt") -> list[str]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return [one.text for one in read_prompts(PromptsConfig(source=str(path), column=column, held_out=0.5))]


def test_prompts_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    wanted = [f"Write about {thing}." for thing in ("tea", "rain", "iron", "moss", "salt", "dusk")]
    rows = [{"prompt": text} for text in wanted]
    csv_rows = "\n".join(f'{at},"{text}"' for at, text in enumerate(wanted))
    assert prompts(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))) == wanted
    assert prompts(tmp_path, "a.csv", f"id,prompt\n{csv_rows}") == wanted
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_prompts(PromptsConfig(source=str(tmp_path / "a.parquet"), held_out=0.5))
    assert [one.text for one in found] == wanted


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"promt": "x"}', "no column 'prompt' (did you mean \"promt\"?)"),
        ("a.jsonl", '{"prompt": 3}', "expected a non-empty text"),
        ("a.jsonl", '{"prompt": "x"}', "none of them"),
        ("a.json", "[]", "a.json: rows are read from .jsonl, .parquet, .csv files or a data set's name"),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        prompts(tmp_path, name, text)
    assert said in str(caught.value)


def test_a_missing_source_is_refused() -> None:
    with pytest.raises(UserError, match="no such file"):
        read_prompts(PromptsConfig(source="nowhere.jsonl"))
    with pytest.raises(UserError, match="neither a file here nor a data set"):
        read_prompts(PromptsConfig(source="nobody/nothing"))


def test_shipped_prompts_are_many_and_split_by_content(tmp_path: Path) -> None:
    config = PromptsConfig(source=str(SHIPPED / "prompts.jsonl"), held_out=0.15)
    found = read_prompts(config)
    assert len(found) >= 160
    held_out = {one.text for one in found if one.split == "held_out"}
    assert 0.05 < len(held_out) / len(found) < 0.25
    lines = (SHIPPED / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "half.jsonl").write_text("\n".join(lines[::-2]), encoding="utf-8")
    half = read_prompts(PromptsConfig(source=str(tmp_path / "half.jsonl"), held_out=0.15))
    assert all((one.text in held_out) == (one.split == "held_out") for one in half)

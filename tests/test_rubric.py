# ruff: noqa: RUF001  (characters that look alike are what is tested)
"""Rubrics: what loads, and how what does not is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.errors import UserError
from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.rubric import Rubric, directive_leak, load_rubric, load_rubrics
from tests.builders import make_rubric, rubric_dict, write

ROOT = Path(__file__).parent.parent


def refusal(tmp_path: Path, content: Any) -> str:
    path = write(tmp_path / "bad.yaml", content)
    with pytest.raises(UserError) as caught:
        load_rubric(path)
    assert all(line.startswith(str(path)) for line in str(caught.value).splitlines())
    return str(caught.value)


def criteria(**changes: Any) -> list[dict[str, Any]]:
    first, second = rubric_dict()["criteria"]
    return [first | changes, second]


def test_shipped_rubrics_load_with_five_levels_and_five_criteria() -> None:
    rubrics = load_rubrics([ROOT / "rubrics"])
    assert len(rubrics) >= 8
    for rubric in rubrics:
        assert (len(rubric.levels), len(rubric.criteria)) == (5, 5), rubric.id


REPEATED = [
    {"name": name, "score": score, "directives": texts}
    for name, score, texts in (("low", 10, ["Be plain.", "Be bare."]), ("mid", 50, []), ("high", 90, ["Be plain."]))
]


CONTROLLED = [{"name": "share", "score": 10}, {"name": "control", "score": 90}]
ANY = {"name": "words", "weight": 100, "descriptors": {"share": "So.", "control": "So."}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (rubric_dict(criteria=criteria(weight=50)), "weights sum to 90"),
        (rubric_dict(criteria=criteria(descriptors={"low": "a", "mid": "b"})), "nothing for level 'high'"),
        (rubric_dict(criteria=criteria(descriptors={"low": "a", "mid": "b", "hihg": "c"})), 'did you mean "high"?'),
        (rubric_dict(criteria=criteria(name="bangs")), "'bangs' is used 2 times"),
        (rubric_dict(levels=REPEATED), "levels.high.directives: 'Be plain.' stands under low already; remove one"),
        (
            rubric_dict(levels=CONTROLLED, criteria=[ANY]),
            "levels: 'control' is what the policy's own answers are",
        ),
        (rubric_dict(objectiv="x"), 'unknown key (did you mean "objective"?)'),
        (rubric_dict(levels=[{"name": "low", "score": 50}, {"name": "high", "score": 10}]), "out of order"),
        (rubric_dict(levels=[{"name": "low", "score": 10, "anchor": 1}]), "levels.0.anchor: unknown key"),
        (rubric_dict(levels=[{"name": "low", "score": 130}, {"name": "high", "score": 10}]), "levels.0.score"),
        (rubric_dict(id="My Rubric"), "use lower-case letters"),
        (rubric_dict(version="one"), "version"),
        (rubric_dict(title=5), "expected text"),
        ("", "the file is empty"),
        ("- a\n- b\n", "found a list"),
        ("id: [", "expected the node content"),
        ("a: &x [1]\nb: *x\n", "anchors and aliases are not allowed"),
        ("a: !!python/object/apply:os.system ['true']\n", "is not allowed; remove it"),
        ("id: a\nid: b\n", "stands twice"),
        ("id: a\nno: b\n", "put it in quotes"),
        ("a: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_a_bad_rubric_is_refused_with_field_and_remedy(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refusal(tmp_path, content)


def measured(**changes: Any) -> dict[str, Any]:
    spec = {"name": "word_share", "words": ["a"], "values": {"low": 0, "mid": 0.5, "high": 1}} | changes
    return rubric_dict(criteria=criteria(measure=spec))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "word_shaer"}, 'did you mean "word_share"?'),
        ({"values": {"low": 0, "mid": 1, "high": 1}}, "values: 0, 1, 1 must strictly rise or strictly fall"),
        ({"values": {"low": 0, "mid": 1, "high": 1.5}}, "values.high: found 1.5, but word_share is always from 0 to 1"),
        ({"values": {"low": -1, "mid": 0, "high": 1}}, "values.low: found -1, but word_share is always from 0 to 1"),
        (
            {"name": "word_count", "words": [], "values": {"low": -1, "mid": 0, "high": 9}},
            "values.low: found -1, but word_count is never below 0",
        ),
        ({"values": {"low": 0, "mid": 1, "high": float("inf")}}, "values.high: found inf; expected a finite number"),
        ({"values": {"low": 0, "mid": 0.5, "high": True}}, "values.high: found true; expected a number"),
        ({"words": []}, "words: needs a list of words"),
        ({"against": ["b"]}, "against: is not read by word_share; remove it"),
        (
            {"words": ["of course"]},
            "words: 'of course' is never one word of a text (it is read as 'of', 'course'); list",
        ),
        ({"words": ["so-called"]}, "'so-called' is never one word of a text (it is read as 'so', 'called')"),
        ({"words": ["C++"]}, "'C++' is never one word of a text (it is read as 'c')"),
        ({"words": ["因为"]}, "'因为' is never one word of a text (it is read as '因', '为')"),
        ({"words": ["42"]}, "'42' is never one word of a text (it has no word (numbers and signs are none))"),
        ({"words": ["บิล"]}, "'บิล' is never one word of a text (its script is written without spaces"),
        ({"words": ["a", "A"]}, "words: 'A' stands under words already (as 'a'); remove one"),
        ({"words": ["don't", "don’t"]}, "stands under words already"),
        ({"words": ["été", "e\u0301te\u0301"]}, "stands under words already"),
        ({"name": "word_balance", "against": ["A"]}, "against: 'A' stands under words already (as 'a'); remove one"),
    ],
)
def test_a_measure_that_cannot_be_met_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert f"criteria.{0 if 'expected' in said else 'words'}.measure." in refusal(tmp_path, measured(**changes))
    assert said in refusal(tmp_path, measured(**changes))


def test_a_measure_may_be_below_0_where_it_can(tmp_path: Path) -> None:
    values = {"low": -0.5, "mid": 0, "high": 0.5}
    spec = {"name": "sentiment", "words": [], "values": values}
    rubric = load_rubric(write(tmp_path / "mood.yaml", measured(**spec)))
    assert rubric.criteria[0].measure is not None
    assert rubric.criteria[0].measure.values == values
    said = "values.low: found -1.5, but sentiment is always from -1 to 1; change it"
    assert said in refusal(tmp_path, measured(**spec | {"values": values | {"low": -1.5}}))
    load_rubric(write(tmp_path / "mood.yaml", measured(**spec | {"name": "valence", "values": {**values, "low": -99}})))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ("spraed", "measure.values: found 'spraed'; write {level name: value, ...}, or spread"),
        (3, "measure.values: found 3; write {level name: value, ...}, or spread"),
        (None, "measure.values: found nothing; write {level name: value, ...}, or spread"),
        ([0, 1, 2], "measure.values: found a list of 3; write {level name: value, ...}, or spread"),
        ({"low": "spread", "mid": 0, "high": 1}, "measure.values.low"),
        ({"low": 0, "mid": 0.5}, "nothing for level 'high'"),
    ],
)
def test_values_are_one_per_level_or_the_writers_spread(tmp_path: Path, values: Any, said: str) -> None:
    rubric = load_rubric(write(tmp_path / "good.yaml", measured(values="spread")))
    assert rubric.criteria[0].measure is not None
    assert rubric.criteria[0].measure.values == "spread"
    assert said in refusal(tmp_path, measured(values=values))


def test_points_are_set_by_a_run_and_change_grades_but_no_answer(tmp_path: Path) -> None:
    content = measured(values="spread", points=[[0.1, 16.7], [0.2, 50], [0.3, 83.3]])
    assert "criteria.0.measure.points: a run sets them, a rubric does not; remove them" in refusal(tmp_path, content)
    rubric = Rubric.model_validate(content)
    assert rubric.criteria[0].measure is not None
    assert rubric.criteria[0].measure.points == ((0.1, 16.7), (0.2, 50), (0.3, 83.3))
    without = Rubric.model_validate(measured(values="spread"))
    assert rubric.content_hash == without.content_hash
    assert rubric.grading_hash != without.grading_hash
    assert Rubric.model_validate_json(rubric.model_dump_json()) == rubric


@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"name": "word_cuont"}, "check.name: no measure 'word_cuont' (did you mean \"word_count\"?)"),
        ({"name": "word_share"}, "check.words: needs a list of words"),
        ({"name": "word_count", "words": ["a"]}, "check.words: is not read by word_count; remove it"),
        ({"name": "word_share", "words": ["of course"]}, "check.words: 'of course' is never one word of a text"),
        ({"name": "word_share", "words": ["A"]}, "check.name: word_share is a criterion's measure already; choose"),
        ({"name": "word_count", "values": "spread"}, "check.values: unknown key"),
        ("word_count", "check: "),
    ],
)
def test_a_check_is_another_measure(tmp_path: Path, check: Any, said: str) -> None:
    assert said in refusal(tmp_path, measured() | {"check": check})


def test_a_check_changes_no_grade(tmp_path: Path) -> None:
    rubric = load_rubric(write(tmp_path / "a.yaml", measured() | {"check": {"name": "word_share", "words": ["b"]}}))
    assert rubric.check is not None
    assert (rubric.check.name, rubric.check.words) == ("word_share", ("b",))
    assert rubric.content_hash == Rubric.model_validate(measured()).content_hash


def test_every_word_that_cannot_match_is_named(tmp_path: Path) -> None:
    lines = refusal(tmp_path, measured(words=["Perhaps", "of course", "don’t", "2nd", "so-called"])).splitlines()
    assert [line.split("'")[1] for line in lines] == ["of course", "so-called"]


def low_level(**changes: Any) -> dict[str, Any]:
    first, *others = rubric_dict()["levels"]
    return rubric_dict(levels=[first | changes, *others])


def two(first: str, second: str) -> dict[str, Any]:
    return low_level(directives=[first, second])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (two("Be plain.", "be  PLAIN"), "levels.low.directives: 'be  PLAIN' stands under low already"),
        (two("Be plain", "Be\u200b plain"), "stands under low already"),
        (two("Be plain", "..."), "levels.low.directives: '...' has no word in it"),
        (
            two("Be plain", " \u200b\u2060"),
            "levels.0.directives.1: found '\\u200b\\u2060', in which nothing can be seen",
        ),
        (low_level(directives=["Be plain."]), "levels.low.directives: found 1; give two or more"),
        (low_level(name="hi-gh"), "levels: the names 'hi-gh' and 'high' are too much alike"),
        (low_level(score=True), "levels.0.score: found true; expected a number"),
        (low_level(score=float("nan")), "levels.0.score: found nan; expected a finite number from 0 to 100"),
        (rubric_dict(title="\u200b"), "title: found '\\u200b', in which nothing can be seen; write a text"),
        (rubric_dict(title="  "), "title: found nothing; write a text"),
        (
            rubric_dict(criteria=criteria(descriptors={"low": "Few.", "mid": "few", "high": "Many."})),
            "criteria.words.descriptors: low and mid have the same text; say how the levels differ",
        ),
    ],
)
def test_what_says_nothing_or_the_same_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    assert said in refusal(tmp_path, content)


def test_two_files_with_one_id_are_refused(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        write(tmp_path / name, rubric_dict())
    with pytest.raises(UserError, match="ids must be unique"):
        load_rubrics([tmp_path])


def test_cpt_check_ends_with_1_and_no_traceback(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.yaml", rubric_dict(objectiv="x", criteria=criteria(weight="many")))
    done = subprocess.run(
        [sys.executable, "-m", "cpt_ray", "check", str(path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "objectiv: unknown key" in done.stderr
    assert "criteria.0.weight" in done.stderr


def test_a_directive_may_not_leak_number_grading_or_name() -> None:
    rubric = make_rubric()
    for text in ("Write richly.", "Write three ornamental, scored lines.", "用三个词"):
        assert directive_leak(text, rubric) is None, text
    for text in (
        *("Aim for 90.", "Reach a high score.", "Add ornament to it.", "Ninety percent flowers."),
        *("Use ٣ words.", "Use ३ words.", "½ of it", "Ⅳ words", "x² words", "Ninety % flowers", "Ten per cent"),
        *("Use ORNAMENT’S flair", "ｏｒｎａｍｅｎｔ", "orna\u00adment", "Keep the _score_ in mind"),
    ):
        assert directive_leak(text, rubric), text


@pytest.mark.parametrize(
    ("title", "text", "leaks"),
    [
        ("Politesse affirmée", "De la politesse affirme\u0301e.", True),
        ("Reader's ease", "Mind the reader’s ease.", True),
        ("शिष्टता", "शिष्टता से लिखो", True),
        ("शिष्टता", "शिष्ट लिखो", False),
        ("正式", "请用正式语气", True),
        ("正式", "请用式样", False),
        ("สุภาพ", "เขียนให้สุภาพมาก", True),
        ("Film criticism", "Write a film-criticism.", True),
        ("Film criticism", "Criticism of a film.", False),
    ],
)
def test_a_rubrics_title_leaks_in_every_spelling(title: str, text: str, leaks: bool) -> None:
    assert (directive_leak(text, make_rubric(title=title)) is not None) == leaks


@given(st.floats(0, 100))
def test_every_score_falls_in_the_bin_of_its_nearest_anchor(score: float) -> None:
    rubric = make_rubric()
    nearest = nearest_level(rubric.levels, score)
    assert all(abs(nearest.score - score) <= abs(level.score - score) for level in rubric.levels)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_loader_fail_in_another_way(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_bytes(data)
    with pytest.raises(UserError):
        load_rubric(path)


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(rubric_dict())), _json)
def test_a_field_of_another_type_is_refused_by_name(
    tmp_path_factory: pytest.TempPathFactory, field: str, value: Any
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.yaml"
    path.write_text(yaml.safe_dump(rubric_dict() | {field: value}), encoding="utf-8")
    try:
        assert isinstance(load_rubric(path), Rubric)
    except UserError as error:
        assert "Traceback" not in str(error)

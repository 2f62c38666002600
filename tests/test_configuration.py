"""Configurations: what a client asks for becomes one directive, and every other thing one line that says why."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.errors import UserError
from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.catalog import Catalog, CatalogLevel
from cpt_ray.tables.records import Directive
from tests.builders import LEVELS, make_directives, make_rubric

RUBRICS = (make_rubric(), make_rubric(id="warmth", title="Warmth"))


def directives(split: str = "train") -> list[Directive]:
    return [
        Directive(
            directive_id=f"{rubric.id}/{one.directive_id}",
            rubric_id=rubric.id,
            level=one.level,
            text=one.text.replace("manner", f"{rubric.id} manner"),
            split=split,
            source="rubric",
        )
        for rubric in RUBRICS
        for one in make_directives()
    ]


CATALOG = Catalog.build(RUBRICS, directives())


def test_a_level_name_gives_its_first_train_directive_whatever_order_they_come_in() -> None:
    held_out = Directive(
        directive_id="aaa", rubric_id="ornament", level="high", text="Held out.", split="held_out", source="rubric"
    )
    catalog = Catalog.build(RUBRICS, [held_out, *reversed(directives())])
    resolved = catalog.resolve({"ornament": "high"})
    assert resolved.directive == "Write in the high ornament manner, please (a)."
    assert resolved.applied == {"ornament": "high"}


def test_several_rubrics_are_combined_in_rubric_order_whatever_order_they_are_asked_in() -> None:
    resolved = CATALOG.resolve({"warmth": 0, "ornament": "mid"})
    assert resolved == CATALOG.resolve({"ornament": "mid", "warmth": "low"})
    assert list(resolved.applied.items()) == [("ornament", "mid"), ("warmth", "low")]
    assert resolved.directive == (
        "Write in the mid ornament manner, please (a).\nWrite in the low warmth manner, please (a)."
    )


def test_nothing_asked_for_is_no_directive() -> None:
    assert CATALOG.resolve({}).directive is None


@pytest.mark.parametrize(("score", "level"), [(0, "low"), (29.9, "low"), (30, "mid"), (50, "mid"), (70, "high")])
def test_a_score_goes_to_the_nearest_level_and_a_tie_goes_up(score: float, level: str) -> None:
    assert CATALOG.resolve({"ornament": score}).applied == {"ornament": level}


@given(st.one_of(st.integers(0, 100), st.floats(0, 100)))
def test_scores_go_where_the_rubric_itself_would_put_them(score: float) -> None:
    assert CATALOG.resolve({"ornament": score}).applied["ornament"] == nearest_level(RUBRICS[0].levels, score).name


@pytest.mark.parametrize(
    ("configuration", "text"),
    [
        ({"ornamnt": "high"}, "configuration: no rubric 'ornamnt' (did you mean \"ornament\"?)"),
        ({"ornament": "hihg"}, "configuration.ornament: no level 'hihg' (did you mean \"high\"?)"),
        ({"ornament": "zzz"}, "configuration.ornament: no level 'zzz' (known: low, mid, high)"),
        ({"ornament": 100.5}, "configuration.ornament: 100.5 is not a score from 0 to 100"),
        ({"ornament": -1}, "configuration.ornament: -1 is not a score from 0 to 100"),
        ({"ornament": float("nan")}, "configuration.ornament: nan is not a score from 0 to 100"),
        ({"ornament": True}, "configuration.ornament: found true; give a level's name or a score from 0 to 100"),
        ({"ornament": None}, "configuration.ornament: found nothing; give a level's name or a score from 0 to 100"),
        (None, 'configuration: found nothing; give an object like {"rubric": "level"}'),
        (["high"], 'configuration: found a list; give an object like {"rubric": "level"}'),
        ({"a": 1, "b": 2, "c": 3}, "configuration: 3 entries, but this model has 2 rubrics"),
    ],
)
def test_what_is_no_configuration_is_refused_with_the_nearest_known_name(configuration: Any, text: str) -> None:
    with pytest.raises(UserError) as raised:
        CATALOG.resolve(configuration)
    assert str(raised.value) == text


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(LEVELS)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
NAMES = st.text() | st.sampled_from(["ornament", "warmth"])


@given(JSON | st.dictionaries(NAMES, JSON, max_size=3))
def test_any_json_is_resolved_to_known_levels_or_refused_in_one_short_line(configuration: Any) -> None:
    try:
        resolved = CATALOG.resolve(configuration)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert len(str(error)) < 400
    else:
        assert set(resolved.applied) == set(configuration)
        assert set(resolved.applied.values()) <= set(LEVELS)
        assert (resolved.directive is None) == (not configuration)


def test_a_huge_name_is_refused_at_once() -> None:
    with pytest.raises(UserError) as raised:
        CATALOG.resolve({"ornament": "x" * 10_000_000})
    assert len(str(raised.value)) < 200


def test_a_catalog_survives_json() -> None:
    assert Catalog.from_json(json.loads(json.dumps(CATALOG.to_json()))) == CATALOG


def test_the_listing_says_what_can_be_asked_for() -> None:
    listed = CATALOG.to_json()["data"][0]
    assert (listed["id"], listed["title"], listed["version"]) == ("ornament", "Ornament", 1)
    assert listed["objective"] == "How rich the words are."
    assert [(level["name"], level["score"]) for level in listed["levels"]] == [("low", 10), ("mid", 50), ("high", 90)]
    assert listed["levels"][0]["directive"] == "Write in the low ornament manner, please (a)."


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        {},
        {"data": [{}]},
        {"data": [{"id": "a", "levels": [{"x": 1}]}]},
        {"data": [CATALOG.to_json()["data"][0] | {"more": 1}]},
    ],
)
def test_another_versions_catalog_is_refused(data: Any) -> None:
    with pytest.raises(UserError, match="another version"):
        Catalog.from_json(data)


def test_a_level_without_a_train_directive_is_refused() -> None:
    with pytest.raises(UserError, match="rubric ornament: level 'low' has no train directive"):
        Catalog.build(RUBRICS, directives(split="held_out"))


@pytest.mark.parametrize("anchors", [[90, 10, 50], [50, 90, 10], [88]])
def test_the_nearest_level_is_found_in_whatever_order_a_catalog_has_them(anchors: list[int]) -> None:
    levels = [CatalogLevel(name=str(anchor), score=anchor, directive="d", directive_id="i") for anchor in anchors]
    assert nearest_level(levels, 88).name == str(max(anchors))

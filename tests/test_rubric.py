"""Rubrics: what loads, and how what does not is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cpt_ray.errors import UserError
from cpt_ray.rubric import Rubric, directive_leak, load_rubric, load_rubrics, read_yaml
from tests.builders import make_rubric, rubric_dict

ROOT = Path(__file__).parent.parent


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


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


def test_embedded_rubrics_load() -> None:
    assert len(load_rubrics([ROOT / "rubrics" / "embedded"])) >= 2


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


def test_a_measure_must_be_known_and_monotonic(tmp_path: Path) -> None:
    measure = {"name": "exclamation_densty", "values": {"low": 0, "mid": 1, "high": 2}}
    assert 'did you mean "exclamation_density"?' in refusal(tmp_path, rubric_dict(criteria=criteria(measure=measure)))
    measure = {"name": "exclamation_density", "values": {"low": 0, "mid": 1, "high": 1}}
    assert "strictly rise or strictly fall" in refusal(tmp_path, rubric_dict(criteria=criteria(measure=measure)))
    measure = {"name": "word_share", "values": {"low": 0, "mid": 1, "high": 2}}
    assert "needs a list of words" in refusal(tmp_path, rubric_dict(criteria=criteria(measure=measure)))


def test_other_encodings_and_huge_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("title: Förmlich".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(path)
    path.write_bytes(b"#" * 2_000_000)
    with pytest.raises(UserError, match="at most 1,000,000"):
        read_yaml(path)


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
    assert directive_leak("Write richly.", rubric) is None
    for text in ("Aim for 90.", "Reach a high score.", "Add ornament to it.", "Ninety percent flowers."):
        assert directive_leak(text, rubric), text


@given(st.floats(0, 100))
def test_every_score_falls_in_the_bin_of_its_nearest_anchor(score: float) -> None:
    rubric = make_rubric()
    nearest = rubric.nearest_level(score)
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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('a: "\\ud83d"', ":1: half a character (\\ud83d); write the whole character, or remove it"),
        ('x: 1\na: [b, "x\\udc00y"]', ":2: half a character (\\udc00)"),
        ('x:\n  "\\ud83d": 1', ":2: half a character (\\ud83d)"),
        ('a: "\\e[31m"', ":1: the character U+001B is not allowed; remove it"),
        ('a: 1\nb: "\\0"', ":2: the character U+0000 is not allowed; remove it"),
        ("a: 1\nb: \x07\n", ":2: the character U+0007 is not allowed; remove it"),
        ("a: \x7f\n", ":1: the character U+007F is not allowed; remove it"),
        ('a: "\\U00110000"', ": an escape code in it stands for no character; write the character itself"),
        ('a: "\\UFFFFFFFF"', ": an escape code in it stands for no character; write the character itself"),
        ("x: 1\n5: a", ":2: the key '5' is read as a number; put it in quotes"),
        ("no: a", ":1: the key 'no' is read as true or false; put it in quotes"),
        ("~: a", ":1: the key '~' is read as nothing; put it in quotes"),
        ("2020-01-01: a", ":1: the key '2020-01-01' is read as a date; put it in quotes"),
        ("? [a]\n: b", ":1: the key is read as a list; put it in quotes"),
        ("a: 2020-13-45", ":1: '2020-13-45' looks like a date or number but is none; put it in quotes"),
        ("a: =", ":1: '=' has a meaning of its own in YAML; put it in quotes"),
        ("<<: {a: 1}", ":1: '<<' has a meaning of its own in YAML; put it in quotes"),
        ("a: b: c", ":1: mapping values are not allowed here; put a text with a colon in quotes"),
        ("a:\n\t- b", ":2: found character '\\t' that cannot start any token; indent with spaces"),
        ("5", ": found a number at the top; write 'key: value' lines"),
        ("text", ": found text at the top; write 'key: value' lines"),
    ],
)
def test_what_yaml_cannot_hold_is_refused_with_its_line(tmp_path: Path, content: str, said: str) -> None:
    path = write(tmp_path / "bad.yaml", content)
    with pytest.raises(UserError) as caught:
        read_yaml(path)
    assert str(caught.value).startswith(f"{path}{said}")


def test_a_character_in_two_halves_is_put_together(tmp_path: Path) -> None:
    """As JSON writes it, which YAML includes."""
    assert read_yaml(write(tmp_path / "x.yaml", json.dumps({"a": "😀 ok"}))) == {"a": "😀 ok"}

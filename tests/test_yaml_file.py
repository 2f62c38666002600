"""YAML that cannot be read, or would be read as something else, is refused with its line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cpt_ray.errors import UserError
from cpt_ray.yaml_file import read_yaml
from tests.builders import write


def test_other_encodings_and_huge_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("title: Förmlich".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        read_yaml(path)
    path.write_bytes(b"#" * 2_000_000)
    with pytest.raises(UserError, match="at most 1,000,000"):
        read_yaml(path)


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

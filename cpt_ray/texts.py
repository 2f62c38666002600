"""Texts as they come from files and requests: blank, broken or misread ones are found, and texts are compared."""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cpt_ray.errors import UserError

_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of controls, format characters (zero-width ones among them) and spaces."""
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0" + "".join(map(chr, range(0xFE00, 0xFE10))))
"""Fillers of Hangul, the empty Braille cell, variation selectors: nothing is drawn, whatever their category says."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_blank(text: str) -> bool:
    """Whether nothing of a text can be seen: it is empty, or all spaces, controls and zero-width characters."""
    return all(unicodedata.category(character) in _INVISIBLE or character in _BLANKS for character in text)


def same_text(text: str, other: str) -> bool:
    """Whether a reader sees the same: equal but for the Unicode normal form and spaces at the ends."""
    return unicodedata.normalize("NFC", text.strip()) == unicodedata.normalize("NFC", other.strip())


def lone_surrogate(value: Any) -> str:
    """The first lone surrogate in a JSON value's texts and keys, as an escape; "" if there is none.

    JSON can hold one ("\\\\ud83d") and UTF-8 cannot, so neither a tokenizer nor parquet takes it.
    """
    return next((f"\\u{ord(half.group()):04x}" for text in strings_in(value) if (half := _SURROGATE.search(text))), "")


def strings_in(value: Any) -> Iterator[str]:
    """All texts in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from strings_in(key)
            yield from strings_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings_in(inner)


def common_length(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    shorter = min(len(text), len(other))
    return next((at for at in range(shorter) if text[at] != other[at]), shorter)


def squashed(text: str) -> str:
    """A text without its white space."""
    return "".join(text.split())


def unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, as `object_pairs_hook`; UserError if a name is in it twice, since one value would be lost."""
    names = dict(pairs)
    if len(names) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise UserError(f"{twice[:60]}: appears twice in one object; leave one out")
    return names


def messages_in(text: str, name: str) -> Any:
    """The messages that a text holds as JSON, else the text; UserError if they are there in another notation."""
    if (messages := _messages(text, json.loads)) is not None:
        return messages
    if _messages(text, ast.literal_eval) is not None:
        raise UserError(f"{name}: messages as Python prints them, not as JSON; save them with json.dumps")
    if squashed(text[:40]).startswith(("[{'role'", '[{"role"', "[{'content'", '[{"content"')):
        raise UserError(f"{name}: begins like messages but is not JSON ({text[:40]!r}); save them with json.dumps")
    return text


def _messages(text: str, parse: Callable[[str], Any]) -> list[dict[str, Any]] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        value = parse(text.strip())
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None
    is_list = isinstance(value, list) and bool(value)
    return value if is_list and all(isinstance(part, dict) and "role" in part for part in value) else None


def refuse_messages_in(text: str, name: str) -> None:
    """UserError if a text that should be a prompt is a list of messages, in JSON or as Python prints it."""
    if not isinstance(messages_in(text, name), str):
        raise UserError(f"{name}: holds a list of messages as text; expected the prompt's own text")

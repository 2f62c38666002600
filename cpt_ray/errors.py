"""The errors a user can mend: one line that says what is wrong, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


class UserError(ValueError):
    """Something in the user's hands is wrong. The command line prints its text and exits with 1."""


def first_line(error: BaseException) -> str:
    """What an error says, cut short."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


def kind_of(value: Any) -> str:
    """What a value of JSON or YAML is, in words: "an object", "nothing"."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return "a text"
        case int() | float():
            return "a number"
        case Mapping():
            return "an object"
        case list() | tuple():
            return "a list"
        case _:
            return f"{value!s:.40}"


def shown(value: Any) -> str:
    """A value as an error repeats it, cut short; what has no letters of its own in words."""
    return kind_of(value) if value is None or isinstance(value, bool) else repr(value)[:60]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`' (did you mean "x"?)'` for the nearest known name, else all of them, in the order given."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (known: {', '.join(names)})" if names else ""

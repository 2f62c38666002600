"""What can be wrong with the parts of a rubric: each check raises a ValueError that says where, what and what to do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from cpt_ray.errors import did_you_mean
from cpt_ray.rubrics.measures import MEASURES, WORD_LISTS_OF, folded, measure_range, why_undefined, word_of, words_of


def numbers(values: Iterable[float]) -> str:
    """As a message lists them."""
    return ", ".join(f"{value:g}" for value in values)


def check_different(where: str, names: list[str]) -> None:
    """ValueError for names that are the same or look alike."""
    looks: dict[str, str] = {}
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: the name {name!r} is used {names.count(name)} times; names must be unique")
        like = looks.setdefault(name.replace("-", "").replace("0", "o").replace("1", "l"), name)
        if like != name:
            raise ValueError(f"{where}: the names {like!r} and {name!r} are too much alike; rename one")


def _check_keys(where: str, mapping: Mapping[str, object], names: list[str]) -> None:
    for key in mapping:
        if key not in names:
            raise ValueError(f"{where}: {key!r} is no level of this rubric{did_you_mean(key, names)}")
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ValueError(f"{where}: nothing for level {', '.join(map(repr, missing))}; write one entry per level")


def wording_of(text: str) -> str:
    """The form in which two wordings are compared: without case, spaces, normal form, invisible characters or a last
    full stop."""
    return " ".join(folded(text).split()).rstrip(".。 ")


def check_descriptors(where: str, descriptors: Mapping[str, str], names: list[str]) -> None:
    """ValueError unless each level has a text of its own."""
    _check_keys(where, descriptors, names)
    owner: dict[str, str] = {}
    for name in names:
        same = owner.setdefault(wording_of(descriptors[name]), name)
        if same != name:
            raise ValueError(f"{where}: {same} and {name} have the same text; say how the levels differ")


def check_word_lists(where: str, measure: str, lists: Mapping[str, Sequence[str]]) -> None:
    """ValueError for a measure that is not known, and for word lists that it cannot read."""
    if measure not in MEASURES:
        raise ValueError(f"{where}.name: no measure {measure!r}{did_you_mean(measure, MEASURES)}")
    for field, entries in lists.items():
        is_needed = field in WORD_LISTS_OF.get(measure, ())
        if is_needed != bool(entries):
            verb = "needs a list of words" if is_needed else f"is not read by {measure}; remove it"
            raise ValueError(f"{where}.{field}: {verb}")
    if problems := list(_word_problems(where, lists)):
        raise ValueError("\n".join(problems))


def check_values(where: str, measure: str, values: Mapping[str, float], names: list[str]) -> None:
    """ValueError for values that a measure cannot have, or that do not rise or fall all the way."""
    _check_keys(where, values, names)
    least, most = measure_range(measure)
    for name, value in values.items():
        if not least <= value <= most:
            known = f"always from {least:g} to {most:g}" if most < math.inf else f"never below {least:g}"
            raise ValueError(f"{where}.{name}: found {value:g}, but {measure} is {known}; change it")
    in_order = [values[name] for name in names]
    steps = [high - low for low, high in itertools.pairwise(in_order)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ValueError(f"{where}: {numbers(in_order)} must strictly rise or strictly fall from level to level")


def _word_problems(where: str, lists: Mapping[str, Sequence[str]]) -> Iterable[str]:
    owner: dict[str, tuple[str, str]] = {}
    for field, entries in lists.items():
        for entry in entries:
            word = word_of(entry)
            if word is None:
                yield f"{where}.{field}: {entry!r} is never one word of a text ({_as_read(entry)}); list single words"
            elif word in owner:
                list_name, listed = owner[word]
                same = "" if listed == entry else f" (as {listed!r})"
                yield f"{where}.{field}: {entry!r} stands under {list_name} already{same}; remove one"
            else:
                owner[word] = (field, entry)


def _as_read(entry: str) -> str:
    words = words_of(entry)
    return f"it is read as {', '.join(map(repr, words))}" if words else why_undefined(entry)

"""Measures of a text that need no judge: exact, registered by name, used by *measured* criteria.

A word is a maximal run of letters and inner apostrophes, lower-cased. A sentence ends in `.`, `!`, `?` or
at the end of the text. A measure of a text without words is undefined (`None`), never zero.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE = re.compile(r"[^.!?\s][^.!?]*(?:[.!?]+|$)")


def words_of(text: str) -> list[str]:
    """The text's words, lower-cased, typographic apostrophes made plain."""
    return [word.lower().replace("\u2019", "'") for word in _WORD.findall(text)]


def measures(text: str, words: Sequence[str] = (), against: Sequence[str] = ()) -> dict[str, float | None]:
    """Every measure of a text, by name: a count of something divided by that of its whole, None if there is no whole.

    `words`, `against`: the lists that `word_share` and `word_balance` look in (WORD_LISTS_OF).
    """
    found, wanted, other = words_of(text), set(words), set(against)
    sentences = len(_SENTENCE.findall(text))
    hits, misses = sum(word in wanted for word in found), sum(word in other for word in found)
    parts = {
        "word_count": (len(found), min(1, len(found))),
        "words_per_sentence": (len(found), sentences if found else 0),
        "mean_word_length": (sum(map(len, found)), len(found)),
        "exclamation_density": (text.count("!"), sentences),  # per sentence
        "question_density": (text.count("?"), sentences),
        "unique_word_share": (len(set(found)), len(found)),
        "word_share": (hits, len(found)),
        "word_balance": (hits, hits + misses),
    }
    return {name: part / whole if whole else None for name, (part, whole) in parts.items()}


MEASURES = tuple(measures(""))
"""Their names."""
WORD_LISTS_OF = {"word_share": ("words",), "word_balance": ("words", "against")}
"""Which word lists a measure reads; the others read none."""

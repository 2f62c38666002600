"""Measures of a text that need no judge: exact, registered by name, used by *measured* criteria.

A word is a maximal run of letters and inner apostrophes, lower-cased. A sentence ends in `.`, `!`, `?` or
at the end of the text. A measure of a text without words is undefined (`None`), never zero.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_SENTENCE = re.compile(r"[^.!?\s][^.!?]*(?:[.!?]+|$)")

Measure = Callable[[str, Sequence[str], Sequence[str]], float | None]


def words_of(text: str) -> list[str]:
    """The text's words, lower-cased, typographic apostrophes made plain."""
    return [word.lower().replace("\u2019", "'") for word in _WORD.findall(text)]


def _num_sentences(text: str) -> int:
    return len(_SENTENCE.findall(text))


def _word_count(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Words in the text."""
    return float(len(words_of(text))) or None


def _words_per_sentence(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Words divided by sentences."""
    found, sentences = words_of(text), _num_sentences(text)
    return len(found) / sentences if found and sentences else None


def _mean_word_length(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Letters per word."""
    found = words_of(text)
    return sum(len(word) for word in found) / len(found) if found else None


def _exclamation_density(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Exclamation marks per sentence."""
    sentences = _num_sentences(text)
    return text.count("!") / sentences if sentences else None


def _question_density(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Question marks per sentence."""
    sentences = _num_sentences(text)
    return text.count("?") / sentences if sentences else None


def _unique_word_share(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Distinct words divided by words, 0 to 1."""
    found = words_of(text)
    return len(set(found)) / len(found) if found else None


def _word_share(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Share of the text's words that are in `words`, 0 to 1."""
    found, wanted = words_of(text), set(words)
    return sum(word in wanted for word in found) / len(found) if found else None


def _word_balance(text: str, words: Sequence[str], against: Sequence[str]) -> float | None:
    """Words in `words` as a share of those in `words` or `against`, 0 to 1; undefined if there are none."""
    found, wanted, other = words_of(text), set(words), set(against)
    hits, misses = sum(word in wanted for word in found), sum(word in other for word in found)
    return hits / (hits + misses) if hits + misses else None


MEASURES: dict[str, Measure] = {
    "word_count": _word_count,
    "words_per_sentence": _words_per_sentence,
    "mean_word_length": _mean_word_length,
    "exclamation_density": _exclamation_density,
    "question_density": _question_density,
    "unique_word_share": _unique_word_share,
    "word_share": _word_share,
    "word_balance": _word_balance,
}
WORD_LISTS_OF = {"word_share": ("words",), "word_balance": ("words", "against")}
"""Which word lists a measure reads; the others read none."""

"""Measures of a text that need no judge: exact, registered by name, used by *measured* criteria.

What a word is, is decided here alone: rubrics' word lists, the search for near-duplicates and the comparison of prompts
read texts with the same functions. `rubrics/README.md` says it for users.

Words are those of Unicode's text segmentation (UAX #29, as the `regex` package implements it) that have a letter, with
two changes for the texts of language models, where `_emphasis_` is markup and `key:value` is two words: connectors
(underscores, the narrow no-break space) and colons end a word. A sentence is a stretch with a word in it, up to a
sentence end (Unicode's Sentence_Terminal and an ellipsis) that is not inside a word or number, or to the end of the
text. A measure of a text without words is undefined (`None`), never zero; so is every measure of a text in a script
that is written without spaces and would need a dictionary (Thai, Lao, Khmer, Burmese ...). Measures that know English
(`english.py`) read words with Latin letters only, and are undefined where there is none.
"""

from __future__ import annotations

import functools
import itertools
import math
import unicodedata
from collections.abc import Sequence

import regex

from cpt_ray.rubrics.english import sentiment, syllables, valence

_FLAGS = regex.WORD | regex.VERSION1 | regex.DOTALL
_TERM = r"[\p{L}\p{N}](?:\B[^\p{Pc}\u202f:\uff1a])*"
_END = r"[\p{Sentence_Terminal}\u2026\u22ef\u0f0d\u0f0e\u166e❓❔❕❗❢]|(?<=\p{Greek}\p{M}*);"
_TERMS = regex.compile(_TERM, _FLAGS)
_TERMS_AND_SYMBOLS = regex.compile(rf"{_TERM}|[\p{{Sm}}\p{{Sc}}\p{{So}}]", _FLAGS)
_TERMS_AND_ENDS = regex.compile(f"{_TERM}|{_END}", _FLAGS)
_CLOSERS = regex.compile(r"[\p{Pe}\p{Pf}\p{Pi}\"'*_`\p{M}\u200b-\u200d\ufe0f]*", _FLAGS)
"""What may stand between a sentence's end and the next space: quotes, brackets, marks of emphasis."""
_LETTER = regex.compile(r"\p{L}", _FLAGS)
_UNSPACED = regex.compile(r"[\p{L}&&[\p{Line_Break=SA}\p{Line_Break=AK}\p{Line_Break=AS}]]", _FLAGS)
"""Letters of scripts without spaces: line breaking knows them, because it needs a dictionary as well."""
_LETTER_AS_SEEN = regex.compile(r"\X", _FLAGS)
_UNSEEN = regex.compile(r"[\p{Default_Ignorable_Code_Point}\u0640\u055b\u055c\u055e]", _FLAGS)
"""What changes no word: soft hyphens and joiners; the Arabic stretch; Armenian accents, which stand inside words."""
_SAME = str.maketrans({"\u2018": "'", "\u2019": "'", "\u02bc": "'", "\u05f3": "'", "\u05f4": '"'})
_EXCLAMATION = regex.compile("[!՜߹᥄‽❕❗❢⹓]", _FLAGS)
_QUESTION = regex.compile(r"[?՞؟፧᥅‽❓❔⳺⳻⸮⹔꘏꛷𑅃]|(?<=\p{Greek}\p{M}*);", _FLAGS)

_LATIN = regex.compile(r"\p{Latin}", _FLAGS)
_MARKS = regex.compile(r"\p{M}", _FLAGS)

MOST_UNSPACED = 0.1
"""Share of a text's letters in scripts without spaces above which its words are not known."""


def folded(text: str) -> str:
    """The form in which texts are compared: no case, no difference of width or normal form, plain apostrophes.

    Nothing that cannot be seen is left in it (Unicode's NFKC_Casefold, but for apostrophes and `_UNSEEN`).
    """
    if text.isascii():
        return text.lower()
    seen = _UNSEEN.sub("", unicodedata.normalize("NFKC", text))
    return unicodedata.normalize("NFKC", seen.casefold()).translate(_SAME)


def terms_of(text: str) -> list[str]:
    """What texts are compared by: words, numbers and symbols (`+`, emoji), folded; the whole text if it has none.

    In a script without spaces, each cluster of letters is a term.
    """
    return [folded(term) for term in _TERMS_AND_SYMBOLS.findall(_composed(text))] or [folded(text).strip()]


def words_of(text: str) -> list[str]:
    """The text's words, folded."""
    return [folded(term) for term in _TERMS.findall(_composed(text)) if _is_word(term)]


def word_of(entry: str) -> str | None:
    """The word, folded, that an entry of a word list is; None if no text has it as one word."""
    composed = _composed(entry.strip())
    return folded(composed) if _TERMS.fullmatch(composed) and words_of(composed) == [folded(composed)] else None


def why_undefined(text: str) -> str:
    """Why a measure of this text is undefined, for a message."""
    if _is_unspaced(_composed(text)):
        return "its script is written without spaces, and words are not looked up in a dictionary"
    words = words_of(text)
    if not words:
        return "it has no word (numbers and signs are none)"
    has_latin = any(map(_LATIN.search, words))
    return "none of the listed words is in it" if has_latin else "it has no word in Latin letters, or none of a list"


def measures(text: str, words: Sequence[str] = (), against: Sequence[str] = ()) -> dict[str, float | None]:
    """Every measure of a text, by name: a count of something divided by that of its whole, None if there is no whole.

    `words`, `against`: the lists that `word_share` and `word_balance` look in (WORD_LISTS_OF).
    """
    composed = _composed(text)
    spelled = [] if _is_unspaced(composed) else [term for term in _TERMS.findall(composed) if _is_word(term)]
    sentences = _sentences(composed) if spelled else []
    in_text = [folded(word) for word in spelled]
    wanted, other = _folded_list(tuple(words)), _folded_list(tuple(against))
    latin = [word for word in in_text if _LATIN.search(word)]
    hits, misses = sum(word in wanted for word in in_text), sum(word in other for word in in_text)
    compatible = unicodedata.normalize("NFKC", composed)  # a fullwidth mark is a mark, a double one two
    parts = {
        "word_count": (len(in_text), min(1, len(in_text))),
        "words_per_sentence": (len(in_text), len(sentences)),
        "mean_word_length": (sum(map(_length, spelled)), len(in_text)),
        "exclamation_density": (len(_EXCLAMATION.findall(compatible)), len(sentences)),  # per sentence
        "question_density": (len(_QUESTION.findall(compatible)), len(sentences)),
        "unique_word_share": (len(set(in_text)), len(in_text)),
        "word_share": (hits, len(in_text)),
        "word_balance": (hits, hits + misses),
        "character_count": (_length(composed.strip()), min(1, len(in_text))),
        "syllables_per_word": (sum(syllables(_plain_letters(word)) for word in latin), len(latin)),
        # of each sentence, which is what VADER is made for
        "sentiment": (math.fsum(sentiment(folded(each)) for each in sentences), len(sentences)) if latin else (0, 0),
        "valence": (valence(latin), min(1, len(latin))),
    }
    return {name: part / whole if whole else None for name, (part, whole) in parts.items()}


def whole_sentences(text: str) -> str:
    """The text up to its last sentence end and the quotes and brackets that close there; "" if it has none.

    A sentence end is one by which sentences are counted, if there is a word before it on its line: else it may be that
    of a list's next number.
    """
    end = line = 0
    has_word = False
    for token in _TERMS_AND_ENDS.finditer(text):
        if (start := text.rfind("\n", 0, token.start()) + 1) > line:
            line, has_word = start, False
        if token[0][0].isalnum():
            has_word = has_word or _LETTER.search(token[0]) is not None
        elif has_word:
            end = token.end()
    return text[: _CLOSERS.match(text, end).end()] if end else ""


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).replace("\u02bc", "'")  # an apostrophe, and a letter to Unicode


def _is_word(term: str) -> bool:
    """Whether a term is more than a number. Terms of scripts without spaces are parts of words that are not known."""
    if term.isascii():
        return term.isalpha() or _LETTER.search(term) is not None
    return _LETTER.search(term) is not None and _UNSPACED.search(term) is None


def _is_unspaced(text: str) -> bool:
    if text.isascii() or not _UNSPACED.search(text):
        return False
    return len(_UNSPACED.findall(text)) > MOST_UNSPACED * len(_LETTER.findall(text))


def _sentences(text: str) -> list[str]:
    """The text, divided in front of each sentence's first term."""
    starts = [0]
    has_word = is_ended = False
    for token in _TERMS_AND_ENDS.finditer(text):
        if not token[0][0].isalnum():
            is_ended = has_word
            continue
        if is_ended:
            starts.append(token.start())
            has_word = is_ended = False
        has_word = has_word or _is_word(token[0])
    if not has_word and len(starts) > 1:  # a number alone at the end
        starts.pop()
    return [text[start:end] for start, end in itertools.pairwise([*starts, len(text)])]


def _length(word: str) -> int:
    """Letters as a reader sees them: a letter with its marks is one."""
    return len(word) if word.isascii() else len(_LETTER_AS_SEEN.findall(_UNSEEN.sub("", word)))


def _plain_letters(word: str) -> str:
    return word if word.isascii() else _MARKS.sub("", unicodedata.normalize("NFD", word))


@functools.lru_cache(maxsize=64)
def _folded_list(entries: tuple[str, ...]) -> frozenset[str]:
    return frozenset(word for word in map(word_of, entries) if word is not None)


MEASURES = tuple(measures(""))
"""Their names."""
OF_LENGTH = {"word_count", "character_count"}
"""Those that say how long a text is: of one that was cut off they say nothing."""
_RANGES = {
    "unique_word_share": (0.0, 1.0),
    "word_share": (0.0, 1.0),
    "word_balance": (0.0, 1.0),
    "sentiment": (-1.0, 1.0),
    "valence": (-math.inf, math.inf),
}


def measure_range(name: str) -> tuple[float, float]:
    """The least and the most that a measure can be."""
    return _RANGES.get(name, (0.0, math.inf))


WORD_LISTS_OF = {"word_share": ("words",), "word_balance": ("words", "against")}
"""Which word lists a measure reads; the others read none."""

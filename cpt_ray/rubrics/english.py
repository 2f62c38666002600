"""What a text's measures need to know about English: the syllables of a word, and the mood of words by two lists.

The lists are kept by others: VADER's (package `vaderSentiment`, MIT) and AFINN-en-165 (Finn Aarup Nielsen, Open
Database License; of the package `afinn` only this file is read, nothing is imported). They were made apart from each
other, so that one can check what the other has selected.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import regex

_VOWELS = regex.compile("[aeiouy]+")
_SILENT = regex.compile(
    r"(?:[^aeiouyl]|[aeiouyrl]l)e$"  # make, whole; but ta-ble
    r"|(?<=[aeiouy].*[^aeioutdyl]|[aeiouy]l+)ed$"  # looked, called; but want-ed
    r"|(?<=[aeiouy].*[^aeiousxzcghy])es$"  # makes; but hous-es
    r"|(?<=[aeiouy].*[^aeiouy])e(?:ly|ful|ment|less|work|times|thing|body)"  # lately, homework
    r"|(?<=some|every)(?=one|where|thing)"
    r"|(?<=[aeiouy])que$"  # unique
)
"""Vowels, or places of one, that are not spoken."""
_APART = regex.compile(
    r"(?<![ct])i(?:a(?!g)|o(?!n)|um|et|en(?![dt]))"  # di-ary, peri-od
    r"|(?<![qg])u(?:al|ous|ity|ate|ing)"  # usu-al
    r"|[eiouy]ing|[uo]e[lr]|creat"  # be-ing, cru-el
    r"|e(?:o(?!u|ple)|(?<=[aeiouy].*e)as?$)"  # vide-o, ide-a
    r"|[aeo]y(?=[aeo](?![ds]$))"  # roy-al
    r"|(?:s|th)ms?$|(?<=[^aeiouy])[^aeiouyr]led$"  # rhyth-m, gig-gled
)
"""Neighbouring vowels that are spoken apart, and syllables without a vowel."""


@functools.lru_cache(maxsize=100_000)
def syllables(word: str) -> int:
    """The syllables of an English word, given in small letters without accents; 1 or more.

    By rules of spelling: right for 98% of the words of a model's everyday answers (against the CMU Pronouncing
    Dictionary).
    """
    return max(1, len(_VOWELS.findall(word)) - len(_SILENT.findall(word)) + len(_APART.findall(word)))


def sentiment(sentence: str) -> float:
    """VADER's compound score of an English sentence, -1 (bleak) to 1 (cheerful): negations and degrees count.

    For single sentences: a longer text scores near -1 or 1 whatever it says, and takes time quadratic in its words.
    """
    return float(_vader().polarity_scores(sentence)["compound"])


def valence(words: Iterable[str]) -> int:
    """The sum of the valences, each from -5 to 5, of those words, in small letters, that AFINN lists."""
    listed = _afinn()
    return sum(listed.get(word, 0) for word in words)


@functools.cache
def _vader() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


@functools.cache
def _afinn() -> dict[str, int]:
    package = importlib.metadata.distribution("afinn")
    path = Path(str(package.locate_file("afinn/data/AFINN-en-165.txt")))
    rows = (line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").splitlines())
    return {word: int(value) for word, value in rows}

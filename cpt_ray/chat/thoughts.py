"""Thoughts are no part of an answer: where they end in a text, by the marks that models put around them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from cpt_ray.chat.templates import special_tokens

NOT_ENDED, UNCLEAR = "thoughts not ended", "thoughts unclear"
DETAILS = {
    NOT_ENDED: "all of the text is thoughts",
    UNCLEAR: "a mark of thoughts in the middle of the text: what is thought and what is answer cannot be told apart",
}
"""What a person reads of each problem."""

_TAGS = (
    *("think", "thinking", "thought", "thoughts", "reasoning", "seed:think", "mm:think"),
    *(r"think:[^\s<>]+", r"ifm\|think(?:_\w+)?"),
)
_MARKS = (  # begin, end; all of these are tags or control tokens, which stand in a text for nothing else
    *((f"(?i:<{tag}>)", f"(?i:</{tag}>)") for tag in _TAGS),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("◁think▷", "◁/think▷"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),
    (r"<\|channel>", r"<channel\|>"),
    (r"(?:<\|start\|>assistant)?<\|channel\|>", r"<\|channel\|>final[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>"),
)
_PLAIN_MARKS = (  # could also be words of an answer: they count at its beginning only
    # gpt-oss without its control tokens: "analysisThe user ... assistantfinalRain falls."
    ("analysis(?=[A-Z]|.*assistantfinal)|final(?=[A-Z])", "(?:^|assistant)final"),
)
_QUOTE = "[`'\"\u201c\u201d\u2018\u2019\u00ab\u00bb]"
_PARTS_OF_MARKS = re.compile(r"<\|(?:message|constrain)\|>")


def _unquoted(mark: str) -> str:
    """Not where a quotation mark or a backtick is on both sides of it: there it is only mentioned."""
    return f"(?:(?<!{_QUOTE})(?:{mark})|(?:{mark})(?!{_QUOTE}))"


def _any(marks: Sequence[str]) -> str:
    return "|".join(f"(?:{mark})" for mark in marks)


_BEGIN_AND_END = [
    (re.compile(begin, re.DOTALL), re.compile(_unquoted(end), re.DOTALL)) for begin, end in (*_MARKS, *_PLAIN_MARKS)
]
_END = re.compile(_unquoted(_any([end for _, end in _MARKS])))
_BEGIN = re.compile(_unquoted(_any([begin for begin, _ in _MARKS])))
_MARK = re.compile(_unquoted(_any([mark for pair in _MARKS for mark in pair])))
_OPEN = re.compile(rf"(?:{_any([begin for begin, _ in _MARKS])})\s*$")
_WRAPPED = re.compile(r"<(answer|response)>(.*?)(?:</\1>)?", re.DOTALL)
_LAST = re.compile(r"(?:<\|(?:return|end)\|>|<turn\|>)$")


class Parted(NamedTuple):
    """A text without its thoughts."""

    answer: str
    """"" where there is a problem."""
    had_thoughts: bool
    problem: str = ""
    """"", `NOT_ENDED` or `UNCLEAR`."""


def without_thoughts(text: str, starts_in_thoughts: bool = False) -> Parted:
    """The answer in a text that a model wrote.

    An end mark alone ends thoughts as well: chat templates often open them at the end of the prompt, and a server does
    not say so. But a text may also mention a mark. In quotation marks or backticks it is taken for a mention, and the
    text is kept whole. Otherwise an end mark at an edge of its line, or with words directly on both sides, ends the
    thoughts, as models write it; within a sentence it may be either, so that the text is rejected: cutting would lose
    half of an answer, keeping would train on thoughts.

    Args:
        starts_in_thoughts: the prompt ends with a begin mark of thoughts, so the text starts inside them.
    """
    rest, had_thoughts = text.strip(), False
    end = _END if starts_in_thoughts else _end_of_begun(rest)
    while end:
        mark = end.search(rest)
        if not mark:
            return Parted("", True, NOT_ENDED)
        rest, had_thoughts = rest[mark.end() :].strip(), True
        end = _end_of_begun(rest)
    lone = None if had_thoughts else _END.search(rest)
    if lone and _BEGIN.search(rest[: lone.start()]):  # a part of the answer is in front of the thoughts
        return Parted("", True, UNCLEAR)
    if lone and _is_alone(rest[: lone.start()], rest[lone.end() :]):
        rest, had_thoughts = rest[lone.end() :].strip(), True
    if had_thoughts:
        rest = _LAST.sub("", rest).strip()
        wrapped = _WRAPPED.fullmatch(rest)
        rest = wrapped[2].strip() if wrapped else rest
    return Parted("", had_thoughts, UNCLEAR) if _MARK.search(rest) else Parted(rest, had_thoughts)


def _end_of_begun(text: str) -> re.Pattern[str] | None:
    """What ends the thoughts that a text begins with; None if it does not begin with thoughts."""
    return next((end for begin, end in _BEGIN_AND_END if begin.match(text)), None)


def _is_alone(before: str, after: str) -> bool:
    """Whether a mark between these is at an edge of its line, or glued to what is on both sides."""
    at_edge = before.rstrip(" \t")[-1:] in ("", "\n") or after.lstrip(" \t")[:1] in ("", "\n")
    return at_edge or not (before[-1].isspace() or after[0].isspace())


def opens_thoughts(tokenizer: Any, prompt_ids: Sequence[int]) -> bool:
    """Whether a rendered prompt ends with a begin mark."""
    return bool(_OPEN.search(tokenizer.decode(list(prompt_ids[-16:]))))


def mark_tokens(tokenizer: Any) -> dict[int, str]:
    """Marks (or parts of them) that are special tokens, by id: a text decoded without special tokens lacks them."""
    special = special_tokens(tokenizer)
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=False))
    return {at: text for at, text in special.items() if _MARK.fullmatch(text) or _PARTS_OF_MARKS.fullmatch(text)}

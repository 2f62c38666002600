"""What users show: choices between two answers to a prompt, and the questions worth asking them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cpt_ray.errors import UserError, kind_of
from cpt_ray.texts import half_character

MAX_CHOICES = 64
"""Taken at once."""


MAX_CHARS = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One thing a user told: of two answers to a prompt, this one."""

    prompt: str
    chosen: str
    rejected: str

    def swapped(self) -> Choice:
        """The opposite choice."""
        return Choice(prompt=self.prompt, chosen=self.rejected, rejected=self.chosen)


def parse_choices(data: Any, where: str = "choices") -> list[Choice]:
    """A client's choices; UserError, in one line, for whatever is not 1 to MAX_CHOICES of them."""
    if not isinstance(data, list) or not 0 < len(data) <= MAX_CHOICES:
        found = f"{len(data)} of them" if isinstance(data, list) else kind_of(data)
        raise UserError(f"{where}: found {found}; give a list of 1 to {MAX_CHOICES} choices")
    names = ("prompt", "chosen", "rejected")
    choices = []
    for at, one in enumerate(data):
        if not isinstance(one, dict) or set(one) != set(names):
            raise UserError(f'{where}[{at}]: expected {{"prompt": "...", "chosen": "...", "rejected": "..."}}')
        for name in names:
            text = one[name]
            is_text = isinstance(text, str) and 0 < len(text.strip()) <= len(text) <= MAX_CHARS
            if is_text and half_character(text):
                raise UserError(f"{where}[{at}].{name}: holds half a character (a lone surrogate, like \\ud83d)")
            if not is_text:
                raise UserError(f"{where}[{at}].{name}: expected a text of 1 to {MAX_CHARS} characters")
        if one["chosen"] == one["rejected"]:
            raise UserError(f"{where}[{at}]: chosen and rejected are the same text; that is no choice")
        choices.append(Choice(**one))
    return choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A pair worth asking, its margins known beforehand."""

    prompt: str
    first: str
    second: str
    margins: tuple[float, ...]
    """Per directive, of choosing `first`; choosing `second` has the negative."""

    def to_json(self) -> dict[str, str]:
        """What a user is asked."""
        return {"prompt": self.prompt, "first": self.first, "second": self.second}


@dataclass
class Preferences:
    """One user's choices and what the policy made of them; what a server keeps."""

    choices: list[Choice] = field(default_factory=list)
    margins: list[tuple[float, ...]] = field(default_factory=list)
    """Per choice and directive."""
    key: str = ""
    """The candidates (and the policy) that the margins belong to; "" if they are none's."""

    def new(self, choices: Sequence[Choice]) -> list[Choice]:
        """Those that are not known yet, each once: a choice sent again says nothing new. Its opposite does."""
        known = set(self.choices)
        return [one for one in dict.fromkeys(choices) if one not in known]

    def add_unscored(self, choices: Sequence[Choice]) -> None:
        """Adds what is new of choices that no policy is asked about; one that needs the margins scores all anew."""
        self.choices += self.new(choices)
        self.margins, self.key = [() for _ in self.choices], ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What `to_json` gave; UserError if it is something else."""
        try:
            choices = [Choice(**one) for one in data["choices"]]
            margins = [tuple(map(float, one)) for one in data["margins"]]
            if len(choices) == len(margins):
                known = dict(zip(choices, margins, strict=True))  # once each, also in a state of an earlier version
                return cls(choices=list(known), margins=list(known.values()), key=str(data["key"]))
        except (KeyError, TypeError, ValueError):
            pass
        raise UserError("preferences: not a saved state; delete it and choose again")

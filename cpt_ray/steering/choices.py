"""What users show: choices between two answers to a prompt, and the questions worth asking them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from cpt_ray.errors import UserError, kind_of
from cpt_ray.texts import lone_surrogate

MAX_CHOICES = 64
"""In one request or file."""
MAX_CHARS = 20_000
"""Of each text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Of two answers to a prompt, the one that a user prefers."""

    prompt: str
    chosen: str
    rejected: str

    def swapped(self) -> Choice:
        """The opposite choice."""
        return Choice(prompt=self.prompt, chosen=self.rejected, rejected=self.chosen)


def parse_choices(data: Any, where: str = "choices") -> list[Choice]:
    """A client's choices; UserError, in one line, for whatever is not 1 to MAX_CHOICES of them."""
    if not isinstance(data, list) or not 0 < len(data) <= MAX_CHOICES:
        given = f"{len(data)} of them" if isinstance(data, list) else kind_of(data)
        raise UserError(f"{where}: found {given}; give a list of 1 to {MAX_CHOICES} choices")
    return [_parse_choice(entry, f"{where}[{at}]") for at, entry in enumerate(data)]


def _parse_choice(entry: Any, where: str) -> Choice:
    if not isinstance(entry, dict) or set(entry) != {"prompt", "chosen", "rejected"}:
        raise UserError(f'{where}: expected {{"prompt": "...", "chosen": "...", "rejected": "..."}}')
    for name, text in entry.items():
        if not (isinstance(text, str) and text.strip() and len(text) <= MAX_CHARS):
            raise UserError(f"{where}.{name}: expected a text of 1 to {MAX_CHARS} characters")
        if lone_surrogate(text):
            raise UserError(f"{where}.{name}: holds half a character (a lone surrogate, like \\ud83d)")
    choice = Choice(**entry)
    if choice.chosen == choice.rejected:
        raise UserError(f"{where}: chosen and rejected are the same text; that is no choice")
    return choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Two answers worth asking about, whose margins are computed beforehand so that a choice costs nothing."""

    prompt: str
    first: str
    second: str
    margins: tuple[float, ...]
    """Per directive, of choosing `first`; choosing `second` has the negative."""

    def to_json(self) -> dict[str, str]:
        """What a user is asked."""
        return {"prompt": self.prompt, "first": self.first, "second": self.second}


@dataclass
class PreferenceState:
    """One user's choices and their margins by the policy: the state that a server keeps."""

    choices: list[Choice] = field(default_factory=list)
    margins: list[tuple[float, ...]] = field(default_factory=list)
    """Per choice and directive."""
    key: str = ""
    """Names the candidates and the policy that computed the margins; "" if none are computed."""

    def new(self, choices: Sequence[Choice]) -> list[Choice]:
        """Those that are not known yet, each once: a repeated choice says nothing new. Its opposite does."""
        known = set(self.choices)
        return [choice for choice in dict.fromkeys(choices) if choice not in known]

    def add_unscored(self, choices: Sequence[Choice]) -> None:
        """Adds what is new of choices, without margins; where they are needed later, all are scored again."""
        self.choices += self.new(choices)
        self.margins, self.key = [() for _ in self.choices], ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What `to_json` gave; UserError if it is something else."""
        try:
            choices = [Choice(**entry) for entry in data["choices"]]
            margins = [tuple(map(float, row)) for row in data["margins"]]
            # each choice once, which earlier versions did not see to
            known = dict(zip(choices, margins, strict=True))
            return cls(choices=list(known), margins=list(known.values()), key=str(data["key"]))
        except (KeyError, TypeError, ValueError):
            raise UserError("preferences: not a saved state; delete it and choose again") from None

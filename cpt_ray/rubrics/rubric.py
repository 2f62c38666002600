"""Rubrics: the YAML a user writes, its typed form, and the linter behind `cpt check`.

One file holds one rubric. See `rubrics/README.md` for the format by example.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import regex
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.rubrics.checks import (
    check_descriptors,
    check_different,
    check_values,
    check_word_lists,
    numbers,
    wording_of,
)
from cpt_ray.rubrics.measures import OF_LENGTH, terms_of, word_of
from cpt_ray.tables.records import CONTROL, content_id
from cpt_ray.texts import is_blank
from cpt_ray.yaml_file import read_yaml, shown_in_yaml, validation_lines

_SAID = regex.compile(r"[\p{L}\p{N}\p{Extended_Pictographic}]")


def _can_be_seen(text: str) -> str:
    if is_blank(text):
        raise ValueError(f"found {shown_in_yaml(text)}{', in which nothing can be seen' if text else ''}; write a text")
    return text


def _not_true_or_false(value: Any) -> Any:
    if isinstance(value, bool):  # which would be read as 1 or 0
        raise ValueError(f"found {shown_in_yaml(value)}; expected a number")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=60)]
Text = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_can_be_seen)]
_NUMBER = BeforeValidator(_not_true_or_false)


def _dict_or_spread(value: Any) -> Any:
    if isinstance(value, dict) or value == SPREAD:
        return value
    raise ValueError(f"found {shown_in_yaml(value)}; write {{level name: value, ...}}, or {SPREAD}")


SPREAD = "spread"
"""In place of a measure's values: they are set by the spread of the writer's own answers."""
LEAST_ANSWERS = 20
"""The fewest answers from which a spread is computed."""
_Values = Annotated[
    dict[str, Annotated[float, Field(strict=False, allow_inf_nan=False), _NUMBER]] | Literal["spread"],
    BeforeValidator(_dict_or_spread),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Level(_Strict):
    """One ordered level of a rubric."""

    name: Name
    score: Annotated[float, Field(ge=0, le=100, strict=False, allow_inf_nan=False), _NUMBER]
    """Anchor on 0-100: the score an answer exactly at this level has."""
    directives: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """System prompts that stand for the level; if empty the director model writes them."""


class MeasureSpec(_Strict):
    """A measure and the word lists that it reads (see `measures.py`)."""

    name: str
    words: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Compared as the words of a text are (`measures.words_of`)."""
    against: Annotated[tuple[Text, ...], Field(strict=False)] = ()

    @property
    def lists(self) -> dict[str, tuple[str, ...]]:
        """The word lists by their names."""
        return {"words": self.words, "against": self.against}


class ScoredMeasureSpec(MeasureSpec):
    """A measure whose values at the levels make it a criterion's score."""

    values: _Values
    """The measure's value at each level, strictly rising or strictly falling; or "spread"."""
    points: Annotated[tuple[Annotated[tuple[float, float], Field(strict=False)], ...], Field(strict=False)] = ()
    """(value, score), rising: what "spread" was found to be. Filled in by the run, never by a rubric's file."""


class Criterion(_Strict):
    """One weighted aspect of a rubric, graded level by level by the judge or by a measure."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=100, strict=False, allow_inf_nan=False), _NUMBER]
    """Percent; the weights of a rubric sum to 100."""
    descriptors: dict[str, Text]
    """Level name to what an answer at that level looks like."""
    measure: ScoredMeasureSpec | None = None

    @property
    def is_spread(self) -> bool:
        """Whether its values are the writer's spread."""
        return self.measure is not None and self.measure.values == SPREAD


class Rubric(_Strict):
    """One thing that can be dialled: its levels, and how an answer is graded."""

    id: Name
    version: Annotated[int, Field(ge=1)]
    title: Text
    objective: Text
    principles: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    levels: Annotated[tuple[Level, ...], Field(min_length=2, max_length=9, strict=False)]
    """Lowest score first."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, strict=False)]
    check: MeasureSpec | None = None
    """A second measure, which selects nothing and is only reported."""

    @property
    def content_hash(self) -> str:
        """Changes with any part of the rubric that a written answer or, but for the spread, a grade can depend on."""
        unread: Any = {
            "levels": {"__all__": {"directives"}},
            "criteria": {"__all__": {"measure": {"points"}}},
            "check": True,
        }
        return content_id(self.model_dump(mode="json", exclude=unread))

    @property
    def grading_hash(self) -> str:
        """Changes with all that a grade depends on."""
        return content_id(self.content_hash, [spec.points for spec in self.measures])

    def __hash__(self) -> int:
        # pydantic's own hash covers every field, and a criterion's descriptors are a dict
        return hash((self.id, self.version))

    def level(self, name: str) -> Level:
        """The level called `name`; UserError with the nearest name if there is none."""
        for level in self.levels:
            if level.name == name:
                return level
        known = [level.name for level in self.levels]
        raise UserError(f"rubric {self.id}: no level {name!r}{did_you_mean(name, known)}")

    @property
    def judged(self) -> tuple[Criterion, ...]:
        """Criteria that need a judge."""
        return tuple(criterion for criterion in self.criteria if criterion.measure is None)

    @property
    def measured(self) -> tuple[Criterion, ...]:
        """Criteria that a registered measure grades."""
        return tuple(criterion for criterion in self.criteria if criterion.measure is not None)

    @property
    def measures(self) -> list[ScoredMeasureSpec]:
        """Of the measured criteria."""
        return [criterion.measure for criterion in self.criteria if criterion.measure is not None]

    @property
    def measures_length(self) -> bool:
        """Whether a criterion measures how long an answer is: a cut answer then has no known value."""
        return any(spec.name in OF_LENGTH for spec in self.measures)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [level.name for level in self.levels]
        check_different("levels", names)
        check_different("criteria", [criterion.name for criterion in self.criteria])
        if CONTROL in names:
            raise ValueError(f"levels: {CONTROL!r} is what the policy's own answers are called; rename the level")
        scores = [level.score for level in self.levels]
        if any(low >= high for low, high in itertools.pairwise(scores)):
            raise ValueError(
                f"levels: score anchors {numbers(scores)} are out of order; list the lowest score first, no two equal"
            )
        total = sum(criterion.weight for criterion in self.criteria)
        if abs(total - 100) > 1e-6:
            raise ValueError(f"criteria: weights sum to {total:g}; change them so that they sum to 100")
        for criterion in self.criteria:
            check_descriptors(f"criteria.{criterion.name}.descriptors", criterion.descriptors, names)
            if criterion.measure is not None:
                _check_measure(f"criteria.{criterion.name}.measure", criterion.measure, names)
        if self.check is not None:
            check_word_lists("check", self.check.name, self.check.lists)
            _check_is_another(self.check, self.measures)
        _check_directives(self)
        return self


def _check_is_another(check: MeasureSpec, measures: Iterable[ScoredMeasureSpec]) -> None:
    for spec in measures:
        if _read_as(spec) == _read_as(check):
            raise ValueError(
                f"check.name: {check.name} is a criterion's measure already; choose one that no criterion has"
            )


def _read_as(spec: MeasureSpec) -> tuple[str, frozenset[str | None], frozenset[str | None]]:
    return spec.name, frozenset(map(word_of, spec.words)), frozenset(map(word_of, spec.against))


def _check_measure(where: str, spec: ScoredMeasureSpec, names: list[str]) -> None:
    check_word_lists(where, spec.name, spec.lists)
    if isinstance(spec.values, dict):
        check_values(f"{where}.values", spec.name, spec.values, names)


def _check_directives(rubric: Rubric) -> None:
    owner: dict[str, str] = {}
    for level in rubric.levels:
        where = f"levels.{level.name}.directives"
        for text in level.directives:
            if not _SAID.search(text):
                raise ValueError(f"{where}: {text[:60]!r} has no word in it; write what the model should do")
            if (wording := wording_of(text)) in owner:
                raise ValueError(f"{where}: {text[:60]!r} stands under {owner[wording]} already; remove one")
            owner[wording] = level.name
            if leak := directive_leak(text, rubric):
                raise ValueError(f"{where}: {text[:60]!r} {leak}; rephrase it")
        if len(level.directives) == 1:
            raise ValueError(
                f"{where}: found 1; give two or more, because some are held out, or none: then the director writes them"
            )


_NUMERALS = regex.compile(r"[\p{N}%\u066a\u2030\u2031\ufe6a\uff05]")
_GRADING = {("percent",), ("per", "cent"), ("score",), ("scores",), ("rubric",), ("rubrics",)}


def directive_leak(text: str, rubric: Rubric) -> str | None:
    """Why `text` may not be a directive of `rubric` (it names the number or the rubric), or None.

    Digits of every script count, and words for numbers of none: "three short sentences" is a manner.
    """
    if numeral := _NUMERALS.search(text):
        return f"leaks a number or the grading ({numeral.group()!r})"
    parts = _parts(text)
    for words in sorted(_GRADING):
        if _has(parts, words):
            return f"leaks a number or the grading ({' '.join(words)!r})"
    for name in (rubric.id, rubric.title):
        if _has(parts, _parts(name)):
            return f"names the rubric ({name!r})"
    return None


def _parts(text: str) -> tuple[str, ...]:
    """Words of a text, taken apart at apostrophes: "ornament's" has the name in it."""
    return tuple(part for term in terms_of(text) for part in term.split("'") if part)


def _has(parts: tuple[str, ...], words: tuple[str, ...]) -> bool:
    return bool(words) and any(parts[at : at + len(words)] == words for at in range(len(parts) - len(words) + 1))


# ---------------------------------------------------------------- reading


def load_rubric(path: Path) -> Rubric:
    """One rubric from one file; UserError with a line per problem."""
    loaded = read_yaml(path)
    try:
        rubric = Rubric.model_validate(loaded)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in validation_lines(error, Rubric))) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    for at, criterion in enumerate(rubric.criteria):
        if criterion.measure is not None and criterion.measure.points:
            raise UserError(f"{path}: criteria.{at}.measure.points: a run sets them, a rubric does not; remove them")
    return rubric


def rubric_files(paths: list[Path]) -> list[Path]:
    """The YAML files named by `paths`; a folder stands for the *.yaml and *.yml files directly in it."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml"))
            if not inside:
                raise UserError(f"{path}: no *.yaml file in this folder")
            files += inside
        elif path.exists():
            files.append(path)
        else:
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            hint = "" if path.suffix in (".yaml", ".yml") else "; an override is key=value"
            raise UserError(f"{path}: no such file or folder{where}{hint}")
    return files


def load_rubrics(paths: list[Path]) -> tuple[Rubric, ...]:
    """All rubrics in `paths`, ordered by id; UserError that lists every problem of every file."""
    problems: list[str] = []
    owners: dict[str, Path] = {}
    rubrics: list[Rubric] = []
    for path in rubric_files(paths):
        try:
            rubric = load_rubric(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if rubric.id in owners:
            problems.append(f"{path}: id: {rubric.id!r} is used by {owners[rubric.id]} too; ids must be unique")
        owners[rubric.id] = path
        rubrics.append(rubric)
    if problems:
        raise UserError("\n".join(problems))
    return tuple(sorted(rubrics, key=lambda rubric: rubric.id))


def check_rubric_names(where: str, names: Iterable[str], known: Collection[str], none: str = "") -> None:
    """UserError for the first of the names in an entry of the run file that is no rubric's id.

    Args:
        none: the entry's value that names no rubric, for a command line.
    """
    for name in names:
        if name not in known:
            override = f" ({where}={none})" if none else ""
            why = f"no rubric {name!r}{did_you_mean(name, known)}"
            raise UserError(f"{where}: {why}; correct it or leave it out{override}")

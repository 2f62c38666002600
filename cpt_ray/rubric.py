"""Rubrics: the YAML a user writes, its typed form, and the linter behind `cpt check`.

One file holds one rubric. See `rubrics/README.md` for the format by example.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Annotated, Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cpt_ray.errors import UserError, did_you_mean, shown
from cpt_ray.measures import MEASURES, WORD_LISTS_OF
from cpt_ray.records import CONTROL, content_id

MAX_FILE_BYTES = 1_000_000

Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=60)]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Level(_Strict):
    """One ordered level of a rubric."""

    name: Name
    score: Annotated[float, Field(ge=0, le=100, strict=False)]
    """Anchor on 0-100: the score an answer exactly at this level has."""
    directives: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """System prompts that stand for the level; if empty the director model writes them."""


class MeasureSpec(_Strict):
    """How a measured criterion reads a text (see `measures.py`)."""

    name: str
    values: dict[str, Annotated[float, Field(strict=False)]]
    """The measure's value at each level, strictly rising or strictly falling."""
    words: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    against: Annotated[tuple[Text, ...], Field(strict=False)] = ()


class Criterion(_Strict):
    """One weighted aspect of a rubric, graded level by level by the judge or by a measure."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=100, strict=False)]
    """Percent; the weights of a rubric sum to 100."""
    descriptors: dict[str, Text]
    """Level name to what an answer at that level looks like."""
    measure: MeasureSpec | None = None


class Rubric(_Strict):
    """One attribute family: what is dialled, its levels and how an answer is graded."""

    id: Name
    version: Annotated[int, Field(ge=1)]
    title: Text
    objective: Text
    principles: Annotated[tuple[Text, ...], Field(min_length=1, strict=False)]
    levels: Annotated[tuple[Level, ...], Field(min_length=2, max_length=9, strict=False)]
    """Lowest score first."""
    criteria: Annotated[tuple[Criterion, ...], Field(min_length=1, strict=False)]

    @property
    def content_hash(self) -> str:
        """Changes with any part of the rubric that a written answer or a grade can depend on."""
        return content_id(self.model_dump(mode="json", exclude={"levels": {"__all__": {"directives"}}}))

    def __hash__(self) -> int:
        return hash((self.id, self.version))

    def level(self, name: str) -> Level:
        """The level called `name`; UserError with the nearest name if there is none."""
        for level in self.levels:
            if level.name == name:
                return level
        raise UserError(f"rubric {self.id}: no level {name!r}{did_you_mean(name, [one.name for one in self.levels])}")

    def nearest_level(self, score: float) -> Level:
        """The level in whose bin `score` (0-100) falls: bins end half-way between anchors, a tie goes up."""
        return min(self.levels, key=lambda level: (abs(level.score - score), -level.score))

    @property
    def judged(self) -> tuple[Criterion, ...]:
        """Criteria that need a judge."""
        return tuple(one for one in self.criteria if one.measure is None)

    @property
    def measured(self) -> tuple[Criterion, ...]:
        """Criteria that a registered measure grades."""
        return tuple(one for one in self.criteria if one.measure is not None)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [level.name for level in self.levels]
        _no_duplicates("levels", names)
        _no_duplicates("criteria", [one.name for one in self.criteria])
        scores = [level.score for level in self.levels]
        if any(low >= high for low, high in itertools.pairwise(scores)):
            raise ValueError(
                f"levels: score anchors {_numbers(scores)} are out of order; list the lowest score first, no two equal"
            )
        total = sum(one.weight for one in self.criteria)
        if abs(total - 100) > 1e-6:
            raise ValueError(f"criteria: weights sum to {total:g}; change them so that they sum to 100")
        for one in self.criteria:
            _keyed_by_level(f"criteria.{one.name}.descriptors", one.descriptors, names)
            if one.measure is not None:
                _check_measure(f"criteria.{one.name}.measure", one.measure, names)
        owner: dict[str, str] = {}
        for level in self.levels:
            if level.name == CONTROL:
                raise ValueError(f"levels: {CONTROL!r} is what the policy's own answers are called; rename the level")
            for text in level.directives:
                if text in owner:
                    raise ValueError(
                        f"levels.{level.name}.directives: {text[:60]!r} stands under {owner[text]} already; remove one"
                    )
                owner[text] = level.name
                if leak := directive_leak(text, self):
                    raise ValueError(f"levels.{level.name}.directives: {text[:60]!r} {leak}; rephrase it")
        return self


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _no_duplicates(where: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: the name {name!r} is used {names.count(name)} times; names must be unique")


def _keyed_by_level(where: str, mapping: dict[str, Any], names: list[str]) -> None:
    for key in mapping:
        if key not in names:
            raise ValueError(f"{where}: {key!r} is no level of this rubric{did_you_mean(key, names)}")
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ValueError(f"{where}: nothing for level {', '.join(map(repr, missing))}; write one entry per level")


def _check_measure(where: str, spec: MeasureSpec, names: list[str]) -> None:
    if spec.name not in MEASURES:
        raise ValueError(f"{where}.name: no measure {spec.name!r}{did_you_mean(spec.name, MEASURES)}")
    _keyed_by_level(f"{where}.values", spec.values, names)
    values = [spec.values[name] for name in names]
    steps = [high - low for low, high in itertools.pairwise(values)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ValueError(f"{where}.values: {_numbers(values)} must strictly rise or strictly fall from level to level")
    for field in ("words", "against"):
        needed, given = field in WORD_LISTS_OF.get(spec.name, ()), bool(getattr(spec, field))
        if needed != given:
            verb = "needs a list of words" if needed else f"is not read by {spec.name}; remove it"
            raise ValueError(f"{where}.{field}: {verb}")


_NUMBER_WORDS = r"\d|\bpercent\b|\b(?:score|rubric)s?\b"


def directive_leak(text: str, rubric: Rubric) -> str | None:
    """Why `text` may not be a directive of `rubric` (it names the number or the rubric), or None."""
    if found := re.search(_NUMBER_WORDS, text, re.IGNORECASE):
        return f"leaks a number or the grading ({found.group()!r})"
    for name in {rubric.id, rubric.id.replace("-", " "), rubric.title}:
        if re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE):
            return f"names the rubric ({name!r})"
    return None


# ---------------------------------------------------------------- reading


def _refusal(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML only: no aliases (bombs), no tags, no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refusal("YAML anchors and aliases are not allowed; write the text out", event)
        if getattr(event, "tag", None):
            raise _refusal(f"the YAML tag {event.tag!r} is not allowed; remove it", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(f"key {key!r} is read as {type(key).__name__}; put it in quotes", key_node)
            if key in seen:
                raise _refusal(f"the key {key!r} stands twice; remove one", key_node)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError naming the file, and the line where there is one."""
    try:
        data = path.read_bytes()
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; give the file (of a run: its run file)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path}: {len(data):,} bytes; at most {MAX_FILE_BYTES:,} are read")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    try:
        loaded = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if loaded is None:
        raise UserError(f"{path}: the file is empty")
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: found a {type(loaded).__name__} at the top; write 'key: value' lines")
    return loaded


def validation_lines(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem as `field: what was found; what to do`."""
    lines = []
    for one in error.errors():
        where = ".".join(str(part) for part in one["loc"])
        found = shown(one["input"])
        match one["type"]:
            case "extra_forbidden":
                known = _fields_at(model, one["loc"][:-1])
                lines.append(f"{where}: unknown key{did_you_mean(str(one['loc'][-1]), known)}")
            case "missing":
                lines.append(f"{where}: missing; add it")
            case "value_error":
                text = str(one["ctx"]["error"])
                lines.append(f"{where}: {text}" if where else text)
            case "string_pattern_mismatch":
                lines.append(f"{where}: found {found}; use lower-case letters, digits and hyphens, a letter first")
            case "tuple_type" | "list_type":
                lines.append(f"{where}: found {found}; expected a list, like [a, b]")
            case "dict_type" | "model_type" | "model_attributes_type":
                lines.append(f"{where}: found {found}; expected entries, like {{name: value}}")
            case "string_type":
                lines.append(f"{where}: found {found}; expected text (put it in quotes)")
            case _:
                lines.append(f"{where}: found {found}; {one['msg'][0].lower()}{one['msg'][1:]}")
    return lines


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model that `loc` points into."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current is not None else None
        current = _model_in(field.annotation) if field else None
    return list(current.model_fields) if current is not None else []


def _model_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if found := _model_in(inner):
            return found
    return None


def load_rubric(path: Path) -> Rubric:
    """One rubric from one file; UserError with a line per problem."""
    loaded = read_yaml(path)
    try:
        return Rubric.model_validate(loaded)
    except ValidationError as error:
        raise UserError("\n".join(f"{path}: {line}" for line in validation_lines(error, Rubric))) from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None


def rubric_files(paths: list[Path]) -> list[Path]:
    """The YAML files named by `paths`; a folder stands for the *.yaml and *.yml files directly in it."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(one for one in path.iterdir() if one.suffix in (".yaml", ".yml"))
            if not found:
                raise UserError(f"{path}: no *.yaml file in this folder")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder" + ("" if path.is_absolute() else f" in {Path.cwd()}"))
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

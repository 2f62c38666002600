"""Rubrics: the YAML a user writes, its typed form, and the linter behind `cpt check`.

One file holds one rubric. See `rubrics/README.md` for the format by example.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

import regex
import yaml
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
from cpt_ray.measures import LARGEST, MEASURES, WORD_LISTS_OF, folded, terms_of, why_undefined, word_of, words_of
from cpt_ray.records import CONTROL, content_id
from cpt_ray.texts import is_blank

MAX_FILE_BYTES = 1_000_000

_SAID = regex.compile(r"[\p{L}\p{N}\p{Extended_Pictographic}]")


def _can_be_seen(text: str) -> str:
    if is_blank(text):
        raise ValueError(f"found {_shown(text)}{', in which nothing can be seen' if text else ''}; write a text")
    return text


def _not_true_or_false(value: Any) -> Any:
    if isinstance(value, bool):  # which would be read as 1 or 0
        raise ValueError(f"found {_shown(value)}; expected a number")
    return value


Name = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9-]*$", max_length=60)]
Text = Annotated[str, StringConstraints(strip_whitespace=True), AfterValidator(_can_be_seen)]
_NUMBER = BeforeValidator(_not_true_or_false)


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
    """How a measured criterion reads a text (see `measures.py`)."""

    name: str
    values: dict[str, Annotated[float, Field(strict=False, allow_inf_nan=False), _NUMBER]]
    """The measure's value at each level, strictly rising or strictly falling."""
    words: Annotated[tuple[Text, ...], Field(strict=False)] = ()
    """Compared as the words of a text are (`measures.words_of`)."""
    against: Annotated[tuple[Text, ...], Field(strict=False)] = ()


class Criterion(_Strict):
    """One weighted aspect of a rubric, graded level by level by the judge or by a measure."""

    name: Name
    weight: Annotated[float, Field(gt=0, le=100, strict=False, allow_inf_nan=False), _NUMBER]
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
        _different("levels", names)
        _different("criteria", [one.name for one in self.criteria])
        if CONTROL in names:
            raise ValueError(f"levels: {CONTROL!r} is what the policy's own answers are called; rename the level")
        scores = [level.score for level in self.levels]
        if any(low >= high for low, high in itertools.pairwise(scores)):
            raise ValueError(
                f"levels: score anchors {_numbers(scores)} are out of order; list the lowest score first, no two equal"
            )
        total = sum(one.weight for one in self.criteria)
        if abs(total - 100) > 1e-6:
            raise ValueError(f"criteria: weights sum to {total:g}; change them so that they sum to 100")
        for one in self.criteria:
            _check_descriptors(f"criteria.{one.name}.descriptors", one.descriptors, names)
            if one.measure is not None:
                _check_measure(f"criteria.{one.name}.measure", one.measure, names)
        _check_directives(self)
        return self


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _different(where: str, names: list[str]) -> None:
    looks: dict[str, str] = {}
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{where}: the name {name!r} is used {names.count(name)} times; names must be unique")
        like = looks.setdefault(name.replace("-", "").replace("0", "o").replace("1", "l"), name)
        if like != name:
            raise ValueError(f"{where}: the names {like!r} and {name!r} are too much alike; rename one")


def _keyed_by_level(where: str, mapping: Mapping[str, Any], names: list[str]) -> None:
    for key in mapping:
        if key not in names:
            raise ValueError(f"{where}: {key!r} is no level of this rubric{did_you_mean(key, names)}")
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ValueError(f"{where}: nothing for level {', '.join(map(repr, missing))}; write one entry per level")


def _wording(text: str) -> str:
    """The same for texts that differ only in case, spaces, normal form, what is not seen or the last full stop."""
    return " ".join(folded(text).split()).rstrip(".。 ")


def _check_descriptors(where: str, descriptors: Mapping[str, str], names: list[str]) -> None:
    _keyed_by_level(where, descriptors, names)
    owner: dict[str, str] = {}
    for name in names:
        same = owner.setdefault(_wording(descriptors[name]), name)
        if same != name:
            raise ValueError(f"{where}: {same} and {name} have the same text; say how the levels differ")


def _check_measure(where: str, spec: MeasureSpec, names: list[str]) -> None:
    if spec.name not in MEASURES:
        raise ValueError(f"{where}.name: no measure {spec.name!r}{did_you_mean(spec.name, MEASURES)}")
    _keyed_by_level(f"{where}.values", spec.values, names)
    for field in ("words", "against"):
        needed, given = field in WORD_LISTS_OF.get(spec.name, ()), bool(getattr(spec, field))
        if needed != given:
            verb = "needs a list of words" if needed else f"is not read by {spec.name}; remove it"
            raise ValueError(f"{where}.{field}: {verb}")
    if problems := [*_word_problems(where, {"words": spec.words, "against": spec.against})]:
        raise ValueError("\n".join(problems))
    _check_values(where, spec, [spec.values[name] for name in names])


def _check_values(where: str, spec: MeasureSpec, values: list[float]) -> None:
    most = LARGEST.get(spec.name, math.inf)
    for name, value in spec.values.items():
        if not 0 <= value <= most:
            known = f"always from 0 to {most:g}" if most < math.inf else "never below 0"
            raise ValueError(f"{where}.values.{name}: found {value:g}, but {spec.name} is {known}; change it")
    steps = [high - low for low, high in itertools.pairwise(values)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ValueError(f"{where}.values: {_numbers(values)} must strictly rise or strictly fall from level to level")


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


def _check_directives(rubric: Rubric) -> None:
    owner: dict[str, str] = {}
    for level in rubric.levels:
        where = f"levels.{level.name}.directives"
        for text in level.directives:
            if not _SAID.search(text):
                raise ValueError(f"{where}: {text[:60]!r} has no word in it; write what the model should do")
            if (wording := _wording(text)) in owner:
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


_UNWANTED = regex.compile(r"[[\p{Cs}\p{Cc}]--[\t\n\r]]", regex.VERSION1)
"""Halves of characters, and control characters: no tokenizer, no file and no terminal takes them well."""
_YAML_HINTS = {
    "mapping values are not allowed here": "put a text with a colon in quotes, and line keys up",
    "could not find expected ':'": "write 'key: value', and put texts in quotes",
    r"'\t' that cannot start": "indent with spaces",
    "that cannot start": "put a text that begins so in quotes",
    "unexpected end of stream": "close the quotes",
    "expected <block end>": "line keys and list entries up, and put texts in quotes",
    "expected ',' or": "put commas between entries, and close the bracket",
    "unknown escape": r"write \\ for \, or use single quotes",
    "another document": "keep one of them, without '---' between",
}


def _kind(value: Any) -> str:
    """What a value out of a YAML file is, in words."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "true or false"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case Mapping():
            return "a section of 'key: value' lines"
        case Sequence() | set():
            return "a list"
    return "a date"


_READ_AS_SOMETHING_ELSE = ("a number", "true or false", "a date")
"""What YAML makes of a text without quotes."""


def _shown(value: Any) -> str:
    """A value as a message repeats it."""
    match value:
        case None | "":
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return repr(value)[:60]
        case Mapping():
            return "a section" if value else "an empty section"
        case Sequence() | set():
            return f"a list of {len(value)}" if value else "an empty list"
    return str(value)[:60]


def _refusal(problem: str, where: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


class _StrictLoader(yaml.SafeLoader):
    """Plain YAML only: no aliases (bombs), no tags, no key twice, no half or control characters."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refusal("YAML anchors and aliases are not allowed; write the text out", event)
        if getattr(event, "tag", None):
            raise _refusal(f"the YAML tag {event.tag!r} is not allowed; remove it", event)
        return super().compose_node(parent, index)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        if node.tag not in self.yaml_constructors:  # "<<" and "=", which resolve to tags
            raise _refusal(f"{node.value!r} has a meaning of its own in YAML; put it in quotes", node)
        try:
            return super().construct_object(node, deep=deep)
        except ValueError:  # 2020-13-45, or a number of thousands of digits
            raise _refusal(
                f"{node.value[:60]!r} looks like a date or number but is none; put it in quotes", node
            ) from None

    def construct_scalar(self, node: Any) -> Any:
        halves = super().construct_scalar(node)
        # JSON writes one character as two halves ("\ud83d\ude00"), which YAML leaves apart
        text = halves.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        if unwanted := _UNWANTED.search(text):
            code = ord(unwanted.group())
            if 0xD800 <= code < 0xE000:
                raise _refusal(f"half a character (\\u{code:04x}); write the whole character, or remove it", node)
            raise _refusal(f"the character U+{code:04X} is not allowed; remove it", node)
        return text

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                shown = f" {key_node.value[:60]!r}" if isinstance(key_node, yaml.ScalarNode) else ""
                raise _refusal(f"the key{shown} is read as {_kind(key)}; put it in quotes", key_node)
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
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    loaded = _parsed(path, text)
    if loaded is None:
        raise UserError(f"{path}: the file is empty")
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: found {_kind(loaded)} at the top; write 'key: value' lines")
    return loaded


def _parsed(path: Path, text: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        problem, mark = str(error.problem), error.problem_mark
        hint = next((f"; {hint}" for part, hint in _YAML_HINTS.items() if part in problem), "")
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: {problem}{hint}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = ord(error.character) if isinstance(error.character, str) else error.character
        raise UserError(f"{path}:{line}: the character U+{code:04X} is not allowed; remove it") from None
    except (ValueError, OverflowError):
        raise UserError(f"{path}: an escape code in it stands for no character; write the character itself") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None


# ---------------------------------------------------------------- validation errors in words

_Schema = dict[str, Any]
PATTERNS = {
    r"^[a-z][a-z0-9-]*$": "lower-case letters, digits and hyphens, a letter first, no spaces or line breaks",
    r"^[A-Za-z0-9][A-Za-z0-9._-]*$": "letters, digits and . _ -, a letter or digit first, no spaces or line breaks",
    r"^[A-Za-z0-9._-]+$": "letters, digits and . _ -, no spaces or line breaks",
    r"^https?://": "an address that begins with http:// or https://",
}
"""What the patterns of the models' texts ask for."""


def validation_lines(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem as `field: what was found; what to do`."""
    schema = model.model_json_schema()
    problems: dict[tuple[str, ...], str] = {}
    for one in error.errors():
        field = _field_at(schema, one["loc"])
        problems.setdefault(field.path, _problem(field, one))  # each kind that a value may be of has its own error
    # What is wrong inside is said there; pydantic also finds a list without it too short, or no text.
    around = {path[:at] for path in problems for at in range(len(path))}
    return [
        f"{'.'.join(path)}: {line}" if path else line
        for path, text in problems.items()
        if path not in around
        for line in text.splitlines()
    ]


class _Field(NamedTuple):
    """What a model says about the place of an error, as JSON schemas."""

    path: tuple[str, ...]
    around: list[_Schema]
    kinds: list[_Schema]
    """More than one where the value may be of several."""
    is_tried: bool
    """The error is about one of several kinds."""


def _field_at(schema: _Schema, loc: Sequence[int | str]) -> _Field:
    """Where `loc` points. It names the kind that pydantic tried of several, and has "[key]" for the key itself."""
    field = _Field((), [], [schema], False)
    for part in loc:
        if part == "[key]":
            field = field._replace(kinds=[_key_of(one) for one in field.around])
        elif len(field.kinds) > 1 and not field.is_tried:
            field = field._replace(is_tried=True)
        else:
            kinds = [kind for one in field.kinds for kind in _kinds(schema, _inside(one, part))]
            field = _Field((*field.path, str(part)), field.kinds, kinds, False)
    return field


def _kinds(schema: _Schema, node: _Schema) -> list[_Schema]:
    if "$ref" in node:
        return _kinds(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return [kind for one in node["anyOf"] if one != {"type": "null"} for kind in _kinds(schema, one)]
    return [node] if node else []


def _inside(node: _Schema, part: int | str) -> _Schema:
    if isinstance(part, int):
        several: list[_Schema] = node.get("prefixItems", [])
        return several[part] if part < len(several) else node.get("items", {})
    others = next(iter(node.get("patternProperties", {}).values()), node.get("additionalProperties"))
    inside: _Schema = node.get("properties", {}).get(part, others)
    return inside if isinstance(inside, dict) else {}


def _key_of(node: _Schema) -> _Schema:
    keys: _Schema = node.get("propertyNames", {"type": "string"})
    return keys


def _problem(field: _Field, error: Any) -> str:
    found, wanted = _shown(error["input"]), " or ".join(map(_wanted, field.kinds))
    match error["type"]:
        case "extra_forbidden":
            known = [key for one in field.around for key in one.get("properties", ())]
            return f"unknown key{did_you_mean(field.path[-1], known)}"
        case "missing":
            return "missing; add it"
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_pattern_mismatch":
            pattern = error["ctx"]["pattern"]
            return f"found {found}; use {PATTERNS.get(pattern, f'text like {pattern}')}"
        case "string_unicode":
            return "found half a character; write the whole character, or remove it"
        case "string_type" if len(field.kinds) == 1 and _kind(error["input"]) in _READ_AS_SOMETHING_ELSE:
            return f"found {found}; expected {wanted} (put it in quotes)"
        case "finite_number":
            return f"found {found}; expected {wanted.replace('a number', 'a finite number')}"
    return f"found {found}; expected {wanted or error['msg']}"


def _wanted(node: _Schema) -> str:
    if "enum" in node or "const" in node:
        return f"one of {', '.join(node['enum'])}" if "enum" in node else str(node["const"])
    match node.get("type"):
        case "string":
            return f"text of at most {node['maxLength']} characters" if "maxLength" in node else "text"
        case "boolean":
            return "true or false"
        case "integer":
            return f"a whole number{_range(node)}"
        case "number":
            return f"a number{_range(node)}"
        case "array":
            return f"a list{_length(node.get('minItems', 0), node.get('maxItems'))}"
        case "object":
            return f"a section of 'key: value' lines{_length(node.get('minProperties', 0), node.get('maxProperties'))}"
    return ""


def _range(node: _Schema) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    bounds = {"above {:g}": above, "of {:g} or more": low, "below {:g}": below, "at most {:g}": high}
    said = [text.format(bound) for text, bound in bounds.items() if bound is not None]
    several = [f"a multiple of {node['multipleOf']:g}"] if "multipleOf" in node else []
    return "".join(f" {text}" for text in [" and ".join(said), *(f"and {one}" for one in several)] if text)


def _length(least: int, most: int | None) -> str:
    if most is None:
        return f" with {least} or more entries" if least > 1 else " with at least one entry" if least else ""
    return f" with {least} entries" if least == most else f" with {least} to {most} entries"


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

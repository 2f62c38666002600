"""YAML files that people write: read strictly, and what is wrong in them said in words, with the line or the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import regex
import yaml
from pydantic import BaseModel, ValidationError

from cpt_ray.errors import UserError, did_you_mean

MAX_FILE_BYTES = 1_000_000
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


def shown_in_yaml(value: Any) -> str:
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


class StrictLoader(yaml.SafeLoader):
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


# copies: what another library changes in PyYAML's own loader does not change how run files are read
_RESOLVERS = yaml.SafeLoader.yaml_implicit_resolvers
StrictLoader.yaml_implicit_resolvers = {first: list(known) for first, known in _RESOLVERS.items()}
StrictLoader.yaml_constructors = dict(yaml.SafeLoader.yaml_constructors)


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
        return yaml.load(text, Loader=StrictLoader)
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
}
"""What the patterns of the models' texts ask for."""


def validation_lines(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Each problem as `field: what was found; what to do`."""
    schema = model.model_json_schema()
    problems: dict[tuple[str, ...], str] = {}
    for problem in error.errors():
        field = _field_at(schema, problem["loc"])
        problems.setdefault(field.path, _problem(field, problem))  # each kind that a value may be of has its own error
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
            field = field._replace(kinds=[_key_of(node) for node in field.around])
        elif len(field.kinds) > 1 and not field.is_tried:
            field = field._replace(is_tried=True)
        else:
            kinds = [kind for node in field.kinds for kind in _kinds(schema, _inside(node, part))]
            field = _Field((*field.path, str(part)), field.kinds, kinds, False)
    return field


def _kinds(schema: _Schema, node: _Schema) -> list[_Schema]:
    if "$ref" in node:
        return _kinds(schema, schema["$defs"][node["$ref"].rpartition("/")[2]])
    if "anyOf" in node:
        return [kind for inner in node["anyOf"] if inner != {"type": "null"} for kind in _kinds(schema, inner)]
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
    shown, wanted = shown_in_yaml(error["input"]), " or ".join(map(_wanted, field.kinds))
    match error["type"]:
        case "extra_forbidden":
            known = [key for node in field.around for key in node.get("properties", ())]
            return f"unknown key{did_you_mean(field.path[-1], known)}"
        case "missing":
            return "missing; add it"
        case "value_error":
            return str(error["ctx"]["error"])
        case "string_pattern_mismatch":
            pattern = error["ctx"]["pattern"]
            return f"found {shown}; use {PATTERNS.get(pattern, f'text like {pattern}')}"
        case "string_unicode":
            return "found half a character; write the whole character, or remove it"
        case "string_type" if len(field.kinds) == 1 and _kind(error["input"]) in _READ_AS_SOMETHING_ELSE:
            return f"found {shown}; expected {wanted} (put it in quotes)"
        case "finite_number":
            return f"found {shown}; expected {wanted.replace('a number', 'a finite number')}"
    return f"found {shown}; expected {wanted or error['msg']}"


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
    texts = [text.format(bound) for text, bound in bounds.items() if bound is not None]
    several = [f"a multiple of {node['multipleOf']:g}"] if "multipleOf" in node else []
    return "".join(f" {text}" for text in [" and ".join(texts), *(f"and {text}" for text in several)] if text)


def _length(least: int, most: int | None) -> str:
    if most is None:
        return f" with {least} or more entries" if least > 1 else " with at least one entry" if least else ""
    return f" with {least} entries" if least == most else f" with {least} to {most} entries"

"""What the tables hold: one frozen record per concept, and its parquet schema derived from it.

Ids are content hashes: the same thing asked for twice has the same id, whatever the order or the run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from cpt_ray.errors import UserError
from cpt_ray.tables.store_path import AnyPath, StorePath

CONTROL = "control"
"""In place of a level: the policy's own answer, without a rubric's directive."""


def joined(names: Iterable[str]) -> str:
    """Rubrics' ids, levels' names or directives' ids as one column holds them."""
    return "+".join(names)


def parts_of(names: str) -> tuple[str, ...]:
    """What `joined` has joined."""
    return tuple(names.split("+"))


def content_id(*parts: Any) -> str:
    """20 hex digits (80 bits) of the SHA-256 of the parts' canonical JSON."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One chat message."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What an answer is written to."""

    prompt_id: str
    """Hash of the text."""
    text: str
    split: str
    """"train" or "held_out", decided by the hash of the text alone, or of the topic if there is one."""
    topic: str = ""
    """What it is about, in small letters; prompts of one topic are all trained on or all held out. "" if not given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Directive:
    """A system prompt of 2-3 sentences that stands for (rubric, level)."""

    directive_id: str
    rubric_id: str
    level: str
    text: str
    split: str
    """"train" or "held_out"; held-out ones are seen in evaluation only."""
    source: str
    """"rubric" if a person wrote it there, else the director model's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One answer to be written."""

    unit_id: str
    """Hash of rubric, level, prompt, sample, layout (`chat/layout.py`), writer (model, engine, sampling) and seed; of a
    control answer: of rubric, neutral directive, prompt, layout, policy and seed."""
    prompt_id: str
    prompt: str
    rubric_id: str
    """Joined by "+" where the answer is written to several rubrics."""
    level: str
    """The target: the level the answer is asked to have, one per rubric joined by "+"; "control" for the policy's own
    answer."""
    score: float | None
    """The target level's anchor, 0-100; None where there is not exactly one."""
    sample: int
    """Which of the samples for the same (prompt, rubric, level), from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A written answer."""

    unit_id: str
    prompt_id: str
    prompt: str
    rubric_id: str
    level: str
    sample: int
    text: str
    num_tokens: int
    """Tokens of the answer."""
    is_cut: bool
    """It ran into max_tokens and lost its unfinished sentence: it has no end mark and is at least this long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CriterionGrade:
    """One criterion's verdict."""

    criterion: str
    measured: bool
    """True if a registered measure gave it, False if the judge did."""
    score: float | None
    """0-100, or None if ungraded."""
    reason: str
    """Why it is ungraded; if it is graded: the judge's rationale, or ""."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """The verdict on one answer."""

    unit_id: str
    rubric_id: str
    """The one rubric of this verdict; an answer written to several has a grade for each."""
    score: float | None
    """Weighted over the criteria, 0-100; None if any criterion is ungraded."""
    judged: float | None
    """The same over the judged criteria alone; None if there are none or one is ungraded."""
    measured: float | None
    """The same over the measured criteria alone."""
    reason: str
    """Why `score` is None; "" if it is not."""
    judge: str
    """The judge model's name."""
    criteria: list[CriterionGrade]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One training row, in TRL's conversational preference format plus where it comes from."""

    pair_id: str
    twin_id: str
    """The pair with chosen and rejected swapped, under the rejected answer's directive."""
    cell_id: str
    """The grid that the pair is of: hash of rubric, prompt and the grid's number among that prompt's grids."""
    prompt_id: str
    rubric_id: str
    """Joined by "+" where the directive combines rubrics; the levels below then as well."""
    level: str
    """Level of the directive and of the chosen answer; "control" where no rubric's directive is given."""
    rejected_level: str
    directive_id: str
    """Joined by "+" like the rubrics; "" in control rows."""
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    chosen_score: float
    rejected_score: float
    chosen_is_cut: bool
    """The answer is the beginning of a longer one: what is trained on has no end mark."""
    rejected_is_cut: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceLogProb:
    """What the untuned policy gives to one (directive, answer); the shard's name says which policy."""

    sequence_id: str
    """Hash of the token ids of prompt and answer."""
    log_prob: float
    """Of the whole answer, nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """Anything dropped, and why."""

    stage: str
    subject_id: str
    """unit_id, directive_id or pair_id."""
    rubric_id: str
    level: str
    reason: str
    """A short fixed phrase, counted in the ledger."""
    detail: str

    @classmethod
    def of(cls, stage: str, row: Any, subject_id: str, reason: str, detail: str) -> Self:
        """`row`: anything with a rubric_id and a level."""
        where = {"rubric_id": row.rubric_id, "level": row.level}
        return cls(stage=stage, subject_id=subject_id, **where, reason=reason, detail=detail)

    @classmethod
    def of_row(cls, stage: str, subject_id: str, reason: str, detail: str) -> Self:
        """Of a row that was read, which belongs to no rubric."""
        return cls(stage=stage, subject_id=subject_id, rubric_id="", level="", reason=reason, detail=detail)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One evaluation answer and its grade; until then, what is to be answered."""

    trial_id: str
    model: str = ""
    """"base" or "tuned"."""
    prompt_id: str
    prompt: str
    rubric_id: str
    level: str
    """The requested level."""
    target: float
    """Its anchor, 0-100."""
    directive: str | None
    """None in the rows without a directive."""
    directive_id: str = ""
    """"" in those rows."""
    is_trained: bool = False
    """The directive is one of those that the policy was trained under."""
    text: str = ""
    num_tokens: int = 0
    """Generated tokens, thoughts included."""
    is_cut: bool = False
    """Whether the answer ran into max_tokens; its unfinished last sentence is then removed, if a whole one is left."""
    score: float | None = None
    """Score by the whole rubric, 0-100; None if ungraded."""
    judged: float | None = None
    """Score by the judged criteria alone; None if there are none."""
    measured: float | None = None
    """Score by the measured criteria alone; None if there are none."""
    reason: str = "not answered yet"
    """Why `score` is None; "" if it is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerLogprobs:
    """How likely the tuned policy finds a given answer."""

    answer_id: str
    """Hash of prompt and text."""
    logprobs: list[float]
    """Sum over the answer's tokens, under each of the catalog's directives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerEmbedding:
    """A frozen model's vector of (prompt, answer)."""

    answer_id: str
    vector: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SteeredAnswer:
    """What the tuned policy says under a directive, or under a user's adapter."""

    directive: str | None
    """Or the adapter's name: the column keeps its name, so that tables of earlier versions can be read."""
    prompt_id: str
    prompt: str
    sample: int
    text: str
    """"" if it said nothing."""


Record = TypeVar("Record")

_ARROW: dict[Any, pa.DataType] = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """(type, nullable) of a field's annotation."""
    if isinstance(annotation, types.UnionType):
        inner = next(kind for kind in typing.get_args(annotation) if kind is not type(None))
        return _arrow_type(inner)[0], True
    if typing.get_origin(annotation) is list:
        return pa.list_(_arrow_type(typing.get_args(annotation)[0])[0]), False
    if dataclasses.is_dataclass(annotation):
        return pa.struct(list(schema_of(typing.cast(type, annotation)))), False
    return _ARROW[annotation], False


def schema_of(record: type[Any]) -> pa.Schema:
    """The parquet schema of a record class."""
    hints = typing.get_type_hints(record)
    fields = []
    for field in dataclasses.fields(record):
        kind, nullable = _arrow_type(hints[field.name])
        fields.append(pa.field(field.name, kind, nullable=nullable))
    return pa.schema(fields)


def to_table(rows: Iterable[Any], record: type[Any]) -> pa.Table:
    """Records of one class as an arrow table of that class's schema."""
    return pa.Table.from_pylist([dataclasses.asdict(row) for row in rows], schema=schema_of(record))


@functools.cache
def _adapter(record: type[Any]) -> TypeAdapter[Any]:
    """Makes records of dicts; made once per class, for that takes as long as reading a shard."""
    return TypeAdapter(record)


def read_records(path: AnyPath, record: type[Record]) -> list[Record]:
    """All rows of one parquet file; UserError if its schema is another one's."""
    table = pq.read_table(pa.BufferReader(path.read_bytes()) if isinstance(path, StorePath) else path)
    if table.schema.names != schema_of(record).names:
        raise UserError(
            f"{path}: columns {', '.join(table.schema.names)} are not those of {record.__name__} "
            f"({', '.join(schema_of(record).names)}); delete the file, it is then made again"
        )
    adapter = _adapter(typing.cast(Any, record))
    return [adapter.validate_python(row) for row in table.to_pylist()]

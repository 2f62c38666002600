"""Prompts: read from a file or a data set, split into train and held-out by the hash of their text or topic."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_ray.config import PreferencesConfig, PromptsConfig
from cpt_ray.errors import UserError, did_you_mean, first_line, shown
from cpt_ray.rubrics.measures import folded, terms_of
from cpt_ray.tables.by_hash import fraction
from cpt_ray.tables.records import Prompt, Reject, content_id
from cpt_ray.texts import is_blank, lone_surrogate, refuse_messages_in, unique_names

MAX_FIELD_CHARACTERS = 100_000_000
"""Of a CSV file's field; Python's own limit, 131,072, is less than a long conversation."""


class Prompts(list[Prompt]):
    """Distinct prompts in file order and, beside them, the rows that repeat one."""

    def __init__(self) -> None:
        super().__init__()
        self.rejects: list[Reject] = []


def read_prompts(config: PromptsConfig) -> Prompts:
    """The prompts of a file or data set; UserError that names file, line and column.

    Whether a prompt is held out depends on its text alone, or on its topic alone if `config.topic` names a column of
    topics; so it never changes side when others are added.
    """
    prompts, rows = Prompts(), dict[str, int]()
    for number, row in enumerate(read_rows(config), start=1):
        if config.limit is not None and len(prompts) >= config.limit:
            break
        text = _cell(config, row, number, config.column)
        topic = _topic(_cell(config, row, number, config.topic)) if config.topic is not None else ""
        prompt_id = content_id(text)
        if prompt_id in rows:
            detail = f"row {number}: the same text as row {rows[prompt_id]}"
            prompts.rejects.append(Reject.of_row("plan", prompt_id, "repeats another", detail))
        else:
            rows[prompt_id] = number
            place = fraction(content_id(topic) if config.topic is not None else prompt_id)
            split = "held_out" if place < config.held_out else "train"
            prompts.append(Prompt(prompt_id=prompt_id, text=text, split=split, topic=topic))
    _check_both_sides(config, prompts)
    return prompts


def _check_both_sides(config: PromptsConfig, prompts: Prompts) -> None:
    topics = f" of {len({prompt.topic for prompt in prompts})} topics" if config.topic is not None else ""
    for split in ("train", "held_out"):
        if not any(prompt.split == split for prompt in prompts):
            raise UserError(
                f"{config.source}: {len(prompts)} distinct prompts{topics}, none of them {split}; "
                f"give more {'topics' if topics else 'prompts'} or change prompts.held_out"
            )


def _topic(text: str) -> str:
    """The same for topics that differ only in case, width, normal form or spaces."""
    return " ".join(folded(text).split())


def _cell(config: PromptsConfig, row: dict[str, Any], number: int, column: str) -> str:
    where = f"{config.source}: row {number}:"
    if column not in row:
        raise UserError(f"{where} no column {column!r}{did_you_mean(column, [str(key) for key in row])}")
    return _text_of(row[column], f"{where} column {column!r}").strip()


def _text_of(value: Any, where: str) -> str:
    if not isinstance(value, str) or is_blank(value):
        raise UserError(f"{where} holds {shown(value)}; expected a non-empty text")
    if escape := lone_surrogate(value):
        raise UserError(f"{where}: half a character ({escape}); correct the text")
    refuse_messages_in(value, where)
    return value


def read_rows(config: PromptsConfig | PreferencesConfig) -> Iterable[dict[str, Any]]:
    """The rows of `source`; UserError if it cannot be read."""
    path = Path(config.source)
    readers = {".jsonl": read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
    suffix = path.suffix.lower()
    if suffix in readers:
        if not path.is_file():
            raise UserError(f"{path}: no such file (source)")
        return readers[suffix](path)
    if path.exists():
        raise UserError(f"{path}: rows are read from {', '.join(readers)} files or a data set's name")
    return _read_hub(config)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; UserError that names the line."""
    try:
        with path.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line, object_pairs_hook=unique_names)
                except UserError as error:
                    raise UserError(f"{path}:{number}: {error}") from None
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", str(error)[:100])
                    raise UserError(f"{path}:{number}: not JSON ({why})") from None
                if not isinstance(row, dict):
                    shown = repr(line.strip()[:40])
                    raise UserError(f'{path}:{number}: found {shown}; expected an object, like {{"column": "text"}}')
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: texts that are not UTF-8
        raise UserError(f"{path}: cannot be read as a parquet file ({first_line(error)})") from None
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows with exactly the header's fields; UserError with the line of one that has others, or an open quote."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows: list[dict[str, Any]] = []
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.reader(lines, strict=True)
            header = next(reader, [])
            if twice := [name for name in header if header.count(name) > 1]:
                raise UserError(f"{path}:1: two columns are called {twice[0]!r}; rename one")
            if len(header) == 1 and (other := next((mark for mark in ";\t|" if mark in header[0]), None)):
                raise UserError(f"{path}:1: fields seem to be divided by {other!r}; divide them by commas")
            line = reader.line_num + 1
            for fields in reader:
                if fields and len(fields) != len(header):
                    raise UserError(
                        f"{path}:{line}: {len(fields)} fields, but the header has {len(header)}; put a text with a "
                        "comma or a quote in double quotes, and write each quote inside twice"
                    )
                rows += [dict(zip(header, fields, strict=True))] if fields else []
                line = reader.line_num + 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(
            f"{path}:{line}: a quote is not closed, or not in its place ({error}); put a text with quotes in double "
            "quotes, and write each quote inside twice"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return rows


def _read_hub(config: PromptsConfig | PreferencesConfig) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(config.source, split=config.data_split)  # type: ignore[no-any-return]
    except Exception as error:  # every failure of the hub client means the same to the user
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{config.source}: neither a file here nor a data set that can be loaded ({type(error).__name__}: {text})"
        ) from error


def check_leakage(prompts: Sequence[Prompt]) -> None:
    """UserError if a held-out prompt is a train prompt but for case, width, normal form, spaces and punctuation."""
    train = {_plain(prompt.text): prompt.text for prompt in prompts if prompt.split == "train"}
    for prompt in prompts:
        if prompt.split == "held_out" and (same := train.get(_plain(prompt.text))):
            raise UserError(
                f"prompts: {prompt.text[:80]!r} is held out, but {same[:80]!r} is trained on and has the same words; "
                "remove one of them"
            )


def _plain(text: str) -> str:
    return " ".join(terms_of(text))

"""Prompts: read from a file or a data set, split into train and held-out by the hash of their text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_ray.config import PreferencesConfig, PromptsConfig
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.records import Prompt, content_id


def read_prompts(config: PromptsConfig) -> list[Prompt]:
    """Distinct prompts in file order; UserError that names file, line and column.

    Whether a prompt is held out depends on its text alone, so it never changes side when others are added.
    """
    rows = read_rows(config)
    prompts: dict[str, Prompt] = {}
    for number, row in enumerate(rows, start=1):
        if config.limit is not None and len(prompts) >= config.limit:
            break
        if config.column not in row:
            hint = did_you_mean(config.column, [str(key) for key in row])
            raise UserError(f"{config.source}: row {number}: no column {config.column!r}{hint}")
        text = row[config.column]
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{config.source}: row {number}: column {config.column!r} holds {text!r:.40}; expected a non-empty text"
            )
        prompt_id = content_id(text.strip())
        held_out = int(prompt_id, 16) / 16 ** len(prompt_id) < config.held_out
        prompts[prompt_id] = Prompt(prompt_id=prompt_id, text=text.strip(), split="held_out" if held_out else "train")
    found = list(prompts.values())
    for split in ("train", "held_out"):
        if not any(one.split == split for one in found):
            raise UserError(
                f"{config.source}: {len(found)} distinct prompts, none of them {split}; "
                "give more prompts or change prompts.held_out"
            )
    return found


def read_rows(config: PromptsConfig | PreferencesConfig) -> Iterable[dict[str, Any]]:
    """The rows of `source`; UserError if it cannot be read."""
    path = Path(config.source)
    readers = {".jsonl": read_jsonl, ".parquet": _read_parquet, ".csv": _read_csv}
    if path.suffix in readers:
        if not path.is_file():
            raise UserError(f"{path}: no such file (source)")
        return readers[path.suffix](path)
    if path.exists():
        raise UserError(f"{path}: rows are read from {', '.join(readers)} files or a data set's name")
    return _read_hub(config)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; UserError that names the line."""
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
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
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a parquet file ({str(error).splitlines()[0]})") from None
    return rows


def _read_csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return [dict(row) for row in csv.DictReader(lines)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 CSV ({error})") from None


def _read_hub(config: PromptsConfig | PreferencesConfig) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(config.source, split=config.data_split)  # type: ignore[no-any-return]
    except Exception as error:  # every failure of the hub client means the same to the user
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{config.source}: neither a file here nor a data set that can be loaded ({type(error).__name__}: {text})"
        ) from error

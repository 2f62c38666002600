"""The run directory: the one module that knows its paths, and how a stage completes a shard.

A table is a folder of shard files. A stage maps an input shard to an output shard (`shard.py` has their names); the
file is written under a temporary name and renamed, or put into an object store whole, so a file that is there is
complete, and is not made again. Two workers that make the same shard (one was thought dead) write the same name, since
it is a hash of all inputs: the first one stays, since others may have read it. Its counts and rejects are in the file
itself, so that nothing is counted twice, and no reject is that of a row which is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow.parquet as pq
import yaml

from cpt_ray.errors import UserError, first_line
from cpt_ray.tables.address import StoreError
from cpt_ray.tables.files import replacing
from cpt_ray.tables.records import (
    AnswerEmbedding,
    AnswerLogprobs,
    Directive,
    Generation,
    Grade,
    Pair,
    ReferenceLogProb,
    Reject,
    SteeredAnswer,
    Trial,
    Unit,
    read_records,
    to_table,
)
from cpt_ray.tables.run_lock import LOCK_FILE, is_held, run_lock
from cpt_ray.tables.shard import rejects_of
from cpt_ray.tables.store_path import AnyPath, StorePath, cloud_environment, path_of, remove_tree

TABLES: dict[str, type[Any]] = {
    "units": Unit,
    "directives": Directive,
    "generations": Generation,
    "grades": Grade,
    "judge_checks": Grade,
    "repeats": Reject,
    "pairs": Pair,
    "rejects": Reject,
    "reference": ReferenceLogProb,
    "evaluation_answers": Trial,
    "evaluation": Trial,
    "steering_logprobs": AnswerLogprobs,
    "steering_embeddings": AnswerEmbedding,
    "steering_answers": SteeredAnswer,
}
FORMAT = 2
"""In run.yaml; goes up when answers have other ids or columns than before."""
RUN_INFO_FILE = "run.yaml"
"""The resolved run file, and hashes of what it names."""
LEDGER_FILE = "ledger.json"
"""Per stage: rows, rejects, tokens, seconds, cost."""
CARD_FILE, JUDGES_FILE = "README.md", "judges.json"
"""The pairs' dataset card, and how the judges agree."""
SPREAD_FILE = "spread.json"
"""Where the writer's own answers divide into levels: a key, and the values by rubric, under "rubrics"."""
MODEL_INFO_FILE = "model/cpt_ray.json"
"""What the model was trained from. Written last, so that a model with this file is complete."""
TRAIN_PROGRESS_FILE = ".train_progress.json"
"""How far the training is, for the process that waits for it."""
CATALOG_FILE = "catalog.json"
"""What a client may ask the server for; also in an adapter's folder."""
QUESTIONS_FILE = "steering/questions.json"
"""Pairs of answers that are worth asking a user about."""
KEYS_FILE = "keys.json"
"""The API keys' hashes, readable by their owner only."""
SPENT_FILE = "keys_spent.json"
"""Tokens that each key with a budget has used."""
RESULTS_FILE, STEERING_RESULTS_FILE = "report/results.json", "report/steering.json"
"""Of `cpt evaluate` and of `cpt steer evaluate`."""
REPORT_FILE = "report/report.html"
"""Shows both."""
TRACES = {LOCK_FILE, RUN_INFO_FILE, "attempts", "units", LEDGER_FILE}
"""What a command leaves in the run directory before it has any result: `units` are planned, not made."""
READERS = 16
"""Shards of an object store that are read at a time."""
Record = TypeVar("Record")
_COUNTS, _REJECTS = b"cpt_ray.counts", b"cpt_ray.rejects"


def _holds_files(path: AnyPath) -> bool:
    """Whether there is a file with something in it; a log may be empty."""
    if isinstance(path, StorePath):
        return True  # an object that is empty is never put
    files = path.rglob("*") if path.is_dir() else [path]
    return any(file.is_file() and file.stat().st_size > 0 for file in files)


def _parsed(path: AnyPath, parse: Callable[[str], Any]) -> Any:
    """A small file's content, or None if it is not there; UserError if it is broken."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except StoreError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); remove it, or mend it") from None


@dataclasses.dataclass(frozen=True)
class RunDir:
    """`runs/<name>`; cheap to make, picklable, the same on every node that sees the folder."""

    path: AnyPath

    @classmethod
    def at(cls, place: str) -> Self:
        """Of a run file's `run_dir`: a path of this machine, or an address."""
        return cls(path_of(place))

    @property
    def environment(self) -> dict[str, str]:
        """Variables that every process needs to reach it: credentials, for an object store."""
        return cloud_environment(self.path)

    @property
    def model(self) -> AnyPath:
        """Merged weights and tokenizer, Hugging Face layout."""
        return self.path / "model"

    @property
    def adapter(self) -> AnyPath:
        """The LoRA alone."""
        return self.path / "adapter"

    @property
    def checkpoints(self) -> AnyPath:
        """Ray Train's storage."""
        return self.path / "checkpoints"

    @property
    def attempts(self) -> AnyPath:
        """Marks of what was begun and not finished."""
        return self.path / "attempts"

    @property
    def train_rows(self) -> AnyPath:
        """What a training reads: tokenized pairs with the reference model's log-probabilities."""
        return self.path / "train_rows"

    @property
    def tensorboard(self) -> AnyPath:
        """TensorBoard's files, by the key of the training."""
        return self.path / "tensorboard"

    @property
    def steering(self) -> AnyPath:
        """What `cpt steer` trained."""
        return self.path / "steering"

    @property
    def preferences(self) -> AnyPath:
        """Choices that the server's clients made, by the hash of their key."""
        return self.path / "preferences"

    @property
    def access(self) -> AnyPath:
        """Who asked what and when, a file per server process."""
        return self.path / "access"

    @property
    def ray_log(self) -> AnyPath:
        """What Ray and vLLM printed."""
        return self.path / "ray.log"

    def temporary_folder(self, folder: AnyPath) -> AnyPath:
        """Where a folder of the run is written before it takes the place of `folder`."""
        return self.path / f".{folder.name}.tmp"

    def table(self, table: str) -> AnyPath:
        """The folder of a table's shards."""
        return self.path / table

    def shard(self, table: str, name: str) -> AnyPath:
        """Path of one shard of a table."""
        return self.table(table) / f"{name}.parquet"

    def has(self, table: str, name: str) -> bool:
        """Whether the shard is complete."""
        return self.shard(table, name).exists()

    def names(self, table: str, prefix: str = "") -> set[str]:
        """The complete shards (of one prefix), by one look at the folder."""
        return {path.stem for path in self.table(table).glob(f"{prefix}*.parquet")}

    def write(
        self,
        table: str,
        name: str,
        rows: Iterable[Any],
        counts: Mapping[str, float] | None = None,
        rejects: tuple[str, Sequence[Reject]] | None = None,
    ) -> None:
        """Completes one shard; one that is there by then stays, but a shard of rejects is replaced.

        Args:
            counts: rows in, tokens, seconds; they stay with it in the file's metadata.
            rejects: the stage, and what it dropped; they stay there too, and are shown (`show_rejects`).
        """
        metadata = {_COUNTS: json.dumps({**(counts or {})})}
        if rejects:
            metadata[_REJECTS] = json.dumps([dataclasses.asdict(reject) for reject in rejects[1]])
        made = to_table(rows, TABLES[table]).replace_schema_metadata(metadata)
        # rejects are a function of their shard: older ones, of a shard that is no more, must not stay
        path = self.shard(table, name)
        with replacing(path, keep=table != "rejects") as file, pq.ParquetWriter(file, made.schema) as writer:
            if made.num_rows:  # `datasets` cannot read a row group without rows
                writer.write_table(made)
        if rejects:
            self.show_rejects(rejects[0], table, name)

    def show_rejects(self, stage: str, table: str, name: str) -> None:
        """Writes the rejects that a shard holds, its own or those of who was first, as the shard of rejects beside it.

        It has to be done again where a process died between the two files.
        """
        rows = json.loads(self._metadata(table, name).get(_REJECTS, b"[]"))
        self.write("rejects", rejects_of(stage, name), [Reject(**row) for row in rows])

    def check_format(self) -> None:
        """UserError if an earlier version of this program has written answers here: none of them would be used."""
        made = self.read_yaml(RUN_INFO_FILE)
        if isinstance(made, dict) and made.get("format") != FORMAT and self.names("generations"):
            raise UserError(
                f"{self.path}: its answers were written by an earlier version, in another format; give another "
                "run_dir, or remove this one"
            )

    def counts(self, table: str, name: str) -> dict[str, float]:
        """The counts that the shard was written with."""
        loaded: dict[str, float] = json.loads(self._metadata(table, name).get(_COUNTS, b"{}"))
        return loaded

    def _metadata(self, table: str, name: str) -> dict[bytes, bytes]:
        path = self.shard(table, name)
        return pq.read_schema(path.open_end() if isinstance(path, StorePath) else path).metadata or {}

    def read(self, table: str, names: Sequence[str], record: type[Record]) -> list[Record]:
        """The rows of the named shards, in order; `record` is the table's class."""
        assert TABLES[table] is record
        paths = [self.shard(table, name) for name in names]
        if not isinstance(self.path, StorePath):
            return [row for path in paths for row in read_records(path, record)]
        with ThreadPoolExecutor(READERS) as readers:  # each waits for the store most of the time
            return [row for rows in readers.map(read_records, paths, itertools.repeat(record)) for row in rows]

    def prune(self, table: str, keep: Iterable[str], prefix: str = "") -> None:
        """Removes the shards (of one prefix) of a cheap table that the present settings no longer name."""
        wanted = set(keep)
        for path in self.table(table).glob(f"{prefix}*.parquet"):
            if path.stem not in wanted:
                path.unlink()

    # ------------------------------------------------------------ small files

    def write_text(self, relative: str, text: str) -> AnyPath:
        """Writes one small file atomically and returns its path."""
        path = self.path / relative
        with replacing(path) as file:
            file.write(text.encode())
        return path

    def write_json(self, relative: str, data: Any) -> AnyPath:
        """Writes `data` as JSON."""
        return self.write_text(relative, json.dumps(data, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, relative: str) -> Any:
        """The JSON file's content, or None if it is not there."""
        return _parsed(self.path / relative, json.loads)

    def write_run(self, resolved: dict[str, Any]) -> None:
        """run.yaml: the resolved config and the content hashes of what it names."""
        text = yaml.safe_dump({**resolved, "format": FORMAT}, sort_keys=False, allow_unicode=True)
        self.write_text(RUN_INFO_FILE, text)

    def read_yaml(self, relative: str) -> Any:
        """The YAML file's content, or None if it is not there."""
        return _parsed(self.path / relative, yaml.safe_load)

    def add_to_ledger(self, stage: str, entry: dict[str, Any]) -> None:
        """Replaces one stage's entry in ledger.json."""
        ledger = self.read_json(LEDGER_FILE) or {}
        ledger[stage] = entry
        self.write_json(LEDGER_FILE, ledger)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the run directory for this process; UserError if another one has it or it cannot be written.

        What ends in a UserError before there is a result leaves nothing behind that was not there before.
        """
        missing: list[Path] = []
        if isinstance(self.path, Path):
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with run_lock(self.path) as hold:
            names = {path.name for path in self.path.iterdir()}
            before = names
            if isinstance(self.path, Path):  # a store has no temporary names, and removes its lease itself
                before = names - {LOCK_FILE} if hold.is_new else names
                for left_behind in itertools.chain(self.path.glob("*/.*.tmp"), self.path.glob("steering/*/.*.tmp")):
                    left_behind.unlink(missing_ok=True)
            try:
                yield
            except UserError:
                with suppress(OSError):  # what led here is said, not this
                    if hold.is_ours():  # else they may be those of a process that has taken over
                        self._remove_traces(before, missing)
                raise

    def _remove_traces(self, before: Set[str], missing: Sequence[Path]) -> None:
        """Removes the run's files that hold no result if there is nothing else beside what was there `before`.

        Args:
            missing: folders that were not there, the deepest first.
        """
        new = [path for path in self.path.iterdir() if path.name not in before]
        has_result = any(_holds_files(path) for path in new if path.name not in TRACES)
        if has_result or set(self.read_json(LEDGER_FILE) or ()) - {"plan"}:
            return
        for path in new:
            remove_tree(path) if path.is_dir() else path.unlink()
        for folder in missing:
            folder.rmdir()

    @property
    def busy(self) -> bool:
        """Whether some process (of this machine, unless the run is in a store) holds the run."""
        return is_held(self.path)

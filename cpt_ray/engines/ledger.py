"""What a stage's work took: counted with each shard, summed into the ledger, shown as metrics while it runs."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from cpt_ray.config import ModelConfig, PriceConfig
from cpt_ray.engines.engine import Completion
from cpt_ray.engines.losses import REJECTED
from cpt_ray.engines.step import Counts
from cpt_ray.tables.rundir import RunDir

NOT_IN_LEDGER = "apart: "
"""Prefix of a shard's counts that the ledger leaves out (kept in the shard's metadata)."""
READERS = 16
"""Shards' counts that are read at a time."""
LIVE_SECONDS = 5.0
"""Between two writes of the ledger while a pool is at work."""


class Tally:
    """What one shard's work took: kept with the shard, summed into the ledger."""

    _lock = threading.Lock()
    _open: ClassVar[WeakKeyDictionary[Tally, int]] = WeakKeyDictionary()
    """The open tallies, each with the id of the thread that opened it."""
    _shared_at = 0.0

    def __init__(self, rows_in: int):
        self.counts: Counter[str] = Counter({"rows_in": rows_in})
        self.seconds = 0.0
        with Tally._lock:
            Tally._share_time()
            Tally._open[self] = threading.get_ident()

    @classmethod
    def _share_time(cls) -> None:
        """Splits the time since the last call evenly between the shards that this process works on."""
        now = time.monotonic()
        for tally in list(cls._open):
            tally.seconds += (now - cls._shared_at) / len(cls._open)
        cls._shared_at = now

    def add(self, completions: Sequence[Completion]) -> None:
        """Counts the tokens of what came back."""
        for completion in completions:
            self.counts["prompt_tokens"] += completion.num_prompt_tokens
            self.counts["cached_tokens"] += completion.num_cached_tokens
            self.counts["generated_tokens"] += completion.num_tokens
            if completion.had_thoughts:
                self.counts["with_thoughts"] += 1
                self.counts["thought_tokens"] += completion.thought_tokens

    def reject(self, reason: str) -> None:
        """Counts one row that is dropped."""
        self.counts[f"{REJECTED}{reason}"] += 1

    def close(self, rows_out: int) -> Counts:
        """The counts to write with the shard."""
        with Tally._lock:
            Tally._share_time()
            Tally._open.pop(self, None)
        return {**self.counts, "rows_out": rows_out, "engine_seconds": round(self.seconds, 3)}

    @classmethod
    def abandon(cls) -> None:
        """Closes what a failed step of this thread left open.

        The error's traceback may keep such a tally alive, and an open tally is given a share of the time of later
        steps.
        """
        with cls._lock:
            cls._share_time()
            for tally in [tally for tally, thread in cls._open.items() if thread == threading.get_ident()]:
                del cls._open[tally]


class LiveLedger:
    """Counts of the running command: written to ledger.json every few seconds, for `cpt status`, and shown as a speed.

    At its end the stage replaces them by the sum over all its shards, whichever process made them.
    """

    def __init__(self, run: RunDir, models: dict[str, ModelConfig]):
        self._run, self._models = run, models
        self._totals: dict[str, Counter[str]] = {stage: Counter() for stage in models}
        self._start = self._written = time.monotonic()

    def add(self, counts: Mapping[str, Counts]) -> str:
        """Adds the counts of one shard; returns a note on the speed."""
        now = time.monotonic()
        for stage, more in counts.items():
            self._totals[stage].update(more)
        if now - self._written > LIVE_SECONDS:
            self._written = now
            for stage, total in self._totals.items():
                if total:
                    entry = _entry(total, self._models[stage].price)
                    self._run.add_to_ledger(stage, {**entry, "so far": "this command"})
        tokens = sum(total["generated_tokens"] for total in self._totals.values())
        return f"{tokens / (now - self._start):.0f} tokens/s" if tokens else ""


class Meters:
    """The ledger's counts as Prometheus metrics of the Ray cluster, by stage."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter as Meter

        self._rows = Meter("cpt_stage_rows", "Rows that a stage finished", tag_keys=("stage", "outcome"))
        self._tokens = Meter("cpt_stage_tokens", "Tokens of a stage", tag_keys=("stage", "kind"))
        self._seconds = Meter(
            "cpt_stage_engine_seconds", "Seconds in which engines worked on shards", tag_keys=("stage",)
        )

    def add(self, stage: str, counts: Counts) -> None:
        """Adds one shard's counts."""
        for key, value in counts.items():
            if value <= 0:  # which a Prometheus counter refuses
                continue
            if key == "rows_out":
                self._rows.inc(value, {"stage": stage, "outcome": "kept"})
            elif key.startswith(REJECTED):
                self._rows.inc(value, {"stage": stage, "outcome": key})
            elif key.endswith("_tokens"):
                self._tokens.inc(value, {"stage": stage, "kind": key.removesuffix("_tokens")})
            elif key == "engine_seconds":
                self._seconds.inc(value, {"stage": stage})


def ledger_entry(run: RunDir, table: str, names: Iterable[str], price: PriceConfig | None = None) -> dict[str, Any]:
    """The sum over a stage's shards, whichever process made them."""
    return _entry(counts_of(run, table, names), price)


def counts_of(run: RunDir, table: str, names: Iterable[str]) -> Counter[str]:
    """The sum of the counts that shards were written with."""
    total: Counter[str] = Counter()
    # a file each: where a folder is on a network, the wait for one is longer than all work on it
    with ThreadPoolExecutor(READERS) as readers:
        for counts in readers.map(functools.partial(run.counts, table), names):
            total.update(counts)
    return total


def thoughts_note(entry: Mapping[str, Any]) -> str:
    """What a stage's line says of answers that came with thoughts, if there were any."""
    if not entry.get("with_thoughts"):
        return ""
    thought, generated = entry.get("thought_tokens", 0), entry.get("generated_tokens", 0)
    share = f" ({thought / generated:.0%} of the tokens)" if thought and generated else ""
    return f"; {entry['with_thoughts']:.0f} came with thoughts, which were cut{share}"


def _entry(total: Counts, price: PriceConfig | None) -> dict[str, Any]:
    entry: dict[str, Any] = {
        key: value for key, value in total.items() if not key.startswith((REJECTED, NOT_IN_LEDGER))
    }
    entry["rejected"] = {
        key.removeprefix(REJECTED): int(value) for key, value in total.items() if key.startswith(REJECTED)
    }
    if entry.get("generated_tokens") and entry.get("engine_seconds"):
        entry["generated_tokens_per_second"] = round(entry["generated_tokens"] / entry["engine_seconds"], 1)
    if price and price != PriceConfig():
        entry["cost"] = round(cost_of(total, price), 6)
    return entry


def cost_of(total: Counts, price: PriceConfig) -> float:
    """What some tokens and engine seconds cost."""
    prompt, cached, generated, seconds = (
        total.get(key, 0) for key in ("prompt_tokens", "cached_tokens", "generated_tokens", "engine_seconds")
    )
    tokens = (prompt - cached) * price.prompt + cached * price.cached + generated * price.generated
    return tokens / 1e6 + seconds / 3600 * price.engine_hour

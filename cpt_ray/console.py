"""What a person sees: this program's own lines and a progress line per stage; a live bar on a terminal."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_SECONDS = 5.0
"""Least time between two lines where there is no terminal; it grows with the time a stage takes."""

Advance = Callable[[float, str], None]
"""(how much was done since the last call, a note that replaces the last one) -> None."""
_COLUMNS = {
    "rows_in": "in",
    "rows_out": "out",
    "prompt_tokens": "prompt",
    "cached_tokens": "cached",
    "generated_tokens": "generated",
    "engine_seconds": "engine s",
    "generated_tokens_per_second": "tokens/s",
    "cost": "cost",
}
"""What `status_lines` has columns for, and their titles."""


def say(text: str = "") -> None:
    """Prints a line at once; SystemExit if the reader of the output has closed it, as `head` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        sys.stdout = io.StringIO()
        raise SystemExit("stopped: nobody reads the output any more") from None


def status_lines(ledger: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """ledger.json as a table: a line per stage, then its rejects and whatever else is known of it."""
    lines = [f"{'stage':<14}" + "".join(f"{title:>12}" for title in _COLUMNS.values())] if ledger else []
    for stage, entry in ledger.items():
        lines.append(f"{stage:<14}" + "".join(f"{_shown(entry.get(key)):>12}" for key in _COLUMNS))
        rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(entry.get("rejected", {}).items()))
        others = ", ".join(f"{key}: {_shown(entry[key])}" for key in entry if key not in (*_COLUMNS, "rejected"))
        if rejected:
            lines.append(f"  rejected: {rejected}")
        if others:
            lines.append(f"  {others}")
    return lines


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.10g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def progress(stage: str, total: float, unit: str) -> AbstractContextManager[Advance]:
    """Shows how far a stage is: a live bar with ETA on a terminal, else a line every few seconds and at the end."""
    return (_bar if sys.stdout.isatty() else _lines)(stage, total, unit)


@contextmanager
def _bar(stage: str, total: float, unit: str) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console()) as bar:
        task = bar.add_task(stage, total=int(total), note="")
        yield lambda amount, note: bar.update(task, advance=int(amount), note=note)


@contextmanager
def _lines(stage: str, total: float, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done, latest = 0.0, ""
    first: tuple[float, float] | None = None  # (when, how much): what came before was starting up

    def show() -> None:
        now = time.monotonic()
        left = ""
        if first and first[1] < done < total:
            left = f", ETA {(now - first[0]) / (done - first[1]) * (total - done):.0f} s"
        say(f"{stage:<12} {done:.0f}/{total:.0f} {unit}, {now - start:.0f} s{left}{latest and ', ' + latest}")

    def advance(amount: float, note: str) -> None:
        nonlocal done, last, latest, first
        now = time.monotonic()
        done, latest = done + amount, note
        if first is None and amount:
            first = (now, done)
        if now - last >= max(PLAIN_INTERVAL_SECONDS, (now - start) / 20) and done < total:
            last = now
            show()

    yield advance
    show()


def flat(info: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """(name, value) of everything in nested mappings; a name is the keys on the way, joined by " / "."""
    for key, value in info.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key} / ")
        else:
            yield f"{prefix}{key}", (", ".join(map(str, value)) or "none") if isinstance(value, list) else value

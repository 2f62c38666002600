"""What a person sees: this program's own lines and a progress line per stage; a live bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_SECONDS = 5.0

Advance = Callable[[float, str], None]
"""(how much was done since the last call, a note that replaces the last one) -> None."""


def say(text: str = "") -> None:
    """One line of this program's own, at once."""
    print(text, flush=True)


@contextmanager
def progress(stage: str, total: float, unit: str) -> Iterator[Advance]:
    """Shows how far a stage is: a live bar with ETA on a terminal, else a line every few seconds and at the end."""
    shown = _bar if sys.stdout.isatty() else _lines
    with shown(stage, total, unit) as advance:
        yield advance


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

    def show() -> None:
        seconds = time.monotonic() - start
        left = f", ETA {seconds / done * (total - done):.0f} s" if 0 < done < total else ""
        say(f"{stage:<12} {done:.0f}/{total:.0f} {unit}, {seconds:.0f} s{left}{latest and ', ' + latest}")

    def advance(amount: float, note: str) -> None:
        nonlocal done, last, latest
        done, latest = done + amount, note
        if time.monotonic() - last >= PLAIN_INTERVAL_SECONDS and done < total:
            last = time.monotonic()
            show()

    yield advance
    show()

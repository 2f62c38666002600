"""Small private JSON files that several processes read and change: keys, what they have spent, users' preferences.

A file is replaced whole, so that reading needs no lock. Whoever changes what is in a file holds the folder's lock from
reading it to writing it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cpt_ray.tables.files import exclusive, replacing


class JsonStore:
    """The JSON files under one folder; names are relative to it."""

    def __init__(self, root: Path):
        self.root = root
        self._threads = threading.Lock()  # some file systems have no locks: this process's threads at least take turns

    @contextmanager
    def changing(self, folder: str = "") -> Iterator[None]:
        """Nobody else changes the files of `folder` meanwhile, on any node; OSError if it cannot be written."""
        with self._threads, exclusive(self.root / folder):
            yield

    def names(self, folder: str = "") -> list[str]:
        """The names of a folder's files, in order, without their ending."""
        return sorted(path.stem for path in (self.root / folder).glob("*.json"))

    def version(self, name: str) -> tuple[int, int] | None:
        """Differs whenever the file was replaced; None if there is none."""
        try:
            status = (self.root / name).stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def read(self, name: str) -> Any:
        """None if there is no such file; ValueError if it is not JSON."""
        try:
            data = json.loads((self.root / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if data is None:
            raise ValueError("found null")
        return data

    def write(self, name: str, data: object, sync: bool = True) -> None:
        """Writes a file that only its owner can read; UserError if the disk refuses.

        Args:
            sync: whether to wait for the disk, so that it outlives the machine's death too.
        """
        with replacing(self.root / name, mode=0o600, sync=sync) as file:
            file.write(json.dumps(data, indent=2).encode())

    def remove(self, name: str) -> bool:
        """Removes a file and what a killed process left of its replacement; returns whether the file was there."""
        path = self.root / name
        was_there = path.exists()
        for part in (path, *path.parent.glob(f".{path.name}.*.tmp")):
            part.unlink(missing_ok=True)
        return was_there

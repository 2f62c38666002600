"""Small private JSON files that several processes read and change: keys, what they have spent, users' preferences.

A file is replaced whole, so that reading needs no lock. It is changed on the condition that nobody else changed it in
between: under the folder's lock, or in an object store by puts that replace the version that was read and no other.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from cpt_ray.tables.address import ChangedError, StoreError, Version
from cpt_ray.tables.files import exclusive, replacing
from cpt_ray.tables.store_path import AnyPath, StorePath

TRIES = 20
"""How often an object is read again because somebody else changed it just then."""
TRY_SECONDS = 0.05
"""Before it is read again, at random up to twice this long, and longer each time."""


class JsonStore:
    """The JSON files under one folder; names are relative to it."""

    def __init__(self, root: AnyPath):
        self.root = root
        self._threads = threading.Lock()  # some file systems have no locks: this process's threads at least take turns

    @property
    def is_remote(self) -> bool:
        """Whether a look at a file may take long."""
        return isinstance(self.root, StorePath)

    def names(self, folder: str = "") -> list[str]:
        """The names of a folder's files, in order, without their ending."""
        return sorted(path.stem for path in (self.root / folder if folder else self.root).glob("*.json"))

    def version(self, name: str) -> Version | tuple[int, int] | None:
        """Differs whenever the file was replaced; None if there is none."""
        path = self.root / name
        if isinstance(path, StorePath):
            return path.version()
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return status.st_mtime_ns, status.st_ino

    def read(self, name: str) -> Any:
        """None if there is no such file; ValueError if it is not JSON."""
        try:
            return _decoded((self.root / name).read_bytes())
        except FileNotFoundError:
            return None

    def change(self, name: str, changed: Callable[[Any], Any], sync: bool = True) -> Any:
        """Replaces a file's content by what `changed` makes of it and returns that; nobody else changes it meanwhile.

        `changed` is given None for a file that is not there, may be called several times, and leaves all as it is by
        returning None or raising. Only its owner can read the file. UserError or OSError if it cannot be written.

        Args:
            sync: whether to wait for the disk, so that it outlives the machine's death too.
        """
        path = self.root / name
        if isinstance(path, StorePath):
            return self._swap(path, changed)
        with self._threads, exclusive(path.parent):
            data = changed(self.read(name))
            if data is not None:
                with replacing(path, mode=0o600, sync=sync) as file:
                    file.write(_encoded(data))
            return data

    def _swap(self, path: StorePath, changed: Callable[[Any], Any]) -> Any:
        for number in range(1, TRIES + 1):
            before = path.read_versioned()
            data = changed(None if before is None else _decoded(before[0]))
            if data is None:
                return None
            try:
                path.put_if(_encoded(data), before[1] if before else None)
                return data
            except ChangedError:
                latest = path.read_versioned()
                if latest and latest[0] == _encoded(data):  # this very put, whose answer was lost
                    return data
                time.sleep(TRY_SECONDS * number * random.uniform(0, 2))
        raise StoreError(f"{path}: changed by others {TRIES} times in a row; try again")

    def remove(self, name: str) -> bool:
        """Removes a file and what a killed process left of its replacement; returns whether the file was there."""
        path = self.root / name
        if isinstance(path, StorePath):
            was_there = path.is_file()
            path.unlink(missing_ok=True)
            return was_there
        if not path.parent.is_dir():
            return False
        with self._threads, exclusive(path.parent):
            was_there = path.exists()
            for part in (path, *path.parent.glob(f".{path.name}.*.tmp")):
                part.unlink(missing_ok=True)
        return was_there


def _encoded(data: object) -> bytes:
    return json.dumps(data, indent=2).encode()


def _decoded(content: bytes) -> Any:
    data = json.loads(content.decode("utf-8"))
    if data is None:
        raise ValueError("found null")
    return data

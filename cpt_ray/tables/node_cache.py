"""What a node keeps beside runs: converted models, and copies of what is in object stores."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cpt_ray.errors import UserError
from cpt_ray.tables.address import StoreError, Version
from cpt_ray.tables.files import exclusive
from cpt_ray.tables.records import content_id
from cpt_ray.tables.store_path import AnyPath, StorePath, path_of

CACHE_ENV = "CPT_CACHE"
"""The environment variable with the folder of converted and copied models; on a cluster one that every node sees, or
one of each node's own."""
TRIES = 3
"""How often a folder is copied that is replaced meanwhile."""
OLD_SECONDS = 86400.0
"""How long nobody has asked for a copy that is removed: on a disk that nodes share, an engine of another one may be
loading it."""


def cache_folder() -> Path:
    """Where models are kept; UserError for an address."""
    given = os.environ.get(CACHE_ENV) or "~/.cache/cpt_ray"
    if "://" in given:
        raise UserError(f"{CACHE_ENV}: found {given!r}; give a folder of this machine, or of a shared disk")
    return Path(os.path.expanduser(given)).absolute()


@contextmanager
def made_once(folder: Path) -> Iterator[Path | None]:
    """A temporary folder that becomes `folder`, whole, when the block ends well; None if another process was first."""
    with exclusive(folder.parent) as is_locked:
        if folder.is_dir():
            yield None
            return
        own = f".{socket.gethostname()}-"
        if is_locked:  # what killed processes of this machine left behind
            for left_behind in folder.parent.glob(f"{own}*.tmp"):
                shutil.rmtree(left_behind, ignore_errors=True)
        temporary = folder.parent / f"{own}{uuid.uuid4().hex}.tmp"
        temporary.mkdir(parents=True)
        try:
            yield temporary
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process was first, on a disk without locks
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def cache_errors(what: str, folder: Path) -> Iterator[None]:
    """Says what cannot be written where, and what to do, in a UserError."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise UserError(
            f"{folder}: {what} cannot be written ({error.strerror or error}); free some space or mend the folder, "
            f"or set {CACHE_ENV} to another one"
        ) from None


def local_copy(where: str | AnyPath) -> Path:
    """A folder on this machine: `where` itself, or this node's copy of what an address names.

    A copy is made once per content, whole, and takes the place of old copies of what was there before.
    UserError if nothing is there or the cache cannot be written.
    """
    path = path_of(where) if isinstance(where, str) else where
    if isinstance(path, Path):
        return path
    own = cache_folder() / f"{path.name}-{content_id(str(path))}"
    for _ in range(TRIES):
        files = path.files()
        if not files:
            raise UserError(f"{path}: nothing is there")
        folder = own / content_id(files)
        with cache_errors(f"the copy of {path}", own):
            if folder.is_dir() or _copied(path, files, folder):
                with suppress(OSError):  # of a disk that may only be read, or another user's
                    os.utime(folder)
                return folder
    raise UserError(f"{path}: is replaced again and again; see what writes there, then give the same command again")


class _ReplacedError(Exception):
    """What is copied was removed or replaced meanwhile."""


def _copied(path: StorePath, files: Mapping[str, Version], folder: Path) -> bool:
    """Makes the copy and removes old ones; False if the files were replaced meanwhile."""
    try:
        with made_once(folder) as temporary:
            if temporary is None:
                return True
            try:
                for name in files:
                    (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                    (path / name).download(temporary / name)
            except FileNotFoundError:
                raise _ReplacedError from None
            if path.files() != files:
                raise _ReplacedError
    except _ReplacedError:
        return False
    for other in folder.parent.iterdir():  # also what other nodes copy now, or left behind
        with suppress(FileNotFoundError):  # another process has removed it, or made it whole
            if other != folder and other.is_dir() and time.time() - other.stat().st_mtime > OLD_SECONDS:
                shutil.rmtree(other, ignore_errors=True)
    return True

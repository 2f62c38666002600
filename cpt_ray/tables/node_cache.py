"""What a node keeps beside runs: converted models, and copies of what is in object stores."""

from __future__ import annotations

import os
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
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
        try:
            if folder.is_dir() or _copied(path, files, folder):
                with suppress(OSError):  # of a disk that may only be read, or another user's
                    os.utime(folder)
                return folder
        except StoreError:
            raise
        except OSError as error:
            raise UserError(
                f"{own}: the copy of {path} cannot be written ({error.strerror or error}); free some space or mend the "
                f"folder, or set {CACHE_ENV} to another one"
            ) from None
    raise UserError(f"{path}: is replaced again and again; see what writes there, then give the same command again")


def _copied(path: StorePath, files: Mapping[str, Version], folder: Path) -> bool:
    """Makes the copy; False if the files were replaced meanwhile."""
    with exclusive(folder.parent) as is_locked:
        if folder.is_dir():  # another process was first
            return True
        if is_locked:  # what killed processes of this machine left behind
            for left_behind in folder.parent.glob(f".{socket.gethostname()}-*.tmp"):
                shutil.rmtree(left_behind, ignore_errors=True)
        temporary = folder.parent / f".{socket.gethostname()}-{uuid.uuid4().hex}.tmp"
        try:
            for name in files:
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).download(temporary / name)
            if path.files() != files:
                return False
            try:
                temporary.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another node was first
                    raise
        except FileNotFoundError:  # removed meanwhile
            return False
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for other in folder.parent.iterdir():  # also what other nodes copy now, or left behind
            with suppress(FileNotFoundError):  # another node has removed it, or made it whole
                if other != folder and other.is_dir() and time.time() - other.stat().st_mtime > OLD_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)
    return True

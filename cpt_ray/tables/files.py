"""Files that are written whole or not at all, by one process at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cpt_ray.errors import UserError
from cpt_ray.tables.store_path import PART_BYTES, AnyPath, StorePath


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """Waits for the folder's lock and holds it during the block; OSError if the folder cannot be written.

    Yields False where the file system has no locks: then nothing keeps another process out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".files.lock").open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            is_locked = True
        except OSError:
            is_locked = False
        yield is_locked


@contextmanager
def replacing(path: AnyPath, mode: int = 0o666, sync: bool = True, keep: bool = False) -> Iterator[IO[bytes]]:
    """A file that becomes `path`, whole, when the block ends well; UserError if the disk or the store refuses.

    In an object store it is one put, which is atomic, of what was written on this machine.

    Args:
        mode: its permissions from the start, less the umask; those of an object are its bucket's.
        sync: whether to wait for the disk, so that it outlives the machine's death too.
        keep: whether a file that is there by then stays, and this one is dropped.
    """
    if isinstance(path, StorePath):
        with tempfile.SpooledTemporaryFile(max_size=PART_BYTES) as spool:
            yield spool
            is_one_part = spool.tell() <= PART_BYTES
            spool.seek(0)
            if keep and path.exists():
                return
            if keep and is_one_part:  # a larger one is put in parts, which takes no condition
                path.put_new(spool.read())
            else:
                path.put(spool.read() if is_one_part else spool)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if keep:
            _add(temporary, path)
        else:
            os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "free some space or mend the folder, then give the same command again"
        ) from None


def _add(temporary: Path, path: Path) -> None:
    """Renames a file unless there is one of that name.

    Where the file system has no hard links, two who do so within the same milliseconds may both succeed.
    """
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # of many kinds, by the file system; where it is none of links, `replace` has it too
        if not path.exists():
            os.replace(temporary, path)
            return
    temporary.unlink(missing_ok=True)

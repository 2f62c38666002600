"""Addresses in object stores as paths: the operations of `pathlib.Path` that this package uses, and conditional puts.

An object is put whole or not at all, so nothing here has a temporary name, and nothing is listed from a cache. The
library is obstore: the same conditional puts and retries for S3 (and what speaks its protocol), GCS and Azure, where
the fsspec file systems have three ways of putting conditionally and pin older versions of what Ray needs.
"""

from __future__ import annotations

import errno
import fnmatch
import functools
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from cpt_ray.errors import UserError
from cpt_ray.tables.address import (
    CLOUD_VARIABLES,
    NO_BUCKET,
    ChangedError,
    StoreError,
    Version,
    changed_errors,
    check_address,
    parts_of_address,
    scheme_of,
    store_errors,
)

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 << 20
"""Larger objects are put and read in parts of this size, so that none takes longer than REQUEST_SECONDS."""
REQUEST_SECONDS, RETRY_SECONDS = 60, 120
"""Of one request, and of all its retries together: the longest that a store is waited for."""


@functools.cache
def _open_store(root: str, seconds: float, _process: int) -> ObjectStore:
    from obstore.store import from_url

    return from_url(
        root,
        # an endpoint is asked without TLS only where the environment gives it as http://
        client_options={"allow_http": True, "timeout": timedelta(seconds=min(seconds, REQUEST_SECONDS))},
        retry_config={"max_retries": 10, "retry_timeout": timedelta(seconds=seconds)},
    )


@dataclass(frozen=True, order=True)
class StorePath:
    """`s3://bucket/run/units/x.parquet`; cheap to make, picklable, the same on every node."""

    root: str
    """`s3://bucket`."""
    key: str
    seconds: float = field(default=RETRY_SECONDS, compare=False)
    """How long the store is waited for."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """UserError for what is no address of a store."""
        try:
            check_address(text)
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(*parts_of_address(text))

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, name: str | Path) -> StorePath:
        return StorePath(self.root, f"{self.key}/{name}" if self.key else str(name))

    @property
    def name(self) -> str:
        """The last part."""
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return Path(self.name).stem

    @property
    def parent(self) -> StorePath:
        """The folder, which in a store is no more than a part of names."""
        return StorePath(self.root, self.key.rpartition("/")[0])

    def absolute(self) -> StorePath:
        """Itself."""
        return self

    def with_suffix(self, suffix: str) -> StorePath:
        """With another ending."""
        return self.parent / Path(self.name).with_suffix(suffix).name

    # ------------------------------------------------------------ looking

    def version(self) -> Version | None:
        """None if there is no such object."""
        meta = self._head()
        return None if meta is None else Version.of(meta)

    def modified(self) -> datetime | None:
        """When the object was put, by the store's clock; None if there is none."""
        meta = self._head()
        return None if meta is None else meta["last_modified"]

    def _head(self) -> Any:
        with self._errors():
            try:
                return self._store.head(self.key)
            except FileNotFoundError as error:
                if NO_BUCKET in str(error):
                    raise
                return None

    def is_file(self) -> bool:
        """Whether it is an object."""
        return bool(self.key) and self._head() is not None

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        with self._errors():
            return next(iter(self._store.list(self.key, chunk_size=1)), None) is not None

    def exists(self) -> bool:
        """Either of them."""
        return self.is_file() or self.is_dir()

    def files(self) -> dict[str, Version]:
        """Versions of all objects below it, by their names below it."""
        with self._errors():
            metas = self._store.list(self.key).collect()
        start = len(self.key) + 1 if self.key else 0
        return {meta["path"][start:]: Version.of(meta) for meta in sorted(metas, key=lambda meta: meta["path"])}

    def iterdir(self) -> Iterator[StorePath]:
        """What is in it: objects and folders."""
        with self._errors():
            listing = self._store.list_with_delimiter(self.key)
        keys = [*listing["common_prefixes"], *(meta["path"] for meta in listing["objects"])]
        yield from (StorePath(self.root, key) for key in sorted(keys))

    def glob(self, pattern: str) -> Iterator[StorePath]:
        """What is in it, by a pattern for names; not for what is below its folders."""
        assert "/" not in pattern
        yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    # ------------------------------------------------------------ reading

    def read_bytes(self) -> bytes:
        """The whole object; FileNotFoundError if there is none."""
        with self.open() as file:
            return file.read()

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object, as `read_bytes`."""
        return self.read_bytes().decode(encoding)

    def read_versioned(self) -> tuple[bytes, Version] | None:
        """The whole object and its version, of one request; None if there is none."""
        with self._errors():
            try:
                result = self._store.get(self.key)
                return bytes(result.bytes()), Version.of(result.meta)
            except FileNotFoundError as error:
                if NO_BUCKET in str(error):
                    raise
                return None

    def open(self, mode: str = "rb") -> IO[bytes]:
        """For reading, at any place; of one version, even if the object is replaced meanwhile."""
        assert mode == "rb"
        with self._errors():
            result = self._store.get(self.key)
            if result.meta["size"] <= PART_BYTES:
                return io.BytesIO(bytes(result.bytes()))
            return io.BufferedReader(_Parts(self, result.meta["size"], Version.of(result.meta)), PART_BYTES)

    def open_end(self) -> IO[bytes]:
        """As `open`, for who reads the end alone: a parquet file's schema needs no more of it."""
        meta = self._head()
        if meta is None:
            raise FileNotFoundError(errno.ENOENT, "not there", str(self))
        return io.BufferedReader(_Parts(self, meta["size"], Version.of(meta)), 1 << 16)

    def read_part(self, start: int, end: int, version: Version) -> bytes:
        """Bytes of one version; StoreError if the object is another one by now."""
        with self._errors():
            try:
                return bytes(
                    self._store.get(self.key, options={"range": (start, end), "if_match": version.e_tag}).bytes()
                )
            except changed_errors():
                raise StoreError(f"{self}: was replaced while it was read; give the same command again") from None

    def download(self, target: Path) -> None:
        """The object as a local file."""
        with self.open() as source, target.open("wb") as file:
            shutil.copyfileobj(source, file, PART_BYTES)

    # ------------------------------------------------------------ writing

    def put(self, content: bytes | IO[bytes]) -> None:
        """Replaces the object, or makes it."""
        with self._errors():
            self._store.put(self.key, content, chunk_size=PART_BYTES, max_concurrency=4)

    def put_if(self, content: bytes, version: Version | None) -> Version:
        """Replaces the object of this version, or makes it where `version` is None; returns the new version.

        ChangedError if it is another one. That may be this very put, which landed before its answer was lost.
        """
        with self._errors():
            try:
                mode: Any = "create" if version is None else version.condition()
                return Version.of(self._store.put(self.key, content, mode=mode))
            except changed_errors():
                raise ChangedError(str(self)) from None
            except FileNotFoundError as error:
                if version is None or NO_BUCKET in str(error):
                    raise
                raise ChangedError(str(self)) from None

    def put_new(self, content: bytes) -> None:
        """Makes the object, unless there is one. obstore repeats no put with a condition, since it may meet itself."""
        for attempts_left in (2, 1, 0):
            try:
                self.put_if(content, None)
                return
            except ChangedError:
                if self.exists():  # else there were two at once, and the store kept neither
                    return
            except StoreError:
                if not attempts_left:
                    raise
        raise StoreError(f"{self}: cannot be written; others write it at the same time")

    def write_text(self, text: str, encoding: str = "utf-8") -> None:
        """Replaces the object."""
        self.put(text.encode(encoding))

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing: there are no folders."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Removes the object; most stores do not say whether there was one."""
        with self._errors():
            try:
                self._store.delete(self.key)
            except FileNotFoundError:
                if not missing_ok:
                    raise

    def remove_tree(self) -> None:
        """Removes all objects below it."""
        if names := list(self.files()):
            with self._errors():
                self._store.delete([(self / name).key for name in names])

    def upload(self, folder: Path) -> None:
        """Makes what is below it the files of a local folder, which are put before others are removed."""
        before = self.files()
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
        for name in names:
            with (folder / name).open("rb") as file:
                (self / name).put(file)
        for name in set(before) - set(names):
            (self / name).unlink(missing_ok=True)

    # ------------------------------------------------------------ the store

    @property
    def _store(self) -> ObjectStore:
        return _open_store(self.root, self.seconds, os.getpid())

    def _errors(self) -> AbstractContextManager[None]:
        return store_errors(str(self), self.root)


AnyPath = Path | StorePath


class _Parts(io.RawIOBase):
    """A large object, read part by part."""

    def __init__(self, path: StorePath, size: int, version: Version):
        self._path, self._size, self._version, self._at = path, size, version, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + min(len(buffer), PART_BYTES), self._size)
        if end <= self._at:
            return 0
        part = self._path.read_part(self._at, end, self._version)
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def path_of(text: str) -> AnyPath:
    """What a run file or an argument names: a path of this machine, absolute, or an address."""
    return StorePath.parse(text) if scheme_of(text) else Path(text).absolute()


def readable(path: AnyPath) -> Any:
    """What pyarrow reads a parquet file from, one row group after the other."""
    return path.open() if isinstance(path, StorePath) else path


def remove_tree(path: AnyPath) -> None:
    """Removes a folder with all that is in it, if it is there."""
    if isinstance(path, StorePath):
        path.remove_tree()
    else:
        shutil.rmtree(path, ignore_errors=True)


def cloud_environment(path: AnyPath) -> dict[str, str]:
    """What has to be sent to other processes so that they reach a path: nothing for one of this machine.

    Nothing either to a cluster that this process starts, which inherits all: what is sent is in Ray's logs as well.
    """
    if not isinstance(path, StorePath) or not os.environ.get("RAY_ADDRESS"):
        return {}
    return {name: value for name, value in os.environ.items() if name.startswith(CLOUD_VARIABLES)}

"""One process at a time works on a run: a lock of the kernel on a folder, a lease in an object store.

A lease is an object that its owner puts anew every few seconds, each time on the condition that it is still the one it
put before. Whoever finds it watches whether that goes on, by the own clock and not by the times in it, and takes over
what has stood still. The lease keeps people from mistakes; that results are whole and made once does not hang on it,
since of two who wrote the same shard the first one's stays.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NoReturn

from cpt_ray.console import say
from cpt_ray.errors import UserError
from cpt_ray.tables.address import ChangedError, StoreError, Version
from cpt_ray.tables.store_path import AnyPath, StorePath

LOCK_FILE = ".lock"
RENEW_SECONDS = 5.0
"""How often the owner of a lease puts it anew."""
STALE_SECONDS = 45.0
"""How long a lease has to stand still before another process takes it over."""


@dataclass(frozen=True)
class Hold:
    """What this process knows of the run that it holds."""

    is_new: bool
    """Nobody has held it before."""
    is_ours: Callable[[], bool] = lambda: True
    """Whether that is still so; StoreError if the store cannot be asked."""


@contextmanager
def run_lock(folder: AnyPath) -> Iterator[Hold]:
    """Holds the run for this process.

    UserError if another process has it, if it cannot be written or, in a store, if another has taken it over meanwhile.
    """
    with _lease(folder) if isinstance(folder, StorePath) else _kernel_lock(folder) as hold:
        yield hold


def is_held(folder: AnyPath) -> bool:
    """Whether some process (of this machine, unless the run is in a store) holds the run."""
    path = folder / LOCK_FILE
    if isinstance(path, StorePath):
        held, modified = path.read_versioned(), path.modified()
        if held is None or modified is None or _Owner.parse(held[0]).is_gone:
            return False
        return (datetime.now(UTC) - modified).total_seconds() < STALE_SECONDS
    try:
        with path.open() as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


# ---------------------------------------------------------------- a folder


@contextmanager
def _kernel_lock(folder: Path) -> Iterator[Hold]:
    """Opens the lock's file again if another process just removed it."""
    path = folder / LOCK_FILE
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            is_new = not path.exists()
            handle = path.open("a+")
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror}); give another run_dir") from None
        with handle:
            _flock(folder, handle)
            if _is_at(path, handle):
                yield Hold(is_new)
                return


def _is_at(path: Path, handle: IO[str]) -> bool:
    try:
        return path.stat().st_ino == os.fstat(handle.fileno()).st_ino
    except FileNotFoundError:
        return False


def _flock(folder: Path, handle: IO[str]) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder}: another process works on this run; wait for it or stop it") from None
    except OSError as error:
        say(f"note: {folder} cannot be locked ({error.strerror}); let only one process work on it at a time")


# ---------------------------------------------------------------- a lease


def _this_place() -> str:
    """Where numbers of processes are comparable: one boot of one kernel, and one container in it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


@dataclass(frozen=True)
class _Owner:
    """What is in a lease."""

    owner: str = ""
    """Random, by process; "" when it was given back."""
    host: str = ""
    pid: int = 0
    place: str = ""

    @classmethod
    def parse(cls, content: bytes) -> _Owner:
        """What can be read of it; nobody, if nothing can."""
        try:
            data = json.loads(content)
            return cls(str(data["owner"]), str(data["host"]), int(data["pid"]), str(data["place"]))
        except (ValueError, KeyError, TypeError):
            return cls()

    def encoded(self) -> bytes:
        """As it is put now; the time, which nobody reads but people, makes it another version."""
        return json.dumps({**asdict(self), "renewed": datetime.now(UTC).isoformat()}).encode()

    @property
    def is_gone(self) -> bool:
        """Given back, or held by a process of this machine that has certainly ended."""
        if self.owner and self.place and self.place == _this_place():
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return True
            except PermissionError:
                pass
        return not self.owner


class _Lease:
    """Held from the making of it; `is_lost` once another process has it.

    A store that cannot be reached loses nothing: the next put that it answers settles whose the lease is.
    """

    def __init__(self, path: StorePath):
        self._path = path
        self._own = _Owner(uuid.uuid4().hex, socket.gethostname(), os.getpid(), _this_place())
        self.is_lost, self._ended = False, threading.Event()
        before = path.read_versioned()
        self.is_new = before is None
        if before is not None and not _Owner.parse(before[0]).is_gone:
            before = self._watched(*before)
        try:
            self._version = path.put_if(self._own.encoded(), before[1] if before else None)
        except ChangedError:
            self._version = self._landed() or self._refuse(path.read_versioned())
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def _refuse(self, held: tuple[bytes, Version] | None) -> NoReturn:
        owner = _Owner.parse(held[0]) if held else _Owner()
        raise UserError(
            f"{self._path.parent}: another process works on this run (on {owner.host or 'a host'}, process "
            f"{owner.pid}); wait for it or stop it"
        )

    def _watched(self, content: bytes, version: Version) -> tuple[bytes, Version] | None:
        """The lease, once it has stood still for long; UserError as soon as it is put anew."""
        owner, end = _Owner.parse(content), time.monotonic() + STALE_SECONDS
        say(
            f"note: {self._path.parent}: held by process {owner.pid} on {owner.host}; taken over unless it renews its "
            f"lease within {STALE_SECONDS:.0f} s"
        )
        while time.monotonic() < end:
            time.sleep(RENEW_SECONDS / 5)
            latest = self._path.read_versioned()
            if latest is None or _Owner.parse(latest[0]).is_gone:
                return latest
            if latest[1] != version:
                self._refuse(latest)
        return content, version

    def _landed(self) -> Version | None:
        """The version of a put of ours that landed although its answer was lost."""
        held = replace(self._path, seconds=RENEW_SECONDS).read_versioned()
        return held[1] if held and _Owner.parse(held[0]).owner == self._own.owner else None

    def is_ours(self) -> bool:
        """By the store's word, now."""
        return not self.is_lost and self._landed() is not None

    def _renew(self) -> None:
        path = replace(self._path, seconds=RENEW_SECONDS)
        while not self._ended.wait(RENEW_SECONDS):
            try:
                try:
                    self._version = path.put_if(self._own.encoded(), self._version)
                except ChangedError:
                    landed = self._landed()
                    if landed is None:
                        break
                    self._version = landed
            except (StoreError, FileNotFoundError):  # it may answer again
                continue
        if not self._ended.is_set():
            self.is_lost = True
            os.kill(os.getpid(), signal.SIGINT)  # ends the command, and waits in C too, as Ctrl-C would

    def give_back(self) -> None:
        """So that the next process need not wait; on the condition that it is still ours.

        A lease is removed only if it is all that is there: of a command that ended before it had any result.
        """
        self._ended.set()
        self._thread.join()
        if self.is_lost:
            return
        with suppress(ChangedError, StoreError, FileNotFoundError):
            if self.is_new and list(self._path.parent.iterdir()) == [self._path]:
                self._path.unlink()
            else:
                self._path.put_if(_Owner().encoded(), self._version)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt in the block: a shell ignores it for what it starts with &, and whoever starts a
    job may have blocked it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, signal.SIG_DFL if handler is None else handler)


@contextmanager
def _lease(folder: StorePath) -> Iterator[Hold]:
    lease = _Lease(folder / LOCK_FILE)
    try:
        with _interruptible():
            try:
                yield Hold(lease.is_new, lease.is_ours)
            finally:
                lease.give_back()
    except KeyboardInterrupt:
        if not lease.is_lost:
            raise
    if lease.is_lost:
        raise UserError(
            f"{folder}: another process has taken over this run; this command ends (what is finished is kept, the same "
            "command goes on)"
        )

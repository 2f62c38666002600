"""API keys: made and revoked with `cpt keys`, kept as hashes in the run directory's keys.json, metered per minute.

A running server sees a change of the file within a second. `Meter` counts for all replicas and lives in one place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.serving.asgi import Refusal
from cpt_ray.serving.store import JsonStore
from cpt_ray.tables.address import StoreError
from cpt_ray.tables.rundir import KEYS_FILE, SPENT_FILE, RunDir
from cpt_ray.tables.store_path import AnyPath

KEY_VARIABLE = "CPT_API_KEY"
"""Holds a key beside those of the file."""
STATES = {"revoked": "was revoked", "expired": "has expired", "spent": "has no tokens"}
"""States in which a key is refused, in words."""
MAX_KEY_NAME = 64
"""Characters of a key's name."""
REREAD_SECONDS = 1.0
"""How often a server looks whether the file has changed."""


def key_hash(key: str) -> str:
    """What is kept of an API key: the hex SHA-256 (keys are 192 random bits, so no slow hash is needed)."""
    return hashlib.sha256(key.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One API key and its limits; None is no limit."""

    name: str
    hash: str
    created: float
    """Unix seconds, as is `expires`."""
    expires: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and answer tokens together, as is `budget`."""
    budget: int | None = None
    """Tokens over the key's whole life."""
    revoked: bool = False

    @property
    def metered(self) -> bool:
        """Whether anything about it has to be counted."""
        return (self.requests_per_minute, self.tokens_per_minute, self.budget) != (None, None, None)

    def state(self, spent: int = 0) -> Literal["open", "revoked", "expired", "spent"]:
        """Whether it opens anything, and why not, after so many tokens."""
        if self.revoked:
            return "revoked"
        if self.expires is not None and self.expires <= time.time():
            return "expired"
        return "spent" if self.budget is not None and spent >= self.budget else "open"

    def describe(self, spent: int) -> str:
        """Its state and limits in one line."""
        parts: list[str] = [self.state(spent)]
        if self.expires is not None:
            parts.append(f"until {time.strftime('%Y-%m-%d %H:%M', time.localtime(self.expires))}")
        for limit, unit in ((self.requests_per_minute, "requests"), (self.tokens_per_minute, "tokens")):
            parts += [] if limit is None else [f"{limit} {unit}/min"]
        parts += [] if self.budget is None else [f"{spent} of {self.budget} tokens used"]
        return ", ".join(parts)


UNKNOWN_KEY = Refusal(
    status=401,
    code="invalid_api_key",
    text="Incorrect or missing API key. Send it as 'Authorization: Bearer KEY'.",
)


class Keyring:
    """The keys of one run: those of the file `path`, and `fixed` ones that live as long as the server."""

    def __init__(self, path: AnyPath, fixed: tuple[Key, ...] = ()):
        self._store, self._path, self._fixed = JsonStore(path.parent), path, fixed
        self._keys: tuple[Key, ...] = ()
        self._seen: object = None
        self._reread_at = 0.0
        self._was_read, self._follower = False, threading.Thread()

    @property
    def keys(self) -> tuple[Key, ...]:
        """All of them, revoked ones too; UserError if the file is not one of keys."""
        if not self._follower.is_alive() and time.monotonic() >= self._reread_at:
            self._reread_at = time.monotonic() + REREAD_SECONDS
            self.reread()
        return self._fixed + self._keys

    def _follow(self) -> None:
        """Has a store's file read in a thread from now on: a slow store must not hold up a server, and the first
        request after an idle hour must not be answered from the keys of an hour ago."""
        if self._store.is_remote and self._was_read and not self._follower.is_alive():
            reference = weakref.ref(self)
            self._follower = threading.Thread(target=_reread_always, args=(reference,), name="keys", daemon=True)
            self._follower.start()

    def reread(self) -> None:
        """Looks whether the file has changed; UserError if it cannot be read and never was."""
        try:
            version = self._store.version(self._path.name)
            if version != self._seen:
                self._keys = tuple(Key(**entry) for entry in self._store.read(self._path.name) or ())
                self._seen = version
            self._was_read = True
        except (OSError, TypeError, ValueError) as error:
            if self._was_read:  # a server that runs keeps the keys it knows
                return
            if isinstance(error, StoreError):
                raise
            raise self._unreadable(error) from None

    def check(self, authorization: bytes) -> Key | Refusal:
        """The key in an Authorization header; compares with every known one, so that the time tells nothing."""
        scheme, _, given = authorization.partition(b" ")
        hashed = hashlib.sha256(given.strip()).hexdigest()
        match, keys = None, self.keys
        self._follow()
        for key in keys:
            if hmac.compare_digest(hashed, key.hash):
                match = key
        if match is None or scheme.lower() != b"bearer":
            return UNKNOWN_KEY
        if (state := match.state()) != "open":
            return Refusal(status=403, code=f"key_{state}", text=f"This API key {STATES[state]}.")
        return match

    def add(self, key: Key) -> None:
        """Writes one more key; UserError if the name is taken, or cannot be read in a list."""
        if not key.name.strip():
            raise UserError("keys: a key needs a name, to be listed and revoked by")
        if len(key.name) > MAX_KEY_NAME or key.name != key.name.strip() or not key.name.isprintable():
            raise UserError(
                f"keys: found the name {key.name[: MAX_KEY_NAME + 1]!a}; give one of at most {MAX_KEY_NAME} printable "
                "characters, without spaces around it: it is a line of `cpt keys list`"
            )

        def added(keys: tuple[Key, ...]) -> tuple[Key, ...]:
            if any(other.name == key.name for other in self._fixed + keys):
                raise UserError(f"{self._path}: there is a key named {key.name!r} (or was: a revoked name stays taken)")
            return *keys, key

        self._change(added)

    def revoke(self, name: str) -> None:
        """Marks a key as revoked; UserError if there is none of that name."""
        if name not in (known := [key.name for key in self.keys]):
            raise UserError(
                f"{self._path}: no key named {name[: MAX_KEY_NAME + 1]!a}{did_you_mean(name[:MAX_KEY_NAME], known)}"
            )
        self._change(
            lambda keys: tuple(dataclasses.replace(key, revoked=key.revoked or key.name == name) for key in keys)
        )

    def _change(self, changed: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> None:
        """Replaces the file's newest keys."""
        try:
            self._store.change(
                self._path.name, lambda data: [dataclasses.asdict(key) for key in changed(self._parsed(data))]
            )
        except StoreError:
            raise
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written ({error.strerror})") from None
        self._reread_at, self._seen = 0.0, None

    def _parsed(self, data: Any) -> tuple[Key, ...]:
        try:
            return tuple(Key(**entry) for entry in data or ())
        except TypeError as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> UserError:
        return UserError(f"{self._path}: cannot be read as keys ({error}); repair or remove it")


def _reread_always(reference: weakref.ref[Keyring]) -> None:
    """Until nobody else holds the keyring."""
    while (keyring := reference()) is not None:
        keyring.reread()
        del keyring
        time.sleep(REREAD_SECONDS)


def make_key(name: str, days: float | None = None, **limits: Any) -> tuple[Key, str]:
    """(what is kept, the key itself: shown once, kept nowhere); `limits` are those of `Key`."""
    secret = f"cpt-{secrets.token_urlsafe(24)}"
    now = time.time()
    expires = None if days is None else now + days * 86400
    return Key(name=name, hash=key_hash(secret), created=now, expires=expires, **limits), secret


class MeterClient(Protocol):
    """What the app asks of the meter, wherever it runs."""

    async def admit(self, key: Key) -> Refusal | None: ...

    async def charge(self, key: Key, tokens: int) -> None: ...


class _Bucket:
    """`per_minute` units flow in evenly, at most a minute's worth; it may be overdrawn, and is then waited for."""

    def __init__(self, per_minute: int, now: float):
        self.per_minute, self._level, self._then = per_minute, float(per_minute), now

    def wait(self, now: float) -> float:
        """Seconds until a whole unit is there."""
        self._level = min(self.per_minute, self._level + (now - self._then) * self.per_minute / 60)
        self._then = now
        return max(0.0, (1 - self._level) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        self._level -= amount


class Meter:
    """Requests and tokens of every limited key, over all replicas.

    An answer's tokens are known, and counted, when it ends: answers in flight together may overdraw the minute, and
    the next request waits for it. What a budget has spent is on disk after every answer; the minutes are in memory.
    Another meter of the run may count meanwhile (an upgrade to a new cluster): each adds to the file what is its own.
    """

    def __init__(self, spent_file: AnyPath, clock: Callable[[], float] = time.monotonic):
        self._store, self._name, self._clock = JsonStore(spent_file.parent), spent_file.name, clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._spent: Counter[str] = Counter(self._store.read(self._name))
        self._unwritten: Counter[str] = Counter()
        self._writing, self._changes, self._kept = asyncio.Lock(), 0, 0

    def _bucket(self, key: Key, unit: str, per_minute: int) -> _Bucket:
        bucket = self._buckets.get((key.name, unit))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[key.name, unit] = _Bucket(per_minute, self._clock())
        return bucket

    async def admit(self, key: Key) -> Refusal | None:
        """None, and one request counted, if the key's limits leave room for it."""
        if key.state(self._spent[key.name] + self._unwritten[key.name]) == "spent":
            return Refusal(status=403, code="budget_spent", text=f"This API key's {key.budget} tokens are used up.")
        for unit, limit in (("requests", key.requests_per_minute), ("tokens", key.tokens_per_minute)):
            if limit is not None and (seconds := self._bucket(key, unit, limit).wait(self._clock())) > 0:
                text = f"This API key may use {limit} {unit} per minute; try again in {int(seconds) + 1} s."
                return Refusal(status=429, code="rate_limit_exceeded", text=text, retry_after=int(seconds) + 1)
        if key.requests_per_minute is not None:
            self._bucket(key, "requests", key.requests_per_minute).take(1)
        return None

    async def charge(self, key: Key, tokens: int) -> None:
        """Counts the tokens of an answer that ended."""
        if key.tokens_per_minute is not None:
            self._bucket(key, "tokens", key.tokens_per_minute).take(tokens)
        if key.budget is not None:
            self._unwritten[key.name] += tokens
            await self._keep()

    async def _keep(self) -> None:
        """Adds what was spent to the file. Answers that end meanwhile are written together, by the next."""
        self._changes += 1
        own = self._changes
        async with self._writing:
            if self._kept < own:
                kept, new = self._changes, self._unwritten.copy()
                self._spent = Counter(
                    await asyncio.to_thread(
                        self._store.change, self._name, lambda spent: Counter(spent) + new, sync=False
                    )
                )
                self._unwritten -= new
                self._kept = kept


def choose_keys(
    host: str, run: RunDir, api_key: str | None, insecure: bool
) -> tuple[tuple[Key, ...] | None, str | None]:
    """(keys beside the run's own, the text of one made here); UserError if nothing would guard an open network."""
    if insecure:
        return None, None
    given = api_key or os.environ.get(KEY_VARIABLE)
    if given and not re.fullmatch(r"[!-~]+", given := given.strip()):  # a key read from a file ends in a line break
        raise UserError(f"{KEY_VARIABLE}: use printable ASCII characters without spaces, and at least one")
    if given:
        return (Key(name=KEY_VARIABLE, hash=key_hash(given), created=time.time()),), None
    spent = run.read_json(SPENT_FILE) or {}
    if any(key.state(spent.get(key.name, 0)) == "open" for key in Keyring(run.path / KEYS_FILE).keys):
        return (), None
    if not is_loopback(host):
        raise UserError(
            f"serve.host: {host} is open to the network and there is no open key; make one (cpt keys add RUN_FILE "
            f"NAME), set {KEY_VARIABLE}, or let everyone in with --insecure"
        )
    key, secret = make_key("this-server")
    return (key,), secret


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Addresses of object stores: which are understood, and what goes wrong in a store, in one line."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

from cpt_ray.errors import UserError, first_line

SCHEMES = ("s3", "gs", "abfs", "abfss")
"""What obstore, and pyarrow for Ray Train's checkpoints, read alike."""
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+")
_WHOLE = re.compile(r"(\w+://[^/?#\s]+)/*([^?#]*?)/*")
CLOUD_VARIABLES = ("AWS_", "GOOGLE_", "AZURE_")
"""What the names of variables with credentials, regions and endpoints begin with."""
NO_BUCKET = "NoSuchBucket"
"""S3's code, which obstore tells from a missing object by its text alone."""


class StoreError(UserError, OSError):
    """An object store refuses or does not answer: a line for the user, and an OSError to a server that goes on."""

    def __init__(self, text: str):
        super().__init__(text)
        self.strerror = text


class Version(NamedTuple):
    """Of an object: what differs whenever it was replaced. S3 and Azure go by the first, GCS by the second."""

    e_tag: str | None
    generation: str | None

    @classmethod
    def of(cls, meta: Any) -> Self:
        """Of what a store says of an object, or answers to a put."""
        return cls(meta["e_tag"], meta["version"])

    def condition(self) -> dict[str, str]:
        """As obstore takes it for a put that replaces this version alone."""
        names = {"e_tag": self.e_tag, "version": self.generation}
        return {name: value for name, value in names.items() if value is not None}


class ChangedError(Exception):
    """A conditional put found another version of the object than it was to replace."""


def scheme_of(text: str) -> str:
    """Of an address, in small letters; "" for a path."""
    match = _ADDRESS.match(text)
    return match[1].lower() if match else ""


def check_address(text: str) -> None:
    """ValueError for an address that is not whole, or of a scheme that is not supported; paths are fine."""
    scheme = scheme_of(text)
    if not scheme:
        return
    known = ", ".join(f"{name}://" for name in SCHEMES)
    if scheme == "file":
        raise ValueError(f"found {text!r}; give the path alone")
    if scheme not in SCHEMES:
        raise ValueError(f"found {text!r}; {scheme}:// is not supported: give a path, or an address with {known}")
    if not text.startswith(f"{scheme}://"):
        raise ValueError(f"found {text!r}; an address begins with {scheme}://")
    if not _WHOLE.fullmatch(text) or not {".", "..", ""}.isdisjoint(text.rstrip("/").split("/")[3:]):
        raise ValueError(f"found {text!r}; expected {scheme}://BUCKET/PATH, without // in it, . and .., ? and #")


def parts_of_address(text: str) -> tuple[str, str]:
    """The bucket's address and the name in it, of an address that `check_address` lets through."""
    match = _WHOLE.fullmatch(text)
    assert match is not None
    return match[1], match[2]


@contextmanager
def store_errors(place: str, root: str) -> Iterator[None]:
    """FileNotFoundError for what is not there, StoreError for whatever else goes wrong with `place` in `root`."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        if NO_BUCKET in str(error):
            raise StoreError(f"{place}: there is no such bucket as {root}; make it, or give another address") from None
        if isinstance(error, FileNotFoundError):
            raise FileNotFoundError(errno.ENOENT, "not there", place) from None
        if isinstance(error, PermissionDeniedError | UnauthenticatedError):
            raise StoreError(
                f"{place}: access refused ({_cause(error)}); give credentials that may read and write there, in the "
                f"environment ({'*, '.join(CLOUD_VARIABLES)}*) or as the node's role"
            ) from None
        raise StoreError(
            f"{place}: the store does not answer as it should ({_cause(error)}); check the address, the credentials, "
            "the region and the endpoint, or give the same command again later"
        ) from None


def changed_errors() -> tuple[type[Exception], ...]:
    """What obstore raises if a condition does not hold."""
    from obstore.exceptions import AlreadyExistsError, PreconditionError

    return AlreadyExistsError, PreconditionError


def _cause(error: Exception) -> str:
    """The status and the code that a store answered with, else what went wrong with the request."""
    text = str(error)
    status, code = re.search(r"status code: (\d+[\w ]*)", text), re.search(r"<Code>(\w+)</Code>", text)
    if status:
        return status[1] + (f", {code[1]}" if code else "")
    return first_line(error)[:200]

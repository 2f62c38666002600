"""Selection by hash: as good as random, and the same in every run, whatever else there is to choose from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from cpt_ray.tables.records import content_id

Item = TypeVar("Item")


def fraction(digest: str) -> float:
    """A hash as a number from 0 to 1: a share `s` of all hashes is below `s`."""
    return float(int(digest, 16) / 16 ** len(digest))


def picked(choices: Sequence[Item], *parts: Any) -> Item:
    """One of the choices; each is picked by about as many `parts` as any other."""
    return choices[int(content_id(*parts), 16) % len(choices)]


def shuffled(items: Iterable[Item], parts: Callable[[Item], tuple[Any, ...]]) -> list[Item]:
    """The items in the order of the hashes of `parts`."""
    return sorted(items, key=lambda item: content_id(*parts(item)))

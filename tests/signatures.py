"""Signatures and source of other libraries, as tests of what is relied on look at them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any


def parameters(function: Callable[..., Any]) -> list[str]:
    """Names of a function's parameters, in order."""
    return list(inspect.signature(function).parameters)


def source(thing: Any) -> str:
    """A function's or class's source, with its white space made one space, so that no formatter matters."""
    return " ".join(inspect.getsource(thing).split())

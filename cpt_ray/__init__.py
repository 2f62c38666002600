"""Rubrics in, a configurable language model out, on Ray."""

__version__ = "0.1.0"

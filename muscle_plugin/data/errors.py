"""The error that everything in this package's data side raises."""

from __future__ import annotations


class DataError(RuntimeError):
    """The data of a run cannot be had. The message says what is missing and how to provide it."""

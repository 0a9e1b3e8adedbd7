"""The errors that a user can mend, and the exit status of each. A command prints one line per fault, and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from muscle_plugin.text import one_line

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
#: Of several processes (torchrun) the first one speaks.
FIRST = os.environ.get("RANK", "0") == "0"


class UserError(Exception):
    """Something that the user can mend. ``str()`` gives one line per fault: what is wrong, where, what would be right.

    Attributes:
        status: exit status of a command that ends with it.
    """

    status = EXIT_BAD_INPUT


class InputError(UserError, ValueError):
    """A value, a name or a file is not what it should be."""


class ConfigError(InputError):
    """One or more settings are wrong.

    Attributes:
        faults: one line each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = list(faults)

    def __reduce__(self) -> Any:
        return type(self), (self.faults,)


class PluginError(InputError):
    """A plugin cannot be loaded, or registers what cannot be used. The message is one line that names it."""


class CompileError(InputError):
    """The net cannot be compiled here."""


class DamagedError(InputError):
    """A checkpoint's file is not what was once written."""


class CatalogueError(UserError, RuntimeError):
    """USB's source could not be found or read."""


class DataError(UserError, RuntimeError):
    """The data of a run cannot be had. The message says what is missing and how to provide it."""


class DeviceError(UserError, RuntimeError):
    """The device, precision or memory asked for is not there."""


class RunError(UserError, RuntimeError):
    """A run cannot start or go on. The message says why and what would help, one line per fault."""


class WriteError(UserError, OSError):
    """A file cannot be written: no room, no permission, a broken disk. What was there is as it was."""


class ExportError(UserError, RuntimeError):
    """The net cannot be exported, or what was exported does not predict what the checkpoint does."""

    status = EXIT_FAILED


class ExchangeError(UserError, RuntimeError):
    """Another process has ended, or did not answer in time."""

    status = EXIT_FAILED


class NotFinite(UserError, RuntimeError):
    """Training came to a loss, a gradient or weights that are not finite. ``str()`` says when, which, and what to do.

    Attributes:
        details: the same as plain data.
    """

    status = EXIT_FAILED

    def __init__(self, text: str, details: dict[str, Any]) -> None:
        super().__init__(text, details)  # both, so that it can be pickled
        self.details = details

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupted(UserError):
    """Training stopped at the user's wish, after a checkpoint. ``str()`` says how to resume."""

    status = EXIT_INTERRUPTED


def fail(lines: Sequence[str], everywhere: bool = False) -> int:
    """Print each fault as a line on standard error; returns the exit status of bad input.

    Args:
        everywhere: also in processes other than the first: the fault is this process's own.
    """
    for line in lines if FIRST or everywhere else ():
        print(f"error: {one_line(line)}", file=sys.stderr)
    return EXIT_BAD_INPUT

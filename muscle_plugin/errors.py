"""Errors that a user can mend. A command prints one line per fault, no traceback, and ends with the error's status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A fault that the user can mend. ``str()`` gives one line per fault: what is wrong, where, what to do.

    Without a message it ends one of several processes whose fault the first one prints.

    Attributes:
        status: exit status of a command that ends with it.
        same_everywhere: whether all processes of a run meet it, so that the first one prints it for all.
    """

    status = EXIT_BAD_INPUT
    same_everywhere = False


class InputError(UserError, ValueError):
    """A value, a name or a file is not what it should be."""


class ConfigError(InputError):
    """One or more settings are wrong. ``faults`` has one line for each."""

    same_everywhere = True

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__(faults)
        self.faults = list(faults)

    def __str__(self) -> str:
        return "\n".join(self.faults)


class PluginError(InputError):
    """A plugin cannot be loaded, or registers what cannot be used. The message is one line that names it."""

    same_everywhere = True


class DamagedError(InputError):
    """A file does not hold what was written to it."""


class DataError(UserError, RuntimeError):
    """The data of a run are missing or unusable. The message says what is missing and how to provide it."""


class DeviceError(UserError, RuntimeError):
    """The device, precision or memory asked for is not available."""


class RunError(UserError, RuntimeError):
    """A run cannot start or resume. The message says why and what would help, one line per fault."""


class WriteError(UserError, OSError):
    """A file cannot be written: no room, no permission, a broken disk. The file that was there is unchanged."""

    def __str__(self) -> str:
        return f"{self.filename}: cannot be written: {self.strerror}"


class ExportError(UserError, RuntimeError):
    """The net cannot be exported, or the export does not predict what the checkpoint predicts."""

    status = EXIT_FAILED


class ExchangeError(UserError, RuntimeError):
    """Another process has ended, or did not answer in time."""

    status = EXIT_FAILED


class NotFinite(UserError, RuntimeError):
    """Loss, gradient or weights became NaN or infinite. ``str()`` says when, which, what to do; ``details`` is plain data."""

    status = EXIT_FAILED
    same_everywhere = True

    def __init__(self, text: str, details: dict[str, Any]) -> None:
        super().__init__(text, details)  # both, so that it can be pickled
        self.details = details

    def __str__(self) -> str:
        return str(self.args[0])


class Interrupted(UserError):
    """Training stopped on request, after writing a checkpoint. ``str()`` says how to resume."""

    status = EXIT_INTERRUPTED
    same_everywhere = True

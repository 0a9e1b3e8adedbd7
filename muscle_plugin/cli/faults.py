"""Faults of the user's input as lines on standard error."""

from __future__ import annotations

import os
import sys

from muscle_plugin.errors import Interrupted, UserError
from muscle_plugin.text import one_line


def in_first_process() -> bool:
    """Whether this is the first of the processes that ``torchrun`` started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print_fault(error: UserError) -> None:
    """Print a fault on standard error, a line each. What all processes meet, the first one prints."""
    if error.same_everywhere and not in_first_process():
        return
    if isinstance(error, Interrupted):
        print(f"\n{error}", file=sys.stderr)
        return
    for line in str(error).splitlines():
        print(f"error: {one_line(line)}", file=sys.stderr)

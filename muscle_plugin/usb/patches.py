"""What this package replaces in other packages, and for how long.

Two kinds: what USB (0.3.2 and git main) cannot run without on a CPU (:mod:`muscle_plugin.usb.calls`), and what only spares a
GPU some waiting (:mod:`muscle_plugin.usb.no_waiting`, :mod:`muscle_plugin.usb.thresholds`). ``MUSCLE_USB_PATCHES=0`` switches
the second kind off; results are the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SWITCH = "MUSCLE_USB_PATCHES"


def speed_patches() -> bool:
    """Whether to replace code of USB's for the sake of speed."""
    return os.environ.get(SWITCH) != "0"


@contextlib.contextmanager
def replaced(*stand_ins: tuple[type | object, str, object]) -> Iterator[None]:
    """Replace attributes within a ``with`` block.

    Args:
        stand_ins: (owner, attribute, value) each.
    """
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in stand_ins]
    for owner, name, value in stand_ins:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in kept:
            if value is None:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, value)

"""Makes the class of an algorithm from its name: ``Host`` over a USB class, with ``Muscle`` in front for ``muscle_*``."""

from __future__ import annotations

from functools import cache
from typing import Any

from muscle_plugin.algorithms.catalogue import MUSCLE, MUSCLE_BASE, MUSCLE_PREFIX
from muscle_plugin.algorithms.mean_teacher import MeanTeacher
from muscle_plugin.algorithms.muscle import Muscle
from muscle_plugin.host import Host
from muscle_plugin.usb import ALGORITHMS

#: Classes used in place of USB's under the same name, where a version of USB has a broken one.
REPLACED: dict[str, Any] = {"meanteacher": MeanTeacher}


@cache
def algorithm_class(name: str) -> Any:
    """The trainable class of an algorithm: any of USB's registry hosted, ``muscle``, or ``muscle_<name>``.

    Raises:
        KeyError: USB's registry has no such algorithm.
    """
    with_muscle = name == MUSCLE or (name.startswith(MUSCLE_PREFIX) and name not in _stock())
    usb_name = MUSCLE_BASE if name == MUSCLE else name.removeprefix(MUSCLE_PREFIX) if with_muscle else name
    if usb_name not in ALGORITHMS:
        raise KeyError(f"unknown algorithm {name!r}; USB registers {', '.join(sorted(_stock()))}")
    base = REPLACED.get(usb_name) or ALGORITHMS[usb_name]
    if issubclass(base, Host):
        return base
    if not with_muscle:
        return type(f"Hosted{base.__name__}", (Host, base), {"usb_name": usb_name, "__doc__": base.__doc__})

    def get_argument() -> list[Any]:
        return [*base.get_argument(), *Muscle.get_argument()]

    members = {
        "usb_name": usb_name,
        "__doc__": f"MUSCLE composed with {usb_name}.",
        "get_argument": staticmethod(get_argument),
    }
    return type(f"Muscle{base.__name__}", (Muscle, Host, base), members)


def _stock() -> list[str]:
    """Names in USB's registry that are not this package's."""
    return [n for n in ALGORITHMS.keys() if not issubclass(ALGORITHMS[n], Host)]  # noqa: SIM118  not a dict

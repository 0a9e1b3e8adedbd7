"""The views that a training step needs, read off the parameters of its ``train_step`` by one table.

USB decides this by the algorithm's name, in its data set class. Here a parameter's name is enough, except for the three
algorithms whose ``x_ulb_s`` is a second weak view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from muscle_plugin.errors import DataError
from muscle_plugin.registry.names import STEP_PARAMETERS

LABELLED, UNLABELLED = "labelled", "unlabelled"
#: Strengths of views. The paper calls the strong ones hard, and so do the settings (``hard_views``, ``hard_augment``).
WEAK, MEDIUM, STRONG = "weak", "medium", "strong"


@dataclass(frozen=True)
class View:
    """A view of the images of a batch: of labelled or unlabelled ones, how strongly augmented, and how often per image."""

    images: str
    strength: str
    count: int = 1


#: Parameter of ``train_step`` -> the view it takes.
VIEWS: dict[str, View] = {
    **dict.fromkeys(("x_lb", "x_lb_w2"), View(LABELLED, WEAK)),
    "x_lb_s": View(LABELLED, STRONG),
    **dict.fromkeys(("x_ulb_w", "x_ulb_w2"), View(UNLABELLED, WEAK)),
    "x_ulb_m": View(UNLABELLED, MEDIUM),
    **dict.fromkeys(("x_ulb_s", "x_ulb_s_0", "x_ulb_s_1", "x_ulb_s_2"), View(UNLABELLED, STRONG)),
}
#: USB classes whose ``x_ulb_s`` is a second weak view.
SECOND_WEAK_VIEW = frozenset({"pimodel", "meanteacher", "mixmatch"})


def views_of(parameters: Sequence[str], usb_name: str) -> dict[str, View]:
    """Return the image views among the parameters of a USB class's ``train_step``.

    Raises:
        DataError: a parameter is neither a view nor anything else that a step may ask for.
    """
    found = {}
    for name in parameters:
        if name in VIEWS:
            second_weak = name == "x_ulb_s" and usb_name in SECOND_WEAK_VIEW
            found[name] = View(UNLABELLED, WEAK) if second_weak else VIEWS[name]
        elif name not in STEP_PARAMETERS:
            raise DataError(
                f"{usb_name}: its train_step asks for {name!r}, a view this package does not make; known:"
                f" {', '.join(STEP_PARAMETERS)}"
            )
    return found


def check_shared_equally(labelled: int, unlabelled: int, world: int) -> None:
    """Raise DataError if ``world`` processes cannot have equally many images of a batch each."""
    if labelled % world or unlabelled % world:
        j, i = (world * max(1, round(n / world)) for n in (labelled, unlabelled))
        raise DataError(
            f"batch: {labelled} labelled and {unlabelled} unlabelled images per step cannot be shared equally by {world}"
            f" processes; {j} and {i} can: --batch_size {j} --uratio {i / j:g}"
        )

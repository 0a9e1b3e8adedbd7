"""What can be chosen of a net besides its name: one set of options for all nets."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from muscle_plugin.errors import InputError
from muscle_plugin.text import did_you_mean

#: Values that ask for nothing, and which any net therefore takes.
OFF: dict[str, object] = {"dropout": 0.0, "input_noise": 0.0, "width": 1.0, "double_head": False, "l2_feature": False}


@dataclass(frozen=True)
class NetOptions:
    """Choices about a net; None leaves one to the net's own default.

    Attributes:
        dropout: probability in [0, 1); 0 leaves dropout out (MUSCLE, Figure 2 b). In cnn13 after its two max-pools (0.5
            by default), in other nets before the head (0 by default).
        input_noise: standard deviation of Gaussian noise on the images while training, in units of the normalised
            images that the net is given (Mean Teacher's 13-layer net: 0.15). Default 0.
        width: factor on the channels, which are rounded to a multiple of 8. Default 1.
        double_head: a second, weight-normed linear head, whose output is ``logits2`` (Mean Teacher's "double output").
        l2_feature: divide the feature by its L2 norm before the head (label propagation without Mean Teacher).

    Raises:
        InputError: a value out of its range.
    """

    dropout: float | None = None
    input_noise: float | None = None
    width: float | None = None
    double_head: bool | None = None
    l2_feature: bool | None = None

    def __post_init__(self) -> None:
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"net: dropout must be at least 0 and less than 1, got {self.dropout}")
        if self.input_noise is not None and not 0 <= self.input_noise < math.inf:
            raise InputError(f"net: input_noise must be 0 or more, got {self.input_noise}")
        if self.width is not None and not 0 < self.width < math.inf:
            raise InputError(f"net: width must be more than 0, got {self.width}")

    @classmethod
    def of(cls, net: str, options: NetOptions | Mapping[str, object] | None) -> NetOptions:
        """Options from a mapping of names to values, or as they are.

        Raises:
            InputError: a name that is no option of any net, or a value of the wrong type.
        """
        if isinstance(options, NetOptions):
            return options
        known = [f.name for f in fields(cls)]
        for name, value in (options or {}).items():
            if name not in known:
                raise InputError(
                    f"net: {net} has no option {name!r}{did_you_mean(name, known)}; known: {', '.join(known)}"
                )
            if not isinstance(value, (int, float, type(None))):
                raise InputError(f"net: {name} must be a number or a truth value, got {value!r}")
        return cls(**(options or {}))  # type: ignore[arg-type]

    def arguments(self, net: str, has: Collection[str]) -> dict[str, Any]:
        """The options that are set, as keyword arguments of a net that has the options ``has``.

        Raises:
            InputError: one is asked for that the net does not have.
        """
        given = {n: v for n, v in asdict(self).items() if v is not None}
        for name, value in given.items():
            if name not in has and value != OFF[name]:
                raise InputError(f"net: {net} has no option {name!r}; it has {', '.join(has)}")
        return {n: v for n, v in given.items() if n in has}


def channels(default: int, width: float) -> int:
    """``default * width`` rounded to the nearest multiple of 8, at least 8."""
    return max(8, 8 * math.floor(default * width / 8 + 0.5))


def refuse_pretrained(net: str, pretrained: bool) -> None:
    """Raise InputError if pretrained weights are asked for of a net that has none to offer."""
    if pretrained:
        raise InputError(f"net: {net} has no pretrained weights")

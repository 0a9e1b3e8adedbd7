"""MUSCLE for USB: semi-supervised learning with a concurrent mutual-information objective.

Importing this package is light: neither torch nor semilearn is loaded until a name that needs them is used.
``import muscle_plugin.register`` makes USB (``semilearn``) know every algorithm and net of this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from muscle_plugin.version import __version__

if TYPE_CHECKING:  # the same as _LAZY, for type checkers
    from muscle_plugin.algorithms.muscle import Muscle
    from muscle_plugin.config import load_settings
    from muscle_plugin.export import export_model, load_exported
    from muscle_plugin.host import Host
    from muscle_plugin.host.device import usb_calls_on
    from muscle_plugin.losses.mutual_information import MutualInformationLoss, mutual_information
    from muscle_plugin.predict import Predictor
    from muscle_plugin.propagation import DiffusionLabelPropagation
    from muscle_plugin.run import train

_LAZY = {
    "mutual_information": "muscle_plugin.losses",
    "MutualInformationLoss": "muscle_plugin.losses",
    "Muscle": "muscle_plugin.algorithms.muscle",
    "Host": "muscle_plugin.host",
    "train": "muscle_plugin.run",
    "load_settings": "muscle_plugin.config",
    "Predictor": "muscle_plugin.predict",
    "export_model": "muscle_plugin.export",
    "load_exported": "muscle_plugin.export",
    "DiffusionLabelPropagation": "muscle_plugin.propagation",
    "usb_calls_on": "muscle_plugin.host.device",
}

__all__ = [
    "DiffusionLabelPropagation",
    "Host",
    "Muscle",
    "MutualInformationLoss",
    "Predictor",
    "__version__",
    "export_model",
    "load_exported",
    "load_settings",
    "mutual_information",
    "train",
    "usb_calls_on",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

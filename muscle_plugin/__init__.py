"""MUSCLE for USB: semi-supervised learning with a concurrent mutual-information objective.

Importing this package is light: neither torch nor semilearn is loaded until a name that needs them is used.
``import muscle_plugin.register`` makes USB (``semilearn``) know every algorithm and net of this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from muscle_plugin.version import __version__

if TYPE_CHECKING:  # the same as _LAZY, for type checkers
    from muscle_plugin.algorithms.muscle import Muscle
    from muscle_plugin.inference.export import export_model, load_exported
    from muscle_plugin.inference.predict import Predictor
    from muscle_plugin.losses import MutualInformationLoss, mutual_information
    from muscle_plugin.propagation import DiffusionLabelPropagation
    from muscle_plugin.runs.train import train
    from muscle_plugin.settings.resolve import load_settings
    from muscle_plugin.training import Host
    from muscle_plugin.usb.calls import usb_calls_on

_LAZY = {
    "mutual_information": "muscle_plugin.losses",
    "MutualInformationLoss": "muscle_plugin.losses",
    "Muscle": "muscle_plugin.algorithms.muscle",
    "Host": "muscle_plugin.training",
    "train": "muscle_plugin.runs.train",
    "load_settings": "muscle_plugin.settings.resolve",
    "Predictor": "muscle_plugin.inference.predict",
    "export_model": "muscle_plugin.inference.export",
    "load_exported": "muscle_plugin.inference.export",
    "DiffusionLabelPropagation": "muscle_plugin.propagation",
    "usb_calls_on": "muscle_plugin.usb.calls",
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

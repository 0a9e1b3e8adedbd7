"""MUSCLE for USB: semi-supervised learning with a concurrent mutual-information objective.

Importing this package is light: neither torch nor semilearn is loaded until a name that needs them is used.
``import muscle_plugin.register`` makes USB (``semilearn``) know every algorithm and net of this package.
"""

from importlib import import_module
from typing import Any

from muscle_plugin.version import __version__

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
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

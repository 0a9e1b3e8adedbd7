# ruff: noqa: F401  what other modules take from here
"""The names of USB (``semilearn``) that this package uses, imported in one place; for 0.3.2 and for git main at 1ef4cbe.

Importing USB takes seconds and prints deprecation warnings of libraries that it uses; they are silenced here, and here
only, and packages that training on images does not need are imported when they are used (:mod:`muscle_plugin.usb.late`).
Modules that must stay light do not import this one.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import warnings

from muscle_plugin.usb.late import imported_when_used

with warnings.catch_warnings(), imported_when_used("semilearn"):
    warnings.simplefilter("ignore")
    import timm.layers.helpers

    # git main imports this name, which timm 1.0 moved
    sys.modules.setdefault("timm.models.layers.helpers", timm.layers.helpers)
    import semilearn.algorithms
    import semilearn.nets as nets
    from semilearn.algorithms.flexmatch import FlexMatchThresholdingHook
    from semilearn.algorithms.hooks import DistAlignQueueHook
    from semilearn.algorithms.softmatch import SoftMatchWeightingHook
    from semilearn.algorithms.utils import SSL_Argument, concat_all_gather, str2bool
    from semilearn.core import AlgorithmBase
    from semilearn.core.hooks import (
        CheckpointHook,
        DistSamplerSeedHook,
        EMAHook,
        EvaluationHook,
        Hook,
        LoggingHook,
        ParamUpdateHook,
        TimerHook,
    )
    from semilearn.core.utils import ALGORITHMS

    # git main's own list of modules leaves one of its algorithms out
    for _module in pkgutil.iter_modules(semilearn.algorithms.__path__):
        importlib.import_module(f"semilearn.algorithms.{_module.name}")

    # 0.3.2 has the name, git main misspells it
    _freematch = semilearn.algorithms.freematch
    FreeMatchThresholdingHook = (
        getattr(_freematch, "FreeMatchThresholdingHook", None) or _freematch.FreeMatchThresholingHook
    )
    # git main's SequenceMatch returns, for imbalanced learning alone, features under a name that it never sets
    # (asking the registry would load plugins, this package among them, in the middle of its own import)
    if hasattr(semilearn.algorithms, "sequencematch"):
        vars(semilearn.algorithms.sequencematch.sequencematch).setdefault("feat_dict", None)


def register_algorithm(name: str, cls: type) -> None:
    """Put a class into USB's registry of algorithms.

    Raises:
        RuntimeError: another class has this name.
    """
    if name not in ALGORITHMS:
        ALGORITHMS[name] = cls
    elif ALGORITHMS[name] is not cls:
        raise RuntimeError(
            f"USB already has an algorithm {name!r}: {ALGORITHMS[name]}; muscle_plugin cannot add its own"
        )


def register_net(name: str, builder: object) -> None:
    """Put a builder where USB's ``get_net_builder`` looks for it: into the module ``semilearn.nets``.

    Raises:
        RuntimeError: another net has this name.
    """
    present = getattr(nets, name, builder)
    if present is not builder:
        raise RuntimeError(f"USB already has a net {name!r}: {present}; muscle_plugin cannot add its own")
    setattr(nets, name, builder)

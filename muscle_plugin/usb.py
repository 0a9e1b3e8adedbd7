"""The names of USB (``semilearn``) that this package uses, imported in one place.

Importing USB takes seconds and prints deprecation warnings of libraries that it uses; they are silenced here, and here
only. Modules that must stay light do not import this one.
"""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import semilearn.nets as nets
    from semilearn.algorithms.utils import SSL_Argument, str2bool
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

__all__ = [
    "ALGORITHMS",
    "CheckpointHook",
    "DistSamplerSeedHook",
    "EMAHook",
    "EvaluationHook",
    "Hook",
    "LoggingHook",
    "ParamUpdateHook",
    "SSL_Argument",
    "TimerHook",
    "nets",
    "str2bool",
]

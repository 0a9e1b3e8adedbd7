# ruff: noqa: F401  what other modules take from here
"""The names of USB (``semilearn``) that this package uses, imported in one place; for 0.3.2 and for git main at 1ef4cbe.

Importing USB takes seconds and prints deprecation warnings of libraries that it uses; they are silenced here, and here
only. Modules that must stay light do not import this one.

USB imports its loggers, audio and language parts as soon as it is imported, which takes a quarter of its start-up time, and
fails where one of them is not installed or cannot be loaded (a torchaudio made for another torch, an aim for another
protobuf). Training on images never calls them, so they are imported when they are used, if ever. Only import statements in
USB's modules get a stand-in, and nothing enters ``sys.modules``: other libraries look there, or call ``find_spec``, to learn
what is installed.
"""

from __future__ import annotations

import builtins
import importlib
import pkgutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from muscle_plugin.usb.calls import replaced

#: What USB imports at once and training on images does not need.
NOT_NEEDED = ("aim", "progress", "skimage", "torchaudio", "transformers", "wandb")


class _Late:
    """A module, or a name in one, that is imported once it is called or looked into."""

    def __init__(self, module: str, name: str = "") -> None:
        self._module, self._name = module, name
        self._importing = not name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # what the machinery of imports and types looks for
            raise AttributeError(attribute)
        return _Late(self._module, attribute) if self._importing else getattr(self._real(), attribute)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def _real(self) -> Any:
        package = self._module.partition(".")[0]
        try:
            module = importlib.import_module(self._module)
        except Exception as e:  # whatever stops it
            absent = isinstance(e, ModuleNotFoundError) and e.name == package
            reason = f"is not installed: pip install {package}" if absent else f"cannot be loaded: {e}"
            raise ImportError(f"{package} is needed for this, and {reason}") from e
        return getattr(module, self._name) if self._name else module


@contextmanager
def imported_when_used(importer: str, packages: tuple[str, ...] = NOT_NEEDED) -> Iterator[None]:
    """Within it, modules of the package ``importer`` get stand-ins for what they import of ``packages``, unless it is imported
    already."""
    real, made = builtins.__import__, list[_Late]()

    def import_(
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Any = (),
        level: int = 0,
    ) -> Any:
        package, asking = name.partition(".")[0], str((globals or {}).get("__name__")).partition(".")[0]
        if level or asking != importer or package not in packages or sys.modules.get(name):
            return real(name, globals, locals, fromlist, level)
        made.append(_Late(name if fromlist else package))
        return made[-1]

    try:
        with replaced((builtins, "__import__", import_)):
            yield
    finally:
        for module in made:
            module._importing = False


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


def registered() -> dict[str, type]:
    """USB's own table of algorithms, to be restored after a plugin that fails."""
    ALGORITHMS.keys()  # a USB that loads plugins does so now
    return ALGORITHMS._dict  # type: ignore[no-any-return]

"""What an algorithm object remembers, as plain data: for checkpoints, and to undo a step.

USB's classes keep state in attributes of the algorithm and of its hooks (class-wise thresholds, queues, moving
averages), and save some of it in ``get_save_dict``. Here everything that is a tensor, an array, a number or a plain
container of these is taken, so that a class which forgets to save something resumes exactly all the same. The result
holds only types that ``torch.load(weights_only=True)`` accepts.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

#: Attributes that belong to where a run is, not to what it has learnt, or that are built anew each time.
# fmt: off
PLACE = frozenset([
    "args", "tb_log", "print_fn", "net_builder", "dataset_dict", "loader_dict", "batches", "hooks_dict", "_hooks",
    "out_dict", "log_dict", "save_dir", "save_name", "resume", "device", "gpu", "rank", "world_size", "distributed",
    "ngpus_per_node", "ema", "bn_controller", "amp_cm", "num_eval_iter", "num_log_iter", "recorder", "save_every",
    "stop_requested", "_clock", "plan", "test_sequestered", "net_options", "notes", "settings",
    "compared_settings",
    "start_epoch", "monitor", "logger", "updates",
])
# fmt: on

#: What checkpoints of earlier versions hold.
_NO_LONGER_KEPT = frozenset(["start_epoch"])
_SKIP = object()


def _pack(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())} if value.dtype.kind in "biuf" else _SKIP
    if isinstance(value, (list, tuple)):
        items = [_pack(v) for v in value]
        return _SKIP if any(i is _SKIP for i in items) else {type(value).__name__: items}
    if type(value) is dict:
        items = [[_pack(k), _pack(v)] for k, v in value.items()]
        return _SKIP if any(i is _SKIP for pair in items for i in pair) else {"dict": items}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return {"state": _clone(value.state_dict())}
    return _SKIP


def _clone(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _clone(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_clone(v) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def _unpack(packed: Any, on: torch.device | None = None) -> Any:
    if not isinstance(packed, dict):
        return packed.to(on or packed.device, copy=True) if isinstance(packed, torch.Tensor) else packed
    ((kind, content),) = packed.items()
    if kind == "array":
        return content.numpy().copy()
    if kind == "list":
        return [_unpack(v, on) for v in content]
    if kind == "tuple":
        return tuple(_unpack(v, on) for v in content)
    return {_unpack(k, on): _unpack(v, on) for k, v in content}


def _capture_object(obj: Any) -> dict[str, Any]:
    packed = {k: _pack(v) for k, v in vars(obj).items() if k not in PLACE}
    return {k: v for k, v in packed.items() if v is not _SKIP}


def _may_set(obj: Any, name: str, packed: Any) -> bool:
    """Whether a state may set an attribute: one that :func:`capture` would have taken, to a value of the same kind. A file
    must not put other paths, settings or methods in place."""
    of_class = getattr(type(obj), name, None)
    if name in PLACE or name.startswith("__") or callable(of_class) or isinstance(of_class, property):
        return False
    now = _pack(vars(obj).get(name))
    if now is _SKIP:
        return False
    if now is None or packed is None:
        return True
    if isinstance(now, (bool, int, float)):
        return isinstance(packed, (bool, int, float))
    return type(now) is type(packed) or (isinstance(now, torch.Tensor) and isinstance(packed, torch.Tensor))


def _restore_object(obj: Any, state: dict[str, Any], on: torch.device | None) -> None:
    for name, packed in state.items():
        if name in _NO_LONGER_KEPT:
            continue
        if not _may_set(obj, name, packed):
            raise ValueError(f"it would set {type(obj).__name__}.{name}")
        if isinstance(packed, dict) and "state" in packed:
            getattr(obj, name).load_state_dict(packed["state"])
        else:
            now = vars(obj).get(name)
            setattr(obj, name, _unpack(packed, now.device if on and isinstance(now, torch.Tensor) else on))
    for name in [k for k, v in vars(obj).items() if k not in PLACE and k not in state and _pack(v) is not _SKIP]:
        delattr(obj, name)  # it came into being after the state was taken


def capture(algorithm: Any) -> dict[str, Any]:
    """Everything that the algorithm and its hooks remember, and the global random generators."""
    hooks = {name: _capture_object(hook) for name, hook in algorithm.hooks_dict.items()}
    return {"algorithm": _capture_object(algorithm), "hooks": hooks, "random": capture_random(algorithm.device)}


def restore(algorithm: Any, state: dict[str, Any], on: torch.device | None = None) -> None:
    """Put an algorithm of the same class and sizes back into a captured state.

    Args:
        on: where tensors go; one whose attribute lives on another device already stays there. None: where they are.
    """
    _restore_object(algorithm, state["algorithm"], on)
    for name, hook in algorithm.hooks_dict.items():
        if name in state["hooks"]:
            _restore_object(hook, state["hooks"][name], on)
    restore_random(state["random"], algorithm.device)


def capture_random(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators; of GPUs, of the one that ``device`` is, if it is one."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": _pack(random.getstate()),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda" and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: dict[str, Any], device: torch.device) -> None:
    """Undo :func:`capture_random`, which may have been on another device."""
    random.setstate(_unpack(state["python"]))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)

"""The state that USB's classes keep in attributes of the algorithm and its hooks, as plain data.

Class-wise thresholds, queues and moving averages are such attributes; USB's ``get_save_dict`` knows some of them. Here every
attribute of an algorithm's class that is a tensor, an array, a number, a text, an object with a ``state_dict``, or a plain
container of these is taken, so that a class that forgets to save something resumes exactly all the same. The attributes of
``Host``, ``Muscle`` and their hooks, which these classes annotate (a test sees to it), are never taken:
:mod:`muscle_plugin.training.checkpoint` saves by name what must last.
"""

from __future__ import annotations

import contextlib
import inspect
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from muscle_plugin.errors import InputError
from muscle_plugin.usb.names import AlgorithmBase

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host

C = TypeVar("C", bound=type)

#: Attributes of USB's base class that hold no state, or that :mod:`muscle_plugin.training.checkpoint` saves by name.
NOT_CAPTURED = frozenset([
    "args", "algorithm", "tb_log", "print_fn", "net_builder", "dataset_dict", "loader_dict", "hooks_dict", "_hooks", "out_dict",
    "log_dict", "results_dict", "save_dir", "save_name", "resume", "gpu", "rank", "world_size", "distributed", "ngpus_per_node",
    "num_classes", "num_train_iter", "num_iter_per_epoch", "num_eval_iter", "num_log_iter", "epochs", "start_epoch", "use_amp",
    "amp_cm", "ema", "bn_controller",
    "it", "epoch", "best_it", "best_eval_acc", "model", "ema_model", "optimizer", "scheduler", "loss_scaler",
])  # fmt: skip
_SKIP = object()


class StrictModel(BaseModel):
    """A part of a checkpoint, whose types are checked and not converted."""

    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


def outside_state(cls: C) -> C:
    """Class decorator: the attributes that the class annotates are this package's own, and no state of USB's."""
    cls._outside_state = frozenset(inspect.get_annotations(cls))  # type: ignore[attr-defined]
    return cls


def _left_out(obj: object) -> frozenset[str]:
    of_usb = NOT_CAPTURED if isinstance(obj, AlgorithmBase) else frozenset(["name", "priority"])  # which each hook has
    return of_usb.union(*(vars(c).get("_outside_state", ()) for c in type(obj).__mro__))


def plain(value: object, copy: bool = False) -> Any:
    """Tensors, and NumPy's scalars as Python's, in nested containers.

    Args:
        copy: clone every tensor; without it only those that are part of a larger one, which would be written to a file too.
    """
    if isinstance(value, Tensor):
        tensor = value.detach()
        whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        return tensor.clone() if copy or not whole else tensor
    if isinstance(value, dict):
        return {k: plain(v, copy) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v, copy) for v in value)
    return value.item() if isinstance(value, np.generic) else value


def _pack(value: object, copy: bool) -> Any:
    """What ``torch.load(weights_only=True)`` accepts, marked by its kind if it is no scalar or tensor; or ``_SKIP``."""
    if value is None or isinstance(value, (bool, int, float, str, np.generic, Tensor)):
        return plain(value, copy)
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())} if value.dtype.kind in "biuf" else _SKIP
    if isinstance(value, (list, tuple)):
        items = [_pack(v, copy) for v in value]
        return _SKIP if any(i is _SKIP for i in items) else {type(value).__name__: items}
    if type(value) is dict:
        pairs = [[_pack(k, copy), _pack(v, copy)] for k, v in value.items()]
        return _SKIP if any(i is _SKIP for pair in pairs for i in pair) else {"dict": pairs}
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        found = plain(value.state_dict(), copy)
        return {"state": found} if found else _SKIP
    return _SKIP


def _unpack(packed: object, on: torch.device | None) -> Any:
    if not isinstance(packed, dict):
        return packed.to(on or packed.device, copy=True) if isinstance(packed, Tensor) else packed
    ((kind, content),) = packed.items()
    if kind == "array":
        return content.numpy().copy()
    if kind == "dict":
        return {_unpack(k, on): _unpack(v, on) for k, v in content}
    items = [_unpack(v, on) for v in content]
    return tuple(items) if kind == "tuple" else items


def capture_object(obj: object, copy: bool = False) -> dict[str, Any]:
    """The attributes of one object that are state, by name; tensors are those of the object, or clones."""
    left_out = _left_out(obj)
    packed = {k: _pack(v, copy) for k, v in vars(obj).items() if k not in left_out}
    return {k: v for k, v in packed.items() if v is not _SKIP}


def _is_object(packed: object) -> bool:
    return isinstance(packed, dict) and "state" in packed


def _may_set(obj: object, name: str, packed: object) -> bool:
    """Whether a file may set an attribute: one that :func:`capture_object` takes, to a value of the same kind, so that no file
    puts other paths, settings or methods in place."""
    of_class = getattr(type(obj), name, None)
    if name in _left_out(obj) or name.startswith("__") or callable(of_class) or isinstance(of_class, property):
        return False
    now = _pack(vars(obj).get(name), copy=False)
    if now is _SKIP or _is_object(now) != _is_object(packed):
        return False
    if now is None or packed is None:
        return True
    if isinstance(now, (bool, int, float)):
        return isinstance(packed, (bool, int, float))
    return isinstance(packed, Tensor) if isinstance(now, Tensor) else type(now) is type(packed)


def restore_object(obj: object, state: dict[str, Any], on: torch.device | None = None) -> None:
    """Undo :func:`capture_object`; state that has come into being since is deleted, and what is no state is refused. Tensors go
    ``on`` a device, unless the attribute is a tensor elsewhere; None: they stay where they are."""
    for name, packed in state.items():
        if not _may_set(obj, name, packed):
            raise InputError(f"it would set {type(obj).__name__}.{name}")
        if _is_object(packed):
            getattr(obj, name).load_state_dict(packed["state"])
        else:
            now = vars(obj).get(name)
            setattr(obj, name, _unpack(packed, now.device if on and isinstance(now, Tensor) else on))
    for name in capture_object(obj).keys() - state.keys():
        delattr(obj, name)


def capture(algorithm: Host, copy: bool = False) -> dict[str, Any]:
    """The state of USB's classes: of the algorithm, and of its hooks by their names."""
    hooks = {name: capture_object(hook, copy) for name, hook in algorithm.hooks_dict.items()}
    return {"algorithm": capture_object(algorithm, copy), "hooks": hooks}


def restore(algorithm: Host, state: dict[str, Any], on: torch.device | None = None) -> None:
    """Undo :func:`capture`, of an algorithm of the same class and sizes; see :func:`restore_object`."""
    restore_object(algorithm, state["algorithm"], on)
    for name, hook in algorithm.hooks_dict.items():
        if name in state["hooks"]:
            restore_object(hook, state["hooks"][name], on)


@contextlib.contextmanager
def undone(algorithm: Host) -> Iterator[None]:
    """Undo at the end what a ``train_step`` without the optimiser's update changes, bit for bit: the state of USB's classes,
    batch statistics and random generators.

    Raises:
        InputError: it has changed weights, which are not copied.
    """
    nets = algorithm.nets.values()
    versions = [(p, p._version) for net in nets for p in net.parameters()]  # PyTorch counts changes in place
    buffers = [{name: b.clone() for name, b in net.named_buffers()} for net in nets]
    before, generators = capture(algorithm, copy=True), capture_random(algorithm.device)
    yield
    if any(p._version != version for p, version in versions):
        raise InputError(
            f"algorithm: train_step of {algorithm.usb_name} changes the net's weights itself, which MUSCLE cannot undo"
            " after its trial step; leave that to the optimiser"
        )
    with torch.no_grad():
        for net, kept in zip(nets, buffers, strict=True):
            for name, b in net.named_buffers():
                b.copy_(kept[name])
    restore(algorithm, before)
    restore_random(generators, algorithm.device)


def capture_random(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and PyTorch's global generators, and of the GPU ``device``."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": _pack(random.getstate(), copy=False),
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, float(gauss)],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda" and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random(state: dict[str, Any], device: torch.device) -> None:
    """Undo :func:`capture_random`, which may have been on another device."""
    random.setstate(_unpack(state["python"], None))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and device.type == "cuda" and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)

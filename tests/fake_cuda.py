"""A simulated GPU: tensors that say ``cuda:0`` and whose values the CPU computes; and what would wait for it.

Such a tensor is a ``FakeTensor`` of PyTorch's: for autograd, autocast and modules it is on the GPU, of a shape and without
data. Here it has a ``value`` too, of the CPU's kernels, so that a program goes the way it would go on a GPU, to its end: with
its losses, gradients and decisions. Tensors of the CPU stay as they are. What a GPU would refuse, operands on two devices, is
an error; what the program would wait for is counted, since PyTorch's own count (``torch.cuda.set_sync_debug_mode``) needs a
driver. It is there for the thread that entered it alone; others, such as one that draws ahead, work on the CPU.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.cuda._utils import _get_device_index
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten
#: The oldest PyTorch with which this was seen to work.
OLDEST = (2, 14)
#: Whose lines are named as the place of a wait; ``nosync`` only passes on what it is asked.
PACKAGES = ("muscle_plugin/", "semilearn/", "pytorch_metric_learning/")
NO_PLACE = "muscle_plugin/usb/calls.py"
MASKS = (torch.bool, torch.uint8)
#: Operations besides pointwise ones that take a scalar (a tensor without dimensions) from the CPU's memory.
TAKE_SCALARS = {"where", "fill_", "fill", "masked_fill", "masked_fill_", "_fused_sgd_", "_fused_adamw_"}
CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)
SOFTMAX = (aten._softmax.default, aten._log_softmax.default)
SOFTMAX_BACKWARD = (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default)


class MixedDevicesError(RuntimeError):
    """An operation whose operands are on two devices, as a GPU would refuse it."""


class Wait(NamedTuple):
    """What waits, and in which file and function of one of ``PACKAGES``."""

    what: str
    where: str


class FakeCuda(TorchDispatchMode):
    """``with`` it the machine has a GPU.

    Attributes:
        waits: how often the program would have waited for it, and for what.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[Wait] = Counter()
        self._saved: dict[int, Tensor] = {}  # address -> value that went into a file
        self._places = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> FakeCuda:
        # at its first use in a process autograd's engine starts a thread per device that it finds, and with threads a process
        # cannot fork: other tests do
        torch.ones(1, requires_grad=True).sum().backward()
        self._open = contextlib.ExitStack()
        for stand_in in (self._places, *_stand_ins(self)):
            self._open.enter_context(stand_in)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._open.close()

    def wait(self, what: str) -> None:
        """Count one."""
        self.waits[Wait(what, _place())] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].device
        tensors = [x for x in _flat([args, [*kwargs.values()]]) if isinstance(x, Tensor)]
        here = [x for x in tensors if not isinstance(x, FakeTensor)]
        target = kwargs.get("device")
        if len(here) == len(tensors) and (target is None or target.type != "cuda"):
            return _computed(func, args, kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("_to_copy", "copy_", "_foreach_copy_"):
            return self._copy(func, name, args, kwargs)
        self._refuse_what_a_gpu_refuses(func, name, args, kwargs, here)
        by_values = torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None
        if _is_indexing(name, args):
            by_values = self._indexed(name, args)
        elif by_values or torch.Tag.data_dependent_output in func.tags:
            self.wait("item" if name == "_local_scalar_dense" else name)
        value = _computed(func, args, kwargs)
        if by_values or torch.Tag.data_dependent_output in func.tags:
            return _mapped(self._claimed, value)
        shapes = torch.Tag.inplace_view in func.tags or "out" in kwargs
        if name.endswith("_") and not shapes:
            return args[0] if func._schema.returns else None
        if not (func.is_view or shapes) or func is aten.detach.default:
            return _mapped(self._claimed, value)
        claimed = func(*args, **kwargs)  # FakeTensorMode knows what is whose view
        for x, v in zip(_flat([claimed]), _flat([value]), strict=True):
            x.value = v
        return claimed

    def _claimed(self, value: Any) -> Any:
        """A tensor of the GPU that has this value."""
        if not isinstance(value, Tensor):
            return value
        with unset_fake_temporarily():
            shape = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        claimed = FakeTensor(self._places, shape, CUDA)
        claimed.value = value
        return claimed

    def _copy(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Copies between the memories; both ways wait unless they are to the GPU and ``non_blocking``."""
        soon = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
        if name == "_to_copy":
            source, target = args[0], kwargs.get("device") or args[0].device
            to_cpu, to_gpu = target.type == "cpu", not isinstance(source, FakeTensor)
        else:
            targets, sources = [*_flat([args[0]])], [*_flat([args[1]])]
            pairs = [*zip(targets, sources, strict=True)]
            to_cpu = any(isinstance(s, FakeTensor) and not isinstance(t, FakeTensor) for t, s in pairs)
            to_gpu = any(isinstance(t, FakeTensor) and not isinstance(s, FakeTensor) for t, s in pairs)
        if to_cpu:
            self.wait("copy to the CPU")
        elif to_gpu and not soon:
            self.wait("copy to the device")
        value = _computed(func, args, kwargs)
        if name != "_to_copy":
            return args[0] if name == "copy_" else None
        return value if to_cpu else self._claimed(value)

    def _indexed(self, name: str, args: Any) -> bool:
        """Counts what an indexing waits for; whether its result's size hangs on values."""
        into, indices = args[0], [i for i in args[1] if i is not None]
        if not isinstance(into, FakeTensor):
            raise MixedDevicesError(f"{name}: an index on cuda:0, of a tensor on the CPU")
        by_mask = any(i.dtype in MASKS for i in indices)
        if any(not isinstance(i, FakeTensor) for i in indices):
            self.wait("copy of an index to the device")
        if "put" not in name:
            if by_mask:
                self.wait("index by a mask")
            return by_mask
        number = args[2].dim() == 0 and not isinstance(args[2], FakeTensor)
        accumulate = len(args) > 3 and args[3]
        if by_mask and not (number and len(indices) == 1 and not accumulate):  # else it is a masked_fill
            self.wait("put by a mask")
        elif number and not by_mask:
            self.wait("copy of a number to the device")
        return False

    def _refuse_what_a_gpu_refuses(self, func: Any, name: str, args: Any, kwargs: Any, here: list[Tensor]) -> None:
        if isinstance(kwargs.get("generator"), torch.Generator):
            raise MixedDevicesError(f"{name}: a generator of the CPU draws nothing on cuda:0")
        if _is_indexing(name, args):
            here = [x for x in here if x is not args[0] and not any(x is i for i in args[1])]
        scalars = torch.Tag.pointwise in func.tags or name in TAKE_SCALARS or name.startswith(("_foreach", "index_put"))
        for x in here:
            if x.dim() or not scalars:
                raise MixedDevicesError(f"{name}: operands on cuda:0, and one of shape {tuple(x.shape)} on the CPU")


def _is_indexing(name: str, args: Any) -> bool:
    return name.startswith(("index", "_index", "_unsafe_index")) and isinstance(args[1], (list, tuple))


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    for v in values:
        if isinstance(v, (list, tuple)):
            yield from _flat(v)
        else:
            yield v


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(function, v) for v in value])
    return function(value)


def _value(x: Any) -> Any:
    if isinstance(x, FakeTensor):
        return x.value
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation gives on the CPU."""
    args, kwargs = _mapped(_value, args), {k: _mapped(_value, v) for k, v in kwargs.items()}
    with unset_fake_temporarily():
        if func in CONVOLUTIONS and args[0].dtype == torch.float16:  # a CPU takes a hundred times as long as in float32
            wide = _mapped(lambda x: x.float() if isinstance(x, Tensor) else x, args)
            return _mapped(lambda x: x.half() if isinstance(x, Tensor) else x, func(*wide, **kwargs))
        # of half-precision numbers a GPU takes the soft-max in float32 in one go, a CPU in two
        if func in SOFTMAX and args[2]:
            return func(args[0].float(), args[1], False)
        if func in SOFTMAX_BACKWARD and args[3] != args[0].dtype:
            return func(*args[:3], args[0].dtype).to(args[3])
        return func(*args, **kwargs)


def _place() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        for package in PACKAGES:
            if package in path and not path.endswith(NO_PLACE) and not name.startswith("<"):  # of a comprehension
                return f"{package}{path.rpartition(package)[2]} {name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "elsewhere"


# --------------------------------------------------------------------------------------------------------- stand-ins


def _stand_ins(gpu: FakeCuda) -> Iterator[contextlib.AbstractContextManager[Any]]:
    """For what asks the driver: PyTorch's, and of ``FakeTensor`` what it cannot do without one."""
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "_lazy_init": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "get_device_name": "no GPU",
        "is_bf16_supported": True, "mem_get_info": (2**33, 2**33), "manual_seed_all": None,
    }  # fmt: skip
    stand_ins: list[tuple[Any, str, Any]] = [
        *((torch.cuda, name, lambda *_, answer=answer, **__: answer) for name, answer in answers.items()),
        (torch.cuda, "Event", mock.MagicMock()),
        (torch.cuda, "set_device", lambda device: _get_device_index(device) and None),  # refuses one without a number
        (torch.cuda, "synchronize", lambda _=None: gpu.wait("synchronize")),
        (torch.cuda, "get_rng_state", lambda _=None: torch.get_rng_state()),
        (torch.cuda, "set_rng_state", lambda state, _=None: torch.set_rng_state(state)),
        (fake_tensor, "init_gpu_context", lambda _: None),
        (Tensor, "pin_memory", lambda self, *_: self),
        (torch, "empty", lambda *size, pin_memory=False, empty=torch.empty, **options: empty(*size, **options)),
        (Tensor, "backward", _backward),
        (nn.Module, "_apply", _apply),
        (FakeTensor, "data", property(Tensor.data.__get__, _set_data)),
        (FakeTensor, "tolist", lambda self: self.cpu().tolist()),
        *_files(gpu),
    ]
    for owner, name, stand_in in stand_ins:
        yield mock.patch.object(owner, name, stand_in, create=owner is FakeTensor)
    yield torch.backends.cudnn.flags(enabled=False)  # a CPU has PyTorch's own batch norm, not cuDNN's


def _files(gpu: FakeCuda) -> list[tuple[Any, str, Any]]:
    """``torch.save`` and ``torch.load``: what was on the GPU is in the file as a value, marked with its device."""
    tag, load, moved = torch.serialization.location_tag, torch.load, set()

    def save(self: FakeTensor, protocol: Any) -> Any:
        gpu._saved[self.value.untyped_storage().data_ptr()] = self.value
        return self.value.__reduce_ex__(protocol)

    def tagged(storage: Any) -> str:
        return "cuda:0" if storage.data_ptr() in gpu._saved else tag(storage)

    def to_gpu(self: Any, *_: Any) -> Any:
        moved.add(self.data_ptr())
        return self

    def claimed(x: Any) -> Any:
        if isinstance(x, dict):
            return {k: claimed(v) for k, v in x.items()}
        if isinstance(x, (list, tuple)):
            return type(x)(map(claimed, x))
        there = isinstance(x, Tensor) and x.numel() and x.untyped_storage().data_ptr() in moved
        return gpu._claimed(x) if there else x

    def loaded(*args: Any, **kwargs: Any) -> Any:
        moved.clear()
        with unset_fake_temporarily():
            found = load(*args, **kwargs)
        return claimed(found)

    return [
        (FakeTensor, "__reduce_ex__", save),
        (torch.serialization, "location_tag", tagged),
        (torch.UntypedStorage, "cuda", to_gpu),
        (torch, "load", loaded),
    ]


def _set_data(self: FakeTensor, new: FakeTensor) -> None:
    Tensor.data.__set__(self, new)
    self.value = new.value


def _apply(self: nn.Module, function: Any, recurse: bool = True) -> nn.Module:
    """``Module._apply``, which goes another way with a ``FakeTensor`` than with a tensor of a GPU. A parameter that comes from
    the CPU is a new object."""
    for module in self.modules():
        for name, t in module._parameters.items():
            if t is not None:
                with torch.no_grad():
                    new = function(t)
                if isinstance(t, FakeTensor) == isinstance(new, FakeTensor):
                    t.data = new
                else:
                    module._parameters[name] = nn.Parameter(new, t.requires_grad)
        for name, t in module._buffers.items():
            module._buffers[name] = None if t is None else function(t)
    return self


@torch.no_grad()
def _backward(self: Tensor, *_: Any) -> None:
    """Autograd's engine, whose thread for a GPU needs a driver: the nodes one after the other, later ones first."""
    waiting: list[tuple[float, int, Any]] = []
    gradients: dict[Any, dict[int, Tensor]] = {}
    order = count()

    def give(node: Any, output: int, gradient: Tensor) -> None:
        expected = node._input_metadata[output]
        if gradient.device != expected.device:
            raise MixedDevicesError(f"{node.name()}: a gradient on {gradient.device}, of a tensor on {expected.device}")
        gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
        if node not in gradients:
            gradients[node] = {}
            leaf = hasattr(node, "variable")
            heapq.heappush(waiting, (float("-inf") if leaf else -node._sequence_nr(), next(order), node))
        known = gradients[node].get(output)
        gradients[node][output] = gradient if known is None else known + gradient

    if self.grad_fn is not None:
        give(self.grad_fn, self.output_nr, torch.ones_like(self))
    while waiting:
        node = heapq.heappop(waiting)[-1]
        given = gradients.pop(node)
        if hasattr(node, "variable"):
            leaf, gradient = node.variable, given[0].detach().clone()
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            continue
        found = node(*(given.get(i) for i in range(len(node._input_metadata))))
        for (following, output), gradient in zip(
            node.next_functions, found if isinstance(found, tuple) else (found,), strict=True
        ):
            if following is not None and gradient is not None:
                give(following, output, gradient)

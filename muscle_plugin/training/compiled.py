"""``--compile``: the net's forward pass by ``torch.compile``, everything around it as it is."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.errors import CompileError
from muscle_plugin.text import out_of_memory

#: Modes that record CUDA graphs, whose outputs live until the next step begins.
WITH_GRAPHS = ("reduce-overhead",)


def _reason(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class CompiledForward:
    """Stands in for ``net.forward``: compiled while the net trains, as written while it evaluates.

    As an attribute of the instance it is inside of ``net.__call__``: hooks on the net (MUSCLE's tap) and USB's
    batch-norm controller stay outside of what is compiled, and the names of parameters are what they were. A compiled graph
    serves one batch size; the second size that comes along gives one for any size. A copy of the net has its own.
    """

    def __init__(self, net: nn.Module, mode: str) -> None:
        self.net, self.mode = net, mode
        self.as_written = type(net).forward.__get__(net)
        self.compiled = torch.compile(self.as_written, mode=mode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.net.training:
            return self.as_written(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as e:
            if out_of_memory(e):
                raise
            raise CompileError(
                f"compile: {type(self.net).__name__} cannot be compiled ({_reason(e)}); use --compile no"
            ) from e

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(memo[id(self.net)], self.mode)


def compile_net(net: nn.Module, mode: str) -> None:
    """Compile the forward pass of a net, at its first call; modes are those of ``torch.compile``, or ``no``."""
    if mode != "no":
        net.forward = CompiledForward(net, mode)


def check_compiler(mode: str, device: torch.device) -> None:
    """Find out, on a function of a line, whether anything can be compiled.

    Raises:
        CompileError: it cannot; with what is missing.
    """
    if mode == "no":
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it warns that there is no GPU

    def line(x: Tensor) -> Tensor:
        return x.sin() + 1

    try:
        torch.compile(line, mode=mode)(torch.zeros(8, device=device))
    except Exception as e:  # whatever a compiler, or its absence, brings up
        if out_of_memory(e):
            raise
        if device.type == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++")):
            raise CompileError("compile: needs a C++ compiler such as g++, which is not here; use --compile no") from e
        what = "Triton and a C compiler" if device.type == "cuda" else "a C++ compiler that works"
        raise CompileError(f"compile: needs {what} ({_reason(e)}); use --compile no") from e


def begin_step(mode: str) -> None:
    """Say that the outputs of the last step are no longer wanted, and those of this one all are, until the next: a step
    calls the net several times, and what an earlier call gave is still needed after a later one."""
    if mode in WITH_GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()

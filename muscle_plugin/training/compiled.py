"""``--compile``: the net's forward pass by ``torch.compile``, everything around it as it is."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from muscle_plugin.errors import CompileError
from muscle_plugin.text import first_line, out_of_memory

#: Modes that record CUDA graphs, whose outputs live until the next step begins.
WITH_GRAPHS = ("reduce-overhead",)


class CompiledForward:
    """Stands in for ``net.forward``: compiled while the net trains, as written while it evaluates.

    As an attribute of the instance it is inside ``net.__call__``: hooks on the net (MUSCLE's forward capture) and USB's
    batch-norm controller stay outside the compiled part, and parameters keep their names. A compiled graph serves one batch
    size; the second size compiles one for any size. A copy of the net has its own.
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
                f"compile: {type(self.net).__name__} cannot be compiled ({type(e).__name__}: {first_line(e)}); use --compile no"
            ) from e

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(memo[id(self.net)], self.mode)


def compile_net(net: nn.Module, mode: str) -> None:
    """Compile the forward pass of a net, at its first call; modes are those of ``torch.compile``, or ``no``."""
    if mode != "no":
        net.forward = CompiledForward(net, mode)


def check_compiler(mode: str, device: torch.device) -> None:
    """Try to compile a function of one line.

    Raises:
        CompileError: nothing can be compiled here; the message says what is missing.
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
        raise CompileError(f"compile: needs {what} ({type(e).__name__}: {first_line(e)}); use --compile no") from e


def begin_step(mode: str) -> None:
    """Release the outputs of the last step, and keep those of this one until the next: a step calls the net several times,
    and still needs what an earlier call returned after a later one."""
    if mode in WITH_GRAPHS:
        torch.compiler.cudagraph_mark_step_begin()

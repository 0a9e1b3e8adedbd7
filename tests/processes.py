"""Processes that know each other, as under ``torchrun``; forked, which spares each of them the seconds of its imports."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def in_processes(world: int, function: Callable[..., Any], *arguments: Any, join: bool = True) -> None:
    """Call ``function(rank, world, *arguments)`` in ``world`` processes with the environment that ``torchrun`` gives.

    Args:
        join: whether they know each other when it is called, or that is left to the function.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _begin, (world, port, function, arguments, join), nprocs=world, start_method="fork"
    )


def _begin(rank: int, world: int, port: int, function: Callable[..., Any], arguments: Any, join: bool) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({k: str(v) for k, v in here.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if not join:
        function(rank, world, *arguments)
        return
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(rank, world, *arguments)
    finally:
        torch.distributed.destroy_process_group()

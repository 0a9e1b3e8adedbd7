# mypy: disable-error-code="empty-body"
"""Types where the training loop meets others: USB's base class below it, the run's log and files above it."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from muscle_plugin.nets.build import NetBuilder
from muscle_plugin.usb.names import Hook, SSL_Argument

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from muscle_plugin.training.hooks import EMA
    from muscle_plugin.training.host import Host

#: A step's results by name: USB's ``out_dict`` and ``log_dict``.
StepOutput = tuple[dict[str, Any], dict[str, Any]]


class TensorBoardLog(Protocol):
    def update(self, tb_dict: dict[str, float], it: int) -> object: ...


class Recorder(Protocol):
    """Keeps what a run measures: the values of each log step, warnings, and a summary of the run so far."""

    def record(self, algorithm: Host, values: dict[str, float]) -> None: ...
    def flush(self) -> None: ...
    def warn(self, text: str) -> None: ...
    def write_result(self, algorithm: Host) -> dict[str, Any]: ...


class BatchNormController(Protocol):
    """USB's ``Bn_Controller``: between the two calls a net's running statistics stay as they are."""

    def freeze_bn(self, model: nn.Module) -> None: ...
    def unfreeze_bn(self, model: nn.Module) -> None: ...


class USBAlgorithm:
    """What this package uses of USB's ``AlgorithmBase``: its stand-in for type checkers."""

    args: Namespace
    num_classes: int
    num_train_iter: int
    num_iter_per_epoch: int
    num_eval_iter: int
    num_log_iter: int
    epochs: int
    epoch: int
    start_epoch: int
    it: int
    best_it: int
    best_eval_acc: float
    ema_m: float
    clip_grad: float
    net_builder: NetBuilder | None
    model: nn.Module
    ema_model: nn.Module
    ema: EMA | None
    bn_controller: BatchNormController
    optimizer: Optimizer
    scheduler: LRScheduler | None
    loss_scaler: GradScaler
    amp_cm: Callable[[], AbstractContextManager[Any]]
    loader_dict: dict[str, Any]
    hooks_dict: dict[str, Hook]
    out_dict: dict[str, Any]
    log_dict: dict[str, Any]
    results_dict: dict[str, float]
    tb_log: TensorBoardLog | None
    print_fn: Callable[[str], object]

    def __init__(
        self, args: Namespace, net_builder: NetBuilder | None, tb_log: TensorBoardLog | None = None,
        logger: logging.Logger | None = None, **kwargs: Any,
    ) -> None: ...  # fmt: skip
    def set_model(self) -> nn.Module: ...
    def set_ema_model(self) -> nn.Module: ...
    def set_optimizer(self) -> tuple[Optimizer, LRScheduler | None]: ...
    def set_hooks(self) -> None: ...
    def register_hook(self, hook: Hook, name: str | None = None, priority: str | int = "NORMAL") -> None: ...
    def call_hook(self, fn_name: str, hook_name: str | None = None) -> None: ...
    def process_batch(self, input_args: Sequence[str] | None = None, **batch: Tensor) -> dict[str, Tensor]: ...
    def train_step(self, **batch: Tensor) -> StepOutput: ...
    @staticmethod
    def get_argument() -> list[SSL_Argument]: ...

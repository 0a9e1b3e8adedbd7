"""Checkpoints of a run: what they hold, and how a run goes on from one.

A checkpoint is plain data, which ``torch.load(weights_only=True)`` reads. USB's keys (``model``, ``ema_model``, ``it``, ...)
are at the top, what USB's classes keep in attributes is under ``algorithm`` and ``hooks`` (see ``state.py``), and everything
else that an exact continuation needs has a name of its own in :class:`Checkpoint`.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import BaseModel, ConfigDict, FiniteFloat, NonNegativeInt, ValidationError
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.errors import InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.run_files import CHECKPOINT_FORMAT, refuse_newer
from muscle_plugin.seeding import derive, seed_everything
from muscle_plugin.settings.schema import MACHINE, PLACE, MuscleSettings, RunSettings, affecting
from muscle_plugin.text import first_line, out_of_memory, shown
from muscle_plugin.training import state
from muscle_plugin.training.hooks import HostLoggingHook
from muscle_plugin.training.monitor import MonitorState
from muscle_plugin.training.optimiser import keep_how
from muscle_plugin.usb.calls import usb_calls_on

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


class _Plain(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class ProcessState(_Plain):
    """What each process has for itself: its generators, and the sums since the last log line."""

    random: dict[str, Any]
    sums: dict[str, float | Tensor]


class Checkpoint(_Plain):
    """The content of a checkpoint's file.

    Attributes:
        images: what a net must be told of the images it was trained on, to be used on others.
        settings: those on which a result depends.
        it: training steps done.
        best_it: the step of the best evaluation, counted from 0.
        evaluations: every top-1 accuracy so far.
        train_seconds: without evaluations and checkpoints.
        log_steps, log_without: see :class:`muscle_plugin.training.hooks.HostLoggingHook`.
        algorithm, hooks: the state that USB's classes keep in attributes.
    """

    format: int
    algorithm_name: str
    num_classes: int
    net: str
    net_from_name: bool
    images: dict[str, Any]
    settings: dict[str, Any]
    it: NonNegativeInt
    epoch: NonNegativeInt
    best_it: NonNegativeInt
    best_eval_acc: FiniteFloat
    model: dict[str, Tensor]
    ema_model: dict[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    loss_scaler: dict[str, Any]
    evaluations: list[FiniteFloat]
    last_metrics: dict[str, float]
    train_seconds: FiniteFloat
    log_steps: NonNegativeInt
    log_without: dict[str, int]
    monitor: MonitorState
    algorithm: dict[str, Any]
    hooks: dict[str, dict[str, Any]]
    processes: list[ProcessState]


# ---------------------------------------------------------------------------------------------------------------- writing


def collect(host: Host) -> dict[str, Any] | None:
    """The content of a checkpoint, by the names of :class:`Checkpoint`; None in processes other than the first. Tensors are
    those of the run itself: write them before the next step."""
    logging = _logging_hook(host)
    sums = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in logging.sums.items()}
    processes = distributed.gather_objects({"random": state.capture_random(host.device), "sums": sums})
    if host.args.rank:
        return None
    return {
        "format": CHECKPOINT_FORMAT,
        **_identity(host),
        "images": _about_images(host),
        "settings": host.compared_settings,
        "it": host.it,
        "epoch": host.epoch,
        "best_it": host.best_it,
        "best_eval_acc": float(host.best_eval_acc),
        **{k: state.plain(getattr(host, k).state_dict()) for k in ("model", "ema_model", "optimizer", "loss_scaler")},
        "scheduler": None if host.scheduler is None else state.plain(host.scheduler.state_dict()),
        "evaluations": list(host.evaluations),
        "last_metrics": dict(host.last_metrics),
        "train_seconds": host.seconds(),
        "log_steps": logging.steps,
        "log_without": dict(logging.without),
        "monitor": host.monitor.state_dict(),
        **state.capture(host),
        "processes": processes,
    }


def check_alike(host: Host) -> None:
    """Raises RuntimeError if the processes hold different weights."""
    if host.args.world_size == 1:
        return
    nets = (host.model, host.ema_model)
    sums = torch.stack([p.detach().double().abs().sum() for net in nets for p in net.parameters()])
    if len(set(distributed.gather_objects(str(sums.tolist())))) > 1:
        raise RuntimeError(f"the processes hold different weights after step {host.it}; the last checkpoint is older")


def settings_to_compare(host: Host) -> dict[str, Any]:
    """The settings on which a result depends, as plain values."""
    fields = {*RunSettings.model_fields, *MuscleSettings.model_fields}
    names = {*fields, *(a.name.lstrip("-") for a in host.get_argument())} - affecting(MACHINE, PLACE) - {"amp"}
    values = {n: getattr(host.args, n) for n in sorted(names) if hasattr(host.args, n)}
    values["precision"] = host.precision  # what auto has become, on another device something else; amp says no more
    values["uratio"] = float(values["uratio"])
    simple = (bool, int, float, str, type(None))
    return {n: v if isinstance(v, simple) else repr(v) for n, v in values.items()}


def _logging_hook(host: Host) -> HostLoggingHook:
    hook = host.hooks_dict["LoggingHook"]
    assert isinstance(hook, HostLoggingHook)
    return hook


def _identity(host: Host) -> dict[str, Any]:
    return {
        "algorithm_name": host.args.algorithm,
        "num_classes": host.num_classes,
        "net": host.args.net,
        "net_from_name": bool(host.args.net_from_name),
    }


def _about_images(host: Host) -> dict[str, Any]:
    mean, std = host.batches.statistics
    return {
        "dataset": host.args.dataset,
        "classes": list(host.source.classes),
        "img_size": int(host.args.img_size),
        "channels": host.batches.channels,
        "net_options": host.net_options,
        "mean": mean.tolist(),
        "std": std.tolist(),
    }


# ---------------------------------------------------------------------------------------------------------------- reading


def read(host: Host, path: Path, content: bytes | None = None) -> Checkpoint:
    """A checkpoint of the same algorithm, net, images and settings.

    Args:
        content: of the file, if it has been read already.

    Raises:
        InputError: it is none.
    """
    found = load_tensors(path, host.device, content)
    refuse_newer(found, path)
    if found.get("format") != CHECKPOINT_FORMAT:
        raise InputError(f"{path}: not a checkpoint of this package (format {shown(repr(found.get('format')))})")
    try:
        checkpoint = Checkpoint.model_validate(found)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False, include_input=False)[0]
        where = shown(".".join(map(str, first["loc"])))
        raise InputError(f"{path}: not a whole checkpoint: {where}: {shown(first['msg'])}") from None
    images = {k: v for k, v in _about_images(host).items() if k not in ("mean", "std")}
    known = {*_identity(host), *images, "algorithm"}
    differing = [
        *_differences(found, _identity(host)),
        *_differences(checkpoint.images, images),
        *_differences(checkpoint.settings, {k: v for k, v in host.compared_settings.items() if k not in known}),
    ]
    if differing := differing or _other_weights(checkpoint.model, host.model.state_dict()):
        raise InputError(f"{path}: a checkpoint of another run: {'; '.join(differing)}")
    return checkpoint


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The entries that both have and on which they disagree."""
    return [f"{k} {shown(repr(there[k]))}, here {v!r}" for k, v in here.items() if k in there and there[k] != v]


def _other_weights(saved: Mapping[str, Tensor], own: Mapping[str, Tensor], most: int = 3) -> list[str]:
    """Differing names and shapes; at most ``most`` of them, and the number of the others."""
    there, here = ({k: tuple(t.shape) for k, t in w.items()} for w in (saved, own))
    found = [
        f"{shown(k)} {there.get(k, 'absent')}, here {here.get(k, 'absent')}"
        for k in {**there, **here}
        if there.get(k) != here.get(k)
    ]
    return found[:most] + ([f"{len(found) - most} more of the net's tensors"] if len(found) > most else [])


# --------------------------------------------------------------------------------------------------------------- going on


def restore(host: Host, checkpoint: Checkpoint, path: str | Path) -> None:
    """Bring a run into the state of a checkpoint that :func:`read` gave.

    Raises:
        InputError: it does not fit.
    """
    if checkpoint.it > host.num_train_iter or checkpoint.epoch > host.epochs:
        reached = f"step {checkpoint.it} of {host.num_train_iter}, epoch {checkpoint.epoch} of {host.epochs}"
        raise InputError(f"{path}: does not fit this run ({reached})")
    try:
        with usb_calls_on(host.device):
            _restore(host, checkpoint)
    except Exception as e:  # whatever the loaders of PyTorch, NumPy and others raise at a state that is not theirs
        if out_of_memory(e):
            raise
        why = first_line(e) if isinstance(e, InputError) else f"{type(e).__name__}: {first_line(e)}"
        raise InputError(f"{path}: does not fit this run ({why})") from e
    host.monitor.saved = checkpoint.it


def _restore(host: Host, checkpoint: Checkpoint) -> None:
    # tensors that a run on a CPU has made go where this run is; those of a GPU have been loaded there
    on = host.device if all(t.is_cpu for t in checkpoint.model.values()) else None
    state.restore(host, {"algorithm": checkpoint.algorithm, "hooks": checkpoint.hooks}, on)
    host.model.load_state_dict(checkpoint.model)
    host.ema_model.load_state_dict(checkpoint.ema_model)
    optimizer, scheduler, scaler = checkpoint.optimizer, checkpoint.scheduler, checkpoint.loss_scaler
    keep_how(optimizer, host.optimizer)
    for saved, group in zip(optimizer["param_groups"], host.optimizer.param_groups, strict=True):
        _check_kinds(saved, group)
    host.optimizer.load_state_dict(optimizer)
    _check_kinds(scaler, host.loss_scaler.state_dict())
    host.loss_scaler.load_state_dict(scaler)
    if scheduler is not None and host.scheduler is not None:
        own = host.scheduler.state_dict()
        _check_kinds(scheduler, own)
        # PyTorch would make an attribute of every key
        host.scheduler.load_state_dict({k: v for k, v in scheduler.items() if k in own})
    host.it, host.epoch, host.start_epoch = checkpoint.it, checkpoint.epoch, checkpoint.epoch
    host.best_it, host.best_eval_acc = checkpoint.best_it, checkpoint.best_eval_acc
    host.evaluations, host.last_metrics = checkpoint.evaluations, checkpoint.last_metrics
    host.clock.counted = checkpoint.train_seconds
    host.monitor.load_state_dict(checkpoint.monitor)
    logging = _logging_hook(host)
    logging.steps, logging.without = checkpoint.log_steps, checkpoint.log_without
    logging.sums = _restore_process(checkpoint.processes, host.args, checkpoint.it, host.device)


def _check_kinds(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises InputError if values of the same name are not of the same kind; another version of PyTorch has other names."""
    numbers = (int, float)
    for name in saved.keys() & own.keys():
        kinds = numbers if isinstance(own[name], numbers) else type(own[name])
        if not isinstance(saved[name], kinds):
            raise InputError(f"{name} is of another kind")


def _restore_process(
    processes: list[ProcessState], args: Namespace, step: int, device: torch.device
) -> dict[str, float | Tensor]:
    """Restore this process's generators and return its sums. Where there were not as many processes, generators begin anew
    from the step reached, and the sums are the mean ones."""
    if any(v.numel() != 1 for p in processes for v in p.sums.values() if isinstance(v, Tensor)):
        raise InputError("sums holds more than scalars")
    if len(processes) == args.world_size:
        state.restore_random(processes[args.rank].random, device)
        return processes[args.rank].sums
    if args.rank == 0:
        state.restore_random(processes[0].random, device)
    else:
        seed_everything(derive(args.seed, "process", args.rank, step) % 2**32)
    return {k: sum(p.sums[k] for p in processes) / len(processes) for k in processes[0].sums}

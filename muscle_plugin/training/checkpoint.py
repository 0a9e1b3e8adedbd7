"""Checkpoints of a run: what they hold, and how a run goes on from one.

A checkpoint is plain data, which ``torch.load(weights_only=True)`` reads. USB's keys (``model``, ``ema_model``, ``it``, ...)
are at the top, what USB's classes keep in attributes is under ``algorithm`` and ``hooks`` (see ``state.py``), and everything
else that an exact continuation needs has a name of its own in :class:`Checkpoint`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import FiniteFloat, NonNegativeInt, ValidationError
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.errors import InputError
from muscle_plugin.files import load_tensors
from muscle_plugin.nets.build import options_of
from muscle_plugin.nets.weights import misfit
from muscle_plugin.run_files import CHECKPOINT_FORMAT, refuse_newer
from muscle_plugin.seeding import derive, seed_everything
from muscle_plugin.settings.schema import MACHINE, PLACE, affecting
from muscle_plugin.text import first_line, one_line, out_of_memory, shown
from muscle_plugin.training import state
from muscle_plugin.training.hooks import HostLoggingHook, keep_how
from muscle_plugin.training.monitor import MonitorState
from muscle_plugin.usb.calls import usb_calls_on

if TYPE_CHECKING:
    from muscle_plugin.training.host import Host


class ProcessState(state.StrictModel):
    """What each process has for itself: its generators, and the sums since the last log line."""

    random: dict[str, Any]
    sums: dict[str, float | Tensor]


class Checkpoint(state.StrictModel):
    """The content of a checkpoint's file.

    Attributes:
        images: what a net must be told of the images it was trained on, to be used on others.
        settings: those on which a result depends.
        best_it: the step of the best evaluation, counted from 0.
        backbone: of a run that trains a part of its net, what is frozen (:class:`muscle_plugin.nets.tune.Backbone`); ``model``
            and ``ema_model`` are then without that.
        algorithm, hooks: the state that USB's classes keep in attributes.
    """

    format: int
    algorithm_name: str
    num_classes: int
    net: str
    net_from_name: bool
    images: dict[str, Any]
    settings: dict[str, Any]
    backbone: dict[str, Any] | None = None
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
    log_counts: dict[str, int]
    monitor: MonitorState
    algorithm: dict[str, Any]
    hooks: dict[str, dict[str, Any]]
    processes: list[ProcessState]


def collect(host: Host) -> dict[str, Any] | None:
    """The content of a checkpoint, by the names of :class:`Checkpoint`; None in processes other than the first. Tensors are
    those of the run itself: write them before the next step."""
    logging = _logging_hook(host)
    sums = {k: v.detach().cpu() if isinstance(v, Tensor) else v for k, v in logging.sums.items()}
    processes = distributed.gather_objects({"random": state.capture_random(host.device), "sums": sums})
    if distributed.rank():
        return None
    return {
        "format": CHECKPOINT_FORMAT,
        "algorithm_name": host.settings.algorithm,
        "num_classes": host.num_classes,
        "net": host.settings.net,
        "net_from_name": host.settings.net_from_name,
        "images": _about_images(host),
        "settings": settings_to_compare(host),
        "backbone": None if host.backbone is None else host.backbone.model_dump(),
        "it": host.it,
        "epoch": host.epoch,
        "best_it": host.best_it,
        "best_eval_acc": float(host.best_eval_acc),
        **{k: state.plain(_trained(host, getattr(host, k))) for k in ("model", "ema_model")},
        **{k: state.plain(getattr(host, k).state_dict()) for k in ("optimizer", "loss_scaler")},
        "scheduler": None if host.scheduler is None else state.plain(host.scheduler.state_dict()),
        "evaluations": list(host.evaluations),
        "last_metrics": dict(host.last_metrics),
        "train_seconds": host.clock.seconds(),
        "log_counts": dict(logging.counts),
        "monitor": state.plain(dict(host.monitor.state)),
        **state.capture(host),
        "processes": processes,
    }


def _trained(host: Host, net: nn.Module) -> dict[str, Tensor]:
    """The state of one of the host's nets, without what is frozen of a pretrained backbone."""
    frozen = {n for n, p in host.model.named_parameters() if host.backbone is not None and not p.requires_grad}
    return {n: t for n, t in net.state_dict().items() if n not in frozen}


def check_alike(host: Host) -> None:
    """Raises RuntimeError if the processes hold different weights."""
    if distributed.world_size() == 1:
        return
    sums = torch.stack([p.detach().double().abs().sum() for net in host.nets.values() for p in net.parameters()])
    if len(set(distributed.gather_objects(str(sums.tolist())))) > 1:
        raise RuntimeError(f"the processes hold different weights after step {host.it}; the last checkpoint is older")


def settings_to_compare(host: Host) -> dict[str, Any]:
    """The settings on which a result depends, as plain values; those that the data and the device decide as they are."""
    own = {a.name.lstrip("-") for a in host.get_argument()}  # of a class that only USB's registry knows, in args alone
    values = {
        **{n: v for n, v in vars(host.args).items() if n in own},
        **dict(host.settings),
        "precision": host.precision,
        "num_classes": host.num_classes,
        "num_labels": len(host.split.labelled),
        "num_train_iter": host.num_train_iter,
    }
    simple = (bool, int, float, str, type(None))
    left_out = affecting(MACHINE, PLACE) | {"amp"}  # which says no more than precision
    if host.backbone is not None:  # whose digest says more
        left_out |= {"pretrain_path", "init_from"}
    return {n: v if isinstance(v, simple) else repr(v) for n, v in sorted(values.items()) if n not in left_out}


def _logging_hook(host: Host) -> HostLoggingHook:
    hook = host.hooks_dict["LoggingHook"]
    assert isinstance(hook, HostLoggingHook)
    return hook


def _about_images(host: Host) -> dict[str, Any]:
    mean, std = host.batches.statistics
    return {
        "dataset": host.settings.dataset,
        "classes": list(host.source.classes),
        "img_size": host.settings.img_size,
        "channels": host.batches.channels,
        "grey": host.source.images.shape[1] == 1,
        "net_size": host.settings.net_size,
        "interpolation": host.batches.preprocessing.interpolation,
        "net_options": options_of(host.settings),
        "mean": mean.tolist(),
        "std": std.tolist(),
        "pixel_values": list(host.source.pixel_range or ()) or None,
    }


def read(host: Host, path: Path, content: bytes | None = None) -> Checkpoint:
    """A checkpoint of the same algorithm, net, images and settings, or an InputError; ``content`` is the file's, if it has been
    read already."""
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
    there = checkpoint.images | checkpoint.settings
    here = {k: v for k, v in _about_images(host).items() if k not in ("mean", "std")} | settings_to_compare(host)
    if host.backbone is not None:  # the same file may have got other weights
        name = "SHA-256 of the backbone"
        there[name], here[name] = (checkpoint.backbone or {}).get("digest"), host.backbone.digest
    differing = [f"{k} {shown(repr(there[k]))}, here {v!r}" for k, v in here.items() if k in there and there[k] != v]
    if fault := "; ".join(differing) or one_line(misfit(checkpoint.model, _trained(host, host.model))):
        raise InputError(f"{path}: a checkpoint of another run: {fault}")
    return checkpoint


def restore(host: Host, checkpoint: Checkpoint, path: str | Path) -> None:
    """Bring a run into the state of a checkpoint that :func:`read` gave, or raise an InputError if it does not fit."""
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
    for net, saved in ((host.model, checkpoint.model), (host.ema_model, checkpoint.ema_model)):
        frozen = net.state_dict().keys() - _trained(host, net).keys()
        net.load_state_dict({n: t for n, t in net.state_dict().items() if n in frozen} | saved)
    optimizer, scheduler, scaler = checkpoint.optimizer, checkpoint.scheduler, checkpoint.loss_scaler
    keep_how(optimizer, host.optimizer)
    for theirs, group in zip(optimizer["param_groups"], host.optimizer.param_groups, strict=True):
        _check_kinds(theirs, group)
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
    host.monitor.load(checkpoint.monitor)
    logging = _logging_hook(host)
    logging.sums, logging.counts = _restore_process(host, checkpoint), Counter(checkpoint.log_counts)


def _check_kinds(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises InputError if values of the same name are not of the same kind; another version of PyTorch has other names."""
    for name in saved.keys() & own.keys():
        kinds = (int, float) if isinstance(own[name], (int, float)) else type(own[name])
        if not isinstance(saved[name], kinds):
            raise InputError(f"{name} is of another kind")


def _restore_process(host: Host, checkpoint: Checkpoint) -> dict[str, float | Tensor]:
    """Restore this process's generators and return its sums. Where there were not as many processes, generators begin anew
    from the step reached, and the sums are the mean ones."""
    processes, rank = checkpoint.processes, distributed.rank()
    if any(v.numel() != 1 for p in processes for v in p.sums.values() if isinstance(v, Tensor)):
        raise InputError("sums holds more than scalars")
    as_many = len(processes) == distributed.world_size()
    if as_many or rank == 0:
        state.restore_random(processes[rank].random, host.device)
    else:
        seed_everything(derive(host.settings.seed, "process", rank, checkpoint.it) % 2**32)
    if as_many:
        return processes[rank].sums
    return {k: sum(p.sums[k] for p in processes) / len(processes) for k in processes[0].sums}

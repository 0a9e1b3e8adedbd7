"""The host: a mixin that makes any USB algorithm class train on a CPU or on GPUs, reproducibly and resumably.

``class Hosted(Host, FixMatch)`` overrides what ``AlgorithmBase.__init__`` calls (data set, loaders, model, hooks), the
training loop and the evaluation. ``semilearn.core`` and the class itself stay as they are.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.data.batches import Batches, LabelledPasses
from muscle_plugin.data.checks import find_oddities
from muscle_plugin.data.load import choose_split, load_data
from muscle_plugin.data.loader import FixedImages
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.device import (
    autocast_context,
    choose_device,
    choose_precision,
    deterministic_kernels,
    fix_workspaces,
)
from muscle_plugin.errors import DeviceError, InputError, Interrupted
from muscle_plugin.files import load_tensors, save_tensors
from muscle_plugin.memory import memory_for
from muscle_plugin.nets import build
from muscle_plugin.nets.weights import load_weights
from muscle_plugin.registry.extension import PLUGIN_NETS
from muscle_plugin.registry.names import NETS
from muscle_plugin.run_files import BEST, CHECKPOINT_FORMAT, LATEST, checkpoint_of, earlier_checkpoints, refuse_newer
from muscle_plugin.schedules import schedule
from muscle_plugin.seeding import derive, seed_everything
from muscle_plugin.settings.namespace import from_namespace, write_for_usb
from muscle_plugin.settings.schema import MACHINE, PLACE, MuscleSettings, RunSettings, affecting
from muscle_plugin.text import first_line, out_of_memory, shown
from muscle_plugin.training import state
from muscle_plugin.training.batch_norm import synchronise_batch_norm
from muscle_plugin.training.compiled import begin_step, check_compiler, compile_net
from muscle_plugin.training.ema import EMA
from muscle_plugin.training.hooks import REPLACEMENTS
from muscle_plugin.training.loaders import step_loaders
from muscle_plugin.training.metrics import prediction_metrics
from muscle_plugin.training.monitor import FP16_STEPS, TrainingMonitor
from muscle_plugin.training.optimiser import compute_update_on, keep_how
from muscle_plugin.usb.calls import usb_calls_on
from muscle_plugin.usb.no_waiting import no_waiting
from muscle_plugin.usb.thresholds import take_over

#: Steps between two times at which several processes agree on whether to stop.
AGREE_EVERY = 10


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """What two descriptions differ in, as far as both say it."""
    return [f"{k} {there[k]!r}, here {v!r}" for k, v in here.items() if k in there and there[k] != v]


class ImageSet:
    """A data set as USB's classes look at one: ``data`` (made when asked for), ``targets``, ``len``."""

    def __init__(self, source: Source, members: Tensor, targets: Tensor) -> None:
        self._source, self._members, self.targets = source, members, targets.tolist()

    @property
    def data(self) -> Tensor:
        return self._source.images[self._members]

    def __len__(self) -> int:
        return len(self.targets)


def _images_channels_last(_: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A hook before a net's forward. Its weights alone do not decide the layout where they are computed in the forward pass
    (weight norm of ``cnn13``), and pooling in the other layout takes twelve times as long."""
    images, *rest = args
    return (images.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else images, *rest)


def _refuse_other_launchers(args: Any) -> None:
    """Raises :class:`DeviceError` where several processes are to train that this package does not bring together."""
    by_usb = getattr(args, "distributed", False) or getattr(args, "multiprocessing_distributed", False)
    if distributed.launched() == 1 and by_usb:
        started = "USB's multiprocessing_distributed and world_size do not"
    elif distributed.launched() > 1 and distributed.world_size() == 1:
        started = f"this program, of which torchrun started {distributed.launched()}, does not"
    else:
        return
    raise DeviceError(
        f"{started} start several processes for this package's algorithms: give `torchrun --standalone --nproc_per_node N"
        " -m muscle_plugin.cli train --c FILE`"
    )


def read_source(args: Any) -> Source:
    """The data set that completed settings name, or ``args.source`` if there is one.

    Raises:
        DataError: it cannot be had, or has another number of classes than the settings say.
    """
    given = getattr(args, "source", None)
    return load_data(args) if given is None else given


class Host:
    """Mixin in front of a USB algorithm class. Takes the arguments of ``AlgorithmBase``.

    ``args`` is completed in place. After construction the object trains with :meth:`train`.

    Raises:
        ConfigError: settings that are wrong, misspelt, or contradict each other.
        DataError, DeviceError, CompileError: the data, the device or the compiler asked for cannot be had.
    """

    usb_name: str = ""
    _warming_up = False  # an attribute of the object only while it is true, and so in no checkpoint

    # set by AlgorithmBase
    args: Any
    model: Any
    ema_model: Any
    ema: Any
    optimizer: Any
    scheduler: Any
    loader_dict: dict[str, Any]
    hooks_dict: dict[str, Any]
    call_hook: Any
    tb_log: Any
    it: int
    epoch: int
    epochs: int
    num_classes: int
    num_train_iter: int
    num_iter_per_epoch: int
    best_it: int
    best_eval_acc: float
    train_step: Any
    get_argument: Any

    def __init__(self, args: Any, net_builder: Any, tb_log: Any = None, logger: Any = None, **kwargs: Any) -> None:
        _refuse_other_launchers(args)
        resolved = from_namespace(args, [a.name.lstrip("-") for a in self.get_argument()])
        for notice in () if distributed.rank() else resolved.notices:
            warnings.warn(notice, stacklevel=4)  # where get_algorithm is called, for what has MUSCLE in it
        settings = self.settings = resolved.settings
        processes = {"rank": distributed.rank(), "world_size": distributed.world_size()}
        write_for_usb(args, settings, **processes)
        seed_everything(args.seed)
        self.device = choose_device(args.device)
        self.precision = choose_precision(args.precision, self.device, self.usb_name)
        fix_workspaces(self.device, args.deterministic)
        check_compiler(args.compile, self.device)
        self.source: Source = read_source(args)
        self.split: Split = choose_split(args, self.source)
        hidden = torch.tensor(self.split.sequestered, dtype=torch.int64)
        fine = self.source.subclasses
        #: (M,) bool: test images of sequestered subclasses; None if there are none.
        self.test_sequestered = torch.isin(fine[self.source.test], hidden) if fine is not None and len(hidden) else None
        unlabelled = settings.total_batch - settings.batch_size
        self.batch_sizes = (settings.batch_size, unlabelled)
        one_run = max(1, round(settings.epoch * len(self.split.unlabelled) / unlabelled))
        write_for_usb(
            args, settings, **processes, gpu=self.device.index, amp=self.precision != "fp32",
            num_classes=len(self.source.classes), num_labels=len(self.split.labelled),
            num_train_iter=settings.num_train_iter or one_run,
            lb_dest_len=len(self.split.labelled), ulb_dest_len=len(self.split.unlabelled),
        )  # fmt: skip
        self.evaluations: list[float] = []
        self.last_metrics: dict[str, float] = {}
        self.train_seconds = 0.0
        self._clock: float | None = None
        self.updates = 0  # of the weights, by this object
        self.recorder: Any = None
        self.save_every = getattr(args, "num_save_iter", None) or args.num_eval_iter
        self.stop_requested = False
        self.logger = logger
        net_builder = build.builder_instead_of(net_builder, args)
        with usb_calls_on(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GradScaler without CUDA, deprecated names: replaced below
            super().__init__(args, net_builder, tb_log, logger, **kwargs)  # type: ignore[call-arg]
        #: What was asked of the net besides its name.
        self.net_options = dict(getattr(net_builder, "keywords", {}).get("options") or {})
        #: What a result depends on, of the settings.
        self.compared_settings = self._compared_settings()
        #: What a user should know before training.
        self.notes = list(self.source.notes)
        if not args.rank:  # the others show none
            self.notes += [*find_oddities(self.source, self.split), *self.batches.notes]
        if args.init_from:
            count = load_weights(self.model, checkpoint_of(Path(args.init_from)), args.init_head)
            self.notes.append(f"{count} of the net's {len(self.model.state_dict())} tensors are from {args.init_from}")
        self._set_layout()
        for net in (self.model, self.ema_model):
            compile_net(net, args.compile)
        if args.rank:  # the same initial weights everywhere, other dropout masks and mixtures
            seed_everything(derive(args.seed, "process", args.rank) % 2**32)
        self.amp_cm = autocast_context(self.precision, self.device)
        self.loss_scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        allowed = FP16_STEPS if args.nonfinite_steps is None else args.nonfinite_steps
        self.monitor = TrainingMonitor(self.device, allowed if self.precision == "fp16" else 0)

    @property
    def device(self) -> torch.device:
        """Where the nets and the batches are."""
        return self._device

    @device.setter
    def device(self, device: torch.device) -> None:
        if not hasattr(self, "_device"):  # a USB that trains on CPUs too chooses one by ``args.gpu`` alone
            self._device = device

    def _compared_settings(self) -> dict[str, Any]:
        fields = {*RunSettings.model_fields, *MuscleSettings.model_fields}
        names = {*fields, *(a.name.lstrip("-") for a in self.get_argument())} - affecting(MACHINE, PLACE) - {"amp"}
        values = {n: getattr(self.args, n) for n in sorted(names) if hasattr(self.args, n)}
        values["precision"] = self.precision  # what auto has become, on another device something else; amp says no more
        values["uratio"] = float(values["uratio"])
        plain = (bool, int, float, str, type(None))
        return {n: v if isinstance(v, plain) else repr(v) for n, v in values.items()}

    def _set_layout(self) -> None:
        """Keep the nets' weights and images channels last, which makes convolutions a sixth faster, on a CPU too; not for a
        net that cannot compute so (one that flattens feature maps by ``view``)."""
        size, last = self.args.img_size, torch.channels_last
        blank = torch.zeros(2, self.batches.channels, size, size, device=self.device).contiguous(memory_format=last)
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), usb_calls_on(self.device):
                self.model.to(memory_format=last)(blank)
        except (RuntimeError, ValueError) as e:
            if out_of_memory(e):
                raise
            self.model.to(memory_format=torch.contiguous_format)
            self.notes.append(f"net {self.args.net} cannot compute channels last, which is faster ({first_line(e)})")
        else:
            self.ema_model.to(memory_format=torch.channels_last)
            for net in (self.model, self.ema_model):
                net.register_forward_pre_hook(_images_channels_last)
            self.batches.channels_last = True  # so that there is nothing left to do for that hook
        self.model.train(was_training)

    # ------------------------------------------------------------------------------------- what AlgorithmBase builds

    def set_dataset(self) -> dict[str, Any]:
        """Labelled, unlabelled and test images; the unlabelled ones carry no labels that training could read."""
        source = self.source
        labelled, unlabelled = self.split.labelled, self.split.unlabelled
        hidden = torch.full((len(unlabelled),), -1)
        return {
            "train_lb": ImageSet(source, source.train[labelled], source.train_labels[labelled]),
            "train_ulb": ImageSet(source, source.train[unlabelled], hidden),
            "eval": ImageSet(source, source.test, source.test_labels),
            "test": None,
        }

    def step_parameters(self) -> tuple[str, ...]:
        """The parameters of the USB class's ``train_step``: the views that a step needs."""
        return tuple(signature(super().train_step).parameters)  # type: ignore[misc]

    def set_data_loader(self) -> dict[str, Any]:
        """The maker of training batches (``self.batches``) and the loaders that USB's code may iterate."""
        args = self.args
        self.batches = Batches(
            self.source, self.split, *self.batch_sizes, self.step_parameters(), self.usb_name,
            args.weak_augment, args.hard_augment, self._channels(), args.seed, self.device,
            args.data_on, args.num_workers, args.hard_ops, args.rank, args.world_size,
        )  # fmt: skip
        test = self._fixed(self.source.test)
        per_epoch = max(1, args.num_train_iter // args.epoch)
        return {"train_lb": LabelledPasses(self.batches, per_epoch), "eval": test}

    def _fixed(self, members: Tensor) -> FixedImages:
        """The images ``members`` of the source, without augmentation."""
        labels = self.source.labels[members]
        if self.batches.resident:
            labels = labels.to(self.device)
        return FixedImages(
            self.batches.images.pool, members, labels, self.batches.normalise, self.args.eval_batch_size,
            self.device, self.args.rank, self.args.world_size,
        )  # fmt: skip

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """What surrounds training."""

        def tell(operation: str) -> None:
            self.monitor.warn(
                self, f"{operation} has no deterministic algorithm here: equal seeds may give other weights"
            )

        args = self.args
        less = f"a smaller --total_batch (it is {args.total_batch}) or --net, --precision bf16 or --data_on host"
        with (
            usb_calls_on(self.device),
            deterministic_kernels(self.device, args.deterministic, tell),
            memory_for("a training step", less),
        ):
            yield

    def _channels(self) -> int:
        """Own nets and those of plugins take the data's channels; USB's and torchvision's want three."""
        own = self.args.net in (*NETS, *PLUGIN_NETS) and not self.args.net_from_name
        return self.source.images.shape[1] if own else 3

    def set_model(self) -> Any:
        return self._placed(super().set_model())  # type: ignore[misc]

    def set_ema_model(self) -> Any:
        return self._placed(super().set_ema_model())  # type: ignore[misc]

    def _placed(self, net: Any) -> Any:
        if self.args.world_size > 1 and self.args.sync_bn:
            net = synchronise_batch_norm(net, self.device)
        return net.to(self.device)

    def set_optimizer(self) -> Any:
        """USB's optimiser; its schedule, or the one asked for, begun anew where the algorithm has stages."""
        optimizer, scheduler = super().set_optimizer()  # type: ignore[misc]
        compute_update_on(optimizer, self.device)
        restarts: tuple[int, ...] = getattr(super(), "schedule_restarts", tuple)()  # of an algorithm that has stages
        args, starts = self.args, [0, *restarts]
        if args.decay_all:
            for group in optimizer.param_groups:
                group["weight_decay"] = args.weight_decay
        if args.lr_schedule == "usb" and len(starts) == 1:
            return optimizer, scheduler
        starts = sorted({s for s in starts if 0 <= s < args.num_train_iter})
        ends = [*starts[1:], args.num_train_iter]
        options: dict[str, dict[str, float]] = {
            "usb": {"warmup": args.num_warmup_iter},
            "cosine": {"reaches_zero_at": args.lr_zero_at},
        }
        name = args.lr_schedule
        parts = [schedule(name, b - a, **options.get(name, {})) for a, b in zip(starts, ends, strict=True)]

        def multiplier(step: int) -> float:
            part = max(i for i, start in enumerate(starts) if start <= step)
            return parts[part](step - starts[part])

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)

    def register_hook(self, hook: Any, name: str | None = None, priority: Any = "NORMAL") -> None:
        """As USB's, with the host's hook where USB's would synchronise, lose or mis-measure something."""
        hook_name = name if name is not None else type(hook).__name__
        take_over(hook)
        replacement = REPLACEMENTS.get(type(hook), type(hook))
        if replacement is None:
            return
        super().register_hook(hook if replacement is type(hook) else replacement(), hook_name, priority)  # type: ignore[misc]

    def process_batch(self, input_args: Any = None, **batch: Any) -> dict[str, Any]:
        """The entries that the USB class's step takes; through USB's own method, which a class may override."""
        names = [*self.batches.parameters, *self.batches.views] if input_args is None else input_args
        with usb_calls_on(self.device):
            return super().process_batch(names, **batch)  # type: ignore[misc]

    # ---------------------------------------------------------------------------------------------------- training

    def warmup(self) -> None:
        """The stage before training that some classes have (Dash); nothing for the others.

        Dash takes its first threshold from the loss on the "eval" loader, which is the test set. Here it sees the
        labelled training images, as its paper says: test labels choose nothing. It also takes the steps of this stage from
        the learning rate's schedule, all of which are over where it is as long as the training; here that begins anew.
        """
        stage = getattr(super(), "warmup", None)
        if stage is None or self.it > 0:
            return
        self._begin_alike()
        loaders, test = self.loader_dict, self.loader_dict["eval"]
        loaders["eval"] = self._fixed(self.source.train[self.split.labelled])
        began, rates = dict(self.scheduler.state_dict()), [g["lr"] for g in self.optimizer.param_groups]
        self._warming_up = True
        try:
            with self._computing():
                stage()
        finally:
            loaders["eval"] = test
            del self._warming_up
        self.scheduler.load_state_dict(began)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def stop_if_warming_up(self) -> None:
        """Called after each step, also of the stage before training, which USB's own loop takes to its end.

        Raises:
            Interrupted: a stop was requested in that stage; there is nothing to save yet.
        """
        if self._warming_up and self._stopping():
            raise Interrupted(
                "stopped in the stage before training, of which nothing is kept: the same command begins anew"
            )

    def _begin_alike(self) -> None:
        """Give every process the first one's nets."""
        for net in (self.model, self.ema_model):
            distributed.copy_from_first_([*net.parameters(), *net.buffers()])

    def average_gradients(self) -> None:
        """Replace the gradients, and running statistics that processes hold of their own images, by their means over
        processes: with them every process takes the same step."""
        if self.args.world_size == 1:
            return
        distributed.average_(p.grad for p in self.model.parameters() if p.grad is not None)
        if not self.args.sync_bn:
            own = not getattr(self, "ema_copies_buffers", True)  # of a teacher that is trained on images itself
            distributed.average_([*self.model.buffers(), *(self.ema_model.buffers() if own else ())])

    def prepare_steps(self) -> None:
        """Called once before the first step of a run or of its continuation."""

    def loaders(self) -> tuple[Any, Any, Any]:
        """Labelled, unlabelled and test loaders for USB's ``Trainer``: ``trainer.fit(*algorithm.loaders())``.

        The batches are those of :meth:`train`. Where there is no GPU, call ``Trainer`` within ``usb_calls_on("cpu")``.
        """
        self._begin_alike()
        with usb_calls_on(self.device):
            self.prepare_steps()
        return (*step_loaders(self), self.loader_dict["eval"])

    def train(self) -> None:
        """Train from the present step to ``num_train_iter``; USB's hooks are called as USB calls them.

        Raises:
            Interrupted: a stop was requested (see :meth:`request_stop`); a checkpoint has been written.
            DeviceError: out of memory.
        """
        self.model.train()
        self._begin_alike()
        per_epoch = max(1, self.num_iter_per_epoch)
        if self.recorder is None and self.logger is not None:  # USB's train.py knows of no notes
            for note in self.notes:
                self.logger.info(note)
        with self._computing():
            self.epoch = self._epoch_of(self.it)
            self.call_hook("before_run")
            self.prepare_steps()
            self._clock = time.perf_counter()
            while self.it < self.num_train_iter:
                self.epoch = self._epoch_of(self.it)
                if self.it % per_epoch == 0 and self.it // per_epoch < self.epochs:
                    self.call_hook("before_train_epoch")
                self.call_hook("before_train_step")
                batch = self.batches.batch(self.it)
                with self.in_step():
                    self.out_dict, self.log_dict = self.train_step(**self.process_batch(**batch))
                self.call_hook("after_train_step")
                self.it += 1
                if self._epoch_of(self.it) != self.epoch or self.it == self.num_train_iter:
                    self.call_hook("after_train_epoch")
                self._save_if_due()
            self.call_hook("after_run")

    def in_step(self) -> contextlib.AbstractContextManager[None]:
        """What surrounds every call of ``train_step``."""
        begin_step(self.args.compile)
        return no_waiting(self.device)

    def _epoch_of(self, step: int) -> int:
        return min(step // max(1, self.num_iter_per_epoch), self.epochs - 1)

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Time spent inside (evaluation, checkpoints) does not count as training time."""
        self.train_seconds = self.seconds()
        self._clock = None
        yield
        self._clock = time.perf_counter()

    def seconds(self) -> float:
        """Seconds of training steps so far, over all continuations of the run; evaluation is not counted."""
        running = time.perf_counter() - self._clock if self._clock is not None else 0.0
        return self.train_seconds + running

    def record(self, values: dict[str, float]) -> None:
        """Log the values of the step that is ending: by the run's recorder if it has one, else as USB's train.py expects, to
        the logger and the TensorBoard log that it gave."""
        if self.recorder is not None:
            self.recorder.record(self, values)
            return
        if self.logger is not None and not self.args.rank:
            shown_values = ", ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items())
            self.logger.info(f"{self.it + 1}/{self.num_train_iter} iterations: {shown_values}")
        if self.tb_log is not None:
            self.tb_log.update(values, self.it)

    # --------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, eval_dest: str = "eval", out_key: str = "logits", return_logits: bool = False) -> dict[str, Any]:
        """Loss (nats), accuracies, macro averages and mean entropy of the predictions (nats) of the averaged net; of the
        live net before training has begun.

        Keys are USB's (``eval/top-1-acc``, ...), with ``top-5-acc`` where there are more than five classes. Where
        subclasses are sequestered, ``eval/labelled_classes/...`` and ``eval/unlabelled_classes/...`` give accuracy and
        entropy over either kind of test image (paper, Figure 3).
        """
        net = self.ema_model if isinstance(self.ema, EMA) else self.model
        was_training = net.training
        net.eval()
        # there may be fewer images than processes
        logits = [torch.empty(0, self.num_classes, device=self.device)]
        labels = [torch.empty(0, dtype=torch.int64, device=self.device)]
        for batch in self.loader_dict[eval_dest]:
            with self.amp_cm():
                logits.append(net(batch["x_lb"])[out_key].float())
            labels.append(batch["y_lb"])
        net.train(was_training)
        scores, truth = (distributed.gather_parts(torch.cat(x)) for x in (logits, labels))
        groups = self.test_sequestered if eval_dest == "eval" else None
        out: dict[str, Any] = {f"{eval_dest}/{k}": v for k, v in prediction_metrics(scores, truth, groups).items()}
        if return_logits:
            out[f"{eval_dest}/logits"] = scores.cpu().numpy()
        return out

    # -------------------------------------------------------------------------------------------------- checkpoints

    @property
    def run_dir(self) -> Path:
        """``save_dir/save_name``."""
        return Path(self.args.save_dir) / self.args.save_name

    def save_model(self, save_name: str, save_path: str | Path, *further: str) -> None:
        """Write a checkpoint, whole or not at all: USB's keys (``model``, ``ema_model``, ``it``, ...), and everything
        else that an exact continuation needs. With several processes the first one writes it.

        Args:
            further: names under which to write the same once more.

        Raises:
            NotFinite: something in them is not finite; the file that is there stays.
            RuntimeError: the processes hold different weights.
            WriteError: the disk is full, or refuses otherwise; earlier checkpoints are as they were.
        """
        with self.not_training():
            self.monitor.check_now(self, self.it)
            self._check_alike()
            own = {"random": state.capture_random(self.device), "logged": self.hooks_dict["LoggingHook"].on_cpu()}
            processes = distributed.gather_objects(own)
            if self.args.rank:
                return
            content = {**state.capture(self), "processes": processes, "monitor": self.monitor.state_dict()}
            own = content["algorithm"]
            checkpoint = {
                "format": CHECKPOINT_FORMAT,
                "algorithm_name": self.args.algorithm,
                "num_classes": self.num_classes,
                "net": self.args.net,
                "net_from_name": bool(self.args.net_from_name),
                "images": self._about_images(),
                "settings": self.compared_settings,
                "it": self.it,
                "epoch": self.epoch,
                "best_it": self.best_it,
                "best_eval_acc": float(self.best_eval_acc),
                **{k: own.pop(k)["state"] for k in ("model", "ema_model")},
                "state": content,
            }
            if self.recorder is not None:
                self.recorder.flush()  # no step before the checkpoint's may be lost
            folder = Path(save_path)
            for name in (save_name, *further):
                earlier = earlier_checkpoints(folder, self.args.keep_checkpoints - 1) if name == LATEST else ()
                save_tensors(folder / name, checkpoint, earlier)
                if name == LATEST:
                    self.monitor.saved = self.it

    def _check_alike(self) -> None:
        if self.args.world_size == 1:
            return
        sums = torch.stack(
            [p.detach().double().abs().sum() for p in (*self.model.parameters(), *self.ema_model.parameters())]
        )
        if len(set(distributed.gather_objects(str(sums.tolist())))) > 1:
            raise RuntimeError(
                f"the processes hold different weights after step {self.it}; the last checkpoint is older"
            )

    def _about_images(self) -> dict[str, Any]:
        """What a net must be told of the images it was trained on, to be used on others."""
        mean, std = self.batches.statistics
        return {
            "dataset": self.args.dataset,
            "classes": list(self.source.classes),
            "img_size": int(self.args.img_size),
            "channels": self.batches.channels,
            "net_options": self.net_options,
            "mean": mean.tolist(),
            "std": std.tolist(),
        }

    def load_model(self, load_path: str | Path) -> dict[str, Any]:
        """Go to the state of a checkpoint; the next step is the one after it.

        Raises:
            ValueError: unreadable, or of another algorithm, net or number of classes.
        """
        checkpoint = self.read_checkpoint(load_path)
        self.go_to(checkpoint, load_path)
        return checkpoint

    def read_checkpoint(self, path: str | Path, content: bytes | None = None) -> dict[str, Any]:
        """A checkpoint of this algorithm, net and number of classes.

        Args:
            content: of the file, if another process has read it.

        Raises:
            ValueError: it is not that.
        """
        checkpoint = load_tensors(Path(path), self.device, content)
        refuse_newer(checkpoint, path)
        if checkpoint.get("format") != CHECKPOINT_FORMAT:
            raise InputError(
                f"{path}: not a checkpoint of this package (format {shown(repr(checkpoint.get('format')))})"
            )
        ours = {
            "algorithm_name": self.args.algorithm,
            "net": self.args.net,
            "net_from_name": bool(self.args.net_from_name),
            "num_classes": self.num_classes,
        }
        needed = dict.fromkeys(("state", "model", "ema_model", "images"), dict)
        if absent := [k for k in (*ours, *needed) if not isinstance(checkpoint.get(k), needed.get(k, (str, int)))]:
            raise InputError(
                f"{path}: not a whole checkpoint: {', '.join(absent)} is missing, or not what it should be"
            )
        images = {k: v for k, v in self._about_images().items() if k not in ("mean", "std")}
        known = {*ours, *images, "algorithm"}
        found = checkpoint.get("settings")
        settings = dict(found) if isinstance(found, dict) else {}
        if settings.get("precision") == "auto":  # of an earlier version, which did not say what that was
            del settings["precision"]
        differing = [
            *_differences(checkpoint, ours),
            *_differences(checkpoint["images"], images),
            *_differences(settings, {k: v for k, v in self.compared_settings.items() if k not in known}),
        ]
        differing = differing or self._other_weights(checkpoint["model"])
        if differing:
            raise InputError(f"{path}: a checkpoint of another run: {'; '.join(differing)}")
        return checkpoint

    def _other_weights(self, weights: dict[str, Tensor], most: int = 3) -> list[str]:
        """What differs in names and shapes; at most ``most`` of them, and the number of the others."""
        there, here = ({k: tuple(t.shape) for k, t in w.items()} for w in (weights, self.model.state_dict()))
        found = [
            f"{k} {there.get(k, 'absent')}, here {here.get(k, 'absent')}"
            for k in {**there, **here}
            if there.get(k) != here.get(k)
        ]
        return found[:most] + ([f"{len(found) - most} more of the net's tensors"] if len(found) > most else [])

    def go_to(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Take over the state that :meth:`read_checkpoint` gave.

        Raises:
            ValueError: it does not fit.
        """
        content = checkpoint["state"]
        try:
            for name in ("model", "ema_model"):
                content["algorithm"][name] = {"state": checkpoint[name]}
            keep_how(content["algorithm"]["optimizer"]["state"], self.optimizer)
            saved_on_cpu = all(t.is_cpu for t in checkpoint["model"].values())
            with usb_calls_on(self.device):
                state.restore(self, content, self.device if saved_on_cpu else None)
                if "monitor" in content:
                    self.monitor.load_state_dict(content["monitor"])
                self._restore_process(content.get("processes", []))
            self._refuse_other_kinds()
            if not 0 <= self.it <= self.num_train_iter or not 0 <= self.epoch <= self.epochs:
                raise InputError(f"step {self.it} of {self.num_train_iter}, epoch {self.epoch} of {self.epochs}")
        except (
            KeyError,
            AttributeError,
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
            OverflowError,
            MemoryError,
        ) as e:
            if isinstance(e, RuntimeError) and out_of_memory(e):
                raise
            raise InputError(f"{path}: does not fit this run ({type(e).__name__}: {first_line(e)})") from e
        self.start_epoch = self.epoch
        self.monitor.saved = self.it

    def _refuse_other_kinds(self) -> None:
        """Raises ValueError if what the host itself remembers is not what it keeps, but another's idea of it."""
        counts = (self.it, self.epoch, self.best_it)
        finite = (*self.evaluations, self.best_eval_acc, self.train_seconds)
        logged = self.hooks_dict["LoggingHook"].sums.values()
        numbers = (*finite, *self.last_metrics.values(), *(x for x in logged if not isinstance(x, Tensor)))
        if (
            any(type(x) is not int for x in counts)
            or not all(isinstance(x, (int, float)) for x in numbers)
            or not all(math.isfinite(x) for x in finite)
            or any(x.numel() != 1 for x in logged if isinstance(x, Tensor))
        ):
            raise InputError("its counts, evaluations or sums are no numbers")

    def _restore_process(self, processes: list[dict[str, Any]]) -> None:
        """What each process has for itself: its generators, and the sums since the last log line. If there were not as many
        processes, generators begin anew from where the run is, and the sums are the mean ones."""
        args = self.args
        if len(processes) == args.world_size:
            state.restore_random(processes[args.rank]["random"], self.device)
            self.hooks_dict["LoggingHook"].sums = dict(processes[args.rank]["logged"])
            return
        if args.rank:
            seed_everything(derive(args.seed, "process", args.rank, self.it) % 2**32)
        sums = [p["logged"] for p in processes]
        if sums:
            self.hooks_dict["LoggingHook"].sums = {k: sum(s[k] for s in sums) / len(sums) for k in sums[0]}

    def _stopping(self) -> bool:
        """Whether to stop after this step; all processes at the same one."""
        if self.args.world_size > 1 and self.it % AGREE_EVERY and self.it < self.num_train_iter:
            return False
        return distributed.any_process(self.stop_requested)

    def _save_if_due(self) -> None:
        stopping = self._stopping()
        evaluated = self.it % self.args.num_eval_iter == 0 or self.it == self.num_train_iter
        best = evaluated and self.evaluations and self.best_it == self.it - 1
        latest = self.it % self.save_every == 0 or self.it == self.num_train_iter or stopping
        names = [name for name, due in ((BEST, best), (LATEST, latest)) if due]
        if names:
            self.save_model(names[0], self.run_dir, *names[1:])
        if self.recorder is not None and (evaluated or stopping):
            self.recorder.write_result(self)
        if stopping and self.it < self.num_train_iter:
            raise Interrupted(f"stopped after step {self.it} of {self.num_train_iter}; saved {self.run_dir / LATEST}")

    def request_stop(self) -> None:
        """Make :meth:`train` save and raise :class:`Interrupted` after the step in progress."""
        self.stop_requested = True

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM request a stop; a second Ctrl-C ends the process at once."""

        def handler(number: int, _: Any) -> None:
            self.request_stop()
            signal.signal(signal.SIGINT, signal.default_int_handler)

        kept = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, previous in kept.items():
                signal.signal(s, previous)

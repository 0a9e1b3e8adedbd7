"""The host: a mixin that makes any USB algorithm class train on a CPU or on GPUs, reproducibly and resumably.

``class Hosted(Host, FixMatch)`` overrides what ``AlgorithmBase.__init__`` calls (data set, loaders, model, hooks), the
training loop and the evaluation. ``semilearn.core`` and the class itself stay as they are.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.data.batches import Batches, LabelledPasses
from muscle_plugin.data.checks import find_oddities, find_shortage
from muscle_plugin.data.load import choose_split, load_data
from muscle_plugin.data.loader import FixedImages
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split, class_counts
from muscle_plugin.data.views import LABELLED, UNLABELLED
from muscle_plugin.device import (
    autocast_context,
    choose_device,
    choose_precision,
    deterministic_kernels,
    fix_workspaces,
    memory_for,
)
from muscle_plugin.errors import DataError, DeviceError, Interrupted, RunError
from muscle_plugin.files import save_tensors
from muscle_plugin.nets.build import NetBuilder, builder_instead_of, builder_of, head_builder
from muscle_plugin.nets.frozen import Encoder
from muscle_plugin.nets.tune import Backbone, backbone_of, share_frozen, tuned_builder
from muscle_plugin.run_files import BEST, LATEST, checkpoint_of, earlier_checkpoints
from muscle_plugin.seeding import derive, seed_everything
from muscle_plugin.settings.namespace import from_namespace, write_for_usb
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.training import checkpoint
from muscle_plugin.training.data import (
    ImageSet,
    StepLoader,
    channels_for,
    fixed_images,
    image_sets,
    make_batches,
)
from muscle_plugin.training.evaluation import predict, prediction_metrics
from muscle_plugin.training.hooks import (
    EMA,
    NOT_NEEDED,
    REPLACEMENTS,
    Stopwatch,
    compute_update_on,
    restarting_schedule,
)
from muscle_plugin.training.monitor import FP16_STEPS, TrainingMonitor, advice
from muscle_plugin.training.nets import (
    check_compiler,
    enough_images_for,
    frozen_encoder,
    prepare,
    synchronise_batch_norm,
)
from muscle_plugin.training.protocols import Recorder, TensorBoardLog
from muscle_plugin.training.state import outside_state
from muscle_plugin.usb.calls import no_waiting, usb_calls_on
from muscle_plugin.usb.names import Hook
from muscle_plugin.usb.thresholds import take_over

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from muscle_plugin.training.protocols import USBAlgorithm
else:
    USBAlgorithm = object

#: Steps between two times at which several processes agree on whether to stop.
AGREE_EVERY = 10


def _refuse_other_launchers(args: Namespace) -> None:
    """Raises :class:`DeviceError` where several processes are to train that this package does not bring together."""
    by_usb = getattr(args, "distributed", False) or getattr(args, "multiprocessing_distributed", False)
    unconnected = distributed.world_size() == 1 if distributed.launched() > 1 else by_usb
    if unconnected:
        raise DeviceError(
            "several processes are asked for, but not connected: start them by `torchrun --standalone --nproc_per_node N -m"
            " muscle_plugin.cli train --c FILE`, not by USB's multiprocessing_distributed or another program"
        )


@outside_state
class Host(USBAlgorithm):
    """Mixin in front of a USB algorithm class. Takes the arguments of ``AlgorithmBase``.

    ``args`` is completed in place. After construction the object trains with :meth:`train`.

    Attributes:
        settings: as resolved; ``args`` is what USB reads.
        test_sequestered: (M,) bool: test images of sequestered subclasses; None if there are none.
        batch_sizes: J and I, labelled and unlabelled images per step.
        backbone: what checkpoints say of the frozen weights; None if all of the net is trained.
        encoder: the backbone of a head that is trained alone.
        notes: what a user should know before training.
        evaluations: every top-1 accuracy so far, as a fraction.
        recorder: without one, values go to USB's logger and TensorBoard log.
        updates: of the weights, by this object.

    Raises:
        DataError, DeviceError, InputError: the data, the device, the net or the compiler asked for cannot be had.
    """

    usb_name: ClassVar[str] = ""

    settings: RunSettings
    run_dir: Path
    source: Source
    split: Split
    test_sequestered: Tensor | None
    batch_sizes: tuple[int, int]
    batches: Batches
    precision: str
    backbone: Backbone | None
    encoder: Encoder | None
    notes: list[str]
    evaluations: list[float]
    last_metrics: dict[str, float]
    monitor: TrainingMonitor
    recorder: Recorder | None
    logger: logging.Logger | None
    clock: Stopwatch
    updates: int
    stop_requested: bool
    _device: torch.device

    def __init__(
        self, args: Namespace, net_builder: NetBuilder | None, tb_log: TensorBoardLog | None = None,
        logger: logging.Logger | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        _refuse_other_launchers(args)
        resolved = from_namespace(args, [a.name.lstrip("-") for a in self.get_argument()])
        settings, rank = resolved.settings, distributed.rank()
        for notice in () if rank else resolved.notices:
            warnings.warn(notice, stacklevel=4)  # where get_algorithm is called, for what has MUSCLE in it
        self.settings, self.run_dir = settings, resolved.run_dir
        seed_everything(settings.seed)
        self.device = choose_device(settings.device)
        self.precision = choose_precision(settings.precision, self.device, self.usb_name)
        fix_workspaces(self.device, settings.deterministic)
        check_compiler(settings.compile, self.device)
        given: Source | None = getattr(args, "source", None)
        self.source = source = load_data(settings) if given is None else given
        self.split = split = choose_split(settings, source)
        self.test_sequestered = None
        if source.subclasses is not None and len(split.sequestered):
            self.test_sequestered = torch.isin(source.subclasses[source.test], torch.tensor(split.sequestered))
        self.batch_sizes = settings.batch_size, settings.total_batch - settings.batch_size
        self.backbone = backbone_of(settings, checkpoint_of(Path(settings.init_from)) if settings.init_from else None)
        net_builder = builder_instead_of(net_builder, settings)
        build_net, channels = net_builder or builder_of(settings), channels_for(settings, source)
        self.encoder = frozen_encoder(self.backbone, settings, build_net, channels, self.device, self.precision)
        write_for_usb(
            args, settings, rank, distributed.world_size(), gpu=self.device.index, amp=self.precision != "fp32",
            num_classes=len(source.classes), num_labels=len(split.labelled),
            num_train_iter=resolved.steps(len(split.unlabelled)),
            lb_dest_len=len(split.labelled), ulb_dest_len=len(split.unlabelled),
        )  # fmt: skip
        self.evaluations, self.last_metrics = [], {}
        self.clock = Stopwatch()
        self.recorder, self.logger = None, logger
        self.updates, self.stop_requested = 0, False
        if self.encoder is not None:
            net_builder = head_builder(settings, self.encoder.num_features)
        elif self.backbone is not None and net_builder is not None:
            net_builder = tuned_builder(net_builder, self.backbone, settings.init_head)
        with usb_calls_on(self.device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GradScaler without CUDA, deprecated names: replaced below
            super().__init__(args, net_builder, tb_log, logger, **kwargs)
        self.batches.prepare()
        self.notes = list(source.notes)
        if not rank:  # the others show none
            steps = None if settings.num_train_iter else self.num_train_iter
            self.notes += find_oddities(source, split)
            self.notes += find_shortage(split, settings.algorithm, *self.batch_sizes, settings.epoch, steps)
            self.notes += self.batches.notes
        self.notes += prepare((self.model, self.ema_model), settings, self.batches, source, self.device)
        if rank:  # the same initial weights everywhere, other dropout masks and mixtures
            seed_everything(derive(settings.seed, "process", rank) % 2**32)
        self.amp_cm = autocast_context(self.precision, self.device)
        self.loss_scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        allowed = FP16_STEPS if settings.nonfinite_steps is None else settings.nonfinite_steps
        limit = allowed if self.precision == "fp16" else 0
        help_after = partial(advice, settings, self.precision, self.run_dir)
        self.monitor = TrainingMonitor(self.device, limit, self._warn, help_after, class_counts(source, split.labelled))

    @property
    def device(self) -> torch.device:
        return self._device

    @device.setter
    def device(self, device: torch.device) -> None:
        if not hasattr(self, "_device"):  # a USB that trains on CPUs too chooses one by ``args.gpu`` alone
            self._device = device

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The trained net and its average, by the names that messages give them."""
        return {"the net": self.model, "the averaged net": self.ema_model}

    def _warn(self, text: str) -> None:
        self.print_fn(f"warning: {text}")
        if self.recorder is not None:
            self.recorder.warn(text)

    # -- what AlgorithmBase builds

    def set_dataset(self) -> dict[str, ImageSet | None]:
        return image_sets(self.source, self.split)

    def step_parameters(self) -> tuple[str, ...]:
        """The parameters of the USB class's ``train_step``: the views that a step needs."""
        return tuple(signature(super().train_step).parameters)

    def set_data_loader(self) -> dict[str, Any]:
        """The maker of training batches (``self.batches``) and the loaders that USB's code may iterate."""
        self.batches = make_batches(self)
        labelled = LabelledPasses(self.batches, max(1, self.num_iter_per_epoch))
        return {"train_lb": labelled, "eval": fixed_images(self, self.source.test)}

    def set_model(self) -> nn.Module:
        return self._placed(super().set_model())

    def set_ema_model(self) -> nn.Module:
        net = self._placed(super().set_ema_model())
        if self.backbone is not None:
            share_frozen(self.model, net)
        return net

    def _placed(self, net: nn.Module) -> nn.Module:
        if self.settings.sync_bn and distributed.world_size() > 1:
            net = synchronise_batch_norm(net, self.device)
        return net.to(self.device)

    def set_optimizer(self) -> tuple[Optimizer, LRScheduler | None]:
        """USB's optimiser; its schedule, or the one asked for, begun anew where the algorithm has stages."""
        optimizer, scheduler = super().set_optimizer()
        compute_update_on(optimizer, self.device)
        if self.settings.decay_all:
            for group in optimizer.param_groups:
                group["weight_decay"] = self.settings.weight_decay
        restarts: Sequence[int] = getattr(super(), "schedule_restarts", tuple)()  # of an algorithm that has stages
        if self.settings.lr_schedule != "usb" or restarts:
            scheduler = restarting_schedule(optimizer, self.settings, self.num_train_iter, restarts)
        return optimizer, scheduler

    def register_hook(self, hook: Hook, name: str | None = None, priority: str | int = "NORMAL") -> None:
        """As USB's, with the host's hook where USB's would synchronise, lose or mis-measure something."""
        hook_name = name if name is not None else type(hook).__name__
        take_over(hook, self.batch_sizes[1])
        replacement = REPLACEMENTS.get(type(hook))
        if type(hook) not in NOT_NEEDED:
            super().register_hook(replacement() if replacement else hook, hook_name, priority)

    def process_batch(self, input_args: Sequence[str] | None = None, **batch: Tensor) -> dict[str, Tensor]:
        """The entries that the USB class's step takes; through USB's own method, which a class may override."""
        names = [*self.batches.parameters, *self.batches.views] if input_args is None else input_args
        with usb_calls_on(self.device):
            return super().process_batch(names, **batch)

    # -- training

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """What surrounds the steps: USB's calls and kernels for this device; what they run into becomes a UserError."""

        def tell(operation: str) -> None:
            text = f"{operation} has no deterministic algorithm here: equal seeds may give other weights"
            self.monitor.warn(text, text)

        batch = self.settings.total_batch
        less = f"a smaller --total_batch (it is {batch}) or --net, --precision bf16 or --data_on host"
        with (
            usb_calls_on(self.device),
            deterministic_kernels(self.device, self.settings.deterministic, tell),
            memory_for("a training step", less),
            enough_images_for(self.settings.net, self.batches.size),
        ):
            yield

    def warmup(self) -> None:
        """The stage before training that some classes have (Dash); nothing for the others.

        Dash takes its first threshold from the loss on the "eval" loader, which is the test set. Here it sees the labelled
        training images, as its paper says: test labels are never used in training. The learning-rate schedule, on which it
        spends the steps of this stage, begins anew.
        """
        stage = getattr(super(), "warmup", None)
        if stage is None or self.it > 0:
            return
        assert self.scheduler is not None
        self._begin_alike()
        loaders, test = self.loader_dict, self.loader_dict["eval"]
        loaders["eval"] = fixed_images(self, self.source.train[self.split.labelled])
        began, rates = dict(self.scheduler.state_dict()), [g["lr"] for g in self.optimizer.param_groups]
        try:
            with self.computing():
                stage()
        finally:
            loaders["eval"] = test
        self.scheduler.load_state_dict(began)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _begin_alike(self) -> None:
        """Give every process the first one's nets."""
        for net in self.nets.values():
            distributed.copy_from_first_([*net.parameters(), *net.buffers()])

    def prepare_steps(self) -> None:
        """Called once before the first step of a run or of its continuation."""

    def loaders(self) -> tuple[StepLoader, StepLoader, FixedImages]:
        """Labelled, unlabelled and test loaders for USB's ``Trainer``: ``trainer.fit(*algorithm.loaders())``.

        The batches are those of :meth:`train`. Where there is no GPU, call ``Trainer`` within ``usb_calls_on("cpu")``.
        """
        self._begin_alike()
        with self.computing():
            self.prepare_steps()
        shared: dict[int, dict[str, Tensor]] = {}
        return StepLoader(self, LABELLED, shared), StepLoader(self, UNLABELLED, shared), self.loader_dict["eval"]

    def train(self) -> None:
        """Train from the present step to ``num_train_iter``, with USB's hooks.

        Raises:
            Interrupted: a stop was requested (see :meth:`request_stop`); a checkpoint has been written.
            DeviceError: out of memory.
            NotFinite: the loss, the gradient or the weights.
            RunError: outside a run of this package's, there are checkpoints that training from step 0 would replace.
        """
        if self.recorder is None and not self.it and not self.settings.overwrite and (self.run_dir / LATEST).exists():
            raise RunError(
                f"{self.run_dir}: already holds a run; load_model continues it, another save_name keeps both"
            )
        self.model.train()
        self._begin_alike()
        per_epoch = max(1, self.num_iter_per_epoch)
        if self.recorder is None and self.logger is not None:  # USB's train.py knows of no notes
            for note in self.notes:
                self.logger.info(note)
        with self.computing():
            self.epoch = self._epoch_of(self.it)
            self.call_hook("before_run")
            self.prepare_steps()
            self.clock.start()
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
        if self.settings.compile == "reduce-overhead":  # what the net's calls return is kept until the next step begins
            torch.compiler.cudagraph_mark_step_begin()
        return no_waiting(self.device)

    def _epoch_of(self, step: int) -> int:
        return min(step // max(1, self.num_iter_per_epoch), self.epochs - 1)

    def record(self, values: dict[str, float]) -> None:
        """Log the values of the step that is ending, without a recorder as USB's train.py does."""
        if self.recorder is not None:
            self.recorder.record(self, values)
            return
        if self.logger is not None and not distributed.rank():
            listed = ", ".join(f"{k.removeprefix('train/')} {v:.4g}" for k, v in values.items())
            self.logger.info(f"{self.it + 1}/{self.num_train_iter} iterations: {listed}")
        if self.tb_log is not None:
            self.tb_log.update(values, self.it)

    def evaluate(self, eval_dest: str = "eval", out_key: str = "logits", return_logits: bool = False) -> dict[str, Any]:
        """Metrics of the averaged net, before training of the live one: those of
        :func:`muscle_plugin.training.evaluation.prediction_metrics` under USB's keys (``eval/top-1-acc``, ...)."""
        net = self.ema_model if isinstance(self.ema, EMA) else self.model
        scores, truth = predict(self, net, self.loader_dict[eval_dest], out_key)
        if not len(truth):
            raise DataError(f"{self.settings.dataset}: there are no images to evaluate on")
        groups = self.test_sequestered if eval_dest == "eval" else None
        out: dict[str, Any] = {f"{eval_dest}/{k}": v for k, v in prediction_metrics(scores, truth, groups).items()}
        if return_logits:
            out[f"{eval_dest}/logits"] = scores.cpu().numpy()
        return out

    # -- checkpoints

    def save_model(self, save_name: str, save_path: str | Path, *further: str) -> None:
        """Write a checkpoint, whole or not at all, also under ``further`` names; of several processes the first one writes.

        Raises:
            NotFinite: something in the weights; the file that is there stays.
            WriteError: earlier checkpoints are as they were.
        """
        with self.clock.paused():
            self.monitor.check_now(self.it, self.nets)
            checkpoint.check_alike(self)
            content = checkpoint.collect(self)
            if content is None:
                return
            if self.recorder is not None:
                self.recorder.flush()  # no step before the checkpoint's may be lost
            folder = Path(save_path)
            for name in (save_name, *further):
                earlier = earlier_checkpoints(folder, self.settings.keep_checkpoints - 1) if name == LATEST else ()
                save_tensors(folder / name, content, earlier)
                if name == LATEST:
                    self.monitor.saved = self.it

    def load_model(self, load_path: str | Path, content: bytes | None = None) -> None:
        """Go to the state of a checkpoint, unless it is unreadable or of another run (InputError); its file's ``content`` may
        have been read already."""
        checkpoint.restore(self, checkpoint.read(self, Path(load_path), content), load_path)

    def _save_if_due(self) -> None:
        stopping, last = self._stopping(), self.it == self.num_train_iter
        evaluated = last or self.it % self.num_eval_iter == 0
        best = evaluated and self.evaluations and self.best_it == self.it - 1
        latest = last or stopping or self.it % (self.settings.num_save_iter or self.num_eval_iter) == 0
        names = [name for name, due in ((BEST, best), (LATEST, latest)) if due]
        if names:
            self.save_model(names[0], self.run_dir, *names[1:])
        if self.recorder is not None and (evaluated or stopping):
            self.recorder.write_result(self)
        if stopping and not last:
            raise Interrupted(f"stopped after step {self.it} of {self.num_train_iter}; saved {self.run_dir / LATEST}")

    # -- stopping

    def request_stop(self) -> None:
        """Make :meth:`train` save and raise :class:`Interrupted` after the step in progress."""
        self.stop_requested = True

    def _stopping(self) -> bool:
        """Whether to stop after this step; all processes at the same one."""
        if distributed.world_size() > 1 and self.it % AGREE_EVERY and self.it < self.num_train_iter:
            return False
        return distributed.any_process(self.stop_requested)

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM request a stop; a second Ctrl-C raises KeyboardInterrupt."""
        at_once = False

        def handler(number: int, _: object) -> None:
            nonlocal at_once
            if number == signal.SIGINT and self.stop_requested:
                at_once = True
                raise KeyboardInterrupt
            self.request_stop()

        kept = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except Exception as e:
            if at_once:  # PyTorch, interrupted in the middle of a file, has an error of its own
                raise KeyboardInterrupt from e
            raise
        finally:
            for s, previous in kept.items():
                signal.signal(s, previous)

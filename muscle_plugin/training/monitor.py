"""Watches a run's numbers: non-finite losses end it before they reach a checkpoint; a collapse, and a lack of pseudo-labels,
are reported once.

What a step finds stays on the device, in a few scalars and one number per logged value. It is read where the program waits
for the device anyway: at log steps, before evaluations and before checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from pydantic import Field
from torch import Tensor, nn

from muscle_plugin import distributed
from muscle_plugin.errors import NotFinite
from muscle_plugin.run_files import LATEST
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.training.state import StrictModel

#: Consecutive non-finite steps allowed under fp16 by default; the loss scaler leaves them out and scales down.
FP16_STEPS = 20
#: MUSCLE has collapsed if H(z) stays below this share of the labels' entropy for so many consecutive log lines.
LOW_ENTROPY, LOW_ENTROPY_LINES = 0.1, 5
#: A net has collapsed if all classes but one get less than this share of the test images that are theirs in so many
#: consecutive evaluations; with the second share it has not.
OTHERS, OTHERS_FINE, ONE_CLASS_EVALUATIONS = 0.05, 0.5, 3
#: The averaged net has caught up if no more than this share of it is from the first weights.
CAUGHT_UP = 0.1
#: Classes are uneven if one has more than this many times the labelled images of another.
UNEVEN = 2
#: Pseudo-labels teach next to nothing if the share of unlabelled images that get one has stayed below the first number until
#: this share of the run, and this step.
LOW_UTILISATION, UTILISED_BY, UTILISED_BY_STEP = 0.01, 0.5, 100

LOSS, GRADIENT = "loss", "gradient"
SHOWN = 10  # names of tensors in failure.json


class MonitorState(StrictModel):
    """What a checkpoint holds of a :class:`TrainingMonitor`.

    Attributes:
        run: (), consecutive non-finite steps.
        skipped: (), steps that the loss scaler left out.
        losses: (), steps whose loss was not finite.
        first: names of a step's values -> (K,) float64, the first step at which each was not finite.
        told: what a warning is about -> its text.
        last_line: the step and the training values of the last log line.
    """

    run: Tensor
    skipped: Tensor
    losses: Tensor
    first: dict[tuple[str, ...], Tensor] = Field(default_factory=dict)
    told: dict[str, str] = Field(default_factory=dict)
    last_line: dict[str, float] = Field(default_factory=dict)
    losses_seen: float = 0.0
    low_entropy: int = 0
    one_class: int = 0
    utilised: float = 0.0
    has_varied: bool = False

    def on(self, device: torch.device) -> MonitorState:
        """The same with its tensors on this device, in the types in which they are counted."""
        counts = {k: getattr(self, k).to(device, torch.int64).reshape(()) for k in ("run", "skipped", "losses")}
        first = {names: at.to(device, torch.float64).reshape(len(names)) for names, at in self.first.items()}
        return self.model_copy(update={**counts, "first": first})


class TrainingMonitor:
    """Knows whether a run's numbers are sound.

    Args:
        limit: consecutive non-finite steps to allow; one more ends the run.
        tell: shows a warning to the user.
        advise: what to do after a failure, given the step of the last checkpoint, or None without one, and whether
            weights had been updated before.
        labelled: (C,) labelled images per class.

    Attributes:
        state: what lasts.
        longest: (), consecutive non-finite steps at most, since the start of the process: more may be allowed on resume.
        saved: the step of the last checkpoint.
    """

    def __init__(
        self, device: torch.device, limit: int, tell: Callable[[str], None], advise: Callable[[int | None, bool], str],
        labelled: Tensor,
    ) -> None:  # fmt: skip
        self.limit, self.labelled = limit, labelled
        self._observed = 0
        self._device, self._tell, self._advise = device, tell, advise
        self.saved: int | None = None
        none = torch.zeros((), dtype=torch.int64)
        self.load(MonitorState(run=none, skipped=none, losses=none))

    def load(self, state: MonitorState) -> None:
        """Go on from this state."""
        self.state = state.on(self._device)
        self.longest = self.state.run

    def observe(
        self, step: int, loss: Tensor, gradient: Tensor | None, skipped: Tensor | None, log: Mapping[str, object]
    ) -> None:
        """Take in a step's values, which are not read yet.

        Args:
            gradient: (), its norm, or any value that is finite if it is; None: not known.
            skipped: (), more than 0 if the loss scaler left the step out.
            log: what the step logs, of which floating-point scalars on the loss's device count.
        """
        self._observed += 1
        values = {LOSS: loss} | ({} if gradient is None else {GRADIENT: gradient})
        decisive = len(values)
        tensors = {k: v for k, v in log.items() if isinstance(v, Tensor) and v.is_floating_point()}
        values |= {k: v for k, v in tensors.items() if v.numel() == 1 and v.device == loss.device}
        stacked = torch.stack([v.detach().reshape(()) for v in values.values()])  # of the widest type among them
        bad = (stacked - stacked).ne(0)  # in fewer operations than isfinite: infinity less itself is no number
        names = tuple(values)
        if names not in self.state.first:
            self.state.first[names] = torch.full((len(names),), math.inf, dtype=torch.float64, device=bad.device)
        first = torch.where(bad, self.state.first[names].clamp(max=step), self.state.first[names])
        self.state.run = torch.where(bad[:decisive].any(), self.state.run + 1, 0)
        self.longest = torch.maximum(self.longest, self.state.run)
        self.state.losses = self.state.losses + bad[0]
        if skipped is not None:
            self.state.skipped = self.state.skipped + (skipped > 0)
        if self.limit:  # steps that were left out, and others after them, are over and done with
            first = torch.where((self.state.run == 0) & (self.longest <= self.limit), math.inf, first)
        self.state.first[names] = first

    def counts(self) -> dict[str, Tensor]:
        """What to read for :meth:`check`, by name."""
        return {"longest": self.longest, "losses": self.state.losses, "skipped": self.state.skipped}

    def check(self, step: int, counts: Mapping[str, float], means: Mapping[str, float]) -> None:
        """At a log step: end the run (NotFinite) after too many consecutive non-finite steps; warn of logged ``means`` that are
        not finite although the loss is, into which they do not enter then. ``counts`` are means over processes."""
        if counts["longest"] > self.limit:
            self._fail(step)
        if counts["losses"] == self.state.losses_seen:
            for name, value in means.items():
                if not math.isfinite(value):
                    self.warn(name, f"{name} is not finite, but the loss is: training goes on")
        self.state.losses_seen = counts["losses"]

    def check_now(self, step: int, nets: Mapping[str, nn.Module]) -> None:
        """Before an evaluation or a checkpoint: check the nets too, whose last change no loss has seen. Raises NotFinite in all
        processes."""
        tensors = {
            f"{name} of {which}": t
            for which, net in nets.items()
            for name, t in net.state_dict().items()
            if t.is_floating_point()
        }
        flags = torch.stack([self.longest <= self.limit, *(t.isfinite().all() for t in tensors.values())]).tolist()
        lost = [name for name, fine in zip(tensors, flags[1:], strict=True) if not fine]
        if distributed.any_process(not all(flags)):
            self._fail(step, lost)

    def _fail(self, step: int, lost: Sequence[str] | None = None) -> NoReturn:
        """Raise NotFinite; ``lost`` are the tensors of the nets that are not finite, None: not looked at."""
        own = {n: at for names, t in self.state.first.items() for n, at in zip(names, t.tolist(), strict=True)}
        first: dict[str, int] = {}
        for found in distributed.gather_objects(own):
            for name, at in found.items():
                if math.isfinite(at):
                    first[name] = min(int(at), first.get(name, int(at)))
        decisive = [n for n in (LOSS, GRADIENT) if n in first]
        begin = min((first[n] for n in decisive), default=step)
        what = f"the {' and the '.join(decisive)}" if decisive else lost[0] if lost else f"the {LOSS}"
        row = f" in more than {self.limit} consecutive steps (nonfinite_steps)" if self.limit and decisive else ""
        terms = [n for n, at in first.items() if at <= begin and n not in (LOSS, GRADIENT)]
        parts = [f"step {begin}: {what} {'are' if len(decisive) > 1 else 'is'} not finite{row}; noticed at step {step}"]
        if terms:
            parts.append(f"first non-finite logged values: {', '.join(terms)}")
        if self.state.last_line:
            values = ", ".join(f"{k} {v:.4g}" for k, v in self.state.last_line.items() if k != "step")
            parts.append(f"last log line, step {self.state.last_line['step']:.0f}: {values}")
        details = {
            "noticed_at_step": step,
            "not_finite_since_step": first,
            "weights_not_finite": None if lost is None else list(lost[:SHOWN]),
            "last_finite": self.state.last_line,
            "last_checkpoint_step": self.saved,
        }
        # Dash's warm-up has counted steps of its own
        updated = not decisive or begin > 1 or self._observed > step
        raise NotFinite("; ".join([*parts, self._advise(self.saved, updated)]), details)

    def warn(self, about: str, text: str) -> None:
        """Tell the user: on the terminal, in the log and in ``result.json``; once per run and subject."""
        if about not in self.state.told:
            self.state.told[about] = text
            self._tell(text)

    def _helpful(self, even: str = "") -> str:
        """What may help against a collapse beside a smaller --lr: as many labels of each class, else ``even``."""
        least, most = self.labelled.aminmax()
        uneven = f", as many labelled images of each class (now {least} to {most})"
        return uneven if most > UNEVEN * least else even

    def see_entropy(self, step: int, entropy: float) -> None:
        """Warn of MUSCLE's collapse, given the mean H(z) since the last log line in nats."""
        most = float(torch.special.entr(self.labelled / self.labelled.sum()).sum())
        self.state.low_entropy = self.state.low_entropy + 1 if entropy < LOW_ENTROPY * most else 0
        if self.state.low_entropy == LOW_ENTROPY_LINES:
            self.warn(
                "entropy",
                f"H(z) has collapsed: {entropy:.3f} nats at step {step}, of the labels' {most:.2f}: nearly all images get"
                " one class. What may help: a smaller --lr or --ulb_loss_ratio"
                f"{self._helpful(', a larger --mi_weight or batch')}; and look at the views with `muscle-plugin data show`",
            )

    def see_evaluation(self, step: int, share: float, largest: float, last: bool, ema_m: float) -> None:
        """Warn of a net that has come to give nearly all test images one class, or does so at the end of the run: its ``share``
        gets the class most often given, ``largest`` is that of the largest class; ``ema_m`` is the momentum of its average.
        A net (and even more its average) that does so at first is no news."""
        others, theirs = 1 - share, 1 - largest
        self.state.has_varied |= others >= OTHERS_FINE * theirs
        self.state.one_class = self.state.one_class + 1 if others < OTHERS * theirs else 0
        if self.state.one_class and (last or (self.state.has_varied and self.state.one_class >= ONE_CLASS_EVALUATIONS)):
            first = "a smaller --lr"
            if ema_m**step > CAUGHT_UP:
                first = f"more steps or a smaller --ema_m (it is {ema_m:g}): the averaged net has not caught up"
            self.warn(
                "one class",
                f"{100 * share:.1f} % of the test images are given one and the same class at step {step}, but the largest"
                f" class has {100 * largest:.1f} % (see balanced_acc in result.json). What may help: {first}{self._helpful()}",
            )

    def see_utilisation(self, step: int, steps: int, ratio: float, cutoff: float | None) -> None:
        """Warn where hardly any unlabelled image has got a pseudo-label in the first part of a run of ``steps``: ``ratio``
        of them since the last log line, by a confidence of at least ``cutoff``, where that is a setting."""
        self.state.utilised = max(self.state.utilised, ratio)
        if self.state.utilised < LOW_UTILISATION and step >= max(UTILISED_BY * steps, UTILISED_BY_STEP):
            lower = f"a lower --p_cutoff (it is {cutoff:g}), " if cutoff is not None else ""
            self.warn(
                "utilisation",
                f"train/util_ratio has stayed below {LOW_UTILISATION:g} up to step {step} of {steps}: hardly any unlabelled"
                f" image passes the confidence threshold. What may help: {lower}more steps, more labelled images",
            )


def advice(settings: RunSettings, precision: str, run_dir: Path, saved: int | None, updated: bool) -> str:
    """What to do about a loss that is not finite, given the step of the run's last checkpoint, and whether weights had
    been updated before it."""
    helps = [f"a smaller --lr (it is {settings.lr:g})"]
    if not settings.clip_grad:
        helps.append("--clip_grad 1")
    if not updated:
        helps = ["other images or labels (see `muscle-plugin data show`)", f"other settings of {settings.algorithm}"]
        if settings.init_from or settings.use_pretrain:
            helps.append("other initial weights")
    if precision == "fp16":
        helps.append("--precision bf16 or fp32")
    why = "" if updated else "no update came before it, so the learning rate is not the cause; "
    helpful = f"{why}what usually helps: {', '.join(helps)}, in a run of another --save_name"
    if saved is None:
        return f"no checkpoint had been written; {helpful}"
    path = run_dir / LATEST
    start = f", or one from that checkpoint's weights by --init_from {path}" if saved else ""
    return (
        f"the last checkpoint, {path} of step {saved}, is from before and whole; {helpful}{start} (--resume would fail at the"
        " same step)"
    )

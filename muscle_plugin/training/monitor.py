"""Whether a run is still sound: losses that are not finite end it before they reach a checkpoint; a collapse is said once.

What a step finds stays on the device, in a few scalars and one number per logged value, and is read where the program waits
anyway: at log steps, before evaluations and before checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from muscle_plugin import distributed
from muscle_plugin.errors import NotFinite

#: Steps in a row whose loss or gradient may be not finite under fp16, whose loss scaler leaves these out and scales down.
FP16_STEPS = 20
#: MUSCLE's H(z) is taken for collapsed below this share of ln C in so many log lines in a row.
LOW_ENTROPY, LOW_ENTROPY_LINES = 0.1, 5
#: A net that gives more test images than this one class, of a test set that is not so, has collapsed.
ONE_CLASS, ONE_CLASS_EVALUATIONS = 0.95, 3

LOSS, GRADIENT = "loss", "gradient"
SHOWN = 10  # names of tensors in failure.json


class TrainingMonitor:
    """What is known of a run's numbers.

    Args:
        device: of the losses.
        limit: steps in a row that may be not finite; more end the run.

    Attributes:
        run, longest: (), steps in a row that were not finite, now and at most.
        skipped: (), steps that the loss scaler left out.
        losses: (), steps whose loss was not finite.
        warnings: what the user has been told, each once.
        saved: the step of the last checkpoint.
        last_line: the step and the training values of the last log line.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.limit = limit
        self._device = device
        self.run, self.longest, self.skipped, self.losses = torch.zeros(4, dtype=torch.int64, device=device).unbind()
        #: names of a step's values -> (K,) float64, the first step at which each was not finite.
        self._first: dict[tuple[str, ...], Tensor] = {}
        self._losses_seen = 0.0
        self.warnings: list[str] = []
        self.saved: int | None = None
        self.last_line: dict[str, float] = {}
        self._low_entropy = self._one_class = 0
        self._has_varied = False

    # ------------------------------------------------------------------------------------------------------- each step

    def observe(self, step: int, loss: Tensor, gradient: Tensor | None, skipped: Tensor | None, log: Any) -> None:
        """Take in a step's values; nothing is read.

        Args:
            step: counted from 1.
            gradient: (), its norm, or whatever is not finite if it is not; None: not known.
            skipped: (), more than 0 if the loss scaler left the step out.
            log: name -> what the step logs. Numbers are ignored: what an algorithm reports as a number it has read itself;
                so are tensors that are not where the loss is.
        """
        values = {LOSS: loss} | ({} if gradient is None else {GRADIENT: gradient})
        decisive = len(values)
        tensors = {k: v for k, v in log.items() if isinstance(v, Tensor) and v.is_floating_point()}
        values |= {k: v for k, v in tensors.items() if v.numel() == 1 and v.device == loss.device}
        stacked = torch.stack([v.detach().reshape(()) for v in values.values()])  # of the widest type among them
        bad = (stacked - stacked).ne(0)  # in fewer operations than isfinite: infinity less itself is no number
        names = tuple(values)
        if names not in self._first:
            self._first[names] = torch.full((len(names),), math.inf, dtype=torch.float64, device=bad.device)
        first = torch.where(bad, self._first[names].clamp(max=step), self._first[names])
        self.run = torch.where(bad[:decisive].any(), self.run + 1, 0)
        self.longest = torch.maximum(self.longest, self.run)
        self.losses = self.losses + bad[0]
        if skipped is not None:
            self.skipped = self.skipped + (skipped > 0)
        if self.limit:  # steps that were left out, and others after them, are over and done with
            first = torch.where((self.run == 0) & (self.longest <= self.limit), math.inf, first)
        self._first[names] = first

    # ---------------------------------------------------------------------------------------- where one waits anyway

    def counts(self) -> dict[str, Tensor]:
        """What to read for :meth:`check`, by name."""
        return {"longest": self.longest, "losses": self.losses, "skipped": self.skipped}

    def check(self, algorithm: Any, step: int, counts: dict[str, float], means: dict[str, float]) -> None:
        """At a log step: end the run if too many steps in a row were not finite; say which values were not although the
        loss was: these do not enter it, and training goes on.

        Args:
            counts: of :meth:`counts`, means over processes.
            means: of the tensors that were logged, over steps and processes.

        Raises:
            NotFinite: in all processes.
        """
        if counts["longest"] > self.limit:
            self._fail(algorithm, step)
        if counts["losses"] == self._losses_seen:
            for name, value in means.items():
                if not math.isfinite(value):
                    self.warn(algorithm, f"{name} is not finite, but the loss is: training goes on", key=name)
        self._losses_seen = counts["losses"]

    def check_now(self, algorithm: Any, step: int) -> None:
        """Before an evaluation or a checkpoint: also the weights and averages, whose last change no loss has seen.

        Raises:
            NotFinite: in all processes.
        """
        nets = {"the net": algorithm.model, "the averaged net": algorithm.ema_model}
        tensors = {
            f"{name} of {which}": t
            for which, net in nets.items()
            for name, t in net.state_dict().items()
            if t.is_floating_point()
        }
        flags = torch.stack([self.longest <= self.limit, *(t.isfinite().all() for t in tensors.values())]).tolist()
        lost = [name for name, fine in zip(tensors, flags[1:], strict=True) if not fine]
        if distributed.any_process(not all(flags)):
            self._fail(algorithm, step, lost)

    def _fail(self, algorithm: Any, step: int, lost: list[str] | None = None) -> None:
        own = {n: at for names, t in self._first.items() for n, at in zip(names, t.tolist(), strict=True)}
        first: dict[str, int] = {}
        for found in distributed.gather_objects(own):
            for name, at in found.items():
                if math.isfinite(at):
                    first[name] = min(int(at), first.get(name, int(at)))
        begin = min(first.values(), default=step)
        details = {
            "noticed_at_step": step,
            "not_finite_since_step": first,
            "weights_not_finite": (lost or [])[:SHOWN],
            "last_finite": self.last_line,
            "last_checkpoint_step": self.saved,
        }
        raise NotFinite(self._words(algorithm, step, begin, first, lost or []), details)

    def _words(self, algorithm: Any, step: int, begin: int, first: dict[str, int], lost: list[str]) -> str:
        args = algorithm.args
        decisive = [n for n in (LOSS, GRADIENT) if n in first]
        what = f"the {' and the '.join(decisive)}" if decisive else lost[0] if lost else f"the {LOSS}"
        row = f" in more than {self.limit} steps in a row (nonfinite_steps)" if self.limit and decisive else ""
        terms = [n for n, at in first.items() if at == begin and n not in (LOSS, GRADIENT)]
        parts = [f"step {begin}: {what} {'are' if len(decisive) > 1 else 'is'} not finite{row}; noticed at step {step}"]
        if terms:
            parts.append(f"of the logged values first {', '.join(terms)}")
        if self.last_line:
            values = ", ".join(f"{k} {v:.4g}" for k, v in self.last_line.items() if k != "step")
            parts.append(f"last log line, step {self.last_line['step']:.0f}: {values}")
        path = algorithm.run_dir / "latest_model.pth"
        kept = "no checkpoint had been written"
        if self.saved is not None:
            kept = f"the last checkpoint, {path} of step {self.saved}, is from before and whole"
        parts.append(kept)
        helps = [f"a smaller --lr (it is {args.lr:g})"]
        if not args.clip_grad:
            helps.append("--clip_grad 1")
        if algorithm.precision == "fp16":
            helps.append("--precision bf16 or fp32")
        again = " (--resume would come to the same)" if self.saved is not None else ""
        start = f", or one from that checkpoint's weights by --init_from {path}" if self.saved else ""
        parts.append(f"what usually helps: {', '.join(helps)}, in a run of another --save_name{start}{again}")
        return "; ".join(parts)

    # -------------------------------------------------------------------------------------------------------- warnings

    def warn(self, algorithm: Any, text: str, key: str | None = None) -> None:
        """Tell the user, once per run: on the terminal, in the log and in ``result.json``.

        Args:
            key: how the text begins, if it says something else each time.
        """
        if any(w.startswith(key or text) for w in self.warnings):
            return
        self.warnings.append(text)
        algorithm.print_fn(f"warning: {text}")
        if algorithm.recorder is not None:
            algorithm.recorder.warn(text)

    def see_entropy(self, algorithm: Any, step: int, entropy: float) -> None:
        """Warn of MUSCLE's collapse.

        Args:
            entropy: H(z), nats, mean since the last log line.
        """
        most = math.log(algorithm.num_classes)
        self._low_entropy = self._low_entropy + 1 if entropy < LOW_ENTROPY * most else 0
        if self._low_entropy == LOW_ENTROPY_LINES:
            self.warn(
                algorithm,
                f"H(z) has collapsed: {entropy:.3f} nats at step {step}, of at most {most:.2f}: nearly all images get one"
                " class. What may help: a smaller --lr, a larger --mi_weight or batch, a smaller --ulb_loss_ratio; and look at"
                " the views with `muscle-plugin data show`",
                key="H(z) has collapsed",
            )

    def see_evaluation(self, algorithm: Any, step: int, share: float, last: bool) -> None:
        """Warn of a net that has come to give nearly all test images one class, or gives so at the end of the run. A net
        (and its average more so) that does so at first is no news.

        Args:
            share: of the test images that are given the class most often given.
            last: whether the run ends here.
        """
        counts = algorithm.source.test_labels.bincount()
        if counts.max() > len(algorithm.source.test) / 2:  # such a set may call for it
            return
        self._has_varied |= share <= 0.5
        self._one_class = self._one_class + 1 if share > ONE_CLASS else 0
        if self._one_class and (last or (self._has_varied and self._one_class >= ONE_CLASS_EVALUATIONS)):
            self.warn(
                algorithm,
                f"{100 * share:.1f} % of the test images are given one and the same class at step {step}"
                " (a smaller --lr may help; with --ema_m near 1 a short run's averaged net has not caught up yet)",
                key=f"{100 * share:.1f} %",
            )

    # ----------------------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            **{k: getattr(self, k).detach().cpu().clone() for k in ("run", "skipped", "losses")},
            "first": [[list(names), t.detach().cpu().clone()] for names, t in self._first.items()],
            "warnings": list(self.warnings),
            "last_line": dict(self.last_line),
            "seen": [self._losses_seen, self._low_entropy, self._one_class, self._has_varied],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`. ``longest`` begins anew: more steps may be allowed now.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is no such state.
        """
        self.run, self.skipped, self.losses = (
            state[k].to(self._device, torch.int64).reshape(()) for k in ("run", "skipped", "losses")
        )
        self.longest = self.run
        self._first = {tuple(map(str, names)): t.to(self._device).reshape(len(names)) for names, t in state["first"]}
        self.warnings, self.last_line = list(map(str, state["warnings"])), dict(state["last_line"])
        self._losses_seen, self._low_entropy, self._one_class, self._has_varied = seen = state["seen"]
        if not all(isinstance(x, (bool, int, float)) for x in (*self.last_line.values(), *seen)):
            raise ValueError("last_line and seen hold numbers")

"""Kills runs and resumes them: ``python benchmarks/chaos.py --kills 30 --seed 0 [-- words of train.py]``.

One run goes through uninterrupted. Then the same run is killed (SIGKILL) and resumed (``--resume auto``) again and again, at
moments drawn from a seeded generator: after a random time, and inside each phase of a run (a step, an evaluation, the writing
and renaming of checkpoints, a line of the log, a refresh of pseudo-labels, the border between two stages, the resumption
itself). A run that comes to its end is compared with the uninterrupted one, and the next one is begun, until all kills have
been made.

Compared to the bit: weights, averaged weights, optimiser, hooks and random states of all checkpoints, ``metrics.jsonl``,
``result.json`` and ``split.json`` (all without times), TensorBoard's scalars. After each kill the checkpoints must be whole,
and the next attempt must begin at the step of the newest one. Exit status 1 if anything differs.

Everything is imported once; each attempt is a fork of this process. Phases are seen by wrapping functions in that child.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # another device's rounding is another question

import torch

import muscle_plugin.register  # noqa: F401  so that a fork need not import it
from muscle_plugin import files
from muscle_plugin.algorithms.label_propagation import PseudoLabels
from muscle_plugin.cli import run_command
from muscle_plugin.run_files import LATEST
from muscle_plugin.runs.recorder import Recorder
from muscle_plugin.training import host
from muscle_plugin.training.hooks import HostParamUpdateHook

ROOT = Path(__file__).resolve().parent.parent
#: What runs if no words name a configuration: both stages, refreshes.
DEFAULT = (
    "--c", str(ROOT / "benchmark_configs/muscle_meanteacher_labelprop_digits_10.yaml"), "--lp_start", "0.5",
)  # fmt: skip
#: Evaluations and checkpoints every few steps, in a few seconds. What the words say wins.
SMALL = (
    "--img_size", "16", "--total_batch", "16", "--num_train_iter", "48", "--epoch", "6", "--num_eval_iter", "7",
    "--num_log_iter", "2", "--num_save_iter", "3", "--num_threads", "1", "--ema_m", "0.9",
)  # fmt: skip
ANYWHERE = "anywhere (by time)"
TIMES = {"seconds", "images_per_second", "train_seconds"}


# ------------------------------------------------------------------------------------------------------------ one attempt


@dataclass(frozen=True)
class Aim:
    """When an attempt dies: inside the ``call``-th passage of a phase, ``after`` seconds from its beginning; of the
    phase ANYWHERE ``after`` seconds from the beginning of the attempt."""

    phase: str
    call: int = 1
    after: float = 0.0


class Phases:
    """Counts and times the passages of each phase in this process, and dies in one of them.

    Args:
        journal: file that is told when training begins, and in the end of all passages.
    """

    def __init__(self, aim: Aim | None, journal: Path) -> None:
        self._aim, self._journal = aim, journal
        self.calls: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()

    def wrap(self, owner: Any, name: str, phase: str, counts: Callable[..., bool] = lambda *_, **__: True) -> None:
        """Make ``owner.name`` a phase, as far as ``counts`` says of a call's arguments."""
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not counts(*args, **kwargs):
                return inner(*args, **kwargs)
            self.calls[phase] += 1
            if self._aim is not None and (self._aim.phase, self._aim.call) == (phase, self.calls[phase]):
                self._die_after(self._aim.after)
            began = time.perf_counter()
            out = inner(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - began
            return out

        setattr(owner, name, wrapped)

    def _die_after(self, seconds: float) -> None:
        def die() -> None:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        if seconds == 0:
            die()
        threading.Thread(target=die, daemon=True).start()

    def half_a_line(self) -> None:
        """A phase that dies with half of a line of the log written."""
        inner = Recorder.record

        def record(recorder: Any, algorithm: Any, values: dict[str, float]) -> None:
            phase = "half a log line"
            self.calls[phase] += 1
            if self._aim is not None and (self._aim.phase, self._aim.call) == (phase, self.calls[phase]):
                with (recorder.run_dir / "metrics.jsonl").open("a") as f:
                    f.write(f'{{"step": {algorithm.it + 1}, "epo')
                self._die_after(0)
            inner(recorder, algorithm, values)

        Recorder.record = record  # type: ignore[method-assign]

    def install(self) -> None:
        """Wrap everything."""
        self.half_a_line()
        of_latest = lambda path, *_: Path(path).name == LATEST  # noqa: E731
        at_border = lambda a: a.it == getattr(a, "stage_1_steps", -1)  # noqa: E731
        renames = SimpleNamespace(replace=os.replace, link=os.link)
        self.wrap(HostParamUpdateHook, "after_train_step", "training step")
        self.wrap(host.Host, "evaluate", "evaluation")
        self.wrap(host, "save_tensors", "writing the newest", of_latest)
        self.wrap(host, "save_tensors", "writing the best", lambda *a: not of_latest(*a))
        self.wrap(renames, "replace", "renaming")
        self.wrap(renames, "link", "renaming")
        self.wrap(Recorder, "record", "log line")
        self.wrap(Recorder, "write_result", "result.json")
        self.wrap(PseudoLabels, "refresh_pseudo_labels", "pseudo-labels")
        self.wrap(host.Host, "_save_if_due", "between the stages", at_border)
        self.wrap(host.Host, "load_model", "resuming")
        files.os = _Instead(os, renames)  # type: ignore[assignment]
        inner = host.Host.train

        def train(algorithm: Any) -> None:
            self._journal.write_text(json.dumps({"began_at": algorithm.it}))
            inner(algorithm)

        host.Host.train = train  # type: ignore[method-assign]


class _Instead:
    """A module with some functions of another object's."""

    def __init__(self, module: Any, functions: SimpleNamespace) -> None:
        self._module, self._functions = module, functions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name, None) or getattr(self._module, name)


def attempt(words: Sequence[str], aim: Aim | None, folder: Path) -> tuple[int, bool, dict[str, Any]]:
    """Run ``train.py`` in a fork: its exit status, whether it was killed, and its journal. Output goes to ``output.txt``."""
    journal = folder / "journal.json"
    journal.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            out = os.open(folder / "output.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            phases = Phases(aim, journal)
            phases.install()
            began = time.perf_counter()
            status = run_command("train", [*words, "--resume", "auto"], "train.py")
            passages = {
                "calls": phases.calls,
                "seconds": phases.seconds,
                "all": time.perf_counter() - began,
            }
            journal.write_text(json.dumps({**json.loads(journal.read_text()), **passages}))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    if aim is not None and aim.phase == ANYWHERE:
        deadline = time.monotonic() + aim.after
        while time.monotonic() < deadline:
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                return _told(code, journal)
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
    return _told(os.waitpid(child, 0)[1], journal)


def _told(code: int, journal: Path) -> tuple[int, bool, dict[str, Any]]:
    killed = os.WIFSIGNALED(code) and os.WTERMSIG(code) == signal.SIGKILL
    try:
        told = json.loads(journal.read_text())
    except (OSError, ValueError):  # it died before
        told = {}
    return os.waitstatus_to_exitcode(code), killed, told


# ------------------------------------------------------------------------------------------------------------- comparison


def differences(a: Any, b: Any, where: str) -> list[str]:
    """Where two nested values differ to the bit, times left out."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        alike = a.dtype == b.dtype and a.shape == b.shape
        return [] if alike and torch.equal(*(x.contiguous().view(-1).view(torch.uint8) for x in (a, b))) else [where]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k not in TIMES]
        return [d for k in keys for d in differences(a.get(k, "absent"), b.get(k, "absent"), f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")]
    return [] if repr(a) == repr(b) else [f"{where}: {str(a)[:80]} against {str(b)[:80]}"]


def compare(whole: Path, cut: Path) -> list[str]:
    """What a run that was killed and one that was not differ in."""
    found = []
    names = sorted({p.name for r in (whole, cut) for p in r.glob("*.pth")})
    for name in names:
        a, b = (files.load_tensors(r / name) if (r / name).exists() else {} for r in (whole, cut))
        found += differences(a, b, name)
    for name in ("result.json", "split.json"):
        found += differences(*(json.loads((r / name).read_text()) for r in (whole, cut)), name)
    rows = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (whole, cut)]
    found += differences(*([row["step"] for row in some] for some in rows), "metrics.jsonl: steps")
    found += differences(*rows, "metrics.jsonl")
    found += differences(*(scalars(r / "tensorboard") for r in (whole, cut)), "tensorboard")
    found += [f"{p.name} was left behind" for p in cut.glob(".*.part")]
    return found


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: tag -> (step, value)."""
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it tells of every resumption
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# ------------------------------------------------------------------------------------------------------------ the harness


def newest_step(run_dir: Path) -> int:
    """The step from which a run must go on."""
    path = run_dir / LATEST
    return int(files.load_tensors(path)["it"]) if path.exists() else 0


def damaged(run_dir: Path) -> list[str]:
    """Checkpoints that a kill has damaged."""
    found = []
    for path in run_dir.glob("*.pth"):
        try:
            files.read_whole(path)
        except ValueError as e:
            found.append(str(e))
    return found


def draw(rng: random.Random, phase: str, told: dict[str, Any], kills: int) -> Aim:
    """A moment in a phase: few passages from the beginning of an attempt, so that many kills fit into one run."""
    if phase == ANYWHERE:
        return Aim(phase, 1, rng.uniform(0, told["all"]))
    calls = told["calls"].get(phase, 1)
    length = told["seconds"].get(phase, 0.0) / calls
    call = rng.randint(1, max(1, min(calls, 4 * calls // kills)))
    return Aim(phase, call, rng.choice([0.0, rng.uniform(0, length)]))


def chaos(words: Sequence[str], kills: int, seed: int, folder: Path) -> list[str]:
    """Kill and resume, print what happened; returns what differs."""
    rng = random.Random(seed)

    def command(name: str) -> list[str]:
        return [*words, "--save_dir", str(folder), "--save_name", name]

    status, _, told = attempt(command("whole"), None, folder)
    if status:
        sys.exit(f"error: the uninterrupted run failed\n{(folder / 'output.txt').read_text()}")
    print(f"uninterrupted: {told['all']:.1f} s", flush=True)
    phases = [p for p in (*told["calls"], "resuming") if p != "renaming"] + ["renaming", ANYWHERE]
    waiting: list[str] = []
    made: Counter[str] = Counter()
    found: list[str] = []
    runs, fruitless = 0, 0
    while (sum(made.values()) < kills or runs == 0) and not found and fruitless < 20:
        runs += 1
        name, over = f"killed{runs}", False
        while not over and not found:
            if not waiting:
                waiting = rng.sample(phases, len(phases))
            # the last ones go through, and so does one that waits for a phase that is over
            aim = draw(rng, waiting[0], told, kills) if sum(made.values()) < kills else None
            step = newest_step(folder / name)
            status, killed, now = attempt(command(name), aim, folder)
            if now and now["began_at"] != step:
                found.append(f"{name}: began at step {now['began_at']}, its checkpoint was of {step}")
            found += damaged(folder / name)
            if killed and aim is not None:
                made[aim.phase] += 1
                waiting.pop(0)
                fruitless = 0
            elif status:
                found.append(f"{name}: exit status {status}: {(folder / 'output.txt').read_text()[-2000:]}")
            else:
                over = True
                fruitless += 1
                waiting.append(waiting.pop(0))
                found += [f"{name}: {d}" for d in compare(folder / "whole", folder / name)]
    for phase in phases:
        print(f"{made[phase]:4}  {phase}")
    print(f"{sum(made.values()):4}  kills, {runs} runs")
    if sum(made.values()) < kills:
        found.append(f"only {sum(made.values())} of {kills} kills were made")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    border = given.index("--") if "--" in given else len(given)
    own, words = given[:border], given[border + 1 :]
    parser = argparse.ArgumentParser(
        description="Kill a run at random moments, resume it, compare it with one never killed."
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the runs, which then stay [a temporary one]")
    options = parser.parse_args(own)
    torch.set_num_threads(1)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = chaos([*SMALL, *(() if "--c" in words else DEFAULT), *words], options.kills, options.seed, folder)
    finally:
        if options.keep is None:
            shutil.rmtree(folder)
    print("\n".join(found) or "identical")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""GPU checks that fit into a loan of fifteen minutes, in two parts. See benchmarks/device.sh.

Each part writes at most seven files to OUT, as it goes on: ``<part>.txt`` (what the commands print), ``<part>.json``
(device, versions, revision, date; each command with its status, seconds and figures), ``summary.md`` of the parts that are
there; of training besides each run's ``train.<algorithm>.metrics.jsonl``, where ``wall`` is seconds since both runs were
started, and ``train.<algorithm>.result.json``. Ends with 1 if a command failed or ran out of time, with 2 if it could not
begin.

Needs the standard library alone: what the commands need may have to be unpacked from wheels first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from device_summary import CHECK, ENDED_WELL, SCORE, TRAIN, compared, summary

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {CHECK: 4.0, TRAIN: 7.0}
#: Seconds that a command has on top to save what it has, once its time is over; kept free at the end.
GRACE = 10
#: Files of tests that want a GPU; the order of the tests in them is benchmarks/device_tests.py's.
CUDA_TESTS = ("tests/test_cuda.py",)
TRAINED = ("fixmatch", "muscle_fixmatch")
#: Share of the time that training is to fill, by the pace of short runs: a run that ends is worth more.
FILLED = 0.85

ABOUT = """
import importlib, json, os, shutil, subprocess, sys
from importlib import metadata
import torch
import muscle_plugin.register
cuda = sys.argv[1] != "cpu"
if cuda and not torch.cuda.is_available():
    sys.exit("PyTorch finds no CUDA device; --device cpu rehearses")
for name in sys.argv[2:]:
    importlib.import_module(name)
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
driver = None
if cuda and shutil.which("nvidia-smi"):
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\\n")[0].strip() or None
names = ("torch", "triton", "torchvision", "timm", "semilearn", "scikit-learn")
print(json.dumps({
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
    "cuda": torch.version.cuda if cuda else None,
    "driver": driver,
    "cpus": os.cpu_count(),
    "versions": {"python": sys.version.split()[0], **{n: version(n) for n in names}},
}))
"""


def checks(device: str) -> dict[str, tuple[float, str]]:
    """Name -> its seconds of four minutes, and its Python command, to which ``--json FILE`` is added; most telling first.

    A new check is a new line here.
    """
    cuda = device == "cuda"
    tests = (
        "-m pytest --verbose --tb short --no-summary -o addopts= -p no:cacheprovider -p benchmarks.device_tests"
        f" -n {6 if cuda else 1} --maxschedchunk 1 --timeout 60 --timeout-method thread"  # a hang ends one of the workers
    )
    step = f"benchmarks/step.py --device {device} --data_dir made --algorithms muscle_fixmatch fixmatch"
    step += " --nets cnn13 --seconds 0.5 --rounds 3" if cuda else " --batch 8 --seconds 0.1 --rounds 1 --workers 0"
    seconds = 0.5 if cuda else 0.05
    points = 50_000 if cuda else 1000
    profile = f"benchmarks/step_profile.py --device {device} --data_dir made --precision bf16"
    profile += " --net cnn13" if cuda else " --batch 8 --warm 3 --steps 3"
    return {
        **{file: (60 / len(CUDA_TESTS), f"{tests} {file}") for file in CUDA_TESTS},
        "step bf16": (40, f"{step} --precision bf16"),  # stock USB: fp16, its amp; the first one compiles
        "step fp32": (30, f"{step} --precision fp32"),
        "views": (25, f"benchmarks/views.py --device {device} --seconds {seconds}{'' if cuda else ' --batch 32'}"),
        "propagation": (15, f"benchmarks/propagation.py --device {device} --sizes {points} --classes 10"),
        "profile": (20, profile),
        **({"step bf16, fastest kernels": (30, f"{step} --precision bf16 --fastest")} if cuda else {}),
    }


# -------------------------------------------------------------------------------------------------------------- report


class Report:
    """What one part has run, in OUT."""

    def __init__(self, out: Path, part: str, about: dict[str, Any], environment: dict[str, str]) -> None:
        self.out, self.part, self.environment = out, part, environment
        self.content: dict[str, Any] = {**about, "commands": []}
        self._text = (out / f"{part}.txt").open("x")
        self._turn = threading.Lock()
        self.write()

    def say(self, text: str) -> None:
        with self._turn:
            for file in (sys.stdout, self._text):
                print(text, end="", file=file, flush=True)

    def write(self) -> None:
        """Bring to file what is known."""
        (self.out / f"{self.part}.json").write_text(json.dumps(self.content, indent=1) + "\n")
        try:
            text = summary(self.out)
        except (
            Exception
        ) as error:  # the visit goes on: the figures are on file, and device_summary.py can be mended later
            text = f"no summary: {type(error).__name__}: {error}\n"
        (self.out / "summary.md").write_text(text)

    def run(self, name: str, command: str, seconds: float, figures: Path | None = None) -> bool:
        """Run Python with these arguments for at most so many seconds; whether it ended well.

        Args:
            figures: a file that the command writes its figures to.
        """
        done = self.together({name: command}, seconds)
        if figures is not None and figures.exists():
            self.content["commands"][-1]["figures"] = json.loads(figures.read_text())
            self.write()
        return done[name] == 0

    def together(
        self, commands: Mapping[str, str], seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> dict[str, int | str]:
        """Run Python with each command's arguments, all at the same time, for at most so many seconds.

        Args:
            commands: by their names.
            enough: asked all the time, and once more in the end; ends them early.

        Returns:
            Exit statuses; "stopped" where there was enough, "out of time", or "no time left" to begin.
        """
        for name, command in commands.items():
            self.say(f"== {name}: python {command}\n")
        began = time.monotonic()
        found: dict[str, int | str] = dict.fromkeys(commands, "no time left")
        if seconds > 0:
            found = self._together(commands, began + seconds, enough)
        took = round(time.monotonic() - began, 1)
        for name, command in commands.items():
            self.say(f"== {name}: status {found[name]}, {took} s\n")
            entry = {"name": name, "command": f"python {command}", "status": found[name], "seconds": took}
            self.content["commands"].append(entry)
        self.write()
        return found

    def _together(self, commands: Mapping[str, str], ends: float, enough: Callable[[], bool]) -> dict[str, int | str]:
        running: dict[str, subprocess.Popen[str]] = {}
        readers = []
        try:
            for name, command in commands.items():
                running[name] = subprocess.Popen(
                    [sys.executable, *shlex.split(command)], cwd=ROOT, env=self.environment, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace",
                    start_new_session=True,  # with all that it starts it can be ended
                )  # fmt: skip
                prefix = f"{name}: " if len(commands) > 1 else ""
                readers.append(threading.Thread(target=self._pass_on, args=(running[name], prefix), daemon=True))
                readers[-1].start()
            why = ""
            while not why and any(p.poll() is None for p in running.values()):
                time.sleep(0.1)
                why = "stopped" if enough() else "out of time" if time.monotonic() > ends else ""
            late = [name for name, p in running.items() if p.poll() is None]
            for name in late:
                running[name].terminate()  # train.py saves what it has
            until = time.monotonic() + GRACE
            for name in late:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    running[name].wait(max(0.0, until - time.monotonic()))
            enough()
            return {n: why if n in late and p.returncode != 0 else p.returncode for n, p in running.items()}
        finally:
            for process in running.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            for reader in readers:
                reader.join(GRACE)

    def _pass_on(self, process: subprocess.Popen[str], prefix: str) -> None:
        for line in process.stdout or ():
            self.say(prefix + line)


# --------------------------------------------------------------------------------------------------------------- parts


def check(report: Report, device: str, ends: float, folder: Path) -> None:
    """Each check in its share of the time until ``ends``; what one leaves, the next ones may take."""
    known = checks(device)
    names = list(known)
    for i, name in enumerate(names):
        share, command = known[name]
        left, later = ends - time.monotonic(), sum(known[n][0] for n in names[i + 1 :])
        seconds = max(left * share / (share + later), left - later)
        figures = folder / f"{i}.json"
        report.run(name, f"{command} --json {figures}", seconds, figures)


class Curve:
    """The lines of a run's ``metrics.jsonl`` as they come.

    Args:
        source: the file, perhaps not there yet.
        target: a copy of it to be made, with ``wall`` on each line: seconds since now.
    """

    def __init__(self, source: Path, target: Path | None = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self._source, self._began, self._read = source, time.monotonic(), 0
        self._target = target.open("x") if target else None

    def follow(self) -> None:
        """Take over the lines that have come."""
        with contextlib.suppress(FileNotFoundError):
            whole = self._source.read_bytes()[self._read :].rpartition(b"\n")[0]
            self._read += len(whole) + bool(whole)
            for line in whole.splitlines():
                self.lines.append({**json.loads(line), "wall": round(time.monotonic() - self._began, 1)})
                if self._target:
                    print(json.dumps(self.lines[-1]), file=self._target, flush=True)


def pace(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of a ``step``, of an ``evaluation`` with what goes with it, and to ``begin``, of a run that was followed."""
    first, last = lines[0], lines[-1]
    seconds = last["seconds"] - first["seconds"]
    evaluating = max(0.0, last["wall"] - first["wall"] - seconds)
    return {
        "step": seconds / (last["step"] - first["step"]), "begin": first["wall"] - first["seconds"],
        "evaluation": evaluating / max(1, sum(SCORE in line for line in lines[1:])),
    }  # fmt: skip


def train(report: Report, device: str, data_dir: Path, ends: float, folder: Path) -> None:
    """Both algorithms at the same time, one process each: one alone leaves much of the GPU idle.

    Short runs, also at the same time, tell how long a step takes beside the other. Both runs have the number of steps that
    the slower can do in the time that is left: their learning rates fall alike, so that accuracies at equal steps can be
    compared. The faster one ends first; from then on the slower has the GPU for itself.
    """
    cpu = device == "cpu"

    def command(algorithm: str, name: str, steps: int, evaluate: int, log: int) -> str:
        words = ["train.py", "--c", f"benchmark_configs/{algorithm}_cifar10_250.yaml", "--data_dir", str(data_dir)]
        words += ["--device", device, "--precision", "fp32" if cpu else "bf16", "--epoch", "1", "--overwrite"]
        words += ["--save_dir", str(folder), "--save_name", name, "--use_tensorboard", "false"]
        words += ["--num_train_iter", str(steps), "--num_eval_iter", str(evaluate), "--num_log_iter", str(log)]
        small = ["--net", "small_cnn", "--total_batch", "16", "--ema_m", "0.9", "--num_threads", "1"]
        return shlex.join(words + (small if cpu else []))

    def curves(name: str, target: str = "") -> dict[str, Curve]:
        kept = {a: report.out / f"train.{a}.{target}" if target else None for a in TRAINED}
        return {a: Curve(folder / f"{a}_{name}" / "metrics.jsonl", kept[a]) for a in TRAINED}

    def all_at(found: dict[str, Curve], step: float) -> bool:
        for curve in found.values():
            curve.follow()
        return all(curve.lines and curve.lines[-1]["step"] >= step for curve in found.values())

    short, log, evaluate = (20, 5, 100) if cpu else (300, 50, 1000)
    found = curves("short")
    commands = {f"{a} short": command(a, f"{a}_short", 100_000, short - log, log) for a in TRAINED}
    report.together(commands, (ends - time.monotonic()) / 4, lambda: all_at(found, short))
    if not all_at(found, 2 * log):
        report.say("== no training: the short runs did not tell how long a step takes\n")
        return
    paces = {a: pace(curve.lines) for a, curve in found.items()}
    left = ends - time.monotonic() - max(p["begin"] for p in paces.values())
    steps = max(1, int(FILLED * left / max(p["step"] + p["evaluation"] / evaluate for p in paces.values())))
    told = (f"{a} {1000 * p['step']:.1f} ms (an evaluation {p['evaluation']:.1f} s)" for a, p in paces.items())
    report.say(f"== a step beside the other: {', '.join(told)}; {left:.0f} s left: {steps} steps each\n")
    trained = "`small_cnn`, fp32, 16 images a step" if cpu else "`cnn13`, bf16, 64 + 64 images a step"
    report.content |= {"steps": steps, "paces": paces, "trained": trained}
    found, evaluations = curves("run", "metrics.jsonl"), 0

    def watch() -> bool:
        nonlocal evaluations
        all_at(found, math.inf)
        before, evaluations = evaluations, sum(SCORE in line for curve in found.values() for line in curve.lines)
        if evaluations > before:
            report.content["accuracy"] = compared({a: curve.lines for a, curve in found.items()})
            report.write()
        return False

    commands = {a: command(a, f"{a}_run", steps, min(evaluate, steps), min(log, steps)) for a in TRAINED}
    report.together(commands, ends - time.monotonic(), watch)
    for a in TRAINED:
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(folder / f"{a}_run" / "result.json", report.out / f"train.{a}.result.json")


# ---------------------------------------------------------------------------------------------------------------- main


def fail(why: str) -> NoReturn:
    print(f"error: {why}", file=sys.stderr)
    sys.exit(2)


def output_of(command: list[str], environment: dict[str, str]) -> str:
    """What it prints; else the program ends with the last line of its complaint."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "no message").splitlines()[-1]
        fail(f"{why} (benchmarks/device.sh says what is needed)")
    return done.stdout


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def refuse_existing(out: Path, part: str) -> None:
    if (out / f"{part}.txt").exists() or (out / f"{part}.json").exists():
        fail(f"{out} has a '{part}' part already; give another folder as OUT")


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT", nargs="?", help="folder to write to [results/gpu/<date>-<device>]")
    add("--part", choices=(CHECK, TRAIN), required=True)
    add(
        "--minutes",
        type=float,
        help=f"time limit; default and maximum: {MINUTES[CHECK]:g} ({CHECK}), {MINUTES[TRAIN]:g} ({TRAIN})",
    )
    add("--data_dir", type=Path, default=ROOT / "data", help=f"of {TRAIN}: has cifar-10-batches-py [data]")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal with tiny settings [%(default)s]")
    add("--wheels", type=Path, help="folder of wheels that this machine lacks; device_wheels.sh fetches them")
    add("--revision", help="of this code, where git cannot tell [git describe]")
    options = parser.parse_args(arguments)
    most = MINUTES[options.part]
    options.minutes = most if options.minutes is None else options.minutes
    if not 0 < options.minutes <= most:
        fail(f"--minutes {options.minutes:g}: give more than 0 and at most {most:g} for --part {options.part}")
    if options.part == TRAIN and not (options.data_dir / "cifar-10-batches-py").is_dir():
        fail(f"{options.data_dir}/cifar-10-batches-py: no such folder; --data_dir names the one that holds it")
    if options.wheels and not any(options.wheels.glob("*.whl")):
        fail(f"--wheels {options.wheels}: no wheels there; benchmarks/device_wheels.sh fetches them")
    if options.out:
        refuse_existing(options.out, options.part)
    return options


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    options = options_of(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):  # and what it has started ends with it
        signal.signal(number, lambda *_: sys.exit("ended by a signal; what is done is on file"))
    with tempfile.TemporaryDirectory() as temporary:
        site, folder = (Path(temporary) / name for name in ("site", "tmp"))
        folder.mkdir()
        paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TMPDIR": str(folder)}
        environment |= {"COLUMNS": "140", "PYTHONUNBUFFERED": "1"}
        if options.wheels:
            quietly = ["--quiet", "--disable-pip-version-check"]
            install = ["-m", "pip", "install", *quietly, "--no-index", "--no-deps", "--target", str(site)]
            wheels = sorted(map(str, options.wheels.resolve().glob("*.whl")))
            output_of([sys.executable, *install, *wheels], environment)
        wanted = ["xdist", "pytest_timeout"] if options.part == CHECK else []
        told = output_of([sys.executable, "-c", ABOUT, options.device, *wanted], environment)
        about = json.loads(told.splitlines()[-1])
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about["command"] = shlex.join(["benchmarks/device.sh", *(sys.argv[1:] if arguments is None else arguments)])
        about |= {"revision": options.revision or revision(), "date": now, "minutes": options.minutes}
        slug = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
        out = options.out or ROOT / "results" / "gpu" / f"{now[:10]}-{slug}"
        refuse_existing(out, options.part)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"{out}: {error.strerror}; give another folder as OUT")
        report = Report(out, options.part, about, environment)
        report.say(f"== {json.dumps(about)}\n")
        ends = began + 60 * options.minutes - GRACE
        if options.part == CHECK:
            check(report, options.device, ends, folder)
        else:
            train(report, options.device, options.data_dir.resolve(), ends, folder)
        report.say(f"== {round(time.monotonic() - began)} s, written to {out}\n\n{(out / 'summary.md').read_text()}")
    commands = report.content["commands"]
    return int(not commands or any(c["status"] not in ENDED_WELL for c in commands))


if __name__ == "__main__":
    sys.exit(main())

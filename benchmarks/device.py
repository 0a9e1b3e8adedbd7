"""All that a GPU should be asked in 25 minutes: CUDA tests, benchmarks, CIFAR-10 training. See benchmarks/device.sh.

OUT gets, at most, six files: ``report.txt`` (what the commands print), ``report.json`` (commands with exit status and
seconds, device, versions, revision, date; renewed after each command) and each training run's ``<algorithm>.result.json`` and
``<algorithm>.metrics.jsonl``. Ends with 1 if a command failed or ran out of time.

Needs the standard library alone: what the commands need may have to be unpacked from wheels first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Seconds that a command has on top to save what it has, once its time is over; kept free at the end.
GRACE = 10
TRAINED = ("muscle_fixmatch", "fixmatch")
#: Share of a training run's time that its steps are to fill, by the speed of a short run: a run that ends is worth more.
FILLED = 0.85

ABOUT = """
import json, sys
from importlib import metadata
import torch
import muscle_plugin.register
cuda = sys.argv[1] != "cpu"
if cuda and not torch.cuda.is_available():
    raise RuntimeError("PyTorch finds no CUDA device")
names = ("torch", "torchvision", "timm", "semilearn", "scikit-learn")
print(json.dumps({
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if cuda else None,
    "cuda": torch.version.cuda if cuda else None,
    "versions": {"python": sys.version.split()[0], **{n: metadata.version(n) for n in names}},
}))
"""


def parts(options: argparse.Namespace) -> dict[str, tuple[float, list[str]]]:
    """Part: its minutes of 25, and the Python commands that share them. Training takes what the others leave.

    A new benchmark is a new line here.
    """
    device, data = options.device, shlex.quote(str(options.data_dir))
    step = f"benchmarks/step.py --device {device} --data_dir {data}"
    propagation = f"benchmarks/propagation.py --device {device}"
    overhead = f"benchmarks/overhead.py --device {device} --data_dir {data}"
    accuracy = "benchmarks/time_to_accuracy.py"
    tests = "-m pytest -q -o addopts= -p no:cacheprovider tests/test_cuda.py"
    if device == "cpu":
        return {
            "tests": (4, [tests]),
            "views": (1, ["benchmarks/views.py --batch 32 --seconds 0.1"]),
            "propagation": (2, [f"{propagation} --sizes 2000 4000"]),
            "step": (5, [f"{step} --algorithms fixmatch --seconds 0.2 --rounds 1 --workers 0"]),
            "overhead": (1, [f"{overhead} --algorithms fixmatch muscle_fixmatch --batch 8 --seconds 0.2 --rounds 1"]),
            "accuracy": (1, [f"{accuracy} --seeds 1 --steps 25"]),
            "scaling": (1, ["benchmarks/scaling.py --only views --views 1 2 --rounds 1 --seconds 0.1"]),
            "training": (10, []),
        }
    nets = "--nets cnn13 wrn_28_2 --seconds 2 --rounds 3"
    return {
        "tests": (4, [tests]),
        "views": (1, [f"benchmarks/views.py --device {device} --seconds 1.5"]),
        "propagation": (2, [f"{propagation} --sizes 50000 200000 --classes {n}" for n in (10, 100)]),
        "step": (5, [f"{step} --precision {p} {nets}" for p in ("bf16", "fp32")]),  # stock USB: fp16 beside bf16
        "overhead": (1.5, [f"{overhead} --precision bf16 --nets cnn13 --seconds 1 --rounds 3"]),
        "accuracy": (1.5, [f"{accuracy} --device {device} --labels 20 --workers 4"]),
        "scaling": (
            1,
            [f"benchmarks/scaling.py --device {device} --only images views classes augment --rounds 3 --seconds 0.5"],
        ),
        "training": (9, []),
    }


class Report:
    """What has been run, in OUT."""

    def __init__(self, out: Path, about: dict[str, Any], environment: dict[str, str]) -> None:
        self.out, self.about, self.environment = out, about, environment
        self.commands: list[dict[str, Any]] = []
        self._text = (out / "report.txt").open("w")
        self._write()

    def say(self, text: str) -> None:
        for file in (sys.stdout, self._text):
            print(text, end="", file=file, flush=True)

    def run(self, command: str, seconds: float) -> bool:
        """Run Python with these arguments for at most so many seconds; whether it ended well."""
        self.say(f"== python {command}\n")
        start = time.monotonic()
        status = self._run([sys.executable, *shlex.split(command)], seconds) if seconds > 0 else "no time left"
        took = round(time.monotonic() - start, 1)
        self.say(f"== status {status}, {took} s\n")
        self.commands.append({"command": f"python {command}", "status": status, "seconds": took})
        self._write()
        return status == 0

    def _run(self, command: list[str], seconds: float) -> int | str:
        """The exit status, or that there was no time."""
        process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # with all that it starts it can be ended
        )  # fmt: skip
        reader = threading.Thread(target=lambda: [self.say(line) for line in process.stdout or ()], daemon=True)
        reader.start()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # train.py saves what it has
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            reader.join(GRACE)

    def _write(self) -> None:
        text = json.dumps({**self.about, "commands": self.commands}, indent=1)
        (self.out / "report.json").write_text(text + "\n")


def train(report: Report, options: argparse.Namespace, algorithm: str, folder: Path, seconds: float) -> None:
    """As many steps as fit into so many seconds: a short run tells the speed, and how long it takes to begin."""
    ends = time.monotonic() + seconds
    cpu = options.device == "cpu"
    command = shlex.join(
        ["train.py", "--c", f"benchmark_configs/{algorithm}_cifar10_250.yaml", "--data_dir", str(options.data_dir)]
        + ["--device", options.device, "--precision", "fp32" if cpu else "bf16", "--save_dir", str(folder)]
        + ["--use_tensorboard", "false", "--epoch", "1", "--overwrite"]
        + (["--net", "small_cnn", "--ema_m", "0.9", "--num_threads", "1"] if cpu else [])
    )
    steps, evaluate = (20, 200) if cpu else (300, 1000)
    short = folder / f"{algorithm}_short"
    more = f"--num_train_iter {steps} --num_eval_iter {steps} --num_log_iter {steps // 4} --save_name {short.name}"
    start = time.monotonic()
    if not report.run(f"{command} {more}", ends - start):
        return
    lines = [json.loads(line) for line in (short / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = ((line["step"], line["seconds"]) for line in lines)  # seconds without evaluations
    step = (last[1] - first[1]) / (last[0] - first[0])
    rest = time.monotonic() - start - last[1]
    steps = max(1, int(FILLED * (ends - time.monotonic() - rest) / step))
    report.say(f"== {algorithm}: a step takes {1000 * step:.1f} ms, all else {rest:.0f} s: {steps} steps\n")
    more = f"--num_train_iter {steps} --num_eval_iter {min(evaluate, steps)} --save_name {algorithm}"
    report.run(f"{command} {more}", ends - time.monotonic())
    for file in ("result.json", "metrics.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(folder / algorithm / file, report.out / f"{algorithm}.{file}")


def ask(report: Report, options: argparse.Namespace, ends: float) -> None:
    """The parts asked for, each in its share of the time until ``ends``; what a part leaves, the later ones have."""
    known = parts(options)
    chosen = [name for name in known if name in options.only]
    wanting = [name for name in ("step", "overhead", "training") if name in chosen]
    if wanting and not (options.data_dir / "cifar-10-batches-py").is_dir():
        report.say(f"== no {options.data_dir}/cifar-10-batches-py: no {', '.join(wanting)}\n")
        chosen = [name for name in chosen if name not in wanting]
    for i, name in enumerate(chosen):
        left = ends - time.monotonic()
        later = sum(known[n][0] for n in chosen[i + 1 :])
        share = left * known[name][0] / (known[name][0] + later)
        part_ends = time.monotonic() + (left if not later else min(share, 60 * known[name][0]))
        commands = known[name][1]
        for j, command in enumerate(commands):
            report.run(command, (part_ends - time.monotonic()) / (len(commands) - j))
        if name == "training":
            with tempfile.TemporaryDirectory() as folder:
                for j, algorithm in enumerate(TRAINED):
                    seconds = (part_ends - time.monotonic()) / (len(TRAINED) - j)
                    train(report, options, algorithm, Path(folder), seconds)


def output_of(command: list[str], environment: dict[str, str]) -> str:
    """What it prints; else the program ends with the last line of its complaint."""
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or "no message").splitlines()[-1]
        sys.exit(f"error: {why} (benchmarks/device.sh says what is needed)")
    return done.stdout


def revision() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    names = ("tests", "views", "propagation", "step", "overhead", "accuracy", "scaling", "training")
    add("out", type=Path, metavar="OUT", help="folder to write to; one without a report")
    add("--minutes", type=float, default=25, help="for everything; the tests alone want two to four [%(default)s]")
    add("--only", type=lambda text: text.split(","), default=list(names), help=f"some of {','.join(names)} [all]")
    add("--data_dir", type=Path, default=ROOT / "data", help="folder that holds cifar-10-batches-py [data]")
    add("--wheels", type=Path, help="folder of wheels that this machine lacks; device_wheels.sh fetches them")
    add("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a rehearsal with tiny settings [%(default)s]")
    add("--revision", help="of this code, where git cannot tell [git describe]")
    options = parser.parse_args()
    if unknown := set(options.only) - set(names):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if (options.out / "report.json").exists():
        parser.error(f"{options.out} has a report already: give another folder")
    options.data_dir = options.data_dir.resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))  # and what it has started ends with it
    with tempfile.TemporaryDirectory() as site:
        paths = [site, str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "COLUMNS": "140"}
        if options.wheels:
            quietly = ["--quiet", "--disable-pip-version-check"]
            install = ["-m", "pip", "install", *quietly, "--no-index", "--no-deps", "--target"]
            wheels = sorted(map(str, options.wheels.resolve().glob("*.whl")))
            output_of([sys.executable, *install, site, *wheels], environment)
        about = json.loads(output_of([sys.executable, "-c", ABOUT, options.device], environment).splitlines()[-1])
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        about |= {"revision": options.revision or revision(), "date": now, "minutes": options.minutes}
        options.out.mkdir(parents=True, exist_ok=True)
        report = Report(options.out, about, environment)
        report.say(f"== {json.dumps(about)}\n")
        ask(report, options, began + 60 * options.minutes - GRACE)
    return int(any(c["status"] != 0 for c in report.commands))


if __name__ == "__main__":
    sys.exit(main())

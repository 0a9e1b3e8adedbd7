#!/usr/bin/env python3
"""Proves the patches beside this file: each one's case fails without it and passes with it.

    python patches/check.py [TREE] [--installed] [--series main|0.3.2] [--only 0003 ...] [--data_dir DIR] [--fresh]

TREE is a checkout of USB, or a folder that holds the package's `semilearn/` alone; without it, the release 0.3.2 is
downloaded. It is copied, never changed. For each patch of the series that fits the tree: the case is run (and must fail),
`git apply` is run (and must be clean), the case is run again (and must pass); at the end all cases are run once more on
the complete tree. Exit status 0: all as stated; 1: something is not; 2: wrong input.

A case is `cases/<name of the patch, with underscores>.py`, run in an empty folder with the tree on PYTHONPATH and the
tree's root in USB_TREE. A line `# needs: train.py` or `# needs: cifar10` says what else it wants: where that is absent
the case is skipped, and the table says so. `cifar10` is a folder with CIFAR-10, given by --data_dir or USB_DATA.

So that a case takes seconds, what USB imports from other packages is imported once and each case runs in a fork of that
process; --fresh gives each case an interpreter of its own instead.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASE_SECONDS = 300
# What `import semilearn` and training import of other packages. An absent one is the case's affair, not ours.
IMPORTED = (
    "torch", "torch._dynamo", "torch.utils.tensorboard", "torchvision", "torchaudio", "timm", "timm.layers", "transformers",
    "transformers.models.bert.modeling_bert", "sklearn.metrics", "scipy.special", "skimage", "ruamel.yaml", "progress.bar",
    "wandb", "aim", "PIL.Image",
)  # fmt: skip


class WrongInput(Exception):
    """The command cannot be carried out; the message is one line."""


@dataclass
class Patch:
    path: Path
    case: Path
    before: str = "not run"
    after: str = "not run"
    at_end: str = ""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)

    @property
    def number(self) -> str:
        return self.path.name[:4]


@dataclass
class Outcome:
    passed: bool
    last_line: str
    seconds: float


def fingerprint(tree: Path) -> str:
    """SHA-256 over the names and texts of the Python files of `semilearn/` (line ends do not count)."""
    digest = hashlib.sha256()
    for file in sorted((tree / "semilearn").rglob("*.py"), key=lambda file: file.relative_to(tree).as_posix()):
        digest.update(file.relative_to(tree).as_posix().encode() + b"\0")
        digest.update(file.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()


def read_series(folder: Path, name: str) -> tuple[list[Patch], str | None]:
    """The patches of `series.<name>` in order, and the fingerprint of the tree they are made for."""
    file = folder / f"series.{name}"
    if not file.is_file():
        have = ", ".join(sorted(f.name.removeprefix("series.") for f in folder.glob("series.*")))
        raise WrongInput(f"--series {name}: there is no {file.name}; there are: {have}")
    made_for, patches = None, []
    for line in file.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"#\s*tree:\s*([0-9a-f]{64})\s*$", line):
            made_for = match[1]
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        path = folder / entry
        case = folder / "cases" / f"{re.sub('[-.]', '_', path.stem)}.py"
        for wanted in (path, case):
            if not wanted.is_file():
                raise WrongInput(f"{file.name}: {wanted.relative_to(folder)} does not exist")
        patches.append(Patch(path, case))
    return patches, made_for


def recognise(folder: Path, tree: Path) -> str:
    """The name of the series made for `tree`."""
    found = fingerprint(tree)
    names = sorted(file.name.removeprefix("series.") for file in folder.glob("series.*"))
    for name in names:
        if read_series(folder, name)[1] == found:
            return name
    raise WrongInput(
        f"{tree}: semilearn/ is neither git main at 1ef4cbe nor the release 0.3.2, unchanged; to try all the same, "
        f"give --series {' or --series '.join(names)}"
    )


def download_release(into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "semilearn==0.3.2", "--no-deps", "--only-binary", ":all:",
               "--quiet", "--disable-pip-version-check", "--dest", str(into)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(into.glob("semilearn-*.whl"))
    if done.returncode or not wheels:
        raise WrongInput(
            "semilearn 0.3.2 could not be downloaded (no network?): give the folder of a checkout, "
            "or --installed for the files of the installed package"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(into / "release")
    return into / "release"


def installed_release() -> Path:
    spec = importlib.util.find_spec("semilearn")
    if spec is None or not spec.submodule_search_locations:
        raise WrongInput("--installed: semilearn is not installed for this Python")
    return Path(next(iter(spec.submodule_search_locations))).resolve().parent


def copy_tree(tree: Path, to: Path) -> None:
    """Copies what patches and cases may touch; a site-packages folder gives its `semilearn/` alone."""
    skipped = shutil.ignore_patterns("__pycache__", ".git", "*.pyc")
    shutil.copytree(tree / "semilearn", to / "semilearn", ignore=skipped)
    if not (tree / "train.py").is_file():
        return
    for entry in tree.iterdir():
        if entry.name in ("semilearn", ".git", "data", "saved_models", "figures", "results"):
            continue
        if entry.is_dir():
            shutil.copytree(entry, to / entry.name, ignore=skipped)
        else:
            shutil.copy2(entry, to / entry.name)


def apply_patch(patch: Path, tree: Path) -> str | None:
    """Applies `patch` to `tree`; the reason if that is not clean."""
    command = ["git", "apply", "--whitespace=nowarn"]
    if not (tree / "train.py").is_file():
        command.append("--include=semilearn/*")
    # A temporary folder may lie inside somebody's repository, where `git apply` would leave the files out silently.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.parent)}
    try:
        done = subprocess.run([*command, str(patch)], cwd=tree, env=environment, capture_output=True, text=True)
    except FileNotFoundError:
        raise WrongInput("git is not installed: the patches are applied with `git apply`") from None
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["git apply failed"])[0]


def wants(case: Path) -> list[str]:
    return re.findall(r"^# needs: (\S+)\s*$", case.read_text(encoding="utf-8"), re.MULTILINE)


def missing(case: Path, tree: Path, data: str | None) -> str | None:
    for want in wants(case):
        if want == "train.py" and not (tree / "train.py").is_file():
            return "needs train.py"
        if want == "cifar10" and not data:
            return "needs CIFAR-10 (--data_dir)"
        if want not in ("train.py", "cifar10"):
            raise WrongInput(f"{case.name}: `# needs: {want}` is not known; known are train.py, cifar10")
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Sends standard error nowhere; the file descriptor, since packages keep the `sys.stderr` that they find."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def symptom(text: str) -> str:
    """The line of a log that names the exception (with the next one, if its message begins there), else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [i for i, line in enumerate(lines) if re.match(r"[A-Za-z_][\w.]*(Error|Exception)\b", line)]
    if not named:
        return lines[-1] if lines else ""
    return " ".join(lines[named[-1] :][: 2 if lines[named[-1]].endswith(":") else 1])


class Runner:
    """Runs cases, each in an empty folder and a process of its own."""

    def __init__(self, tree: Path, data: str | None, fresh: bool):
        self.tree, self.data = tree, data
        # One core is enough for a case, and threads do not survive a fork.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        self.fork = hasattr(os, "fork") and not fresh
        if self.fork:
            with quiet():
                for name in IMPORTED:
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
                if "torch" in sys.modules:
                    sys.modules["torch"].set_num_threads(1)

    def environment(self) -> dict[str, str]:
        rest = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.tree), *rest]),
            "PYTHONDONTWRITEBYTECODE": "1",  # a patched file may have the old one's size and second
            "USB_TREE": str(self.tree),
            "WANDB_MODE": "disabled",
        }
        if self.data:
            environment["USB_DATA"] = self.data
        return environment

    def run(self, case: Path) -> Outcome:
        with tempfile.TemporaryDirectory(prefix="usb-case-") as folder:
            work, log = Path(folder) / "work", Path(folder) / "log"
            work.mkdir()
            start = time.monotonic()
            status = self._forked(case, work, log) if self.fork else self._started(case, work, log)
            seconds = time.monotonic() - start
            text = log.read_text(encoding="utf-8", errors="replace")
        last = f"did not end within {CASE_SECONDS} s" if status is None else symptom(text) or f"exit status {status}"
        return Outcome(status == 0, last, seconds)

    def _started(self, case: Path, work: Path, log: Path) -> int | None:
        with log.open("w") as out:
            try:
                return subprocess.run(
                    [sys.executable, str(case)], cwd=work, env=self.environment(), stdin=subprocess.DEVNULL,
                    stdout=out, stderr=subprocess.STDOUT, timeout=CASE_SECONDS,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return None

    def _forked(self, case: Path, work: Path, log: Path) -> int | None:
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            self._child(case, work, log)
        deadline = time.monotonic() + CASE_SECONDS
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return None
            time.sleep(0.02)

    def _child(self, case: Path, work: Path, log: Path) -> None:
        status = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            os.chdir(work)
            os.environ.update(self.environment())
            sys.dont_write_bytecode = True
            sys.path[0:1] = [str(case.parent), str(self.tree)]
            sys.argv = [str(case)]
            warnings.resetwarnings()
            runpy.run_path(str(case), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)


def check(patches: list[Patch], tree: Path, runner: Runner, only: list[str]) -> None:
    """Fills in what happened; says each step on standard error as it goes."""
    chosen = [patch for patch in patches if not only or patch.number in only]
    for patch in patches:
        run = patch in chosen
        skip = missing(patch.case, tree, runner.data) if run else None
        if skip:
            patch.before = patch.after = f"skipped: {skip}"
        elif run:
            print(f"{patch.path.stem} ...", file=sys.stderr, flush=True)
            outcome = runner.run(patch.case)
            patch.seconds += outcome.seconds
            patch.before = "passes" if outcome.passed else f"fails: {outcome.last_line}"
            if outcome.passed:
                patch.faults.append(f"{patch.case.name} passes without the patch, so it proves nothing")
        if reason := apply_patch(patch.path, tree):
            patch.after = "not applied"
            patch.faults.append(f"{patch.path.name} does not apply: {reason}")
            return  # those that follow are made on top of it
        if run and not skip:
            outcome = runner.run(patch.case)
            patch.seconds += outcome.seconds
            patch.after = "passes" if outcome.passed else f"fails: {outcome.last_line}"
            if not outcome.passed:
                patch.faults.append(f"{patch.case.name} fails with the patch: {outcome.last_line}")
    for patch in chosen:
        if patch.after != "passes" or patch is patches[-1]:  # the last one's "after" was the complete tree
            continue
        outcome = runner.run(patch.case)
        patch.seconds += outcome.seconds
        if not outcome.passed:
            patch.at_end = "fails at the end"
            patch.faults.append(f"{patch.case.name} fails on the complete tree: {outcome.last_line}")


def shorten(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def print_table(patches: list[Patch]) -> None:
    print("| patch | before | after | seconds |")
    print("|---|---|---|---|")
    for patch in patches:
        before = shorten(patch.before, 110).replace("|", "\\|")
        after = shorten(patch.after, 110).replace("|", "\\|")
        print(f"| {patch.path.stem} | {before} | {patch.at_end or after} | {patch.seconds:.1f} |")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="check.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "tree", nargs="?", metavar="TREE", help="a checkout of USB (default: downloads the release 0.3.2)"
    )
    parser.add_argument("--installed", action="store_true", help="use the files of the installed semilearn")
    parser.add_argument("--series", help="the series to apply, instead of the one that was made for the tree")
    parser.add_argument("--only", nargs="+", default=[], metavar="NNNN", help="run the cases of these patches alone")
    parser.add_argument(
        "--data_dir", default=os.environ.get("USB_DATA"), help="a folder with CIFAR-10 (or set USB_DATA)"
    )
    parser.add_argument("--patches", type=Path, default=HERE, help=argparse.SUPPRESS)
    parser.add_argument("--fresh", action="store_true", help="start an interpreter for each case (slower)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.tree and args.installed:
            raise WrongInput("give either a TREE or --installed")
        with tempfile.TemporaryDirectory(prefix="usb-patches-") as folder:
            root = Path(folder).resolve()
            if args.tree:
                source = Path(args.tree).resolve()
            else:
                source = installed_release() if args.installed else download_release(root)
            if not (source / "semilearn" / "__init__.py").is_file():
                raise WrongInput(f"{source}: not a tree of USB (it has no semilearn/__init__.py)")
            name = args.series or recognise(args.patches, source)
            patches, _ = read_series(args.patches, name)
            if unknown := set(args.only) - {patch.number for patch in patches}:
                raise WrongInput(f"--only {' '.join(sorted(unknown))}: no such patch in series.{name}")
            tree = root / "tree"
            copy_tree(source, tree)
            data = str(Path(args.data_dir).resolve()) if args.data_dir else None
            print(f"series {name}, {len(patches)} patches, on a copy of {source}", flush=True)
            check(patches, tree, Runner(tree, data, args.fresh), args.only)
    except WrongInput as wrong:
        print(f"check.py: {wrong}", file=sys.stderr)
        return 2
    print_table(patches)
    for fault in (fault for patch in patches for fault in patch.faults):
        print(f"check.py: {fault}", file=sys.stderr)
    proven = sum(patch.after == "passes" and not patch.faults for patch in patches)
    skipped = sum(patch.after.startswith("skipped") for patch in patches)
    print(f"{proven} of {len(patches)} patches proven" + (f", {skipped} skipped" if skipped else ""))
    return int(any(patch.faults for patch in patches))


if __name__ == "__main__":
    sys.exit(main())

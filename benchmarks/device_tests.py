"""A pytest plugin for ``device.py``: what matters most runs first, results are on file and failures shown at once, and a test
that ruins the process's CUDA context takes no other one with it.

    python -m pytest --no-summary -p benchmarks.device_tests -n 4 --maxschedchunk 1 --json FILE tests/test_cuda.py

Needs pytest-xdist: after such a test its worker ends and another one takes over. So it is, with pytest-timeout's
``--timeout-method thread``, after one that hangs.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

#: Parts of tests' names, those first that say most; other tests come then, and in the end those of LAST, which compile for
#: minutes.
FIRST = (
    "kernel", "views", "a_batch", "batches", "steady_step_never_waits_for_the_device[muscle_fixmatch-", "every_precision",
    "label_propagation", "steady_step",
)  # fmt: skip
LAST = ("is_not[default-muscle_fixmatch", "is_not[reduce-overhead-muscle_fixmatch", "compiled")


def turn(test: str) -> int:
    """The place of a test in the order."""
    name = test.partition("::")[2]
    order = [*((i, part) for i, part in enumerate(LAST, len(FIRST) + 1)), *enumerate(FIRST)]
    return next((i for i, part in order if part in name), len(FIRST))


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--json", metavar="FILE", help="write the results there, after each test")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    items.sort(key=lambda item: turn(item.nodeid))


@pytest.hookimpl(hookwrapper=True, trylast=True)
def pytest_runtest_protocol(item: Any) -> Iterator[None]:
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and context_is_lost():
        os._exit(1)  # in it all later tests would fail


def context_is_lost() -> bool:
    """Whether a CUDA error has made this process's GPU useless, as a failed assertion in a kernel does."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config: Any) -> None:
    if config.option.json and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Results(Path(config.option.json), config))


class Results:
    """Keeps how each test ended, in a file, and says why one failed when it does."""

    def __init__(self, path: Path, config: Any) -> None:
        self._path, self._config = path, config
        self._collected = 0
        self._outcomes: dict[str, str] = {}

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self._collected = len(ids)
        self._write()

    def pytest_runtest_logreport(self, report: Any) -> None:
        worst = (report.outcome, self._outcomes.get(report.nodeid))
        self._outcomes[report.nodeid] = next(o for o in ("failed", "skipped", "passed") if o in worst)
        if report.failed:
            self._config.get_terminal_writer().line(f"\n{report.nodeid} failed:\n{report.longreprtext}")
        self._write()

    def _write(self) -> None:
        names = {o: [n for n, found in self._outcomes.items() if found == o] for o in ("passed", "failed", "skipped")}
        counts = {o: len(found) for o, found in names.items()}
        text = json.dumps({"collected": self._collected, **counts, "failures": names["failed"]}, indent=1)
        whole = self._path.with_suffix(".part")
        whole.write_text(text)
        whole.replace(self._path)

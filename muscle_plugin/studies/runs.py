"""Reads run directories, and files of summaries made of them."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from muscle_plugin.errors import ConfigError, RunsError
from muscle_plugin.files import read_json, write_text
from muscle_plugin.run_files import LATEST, SPLIT_FILE
from muscle_plugin.settings.resolve import Resolved, differing_settings, load_settings, resolve
from muscle_plugin.settings.schema import MACHINE, PLACE, affecting
from muscle_plugin.settings.sources import config_names, read_saved
from muscle_plugin.text import one_line, shown

#: Settings that may differ from the configuration's without making it another experiment.
_INDIFFERENT = ("seed", "split_seed")

#: The key of test accuracy in ``metrics.jsonl``, all that a summary keeps of an evaluation.
ACCURACY = "eval/top-1-acc"


@dataclass(frozen=True)
class Run:
    """One run: the content of ``result.json`` and ``environment.json``, and the lines of ``metrics.jsonl``.

    Attributes:
        path: the run directory; of a summary, where it was.
        result: empty if the run never got so far.
        config: name of the configuration in ``benchmark_configs``; None if it is none of them, or no longer there.
        changed: settings in which it differs from that configuration: name -> (configuration's, the run's).
        failure: what stopped it, if it failed.
        settings: of one without ``config``: those that a result depends on, but for the seed.
    """

    path: Path
    result: dict[str, Any]
    metrics: list[dict[str, float]]
    environment: dict[str, Any] = field(default_factory=dict)
    config: str | None = None
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    failure: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps at which ``key`` was logged, and its values."""
        points = [(m["step"], m[key]) for m in self.metrics if key in m]
        return [p[0] for p in points], [p[1] for p in points]

    @property
    def state(self) -> str:
        """``finished``, ``cut off`` or ``failed``."""
        if self.failure is not None:
            return "failed"
        return "finished" if self.result.get("complete") else "cut off"

    @property
    def title(self) -> str:
        """The name of its configuration, else of its directory."""
        return self.config or self.path.name

    @property
    def pretrained(self) -> bool:
        """Whether it trained without labels, so that its accuracies mean nothing."""
        return self.result.get("stage") == "pretrain"

    @cached_property
    def deviation(self) -> str:
        """How it differs from its configuration, for people; empty if it does not."""
        if self.config is None:
            return ""
        words = [f"{k} {plain(ours)} instead of {plain(theirs)}" for k, (theirs, ours) in sorted(self.changed.items())]
        return ", ".join(words)

    @property
    def shortened(self) -> bool:
        """Whether it trains for fewer steps or epochs than its configuration."""
        if "num_train_iter" in self.changed and self.changed["num_train_iter"][0] is None:
            return True  # a number of steps in place of whole epochs
        return any(
            ours is not None and theirs is not None and ours < theirs
            for k, (theirs, ours) in self.changed.items()
            if k in ("epoch", "num_train_iter")
        )

    def score(self, rule: str, metric: str = "top1") -> float | None:
        """A figure of the run, as a fraction or in the unit of the metric; None if it has none.

        Args:
            rule: ``last``, ``best`` or ``median20``, for top-1 accuracy; all else is of the last evaluation.
            metric: ``top1``, ``top5``, or a key of ``last_evaluation``.
        """
        if self.pretrained:
            return None
        if metric == "top1":
            return self.result.get(f"{rule}_top1")
        return self.result.get("last_evaluation", {}).get({"top5": "top-5-acc"}.get(metric, metric))


def plain(value: Any) -> str:
    return "the default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def read_run(path: Path) -> Run:
    """The run in a directory.

    Raises:
        OSError, ValueError: it holds no run, or one whose files are damaged.
    """

    def content(name: str, needed: bool = False) -> dict[str, Any]:
        file = path / name
        return read_json(file) if needed or file.exists() else {}

    failed = content("failure.json")
    failure = None if failed.get("error") is None else str(failed["error"])
    result = content("result.json", needed=failure is None)
    environment = content("environment.json")
    lines = (path / "metrics.jsonl").read_text().splitlines() if (path / "metrics.jsonl").is_file() else []
    try:
        metrics = [json.loads(line) for line in lines]
    except RecursionError:
        raise ValueError("metrics.jsonl: nested too deep") from None
    _refuse_other_kinds(result, metrics, environment)
    config, changed = _compare(path, environment.get("config", failed.get("config")))
    settings = {} if config else _settings_of(path)
    return Run(path, result, metrics, environment, config, changed, failure, settings)


#: Of ``result.json``: what a report computes with, and what it prints.
_NUMBERS = ("steps", "num_train_iter", "best_top1", "last_top1", "median20_top1", "best_step", "evaluations", "seconds",
            "images_per_second", "num_labels")  # fmt: skip
_TEXTS = ("algorithm", "dataset", "net", "stage", "device", "precision")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # neither infinite nor no number


def _refuse_other_kinds(result: Any, metrics: Any, environment: Any) -> None:
    """Raises ValueError if a run's files hold values of other kinds than a run writes: a report would fail in its middle."""

    def refuse(name: str, key: str, value: Any) -> None:
        raise ValueError(f"{name}: {shown(key)}: not expected to be {shown(repr(value))}")

    if not isinstance(result, dict) or not isinstance(environment, dict) or not isinstance(metrics, list):
        raise ValueError("result, environment or metrics are not what a run writes")
    if result and not all(k in result for k in ("algorithm", "dataset", "complete", "seed")):
        raise ValueError("result.json: lacks algorithm, dataset, complete or seed")
    for key, value in result.items():
        of_kind = {
            **dict.fromkeys(_NUMBERS, value is None or _is_number(value)),
            **dict.fromkeys(_TEXTS, isinstance(value, str)),
            "complete": isinstance(value, bool), "seed": type(value) is int, "last_evaluation": isinstance(value, dict),
        }  # fmt: skip
        if not of_kind.get(key, True):
            refuse("result.json", key, value)
    for key, value in (result.get("last_evaluation") or {}).items():
        if value is not None and not _is_number(value):
            refuse("result.json", key, value)
    for line in metrics:
        if not isinstance(line, dict) or not _is_number(line.get("step")):
            refuse("metrics.jsonl", "step", line)
        for key, value in line.items():  # a loss may be infinite
            if not isinstance(value, (int, float, type(None))) or (key == ACCURACY and not _is_number(value)):
                refuse("metrics.jsonl", key, value)
    for key, value in environment.items():
        parts = value if key == "command" and isinstance(value, list) else [value]
        if key == "plugins" and isinstance(value, dict):
            parts = list(value.values())
        if key != "continuations" and not all(isinstance(x, (str, int, float, type(None))) for x in parts):
            refuse("environment.json", key, value)


@cache
def _known_configurations() -> frozenset[str]:
    return frozenset(config_names())


@cache
def _configuration(name: str) -> Resolved:
    return load_settings(name)


def _compare(path: Path, config: str | None) -> tuple[str | None, dict[str, tuple[Any, Any]]]:
    """The configuration of a run, and what of it was changed."""
    if config not in _known_configurations():
        return None, {}
    try:
        differing = differing_settings(path / "config.yaml", _configuration(config))
    except ConfigError:
        return None, {}
    if "algorithm" in differing or "dataset" in differing:
        return None, {}
    same_file = {k for k in ("init_from", "pretrain_path") if k in differing and _alike(*differing[k])}
    left_out = {*_INDIFFERENT, *same_file}
    return config, {k: (here, there) for k, (there, here) in differing.items() if k not in left_out}


def _alike(a: str | None, b: str | None) -> bool:
    """Whether two files are the same but for the place."""
    return bool(a and b) and _without_place(str(a)) == _without_place(str(b))


def _without_place(file: str) -> str:
    """A file's name; of a run's last checkpoint, or of its split, the run's, whatever the seed."""
    path = Path(file)
    return re.sub(r"_\d+$", "", path.parent.name) if path.name in (LATEST, SPLIT_FILE) else path.name


def _settings_of(path: Path) -> dict[str, Any]:
    """The settings in a run's directory on which a result depends, but for the seed, as JSON gives them back; empty if it
    has none."""
    try:
        layers = read_saved(path / "config.yaml")
    except ConfigError:
        return {}
    try:
        found = resolve(layers).as_dict()  # with the settings that an older version did not have
    except ConfigError:  # of a plugin
        found = {k: v for layer in layers for k, v in layer.values.items()}
    for key in ("init_from", "pretrain_path", "split_file"):
        if isinstance(found.get(key), str):
            found[key] = _without_place(found[key])
    kept = {k: v for k, v in found.items() if k not in {*affecting(MACHINE, PLACE), *_INDIFFERENT}}
    return dict(json.loads(json.dumps(kept, default=str)))


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """All runs in directories at any depth, or in files of summaries (``.jsonl``), each once (a copy of a run's directory,
    or its summary, is the same run), in order of name; and a line for each directory that looks like a run and cannot be
    read.

    Raises:
        RunsError: a path does not exist, or holds no run.
    """
    runs: dict[str, Run] = {}
    places_seen: set[Path] = set()
    unread = []

    def add(run: Run) -> None:
        began = run.environment.get("started")
        same = json.dumps([run.path.name, run.result, run.environment], sort_keys=True) if began else f"{len(runs)}"
        if same not in runs or len(run.metrics) > len(runs[same].metrics):
            runs[same] = run

    for path in paths:
        if path.suffix == ".jsonl":
            if path.resolve() not in places_seen:
                for run in read_summaries(path):
                    add(run)
            places_seen.add(path.resolve())
            continue
        try:
            there = path.is_dir()
        except (OSError, ValueError):  # no name that a folder can have
            there = False
        if not there:
            raise RunsError(f"{shown(path)}: no such folder; give folders of runs")
        places = sorted(p.parent for p in path.rglob("config.yaml"))
        if not places:
            raise RunsError(f"{path}: no run in it (a run's folder has a config.yaml)")
        for place in places:
            if place.resolve() in places_seen:
                continue
            places_seen.add(place.resolve())
            try:
                add(read_run(place.resolve()))  # whose name is needed: `report .`
            except (OSError, ValueError, KeyError, TypeError) as e:
                unread.append(one_line(f"{place}: {e}"))
    return sorted(runs.values(), key=lambda r: (r.title, r.result.get("seed", -1), str(r.path))), unread


def _refuse_other_changes(changed: dict[str, tuple[Any, Any]]) -> None:
    lengths = [v for k, pair in changed.items() if k in ("epoch", "num_train_iter") for v in pair]
    if any(v is not None and not _is_number(v) for v in lengths):
        raise ValueError("a length that is no number")


def names_of(runs: Sequence[Run]) -> list[str]:
    """The name of each run's directory, with that of its folder where the name alone is not enough."""
    count = Counter(run.path.name for run in runs)
    return [
        run.path.name if count[run.path.name] == 1 else f"{run.path.absolute().parent.name}/{run.path.name}"
        for run in runs
    ]


def write_summaries(runs: Iterable[Run], path: Path) -> None:
    """A line of JSON per run, all that a report needs of it: result, environment, evaluations."""
    lines = []
    runs = list(runs)
    for run, name in zip(runs, names_of(runs), strict=True):
        steps, values = run.curve(ACCURACY)
        content = {
            "path": name, "config": run.config, "changed": run.changed, "failure": run.failure,
            "result": run.result, "environment": run.environment,
            "evaluations": [[int(s), round(v, 6)] for s, v in zip(steps, values, strict=True)],
        }  # fmt: skip
        if run.settings:
            content["settings"] = run.settings
        lines.append(json.dumps(content, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def read_summaries(path: Path) -> list[Run]:
    """The runs of a file that :func:`write_summaries` wrote.

    Raises:
        RunsError: no such file, or not one of these.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as e:
        raise RunsError(f"{shown(path)}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    runs = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            c = json.loads(line)
            metrics = [{"step": s, ACCURACY: v} for s, v in c["evaluations"]]
            changed = {k: (a, b) for k, (a, b) in c["changed"].items()}
            where = path.parent / c["path"]
            _refuse_other_kinds(c["result"], metrics, c["environment"])
            _refuse_other_changes(changed)
            failure = None if c["failure"] is None else str(c["failure"])
            config = c["config"] if c["config"] in _known_configurations() else None
            settings = {k: v for k, v in c.get("settings", {}).items() if k not in affecting(MACHINE, PLACE)}
            runs.append(Run(where, c["result"], metrics, c["environment"], config, changed, failure, settings))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RunsError(f"{path} line {number}: not a summary of a run, as `report` writes them") from None
    return runs


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    v = list(values)
    return statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0


def by_algorithm(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs grouped by algorithm, in order of appearance."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.result["algorithm"], []).append(run)
    return groups

"""Run directories, and files of summaries made of them, as a report reads them."""

from __future__ import annotations

import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from muscle_plugin.errors import ConfigError, InputError
from muscle_plugin.files import from_json, read_json, to_json, write_text
from muscle_plugin.run_files import LATEST, SPLIT_FILE
from muscle_plugin.settings.resolve import load_settings, resolve
from muscle_plugin.settings.schema import MACHINE, PLACE, SEED, affecting
from muscle_plugin.settings.sources import config_names, read_saved
from muscle_plugin.text import one_line, shown

#: The key of test accuracy in ``metrics.jsonl``, all that a summary keeps of an evaluation.
ACCURACY = "eval/top-1-acc"
#: Which accuracy of a run counts, in words.
RULES = {
    "last": "accuracy at the last step",
    "best": "best accuracy over the run, chosen on the test set",
    "median20": "median of the last 20 evaluations, or of all where there are fewer",
}
#: A run that changes one of these belongs to no cell of a study.
_PLACING = ("algorithm", "dataset", "num_labels")
#: Settings that name files, which have another path in another folder of runs.
_FILES = ("init_from", "pretrain_path", "split_file")
#: Settings in which runs of one experiment may differ.
_NOT_COMPARED = affecting(SEED, MACHINE, PLACE)


@dataclass(frozen=True)
class Run:
    """One run: the content of ``result.json`` and ``environment.json``, and the lines of ``metrics.jsonl``."""

    path: Path  #: of a summary: where it was
    result: dict[str, Any]  #: empty if the run never got so far
    metrics: list[dict[str, Any]]  #: step -> numbers; None for one that was not finite
    environment: dict[str, Any]
    #: Name in ``benchmark_configs``; None if it has none, or has another algorithm, data set or number of labels.
    config: str | None
    #: Settings in which it differs from ``config``: name -> (configuration's, the run's).
    changed: dict[str, tuple[Any, Any]]
    failure: str | None
    settings: dict[str, Any]  #: without ``config``: those that decide the result, except the seed

    def curve(self, key: str) -> dict[float, float]:
        """A logged value by step, where it was finite."""
        return {m["step"]: value for m in self.metrics if (value := m.get(key)) is not None}

    @property
    def state(self) -> str:
        """``finished``, ``cut off`` or ``failed``."""
        if self.failure is not None:
            return "failed"
        return "finished" if self.result.get("complete") else "cut off"

    @property
    def pretrained(self) -> bool:
        """Whether it trained without labels, so that its accuracies mean nothing."""
        return self.result.get("stage") == "pretrain"

    @cached_property
    def deviation(self) -> str:
        """How it differs from its configuration, in words."""
        return ", ".join(
            f"{k} {plain(ours)} instead of {plain(theirs)}" for k, (theirs, ours) in sorted(self.changed.items())
        )

    def score(self, rule: str, metric: str = "top1") -> float | None:
        """A metric: ``top1`` by a rule (``last``, ``best``, ``median20``), ``top5`` or another of the last evaluation."""
        if self.pretrained:
            return None
        if metric == "top1":
            return self.result.get(f"{rule}_top1")
        return self.result.get("last_evaluation", {}).get({"top5": "top-5-acc"}.get(metric, metric))


def plain(value: object) -> str:
    """The value of a setting, for people."""
    return "the default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


#: Neither infinite nor NaN.
_Number = Annotated[float, Field(gt=-1e300, lt=1e300)]


class _Result(BaseModel, strict=True):
    algorithm: str
    dataset: str
    complete: bool
    seed: int
    last_evaluation: dict[str, _Number | None] = {}
    last_top1: _Number | None = None
    best_top1: _Number | None = None
    median20_top1: _Number | None = None


class _Line(BaseModel, strict=True, extra="allow"):
    __pydantic_extra__: dict[str, float | None]
    step: _Number
    accuracy: _Number | None = Field(None, validation_alias=ACCURACY)


class _Files(BaseModel, strict=True):
    """What a report computes with of a run's files."""

    result: _Result | None = Field(alias="result.json")
    metrics: list[_Line] = Field(alias="metrics.jsonl")
    command: list[Any] = Field(alias="environment.json")


def _check(result: object, metrics: object, environment: Mapping[str, Any]) -> None:
    """Raise ValueError if a run's files hold what no run writes: a report would fail in its middle."""
    content = {"result.json": None if result == {} else result, "metrics.jsonl": metrics}
    try:
        _Files.model_validate(content | {"environment.json": environment.get("command", [])})
    except ValidationError as e:
        place = ": ".join(f"line {x + 1}" if isinstance(x, int) else x for x in e.errors(include_input=False)[0]["loc"])
        raise ValueError(f"{shown(place)}: not what a run writes") from None


def _read_metrics(path: Path) -> list[Any]:
    """The lines of ``metrics.jsonl`` but for what a kill or a full disk cut off at its end."""
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    metrics = []
    for number, line in enumerate(lines, 1):
        try:
            metrics.append(from_json(line))
        except ValueError:
            if number < len(lines):  # a whole file ends in an empty one
                raise InputError(f"{path.name}: line {number}: not what a run writes") from None
    return metrics


def read_run(path: Path) -> Run:
    """The run in a directory; an exception if it holds no run, or one whose files are damaged."""

    def content(name: str) -> dict[str, Any]:
        return read_json(path / name) if (path / name).exists() else {}

    failed, environment = content("failure.json"), content("environment.json")
    failure = None if failed.get("error") is None else str(failed["error"])
    result = read_json(path / "result.json") if failure is None else content("result.json")
    metrics = _read_metrics(path / "metrics.jsonl")
    _check(result, metrics, environment)
    config, changed, settings = _placed(path / "config.yaml", environment.get("config", failed.get("config")))
    return Run(path, result, metrics, environment, config, changed, failure, settings)


_known_configurations = cache(config_names)


@cache
def _settings_of(config: str) -> dict[str, Any]:
    return _comparable(load_settings(config).as_dict())


def _comparable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which runs of one experiment agree, as JSON gives them back."""
    kept = {k: v for k, v in settings.items() if k not in _NOT_COMPARED}
    kept |= {k: _without_place(Path(kept[k])) for k in _FILES if isinstance(kept.get(k), str)}
    return dict(json.loads(json.dumps(kept, default=str)))


def _without_place(file: Path) -> str:
    """A file's name; of a checkpoint or split in a run directory, the run's name without its seed."""
    return re.sub(r"_\d+$", "", file.parent.name) if file.name in (LATEST, SPLIT_FILE) else file.name


def _placed(saved: Path, config: str | None) -> tuple[str | None, dict[str, tuple[Any, Any]], dict[str, Any]]:
    """A run's ``config``, ``changed`` and ``settings``."""
    layers = read_saved(saved)
    try:
        mine = _comparable(resolve(layers).as_dict())
    except ConfigError:  # of a plugin
        return None, {}, _comparable({k: v for layer in layers for k, v in layer.values.items()})
    if config in _known_configurations():
        theirs = _settings_of(config)
        pairs = {k: (theirs.get(k), mine.get(k)) for k in {**theirs, **mine}}
        changed = {k: (a, b) for k, (a, b) in pairs.items() if a != b}
        if not any(k in changed for k in _PLACING):
            return config, changed, {}
    return None, {}, mine


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Runs in directories at any depth and in files of summaries (``.jsonl``), by name, each once however often it is
    copied; and a line for each run directory that cannot be read."""
    found: list[Run] = []
    unread = []
    for path in dict.fromkeys(paths):
        if path.suffix == ".jsonl":
            found += read_summaries(path)
            continue
        if not os.path.isdir(path):  # False, too, for a name that no folder can have
            raise InputError(f"{shown(path)}: no such folder; give folders of runs")
        places = sorted(p.parent for p in path.rglob("config.yaml"))
        if not places:
            raise InputError(f"{path}: no run in it (a run's folder has a config.yaml)")
        for place in places:
            try:
                found.append(read_run(place.resolve()))  # its name is needed: `report .`
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as e:
                unread.append(one_line(f"{place}: {e}"))
    runs: dict[str, Run] = {}
    for run in found:
        same = str(run.path.absolute())
        if run.environment.get("started"):
            same = json.dumps([run.path.name, run.result, run.environment], sort_keys=True)
        if same not in runs or len(run.metrics) > len(runs[same].metrics):
            runs[same] = run
    order = sorted(runs.values(), key=lambda r: (r.config or r.path.name, r.result.get("seed", -1), str(r.path)))
    return order, list(dict.fromkeys(unread))


def names_of(runs: Sequence[Run]) -> list[str]:
    """The name of each run's directory, with its folder's where several share it."""
    count = Counter(run.path.name for run in runs)
    return [
        run.path.name if count[run.path.name] == 1 else f"{run.path.absolute().parent.name}/{run.path.name}"
        for run in runs
    ]


def write_summaries(runs: Sequence[Run], path: Path) -> None:
    """Write all that a report needs of runs, a line of JSON each."""
    lines = []
    for run, name in zip(runs, names_of(runs), strict=True):
        content = {
            "path": name, "config": run.config, "changed": run.changed, "failure": run.failure,
            "result": run.result, "environment": run.environment, "settings": run.settings,
            "evaluations": [[int(s), round(v, 6)] for s, v in run.curve(ACCURACY).items()],
        }  # fmt: skip
        lines.append(to_json(content, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def read_summaries(path: Path) -> list[Run]:
    """The runs of a file that :func:`write_summaries` wrote."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as e:
        raise InputError(f"{shown(path)}: cannot be read: {getattr(e, 'strerror', None) or e}") from None
    runs = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            content = from_json(line)
            metrics = [{"step": step, ACCURACY: accuracy} for step, accuracy in content["evaluations"]]
            _check(content["result"], metrics, content["environment"])
            config = content["config"] if content["config"] in _known_configurations() else None
            changed = {k: (theirs, ours) for k, (theirs, ours) in content["changed"].items()}
            failure = None if content["failure"] is None else str(content["failure"])
            place, settings = path.parent / content["path"], dict(content.get("settings", {}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(f"{path} line {number}: not a summary of a run, as `report` writes them") from None
        runs.append(Run(place, content["result"], metrics, content["environment"], config, changed, failure, settings))
    return runs


def mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    v = list(values)
    return statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0


def summary(scores: Sequence[float]) -> str:
    """``92.50 ± 4.40 (n = 5)``: mean, sample standard deviation, number of runs; empty without one."""
    if not scores:
        return ""
    mean, std = mean_and_std(scores)
    return f"{mean:.2f}" + (f" ± {std:.2f}" if len(scores) > 1 else "") + f" (n = {len(scores)})"

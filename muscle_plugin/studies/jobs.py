"""The runs of a sweep: their settings, directories and states, and which one waits for which."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from muscle_plugin.errors import ConfigError, InputError
from muscle_plugin.files import read_json
from muscle_plugin.run_files import FAILURE_FILE
from muscle_plugin.settings.resolve import Resolved, began_otherwise, differing_settings, load_settings
from muscle_plugin.settings.sources import Layer, config_name
from muscle_plugin.studies.definitions import expand


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    name: str
    seed: int
    config: str
    overrides: dict[str, Any]
    resolved: Resolved

    def __str__(self) -> str:
        return f"{self.name}, seed {self.seed}"

    @property
    def run_dir(self) -> Path:
        return self.resolved.run_dir

    @property
    def result(self) -> dict[str, Any]:
        """The content of ``result.json``; empty if there is none, or it is damaged."""
        try:
            return read_json(self.run_dir / "result.json")
        except (OSError, InputError):
            return {}

    @property
    def differing(self) -> dict[str, tuple[Any, Any]]:
        """:func:`differing_settings` of the run in the directory; empty if there is none."""
        try:
            return differing_settings(self.run_dir / "config.yaml", self.resolved)
        except ConfigError:
            return {}

    @property
    def state(self) -> str:
        """``new``, ``finished``, ``cut off``, ``failed``, or ``of other settings``."""
        if (self.run_dir / FAILURE_FILE).is_file():
            return "failed"
        complete = self.result.get("complete")
        if complete is None or not (self.run_dir / "config.yaml").is_file():
            return "new"
        if self.differing:
            return "of other settings"
        return "finished" if complete else "cut off"


def jobs_of(words: Sequence[str], seeds: int, layer: Layer) -> list[Job]:
    """The runs of the configurations that words stand for, seed by seed from 0; ``layer`` holds the settings of all."""
    faults = [
        f"--{k}: a sweep decides it for each run itself" + ("; give --seeds N" if k == "seed" else "")
        for k in ("seed", "save_name", "resume", "overwrite", "load_path")
        if k in layer.values
    ]
    shared = {"num_threads": 1, **layer.values}
    jobs: list[Job] = []
    try:
        paths = expand(words)
    except ConfigError as e:
        faults, paths = [*faults, *e.faults], []
    for path in paths:
        try:
            jobs += _jobs_of_file(path, seeds, shared)
        except ConfigError as e:
            named = ("--", f"{path.name}:", f"{path.absolute()}:")
            faults += [f if f.startswith(named) else f"{path.stem}: {f}" for f in e.faults]
    directories = Counter(job.run_dir for job in jobs)
    faults += [f"{d.name}: two configurations have this name" for d, n in directories.items() if n > 1]
    if faults:
        raise ConfigError(list(dict.fromkeys(faults)))
    jobs.sort(key=lambda job: job.seed)
    run_order(jobs)
    return jobs


def _jobs_of_file(path: Path, seeds: int, shared: Mapping[str, Any]) -> list[Job]:
    settings = load_settings(path, **shared).settings
    name = (config_name(path) or path.stem).replace("/", "-")
    # the same places wherever the run is executed
    places = ("save_dir", "data_dir") if settings.dataset != "digits" else ("save_dir",)  # digits are in no folder
    overrides = dict(shared) | {k: os.path.abspath(getattr(settings, k)) for k in places}
    if "plugins" in shared:  # True stands for those that the file names
        overrides["plugins"] = settings.plugins
    jobs = []
    for seed in range(seeds):
        own = {**overrides, "seed": seed, "resume": "auto", "save_name": f"{name}_{seed}"}
        jobs.append(Job(name, seed, str(path.resolve()), own, load_settings(path, **own)))
    return jobs


def predecessor(job: Job, jobs: Mapping[Path, Job]) -> Job | None:
    """The run, of those by run directory, from whose weights another one starts."""
    if not job.resolved.settings.init_from:
        return None
    start = Path(job.resolved.settings.init_from).absolute()
    return jobs.get(start) or jobs.get(start.parent)


def run_order(jobs: Iterable[Job]) -> TopologicalSorter[Path]:
    """Sort run directories so that each comes after the one that it starts from; circles raise a ConfigError."""
    by_dir = {job.run_dir: job for job in jobs}
    sorter: TopologicalSorter[Path] = TopologicalSorter()
    for run_dir, job in by_dir.items():
        before = predecessor(job, by_dir)
        sorter.add(run_dir, *([before.run_dir] if before else []))
    try:
        sorter.prepare()
    except CycleError as e:
        names = [run_dir.name for run_dir in reversed(e.args[1])]
        raise ConfigError([f"init_from: {names[0]} would start from its own weights: {' from '.join(names)}"]) from None
    return sorter


def refuse(faults: Sequence[str], most: int) -> None:
    """Raise the first faults, with the number of further ones."""
    unique = list(dict.fromkeys(faults))
    if unique:
        more = [f"and {len(unique) - most} more like these"] if len(unique) > most else []
        raise ConfigError([*unique[:most], *more])


def refuse_other_settings(jobs: Iterable[Job], advice: str) -> None:
    """Raise a ConfigError, with ``advice``, for runs that began with other settings than they have now."""
    others = [job for job in jobs if job.state == "of other settings"]
    refuse([f"{job.run_dir}: {began_otherwise(job.differing)}. {advice}" for job in others], 3)

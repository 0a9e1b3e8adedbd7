"""The studies of ``studies.yaml``: the paper's tables and figures, the digits study, USB's protocols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from muscle_plugin.errors import ConfigError
from muscle_plugin.settings.sources import config_directory, find_config


@dataclass(frozen=True)
class Cell:
    """One cell of a table; ``paper`` is the mean and standard deviation that the paper prints (%), if it has the cell."""

    config: str
    metric: str = "top1"
    paper: tuple[float, float] | None = None


@dataclass(frozen=True)
class StudyTable:
    """A table: ``cells[i][j]`` is row i, column j."""

    name: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Cell, ...], ...]

    @property
    def configs(self) -> list[str]:
        return list(dict.fromkeys(cell.config for row in self.cells for cell in row))

    @property
    def of_paper(self) -> bool:
        return any(cell.paper for row in self.cells for cell in row)


@dataclass(frozen=True)
class StudyFigure:
    """A plot of the paper."""

    name: str
    title: str
    x: str  #: name of the x axis
    series: dict[str, dict[str, str]]  #: name -> value on the x axis -> configuration
    metrics: Sequence[str] = ("top1",)  #: one panel each: ``top1`` or keys of ``last_evaluation`` in ``result.json``
    before: Sequence[str] = ()  #: configurations from whose weights others start

    @property
    def xs(self) -> list[str]:
        return list(dict.fromkeys(x for points in self.series.values() for x in points))

    @property
    def configs(self) -> list[str]:
        return list(dict.fromkeys([*self.before, *(c for points in self.series.values() for c in points.values())]))


def _table(name: str, content: Mapping[str, Any]) -> StudyTable:
    folder = f"{content['folder']}/" if "folder" in content else ""
    columns = content["columns"]

    def cell(row: Mapping[str, str], column: Mapping[str, str], printed: str | None) -> Cell:
        config = f"{folder}{row['config']}_{column['config']}{row.get('suffix', '')}"
        mean, _, std = (printed or "").partition("±")
        return Cell(config, column.get("metric", "top1"), (float(mean), float(std)) if printed else None)

    cells = tuple(
        tuple(cell(row, *pair) for pair in zip(columns, row.get("paper", [None] * len(columns)), strict=True))
        for row in content["rows"]
    )
    rows, heads = (tuple(x["head"] for x in content[key]) for key in ("rows", "columns"))
    return StudyTable(name, content["title"], rows, heads, cells)


@cache
def _content() -> dict[str, dict[str, dict[str, Any]]]:
    return YAML(typ="safe", pure=True).load(Path(__file__).with_name("studies.yaml"))  # type: ignore[no-any-return]


@cache
def tables() -> list[StudyTable]:
    """All tables, the paper's first."""
    return [_table(name, table) for name, table in _content()["tables"].items()]


@cache
def figures() -> list[StudyFigure]:
    """All plots of the paper."""
    return [StudyFigure(name, **figure) for name, figure in _content()["figures"].items()]


@cache
def _studies() -> dict[str, list[str]]:
    """Name -> configurations; ``figure2`` is its four parts."""
    studies = {t.name: t.configs for t in tables()} | {f.name: f.configs for f in figures()}
    parts = [configs for name, configs in studies.items() if name.startswith("figure2")]
    return studies | {"figure2": list(dict.fromkeys(chain(*parts)))}


def study_names() -> list[str]:
    """Names that stand for several configurations."""
    return list(_studies())


def study_configs(name: str) -> list[str]:
    """The configurations of a study, each once; none for another name."""
    return _studies().get(name, [])


def expand(words: Sequence[str]) -> list[Path]:
    """The configuration files that words stand for, each once: names of studies, names of configurations (``*`` stands
    for anything: ``*_digits_10``), or paths of YAML files. A ConfigError names each word that stands for nothing."""
    found: list[Path] = []
    faults = []
    for word in words:
        if word in study_names():
            found += map(find_config, study_configs(word))
        elif "*" in word and not Path(word).exists():
            matches = sorted(config_directory().glob(f"{word.removesuffix('.yaml')}.yaml"))
            if not matches:
                faults.append(f"{word}: no configuration in {config_directory()} is named so")
            found += matches
        else:
            try:
                found.append(find_config(word, study_names()))
            except ConfigError as e:
                faults += e.faults
    if faults:
        raise ConfigError(faults)
    return list(dict.fromkeys(found))

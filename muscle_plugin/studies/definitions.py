"""What can be swept and reported by name: the paper's tables and figures, the digits study, USB's protocols.

They stand in ``studies.yaml``, the tables with the paper's numbers. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from muscle_plugin.errors import ConfigError
from muscle_plugin.settings.sources import config_directory, find_config


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        config: name of the configuration that trains it.
        metric: ``top1`` or ``top5``.
        paper: mean and standard deviation that the paper prints (%), if it has the cell.
    """

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
        """Names of its configurations, each once."""
        return list(dict.fromkeys(cell.config for row in self.cells for cell in row))

    @property
    def of_paper(self) -> bool:
        """Whether the paper has it."""
        return any(cell.paper for row in self.cells for cell in row)


@dataclass(frozen=True)
class StudyFigure:
    """A plot: series -> value on the x axis -> name of a configuration.

    Attributes:
        x: name of the x axis.
        metrics: what is plotted, one panel each: ``top1`` or keys of ``last_evaluation`` in ``result.json``.
        before: configurations from whose weights others start.
    """

    name: str
    title: str
    x: str
    series: dict[str, dict[str, str]]
    metrics: tuple[str, ...] = ("top1",)
    before: tuple[str, ...] = ()

    @property
    def xs(self) -> list[str]:
        """Values on the x axis, each once."""
        return list(dict.fromkeys(x for points in self.series.values() for x in points))

    @property
    def configs(self) -> list[str]:
        """Names of its configurations, each once, in an order in which they can be trained."""
        return list(dict.fromkeys([*self.before, *(c for points in self.series.values() for c in points.values())]))


def _printed(text: str) -> tuple[float, float]:
    mean, std = text.split("±")
    return float(mean), float(std)


def _table(name: str, content: dict[str, Any]) -> StudyTable:
    folder = f"{content['folder']}/" if "folder" in content else ""
    cells = []
    for row in content["rows"]:
        printed = row.get("paper") or [None] * len(content["columns"])
        cells.append(
            tuple(
                Cell(
                    f"{folder}{row['config']}_{column['config']}{row.get('suffix', '')}",
                    column.get("metric", "top1"),
                    None if text is None else _printed(text),
                )
                for column, text in zip(content["columns"], printed, strict=True)
            )
        )
    rows, columns = (tuple(x["head"] for x in content[key]) for key in ("rows", "columns"))
    return StudyTable(name, content["title"], rows, columns, tuple(cells))


@cache
def _studies() -> dict[str, StudyTable | StudyFigure]:
    content = YAML(typ="safe", pure=True).load(Path(__file__).with_name("studies.yaml").read_text(encoding="utf-8"))
    out: dict[str, StudyTable | StudyFigure] = {n: _table(n, t) for n, t in content["tables"].items()}
    for name, figure in content["figures"].items():
        series = {s["head"]: {str(x): config for x, config in s["points"].items()} for s in figure["series"]}
        out[name] = StudyFigure(
            name, figure["title"], figure["x"], series,
            tuple(figure.get("metrics", ("top1",))), tuple(figure.get("before", ())),
        )  # fmt: skip
    return out


def tables() -> list[StudyTable]:
    """All tables, the paper's first."""
    return [s for s in _studies().values() if isinstance(s, StudyTable)]


def figures() -> list[StudyFigure]:
    """All plots of the paper."""
    return [s for s in _studies().values() if isinstance(s, StudyFigure)]


def study_names() -> list[str]:
    """Names that stand for several configurations."""
    return [*_studies(), "figure2"]


def study_configs(name: str) -> list[str]:
    """The configurations of a study, each once; ``figure2`` is its four parts."""
    return list(
        dict.fromkeys(
            c for n, s in _studies().items() if n == name or (name == "figure2" and n[:-1] == name) for c in s.configs
        )
    )


def expand(words: Sequence[str]) -> list[Path]:
    """The configuration files that words stand for, each once: names of studies, names of configurations (``*`` stands
    for anything: ``*_digits_10``), or paths of YAML files.

    Raises:
        ConfigError: a word stands for nothing; every such word is named.
    """
    found: dict[Path, None] = {}
    faults = []
    for word in words:
        if word in study_names():
            found |= {find_config(name): None for name in study_configs(word)}
        elif "*" in word and not Path(word).exists():
            matches = sorted(p for p in config_directory().glob(f"{word.removesuffix('.yaml')}.yaml"))
            if not matches:
                faults.append(f"{word}: no configuration in {config_directory()} is named so")
            found |= dict.fromkeys(matches)
        else:
            try:
                found[find_config(word, study_names())] = None
            except ConfigError as e:
                faults += e.faults
    if faults:
        raise ConfigError(faults)
    return list(found)

"""Runs that are one experiment but for the seed, and what is said of them together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from muscle_plugin.studies.definitions import Cell
from muscle_plugin.studies.runs import Run, mean_and_std, plain

#: Which accuracy of a run counts, in words.
RULES = {
    "last": "accuracy at the last step",
    "best": "best accuracy over the run, chosen on the test set",
    "median20": "median of the last 20 evaluations, or of all where there are fewer",
}


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that deviate from it in the same way, or not at all.

    Attributes:
        title: name of the configuration, or of the directory where there is none.
        config: name of the configuration; None where there is none.
        deviation: from the configuration, or from other groups of the title where there is none, for people; empty: none.
        runs: of different seeds, usually.
    """

    title: str
    config: str | None
    deviation: str
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        """Runs that are complete."""
        return [r for r in self.runs if r.state == "finished"]

    @property
    def name(self) -> str:
        """Title and deviation."""
        return f"{self.title}: {self.deviation}" if self.deviation else self.title

    @property
    def algorithm(self) -> str:
        """Its algorithm; empty if no run got so far as to say."""
        return next((str(r.result["algorithm"]) for r in self.runs if r.result), "")

    @property
    def setting(self) -> str:
        """What is left of the title without the algorithm: data set, labels, protocol; and the deviation."""
        if self.config is None:
            result = next((r.result for r in self.runs if r.result), {})
            return f"{result.get('dataset', '?')}_{result.get('num_labels')} (no known configuration)"
        folder, slash, leaf = self.title.rpartition("/")
        name = folder + slash + leaf.removeprefix(f"{self.algorithm}_")
        return f"{name} ({self.deviation})" if self.deviation else name

    @cached_property
    def trouble(self) -> str:
        """What keeps runs from counting, or from counting alike: ``1 failed, seed 0 2 times``; empty if nothing does."""
        states = [r.state for r in self.runs]
        states += ["pre-trained without labels"] * sum(r.pretrained for r in self.finished)
        words = [f"{n} {state}" for state, n in Counter(states).items() if state != "finished"]
        seeds = Counter(r.result["seed"] for r in self.finished)
        words += [f"seed {s} {n} times" for s, n in sorted(seeds.items()) if n > 1]
        return ", ".join(words)

    def scores(self, rule: str, metric: str = "top1") -> list[float]:
        """The figures of finished runs; accuracies in percent."""
        scale = 1 if metric.endswith("entropy") else 100
        found = [r.score(rule, metric) for r in self.finished]
        return [scale * x for x in found if x is not None]


def groups_of(runs: Iterable[Run]) -> list[Group]:
    """Runs in their groups, those without deviation first, in order of appearance."""
    found: dict[tuple[str, str | None, str, str], list[Run]] = {}
    for run in runs:
        # without a configuration, runs of like settings differ in their directory's name by the seed at its end
        title = run.config or run.path.name.removesuffix(f"_{run.result.get('seed')}")
        found.setdefault((title, run.config, run.deviation, _settings(run)), []).append(run)
    groups = []
    for (title, config, deviation, settings), members in found.items():
        if config is None and len(alike := [k for k in found if k[:2] == (title, None)]) > 1:
            deviation = _told_apart(members[0], [found[k][0] for k in alike if k[3] != settings])
            title = title if deviation else _place(members)
        groups.append(Group(title, config, deviation, tuple(members)))
    return sorted(groups, key=lambda g: bool(g.deviation and g.config))


def _told_apart(run: Run, others: Sequence[Run]) -> str:
    """What tells a run without configuration from those of other settings: ``mi_weight 2, lr 0.1``."""
    if not run.settings or not all(r.settings for r in others):
        return ""
    names = sorted(set.intersection(*({*r.settings} for r in (run, *others))))  # not those of one algorithm alone
    differing = [k for k in names if any(r.settings[k] != run.settings[k] for r in others)]
    return ", ".join(f"{k} {plain(run.settings[k])}" for k in differing)


def _settings(run: Run) -> str:
    """Key of the settings of a run without configuration."""
    if run.config:
        return ""
    said = {k: run.result.get(k) for k in ("algorithm", "dataset", "num_labels", "net", "num_train_iter")}
    return json.dumps(run.settings or said, sort_keys=True)


def _place(members: Sequence[Run]) -> str:
    """Folder and directory of the first of runs whose directories have the names of others."""
    path = members[0].path.absolute()
    return f"{path.parent.name}/{path.name}" + (" ..." if len(members) > 1 else "")


def names_in_settings(groups: Sequence[Group]) -> list[str]:
    """A name for each group among those of its setting: its algorithm, with the title where several have the same."""
    count = Counter((g.setting, g.algorithm) for g in groups)
    return [g.algorithm if count[g.setting, g.algorithm] == 1 else f"{g.algorithm} ({g.name})" for g in groups]


def summary(scores: Sequence[float]) -> str:
    """``92.50 ± 4.40 (n = 5)``: mean, sample standard deviation, number of runs; empty without one."""
    if not scores:
        return ""
    mean, std = mean_and_std(scores)
    return f"{mean:.2f}" + (f" ± {std:.2f}" if len(scores) > 1 else "") + f" (n = {len(scores)})"


@dataclass(frozen=True)
class Ours:
    """What the runs of a group give for a cell of the paper.

    Attributes:
        text: mean, standard deviation and number of finished runs; empty without one.
        trouble: runs that do not count.
        deviation: from the cell's configuration.
        difference: mean minus the paper's; None where either is missing.
        within: whether the difference is at most two of the paper's standard deviations.
    """

    text: str
    trouble: str
    deviation: str
    difference: float | None = None
    within: bool | None = None


def ours_for(cell: Cell, groups: Sequence[Group], rule: str) -> list[Ours]:
    """What the runs of a cell's configuration give, those without deviation first."""
    out = []
    for group in groups:
        if group.config != cell.config:
            continue
        scores = group.scores(rule, cell.metric)
        difference = within = None
        if scores and cell.paper is not None and not group.deviation:
            difference = mean_and_std(scores)[0] - cell.paper[0]
            within = abs(difference) <= 2 * cell.paper[1]
        out.append(Ours(summary(scores), group.trouble, group.deviation, difference, within))
    return out

"""Runs of one experiment, which differ in the seed alone: their scores, the paper's beside them, and ranks over settings."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
import pandas as pd
from scipy import stats

from muscle_plugin.registry.catalogue import MUSCLE, MUSCLE_PREFIX
from muscle_plugin.studies.runs import Run, plain


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that deviate from it in the same way, or not at all."""

    title: str  #: name of the configuration, or of the directory where there is none
    config: str | None
    deviation: str  #: from the configuration, or from other groups of the title where there is none, in words
    runs: tuple[Run, ...]

    @property
    def finished(self) -> list[Run]:
        return [r for r in self.runs if r.state == "finished"]

    @property
    def name(self) -> str:
        return f"{self.title}: {self.deviation}" if self.deviation else self.title

    @property
    def algorithm(self) -> str:
        """Its algorithm; empty if no run got so far as to say."""
        return next((str(r.result["algorithm"]) for r in self.runs if r.result), "")

    @property
    def setting(self) -> str:
        """Title without algorithm: data set, labels and protocol; and the deviation."""
        if self.config is None:
            result = next((r.result for r in self.runs if r.result), {})
            return f"{result.get('dataset', '?')}_{result.get('num_labels')} (no known configuration)"
        folder, slash, leaf = self.title.rpartition("/")
        name = folder + slash + leaf.removeprefix(f"{self.algorithm}_")
        return f"{name} ({self.deviation})" if self.deviation else name

    @cached_property
    def trouble(self) -> str:
        """Why runs do not count, or count twice: ``1 failed, seed 0 2 times``; empty if all is well."""
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
        settings = json.dumps(run.settings, sort_keys=True)
        found.setdefault((title, run.config, run.deviation, settings), []).append(run)
    groups = []
    for (title, config, deviation, settings), members in found.items():
        if config is None and len(alike := [k for k in found if k[:2] == (title, None)]) > 1:
            deviation = _told_apart(members[0], [found[k][0] for k in alike if k[3] != settings])
        groups.append(Group(title, config, deviation, tuple(members)))
    return sorted(groups, key=lambda g: bool(g.deviation and g.config))


def _told_apart(run: Run, others: Sequence[Run]) -> str:
    """What tells a run without configuration from those of other settings: ``mi_weight 2, lr 0.1``."""
    names = sorted(set.intersection(*({*r.settings} for r in (run, *others))))  # not those of one algorithm alone
    differing = [k for k in names if any(r.settings[k] != run.settings[k] for r in others)]
    return ", ".join(f"{k} {plain(run.settings[k])}" for k in differing) or f"in {run.path.absolute().parent.name}"


def names_in_settings(groups: Sequence[Group]) -> list[str]:
    """A name for each group among those of its setting: its algorithm, with the title where several have the same."""
    count = Counter((g.setting, g.algorithm) for g in groups)
    return [g.algorithm if count[g.setting, g.algorithm] == 1 else f"{g.algorithm} ({g.name})" for g in groups]


@dataclass(frozen=True)
class Ranking:
    """Mean ranks of algorithms over settings, the Friedman test, and Nemenyi's critical difference (Demsar 2006)."""

    settings: tuple[str, ...]
    ranks: dict[str, float]  #: algorithm -> mean rank, the best first; ties share their ranks
    scores: dict[str, tuple[float, ...]]  #: algorithm -> mean accuracy (%) in each setting
    p_value: float  #: of the Friedman test: how likely ranks so different are if all algorithms are alike
    critical_difference: float  #: mean ranks nearer than this do not differ at the 5 % level
    left_out: tuple[str, ...]  #: algorithms and settings that the runs do not cover together


def rank(scores: Mapping[str, Mapping[str, float]]) -> Ranking | None:
    """Rank algorithms by scores (setting -> algorithm -> accuracy). Whichever algorithm or setting has most gaps is left out
    until there are none; returns None if fewer than three algorithms or two settings remain."""
    table = pd.DataFrame.from_dict(scores, orient="index")
    table = table[table.count(axis=1) > 1]
    left_out: list[str] = []
    while table.isna().any(axis=None):
        lacking, gaps = table.isna().mean(axis=0), table.isna().mean(axis=1)
        if lacking.max() >= gaps.max():
            left_out.append(lacking.idxmax())
            table = table.drop(columns=left_out[-1])
        else:
            left_out.append(gaps.idxmax())
            table = table.drop(index=left_out[-1])
    n, k = table.shape
    if k < 3 or n < 2:
        return None
    ranks = table.rank(axis=1, ascending=False).mean().sort_values(kind="stable")
    with np.errstate(invalid="ignore"):  # 0 / 0 if all are alike
        p_value = float(stats.friedmanchisquare(*table.to_numpy().T).pvalue)
    return Ranking(
        tuple(table.index),
        ranks.to_dict(),
        {algorithm: tuple(table[algorithm]) for algorithm in ranks.index},
        p_value if math.isfinite(p_value) else 1.0,
        critical_difference(k, n),
        tuple(left_out),
    )


def critical_difference(k: int, n: int) -> float:
    """Nemenyi's critical difference of the mean ranks of k algorithms over n settings, at the 5 % level."""
    quantile = float(stats.studentized_range.ppf(1 - 0.05, k, np.inf))
    return quantile / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))


def _scores_by_seed(groups: Sequence[Group], rule: str) -> dict[str, dict[str, dict[int, float]]]:
    """Setting -> algorithm -> seed -> accuracy (%), settings in natural order."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for group, name in zip(groups, names_in_settings(groups), strict=True):
        if scores := {r.result["seed"]: 100 * x for r in group.finished if (x := r.score(rule)) is not None}:
            found.setdefault(group.setting, {})[name] = scores
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def scores_by_setting(groups: Sequence[Group], rule: str) -> dict[str, dict[str, float]]:
    """Setting -> algorithm -> mean accuracy (%) over the seeds that all have, since another seed is another labelled subset.
    Algorithms with less than half as many runs as the setting's most are left out."""
    out: dict[str, dict[str, float]] = {}
    for setting, scores in _scores_by_seed(groups, rule).items():
        most = max(map(len, scores.values()))
        enough = {a: s for a, s in scores.items() if 2 * len(s) >= most}
        if shared := set.intersection(*(set(s) for s in enough.values())):
            out[setting] = {a: fmean(s[seed] for seed in shared) for a, s in enough.items()}
    return out


def gains_of_muscle(groups: Sequence[Group], rule: str) -> dict[str, dict[str, str]]:
    """Setting -> base -> what MUSCLE adds to it, paired by seed: mean difference in points and its 95 % interval (Student's
    t), ``+4.2 [+1.1, +7.3] (n = 5)``. The base of ``muscle`` alone is ``supervised``."""
    out: dict[str, dict[str, str]] = {}
    for setting, scores in _scores_by_seed(groups, rule).items():
        for name in scores:
            base = "supervised" if name == MUSCLE else name.removeprefix(MUSCLE_PREFIX)
            if base == name or base not in scores:
                continue
            of_base, own = scores[base], scores[name]
            if differences := [own[seed] - of_base[seed] for seed in sorted(own.keys() & of_base.keys())]:
                out.setdefault(setting, {})[base] = _with_interval(differences)
    return out


def _with_interval(values: Sequence[float]) -> str:
    n, mean = len(values), fmean(values)
    if n == 1:
        return f"{mean:+.1f} (n = 1)"
    half = float(stats.t.ppf(0.975, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}] (n = {n})"


def natural_key(text: str) -> list[str | int]:
    """Key that sorts ``digits_20`` before ``digits_100``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]

"""Mean ranks of algorithms over settings, the Friedman test, and Nemenyi's critical difference (Demsar 2006)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from scipy import stats

from muscle_plugin.studies.groups import Group, names_in_settings

SIGNIFICANCE = 0.05


@dataclass(frozen=True)
class Ranking:
    """How algorithms rank over settings.

    Attributes:
        ranks: algorithm -> mean rank, the best first; ties share their ranks.
        scores: algorithm -> mean accuracy (%) in each setting.
        p_value: of the Friedman test: how likely ranks so different are if all algorithms are alike.
        critical_difference: mean ranks nearer than this do not differ at the 5 % level.
        left_out: algorithms and settings that the runs do not cover together.
    """

    settings: tuple[str, ...]
    ranks: dict[str, float]
    scores: dict[str, tuple[float, ...]]
    p_value: float
    critical_difference: float
    left_out: tuple[str, ...]


def rank(scores: Mapping[str, Mapping[str, float]]) -> Ranking | None:
    """Rank algorithms by accuracy (setting -> algorithm -> score) over the settings that all of them have.

    Whichever algorithm or setting has most gaps is left out until there are none. Returns None if fewer than three
    algorithms or two settings are left.
    """
    algorithms = list(dict.fromkeys(a for row in scores.values() for a in row))
    settings = [s for s, row in scores.items() if len(row) > 1]
    left_out: list[str] = []
    while True:
        lacking = {a: sum(a not in scores[s] for s in settings) for a in algorithms}
        gaps = {s: sum(a not in scores[s] for a in algorithms) for s in settings}
        if not any(lacking.values()):
            break
        worst_a, worst_s = max(lacking, key=lacking.__getitem__), max(gaps, key=gaps.__getitem__)
        if lacking[worst_a] / len(settings) >= gaps[worst_s] / len(algorithms):
            algorithms.remove(worst_a)
            left_out.append(worst_a)
        else:
            settings.remove(worst_s)
            left_out.append(worst_s)
    k, n = len(algorithms), len(settings)
    if k < 3 or n < 2:
        return None
    table = np.array([[scores[s][a] for a in algorithms] for s in settings])
    ranks = stats.rankdata(-table, axis=1).mean(0)
    p_value = float(stats.friedmanchisquare(*table.T).pvalue)
    order = np.argsort(ranks, kind="stable")
    return Ranking(
        tuple(settings),
        {algorithms[i]: float(ranks[i]) for i in order},
        {algorithms[i]: tuple(table[:, i].tolist()) for i in order},
        p_value if math.isfinite(p_value) else 1.0,  # all alike
        critical_difference(k, n),
        tuple(left_out),
    )


def critical_difference(k: int, n: int) -> float:
    """Nemenyi's critical difference of the mean ranks of k algorithms over n settings, at the 5 % level."""
    quantile = float(stats.studentized_range.ppf(1 - SIGNIFICANCE, k, np.inf))
    return quantile / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))


def scores_by_setting(groups: Sequence[Group], rule: str) -> dict[str, dict[str, float]]:
    """Setting -> algorithm -> mean accuracy (%) over the seeds that all have, since another seed is another labelled subset.
    Algorithms with less than half as many runs as the setting's most are left out."""
    by_seed: dict[str, dict[str, dict[int, float]]] = {}
    for group, name in zip(groups, names_in_settings(groups), strict=True):
        found = {r.result["seed"]: 100 * x for r in group.finished if (x := r.score(rule)) is not None}
        if found:
            by_seed.setdefault(group.setting, {})[name] = found
    out: dict[str, dict[str, float]] = {}
    for setting, scores in sorted(by_seed.items(), key=lambda item: natural_key(item[0])):
        most = max(map(len, scores.values()))
        enough = {a: s for a, s in scores.items() if 2 * len(s) >= most}
        if shared := set.intersection(*(set(s) for s in enough.values())):
            out[setting] = {a: fmean(s[seed] for seed in shared) for a, s in enough.items()}
    return out


def natural_key(text: str) -> list[str | int]:
    """Key that sorts ``digits_20`` before ``digits_100``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]

"""Short runs in several processes, or in one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import SHORT

from muscle_plugin import distributed
from muscle_plugin.registry.catalogue import all_algorithms
from muscle_plugin.runs.build import build
from muscle_plugin.settings.resolve import load_settings
from muscle_plugin.training import checkpoint, state


def run(name: str, folder: Path) -> tuple[Any, list[dict[str, float]]]:
    """Train in float64, without dropout: a step then depends on the global batch alone."""
    rows: list[dict[str, float]] = []
    special: dict[str, Any] = {"net_dropout": 0, "num_labels": 40}
    if any(a.name == "p_cutoff" for a in all_algorithms()[name].arguments):
        special = {**special, "p_cutoff": 0.2}  # pseudo-labels from the first steps on
    settings = {**SHORT, "num_log_iter": 1, **special}
    algorithm = build(
        load_settings(None, **{**settings, "algorithm": name, "save_dir": str(folder), "save_name": name})
    )
    normalise = algorithm.batches.normalise
    algorithm.batches.normalise = lambda x: normalise(x).double()
    algorithm.loader_dict["eval"]._normalise = algorithm.batches.normalise
    algorithm.record = rows.append
    algorithm.save_model = lambda *_: checkpoint.check_alike(algorithm)
    algorithm.warmup()
    algorithm.train()
    return algorithm, rows


def remembered(algorithm: Any) -> dict[str, Any]:
    """What the algorithm and its hooks hold."""
    found = state.capture(algorithm)
    nets = {which: net.state_dict() for which, net in algorithm.nets.items()}
    return {"own": found["algorithm"], **found["hooks"], **nets, "optimizer": algorithm.optimizer.state_dict()}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def main(rank: int, world: int, folder: Path, names: Sequence[str], same: bool = False) -> None:
    """What a process does: train short runs and write what they came to.

    ``folder/<algorithm>.<processes>.pt`` holds the logged values of every step and the nets; with ``same`` also whether all
    processes remember the same.
    """
    torch.set_default_dtype(torch.float64)
    with distributed.joined(torch.device("cpu"), 60):
        for name in names:
            algorithm, rows = run(name, folder)
            found: dict[str, Any] = {
                "rows": rows,
                "model": algorithm.model.state_dict(),
                "ema": algorithm.ema_model.state_dict(),
            }
            if same:
                states = distributed.gather_objects(remembered(algorithm))
                found["differing"] = [k for k, v in states[0].items() if not all(equal(v, s.get(k)) for s in states)]
            if rank == 0:
                torch.save(found, folder / f"{name}.{world}.pt")

"""``muscle-plugin usb-export``: finished runs of USB's protocols in USB's formats."""

from __future__ import annotations

import argparse
import io
import statistics
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from ruamel.yaml import YAML

from muscle_plugin.errors import InputError
from muscle_plugin.files import write_text
from muscle_plugin.registry.catalogue import all_algorithms, muscle_algorithms
from muscle_plugin.settings.resolve import Resolved, load_settings
from muscle_plugin.settings.schema import MuscleSettings
from muscle_plugin.studies.definitions import tables
from muscle_plugin.studies.runs import ACCURACY, Run, find_runs
from muscle_plugin.text import first_line, shown

#: USB's protocols: byte-order mark and line end of their files of results.
PROTOCOLS = {"classic_cv": ("\ufeff", "\r\n"), "usb_cv": ("", "\n")}
SEEDS = (0, 1, 2)
#: Columns of USB's table whose data do not load here; their cells stay empty.
NOT_HERE = {"usb_cv": ("tissuemnist_80", "tissuemnist_400", "semi_aves_3959")}


class Row(NamedTuple):
    """A row that can be exported."""

    protocol: str
    algorithm: str
    runs: dict[str, list[Run]]  #: column -> runs of every seed, as configured and complete

    def cells(self) -> list[str]:
        """The row as USB writes it: mean±std (ddof 0) over seeds of the error at the best step (%)."""
        out = []
        for column in columns(self.protocol):
            errors = [100 * (1 - run.result["best_top1"]) for run in self.runs.get(column, ())]
            out.append(f"{round(statistics.fmean(errors), 2)}±{round(statistics.pstdev(errors), 2)}" if errors else "")
        return out


@cache
def _names(protocol: str) -> tuple[list[str], list[str]]:
    """Algorithms, and columns that train here (data set and labels), of a protocol."""
    cells = next(t for t in tables() if t.name == protocol).cells
    algorithms = [load_settings(row[0].config).settings.algorithm for row in cells]
    return algorithms, [c.config.removeprefix(f"{protocol}/{algorithms[0]}_") for c in cells[0]]


def columns(protocol: str) -> list[str]:
    """Columns of USB's file of results."""
    return [*_names(protocol)[1], *NOT_HERE.get(protocol, ())]


def rows_of(protocol: str, runs: Sequence[Run]) -> tuple[list[Row], list[str]]:
    """The rows that can be exported, and a line on each algorithm whose runs are not complete."""
    rows, refused = [], []
    algorithms, own_columns = _names(protocol)
    for algorithm in algorithms:
        by_column = {c: [r for r in runs if r.config == f"{protocol}/{algorithm}_{c}"] for c in own_columns}
        if not any(by_column.values()):
            continue
        row, faults = Row(protocol, algorithm, {}), []
        for column, members in by_column.items():
            by_seed = {r.result["seed"]: r for r in members if not _unfit(r)}
            if missing := [str(s) for s in SEEDS if s not in by_seed]:
                reasons = "; ".join(f"{r.path.name}: {_unfit(r)}" for r in members if _unfit(r))
                faults.append(f"{column} lacks seed(s) {', '.join(missing)}" + (f" ({reasons})" if reasons else ""))
            else:
                row.runs[column] = [by_seed[s] for s in SEEDS]
        if faults:
            refused.append(f"{protocol}, {algorithm}: not exported: {'; '.join(faults)}")
        else:
            rows.append(row)
    return rows, refused


def _unfit(run: Run) -> str:
    """Why a run does not count; empty if it does."""
    if run.state != "finished":
        return run.state
    if run.changed:
        return f"not as configured ({run.deviation})"
    try:
        datetime.fromisoformat(run.environment["started"])
    except (KeyError, TypeError, ValueError):
        return "without time"
    return "" if isinstance(run.result.get("best_top1"), float) else "without accuracy"


def results_csv(protocol: str, rows: Sequence[Row], checkout: Path | None) -> tuple[str, list[str]]:
    """USB's file of results, a new one or that of a checkout, with these rows; and the names of those that it had."""
    head = columns(protocol)
    table = pd.DataFrame(columns=head, dtype=object)
    if checkout is not None:
        path = checkout / "results" / f"{protocol}.csv"
        try:
            table = pd.read_csv(path, index_col=0, dtype=object, keep_default_na=False, encoding="utf-8-sig")
        except OSError as e:
            raise InputError(f"{path}: {e.strerror}; --usb names a checkout of USB") from None
        except ValueError as e:
            raise InputError(f"{path}: cannot be read: {first_line(e)}") from None
        if list(table) != head:
            raise InputError(f"{path}: expected columns {', '.join(head)}, found {shown(', '.join(table))}")
    replaced = [row.algorithm for row in rows if row.algorithm in table.index]
    for row in rows:
        table.loc[row.algorithm] = row.cells()
    mark, line_end = PROTOCOLS[protocol]
    return mark + table.to_csv(index_label="", lineterminator=line_end), replaced


def flat_config(protocol: str, resolved: Resolved) -> dict[str, Any]:
    """The settings of a run as one of USB's configuration files has them: flat, USB's names, USB's order."""
    s = resolved.settings
    name, folder = f"{s.algorithm}_{s.dataset}_{s.num_labels}_{s.seed}", f"./saved_models/{protocol}"
    own = {a.name: getattr(s, a.name) for a in all_algorithms()[s.algorithm].arguments}
    if s.algorithm in muscle_algorithms():
        own |= {n: getattr(s, n) for n in MuscleSettings.model_fields}
    shared = {
        "ulb_loss_ratio": s.ulb_loss_ratio, "uratio": int(s.uratio) if s.uratio == int(s.uratio) else s.uratio,
        "ema_m": s.ema_m, "crop_ratio": 0.875, "img_size": s.img_size, "optim": s.optim, "lr": s.lr, "momentum": s.momentum,
        "weight_decay": s.weight_decay, "layer_decay": s.layer_decay, "amp": False, "clip": 0.0, "use_cat": s.use_cat,
        "include_lb_to_ulb": s.include_lb_to_ulb, "hard_augment": s.hard_augment, "net": s.net,
        "net_from_name": s.net_from_name, "use_pretrain": s.use_pretrain, "pretrain_path": s.pretrain_path,
        "data_dir": "./data", "dataset": s.dataset, "train_sampler": "RandomSampler", "num_classes": s.num_classes,
        "num_workers": 1, "seed": s.seed, "world_size": 1, "rank": 0, "multiprocessing_distributed": True,
        "dist_url": "tcp://127.0.0.1:10001", "dist_backend": "nccl", "gpu": "None",
    }  # fmt: skip
    return {
        "algorithm": s.algorithm, "save_dir": folder, "save_name": name, "resume": True,
        "load_path": f"{folder}/{name}/latest_model.pth", "overwrite": True, "use_tensorboard": True, "use_wandb": False,
        "epoch": s.epoch, "num_train_iter": s.num_train_iter, "num_eval_iter": s.num_eval_iter,
        "num_log_iter": s.num_log_iter, "num_warmup_iter": s.num_warmup_iter, "num_labels": s.num_labels,
        "batch_size": s.batch_size, "eval_batch_size": s.eval_batch_size, **own,
        **{k: v for k, v in shared.items() if k not in own},
    }  # fmt: skip


def log_text(run: Run, uses_ema: bool) -> str:
    """The run's evaluations as lines of ``log.txt``, in the form that USB's ``scripts/average_log.py`` reads."""
    began = datetime.fromisoformat(run.environment["started"])
    best, best_step, lines = -1.0, 0, []
    for line in run.metrics:
        if line.get(ACCURACY) is None:
            continue
        step = int(line["step"])
        if line[ACCURACY] > best:
            best, best_step = line[ACCURACY], step
        values = {k: round(v, 4) for k, v in line.items() if v is not None and (k == "lr" or "/" in k)}
        at = (began + timedelta(seconds=line.get("seconds") or 0)).strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
        lines.append(
            f"[{at} INFO] {step} iteration, USE_EMA: {uses_ema}, {values},BEST_EVAL_ACC: {best:.4f}, at {best_step} iters\n"
        )
    return "".join(lines)


def _write_runs(row: Row, out: Path) -> None:
    """Write the configurations and logs of a row as they lie in USB's repository."""
    for column, runs in row.runs.items():
        for run in runs:
            resolved = load_settings(run.config, seed=run.result["seed"])
            name, text = f"{row.algorithm}_{column}_{run.result['seed']}", io.StringIO()
            YAML().dump(flat_config(row.protocol, resolved), text)
            write_text(out / "config" / row.protocol / row.algorithm / f"{name}.yaml", text.getvalue())
            log = log_text(run, uses_ema=resolved.settings.ema_m != 0)
            write_text(out / "saved_models" / row.protocol / name / "log.txt", log)


def main(argv: Sequence[str], prog: str = "muscle-plugin usb-export") -> int:
    """Return the exit status 0; bad input, and no complete row, are raised as a UserError."""
    parser = argparse.ArgumentParser(
        prog=prog, description="Export finished runs of USB's protocols (sweep classic_cv, usb_cv) in USB's formats: rows of"
        " results/*.csv (error in percent at the best step, mean±std of 3 seeds), config/*.yaml, saved_models/*/log.txt.",
    )  # fmt: skip
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, at any depth")
    add("--out", type=Path, default=Path("usb_export"), metavar="DIR", help="folder to write [%(default)s]")
    add("--algorithms", nargs="+", metavar="NAME", help="only these; default: all that are complete")
    add("--usb", type=Path, metavar="DIR", help="a checkout of USB, to whose rows these are added")
    options = parser.parse_args(list(argv))
    runs, unread = find_runs(options.runs)
    rows, notes, files = [], unread, {}
    for protocol in PROTOCOLS:
        complete, refused = rows_of(protocol, runs)
        notes += refused
        if chosen := [row for row in complete if row.algorithm in (options.algorithms or [row.algorithm])]:
            content, replaced = results_csv(protocol, chosen, options.usb)
            files[options.out / "results" / f"{protocol}.csv"] = content
            notes += [f"replaces the row {name} of USB's {protocol}.csv" for name in replaced]
            rows += chosen
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if not rows:
        names = " or ".join(PROTOCOLS)
        raise InputError(f"no row is complete: it takes runs of every configuration of {names} with seeds 0, 1, 2")
    for path, content in files.items():
        write_text(path, content)
    for row in rows:
        _write_runs(row, options.out)
    written = [*files, options.out / "config", options.out / "saved_models"]
    print(f"{len(rows)} row(s). Written: {', '.join(map(str, written))}")
    return 0

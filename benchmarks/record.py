"""Record what this package computes and prints, to compare two revisions of it bit for bit.

    python benchmarks/record.py record before.json          # 45 algorithms and forms, 8 steps each; every --help; wrong input
    git checkout ... && python benchmarks/record.py record after.json
    python benchmarks/record.py compare before.json after.json

For each algorithm a digits run of 8 steps is trained to its end, and once more from its checkpoint of step 4. The record
holds SHA-256 sums of the weights, the averaged weights and the optimiser's state, and the logged values in full. Both
records must come from one machine: another CPU rounds differently. Only public names are used.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
SETTINGS: dict[str, Any] = {
    "dataset": "digits", "num_labels": 10, "img_size": 16, "total_batch": 16, "num_train_iter": 8, "epoch": 2,
    "num_eval_iter": 4, "num_log_iter": 2, "lr": 0.05, "ema_m": 0.9, "use_tensorboard": False, "num_threads": 1,
}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "crmatch": {"net": "wrn_28_2", "img_size": 32, "total_batch": 4},
    "dash": {"num_wu_iter": 2},
}
#: Further runs, which take paths that the default ones do not.
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"algorithm": "muscle_fixmatch", "precision": "bf16"},
    "host": {"algorithm": "muscle_fixmatch", "data_on": "host", "num_workers": 1},
    "cosine": {"algorithm": "muscle_meanteacher", "lr_schedule": "cosine", "lr_zero_at": 1.2, "decay_all": True},
    "adamw": {"algorithm": "fixmatch", "optim": "AdamW", "lr": 0.001, "clip_grad": 1.0, "num_warmup_iter": 2},
    "ratio": {"algorithm": "muscle", "ratio": 3.0, "hard_views": 2, "include_lb_to_ulb": True},
    "separate": {"algorithm": "muscle_flexmatch", "mi_batch_norm": "separate", "mi_labelled": False},
    "pretrain": {"algorithm": "muscle", "stage": "pretrain"},
    "options": {
        "algorithm": "muscle_fixmatch",
        "net": "cnn13",
        "net_width": 0.125,
        "net_dropout": 0.3,
        "net_noise": 0.1,
    },
    "usb_net": {"algorithm": "muscle_softmatch", "net": "wrn_28_2", "img_size": 32, "total_batch": 4},
    "augment": {"algorithm": "muscle", "hard_augment": "randaugment_usb", "hard_ops": 4},
}
#: In seconds, rates, paths and versions two records may differ.
VOLATILE = ("seconds", "images_per_second", "time", "prefetch", "path", "run_dir", "started")
HELP = ["", "train", "sweep", "report", "usb-export", "predict", "export", "data", "data show", "demo"]
WRONG = [
    "train",
    "train nosuch",
    "train fixmatch_digits_10 --nosuch 1",
    "train fixmatch_digits_10 --lr -1 --epoch 0 --seed x",
    "train --algorithm fixmatc --dataset digits",
    "train --algorithm fixmatch --dataset digit",
    "train --net resnet --dataset digits",
    "train fixmatch_digits_10 --num_labels 11",
    "train fixmatch_digits_10 --device mps",
    "train fixmatch_digits_10 --device cuda:0",
    "train fixmatch_digits_10 --mi_weight 1",
    "train fixmatch_digits_10 --overwrite --resume",
    "train fixmatch_digits_10 --lr_zero_at 2",
    "train fixmatch_digits_10 --total_batch 64 --batch_size 63",
    "train fixmatch_digits_10 --dataset cifar10 --data_dir nowhere",
    "train fixmatch_digits_10 --save_name a/b",
    "train fixmatch_digits_10 --split_file nowhere.json",
    "train fixmatch_digits_10 --plugins nowhere.py",
    "train fixmatch_digits_10 --init_from nowhere.pth",
    "train muscle_fullysupervised",
    "train fixmatch_digits_10 --use_wandb",
    "train broken.yaml",
    "train list.yaml",
    "sweep nosuch",
    "sweep digits --seeds x",
    "report nowhere --out r",
    "usb-export nowhere --out r",
    "predict --checkpoint nowhere --images . --out o.csv",
    "export --checkpoint nowhere --out o",
    "data show --dataset nosuch",
    "demo --out broken.yaml",
]


def digest(value: Any) -> str:
    """SHA-256 of tensors in any nesting of lists and dictionaries, by name."""
    import torch

    found = hashlib.sha256()

    def take(at: str, x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found.update(f"{at} {x.dtype} {tuple(x.shape)}".encode())
            found.update(
                x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if x.numel() else b""
            )
        elif isinstance(x, dict):
            for k in sorted(x, key=str):
                take(f"{at}.{k}", x[k])
        elif isinstance(x, (list, tuple)):
            for i, v in enumerate(x):
                take(f"{at}.{i}", v)
        else:
            found.update(f"{at} {x!r}".encode())

    take("", value)
    return found.hexdigest()[:16]


def steady(value: Any) -> Any:
    """Without what differs between two runs of the same code."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if not any(x in k for x in VOLATILE)}
    return [steady(v) for v in value] if isinstance(value, list) else value


def read_run(run: Path) -> dict[str, Any]:
    import torch

    checkpoint = torch.load(run / "latest_model.pth", map_location="cpu", weights_only=True)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "model": digest(checkpoint["model"]),
        "ema_model": digest(checkpoint["ema_model"]),
        "optimizer": digest({"state": checkpoint["optimizer"]["state"]}),
        "metrics": steady(lines),
        "result": steady(json.loads((run / "result.json").read_text())),
        "split": hashlib.sha256((run / "split.json").read_bytes()).hexdigest()[:16],
    }


def train_twice(name: str, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A run to its end, and what comes of going on from its checkpoint of step 4."""
    from muscle_plugin import load_settings, train

    given = {**SETTINGS, "save_dir": str(folder), "save_name": name, **settings}
    train(load_settings(None, **given), quiet=True)
    run = folder / name
    whole = read_run(run)
    (run / "latest_model.pth").unlink()
    train(load_settings(None, **given, resume="yes"), quiet=True)
    resumed = read_run(run)
    return {"whole": whole, "resumed": {k: resumed[k] for k in ("model", "ema_model", "optimizer", "metrics")}}


def algorithms() -> list[str]:
    with contextlib.suppress(ImportError):
        from muscle_plugin.registry.catalogue import all_algorithms

        return list(all_algorithms())
    from muscle_plugin.algorithms.catalogue import all_algorithms as before

    return list(before())


def forms(only: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in algorithms():
        if not only or name in only:
            yield name, {"algorithm": name, **SPECIAL.get(name.removeprefix("muscle_"), {})}
    for name, settings in VARIANTS.items():
        if not only or name in only:
            yield f"variant-{name}", settings


def record(out: Path, only: list[str], texts: bool) -> None:
    warnings.simplefilter("ignore")
    content: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"runs": {}, "texts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name, settings in forms(only):
            if name in content["runs"]:
                continue
            try:
                content["runs"][name] = train_twice(name, settings, Path(folder))
            except Exception as e:
                content["runs"][name] = {"error": f"{type(e).__name__}: {e}"}
                print(f"{name}: {type(e).__name__}: {e}", flush=True)
            out.write_text(json.dumps(content, indent=1))
            shutil.rmtree(Path(folder) / name, ignore_errors=True)
        if texts:
            content["texts"] = {f"help {c}": text(folder, *c.split(), "--help") for c in HELP}
            Path(folder, "broken.yaml").write_text("lr: [1\n")
            Path(folder, "list.yaml").write_text("- 1\n")
            content["texts"] |= {f"wrong {c}": text(folder, *c.split()) for c in WRONG}
            out.write_text(json.dumps(content, indent=1))
    print(f"{out}: {len(content['runs'])} runs, {len(content['texts'])} texts")


def text(folder: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "muscle_plugin.cli", *words], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"COLUMNS": "120", "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path[1:2]])},
    )  # fmt: skip
    return f"{done.returncode}\n{done.stdout}{done.stderr}".replace(folder, "FOLDER").replace(os.getcwd(), "ROOT")


def differences(a: Any, b: Any, at: str = "") -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for k in {**a, **b}:
            if k not in a or k not in b:
                yield f"{at}.{k}: only {'before' if k in a else 'after'}"
            else:
                yield from differences(a[k], b[k], f"{at}.{k}")
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{at}[{i}]")
    elif a != b:
        yield f"{at}: {a!r} != {b!r}"


def compare(before: Path, after: Path, texts: bool) -> int:
    a, b = (json.loads(p.read_text()) for p in (before, after))
    found = list(differences(a["runs"], b["runs"]))
    same = sum(a["runs"].get(k) == b["runs"].get(k) for k in a["runs"])
    if texts:
        found += list(differences(a["texts"], b["texts"]))
    print("\n".join(found))
    print(f"{same} of {len(a['runs'])} runs are identical, each to its end and resumed")
    return bool(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("record")
    one.add_argument("out", type=Path)
    one.add_argument("--only", nargs="*", default=[])
    one.add_argument("--no-texts", action="store_true")
    two = commands.add_parser("compare")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    two.add_argument("--texts", action="store_true")
    options = parser.parse_args()
    if options.command == "record":
        sys.path.insert(0, os.getcwd())
        record(options.out.resolve(), options.only, not options.no_texts)
        return 0
    return compare(options.before, options.after, options.texts)


if __name__ == "__main__":
    sys.exit(main())

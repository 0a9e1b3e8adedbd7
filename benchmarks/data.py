"""Start-up and peak memory of CIFAR-10, this package against stock USB, each in fresh processes of one run.

    python benchmarks/data.py --data_dir data [--rounds 3]

"Ready" is the first FixMatch batch (64 labelled, 64 unlabelled images: weak views of both, strong ones of the latter),
from local files. Imports are not counted; they are timed beside. Peak memory is what the process takes beyond what it had
after its imports, against the uint8 array of all 60,000 images (184.3 MB).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from pathlib import Path

from process_memory import forget_peak, memory
from rich.console import Console
from rich.table import Table

BEGAN = time.perf_counter()
RAW = 60_000 * 3 * 32 * 32
GOAL_SECONDS, GOAL_MEMORY = 3.0, 1.2


def ours(data_dir: str) -> None:
    import torch

    from muscle_plugin.data.batches import Batches
    from muscle_plugin.data.datasets import load_source
    from muscle_plugin.data.source import SourceOptions
    from muscle_plugin.data.splits import draw_split

    torch.zeros(8).sum()

    def ready() -> None:
        source = load_source("cifar10", SourceOptions(Path(data_dir), 32))
        split = draw_split(source, 250, 0)
        parameters = ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s")
        batches = Batches(
            source, split, 64, 64, parameters, "fixmatch", "crop_flip", "randaugment_usb", 3, 0, torch.device("cpu")
        )
        batches.batch(0)

    measure(ready)


def stock(data_dir: str) -> None:
    import semilearn.datasets.utils as utils
    from semilearn.datasets import get_cifar

    with tempfile.TemporaryDirectory() as folder:
        utils.base_dir = folder  # USB writes its index files into site-packages
        (Path(folder) / "cifar10").symlink_to(Path(data_dir).resolve())
        args = Namespace(
            img_size=32, crop_ratio=0.875, ulb_num_labels=None, lb_imb_ratio=1, ulb_imb_ratio=1, dataset="cifar10",
            num_labels=250, seed=0, num_classes=10,
        )  # fmt: skip

        def ready() -> None:
            import torch

            with contextlib.redirect_stdout(io.StringIO()):
                labelled, unlabelled, _ = get_cifar(args, "fixmatch", "cifar10", 250, 10, folder, False)
            batch = [labelled[i]["x_lb"] for i in range(64)]
            more = [unlabelled[i] for i in range(64)]
            torch.stack(batch), torch.stack([m["x_ulb_w"] for m in more]), torch.stack([m["x_ulb_s"] for m in more])

        measure(ready)


def measure(ready) -> None:  # type: ignore[no-untyped-def]
    """Print seconds and memory of ``ready()`` as JSON."""
    imported = time.perf_counter() - BEGAN
    forget_peak()
    before, start = memory("VmRSS"), time.perf_counter()
    ready()
    seconds = time.perf_counter() - start
    print(json.dumps({"imports": imported, "seconds": seconds, "memory": memory("VmHWM") - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder that holds cifar-10-batches-py [%(default)s]")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind [%(default)s]")
    parser.add_argument("--measure", choices=("ours", "stock"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        {"ours": ours, "stock": stock}[options.measure](options.data_dir)
        return
    if not (Path(options.data_dir) / "cifar-10-batches-py").is_dir():
        sys.exit(
            f"error: {options.data_dir}/cifar-10-batches-py: no such folder; --data_dir names the one that holds it"
        )
    found: dict[str, list[dict[str, float]]] = {"stock": [], "ours": []}
    for _ in range(options.rounds):
        for kind, values in found.items():
            command = [sys.executable, __file__, "--measure", kind, "--data_dir", options.data_dir]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: {kind}: {done.stderr.strip().splitlines()[-1]}")
            values.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table(title=f"CIFAR-10, 250 labels, {options.rounds} process(es) each: medians (lowest to highest)")
    for column in ("", "ready after", "imports before", "peak memory", "over raw array"):
        table.add_column(column, justify="right" if column else "left")
    middle: dict[str, tuple[float, float]] = {}
    for kind, name in (("stock", "stock USB"), ("ours", "this package")):
        seconds, imports, size = ([v[k] for v in found[kind]] for k in ("seconds", "imports", "memory"))
        middle[kind] = statistics.median(seconds), statistics.median(size)
        table.add_row(
            name,
            f"{middle[kind][0]:.2f} s ({min(seconds):.2f} to {max(seconds):.2f})",
            f"{statistics.median(imports):.2f} s",
            f"{middle[kind][1] / 1e6:.0f} MB",
            f"{middle[kind][1] / RAW:.2f}x",
        )
    console = Console(width=100, highlight=False)
    console.print(table)
    (stock_seconds, stock_size), (our_seconds, our_size) = middle["stock"], middle["ours"]
    console.print(f"ratio: {stock_seconds / our_seconds:.1f}x sooner, {stock_size / our_size:.1f}x less memory")
    console.print(f"goal: ready in under {GOAL_SECONDS:g} s: {'met' if our_seconds < GOAL_SECONDS else 'NOT met'}")
    console.print(
        f"goal: peak under {GOAL_MEMORY}x of the raw array: {'met' if our_size < GOAL_MEMORY * RAW else 'NOT met'}"
    )


if __name__ == "__main__":
    main()

"""A resumed run does every iteration that is left, reads checkpoints of older runs, and stops where it cannot go on."""

import contextlib
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from small import algorithm, settings

faults = []  # each of the three is looked for, whatever becomes of the others


def interrupted():
    """A run whose last checkpoint is from within the first of two epochs of three iterations."""
    run = algorithm(settings(num_train_iter=6, epoch=2, num_eval_iter=2))
    to_device = run.process_batch
    run.process_batch = lambda **batch: sys.exit() if run.it == 2 else to_device(**batch)
    with contextlib.suppress(SystemExit):
        run.train()
    checkpoint = torch.load("run/latest_model.pth", weights_only=False)
    checkpoint["best_eval_acc"] = float(checkpoint["best_eval_acc"])
    torch.save(checkpoint, "run/latest_model.pth")
    return run, checkpoint


run, checkpoint = interrupted()
args = run.args
resumed = algorithm(args)
resumed.resume = True
resumed.load_model("run/latest_model.pth")
resumed.train()
if resumed.it != 6:
    faults.append(f"the resumed run ended after {resumed.it} iterations of 6")

run.best_eval_acc = np.float64(1)  # what accuracy_score of scikit-learn < 1.5 returns
run.save_model("written.pth", ".")
if type(written := torch.load("written.pth", weights_only=False)["best_eval_acc"]) is not float:
    faults.append(f"best_eval_acc is saved as {type(written).__name__}")
torch.save({**checkpoint, "best_eval_acc": np.float64(1)}, "older.pth")
try:
    algorithm(args).load_model("older.pth")
except Exception as e:
    faults.append(f"an older checkpoint cannot be read: {str(e).splitlines()[0][:60]}")

tree = Path(os.environ["USB_TREE"])
if (tree / "train.py").exists():
    sys.path.insert(0, str(tree))
    import train

    Path("damaged.pth").write_bytes(Path("run/latest_model.pth").read_bytes()[:1000])
    args.resume, args.load_path, args.save_name = True, "damaged.pth", "program"
    with mock.patch("semilearn.algorithms.fixmatch.FixMatch.train") as training, contextlib.suppress(Exception):
        train.main(args)
    if training.called:
        faults.append("the checkpoint could not be read, and training began anew")

    class WasReadError(Exception):
        """eval.py got as far as building the net."""

    sys.argv = ["eval.py", "--load_path", "older.pth"]
    with mock.patch("semilearn.core.utils.get_net_builder", side_effect=WasReadError):
        try:
            runpy.run_path(str(tree / "eval.py"), run_name="__main__")
        except WasReadError:
            pass
        except Exception as e:
            faults.append(f"eval.py cannot read an older checkpoint: {str(e).splitlines()[0][:60]}")

assert not faults, "; ".join(faults)

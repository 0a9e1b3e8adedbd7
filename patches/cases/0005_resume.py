"""A resumed run does every iteration that is left, reads checkpoints of older runs, and stops where it cannot go on."""

import contextlib
import os
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from small import algorithm, settings

args = settings(num_train_iter=6, epoch=2, num_eval_iter=2)
interrupted = algorithm(args)
interrupted.best_eval_acc = np.float64(1)  # what accuracy_score of scikit-learn < 1.5 returns
to_device = interrupted.process_batch
interrupted.process_batch = lambda **batch: sys.exit() if interrupted.it == 2 else to_device(**batch)
with contextlib.suppress(SystemExit):
    interrupted.train()  # its last checkpoint is from within the first of two epochs of three iterations

resumed = algorithm(args)
resumed.resume = True
resumed.load_model("run/latest_model.pth")
resumed.train()
assert resumed.it == 6, f"the resumed run ended after {resumed.it} iterations of 6"

checkpoint = torch.load("run/latest_model.pth")
assert type(checkpoint["best_eval_acc"]) is float, type(checkpoint["best_eval_acc"])
checkpoint["best_eval_acc"] = np.float64(1)  # as older runs saved it
torch.save(checkpoint, "older.pth")
algorithm(args).load_model("older.pth")

if Path(os.environ["USB_TREE"], "train.py").exists():
    sys.path.insert(0, os.environ["USB_TREE"])
    import train

    Path("damaged.pth").write_bytes(Path("run/latest_model.pth").read_bytes()[:1000])
    args.resume, args.load_path = True, "damaged.pth"
    with mock.patch("semilearn.algorithms.fixmatch.FixMatch.train") as training, contextlib.suppress(Exception):
        train.main(args)
    assert not training.called, "the checkpoint could not be read, and training began anew"

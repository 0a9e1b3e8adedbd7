"""FixMatch trains, evaluates, writes checkpoints and goes on from them without a GPU; so do the Trainer and train.py."""

import os
import sys
from pathlib import Path
from unittest import mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there is a GPU, leave it out

from semilearn import Trainer
from semilearn.core.utils import send_model_cuda
from small import algorithm, loaders, settings

args = settings()
fixmatch = algorithm(args)
fixmatch.model = send_model_cuda(args, fixmatch.model)
fixmatch.ema_model = send_model_cuda(args, fixmatch.ema_model, clip_batch=False)
before = fixmatch.model.state_dict()["conv1.weight"].clone()
fixmatch.train()
assert fixmatch.it == 6, f"{fixmatch.it} steps of 6"
assert not before.equal(fixmatch.model.state_dict()["conv1.weight"]), "training did not change the weights"
assert fixmatch.log_dict["train/run_time"] > 0, fixmatch.log_dict

resumed = algorithm(args)
resumed.load_model("run/latest_model.pth")
assert resumed.model.state_dict()["conv1.weight"].equal(fixmatch.model.state_dict()["conv1.weight"])

trainer = Trainer(args, algorithm(args))
train_lb, train_ulb, eval_loader = loaders(args).values()
trainer.fit(train_lb, train_ulb, eval_loader)
labels, probabilities = trainer.predict(eval_loader)
assert probabilities.shape == (12, 3)

if Path(os.environ["USB_TREE"], "train.py").exists():
    sys.path.insert(0, os.environ["USB_TREE"])
    import train

    started = []  # train.py makes loaders for the data sets that it knows: here it gets as far as training
    trained = {"train": lambda self: started.append(self), "results_dict": {}}
    for several in (False, True):  # as the files of config/ ask for it
        with mock.patch.multiple("semilearn.algorithms.fixmatch.FixMatch", create=True, **trained):
            train.main(settings(multiprocessing_distributed=several, save_name="program"))
    assert len(started) == 2, "train.py trained nothing"
    assert next(started[0].model.parameters()).device.type == "cpu"

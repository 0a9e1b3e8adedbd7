#!/usr/bin/env python3
"""Does `musclefixmatch` (0012) learn, and more than `fixmatch`? Twenty labelled digits, 300 steps, a minute a run on one core.

    PYTHONPATH=path/to/patched/tree python patches/learns.py [SEED ...]

scikit-learn's digits at 16 x 16, USB's RandAugment, batches of 24 labelled and 72 unlabelled images, a net of three
convolutions: everything but the algorithm and the seed is the same in both runs. Printed is the accuracy of the averaged net
on 360 images, after the last step.
"""

import logging
import random
import sys
import warnings

import numpy as np
import torch
from PIL import Image
from semilearn import BasicDataset, get_algorithm, get_config, get_data_loader
from semilearn.datasets.augmentation import RandAugment
from sklearn.datasets import load_digits
from torch import nn
from torchvision.transforms import Compose, RandomCrop, ToTensor

LABELS, TEST, STEPS = 20, 360, 300


class Net(nn.Module):
    def __init__(self, num_classes, **_):
        super().__init__()
        layers = []
        for i, o, kernel, stride, padding in ((3, 32, 5, 2, 2), (32, 64, 5, 2, 2), (64, 128, 4, 1, 0)):
            layers += [nn.Conv2d(i, o, kernel, stride, padding, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(128, num_classes)

    def forward(self, x):
        feat = self.body(x).mean((2, 3))
        return {"logits": self.head(feat), "feat": feat}


def accuracy(name, seed):
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)  # of which RandAugment draws
    args = get_config({
        "algorithm": name, "dataset": "generated", "num_classes": 10, "num_train_iter": STEPS, "epoch": 3,
        "num_eval_iter": STEPS, "num_log_iter": STEPS, "batch_size": 24, "lr": 0.05, "ema_m": 0.98, "seed": seed,
        "amp": False, "distributed": False, "save_dir": "learns", "save_name": f"{name}_{seed}",
    })  # fmt: skip
    digits = load_digits()
    images = [
        Image.fromarray((15.9 * i).astype(np.uint8)).resize((16, 16), Image.BILINEAR).convert("RGB")
        for i in digits.images
    ]
    images, classes = np.stack([np.asarray(i) for i in images]), digits.target
    order = np.random.default_rng(seed).permutation(len(classes))
    test, train = order[:TEST], order[TEST:]
    labelled = np.concatenate([train[classes[train] == c][: LABELS // 10] for c in range(10)])
    weak, strong = (Compose([RandomCrop(16, 2), *more, ToTensor()]) for more in ((), (RandAugment(3, 5),)))

    def loader(chosen, size, view, unlabelled=False, **kwargs):
        views = {"transform": view, "strong_transform": strong}
        data = BasicDataset(name, images[chosen], classes[chosen], 10, is_ulb=unlabelled, **views)
        return get_data_loader(args, data, size, num_workers=0, **kwargs)

    algorithm = get_algorithm(args, Net, None, logging.getLogger("quiet"))
    algorithm.loader_dict = {
        "train_lb": loader(labelled, 24, weak),
        "train_ulb": loader(train, 72, weak, unlabelled=True),
        "eval": loader(test, TEST, ToTensor(), data_sampler=None, drop_last=False),
    }
    algorithm.train()
    return float(algorithm.log_dict["eval/top-1-acc"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in map(int, sys.argv[1:] or ("0", "1", "2")):
        print(
            f"seed {seed}:",
            ", ".join(f"{n} {accuracy(n, seed):.1%}" for n in ("fixmatch", "musclefixmatch")),
            flush=True,
        )

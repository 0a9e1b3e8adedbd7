"""What several cases start from: settings of a run of seconds, and generated images instead of a data set's files."""

import numpy as np
import torch
from semilearn import BasicDataset, get_algorithm, get_config, get_data_loader


class SmallNet(torch.nn.Module):
    """What USB asks of a net at least: logits and features."""

    def __init__(self, num_classes, **kwargs):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.bn1 = torch.nn.BatchNorm2d(8)
        self.classifier = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        feat = torch.relu(self.bn1(self.conv1(x))).mean(dim=(2, 3))
        return {"logits": self.classifier(feat), "feat": feat}


def settings(**changes):
    """USB's settings for 3 classes; `dataset` names none that USB knows, so that it reads no files."""
    small = {
        "algorithm": "fixmatch", "dataset": "generated", "num_classes": 3, "num_labels": 12, "lb_dest_len": 12,
        "ulb_dest_len": 12, "batch_size": 6, "uratio": 1, "eval_batch_size": 12, "img_size": 32, "num_workers": 0,
        "num_train_iter": 6, "epoch": 2, "num_eval_iter": 3, "num_log_iter": 1, "amp": False, "distributed": False,
        "save_dir": ".", "save_name": "run",
    }  # fmt: skip
    return get_config({**small, **changes})


def images(algorithm, count=12, classes=3, seed=0, unlabelled=False):
    """A data set of noise: image i is of class i mod `classes`, which shows in one colour."""
    data = np.random.default_rng(seed).integers(0, 100, (count, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(count) % classes
    data[np.arange(count), :, :, targets % 3] += 150

    def view(image):
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)
        return pixels + 0.1 * torch.randn_like(pixels)

    views = {"transform": view, "strong_transform": view, "medium_transform": view}
    return BasicDataset(algorithm, data, targets, classes, is_ulb=unlabelled, **views)


def loaders(args, num_workers=0):
    def loader(data, **kwargs):
        return get_data_loader(args, data, args.batch_size, num_workers=num_workers, **kwargs)

    return {
        "train_lb": loader(images(args.algorithm, classes=args.num_classes)),
        "train_ulb": loader(images(args.algorithm, classes=args.num_classes, seed=1, unlabelled=True)),
        "eval": loader(images(args.algorithm, classes=args.num_classes, seed=2), data_sampler=None, drop_last=False),
    }


def algorithm(args):
    """The algorithm of `args` with its loaders, not yet on any device."""
    built = get_algorithm(args, SmallNet, None, None)
    built.loader_dict = loaders(args)
    return built

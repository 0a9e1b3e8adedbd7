"""get_dataset builds a data set that is registered under its name, and its images are loaded as those of USB's own are."""
# ruff: noqa: PT017

import numpy as np
from semilearn import BasicDataset, get_config, get_data_loader, get_dataset
from semilearn.core.utils import DATASETS
from torchvision import transforms


@DATASETS.register("stripes")
def get_stripes(args, algorithm, dataset, num_labels, num_classes, data_dir, include_lb_to_ulb):
    assert (dataset, data_dir, include_lb_to_ulb) == ("stripes", "here", False)
    images = np.zeros((24, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(24) % num_classes
    images[np.arange(24), targets] = 255
    view = transforms.ToTensor()
    labelled = BasicDataset(algorithm, images[:num_labels], targets[:num_labels], num_classes, view)
    unlabelled = BasicDataset(algorithm, images, None, num_classes, view, True, view, view)
    test = (BasicDataset(algorithm, images[:3], targets[:3], num_classes, view),) if args.with_test else ()
    return (labelled, unlabelled, BasicDataset(algorithm, images, targets, num_classes, view), *test)


def read(with_test):
    args = get_config({"dataset": "stripes", "num_classes": 3, "with_test": with_test})
    return args, get_dataset(args, "fixmatch", "stripes", 6, 3, data_dir="here", include_lb_to_ulb=False)


args, found = read(with_test=False)
assert found is not None, "get_dataset does not know a registered data set"
assert {k: v and len(v) for k, v in found.items()} == {"train_lb": 6, "train_ulb": 24, "eval": 24, "test": None}, found
batch = next(iter(get_data_loader(args, found["train_lb"], 6, data_sampler=None, num_workers=0)))
assert batch["x_lb"].shape == (6, 3, 32, 32)
assert (batch["x_lb"].sum(dim=(1, 3)).argmax(1) == batch["y_lb"]).all()
assert len(read(with_test=True)[1]["test"]) == 3
assert get_dataset(args, "fixmatch", "unheard_of", 6, 3) is None, "names that nobody knows are treated as before"

DATASETS["wrong"] = lambda **_: (None, None)
try:
    get_dataset(args, "fixmatch", "wrong", 6, 3)
except ValueError as e:
    assert "wrong" in str(e), e
else:
    raise AssertionError("two sets were taken for a data set")

"""MUSCLE+FixMatch: its mutual information is right and has a gradient, its views are its own, and training raises it."""
# ruff: noqa: B905

import math

import numpy as np
import torch
from semilearn import BasicDataset, get_algorithm, get_config, get_data_loader
from semilearn.algorithms.muscle.utils import mutual_information

# -- values worked out by hand: certain and agreeing, independent, and one that is neither
certain = 100 * torch.eye(4)
assert math.isclose(mutual_information(certain, certain[None]).item(), math.log(4), rel_tol=1e-5)
assert abs(mutual_information(certain, torch.zeros(2, 4, 4)).item()) < 1e-6
assert abs(mutual_information(certain[:1].expand(8, 4), certain[:1].expand(1, 8, 4)).item()) < 1e-6, (
    "one class for all: none"
)
half = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).log()  # joint: 5/16 on the diagonal, 3/16 beside it
by_hand = 2 * (5 / 16 * math.log(5 / 4) + 3 / 16 * math.log(3 / 4))
assert math.isclose(mutual_information(half, half[None]).item(), by_hand, rel_tol=1e-5)
assert math.isclose(mutual_information(half.half(), half[None].half()).item(), by_hand, rel_tol=1e-2)

# -- a run on generated images: bright in one of three channels, and noise
COUNT, CLASSES = 48, 3


def images(seed, unlabelled=False):
    data = np.random.default_rng(seed).integers(0, 100, (COUNT, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(COUNT) % CLASSES
    data[np.arange(COUNT), :, :, targets] += 100

    def view(noise):
        return lambda image: (
            torch.from_numpy(np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255)
            + noise * torch.randn(3, 32, 32)
        )

    return BasicDataset("musclefixmatch", data, targets, CLASSES, view(0.02), unlabelled, view(0.1), view(0.3))


class Net(torch.nn.Module):
    """In the form of USB's nets, and small."""

    def __init__(self, num_classes, **_):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 5, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
        self.head = torch.nn.Linear(8, num_classes)

    def forward(self, x):
        feat = self.body(x).mean((2, 3))
        return {"logits": self.head(feat), "feat": feat}


torch.manual_seed(0)
torch.set_num_threads(1)
args = get_config({
    "algorithm": "musclefixmatch", "dataset": "generated", "num_classes": CLASSES, "num_train_iter": 40, "epoch": 1,
    "batch_size": 6, "num_workers": 0, "amp": False, "distributed": False, "save_name": "run", "save_dir": ".",
})  # fmt: skip
muscle = get_algorithm(args, Net, None, None)
muscle.model.train()
labelled = get_data_loader(args, images(0), 6, num_workers=0)
unlabelled = get_data_loader(args, images(1, unlabelled=True), 12, num_workers=0)
optimizer, found = torch.optim.SGD(muscle.model.parameters(), lr=0.2, momentum=0.9), []
for step, (lb, ulb) in enumerate(zip(labelled, unlabelled)):
    views = [ulb[k] for k in ("x_ulb_w", "x_ulb_s_0", "x_ulb_s_1", "x_ulb_s_2")]
    assert all(not torch.equal(a, b) for i, a in enumerate(views) for b in views[:i]), "two views are the same"
    batch = {"x_lb": lb["x_lb"], "y_lb": lb["y_lb"], **{k: v for k, v in ulb.items() if k != "idx_ulb"}}
    if step == 0:  # each loss by itself, with batch norm's running averages left alone
        gradients = {}
        for ratio in (0.0, 1.0):
            muscle.lambda_mi = ratio
            out, log = muscle.train_step(**batch)
            out["loss"].backward()
            gradients[ratio] = torch.cat([p.grad.flatten() for p in muscle.model.parameters() if p.grad is not None])
            muscle.model.zero_grad()
        parts = log["train/sup_loss"] + log["train/unsup_loss"] - log["train/mutual_info"]
        assert math.isclose(log["train/total_loss"], parts, rel_tol=1e-4, abs_tol=1e-4), log
        assert not torch.allclose(gradients[0.0], gradients[1.0], atol=1e-4), "mutual information has no gradient"
        muscle.use_cat = False  # a forward for each view: other batch statistics, the same loss otherwise
        assert math.isfinite(muscle.train_step(**batch)[1]["train/total_loss"])
        muscle.use_cat = True
    out, log = muscle.train_step(**batch)
    optimizer.zero_grad()
    out["loss"].backward()
    optimizer.step()
    found.append(log["train/mutual_info"])
    assert 0 <= log["train/mutual_info"] <= math.log(CLASSES) + 1e-4, log
assert found[-1] > found[0] + 0.3, f"mutual information did not rise: {found}"

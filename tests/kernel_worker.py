"""Run with ``TRITON_INTERPRET=1``, which must be set before Triton is imported: prints, as JSON, for each case whether the
kernel's views are those of PyTorch's operations, bit for bit."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from test_augment import VALUES, pictures, seeded

from muscle_plugin.data import kernel
from muscle_plugin.data.augment import AUGMENTATIONS, augmentation
from muscle_plugin.data.batch_random import BatchRandom
from muscle_plugin.data.batches import Batches
from muscle_plugin.data.datasets import load_source
from muscle_plugin.data.operations import OPERATIONS
from muscle_plugin.data.randaugment import Plan, apply
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.data.splits import draw_split
from muscle_plugin.data.views import STRONG, UNLABELLED, View

SIZES = [(32, 32), (33, 28)]
#: Images of a case: an interpreted view takes some 10 ms.
MANY = 16


def same(plan, images, channels, channels_last=False):
    """Of images in another order than the pool's, normalised."""
    c = images.shape[1]
    rows = torch.arange(len(images)).flip(0)
    scale, shift = torch.linspace(0.011, 0.017, c), torch.linspace(-1.3, -1.9, c)
    packed = kernel.pack(plan, rows, *images.shape[2:])
    made = kernel.views(images, packed, plan, scale, shift, channels, channels_last)
    levels = apply(images[rows], plan).float()
    expected = levels.mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1)).repeat(1, channels // c, 1, 1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.equal(made, expected) and made.is_contiguous(memory_format=layout)


def one_operation(name, size, channels):
    values = torch.zeros(MANY) if VALUES[name] is None else VALUES[name][:MANY].float().clamp(-300, 300)
    plan = Plan(torch.full((1, MANY), OPERATIONS.index(name)), values.view(1, -1), 128)
    return same(plan, pictures(MANY, channels, *size), channels)


def drawn(name, size, channels, ops=None):
    augment = augmentation(name, AUGMENTATIONS["crop_flip"], ops)
    plan = augment.draw(BatchRandom.of(seeded(1), MANY), (channels, *size))
    return all(same(plan, pictures(MANY, channels, *size), 3, last) for last in (False, True))


def whole_batches(data_on, parameters, rank=0, world=1, colour=False):
    """With the kernel and without: the batches of two steps, of three-channel views of grey images, or of colour ones that
    lie channels last in memory."""
    source = load_source("digits", SourceOptions(Path(), 16))
    if colour:
        images = pictures(len(source.images), 3, 16, 16).contiguous(memory_format=torch.channels_last)
        source = replace(source, images=images)
    made = []
    for found in (None, kernel):
        batches = Batches(
            source, draw_split(source, 40, 0), 4, 8, parameters, "fixmatch", "crop_flip", "randaugment", 3, 5,
            torch.device("cpu"), data_on, rank=rank, world=world,
        )  # fmt: skip
        assert batches._kernel is kernel
        batches._kernel = found
        batches.add_views({"x_ulb_h": View(UNLABELLED, STRONG, 2)})
        made.append([batches.batch(step) for step in (3, 4)])
    return all(torch.equal(a[k], b[k]) for a, b in zip(*made, strict=True) for k in a | b)


def hue_is_left():
    """Views whose plan has an operation that the kernel lacks are those of PyTorch."""

    original = AUGMENTATIONS["randaugment"]

    def draw(draws, shape, ops=2):
        plan = original.draw(draws, shape, ops)
        plan.operations[0] = OPERATIONS.index("hue")
        return plan

    AUGMENTATIONS["randaugment"] = replace(original, draw=draw)
    return whole_batches("device", ("x_lb", "x_ulb_w", "x_ulb_s"), colour=True)


def wrong_views_are_noticed():
    """With a constant of the kernel's that is another than PyTorch's."""
    constants_of = kernel.constants_of
    kernel.constants_of = lambda *a: ({**constants_of(*a)[0], "FILL": 1}, constants_of(*a)[1])
    why = kernel.why_not(torch.device("cpu"), (3, 16, 16), 3)
    kernel.constants_of = constants_of
    return why == "the kernel's views are not those of PyTorch's operations"


def main():
    found = {}
    for size in SIZES:
        for channels in (1, 3):
            where = f"{channels} {size[0]}x{size[1]}"
            found |= {f"{name} {where}": one_operation(name, size, channels) for name in VALUES}
            for name, ops in [("crop", None), ("crop_flip", None), ("randaugment", 4), ("randaugment_usb", 3)]:
                found[f"drawn {name} {where}"] = drawn(name, size, channels, ops)
    step = ("x_lb", "y_lb", "x_ulb_w", "x_ulb_m", "x_ulb_s", "idx_ulb")
    for data_on in ("device", "host"):
        found[f"batches {data_on}"] = whole_batches(data_on, step)
        found[f"batches {data_on} channels last"] = whole_batches(data_on, step, colour=True)
    found["batches of a process"] = whole_batches("device", step, 1, 2)
    found["batches rotated"] = whole_batches("device", ("x_lb", "x_ulb_w", "x_ulb_s_0", "x_ulb_s_0_rot", "rot_v"))
    found["batches rotated weakly"] = whole_batches("device", ("x_lb", "x_ulb_w", "x_ulb_rot", "rot_v"))
    found["it says that it works"] = kernel.why_not(torch.device("cpu"), (3, 33, 28), 3) is None
    found["it says that it works for grey images"] = kernel.why_not(torch.device("cpu"), (1, 16, 16), 3) is None
    found["it notices wrong views"] = wrong_views_are_noticed()
    found["hue is left to PyTorch"] = hue_is_left()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()

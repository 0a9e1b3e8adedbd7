"""The two RandAugments: which operations are drawn for each image, and how a plan of them is applied to a batch.

Parameters are drawn on the CPU, so that the sizes of groups of images are known there, and nothing waits for a GPU.

Sources: RandAugment (Cubuk et al. 2019, arXiv 1909.13719) as used by FixMatch (Sohn et al. 2020, arXiv 2001.07685) and
by USB (Wang et al. 2022, arXiv 2208.07204); Cutout (DeVries and Taylor 2017, arXiv 1708.04552).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muscle_plugin.data.batch_random import BatchRandom
from muscle_plugin.data.operations import (
    BY_VALUE,
    FIRST_GEOMETRIC,
    FIRST_TRANSFORM,
    OPERATIONS,
    Fill,
    cutout,
    matrices,
    move_rows,
    pieces,
    transform,
)  # fmt: skip

GREY = 128


@dataclass(frozen=True)
class Window:
    """A window of each image's own size in the image padded by reflection, in CPU tensors."""

    top: Tensor  # (N,) int64, in the padded image
    left: Tensor
    flip: Tensor  # (N,) bool, whether the window is mirrored
    margin: tuple[int, int]  # rows of padding above and below, columns on either side


@dataclass(frozen=True)
class Plan:
    """What is done to each of N images, in CPU tensors: a window, operations one after another, a hole."""

    operations: Tensor  # (slots, N) int64 indices into OPERATIONS
    values: Tensor  # (slots, N) float32 parameters
    outside: int = 0  # the grey level that geometric operations read outside the image
    hole: Tensor | None = None  # (4, N) int64 left, top, right, bottom of the final cutout
    hole_fill: Fill = GREY
    window: Window | None = None


def windows(images: Tensor, rows: Tensor, left: Tensor, width: int, flip: Tensor) -> Tensor:
    """Cut a window out of each image: (N, height) ``rows``, ``width`` columns from (N,) ``left`` on, mirrored if ``flip``."""
    n, c, h, w = images.shape
    if not n:
        return images.new_empty(n, c, rows.shape[1], width)
    device = images.device
    # a row of a window is a piece of the flat images: an index per row, and the copy moves whole rows
    start = (torch.arange(n).view(-1, 1) * c * h + rows) * w + left.view(-1, 1)
    order = flip.byte().argsort()  # those to be mirrored come last, so that they are one slice
    channels = torch.arange(c, device=device).view(-1, 1) * (h * w)
    index = start[order].to(device, non_blocking=True).unsqueeze(1) + channels
    out = pieces(images.contiguous(), index.view(-1), width).view(n, c, -1, width)
    mirrored = out[n - int(flip.sum()) :]
    mirrored.copy_(mirrored.flip(3))
    return out.index_select(0, order.argsort().to(device, non_blocking=True))


def apply(images: Tensor, plan: Plan) -> Tensor:
    """Carry out a plan on (N, C, H, W) uint8 images, C = 1 or 3, on any device."""
    if plan.window is not None:
        h, w = images.shape[2:]
        y, x = plan.window.margin
        rows = plan.window.top.view(-1, 1) + torch.arange(-y, h - y)
        rows = (h - 1) - ((h - 1) - rows.abs()).abs()  # reflected at both borders, the edge not repeated
        mirror = images.flip(3)
        wide = torch.cat([mirror[..., -x - 1 : -1], images, mirror[..., 1 : x + 1]], 3)
        images = windows(wide, rows, plan.window.left, w, plan.window.flip)
    if len(plan.operations):
        images = _operate_in_groups(images, plan)
    return images if plan.hole is None else cutout(images, plan.hole, plan.hole_fill)


def _operate_in_groups(images: Tensor, plan: Plan) -> Tensor:
    """In each slot the images are sorted by operation, so that an operation works on one slice; from slot to slot, and back
    to the given order in the end, they are moved once."""
    moves, values, maps, sizes = grouped(plan, *images.shape[2:])
    moves, values, maps = (t.to(images.device, non_blocking=True) for t in (moves, values, maps))
    for slot, of_operation in enumerate(sizes):
        images = images.index_select(0, moves[slot])
        parts = zip(OPERATIONS, images.split(of_operation), values[slot].split(of_operation), strict=True)
        for name, part, value in parts:
            if name in BY_VALUE and len(part):
                part.copy_(BY_VALUE[name](part, value))
        first, second = (sum(of_operation[:i]) for i in (FIRST_GEOMETRIC, FIRST_TRANSFORM))
        for function, a, b in ((move_rows, first, second), (transform, second, len(images))):
            if a < b:
                images[a:b] = function(images[a:b], maps[:, slot, a:b], plan.outside)
    return images.index_select(0, moves[-1])


def grouped(plan: Plan, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Sort the images of each slot of a plan by operation, on the CPU: (slots + 1, N) where the images of a slot were in the
    slot before, and in the end; (slots, N) values and (6, slots, N) affine matrices in the new order; for each slot the number
    of images of each operation."""
    order = plan.operations.argsort(1)
    place = order.argsort(1)  # where each image is in each slot
    moves = torch.cat([order[:1], place[:-1].gather(1, order[1:]), place[-1:]])
    operations, values = plan.operations.gather(1, order), plan.values.gather(1, order)
    sizes = [torch.bincount(o, minlength=len(OPERATIONS)).tolist() for o in plan.operations]
    return moves, values, matrices(operations, values, height, width), sizes


def _table(values: Mapping[str, Sequence[float]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([OPERATIONS.index(name) for name in values]), torch.tensor(list(values.values()))


_LEVELS = range(1, 10)  # of 10
# FixMatch's strength of each operation at each level; translations in pixels of 32
_FIXMATCH = _table(
    {
        **dict.fromkeys(("identity", "auto_contrast", "equalize"), (0.0,) * 9),
        "rotate": tuple(3.0 * v for v in _LEVELS),
        "solarize": tuple(256.0 - 256 * v // 10 for v in _LEVELS),
        **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), tuple(0.1 + 0.18 * v for v in _LEVELS)),
        **dict.fromkeys(("shear_x", "shear_y"), tuple(0.03 * v for v in _LEVELS)),
        **dict.fromkeys(("translate_x", "translate_y"), tuple(float(v) for v in _LEVELS)),
        "posterize": tuple(4.0 - 4 * v // 10 for v in _LEVELS),
    }
)
# USB's range of each operation; translations as a fraction of the side
_USB = _table(
    {
        **dict.fromkeys(("identity", "auto_contrast", "equalize"), (0.0, 0.0)),
        "posterize": (4, 8),
        "solarize": (0, 256),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (0.05, 0.95)),
        "rotate": (-30, 30),
        **dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y"), (-0.3, 0.3)),
    }
)


def _pixels(operations: Tensor, per_x: float, per_y: float) -> Tensor:
    """The factors of the operations' values: translations are in another unit than pixels."""
    x, y = (operations == OPERATIONS.index(f"translate_{axis}") for axis in "xy")
    return torch.where(x, per_x, torch.where(y, per_y, 1.0))


def draw_randaugment(random: BatchRandom, shape: tuple[int, ...], ops: int = 2) -> Plan:
    """Draw FixMatch's RandAugment, which follows the weak augmentation, for images of ``shape`` (C, H, W).

    ``ops`` of its 14 operations with replacement, each applied with p = 0.5 at a uniform level 1..9 of 10, geometric
    ones either way; then Cutout of half the side about a uniform pixel. Outside and hole are grey (128).
    """
    names, levels = _FIXMATCH
    height, width = shape[1:]
    choice, level = random.integers(len(names), ops), random.integers(levels.shape[1], ops)
    operations = names[choice]
    values = levels[choice, level] * _pixels(operations, width / 32, height / 32)
    negative = (random.integers(2, ops) == 0) & (operations >= FIRST_GEOMETRIC)
    values = torch.where(negative, -values, values)
    operations = operations * random.coins(ops)  # the identity is operation 0
    x, y = random.integers(width), random.integers(height)
    hole = torch.stack([x - width // 4, y - height // 4, x + width // 4, y + height // 4])
    return Plan(operations, values, GREY, hole, GREY)


def draw_randaugment_usb(random: BatchRandom, shape: tuple[int, ...], ops: int = 3) -> Plan:
    """Draw USB's RandAugment, which follows the weak augmentation.

    ``ops`` of the 14 operations with replacement, all applied, each at a uniform strength of its range (negative ones
    of geometric operations included, enhancements only downwards); then Cutout of up to half the width about a uniform
    point, pushed inside at the left and top border. Outside is black, the hole (125, 123, 114).
    """
    names, ranges = _USB
    height, width = shape[1:]
    choice = random.integers(len(names), ops)
    low, high = ranges[choice].unbind(2)
    operations = names[choice]
    values = low + (high - low) * random.uniform(0, 1, ops)
    values = torch.where(operations == OPERATIONS.index("posterize"), values.floor(), values)
    values = values * _pixels(operations, width, height)
    side = random.uniform(0, 1) * 0.5 * width
    centre = random.uniform(0, 1, 2) * torch.tensor([[width], [height]])
    start = (centre - side / 2).clamp(min=0).long()
    hole = torch.cat([start, start + side.long() + 1])
    return Plan(operations, values, 0, hole, (125, 123, 114))

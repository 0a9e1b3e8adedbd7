"""Batched augmentations: (N, C, H, W) uint8 images in, C = 1 or 3, on any device, parameters drawn per image.

They return uint8 images, or float images in [0, 1] where they interpolate (digits). The generator is a CPU generator, or
``Draws`` of several: what is drawn, sizes of groups included, is known without waiting for a GPU, and is the same for every
device. What an image becomes depends on its own draws alone. A new one is a function and a line in ``AUGMENTATIONS``. The
operations of RandAugment are in ``randaugment.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.data.draws import Draws, Random
from muscle_plugin.data.randaugment import (
    OPERATIONS,
    Plan,
    apply,
    pieces,
    randaugment,
    randaugment_usb,
    rotate,
    to_uint8,
)

Augmentation = Callable[[Tensor, Random], Tensor]


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float 0..1."""
    return images.float() / 255


def affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Rotate, scale, shear and shift each image about its centre (bilinear; outside is 0).

    Args:
        images: (N, channels, H, W) float.
        angle: (N,) radians, positive turns the content counter-clockwise.
        scale: (N,) magnification.
        shear: (N,) horizontal shear, as the tangent of its angle.
        shift_x, shift_y: (N,) shift of the content, as a fraction of the image's side.
    """
    if not len(images):
        return images.clone()  # affine_grid takes no empty batch
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # sampling grid = inverse map: undo the shift, then rotation and scale, then shear
    a, b = cos + shear * sin, -sin + shear * cos
    x, y = -2 * shift_x, -2 * shift_y
    theta = torch.stack([a, b, a * x + b * y, sin, cos, sin * x + cos * y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.device, non_blocking=True), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def _distort(images: Tensor, draws: Draws, angle: float, scale: float, shear: float, shift: float) -> Tensor:
    """Affine distortion of each image: angle in radians, scale as its logarithm, shift as a fraction of the side."""
    return affine(
        to_float(images),
        draws.uniform(-angle, angle),
        torch.exp(draws.uniform(-scale, scale)),
        draws.uniform(-shear, shear),
        draws.uniform(-shift, shift),
        draws.uniform(-shift, shift),
    )


def digits_weak(images: Tensor, generator: Random) -> Tensor:
    """Rotation to 0.25 rad, scale by 0.86 to 1.16, shear to 0.2, shift to a tenth of the side: another hand's digit."""
    return _distort(images, Draws.of(generator, len(images)), 0.25, 0.15, 0.2, 0.1)


def digits_hard(images: Tensor, generator: Random) -> Tensor:
    """Rotation to 0.35 rad, scale by 0.78 to 1.28, shear to 0.3, shift to an eighth, contrast to 30 %, noise.

    No flips: they turn one digit into another, or into none.
    """
    draws = Draws.of(generator, len(images))
    x = _distort(images, draws, 0.35, 0.25, 0.3, 0.12)
    contrast = draws.uniform(0.7, 1.3).view(-1, 1, 1, 1)
    noise = 0.05 * draws.normal(*x.shape[1:])
    return x * contrast.to(x.device, non_blocking=True) + noise.to(x.device, non_blocking=True)


def _windows(images: Tensor, rows: Tensor, left: Tensor, width: int, flip: Tensor | None) -> Tensor:
    """Windows of the images.

    Args:
        images: (N, C, H, W) uint8.
        rows: (N, height) the rows of each window.
        left: (N,) its first column.
        width: its columns.
        flip: (N,) bool, whether it is mirrored; None for no mirroring.
    """
    n, c, h, w = images.shape
    if not n:
        return images.new_empty(n, c, rows.shape[1], width)
    device = images.device
    # a row of a window is a piece of the flat images: an index per row, and the copy moves whole rows
    start = (torch.arange(n).view(-1, 1) * c * h + rows) * w + left.view(-1, 1)
    if flip is not None:  # those to be mirrored come last, so that they are one slice
        order = flip.byte().argsort()
        start = start[order]
    channels = torch.arange(c, device=device).view(-1, 1) * (h * w)
    index = start.to(device, non_blocking=True).unsqueeze(1) + channels
    out = pieces(images.contiguous(), index.view(-1), width).view(n, c, -1, width)
    if flip is None:
        return out
    mirrored = out[n - int(flip.sum()) :]
    mirrored.copy_(mirrored.flip(3))
    return out.index_select(0, order.argsort().to(device, non_blocking=True))


def _padded_crop(images: Tensor, generator: Random, flip: bool) -> Tensor:
    n, _, h, w = images.shape
    y, x = max(1, h // 8), max(1, w // 8)
    draws = Draws.of(generator, n)
    top, left = draws.integers(2 * y + 1), draws.integers(2 * x + 1)
    rows = top.view(-1, 1) + torch.arange(-y, h - y)
    rows = (h - 1) - ((h - 1) - rows.abs()).abs()  # reflected at both borders, the edge not repeated
    mirror = images.flip(3)
    wide = torch.cat([mirror[..., -x - 1 : -1], images, mirror[..., 1 : x + 1]], 3)
    return _windows(wide, rows, left, w, draws.coins() if flip else None)


def crop(images: Tensor, generator: Random) -> Tensor:
    """Random translation by up to an eighth of the side (4 of 32 pixels), whole pixels, the border reflected."""
    return _padded_crop(images, generator, flip=False)


def crop_flip(images: Tensor, generator: Random) -> Tensor:
    """``crop`` and horizontal flip with p = 0.5: the weak augmentation of Mean Teacher, FixMatch and USB."""
    return _padded_crop(images, generator, flip=True)


def rotate_crop_flip(images: Tensor, generator: Random) -> Tensor:
    """Label propagation's views of Mini-ImageNet (Iscen et al. 2019, arXiv 1904.04717).

    Rotation by up to 10 degrees (nearest pixel), crop of the image padded by 8 of 84 pixels, horizontal flip; outside
    is black.
    """
    n, _, h, w = images.shape
    y, x = round(8 / 84 * h), round(8 / 84 * w)
    draws = Draws.of(generator, n)
    turned = rotate(images, draws.uniform(-10, 10))
    top, left = draws.integers(2 * y + 1), draws.integers(2 * x + 1)
    rows = top.view(-1, 1) + torch.arange(h)
    return _windows(F.pad(turned, (x, x, y, y)), rows, left, w, draws.coins())


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Enlarge bilinearly, (N, C, height, width) uint8: within 1 grey level of torchvision's ``resize``."""
    h, w = images.shape[2:]

    def weights(new: int, old: int) -> Tensor:
        one = torch.eye(old, device=images.device).view(1, 1, old, old)
        return F.interpolate(one, (new, old), mode="bilinear").view(new, old)

    return to_uint8((weights(height, h) @ (images.float() @ weights(width, w).t())).add_(0.5))


def draw_colour_jitter(n: int, generator: Random) -> Plan:
    """Brightness, contrast and saturation by 1 +- 0.4 and hue by +- 0.125 turns, in a random order for each image."""
    jitter = torch.tensor([OPERATIONS.index(name) for name in ("brightness", "contrast", "color", "hue")])
    draws = Draws.of(generator, n)
    order = draws.uniform(0, 1, 4).argsort(0)
    values = draws.uniform(-1, 1, 4)
    return Plan(jitter[order], torch.where(order == 3, 0.125 * values, 1 + 0.4 * values))


def iic(images: Tensor, generator: Random) -> Tensor:
    """The hard views of IIC (Ji et al. 2019, arXiv 1807.06653) without Sobel.

    Crop of 20/32 of the side resized back, horizontal flip, then ``draw_colour_jitter``.
    """
    n, _, h, w = images.shape
    height, width = round(h * 20 / 32), round(w * 20 / 32)
    draws = Draws.of(generator, n)
    top, left = draws.integers(h - height + 1), draws.integers(w - width + 1)
    windows = _windows(images, top.view(-1, 1) + torch.arange(height), left, width, draws.coins())
    return apply(resize(windows, h, w), draw_colour_jitter(n, draws))


AUGMENTATIONS: dict[str, Augmentation] = {
    "digits_weak": digits_weak,
    "digits_hard": digits_hard,
    "crop_flip": crop_flip,
    "crop": crop,
    "rotate_crop_flip": rotate_crop_flip,
    "iic": iic,
    "randaugment": randaugment,
    "randaugment_usb": randaugment_usb,
}
# these are drawn on top of a weak view
AFTER_WEAK: frozenset[str] = frozenset({"randaugment", "randaugment_usb"})

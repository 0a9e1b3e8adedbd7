"""Batched augmentations: (N, C, H, W) uint8 images, C = 1 or 3, on any device, with parameters drawn per image.

They return uint8 images, or float images in [0, 1] where they interpolate (digits). A new augmentation is two functions and a
line in ``AUGMENTATIONS``: one draws the parameters, on the CPU and without the images, so that this can be done ahead; the
other applies them, on the images' device. The views are the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from muscle_plugin.data.batch_random import BatchRandom
from muscle_plugin.data.normalise import resize_matrix
from muscle_plugin.data.operations import OPERATIONS, to_uint8
from muscle_plugin.data.randaugment import Plan, Window, apply, draw_randaugment, draw_randaugment_usb, windows
from muscle_plugin.errors import DataError


@dataclass(frozen=True)
class Augmentation:
    """Called with images and a generator, it returns a view of each image."""

    #: (random, (C, H, W)) -> the parameters of all views, in CPU tensors; may take ``ops``, operations per view
    draw: Callable[..., Any]
    apply: Callable[[Tensor, Any], Tensor]

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self.apply(images, self.draw(BatchRandom.of(generator, len(images)), images.shape[1:]))


def affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Rotate, scale, shear and shift each of (N, channels, H, W) float images about its centre (bilinear; outside is 0).

    The parameters are (N,): ``angle`` in radians turns the content counter-clockwise, ``shear`` is horizontal, the tangent
    of its angle, shifts are fractions of the image's side.
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


def _draw_distortion(random: BatchRandom, angle: float, scale: float, shear: float, shift: float) -> tuple[Tensor, ...]:
    """Parameters of ``affine``, from the largest angle (radians), logarithm of the scale, shear and shift (of the side)."""
    turn, size, slant, x, y = (random.uniform(-most, most) for most in (angle, scale, shear, shift, shift))
    return turn, size.exp(), slant, x, y


def _draw_digits_hard(random: BatchRandom, shape: tuple[int, ...]) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    distortion = _draw_distortion(random, 0.35, 0.25, 0.3, 0.12)
    return distortion, random.uniform(0.7, 1.3).view(-1, 1, 1, 1), 0.05 * random.normal(*shape)


def _digits_hard(images: Tensor, drawn: tuple[tuple[Tensor, ...], Tensor, Tensor]) -> Tensor:
    distortion, contrast, noise = drawn
    x = affine(images.float() / 255, *distortion)
    return x * contrast.to(x.device, non_blocking=True) + noise.to(x.device, non_blocking=True)


def _draw_crop(random: BatchRandom, shape: tuple[int, ...], flip: bool = False) -> Plan:
    y, x = (max(1, side // 8) for side in shape[1:])
    top, left = random.integers(2 * y + 1), random.integers(2 * x + 1)
    mirrored = random.coins() if flip else torch.zeros_like(top, dtype=torch.bool)
    none = top.new_empty(0, len(top))
    return Plan(none, none.float(), window=Window(top, left, mirrored, (y, x)))


def _draw_rotate_crop_flip(random: BatchRandom, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
    degrees = random.uniform(-10, 10)
    y, x = (round(8 / 84 * side) for side in shape[1:])
    return degrees, random.integers(2 * y + 1), random.integers(2 * x + 1), random.coins()


def _rotate_crop_flip(images: Tensor, drawn: tuple[Tensor, ...]) -> Tensor:
    degrees, top, left, flip = drawn
    h, w = images.shape[2:]
    y, x = (round(8 / 84 * side) for side in (h, w))
    rows = top.view(-1, 1) + torch.arange(h)
    turn = Plan(torch.full((1, len(images)), OPERATIONS.index("rotate")), degrees.unsqueeze(0))
    return windows(F.pad(apply(images, turn), (x, x, y, y)), rows, left, w, flip)


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Enlarge uint8 images bilinearly to (N, C, height, width): within 1 grey level of torchvision's ``resize``."""
    rows, columns = (
        resize_matrix(*sides, images.device) for sides in zip((height, width), images.shape[2:], strict=True)
    )
    return to_uint8((rows @ (images.float() @ columns.t())).add_(0.5))


def draw_colour_jitter(random: BatchRandom) -> Plan:
    """Draw brightness, contrast and saturation by 1 +- 0.4 and hue by +- 0.125 turns, in a random order for each image."""
    jitter = torch.tensor([OPERATIONS.index(name) for name in ("brightness", "contrast", "color", "hue")])
    order = random.uniform(0, 1, 4).argsort(0)
    values = random.uniform(-1, 1, 4)
    return Plan(jitter[order], torch.where(order == 3, 0.125 * values, 1 + 0.4 * values))


def _draw_iic(random: BatchRandom, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Plan]:
    top, left = (random.integers(side - round(side * 20 / 32) + 1) for side in shape[1:])
    return top, left, random.coins(), draw_colour_jitter(random)


def _iic(images: Tensor, drawn: tuple[Tensor, Tensor, Tensor, Plan]) -> Tensor:
    top, left, flip, jitter = drawn
    h, w = images.shape[2:]
    height, width = (round(side * 20 / 32) for side in (h, w))
    parts = windows(images, top.view(-1, 1) + torch.arange(height), left, width, flip)
    return apply(resize(parts, h, w), jitter)


#: Random translation by up to an eighth of the side (4 of 32 pixels), whole pixels, the border reflected.
crop = Augmentation(_draw_crop, apply)
#: ``crop`` and horizontal flip with p = 0.5: the weak augmentation of Mean Teacher, FixMatch and USB.
crop_flip = Augmentation(partial(_draw_crop, flip=True), apply)
AUGMENTATIONS: dict[str, Augmentation] = {
    # rotation to 0.25 rad, scale by 0.86 to 1.16, shear to 0.2, shift to a tenth of the side: another hand's digit
    "digits_weak": Augmentation(
        lambda random, _: _draw_distortion(random, 0.25, 0.15, 0.2, 0.1),
        lambda images, drawn: affine(images.float() / 255, *drawn),
    ),
    # rotation to 0.35 rad, scale by 0.78 to 1.28, shear to 0.3, shift to an eighth, contrast to 30 %, noise; no flips, which
    # turn one digit into another, or into none
    "digits_hard": Augmentation(_draw_digits_hard, _digits_hard),
    "crop_flip": crop_flip,
    "crop": crop,
    # label propagation's views of Mini-ImageNet (Iscen et al. 2019, arXiv 1904.04717): rotation by up to 10 degrees (nearest
    # pixel), crop of the image padded by 8 of 84 pixels, horizontal flip; outside is black
    "rotate_crop_flip": Augmentation(_draw_rotate_crop_flip, _rotate_crop_flip),
    # the strong views of IIC (Ji et al. 2019, arXiv 1807.06653) without Sobel: crop of 20/32 of the side resized back,
    # horizontal flip, then draw_colour_jitter
    "iic": Augmentation(_draw_iic, _iic),
    "randaugment": Augmentation(draw_randaugment, apply),
    "randaugment_usb": Augmentation(draw_randaugment_usb, apply),
}
#: These follow a weak view.
AFTER_WEAK: frozenset[str] = frozenset({"randaugment", "randaugment_usb"})


def augmentation(name: str, weak: Augmentation | None = None, ops: int | None = None) -> Augmentation:
    """Return the augmentation of this name, after ``weak`` if it is one of ``AFTER_WEAK``, with ``ops`` operations per view."""
    if name not in AUGMENTATIONS:
        raise DataError(f"augmentation: unknown {name!r}; known: {', '.join(AUGMENTATIONS)}")
    chosen = AUGMENTATIONS[name]
    if ops is not None:
        if "ops" not in signature(chosen.draw).parameters:
            raise DataError(f"hard_ops: {name} draws no operations; randaugment does")
        chosen = replace(chosen, draw=partial(chosen.draw, ops=ops))
    return chosen if weak is None or name not in AFTER_WEAK else _after(weak, chosen)


def _after(first: Augmentation, then: Augmentation) -> Augmentation:
    """``then``, which takes a plan, of the views that ``first`` makes; the window of a crop becomes a part of the plan."""

    def draw(random: BatchRandom, shape: tuple[int, ...]) -> Any:
        drawn, plan = first.draw(random, shape), then.draw(random, shape)
        return replace(plan, window=drawn.window) if first in (crop, crop_flip) else (drawn, plan)

    def apply_both(images: Tensor, drawn: tuple[Any, Plan]) -> Tensor:
        x = first.apply(images, drawn[0])
        return then.apply(x if x.dtype == torch.uint8 else (x * 255).round_().clamp_(0, 255).byte(), drawn[1])

    return Augmentation(draw, then.apply if first in (crop, crop_flip) else apply_both)

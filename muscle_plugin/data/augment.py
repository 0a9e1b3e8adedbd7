"""Batched augmentations: (N, channels, H, W) uint8 images in, float images in [0, 1] out, parameters drawn per image.

Each runs on the device of the images and draws from the generator it is given, which lives on that device. A new one is
a function and a line in ``AUGMENTATIONS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Augmentation = Callable[[Tensor, torch.Generator], Tensor]


def to_float(images: Tensor) -> Tensor:
    """uint8 0..255 to float 0..1."""
    return images.float() / 255


def _uniform(generator: torch.Generator, n: int, low: float, high: float) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) * (high - low) + low


def affine(images: Tensor, angle: Tensor, scale: Tensor, shear: Tensor, shift_x: Tensor, shift_y: Tensor) -> Tensor:
    """Rotate, scale, shear and shift each image about its centre (bilinear; outside is 0).

    Args:
        images: (N, channels, H, W) float.
        angle: (N,) radians, positive turns the content counter-clockwise.
        scale: (N,) magnification.
        shear: (N,) horizontal shear, as the tangent of its angle.
        shift_x, shift_y: (N,) shift of the content, as a fraction of the image's side.
    """
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    # sampling grid = inverse map: undo the shift, then rotation and scale, then shear
    a, b = cos + shear * sin, -sin + shear * cos
    x, y = -2 * shift_x, -2 * shift_y
    theta = torch.stack([a, b, a * x + b * y, sin, cos, sin * x + cos * y], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def cutout(images: Tensor, side: float, generator: torch.Generator, fill: float = 0.0) -> Tensor:
    """Fill a square of ``side`` (fraction of the image's side) at a random centre of each image; it may be clipped."""
    n, _, h, w = images.shape
    cy, cx = _uniform(generator, n, 0, h).view(-1, 1, 1), _uniform(generator, n, 0, w).view(-1, 1, 1)
    rows = torch.arange(h, device=images.device).view(1, -1, 1) + 0.5
    cols = torch.arange(w, device=images.device).view(1, 1, -1) + 0.5
    inside = ((rows - cy).abs() < side * h / 2) & ((cols - cx).abs() < side * w / 2)
    return images.masked_fill(inside.unsqueeze(1), fill)


def _distort(
    images: Tensor, generator: torch.Generator, angle: float, scale: float, shear: float, shift: float
) -> Tensor:
    """Affine distortion of each image: angle in radians, scale as its logarithm, shift as a fraction of the side."""
    n = len(images)
    return affine(
        to_float(images),
        _uniform(generator, n, -angle, angle),
        torch.exp(_uniform(generator, n, -scale, scale)),
        _uniform(generator, n, -shear, shear),
        _uniform(generator, n, -shift, shift),
        _uniform(generator, n, -shift, shift),
    )


def digits_weak(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation to 0.25 rad, scale by 0.86 to 1.16, shear to 0.2, shift to a tenth of the side: another hand's digit."""
    return _distort(images, generator, 0.25, 0.15, 0.2, 0.1)


def digits_hard(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotation to 0.35 rad, scale by 0.78 to 1.28, shear to 0.3, shift to an eighth, contrast to 30 %, noise.

    No flips: they turn one digit into another, or into none.
    """
    x = _distort(images, generator, 0.35, 0.25, 0.3, 0.12)
    x = x * _uniform(generator, len(x), 0.7, 1.3).view(-1, 1, 1, 1)
    return x + 0.05 * torch.randn(x.shape, generator=generator, device=generator.device)


def crop_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random translation by up to an eighth of the side (4 of 32 pixels, reflected border), and horizontal flip.

    The weak augmentation of Mean Teacher, FixMatch and USB, by whole pixels: no value is interpolated.
    """
    n, _, h, w = images.shape
    pad_y, pad_x = max(1, h // 8), max(1, w // 8)
    device = images.device
    dy = torch.randint(-pad_y, pad_y + 1, (n, 1), generator=generator, device=device)
    dx = torch.randint(-pad_x, pad_x + 1, (n, 1), generator=generator, device=device)
    flip = torch.rand(n, 1, generator=generator, device=device) < 0.5
    rows = torch.arange(h, device=device) + dy
    cols = torch.arange(w, device=device).expand(n, w)
    cols = torch.where(flip, w - 1 - cols, cols) + dx
    rows = (h - 1) - ((h - 1) - rows.abs()).abs()  # reflect at both borders, edge not repeated
    cols = (w - 1) - ((w - 1) - cols.abs()).abs()
    batch = torch.arange(n, device=device).view(-1, 1, 1)
    return to_float(images.permute(0, 2, 3, 1)[batch, rows.unsqueeze(2), cols.unsqueeze(1)].permute(0, 3, 1, 2))


_GREY = (0.299, 0.587, 0.114)


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return x
    weights = torch.tensor(_GREY, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)
    return (x * weights).sum(1, keepdim=True)


def colour_jitter(x: Tensor, generator: torch.Generator, strength: float, hue: float) -> Tensor:
    """Brightness, contrast and saturation by factors in 1 +- strength and hue by a turn of +- ``hue``, per image.

    The hue is turned in the chroma plane of YIQ (a linear map) rather than in HSV.
    """
    n = len(x)

    def factor() -> Tensor:
        return _uniform(generator, n, 1 - strength, 1 + strength).view(-1, 1, 1, 1)

    x = (x * factor()).clamp(0, 1)
    mean = _grey(x).mean((1, 2, 3), keepdim=True)
    x = (mean + (x - mean) * factor()).clamp(0, 1)
    if x.shape[1] != 3:
        return x
    grey = _grey(x)
    x = (grey + (x - grey) * factor()).clamp(0, 1)
    to_yiq = torch.tensor(
        [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], device=x.device
    )
    angle = _uniform(generator, n, -hue, hue) * 2 * math.pi
    one, zero, cos, sin = torch.ones_like(angle), torch.zeros_like(angle), torch.cos(angle), torch.sin(angle)
    turn = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq
    return torch.einsum("nij,njhw->nihw", matrix, x).clamp(0, 1)


def iic(images: Tensor, generator: torch.Generator) -> Tensor:
    """The hard views of IIC (Ji et al. 2019) without Sobel: crop 20/32 of the side and resize back, flip, colour jitter."""
    n = len(images)
    crop = 20 / 32
    reach = (1 - crop) / 2  # how far the crop's centre may lie from the image's, as a fraction of the side
    sign = torch.where(torch.rand(n, generator=generator, device=images.device) < 0.5, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1] = crop * sign, crop
    theta[:, 0, 2] = 2 * _uniform(generator, n, -reach, reach)
    theta[:, 1, 2] = 2 * _uniform(generator, n, -reach, reach)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    x = F.grid_sample(to_float(images), grid, align_corners=False, padding_mode="reflection")
    return colour_jitter(x, generator, 0.4, 0.125)


AUGMENTATIONS: dict[str, Augmentation] = {
    "digits_weak": digits_weak,
    "digits_hard": digits_hard,
    "crop_flip": crop_flip,
    "iic": iic,
}

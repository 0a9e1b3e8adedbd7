"""Pillow's image operations on batches, with a parameter for each image.

Every operation takes (N, C, H, W) uint8 images, C = 1 (Pillow's mode L) or 3 (RGB), on any device, and a tensor (N,) of
parameters, and returns new uint8 images equal, bit for bit, to what Pillow gives; ``hue`` alone follows torchvision instead.
Nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Fill = int | tuple[int, int, int]


def _per_image(parameter: Tensor, images: Tensor) -> Tensor:
    """The parameters on the images' device, shaped to broadcast over them."""
    return parameter.to(images.device, non_blocking=True).view(-1, 1, 1, 1)


def luminance(images: Tensor) -> Tensor:
    """Pillow's conversion to mode L: (N, 1, H, W) float of whole grey levels (ITU-R 601-2, rounded)."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.float().split(1, 1)
    # Pillow's integers with 16 fractional bits stay below 2 ** 24: float32 holds them exactly
    level = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return level.add_(0x8000).mul_(1 / 65536).floor_()


def to_uint8(levels: Tensor) -> Tensor:
    """Grey levels from 0 to 255, truncated; by way of int16, which the CPU does twice as fast as at once."""
    return levels.short().to(torch.uint8)


def _blend(degenerate: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """degenerate + factor * (images - degenerate), clipped and truncated; the order of rounding is Pillow's."""
    mixed = images.float().sub_(degenerate).mul_(_per_image(factor.float(), images)).add_(degenerate)
    return to_uint8(mixed.clamp_(0, 255))


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the grey levels: ``ImageEnhance.Brightness``; factor 0 is black, 1 the image. Exact."""
    return to_uint8(images.float().mul_(_per_image(factor.float(), images)).clamp_(0, 255))


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the image's mean grey: ``ImageEnhance.Contrast``; factor 0 is flat, 1 the image. Exact."""
    mean = luminance(images).mean((1, 2, 3), keepdim=True, dtype=torch.float64)
    # rounded halves upwards; less than one pixel's share is added, as a GPU's mean may fall short of a half
    return _blend((mean + (0.5 + 0.25 / (images.shape[2] * images.shape[3]))).floor_().float(), images, factor)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the grey image: ``ImageEnhance.Color`` (saturation); one channel stays as it is. Exact."""
    return images.clone() if images.shape[1] == 1 else _blend(luminance(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the smoothed image: ``ImageEnhance.Sharpness``; the outermost pixels stay as they are. Exact."""
    w = images.shape[3]
    levels = images.flatten(2).float()
    # 3 x 3 sums over the flattened rows: those that run over a row's end belong to border pixels, which are kept
    column = (levels[..., : -2 * w] + levels[..., w:-w]).add_(levels[..., 2 * w :])
    box = (column[..., :-2] + column[..., 1:-1]).add_(column[..., 2:])
    centre = levels[..., w + 1 : -w - 1]
    smooth = box.add_(centre, alpha=4).mul_(1 / 13).add_(0.5).floor_()  # a thirteenth never is half a grey level
    factor = factor.to(images.device, torch.float32, non_blocking=True).view(-1, 1, 1)
    mixed = (centre - smooth).mul_(factor).add_(smooth).clamp_(0, 255)
    result = images.clone()
    result.flatten(2)[..., w + 1 : -w - 1] = to_uint8(mixed)
    result[..., 0], result[..., -1] = images[..., 0], images[..., -1]
    return result


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the highest ``bits`` (1 to 8) bits of each grey level: ``ImageOps.posterize``. Exact."""
    return images & _per_image((255 << (8 - bits.long())).to(torch.uint8), images)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the grey levels from ``threshold`` (0 to 256, a fraction too) on: ``ImageOps.solarize``. Exact."""
    lowest = threshold.ceil().long()
    # in place the comparison gives 0 or 1 as uint8, seven times as fast as bool
    inverted = images.clone().ge_(_per_image(lowest.clamp(max=255).to(torch.uint8), images))
    invert = _per_image((lowest < 256).to(torch.uint8) * 255, images)  # 256 is beyond uint8: invert nothing
    return inverted.mul_(invert).bitwise_xor_(images)


def auto_contrast(images: Tensor) -> Tensor:
    """Stretch each channel's range to 0..255: ``ImageOps.autocontrast``; a flat channel stays as it is. Exact."""
    low, high = (f(2, keepdim=True).double() for f in (images.flatten(2).amin, images.flatten(2).amax))
    flat = high == low
    # torch would turn 255 / x into a product, which rounds otherwise
    scale = torch.where(flat, 1.0, torch.full_like(low, 255) / (high - low))
    level = torch.arange(256, dtype=torch.float64, device=images.device)
    table = (level * scale).sub_(torch.where(flat, 0.0, low * scale)).clamp_(0, 255).to(torch.uint8)
    return table.gather(2, images.flatten(2).long()).view(images.shape)


def equalize(images: Tensor) -> Tensor:
    """Spread each channel's grey levels evenly over 0..255: ``ImageOps.equalize``. Exact."""
    index = images.flatten(2).long()
    n, c, pixels = index.shape
    # one-dimensional: a GPU's deterministic scatter_add_ of several dimensions would wait
    place = index + torch.arange(0, 256 * n * c, 256, device=images.device).view(n, c, 1)
    one = torch.ones((), device=images.device).expand(n * c * pixels)
    # whole numbers in float32, which divides several times faster than integers
    histogram = torch.zeros(n * c * 256, device=images.device).scatter_add_(0, place.flatten(), one).view(n, c, 256)
    below = histogram.int().cumsum(2) - histogram  # of floats a GPU has no deterministic sum
    # a 255th of the pixels below the brightest level; a GPU multiplies by 1 / 255 and may fall short of a whole number
    step = ((below.gather(2, index.amax(2, keepdim=True)) + 0.5) / 255).floor_()
    level = torch.arange(256, dtype=torch.float32, device=images.device)
    spread = below.add_((step / 2).floor_()).div_(step.clamp(min=1))  # to_uint8 truncates
    return to_uint8(torch.where(step > 0, spread, level).clamp_(max=255)).gather(2, index).view(images.shape)


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue in HSV by ``turn`` of the circle (-0.5 to 0.5), within 1 grey level of torchvision's ``adjust_hue`` on uint8
    tensors; one channel stays as it is."""
    if images.shape[1] == 1:
        return images.clone()
    levels = images.float()
    red, green, blue = levels.split(1, 1)
    value = levels.amax(1, keepdim=True)
    chroma = value - levels.amin(1, keepdim=True)
    # selections by 0 or 1 as float: on the CPU a fraction of the time of torch.where
    is_red, is_green = value.clone().eq_(red), value.clone().eq_(green)
    from_red = green - blue
    from_green = (blue - red).add_(chroma, alpha=2)
    from_blue = (red - green).add_(chroma, alpha=4)
    sextant = from_blue.lerp_(from_green, is_green).lerp_(from_red, is_red).div_(chroma.clamp(min=1))
    sextant += _per_image(turn.float() * 6, images)
    # a channel lies at the bottom within a sextant of its complement, at the top from two sextants on
    complement = torch.arange(3, 9, 2, device=images.device).remainder(6).view(1, 3, 1, 1)  # of red, green, blue
    away = sextant - complement.float()
    away = away.sub_((away / 6).round_(), alpha=6).abs_()
    return to_uint8(away.sub_(1).clamp_(0, 1).sub_(1).mul_(chroma).add_(value + 0.5))


def pieces(values: Tensor, start: Tensor, length: int) -> Tensor:
    """The ``length`` values from each ``start`` on, (len(start), length), of contiguous values read as one row."""
    flat = values.view(-1)
    return flat.as_strided((len(flat) - length + 1, length), (1, 1)).index_select(0, start)


def move_rows(images: Tensor, matrix: Tensor, fill: int) -> Tensor:
    """``transform`` for matrices that leave rows straight and unscaled; a third of its time, as rows are copied."""
    n, c, h, w = images.shape
    _, b, left, _, e, top = matrix.to(images.device, non_blocking=True).view(6, n, 1)
    rows = torch.arange(h, dtype=torch.int32, device=images.device)
    x = (b * rows + left).bitwise_right_shift_(16).clamp_(-w, w)
    y = (e * rows + top).bitwise_right_shift_(16)
    x = torch.where((y >= 0) & (y < h), x, w)
    # each row between w pixels of fill; those to its right are the next row's
    wide = images.new_full((n * c * h + 1, 2 * w), fill)
    wide[:-1, w:] = images.reshape(-1, w)
    first = torch.arange(n * c, dtype=torch.int32, device=images.device).view(n, c, 1) * h
    start = (first + y.clamp_(0, h - 1).unsqueeze(1)).mul_(2 * w).add_((x + w).unsqueeze(1))
    return pieces(wide, start.view(-1), w).view(n, c, h, w)


def transform(images: Tensor, matrix: Tensor, fill: int) -> Tensor:
    """Pillow's affine transformation, nearest neighbour: ``matrix`` is ``matrices``', (6, N)."""
    n, c, h, w = images.shape
    a, b, left, d, e, top = matrix.to(images.device, non_blocking=True).view(6, n, 1, 1)
    cols = torch.arange(w, dtype=torch.int32, device=images.device)
    rows = torch.arange(h, dtype=torch.int32, device=images.device).view(-1, 1)
    x = ((a * cols + left) + b * rows).bitwise_right_shift_(16).clamp_(-1, w)
    y = ((d * cols + top) + e * rows).bitwise_right_shift_(16).clamp_(-1, h)
    # what is outside reads the border of fill, one pixel wide
    index = y.mul_(w + 2).add_(x).add_(w + 3).long().view(n, 1, h * w).expand(-1, c, -1)
    return F.pad(images, (1, 1, 1, 1), value=fill).flatten(2).gather(2, index).view(n, c, h, w)


_ROW_BY_ROW = ("shear_x", "translate_x", "translate_y")  # these move whole rows
_GEOMETRIC = (*_ROW_BY_ROW, "rotate", "shear_y")


def matrices(operations: Tensor, values: Tensor, height: int, width: int) -> Tensor:
    """Pillow's affine matrices (a, b, c, d, e, f) from output to input as its integers with 16 fractional bits: (6, ...) int32.

    ``operations`` are (...) indices into ``OPERATIONS`` (not geometric: the identity), with their ``values``: ``rotate`` turns
    the content counter-clockwise by degrees; ``shear_x`` reads each pixel (x, y) at (x + value * y, y), ``shear_y`` at
    (x, y + value * x), ``translate_x`` and ``translate_y`` at (x + value, y) and (x, y + value), rounded.
    """
    kinds = torch.arange(FIRST_GEOMETRIC, len(OPERATIONS)).view(-1, *(1,) * values.dim())
    values = values.double() * (operations == kinds)
    shear_x, _, _, degrees, shear_y = values
    cos, sin = degrees.deg2rad_().cos(), degrees.sin()
    to_input = torch.stack([cos, shear_x - sin, shear_y + sin, cos]).unflatten(0, (2, 2))
    x, y = width / 2, height / 2
    # the centre stays where it is; translations are by whole pixels, halves upwards
    shift = torch.stack([x - cos * x + sin * y, y - cos * y - sin * x]) + (values[1:3] + 0.5).floor_()
    half = to_input * 0.5
    at_centres = torch.cat([to_input, (shift + half[:, 0] + half[:, 1]).unsqueeze(1)], 1).flatten(0, 1)
    return (at_centres * 65536 + 0.5).floor_().int()


def cutout(images: Tensor, hole: Tensor, fill: Fill) -> Tensor:
    """Fill the hole of each image, (4, N) left, top, right, bottom, with a grey level or a colour, which a single channel gets
    as its luminance."""
    c, h, w = images.shape[1:]
    x1, y1, x2, y2 = hole.to(images.device, non_blocking=True).view(4, -1, 1, 1, 1)
    cols, rows = torch.arange(w, device=images.device), torch.arange(h, device=images.device).view(-1, 1)
    cols, rows = (cols >= x1) & (cols < x2), (rows >= y1) & (rows < y2)
    hole = rows.view(torch.uint8).neg() & cols.view(torch.uint8).neg()  # 255 inside, 0 outside
    colour = torch.tensor(fill if isinstance(fill, tuple) else [fill], dtype=torch.uint8).view(1, -1, 1, 1)
    if c == 1:
        colour = luminance(colour).to(torch.uint8)
    colour = colour.to(images.device, non_blocking=True)
    return (images ^ colour).bitwise_and_(~hole).bitwise_xor_(colour)


BY_VALUE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auto_contrast": lambda images, _: auto_contrast(images),
    "equalize": lambda images, _: equalize(images),
    "posterize": posterize,
    "solarize": solarize,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "hue": hue,
}
OPERATIONS = ("identity", *BY_VALUE, *_GEOMETRIC)
FIRST_GEOMETRIC = len(OPERATIONS) - len(_GEOMETRIC)
#: After these the geometric operations do not move whole rows.
FIRST_TRANSFORM = FIRST_GEOMETRIC + len(_ROW_BY_ROW)

"""A Triton kernel that makes the views of a :class:`~muscle_plugin.data.randaugment.Plan`: window, operations, hole and
normalisation of an image in one program, which keeps it on chip.

The views equal those of ``randaugment.apply`` and ``normalise.Normaliser`` bit for bit, which take some 400 launches per batch.
Whatever rounds is therefore computed in the same order and precision as there (no fused multiply-add, no approximate
division), and in whole numbers where that gives the same.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muscle_plugin.data.operations import OPERATIONS, Fill, luminance, matrices
from muscle_plugin.data.randaugment import Plan, Window, apply

#: Largest image, in pixels: 64 x 64 stays in a program's registers; of 84 x 84 some 300 to 500 bytes a thread do not.
MOST_PIXELS = 8192
_HUE = OPERATIONS.index("hue")  # which the kernel does not compute
#: Columns of a packed plan: the image's row, top, left, whether mirrored, the hole's four sides; then for each slot the
#: operation, the bits of its value and six of an affine matrix.
_FIXED, _SLOT = 8, 8

_AUTO_CONTRAST = tl.constexpr(OPERATIONS.index("auto_contrast"))
_EQUALIZE = tl.constexpr(OPERATIONS.index("equalize"))
_POSTERIZE = tl.constexpr(OPERATIONS.index("posterize"))
_SOLARIZE = tl.constexpr(OPERATIONS.index("solarize"))
_BRIGHTNESS = tl.constexpr(OPERATIONS.index("brightness"))
_COLOR = tl.constexpr(OPERATIONS.index("color"))
_CONTRAST = tl.constexpr(OPERATIONS.index("contrast"))
_SHARPNESS = tl.constexpr(OPERATIONS.index("sharpness"))
_FIRST_GEOMETRIC = tl.constexpr(OPERATIONS.index("shear_x"))


@triton.jit
def _luminance(r, g, b, C: tl.constexpr):
    if C == 1:
        level = r
    else:
        level = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
    return level


@triton.jit
def _blend(degenerate, x, factor):
    low = degenerate.to(tl.float32)
    mixed = (x.to(tl.float32) - low) * factor + low
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit
def _auto_contrast(x, inside):
    low = tl.min(tl.where(inside, x, 255), 0)
    high = tl.max(tl.where(inside, x, 0), 0)
    scale = 255.0 / tl.maximum(high - low, 1).to(tl.float64)
    stretched = x.to(tl.float64) * scale - low.to(tl.float64) * scale
    return tl.where(high > low, tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32), x)


@triton.jit
def _equalize(x, inside, OUTSIDE: tl.constexpr):
    level = tl.arange(0, 256)
    count = tl.histogram(tl.where(inside, x, 0), 256) - tl.where(level == 0, OUTSIDE, 0)
    below = tl.cumsum(count, 0) - count
    brightest = tl.max(tl.where(count > 0, level, 0), 0)
    step = tl.sum(tl.where(level < brightest, count, 0), 0) // 255
    table = tl.minimum((below + step // 2) // tl.maximum(step, 1), 255)
    return tl.gather(tl.where(step > 0, table, level), x, 0)


@triton.jit
def _sharpness(x, pos, factor, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr):
    row, col = pos // W, pos % W
    inner = (row > 0) & (row < H - 1) & (col > 0) & (col < W - 1)
    # what is read beyond the image belongs to border pixels, which stay as they are
    column = x + tl.gather(x, tl.maximum(pos - W, 0), 0) + tl.gather(x, tl.minimum(pos + W, P - 1), 0)
    box = column + tl.gather(column, tl.maximum(pos - 1, 0), 0) + tl.gather(column, tl.minimum(pos + 1, P - 1), 0)
    smooth = (2 * (box + 4 * x) + 13) // 26  # a thirteenth never is half a grey level
    return tl.where(inner, _blend(smooth, x, factor), x)


@triton.jit
def _point(x, operation, value):
    """Operations that take each grey level for itself."""
    if operation == _POSTERIZE:
        x = x & ((255 << (8 - value.to(tl.int32))) & 255)
    elif operation == _SOLARIZE:
        x = tl.where(x.to(tl.float32) >= value, 255 - x, x)
    elif operation == _BRIGHTNESS:
        x = _blend(tl.zeros_like(x), x, value)
    return x


@triton.jit
def _views(
    pool, plan, out, scale, shift,
    stride_channel, stride_pixel,
    C: tl.constexpr, WIDE: tl.constexpr, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr,
    MARGIN_Y: tl.constexpr, MARGIN_X: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr,
    FILL: tl.constexpr, HOLE_R: tl.constexpr, HOLE_G: tl.constexpr, HOLE_B: tl.constexpr,
):  # fmt: skip
    view = tl.program_id(0)
    plan += view * COLUMNS
    pos = tl.arange(0, P)
    inside = pos < H * W
    row, col = pos // W, pos % W

    # the window: reflected at the borders, the edge not repeated
    y = tl.abs(row + tl.load(plan + 1) - MARGIN_Y)
    x = tl.where(tl.load(plan + 3) != 0, W - 1 - col, col) + tl.load(plan + 2) - MARGIN_X
    y, x = (H - 1) - tl.abs((H - 1) - y), (W - 1) - tl.abs((W - 1) - tl.abs(x))
    source = pool + tl.load(plan).to(tl.int64) * (C * H * W) + (y * W + x)
    r = tl.load(source, mask=inside, other=0).to(tl.int32)
    g, b = r, r
    if C == 3:
        g = tl.load(source + H * W, mask=inside, other=0).to(tl.int32)
        b = tl.load(source + 2 * H * W, mask=inside, other=0).to(tl.int32)

    for slot in range(SLOTS):
        step = plan + 8 + 8 * slot
        operation = tl.load(step)
        value = tl.load(step + 1).to(tl.float32, bitcast=True)
        if operation >= _FIRST_GEOMETRIC:
            # Pillow's affine map from output to input, in whole numbers with 16 fractional bits
            x = (tl.load(step + 2) * col + tl.load(step + 4) + tl.load(step + 3) * row) >> 16
            y = (tl.load(step + 5) * col + tl.load(step + 7) + tl.load(step + 6) * row) >> 16
            hit = (x >= 0) & (x < W) & (y >= 0) & (y < H) & inside
            at = tl.where(hit, y * W + x, 0)
            r = tl.where(hit, tl.gather(r, at, 0), FILL)
            if C == 3:
                g = tl.where(hit, tl.gather(g, at, 0), FILL)
                b = tl.where(hit, tl.gather(b, at, 0), FILL)
        elif operation == _AUTO_CONTRAST:
            r = _auto_contrast(r, inside)
            if C == 3:
                g, b = _auto_contrast(g, inside), _auto_contrast(b, inside)
        elif operation == _EQUALIZE:
            r = _equalize(r, inside, P - H * W)
            if C == 3:
                g, b = _equalize(g, inside, P - H * W), _equalize(b, inside, P - H * W)
        elif operation == _SHARPNESS:
            r = _sharpness(r, pos, value, H, W, P)
            if C == 3:
                g, b = _sharpness(g, pos, value, H, W, P), _sharpness(b, pos, value, H, W, P)
        elif operation == _COLOR:
            if C == 3:
                grey = _luminance(r, g, b, C)
                r, g, b = _blend(grey, r, value), _blend(grey, g, value), _blend(grey, b, value)
        elif operation == _CONTRAST:
            total = tl.sum(tl.where(inside, _luminance(r, g, b, C), 0), 0)
            mean = (2 * total + H * W) // (2 * H * W)  # rounded halves upwards
            r = _blend(mean, r, value)
            if C == 3:
                g, b = _blend(mean, g, value), _blend(mean, b, value)
        else:
            r = _point(r, operation, value)
            if C == 3:
                g, b = _point(g, operation, value), _point(b, operation, value)

    hole = (
        (col >= tl.load(plan + 4)) & (row >= tl.load(plan + 5)) & (col < tl.load(plan + 6)) & (row < tl.load(plan + 7))
    )
    r = tl.where(hole, HOLE_R, r)
    if C == 3:
        g, b = tl.where(hole, HOLE_G, g), tl.where(hole, HOLE_B, b)

    out += view.to(tl.int64) * (WIDE * H * W) + pos * stride_pixel
    for channel in tl.static_range(WIDE):
        if C == 1 or channel == 0:
            levels = r
        elif channel == 1:
            levels = g
        else:
            levels = b
        at = 0 if C == 1 else channel
        normal = levels.to(tl.float32) * tl.load(scale + at) + tl.load(shift + at)
        tl.store(out + channel * stride_channel, normal, mask=inside)


def pack(plan: Plan, rows: Tensor, height: int, width: int) -> Tensor:
    """Write a plan of N views of the images in ``rows`` of the pool as the kernel reads it, (N, columns) int32 on the CPU."""
    slots, n = plan.operations.shape
    nothing = torch.zeros_like(rows)
    window = plan.window or Window(nothing, nothing, nothing, (0, 0))
    hole = nothing.expand(4, -1) if plan.hole is None else plan.hole
    packed = torch.empty(_FIXED + _SLOT * slots, n, dtype=torch.int32)
    packed[:_FIXED] = torch.cat([torch.stack([rows, window.top, window.left, window.flip]), hole])
    if slots:
        steps = packed[_FIXED:].view(slots, _SLOT, n)
        steps[:, 0] = plan.operations
        steps[:, 1] = plan.values.view(torch.int32)
        steps[:, 2:] = matrices(plan.operations, plan.values, height, width).movedim(0, 1)
    return packed.t().contiguous()


def fits(shape: tuple[int, ...]) -> bool:
    """Whether images (C, H, W) can be kept on chip."""
    c, h, w = shape
    return c in (1, 3) and h * w <= MOST_PIXELS


def views(
    pool: Tensor, packed: Tensor, plan: Plan, scale: Tensor, shift: Tensor, channels: int, channels_last: bool = False
) -> Tensor:
    """Make the normalised views of a plan, (N, channels, H, W) float32, from (P, C, H, W) uint8, contiguous, and what
    :func:`pack` made of the plan. A grey level is multiplied by ``scale``, and ``shift`` is added, C values each."""
    n, (_, c, h, w) = len(packed), pool.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    out = torch.empty((n, channels, h, w), device=pool.device, memory_format=layout)
    margin = plan.window.margin if plan.window is not None else (0, 0)
    constants, options = constants_of((c, h, w), channels, len(plan.operations), margin, plan.outside, plan.hole_fill)
    strides = (1, channels) if channels_last else (h * w, 1)
    if n:
        with torch.cuda.device_of(pool):  # nothing, for a CPU
            _views[(n,)](pool, packed, out, scale, shift, *strides, **constants, **options)
    return out


@cache
def constants_of(
    shape: tuple[int, ...], channels: int, slots: int, margin: tuple[int, int], outside: int, fill: Fill
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the constants and the options with which the kernel is compiled for images of (C, H, W) and a kind of plan."""
    c, h, w = shape
    r, g, b = fill if isinstance(fill, tuple) else (fill,) * 3
    if c == 1 and isinstance(fill, tuple):
        r = int(luminance(torch.tensor(fill).view(1, 3, 1, 1)))
    pixels: int = triton.next_power_of_2(h * w)
    constants = {
        "C": c, "WIDE": channels, "H": h, "W": w, "P": pixels, "MARGIN_Y": margin[0], "MARGIN_X": margin[1],
        "SLOTS": slots, "COLUMNS": _FIXED + _SLOT * slots, "FILL": outside, "HOLE_R": r, "HOLE_G": g, "HOLE_B": b,
    }  # fmt: skip
    return constants, {"num_warps": min(max(pixels // 256, 4), 16), "enable_fp_fusion": False}


def takes(plan: Plan) -> bool:
    """Whether the kernel has all of a plan's operations."""
    return not (plan.operations == _HUE).any()


def why_not(device: torch.device, shape: tuple[int, ...], channels: int) -> str | None:
    """Say why the kernel cannot make views, of ``channels``, of images (C, H, W) on this device; None if some views of all
    operations are those of PyTorch."""
    if not hasattr(tl, "gather"):
        return f"Triton {triton.__version__} is older than 3.2"
    c, h, w = shape
    known = torch.tensor([i for i in range(len(OPERATIONS)) if i != _HUE])
    n, rows = len(known), torch.arange(len(known)) % 2
    images = torch.arange(2 * c * h * w).mul_(37).remainder_(251).to(torch.uint8).view(2, c, h, w)
    side = torch.tensor([0, 1]).repeat(n)[:n]
    plan = Plan(
        torch.stack([known, known.flip(0)]), torch.full((2, n), 1.5), 128, torch.stack([side, side, side + 3, side + 4]),
        (125, 123, 114), Window(side, side.flip(0), side > 0, (1, 1)),
    )  # fmt: skip
    scale, shift = torch.linspace(0.01, 0.02, c), torch.linspace(-2, -1, c)
    packed = pack(plan, rows, h, w).to(device)
    made = views(images.to(device), packed, plan, scale.to(device), shift.to(device), channels, True)
    expected = apply(images[rows], plan).float().mul_(scale.view(1, -1, 1, 1)).add_(shift.view(1, -1, 1, 1))
    same = torch.equal(made.cpu(), expected.repeat(1, channels // c, 1, 1))
    return None if same else "the kernel's views are not those of PyTorch's operations"

"""Augmentations of batches: Pillow's operations to the bit, what is drawn, and the shapes of the views."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from muscle_plugin.data import operations as pillow_operations
from muscle_plugin.data import randaugment
from muscle_plugin.data.augment import (
    AFTER_WEAK,
    AUGMENTATIONS,
    affine,
    augmentation,
    crop,
    crop_flip,
    draw_colour_jitter,
    resize,
)
from muscle_plugin.data.batch_random import BatchRandom
from muscle_plugin.data.operations import OPERATIONS
from muscle_plugin.data.randaugment import Plan

SIZES = [(32, 32), (33, 28), (8, 8)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(n, low, high, seed=0):
    return torch.rand(n, generator=seeded(seed)) * (high - low) + low


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(n, channels, height, width, seed=0):
    """Random images of several ranges of grey, with flat, two-valued and smooth ones among them."""
    g = seeded(seed)
    low = torch.randint(0, 200, (n, channels, 1, 1), generator=g)
    span = torch.randint(1, 57, (n, channels, 1, 1), generator=g)
    images = torch.randint(0, 256, (n, channels, height, width), generator=g)
    images[1::2] = (images % span + low)[1::2]
    images[2::8] = low[2::8]
    images[3::8] = (images[3::8] > 99) * 255
    images[4::8] = torch.arange(width) * 255 // (width - 1)
    images[5::8] = images[5::8] // 64 * 85
    return images.to(torch.uint8)


def to_pillow(image):
    array = image.permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(array[..., 0] if len(image) == 1 else array)


def from_pillow(picture):
    array = torch.from_numpy(np.array(picture))
    return array.unsqueeze(0) if array.ndim == 2 else array.permute(2, 0, 1)


def operate(name, images, values, outside=0):
    """Apply one operation to every image."""
    operations = torch.full((1, len(images)), OPERATIONS.index(name))
    return randaugment.apply(images, Plan(operations, values.unsqueeze(0), outside))


def same(ours, theirs, tolerance=0):
    theirs = torch.stack([from_pillow(p) if isinstance(p, Image.Image) else p for p in theirs])
    assert ours.dtype == torch.uint8
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours.int(), theirs.int(), rtol=0, atol=tolerance)


def enhance(kind):
    return lambda picture, v, fill: kind(picture).enhance(v)


def matrix(entry, value):
    m = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    m[entry] = value
    return m


def transform(entry):
    return lambda picture, v, fill: picture.transform(
        picture.size, Image.Transform.AFFINE, matrix(entry, v), fillcolor=(fill,) * len(picture.getbands())
    )


# what each operation of a plan is in Pillow: (picture, value, grey level outside) -> picture
PILLOW = {
    "identity": lambda picture, v, fill: picture,
    "auto_contrast": lambda picture, v, fill: ImageOps.autocontrast(picture),
    "equalize": lambda picture, v, fill: ImageOps.equalize(picture),
    "posterize": lambda picture, v, fill: ImageOps.posterize(picture, int(v)),
    "solarize": lambda picture, v, fill: ImageOps.solarize(picture, v),
    "brightness": enhance(ImageEnhance.Brightness),
    "color": enhance(ImageEnhance.Color),
    "contrast": enhance(ImageEnhance.Contrast),
    "sharpness": enhance(ImageEnhance.Sharpness),
    "rotate": lambda picture, v, fill: picture.rotate(v, fillcolor=(fill,) * len(picture.getbands())),
    "shear_x": transform(1),
    "shear_y": transform(3),
    "translate_x": transform(2),
    "translate_y": transform(5),
}
FACTORS = torch.cat([torch.tensor([0, 1, 1.9, 0.05, 0.5, 2.5]), uniform(58, 0, 2)])
SHEARS = torch.cat([torch.tensor([0, 0.3, -0.3, 1.5, -1.5, 1e-6]), uniform(58, -0.4, 0.4)])
PIXELS = torch.cat([torch.tensor([0, 0.5, -0.5, 3, -3, 99, -99, 1e6]), uniform(56, -12, 12)])
VALUES = {
    "auto_contrast": None,
    "equalize": None,
    "posterize": torch.arange(64) % 8 + 1,
    "solarize": torch.cat([torch.tensor([0, 1, 255, 256, 255.5, 0.5]), uniform(58, 0, 256)]),
    **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), FACTORS),
    "rotate": torch.cat([torch.tensor([0, 90, -90, 180, 270, 45, 30, -30, 60, 360]), uniform(54, -180, 180)]),
    **dict.fromkeys(("shear_x", "shear_y"), SHEARS),
    **dict.fromkeys(("translate_x", "translate_y"), PIXELS),
}
GEOMETRIC = {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", VALUES)
def test_an_operation_is_pillows_to_the_bit(name, channels, size):
    images, values = pictures(64, channels, *size), VALUES[name]
    before = images.clone()
    for fill in (0, 128) if name in GEOMETRIC else (None,):
        ours = operate(name, images, torch.zeros(64) if values is None else values, fill or 0)
        each = [None] * 64 if values is None else values.tolist()
        same(ours, [PILLOW[name](to_pillow(x), v, fill) for x, v in zip(images, each, strict=True)])
        assert torch.equal(images, before)
        assert ours.data_ptr() != images.data_ptr()


def test_luminance_is_pillows():
    images = pictures(64, 3, 33, 28)
    same(pillow_operations.luminance(images).to(torch.uint8), [to_pillow(x).convert("L") for x in images])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
def test_cutout_is_a_filled_rectangle(channels, size):
    images = pictures(64, channels, *size)
    left, top, right, bottom = box = torch.randint(-3, 40, (4, 64), generator=seeded())
    for fill in (128, (125, 123, 114)):
        pillow = []
        for image, (x1, y1, x2, y2) in zip(images, box.t().tolist(), strict=True):
            picture = to_pillow(image)
            if x2 > x1 and y2 > y1:
                grey = Image.new("RGB", (1, 1), fill).convert("L").getpixel((0, 0)) if isinstance(fill, tuple) else fill
                colour = grey if channels == 1 else fill if isinstance(fill, tuple) else (fill,) * 3
                ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), colour)
            pillow.append(picture)
        same(pillow_operations.cutout(images, torch.stack([left, top, right, bottom]), fill), pillow)


@pytest.mark.parametrize("size", SIZES)
def test_hue_is_torchvisions_within_a_grey_level(size):
    images = pictures(64, 3, *size)
    turn = torch.cat([torch.tensor([0, 0.5, -0.5, 0.125]), uniform(60, -0.5, 0.5)])
    ours = pillow_operations.hue(images, turn)
    same(ours, [TF.adjust_hue(x, v) for x, v in zip(images, turn.tolist(), strict=True)], tolerance=1)
    grey = pictures(64, 1, *size)
    assert torch.equal(pillow_operations.hue(grey, turn), grey)


@pytest.mark.parametrize("channels", [1, 3])
def test_enlarging_is_torchvisions_within_a_grey_level(channels):
    images = pictures(32, channels, 20, 17)
    theirs = TF.resize(images, [32, 28], InterpolationMode.BILINEAR)
    same(resize(images, 32, 28), list(theirs), tolerance=1)


def draw(name, n, size, ops, seed=0):
    return AUGMENTATIONS[name].draw(BatchRandom.of(seeded(seed), n), (3, *size), ops)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(AFTER_WEAK))
def test_randaugment_applies_its_plan_one_operation_after_another(name, channels, size):
    images = pictures(200, channels, *size)
    plan = draw(name, 200, size, 4)
    pillow = [to_pillow(x) for x in images]
    for operations, values in zip(plan.operations.tolist(), plan.values.tolist(), strict=True):
        pillow = [PILLOW[OPERATIONS[o]](p, v, plan.outside) for p, o, v in zip(pillow, operations, values, strict=True)]
    expected = torch.stack([from_pillow(p) for p in pillow])
    without_hole = Plan(plan.operations, plan.values, plan.outside)
    assert torch.equal(randaugment.apply(images, without_hole), expected)
    expected = pillow_operations.cutout(expected, plan.hole, plan.hole_fill)
    assert torch.equal(randaugment.apply(images, plan), expected)
    assert torch.equal(augmentation(name, ops=4)(images, seeded()), expected)


def values_drawn(plan, name):
    return plan.values[plan.operations == OPERATIONS.index(name)]


def test_fixmatchs_randaugment_draws_each_operation_and_level_equally_often():
    n, ops = 20_000, 2
    plan = draw("randaugment", n, (32, 32), ops)
    share = torch.bincount(plan.operations.flatten(), minlength=len(OPERATIONS)) / (n * ops)
    drawn = {name: s for name, s in zip(OPERATIONS, share.tolist(), strict=True) if s}
    assert set(drawn) == set(PILLOW)
    assert drawn.pop("identity") == pytest.approx(0.5 + 0.5 / 14, abs=0.01)  # p = 0.5, and itself one of 14
    assert all(s == pytest.approx(0.5 / 14, abs=0.005) for s in drawn.values())
    twice = ((plan.operations > 0).sum(0) == 2).float().mean()  # the slots are drawn independently
    assert twice == pytest.approx((0.5 * 13 / 14) ** 2, abs=0.015)

    def expected(name, values):
        drawn, counts = values_drawn(plan, name).unique(return_counts=True)
        torch.testing.assert_close(drawn, torch.tensor(sorted({float(v) for v in values})))
        assert counts.min() > 40

    v = range(1, 10)
    for name in ("brightness", "color", "contrast", "sharpness"):
        expected(name, [0.1 + 0.18 * i for i in v])
    expected("posterize", [1, 2, 3, 4])
    expected("solarize", [256 - int(25.6 * i) for i in v])
    for name, unit in {"rotate": 3, "shear_x": 0.03, "shear_y": 0.03, "translate_x": 1, "translate_y": 1}.items():
        expected(name, [sign * unit * i for i in v for sign in (-1, 1)])
    assert values_drawn(draw("randaugment", n, (64, 96), 1), "translate_x").max() == 27
    assert values_drawn(draw("randaugment", n, (64, 96), 1), "translate_y").max() == 18


def test_fixmatchs_hole_is_half_a_side_about_a_uniform_pixel():
    left, top, right, bottom = draw("randaugment", 20_000, (32, 32), 2).hole
    assert ((right - left == 16) & (bottom - top == 16)).all()
    for centre in (left + 8, top + 8):
        assert torch.bincount(centre, minlength=32).float().div(20_000).sub(1 / 32).abs().max() < 0.005


def test_usbs_randaugment_draws_each_operation_equally_often_over_its_range():
    n, ops = 20_000, 3
    plan = draw("randaugment_usb", n, (32, 64), ops)
    share = torch.bincount(plan.operations.flatten(), minlength=len(OPERATIONS)) / (n * ops)
    drawn = {name: s for name, s in zip(OPERATIONS, share.tolist(), strict=True) if s}
    assert set(drawn) == set(PILLOW)
    assert all(s == pytest.approx(1 / 14, abs=0.005) for s in drawn.values())
    ranges = {
        "solarize": (0, 256),
        **dict.fromkeys(("brightness", "color", "contrast", "sharpness"), (0.05, 0.95)),
        "rotate": (-30, 30),
        **dict.fromkeys(("shear_x", "shear_y"), (-0.3, 0.3)),
        "translate_x": (-0.3 * 64, 0.3 * 64),
        "translate_y": (-0.3 * 32, 0.3 * 32),
    }
    for name, (low, high) in ranges.items():
        v = (values_drawn(plan, name) - low) / (high - low)
        assert v.min() >= 0
        assert v.max() <= 1
        assert torch.histc(v, 10, 0, 1).div(len(v)).sub(0.1).abs().max() < 0.025
    assert values_drawn(plan, "posterize").unique().tolist() == [4, 5, 6, 7]
    left, top, right, bottom = plan.hole
    side = right - left
    assert torch.equal(side, bottom - top)
    assert torch.bincount(side, minlength=33)[1:].div(n).sub(1 / 32).abs().max() < 0.006
    assert min(left.min(), top.min()) == 0
    assert left.max() == 63
    assert top.max() == 31


def crops_of(padded, height, width):
    """Every window of a padded image, mirrored and not, and where it is."""
    return {
        (window.flip(2) if flip else window).contiguous().numpy().tobytes(): (dy, dx, flip)
        for dy in range(padded.shape[1] - height + 1)
        for dx in range(padded.shape[2] - width + 1)
        for flip in (False, True)
        for window in [padded[:, dy : dy + height, dx : dx + width]]
    }


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 1), (33, 28, 3), (8, 8, 3)])
def test_crop_flip_moves_whole_pixels_and_reflects(height, width, channels):
    """Each result is one of the windows of the reflected image, flipped or not, each about equally often."""
    y, x = height // 8, width // 8
    image = torch.randint(0, 256, (1, channels, height, width), generator=seeded(), dtype=torch.uint8)
    padded = torch.nn.functional.pad(image, (x, x, y, y), mode="reflect")
    windows = crops_of(padded[0], height, width)
    for function in (crop_flip, crop):
        out = function(image.repeat(600, 1, 1, 1), seeded())
        drawn = [windows[v.contiguous().numpy().tobytes()] for v in out]
        assert {d[0] for d in drawn} == set(range(2 * y + 1))
        assert {d[1] for d in drawn} == set(range(2 * x + 1))
        assert 240 < sum(d[2] for d in drawn) < 360 if function is crop_flip else not any(d[2] for d in drawn)


def test_rotate_crop_flip_is_a_window_of_a_turned_image():
    """A turned disc is the same disc, which shows the window; a bar shows the turn."""
    view = AUGMENTATIONS["rotate_crop_flip"]
    side = 42
    rows, cols = torch.arange(side).view(-1, 1) - side / 2 + 0.5, torch.arange(side) - side / 2 + 0.5
    disc = (255 * (rows**2 + cols**2 < 18**2)).to(torch.uint8).expand(1, 1, -1, -1)
    out = view(disc.repeat(300, 1, 1, 1), seeded()).float()
    centre = [((out[:, 0] > 0) * axis).sum((1, 2)) / (out[:, 0] > 0).sum((1, 2)) for axis in (rows, cols)]
    for c in centre:  # 8 of 84 pixels are 4 of 42
        assert c.min() < -2.9
        assert c.max() > 2.9
        assert c.abs().max() < 4.2
    bar = ((rows.abs() < 2) & (cols.abs() < 15)).to(torch.uint8).expand(200, 1, -1, -1)
    slopes = torch.stack([image[0].nonzero().float().mT.cov()[0, 1] for image in view(bar, seeded())])
    assert slopes.min() < -5  # turned either way
    assert slopes.max() > 5


def test_iic_crops_a_part_and_keeps_grey_images_grey():
    images = pictures(64, 3, 32, 32)
    out = AUGMENTATIONS["iic"](images, seeded())
    assert out.shape == images.shape
    grey = images[:, :1].expand(-1, 3, -1, -1)
    out = AUGMENTATIONS["iic"](grey, seeded())
    assert (out.amax(1) - out.amin(1)).max() <= 1


def test_iics_jitter_applies_each_operation_once_in_a_random_order():
    n = 4800
    plan = draw_colour_jitter(BatchRandom.of(seeded(), n))
    orders, counts = plan.operations.unique(dim=1, return_counts=True)
    assert orders.shape[1] == 24
    assert counts.min() > 140
    assert counts.max() < 260
    for name, low, high in [
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("color", 0.6, 1.4),
        ("hue", -0.125, 0.125),
    ]:
        v = (values_drawn(plan, name) - low) / (high - low)
        assert len(v) == n
        assert v.min() >= 0
        assert v.max() <= 1
        assert torch.histc(v, 10, 0, 1).div(n).sub(0.1).abs().max() < 0.02
    plan = draw_colour_jitter(BatchRandom.of(seeded(), 100))
    images = pictures(100, 3, 16, 16)
    expected = images.clone()
    for operations, values in zip(plan.operations, plan.values, strict=True):
        for i, (operation, value) in enumerate(zip(operations, values, strict=True)):
            expected[i : i + 1] = operate(OPERATIONS[operation], expected[i : i + 1], value.view(1))
    assert torch.equal(randaugment.apply(images, plan), expected)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (33, 33), (20, 31)])
def test_augmentations_keep_shape_are_seeded_and_draw_per_image(name, channels, size):
    image = torch.randint(0, 256, (1, channels, *size), dtype=torch.uint8, generator=seeded())
    images = image.repeat(16, 1, 1, 1)
    first, again, other = (AUGMENTATIONS[name](images, seeded(s)) for s in (0, 0, 1))
    assert torch.equal(images, image.repeat(16, 1, 1, 1))  # untouched
    assert first.shape == images.shape
    assert first.dtype == (torch.float32 if name.startswith("digits") else torch.uint8)
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({x.numpy().tobytes() for x in first}) > 4  # not one draw for the batch


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
def test_how_the_images_lie_in_memory_does_not_matter(name):
    images = pictures(24, 3, 32, 28)
    expected = AUGMENTATIONS[name](images, seeded())
    for other in (
        images.contiguous(memory_format=torch.channels_last),
        images.transpose(2, 3).contiguous().transpose(2, 3),
        images.repeat_interleave(2, 0)[::2],
        torch.cat([images, images], 3)[..., :28],
    ):
        torch.testing.assert_close(AUGMENTATIONS[name](other, seeded()), expected)


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [0, 1])
def test_no_image_and_one_image(name, channels, n):
    images = pictures(n, channels, 16, 12)
    assert AUGMENTATIONS[name](images, seeded()).shape == images.shape


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_is_read_back_from_the_images_device(name, channels):
    """On the meta device, which holds no values: reading one back, or a tensor left on the CPU, raises."""
    images = torch.empty(64, channels, 20, 31, dtype=torch.uint8, device="meta")
    out = AUGMENTATIONS[name](images, seeded())
    assert out.device.type == "meta"
    assert out.shape == images.shape


def test_operations_take_no_images():
    empty = torch.empty(0, 3, 16, 12, dtype=torch.uint8)
    for name in VALUES:
        assert operate(name, empty, torch.empty(0)).shape == empty.shape
    assert pillow_operations.hue(empty, torch.empty(0)).shape == empty.shape


def test_digits_views_have_not_changed():
    """They have trained published results: sums of what they gave before (torch 2.14, CPU)."""
    images = torch.arange(4 * 8 * 8).remainder(256).to(torch.uint8).view(4, 1, 8, 8)
    weak, hard = (AUGMENTATIONS[name](images, seeded(3)) for name in ("digits_weak", "digits_hard"))
    torch.testing.assert_close(
        weak.sum((1, 2, 3)), torch.tensor([6.94342, 17.18414, 36.18629, 50.86357]), rtol=1e-4, atol=1e-3
    )
    torch.testing.assert_close(
        hard.sum((1, 2, 3)), torch.tensor([7.6775, 12.49902, 46.84156, 35.61283]), rtol=1e-4, atol=1e-3
    )


def test_affine_turns_scales_and_shifts_the_content():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 6] = 1  # right of the centre
    zero, one = torch.zeros(1), torch.ones(1)

    def peak(*parameters):
        y, x = divmod(int(affine(image, *parameters).argmax()), 9)
        return y, x

    assert peak(zero, one, zero, zero, zero) == (4, 6)
    assert peak(torch.tensor([torch.pi / 2]), one, zero, zero, zero) == (2, 4)  # counter-clockwise: up
    assert peak(zero, one * 2, zero, zero, zero) == (4, 8)
    assert peak(zero, one, zero, torch.tensor([1 / 9]), torch.tensor([-2 / 9])) == (2, 7)


def test_what_follows_a_weak_view_is_an_augmentation():
    assert set(AFTER_WEAK) < set(AUGMENTATIONS)

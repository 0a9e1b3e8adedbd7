"""Order, splits, augmentation and views."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from muscle_plugin.data.augment import AUGMENTATIONS, affine, crop_flip, cutout, to_float
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.sources import DataError, digits, load_source
from muscle_plugin.data.splits import balanced_split
from muscle_plugin.data.views import LABELLED, UNLABELLED, WEAK, Batches, View, quarter_turns, views_of

CIFAR = Path(os.environ.get("CIFAR_DIR", ROOT / "data"))
needs_cifar = pytest.mark.skipif(
    not (CIFAR / "cifar-10-batches-py").is_dir(), reason=f"CIFAR-10's files are not in {CIFAR} (set CIFAR_DIR)"
)
CPU = torch.device("cpu")


def batches(
    parameters=("x_lb", "y_lb", "x_ulb_w", "x_ulb_s", "idx_lb", "idx_ulb"), usb_name="fixmatch", seed=0, channels=1
):
    source = digits(Path())
    split = balanced_split(source.train_labels, 20, 10, seed, include_labelled=False)
    return Batches(source, split, 4, 6, parameters, usb_name, "digits_weak", "digits_hard", channels, seed, CPU)


@pytest.mark.parametrize(("n", "batch"), [(10, 3), (7, 7), (3, 8), (1, 5), (1437, 64)])
def test_every_index_once_per_pass_and_equally_often(n, batch):
    stream = IndexStream(n, batch, seed=0, name="x")
    steps = 4 * n
    seen = torch.cat([stream.batch(t) for t in range(steps)])
    for k in range(len(seen) // n):
        assert sorted(seen[k * n : (k + 1) * n].tolist()) == list(range(n))


def test_a_batch_depends_on_seed_and_step_alone():
    a, b = IndexStream(50, 8, 0, "x"), IndexStream(50, 8, 0, "x")
    for t in range(40):
        a.batch(t)
    assert torch.equal(a.batch(3), b.batch(3))
    assert not torch.equal(IndexStream(50, 8, 1, "x").batch(3), b.batch(3))
    assert not torch.equal(IndexStream(50, 8, 0, "y").batch(3), b.batch(3))


def test_split_is_balanced_disjoint_complete_and_seeded():
    labels = digits(Path()).train_labels
    split = balanced_split(labels, 40, 10, 0, include_labelled=False)
    assert torch.bincount(labels[split.labelled]).tolist() == [4] * 10
    assert sorted(torch.cat([split.labelled, split.unlabelled]).tolist()) == list(range(len(labels)))
    assert torch.equal(split.labelled, balanced_split(labels, 40, 10, 0, False).labelled)
    assert not torch.equal(split.labelled, balanced_split(labels, 40, 10, 1, False).labelled)
    assert len(balanced_split(labels, 40, 10, 0, include_labelled=True).unlabelled) == len(labels)


def test_impossible_splits_say_so():
    labels = digits(Path()).train_labels
    with pytest.raises(DataError, match="cannot be shared equally by 10"):
        balanced_split(labels, 15, 10, 0, False)
    with pytest.raises(DataError, match=r"1000 labels per class asked for, but class \d has \d+ images"):
        balanced_split(labels, 10_000, 10, 0, False)
    with pytest.raises(DataError, match="leaves no unlabelled image"):
        balanced_split(torch.tensor([0, 1]), 2, 2, 0, False)


def test_digits_division_is_fixed_stratified_and_disjoint():
    source = digits(Path())
    assert (len(source.train), len(source.test)) == (1437, 360)
    counts = torch.bincount(source.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert source.train.dtype == torch.uint8
    assert source.train.max() == 255


@pytest.mark.parametrize("name", sorted(AUGMENTATIONS))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [8, 32, 33])
def test_augmentations_keep_shape_are_seeded_and_draw_per_image(name, channels, size):
    image = torch.randint(
        0, 256, (1, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    images = image.repeat(16, 1, 1, 1)
    first, again, other = (AUGMENTATIONS[name](images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len({x.numpy().tobytes() for x in first}) > 4  # not one draw for the batch


def test_crop_flip_moves_whole_pixels_and_reflects():
    """Each result is one of the 2 x 9 x 9 crops of the reflected image, flipped or not."""
    image = torch.arange(32 * 32, dtype=torch.int64).remainder(251).to(torch.uint8).view(1, 1, 32, 32)
    padded = torch.nn.functional.pad(image.float(), (4, 4, 4, 4), mode="reflect") / 255
    crops = {
        torch.flip(crop, (2,)).numpy().tobytes() if flip else crop.numpy().tobytes(): (dy, dx, flip)
        for dy in range(9)
        for dx in range(9)
        for flip in (False, True)
        for crop in [padded[0, :, dy : dy + 32, dx : dx + 32].contiguous()]
    }
    out = crop_flip(image.repeat(300, 1, 1, 1), torch.Generator().manual_seed(0))
    drawn = [crops[x.contiguous().numpy().tobytes()] for x in out]
    assert {d[0] for d in drawn} == {d[1] for d in drawn} == set(range(9))
    assert 100 < sum(d[2] for d in drawn) < 200


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


def test_cutout_fills_one_square():
    out = cutout(torch.ones(50, 2, 16, 16), 0.25, torch.Generator().manual_seed(0))
    for image in out:
        assert torch.equal(image[0], image[1])
        rows, columns = (image[0] == 0).any(1).sum(), (image[0] == 0).any(0).sum()
        assert (image[0] == 0).sum() == rows * columns <= 16


def test_views_are_read_off_the_parameters():
    assert views_of(["x_lb", "y_lb", "x_ulb_w", "x_ulb_s"], "fixmatch")["x_ulb_s"].strength == "hard"
    assert views_of(["x_lb", "y_lb", "x_ulb_w", "x_ulb_s"], "meanteacher")["x_ulb_s"] == View(UNLABELLED, WEAK)
    with pytest.raises(DataError, match="asks for 'x_ulb_new'"):
        views_of(["x_lb", "x_ulb_new"], "mine")


def test_a_view_does_not_depend_on_which_others_are_made():
    few, many = batches(("x_lb", "y_lb", "x_ulb_w")), batches()
    a, b = few.batch(5), many.batch(5)
    assert set(a) == {"x_lb", "y_lb", "x_ulb_w"}
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_batches_hold_the_images_that_their_indices_name():
    b = batches()
    batch = b.batch(2)
    assert (len(batch["x_lb"]), len(batch["x_ulb_w"])) == (4, 6)
    assert torch.equal(batch["y_lb"], b._labels[batch["idx_lb"]])
    plain = b.normalise(to_float(b._images[LABELLED][batch["idx_lb"]])).flatten(1)
    distance = torch.cdist(plain, batch["x_lb"].flatten(1))
    assert (distance.argmin(0) == torch.arange(4)).float().mean() >= 0.75


def test_rotations_come_with_their_labels():
    x = torch.rand(8, 1, 4, 4)
    turns = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for image, k, turned in zip(x, turns, quarter_turns(x, turns), strict=True):
        assert torch.equal(turned, torch.rot90(image, int(k), (1, 2)))
    b = batches(("x_lb", "y_lb", "x_ulb_w", "x_ulb_s_0", "x_ulb_s_1", "x_ulb_s_0_rot", "rot_v"), "remixmatch").batch(0)
    assert torch.equal(quarter_turns(b["x_ulb_s_0"], b["rot_v"]), b["x_ulb_s_0_rot"])


def test_one_channel_serves_nets_of_three_and_not_the_reverse():
    assert batches(channels=3).batch(0)["x_lb"].shape[1] == 3
    source = digits(Path())
    colour = type(source)(source.train.repeat(1, 3, 1, 1), *list(vars(source).values())[1:])
    from muscle_plugin.data.views import normaliser

    with pytest.raises(DataError, match=r"takes 1 channel\(s\), but the images have 3"):
        normaliser(colour, 1, CPU)


def test_a_cifar_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(DataError, match=r"not a file of cifar10 \(refused .*system\)"):
        load_source("cifar10", tmp_path, 32)
    assert not (tmp_path / "ran").exists()


@needs_cifar
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_whole(name, classes):
    source = load_source(name, CIFAR, 32)
    assert (source.train.shape, source.test.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert torch.bincount(source.train_labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(source.test_labels).tolist() == [10_000 // classes] * classes
    assert len(source.classes) == classes


@needs_cifar
def test_cifar_trains(short_run):
    settings = {"dataset": "cifar10", "num_labels": 40, "img_size": 32, "data_dir": str(CIFAR), "num_train_iter": 2}
    assert short_run(algorithm="muscle_fixmatch", **settings)["complete"]

"""Order, splits, views, and where the images of a step come from."""

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, SHORT
from hypothesis import assume, given
from hypothesis import strategies as st

from muscle_plugin.data.augment import augmentation
from muscle_plugin.data.batches import Batches, quarter_turns
from muscle_plugin.data.datasets.digits import digits
from muscle_plugin.data.load import choose_split, load_data
from muscle_plugin.data.loader import Ahead, Parcel, ResidentImages, StreamedImages, fits
from muscle_plugin.data.normalise import Normaliser, pixel_statistics
from muscle_plugin.data.sampler import IndexStream
from muscle_plugin.data.source import Source, SourceOptions
from muscle_plugin.data.splits import draw_split, read_split, write_split
from muscle_plugin.data.views import MEDIUM, STRONG, UNLABELLED, WEAK, View, views_of
from muscle_plugin.errors import DataError

CPU = torch.device("cpu")
DIGITS = digits(SourceOptions(Path(), 8))


def batches(
    parameters=("x_lb", "y_lb", "x_ulb_w", "x_ulb_s", "idx_lb", "idx_ulb"), usb_name="fixmatch", seed=0, channels=1,
    weak="digits_weak", hard="digits_hard", **more,
):  # fmt: skip
    split = draw_split(DIGITS, 20, seed)
    return Batches(DIGITS, split, 4, 6, parameters, usb_name, weak, hard, channels, seed, CPU, **more)


def toy(labels, subclasses=None, images=None):
    """A source of blank images with these labels; all are for training."""
    labels = torch.tensor(labels)
    count = len(labels)
    fine = None if subclasses is None else torch.tensor(subclasses)
    names = () if fine is None else tuple(f"s{i}" for i in range(int(fine.max()) + 1))
    pool = torch.zeros(count, 1, 8, 8, dtype=torch.uint8) if images is None else images
    classes = tuple("abcdefghij"[: int(labels.max()) + 1])
    return Source(pool, labels, torch.arange(count), torch.empty(0, dtype=torch.int64), classes, fine, names)


# --------------------------------------------------------------------------------------------------------------- order


@given(st.integers(1, 60), st.integers(1, 40))
def test_every_index_once_per_pass_and_equally_often(n, batch):
    stream = IndexStream(n, batch, seed=0, name="x")
    seen = torch.cat([stream.batch(t) for t in range(3 * n)])
    for k in range(len(seen) // n):
        assert sorted(seen[k * n : (k + 1) * n].tolist()) == list(range(n))


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 5), st.integers(0, 50))
def test_the_parts_of_several_processes_are_the_batch_of_one(n, batch, world, step):
    parts = [IndexStream(n, batch, 3, "x", rank, world).batch(step) for rank in range(world)]
    assert torch.equal(torch.cat(parts), IndexStream(n, batch, 3, "x").batch(step))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_processes_see_disjoint_images_within_a_pass():
    parts = [torch.cat([IndexStream(64, 16, 0, "x", rank, 2).batch(t) for t in range(4)]) for rank in range(2)]
    assert sorted(torch.cat(parts).tolist()) == list(range(64))


def test_a_batch_depends_on_seed_and_step_alone():
    a, b = IndexStream(50, 8, 0, "x"), IndexStream(50, 8, 0, "x")
    for t in range(40):
        a.batch(t)
    assert torch.equal(a.batch(3), b.batch(3))
    assert not torch.equal(IndexStream(50, 8, 1, "x").batch(3), b.batch(3))
    assert not torch.equal(IndexStream(50, 8, 0, "y").batch(3), b.batch(3))


@pytest.mark.parametrize(("ratio", "sizes"), [(0.5, (64, 32)), (1, (48, 48)), (3, (24, 72)), (7, (12, 84))])
def test_an_epoch_is_one_pass_over_the_unlabelled_images(build_short, ratio, sizes):
    algorithm = build_short(algorithm="flexmatch", total_batch=96, ratio=ratio, num_train_iter=None, epoch=1)
    assert algorithm.batch_sizes == sizes
    seen = torch.cat([algorithm.batches.batch(t)["idx_ulb"] for t in range(algorithm.num_train_iter)])
    assert len(seen.unique()) >= min(1427, len(seen))
    assert abs(len(seen) - 1427) <= sizes[1] / 2


# -------------------------------------------------------------------------------------------------------------- splits


def test_split_is_balanced_disjoint_complete_and_seeded():
    labels = DIGITS.train_labels
    split = draw_split(DIGITS, 40, 0)
    assert torch.bincount(labels[split.labelled]).tolist() == [4] * 10
    assert sorted(torch.cat([split.labelled, split.unlabelled]).tolist()) == list(range(len(labels)))
    assert torch.equal(split.labelled, draw_split(DIGITS, 40, 0).labelled)
    assert not torch.equal(split.labelled, draw_split(DIGITS, 40, 1).labelled)
    assert len(draw_split(DIGITS, 40, 0, include_labelled=True).unlabelled) == len(labels)


@pytest.mark.parametrize(
    ("classes", "counts"),
    [(10, (40, 100, 250, 500, 1000, 4000)), (100, (100, 400, 500, 2500, 4000, 10_000))],
)
def test_every_count_of_the_paper_and_of_usbs_tables(classes, counts):
    source = Source(
        torch.empty(0), torch.arange(50_000) % classes, torch.arange(50_000), torch.empty(0, dtype=torch.int64),
        tuple(map(str, range(classes))),
    )  # fmt: skip
    for count in counts:
        split = draw_split(source, count, 0)
        assert torch.bincount(source.labels[split.labelled]).tolist() == [count // classes] * classes
        assert len(split.unlabelled) == 50_000 - count


def test_impossible_splits_say_so():
    with pytest.raises(DataError, match=r"\b15 .*\b10\b"):
        draw_split(DIGITS, 15, 0)
    with pytest.raises(DataError, match=r"\b1000 .*class '\d'.* 1\d\d\b"):
        draw_split(DIGITS, 10_000, 0)
    with pytest.raises(DataError, match="class '5'"):
        draw_split(DIGITS, 20, 0, imbalance=1000)
    with pytest.raises(DataError, match="subclasses.*cifar20"):
        draw_split(DIGITS, 20, 0, sequestered=1)


def test_images_without_a_label_are_never_labelled_and_always_unlabelled():
    split = draw_split(toy([0, -1, 1, -1, 0, 1]), 2, 0)
    assert {1, 3} <= set(split.unlabelled.tolist())
    everything = draw_split(toy([0, -1, 1, -1, 0, 1]), None, 0)
    assert everything.labelled.tolist() == [0, 2, 4, 5]
    assert everything.unlabelled.tolist() == [1, 3]


@given(st.integers(10, 400), st.floats(1.01, 20))
def test_biased_labels_fall_geometrically_and_add_up(num_labels, ratio):
    source = toy([*range(4)] * 400)
    exact = num_labels * ratio ** -torch.linspace(0, 1, 4).double()
    exact /= (ratio ** -torch.linspace(0, 1, 4).double()).sum()
    assume(exact.min() >= 1)
    split = draw_split(source, num_labels, 0, imbalance=ratio)
    counts = torch.bincount(source.train_labels[split.labelled]).double()
    assert int(counts.sum()) == num_labels
    assert counts.tolist() == sorted(counts.tolist(), reverse=True)
    assert (counts - exact).abs().max() < 1


def test_sequestered_subclasses_give_no_labels_but_stay_unlabelled():
    fine = [c * 5 + s for c in range(3) for s in range(5) for _ in range(6)]
    source = toy([f // 5 for f in fine], fine)
    split = draw_split(source, 24, seed=0, sequestered=1)
    assert [s // 5 for s in split.sequestered] == [0, 1, 2]
    per_subclass = torch.bincount(source.subclasses[split.labelled], minlength=15)
    assert all(per_subclass[s] == (0 if s in split.sequestered else 2) for s in range(15))
    assert set(split.sequestered) <= set(source.subclasses[split.unlabelled].tolist())
    assert len({draw_split(source, 24, seed, sequestered=1).sequestered for seed in range(8)}) > 4
    with pytest.raises(DataError, match="one must remain"):
        draw_split(source, 24, 0, sequestered=5)


def test_a_split_file_gives_the_split_back(tmp_path):
    fine = [c * 5 + s for c in range(3) for s in range(5) for _ in range(6)]
    source = toy([f // 5 for f in fine], fine)
    split = draw_split(source, 12, 4, sequestered=1)
    write_split(tmp_path / "s.json", split, source, seed=4)
    read = read_split(tmp_path / "s.json", source, include_labelled=False)
    assert torch.equal(read.labelled, split.labelled)
    assert torch.equal(read.unlabelled, split.unlabelled)
    assert read.sequestered == split.sequestered
    assert len(read_split(tmp_path / "s.json", source, include_labelled=True).unlabelled) == 90
    assert json.loads((tmp_path / "s.json").read_text())["labels_per_class"] == {"a": 4, "b": 4, "c": 4}
    np.save(tmp_path / "lb.npy", split.labelled.numpy())  # as USB writes them
    assert torch.equal(read_split(tmp_path / "lb.npy", source, False).labelled, split.labelled)


def test_unfit_split_files_say_so(tmp_path):
    path = tmp_path / "s.json"
    write_split(path, draw_split(DIGITS, 20, 0), DIGITS)
    with pytest.raises(DataError, match=r"s\.json: .*other training images"):
        read_split(path, toy([0, 1, 0, 1]), False)
    good = json.loads(path.read_text())
    for change, message in [
        ({"labelled": [0, 1]}, r"class '\d'"),
        ({"labelled": [0, 10**6]}, r"\b0 .*\b1436\b"),
        ({"labelled": good["labelled"] * 2}, "differ"),
        ({"labelled": ["0"]}, "indices"),
        ({"format": 99}, "this package"),
    ]:
        path.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=message):
            read_split(path, DIGITS, False)
    for content in ("", "[]", "{", '{"format": 1}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"s\.json: .*read"):
            read_split(path, DIGITS, False)
    with pytest.raises(DataError, match=r"absent\.json: .*read"):
        read_split(tmp_path / "absent.json", DIGITS, False)


def test_a_run_leaves_its_split_and_another_takes_it(short_run, tmp_path):
    short_run(algorithm="fixmatch", seed=3, save_name="a")
    split = tmp_path / "a" / "split.json"
    short_run(algorithm="fixmatch", seed=8, split_file=str(split), save_name="b")
    labelled = [json.loads((tmp_path / n / "split.json").read_text())["labelled"] for n in "ab"]
    assert labelled[0] == labelled[1]
    short_run(algorithm="fixmatch", seed=8, split_seed=3, save_name="c")
    assert json.loads((tmp_path / "c" / "split.json").read_text())["labelled"] == labelled[0]


def test_a_split_file_that_contradicts_num_labels_is_refused(build_short, tmp_path):
    write_split(tmp_path / "s.json", draw_split(DIGITS, 20, 0), DIGITS)
    with pytest.raises(DataError, match=r"s\.json .*\b20 .*num_labels .*\b10\b"):
        build_short(split_file=str(tmp_path / "s.json"), num_labels=10)


def test_a_run_whose_data_changed_does_not_go_on(short_run, tmp_path):
    short_run(algorithm="fixmatch", save_name="a")
    file = tmp_path / "a" / "split.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"fingerprint": "0" * 16}))
    with pytest.raises(DataError, match=r"split\.json: .*other training images"):
        short_run(algorithm="fixmatch", save_name="a", resume="yes")


# --------------------------------------------------------------------------------------------------------------- views


def test_views_are_read_off_the_parameters():
    assert views_of(["x_lb", "y_lb", "x_ulb_w", "x_ulb_s"], "fixmatch")["x_ulb_s"].strength == STRONG
    assert views_of(["x_lb", "y_lb", "x_ulb_w", "x_ulb_s"], "meanteacher")["x_ulb_s"] == View(UNLABELLED, WEAK)
    with pytest.raises(DataError, match="mine.*'x_ulb_new'"):
        views_of(["x_lb", "x_ulb_new"], "mine")


def test_the_medium_view_is_one_operation_of_randaugment():
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    source = toy([0, 1] * 100, images=images)
    split = draw_split(source, 4, 0)
    names = ("x_ulb_w", "x_ulb_m", "x_ulb_s")

    def of(ops, hard="randaugment_usb"):
        return Batches(source, split, 2, 64, names, "x", "crop_flip", hard, 3, 0, CPU, strong_ops=ops).batch(0)

    assert views_of(names, "sequencematch")["x_ulb_m"] == View(UNLABELLED, MEDIUM)
    one, three = of(1), of(None)
    assert torch.equal(one["x_ulb_m"], three["x_ulb_m"])
    assert not torch.equal(one["x_ulb_s"], three["x_ulb_s"])
    plain = of(None, "iic")  # draws no operations
    assert not torch.equal(plain["x_ulb_m"], plain["x_ulb_w"])
    assert not torch.equal(plain["x_ulb_m"], plain["x_ulb_s"])


def test_a_view_does_not_depend_on_which_others_are_made():
    few, many = batches(("x_lb", "y_lb", "x_ulb_w")), batches()
    a, b = few.batch(5), many.batch(5)
    assert set(a) == {"x_lb", "y_lb", "x_ulb_w"}
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_batches_hold_the_images_that_their_indices_name():
    b = batches()
    split = draw_split(DIGITS, 20, 0)
    batch = b.batch(2)
    assert (len(batch["x_lb"]), len(batch["x_ulb_w"])) == (4, 6)
    members = DIGITS.train[split.labelled][batch["idx_lb"]]
    assert torch.equal(batch["y_lb"], DIGITS.labels[members])
    distance = torch.cdist(b.normalise(DIGITS.images[members]).flatten(1), batch["x_lb"].flatten(1))
    assert (distance.argmin(0) == torch.arange(4)).float().mean() >= 0.75


def test_v_draws_of_a_view_differ_and_randaugment_follows_the_weak_view():
    images = torch.randint(0, 256, (200, 3, 32, 32), dtype=torch.uint8)
    source = toy([0, 1] * 100, images=images)
    b = Batches(source, draw_split(source, 4, 0), 2, 6, ("x_lb", "x_ulb_w"), "x", "crop_flip", "randaugment", 3, 0, CPU)
    b.add_views({"x_ulb_h": View(UNLABELLED, STRONG, 3)})
    first, second, third = b.batch(0)["x_ulb_h"].chunk(3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)

    blank = torch.full((64, 1, 16, 16), 100, dtype=torch.uint8)
    blank[:, :, :, :4] = 255  # a bar that crop_flip moves
    after = augmentation("randaugment", augmentation("crop_flip"))(blank, torch.Generator().manual_seed(0))
    alone = augmentation("randaugment")(blank, torch.Generator().manual_seed(0))
    assert not torch.equal(after, alone)
    assert after.dtype == torch.uint8


def test_unknown_augmentations_and_operations_say_so():
    with pytest.raises(DataError, match="'blur'.* crop_flip"):
        augmentation("blur")
    with pytest.raises(DataError, match="iic .*operations"):
        augmentation("iic", ops=2)


def test_rotations_come_with_their_labels():
    x = torch.rand(8, 1, 4, 4)
    turns = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
    for image, k, turned in zip(x, turns, quarter_turns(x, turns), strict=True):
        assert torch.equal(turned, torch.rot90(image, int(k), (1, 2)))
    b = batches(("x_lb", "y_lb", "x_ulb_w", "x_ulb_s_0", "x_ulb_s_1", "x_ulb_s_0_rot", "rot_v"), "remixmatch").batch(0)
    assert torch.equal(quarter_turns(b["x_ulb_s_0"], b["rot_v"]), b["x_ulb_s_0_rot"])


@pytest.mark.parametrize("world", [2, 3])
def test_crmatchs_turned_images_are_the_same_for_any_number_of_processes(world):
    names = ("x_lb", "y_lb", "x_ulb_w", "x_ulb_s", "x_ulb_rot", "rot_v")
    split = draw_split(DIGITS, 20, 0)
    shared = (DIGITS, split, 6, 18, names, "crmatch", "digits_weak", "digits_hard", 1, 0, CPU)
    one, parts = (
        [Batches(*shared, rank=r, world=w).batch(3)["x_ulb_rot"].unflatten(0, (4, 6 // w)) for r in range(w)]
        for w in (1, world)
    )
    assert torch.equal(torch.cat(parts, 1), one[0])
    assert torch.equal(one[0][2], torch.rot90(one[0][0], 2, (2, 3)))


def test_pixels_are_normalised_whether_bytes_or_fractions():
    images = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    mean, std = pixel_statistics(toy([0, 1, 2] * 100, images=images))
    plain = images.double() / 255
    assert torch.allclose(mean.double(), plain.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(std.double(), plain.std((0, 2, 3), correction=0), atol=1e-6)
    normalise = Normaliser(mean, std, 3, CPU)
    assert torch.allclose(normalise(images), normalise(images.float() / 255), atol=1e-5)
    assert normalise(images).mean((0, 2, 3)).abs().max() < 1e-4


def test_one_channel_serves_nets_of_three_and_not_the_reverse():
    assert batches(channels=3).batch(0)["x_lb"].shape[1] == 3
    with pytest.raises(DataError, match=r"\b1 channel.*\b3\b"):
        Normaliser(torch.zeros(3), torch.ones(3), 1, CPU)


# -------------------------------------------------------------------------------------------------- device and streams


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_are_those_of_the_device(workers):
    members = {"a": torch.tensor([3, 1, 4]), "b": torch.arange(5, 20)}
    images = torch.randint(0, 256, (20, 1, 4, 4), dtype=torch.uint8)

    order = {k: IndexStream(len(m), 4, 0, k) for k, m in members.items()}
    resident = ResidentImages(images, members, CPU)
    streamed = StreamedImages(images, members, order, CPU, workers)
    for step in (0, 1, 2, 2, 3, 0, 7, 8):  # a trial step is made twice, a resumed run starts anywhere
        index = {k: stream.batch(step) for k, stream in order.items()}
        for kind, i in index.items():
            expected = images[members[kind][i]]
            for source in (resident, streamed):
                assert torch.equal(source.of_step(step)[source.rows(index)[kind]], expected)


def test_where_the_images_live_changes_no_weight(short_run, tmp_path):
    for where in ("device", "host"):
        short_run(algorithm="muscle_fixmatch", data_on=where, num_workers=1, save_name=where)
    a, b = (torch.load(tmp_path / w / "latest_model.pth", weights_only=True)["model"] for w in ("device", "host"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_images_are_gathered_where_there_is_no_shared_memory(tmp_path):
    """A container's /dev/shm may be small, or full."""
    own = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=4k,nr_inodes=1 tmpfs /dev/shm"
    if shutil.which("unshare") is None or subprocess.run([*own, mount], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    settings = SHORT | {"data_on": "host", "num_workers": 2, "save_dir": tmp_path, "save_name": "r"}
    words = [str(w) for k, v in settings.items() for w in (f"--{k}", v)]
    train = shlex.join([sys.executable, "-m", "muscle_plugin.cli", "train", *words])
    done = subprocess.run([*own, f"{mount} && exec {train}"], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_streaming_draws_nothing_from_the_generators_of_training():
    before = torch.get_rng_state()
    images = torch.zeros(4, 1, 4, 4, dtype=torch.uint8)
    StreamedImages(images, {"a": torch.arange(4)}, {"a": IndexStream(4, 2, 0, "a")}, CPU, 1).of_step(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_set_larger_than_the_machine_does_not_fit():
    assert fits(torch.zeros(10, dtype=torch.uint8), CPU)
    assert not fits(torch.zeros(1, dtype=torch.uint8).expand(2**50), CPU)


def test_what_is_drawn_ahead_is_what_would_be_drawn_in_the_step():
    made, drawn = batches(), []

    def draw(step):
        drawn.append(step)
        return made._draw(step)

    made._drawn = ahead = Ahead(draw, CPU)
    plain = batches()

    def same(step):
        there, here = made.batch(step), plain.batch(step)
        assert there.keys() == here.keys()
        assert all(torch.equal(there[k], here[k]) for k in here)

    same(0)
    ahead._drawn[1].result(60)
    assert drawn == [0, 1]
    for step in (1, 2, 7, 8, 3):  # in order, elsewhere, and going back
        same(step)
    for b in (made, plain):  # the views of a step change, and with them what it draws
        b.add_views({"x_ulb_h": View(UNLABELLED, STRONG, 3)})
    same(4)


def test_a_fault_in_drawing_ahead_comes_up_in_its_step():
    def draw(step):
        if step == 1:
            raise DataError("no step 1")
        return step

    ahead = Ahead(draw, CPU)
    assert ahead(0) == 0
    with pytest.raises(DataError, match="no step 1"):
        ahead(1)
    assert ahead(2) == 2


def test_tensors_of_a_parcel_arrive_as_they_were():
    tensors = {
        "a": torch.tensor([3, 4]), "b": torch.tensor([[True], [False], [True]]), "none": torch.empty(0, 2),
        "c": torch.linspace(0, 1, 5), "d": torch.arange(12, dtype=torch.int32).view(3, 4).t(),
    }  # fmt: skip
    there = Parcel(tensors, CPU).unpack()
    assert list(there) == list(tensors)
    for name, t in tensors.items():
        assert (there[name].dtype, there[name].shape) == (t.dtype, t.shape)
        assert torch.equal(there[name], t)
    assert {t.device.type for t in Parcel(tensors, torch.device("meta")).unpack().values()} == {"meta"}
    assert Parcel({}, CPU).unpack() == {}


# ------------------------------------------------------------------------------------------------------- from settings


def asked(**changed):
    """Settings that say which data are read."""
    settings = {
        "dataset": "digits", "data_dir": ".", "img_size": 8, "num_classes": None, "labels_csv": None,
        "skip_bad_images": False, "allow_outside": False, "cache_dir": None, "save_dir": "runs", "num_labels": 20,
        "seed": 0, "split_seed": None, "split_file": None, "include_lb_to_ulb": False, "lb_imb_ratio": 1.0,
        "sequestered": 0, "pixel_range": None, "algorithm": "fixmatch",
    }  # fmt: skip
    return SimpleNamespace(**{**settings, **changed})


def test_only_algorithms_that_see_unlabelled_images_need_some(tmp_path):
    source = toy([0, 1, 0, 1])
    assert len(choose_split(asked(num_labels=2), source).unlabelled) == 2
    with pytest.raises(DataError, match="all 4 training images are labelled.*--num_labels"):
        choose_split(asked(num_labels=4), source)
    split = choose_split(asked(num_labels=4, algorithm="supervised"), source)
    assert split.unlabelled.tolist() == [0, 1, 2, 3]
    write_split(tmp_path / "s.json", split, source)
    again = choose_split(asked(num_labels=4, algorithm="supervised", split_file=str(tmp_path / "s.json")), source)
    assert torch.equal(again.unlabelled, split.unlabelled)


def test_data_are_loaded_from_settings_which_stay_as_they_are():
    settings = asked()
    source = load_data(settings)
    assert torch.equal(source.images, DIGITS.images)
    assert torch.equal(choose_split(settings, source).labelled, draw_split(DIGITS, 20, 0).labelled)
    assert settings == asked()
    split = choose_split(asked(seed=7, split_seed=3), source)
    assert torch.equal(split.labelled, draw_split(DIGITS, 20, 3).labelled)


def test_data_that_contradict_the_settings_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"^num_classes: digits .*\b10 .*\b7\b"):
        load_data(asked(num_classes=7))
    write_split(tmp_path / "s.json", draw_split(DIGITS, 20, 0), DIGITS)
    with pytest.raises(DataError, match=r"^split_file: .*s\.json .*\b20 .*num_labels .*\b10\b"):
        choose_split(asked(split_file=str(tmp_path / "s.json"), num_labels=10), DIGITS)


def test_the_table_of_views_needs_no_pytorch():
    code = "import sys, muscle_plugin.data.views; assert not {'torch', 'semilearn'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)

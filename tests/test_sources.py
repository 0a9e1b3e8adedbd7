"""Data sets read from files: the formats of torchvision, image folders, tables, Mini-ImageNet, and packed arrays."""

import codecs
import io
import os
import pickle
import re
import stat
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from scipy.io import savemat

from muscle_plugin.data import images as image_files
from muscle_plugin.data.datasets import READERS, load_source
from muscle_plugin.data.datasets.digits import digits
from muscle_plugin.data.datasets.image_folder import image_folder
from muscle_plugin.data.datasets.miniimagenet import miniimagenet
from muscle_plugin.data.images import PixelRange, decode, find_images
from muscle_plugin.data.packed import pack
from muscle_plugin.data.source import SourceOptions
from muscle_plugin.errors import DataError

CIFAR = Path(os.environ.get("CIFAR_DIR", ROOT / "data"))
needs_cifar = pytest.mark.skipif(
    not all((CIFAR / name).is_dir() for name in ("cifar-10-batches-py", "cifar-100-python")),
    reason=f"CIFAR's files are not in {CIFAR} (set CIFAR_DIR)",
)
RNG = np.random.default_rng(0)


def options(folder, size=32, **more):
    return SourceOptions(Path(folder), size, cache_dirs=[Path(folder) / ".packed"], **more)


# ------------------------------------------------------------------------------------------------------------- digits


def test_digits_division_is_fixed_stratified_and_disjoint():
    source = digits(options("."))
    assert (len(source.train), len(source.test)) == (1437, 360)
    assert sorted(torch.cat([source.train, source.test]).tolist()) == list(range(1797))
    counts = torch.bincount(source.test_labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    assert source.images.dtype == torch.uint8
    assert source.images.max() == 255


@pytest.mark.parametrize("size", [5, 16])
def test_resizing_agrees_with_pillow(size):
    small, other = digits(options(".")), load_source("digits", options(".", size))
    assert other.images.shape == (1797, 1, size, size)
    for i in (0, 1100, 1796):
        expected = Image.fromarray(small.images[i, 0].numpy()).resize((size, size), Image.Resampling.BILINEAR)
        assert np.abs(np.asarray(expected).astype(int) - other.images[i, 0].numpy()).max() <= 1


# -------------------------------------------------------------------------------------------------------------- CIFAR


def write_cifar10(folder, count=4, protocol=2):
    """CIFAR-10's files with ``count`` random images each, and what they hold."""
    folder.mkdir(parents=True)
    parts = {}
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        data = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
        labels = RNG.integers(0, 10, count).tolist()
        parts[name] = (data, labels)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol=protocol))
    meta = {"label_names": [f"class {i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=protocol))
    return parts


@pytest.mark.parametrize("place", ["", "cifar10"])
def test_cifar10_is_read_where_torchvision_or_usb_keeps_it(tmp_path, place):
    parts = write_cifar10(tmp_path / place / "cifar-10-batches-py")
    source = load_source("cifar10", options(tmp_path))
    expected = np.concatenate([data for data, _ in parts.values()]).reshape(-1, 3, 32, 32)
    assert torch.equal(source.images, torch.from_numpy(expected))
    assert source.labels.tolist() == [y for _, labels in parts.values() for y in labels]
    assert (source.train.tolist(), source.test.tolist()) == (list(range(20)), [20, 21, 22, 23])
    assert source.classes[3] == "class 3"


def test_damaged_cifar_files_are_named(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    whole = (folder / "data_batch_3").read_bytes()
    for content, message in [
        (whole[:2000], "data_batch_3: .*CIFAR file"),
        (b"", "data_batch_3: .*CIFAR file"),
        (pickle.dumps({"data": np.zeros((2, 10), np.uint8)}, 2), r"data_batch_3: .*\b3072\b"),
        (pickle.dumps({"labels": [1]}, 2), "data_batch_3: .*labels"),
        (pickle.dumps([1, 2], 2), "data_batch_3: .*CIFAR file"),
    ]:
        (folder / "data_batch_3").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_source("cifar10", options(tmp_path))
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="data_batch_3: missing"):
        load_source("cifar10", options(tmp_path))


def test_a_cifar_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path / 'ran'}",))

    folder = tmp_path / "cifar-10-batches-py"
    write_cifar10(folder)
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Evil()}))
    with pytest.raises(DataError, match=r"data_batch_1: .*system\b"):
        load_source("cifar10", options(tmp_path))
    assert not (tmp_path / "ran").exists()

    class Doubled:
        def __reduce__(self):
            return (codecs.encode, ("a", "hex_codec"))

    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Doubled()}, 2))
    with pytest.raises(DataError, match=r"data_batch_1: .*\bhex_codec\b"):
        load_source("cifar10", options(tmp_path))


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "cifar20", "stl10", "svhn", "svhn_noextra"])
def test_without_files_and_network_one_line_says_what_to_do(name, tmp_path, monkeypatch):
    import urllib.request

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(DataError, match=r"downloaded .*--data_dir") as e:
        load_source(name, options(tmp_path))
    assert "\n" not in str(e.value)


@needs_cifar
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100), ("cifar20", 20)])
def test_cifar_is_whole(name, classes):
    source = load_source(name, options(CIFAR))
    assert source.images.shape == (60_000, 3, 32, 32)
    assert torch.bincount(source.train_labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(source.test_labels).tolist() == [10_000 // classes] * classes
    assert len(source.classes) == classes
    reference = CIFAR / ("cifar-10-batches-py/test_batch" if name == "cifar10" else "cifar-100-python/test")
    with reference.open("rb") as f:
        content = pickle.load(f, encoding="bytes")
    assert torch.equal(source.images[source.test].view(-1, 3072), torch.from_numpy(content[b"data"]))
    if name == "cifar20":
        assert source.subclasses[source.test].tolist() == content[b"fine_labels"]
        # a subclass belongs to one class, five to each
        pairs = {(int(c), int(s)) for c, s in zip(source.labels, source.subclasses, strict=True)}
        assert len(pairs) == 100


@needs_cifar
def test_cifar_trains(short_run):
    settings = {"img_size": 32, "data_dir": str(CIFAR), "num_train_iter": 2, "eval_batch_size": 1000}
    assert short_run(algorithm="muscle_fixmatch", dataset="cifar10", num_labels=40, **settings)["complete"]
    result = short_run(algorithm="muscle", dataset="cifar20", num_labels=80, **settings)
    both = result["last_evaluation"]
    assert {"labelled_classes/top-1-acc", "unlabelled_classes/entropy", "entropy"} <= both.keys()
    mean = 0.8 * both["labelled_classes/top-1-acc"] + 0.2 * both["unlabelled_classes/top-1-acc"]
    assert mean == pytest.approx(both["top-1-acc"], abs=1e-6)


def test_accuracy_and_entropy_are_told_apart_by_class_type():
    from muscle_plugin.training.evaluation import prediction_metrics

    logits = torch.tensor([[50.0, 0.0], [50.0, 0.0], [0.0, 0.0], [50.0, 0.0]])
    hidden = torch.tensor([False, False, True, True])
    found = prediction_metrics(logits, torch.tensor([0, 1, 0, 1]), hidden)
    assert found["labelled_classes/top-1-acc"] == 0.5
    assert found["labelled_classes/entropy"] == pytest.approx(0, abs=1e-6)
    assert found["unlabelled_classes/top-1-acc"] == 0.5
    assert found["unlabelled_classes/entropy"] == pytest.approx(np.log(2) / 2, abs=1e-6)
    assert found["entropy"] == pytest.approx(np.log(2) / 4, abs=1e-6)
    assert found["top-1-acc"] == 0.5


# -------------------------------------------------------------------------------------------------------- STL-10, SVHN


def test_stl10_is_read_from_torchvisions_files(tmp_path):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    counts = {"train": 20, "unlabeled": 12, "test": 10}
    pixels = {k: RNG.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8) for k, n in counts.items()}
    for part, x in pixels.items():
        x.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # columns first
    for part in ("train", "test"):
        (np.arange(counts[part]) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
    source = load_source("stl10", options(tmp_path, 96))
    assert torch.equal(source.images, torch.from_numpy(np.concatenate(list(pixels.values()))))
    assert source.train_labels.tolist() == [i % 10 for i in range(20)] + [-1] * 12
    assert source.test_labels.tolist() == list(range(10))
    assert load_source("stl10", options(tmp_path, 32)).images.shape == (42, 3, 32, 32)

    from torchvision.datasets import STL10

    reference = STL10.__new__(STL10)  # torchvision's reader, without its check of the sums
    reference.root, reference.base_folder = str(tmp_path), "stl10_binary"
    theirs, labels = reference._STL10__loadfile("train_X.bin", "train_y.bin")
    assert np.array_equal(theirs, source.images[:20].numpy())
    assert labels.tolist() == source.labels[:20].tolist()

    (folder / "test_X.bin").write_bytes(b"123")
    with pytest.raises(DataError, match=r"test_X\.bin: .*\b3 bytes"):
        load_source("stl10", options(tmp_path, 96))


def test_svhn_is_read_from_torchvisions_files(tmp_path):
    expected, labels = [], []
    for part, n in (("train", 5), ("extra", 4), ("test", 3)):
        x = RNG.integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)
        y = RNG.integers(1, 11, (n, 1), dtype=np.uint8)
        savemat(tmp_path / f"{part}_32x32.mat", {"X": x.transpose(2, 3, 1, 0), "y": y})
        expected.append(x)
        labels += (y.ravel() % 10).tolist()  # 10 stands for the digit 0
    source = load_source("svhn", options(tmp_path))
    assert torch.equal(source.images, torch.from_numpy(np.concatenate(expected)))
    assert source.labels.tolist() == labels
    assert (len(source.train), len(source.test)) == (9, 3)
    assert len(load_source("svhn_noextra", options(tmp_path)).train) == 5
    (tmp_path / "test_32x32.mat").write_bytes(b"no")
    with pytest.raises(DataError, match=r"test_32x32\.mat: .*SVHN"):
        load_source("svhn", options(tmp_path))


# -------------------------------------------------------------------------------------------------------- image files


def picture(path, colour=(200, 30, 60), size=(20, 12), mode="RGB", **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path, **save)
    return path


@pytest.mark.parametrize(
    ("name", "mode"),
    [("a.png", "RGB"), ("a.png", "L"), ("a.png", "P"), ("a.png", "1"), ("a.png", "RGBA"), ("a.png", "LA"),
     ("a.jpg", "RGB"), ("a.jpg", "L"), ("a.jpg", "CMYK"), ("a.bmp", "RGB"), ("a.tif", "CMYK"), ("a.tif", "LAB"),
     ("a.webp", "RGB"), ("a.ppm", "RGB"), ("a.gif", "P")],
)  # fmt: skip
def test_formats_and_modes_that_pillow_reads_are_read(name, mode, tmp_path):
    found = decode(picture(tmp_path / name, (0, 0, 0) if mode in ("1",) else (200, 30, 60), mode=mode), 16)
    assert found.shape == (3, 16, 16)
    assert found.dtype == np.uint8
    expected = {"1": (0, 0, 0), "L": (84, 84, 84), "LA": (84, 84, 84)}.get(mode, (200, 30, 60))
    assert np.abs(found.reshape(3, -1).mean(1) - expected).max() <= 6


def test_sixteen_bits_turned_transparent_and_animated_images(tmp_path):
    Image.fromarray(np.full((8, 8), 300 * 256 // 2, np.uint16)).save(tmp_path / "deep.png")
    assert np.abs(decode(tmp_path / "deep.png", 8).astype(int) - 150).max() <= 1

    half = Image.new("RGB", (40, 40), (255, 0, 0))
    half.paste((0, 0, 255), (0, 20, 40, 40))
    turned = Image.Exif()
    turned[0x0112] = 3  # half a turn
    half.save(tmp_path / "turned.jpg", exif=turned, quality=95)
    top = decode(tmp_path / "turned.jpg", 8)[:, 0, 0]
    assert top[2] > 200 > 60 > top[0]

    grey = Image.fromarray(np.repeat([[200, 20], [90, 150]], 5, axis=1).astype(np.uint8)).resize((20, 10))
    for turn in range(1, 9):
        turned[0x0112] = turn
        grey.save(tmp_path / "grey.png", exif=turned)
        grey.save(
            tmp_path / "grey.tif", exif=turned
        )  # Pillow, given its name, reads scrambled rows where it lies on its side
        Image.fromarray(np.asarray(grey).astype(np.uint16) << 8).save(tmp_path / "deep.png", exif=turned)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / "grey.png")).resize((8, 8), 2))
        for name in ("grey.png", "grey.tif", "deep.png"):
            assert (decode(tmp_path / name, 8) == expected).all(), (turn, name)

    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert decode(tmp_path / "clear.png", 8).max() == 0

    frames = [Image.new("RGB", (4, 4), c) for c in ((10, 10, 10), (250, 250, 250))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert decode(tmp_path / "moving.gif", 8).max() < 20


RAMP = np.arange(256).reshape(16, 16)


def deep_png(values, significant_bits=None):
    """A grey PNG of 16 bits, with an sBIT chunk if asked for."""
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(file, "PNG")
    content = file.getvalue()
    if significant_bits is None:
        return content
    chunk = b"sBIT" + bytes([significant_bits])
    return content[:33] + struct.pack(">I", 1) + chunk + struct.pack(">I", zlib.crc32(chunk)) + content[33:]


def deep_tiff(values, order="<", photometric=1, bits=None, most=None):
    """A grey TIFF of one strip, of the integers that ``values`` has; Pillow writes few of these."""
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    bits = bits or 8 * values.dtype.itemsize
    tags = {256: values.shape[1], 257: len(values), 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: len(values),
            279: len(data), **({281: most} if most else {}), 339: 2 if values.dtype.kind == "i" else 1}  # fmt: skip
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    return head + data + struct.pack(order + "H", len(tags)) + entries + b"\0\0\0\0"


def pgm(values, maxval):
    return b"P5 16 16 %d\n" % maxval + values.astype(">u2").tobytes()


@pytest.mark.parametrize(
    "content",
    {
        "12 bits in a PNG": deep_png(16 * RAMP + 7),
        "which says so": deep_png(16 * RAMP + 7, 12),
        "which says so and has scaled them": deep_png(256 * RAMP + (RAMP & 0xF0), 12),
        "which has 16": deep_png(257 * RAMP, 16),
        "16 bits in a TIFF": deep_tiff((257 * RAMP).astype("u2")),
        "of the other byte order": deep_tiff((257 * RAMP).astype("u2"), ">"),
        "10 bits in it": deep_tiff((4 * RAMP).astype("u2")),
        "where it says 12": deep_tiff((16 * RAMP).astype("u2"), most=4095),
        "where it says what is wrong": deep_tiff((257 * RAMP).astype("u2"), most=255),
        "32 bits": deep_tiff((RAMP.astype("u4") << 24) + 99),
        "8 bits in 32": deep_tiff(RAMP.astype("i4")),
        "white is 0": deep_tiff((65535 - 257 * RAMP).astype("u2"), photometric=0),
        "maxval 4095": pgm(16 * RAMP + RAMP // 16, 4095),
        "maxval 65535": pgm(257 * RAMP, 65535),
    }.items(),
    ids=lambda x: x[0],
)
def test_grey_values_of_more_than_8_bits_keep_256_levels(content, tmp_path):
    (tmp_path / "x.png").write_bytes(content[1])
    assert (decode(tmp_path / "x.png", 16) == RAMP).all()


def test_dark_images_keep_the_range_of_their_file_or_of_the_others(tmp_path):
    dark = RAMP // 32  # of 256 levels
    for name, content in {
        "scaled": deep_png(256 * dark, 12), "12": deep_png(16 * dark + 1, 12), "pgm": pgm(16 * dark, 4095),
        "tiff": deep_tiff((16 * dark).astype("u2"), most=4000), "bright": deep_png(16 * RAMP),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    (tmp_path / "unsaid").write_bytes(deep_png(16 * dark))
    files = [tmp_path / n for n in ("unsaid", "bright", "scaled", "12", "tiff", "pgm")]
    packed = pack("x", tmp_path, files, 16, [tmp_path / ".packed"])
    assert all((packed.images[i].numpy() == dark).all() for i in (0, 2, 3, 4, 5))
    assert packed.pixel_range == (0, 4095, False)
    assert pack("x", tmp_path, files, 16, [tmp_path / ".packed"]).notes == packed.notes  # from the array file
    mine = pack("x", tmp_path, files, 16, [tmp_path / ".packed"], PixelRange(0, 127, overrides=True))
    assert (mine.images[3, 0].numpy() == (2 * (16 * dark + 1)).clip(0, 255)).all()
    assert (mine.images[5, 0].numpy() == dark).all()  # Pillow has scaled it
    assert any("0 is black and 127 white (pixel_range)" in note for note in mine.notes)


def test_negative_values_are_darker_than_others(tmp_path):
    (tmp_path / "x.tif").write_bytes(deep_tiff((16 * RAMP - 1024).astype("i2")))
    grey = decode(tmp_path / "x.tif", 16)[0].ravel().astype(int)
    assert (np.diff(grey) >= 0).all()
    assert grey[0] == 0
    assert len(set(grey)) > 200
    window = decode(tmp_path / "x.tif", 16, PixelRange(-512, 511, overrides=True))[0].ravel()
    assert (window == (4 * RAMP.ravel() - 128).clip(0, 255)).all()


def test_colours_of_16_bits_that_use_12_are_told_of(tmp_path):
    def colour_png(value):
        rows = 4 * (b"\0" + struct.pack(">H", value) * 12)
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND")
        framed = [struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks]
        return b"\x89PNG\r\n\x1a\n" + b"".join(framed)

    for name, value in (("a", 4000), ("b", 100)):
        (tmp_path / f"{name}.png").write_bytes(colour_png(value))
    files = sorted(tmp_path.glob("*.png"))
    (note,) = pack("x", tmp_path, files, 8, [tmp_path / ".packed"]).notes
    assert re.search("2 colour images of 16 bits: .*upper 8", note)
    (tmp_path / "b.png").write_bytes(colour_png(60000))
    assert pack("x", tmp_path, files, 8, [tmp_path / ".packed"]).notes == ()


def test_unreadable_images_say_why(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(DataError, match=r"text\.png: not"):
        decode(tmp_path / "text.png", 8)
    whole = picture(tmp_path / "cut.jpg", size=(300, 300)).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.jpg: .*truncated"):
        decode(tmp_path / "cut.jpg", 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match=r"bomb\.png: .*\b100 pixels"):
        decode(picture(tmp_path / "bomb.png", size=(12, 12)), 8)


def make_folder(root, classes=("cat", "dog"), labelled=3, unlabelled=4, test=2):
    for c, name in enumerate(classes):
        for i in range(labelled):
            picture(root / "labelled" / name / f"{i}.png", (60 * c, 10 * i, 0))
        for i in range(test):
            picture(root / "test" / name / f"{i}.jpg", (60 * c, 10 * i, 99))
    for i in range(unlabelled):
        picture(root / "unlabelled" / f"{i}.webp", (5, 5, 20 * i))
    return root


def test_what_an_image_folder_holds_besides_is_told_of(tmp_path):
    root = make_folder(tmp_path)
    assert image_folder(options(root, 8)).notes == ()
    for name in ("unlabelled/a.HEIC", "labelled/cat/b.heic", "test/README", "unlabelled/.hidden", "table.csv"):
        (root / name).write_text("x")
    for name in ("labeled", "Train", ".git"):
        (root / name).mkdir()
    folders, files = image_folder(options(root, 8)).notes
    assert re.search(f"{root}: 'Train', 'labeled'; .*: labelled, unlabelled, test", folders)
    assert re.search(rf"{root}: .*: 2 \.heic, 1 without", files)


def test_an_image_folder(tmp_path):
    source = image_folder(options(make_folder(tmp_path), 8))
    assert source.classes == ("cat", "dog")
    assert source.train_labels.tolist() == [0] * 3 + [1] * 3 + [-1] * 4
    assert source.test_labels.tolist() == [0, 0, 1, 1]
    assert source.images[source.train[3]][0].unique().tolist() == [60]
    assert source.images[source.test[0]][2].float().mean() == pytest.approx(99, abs=3)


def test_image_folders_that_are_not_one_say_what_is_expected(tmp_path):
    with pytest.raises(DataError, match="absent: .*--data_dir"):
        image_folder(options(tmp_path / "absent"))
    with pytest.raises(DataError, match=r"labelled/ .*--labels_csv"):
        image_folder(options(tmp_path))
    make_folder(tmp_path / "a", classes=("cat",))
    with pytest.raises(DataError, match="two classes .*'cat'"):
        image_folder(options(tmp_path / "a"))
    root = make_folder(tmp_path / "b")
    (root / "labelled" / "eel").mkdir()
    with pytest.raises(DataError, match=r"labelled/eel: no image"):
        image_folder(options(root))
    (root / "labelled" / "eel").rmdir()
    picture(root / "test" / "dogs" / "1.png")
    with pytest.raises(DataError, match="class 'dogs' .*'dog'"):
        image_folder(options(root))
    picture(root / "labelled" / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png: .*no class"):
        image_folder(options(root))


def test_a_bad_image_is_named_and_left_out_only_when_asked(tmp_path):
    root = make_folder(tmp_path)
    (root / "unlabelled" / "2.webp").write_bytes(b"")
    for _ in range(2):  # decoded, then from the array file
        with pytest.raises(DataError, match=r"\b1 image .*2\.webp.*--skip-bad-images"):
            image_folder(options(root))
    source = image_folder(options(root, skip_bad_images=True))
    assert len(source.train) == 9
    assert "2.webp" in source.notes[0]


def test_a_table_of_labels(tmp_path):
    for i in range(6):
        picture(tmp_path / "pictures" / f"{i}.png", (i, 0, 0))
    table = tmp_path / "labels.csv"
    table.write_text(
        "file,label,split\npictures/0.png,dog,\npictures/1.png,cat,train\npictures/2.png,cat,test\n3.png,,\n"
    )
    with pytest.raises(DataError, match=r"labels\.csv line 5: .*3\.png"):
        image_folder(options(tmp_path, labels_csv=table))
    table.write_text(
        "\ufeffpictures/0.png;dog\npictures/1.png;cat\n\n pictures/2.png ; cat ;test\n./pictures/3.png;;\n"
    )
    source = image_folder(options(tmp_path, labels_csv=table))
    beside = image_folder(options(tmp_path, labels_csv=Path("labels.csv")))  # found in data_dir
    assert torch.equal(beside.labels, source.labels)
    assert source.classes == ("cat", "dog")
    assert source.train_labels.tolist() == [1, 0, -1, -1, -1]
    assert source.test_labels.tolist() == [0]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("how", ["absolute", "by way of the folder above"])
def test_a_path_that_leads_to_an_image_of_the_folder_is_that_image(how, allowed, tmp_path, monkeypatch):
    for i in range(6):
        picture(tmp_path / "data" / f"{i}.png", (i, 0, 0))
    top = f"{tmp_path}/data" if how == "absolute" else "../data"
    (tmp_path / "t.csv").write_text(f"{top}/0.png,cat\n{top}/1.png,dog\n{top}/2.png,dog,test\n")
    monkeypatch.chdir(tmp_path)
    source = image_folder(replace(options(Path("data"), labels_csv=Path("t.csv")), allow_outside=allowed))
    assert source.train_labels.tolist() == [0, 1, -1, -1, -1]  # the test image is not among them, nor is one twice
    assert source.test_labels.tolist() == [1]


@pytest.mark.parametrize(
    ("line", "message"),
    [("../a.png,cat", r"line 2: '\.\./a\.png'"),
     ("/etc/passwd,cat", "line 2: '/etc/passwd'"),
     ("b/../../a.png,cat", r"line 2: 'b/\.\./\.\./a\.png'"),
     (",cat", "line 2: ''"),
     ("a.png,cat,valid", "line 2: split .*'valid'"),
     ("a.png,,test", "line 2: .*test image .*label"),
     ("a.png,cat", r"line 2: a\.png .*another label"),
     ('a.png,"cat', "line 2: .*table"),
     ("none.png,cat", r"line 2: .*none\.png")],
)  # fmt: skip
def test_faulty_lines_of_a_table_are_named(line, message, tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "t.csv").write_text(f"a.png,dog\n{line}\n")
    with pytest.raises(DataError, match=message):
        image_folder(options(tmp_path, labels_csv=tmp_path / "t.csv"))


def test_tables_that_are_none(tmp_path):
    picture(tmp_path / "a.png")
    for content, message in [(b"", "file,label"), (b"a.png\n", "file,label"),
                             (b"\xff\xfe\x00", r"t\.csv: .*read")]:  # fmt: skip
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(DataError, match=message):
            image_folder(options(tmp_path, labels_csv=tmp_path / "t.csv"))
    with pytest.raises(DataError, match=r"absent\.csv: "):
        image_folder(options(tmp_path, labels_csv=tmp_path / "absent.csv"))


# ------------------------------------------------------------------------------------------------------- packed arrays


@pytest.fixture
def decoded(monkeypatch):
    """The files decoded since the start of the test."""
    seen = []
    real = image_files.decode
    monkeypatch.setattr(image_files, "decode", lambda path, *how: (seen.append(path), real(path, *how))[1])
    return seen


def test_images_are_decoded_once_and_again_when_they_change(tmp_path, decoded):
    root = make_folder(tmp_path)
    first = image_folder(options(root, 8))
    assert len(decoded) == 14
    again = image_folder(options(root, 8))
    assert len(decoded) == 14
    assert torch.equal(first.images, again.images)
    picture(root / "unlabelled" / "1.webp", (250, 250, 250), size=(30, 30))
    changed = image_folder(options(root, 8))
    assert len(decoded) == 28
    assert (changed.images != first.images).flatten(1).any(1).sum() == 1
    assert len(list((root / ".packed").glob("*.npy"))) == 1  # the older one is gone
    image_folder(options(root, 16))
    assert len(list((root / ".packed").glob("*.npy"))) == 2  # another size is kept beside


def test_array_files_of_other_data_sets_in_the_folder_are_kept(tmp_path, decoded):
    files = [picture(tmp_path / f"{i}.png") for i in range(4)]
    for _ in range(2):
        for name, chosen in (("one", files[:2]), ("other", files[2:])):
            pack(name, tmp_path, chosen, 8, [tmp_path / ".packed"])
    assert len(decoded) == 4
    pack("one", tmp_path, files[:1], 8, [tmp_path / ".packed"])
    assert len(list((tmp_path / ".packed").glob("*.npy"))) == 2  # of one the newer alone


@pytest.mark.parametrize("damage", ["bit", "cut", "header", "gone"])
def test_a_damaged_array_file_is_made_anew(damage, tmp_path, decoded):
    root = make_folder(tmp_path)
    good = image_folder(options(root, 8)).images.clone()
    (array,), (header,) = ((root / ".packed").glob(f"*.{e}") for e in ("npy", "json"))
    content = bytearray(array.read_bytes())
    if damage == "bit":
        content[-5] ^= 1
    array.write_bytes(content[:-100] if damage == "cut" else content)
    if damage == "header":
        header.write_text("{")
    if damage == "gone":
        header.unlink()
    assert torch.equal(image_folder(options(root, 8)).images, good)
    assert len(decoded) == 28


def test_training_cannot_write_to_the_array_file(tmp_path):
    root = make_folder(tmp_path)
    image_folder(options(root, 8)).images.zero_()
    assert image_folder(options(root, 8)).images.max() > 0


def test_the_array_file_goes_where_it_can(tmp_path):
    root = make_folder(tmp_path / "data")
    (tmp_path / "data" / ".packed").write_text("in the way")
    places = [root / ".packed", tmp_path / "runs" / ".packed"]
    source = image_folder(SourceOptions(root, 8, cache_dirs=places))
    assert len(source.train) == 10
    (array,) = places[1].glob("*.npy")
    assert stat.S_IMODE(array.stat().st_mode) & 0o600 == 0o600
    with pytest.raises(DataError, match=r"/\.packed.*--cache_dir"):
        image_folder(SourceOptions(root, 12, cache_dirs=[root / ".packed"]))


# ------------------------------------------------------------------------------------------------------- Mini-ImageNet


@pytest.mark.parametrize("parts", [("",), ("train", "val", "test")])
def test_miniimagenet_is_the_union_of_its_folders_divided_by_seed(parts, tmp_path):
    names = [f"n{i}" for i in range(6)]
    for i, name in enumerate(names):
        for j in range(5):
            picture(tmp_path / "miniimagenet" / parts[i % len(parts)] / name / f"{j}.jpg", (40 * i, 0, 0))
    sizes = {"num_classes": 6, "per_class": 5, "test_per_class": 2}
    source = miniimagenet(options(tmp_path, 8), **sizes)
    assert source.classes == tuple(names)
    assert torch.bincount(source.train_labels).tolist() == [3] * 6
    assert torch.bincount(source.test_labels).tolist() == [2] * 6
    assert sorted(torch.cat([source.train, source.test]).tolist()) == list(range(30))
    shade = source.images[:, 0].float().mean((1, 2))
    assert torch.allclose(shade, 40.0 * source.labels, atol=4)
    assert torch.equal(source.test, miniimagenet(options(tmp_path, 8), **sizes).test)
    assert not torch.equal(source.test, miniimagenet(options(tmp_path, 8, seed=1), **sizes).test)
    with pytest.raises(DataError, match=r"\b100 classes.*\b6\b"):
        load_source("miniimagenet", options(tmp_path, 8))
    next((tmp_path / "miniimagenet").rglob("4.jpg")).unlink()
    with pytest.raises(DataError, match=r"\b5 images .*\bn\d, .*\b4\b"):
        miniimagenet(options(tmp_path, 8), **sizes)


def test_miniimagenet_that_is_not_there_says_how_to_provide_it(tmp_path):
    with pytest.raises(DataError, match=r"\btrain/<class>/\*"):
        load_source("miniimagenet", options(tmp_path))


@pytest.mark.parametrize("place", ["eurosat/2750", "eurosat", "."])
def test_eurosat_trains_on_the_first_four_fifths_of_each_class(place, tmp_path):
    names = [f"Class{i}" for i in range(10)]
    for i, name in enumerate(names):
        for j in range(5 + i % 2 * 5):
            picture(tmp_path / place / name / f"{name}_{j}.jpg", (20 * i, 10 * j, 0))
    source = load_source("eurosat", options(tmp_path, 8))
    assert source.classes == tuple(names)
    assert torch.bincount(source.train_labels).tolist() == [4, 8] * 5
    assert torch.bincount(source.test_labels).tolist() == [1, 2] * 5
    greens = source.images[source.test][:, 1].float().mean((1, 2))
    expected = torch.tensor([40.0, 80, 90] * 5)
    assert torch.allclose(greens, expected, atol=4)
    with pytest.raises(DataError, match=r"eurosat .*elsewhere.*\b10 folders"):
        load_source("eurosat", options(tmp_path / "elsewhere", 8))


def test_every_data_set_has_a_source_and_hidden_files_are_left_out(tmp_path):
    from muscle_plugin.registry.names import DATASETS

    assert READERS.keys() == DATASETS.keys()
    picture(tmp_path / ".hidden" / "a.png")
    picture(tmp_path / ".b.png")
    picture(tmp_path / "deep" / "er" / "C.PNG")
    (tmp_path / "notes.txt").write_text("x")
    assert find_images(tmp_path) == [tmp_path / "deep" / "er" / "C.PNG"]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    for name in ("labelled/a", "labelled/b", "test/a"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name / "0.png")
    inside = Path.iterdir

    def refusing(folder):
        if folder.name == "test":
            raise PermissionError(13, "Permission denied", str(folder))
        return inside(folder)

    monkeypatch.setattr(Path, "iterdir", refusing)
    with pytest.raises(PermissionError):
        load_source("folder", SourceOptions(tmp_path, 8, cache_dirs=[tmp_path / "cache"]))

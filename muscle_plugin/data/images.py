"""Image files: found, decoded by Pillow, resized, and packed into one array that later starts map into memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import stat
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from muscle_plugin.errors import DataError
from muscle_plugin.files import as_shared_as_any, write_json
from muscle_plugin.text import shown

#: Of array files; another one where `decode` makes other pixels of the same file.
PACK_FORMAT = 2
_CHECKED_BYTES = 64 << 20  # bytes per checksum


#: Formats that Pillow reads and we do not: PostScript is a program, which Ghostscript would run; Windows metafiles are lists
#: of calls to Windows.
REFUSED_FORMATS = frozenset(["EPS", "WMF"])


def image_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in REFUSED_FORMATS)


def image_suffixes() -> frozenset[str]:
    """Lower-case file endings of the formats that are read."""
    formats = set(image_formats())
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def find_images(folder: Path, deep: bool = True) -> list[Path]:
    """Image files at any depth under ``folder`` (or directly in it), by their endings, in the order of their paths; hidden
    ones are left out, and links to folders are not followed."""
    suffixes = image_suffixes()
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if deep and not f.startswith(".")]
        found += [
            Path(parent, f) for f in files if not f.startswith(".") and os.path.splitext(f)[1].lower() in suffixes
        ]
    return sorted(found)


def _other_endings(folder: Path) -> Iterator[str]:
    """The endings, in small letters, of the files at any depth under ``folder`` that :func:`find_images` passes over, but for
    hidden ones."""
    suffixes = image_suffixes()
    for _, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        endings = (os.path.splitext(f)[1].lower() for f in files if not f.startswith("."))
        yield from (e for e in endings if e not in suffixes)


def images_at(path: Path) -> list[Path]:
    """The image file ``path``, or those at any depth under this folder.

    Raises:
        DataError: there is none.
    """
    if not path.exists():
        raise DataError(f"{path}: no such folder or image")
    files = [path] if path.is_file() else find_images(path)
    if not files:
        raise DataError("; ".join([f"{path}: no image in it", *unknown_files([path])]))
    return files


def unknown_files(folders: Iterable[Path]) -> list[str]:
    """A line on the files at any depth under ``folders`` that :func:`find_images` passes over, if there are any."""
    endings = Counter(ending for folder in folders for ending in _other_endings(folder))
    listed = ", ".join(f"{n} {shown(ending or 'without ending')}" for ending, n in endings.most_common(5))
    return [f"files that are no images known here were passed over: {listed}"] if endings else []


def name_below(root: Path, path: Path) -> Path:
    """A file's path relative to ``root``, if it is below."""
    return path.relative_to(root) if path.is_relative_to(root) else path


def decode(path: Path, size: int) -> np.ndarray:
    """One image as (3, size, size) uint8 RGB: turned as its EXIF says, first frame, transparency over black, 16 bits
    reduced to 8, then resized (bilinear, antialiased; not cropped, so other shapes are stretched).

    Raises:
        DataError: it cannot be read, is no file (but a pipe, a device), or has more pixels than Pillow takes for harmless.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a file")
        # by a file and not its name, which Pillow would map into memory: of a grey TIFF that lies on its side wrongly
        with path.open("rb") as file, Image.open(file, formats=image_formats()) as image:
            # Pillow warns where a size is beyond its limit, and refuses only twice that
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode no more than is needed
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16") or image.mode == "I":
                image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8))
            elif image.mode == "F":
                raise ValueError("floating-point pixels have no known range")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
            image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            return np.asarray(image).transpose(2, 0, 1)
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; shrink it") from None
    except Exception as e:  # of a damaged file, Pillow's readers raise what they meet
        reason = shown(getattr(e, "strerror", None) or e) or type(e).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from None


def leads_out(root: Path, files: Iterable[Path]) -> Path | None:
    """The first of these files that lies outside ``root`` once links are followed; None if none does."""
    top = os.path.realpath(root)
    folders: dict[str, str] = {}
    for path in files:
        parent, name = os.path.split(path)
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        real = os.path.join(folders[parent], name)
        if os.path.islink(real):
            real = os.path.realpath(real)
        if os.path.commonpath([top, real]) != top:
            return path
    return None


def decode_all(paths: Sequence[Path], size: int, out: np.ndarray) -> dict[int, str]:
    """Decode every file into its row of ``out`` (N, 3, size, size); one thread per core, a bar on a terminal.

    Returns:
        position -> why it could not be read; its row of ``out`` is zero.
    """
    bad: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            out[i] = decode(paths[i], size)
        except DataError as e:
            out[i] = 0
            bad[i] = str(e)

    # here and not in `decode`: what is warned of belongs to all threads together
    with warnings.catch_warnings(), ThreadPoolExecutor(_cores()) as pool:
        warnings.simplefilter("ignore")
        for _ in counted(pool.map(one, range(len(paths))), "reading images", len(paths)):
            pass
    return dict(sorted(bad.items()))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Pack:
    """(N, 3, size, size) uint8 images, mapped from their file, and why rows could not be read."""

    images: Tensor
    bad: dict[int, str]

    def faults(self, most: int = 5) -> str:
        """Why rows could not be read: of the first ones, and how many more."""
        reasons = list(self.bad.values())
        more = f" (and {len(reasons) - most} more)" if len(reasons) > most else ""
        return "; ".join(reasons[:most]) + more


def pack(name: str, root: Path, files: Sequence[Path], size: int, places: Iterable[Path]) -> Pack:
    """The images of ``files`` at one size, from the array file that an earlier call left, or decoded into one now.

    The array file is used if the files' names, sizes and times are those it was made from, and its checksums hold.

    Args:
        name: begins the array file's name.
        root: folder of the files; their names are taken relative to it.
        places: folders for the array file; the first that can be written is used, all are searched.

    Raises:
        DataError: no folder can be written.
    """
    listing = _listing(root, files)
    key = {"format": PACK_FORMAT, "size": size, "count": len(files), "listing": listing}
    stem = f"{name}_{size}_{listing[:12]}"
    candidates = list(dict.fromkeys(places))
    for place in candidates:
        found = _open_pack(place / f"{stem}.npy", key)
        if found is not None:
            return found
    reasons = []
    for place in candidates:
        try:
            return _write_pack(place / f"{stem}.npy", key, root, files, size)
        except OSError as e:
            reasons.append(f"{place}: {e.strerror or e}")
    raise DataError(
        f"the images of {root} need {len(files) * 3 * size * size / 1e6:,.0f} MB for an array file, which cannot be"
        f" written ({'; '.join(reasons)}); give a folder with room as --cache_dir"
    )


def _listing(root: Path, files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(os.fsencode(name_below(root, path)))
        try:
            status = path.stat()
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:  # a link to nothing; decoding says so
            digest.update(b"\0absent\n")
    return digest.hexdigest()


def _map(path: Path) -> Tensor:
    # copy-on-write: nothing can write to the file, and torch asks for writable memory
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _checksums(images: Tensor) -> list[int]:
    flat = memoryview(images.numpy().reshape(-1))
    starts = range(0, len(flat), _CHECKED_BYTES)
    with ThreadPoolExecutor(_cores()) as pool:
        return list(pool.map(lambda s: zlib.crc32(flat[s : s + _CHECKED_BYTES]), starts))


def _open_pack(path: Path, key: dict[str, Any]) -> Pack | None:
    """The pack, or None if there is none that is whole and of these files."""
    try:
        header = json.loads(path.with_suffix(".json").read_text())
        images = _map(path)
        expected = (key["count"], 3, key["size"], key["size"])
        if header["key"] != key or images.shape != expected or images.dtype != torch.uint8:
            return None
        if header["checksums"] != _checksums(images):
            return None
        return Pack(images, {int(i): str(reason) for i, reason in header["bad"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError, MemoryError):
        return None


def _write_pack(path: Path, key: dict[str, Any], root: Path, files: Sequence[Path], size: int) -> Pack:
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=".part", delete=False) as part:
        temporary = Path(part.name)
    try:
        shape = (len(files), 3, size, size)
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        if hasattr(os, "posix_fallocate"):  # claim the room: a full disk is an error here, and not a signal later
            with temporary.open("r+b") as f:
                os.posix_fallocate(f.fileno(), 0, temporary.stat().st_size)
        bad = decode_all(files, size, array)
        array.flush()
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        sums = _checksums(torch.from_numpy(array))
        del array
        as_shared_as_any(temporary)
        os.replace(temporary, path)
        header = {"root": str(root), "key": key, "bad": {str(i): r for i, r in bad.items()}, "checksums": sums}
        images = _map(path)  # before another process can take it for an older one
        write_json(path.with_suffix(".json"), header)
        _remove_older(path, header)
        return Pack(images, bad)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _remove_older(path: Path, header: dict[str, Any]) -> None:
    """Delete array files that an earlier state of the same folder left beside ``path``."""
    for other in path.parent.glob("*.json"):
        same_kind = other.stem.rpartition("_")[0] == path.stem.rpartition("_")[0]  # all but the listing
        if other == path.with_suffix(".json") or not same_kind:
            continue
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            content = json.loads(other.read_text())
            if content["root"] == header["root"] and content["key"]["size"] == header["key"]["size"]:
                other.unlink()
                other.with_suffix(".npy").unlink()


T = TypeVar("T")


def counted(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, with a bar on stderr while they pass, if that is a terminal."""
    console = Console(file=sys.stderr)
    with Progress(TextColumn(what), BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn(),
             console=console, transient=True, disable=not console.is_terminal) as bar:  # fmt: skip
        yield from bar.track(items, total=total)

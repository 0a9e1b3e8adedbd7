"""Decoded image files in one array file, made once and mapped into memory by later runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.images import PixelRange, cores, decode_all, find_pixel_range, name_below
from muscle_plugin.errors import DataError
from muscle_plugin.files import atomic_write, write_json

#: Version of array files; to be raised when ``images.decode`` makes other pixels of the same file.
PACK_FORMAT = 3
_CHECKED_BYTES = 64 << 20  # bytes per checksum


@dataclass(frozen=True)
class Pack:
    """(N, 3, size, size) uint8 images mapped from their file, by row why some could not be read, and what
    :func:`~.images.find_pixel_range` returned."""

    images: Tensor
    bad: dict[int, str]
    pixel_range: PixelRange | None
    notes: tuple[str, ...]

    def faults(self) -> str:
        """Say why rows could not be read: the first reasons, and how many more there are."""
        more = f" (and {len(self.bad) - 5} more)" if len(self.bad) > 5 else ""
        return f"{len(self.bad)} image file(s) cannot be used: {'; '.join([*self.bad.values()][:5])}{more}"


def pack(
    name: str, root: Path, files: Sequence[Path], size: int, places: Iterable[Path],
    pixel_range: PixelRange | None = None,
) -> Pack:  # fmt: skip
    """Return the images of ``files`` at one size, from an earlier call's array file or decoded into a new one.

    An array file is used if the files have the names, sizes and times that it was made from, ``pixel_range`` is the same,
    and its checksums hold. Of the folders in ``places`` all are searched, and the first that can be written is used.
    """
    digest = hashlib.sha256(repr(pixel_range or "").encode())
    for file in files:
        digest.update(os.fsencode(name_below(root, file)))
        try:
            status = file.stat()
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        except OSError:  # a broken link; decoding says so
            digest.update(b"\0absent\n")
    listing = digest.hexdigest()
    key = {"format": PACK_FORMAT, "size": size, "count": len(files), "listing": listing}
    shape = (len(files), 3, size, size)
    paths = [place / f"{name}_{size}_{listing[:12]}.npy" for place in dict.fromkeys(places)]
    for path in paths:
        if found := _open(path, key, shape):
            return found
    reasons = []
    for path in paths:
        try:
            return _write(path, key, shape, root, files, pixel_range)
        except OSError as e:
            reasons.append(f"{path.parent}: {e.strerror or e}")
    raise DataError(
        f"the images of {root} need an array file of {np.prod(shape) / 1e6:,.0f} MB, which cannot be written"
        f" ({'; '.join(reasons)}); give a folder with room as --cache_dir"
    )


def _map(path: Path) -> Tensor:
    # copy-on-write: nothing can write to the file, and torch asks for writable memory
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def _checksums(images: np.ndarray) -> list[int]:
    flat = images.reshape(-1)
    parts = [flat[start : start + _CHECKED_BYTES] for start in range(0, len(flat), _CHECKED_BYTES)]
    with ThreadPoolExecutor(cores()) as pool:
        return list(pool.map(zlib.crc32, parts))


def _open(path: Path, key: dict[str, object], shape: tuple[int, ...]) -> Pack | None:
    """The pack, or None if the file is absent, damaged, or made from other files."""
    with contextlib.suppress(Exception):  # a damaged file can make its readers raise anything
        header = json.loads(path.with_suffix(".json").read_text())
        images = _map(path)
        same = header["key"] == key and images.shape == shape and images.dtype == torch.uint8
        if same and header["checksums"] == _checksums(images.numpy()):
            pixel_range = PixelRange(*header["pixel_range"]) if header["pixel_range"] else None
            bad = {int(i): str(reason) for i, reason in header["bad"].items()}
            return Pack(images, bad, pixel_range, tuple(header["notes"]))
    return None


def _write(
    path: Path, key: dict[str, object], shape: tuple[int, ...], root: Path, files: Sequence[Path],
    given: PixelRange | None,
) -> Pack:  # fmt: skip
    with atomic_write(path) as file:
        array = np.lib.format.open_memmap(file.name, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):  # claim the room: a full disk is an error here, and not a signal later
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(file.name))
        pixel_range, notes = find_pixel_range(files, given)
        if given and not notes:
            notes = ["pixel_range has no effect: no image has more than 8 bits"]
        bad = decode_all(files, shape[-1], array, pixel_range)
        array.flush()
        about = {"bad": bad, "pixel_range": pixel_range, "notes": notes}
        header = {"root": str(root), "key": key, **about, "checksums": _checksums(array)}
        del array
    images = _map(path)  # before another process can take it for an older one
    write_json(path.with_suffix(".json"), header)
    # an earlier state of the same folder may have left files, of the same name and size, but of another listing
    for other in path.parent.glob(f"{path.stem.rpartition('_')[0]}_{'?' * 12}.json"):
        with contextlib.suppress(Exception):
            if other.stem != path.stem and json.loads(other.read_text())["root"] == str(root):
                other.unlink()
                other.with_suffix(".npy").unlink()
    return Pack(images, bad, pixel_range, tuple(notes))

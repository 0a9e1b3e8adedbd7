"""Image files: found, and decoded by Pillow to uint8 arrays of one size."""

from __future__ import annotations

import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from muscle_plugin.errors import DataError
from muscle_plugin.text import shown

#: Formats that Pillow reads and this package refuses: PostScript is a program, which Ghostscript would run; Windows metafiles
#: are lists of calls to Windows.
REFUSED_FORMATS = frozenset(["EPS", "WMF"])


def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in REFUSED_FORMATS)


def _suffixes() -> frozenset[str]:
    """Lower-case suffixes of the formats that are read."""
    formats = set(_formats())
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files and their lower-case suffixes under ``folder``; hidden ones are left out, links to folders not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        yield from ((Path(parent, f), os.path.splitext(f)[1].lower()) for f in files if not f.startswith("."))


def find_images(folder: Path) -> list[Path]:
    """Return the image files at any depth under ``folder``, by suffix and in order of path."""
    suffixes = _suffixes()
    return sorted(path for path, suffix in _walk(folder) if suffix in suffixes)


def images_at(path: Path) -> list[Path]:
    """Return the image file ``path``, or those at any depth under this folder; raise DataError if there is none."""
    if not path.exists():
        raise DataError(f"{path}: no such folder or image")
    files = [path] if path.is_file() else find_images(path)
    if not files:
        raise DataError("; ".join([f"{path}: no image in it", *unknown_files([path])]))
    return files


def unknown_files(folders: Iterable[Path]) -> list[str]:
    """Describe in one line the files under ``folders`` that :func:`find_images` passes over; empty if there are none."""
    suffixes = _suffixes()
    others = Counter(suffix for folder in folders for _, suffix in _walk(folder) if suffix not in suffixes)
    listed = ", ".join(f"{n} {shown(suffix or 'without ending')}" for suffix, n in others.most_common(5))
    return [f"files that are no images known here were passed over: {listed}"] if others else []


def name_below(root: Path, path: Path) -> Path:
    """Return a file's path relative to ``root``, if it is below."""
    return path.relative_to(root) if path.is_relative_to(root) else path


def leads_out(root: Path, files: Iterable[Path]) -> Path | None:
    """Return the first file that lies outside ``root`` once links are followed; None if there is none."""
    top, folder_of = os.path.realpath(root), cache(os.path.realpath)
    for path in files:
        real = os.path.realpath(path) if path.is_symlink() else folder_of(path.parent)
        if os.path.commonpath([top, real]) != top:
            return path
    return None


def decode(path: Path, size: int) -> np.ndarray:
    """Decode an image as (3, size, size) uint8 RGB.

    It is turned as its EXIF data say, the first frame of an animation, transparent over black, 16 bits reduced to 8, then
    resized (bilinear, antialiased; stretched, not cropped). A pipe or a device is refused, as is what has more pixels than
    Pillow considers harmless.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a file")
        # a file and not its name, which Pillow would map into memory: of a grey TIFF that lies on its side wrongly
        with path.open("rb") as file, Image.open(file, formats=_formats()) as image:
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


def decode_all(paths: Sequence[Path], size: int, out: np.ndarray) -> dict[int, str]:
    """Decode every file into its row of ``out``, (N, 3, size, size) uint8, by one thread per core; returns position -> why
    the file could not be read, whose row is zero."""
    console = Console(stderr=True)
    bad: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            out[i] = decode(paths[i], size)
        except DataError as e:
            out[i] = 0
            bad[i] = str(e)

    # here and not in `decode`: filters of warnings belong to all threads together
    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
        warnings.simplefilter("ignore")
        done = pool.map(one, range(len(paths)))
        quiet = not console.is_terminal
        list(track(done, "reading images", len(paths), console=console, transient=True, disable=quiet))
    return dict(sorted(bad.items()))


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Image files: found, and decoded by Pillow to uint8 arrays of one size."""

from __future__ import annotations

import contextlib
import math
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import track

from muscle_plugin.errors import DataError
from muscle_plugin.text import plural, shown

#: Formats that Pillow reads and this package refuses: PostScript is a program, which Ghostscript would run; Windows metafiles
#: are lists of calls to Windows.
REFUSED_FORMATS = frozenset(["EPS", "WMF"])
#: Folders that operating systems make for thumbnails and deleted files, in lower case.
_OF_SYSTEMS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information")
_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX_SAMPLE_VALUE, _SAMPLE_FORMAT = 258, 262, 281, 339  # tags of TIFF


class PixelRange(NamedTuple):
    """The grey values of more than 8 bits that become black and white, in files that do not say it or, if it ``overrides``, in
    others too; not in formats whose values Pillow has scaled (PGM, JPEG 2000)."""

    black: int
    white: int
    overrides: bool = False


def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(kind for kind in Image.OPEN if kind not in REFUSED_FORMATS)


def image_suffixes() -> frozenset[str]:
    """Return the lower-case suffixes of the formats that are read."""
    formats = set(_formats())
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in formats)


def of_the_user(folder: str) -> bool:
    """Whether a folder of this name may hold the user's images: it is neither hidden nor an operating system's."""
    return not folder.startswith(".") and folder.lower() not in _OF_SYSTEMS


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files and their lower-case suffixes under ``folder``; hidden ones are left out, links to folders not followed."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if of_the_user(f)]
        yield from ((Path(parent, f), os.path.splitext(f)[1].lower()) for f in files if not f.startswith("."))


def find_images(folder: Path) -> list[Path]:
    """Return the image files at any depth under ``folder``, by suffix and in order of path."""
    suffixes = image_suffixes()
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
    suffixes = image_suffixes()
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


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file, opened by Pillow; what goes wrong in it, also later, becomes a DataError that names it."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("not a file")
        # a file and not its name, which Pillow would map into memory: of a grey TIFF that lies on its side wrongly
        with path.open("rb") as file, Image.open(file, formats=_formats()) as image:
            # Pillow warns where a size is beyond its limit, and refuses only twice that
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise Image.DecompressionBombError
            yield image
    except UnidentifiedImageError:
        raise DataError(f"{path}: not an image that Pillow can read") from None
    except Image.DecompressionBombError:
        raise DataError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; shrink it") from None
    except Exception as e:  # of a damaged file, Pillow's readers raise what they meet
        reason = shown(getattr(e, "strerror", None) or e) or type(e).__name__
        raise DataError(f"{path}: cannot be read: {reason}") from None


def decode(path: Path, size: int, pixel_range: PixelRange | None = None) -> np.ndarray:
    """Decode an image as (3, size, size) uint8 RGB.

    It is turned as its EXIF data say, the first frame of an animation, transparent over black, grey values of more than 8 bits
    reduced to 8 by ``pixel_range`` (None: the file's own, else that of its values), then resized (bilinear, antialiased;
    stretched, not cropped). A pipe or a device is refused, as is what has more pixels than Pillow considers harmless.
    """
    with _opened(path) as image:
        image.draft("RGB", (2 * size, 2 * size))  # JPEG: decode no more than is needed
        if _is_deep(image):
            inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == 0
            values, said = _deep_values(path, image, pixel_range)
            black, white, _ = said or pixel_range or _covering(int(values.min()), int(values.max()))
            grey = ((values - black) * 256 // (white - black + 1)).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(255 - grey if inverted else grey)
        else:
            image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ValueError("floating-point pixels have no known range")
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)


def _is_deep(image: Image.Image) -> bool:
    return image.mode == "I" or image.mode.startswith("I;16")


def _deep_values(path: Path, image: Image.Image, given: PixelRange | None) -> tuple[np.ndarray, PixelRange | None]:
    """The upright (H, W) int64 grey values of an image of more than 8 bits, and their range, as far as the file says it or
    ``given`` overrides it."""
    tags = getattr(image, "tag_v2", {})
    values = np.asarray(ImageOps.exif_transpose(image)).astype(np.int64)
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] != 1
    if tags and not signed:  # Pillow reads 32 bits as signed ones
        values &= 0xFFFFFFFF
    if image.format in ("PPM", "JPEG2000"):  # Pillow has scaled them
        return values, PixelRange(0, 65535)
    if given is not None and given.overrides:
        return values, given
    said = None
    if image.format == "PNG":
        with path.open("rb") as file:
            _, _, bits = file.read(1 << 16).partition(b"IDAT")[0].partition(b"\0\0\0\1sBIT")
        if bits:
            said = PixelRange(0, (1 << bits[0]) - 1)
            # PNG wants values scaled to 16 bits, so that the lower bits of dark ones are 0; not all programs do that
            if values.max() > said.white or not (values & (0xFFFF >> bits[0])).any():
                said = PixelRange(0, 65535)
    elif tags and not signed:
        if (stored := tags.get(_BITS_PER_SAMPLE, (16,))[0]) < 16:
            said = PixelRange(0, (1 << stored) - 1)
        elif _MAX_SAMPLE_VALUE in tags:  # to some programs the largest value of this image, to others of any
            said = _covering(0, int(np.max(tags[_MAX_SAMPLE_VALUE])))
    return values, said if said and values.max() <= said.white else None


def _covering(least: int, most: int) -> PixelRange:
    """The range of as many bits as cameras have (8, 10, 12, ...) that holds these values; negative ones add another."""
    bits = max(8, most.bit_length() + most.bit_length() % 2)
    return PixelRange(-(1 << (-least - 1).bit_length()) if least < 0 else 0, (1 << bits) - 1)


def find_pixel_range(files: Sequence[Path], given: PixelRange | None) -> tuple[PixelRange | None, list[str]]:
    """Return the range of grey values of more than 8 bits in those of ``files`` that do not say it: ``given``, else that of all
    their values (None: there are none); and lines for the user on what is used."""
    dark: list[bool] = []  # of each colour image of 16 bits

    def look(path: Path) -> tuple[PixelRange | None, int, int] | None:
        with contextlib.suppress(DataError), _opened(path) as image:  # decoding says what is wrong
            if _is_deep(image):
                values, said = _deep_values(path, image, given)
                return said, int(values.min()), int(values.max())
            if any(raw in str(getattr(image, "tile", "")) for raw in ("RGB;16", "A;16")):
                dark.append(bool(np.asarray(image.convert("RGB")).max() < 64))
        return None

    with warnings.catch_warnings(), ThreadPoolExecutor(cores()) as pool:
        warnings.simplefilter("ignore")
        deep = [found for found in pool.map(look, files) if found]
    lines, common = [], given
    for said in dict.fromkeys(said for said, *_ in deep):
        _, lows, highs = zip(*(x for x in deep if x[0] == said), strict=True)
        used = said or given or _covering(min(lows), max(highs))
        common = common or (None if said else used)
        estimated = "estimated from the images; --pixel_range sets it"
        whence = "pixel_range" if used == given else "as the files say" if said else estimated
        values = f"{plural(len(lows), 'image')} of more than 8 bits, {min(lows)} to {max(highs)}"
        lines.append(f"{values}: {used.black} is black and {used.white} white ({whence})")
    if dark and all(dark):
        advice = "only the upper 8 are read, and stay below 64; scale the values to 16 bits"
        lines.append(f"{plural(len(dark), 'colour image')} of 16 bits: {advice}")
    return common, lines


def decode_all(
    paths: Sequence[Path], size: int, out: np.ndarray, pixel_range: PixelRange | None = None
) -> dict[int, str]:
    """Decode every file into its row of ``out``, (N, 3, size, size) uint8, by one thread per core; returns position -> why
    the file could not be read, whose row is zero."""
    console = Console(stderr=True)
    bad: dict[int, str] = {}

    def one(i: int) -> None:
        try:
            out[i] = decode(paths[i], size, pixel_range)
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

"""Files that are whole or absent: written beside the target, flushed to disk, and renamed over it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from muscle_plugin.text import first_line


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends without an exception."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        as_shared_as_any(name)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    if os.name == "posix":  # the rename itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def as_shared_as_any(name: str | Path) -> None:
    """Give a temporary file, which its owner alone may read, the permissions of any new file."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with atomic_write(path) as f:
        f.write(text.encode(errors="backslashreplace"))  # names of files need not be text


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        OSError, ValueError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path.name}: nested too deep") from None
    except ValueError as e:
        raise ValueError(f"{path.name}: {e}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name}: expected a mapping, found a {type(found).__name__}")
    return found


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Replace a checkpoint."""
    with atomic_write(path) as f:
        torch.save(content, f)


def load_tensors(path: Path, device: torch.device | str = "cpu", content: bytes | None = None) -> dict[str, Any]:
    """Read a checkpoint, a mapping, as :func:`load_plain` does.

    Raises:
        ValueError: it is none, or cannot be read.
    """
    found = load_plain(path, device, content)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a checkpoint, but a {type(found).__name__}")
    return found


def load_plain(path: Path, device: torch.device | str = "cpu", content: bytes | None = None) -> Any:
    """Read a file that ``torch.save`` wrote, without running any code in it.

    Args:
        device: where the tensors go that were on a GPU.
        content: of the file, if it has been read already.

    Raises:
        ValueError: the file is absent, damaged, holds more than plain data, or is compressed.
    """
    target = torch.device(device)

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" or target.type == "cpu" else storage.cuda(target.index)

    try:
        source = path if content is None else io.BytesIO(content)
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:  # torch never compresses, but would expand what another has packed
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("its content is compressed; torch.save writes it as it is")
        found = torch.load(path if content is None else io.BytesIO(content), map_location=place, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as e:
        raise ValueError(f"{path}: not a readable checkpoint ({first_line(e)})") from None
    return found

"""Files that are whole or absent: written beside the target, flushed to disk, and renamed over it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from muscle_plugin.errors import DamagedError, InputError, WriteError
from muscle_plugin.text import first_line, out_of_memory

if TYPE_CHECKING:
    import torch

#: A checkpoint's file ends with this and the SHA-256 of all before it; its content says so under the key. PyTorch ignores both.
_CHECKED, _CHECKED_KEY = b"\nsha256 ", "sha256_follows"


def refuse_existing(path: Path, instead: str) -> None:
    """Raise InputError, which says what to do ``instead``, if there is a file or folder of this name."""
    if os.path.lexists(path):
        raise InputError(f"{path}: already exists; {instead}")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn every OSError within it into a :class:`WriteError` of ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as e:
        raise WriteError(e.errno, e.strerror or str(e), str(path)) from e


@contextlib.contextmanager
def atomic_write(path: Path, earlier: Sequence[Path] = ()) -> Iterator[BinaryIO]:
    """Open a binary file that replaces ``path`` when the block ends without an exception; after a WriteError all is unchanged.

    The present file moves to the first of ``earlier``, and those there move in turn; the last one is deleted.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("x+b") as f:  # to be read too: the caller may map it
                yield f
                f.flush()
                os.fsync(f.fileno())
            _replace(part, path, earlier)
        finally:
            part.unlink(missing_ok=True)
        if os.name == "posix":  # the rename itself must reach the disk
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _replace(new: Path, path: Path, earlier: Sequence[Path]) -> None:
    """Rename ``new`` to ``path``. Whenever the process dies, the names lead to whole and different files."""
    second_name = new.with_suffix(".old.part")
    try:
        if earlier:
            os.link(path, second_name)
    except OSError:  # no file yet, or no hard links here: then there is no `path` for a moment, but earlier[0]
        _shift([path, *earlier])
    os.replace(new, path)
    if second_name.exists():
        _shift(earlier)
        os.replace(second_name, earlier[0])


def _shift(files: Sequence[Path]) -> None:
    """Free the first name: rename each file up to the first absent one to the next name, over the last of all."""
    absent = next((i for i, path in enumerate(files) if not path.exists()), len(files) - 1)
    for i in range(absent, 0, -1):
        os.replace(files[i - 1], files[i])


def finish_move(path: Path, earlier: Sequence[Path]) -> None:
    """Complete a replacement of ``path`` during which a process was killed; no other may be writing there."""
    for second_name in path.parent.glob(f".{path.name}.*.old.part"):
        if earlier and path.exists() and not path.samefile(second_name):
            _shift(earlier)
            os.replace(second_name, earlier[0])


def remove_parts(folder: Path) -> None:
    """Delete the partial files of killed processes; no other process may be writing in ``folder``."""
    for part in folder.glob(".*.part"):
        part.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a text file."""
    with atomic_write(path) as f:
        f.write(text.encode(errors="backslashreplace"))  # file names need not be text


def to_json(content: object, **style: Any) -> str:
    """Return plain data as JSON; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(from_json(json.dumps(content)), allow_nan=False, **style)


def from_json(text: str) -> Any:
    """Parse JSON; NaN and infinity, which earlier versions wrote, become None."""
    return json.loads(text, parse_constant=lambda _: None)


def write_json(path: Path, content: object) -> None:
    """Replace a JSON file."""
    write_text(path, to_json(content, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds a mapping; raise OSError or InputError if there is none."""
    if path.exists() and not path.is_file():  # a pipe would not end
        raise InputError(f"{path.name}: not a file")
    try:
        found = from_json(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise InputError(f"{path.name}: nested too deep") from None
    except ValueError as e:
        raise InputError(f"{path.name}: {e}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path.name}: expected a mapping, found a {type(found).__name__}")
    return found


class _Hashing:
    """Passes bytes on to a file and takes their SHA-256, so that a checkpoint is never in memory as a whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.hash = file, hashlib.sha256()
        self.fault: OSError | None = None

    def write(self, data: bytes) -> int:
        self.hash.update(data)
        try:
            return self._file.write(data)
        except OSError as e:
            self.fault = self.fault or e
            raise

    def flush(self) -> None:
        self._file.flush()


def save_tensors(path: Path, content: Mapping[str, object], earlier: Sequence[Path] = ()) -> None:
    """Replace a checkpoint, as :func:`atomic_write` does; the file ends with a checksum."""
    import torch

    with atomic_write(path, earlier) as f:
        out = _Hashing(f)
        try:
            torch.save({**content, _CHECKED_KEY: True}, out)
        except RuntimeError as e:  # PyTorch's word for a write that failed
            raise out.fault or e from e
        f.write(_CHECKED + out.hash.digest())


def _is_checked(path: Path, content: bytes) -> bool:
    """Whether the file ends with a checksum; raise DamagedError if that is wrong."""
    size = hashlib.sha256().digest_size
    end = len(content) - size - len(_CHECKED)
    if end < 0 or not content.startswith(_CHECKED, end):
        return False
    if hashlib.sha256(memoryview(content)[:end]).digest() != content[-size:]:
        raise DamagedError(f"{path}: damaged: its content does not match its checksum")
    return True


def read_whole(path: Path) -> bytes:
    """Read the file of a checkpoint of this package; raise DamagedError if it is not what was written."""
    try:
        content = path.read_bytes()
    except OSError as e:
        if e.errno == errno.EIO:
            raise DamagedError(f"{path}: damaged: the disk cannot read it") from None
        raise
    if not _is_checked(path, content):
        raise DamagedError(f"{path}: damaged, cut off or not a checkpoint of this package: it has no checksum")
    return content


def load_tensors(path: Path, device: torch.device | str = "cpu", content: bytes | None = None) -> dict[str, Any]:
    """Read a checkpoint, a mapping that ``torch.save`` wrote, without running any code in it.

    Tensors that were on a GPU go to ``device``; ``content`` is the file's, if it has been read already. A DamagedError if it
    is damaged, holds more than plain data, or is compressed.
    """
    import torch

    target = torch.device(device)

    def place(storage: Any, location: str) -> Any:
        return storage if location == "cpu" or target.type == "cpu" else storage.cuda(target.index)

    try:
        content = path.read_bytes() if content is None else content
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as e:
        raise InputError(f"{path}: cannot be read: {e.strerror}") from None
    checked = _is_checked(path, content)
    try:
        _refuse_compressed(content)
        found = torch.load(io.BytesIO(content), map_location=place, weights_only=True)
        _refuse_inflated(found, len(content))
    except ValueError as e:  # our own
        raise DamagedError(f"{path}: not a readable checkpoint ({first_line(e)})") from None
    except Exception as e:  # anything that torch's readers raise; their texts advise to run what the file holds
        if isinstance(e, RuntimeError) and out_of_memory(e):
            raise InputError(f"{path}: cannot be read: out of memory ({first_line(e)})") from None
        if not content.startswith(b"PK"):
            what = "another kind of file" if content else "it is empty"
        elif "GLOBAL" in str(e):
            what = "it holds more than plain data, which is not loaded since it could run code"
        else:
            what = "cut off or damaged"
        raise DamagedError(f"{path}: not a readable checkpoint ({what})") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a checkpoint, but a {type(found).__name__}")
    if found.pop(_CHECKED_KEY, False) and not checked:
        raise DamagedError(f"{path}: damaged: its checksum is missing")
    return found


def _refuse_compressed(content: bytes) -> None:
    """Raise ValueError for content that would expand: ``torch.save`` never compresses."""
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its content is compressed; torch.save writes it as it is")
    # how pickle spells bytes; nested, with the codec hex, each doubles its argument
    if b"_codecs\nencode\n" in content:
        raise ValueError("it holds texts to be encoded, which weights need not")


def _refuse_inflated(found: object, size: int) -> None:
    """Raise ValueError for content that grows when it is copied: large views of one number, many references to one list."""
    try:
        objects, numbers = _size_of(found, {})
    except RecursionError:
        raise ValueError("nested too deep") from None
    if objects > 16 * size or numbers > 16 * size:
        raise ValueError(f"its {size:,} bytes would become {objects:,} objects and {numbers:,} bytes of tensors")


def _size_of(value: object, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count (objects, bytes of tensors) in nested values; what occurs twice counts twice.

    ``known`` holds the counts of containers by identity; None while one is being counted.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return 1, value.numel() * value.element_size()
    if not isinstance(value, (dict, list, tuple)):
        return 1, 0
    if id(value) in known:
        found = known[id(value)]
        if found is None:
            raise ValueError("it holds something that holds itself")
        return found
    known[id(value)] = None
    parts = [_size_of(v, known) for v in (value.values() if isinstance(value, dict) else value)]
    known[id(value)] = size = (1 + sum(n for n, _ in parts), sum(b for _, b in parts))
    return size


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a .safetensors file, by name, on the CPU; raise InputError if that fails."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(f"{path}: reading it needs the package safetensors: pip install safetensors") from None
    try:
        return load_file(path)
    except Exception as e:  # safetensors' error derives from Exception alone
        raise DamagedError(f"{path}: cannot be read as safetensors ({first_line(e)})") from None

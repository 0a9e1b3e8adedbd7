"""Features of a fixed number of views of every image, computed once by a frozen backbone and kept in array files.

With a frozen backbone the features of a view never change. Steps then draw from a pool of views, weak and strong ones of each
image, and train a head without forwarding an image. A pool depends on the images, the augmentation and the backbone, and not
on a run: all runs of a sweep share it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from muscle_plugin.data.batches import Batches
from muscle_plugin.data.images import cores
from muscle_plugin.data.loader import Parcel, fits
from muscle_plugin.data.source import Source
from muscle_plugin.data.splits import Split
from muscle_plugin.data.views import LABELLED, UNLABELLED, View
from muscle_plugin.errors import DataError, UserError
from muscle_plugin.files import load_tensors, save_tensors, write_json
from muscle_plugin.propagation.graph import NearestNeighbours, Neighbourhood, neighbourhood
from muscle_plugin.seeding import derive
from muscle_plugin.text import duration

#: Version of the files; to be raised when the same key gives other features.
POOL_FORMAT = 1
#: Images whose views are drawn together, and which are computed again if a pool is cut off.
CHUNK = 256
#: Seconds between two records of how far a pool is, and between two lines where there is no terminal.
_RECORDED_EVERY, _SAID_EVERY = 10.0, 30.0
_PLAIN = "plain"


class PooledBatches(Batches):
    """Batches of features from a pool that holds, for each image and strength, as many views as ``counts`` says.

    For each image of a step the pool's views of a strength are put into a random order, and the step's views of that strength
    take them one by one; they are reused cyclically if a step needs more than the pool holds. Images without augmentation are
    in the pool too.

    Args:
        counts: views by strength, of each training image.
        backbone: what identifies the backbone, and the precision in which it computes.
        name: how the names of the files begin.
        augmentations: what identifies the augmentation of a strength.
        places: folders for the files; all are searched, the first that can be written is used.
        others: see :class:`Batches`.
    """

    def __init__(
        self, source: Source, split: Split, *others: Any, counts: Mapping[str, int], backbone: Mapping[str, object],
        places: Sequence[Path], name: str, augmentations: Mapping[str, str],
    ) -> None:  # fmt: skip
        super().__init__(source, split, *others)
        self._train, self._counts = source.train, counts
        self._places, self._name, self._augmentations = tuple(dict.fromkeys(places)), name, augmentations
        self._key = {
            "format": POOL_FORMAT,
            "images": _digest(source.images),
            **backbone,
            "pixels": [t.tolist() for t in self.statistics],
            "size": [self.preprocessing.size, self.preprocessing.interpolation],
        }
        self._members = {LABELLED: split.labelled, UNLABELLED: split.unlabelled}
        self._pools: dict[str, Tensor] = {}
        self._neighbours: dict[int | None, Neighbourhood] = {}

    def pool(self, strength: str) -> Tensor:
        """(S, N, F) float16 features of S views of the N training images, on the device if they fit; of the strength
        ``plain`` (1, P, F) of all images of the source."""
        if strength not in self._pools:
            found = self._open(strength)
            self._pools[strength] = found.to(self.device) if fits(found.view(torch.uint8), self.device) else found
        return self._pools[strength]

    def prepare(self, strengths: Iterable[str] | None = None) -> None:
        for strength in {v.strength for v in self.views.values()} if strengths is None else strengths:
            self.pool(strength)

    @property
    def fixed(self) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        return self.pool(_PLAIN)[0], Tensor.float

    def batch(self, step: int) -> dict[str, Tensor]:
        wheres, parcel = self._drawn(step)
        sent = parcel.unpack()
        out = {name: there for name, there in sent.items() if name in self.parameters}
        if "y_lb" in self.parameters:
            out["y_lb"] = self._labels[sent["idx_lb"]]
        for (kind, strength), views in self._by_kind().items():
            pool = self.pool(strength).flatten(0, 1)
            where = sent[f"{kind} {strength}"] if pool.device == self.device else wheres[f"{kind} {strength}"]
            drawn = pool[where].to(self.device, non_blocking=True).float()
            parts = drawn.split([v.count for v in views.values()])
            out |= {name: part.flatten(0, 1) for name, part in zip(views, parts, strict=True)}
        return out

    def _by_kind(self) -> dict[tuple[str, str], dict[str, View]]:
        """Kind of images and strength -> the views of both."""
        found: dict[tuple[str, str], dict[str, View]] = {}
        for name, view in self.views.items():
            found.setdefault((view.images, view.strength), {})[name] = view
        return found

    def _draw(self, step: int) -> tuple[dict[str, Any], Parcel]:
        """Where in the pools the views of a step are, (V, n) by kind and strength, on the CPU and for the device."""
        index = {kind: stream.batch(step) for kind, stream in self.order.items()}
        wheres = {}
        for (kind, strength), views in self._by_kind().items():
            slots, rows = self._counts[strength], self._members[kind][index[kind]]
            # does not depend on how many views there are: MUSCLE's come after those of the base
            random = self._random(step, {f"pool {kind} {strength}": (1, len(rows))})
            order = random.uniform(0, 1, slots).argsort(0)
            chosen = order[torch.arange(sum(v.count for v in views.values())) % slots]
            wheres[f"{kind} {strength}"] = chosen * len(self._train) + rows
        return wheres, Parcel({"idx_lb": index[LABELLED], "idx_ulb": index[UNLABELLED], **wheres}, self.device)

    def neighbours(self, k: int | None) -> Neighbourhood:
        """The ``k`` nearest neighbours (None: 2 ln n) of each training image, by its features without augmentation."""
        if k not in self._neighbours:
            key = {**self._key, "k": k, "members": _digest(self._train)}
            paths = [place / f"{self._name}_neighbours_{_short(key)}.pth" for place in self._places]
            self._neighbours[k] = _read_neighbours(paths) or self._search(k, paths)
        order, near = self._neighbours[k]
        on = self.device
        return Neighbourhood(order.to(on), near._replace(similarity=near.similarity.to(on), index=near.index.to(on)))

    def _search(self, k: int | None, paths: Iterable[Path]) -> Neighbourhood:
        found = neighbourhood(self.fixed_features(self._train), k)
        for path in paths:
            with contextlib.suppress(OSError):  # the next run searches again
                save_tensors(path, {"order": found.order, **found.neighbours._asdict()})
                break
        return found

    # -- files

    def _open(self, strength: str) -> Tensor:
        assert self._encoder is not None
        count = self._counts.get(strength, 1)
        members = self._train if strength in self._counts else torch.arange(len(self.images.pool))
        about = {"augmentation": self._augmentations.get(strength, ""), "views": count, "members": _digest(members)}
        key = {**self._key, **about}
        stem = f"{self._name}_{strength}_{_short(key)}.npy"
        shape = (count, len(members), self._encoder.num_features)
        paths = [place / stem for place in self._places]
        for path in paths:
            if path.exists() and (found := _whole(path, key, shape)) is not None:
                return found
        reasons = []
        for path in paths:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with _alone(path):
                    if (found := _whole(path, key, shape)) is None:  # another process may have made it meanwhile
                        self._make(path, key, shape, members, strength)
                        found = _whole(path, key, shape)
                if found is not None:
                    return found
            except OSError as e:
                reasons.append(f"{path.parent}: {e.strerror or e}")
        megabytes = 2 * np.prod(shape) / 1e6
        raise DataError(
            f"view_pool: the features of {count} {strength} view(s) of {len(members)} images need a file of"
            f" {megabytes:,.0f} MB, which cannot be written ({'; '.join(reasons)}); give a folder with room as --cache_dir, or"
            " --view_pool none"
        )

    def _make(self, path: Path, key: dict[str, Any], shape: tuple[int, ...], members: Tensor, strength: str) -> None:
        """Compute the features that are not there yet, and record which are, so that a pool that is cut off goes on."""
        part, record = path.with_suffix(".part"), path.with_suffix(".part.json")
        starts = [(view, first) for view in range(shape[0]) for first in range(0, shape[1], CHUNK)]
        done = _done(part, record, key, shape)
        array = np.lib.format.open_memmap(part, "r+" if done else "w+", np.float16, None if done else shape)
        # claim the room: a full disk is an error here, and not a signal later
        if not done and hasattr(os, "posix_fallocate"):
            try:
                with part.open("r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, os.path.getsize(part))
            except OSError:
                part.unlink()
                raise
        augment = self._augment.get(strength)

        def make(view: int, first: int) -> int:
            images = self.images.pool[members[first : first + CHUNK].to(self.images.pool.device)].to(self.device)
            if augment is not None:
                seed = derive(0, "view pool", strength, view, first)
                images = augment(images, torch.Generator().manual_seed(seed))
            precise = self.to_net(images)
            features = precise.half()
            if not features.isfinite().all():
                why = "are not finite" if precise.isnan().any() else "exceed half precision's 65,504"
                raise DataError(f"view_pool: features {why}; give --view_pool none")
            array[view, first : first + CHUNK] = features.cpu().numpy()
            return zlib.crc32(array[view, first : first + CHUNK].data)

        def save(to: Path) -> None:
            array.flush()
            write_json(to, {"key": key, "checksums": {f"{v},{f}": c for (v, f), c in done.items()}})

        left = [start for start in starts if start not in done]
        recorded = time.monotonic()
        try:
            with (
                _said(
                    f"features of {shape[0]} {strength} view(s) of {shape[1]:,} images", len(starts), len(done)
                ) as say,
                contextlib.closing(_in_parallel(make, left, self.device)) as made,
            ):
                for start, checksum in made:
                    done[start] = checksum
                    say(len(done))
                    if time.monotonic() - recorded > _RECORDED_EVERY:
                        save(record)
                        recorded = time.monotonic()
        finally:
            save(record)
        save(path.with_suffix(".json"))
        os.replace(part, path)
        record.unlink()


def _read_neighbours(paths: Iterable[Path]) -> Neighbourhood | None:
    for path in filter(Path.exists, paths):
        with contextlib.suppress(UserError, KeyError):  # damaged, or another file
            found = load_tensors(path)
            near = NearestNeighbours(found["similarity"], found["index"], found["method"])
            return Neighbourhood(found["order"], near)
    return None


def _short(key: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]


def _digest(images: Tensor) -> str:
    found = hashlib.sha256(repr(tuple(images.shape)).encode())
    for part in images.split(1024):
        found.update(part.contiguous().numpy())
    return found.hexdigest()


def _checksums_hold(array: np.ndarray, checksums: Mapping[str, int]) -> dict[tuple[int, int], int]:
    """The chunks, (view, first image), whose checksum is right."""
    listed = {cast("tuple[int, int]", tuple(map(int, k.split(",")))): c for k, c in checksums.items()}
    with ThreadPoolExecutor(cores()) as pool:
        found = pool.map(lambda at: zlib.crc32(array[at[0], at[1] : at[1] + CHUNK].data), listed)
        return {at: c for (at, c), now in zip(listed.items(), found, strict=True) if c == now}


def _done(path: Path, record: Path, key: dict[str, Any], shape: tuple[int, ...]) -> dict[tuple[int, int], int]:
    """What a file holds of a pool, with its checksums; nothing if it is absent, damaged or of something else."""
    with contextlib.suppress(Exception):  # a damaged file can make its readers raise anything
        header = json.loads(record.read_text())
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if header["key"] == key and array.shape == shape and array.dtype == np.float16:
            return _checksums_hold(array, header["checksums"])
    return {}


def _whole(path: Path, key: dict[str, Any], shape: tuple[int, ...]) -> Tensor | None:
    """The features of a finished file, mapped into memory; None if it is absent, damaged or of something else."""
    if len(_done(path, path.with_suffix(".json"), key, shape)) < shape[0] * -(-shape[1] // CHUNK):
        return None
    # copy-on-write: nothing can write to the file, and torch asks for writable memory
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process makes this file, and keep others waiting; the lock ends with the process."""
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that is making {path}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _in_parallel(
    make: Callable[[int, int], int], starts: Sequence[tuple[int, int]], device: torch.device
) -> Generator[tuple[tuple[int, int], int]]:
    """Each chunk with what ``make`` returns for it, as they are done; on a CPU by one thread per core."""
    if device.type != "cpu":
        yield from ((start, make(*start)) for start in starts)
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(cores(), initializer=lambda: torch.set_num_threads(1)) as pool:
        running = {pool.submit(make, *start): start for start in starts}
        try:
            for future in as_completed(running):
                yield running[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # for threads to come, which take the number set last


@contextlib.contextmanager
def _said(what: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal, elsewhere a line now and then, with the time left."""
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(24), TaskProgressColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda now: bar.update(task, completed=now)
        return
    began, first = time.monotonic(), done
    last = began - _SAID_EVERY  # the first chunk tells how long it will take

    def say(now: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SAID_EVERY:
            last = time.monotonic()
            left = (last - began) / (now - first) * (total - now)
            console.print(f"{what}: {100 * now / total:.0f} %, {duration(left)} left")

    yield say

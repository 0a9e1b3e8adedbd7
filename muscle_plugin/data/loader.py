"""Where the images of a step come from: memory of the device, or, for sets that do not fit, a DataLoader's workers.

Both give the same images for the same step, so that a run's views do not depend on the choice.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from muscle_plugin.data.sampler import IndexStream

#: A set stays on the device if it takes no more than this share of the free memory.
SHARE = 0.5
_NO_END = 2**62  # steps; a loader is asked for as many as training needs


def fits(images: Tensor, device: torch.device) -> bool:
    """Whether uint8 ``images`` may live in the device's memory (for a CPU: in the machine's)."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**62
    return images.numel() <= SHARE * free


class _Steps(Dataset):
    """Training step -> its indices and uint8 images, by kind."""

    def __init__(self, images: Tensor, members: Mapping[str, Tensor], streams: Mapping[str, IndexStream]) -> None:
        self.images, self.members, self.streams = images, members, streams

    def __getitem__(self, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        index = {kind: stream.batch(step) for kind, stream in self.streams.items()}
        return {kind: (i, self.images[self.members[kind][i]]) for kind, i in index.items()}


class ResidentImages:
    """The images of any step, from memory of the device.

    Args:
        images: (P, channels, H, W) uint8.
        members: kind of image -> (n,) which of them are of that kind.
        streams: kind -> the order in which they are drawn.
        device: where they are to live.
    """

    def __init__(
        self, images: Tensor, members: Mapping[str, Tensor], streams: Mapping[str, IndexStream], device: torch.device
    ) -> None:
        images = images.to(device).contiguous()  # image after image, whatever the source has them in
        self._steps = _Steps(images, {k: m.to(device) for k, m in members.items()}, streams)
        self._members = dict(members)
        self._device = device

    def draw(self, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """kind -> (n,) indices among its images, and their rows of :meth:`all_images`, on the CPU."""
        index = {k: stream.batch(step) for k, stream in self._steps.streams.items()}
        return {k: (i, self._members[k][i]) for k, i in index.items()}

    def all_images(self) -> Tensor:
        """(P, channels, H, W) uint8, on the device."""
        return self._steps.images

    def step(self, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """kind -> (n,) indices among its images, and (n, channels, H, W) uint8 images, on the device."""
        index = {k: s.batch(step).to(self._device, non_blocking=True) for k, s in self._steps.streams.items()}
        return {k: (i, self.gather(k, i)) for k, i in index.items()}

    def gather(self, kind: str, index: Tensor) -> Tensor:
        """(n, channels, H, W) uint8 images of a kind, on the device."""
        return self._steps.images[self._steps.members[kind][index]]


class StreamedImages:
    """The same, gathered ahead by worker processes from the host's memory or a mapped file, and copied as they are needed.

    Steps that follow one another are free; any other step starts the workers anew.

    Args:
        workers: processes; 0: gather when asked.
    """

    def __init__(
        self, images: Tensor, members: Mapping[str, Tensor], streams: Mapping[str, IndexStream], device: torch.device,
        workers: int,
    ) -> None:  # fmt: skip
        self._steps, self._device, self._workers = _Steps(images, members, streams), device, workers
        self._iterator: Iterator[dict[str, tuple[Tensor, Tensor]]] | None = None
        self._next = 0
        self._last: tuple[int, dict[str, tuple[Tensor, Tensor]]] | None = None

    def step(self, step: int) -> dict[str, tuple[Tensor, Tensor]]:
        """As :meth:`ResidentImages.step`."""
        if self._last is not None and self._last[0] == step:
            return self._last[1]
        if self._iterator is None or step != self._next:
            self.close()
            loader = DataLoader(
                self._steps, batch_size=None, sampler=range(step, _NO_END), num_workers=self._workers,  # type: ignore[arg-type]
                pin_memory=self._device.type == "cuda",
                generator=torch.Generator(),  # its own: the workers' seeds must not be drawn from training's
            )  # fmt: skip
            self._iterator = iter(loader)
        found = next(self._iterator)
        out = {
            kind: (i.to(self._device, non_blocking=True), x.to(self._device, non_blocking=True))
            for kind, (i, x) in found.items()
        }
        self._next, self._last = step + 1, (step, out)
        return out

    def all_images(self) -> Tensor:
        """(P, channels, H, W) uint8, where they are kept."""
        return self._steps.images

    def close(self) -> None:
        """Stop the workers."""
        self._iterator = None

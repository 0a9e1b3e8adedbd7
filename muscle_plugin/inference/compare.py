"""Whether what was exported predicts what the checkpoint does, on real images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from muscle_plugin.data.images import decode, images_at
from muscle_plugin.data.load import load_data
from muscle_plugin.errors import DataError, ExportError, InputError
from muscle_plugin.run_files import CONFIG_FILE
from muscle_plugin.settings.schema import RunSettings
from muscle_plugin.settings.sources import read_saved
from muscle_plugin.text import first_line

#: Images on which the export is compared with the checkpoint.
COMPARED = 64


class Comparison:
    """Compares logits with those of the checkpoint.

    Args:
        images: (N, 3, S, S) uint8 RGB.
        expected: (N, C) logits of the checkpoint's net.
        tolerance: largest difference of a logit, relative to the largest logit or 1.

    Attributes:
        found: largest difference of a logit by what was compared.
    """

    def __init__(self, images: Tensor, expected: Tensor, tolerance: float) -> None:
        self.images, self.expected, self.found = images, expected, dict[str, float]()
        self._limit = tolerance * max(1.0, float(expected.abs().max()))

    def same(self, logits: Tensor) -> bool:
        """Whether (N, C) logits are the expected ones within the tolerance."""
        return float((logits - self.expected).abs().max()) <= self._limit

    def check(self, name: str, logits: Tensor, first: int = 0) -> None:
        """Compare the logits of all images from ``first`` on.

        Raises:
            ExportError: they differ by more than the tolerance.
        """
        difference = float((logits - self.expected[first:]).abs().max())
        if not difference <= self._limit:
            raise ExportError(
                f"{name} differs from the checkpoint by {difference:.2g} in a logit, more than {self._limit:.2g};"
                " nothing was written"
            )
        self.found[name] = difference


def read_images(path: Path, size: int) -> Tensor:
    """(N, 3, size, size) uint8 RGB: at most :data:`COMPARED` images of a folder, evenly chosen; or one image.

    Raises:
        DataError: there is none, or one cannot be read.
    """
    files = images_at(path)
    return torch.from_numpy(np.stack([decode(files[i], size) for i in _evenly(len(files))]))


def images_of_the_run(checkpoint: Path, size: int) -> Tensor:
    """As :func:`read_images`, of the data set that the run of a checkpoint was trained on: test images if it has any.

    Raises:
        DataError: the run's ``config.yaml`` or its data cannot be read.
    """
    try:
        saved = {k: v for layer in read_saved(checkpoint.parent / CONFIG_FILE) for k, v in layer.values.items()}
        s = RunSettings(**{k: v for k, v in saved.items() if k in RunSettings.model_fields})
        source = load_data(s.model_copy(update={"img_size": size}))
    except (DataError, InputError, OSError, ValueError) as e:
        raise DataError(
            f"the images of the run, to compare on, cannot be had ({first_line(e)}); --images names a folder of some"
        ) from None
    members = source.test if len(source.test) else source.train
    pixels = source.images[members[_evenly(len(members))]]
    return pixels if pixels.shape[1] == 3 else pixels.repeat(1, 3, 1, 1)


def _evenly(count: int) -> Sequence[int]:
    return sorted({i * count // min(count, COMPARED) for i in range(min(count, COMPARED))})

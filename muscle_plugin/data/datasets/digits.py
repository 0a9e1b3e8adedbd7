"""scikit-learn's digits."""

from __future__ import annotations

import numpy as np
import torch

from muscle_plugin.data.source import Source, SourceOptions


def digits(options: SourceOptions) -> Source:
    """Read scikit-learn's digits: 1,437 training and 360 test images of 8 x 8 pixels, one channel.

    The train/test split is stratified and the same for every seed. The images come with scikit-learn.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=bunch.target, random_state=0)
    return Source(images, labels, torch.from_numpy(train), torch.from_numpy(test), tuple("0123456789"))

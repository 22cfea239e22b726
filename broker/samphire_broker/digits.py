"""Real handwritten digits, as they ship with scikit-learn (UCI ML hand-written digits, 1,797 images)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Digits(NamedTuple):
    """Images, float32 [n, 8, 8] from 0 to 1, and labels, int64 [n], in a fixed split."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    held_out_images: NDArray[np.float32]
    held_out_labels: NDArray[np.int64]


def load_split() -> Digits:
    """The split that training and the demo share: a quarter is held out, never trained on."""
    from sklearn.datasets import load_digits  # it takes two seconds to load
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)
    labels = bunch.target.astype(np.int64)
    split = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    train_images, held_out_images, train_labels, held_out_labels = split
    return Digits(train_images, train_labels, held_out_images, held_out_labels)

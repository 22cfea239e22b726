"""What `make bench-gpu` asks the models, and what it expects of them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

IMAGES = 64
PIXELS = 64
NEAR = 1e-4
"""Scores of the same image differ by less, from one device to the other; those of two images by more."""

sys.path.insert(0, str(Path(__file__).parent / "models" / "classifier" / "1"))
from network import classifier, scores  # type: ignore[import-not-found]  # noqa: E402 - Triton reads it from there too


@dataclass(frozen=True)
class Model:
    """A model with different questions, and the bytes of the answer to each."""

    name: str
    input: str
    output: str
    datatype: str
    questions: Sequence[NDArray[Any]]
    expected: Sequence[bytes]
    same: Callable[[bytes, bytes], bool]


def identity() -> Model:
    """FP32 [1, 16], which comes back."""
    rows = [np.full((1, 16), number, np.float32) for number in range(1000)]
    answers = [row.tobytes() for row in rows]
    return Model("identity", "input_fp32", "output_fp32", "FP32", rows, answers, operator.eq)


def images() -> NDArray[np.uint8]:
    """UINT8 [n, 3, height, width]: coarse patterns, no two of which are alike."""
    coarse = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 4, 4), dtype=np.uint8)
    return coarse.repeat(PIXELS // 4, axis=2).repeat(PIXELS // 4, axis=3)


def image_classifier() -> Model:
    """Images whose scores are computed here as well."""
    network, asked = classifier(), images()
    answers = scores(network, torch.from_numpy(asked)).numpy()
    apart = np.abs(answers[:, None] - answers[None]).max(axis=-1) + np.eye(IMAGES)
    assert apart.min() > 2 * NEAR, "an answer could not be told from that to another image"
    questions = [image[np.newaxis] for image in asked]
    return Model("classifier", "image", "scores", "UINT8", questions, [one.tobytes() for one in answers], near)


def near(expected: bytes, answer: bytes) -> bool:
    """Whether these scores are those of the same image."""
    one, other = np.frombuffer(expected, np.float32), np.frombuffer(answer, np.float32)
    return one.shape == other.shape and bool(np.abs(one - other).max() < NEAR)


MODELS = (identity(), image_classifier())

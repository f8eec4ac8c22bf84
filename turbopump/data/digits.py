"""scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels; every fifth is held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from turbopump.core.config import NonNegativeInt, setting
from turbopump.core.errors import MissingDependencyError


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """scikit-learn's handwritten digits, 8 x 8 pixels, for the convnet."""

    kind: Literal["digits"] = setting("digits", "scikit-learn's handwritten digits, 8 x 8 pixels")
    shift: NonNegativeInt = setting(0, "training images are moved by up to this many pixels each way; 0 leaves them")


def open_digits(config: DigitsConfig, split: str) -> DigitsSource:
    """The split `train` (1,437 images) or `validation` (360); raises `MissingDependencyError`."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("scikit-learn", "digits", "the digits dataset") from error
    data = load_digits()
    held_out = np.arange(len(data.target)) % 5 == 0
    mine = held_out if split == "validation" else ~held_out
    images = (data.images[mine, None] / 8.0 - 1.0).astype(np.float32)
    return DigitsSource(images, data.target[mine].astype(np.int64), config.shift if split == "train" else 0, split)


class DigitsSource:
    """Sample i is (image float32 [1, 8, 8] in -1 to 1, label int64)."""

    def __init__(self, images_NCHW: np.ndarray, labels_N: np.ndarray, shift: int, split: str) -> None:
        self._images, self._labels, self._shift = images_NCHW, labels_N, shift
        self.randomness = "seeded" if shift else "none"
        self.num_classes = 10
        self.name = f"digits ({split})"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.int64]:
        image = self._images[index].copy()
        if self._shift:  # numpy's global generator: the loader has seeded it for this sample
            down, right = np.random.randint(-self._shift, self._shift + 1, 2)
            image = _moved(image, int(down), int(right))
        return image, self._labels[index]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """[B, 1, 8, 8] and [B], where nothing is random; else a list of samples."""
        if self._shift:
            return [self[int(i)] for i in indices]
        rows = np.asarray(indices, np.int64)
        return self._images[rows], self._labels[rows]


def _moved(image_CHW: np.ndarray, down: int, right: int) -> np.ndarray:
    """The image moved by whole pixels; what comes in from outside is background (-1)."""
    _, height, width = image_CHW.shape
    out = np.full_like(image_CHW, -1.0)
    top, left = max(0, down), max(0, right)
    bottom, end = min(height, height + down), min(width, width + right)
    out[:, top:bottom, left:end] = image_CHW[:, top - down : bottom - down, left - right : end - right]
    return out

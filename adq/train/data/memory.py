"""Sets held in memory as uint8, augmented and normalised a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset

from adq.train.data.sampler import AUGMENT, generator


@dataclass(frozen=True)
class CropFlip:
    """Shift by up to ``padding`` pixels either way, filled with black, and mirror half of the images."""

    padding: int
    flip: bool
    seed: int = 0

    def draw(self, epoch: int, length: int) -> np.ndarray:
        """Row offset, column offset and mirroring of every sample in an epoch, int64 ``[length, 3]``."""
        high = [2 * self.padding + 1, 2 * self.padding + 1, 2 if self.flip else 1]
        return generator(AUGMENT, self.seed, epoch).integers(high, size=(length, 3))

    def apply(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Augment uint8 images ``[B, C, H, W]``, each by its row of ``draws`` ``[B, 3]``; returns a new array."""
        batch, channels, height, width = images.shape
        p = self.padding
        canvas = np.zeros((batch, channels, height + 2 * p, width + 2 * p), np.uint8)
        canvas[:, :, p : p + height, p : p + width] = images
        windows = sliding_window_view(canvas, (height, width), axis=(2, 3))
        out = windows[np.arange(batch), :, draws[:, 0], draws[:, 1]]
        mirrored = draws[:, 2] == 1
        out[mirrored] = out[mirrored, :, :, ::-1]
        return out


class MemoryDataset(Dataset[tuple[Tensor, Tensor]]):
    """Images in memory; a batch is fetched at once through ``__getitems__``.

    Args:
        images: uint8 ``[N, C, H, W]``; not copied.
        labels: int64 ``[N]``.
        mean: per channel, of pixels scaled to 0..1.
        std: the same.
        augment: None for the images as they are.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        augment: CropFlip | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augment = augment
        self._mean = torch.tensor(mean).mul_(255).view(-1, 1, 1)
        self._std = torch.tensor(std).mul_(255).view(-1, 1, 1)
        self._draws: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Image float32 ``[C, H, W]`` and label; the index may carry an epoch (see EpochSampler)."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images float32 ``[B, C, H, W]``, normalised, and labels int64 ``[B]``."""
        epochs, rows = np.divmod(np.asarray(indices, np.int64), len(self))
        images = self.images[rows]
        if self.augment is not None:
            images = self.augment.apply(images, self._draws_of(epochs, rows))
        normalised = torch.from_numpy(images).float().sub_(self._mean).div_(self._std)
        return normalised, torch.from_numpy(self.labels[rows])

    def _draws_of(self, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
        assert self.augment is not None
        out = np.empty((len(rows), 3), np.int64)
        for epoch in np.unique(epochs).tolist():
            if self._draws is None or self._draws[0] != epoch:
                self._draws = (epoch, self.augment.draw(epoch, len(self)))
            here = epochs == epoch
            out[here] = self._draws[1][rows[here]]
        return out


def identity(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Collate function for datasets whose ``__getitems__`` returns a batch already."""
    return batch

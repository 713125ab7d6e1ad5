"""Order of the samples: a function of (seed, epoch) alone, resumable inside an epoch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ORDER, AUGMENT, SPLIT, CALIBRATION = range(4)
"""What a random stream is for; part of its seed, so that the streams are independent."""


def generator(purpose: int, *seeds: int) -> np.random.Generator:
    """A random generator that depends on its purpose and the non-negative seeds alone."""
    return np.random.default_rng([purpose, *seeds])


class EpochSampler(Sampler[int]):
    """Shuffles ``length`` samples anew every epoch, and tells the dataset which epoch it is.

    It yields ``epoch * length + index``; the datasets of this package take that apart again with
    :func:`split_index`. So the epoch travels with every index: into persistent workers, through samplers
    that wrap this one (Accelerate's shards), and never changes under batches already on their way.
    """

    def __init__(self, length: int, seed: int = 0) -> None:
        self.length = length
        self.seed = seed
        self.epoch = 0
        self._skip = (0, 0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, that the next iteration goes through."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch

    def resume(self, epoch: int, samples: int) -> None:
        """Go to ``epoch``, and leave out its first ``samples`` samples the next time it is gone through.

        ``samples`` counts over all processes: finished batches x batch size x processes. The samples left
        out are not decoded, and the batches that follow are those of the uninterrupted epoch.
        """
        if not 0 <= samples <= self.length:
            raise ValueError(f"an epoch has {self.length} samples, cannot resume after {samples}")
        self.set_epoch(epoch)
        self._skip = (epoch, samples)

    def __iter__(self) -> Iterator[int]:
        epoch, start = self.epoch, 0
        if self._skip[0] == epoch:
            start, self._skip = self._skip[1], (0, 0)
        order = generator(ORDER, self.seed, epoch).permutation(self.length)
        yield from (order[start:] + epoch * self.length).tolist()

    def __len__(self) -> int:
        """Samples of a complete epoch."""
        return self.length


def split_index(index: int, length: int) -> tuple[int, int]:
    """Epoch and index in the dataset that an :class:`EpochSampler` packed into one number."""
    return divmod(index, length)


def stratified_order(labels: np.ndarray, seed: int) -> np.ndarray:
    """A seeded order of all samples in which every beginning holds the classes in about their shares.

    Args:
        labels: int64 ``[N]``.
        seed: non-negative.

    Returns:
        int64 ``[N]``, a permutation. A class of m samples comes at the positions (i + 0.5) / m of the way.
    """
    shuffled = generator(SPLIT, seed).permutation(len(labels))
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = shuffled[labels[shuffled] == label]
        position[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled[np.argsort(position[shuffled], kind="stable")]

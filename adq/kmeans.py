"""One-dimensional k-means to the optimum: the K levels with the least squared error for many weights.

Lloyd iterations stop in local optima, here up to a decibel short. On a line the optimum can be computed, by
dynamic programming over the cuts between cells (H. Wang and M. Song, The R Journal 3(2), 2011), once there are
few enough points. So the weights become a :class:`Spectrum` (a histogram where there are many), which becomes
a few points for each level, spaced as the optimum would space its levels; the best cuts between those are
found, and Lloyd iterations on the spectrum finish. Only the histogram grows with the weights.

Everything is deterministic: counts are whole numbers, and the rest is single-threaded numpy in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

BLOCK = 2**20
"""Weights that are worked on at a time; temporaries are of this size."""
SORTED_BELOW = 2**16
"""Up to this many weights are sorted, more are counted in a histogram."""
BINADES, BIN_BITS = 24, 11
"""The histogram covers ``2^-BINADES`` of the largest magnitude up to it, and drops BIN_BITS of 23 mantissa bits."""
SIDE = BINADES << (23 - BIN_BITS)
"""Bins on each side of zero: a bin's width is ``2^-12`` of its value."""
MIN_POINTS, POINTS_PER_LEVEL = 256, 8
REACH = 16
"""A cell holds at most this many times its share of the points (any number if there are only MIN_POINTS)."""
EVENING_ROUNDS = 50
LLOYD_GAIN = 1e-4
"""Lloyd iterations stop when the squared error falls by less than this share of itself (0.0004 dB)."""
LLOYD_MAX_ITERATIONS = 100


@dataclass(frozen=True)
class Spectrum:
    """How weights are distributed: float64 ``[n]`` ascending values, and how many weights have each."""

    value: np.ndarray
    count: np.ndarray

    @property
    def moments(self) -> np.ndarray:
        """Sums of 1, x and x^2 over the first i values, ``[3, n + 1]``."""
        powers = self.count * np.stack([np.ones_like(self.value), self.value, self.value**2])
        return np.pad(powers.cumsum(1), ((0, 0), (1, 0)))


# ---- from weights to a spectrum ----------------------------------------------------------------------


def blocks(w: Tensor, *along: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of at most BLOCK elements that make up ``w``, each with the matching views of ``along``.

    Args:
        w: any shape and layout.
        along: tensors of as many axes, which broadcast against w.
    """
    if w.numel() <= BLOCK:
        yield w, *along
        return
    axis = max(range(w.dim()), key=lambda d: (w.shape[d] > 1, w.stride(d)))
    halves = [t.tensor_split(2, axis) if t.shape[axis] > 1 else (t, t) for t in (w, *along)]
    for half in zip(*halves, strict=True):
        yield from blocks(*half)


def spectrum(w: Tensor, scale: Tensor, low: float, high: float) -> Spectrum:
    """The distribution of ``w / scale``: exact up to SORTED_BELOW weights, else to ``2^-12`` of each value.

    Args:
        w: finite weights, any shape, not empty.
        scale: float32, broadcasts against w.
        low, high: the least and the largest of ``w / scale``.
    """
    parts = (part.float() / s for part, s in blocks(w, scale))
    if w.numel() > SORTED_BELOW:
        return _histogram(parts, np.float32(low), np.float32(high))
    value, count = np.unique(torch.cat([part.flatten() for part in parts]).cpu().numpy(), return_counts=True)
    return Spectrum(value.astype(np.float64), count.astype(np.float64))


def _histogram(parts: Iterable[Tensor], low: np.float32, high: np.float32) -> Spectrum:
    """Counts in bins of equal relative width on both sides of zero, or of the bound nearest to zero."""
    origin = min(max(low, np.float32(0)), high)
    peak = max(high - origin, origin - low).view(np.int32)
    floor = max(0, int(peak) - (BINADES << 23))
    counts = sum(torch.bincount(_bins(part - float(origin), floor), minlength=2 * SIDE + 1) for part in parts)
    edges = np.minimum(floor + (np.arange(SIDE + 2) << BIN_BITS), peak).astype(np.int32).view(np.float32)
    middle = 0.5 * (edges[:-1].astype(np.float64) + edges[1:])
    middle[0] = 0.0
    value = np.concatenate([-middle[:0:-1], middle]) + origin
    count = counts.cpu().numpy()  # type: ignore[union-attr]
    used = count.nonzero()[0]
    return Spectrum(value[used].clip(low, high), count[used].astype(np.float64))


def _bins(x: Tensor, floor: int) -> Tensor:
    """The bin of every element, int32 ``[n]``: the float32 pattern is itself a logarithm, in steps of an ulp."""
    pattern = x.view(torch.int32)
    sign = pattern >> 31
    size = (pattern & 0x7FFFFFFF).sub_(floor).clamp_min_(0).bitwise_right_shift_(BIN_BITS)
    return size.bitwise_xor_(sign).sub_(sign).add_(SIDE).flatten()


# ---- from a spectrum to levels -----------------------------------------------------------------------


def optimal_levels(weights: Spectrum, levels: int) -> np.ndarray:
    """The levels with the least squared error, ascending float64 ``[levels]``; within 0.02 dB of it as measured.

    Up to ``levels`` different values are levels themselves; the largest is then repeated.
    """
    points = _thin(weights, levels)
    if points.value.size <= levels:
        return np.pad(points.value, (0, levels - points.value.size), mode="edge")
    return lloyd(weights, _best_cuts(points, levels))


def _thin(weights: Spectrum, levels: int) -> Spectrum:
    """A few points for each level, each the mean of neighbours, as dense as levels in the optimum would be.

    That is proportional to the cube root of the density (Panter and Dite, 1951): the gap h between neighbours of
    n weights is worth ``(n h^2)^(1/3)``. No gap is worth more than one level, nor gets more than one point.
    """
    value, count = weights.value, weights.count
    if value.size <= MIN_POINTS:
        return weights
    worth = np.cbrt(0.5 * (count[1:] + count[:-1]) * np.diff(value) ** 2)
    for _ in range(EVENING_ROUNDS):
        most = worth.sum() / levels
        if worth.max() <= 1.01 * most:
            break
        worth = np.minimum(worth, most)
    steps = np.minimum(worth / worth.sum() * max(MIN_POINTS, POINTS_PER_LEVEL * levels), 1.0)
    place = np.append(0.0, steps.cumsum()).astype(np.int64)
    first = np.flatnonzero(np.diff(place, prepend=-1))
    total = np.add.reduceat(count, first)
    return Spectrum(np.add.reduceat(count * value, first) / total, total)


def _best_cuts(points: Spectrum, levels: int) -> np.ndarray:
    """Means of the cells with the least squared error, by dynamic programming; float64 ``[levels]``.

    The least error of the first j points in k cells is ``min_i error[k - 1, i] + cost(i, j)``, over the last
    ``reach`` i before j. Needs more points than levels.
    """
    size = points.value.size
    reach = size if size <= MIN_POINTS else REACH * size // levels
    # around their mean, so that differences of the sums of squares keep their digits
    mean = np.average(points.value, weights=points.count)
    moments = Spectrum(points.value - mean, points.count).moments
    n, s, q = (row - _before(np.pad(row, (reach, 0), constant_values=-1.0), reach) for row in moments)
    cost = q - s**2 / n
    error = np.full((levels, reach + size + 1), np.inf)
    error[0, reach] = 0.0
    candidates = np.empty_like(cost)
    for before, after in pairwise(error):
        np.add(_before(before, reach), cost, out=candidates)
        candidates.min(0, out=after[reach:])
    cuts = [size]
    for row in error[::-1]:
        j = cuts[-1]
        cuts.append(j - reach + int((row[j : j + reach] + cost[:, j]).argmin()))
    n, s, _ = np.diff(moments[:, cuts[::-1]])
    return mean + s / n


def _before(padded: np.ndarray, reach: int) -> np.ndarray:
    """Views: in column j the ``reach`` entries before entry j of a row that ``reach`` entries pad; ``[reach, n]``."""
    return sliding_window_view(padded[:-1], reach).T


def lloyd(weights: Spectrum, codebook: np.ndarray) -> np.ndarray:
    """Lloyd iterations (levels move to their cells' means) until the squared error rests, see LLOYD_GAIN.

    A level whose cell is empty stays where it is.

    Args:
        weights: the distribution.
        codebook: ascending float64 ``[K]``; so is the result.
    """
    moments = weights.moments
    before = np.inf
    for _ in range(LLOYD_MAX_ITERATIONS):
        inner = weights.value.searchsorted(0.5 * (codebook[:-1] + codebook[1:]), side="right")
        n, s, _ = np.diff(moments[:, np.concatenate([[0], inner, [weights.value.size]])])
        means = np.divide(s, n, out=codebook.copy(), where=n > 0)
        error = moments[2, -1] - (s * means).sum()
        if not error < (1.0 - LLOYD_GAIN) * before:
            break
        before, codebook = error, np.maximum.accumulate(means)
    return codebook

"""Fitting codebooks to weights: post-training quantization, and the start of training.

Weights are worked on in blocks, so a fit needs little memory beside them, and every result is the same
whatever the number of threads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from adq.config import WeightConfig
from adq.kmeans import SORTED_BELOW, Spectrum, blocks, lloyd, optimal_levels, spectrum
from adq.reference import decision_thresholds, snap_codebook

SCALE_ROUNDS = 3
STEP_CANDIDATES = 60

_ops = torch.ops.adq

Bounds = tuple[Tensor, Tensor]
"""The least and the largest weight of each channel, see :func:`_bounds`."""


@dataclass(frozen=True)
class Fit:
    """A fitted codebook: ``w_q = scale * codebook[code]``.

    Attributes:
        codebook: ascending float32 ``[K]``, in units of ``scale``.
        scale: float32, broadcasts against the weight; one element for ``scale="tensor"``.
        count: float32 ``[K]``, how many weights each level serves: the EMA starts from it.
    """

    codebook: Tensor
    scale: Tensor
    count: Tensor


def sqnr(w: Tensor, w_q: Tensor) -> float:
    """Signal-to-quantization-noise ratio ``10 log10(sum w^2 / sum (w - w_q)^2)`` in dB; inf where equal."""
    signal = noise = torch.zeros((), dtype=torch.float64, device=w.device)
    for x, y in blocks(w, w_q):
        signal = signal + x.double().square().sum()
        noise = noise + (x.double() - y.double()).square().sum()
    if noise.item() == 0.0:
        return math.inf
    return 10.0 * math.log10(signal.item() / noise.item()) if signal.item() > 0.0 else -math.inf


# ---- levels without refinement -----------------------------------------------------------------------


def quantile_codebook(weights: Spectrum, num_levels: int, levels: str = "full") -> Tensor:
    """Levels at quantiles ``(i + 0.5) / n`` of the positive and of the negative weights, plus zero.

    With ``levels="symmetric"`` both sides have the same number; with ``"full"`` the side with more weights
    has the odd one, and a side without weights has none. ADQ, arXiv 2510.19760, section 3.1.

    Args:
        weights: their distribution.
        num_levels: K.

    Returns:
        Ascending float32 ``[K]``.
    """
    value, count = weights.value, weights.count
    positive = Spectrum(value[value > 0], count[value > 0])
    negative = Spectrum(-value[value < 0][::-1], count[value < 0][::-1])
    if levels == "symmetric":  # an empty side mirrors the other one
        positive = positive if positive.value.size else negative
        negative = negative if negative.value.size else positive
    spare = num_levels - 1
    more = positive.count.sum() > negative.count.sum()
    n_pos = spare // 2 + spare % 2 * int(more)
    if not positive.value.size or not negative.value.size:
        n_pos = spare if positive.value.size else 0
    sides = [-_quantiles(negative, spare - n_pos), np.zeros(1), _quantiles(positive, n_pos)]
    return torch.from_numpy(np.sort(np.concatenate(sides))).float()


def _quantiles(side: Spectrum, n: int) -> np.ndarray:
    """Quantiles ``(i + 0.5) / n``, i < n, interpolated linearly; float64 ``[n]``, zeros if there are no weights."""
    if not side.value.size:
        return np.zeros(n)
    ranks = side.count.cumsum()
    position = (np.arange(n) + 0.5) / max(n, 1) * (ranks[-1] - 1)
    low, high = (side.value[ranks.searchsorted(edge, side="right")] for edge in (np.floor(position), np.ceil(position)))
    return low + (position - np.floor(position)) * (high - low)


def uniform_codebook(low: float, high: float, num_levels: int) -> Tensor:
    """K evenly spaced levels over the range of the weights, zero among them; ascending float32 ``[K]``."""
    grid = np.linspace(min(low, 0.0), max(high, 0.0), num_levels)
    return torch.from_numpy(grid - grid[np.abs(grid).argmin()]).float()


# ---- scales ------------------------------------------------------------------------------------------


def _bounds(w: Tensor, axis: int | None) -> Bounds:
    """The least and the largest weight of each channel along ``axis`` (of the tensor if None); float32.

    Shape: that of w with every other axis 1, so that they broadcast. NaN where a weight is.
    """
    others = [d for d in range(w.dim()) if d != axis]
    if not others:
        return w.float(), w.float()
    return w.amin(others, keepdim=True).float(), w.amax(others, keepdim=True).float()


def _products(w: Tensor, codebook: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel ``sum w q`` and ``sum q^2``, q the levels nearest to ``w / scale``; float64, shape of ``scale``."""
    thresholds = decision_thresholds(codebook)
    others = [d + 1 for d in range(w.dim()) if scale.shape[d] == 1]
    sums = torch.zeros(2, *scale.shape, dtype=torch.float64, device=w.device)
    for part, s, wq, qq in blocks(w, scale, *sums):
        x = part.float()
        q, _ = _ops.codebook_lookup(x / s, codebook, thresholds, False)
        # one sum of both: torch splits the sum to a single result between threads, and rounds differently
        products = torch.stack((x * q, q * q))
        both = products.sum(others, keepdim=True) if others else products
        wq += both[0]
        qq += both[1]
    return sums[0], sums[1]


def fit_scale(w: Tensor, codebook: Tensor, scale: Tensor) -> Tensor:
    """Per channel the factor s that minimises ``||w - s q||^2``, q the levels nearest to ``w / scale``.

    The old scale where that factor is not positive. Shape and dtype of ``scale``.
    """
    wq, qq = _products(w, codebook, scale)
    fitted = (wq / qq).float()
    return torch.where(fitted > 0, fitted, scale)


# ---- the fit -----------------------------------------------------------------------------------------


def fit(w: Tensor, config: WeightConfig, axis: int = 0) -> Fit:
    """Fit codebook and scale to a weight: the start of training, and post-training quantization.

    With ``refine`` the levels are those of the least squared error of ``w / scale`` (:mod:`adq.kmeans`); per-channel
    scales start at the largest magnitudes and are fitted in turn with the levels. Otherwise the levels are
    those of ``init`` (in more than 65,536 weights to ``2^-12`` of themselves) and scales stay where they start.

    Args:
        w: weight, finite, not empty.
        config: levels, scale, init, refine and snap are used.
        axis: the output channels' axis.

    Raises:
        ValueError: w is empty, or holds NaN or infinity.
    """
    if w.numel() == 0:
        raise ValueError("adq: the weight is empty")
    w = w.detach()
    per_channel = config.scale == "channel"
    bounds = _bounds(w, axis if per_channel else None)
    if not all(bool(bound.isfinite().all()) for bound in bounds):
        raise ValueError("adq: the weight holds NaN or infinity")
    peak = torch.maximum(-bounds[0], bounds[1])
    some = peak[peak > 0]
    # a channel of zeros is in units of the smallest other one: its codeword nearest to zero need not be zero
    covering = torch.where(peak > 0, peak, some.min() if some.numel() else 1.0)
    scale = covering if per_channel else torch.ones_like(peak)
    if config.update == "step":
        codebook, scale = _uniform_step(w, covering, config.num_levels)
    elif config.refine:
        codebook, scale = _refined(w, scale, bounds, config.num_levels, SCALE_ROUNDS if per_channel else 0)
    elif config.init == "uniform":
        codebook = uniform_codebook(*_limits(scale, bounds), config.num_levels).to(w.device)
    else:
        weights = spectrum(w, scale, *_limits(scale, bounds))
        codebook = quantile_codebook(weights, config.num_levels, config.levels).to(w.device)
    if config.snap and config.update != "step":  # signed integers are on the grid as they are
        codebook = snap_codebook(codebook)
    return Fit(codebook, scale, _statistics(w, scale, codebook)[0].float())


def _uniform_step(w: Tensor, peak: Tensor, num_levels: int) -> tuple[Tensor, Tensor]:
    """The grid of signed integers, and per channel the step of least squared error.

    A search over fractions of the step that covers the largest magnitude ``peak``, whose shape is that of the scale.
    """
    low = -(num_levels // 2)
    grid = torch.arange(low, low + num_levels, dtype=torch.float32, device=w.device)
    best, least = peak, torch.full_like(peak, math.inf, dtype=torch.float64)
    for fraction in np.geomspace(0.05, 1.0, STEP_CANDIDATES).tolist():
        scale = fraction / max(1, num_levels + low - 1) * peak
        wq, qq = _products(w, grid, scale)
        noise = scale.double().square() * qq - 2.0 * scale.double() * wq
        best, least = torch.where(noise < least, scale, best), torch.minimum(noise, least)
    return grid, fit_scale(w, grid, best)


def _limits(scale: Tensor, bounds: Bounds) -> tuple[float, float]:
    """The least and the largest of ``w / scale``."""
    return (bounds[0] / scale).min().item(), (bounds[1] / scale).max().item()


def _refined(w: Tensor, scale: Tensor, bounds: Bounds, num_levels: int, rounds: int) -> tuple[Tensor, Tensor]:
    """The optimal codebook for the given scale, then scale and codebook fitted in turn, ``rounds`` times."""
    levels = optimal_levels(spectrum(w, scale, *_limits(scale, bounds)), num_levels)
    for _ in range(rounds):
        scale = fit_scale(w, _table(levels, w), scale)
        levels = lloyd(spectrum(w, scale, *_limits(scale, bounds)), levels)
    codebook = _table(levels, w)
    if w.numel() > SORTED_BELOW:  # from a histogram's middles to the means of the weights themselves
        count, total = _statistics(w, scale, codebook)
        means = torch.where(count > 0, total / count.clamp_min(1), codebook.double()).float()
        codebook = means.cummax(0).values  # equal means may have been rounded apart
    return codebook, scale


def _table(levels: np.ndarray, w: Tensor) -> Tensor:
    return torch.from_numpy(levels).float().to(w.device)


def _statistics(w: Tensor, scale: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Per level, how many ``w / scale`` are nearest to it (int64 ``[K]``), and their sum (float64 ``[K]``)."""
    thresholds = decision_thresholds(codebook)
    count = torch.zeros(codebook.numel(), dtype=torch.int64, device=w.device)
    total = count.double()
    for part, s in blocks(w, scale):
        n, sums = _ops.codebook_statistics(part.float() / s, thresholds)
        count += n
        total += sums
    return count, total

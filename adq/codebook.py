"""Fitting codebooks: quantile start, Lloyd refinement, scales. Everything is built on the operators, deterministic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adq.config import WeightConfig
from adq.reference import decision_thresholds, least_squares_scale, snap_codebook

LLOYD_GAIN_DB = 0.01
LLOYD_MAX_ITERATIONS = 200
SCALE_ROUNDS = 3

_ops = torch.ops.adq


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
    signal = w.double().square().sum().item()
    noise = (w.double() - w_q.double()).square().sum().item()
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf


def _side_quantiles(ordered: Tensor, n: int) -> Tensor:
    """Quantiles ``(i + 0.5) / n``, i < n, of sorted values, interpolated linearly; float32 ``[n]``."""
    position = (torch.arange(n, device=ordered.device, dtype=torch.float64) + 0.5) / n * (ordered.numel() - 1)
    low = position.floor().long()
    high = position.ceil().long()
    return torch.lerp(ordered[low].double(), ordered[high].double(), position - low).float()


def quantile_codebook(w: Tensor, num_levels: int, levels: str = "full") -> Tensor:
    """Levels at quantiles ``(i + 0.5) / n`` of the positive and of the negative weights, plus zero.

    With ``levels="symmetric"`` both sides have the same number; with ``"full"`` the side with more weights
    has the odd one, and a side without weights has none. ADQ, arXiv 2510.19760, section 3.1.

    Args:
        w: finite weights, any shape, not empty.
        num_levels: K.

    Returns:
        Ascending float32 ``[K]``.
    """
    values = w.detach().flatten().float()
    positive = values[values > 0].sort().values
    negative = values[values < 0].sort().values
    spare = num_levels - 1
    n_pos, n_neg = spare // 2, spare // 2
    if positive.numel() == 0 and negative.numel() == 0:
        return values.new_zeros(num_levels)
    if levels == "symmetric":  # an empty side mirrors the other one
        positive, negative = (
            positive if positive.numel() else -negative.flip(0),
            negative if negative.numel() else -positive.flip(0),
        )
    elif positive.numel() == 0 or negative.numel() == 0:
        n_pos, n_neg = (spare, 0) if positive.numel() else (0, spare)
    elif positive.numel() > negative.numel():
        n_pos = spare - n_neg
    else:
        n_neg = spare - n_pos
    zero = values.new_zeros(num_levels - n_pos - n_neg)
    sides = [
        _side_quantiles(negative, n_neg) if n_neg else zero[:0],
        zero,
        _side_quantiles(positive, n_pos) if n_pos else zero[:0],
    ]
    return torch.cat(sides).sort().values


def uniform_codebook(w: Tensor, num_levels: int) -> Tensor:
    """K evenly spaced levels over the range of w, zero among them; ascending float32 ``[K]``."""
    low, high = (bound.float() for bound in w.detach().aminmax())
    grid = low.clamp_max(0) + (high.clamp_min(0) - low.clamp_max(0)) * torch.linspace(0, 1, num_levels, device=w.device)
    return grid - grid[grid.abs().argmin()]


def lloyd(v: Tensor, codebook: Tensor) -> Tensor:
    """Lloyd iterations (cell means, exact 1-D k-means steps) until the SQNR gains less than 0.01 dB.

    A level whose cell is empty stays where it is, so the order is kept.

    Args:
        v: weights in units of their scale, any shape.
        codebook: ascending float32 ``[K]``.

    Returns:
        Ascending float32 ``[K]``.
    """
    signal = v.double().square().sum().item()
    before = -math.inf
    for _ in range(LLOYD_MAX_ITERATIONS):
        count, total = _ops.codebook_statistics(v, decision_thresholds(codebook))
        now = _sqnr_from_statistics(signal, codebook, count, total)
        if not now - before >= LLOYD_GAIN_DB:  # inf - inf, without any signal, is no gain either
            break
        before = now
        means = torch.where(count > 0, total / count.clamp_min(1), codebook)
        codebook = means.cummax(0).values  # equal means may have been rounded apart
    return codebook


def _sqnr_from_statistics(signal: float, codebook: Tensor, count: Tensor, total: Tensor) -> float:
    c, n, s = codebook.double(), count.double(), total.double()
    noise = signal - (2 * c * s - n * c * c).sum().item()
    # the difference is only known to the rounding of the float32 sums
    return 10.0 * math.log10(signal / max(noise, 1e-7 * signal)) if signal > 0.0 else math.inf


def channel_scale(w: Tensor, axis: int | None) -> Tensor:
    """Largest magnitude of each channel along ``axis`` (of the tensor if None), 1 where that is zero.

    Shape: that of w with every other axis 1, so that it broadcasts; float32.
    """
    magnitude = w.detach().float().abs()
    others = [d for d in range(w.dim()) if d != axis]
    peak = magnitude.amax(dim=others, keepdim=True) if others else magnitude
    return torch.where(peak > 0, peak, 1.0)


def fit(w: Tensor, config: WeightConfig, axis: int = 0) -> Fit:
    """Fit codebook and scale to a weight: the start of training, and post-training quantization.

    With per-channel scales and ``refine``, Lloyd iterations alternate with least-squares scales.

    Args:
        w: weight, finite, not empty.
        config: levels, scale, init, refine and snap are used.
        axis: the output channels' axis.

    Raises:
        ValueError: w is empty, or holds NaN or infinity.
    """
    if w.numel() == 0:
        raise ValueError("adq: the weight is empty")
    if not bool(w.isfinite().all()):
        raise ValueError("adq: the weight holds NaN or infinity")
    w = w.detach().float()
    per_channel = config.scale == "channel"
    scale = channel_scale(w, axis) if per_channel else w.new_ones([1] * w.dim())
    v = w / scale
    uniform = config.init == "uniform"
    codebook = (
        uniform_codebook(v, config.num_levels) if uniform else quantile_codebook(v, config.num_levels, config.levels)
    )
    for _ in range(SCALE_ROUNDS if per_channel and config.refine else int(config.refine)):
        codebook = lloyd(v, codebook)
        if per_channel:
            q, _ = _ops.codebook_lookup(v, codebook, decision_thresholds(codebook), False)
            scale = least_squares_scale(w, q, scale)
            v = w / scale
    codebook = snap_codebook(codebook) if config.snap else codebook
    count, _ = _ops.codebook_statistics(v, decision_thresholds(codebook))
    return Fit(codebook, scale, count.float())

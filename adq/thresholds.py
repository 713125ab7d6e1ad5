"""Fitting the activation quantizer to observed inputs: clip search for the least squared error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adq.config import ActivationConfig
from adq.ops import ACTIVATION_RANGE, MIN_INTERVAL

UNSIGNED_CANDIDATES = 100
SIGNED_CANDIDATES = 24


@dataclass(frozen=True)
class Thresholds:
    """Start values of an activation quantizer; the fields are the arguments of ``threshold_quantize``.

    All float32 ``[1]``, but ``interval``: ``[steps]`` with learned thresholds.
    """

    start: Tensor
    interval: Tensor
    in_scale: Tensor
    out_scale: Tensor
    offset: Tensor


def num_intervals(config: ActivationConfig) -> int:
    """Length of ``interval``: one per step where they are learned, one for all where they are uniform."""
    return 1 if config.is_uniform else config.steps


def uniform_bits(interval: Tensor) -> int | None:
    """The width that the constant interval of a uniform quantizer is of; None if of none."""
    if interval.is_meta or interval.numel() != 1:
        return None
    steps = ACTIVATION_RANGE / max(interval.item(), MIN_INTERVAL)
    return next((bits for bits in range(1, 9) if math.isclose(steps, 2**bits - 1, rel_tol=1e-4)), None)


def uniform_thresholds(step: Tensor, zero_level: Tensor, config: ActivationConfig) -> Thresholds:
    """The uniform quantizer with a given step, in input units, whose level ``zero_level`` stands for zero.

    ``in_scale`` brings the covered range to width R = 2, so that the learned parameters of every layer
    have the same magnitude whatever the scale of its inputs, and one learning rate serves them all.
    """
    width = ACTIVATION_RANGE / config.steps
    one = torch.ones(1, dtype=torch.float32, device=step.device)
    offset = width * zero_level.float().reshape(1)
    return Thresholds(
        start=-offset,
        interval=torch.full((num_intervals(config),), width, dtype=torch.float32, device=step.device),
        in_scale=width * one / step,
        out_scale=step * one / width,
        offset=offset,
    )


def _squared_error(values: Tensor, step: Tensor, zero_level: Tensor, steps: int) -> Tensor:
    """Mean squared error of each candidate quantizer; values ``[n]``, step and zero_level ``[m]`` -> ``[m]``."""
    errors = []
    for s, z in zip(step, zero_level, strict=True):
        level = (values / s + z).round().clamp(0, steps)
        errors.append(((level - z) * s - values).square().mean(dtype=torch.float64))
    return torch.stack(errors)


def fit_thresholds(values: Tensor, config: ActivationConfig) -> Thresholds:
    """Fit thresholds to observed inputs: the clip range of least squared error, uniform inside.

    With uniform output levels the least-squares thresholds are the midpoints of the levels, so uniform
    intervals are where training starts from; it then learns each of them.

    Args:
        values: a sample of the layer's inputs, float32 ``[n]``, finite, not empty.
        config: bits and sign. Of inputs on one side of zero, ``signed=True`` gives the other side levels of the same
            size: one less, or with two levels none.

    Raises:
        ValueError: no values, NaN or infinity among them, negative ones although ``signed=False``, or all of them so
            small, or so large, that float32 holds no thresholds.
    """
    if values.numel() == 0:
        raise ValueError("adq: no inputs were observed")
    if not bool(values.isfinite().all()):
        raise ValueError("adq: NaN or infinity among the observed inputs")
    values = values.float()
    low, high = values.min(), values.max()
    if config.signed is False and low < 0:
        raise ValueError(f"adq: signed=False, but inputs down to {low.item():.3g} were observed")
    steps, peak = config.steps, torch.maximum(high, -low)
    below = steps // 2 if config.signed else 0
    if peak == 0:  # says nothing about the range
        return uniform_thresholds(torch.ones_like(peak) / (steps - below), torch.full_like(peak, below), config)
    unit = peak / (2 * torch.frexp(peak).mantissa)  # a power of two; squares of the quotients are in range
    values, low, high, peak = values / unit, low / unit, high / unit, peak / unit
    if low >= 0 or (config.signed and high <= 0):
        clip = peak * torch.arange(1, UNSIGNED_CANDIDATES + 1, device=values.device) / UNSIGNED_CANDIDATES
        step, zero_level = clip / (steps - below), torch.full_like(clip, below if low >= 0 else steps - below)
    else:
        part = torch.arange(1, SIGNED_CANDIDATES + 1, device=values.device) / SIGNED_CANDIDATES
        clip_low, clip_high = (
            torch.cartesian_prod(low.clamp_max(0) * part, high.clamp_min(0) * part).unique(dim=0).unbind(1)
        )
        step = (clip_high - clip_low) / steps
        step, clip_low = step[step > 0], clip_low[step > 0]
        zero_level = (-clip_low / step).round()
    best = _squared_error(values, step, zero_level, steps).argmin()
    fitted = uniform_thresholds(step[best] * unit, zero_level[best], config)
    if not bool((fitted.in_scale + fitted.out_scale).isfinite()):
        raise ValueError(f"adq: inputs of up to {(peak * unit).item():.3g} have no thresholds in float32")
    return fitted


def averaged(several: Sequence[Thresholds]) -> Thresholds:
    """The mean of thresholds of one width: of the inputs at which the level changes, and of the output scale.

    Args:
        several: of equal shapes; the first says what is uniform and where the tensors are.

    Raises:
        ValueError: zero is on different levels.
    """
    first = several[0]
    if len(several) == 1:
        return first
    zeros = [thresholds.offset.tolist() for thresholds in several]
    if any(zero != zeros[0] for zero in zeros):
        raise ValueError("adq: thresholds have no mean: of the quantizers to average zero is on different levels")

    def mean(values: Iterable[Tensor]) -> Tensor:
        return torch.stack([value.to(first.start.device) for value in values]).mean(0)

    scales = [thresholds.in_scale.double() for thresholds in several]
    in_scale = 1 / mean(1 / scale for scale in scales)

    def in_inputs(values: Iterable[Tensor]) -> Tensor:
        return in_scale * mean(value.double() / scale for value, scale in zip(values, scales, strict=True))

    interval = in_inputs(thresholds.interval.clamp_min(MIN_INTERVAL) for thresholds in several)
    return Thresholds(
        start=in_inputs(thresholds.start for thresholds in several).float(),
        interval=first.interval if first.interval.numel() == 1 else interval.float(),  # of uniform ones it is constant
        in_scale=in_scale.float(),
        out_scale=mean(thresholds.out_scale.double() for thresholds in several).float(),
        offset=first.offset,
    )


def resampled(thresholds: Thresholds, present: ActivationConfig, config: ActivationConfig) -> Thresholds:
    """Thresholds of another width, or kind, that follow the same curve from input to output.

    The curve is the surrogate of the G-STE (arXiv 2111.14826), piecewise linear: at the input ``T_i`` the quantizer is
    at position ``D i``. The new thresholds are the inputs at which it is at ``D' j``, where ``D' = R / steps`` of the
    new width; zero stays on a level, for which positions move by at most ``D' / 2``, and the ends go on straight. So
    outputs differ by at most ``out_scale (D / 2 + 3 D' / 2)``. A uniform quantizer takes the chord of the curve.
    ``in_scale``, ``start`` and ``interval`` are multiplied by one number, which changes no output: where an interval
    would be less than the least that counts, and so that the one of a uniform quantizer is ``D'``, as calibration sets.

    Args:
        thresholds: of a calibrated or trained quantizer.
        present: its configuration.
        config: the new one; whether levels are on both sides of zero stays as it is.
    """
    if (present.steps, present.is_uniform) == (config.steps, config.is_uniform):
        return thresholds
    width, new_width = ACTIVATION_RANGE / present.steps, ACTIVATION_RANGE / config.steps
    interval = thresholds.interval.double().clamp_min(MIN_INTERVAL).expand(present.steps)
    ends = interval.cpu().cumsum(0).to(interval.device)  # that of a GPU is not deterministic
    begins = thresholds.start.double() + ends - interval
    offset = thresholds.offset.double()
    new_offset = (offset / new_width).round() * new_width
    levels = torch.arange(config.steps + 1, dtype=torch.float64, device=offset.device)
    position = (levels * new_width - new_offset + offset) / width  # in steps of the present width
    segment = position.floor().clamp(0, present.steps - 1).long()
    edges = begins[segment] + (position - segment) * interval[segment]
    if config.is_uniform:
        interval = (edges[-1:] - edges[:1]) / config.steps
        unit = new_width / interval
    else:
        interval = edges.diff()
        unit = (2.0 * MIN_INTERVAL / interval.min()).clamp_min(1.0)  # at the least itself there is no gradient
    return Thresholds(
        start=(unit * edges[:1]).float(),
        interval=(unit * interval).float(),
        in_scale=(unit * thresholds.in_scale).float(),
        out_scale=thresholds.out_scale,
        offset=new_offset.float(),
    )

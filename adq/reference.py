"""The torch oracle of every operator: short, obvious, and the meaning of the other implementations.

These functions are registered as each operator's default, so they serve every device that has no
faster implementation. Codes, levels and packed bytes of the C++ and Triton kernels equal these bit for
bit; sums and parameter gradients equal them to float32 rounding (here they are accumulated in float64).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from adq import ops
from adq.layout import restore

INT8_MAX = 127
SMOOTHING = 1e-5
"""Of the mean count of a level: how much a codeword is held where it stands."""
REVIVE_BELOW = 1e-3
"""A level is dead when its EMA count falls below this share of the mean count of a level,"""
UNUSED = 0.5
"""and below this many weights: in a large layer a level that a few outliers use is in use."""
LEAST_SCALE = 1e-30
"""Scales are not made smaller than this."""


def decision_thresholds(codebook: Tensor) -> Tensor:
    """Midpoints ``t[k] = 0.5 * (c[k] + c[k + 1])`` of an ascending codebook ``[K]``, float32 ``[K - 1]``."""
    return 0.5 * (codebook[:-1] + codebook[1:])


def _codes(w: Tensor, thresholds: Tensor) -> Tensor:
    """``code = #{k : w > t[k]}``, int64; a tie goes to the lower codeword, NaN to code 0."""
    w = w.float()
    return torch.bucketize(w.masked_fill(w.isnan(), -torch.inf), thresholds)


def codebook_lookup(w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool) -> tuple[Tensor, Tensor]:
    """Nearest codeword of every weight: ``w_q = c[code]`` in w's dtype (NaN stays NaN), and uint8 codes.

    With ``codes=False`` the second result is empty. ADQ, arXiv 2510.19760, section 3.
    """
    ops.check_codebook(w, thresholds, codebook)
    code = _codes(w, thresholds)
    w_q = torch.empty_like(w).copy_(torch.where(w.isnan(), torch.nan, codebook[code]))
    return w_q, torch.empty_like(w, dtype=torch.uint8).copy_(code) if codes else code.new_empty(0, dtype=torch.uint8)


def codebook_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Per level, how many weights fall in its cell (int64 ``[K]``) and their sum (float32 ``[K]``).

    NaN counts in no cell.
    """
    ops.check_codebook(w, thresholds)
    values = w.float().flatten()
    values = values[~values.isnan()]
    code = torch.bucketize(values, thresholds)
    levels = thresholds.numel() + 1
    count = torch.bincount(code, minlength=levels)
    total = torch.zeros(levels, dtype=torch.float64, device=w.device)
    return count, total.index_put_((code,), values.double(), accumulate=True).float()


def codebook_lookup_statistics(
    w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`codebook_lookup` and :func:`codebook_statistics` in one pass over w."""
    return *codebook_lookup(w, codebook, thresholds, codes), *codebook_statistics(w, thresholds)


def scaled_lookup(w: Tensor, scale: Tensor, codebook: Tensor) -> Tensor:
    """The codeword nearest to ``w / scale``, float32, in units of the scale."""
    return codebook_lookup(w.float() / scale, codebook, decision_thresholds(codebook), False)[0]


def foreach_codebook_quantize(weights: list[Tensor], scales: list[Tensor], codebooks: list[Tensor]) -> list[Tensor]:
    """``w_q = scale * c[code(w / scale)]`` of every layer, in w's dtype and strides; float32 until rounded."""
    ops.check_foreach_quantize(weights, scales, codebooks)
    return [
        torch.empty_like(w).copy_(scaled_lookup(w, scale, codebook) * scale)
        for w, scale, codebook in zip(weights, scales, codebooks, strict=True)
    ]


def foreach_codebook_step_(
    weights: list[Tensor],
    scales: list[Tensor],
    codebooks: list[Tensor],
    counts: list[Tensor],
    totals: list[Tensor],
    rates: Tensor,
    pace: float,
    snap: list[bool],
    quantized: list[Tensor],
) -> None:
    """One EMA step of every layer's codebook and channel scales towards its weight; all state changes in place.

    With ``v = w / scale``, q the codewords of v and r = ``rates[l] * pace``::

        scale <- scale + r (sum w q / sum q^2 - scale)      of each channel, where there are channels
        c, N, M <- ema_update(c, N, M, n, s, r)             n, s: statistics of within_reach(v) in the old cells
        c, M, scale <- f c, f M, scale / f                  with hold_peak's f, where there are channels
        c <- snap_codebook(c)                               where ``snap[l]``; N and M stay as they are

    Args:
        weights: float32, bfloat16 or float16, any shape; scales: see :mod:`adq.ops`.
        codebooks, counts, totals: c, N and M, float32 ``[K_l]``; c ascending.
        rates: float32 ``[layers]``, 1 - g of each layer, on the weights' device.
        pace: factor on all rates.
        snap: whether the levels of a layer are held on an int8 grid.
        quantized: empty, or a tensor like each weight for the weight quantized with the new state.
    """
    ops.check_foreach_step(weights, scales, codebooks, counts, totals, rates, snap, quantized)
    for i, (w, scale, codebook) in enumerate(zip(weights, scales, codebooks, strict=True)):
        rate = rates[i] * pace
        v, per_channel = w.float() / scale, ops.scale_axis(w.shape, scale) is not None
        counted = within_reach(v, codebook) if per_channel else v
        q, _, n, s = codebook_lookup_statistics(counted, codebook, decision_thresholds(codebook), False)
        new_codebook, count, total = ema_update(codebook, counts[i], totals[i], n, s, rate)
        if per_channel:
            fitted = least_squares_scale(w.float(), q, scale)
            new_codebook, total, factor = hold_peak(codebook, new_codebook, total)
            fitted = torch.where(rate > 0.0, fitted, scale)  # which may be infinite
            scale.copy_(rescale(scale + rate * (fitted - scale), factor))
        codebook.copy_(snap_codebook(new_codebook) if snap[i] else new_codebook)
        counts[i].copy_(count)
        totals[i].copy_(total)
    for w_q, value in zip(quantized, foreach_codebook_quantize(weights, scales, codebooks), strict=False):
        w_q.copy_(value)


def within_reach(v: Tensor, codebook: Tensor) -> Tensor:
    """``v``, but no further beyond an outer level than the gap to its neighbour, or the largest level over K - 1.

    A channel outgrows its scale where a filter was nearly dead: behind a batch norm its gradient is as large as its
    weights are small. Until the scale has followed, it shall not take the levels away from all other channels. Cells do
    not change.
    """
    levels, peak = codebook.numel(), torch.maximum(codebook[0].abs(), codebook[-1].abs())
    if levels < 2:
        return v
    gap = torch.where(peak > 0, peak / (levels - 1), torch.inf)
    low = codebook[0] - torch.maximum(codebook[1] - codebook[0], gap)
    high = codebook[-1] + torch.maximum(codebook[-1] - codebook[-2], gap)
    return v.clamp(low, high)


def hold_peak(before: Tensor, codebook: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels and M in the unit in which the largest level is as large as before, and the factor f that leads there.

    Only products of levels and scales are determined. Scales fit whole weights, levels those within reach: without
    this, each step would leave the scales a little larger and the levels smaller, without end. The largest level has
    the same bits as before, since one that rounds up from 127 steps of a grid would double the steps.
    """
    peak, largest = before.abs().amax(), codebook.abs().amax()
    factor = peak / largest
    holds = (factor > 0.0) & (factor < torch.inf)
    factor = torch.where(holds, factor, 1.0)
    held = torch.minimum(torch.maximum(codebook * factor, -peak), peak)
    held = torch.where(codebook.abs() == largest, torch.copysign(peak, codebook), held)
    return torch.where(holds, held, codebook), total * factor, factor


def rescale(scale: Tensor, factor: Tensor) -> Tensor:
    """``scale / f``; the scale itself where that vanishes, since weights are divided by it."""
    rescaled = scale / factor
    return torch.where(rescaled.abs() >= LEAST_SCALE, rescaled, scale)


def least_squares_scale(w: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    """Per channel the factor that minimises ``||w - s q||^2``, the old scale where it is not positive."""
    others = [d for d in range(w.dim()) if scale.shape[d] == 1]
    product, norm = w * q, q.square()
    if others:  # torch sums over all dimensions when given none
        product, norm = product.sum(others, keepdim=True), norm.sum(others, keepdim=True)
    fitted = product / norm
    return torch.where(fitted > 0, fitted, scale)


def snap_codebook(codebook: Tensor) -> Tensor:
    """The codebook on an int8 grid: multiples ``m 2^e``, |m| <= 127, with the smallest such power of two.

    A power of two makes every product with a scale round as the integer's own product would, so
    ``scale * c`` equals the int8 weight ``m`` times the scale ``2^e * scale`` exactly.
    """
    step = grid_step(codebook)
    return (codebook / step).round().clamp(-INT8_MAX, INT8_MAX) * step


def grid_step(codebook: Tensor) -> Tensor:
    """Step ``2^e`` of the grid of :func:`snap_codebook`, ``[]``; 1 for a codebook of zeros."""
    peak = codebook.abs().amax()
    mantissa, exponent = torch.frexp((peak / INT8_MAX).clamp_min(torch.finfo(torch.float32).tiny))
    step = torch.ldexp(torch.ones_like(peak), exponent - (mantissa == 0.5).int())
    return torch.where(peak > 0, step, 1.0)


def ema_update(
    codebook: Tensor, ema_count: Tensor, ema_total: Tensor, count: Tensor, total: Tensor, rate: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One EMA step of a codebook towards the means of its cells (VQ-VAE's rule; ADQ section 3.2).

    ``N <- (1 - r) N + r n``, ``M <- (1 - r) M + r s``, ``c = (M + e c) / (N + e)``. The smoothing e pulls a
    level that few weights use towards where it stands, not towards zero, so the order is kept. A level
    that no weight has used for long is moved into the most used cell, with half of that cell's weight. A rate of zero
    changes nothing.

    Args:
        codebook: ascending float32 ``[K]``; ema_count, ema_total: N and M, float32 ``[K]``.
        count, total: statistics of the current weights in the current cells, ``[K]``.
        rate: r = 1 - g.

    Returns:
        New ``(codebook, N, M)``. Nothing is read back to the host.
    """
    new_count = (1.0 - rate) * ema_count + rate * count.float()
    new_total = (1.0 - rate) * ema_total + rate * total
    smoothing = SMOOTHING * new_count.sum() / new_count.numel() + 1e-30
    new_codebook = torch.cummax((new_total + smoothing * codebook) / (new_count + smoothing), 0).values
    moves = torch.as_tensor(rate, device=codebook.device) > 0.0
    states = zip(_revive(new_codebook, new_count, new_total), (codebook, ema_count, ema_total), strict=True)
    return tuple(torch.where(moves, new, old) for new, old in states)  # type: ignore[return-value]


def _revive(codebook: Tensor, count: Tensor, total: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Move the least used level, if it is dead, beside the most used one, whose N and M it shares."""
    levels = codebook.numel()
    if levels < 2:
        return codebook, count, total
    dead, donor = count.argmin(), count.argmax()
    # a donor of fewer than two weights has nothing to share
    revive = (count[dead] < (REVIVE_BELOW * count.sum() / levels).clamp_max(UNUSED)) & (count[donor] >= 2.0)
    centre = codebook[donor]
    left = centre - codebook[(donor - 1).clamp_min(0)]
    right = codebook[(donor + 1).clamp_max(levels - 1)] - centre
    to_right = right >= left
    newcomer = torch.where(to_right, centre + 0.25 * right, centre - 0.25 * left)
    half = 0.5 * (count[donor] + count[dead])
    index = torch.arange(levels, device=codebook.device)
    is_dead, is_donor = index == dead, index == donor
    revived = (
        torch.where(is_dead, newcomer, codebook),
        torch.where(is_dead | is_donor, half, count),
        torch.where(is_dead, half * newcomer, torch.where(is_donor, half * centre, total)),
    )
    # where the newcomer belongs: beside the donor's place in a row without the dead level
    slot = donor - (dead < donor).long() + to_right.long()
    rest = index - (index > slot).long()
    source = torch.where(index == slot, dead, rest + (rest >= dead).long())
    before = (codebook, count, total)
    return tuple(torch.where(revive, new[source], old) for new, old in zip(revived, before, strict=True))  # type: ignore[return-value]


def level_edges(start: Tensor, interval: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Segment starts ``T_0..T_n`` and level edges ``T_i + interval[i] / 2``, by float32 additions in order."""
    segment, edge = [start], []
    for width in interval:
        edge.append(segment[-1] + 0.5 * width)
        segment.append(segment[-1] + width)
    return segment, edge


def _levels(u: Tensor, start: Tensor, interval: Tensor, steps: int) -> Tensor:
    """Output level ``q = #{i : u > T_i + interval[i] / 2}`` as float32; NaN stays NaN."""
    if interval.numel() == steps:
        _, edges = level_edges(start, interval)
        q = torch.zeros_like(u)
        for edge in edges:
            q += u > edge
        return q.masked_fill(u.isnan(), torch.nan)
    return ((u - start) / interval[0] - 0.5).ceil().clamp(0, steps) + 0.0


def threshold_quantize(
    x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor, offset: Tensor, steps: int
) -> Tensor:
    """N2UQ activation quantizer, quantize and dequantize: ``y = out_scale * (D q - offset)``.

    ``u = in_scale * x``, ``D = R / steps``, and q counts the edges below u (see :func:`_levels`).
    With one interval for all steps the edges are ``start + (i + 0.5) * interval`` in closed form.
    NaN in, NaN out. Source: N2UQ, arXiv 2111.14826, equation 5; the affine offset is ours.
    """
    ops.check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    start, in_scale, out_scale, offset = start[0], in_scale[0], out_scale[0], offset[0]
    q = _levels(in_scale * x.float(), start, interval.clamp_min(ops.MIN_INTERVAL), steps)
    step = torch.tensor(ops.ACTIVATION_RANGE / steps, dtype=torch.float32, device=x.device)
    return torch.empty_like(x).copy_(out_scale * (step * q - offset))


def threshold_levels(x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, steps: int) -> Tensor:
    """The levels q of :func:`threshold_quantize` as uint8, in x's strides; NaN has level 0."""
    ops.check_levels(x, start, interval, in_scale, steps)
    q = _levels(in_scale[0] * x.float(), start[0], interval.clamp_min(ops.MIN_INTERVAL), steps)
    return torch.empty_like(x, dtype=torch.uint8).copy_(q.nan_to_num(0.0))


def threshold_quantize_backward(
    grad: Tensor,
    x: Tensor,
    start: Tensor,
    interval: Tensor,
    in_scale: Tensor,
    out_scale: Tensor,
    offset: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All five gradients of :func:`threshold_quantize` by the generalized straight-through estimator.

    The surrogate is piecewise linear: it rises by D over each segment ``T_i < u <= T_{i+1}`` and is
    constant outside. With ``g = grad * out_scale``, per segment ``G_i = sum g``, ``H_i = sum g (u - T_i)``::

        d_x           = g * in_scale * D / interval[i]
        d_interval[i] = -(D / interval[i]^2) H_i - sum_{k > i} (D / interval[k]) G_k
        d_start       = -sum_k (D / interval[k]) G_k
        d_in_scale    = sum g * x * D / interval[i]
        d_out_scale   = sum grad * (D q - offset)

    One interval for all steps has the surrogate of a single segment of width ``steps * interval``.
    A clamped interval gets gradient zero, NaN in x gets and gives none. Source: arXiv 2111.14826, 3.2.
    """
    ops.check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    ops.check_grad(grad, x)
    shared = interval.numel() != steps
    start, in_scale, out_scale, offset = start[0], in_scale[0], out_scale[0], offset[0]
    width = interval.clamp_min(ops.MIN_INTERVAL)
    u, dy, x32 = in_scale * x.float(), grad.double(), x.double()
    q = _levels(u, start, width, steps).nan_to_num(0.0)
    # one segment that spans the whole range, or one segment a step
    segments = [(start, start + steps * width[0])] if shared else list(pairwise(level_edges(start, width)[0]))
    rise = ops.ACTIVATION_RANGE if shared else ops.ACTIVATION_RANGE / steps
    spans = width.double() * (steps if shared else 1)

    d_x = torch.zeros_like(u, dtype=torch.float64)
    g_sum = torch.zeros_like(spans)
    h_sum = torch.zeros_like(spans)
    d_in_scale = torch.zeros_like(in_scale, dtype=torch.float64)
    g = dy * out_scale.double()
    for i, (low, high) in enumerate(segments):
        inside = (u > low) & (u <= high)
        g_in = torch.where(inside, g, 0.0)
        slope = rise / spans[i]
        d_x += g_in * slope * in_scale
        g_sum[i] = g_in.sum()
        h_sum[i] = torch.where(inside, g * (u.double() - low), 0.0).sum()
        d_in_scale += torch.where(inside, g * x32, 0.0).sum() * slope
    slopes = rise / spans
    flow = slopes * g_sum
    after = flow.sum() - flow.cumsum(0)
    d_interval = (-slopes / spans * h_sum - after) * (steps if shared else 1)
    d_interval = torch.where(interval > ops.MIN_INTERVAL, d_interval, 0.0)
    levels = ops.ACTIVATION_RANGE / steps * q - offset.double()
    d_out_scale = torch.where(u.isnan(), 0.0, dy * levels).sum().reshape(1)
    return (
        torch.empty_like(x).copy_(d_x),
        (-flow.sum()).reshape(1).float(),
        d_interval.float(),
        d_in_scale.reshape(1).float(),
        d_out_scale.float(),
    )


def integer_conv2d(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    initial: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    low: float,
    high: float,
    quantizers: list[Tensor],
    steps: list[int],
    keep: bool,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: int,
) -> tuple[Tensor, list[Tensor]]:
    """Convolution of levels with int8 weights, exact in int32, and all that follows up to the next layers' levels.

    With ``a = initial[o] + sum of x w``, and every line one float32 operation an element::

        v = float(a) * multiplier[o]
        v = v + bias[o]
        v = v + residual                        where there is one
        y = clamp(v, low, high)
        levels[i] = threshold_levels(y, quantizers[3 i], quantizers[3 i + 1], quantizers[3 i + 2], steps[i])

    Args:
        x: levels, uint8 ``[N, C, H, W]``; outside the image they are ``zero``.
        weight, table: int8 weights ``[O, C / groups, *kernel]`` as :func:`adq.layout.arrange` gives them.
        initial: int32 ``[O]``, ``-zero * sum w`` where level ``zero`` means 0.
        multiplier, bias: float32 ``[O]``.
        residual: float32 ``[N, O, H', W']``, optional.
        quantizers: start, interval and in_scale of each quantizer that reads y; steps: theirs.
        keep: whether y is wanted itself.
        kernel, stride, padding, dilation: two numbers each, height first.

    Returns:
        y, float32 ``[N, O, H', W']`` (empty if not kept), and the levels, uint8; channels_last.
    """
    shape = ops.check_integer_conv2d(
        x, weight, table, initial, multiplier, bias, residual, quantizers, steps,
        kernel, stride, padding, dilation, groups, zero,
    )  # fmt: skip
    integers = restore(weight, table, (shape[1], x.shape[1] // groups, *kernel), groups)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=zero)
    total = F.conv2d(padded.double(), integers.double(), None, stride, 0, dilation, groups)  # exact: below 2^53
    total += initial.view(-1, 1, 1)
    v = total.float() * multiplier.view(-1, 1, 1) + bias.view(-1, 1, 1)
    v = (v if residual is None else v + residual).clamp(low, high)
    y, levels = ops.integer_results(x, shape, keep, len(steps))
    for i, level in enumerate(levels):
        start, interval, in_scale = quantizers[3 * i : 3 * i + 3]
        level.copy_(threshold_levels(v, start, interval, in_scale, steps[i]))
    return y.copy_(v) if keep else y, levels


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes, in row-major order, as a little-endian bit stream: code i holds bits ``[i b, (i + 1) b)``.

    Only the low ``bits`` bits of a code are kept. Returns uint8 ``[ceil(numel * bits / 8)]``; the last
    byte is filled with zeros.
    """
    ops.check_pack(codes, bits)
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.flatten()[:, None] >> shifts) & 1).flatten()
    size = ops.packed_size(codes.numel(), bits)
    stream = torch.nn.functional.pad(stream, (0, 8 * size - stream.numel())).view(size, 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=codes.device)
    return (stream * weights).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """The inverse of :func:`pack_bits`: uint8 codes ``[numel]``."""
    ops.check_unpack(packed, bits, numel)
    byte = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[:, None] >> byte) & 1).flatten()[: numel * bits].view(numel, bits)
    weights = torch.tensor([1 << i for i in range(bits)], dtype=torch.uint8, device=packed.device)
    return (stream * weights).sum(1, dtype=torch.uint8)


def codebook_decode(packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, shape: list[int]) -> Tensor:
    """A weight from its packed codes: ``w_q = scale * c[code]``, one float32 product, contiguous.

    No code reads beyond the table: one that has no level takes the last.

    Args:
        packed: uint8, codes of the weight in row-major order, see :func:`pack_bits`.
        codebook: float32 ``[K]``, ``K <= 2**bits``, in any order.
        scale: float32, contiguous, 1 in all dimensions of the weight but at most one; any sign.
        bits: width of a code, 1..8.
        shape: of the weight.
    """
    ops.check_decode(packed, codebook, scale, bits, shape)
    code = unpack_bits(packed, bits, math.prod(shape)).int().clamp_max(codebook.numel() - 1)
    return codebook[code].view(shape) * scale


def codebook_linear(x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, outputs: int) -> Tensor:
    """``y = x W^T`` for few rows of x and a weight in packed codes, that of :func:`codebook_decode`.

    Sums are float64 here. Elsewhere W is never written down: products ``x c[code]`` and their sums are float32, the
    scale comes last, and each row of y depends on its own row of x alone.

    Args:
        x: float32, bfloat16 or float16 ``[..., in]``, any strides.
        packed: uint8, codes of W ``[outputs, in]`` in row-major order; rows may begin inside a byte.
        codebook: float32 ``[K]``, ``K <= 2**bits``, in any order.
        scale: float32, ``[outputs, 1]`` or ``[1, 1]``; any sign.
        bits: width of a code, 1..8.
        outputs: rows of W.

    Returns:
        y in x's dtype, ``[..., outputs]``, contiguous.
    """
    shape, _ = ops.check_linear(x, packed, codebook, scale, bits, outputs)
    w = codebook_decode(packed, codebook, scale, bits, [outputs, x.shape[-1]])
    return x.new_empty(shape).copy_(F.linear(x.double(), w.double()))


for _name in ops.SCHEMAS:
    ops.LIBRARY.impl(_name, globals()[_name], "CompositeExplicitAutograd")

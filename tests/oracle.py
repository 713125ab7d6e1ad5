"""Independent oracles of every adq operator, written from the formulas of the method.

What is defined in float32 (the decisions: ``u = in_scale * x``, the edges, the output levels) is computed
here in float32, one numpy operation at a time, and must be met exactly. What is defined as a sum is computed
in float64, together with its *magnitude*, the sum of the absolute contributions, which is the scale that a
rounding error is measured against.

The gradients of the activation quantizer are derived twice: by the closed-form sums
(:func:`threshold_gradients`) and by torch's autograd in float64 on the published eager algorithm
(:func:`surrogate_gradients`).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

F32 = np.float32
RANGE = 2.0
MIN_INTERVAL = F32(1e-3)


def exact(tensor: torch.Tensor) -> np.ndarray:
    """The values of a float32, bfloat16 or float16 tensor as a float32 array of the same shape."""
    return tensor.detach().float().cpu().numpy()


@dataclass(frozen=True)
class Sum:
    """A float64 result and the sum of the absolute values that were added up to give it."""

    value: np.ndarray
    magnitude: np.ndarray


# ---- codebooks ---------------------------------------------------------------------------------------


def decision_thresholds(codebook: np.ndarray) -> np.ndarray:
    return np.array([F32(0.5) * (low + high) for low, high in pairwise(codebook)], F32)


def codebook_codes(w: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """``#{k : w > t[k]}``; no comparison with NaN is true, so NaN has code 0."""
    return np.asarray((w[..., None] > thresholds).sum(-1), np.uint8)


def codebook_lookup(w: np.ndarray, codebook: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    codes = codebook_codes(w, thresholds)
    return np.where(np.isnan(w), F32(np.nan), codebook[codes]), codes


def codebook_statistics(w: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, Sum]:
    """Count and float64 sum of the numbers in every cell."""
    values = w[~np.isnan(w)].astype(np.float64)
    codes = codebook_codes(w, thresholds)[~np.isnan(w)]
    cells = [values[codes == level] for level in range(len(thresholds) + 1)]
    count = np.array([cell.size for cell in cells], np.int64)
    total = Sum(np.array([cell.sum() for cell in cells]), np.array([np.abs(cell).sum() for cell in cells]))
    return count, total


# ---- the codebooks of many layers ----------------------------------------------------------------------


def scaled_codes(w: np.ndarray, scale: np.ndarray, codebook: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``v = w / scale`` in float32, and its codes."""
    with np.errstate(divide="ignore", invalid="ignore"):
        v = w / scale
    return v, codebook_codes(v, decision_thresholds(codebook))


def scaled_lookup(w: np.ndarray, scale: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """``scale * c[code]``, float32; NaN where w / scale is."""
    v, codes = scaled_codes(w, scale, codebook)
    return np.where(np.isnan(v), F32(np.nan), scale * codebook[codes])


@dataclass(frozen=True)
class State:
    """What a step changes: the scale, and codebook, N and M."""

    scale: Sum
    codebook: Sum
    count: Sum
    total: Sum


def fitted_scale(w: np.ndarray, scale: np.ndarray, codebook: np.ndarray, rate: float) -> Sum:
    """A step of each channel's scale towards the least-squares one, channel by channel."""
    v, codes = scaled_codes(w, scale, codebook)
    q = np.where(np.isnan(v), np.nan, codebook[codes]).astype(np.float64)
    axis = int(np.argmax(scale.shape))
    value, magnitude = scale.astype(np.float64), np.abs(scale).astype(np.float64)
    for i in range(scale.size):
        where = tuple(i if d == axis else 0 for d in range(scale.ndim))
        terms, norm = (w.astype(np.float64) * q).take(i, axis), np.square(q.take(i, axis)).sum()
        if norm > 0 and terms.sum() > 0:
            value[where] += rate * (terms.sum() / norm - value[where])
            magnitude[where] += rate * (2 * np.abs(terms).sum() / norm + magnitude[where])
    return Sum(value, magnitude)


def revived(codebook: np.ndarray, count: np.ndarray, total: np.ndarray) -> list[np.ndarray]:
    """Codebook, N and M with the least used level, if it is dead, put beside the most used one."""
    state = [codebook, count, total]
    dead, donor = int(count.argmin()), int(count.argmax())
    if not (count[dead] < min(1e-3 * count.mean(), 0.5) and count[donor] >= 2):
        return state
    left = codebook[donor] - codebook[max(donor - 1, 0)]
    right = codebook[min(donor + 1, len(codebook) - 1)] - codebook[donor]
    newcomer = codebook[donor] + (0.25 * right if right >= left else -0.25 * left)
    half = (count[donor] + count[dead]) / 2
    rows = [list(row) for k, row in enumerate(zip(*state, strict=True)) if k != dead]
    at = donor - (dead < donor)
    rows[at][1:] = half, half * codebook[donor]
    rows.insert(at + (right >= left), [newcomer, half, half * newcomer])
    return [np.array(column) for column in zip(*rows, strict=True)]


def within_reach(v: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """No further beyond the outer levels than a level's distance: the outer one, or the largest level over K - 1."""
    if len(codebook) == 1 or not codebook[[0, -1]].any():
        return v
    even = max(abs(codebook[0]), abs(codebook[-1])) / (len(codebook) - 1)
    low = codebook[0] - max(codebook[1] - codebook[0], even)
    high = codebook[-1] + max(codebook[-1] - codebook[-2], even)
    return np.where(v < low, low, np.where(v > high, high, v))


def codebook_step(
    w: np.ndarray, scale: np.ndarray, codebook: np.ndarray, count: np.ndarray, total: np.ndarray, rate: float
) -> State:
    """One step of a layer in float64, from decisions in float32; ``rate`` is that of the layer times the pace."""
    v, _ = scaled_codes(w, scale, codebook)
    if scale.size > 1:
        v = within_reach(v, codebook)
    n, s = codebook_statistics(v, decision_thresholds(codebook))
    count = (1 - rate) * count.astype(np.float64) + rate * n
    magnitude = (1 - rate) * np.abs(total).astype(np.float64) + rate * s.magnitude
    total = (1 - rate) * total.astype(np.float64) + rate * s.value
    smoothing = 1e-5 * count.mean() + 1e-30
    mean = np.maximum.accumulate((total + smoothing * codebook) / (count + smoothing))
    reach = np.maximum.accumulate((magnitude + smoothing * np.abs(codebook)) / (count + smoothing))
    state = revived(mean, count, total) if rate > 0 else [codebook.astype(np.float64), count, total]
    # the spacing of two levels carries the errors of both
    sizes = [np.maximum(np.abs(state[0]), reach), state[1], np.maximum(np.abs(state[2]), magnitude)]
    new_scale = Sum(scale.astype(np.float64), np.zeros(scale.shape))
    if scale.size > 1:
        new_scale = fitted_scale(w, scale, codebook, rate)
        before, after = np.abs(codebook.astype(np.float64)).max(), np.abs(state[0]).max()
        if rate > 0 and before > 0 and after > 0:  # the largest level stays, products with scales too
            factor, blur = before / after, (sizes[0] / after).max()
            new_scale = Sum(new_scale.value / factor, (new_scale.magnitude + np.abs(new_scale.value) * blur) / factor)
            for i in (0, 2):
                state[i], sizes[i] = state[i] * factor, (sizes[i] + np.abs(state[i]) * blur) * factor
    return State(new_scale, *(Sum(value, 2 * size) for value, size in zip(state, sizes, strict=True)))


def snapped(codebook: np.ndarray) -> np.ndarray:
    """The nearest multiples ``m 2^e``, ``|m| <= 127``, by the smallest power of two that reaches the peak."""
    peak = np.abs(codebook.astype(np.float64)).max()
    step = 1.0
    while peak > 0 and step * 127 >= 2 * peak:
        step /= 2
    while step * 127 < peak:
        step *= 2
    return (np.rint(codebook / step).clip(-127, 127) * step).astype(F32)


# ---- activation thresholds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Activation:
    """The parameters of one activation quantizer, in the order of the operator's arguments."""

    start: torch.Tensor
    interval: torch.Tensor
    in_scale: torch.Tensor
    out_scale: torch.Tensor
    offset: torch.Tensor
    steps: int

    @property
    def arguments(self) -> tuple:
        return self.start, self.interval, self.in_scale, self.out_scale, self.offset, self.steps

    @property
    def uniform(self) -> bool:
        return self.interval.numel() != self.steps

    def scalars(self) -> tuple[np.float32, ...]:
        return tuple(F32(t.item()) for t in (self.start, self.in_scale, self.out_scale, self.offset))

    def widths(self) -> np.ndarray:
        return np.maximum(exact(self.interval), MIN_INTERVAL)

    def segments(self) -> np.ndarray:
        """``T_0 .. T_n`` by float32 additions in order; a uniform quantizer has one segment."""
        (start, *_), widths = self.scalars(), self.widths()
        if self.uniform:
            return np.array([start, start + F32(self.steps) * widths[0]], F32)
        bounds = [start]
        for width in widths:
            bounds.append(bounds[-1] + width)
        return np.array(bounds, F32)

    def edges(self) -> np.ndarray:
        """``T_i + interval[i] / 2``: the inputs at which the output steps up (not for the uniform form)."""
        lows = self.segments()[:-1]
        return np.array([low + F32(0.5) * width for low, width in zip(lows, self.widths(), strict=True)], F32)


def activation_levels(x: np.ndarray, act: Activation) -> np.ndarray:
    """Output level ``0 .. steps`` as float32; a number of steps, so its zero is positive; NaN stays NaN."""
    start, in_scale, _, _ = act.scalars()
    u = in_scale * x
    with np.errstate(invalid="ignore"):
        if act.uniform:
            levels = np.clip(np.ceil((u - start) / act.widths()[0] - F32(0.5)), F32(0), F32(act.steps)) + F32(0)
        else:
            levels = (u[..., None] > act.edges()).sum(-1).astype(F32)
    return np.where(np.isnan(u), F32(np.nan), levels)


def threshold_quantize(x: np.ndarray, act: Activation) -> np.ndarray:
    """``out_scale * (D q - offset)``, each operation rounded to float32."""
    _, _, out_scale, offset = act.scalars()
    return np.asarray(out_scale * (F32(RANGE / act.steps) * activation_levels(x, act) - offset))


def threshold_gradients(grad: np.ndarray, x: np.ndarray, act: Activation) -> dict[str, Sum]:
    """The closed-form gradients, in float64 over float32 decisions."""
    shape, grad, x = x.shape, grad.ravel(), x.ravel()
    _, in_scale, out_scale, offset = act.scalars()
    bounds, widths = act.segments(), act.widths().astype(np.float64)
    parts = act.steps if act.uniform else 1  # steps that one interval serves
    spans = widths * parts
    slopes = RANGE / act.steps * parts / spans
    u = in_scale * x
    dy = grad.astype(np.float64)
    g = dy * np.float64(out_scale)

    d_x = np.zeros(x.shape)
    sums = {name: np.zeros((2, len(spans))) for name in ("g", "h", "gx")}  # row 0: signed, row 1: absolute
    for i, slope in enumerate(slopes):
        inside = (u > bounds[i]) & (u <= bounds[i + 1])
        d_x[inside] = g[inside] * np.float64(in_scale) * slope
        for name, factor in (
            ("g", np.ones(inside.sum())),
            ("h", u[inside].astype(np.float64) - np.float64(bounds[i])),
            ("gx", x[inside].astype(np.float64)),
        ):
            terms = g[inside] * factor
            sums[name][:, i] = terms.sum(), np.abs(terms).sum()

    flow = slopes * sums["g"]
    own = slopes / spans * sums["h"]
    later = np.stack([flow[:, i + 1 :].sum(1) for i in range(len(spans))], axis=1)
    d_interval = (own + later) * parts * (exact(act.interval) > MIN_INTERVAL)
    d_in_scale = (slopes * sums["gx"]).sum(1)

    finite = ~np.isnan(u)
    levels = RANGE / act.steps * activation_levels(x, act)[finite].astype(np.float64)
    d_out_scale = (dy[finite] * (levels - np.float64(offset))).sum()
    out_magnitude = (np.abs(dy[finite]) * (levels + np.abs(np.float64(offset)))).sum()
    return {
        "x": Sum(d_x.reshape(shape), np.abs(d_x).reshape(shape)),
        "start": Sum(-flow[0].sum(keepdims=True), flow[1].sum(keepdims=True)),
        "interval": Sum(-d_interval[0], d_interval[1]),
        "in_scale": Sum(d_in_scale[:1], d_in_scale[1:]),
        "out_scale": Sum(np.array([d_out_scale]), np.array([out_magnitude])),
    }


def _rounded(value: torch.Tensor, to: np.ndarray) -> torch.Tensor:
    """``value`` with its numbers replaced by ``to``: the gradient is that of ``value``."""
    return value + (torch.from_numpy(np.asarray(to, np.float64)) - value).detach()


def surrogate_gradients(grad: torch.Tensor, x: torch.Tensor, act: Activation) -> dict[str, np.ndarray]:
    """Gradients of the eager algorithm of N2UQ (arXiv 2111.14826) by torch's autograd in float64.

    The forward pass takes the value of the step function and the backward pass that of the piecewise linear
    one, by ``step.detach() + linear - linear.detach()``; both are built segment by segment with ``where``.
    x must be finite. Thresholds and inputs have their float32 values, because those decide the segment.
    """
    names = ("start", "interval", "in_scale", "out_scale")
    leaves = {name: getattr(act, name).detach().double().requires_grad_() for name in names}
    leaves["x"] = x.detach().double().flatten().requires_grad_()
    _, in_scale, _, offset = act.scalars()
    u = _rounded(leaves["x"] * leaves["in_scale"], in_scale * exact(x).ravel())

    floor = torch.tensor(float(MIN_INTERVAL), dtype=torch.float64)
    interval = torch.where(leaves["interval"] > floor, leaves["interval"], floor)
    segments, bounds = (1, act.segments()) if act.uniform else (act.steps, act.segments())
    if act.uniform:
        interval = interval * act.steps
    rise = RANGE / segments

    step = RANGE / act.steps * torch.from_numpy(activation_levels(exact(x).ravel(), act)).double()
    low, linear = leaves["start"], torch.zeros_like(u)
    for i in range(segments):
        low = _rounded(low, bounds[i])
        linear = torch.where(u > low, rise / interval[i] * (u - low) + i * rise, linear)
        low = low + interval[i]
    linear = torch.where(u > _rounded(low, bounds[-1]), RANGE, linear)

    out = step.detach() + linear - linear.detach()
    y = leaves["out_scale"] * (out - float(offset))
    y.backward(grad.detach().double().flatten())
    gradients = {name: leaf.grad.numpy() for name, leaf in leaves.items()}
    return {**gradients, "x": gradients["x"].reshape(x.shape)}


# ---- bit packing -------------------------------------------------------------------------------------


def pack_bits(codes: list[int], bits: int) -> bytes:
    """One big integer that holds code i at bit ``i * bits``, written out little-endian."""
    stream = sum((code % 2**bits) << (i * bits) for i, code in enumerate(codes))
    return stream.to_bytes((len(codes) * bits + 7) // 8, "little")


def unpack_bits(packed: bytes, bits: int, numel: int) -> list[int]:
    stream = int.from_bytes(packed, "little")
    return [stream >> (i * bits) & (2**bits - 1) for i in range(numel)]


def codebook_decode(packed: bytes, codebook: np.ndarray, scale: np.ndarray, bits: int, shape) -> np.ndarray:
    """``scale * codebook[code]``, rounded once; a code without a level has the last one."""
    codes = np.array(unpack_bits(packed, bits, int(np.prod(shape, dtype=np.int64))), np.int64)
    return codebook[np.minimum(codes, len(codebook) - 1)].reshape(shape) * scale


def codebook_linear(x: np.ndarray, w: np.ndarray) -> Sum:
    """``x W^T`` of a decoded weight."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    return Sum(x @ w.T, np.abs(x) @ np.abs(w).T)

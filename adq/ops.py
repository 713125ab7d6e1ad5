"""Schemas, argument checks and fake (shape-only) implementations of every adq operator.

Nothing is computed here. The implementations stand in :mod:`adq.reference` (every device), in
:mod:`adq.backends.cpu` (C++) and in :mod:`adq.backends.cuda` (Triton); torch's dispatcher chooses
between them. The mathematics is defined once, by :mod:`adq.reference`.

Conventions shared by all operators:

* ``w``, ``x`` and ``grad`` are float32, bfloat16 or float16 of any shape, strides and memory format;
  the mathematics is float32 and each result that has their shape also has their dtype and strides.
* ``codebook`` ``[K]`` and ``thresholds`` ``[K - 1]`` are float32 and ascending, 1 <= K <= 256.
* The parameters of the activation quantizer are float32: ``start``, ``in_scale``, ``out_scale`` and
  ``offset`` hold one element, ``interval`` holds ``steps`` elements, or one that serves every step
  (the uniform quantizer).
* ``packed`` holds codes of ``bits`` bits as :func:`adq.reference.pack_bits` writes them.
* The ``foreach`` operators take the weights of many layers, a list entry a layer, and fold in the scales:
  ``scales[l]`` is float32 and contiguous, has as many dimensions as ``weights[l]``, and all of them are 1 but at
  most one, the channels'. All tensors lie on one device.
* Every operator is deterministic, bit for bit, from run to run and for any number of threads, and functional, but
  for the one whose name ends in an underscore.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MAX_BITS = 8
MAX_LEVELS = 2**MAX_BITS
ACTIVATION_RANGE = 2.0
"""Width R of the activation quantizer's output before ``out_scale`` (N2UQ, arXiv 2111.14826)."""
MIN_INTERVAL = 1e-3
"""Smallest interval between activation thresholds; smaller ones are clamped, with gradient zero."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

LIBRARY = torch.library.Library("adq", "DEF")

SCHEMAS = {
    "codebook_lookup": ("(Tensor w, Tensor codebook, Tensor thresholds, bool codes) -> (Tensor w_q, Tensor codes)"),
    "codebook_statistics": "(Tensor w, Tensor thresholds) -> (Tensor count, Tensor total)",
    "codebook_lookup_statistics": (
        "(Tensor w, Tensor codebook, Tensor thresholds, bool codes)"
        " -> (Tensor w_q, Tensor codes, Tensor count, Tensor total)"
    ),
    "threshold_quantize": (
        "(Tensor x, Tensor start, Tensor interval, Tensor in_scale, Tensor out_scale, Tensor offset,"
        " int steps) -> Tensor"
    ),
    "threshold_quantize_backward": (
        "(Tensor grad, Tensor x, Tensor start, Tensor interval, Tensor in_scale, Tensor out_scale,"
        " Tensor offset, int steps)"
        " -> (Tensor d_x, Tensor d_start, Tensor d_interval, Tensor d_in_scale, Tensor d_out_scale)"
    ),
    "foreach_codebook_quantize": "(Tensor[] weights, Tensor[] scales, Tensor[] codebooks) -> Tensor[]",
    "foreach_codebook_step_": (
        "(Tensor[] weights, Tensor(a!)[] scales, Tensor(b!)[] codebooks, Tensor(c!)[] counts, Tensor(d!)[] totals,"
        " Tensor rates, float pace, bool[] snap, Tensor(e!)[] quantized) -> ()"
    ),
    "threshold_levels": "(Tensor x, Tensor start, Tensor interval, Tensor in_scale, int steps) -> Tensor",
    "integer_conv2d": (
        "(Tensor x, Tensor weight, Tensor table, Tensor initial, Tensor multiplier, Tensor bias, Tensor? residual,"
        " float low, float high, Tensor[] quantizers, int[] steps, bool keep, int[] kernel, int[] stride,"
        " int[] padding, int[] dilation, int groups, int zero) -> (Tensor y, Tensor[] levels)"
    ),
    "pack_bits": "(Tensor codes, int bits) -> Tensor",
    "unpack_bits": "(Tensor packed, int bits, int numel) -> Tensor",
    "codebook_decode": "(Tensor packed, Tensor codebook, Tensor scale, int bits, int[] shape) -> Tensor",
    "codebook_linear": ("(Tensor x, Tensor packed, Tensor codebook, Tensor scale, int bits, int outputs) -> Tensor"),
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


# ---- argument checks: called by the fakes and by every implementation --------------------------------


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"adq: {name} must be float32, bfloat16 or float16, got {tensor.dtype}")


def _check_table(name: str, tensor: Tensor, device: torch.device, index: int | None = None) -> None:
    if tensor.dtype is torch.float32 and tensor.dim() == 1 and tensor.device == device:
        return
    name = name if index is None else f"{name}[{index}]"
    if tensor.dtype != torch.float32 or tensor.dim() != 1:
        raise TypeError(
            f"adq: {name} must be a one-dimensional float32 tensor, got {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    raise ValueError(f"adq: {name} is on {tensor.device}, but the data is on {device}")


def check_codebook(w: Tensor, thresholds: Tensor, codebook: Tensor | None = None) -> None:
    """Check the arguments of the codebook operators; raises TypeError or ValueError."""
    _check_float("w", w)
    _check_table("thresholds", thresholds, w.device)
    if thresholds.numel() >= MAX_LEVELS:
        raise ValueError(f"adq: a codebook has at most {MAX_LEVELS} levels, got {thresholds.numel() + 1}")
    if codebook is not None:
        _check_table("codebook", codebook, w.device)
        if codebook.numel() != thresholds.numel() + 1:
            raise ValueError(
                f"adq: {codebook.numel()} levels need {codebook.numel() - 1} thresholds, got {thresholds.numel()}"
            )


def scale_axis(weight_shape: Sequence[int], scale: Tensor) -> int | None:
    """The axis of a weight along which ``scale`` has an element for each channel, None if one serves all of it."""
    shape = scale.shape
    if scale.dtype is torch.float32 and len(shape) == len(weight_shape) and scale.is_contiguous():
        if scale.numel() == 1:
            return None
        axes = [axis for axis, size in enumerate(shape) if size != 1]
        if len(axes) == 1 and shape[axes[0]] == weight_shape[axes[0]]:
            return axes[0]
    raise ValueError(
        f"adq: the scale of a weight {tuple(weight_shape)} must be contiguous float32 and 1 in all dimensions but at "
        f"most one, got {scale.dtype} {tuple(scale.shape)}"
    )


def scale_layout(w: Tensor, axis: int | None) -> tuple[int, int, int]:
    """Outer, channels and inner of the memory of a dense weight whose scales lie along ``axis``."""
    channels, inner = (1, w.numel()) if axis is None else (w.shape[axis], w.stride(axis))
    return w.numel() // max(channels * inner, 1), channels, inner


def _check_lists(weights: list[Tensor], scales: list[Tensor], **tables: list[Tensor]) -> None:
    for name, tensors in {"scales": scales, **tables}.items():
        if len(tensors) != len(weights):
            raise ValueError(f"adq: {len(weights)} weights, but {len(tensors)} {name}")
    device = weights[0].device if weights else None
    for i, (w, scale, *state) in enumerate(zip(weights, scales, *tables.values(), strict=True)):
        if w.dtype not in _FLOATS:
            _check_float(f"weights[{i}]", w)
        scale_axis(w.shape, scale)
        if w.device != device or scale.device != device:
            raise ValueError(f"adq: weights[{i}] is on {w.device} and its scale on {scale.device}, others on {device}")
        levels = state[0].numel()
        for name, table in zip(tables, state, strict=True):
            _check_table(name, table, w.device, i)
            if table.numel() != levels or not 1 <= levels <= MAX_LEVELS or not table.is_contiguous():
                raise ValueError(
                    f"adq: {name}[{i}] must be contiguous, with one element for each of the 1..{MAX_LEVELS} levels of "
                    f"its codebook, got {table.numel()} for {levels} levels"
                )


def check_foreach_quantize(weights: list[Tensor], scales: list[Tensor], codebooks: list[Tensor]) -> None:
    """Check the arguments of :func:`foreach_codebook_quantize`; raises TypeError or ValueError."""
    _check_lists(weights, scales, codebooks=codebooks)


def check_foreach_step(
    weights: list[Tensor],
    scales: list[Tensor],
    codebooks: list[Tensor],
    counts: list[Tensor],
    totals: list[Tensor],
    rates: Tensor,
    snap: list[bool],
    quantized: list[Tensor],
) -> None:
    """Check the arguments of :func:`foreach_codebook_step_`; raises TypeError or ValueError."""
    _check_lists(weights, scales, codebooks=codebooks, counts=counts, totals=totals)
    if not weights:
        return
    _check_table("rates", rates, weights[0].device)
    if rates.numel() != len(weights) or len(snap) != len(weights):
        raise ValueError(f"adq: {len(weights)} weights, but {rates.numel()} rates and {len(snap)} of snap")
    if len(quantized) not in (0, len(weights)):
        raise ValueError(f"adq: quantized must be empty or hold a tensor a weight, got {len(quantized)}")
    for i, (w, w_q) in enumerate(zip(weights, quantized, strict=False)):
        layout = torch.empty_like(w, device="meta").stride()
        if w_q.dtype != w.dtype or w_q.shape != w.shape or w_q.device != w.device or w_q.stride() != layout:
            raise ValueError(f"adq: quantized[{i}] must be like weights[{i}], as torch.empty_like makes it")


def _check_edges(device: torch.device, interval: Tensor, steps: int, **scalars: Tensor) -> None:
    _check_table("interval", interval, device)
    for name, tensor in scalars.items():
        _check_table(name, tensor, device)
        if tensor.numel() != 1:
            raise ValueError(f"adq: {name} must hold one element, got {tensor.numel()}")
    if not 1 <= steps < MAX_LEVELS:
        raise ValueError(f"adq: steps must be in 1..{MAX_LEVELS - 1}, got {steps}")
    if interval.numel() not in (1, steps):
        raise ValueError(f"adq: {steps} steps need {steps} intervals or one, got {interval.numel()}")


def check_threshold(
    x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor, offset: Tensor, steps: int
) -> None:
    """Check the arguments of the activation quantizer; raises TypeError or ValueError."""
    _check_float("x", x)
    scalars = {"start": start, "in_scale": in_scale, "out_scale": out_scale, "offset": offset}
    _check_edges(x.device, interval, steps, **scalars)


def check_levels(x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, steps: int) -> None:
    """Check the arguments of :func:`threshold_levels`; raises TypeError or ValueError."""
    _check_float("x", x)
    _check_edges(x.device, interval, steps, start=start, in_scale=in_scale)


def check_grad(grad: Tensor, x: Tensor) -> None:
    """Check the incoming gradient of the activation quantizer; raises TypeError or ValueError."""
    if grad.dtype != x.dtype:
        raise TypeError(f"adq: grad is {grad.dtype}, but x is {x.dtype}")
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"adq: grad {tuple(grad.shape)} on {grad.device} does not match x {tuple(x.shape)} on {x.device}"
        )


def conv_output(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Length of an axis after a convolution."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _check_geometry(**pairs: list[int]) -> None:
    for name, pair in pairs.items():
        least = 0 if name == "padding" else 1
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"adq: {name} must be two numbers from {least} up, got {pair}")


def check_integer_conv2d(
    x: Tensor,
    weight: Tensor,
    table: Tensor,
    initial: Tensor,
    multiplier: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    quantizers: list[Tensor],
    steps: list[int],
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    zero: int,
) -> tuple[int, int, int, int]:
    """Check the arguments of :func:`integer_conv2d`; raises TypeError or ValueError. Returns the result's shape."""
    _check_geometry(kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    if x.dtype != torch.uint8 or weight.dtype != torch.uint8 or table.dtype != torch.int8 or x.dim() != 4:
        raise TypeError(
            "adq: x must be uint8 of four dimensions, weight uint8 and table int8, got "
            f"{x.dtype} {tuple(x.shape)}, {weight.dtype} and {table.dtype}"
        )
    outputs, inputs = initial.numel(), x.shape[1]
    for name, tensor, kind in (
        ("initial", initial, torch.int32),
        ("multiplier", multiplier, torch.float32),
        ("bias", bias, torch.float32),
    ):
        if tensor.dtype != kind or tensor.shape != (outputs,) or not tensor.is_contiguous():
            raise ValueError(
                f"adq: {name} must be contiguous {kind} [{outputs}], got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if groups < 1 or inputs % groups or outputs % groups:
        raise ValueError(f"adq: {inputs} inputs and {outputs} outputs do not divide into {groups} groups")
    taps = kernel[0] * kernel[1]
    layout = integer_layout(outputs, inputs // groups, taps, groups, table.numel())
    if tuple(weight.shape) != layout or not weight.is_contiguous():
        raise ValueError(f"adq: the weight must be contiguous {layout}, got {tuple(weight.shape)}; see adq.layout")
    if taps * (inputs // groups) * 255 * 128 >= 2**31:
        raise ValueError(f"adq: a sum of {taps * (inputs // groups)} products may exceed 32 bits")
    if not 0 <= zero <= 255:
        raise ValueError(f"adq: zero must be a level in 0..255, got {zero}")
    height, width = (conv_output(x.shape[2 + i], kernel[i], stride[i], padding[i], dilation[i]) for i in range(2))
    if height < 1 or width < 1:
        raise ValueError(f"adq: a kernel {tuple(kernel)} does not fit an input of {x.shape[2]} x {x.shape[3]}")
    shape = (x.shape[0], outputs, height, width)
    if residual is not None and (residual.dtype != torch.float32 or tuple(residual.shape) != shape):
        raise ValueError(f"adq: residual must be float32 {shape}, got {residual.dtype} {tuple(residual.shape)}")
    if len(quantizers) != 3 * len(steps):
        raise ValueError(f"adq: {len(steps)} quantizers need start, interval and in_scale each, got {len(quantizers)}")
    for i, count in enumerate(steps):
        start, interval, in_scale = quantizers[3 * i : 3 * i + 3]
        _check_edges(x.device, interval, count, start=start, in_scale=in_scale)
    tensors = [weight, table, initial, multiplier, bias, *([] if residual is None else [residual])]
    if any(tensor.device != x.device for tensor in tensors):
        raise ValueError(f"adq: x is on {x.device}, other arguments are not")
    return shape


def integer_layout(outputs: int, inputs: int, taps: int, groups: int, levels: int) -> tuple[int, ...]:
    """Shape of a weight for :func:`integer_conv2d`; ``inputs`` are those of a group. What lies where: adq.layout."""
    if levels not in (0, 2, 4, 8, 16):
        raise ValueError(f"adq: a table has 2, 4, 8 or 16 levels, or none, got {levels}")
    if is_depthwise(outputs, inputs, groups):
        return taps, outputs
    return groups, -(outputs // groups // -16), taps * -(inputs // -4), 8 * (levels.bit_length() - 1 if levels else 8)


def is_depthwise(outputs: int, inputs: int, groups: int) -> bool:
    """Whether each channel is convolved by itself; ``inputs`` are those of a group."""
    return groups > 1 and outputs == groups and inputs == 1


def packed_size(numel: int, bits: int) -> int:
    """Bytes that ``numel`` codes of ``bits`` bits take when packed without padding between them."""
    return (numel * bits + 7) // 8


def check_pack(codes: Tensor, bits: int) -> None:
    """Check the arguments of :func:`pack_bits`; raises TypeError or ValueError."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"adq: codes must be uint8, got {codes.dtype}")
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"adq: bits must be in 1..{MAX_BITS}, got {bits}")


def check_unpack(packed: Tensor, bits: int, numel: int) -> None:
    """Check the arguments of :func:`unpack_bits`; raises TypeError or ValueError."""
    check_pack(packed, bits)
    if numel < 0:
        raise ValueError(f"adq: numel must not be negative, got {numel}")
    if packed.dim() != 1 or packed.numel() != packed_size(numel, bits):
        raise ValueError(
            f"adq: {numel} codes of {bits} bits take {packed_size(numel, bits)} bytes, got shape {tuple(packed.shape)}"
        )


def check_decode(packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, shape: Sequence[int]) -> int | None:
    """Check the arguments of :func:`codebook_decode`; raises TypeError or ValueError. Returns the scale's axis."""
    if any(size < 0 for size in shape):
        raise ValueError(f"adq: the shape must not be negative, got {tuple(shape)}")
    check_unpack(packed, bits, math.prod(shape))
    _check_table("codebook", codebook, packed.device)
    if not 1 <= codebook.numel() <= 2**bits:
        raise ValueError(f"adq: codes of {bits} bits need 1..{2**bits} levels, got {codebook.numel()}")
    if scale.device != packed.device:
        raise ValueError(f"adq: scale is on {scale.device}, but the data is on {packed.device}")
    return scale_axis(shape, scale)


def check_linear(
    x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, outputs: int
) -> tuple[list[int], int | None]:
    """Check the arguments of :func:`codebook_linear`; raises TypeError or ValueError.

    Returns the result's shape, and the scale's axis: that of the outputs, or None.
    """
    _check_float("x", x)
    if x.dim() == 0:
        raise ValueError("adq: x must have a dimension of inputs, got shape ()")
    axis = check_decode(packed, codebook, scale, bits, (outputs, x.shape[-1]))
    if axis == 1:
        raise ValueError(f"adq: scale must hold one element or one for each output, got {tuple(scale.shape)}")
    if x.device != packed.device:
        raise ValueError(f"adq: x is on {x.device}, but the codes are on {packed.device}")
    return [*x.shape[:-1], outputs], axis


# ---- fakes -------------------------------------------------------------------------------------------


def _register_fake(function: Callable[..., Any]) -> Callable[..., Any]:
    name = function.__name__.removeprefix("_fake_")
    torch.library.register_fake(f"adq::{name}", function, lib=LIBRARY)
    return function


def _codes_like(w: Tensor, codes: bool) -> Tensor:
    return torch.empty_like(w, dtype=torch.uint8) if codes else w.new_empty(0, dtype=torch.uint8)


@_register_fake
def _fake_codebook_lookup(w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool) -> tuple[Tensor, ...]:
    check_codebook(w, thresholds, codebook)
    return torch.empty_like(w), _codes_like(w, codes)


@_register_fake
def _fake_codebook_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, ...]:
    check_codebook(w, thresholds)
    levels = thresholds.numel() + 1
    return w.new_empty(levels, dtype=torch.int64), w.new_empty(levels, dtype=torch.float32)


@_register_fake
def _fake_codebook_lookup_statistics(
    w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool
) -> tuple[Tensor, ...]:
    w_q, code = _fake_codebook_lookup(w, codebook, thresholds, codes)
    return w_q, code, *_fake_codebook_statistics(w, thresholds)


@_register_fake
def _fake_foreach_codebook_quantize(
    weights: list[Tensor], scales: list[Tensor], codebooks: list[Tensor]
) -> list[Tensor]:
    check_foreach_quantize(weights, scales, codebooks)
    return [torch.empty_like(w) for w in weights]


@_register_fake
def _fake_foreach_codebook_step_(
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
    check_foreach_step(weights, scales, codebooks, counts, totals, rates, snap, quantized)


@_register_fake
def _fake_threshold_quantize(
    x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor, offset: Tensor, steps: int
) -> Tensor:
    check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    return torch.empty_like(x)


@_register_fake
def _fake_threshold_quantize_backward(
    grad: Tensor,
    x: Tensor,
    start: Tensor,
    interval: Tensor,
    in_scale: Tensor,
    out_scale: Tensor,
    offset: Tensor,
    steps: int,
) -> tuple[Tensor, ...]:
    check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    check_grad(grad, x)
    return tuple(torch.empty_like(tensor) for tensor in (x, start, interval, in_scale, out_scale))


@_register_fake
def _fake_threshold_levels(x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, steps: int) -> Tensor:
    check_levels(x, start, interval, in_scale, steps)
    return torch.empty_like(x, dtype=torch.uint8)


@_register_fake
def _fake_integer_conv2d(
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
    shape = check_integer_conv2d(
        x, weight, table, initial, multiplier, bias, residual, quantizers, steps,
        kernel, stride, padding, dilation, groups, zero,
    )  # fmt: skip
    return integer_results(x, shape, keep, len(steps))


def channels_last(tensor: Tensor) -> Tensor:
    """The tensor itself if its memory is ``[N, H, W, C]``, else a copy that is."""
    return tensor.contiguous(memory_format=torch.channels_last)


def integer_results(
    x: Tensor, shape: tuple[int, int, int, int], keep: bool, levels: int
) -> tuple[Tensor, list[Tensor]]:
    """Uninitialised results of :func:`integer_conv2d`, channels_last; y is empty if it is not kept."""

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    return empty(torch.float32) if keep else x.new_empty(0, dtype=torch.float32), [
        empty(torch.uint8) for _ in range(levels)
    ]


@_register_fake
def _fake_pack_bits(codes: Tensor, bits: int) -> Tensor:
    check_pack(codes, bits)
    return codes.new_empty(packed_size(codes.numel(), bits))


@_register_fake
def _fake_unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    check_unpack(packed, bits, numel)
    return packed.new_empty(numel)


@_register_fake
def _fake_codebook_decode(packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, shape: list[int]) -> Tensor:
    check_decode(packed, codebook, scale, bits, shape)
    return packed.new_empty(shape, dtype=torch.float32)


@_register_fake
def _fake_codebook_linear(
    x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, outputs: int
) -> Tensor:
    return x.new_empty(check_linear(x, packed, codebook, scale, bits, outputs)[0])

"""Every operator on the device against the reference: decisions exactly, sums to float32 rounding.

The reference (:mod:`adq.reference`) decides in float32 and adds in float64; it runs on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adq import reference
from adq.batches import to_device
from adq.bench.case import Setting
from adq.bench.data import activations, convolution
from adq.bench.peers import kept_bytes
from adq.functional import threshold_quantize
from adq.ops import packed_size

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "1": lambda values: values[:1],
    "empty": lambda values: values[:0],
    "63": lambda values: values[:63],
    "1023": lambda values: values[:1023],
    "65537": lambda values: values[:65537],
    "misaligned": lambda values: values[3:4099],
    "transposed": lambda values: values[: 37 * 53].view(37, 53).t(),
    "every second": lambda values: values[:4099:2],
    "channels_last": lambda values: values[:9600].view(5, 16, 10, 12).contiguous(memory_format=torch.channels_last),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LEVELS = (16, 8, 4, 256, 1, 2, 3, 31)
STEPS = ((3, False), (2, False), (4, False), (8, True), (1, False), (5, False), (8, False), (3, True))
"""Bits, and whether one interval serves all the steps."""
PLAIN = "65537"
"""The shape on which every width is tried; the others try the first width alone."""
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, int, int, int, int]]] = {
    "3x3": ((2, 64, 15, 14), (144, 3, 1, 1, 1)),
    "3x3 /2": ((3, 32, 13, 13), (64, 3, 2, 1, 1)),
    "1x1": ((5, 40, 6, 7), (72, 1, 1, 0, 1)),
    "7x7 /2": ((1, 3, 33, 31), (64, 7, 2, 3, 1)),
    "depthwise": ((2, 48, 14, 9), (48, 3, 1, 1, 48)),
}
"""Shapes of inputs, and outputs, kernel, stride, padding and groups."""
WIDTHS = (2, 3, 4, 1, 5, 6, 7, 8)
"""Those that are timed first."""
SUM_TOLERANCE = 2e-6
"""Of the sum of the absolute contributions."""
REFERENCE_TOLERANCE = 1e-14
"""Of the largest sum: rounding of the float64 reference."""
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 2.0**-126, torch.bfloat16: 2.0**-126, torch.float16: 2.0**-24}


@dataclass(frozen=True)
class Check:
    """A named comparison; ``run`` raises AssertionError where the device and the reference differ."""

    name: str
    run: Callable[[], None]


def checks(setting: Setting) -> Iterator[Check]:
    """All comparisons of the operators on the setting's device, the widths that are timed before the others."""
    device = setting.device
    yield Check("memory kept for the backward", partial(_check_kept, setting))
    for bits in WIDTHS:
        for count in (0, 1, 7, 8191, 65536):
            yield Check(f"{count} codes of {bits} bits", partial(_check_bits, bits, count, device))
    values = _values(2**17)
    finite = values.nan_to_num(0.0, 3.0, -3.0)
    for shape, take in sorted(SHAPES.items(), key=lambda item: item[0] != PLAIN):
        for dtype_name, dtype in DTYPES.items():
            w = take(values.to(dtype)), take(finite.to(dtype))
            where = f"{dtype_name}, {shape}"
            for levels in LEVELS if shape == PLAIN else LEVELS[:1]:
                yield Check(f"codebook, K={levels}, {where}", partial(_check_codebook, w, levels, device))
            for bits, shared in STEPS if shape == PLAIN else STEPS[:1]:
                title = f"N2UQ, {bits} bits{', one interval' if shared else ''}, {where}"
                yield Check(title, partial(_check_threshold, w, bits, shared, device))
    yield Check("every layer in one call", partial(_check_foreach, device))
    for name, (images, geometry) in CONVOLUTIONS.items():
        for bits in (3, 1, 2, 4, 8):
            title = f"integer convolution, {name}, {bits} bits"
            yield Check(title, partial(_check_convolution, images, geometry, bits, device))
    for bits in WIDTHS:  # last: on a GPU these take the longest to compile
        for inputs in (8, 13, 4136):
            title = f"products with codes of {bits} bits, rows of {inputs}"
            yield Check(title, partial(_check_linear, bits, inputs, device))


def _values(count: int) -> Tensor:
    """Normal values, among them zeros, ties with the codebooks, infinities and NaN."""
    values = torch.randn(count, generator=torch.Generator().manual_seed(0))
    values[::97] = 0.0
    values[5::89] = 0.5
    values[7::1009] = torch.inf
    values[11::1013] = -torch.inf
    values[13::1019] = torch.nan
    return values


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device with the same strides and offset."""
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _same(actual: Tensor, expected: Tensor, what: str) -> None:
    actual = actual.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, f"{what}: dtype or shape"
    assert actual.stride() == expected.stride(), f"{what}: strides {actual.stride()} instead of {expected.stride()}"
    wrong = ~((actual == expected) | (actual.isnan() & expected.isnan()))
    assert not wrong.any(), f"{what}: {int(wrong.sum())} of {wrong.numel()} differ"


def _close(actual: Tensor, expected: Tensor, magnitude: Tensor, what: str) -> None:
    """Within rounding of sums whose absolute contributions add up to ``magnitude``."""
    dtype = actual.dtype
    magnitude = magnitude.double()
    allowed = (SUM_TOLERANCE + ROUNDING[dtype]) * magnitude + SMALLEST[dtype]
    if magnitude.numel():  # the reference's own float64 sums are differences of larger ones
        allowed = allowed + REFERENCE_TOLERANCE * magnitude.max()
    excess = (actual.cpu().double() - expected.double()).abs() - allowed
    same = (actual.cpu() == expected) | (actual.cpu().isnan() & expected.isnan())
    worst = float(torch.where(same, 0.0, excess.nan_to_num(torch.inf)).max()) if same.numel() else 0.0
    assert worst <= 0, f"{what}: the error exceeds what rounding allows by {worst:.3g}"


def _check_codebook(data: tuple[Tensor, Tensor], levels: int, device: torch.device) -> None:
    """Lookup of all values, sums of the finite ones."""
    w, finite = data
    codebook = torch.linspace(-2.0, 2.0, levels)
    thresholds = reference.decision_thresholds(codebook)
    tables = codebook.to(device), thresholds.to(device)
    expected = reference.codebook_lookup(w, codebook, thresholds, True)
    for actual, wanted, what in zip(
        torch.ops.adq.codebook_lookup(_on(w, device), *tables, True), expected, ("w_q", "codes"), strict=True
    ):
        _same(actual, wanted, what)
    count, total = reference.codebook_statistics(finite, thresholds)
    magnitude = _absolute_sums(finite, thresholds)
    w_q, _, fused_count, fused_total = torch.ops.adq.codebook_lookup_statistics(_on(finite, device), *tables, False)
    _same(w_q, reference.codebook_lookup(finite, codebook, thresholds, False)[0], "fused w_q")
    _same(fused_count, count, "fused count")
    _close(fused_total, total, magnitude, "fused total")
    alone = torch.ops.adq.codebook_statistics(_on(finite, device), tables[1])
    _same(alone[0], count, "count")
    _close(alone[1], total, magnitude, "total")


def _layers(device: torch.device) -> tuple[list[Tensor], ...]:
    """Weights of several shapes, dtypes and widths with their scales, codebooks, EMA counts and EMA totals."""
    generator = torch.Generator().manual_seed(3)
    weights, state = [], []
    for shape, axis, levels, dtype in (
        ((64, 32, 3, 3), 0, 8, torch.float32),
        ((32, 1, 3, 3), 0, 15, torch.float32),
        ((24, 40, 2, 2), 1, 4, torch.float32),
        ((100, 333), 0, 256, torch.bfloat16),
        ((50, 77), None, 16, torch.float16),
    ):
        weights.append(torch.randn(shape, generator=generator).to(dtype))
        scale = torch.rand([n if d == axis else 1 for d, n in enumerate(shape)], generator=generator) + 0.5
        codebook = torch.randn(levels, generator=generator).sort().values
        count = torch.full((levels,), weights[-1].numel() / levels)
        state.append((scale, codebook, count, count * codebook))
    return [w.to(device) for w in weights], *([t.to(device) for t in table] for table in zip(*state, strict=True))


def _check_foreach(device: torch.device) -> None:
    """One step of all codebooks, and the weights quantized before and after it."""
    ours, theirs = _layers(device), _layers(torch.device("cpu"))
    for actual, expected in zip(
        torch.ops.adq.foreach_codebook_quantize(*ours[:3]),
        reference.foreach_codebook_quantize(*theirs[:3]),
        strict=True,
    ):
        _same(actual, expected, "quantized weight")
    count = len(ours[0])
    kept = [torch.empty_like(w) for w in ours[0]]
    rates, snap = torch.full((count,), 0.1), [False] * count
    torch.ops.adq.foreach_codebook_step_(*ours, rates.to(device), 0.5, snap, kept)
    weights, scales, codebooks, counts, totals = theirs
    reference.foreach_codebook_step_(weights, scales, codebooks, counts, totals, rates, 0.5, snap, [])
    for name, mine, wanted in zip(("scale", "codebook", "count", "total"), ours[1:], theirs[1:], strict=True):
        for a, b in zip(mine, wanted, strict=True):
            _close(a, b, b.abs() + b.abs().max(), name)
    for actual, expected in zip(kept, torch.ops.adq.foreach_codebook_quantize(*ours[:3]), strict=True):
        _same(actual, expected.cpu(), "weight quantized in the step")


def _check_convolution(
    shape: tuple[int, ...], geometry: tuple[int, int, int, int, int], bits: int, device: torch.device
) -> None:
    """The levels of the next layer, and the float result with a residual, of which the same levels are taken."""
    names = "out_channels", "kernel_size", "stride", "padding", "groups"
    operands = list(convolution(shape, dict(zip(names, geometry, strict=True)), bits).operands)
    _, (levels,) = reference.integer_conv2d(*operands)
    _same(torch.ops.adq.integer_conv2d(*to_device(operands, device))[1][0], levels, "levels")
    generator = torch.Generator().manual_seed(bits)
    operands[6] = torch.randn(levels.shape, generator=generator).contiguous(memory_format=torch.channels_last)
    operands[11] = True
    expected, (levels,) = reference.integer_conv2d(*operands)
    y, (actual,) = torch.ops.adq.integer_conv2d(*to_device(operands, device))
    _same(y, expected, "y")
    _same(actual, levels, "levels with a residual")
    start, interval, in_scale = to_device(operands[9], device)
    _same(torch.ops.adq.threshold_levels(y, start, interval, in_scale, operands[10][0]), levels, "threshold levels")


def _absolute_sums(w: Tensor, thresholds: Tensor) -> Tensor:
    values = w.float().flatten().contiguous()
    code = torch.bucketize(values, thresholds)
    return torch.bincount(code, values.abs().double(), minlength=thresholds.numel() + 1)


def _check_threshold(data: tuple[Tensor, Tensor], bits: int, shared: bool, device: torch.device) -> None:
    """Forward pass on all values, gradients of the finite ones."""
    x, finite = data
    steps = 2**bits - 1
    interval = torch.full((1,), 2.0 / steps) if shared else torch.linspace(0.6, 1.4, steps) * 2.0 / steps
    start, in_scale, out_scale, offset = (torch.tensor([value]) for value in (-0.9, 0.8, 1.3, 0.25))
    parameters = (start, interval, in_scale, out_scale, offset)
    moved = [tensor.to(device) for tensor in parameters]
    y = torch.ops.adq.threshold_quantize(_on(x, device), *moved, steps)
    _same(y, reference.threshold_quantize(x, start, interval, in_scale, out_scale, offset, steps), "y")
    grad = torch.empty_like(finite).normal_(generator=torch.Generator().manual_seed(1))
    actual = torch.ops.adq.threshold_quantize_backward(_on(grad, device), _on(finite, device), *moved, steps)
    # in float32, so that d_x is compared before its rounding to a narrower dtype
    expected = _gradients(grad.float(), finite.float(), parameters, steps)
    magnitudes = _magnitudes(grad.float(), finite.float(), parameters, steps)
    names = ("d_x", "d_start", "d_interval", "d_in_scale", "d_out_scale")
    for name, ours, wanted, magnitude in zip(names, actual, expected, magnitudes, strict=True):
        _close(ours, wanted, magnitude, name)


def _gradients(grad: Tensor, x: Tensor, parameters: Sequence[Tensor], steps: int) -> tuple[Tensor, ...]:
    start, interval, in_scale, out_scale, offset = parameters
    return reference.threshold_quantize_backward(grad, x, start, interval, in_scale, out_scale, offset, steps)


def _magnitudes(grad: Tensor, x: Tensor, parameters: Sequence[Tensor], steps: int) -> tuple[Tensor, ...]:
    """Sums of the absolute contributions to each gradient: every contribution is given the same sign."""
    *others, offset = parameters
    without = (*others, torch.zeros_like(offset))
    d_x, d_start, d_interval, _, d_out = _gradients(grad.abs(), x, without, steps)
    d_in_scale = _gradients(grad.abs() * x.sign(), x, without, steps)[3]
    d_out = d_out + offset.abs() * grad.abs().double().sum()
    return d_x.abs(), d_start.abs(), d_interval.abs(), d_in_scale.abs(), d_out


def _check_bits(bits: int, count: int, device: torch.device) -> None:
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = torch.ops.adq.pack_bits(codes.to(device), bits)
    assert packed.numel() == packed_size(count, bits), "packed size"
    _same(packed, reference.pack_bits(codes, bits), "packed")
    _same(torch.ops.adq.unpack_bits(packed, bits, count), codes, "unpacked")
    levels = torch.linspace(-1.0, 1.0, 2**bits - (bits > 1))  # a code has none
    for shape, axis in (([count], None), ([count // 7, 7], 0), ([count // 7, 7], 1)):
        scales = [n if d == axis else 1 for d, n in enumerate(shape)]
        scale = torch.linspace(-1.0, 2.0, math.prod(scales)).view(scales)
        stream = packed[: packed_size(math.prod(shape), bits)]
        arguments = stream, levels.to(device), scale.to(device), bits, shape
        expected = reference.codebook_decode(stream.cpu(), levels, scale, bits, shape)
        _same(torch.ops.adq.codebook_decode(*arguments), expected, "decoded weight")


def _check_linear(bits: int, inputs: int, device: torch.device) -> None:
    """Several outputs for more rows of x than the kernels take at once."""
    outputs, generator = 9, torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (outputs * inputs,), dtype=torch.uint8, generator=generator)
    packed, levels = reference.pack_bits(codes, bits), torch.linspace(-1.0, 1.0, 2**bits - (bits > 1))
    for dtype in DTYPES.values():
        x = torch.randn(11, inputs, generator=generator).to(dtype)
        for scale in (torch.linspace(-1.0, 2.0, outputs).view(-1, 1), torch.tensor([[0.7]])):
            tables = [tensor.to(device) for tensor in (packed, levels, scale)]
            actual = torch.ops.adq.codebook_linear(x.to(device), *tables, bits, outputs)
            expected = reference.codebook_linear(x.float(), packed, levels, scale, bits, outputs)
            contributions = x.float().abs(), packed, levels.abs(), scale.abs(), bits, outputs
            _close(actual, expected, reference.codebook_linear(*contributions), "y")


def _check_kept(setting: Setting) -> None:
    elements = 2**16
    data = activations(setting, elements, torch.float32, 3)
    kept = elements * kept_bytes(threshold_quantize)(data)
    parameters = sum(tensor.nbytes for tensor in (*data.parameters, data.offset))
    assert kept <= 4 * elements + parameters, f"{kept:.0f} bytes, more than the input and the parameters"

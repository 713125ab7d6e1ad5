"""The operators on large tensors, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from adq.bench.case import ADQ, Build, Case, Setting, share_of_copy
from adq.bench.data import Activations, Codes, Weights, activations, codes, copy_of, on_data, weights
from adq.ops import packed_size

PART = "operators"
F32, BF16 = torch.float32, torch.bfloat16
TITLES = {F32: "fp32", BF16: "bf16"}

Bounds = tuple[float | None, float | None]

# Shares of the copy's bandwidth that are asked for, (CPU, GPU); None asks for nothing.
LOOKUP = {4: (0.90, 0.90), 8: (0.90, 0.90), 16: (0.90, 0.90), 256: (0.30, 0.60)}
FUSED = {4: (0.80, 0.75), 8: (0.80, 0.75), 16: (0.80, 0.75)}
FORWARD: dict[tuple[torch.dtype, int], Bounds] = {
    **{(F32, bits): (0.90, 0.92) for bits in (2, 3, 4)},
    **{(BF16, bits): (0.60, 0.88) for bits in (2, 3)},
}
BACKWARD: dict[tuple[torch.dtype, int], Bounds] = {
    **{(F32, 2): (0.75, 0.90), (F32, 3): (0.60, 0.85), (F32, 4): (0.40, 0.70)},
    **{(BF16, 2): (None, 0.85), (BF16, 3): (None, 0.70), (BF16, 4): (None, 0.45)},
}
PACK = (0.70, 0.80)
DECODE = (0.70, 0.80)


def run_lookup(d: Weights) -> Any:
    """Nearest level: reads and writes an element once."""
    return torch.ops.adq.codebook_lookup(d.w(), d.codebook, d.thresholds, False)


def run_fused(d: Weights) -> Any:
    """Nearest level, counts and sums in one pass."""
    return torch.ops.adq.codebook_lookup_statistics(d.w(), d.codebook, d.thresholds, False)


def run_forward(d: Activations) -> Any:
    """N2UQ: reads and writes an element once."""
    return torch.ops.adq.threshold_quantize(d.x(), *d.parameters, d.offset, d.steps)


def run_backward(d: Activations) -> Any:
    """N2UQ, all five gradients: reads x and its gradient, writes one."""
    return torch.ops.adq.threshold_quantize_backward(d.grad(), d.x(), *d.parameters, d.offset, d.steps)


def run_pack(d: Codes) -> Any:
    """Codes of a byte each into a bit stream."""
    return torch.ops.adq.pack_bits(d.codes(), d.bits)


def run_unpack(d: Codes) -> Any:
    """A bit stream into codes of a byte each."""
    return torch.ops.adq.unpack_bits(d.packed(), d.bits, d.codes.first.numel())


def run_decode(d: Codes) -> Any:
    """A bit stream into a weight: reads the codes, writes an element once."""
    return torch.ops.adq.codebook_decode(d.packed(), d.codebook, d.scale, d.bits, d.shape)


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part."""
    bounds: Bounds
    for levels, bounds in LOOKUP.items():
        yield _weight_case(setting, f"lookup, K={levels}, fp32", levels, run_lookup, bounds)
    for levels, bounds in FUSED.items():
        yield _weight_case(setting, f"lookup + count + sum, K={levels}, fp32", levels, run_fused, bounds)
    for (dtype, bits), bounds in FORWARD.items():
        yield _activation_case(setting, "N2UQ forward", dtype, bits, 2, run_forward, bounds)
    for (dtype, bits), bounds in BACKWARD.items():
        yield _activation_case(setting, "N2UQ backward", dtype, bits, 3, run_backward, bounds)
    for bits in (2, 3, 4):
        yield _bits_case(setting, f"pack, {bits} bits", bits, run_pack)
        yield _bits_case(setting, f"unpack, {bits} bits", bits, run_unpack)
    for bits in (2, 3, 4, 8):
        yield _decode_case(setting, bits)


def _case(setting: Setting, name: str, data: Any, run: Any, moved: int, bounds: Bounds) -> Case:
    contenders: dict[str, Build] = {ADQ: on_data(run)} | copy_of(moved, setting)
    return Case(PART, name, data, contenders, (share_of_copy(bounds[setting.cuda]),), bytes_moved=moved)


def _weight_case(setting: Setting, name: str, levels: int, run: Any, bounds: Bounds) -> Case:
    elements = setting.elements(F32)
    return _case(setting, name, lambda: weights(setting, elements, F32, levels), run, 8 * elements, bounds)


def _activation_case(
    setting: Setting, name: str, dtype: torch.dtype, bits: int, tensors: int, run: Any, bounds: Bounds
) -> Case:
    elements = setting.elements(dtype)
    return _case(
        setting,
        f"{name}, {bits} bits, {TITLES[dtype]}",
        lambda: activations(setting, elements, dtype, bits),
        run,
        tensors * dtype.itemsize * elements,
        bounds,
    )


def _bits_case(setting: Setting, name: str, bits: int, run: Any) -> Case:
    elements = setting.elements(torch.uint8)
    moved = elements + packed_size(elements, bits)
    return _case(setting, name, lambda: codes(setting, elements, bits), run, moved, PACK)


def _decode_case(setting: Setting, bits: int) -> Case:
    elements = setting.elements(F32)
    moved = 4 * elements + packed_size(elements, bits)
    data = partial(codes, setting, elements, bits)
    return _case(setting, f"decode, {bits} bits, fp32", data, run_decode, moved, DECODE)

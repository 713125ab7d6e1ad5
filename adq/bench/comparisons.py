"""The operators on large tensors, beside what a user would otherwise run on the same data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from adq.bench import peers
from adq.bench.case import ADQ, Build, Case, Setting, extra, faster_than
from adq.bench.data import activations, on_data, weights
from adq.bench.operators import F32, TITLES, run_backward, run_forward, run_fused, run_lookup
from adq.functional import threshold_quantize

PART = "peers"

# How many times faster than a peer, (CPU, GPU); None asks for nothing.
OVER_LOOP = {2: (None, 20.0), 3: (150.0, 40.0), 4: (None, 70.0)}
OVER_COMPILED_FORWARD = (1.0, 1.0)
OVER_COMPILED_BACKWARD = (1.5, 1.5)
OVER_BUCKETIZE = (20.0, 2.0)
KEPT = 4.01
"""Bytes an element that autograd may keep: the float32 input, and the few parameters."""


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part."""
    for levels in (4, 8, 16, 256):
        yield lookup_case(setting, levels)
    yield _case(setting, "lookup + count + sum, K=16, fp32", 16, {ADQ: on_data(run_fused), peers.VQ_EMA: peers.vq_ema})
    for dtype in (torch.float32, torch.bfloat16):
        yield forward_case(setting, dtype)
    yield backward_case(setting)
    for bits in OVER_LOOP:
        yield both_case(setting, bits)


def _case(setting: Setting, name: str, levels: int, contenders: dict[str, Build], targets: tuple = ()) -> Case:
    elements = setting.elements(F32)
    return Case(
        PART,
        f"{name}, beside peers",
        lambda: weights(setting, elements, F32, levels),
        contenders,
        targets,
        bytes_moved=8 * elements,
    )


def lookup_case(setting: Setting, levels: int) -> Case:
    """Nearest level of float32 weights."""
    contenders: dict[str, Build] = {ADQ: on_data(run_lookup), peers.BUCKETIZE: peers.bucketize}
    if levels == 16:
        contenders |= {peers.COMPILED_BUCKETIZE: peers.compiled_bucketize} if setting.compiled else {}
        contenders |= {
            peers.TORCHAO_FAKE: peers.torchao_fake_quantize,
            peers.TORCHAO_CODEBOOK: peers.torchao_codebook,
            peers.BNB_NF4: peers.bitsandbytes_nf4,
        }
    if levels == 256:
        contenders[peers.BNB_BLOCKWISE] = peers.bitsandbytes_blockwise
    bound = OVER_BUCKETIZE[setting.cuda] if levels <= 16 else None
    return _case(setting, f"lookup, K={levels}, fp32", levels, contenders, (faster_than(peers.BUCKETIZE, bound),))


def _activation_case(setting: Setting, name: str, dtype: torch.dtype, bits: int, tensors: int, **rest: Any) -> Case:
    elements = setting.elements(dtype)
    return Case(
        PART,
        f"{name}, {bits} bits, {TITLES[dtype]}, beside peers",
        lambda: activations(setting, elements, dtype, bits),
        bytes_moved=tensors * dtype.itemsize * elements,
        **rest,
    )


def forward_case(setting: Setting, dtype: torch.dtype) -> Case:
    """N2UQ at 3 bits, the forward pass alone."""
    contenders: dict[str, Build] = {ADQ: on_data(run_forward), peers.LOOP: peers.loop_forward}
    if setting.compiled:
        contenders[peers.COMPILED_LOOP] = peers.compiled_loop_forward
    if dtype == F32:
        contenders |= {
            peers.FAKE_QUANTIZE: peers.fake_quantize,
            peers.LEARNABLE: peers.learnable_forward,
            peers.TORCHAO_FAKE: peers.torchao_fake_quantize,
        }
    targets = (faster_than(peers.LOOP, None), faster_than(peers.COMPILED_LOOP, OVER_COMPILED_FORWARD[setting.cuda]))
    return _activation_case(setting, "N2UQ forward", dtype, 3, 2, contenders=contenders, targets=targets)


def backward_case(setting: Setting) -> Case:
    """N2UQ at 3 bits, the backward pass alone."""
    contenders: dict[str, Build] = {ADQ: on_data(run_backward), peers.LOOP: peers.loop_backward}
    if setting.compiled:
        contenders[peers.COMPILED_LOOP] = peers.compiled_loop_backward
    targets = (faster_than(peers.LOOP, None), faster_than(peers.COMPILED_LOOP, OVER_COMPILED_BACKWARD[setting.cuda]))
    return _activation_case(setting, "N2UQ backward", F32, 3, 3, contenders=contenders, targets=targets)


def both_case(setting: Setting, bits: int) -> Case:
    """N2UQ, forward and backward through autograd, and what is kept in between."""
    functions = {ADQ: threshold_quantize, peers.LOOP: peers.n2uq}
    contenders = {name: peers.both(function) for name, function in functions.items()}
    if bits == 3:
        contenders[peers.LEARNABLE] = peers.learnable_both
        if setting.compiled:
            contenders[peers.COMPILED_LOOP] = peers.compiled_loop_both
    kept = {f"kept by {name}": peers.kept_bytes(function) for name, function in functions.items()}
    targets = [faster_than(peers.LOOP, OVER_LOOP[bits][setting.cuda])]
    for name in functions:
        bound = KEPT if name == ADQ else None
        targets.append(extra(name, "bytes an element kept for the backward", f"kept by {name}", bound))
    return _activation_case(
        setting,
        "N2UQ forward + backward",
        F32,
        bits,
        5,
        contenders=contenders,
        targets=tuple(targets),
        extras=kept,
    )

"""Launches the Triton kernels of :mod:`adq.kernels`; same functions and arguments as :mod:`adq.reference`.

They serve CUDA and ROCm devices and, under Triton's interpreter (``TRITON_INTERPRET=1``), the CPU.
Tensors are processed in memory order, so a result has the strides of its input; an input with holes or
overlaps is copied first. Nothing here reads a value back from the device, so every operator can be
captured in a CUDA graph, and no launch is autotuned or depends on the device's size.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from adq import ops
from adq.kernels.codebook import codebook_kernel, codebook_reduce_kernel

INTERPRETED = triton.knobs.runtime.interpret
WARPS = 2 if torch.version.hip else 4
LANES = 1024 if INTERPRETED else 128
"""Lanes of a tile, one a thread (a warp has 64 on ROCm); the interpreter prefers few large tiles."""
VECTOR_BYTES = 16
PROGRAMS = 4096
"""Most programs of an elementwise kernel."""
PARTIALS = 1024
"""Most programs, and so partials, of a reduction: fixed, so that sums are the same on every device."""
REGISTER_LEVELS = 16
"""Most levels whose tables and statistics a program holds in registers."""


def describe() -> str:
    """What serves, for ``adq info``."""
    return f"Triton {triton.__version__}"


def _launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **constants) -> None:
    """Launch on ``device``. Products and sums are never contracted: results are the reference's bits."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, num_warps=WARPS, enable_fp_fusion=False, **constants)


def _tiles(x: Tensor, most: int) -> tuple[int, dict[str, int]]:
    """Programs for the elements of x, and the shape of their tiles: 16 bytes of x in every lane."""
    vector = VECTOR_BYTES // x.element_size()
    return min(triton.cdiv(x.numel(), LANES * vector), most), {"LANES": LANES, "VECTOR": vector}


def _like(x: Tensor, out: Tensor) -> Tensor:
    """x in the strides of ``out``, which is dense: x itself if it has them, else a copy."""
    return x if x.stride() == out.stride() else torch.empty_like(out, dtype=x.dtype).copy_(x)


def _codebook(
    w: Tensor, thresholds: Tensor, codebook: Tensor | None, codes: bool, statistics: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """w_q and, on demand, codes, count and total; what is not wanted is None."""
    ops.check_codebook(w, thresholds, codebook)
    levels = thresholds.numel() + 1
    dense = torch.empty_like(w)
    w = _like(w, dense)
    w_q = dense if codebook is not None else None
    code = torch.empty_like(dense, dtype=torch.uint8) if codes else None
    count = w.new_zeros(levels, dtype=torch.int64) if statistics else None
    total = w.new_zeros(levels, dtype=torch.float32) if statistics else None
    if w.numel() == 0:
        return w_q, code, count, total
    programs, tile = _tiles(w, PARTIALS if statistics else PROGRAMS)
    counts = w.new_empty(levels, programs, dtype=torch.int32) if statistics else None
    totals = w.new_empty(levels, programs, dtype=torch.float32) if statistics else None
    held = min(levels, REGISTER_LEVELS)
    _launch(
        codebook_kernel,
        (programs, triton.cdiv(levels, held) if statistics else 1),
        w.device,
        *(w, codebook, thresholds, w_q, code, counts, totals, w.numel()),
        K=levels,
        PROBES=(levels - 1).bit_length() if levels > held else 0,
        LEVELS=held,
        **tile,
    )
    if statistics:
        _launch(codebook_reduce_kernel, (levels,), w.device, counts, totals, count, total, programs, PROGRAMS=PARTIALS)
    return w_q, code, count, total


def codebook_lookup(w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool) -> tuple[Tensor, Tensor]:
    """See :func:`adq.reference.codebook_lookup`."""
    w_q, code, _, _ = _codebook(w, thresholds, codebook, codes, statistics=False)
    return w_q, code if codes else w.new_empty(0, dtype=torch.uint8)


def codebook_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`adq.reference.codebook_statistics`."""
    _, _, count, total = _codebook(w, thresholds, None, codes=False, statistics=True)
    return count, total


def codebook_lookup_statistics(
    w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`adq.reference.codebook_lookup_statistics`."""
    w_q, code, count, total = _codebook(w, thresholds, codebook, codes, statistics=True)
    return w_q, code if codes else w.new_empty(0, dtype=torch.uint8), count, total

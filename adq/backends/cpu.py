"""The operators on CPU tensors, by the C++ kernels of ``csrc/``; importing fails where they are not built.

The kernels see memory, not shapes: a non-overlapping dense tensor (channels_last too) is taken in memory
order, any other is copied into the layout that its result gets. ``ADQ_CPU_ISA`` forces an instruction
set: ``avx512vnni``, ``avx512``, ``avx2vnni``, ``avx2`` or ``baseline``; those with VNNI differ from those without
in the integer convolution alone.

Where torch has a stable C interface for it (2.14 and newer), it calls the commonest operators without Python: their
small calls end in ``csrc/dispatch.cpp``, all others come back to the functions here. ``ADQ_CPU_DISPATCH=python`` turns
that off. Frozen TorchScript needs it off: torch 2.14 takes the tensors out of the lists that it hands over so, and a
frozen graph calls with the same list again.

On Linux, results of 1 MiB and more live in memory that the process keeps for the next ones: fresh memory costs page
faults, which take several times as long as the kernels. ``ADQ_CPU_POOL_MIB`` limits what may wait unused
(default 1024; 0 turns the pool off).
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor, get_num_threads
from torch.autograd.graph import increment_version
from torch.utils import deterministic as fill_settings

from adq import ops

try:
    import adq._C as _C
except ModuleNotFoundError as error:
    raise ImportError(
        f"adq._C is not built in {os.path.dirname(ops.__file__)}; a source checkout needs `pip install -e .`, and in "
        "the working directory it hides an installed package from `python -m ...` (so run `pytest`, not "
        "`python -m pytest`); an installation without it found no C++ compiler"
    ) from error

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ISA_TITLES = {
    "avx512vnni": "AVX-512 with VNNI",
    "avx512": "AVX-512",
    "avx2vnni": "AVX2 with VNNI",
    "avx2": "AVX2",
    "baseline": "baseline instruction set",
}

POOL_FROM: int = _C.POOL_FROM
"""Bytes of the smallest result that comes from the pool."""

if "ADQ_CPU_ISA" in os.environ:
    _C.set_isa(os.environ["ADQ_CPU_ISA"])
_POOL_MIB = os.environ.get("ADQ_CPU_POOL_MIB") or "1024"
if not _POOL_MIB.isdecimal():
    raise ValueError(f"ADQ_CPU_POOL_MIB must be a whole number of MiB, got {_POOL_MIB!r}")
_POOL_LIMIT = int(_POOL_MIB) * 2**20
_C.set_pool_limit(_POOL_LIMIT)
_HAS_POOL = _C.has_pool() and _POOL_LIMIT > 0


def _torch_functions() -> dict[str, int] | None:
    """Addresses of the functions of torch that native operators call, None where this torch lacks one."""
    choice = os.environ.get("ADQ_CPU_DISPATCH", "auto")
    if choice not in ("auto", "python"):
        raise ValueError(f"ADQ_CPU_DISPATCH must be auto or python, got {choice!r}")
    library = ctypes.CDLL(torch._C.__file__)
    names = _C.torch_functions()
    if choice == "python" or not all(hasattr(library, name) for name in names):
        return None
    return {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names}


_TORCH_FUNCTIONS = _torch_functions()


def register_native() -> set[str]:
    """Register the operators that torch calls without Python; their names.

    Their small and common calls go straight to C++; all others come back to the functions below.
    """
    if _TORCH_FUNCTIONS is None:
        return set()
    names = _C.native_operators()
    _C.register_native(_TORCH_FUNCTIONS, {name: globals()[name] for name in names})
    return set(names)


def describe() -> str:
    """One line on how the kernels run, e.g. ``C++ kernels, AVX-512, OpenMP, called by torch itself``."""
    threads = "OpenMP" if _C.openmp() else "1 thread, no OpenMP"
    called = "from Python" if _TORCH_FUNCTIONS is None else "by torch itself"
    return f"C++ kernels, {_ISA_TITLES[_C.isa()]}, {threads}, called {called}"


def _pooled(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """Uninitialised memory of the pool for a dense tensor, None where that is not a matter for the pool."""
    numel = size.numel()
    wanted = _HAS_POOL and numel * dtype.itemsize >= POOL_FROM
    if not wanted or (torch.are_deterministic_algorithms_enabled() and fill_settings.fill_uninitialized_memory):  # type: ignore[attr-defined]
        return None
    memory = torch.frombuffer(_C.PoolBuffer(numel * dtype.itemsize), dtype=dtype, count=numel)
    # not a view: autograd forbids in-place changes of a view that a Function returns
    return torch.empty(0, dtype=dtype).set_(memory.untyped_storage(), 0, size, stride)


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``torch.empty_like``, with the memory of large results from the pool."""
    if tensor.numel() < POOL_FROM // 4:
        return torch.empty_like(tensor, dtype=dtype)
    stride = torch.empty_like(tensor, device="meta").stride()
    pooled = _pooled(tensor.shape, stride, dtype or tensor.dtype)
    return torch.empty_like(tensor, dtype=dtype) if pooled is None else pooled


def _empty(
    shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format = torch.contiguous_format
) -> Tensor:
    """``torch.empty``, with the memory of large results from the pool."""
    size = torch.Size(shape)
    if size.numel() >= POOL_FROM // 4:
        stride = torch.empty(size, device="meta", memory_format=memory_format).stride()
        pooled = _pooled(size, stride, dtype)
        if pooled is not None:
            return pooled
    return torch.empty(size, dtype=dtype, memory_format=memory_format)


def _with_strides_of(tensor: Tensor, out: Tensor) -> Tensor:
    """The tensor itself if it lies in memory as ``out`` does (``out`` is dense), else a copy that does."""
    return tensor if tensor.stride() == out.stride() else empty_like(out, tensor.dtype).copy_(tensor)


def _dense(w: Tensor) -> Tensor:
    """The tensor itself if it is non-overlapping and dense, else a copy; its order does not matter."""
    return w if w.is_contiguous() else _with_strides_of(w, empty_like(w))


def _lookup(
    w: Tensor,
    out: Tensor | None,
    codebook: Tensor | None,
    thresholds: Tensor,
    code: Tensor | None,
    count: Tensor | None = None,
    total: Tensor | None = None,
) -> None:
    """Run the lookup kernel over dense ``w``, filling the outputs that are given."""
    thresholds = thresholds.contiguous()
    codebook = None if codebook is None else codebook.contiguous()
    _C.codebook_lookup(
        _DTYPES[w.dtype],
        w.data_ptr(),
        w.numel(),
        0 if codebook is None else codebook.data_ptr(),
        thresholds.data_ptr(),
        thresholds.numel() + 1,
        0 if out is None else out.data_ptr(),
        0 if code is None else code.data_ptr(),
        0 if count is None else count.data_ptr(),
        0 if total is None else total.data_ptr(),
        get_num_threads(),
    )


def _new_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    levels = thresholds.numel() + 1
    return w.new_empty(levels, dtype=torch.int64), w.new_empty(levels, dtype=torch.float32)


def codebook_lookup(w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool) -> tuple[Tensor, Tensor]:
    """See :func:`adq.reference.codebook_lookup`."""
    ops.check_codebook(w, thresholds, codebook)
    out = empty_like(w)
    w = _with_strides_of(w, out)
    code = empty_like(out, dtype=torch.uint8) if codes else None
    _lookup(w, out, codebook, thresholds, code)
    return out, w.new_empty(0, dtype=torch.uint8) if code is None else code


def codebook_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`adq.reference.codebook_statistics`."""
    ops.check_codebook(w, thresholds)
    count, total = _new_statistics(w, thresholds)
    _lookup(_dense(w), None, None, thresholds, None, count, total)
    return count, total


def codebook_lookup_statistics(
    w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`adq.reference.codebook_lookup_statistics`."""
    ops.check_codebook(w, thresholds, codebook)
    out = empty_like(w)
    w = _with_strides_of(w, out)
    code = empty_like(out, dtype=torch.uint8) if codes else None
    count, total = _new_statistics(w, thresholds)
    _lookup(w, out, codebook, thresholds, code, count, total)
    return out, w.new_empty(0, dtype=torch.uint8) if code is None else code, count, total


def _weight(w: Tensor, w_q: Tensor | None, scale: Tensor, codebook: Tensor) -> tuple[int, ...]:
    """What the kernels are told of a layer; ``w`` is dense."""
    address = 0 if w_q is None else w_q.data_ptr()
    layout = (
        *ops.scale_layout(w, ops.scale_axis(w.shape, scale)),
        scale.data_ptr(),
        codebook.data_ptr(),
        codebook.numel(),
    )
    return _DTYPES[w.dtype], w.data_ptr(), *layout, address


def foreach_codebook_quantize(weights: list[Tensor], scales: list[Tensor], codebooks: list[Tensor]) -> list[Tensor]:
    """See :func:`adq.reference.foreach_codebook_quantize`."""
    ops.check_foreach_quantize(weights, scales, codebooks)
    outs = [empty_like(w) for w in weights]
    dense = [_with_strides_of(w, out) for w, out in zip(weights, outs, strict=True)]
    _C.quantize_layers([*map(_weight, dense, outs, scales, codebooks)], get_num_threads())
    return outs


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
    """See :func:`adq.reference.foreach_codebook_step_`."""
    ops.check_foreach_step(weights, scales, codebooks, counts, totals, rates, snap, quantized)
    dense = [_dense(w) for w in weights]
    outs: list[Tensor | None] = [*quantized] or [None] * len(weights)
    step_rates = (rates * pace).tolist()
    steps = [
        (count.data_ptr(), total.data_ptr(), rate, snapped)
        for count, total, rate, snapped in zip(counts, totals, step_rates, snap, strict=True)
    ]
    _C.step_layers([*map(_weight, dense, outs, scales, codebooks)], steps, get_num_threads())
    for tensor in (*scales, *codebooks, *counts, *totals, *quantized):
        increment_version(tensor)


def threshold_quantize(
    x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor, offset: Tensor, steps: int
) -> Tensor:
    """See :func:`adq.reference.threshold_quantize`."""
    ops.check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    out = empty_like(x)
    x = _with_strides_of(x, out)
    interval = interval.contiguous()
    _C.threshold_quantize(
        _DTYPES[x.dtype],
        x.data_ptr(),
        x.numel(),
        start.data_ptr(),
        interval.data_ptr(),
        in_scale.data_ptr(),
        out_scale.data_ptr(),
        offset.data_ptr(),
        interval.numel(),
        steps,
        out.data_ptr(),
        get_num_threads(),
    )
    return out


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
    """See :func:`adq.reference.threshold_quantize_backward`."""
    ops.check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    ops.check_grad(grad, x)
    d_x = empty_like(x)
    x = _with_strides_of(x, d_x)
    grad = _with_strides_of(grad, d_x)
    interval = interval.contiguous()
    d_start, d_interval, d_in_scale, d_out_scale = map(torch.empty_like, (start, interval, in_scale, out_scale))
    _C.threshold_quantize_backward(
        _DTYPES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        x.numel(),
        start.data_ptr(),
        interval.data_ptr(),
        in_scale.data_ptr(),
        out_scale.data_ptr(),
        offset.data_ptr(),
        interval.numel(),
        steps,
        d_x.data_ptr(),
        d_start.data_ptr(),
        d_interval.data_ptr(),
        d_in_scale.data_ptr(),
        d_out_scale.data_ptr(),
        get_num_threads(),
    )
    return d_x, d_start, d_interval, d_in_scale, d_out_scale


def _levels_of(start: Tensor, interval: Tensor, in_scale: Tensor, steps: int, levels: Tensor) -> tuple[int, ...]:
    """What the kernels are told of a quantizer of which the levels are wanted; ``interval`` is contiguous."""
    scalars = start.data_ptr(), interval.data_ptr(), in_scale.data_ptr()
    return *scalars, interval.numel(), steps, levels.data_ptr()


def threshold_levels(x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, steps: int) -> Tensor:
    """See :func:`adq.reference.threshold_levels`."""
    ops.check_levels(x, start, interval, in_scale, steps)
    levels = empty_like(x, torch.uint8)
    x = _with_strides_of(x, levels)
    interval = interval.contiguous()
    quantizer = _levels_of(start, interval, in_scale, steps, levels)
    _C.threshold_levels(_DTYPES[x.dtype], x.data_ptr(), x.numel(), quantizer, get_num_threads())
    return levels


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
    """See :func:`adq.reference.integer_conv2d`."""
    shape = ops.check_integer_conv2d(
        x, weight, table, initial, multiplier, bias, residual, quantizers, steps,
        kernel, stride, padding, dilation, groups, zero,
    )  # fmt: skip
    x = ops.channels_last(x)
    residual = None if residual is None else ops.channels_last(residual)
    y = _empty(shape, torch.float32, torch.channels_last) if keep else x.new_empty(0, dtype=torch.float32)
    levels = [_empty(shape, torch.uint8, torch.channels_last) for _ in steps]
    quantizers = [tensor.contiguous() for tensor in quantizers]
    table = table.contiguous()
    outputs = initial.data_ptr(), multiplier.data_ptr(), bias.data_ptr(), 0 if residual is None else residual.data_ptr()
    _C.integer_conv2d(
        x.data_ptr(),
        tuple(x.shape),
        weight.data_ptr(),
        table.data_ptr(),
        table.numel(),
        outputs,
        y.data_ptr() if keep else 0,
        shape[1:],
        low,
        high,
        [
            _levels_of(quantizers[3 * i], quantizers[3 * i + 1], quantizers[3 * i + 2], count, level)
            for i, (count, level) in enumerate(zip(steps, levels, strict=True))
        ],
        (kernel, stride, padding, dilation),
        groups,
        zero,
        get_num_threads(),
    )
    return y, levels


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See :func:`adq.reference.pack_bits`."""
    ops.check_pack(codes, bits)
    codes = codes.contiguous()
    packed = _empty((ops.packed_size(codes.numel(), bits),), torch.uint8)
    _C.pack_bits(codes.data_ptr(), codes.numel(), bits, packed.data_ptr(), get_num_threads())
    return packed


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """See :func:`adq.reference.unpack_bits`."""
    ops.check_unpack(packed, bits, numel)
    packed = packed.contiguous()
    codes = _empty((numel,), torch.uint8)
    _C.unpack_bits(packed.data_ptr(), bits, numel, codes.data_ptr(), get_num_threads())
    return codes


def codebook_decode(packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, shape: list[int]) -> Tensor:
    """See :func:`adq.reference.codebook_decode`."""
    axis = ops.check_decode(packed, codebook, scale, bits, shape)
    packed, codebook = packed.contiguous(), codebook.contiguous()
    out = _empty(shape, torch.float32)
    table = codebook.data_ptr(), codebook.numel(), scale.data_ptr()
    layout = ops.scale_layout(out, axis)
    _C.codebook_decode(packed.data_ptr(), bits, *table, *layout, out.data_ptr(), get_num_threads())
    return out


def codebook_linear(x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, outputs: int) -> Tensor:
    """See :func:`adq.reference.codebook_linear`."""
    shape, _ = ops.check_linear(x, packed, codebook, scale, bits, outputs)
    rows, packed, codebook = x.float().contiguous(), packed.contiguous(), codebook.contiguous()
    y = _empty(shape, torch.float32)
    size = math.prod(shape[:-1]), x.shape[-1], outputs
    table = codebook.data_ptr(), codebook.numel(), scale.data_ptr(), scale.numel()
    _C.codebook_linear(rows.data_ptr(), *size, packed.data_ptr(), bits, *table, y.data_ptr(), get_num_threads())
    return y.to(x.dtype)

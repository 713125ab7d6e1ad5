"""Launches the Triton kernels of :mod:`adq.kernels`; same functions and arguments as :mod:`adq.reference`.

They serve CUDA and ROCm devices and, under Triton's interpreter (``TRITON_INTERPRET=1``), the CPU.
Tensors are processed in memory order, so a result has the strides of its input; an input with holes or
overlaps is copied first. Nothing here reads a value back from the device, so every operator can be
captured in a CUDA graph, and no launch is autotuned or depends on the device's size.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adq import ops
from adq.backends.layers import LONG, SHORT, Layout, Table, tables
from adq.kernels.bits import decode_kernel, pack_kernel, unpack_kernel
from adq.kernels.codebook import (
    codebook_cells_kernel,
    codebook_kernel,
    codebook_reduce_kernel,
    codebook_statistics_kernel,
)
from adq.kernels.codebook_linear import linear_kernel
from adq.kernels.foreach import foreach_quantize_kernel, foreach_statistics_kernel, foreach_update_kernel
from adq.kernels.integer import integer_dense_kernel, integer_depthwise_kernel, integer_weight_kernel
from adq.kernels.threshold import threshold_kernel, threshold_table_kernel
from adq.kernels.threshold_backward import (
    threshold_backward_kernel,
    threshold_backward_search_kernel,
    threshold_reduce_kernel,
)

INTERPRETED = triton.knobs.runtime.interpret
WARP = 1024 if INTERPRETED else 64 if torch.version.hip else 32
"""Lanes of a warp. All other kernels are programs of one warp, across whose lanes tables lie and which
waits for no other; the interpreter prefers few large tiles."""
ROWS = 2
"""Vectors that a lane of an elementwise kernel loads together; a lane of a reduction loads one."""
VECTOR_BYTES = 16
"""Bytes of a tensor in a vector."""
BLOCK = 1024 if INTERPRETED else 128
"""Lanes of a program of the kernels of bits and of many layers, one a thread."""
PROGRAMS = 8192
"""Most programs of an elementwise kernel."""
PARTIALS = 4096
"""Most programs, and so partials, of a reduction: fixed, so that sums are the same on every device."""
PRECISION = "ieee" if INTERPRETED or torch.version.hip else "tf32"
"""Of the units that multiply matrices."""
PRODUCT_SIZE = 128 if INTERPRETED else WARP
"""Elements of a tile of the sums that are matrix products, for more than 16 levels or 15 steps."""
PRODUCT_REGISTERS = 255
"""Registers of a thread there: left to itself ptxas may take 80 and spill."""
PRODUCT_PARTIALS = 2048
"""As PARTIALS, for those."""
REDUCE_ROWS = 32 if INTERPRETED else 1
"""Rows of partials that one program adds up."""
LINEAR_LANES = (1 if INTERPRETED else 4) * WARP
"""Lanes of a tile of four codes each, for each output of a program of the linear kernel."""
LINEAR_OUTPUTS = 4
LINEAR_ROWS = 4
"""Outputs of a program of the linear kernel, and most rows of x: as many sums as fit in registers."""
LANE_PROBES = 5
"""Most steps of a binary search in tables across the lanes of a warp, which have 32 entries."""
REGISTER_LEVELS = 16
"""Most levels whose statistics a program holds in registers."""
REGISTER_STEPS = 15
"""Most activation steps whose thresholds and sums a program holds in registers."""

DENSE_PIXELS, DENSE_OUTPUTS, DENSE_INPUTS, DENSE_STAGES = 128, 64, 64, 3
"""Of a tile of the integer convolution, and how many of its steps are on their way."""
DEPTHWISE_PIXELS, DEPTHWISE_CHANNELS = 32, 64
WEIGHT_STEPS = 256 if INTERPRETED else 32

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def describe() -> str:
    """What serves, for ``adq info``."""
    return f"Triton {triton.__version__}"


def launch_options(
    hip: bool, block: bool = False, registers: int | None = None, stages: int = 1
) -> dict[str, int | bool]:
    """Compiler options: a single warp, or a ``block`` of 128 threads, and products and sums never contracted to
    fused ones, so that results are the reference's bits. Loops are pipelined through shared memory in ``stages``.
    ``registers`` caps a thread's registers, on NVIDIA alone."""
    warps = (2 if hip else 4) if block else 1
    options = {"num_warps": warps, "num_stages": min(stages, 2) if hip else stages, "enable_fp_fusion": False}
    return options if hip or registers is None else {**options, "maxnreg": registers}


def _launch(
    kernel: Any,
    programs: int,
    *args: Any,
    block: bool = False,
    registers: int | None = None,
    stages: int = 1,
    **constants: Any,
) -> None:
    """Launch on the device of the first argument; no programs, no launch."""
    device = args[0].device
    options = launch_options(torch.version.hip is not None, block, registers, stages)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if programs:
            kernel[(programs,)](*args, **options, **constants)


def _tiles(x: Tensor, rows: int, most: int) -> tuple[int, dict[str, Any]]:
    """Programs for the elements of x, and the shape of their tiles: ``rows`` vectors of x in every lane."""
    lanes, vector = rows * WARP, VECTOR_BYTES // x.element_size()
    return min(triton.cdiv(x.numel(), lanes * vector), most), {"LANES": lanes, "VECTOR": vector}


def _probes(edges: int) -> dict[str, Any]:
    """Steps of a binary search that need no memory, and the others."""
    probes = edges.bit_length()
    return {"PROBES": min(probes, LANE_PROBES), "MORE": max(probes - LANE_PROBES, 0)}


def _like(x: Tensor, out: Tensor) -> Tensor:
    """x in the strides of ``out``, which is dense: x itself if it has them, else a copy."""
    return x if x.stride() == out.stride() else torch.empty_like(out, dtype=x.dtype).copy_(x)


def _codes_like(w: Tensor, codes: bool) -> Tensor:
    return torch.empty_like(w, dtype=torch.uint8) if codes else w.new_empty(0, dtype=torch.uint8)


def _partials(w: Tensor, levels: int, programs: int) -> tuple[Tensor, Tensor]:
    """Memory for the counts and sums of every program."""
    return w.new_empty(levels, programs, dtype=torch.int32), w.new_empty(levels, programs, dtype=torch.float32)


def _add_partials(counts: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    levels, programs = counts.shape
    if not programs:
        return counts.new_zeros(levels, dtype=torch.int64), totals.new_zeros(levels)
    count, total = counts.new_empty(levels, dtype=torch.int64), totals.new_empty(levels)
    _launch(
        codebook_reduce_kernel,
        triton.cdiv(levels, REDUCE_ROWS),
        *(counts, totals, count, total, levels, programs),
        block=True,
        ROWS=REDUCE_ROWS,
        PROGRAMS=triton.next_power_of_2(max(programs, PARTIALS)),
    )
    return count, total


def _codebook(
    w: Tensor,
    codebook: Tensor | None,
    thresholds: Tensor,
    w_q: Tensor | None = None,
    codes: Tensor | None = None,
    statistics: bool = False,
) -> tuple[Tensor, Tensor] | None:
    """One pass over w for all that is wanted: ``w_q`` and ``codes`` are written where they are given, the
    statistics, for up to 16 levels, are returned."""
    levels = thresholds.numel() + 1
    if not statistics:
        programs, tile = _tiles(w, ROWS, PROGRAMS)
        probes = _probes(levels - 1)
        _launch(codebook_kernel, programs, w, codebook, thresholds, w_q, codes, w.numel(), K=levels, **probes, **tile)
        return None
    programs, tile = _tiles(w, 1, PARTIALS)
    partials = _partials(w, levels, programs)
    _launch(
        codebook_cells_kernel,
        programs,
        *(w, codebook, thresholds, w_q, codes, *partials, w.numel()),
        K=levels,
        PROBES=(levels - 1).bit_length(),
        **tile,
    )
    return _add_partials(*partials)


def _many_level_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Count and total for more than 16 levels, in a pass of its own."""
    levels = thresholds.numel() + 1
    programs = min(triton.cdiv(w.numel(), PRODUCT_SIZE), PRODUCT_PARTIALS)
    partials = _partials(w, levels, programs)
    _launch(
        codebook_statistics_kernel,
        programs,
        *(w, thresholds, *partials, w.numel()),
        K=levels,
        **_probes(levels - 1),
        registers=PRODUCT_REGISTERS,
        SIZE=PRODUCT_SIZE,
        PRECISION=PRECISION,
    )
    return _add_partials(*partials)


def codebook_lookup(w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool) -> tuple[Tensor, Tensor]:
    """See :func:`adq.reference.codebook_lookup`."""
    ops.check_codebook(w, thresholds, codebook)
    w_q, code = torch.empty_like(w), _codes_like(w, codes)
    _codebook(_like(w, w_q), codebook.contiguous(), thresholds.contiguous(), w_q, code if codes else None)
    return w_q, code


def codebook_statistics(w: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`adq.reference.codebook_statistics`."""
    ops.check_codebook(w, thresholds)
    w, thresholds = _like(w, torch.empty_like(w)), thresholds.contiguous()
    if thresholds.numel() >= REGISTER_LEVELS:
        return _many_level_statistics(w, thresholds)
    return _codebook(w, None, thresholds, statistics=True)  # type: ignore[return-value]


def codebook_lookup_statistics(
    w: Tensor, codebook: Tensor, thresholds: Tensor, codes: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See :func:`adq.reference.codebook_lookup_statistics`."""
    if thresholds.numel() >= REGISTER_LEVELS:
        return *codebook_lookup(w, codebook, thresholds, codes), *codebook_statistics(w, thresholds)
    ops.check_codebook(w, thresholds, codebook)
    w_q, code = torch.empty_like(w), _codes_like(w, codes)
    tables = codebook.contiguous(), thresholds.contiguous()
    statistics = _codebook(_like(w, w_q), *tables, w_q, code if codes else None, statistics=True)
    return w_q, code, *statistics  # type: ignore[misc]


def _place(whole: Tensor, layout: Layout) -> Tensor:
    """A tensor in the memory of another one, but no view of it: changed in place, it changes no other's version."""
    size, stride, offset = layout
    return whole.new_empty(0).set_(whole.untyped_storage(), offset, size, stride)


def _stage(table: Table, weights: list[Tensor]) -> Tensor | None:
    """Dense copies of the weights that are not dense, all in one tensor; None if there are none."""
    if not table.sizes[1]:
        return None
    stage = weights[0].new_empty(table.sizes[1], dtype=table.dtype)
    for i, layout in zip(table.members, table.staged, strict=True):
        if layout:
            _place(stage, layout).copy_(weights[i])
    return stage


def _constants(table: Table, registers: int | None = None) -> dict[str, Any]:
    return {
        "registers": registers,
        "DTYPE": TYPES[table.dtype],
        "KINDS": table.kinds,
        "LANES": BLOCK,
        "block": True,
        "VECTOR": VECTOR_BYTES // table.dtype.itemsize,
    }


def foreach_codebook_quantize(weights: list[Tensor], scales: list[Tensor], codebooks: list[Tensor]) -> list[Tensor]:
    """See :func:`adq.reference.foreach_codebook_quantize`; one launch for each dtype of the weights.

    The results share memory, so that their addresses need not be copied to the device.
    """
    results: list[Tensor] = list(weights)
    for table in tables(
        BLOCK,
        lambda: ops.check_foreach_quantize(weights, scales, codebooks),
        weights=weights,
        scales=scales,
        codebooks=codebooks,
    ):
        out = weights[0].new_empty(table.sizes[0], dtype=table.dtype)
        arguments = table.data, _stage(table, weights), out, len(table.members)
        # left to itself ptxas takes too few, and spills
        constants = _constants(table, 128 if table.kinds & ops.MAX_LEVELS else None)
        _launch(foreach_quantize_kernel, table.programs, *arguments, **constants)
        for i, layout in zip(table.members, table.outputs, strict=True):
            results[i] = _place(out, layout)
    return results


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
    """See :func:`adq.reference.foreach_codebook_step_`; two launches for each dtype of the weights."""
    lists = {"weights": weights, "scales": scales, "codebooks": codebooks, "counts": counts, "totals": totals}
    check = partial(ops.check_foreach_step, **lists, rates=rates, snap=snap, quantized=quantized)
    options = rates.dtype, rates.shape, rates.device
    for table in tables(BLOCK, check, options, snap, **lists, quantized=quantized):
        work = rates.new_empty(table.workspace)
        layers = len(table.members)
        arguments = table.data, _stage(table, weights), rates.contiguous(), work, layers, pace
        constants = _constants(table, 128 if table.kinds < REGISTER_LEVELS else 255)
        sums = {"SHORT": SHORT, "LONG": LONG, "PRODUCT": PRODUCT_SIZE, **constants}
        _launch(foreach_statistics_kernel, table.programs, *arguments, **sums)
        programs = table.programs if quantized else layers
        constants = _constants(table, 255 if table.kinds & ops.MAX_LEVELS else 168)
        _launch(foreach_update_kernel, programs, *arguments, QUANTIZE=bool(quantized), **constants)
    for tensor in chain(scales, codebooks, counts, totals, quantized):
        torch.autograd.graph.increment_version(tensor)


def _table(start: Tensor, interval: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Segment starts, level edges and clamped intervals, for more steps than fit in registers."""
    segments, edges, widths = (start.new_empty(steps + last) for last in (1, 0, 0))
    _launch(threshold_table_kernel, 1, start, interval, segments, edges, widths, steps, MIN_INTERVAL=ops.MIN_INTERVAL)
    return segments, edges, widths


def _searched(interval: Tensor, steps: int) -> bool:
    return interval.numel() == steps > REGISTER_STEPS


def threshold_quantize(
    x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, out_scale: Tensor, offset: Tensor, steps: int
) -> Tensor:
    """See :func:`adq.reference.threshold_quantize`."""
    ops.check_threshold(x, start, interval, in_scale, out_scale, offset, steps)
    return _threshold(x, start, interval, in_scale, out_scale, offset, steps, torch.empty_like(x))


def threshold_levels(x: Tensor, start: Tensor, interval: Tensor, in_scale: Tensor, steps: int) -> Tensor:
    """See :func:`adq.reference.threshold_levels`."""
    ops.check_levels(x, start, interval, in_scale, steps)
    return _threshold(x, start, interval, in_scale, None, None, steps, torch.empty_like(x, dtype=torch.uint8))


def _threshold(
    x: Tensor,
    start: Tensor,
    interval: Tensor,
    in_scale: Tensor,
    out_scale: Tensor | None,
    offset: Tensor | None,
    steps: int,
    y: Tensor,
) -> Tensor:
    """Fill y, which is dense, with the quantized x, or with its levels."""
    interval = interval.contiguous()
    programs, tile = _tiles(x, ROWS, PROGRAMS)
    edges = _table(start, interval, steps)[1] if _searched(interval, steps) and programs else None
    _launch(
        threshold_kernel,
        programs,
        *(_like(x, y), start, interval, in_scale, out_scale, offset, edges, y, x.numel()),
        STEPS=steps,
        UNIFORM=interval.numel() != steps,
        **_probes(interval.numel()),
        STEP=ops.ACTIVATION_RANGE / steps,
        MIN_INTERVAL=ops.MIN_INTERVAL,
        **tile,
    )
    return y


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
    """See :func:`adq.reference.integer_conv2d`; the levels are passes of their own over y."""
    shape = ops.check_integer_conv2d(
        x, weight, table, initial, multiplier, bias, residual, quantizers, steps,
        kernel, stride, padding, dilation, groups, zero,
    )  # fmt: skip
    y, _ = ops.integer_results(x, shape, True, 0)
    inputs, outputs = x.shape[1] // groups, shape[1] // groups
    geometry = {"KERNEL": kernel, "STRIDES": stride, "PADDING": padding, "DILATION": dilation}
    constants: dict[str, Any] = {name: tuple(value) for name, value in geometry.items()}
    after = multiplier, bias, None if residual is None else ops.channels_last(residual), y
    sides = shape[0] * shape[2] * shape[3], *x.shape[2:], *shape[2:]
    bounds = zero, float(low), float(high)
    if ops.is_depthwise(shape[1], inputs, groups):
        tile = {"M": DEPTHWISE_PIXELS, "N": min(DEPTHWISE_CHANNELS, triton.next_power_of_2(shape[1]))}
        programs = triton.cdiv(sides[0], tile["M"]) * triton.cdiv(shape[1], tile["N"])
        own = ops.channels_last(x), weight.view(torch.int8), initial, *after
        constants |= {"CHANNELS": shape[1], **tile}
        _launch(integer_depthwise_kernel, programs, *own, *sides, *bounds, block=True, **constants)
    else:
        tile = {"M": DENSE_PIXELS, "N": max(16, min(DENSE_OUTPUTS, triton.next_power_of_2(outputs))), "K": DENSE_INPUTS}
        programs = triton.cdiv(sides[0], tile["M"]) * triton.cdiv(outputs, tile["N"]) * groups
        own = ops.channels_last(x), *_integer_weight(weight, table, initial, inputs, outputs), *after
        constants |= {"GROUPS": groups, "INPUTS": inputs, "OUTPUTS": outputs, **tile}
        # left to itself ptxas takes too few registers, and spills
        constants |= {"block": True, "registers": 255, "stages": DENSE_STAGES}
        _launch(integer_dense_kernel, programs, *own, *sides, *bounds, **constants)
    readers = zip(quantizers[::3], quantizers[1::3], quantizers[2::3], steps, strict=True)
    return y if keep else x.new_empty(0, dtype=torch.float32), [threshold_levels(y, *reader) for reader in readers]


def _integer_weight(weight: Tensor, table: Tensor, initial: Tensor, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """The weight as int8, and what its sums begin with."""
    groups, blocks, length, _ = weight.shape
    plain, base = weight.new_empty(groups, blocks, 16, 4 * length, dtype=torch.int8), torch.empty_like(initial)
    coded = table.numel() > 0
    _launch(
        integer_weight_kernel,
        groups * blocks,
        *(weight, table.contiguous() if coded else None, initial, plain, base, length, inputs, outputs),
        block=True,
        BITS=table.numel().bit_length() - 1 if coded else 8,
        STEPS=WEIGHT_STEPS,
    )
    return plain, base


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
    interval = interval.contiguous()
    d_x = torch.empty_like(x)
    parameters = (start, interval, in_scale, out_scale)
    if x.numel() == 0:
        return d_x, *map(torch.zeros_like, parameters)  # type: ignore[return-value]
    d_parameters = tuple(map(torch.empty_like, parameters))
    data, scales = (_like(grad, d_x), _like(x, d_x)), (in_scale, out_scale, offset)
    backward = _searched_backward if _searched(interval, steps) else _register_backward
    partials = backward(*data, start, interval, scales, d_x, steps)
    rows, programs = partials.shape
    _launch(
        threshold_reduce_kernel,
        rows,
        *(partials, interval, *d_parameters, rows - 3, programs),
        block=True,
        MIN_INTERVAL=ops.MIN_INTERVAL,
        PROGRAMS=triton.next_power_of_2(max(programs, PARTIALS)),
    )
    return d_x, *d_parameters  # type: ignore[return-value]


def _register_backward(
    grad: Tensor, x: Tensor, start: Tensor, interval: Tensor, scales: tuple[Tensor, ...], d_x: Tensor, steps: int
) -> Tensor:
    """Write ``d_x`` and return the partial sums, with every segment in registers."""
    programs, tile = _tiles(x, 1, PARTIALS)
    segments = interval.numel()
    partials = start.new_empty(segments + 3, programs)
    _launch(
        threshold_backward_kernel,
        programs,
        *(grad, x, start, interval, *scales, d_x, partials, x.numel()),
        STEPS=steps,
        UNIFORM=segments != steps,
        PROBES=(segments - 1).bit_length(),
        STEP=ops.ACTIVATION_RANGE / steps,
        MIN_INTERVAL=ops.MIN_INTERVAL,
        **tile,
    )
    return partials


def _searched_backward(
    grad: Tensor, x: Tensor, start: Tensor, interval: Tensor, scales: tuple[Tensor, ...], d_x: Tensor, steps: int
) -> Tensor:
    """:func:`_register_backward` for more segments than fit."""
    programs = min(triton.cdiv(x.numel(), PRODUCT_SIZE), PRODUCT_PARTIALS)
    partials = start.new_empty(steps + 3, programs)
    _launch(
        threshold_backward_search_kernel,
        programs,
        *(grad, x, *_table(start, interval, steps), *scales, d_x, partials, x.numel()),
        STEPS=steps,
        **_probes(steps + 1),
        STEP=ops.ACTIVATION_RANGE / steps,
        registers=PRODUCT_REGISTERS,
        SIZE=PRODUCT_SIZE,
        PRECISION=PRECISION,
    )
    return partials


def _aligned(source: Tensor, alignment: int) -> Tensor:
    """A contiguous tensor that begins at a multiple of ``alignment`` bytes: a copy where ``source`` does not."""
    source = source.contiguous()
    return source.clone() if source.data_ptr() % alignment else source


def _bits(kernel: Any, source: Tensor, alignment: int, out: Tensor, numel: int, bits: int) -> Tensor:
    """Launch one of the bit kernels, from ``source``, whose address must be a multiple of ``alignment``."""
    source = _aligned(source, alignment)
    unit = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}[bits & -bits]
    _launch(kernel, triton.cdiv(numel, 16 * BLOCK), source, out, numel, block=True, BITS=bits, UNIT=unit, LANES=BLOCK)
    return out


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """See :func:`adq.reference.pack_bits`."""
    ops.check_pack(codes, bits)
    packed = codes.new_empty(ops.packed_size(codes.numel(), bits))
    return _bits(pack_kernel, codes, 8, packed, codes.numel(), bits)


def unpack_bits(packed: Tensor, bits: int, numel: int) -> Tensor:
    """See :func:`adq.reference.unpack_bits`."""
    ops.check_unpack(packed, bits, numel)
    return _bits(unpack_kernel, packed, bits & -bits, packed.new_empty(numel), numel, bits)


def _four_code_units(packed: Tensor, bits: int) -> tuple[Tensor, Any]:
    """A stream that can be read in units of four codes, or of a byte where four codes do not fill a unit."""
    unit = {4: tl.uint16, 8: tl.uint32}.get(bits, tl.uint8)
    return _aligned(packed, unit.primitive_bitwidth // 8), unit


def codebook_decode(packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, shape: list[int]) -> Tensor:
    """See :func:`adq.reference.codebook_decode`."""
    axis = ops.check_decode(packed, codebook, scale, bits, shape)
    w_q = packed.new_empty(shape, dtype=torch.float32)
    packed, unit = _four_code_units(packed, bits)
    _, channels, inner = ops.scale_layout(w_q, axis)
    programs, tile = _tiles(w_q, ROWS, PROGRAMS)
    _launch(
        decode_kernel,
        programs,
        *(packed, codebook.contiguous(), scale, w_q, w_q.numel(), inner, channels),
        BITS=bits,
        K=codebook.numel(),
        UNIT=unit,
        ROWS=None if axis is None else 4 if inner % 4 == 0 else 1,
        LANES=tile["LANES"],
    )
    return w_q


def codebook_linear(x: Tensor, packed: Tensor, codebook: Tensor, scale: Tensor, bits: int, outputs: int) -> Tensor:
    """See :func:`adq.reference.codebook_linear`; a launch for every four rows of x."""
    shape, axis = ops.check_linear(x, packed, codebook, scale, bits, outputs)
    inputs = x.shape[-1]
    packed, unit = _four_code_units(packed, bits)
    y = x.new_empty(shape)
    count = math.prod(shape[:-1])
    rows, results = x.contiguous().view(count, inputs), y.view(count, outputs)
    tile = 4 * LINEAR_LANES
    for first in range(0, count, LINEAR_ROWS):
        some = slice(first, first + LINEAR_ROWS)
        _launch(
            linear_kernel,
            triton.cdiv(outputs, LINEAR_OUTPUTS),
            *(rows[some], packed, codebook.contiguous(), scale, results[some], inputs, outputs),
            0 if inputs % 8 else inputs // tile * tile,
            0 if axis is None else 1,
            BITS=bits,
            K=codebook.numel(),
            UNIT=unit,
            ROWS=min(count - first, LINEAR_ROWS),
            OUTPUTS=LINEAR_OUTPUTS,
            LANES=LINEAR_LANES,
        )
    return y

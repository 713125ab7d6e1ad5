"""The N2UQ activation quantizer (arXiv 2111.14826), forward: quantize and dequantize in one pass."""

import triton
import triton.language as tl
from adq.kernels.tiles import (
    TABLE,
    lane_probes,
    lane_search,
    load_edges,
    load_tile,
    look_up,
    search,
    store_tile,
    tile_offsets,
)


@triton.jit
def load_segments(start, interval, STEPS: tl.constexpr, MIN_INTERVAL: tl.constexpr):
    """Segment starts ``T_0..T_n``, level edges ``T_i + interval[i] / 2`` and clamped intervals: three tuples
    of scalars, by float32 additions in the reference's order."""
    low = tl.load(start)
    segments, edges, widths = (low,), (), ()
    for i in tl.static_range(STEPS):
        width = tl.load(interval + i)
        width = tl.where(width < MIN_INTERVAL, MIN_INTERVAL, width)
        edges = edges + (low + 0.5 * width,)
        low += width
        segments = segments + (low,)
        widths = widths + (width,)
    return segments, edges, widths


@triton.jit
def lane_segments(low, interval, widths, STEPS: tl.constexpr, MIN_INTERVAL: tl.constexpr):
    """The same numbers as tables across the lanes: ``T_i``, ``T_i + interval[i] / 2`` and clamped intervals, the
    last two infinite from ``STEPS`` on. ``low`` is ``T_0``, ``widths`` are those of :func:`load_segments`."""
    lane = tl.arange(0, TABLE)
    low = tl.full((TABLE,), low, tl.float32)
    for i in tl.static_range(STEPS):
        low = tl.where(lane > i, low + widths[i], low)
    width = tl.load(interval + lane, mask=lane < STEPS, other=float("inf"))
    width = tl.where(width < MIN_INTERVAL, MIN_INTERVAL, width)
    return low, low + 0.5 * width, width


@triton.jit
def uniform_level(u, low, width, STEPS: tl.constexpr):
    """Output level for one interval ``width`` that serves every step; NaN gives any level."""
    level = tl.ceil(tl.div_rn(u - low, width) - 0.5)
    return tl.minimum(tl.maximum(level, 0.0), STEPS)


@triton.jit(do_not_specialize=["STEPS"])
def threshold_table_kernel(start, interval, segments, edges, widths, STEPS, MIN_INTERVAL: tl.constexpr):
    """:func:`load_segments` for any number of steps, into memory; one program.

    start, interval  ``[1]``, ``[STEPS]`` float32
    segments         out, ``[STEPS + 1]`` float32: ``T_0..T_n``
    edges, widths    out, ``[STEPS]`` float32
    """
    low = tl.load(start)
    tl.store(segments, low)
    for i in range(STEPS):
        width = tl.load(interval + i)
        width = tl.where(width < MIN_INTERVAL, MIN_INTERVAL, width)
        tl.store(edges + i, low + 0.5 * width)
        tl.store(widths + i, width)
        low += width
        tl.store(segments + i + 1, low)


@triton.jit
def _quantize(
    x,
    y,
    first,
    tile,
    numel,
    scalars,
    edges,
    probes,
    outputs,
    STEPS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PROBES: tl.constexpr,
    MORE: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of :func:`threshold_kernel`."""
    u_scale, y_scale, zero, low, width = scalars
    u = u_scale * load_tile(x, first, tile, numel, float("nan"))
    if UNIFORM:
        level = uniform_level(u, low, width, STEPS)
    else:
        level = lane_search(u, probes, PROBES)
        if MORE > 0:
            level = search(u, edges, STEPS, MORE, level << MORE)
    if y_scale is None:
        value, nothing = level.to(tl.int32), 0
    elif outputs is None:
        value, nothing = y_scale * (STEP * level.to(tl.float32) - zero), float("nan")
    else:
        value, nothing = look_up(outputs, level), float("nan")
    store_tile(y, first, tile, numel, tl.where(u == u, value, nothing))


@triton.jit(do_not_specialize=["numel"])
def threshold_kernel(
    x,
    start,
    interval,
    in_scale,
    out_scale,
    offset,
    edges,
    y,
    numel,
    STEPS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PROBES: tl.constexpr,
    MORE: tl.constexpr,
    STEP: tl.constexpr,
    MIN_INTERVAL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``y = out_scale (D q - offset)`` with ``u = in_scale x`` and ``q = #{i : u > T_i + interval[i] / 2}``.

    Source: N2UQ, arXiv 2111.14826, equation 5; the affine offset is ours. ``D = STEP`` is the output step
    R / n. The level is found by a binary search of ``PROBES`` steps across lanes and ``MORE`` in memory or,
    if UNIFORM, computed in closed form.

    x                                    ``[numel]`` float32, bfloat16 or float16
    start, in_scale, out_scale, offset   ``[1]`` float32; the last two None: y is the level q itself, of NaN 0
    interval                             ``[STEPS]`` float32, ``[1]`` if UNIFORM
    edges                                ``[STEPS]`` float32 of :func:`threshold_table_kernel`, or None up to 15
                                         steps, whose edges every program works out itself
    y                                    out, ``[numel]`` in x's dtype, levels in uint8
    """
    SIZE: tl.constexpr = LANES * VECTOR
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    KNOWN: tl.constexpr = 1 if UNIFORM or edges is not None else STEPS
    segments, _, widths = load_segments(start, interval, KNOWN, MIN_INTERVAL)
    y_scale, zero = None, None
    if out_scale is not None:
        y_scale, zero = tl.load(out_scale), tl.load(offset)
    scalars = (tl.load(in_scale), y_scale, zero, segments[0], widths[0])
    probes, outputs = None, None
    if not UNIFORM:
        if edges is None:
            _, lanes, _ = lane_segments(segments[0], interval, widths, STEPS, MIN_INTERVAL)
        else:
            lanes = load_edges(edges, STEPS, 1 << MORE)
        probes = lane_probes(lanes, PROBES)
        if MORE == 0 and out_scale is not None:
            outputs = scalars[1] * (STEP * tl.arange(0, TABLE).to(tl.float32) - scalars[2])
    whole = numel // SIZE * SIZE
    tile = tile_offsets(LANES, VECTOR)
    for first in range(program * SIZE, whole, programs * SIZE):
        _quantize(x, y, first, tile, numel, scalars, edges, probes, outputs, STEPS, UNIFORM, PROBES, MORE, STEP)
    tile = tile_offsets(LANES, 1)
    for first in range(whole + program * LANES, numel, programs * LANES):
        _quantize(x, y, first, tile, numel, scalars, edges, probes, outputs, STEPS, UNIFORM, PROBES, MORE, STEP)

"""The N2UQ activation quantizer (arXiv 2111.14826), forward: quantize and dequantize in one pass."""

import triton
import triton.language as tl
from adq.kernels.tiles import load_tile, search, store_tile, tile_offsets


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
def chain_level(u, edges, STEPS: tl.constexpr):
    """Output level ``#{i : u > edges[i]}``, float32, by compares and selects; NaN gives 0."""
    level = tl.full(u.shape, 0, tl.float32)
    for i in tl.static_range(STEPS):
        level = tl.where(u > edges[i], i + 1.0, level)
    return level


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
    STEP: tl.constexpr,
    MIN_INTERVAL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``y = out_scale (D q - offset)`` with ``u = in_scale x`` and ``q = #{i : u > T_i + interval[i] / 2}``.

    Source: N2UQ, arXiv 2111.14826, equation 5; the affine offset is ours. ``D = STEP`` is the output step
    R / n. Up to 15 steps the edges stay in registers; above (``PROBES`` > 0) they come from
    :func:`threshold_table_kernel` and are searched; ``UNIFORM`` computes the level in closed form.

    x                                    ``[numel]`` float32, bfloat16 or float16
    start, in_scale, out_scale, offset   ``[1]`` float32
    interval                             ``[STEPS]`` float32, ``[1]`` if UNIFORM
    edges                                ``[STEPS]`` float32, or None where ``PROBES`` = 0
    y                                    out, ``[numel]`` in x's dtype
    """
    SIZE: tl.constexpr = LANES * VECTOR
    tile = tile_offsets(LANES, VECTOR)
    u_scale, y_scale, zero = tl.load(in_scale), tl.load(out_scale), tl.load(offset)
    if PROBES == 0:
        segments, chain, widths = load_segments(start, interval, 1 if UNIFORM else STEPS, MIN_INTERVAL)
    for first in range(tl.program_id(0).to(tl.int64) * SIZE, numel, tl.num_programs(0) * SIZE):
        u = u_scale * load_tile(x, first, tile, numel, float("nan"))
        if UNIFORM:
            level = uniform_level(u, segments[0], widths[0], STEPS)
        elif PROBES == 0:
            level = chain_level(u, chain, STEPS)
        else:
            level = search(u, edges, STEPS, PROBES).to(tl.float32)
        level = tl.where(u == u, level, float("nan"))
        store_tile(y, first, tile, numel, y_scale * (STEP * level - zero))

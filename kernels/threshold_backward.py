"""The N2UQ activation quantizer (arXiv 2111.14826), backward: all five gradients in one pass.

With ``ramp_i = clamp((u - T_i) / w_i, 0, 1)`` and ``s = g D / w`` of u's own segment (0 outside all of them),
the sums of the reference collapse to one a segment::

    d_x = s in_scale        d_interval[i] = -sum(s ramp_i)    d_start = -sum(s)
    d_in_scale = sum(s x)   d_out_scale = sum(grad (D q - offset))

Sums are fused multiply-adds by name; nothing that decides a segment or level is fused.
"""

import triton
import triton.language as tl
from adq.kernels.threshold import lane_segments, load_segments, uniform_level
from adq.kernels.tiles import (
    ADD,
    FLUSH,
    TABLE,
    cell_sums,
    column,
    lane_probes,
    lane_search,
    lane_zeros,
    load_edges,
    load_tile,
    look_up,
    saturate,
    search,
    store_tile,
    tile_offsets,
)


@triton.jit
def _slope_and_output(
    u, scalars, segments, tables, STEPS: tl.constexpr, UNIFORM: tl.constexpr, PROBES: tl.constexpr, STEP: tl.constexpr
):
    """``out_scale D / w`` of u's segment, and ``D q - offset``: a segment's level rises by one in its middle."""
    slope, zero, width = scalars
    probes, slopes, middles, outputs = tables
    if UNIFORM:
        output = STEP * uniform_level(u, segments[0], width, STEPS) - zero
    else:
        segment = lane_search(u, probes, PROBES)
        slope, output = look_up(slopes, segment), look_up(outputs, segment)
        output = tl.where(u > look_up(middles, segment), output + STEP, output)
    return slope, output


@triton.jit
def _differentiate(
    grad,
    x,
    d_x,
    first,
    tile,
    numel,
    u_scale,
    scalars,
    segments,
    inverses,
    tables,
    sums,
    SEGMENTS: tl.constexpr,
    STEPS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PROBES: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of :func:`threshold_backward_kernel`: write ``d_x`` and return the sums with the tile added."""
    value = load_tile(x, first, tile, numel, float("nan"))
    dy = load_tile(grad, first, tile, numel, 0.0)
    u = u_scale * value
    inside = (u > segments[0]) & (u <= segments[SEGMENTS])
    slope, output = _slope_and_output(u, scalars, segments, tables, STEPS, UNIFORM, PROBES, STEP)
    rise = tl.where(inside, dy * slope, 0.0)
    store_tile(d_x, first, tile, numel, rise * u_scale)
    for i in tl.static_range(tile.shape[1]):
        at, flow, within = column(u, i), column(rise, i), column(inside.to(tl.int32), i) != 0
        added = ()
        for k in tl.static_range(SEGMENTS):
            added = added + (tl.fma(flow, saturate((at - segments[k]) * inverses[k]), sums[k]),)
        d_in, d_out = sums[SEGMENTS + 1], sums[SEGMENTS + 2]
        d_in = tl.where(within, tl.fma(flow, column(value, i), d_in), d_in)
        d_out = tl.where(at == at, tl.fma(column(dy, i), column(output, i), d_out), d_out)
        sums = added + (sums[SEGMENTS] + flow, d_in, d_out)
    return sums


@triton.jit(do_not_specialize=["numel"])
def threshold_backward_kernel(
    grad,
    x,
    start,
    interval,
    in_scale,
    out_scale,
    offset,
    d_x,
    partials,
    numel,
    STEPS: tl.constexpr,
    UNIFORM: tl.constexpr,
    PROBES: tl.constexpr,
    STEP: tl.constexpr,
    MIN_INTERVAL: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``d_x`` and the partial sums of the other gradients, for up to 15 segments; UNIFORM has a single one.

    grad, x                              ``[numel]`` float32, bfloat16 or float16
    start, in_scale, out_scale, offset   ``[1]`` float32
    interval                             ``[STEPS]`` float32, ``[1]`` if UNIFORM
    d_x                                  out, ``[numel]`` in x's dtype
    partials                             out, ``[SEGMENTS + 3, programs]`` float32: the sums
                                         ``s ramp_i``, ``s``, ``s x`` and ``grad (D q - offset)``
    """
    SIZE: tl.constexpr = LANES * VECTOR
    SEGMENTS: tl.constexpr = 1 if UNIFORM else STEPS
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    u_scale, y_scale, zero = tl.load(in_scale), tl.load(out_scale), tl.load(offset)
    segments, _, widths = load_segments(start, interval, SEGMENTS, MIN_INTERVAL)
    scalars = (STEP * y_scale / widths[0], zero, widths[0])
    inverses = ()
    if UNIFORM:
        span = STEPS * widths[0]
        segments, inverses = (segments[0], segments[0] + span), (1.0 / span,)
        tables = ((), (), (), ())
    else:
        low, middle, width = lane_segments(segments[0], interval, widths, STEPS, MIN_INTERVAL)
        outputs = STEP * tl.arange(0, TABLE).to(tl.float32) - zero
        tables = (lane_probes(low + width, PROBES), STEP * y_scale / width, middle, outputs)
        for k in tl.static_range(STEPS):
            inverses = inverses + (1.0 / widths[k],)
    zeros = lane_zeros(SEGMENTS + 3, LANES, tl.float32)
    sums, whole, step = zeros, numel // SIZE * SIZE, programs * SIZE
    tile = tile_offsets(LANES, VECTOR)
    for block in range(program * SIZE, whole, step * FLUSH):
        part = zeros
        for first in range(block, tl.minimum(block + step * FLUSH, whole), step):
            part = _differentiate(
                *(grad, x, d_x, first, tile, numel, u_scale, scalars, segments, inverses, tables, part),
                *(SEGMENTS, STEPS, UNIFORM, PROBES, STEP),
            )
        added = ()
        for i in tl.static_range(SEGMENTS + 3):
            added = added + (sums[i] + part[i],)
        sums = added
    tile = tile_offsets(LANES, 1)
    for first in range(whole + program * LANES, numel, programs * LANES):
        sums = _differentiate(
            *(grad, x, d_x, first, tile, numel, u_scale, scalars, segments, inverses, tables, sums),
            *(SEGMENTS, STEPS, UNIFORM, PROBES, STEP),
        )
    for i in tl.static_range(SEGMENTS + 3):
        total = tl.reduce(sums[i], 0, ADD)
        if UNIFORM and i == 0:
            total *= STEPS
        tl.store(partials + i * programs + program, total)


@triton.jit(do_not_specialize=["numel"])
def threshold_backward_search_kernel(
    grad,
    x,
    segments,
    edges,
    widths,
    in_scale,
    out_scale,
    offset,
    d_x,
    partials,
    numel,
    STEPS: tl.constexpr,
    PROBES: tl.constexpr,
    MORE: tl.constexpr,
    STEP: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """:func:`threshold_backward_kernel` for 16 to 255 learned intervals, from the tables in memory.

    The sums of a segment ``16 i + j`` are matrix products, as in
    :func:`adq.kernels.codebook.codebook_statistics_kernel`.

    segments        ``[STEPS + 1]`` float32
    edges, widths   ``[STEPS]`` float32
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    digit = tl.arange(0, 16)
    tile = tile_offsets(SIZE, 1)
    u_scale, y_scale, zero = tl.load(in_scale), tl.load(out_scale), tl.load(offset)
    flow = tl.full((16, 16), 0, tl.float32)
    ramp, new_flow, new_ramp = flow, flow, flow
    probes = lane_probes(load_edges(segments, STEPS + 1, 1 << MORE), PROBES)
    d_in = tl.full((SIZE,), 0, tl.float32)
    d_out = tl.full((SIZE,), 0, tl.float32)
    for first in range(program.to(tl.int64) * SIZE, numel, programs * SIZE):
        value = tl.reshape(load_tile(x, first, tile, numel, float("nan")), (SIZE,))
        dy = tl.reshape(load_tile(grad, first, tile, numel, 0.0), (SIZE,))
        u = u_scale * value
        above = lane_search(u, probes, PROBES)
        if MORE > 0:
            above = search(u, segments, STEPS + 1, MORE, above << MORE)
        inside = (above > 0) & (above <= STEPS)
        segment = tl.where(inside, above - 1, 0)
        rise = tl.where(inside, dy * y_scale * (STEP / tl.load(widths + segment)), 0.0)
        store_tile(d_x, first, tile, numel, tl.reshape(rise * u_scale, (SIZE, 1)))
        level = tl.where(inside, segment + (u > tl.load(edges + segment)).to(tl.int32), tl.minimum(above, STEPS))
        d_in += rise * tl.where(inside, value, 0.0)
        d_out += tl.where(u == u, dy * (STEP * level.to(tl.float32) - zero), 0.0)
        reach = rise * tl.where(inside, u - tl.load(segments + segment), 0.0)
        row = ((segment >> 4)[None, :] == digit[:, None]).to(tl.float32)
        column = ((segment & 15)[:, None] == digit[None, :]).to(tl.float32)
        flow += new_flow
        ramp += new_ramp
        new_flow = cell_sums(row, column, rise, True, PRECISION)
        new_ramp = cell_sums(row, column, reach, True, PRECISION)
    segment = tl.arange(0, 256)
    flow = tl.reshape(flow + new_flow, (256,))
    width = tl.load(widths + segment, mask=segment < STEPS, other=1.0)
    passed = tl.cumsum(flow, 0, reverse=True) - flow
    part = tl.reshape(ramp + new_ramp, (256,)) / width + passed
    tl.store(partials + segment * programs + program, part, mask=segment < STEPS)
    tl.store(partials + STEPS * programs + program, tl.reduce(flow, 0, ADD))
    tl.store(partials + (STEPS + 1) * programs + program, tl.reduce(d_in, 0, ADD))
    tl.store(partials + (STEPS + 2) * programs + program, tl.reduce(d_out, 0, ADD))


@triton.jit(do_not_specialize=["segments", "programs"])
def threshold_reduce_kernel(
    partials,
    interval,
    d_start,
    d_interval,
    d_in_scale,
    d_out_scale,
    segments,
    programs,
    MIN_INTERVAL: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Add the partials in a fixed order, in float64, and finish the gradients; one program a row.

    partials                             ``[segments + 3, programs]`` float32, programs <= PROGRAMS
    interval                             ``[segments]`` float32
    d_interval                           out, ``[segments]`` float32, 0 where the interval is clamped
    d_start, d_in_scale, d_out_scale     out, ``[1]`` float32
    """
    row = tl.program_id(0)
    column = tl.arange(0, PROGRAMS)
    values = tl.load(partials + row * programs + column, mask=column < programs, other=0.0)
    total = tl.reduce(values.to(tl.float64), 0, ADD).to(tl.float32)
    if row < segments:
        width = tl.load(interval + row)
        tl.store(d_interval + row, tl.where(width > MIN_INTERVAL, -total, 0.0))
    elif row == segments:
        tl.store(d_start, -total)
    elif row == segments + 1:
        tl.store(d_in_scale, total)
    else:
        tl.store(d_out_scale, total)

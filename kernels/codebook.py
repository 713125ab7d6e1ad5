"""Nearest codeword and per-level statistics of a weight tensor (ADQ, arXiv 2510.19760)."""

import triton
import triton.language as tl
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
    search,
    store_tile,
    tile_offsets,
)


@triton.jit
def _load_tables(codebook, thresholds, K: tl.constexpr, PROBES: tl.constexpr, MORE: tl.constexpr):
    """The probes of the first steps of the search, and the codebook, each across the lanes."""
    probes = lane_probes(load_edges(thresholds, K - 1, 1 << MORE), PROBES)
    levels = ()
    if codebook is not None and K <= TABLE:
        lane = tl.arange(0, TABLE)
        levels = tl.load(codebook + lane, mask=lane < K, other=0.0)
    return probes, levels


@triton.jit
def _quantize(
    w,
    codebook,
    thresholds,
    tables,
    w_q,
    codes,
    start,
    tile,
    numel,
    K: tl.constexpr,
    PROBES: tl.constexpr,
    MORE: tl.constexpr,
):
    """Load a tile, store each result that is wanted, and return the weights and codes."""
    probes, levels = tables
    x = load_tile(w, start, tile, numel, float("nan"))
    code = lane_search(x, probes, PROBES)
    if MORE > 0:
        code = search(x, thresholds, K - 1, MORE, code << MORE)
    if w_q is not None:
        if K <= TABLE:
            value = look_up(levels, code)
        else:
            value = tl.load(codebook + code, eviction_policy="evict_last")
        store_tile(w_q, start, tile, numel, tl.where(x == x, value, float("nan")))
    if codes is not None:
        store_tile(codes, start, tile, numel, code)
    return x, code


@triton.jit
def _add_totals(w, code, totals, K: tl.constexpr):
    """Add the weights of a tile to the sums ``[LANES]`` of their levels."""
    w = tl.where(w == w, w, 0.0)
    for i in tl.static_range(w.shape[1]):
        value, level = column(w, i), column(code, i)
        added = ()
        for k in tl.static_range(K):
            added = added + (tl.where(level == k, totals[k] + value, totals[k]),)
        totals = added
    return totals


@triton.jit
def _add_counts(w, code, even, odd, K: tl.constexpr):
    """Add a tile to the counts ``[LANES]`` of even and of odd levels, a byte a level, by way of a sum of the
    lane's weights with four bits a level."""
    if K <= 8:
        one, low = tl.full((), 1, tl.int32), 0x0F0F0F0F
    else:
        one, low = tl.full((), 1, tl.int64), 0x0F0F0F0F0F0F0F0F
    packed = tl.reduce(tl.where(w == w, one << 4 * code, 0), 1, ADD)
    return even + (packed & low), odd + (packed >> 4 & low)


@triton.jit
def _flush(counts, totals, even, odd, part, K: tl.constexpr):
    """Add the bytes of :func:`_add_counts` and the sums of :func:`_add_totals` to those of all tiles before."""
    new_counts, new_totals = (), ()
    for k in tl.static_range(K):
        new_counts = new_counts + (counts[k] + ((odd if k % 2 else even) >> 8 * (k // 2) & 255).to(tl.int32),)
        new_totals = new_totals + (totals[k] + part[k],)
    return new_counts, new_totals


@triton.jit(do_not_specialize=["numel"])
def codebook_kernel(
    w,
    codebook,
    thresholds,
    w_q,
    codes,
    numel,
    K: tl.constexpr,
    PROBES: tl.constexpr,
    MORE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Nearest codeword of every weight: ``code = #{k : w > t[k]}``, ``w_q = c[code]``; NaN gives NaN and code 0.

    The code is found by a binary search of ``PROBES`` steps across lanes and ``MORE`` in memory.
    Source: ADQ, arXiv 2510.19760, section 3.

    w           ``[numel]`` float32, bfloat16 or float16
    codebook    ``[K]`` float32, ascending; None where ``w_q`` is None
    thresholds  ``[K - 1]`` float32, ascending
    w_q         out, ``[numel]`` in w's dtype, or None
    codes       out, ``[numel]`` uint8, or None
    """
    SIZE: tl.constexpr = LANES * VECTOR
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tables = _load_tables(codebook, thresholds, K, PROBES, MORE)
    whole = numel // SIZE * SIZE
    tile = tile_offsets(LANES, VECTOR)
    for start in range(program * SIZE, whole, programs * SIZE):
        _quantize(w, codebook, thresholds, tables, w_q, codes, start, tile, numel, K, PROBES, MORE)
    tile = tile_offsets(LANES, 1)
    for start in range(whole + program * LANES, numel, programs * LANES):
        _quantize(w, codebook, thresholds, tables, w_q, codes, start, tile, numel, K, PROBES, MORE)


@triton.jit(do_not_specialize=["numel"])
def codebook_cells_kernel(
    w,
    codebook,
    thresholds,
    w_q,
    codes,
    counts,
    totals,
    numel,
    K: tl.constexpr,
    PROBES: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """:func:`codebook_kernel` for K <= 16 and, in the same pass, the statistics of the cells:
    ``n[k] = #{code = k}``, ``s[k] = sum of those w``; NaN counts nowhere.

    counts  out, ``[K, programs]`` int32: partial counts of the programs
    totals  out, ``[K, programs]`` float32: their partial sums
    """
    SIZE: tl.constexpr = LANES * VECTOR
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    tables = _load_tables(codebook, thresholds, K, PROBES, 0)
    count = lane_zeros(K, LANES, tl.int32)
    total = lane_zeros(K, LANES, tl.float32)
    zeros, none = total, tl.full((LANES,), 0, tl.int32 if K <= 8 else tl.int64)
    whole, step = numel // SIZE * SIZE, programs * SIZE
    tile = tile_offsets(LANES, VECTOR)
    for first in range(program * SIZE, whole, step * FLUSH):
        part, even, odd = zeros, none, none
        for start in range(first, tl.minimum(first + step * FLUSH, whole), step):
            x, code = _quantize(w, codebook, thresholds, tables, w_q, codes, start, tile, numel, K, PROBES, 0)
            part = _add_totals(x, code, part, K)
            even, odd = _add_counts(x, code, even, odd, K)
        count, total = _flush(count, total, even, odd, part, K)
    tile = tile_offsets(LANES, 1)
    for start in range(whole + program * LANES, numel, programs * LANES):
        x, code = _quantize(w, codebook, thresholds, tables, w_q, codes, start, tile, numel, K, PROBES, 0)
        even, odd = _add_counts(x, code, none, none, K)
        count, total = _flush(count, total, even, odd, _add_totals(x, code, zeros, K), K)
    for k in tl.static_range(K):
        tl.store(counts + k * programs + program, tl.reduce(count[k], 0, ADD))
        tl.store(totals + k * programs + program, tl.reduce(total[k], 0, ADD))


@triton.jit(do_not_specialize=["numel"])
def codebook_statistics_kernel(
    w,
    thresholds,
    counts,
    totals,
    numel,
    K: tl.constexpr,
    PROBES: tl.constexpr,
    MORE: tl.constexpr,
    SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The statistics of :func:`codebook_cells_kernel` for 16 < K <= 256.

    With ``code = 16 i + j`` the sums ``s[i, j] = sum [w in row i] w [w in column j]`` are a matrix product,
    and so are the counts: 2 x 16 compares a weight instead of 256. Infinite weights are kept out of the
    product, in which they would meet zeros, and added to the end levels.

    w           ``[numel]`` float32, bfloat16 or float16
    thresholds  ``[K - 1]`` float32, ascending
    counts      out, ``[K, programs]`` int32
    totals      out, ``[K, programs]`` float32
    """
    SPLIT: tl.constexpr = w.dtype.element_ty == tl.float32
    program, programs = tl.program_id(0), tl.num_programs(0)
    probes, _ = _load_tables(None, thresholds, K, PROBES, MORE)
    tile = tile_offsets(SIZE, 1)
    digit = tl.arange(0, 16)
    count = tl.full((16, 16), 0, tl.float32)  # whole numbers, below 2^24 up to 2^35 weights
    total, part = count, count
    low = tl.full((SIZE,), 0, tl.float32)
    high = tl.full((SIZE,), 0, tl.float32)
    for start in range(program.to(tl.int64) * SIZE, numel, programs * SIZE):
        total += part
        x = tl.reshape(load_tile(w, start, tile, numel, float("nan")), (SIZE,))
        code = lane_search(x, probes, PROBES)
        if MORE > 0:
            code = search(x, thresholds, K - 1, MORE, code << MORE)
        code = tl.where(x == x, code, 256)
        row = ((code >> 4)[None, :] == digit[:, None]).to(tl.float32)
        column = ((code & 15)[:, None] == digit[None, :]).to(tl.float32)
        count = tl.dot(row, column, count, input_precision=PRECISION)
        low += tl.where(x == float("-inf"), x, 0.0)
        high += tl.where(x == float("inf"), x, 0.0)
        part = cell_sums(row, column, tl.where(tl.abs(x) < float("inf"), x, 0.0), SPLIT, PRECISION)
    total += part
    level = digit[:, None] * 16 + digit[None, :]
    total += tl.where(level == 0, tl.reduce(low, 0, ADD), 0.0)
    total += tl.where(level == K - 1, tl.reduce(high, 0, ADD), 0.0)
    tl.store(counts + level * programs + program, count.to(tl.int32), mask=level < K)
    tl.store(totals + level * programs + program, total, mask=level < K)


@triton.jit(do_not_specialize=["levels", "programs"])
def codebook_reduce_kernel(counts, totals, count, total, levels, programs, ROWS: tl.constexpr, PROGRAMS: tl.constexpr):
    """Add the partials of the programs in a fixed order, in float64; ``ROWS`` levels a program.

    counts  ``[levels, programs]`` int32, programs <= PROGRAMS        count  out, ``[levels]`` int64
    totals  ``[levels, programs]`` float32                            total  out, ``[levels]`` float32
    """
    level = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PROGRAMS)[None, :]
    partial = level[:, None] * programs + column
    inside = (level[:, None] < levels) & (column < programs)
    n = tl.load(counts + partial, mask=inside, other=0)
    s = tl.load(totals + partial, mask=inside, other=0.0)
    tl.store(count + level, tl.reduce(n.to(tl.int64), 1, ADD), mask=level < levels)
    tl.store(total + level, tl.reduce(s.to(tl.float64), 1, ADD).to(tl.float32), mask=level < levels)

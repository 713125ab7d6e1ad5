"""Nearest codeword and per-level statistics of a weight tensor (ADQ, arXiv 2510.19760)."""

import triton
import triton.language as tl
from adq.kernels.tiles import ADD, lane_zeros, load_scalars, load_tile, narrow, search, tile_mask, tile_offsets


@triton.jit
def _chain(w, thresholds, levels, K: tl.constexpr):
    """Code of each weight, and codeword where ``levels`` is given, by K - 1 compares and selects.

    ``thresholds[K - 1]`` and ``levels[K]`` are tuples of scalars in registers.
    """
    code = tl.full(w.shape, 0, tl.int32)
    w_q = w
    if levels is not None:
        w_q = tl.full(w.shape, levels[0], tl.float32)
    for k in tl.static_range(1, K):
        above = w > thresholds[k - 1]
        code = tl.where(above, k, code)
        if levels is not None:
            w_q = tl.where(above, levels[k], w_q)
    return code, w_q


@triton.jit
def _store(w_q, codes, start, tile, numel, value, code):
    """Store a tile of each result that is wanted, with one branch for both: the codes share its compares."""
    if w_q is not None:
        value = narrow(value, w_q.dtype.element_ty)
    code = code.to(tl.uint8)
    if start + tile.shape[0] * tile.shape[1] <= numel:
        if w_q is not None:
            tl.store(w_q + start + tile, value)
        if codes is not None:
            tl.store(codes + start + tile, code)
    else:
        inside = tile_mask(tile, start, numel)
        if w_q is not None:
            tl.store(w_q + start + tile, value, mask=inside)
        if codes is not None:
            tl.store(codes + start + tile, code, mask=inside)


@triton.jit
def _accumulate(w, code, counts, totals, K: tl.constexpr):
    """Add a tile to the counts and sums ``[LANES]`` of the levels 0 <= code < K <= 16.

    The counts of the weights in a lane, 15 at most, are added up in one integer, four bits a level.
    """
    one = tl.full((), 1, tl.int64)
    packed = tl.reduce(tl.where(w == w, one << (4 * code), 0), 1, ADD)
    code = tl.where(w == w, code, K)
    new_counts = ()
    new_totals = ()
    for k in tl.static_range(K):
        new_counts = new_counts + (counts[k] + ((packed >> (4 * k)) & 15).to(tl.int32),)
        new_totals = new_totals + (totals[k] + tl.reduce(tl.where(code == k, w, 0.0), 1, ADD),)
    return new_counts, new_totals


@triton.jit(do_not_specialize=["numel"])
def codebook_kernel(
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
    """Nearest codeword of every weight and, for K <= 16, the statistics of the cells, in one pass over w.

    ``code = #{k : w > t[k]}``, ``w_q = c[code]``, ``n[k] = #{code = k}``, ``s[k] = sum of those w``; NaN
    gives NaN, code 0 and counts nowhere. Source: ADQ, arXiv 2510.19760, section 3. With ``PROBES`` = 0
    the tables stay in registers, else the code is found by ``PROBES`` steps of a binary search.

    w           ``[numel]`` float32, bfloat16 or float16
    codebook    ``[K]`` float32, ascending; None where ``w_q`` is None
    thresholds  ``[K - 1]`` float32, ascending
    w_q         out, ``[numel]`` in w's dtype, or None
    codes       out, ``[numel]`` uint8, or None
    counts      out, ``[K, programs]`` int32, or None: partial counts of the programs
    totals      out, ``[K, programs]`` float32, or None with ``counts``: their partial sums
    """
    SIZE: tl.constexpr = LANES * VECTOR
    program, programs = tl.program_id(0), tl.num_programs(0)
    tile = tile_offsets(LANES, VECTOR)
    edges, levels = None, None
    if PROBES == 0:
        edges = load_scalars(thresholds, K - 1)
        if w_q is not None:
            levels = load_scalars(codebook, K)
    if counts is not None:
        count = lane_zeros(K, LANES, tl.int32)
        total = lane_zeros(K, LANES, tl.float32)
    for start in range(program.to(tl.int64) * SIZE, numel, programs * SIZE):
        x = load_tile(w, start, tile, numel, float("nan"))
        if PROBES == 0:
            code, value = _chain(x, edges, levels, K)
        else:
            code = search(x, thresholds, K - 1, PROBES)
            if w_q is not None:
                value = tl.load(codebook + code)
            else:
                value = x
        if w_q is not None:
            value = tl.where(x == x, value, float("nan"))
        _store(w_q, codes, start, tile, numel, value, code)
        if counts is not None:
            count, total = _accumulate(x, code, count, total, K)
    if counts is not None:
        for k in tl.static_range(K):
            tl.store(counts + k * programs + program, tl.reduce(count[k], 0, ADD))
            tl.store(totals + k * programs + program, tl.reduce(total[k], 0, ADD))


@triton.jit(do_not_specialize=["numel"])
def codebook_statistics_kernel(
    w, thresholds, counts, totals, numel, K: tl.constexpr, PROBES: tl.constexpr, SIZE: tl.constexpr
):
    """The statistics of :func:`codebook_kernel` for 16 < K <= 256.

    With ``code = 16 i + j`` the sums ``s[i, j] = sum [w in row i] w [w in column j]`` are a matrix
    product, in IEEE float32, and so are the counts: 2 x 16 compares a weight instead of 256. Infinite
    weights are kept out of the product, in which they would meet zeros, and added to the end levels.

    w           ``[numel]`` float32, bfloat16 or float16
    thresholds  ``[K - 1]`` float32, ascending
    counts      out, ``[K, programs]`` int32
    totals      out, ``[K, programs]`` float32
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    tile = tile_offsets(SIZE, 1)
    digit = tl.arange(0, 16)
    count = tl.full((16, 16), 0, tl.int32)
    total = tl.full((16, 16), 0, tl.float32)
    low = tl.full((SIZE,), 0, tl.float32)
    high = tl.full((SIZE,), 0, tl.float32)
    for start in range(program.to(tl.int64) * SIZE, numel, programs * SIZE):
        x = tl.reshape(load_tile(w, start, tile, numel, float("nan")), (SIZE,))
        code = tl.where(x == x, search(x, thresholds, K - 1, PROBES), 256)
        row = (code >> 4)[None, :] == digit[:, None]
        column = (code & 15)[:, None] == digit[None, :]
        count += tl.dot(row.to(tl.float16), column.to(tl.float16)).to(tl.int32)
        low += tl.where(x == float("-inf"), x, 0.0)
        high += tl.where(x == float("inf"), x, 0.0)
        finite = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        total = tl.dot(row.to(tl.float32), tl.where(column, finite[:, None], 0.0), total, input_precision="ieee")
    level = digit[:, None] * 16 + digit[None, :]
    total += tl.where(level == 0, tl.reduce(low, 0, ADD), 0.0)
    total += tl.where(level == K - 1, tl.reduce(high, 0, ADD), 0.0)
    tl.store(counts + level * programs + program, count, mask=level < K)
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

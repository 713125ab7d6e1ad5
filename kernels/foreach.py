"""The weights of many layers at once: quantize them all, step all their codebooks and channel scales.

A table ``[layers, FIELDS]`` int64 on the device tells where each layer's tensors lie and how its weight is cut into
rows and items; :mod:`adq.backends.layers` makes it. Behind it stands the layer of each program. The kernels share:

* A row holds weights of one scale. Element ``j < length`` of row r lies at ``r inner + (j // inner) jump + j % inner``
  in memory: a channel of a weight ``[outer, channels, inner]`` in memory order, with ``jump = channels inner``, or,
  where one scale serves the layer, any piece of it; then the last row may be shorter.
* A program takes an item, some whole rows of one layer. It holds ``LANES`` vectors of ``VECTOR`` neighbours at a time;
  ``2 ** shift`` neighbouring lanes share a row, so the sums of a row are added up within a warp.
* A branch on the layer's number of levels picks a chain of compares (up to 4, 8 or 16 levels, with thresholds that
  nothing exceeds behind the last) or a search (``kind`` 4, 8, 16 or 256; ``KINDS`` is the sum of those that occur).
* Weights that are not dense have been copied to ``staged``; their ``weight`` is an offset in bytes from its start.
* The workspace of a layer, from element ``work`` on: counts (int32) and sums of the items, ``[levels, items]`` each;
  codebook, N and M as they were before the step, ``[3, levels]``; the new codebook once an item, ``[items, levels]``.

``v = w / scale``, the thresholds and ``scale * c[code]`` are single float32 operations, as in :mod:`adq.reference`.
"""

import triton
import triton.language as tl
from adq.kernels.tiles import ADD, lane_zeros, narrow, widen

FIELDS = (
    "weight",  # addresses
    "scale",
    "codebook",
    "count",
    "total",
    "output",  # address, or offset in bytes from the start of ``out``
    "in_stage",  # whether ``weight`` is an offset from the start of ``staged``
    "numel",
    "rows",
    "length",
    "inner",
    "jump",
    "vectors",  # whether rows can be read and written as aligned vectors
    "shift",
    "channels",  # whether each row has a scale of its own
    "levels",
    "kind",
    "first",  # the layer's first program
    "items",
    "height",  # rows of an item
    "work",
    "index",  # of the layer in ``rates``
    "snap",
)
"""Columns of the table of layers."""

_COLUMNS = {name: tl.constexpr(i) for i, name in enumerate(FIELDS)}
WIDTH = tl.constexpr(len(FIELDS))
WEIGHT, SCALE, CODEBOOK, COUNT, TOTAL, OUTPUT = (_COLUMNS[name] for name in FIELDS[:6])
IN_STAGE, NUMEL, ROWS, LENGTH, INNER, JUMP = (_COLUMNS[name] for name in FIELDS[6:12])
VECTORS, SHIFT, CHANNELS, LEVELS, KIND, FIRST = (_COLUMNS[name] for name in FIELDS[12:18])
ITEMS, HEIGHT, WORK, INDEX, SNAP = (_COLUMNS[name] for name in FIELDS[18:])

SMOOTHING = tl.constexpr(1e-5)
REVIVE_BELOW = tl.constexpr(1e-3)
UNUSED = tl.constexpr(0.5)
LEAST_SCALE = tl.constexpr(1e-30)


@triton.jit
def _layer_of(table, layers, program):
    """The program's layer, as a pointer to its row of the table, and its item in that layer."""
    layer = table + tl.load(table + layers * WIDTH + program) * WIDTH
    return layer, program - tl.load(layer + FIRST).to(tl.int32)


@triton.jit
def _number(layer, FIELD: tl.constexpr):
    return tl.load(layer + FIELD).to(tl.int32)


@triton.jit
def _floats(layer, FIELD: tl.constexpr):
    """One of the layer's float32 tensors."""
    return tl.load(layer + FIELD).to(tl.pointer_type(tl.float32))


@triton.jit
def _weight(layer, staged):
    """Address of the layer's weight."""
    address = tl.load(layer + WEIGHT)
    if staged is not None:
        address += tl.load(layer + IN_STAGE) * staged.to(tl.int64)
    return address


@triton.jit
def _output(layer, out):
    """Address of the layer's quantized weight."""
    address = tl.load(layer + OUTPUT)
    if out is not None:
        address += out.to(tl.int64)
    return address


@triton.jit
def _shape(layer):
    """How a row lies in memory: ``(length, inner, jump, vectors)``."""
    return _number(layer, LENGTH), _number(layer, INNER), tl.load(layer + JUMP), _number(layer, VECTORS)


@triton.jit
def _span(layer, item):
    """First row of the item, and the row behind its last."""
    height = _number(layer, HEIGHT)
    return item * height, tl.minimum((item + 1) * height, _number(layer, ROWS))


@triton.jit
def _lanes(layer, first, end, LANES: tl.constexpr):
    """Row of each lane, how many elements it has, 0 behind ``end``, and the lane's place among those of its row."""
    shift = _number(layer, SHIFT)
    lane = tl.arange(0, LANES)
    row, length = first + (lane >> shift), tl.load(layer + LENGTH)
    left = tl.minimum(length, tl.load(layer + NUMEL) - row.to(tl.int64) * length).to(tl.int32)
    return row, tl.where(row < end, left, 0), lane & ((1 << shift) - 1)


@triton.jit
def _inside(vector, left, VECTOR: tl.constexpr):
    """Which elements ``[LANES, VECTOR]`` of these vectors of the rows there are."""
    return tl.arange(0, VECTOR)[None, :] < (left - vector * VECTOR)[:, None]


@triton.jit
def _places(row, vector, shape, VECTOR: tl.constexpr):
    """Element offsets of vectors of any rows."""
    inner, jump = shape[1], shape[2]
    column = vector[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    return row.to(tl.int64)[:, None] * inner + (column // inner) * jump + column % inner


@triton.jit
def _vector_places(row, vector, shape, VECTOR: tl.constexpr):
    """Element offsets of vectors of rows that are whole vectors."""
    start = (row.to(tl.int64) * (shape[0] // VECTOR) + vector) * VECTOR
    return start[:, None] + tl.arange(0, VECTOR)[None, :]


@triton.jit
def _read(address, row, vector, left, shape, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = address.to(tl.pointer_type(DTYPE)) + _places(row, vector, shape, VECTOR)
    return tl.load(pointer, mask=_inside(vector, left, VECTOR), other=0.0)


@triton.jit
def _read_vectors(address, row, vector, left, shape, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16) + _vector_places(row, vector, shape, VECTOR)
    return tl.load(pointer, mask=(vector * VECTOR < left)[:, None], other=0.0)


@triton.jit
def _load(address, row, vector, left, shape, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Weights ``[LANES, VECTOR]``, 0 where there are none; float32."""
    if shape[3] != 0:
        w = _read_vectors(address, row, vector, left, shape, DTYPE, VECTOR)
    else:
        w = _read(address, row, vector, left, shape, DTYPE, VECTOR)
    return widen(w)


@triton.jit
def _store(address, row, vector, left, shape, values, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """Store values where :func:`_load` loads."""
    values = narrow(values, DTYPE)
    if shape[3] != 0:
        pointer = tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)
        places = _vector_places(row, vector, shape, VECTOR)
        tl.store(pointer + places, values, mask=(vector * VECTOR < left)[:, None])
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
        tl.store(pointer + _places(row, vector, shape, VECTOR), values, mask=_inside(vector, left, VECTOR))


@triton.jit
def _divided(w, scale, inside):
    """``v = w / scale``, NaN where there is no weight."""
    return tl.where(inside, tl.div_rn(w, scale[:, None]), float("nan"))


@triton.jit
def _tables(codebook, levels, K: tl.constexpr):
    """The levels and the thresholds above them, K of each in registers; +inf above the last level and behind it."""
    values = (tl.load(codebook),)
    edges = ()
    for k in tl.static_range(1, K):
        value = tl.load(codebook + tl.minimum(k, levels - 1))
        edges = edges + (tl.where(k < levels, 0.5 * (values[k - 1] + value), float("inf")),)
        values = values + (value,)
    return values, edges + (tl.full((), float("inf"), tl.float32),)


@triton.jit
def _chain(v, values, edges, K: tl.constexpr):
    """Codeword of each v; the lowest for NaN."""
    q = tl.full(v.shape, values[0], tl.float32)
    for k in tl.static_range(1, K):
        q = tl.where(v > edges[k - 1], values[k], q)
    return q


@triton.jit
def _search(v, codebook, levels):
    """Code of each v among up to 256 levels, by a branchless binary search; 0 for NaN."""
    code = tl.full(v.shape, 0, tl.int32)
    for i in tl.static_range(8):
        probe = code + (128 >> i)
        upper = codebook + tl.minimum(probe, levels - 1)
        threshold = 0.5 * (tl.load(upper - 1) + tl.load(upper))
        code = tl.where((v > threshold) & (probe < levels), probe, code)
    return code


@triton.jit
def _codewords(v, codebook, levels, values, edges, K: tl.constexpr):
    """Codeword of each v, by chain or, for K = 256, by search; the lowest for NaN."""
    if K == 256:
        q = tl.load(codebook + _search(v, codebook, levels))
    else:
        q = _chain(v, values, edges, K)
    return q


@triton.jit
def _quantize(
    layer,
    item,
    codebook,
    source,
    target,
    K: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``w_q = scale * c[code(w / scale)]`` of an item's rows, from address ``source`` to ``target``."""
    shape, levels, scales = _shape(layer), _number(layer, LEVELS), _floats(layer, SCALE)
    values, edges = None, None
    if K != 256:
        values, edges = _tables(codebook, levels, K)
    start, end = _span(layer, item)
    step = 1 << _number(layer, SHIFT)
    for first in range(start, end, LANES // step):
        row, left, lane = _lanes(layer, first, end, LANES)
        scale = tl.load(scales + row * _number(layer, CHANNELS), mask=row < end, other=1.0)
        for at in range(0, tl.cdiv(shape[0], VECTOR), step):
            vector = at + lane
            v = _load(source, row, vector, left, shape, DTYPE, VECTOR)
            v = _divided(v, scale, _inside(vector, left, VECTOR))
            q = tl.where(v == v, _codewords(v, codebook, levels, values, edges, K), float("nan"))
            _store(target, row, vector, left, shape, q * scale[:, None], DTYPE, VECTOR)


@triton.jit(do_not_specialize=["layers"])
def foreach_quantize_kernel(
    table,
    staged,
    out,
    layers,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """``w_q = scale * c[code(w / scale)]`` of every layer, with ``code = #{k : v > 0.5 (c[k] + c[k + 1])}``.

    NaN gives NaN. Source: ADQ, arXiv 2510.19760, section 3.

    table   ``[layers, FIELDS]`` int64, and behind it the layer of each program
    staged  copies of the weights that are not dense, in the weights' dtype, or None
    out     out, the quantized weights of all layers, in the weights' dtype
    """
    layer, item = _layer_of(table, layers, tl.program_id(0))
    source, target, codebook = _weight(layer, staged), _output(layer, out), _floats(layer, CODEBOOK)
    kind = _number(layer, KIND)
    for i in tl.static_range(2, 9):
        if KINDS & (1 << i):
            if kind == 1 << i:
                _quantize(layer, item, codebook, source, target, 1 << i, DTYPE, LANES, VECTOR)


@triton.jit
def _fit_rows(scales, first, end, length, fit, norm, seen, rate, SHIFT: tl.constexpr):
    """``scale <- scale + r (sum w q / sum q^2 - scale)``, the sums over the lanes of each row."""
    COUNT: tl.constexpr = fit.shape[0] >> SHIFT
    row = first + tl.arange(0, COUNT)
    fit = tl.reduce(tl.reshape(fit, (COUNT, 1 << SHIFT)), 1, ADD)
    norm = tl.reduce(tl.reshape(norm, (COUNT, 1 << SHIFT)), 1, ADD)
    seen = tl.reduce(tl.reshape(seen, (COUNT, 1 << SHIFT)), 1, ADD)
    old = tl.load(scales + row, mask=row < end, other=1.0)
    fitted = tl.div_rn(fit, norm)
    fitted = tl.where((fitted > 0) & (seen == length), fitted, old)
    fitted = tl.where(rate > 0, fitted, old)  # which may be infinite
    tl.store(scales + row, old + rate * (fitted - old), mask=row < end)


@triton.jit
def _fit_scales(layer, first, end, fit, norm, seen, rate, SHORT: tl.constexpr, LONG: tl.constexpr):
    """Step the scales of the rows that a program holds, from each lane's sums of ``w q``, of ``q^2`` and of one."""
    scales, length = _floats(layer, SCALE), _number(layer, LENGTH)
    if _number(layer, SHIFT) == SHORT:
        _fit_rows(scales, first, end, length, fit, norm, seen, rate, SHORT)
    else:
        _fit_rows(scales, first, end, length, fit, norm, seen, rate, LONG)


@triton.jit
def _reach(layer):
    """The values that are counted as they are, from and to: see :func:`adq.reference.within_reach`."""
    codebook, last = _floats(layer, CODEBOOK), _number(layer, LEVELS) - 1
    lowest, highest = tl.load(codebook), tl.load(codebook + last)
    peak = tl.maximum(tl.abs(lowest), tl.abs(highest))
    limited = (_number(layer, CHANNELS) != 0) & (last > 0) & (peak > 0)
    gap = tl.where(limited, tl.div_rn(peak, tl.maximum(last, 1).to(tl.float32)), float("inf"))
    low = lowest - tl.maximum(tl.load(codebook + tl.minimum(last, 1)) - lowest, gap)
    high = highest + tl.maximum(highest - tl.load(codebook + tl.maximum(last - 1, 0)), gap)
    return low, high


@triton.jit
def _clamped(v, low, high):
    """v within reach; NaN stays."""
    return tl.where(v > high, high, tl.where(v < low, low, v))


@triton.jit
def _beyond(v, low, high, lowest, highest):
    """Sum ``[LANES]`` of what values have beyond reach, times their codewords."""
    excess = tl.where(v > high, highest * (v - high), tl.where(v < low, lowest * (v - low), 0.0))
    return tl.reduce(excess, 1, ADD)


@triton.jit
def _row_sums(counts, totals, beyond, values, scale, K: tl.constexpr):
    """The sums of ``w q``, of ``q^2`` and of one in each lane, from its statistics of the row."""
    fit = beyond + values[0] * totals[0]
    norm = values[0] * values[0] * counts[0].to(tl.float32)
    seen = counts[0]
    for k in tl.static_range(1, K):
        fit += values[k] * totals[k]
        norm += values[k] * values[k] * counts[k].to(tl.float32)
        seen += counts[k]
    return scale * fit, norm, seen


@triton.jit
def _added(sums, more, K: tl.constexpr):
    added = ()
    for k in tl.static_range(K):
        added = added + (sums[k] + more[k],)
    return added


@triton.jit
def _accumulate(v, edges, counts, totals, K: tl.constexpr):
    """Add a tile to the counts and sums ``[LANES]`` of the levels; NaN lies in none."""
    new_counts = ()
    new_totals = ()
    for k in tl.static_range(K):
        inside = v <= edges[k]
        if k > 0:
            inside = inside & (v > edges[k - 1])
        new_counts = new_counts + (counts[k] + tl.reduce(inside.to(tl.int32), 1, ADD),)
        new_totals = new_totals + (totals[k] + tl.reduce(tl.where(inside, v, 0.0), 1, ADD),)
    return new_counts, new_totals


@triton.jit
def _chain_statistics(
    layer,
    item,
    source,
    counts,
    totals,
    rate,
    K: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Statistics of an item's rows in up to 16 cells, and their new scales."""
    shape, levels, scales = _shape(layer), _number(layer, LEVELS), _floats(layer, SCALE)
    values, edges = _tables(_floats(layer, CODEBOOK), levels, K)
    low, high = _reach(layer)
    count = lane_zeros(K, LANES, tl.int32)
    total = lane_zeros(K, LANES, tl.float32)
    start, end = _span(layer, item)
    step = 1 << _number(layer, SHIFT)
    for first in range(start, end, LANES // step):
        row, left, lane = _lanes(layer, first, end, LANES)
        scale = tl.load(scales + row * _number(layer, CHANNELS), mask=row < end, other=1.0)
        row_count = lane_zeros(K, LANES, tl.int32)
        row_total = lane_zeros(K, LANES, tl.float32)
        beyond = tl.full((LANES,), 0, tl.float32)
        for at in range(0, tl.cdiv(shape[0], VECTOR), step):
            vector = at + lane
            w = _load(source, row, vector, left, shape, DTYPE, VECTOR)
            v = _divided(w, scale, _inside(vector, left, VECTOR))
            beyond += _beyond(v, low, high, values[0], values[K - 1])
            row_count, row_total = _accumulate(_clamped(v, low, high), edges, row_count, row_total, K)
        if _number(layer, CHANNELS) != 0:
            fit, norm, seen = _row_sums(row_count, row_total, beyond, values, scale, K)
            _fit_scales(layer, first, end, fit, norm, seen, rate, SHORT, LONG)
        count, total = _added(count, row_count, K), _added(total, row_total, K)
    items = _number(layer, ITEMS)
    for k in tl.static_range(K):
        tl.store(counts + k * items + item, tl.reduce(count[k], 0, ADD), mask=k < levels)
        tl.store(totals + k * items + item, tl.reduce(total[k], 0, ADD), mask=k < levels)


@triton.jit
def _product_statistics(
    layer,
    item,
    source,
    counts,
    totals,
    rate,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    DTYPE: tl.constexpr,
    LANES: tl.constexpr,
    SIZE: tl.constexpr,
):
    """:func:`_chain_statistics` for up to 256 cells, by the matrix products of
    :func:`adq.kernels.codebook.codebook_statistics_kernel`, one for every ``SIZE`` lanes."""
    BATCH: tl.constexpr = LANES // SIZE
    shape, levels, scales = _shape(layer), _number(layer, LEVELS), _floats(layer, SCALE)
    codebook = _floats(layer, CODEBOOK)
    digit = tl.arange(0, 16)
    count = tl.full((BATCH, 16, 16), 0, tl.int32)
    total = tl.full((BATCH, 16, 16), 0, tl.float32)
    least, most = _reach(layer)
    low, high = lane_zeros(2, LANES, tl.float32)
    start, end = _span(layer, item)
    step = 1 << _number(layer, SHIFT)
    for first in range(start, end, LANES // step):
        row, left, lane = _lanes(layer, first, end, LANES)
        scale = tl.load(scales + row * _number(layer, CHANNELS), mask=row < end, other=1.0)
        fit, norm = lane_zeros(2, LANES, tl.float32)
        seen = tl.full((LANES,), 0, tl.int32)
        for at in range(0, shape[0], step):
            vector = at + lane
            w = widen(_read(source, row, vector, left, shape, DTYPE, 1))
            v = _divided(w, scale, _inside(vector, left, 1))
            code = _search(v, codebook, levels)
            q = tl.load(codebook + code)
            fit += tl.reduce(tl.where(v == v, w * q, 0.0), 1, ADD)
            norm += tl.reduce(tl.where(v == v, q * q, 0.0), 1, ADD)
            seen += tl.reduce((v == v).to(tl.int32), 1, ADD)
            v = _clamped(tl.reshape(v, (LANES,)), least, most)
            low += tl.where(v == -float("inf"), v, 0.0)
            high += tl.where(v == float("inf"), v, 0.0)
            code = tl.reshape(tl.where(v == v, tl.reshape(code, (LANES,)), 256), (BATCH, SIZE))
            finite = tl.reshape(tl.where(tl.abs(v) < float("inf"), v, 0.0), (BATCH, SIZE))
            tens = (code >> 4)[:, None, :] == digit[None, :, None]
            ones = (code & 15)[:, :, None] == digit[None, None, :]
            count += tl.dot(tens.to(tl.float16), ones.to(tl.float16)).to(tl.int32)
            cells = tl.where(ones, finite[:, :, None], 0.0)
            total += tl.dot(tens.to(tl.float32), cells, input_precision="ieee")
        if _number(layer, CHANNELS) != 0:
            _fit_scales(layer, first, end, fit, norm, seen, rate, SHORT, LONG)
    level = digit[:, None] * 16 + digit[None, :]
    sums = tl.reduce(total, 0, ADD)
    sums += tl.where(level == 0, tl.reduce(low, 0, ADD), 0.0)
    sums += tl.where(level == levels - 1, tl.reduce(high, 0, ADD), 0.0)
    place = level * _number(layer, ITEMS) + item
    tl.store(counts + place, tl.reduce(count, 0, ADD), mask=level < levels)
    tl.store(totals + place, sums, mask=level < levels)


@triton.jit
def _workspace(layer, work):
    """The layer's parts of the workspace: counts, totals, old state, new codebooks."""
    size = tl.load(layer + LEVELS) * tl.load(layer + ITEMS)
    counts = work + tl.load(layer + WORK)
    old = counts + 2 * size
    return counts.to(tl.pointer_type(tl.int32)), counts + size, old, old + 3 * tl.load(layer + LEVELS)


@triton.jit(do_not_specialize=["layers"])
def foreach_statistics_kernel(
    table,
    staged,
    rates,
    work,
    layers,
    pace,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    SHORT: tl.constexpr,
    LONG: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    PRODUCT: tl.constexpr,
):
    """First half of a step: the statistics of ``v = w / scale`` in the cells, item by item, and the new scales.

    ``n[k] = #{code = k}``, ``s[k] = sum of those v``, within reach where channels have scales;
    ``scale <- scale + r (sum w q / sum q^2 - scale)`` of each channel, with q the codewords and ``r = rates[l] pace``.
    NaN counts nowhere, and leaves the scale of its channel as it is. Source: ADQ, arXiv 2510.19760, section 3.2; the
    scale is the least-squares one.

    table   ``[layers, FIELDS]`` int64, and behind it the layer of each program; the scales are written
    staged  copies of the weights that are not dense, in the weights' dtype, or None
    rates   ``[layers of the call]`` float32
    work    out, the workspace, float32: partial counts and sums, old state
    """
    layer, item = _layer_of(table, layers, tl.program_id(0))
    counts, totals, old, _ = _workspace(layer, work)
    if item == 0:
        level, levels = tl.arange(0, 256), _number(layer, LEVELS)
        for i in tl.static_range(3):
            value = tl.load(_floats(layer, CODEBOOK + i) + level, mask=level < levels)
            tl.store(old + i * levels + level, value, mask=level < levels)
    rate = tl.load(rates + tl.load(layer + INDEX)) * pace
    source, kind = _weight(layer, staged), _number(layer, KIND)
    for i in tl.static_range(2, 5):
        if KINDS & (1 << i):
            if kind == 1 << i:
                _chain_statistics(layer, item, source, counts, totals, rate, 1 << i, SHORT, LONG, DTYPE, LANES, VECTOR)
    if KINDS & 256:
        if kind == 256:
            _product_statistics(layer, item, source, counts, totals, rate, SHORT, LONG, DTYPE, LANES, PRODUCT)


@triton.jit
def _add_partials(partials, level, levels, items, dtype: tl.constexpr, CHUNK: tl.constexpr):
    """Sums ``[K]`` of each level over the items, ``CHUNK`` of them at a time, in a fixed order."""
    added = tl.full(level.shape, 0, dtype)
    for start in range(0, items, CHUNK):
        item = start + tl.arange(0, CHUNK)[None, :]
        there = (level < levels)[:, None] & (item < items)
        part = tl.load(partials + level[:, None] * items + item, mask=there, other=0)
        added += tl.reduce(part.to(dtype), 1, ADD)
    return added


@triton.jit
def _pick(values, level, index):
    """``values[index]``."""
    return tl.reduce(tl.where(level == index, values, 0.0), 0, ADD)


@triton.jit
def _running_max(values, level):
    """The largest value up to each place, in steps that double; NaN stays."""
    COUNT: tl.constexpr = values.shape[0]
    for i in tl.static_range(8):
        if 1 << i < COUNT:
            before = tl.gather(values, tl.maximum(level - (1 << i), 0), 0)
            values = tl.maximum(values, before, propagate_nan=tl.PropagateNan.ALL)
    return values


@triton.jit
def _ema(old, level, levels, n, s, rate):
    """``N <- (1 - r) N + r n``, ``M <- (1 - r) M + r s``, ``c = (M + e c) / (N + e)``, not below its predecessors."""
    there = level < levels
    codebook = tl.load(old + level, mask=there, other=0.0)
    count = (1.0 - rate) * tl.load(old + levels + level, mask=there, other=0.0) + rate * n
    total = (1.0 - rate) * tl.load(old + 2 * levels + level, mask=there, other=0.0) + rate * s
    smoothing = tl.div_rn(tl.reduce(count, 0, ADD) * SMOOTHING, levels.to(tl.float32)) + 1e-30
    codebook = tl.div_rn(total + smoothing * codebook, count + smoothing)
    return _running_max(codebook, level), count, total


@triton.jit
def _revive(codebook, count, total, level, levels):
    """Move the least used level, if it is dead, beside the most used one, whose N and M it shares.

    Returns the state in the old order, and the new place of each level.
    """
    there = level < levels
    dead = tl.argmin(tl.where(there, count, float("inf")), 0)
    donor = tl.argmax(tl.where(there, count, -float("inf")), 0)
    fewest, most = _pick(count, level, dead), _pick(count, level, donor)
    rare = tl.div_rn(tl.reduce(count, 0, ADD) * REVIVE_BELOW, levels.to(tl.float32))
    revive = (fewest < rare) & (fewest < UNUSED) & (most >= 2.0)
    centre = _pick(codebook, level, donor)
    left = centre - _pick(codebook, level, tl.maximum(donor - 1, 0))
    right = _pick(codebook, level, tl.minimum(donor + 1, levels - 1)) - centre
    to_right = right >= left
    newcomer = tl.where(to_right, centre + 0.25 * right, centre - 0.25 * left)
    half = 0.5 * (most + fewest)
    is_dead, is_donor = level == tl.where(revive, dead, -1), level == tl.where(revive, donor, -1)
    total = tl.where(is_dead, half * newcomer, tl.where(is_donor, half * centre, total))
    # beside the donor's place in a row without the dead level
    slot = donor - (dead < donor).to(tl.int32) + to_right.to(tl.int32)
    rest = level - (level > dead).to(tl.int32)
    place = tl.where(level == dead, slot, rest + (rest >= slot).to(tl.int32))
    return (
        tl.where(is_dead, newcomer, codebook),
        tl.where(is_dead | is_donor, half, count),
        total,
        tl.where(revive, place, level),
    )


@triton.jit
def _snapped(codebook, there):
    """The levels on a grid of multiples ``m 2^e``, ``|m| <= 127``, with the smallest such power of two."""
    peak = tl.max(tl.where(there, tl.abs(codebook), 0.0), 0)
    least = tl.maximum(tl.div_rn(peak, 127.0), 1.1754943508222875e-38).to(tl.int32, bitcast=True)
    exponent = (least >> 23) + ((least & 0x7FFFFF) != 0).to(tl.int32)
    step = tl.where(peak > 0, (exponent << 23).to(tl.float32, bitcast=True), 1.0)
    multiple = (tl.div_rn(codebook, step) + 12582912.0) - 12582912.0  # half to even
    return tl.minimum(tl.maximum(multiple, -127.0), 127.0) * step


@triton.jit
def _held(layer, old, codebook, level, levels):
    """The levels in the unit in which the largest is as large as before, and the factor that leads there, where there
    are channels: see :func:`adq.reference.hold_peak`."""
    there = level < levels
    before = tl.max(tl.where(there, tl.abs(tl.load(old + level, mask=there, other=0.0)), 0.0), 0)
    largest = tl.max(tl.where(there, tl.abs(codebook), 0.0), 0)
    factor = tl.div_rn(before, largest)
    holds = (factor > 0) & (factor < float("inf")) & (_number(layer, CHANNELS) != 0)
    size = tl.abs(codebook)
    held = tl.where(size == largest, before, tl.minimum(size * factor, before))
    return tl.where(holds, tl.where(codebook < 0, -held, held), codebook), tl.where(holds, factor, 1.0)


@triton.jit
def _rescale(layer, first, end, factor, LANES: tl.constexpr):
    """Scales of some rows in the new unit of the levels; see :func:`adq.reference.rescale`."""
    for at in range(first, end, LANES):
        row = at + tl.arange(0, LANES)
        scale = tl.load(_floats(layer, SCALE) + row, mask=row < end, other=1.0)
        rescaled = tl.div_rn(scale, factor)
        rescaled = tl.where(tl.abs(rescaled) >= LEAST_SCALE, rescaled, scale)
        tl.store(_floats(layer, SCALE) + row, rescaled, mask=row < end)


@triton.jit
def _update(layer, item, counts, totals, old, new, rate, K: tl.constexpr, CHUNK: tl.constexpr):
    """The layer's new state, for up to K levels: to its own tensors by item 0, the codebook to ``new`` by each.

    Returns the factor by which scales are to be divided.
    """
    level, levels, items = tl.arange(0, K), _number(layer, LEVELS), _number(layer, ITEMS)
    n = _add_partials(counts, level, levels, items, tl.int64, CHUNK).to(tl.float32)
    s = _add_partials(totals, level, levels, items, tl.float64, CHUNK).to(tl.float32)
    codebook, count, total = _ema(old, level, levels, n, s, rate)
    codebook, count, total, place = _revive(codebook, count, total, level, levels)
    codebook, factor = _held(layer, old, codebook, level, levels)
    total = total * factor
    there = level < levels
    if not rate > 0:
        codebook = tl.load(old + level, mask=there, other=0.0)
        count = tl.load(old + levels + level, mask=there, other=0.0)
        total = tl.load(old + 2 * levels + level, mask=there, other=0.0)
        place, factor = level, 1.0
    if tl.load(layer + SNAP) != 0:
        codebook = _snapped(codebook, there)
    if item == 0:
        tl.store(_floats(layer, CODEBOOK) + place, codebook, mask=there)
        tl.store(_floats(layer, COUNT) + place, count, mask=there)
        tl.store(_floats(layer, TOTAL) + place, total, mask=there)
    if new is not None:
        tl.store(new + place, codebook, mask=there)
    return factor


@triton.jit(do_not_specialize=["layers"])
def foreach_update_kernel(
    table,
    staged,
    rates,
    work,
    layers,
    pace,
    QUANTIZE: tl.constexpr,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Second half of a step: adds up the items' statistics and updates codebook, N and M by
    :func:`adq.reference.ema_update`, scales with the unit of the levels, levels on an int8 grid where ``snap`` is set.

    With QUANTIZE there is a program an item: each works out the new codebook for itself, then quantizes its rows with
    the new state. Without, a program a layer.

    table   ``[layers, FIELDS]`` int64, and behind it the layer of each program; the tensors it names are written
    staged  copies of the weights that are not dense, in the weights' dtype, or None
    rates   ``[layers of the call]`` float32
    work    the workspace of :func:`foreach_statistics_kernel`; the new codebooks are written
    """
    program = tl.program_id(0)
    if QUANTIZE:
        layer, item = _layer_of(table, layers, program)
    else:
        layer, item = table + program * WIDTH, 0
    counts, totals, old, new = _workspace(layer, work)
    rate = tl.load(rates + tl.load(layer + INDEX)) * pace
    codebook = None
    if QUANTIZE:
        codebook = new + item * _number(layer, LEVELS)
    kind, factor = _number(layer, KIND), 1.0
    if KINDS & (4 + 8 + 16):
        if kind <= 16:
            factor = _update(layer, item, counts, totals, old, codebook, rate, 16, 128)
    if KINDS & 256:
        if kind == 256:
            factor = _update(layer, item, counts, totals, old, codebook, rate, 256, 16)
    if _number(layer, CHANNELS) != 0:
        first, end = 0, _number(layer, ROWS)
        if QUANTIZE:
            first, end = _span(layer, item)
        _rescale(layer, first, end, factor, LANES)
    if QUANTIZE:
        tl.debug_barrier()  # codebook and scales are read by other threads than wrote them
        source, target = _weight(layer, staged), _output(layer, None)
        for i in tl.static_range(2, 9):
            if KINDS & (1 << i):
                if kind == 1 << i:
                    _quantize(layer, item, codebook, source, target, 1 << i, DTYPE, LANES, VECTOR)

"""What the kernels share: the tile of elements a program holds, its loads and stores, table search."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TABLE = tl.constexpr(32)
"""Entries of a table that lies across the lanes of a warp."""
FLUSH = tl.constexpr(16)
"""Tiles that are added up on their own, before their sums are added to those of the others: chains of float32
additions stay short, and counts of at most 8 a lane and tile fit in a byte."""


@triton.jit
def _add(a, b):
    return a + b


ADD = getattr(tl.standard, "_sum_combine", _add)
"""For ``tl.reduce(x, axis, ADD)``: ``tl.sum``, but ten times faster in the interpreter, which knows it by identity."""


@triton.jit
def tile_offsets(LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Element offsets ``[LANES, VECTOR]`` of a tile, int32; a row lies in one thread."""
    return tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]


@triton.jit
def tile_mask(tile, start, numel):
    """Which elements of a tile, from ``start`` on, there are."""
    return tile < tl.minimum(numel - start, 1 << 30).to(tl.int32)  # more than a tile may be left, and than int32 holds


@triton.jit
def widen(values):
    """float16 or bfloat16 to float32; by integers, since the interpreter's own cast gets subnormal bfloat16 wrong
    and the compiler's takes two instructions for every other one."""
    if values.dtype == tl.bfloat16:
        bits = values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        wide = bits.to(tl.float32, bitcast=True)
    else:
        wide = values.to(tl.float32)
    return wide


@triton.jit
def narrow(values, dtype: tl.constexpr):
    """``values`` in ``dtype``, rounded to nearest, ties to even; the interpreter's cast to bfloat16 truncates."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = tl.where(values == values, values, float("nan")).to(tl.uint32, bitcast=True)
        bits += tl.where(values == values, 0x7FFF + ((bits >> 16) & 1), 0)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@triton.jit
def load_tile(pointer, start, tile, numel, other):
    """The tile of ``pointer[numel]`` that begins at element ``start``, in float32. A tile of single elements is
    a masked one, ``other`` past the end; any other lies wholly inside."""
    if tile.shape[1] == 1:
        values = tl.load(pointer + start + tile, mask=tile_mask(tile, start, numel), other=other)
    else:
        values = tl.load(pointer + start + tile)
    return widen(values)


@triton.jit
def store_tile(pointer, start, tile, numel, values):
    """Store ``values``, in the pointer's dtype, where :func:`load_tile` loads."""
    values = narrow(values, pointer.dtype.element_ty)
    if tile.shape[1] == 1:
        tl.store(pointer + start + tile, values, mask=tile_mask(tile, start, numel))
    else:
        tl.store(pointer + start + tile, values)


@triton.jit
def column(tile, index: tl.constexpr):
    """One element of every lane of a 32-bit tile, ``[LANES]``: a choice of registers, no instruction."""
    bits = tile.to(tl.int32, bitcast=True)
    wanted = tl.arange(0, tile.shape[1])[None, :] == index
    return tl.reduce(tl.where(wanted, bits, 0), 1, ADD).to(tile.dtype, bitcast=True)


@triton.jit
def saturate(values):
    """Clamp to [0, 1], NaN to 0; NVIDIA does it in the multiplication before. Older interpreters keep NaN."""
    if INTERPRETED:
        values = tl.where(values == values, values, 0.0)
    return tl.minimum(tl.maximum(values, 0.0), 1.0)


@triton.jit
def load_scalars(pointer, COUNT: tl.constexpr):
    """The first ``COUNT`` elements as a tuple of scalars, which stay in registers."""
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(pointer + i),)
    return values


@triton.jit
def lane_zeros(COUNT: tl.constexpr, LANES: tl.constexpr, dtype: tl.constexpr):
    """A tuple of ``COUNT`` accumulators ``[LANES]``, one register each in every thread."""
    values = ()
    for _ in tl.static_range(COUNT):
        values = values + (tl.full((LANES,), 0, dtype),)
    return values


@triton.jit
def look_up(table, index):
    """``table[index]`` for a table that lies across the lanes of the program's one warp: a shuffle."""
    return tl.reshape(tl.gather(table, tl.reshape(index, (index.numel,)), 0), index.shape)


@triton.jit
def lane_probes(edges, PROBES: tl.constexpr):
    """What :func:`lane_search` needs of ascending ``edges[TABLE]``, infinite at the end: the thresholds of the
    first two probes as three scalars, those of a quarter, a half and three, then a table a probe."""
    TABLE: tl.constexpr = edges.shape[0]
    lane = tl.arange(0, TABLE)
    probes = ()
    if PROBES > 0:
        for i in tl.static_range(3):
            middle = lane + 1 == (i + 1 << PROBES >> 2)
            probes = probes + (tl.reduce(tl.where(middle, edges, 0.0), 0, ADD),)
    for i in tl.static_range(2, PROBES):
        probes = probes + (tl.gather(edges, tl.minimum(lane + (1 << PROBES >> i + 1) - 1, TABLE - 1), 0),)
    return probes


@triton.jit
def lane_search(values, probes, PROBES: tl.constexpr):
    """``#{i : values > edges[i]}``, int32, of fewer than ``2 ** PROBES`` edges; NaN gives 0."""
    found = tl.full(values.shape, 0, tl.int32)
    if PROBES > 0:
        upper = values > probes[1]
        found = tl.where(upper, 1 << PROBES - 1, 0)
    if PROBES > 1:
        found = tl.where(values > tl.where(upper, probes[2], probes[0]), found + (1 << PROBES - 2), found)
    for i in tl.static_range(2, PROBES):
        found = tl.where(values > look_up(probes[i + 1], found), found + (1 << PROBES - 1 - i), found)
    return found


@triton.jit
def load_edges(table, LENGTH: tl.constexpr, STRIDE: tl.constexpr):
    """Every ``STRIDE``-th of the ascending thresholds ``table[LENGTH]``, for :func:`lane_probes`."""
    place = (tl.arange(0, TABLE) + 1) * STRIDE - 1
    return tl.load(table + place, mask=place < LENGTH, other=float("inf"))


@triton.jit
def search(values, table, LENGTH: tl.constexpr, PROBES: tl.constexpr, found=None):
    """``#{i : values > table[i]}`` for an ascending ``table[LENGTH]``, int32, by ``PROBES`` steps of a binary
    search in memory, from ``found`` on, or from 0 where ``LENGTH < 2 ** PROBES``.

    Branchless: the table is thought to go on with thresholds that nothing exceeds. NaN gives 0.
    """
    if found is None:
        found = tl.full(values.shape, 0, tl.int32)
    END: tl.constexpr = triton.next_power_of_2(LENGTH + 1)
    for i in tl.static_range(PROBES):
        probe = found + (1 << PROBES - 1 - i)
        if END - (1 << PROBES - 1 - i) > LENGTH:
            threshold = tl.load(table + tl.minimum(probe, LENGTH) - 1, eviction_policy="evict_last")
            above = (values > threshold) & (probe <= LENGTH)
        else:
            above = values > tl.load(table + probe - 1, eviction_policy="evict_last")
        found = tl.where(above, probe, found)
    return found


@triton.jit
def cell_sums(row, column, values, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``sum of values[SIZE] in row i and column j`` as ``[16, 16]`` float32, by a product of matrices: ``row[16,
    SIZE]`` and ``column[SIZE, 16]`` of zeros and ones, finite values.

    TF32 units keep 11 bits of a factor, all that a 16-bit number has; others (SPLIT) are added in two parts, to
    22 bits. They round sums towards zero, so callers add the tiles up themselves.
    """
    if SPLIT and PRECISION == "tf32":
        head = (values.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        sums = tl.dot(row, column * head[:, None], input_precision=PRECISION)
        return tl.dot(row, column * (values - head)[:, None], sums, input_precision=PRECISION)
    else:
        return tl.dot(row, column * values[:, None], input_precision=PRECISION)

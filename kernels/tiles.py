"""What the kernels share: the tile of elements a program holds, its loads and stores, table search."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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
    """Which elements of the last tile, from ``start`` on, there are. Compares constants with one number a
    lane: offsets kept for this rare case would take registers in every other tile."""
    LANES: tl.constexpr = tile.shape[0]
    VECTOR: tl.constexpr = tile.shape[1]
    left = (numel - start).to(tl.int32) - tl.arange(0, LANES)[:, None] * VECTOR
    return tl.arange(0, VECTOR)[None, :] < left


@triton.jit
def widen(values):
    """float16 or bfloat16 to float32; the interpreter's own cast gets subnormal bfloat16 wrong."""
    if INTERPRETED and values.dtype == tl.bfloat16:
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
    """The tile of ``pointer[numel]`` that begins at element ``start``, ``other`` past the end; float32."""
    if start + tile.shape[0] * tile.shape[1] <= numel:
        values = tl.load(pointer + start + tile)
    else:
        values = tl.load(pointer + start + tile, mask=tile_mask(tile, start, numel), other=other)
    return widen(values)


@triton.jit
def store_tile(pointer, start, tile, numel, values):
    """Store ``values``, in the pointer's dtype, where :func:`load_tile` loads."""
    values = narrow(values, pointer.dtype.element_ty)
    if start + tile.shape[0] * tile.shape[1] <= numel:
        tl.store(pointer + start + tile, values)
    else:
        tl.store(pointer + start + tile, values, mask=tile_mask(tile, start, numel))


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
def search(values, table, LENGTH: tl.constexpr, PROBES: tl.constexpr):
    """``#{i : values > table[i]}`` for an ascending ``table[LENGTH]`` with ``LENGTH < 2 ** PROBES``, int32.

    Branchless: the table is thought to go on with thresholds that nothing exceeds. NaN gives 0.
    """
    found = tl.full(values.shape, 0, tl.int32)
    for i in tl.static_range(PROBES):
        probe = found + (1 << (PROBES - 1 - i))
        if LENGTH + 1 < 1 << PROBES:
            threshold = tl.load(table + tl.minimum(probe, LENGTH) - 1, eviction_policy="evict_last")
            above = (values > threshold) & (probe <= LENGTH)
        else:
            above = values > tl.load(table + probe - 1, eviction_policy="evict_last")
        found = tl.where(above, probe, found)
    return found

"""Products of a weight in packed codes with few rows of x: of the weight, its codes are all that is read.

A program is one warp with a few outputs, whose codes it loads side by side; so x is read once for all of them, and
enough bytes are under way. Codes and levels are found as in :mod:`adq.kernels.bits`.
"""

import triton
import triton.language as tl
from adq.kernels.bits import any_codes, code_levels, four_codes, level_table
from adq.kernels.tiles import ADD, column, lane_zeros, narrow, tile_mask, tile_offsets, widen


@triton.jit
def _add_products(level, factors, sums, ROWS: tl.constexpr):
    """The ``ROWS`` sums of an output with those of another tile, each lane's elements one after the other."""
    added = ()
    for r in tl.static_range(ROWS):
        total = sums[r]
        for i in tl.static_range(level.shape[1]):
            total = tl.fma(column(level, i), column(factors[r], i), total)
        added = added + (total,)
    return added


@triton.jit(do_not_specialize=["inputs", "outputs", "whole", "step"])
def linear_kernel(
    x,
    packed,
    codebook,
    scale,
    y,
    inputs,
    outputs,
    whole,
    step,
    BITS: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    LANES: tl.constexpr,
):
    """``y[r, o] = scale[o] sum_i x[r, i] codebook[code[o, i]]`` for ``OUTPUTS`` outputs and all rows.

    Every lane adds up its own elements in float32, by fused multiply-adds, and a tree adds up the lanes: an order that
    depends on the number of inputs alone. A code that has no level takes the last one.

    x         ``[ROWS, inputs]`` float32, bfloat16 or float16
    packed    ``[ceil(outputs inputs BITS / 8)]`` uint8, aligned to a unit
    codebook  ``[K]`` float32, K <= 2 ** BITS
    scale     ``[outputs]`` float32, step 1; or one for all, step 0
    y         out, ``[ROWS, outputs]``, in x's dtype
    whole     inputs that are read as tiles of four a lane, 0 where rows of codes begin inside a group of eight
    UNIT      unsigned integer of four codes, or of a byte where these do not fill one of 8, 16 or 32 bits
    """
    first = tl.program_id(0).to(tl.int64) * OUTPUTS
    table = level_table(codebook, K, BITS)
    lane, tile = tl.arange(0, LANES), tile_offsets(LANES, 4)
    sums = lane_zeros(OUTPUTS * ROWS, LANES, tl.float32)
    for start in range(0, whole, LANES * 4):
        factors = ()
        for r in tl.static_range(ROWS):
            row = tl.multiple_of(r * inputs.to(tl.int64), 8)
            factors = factors + (widen(tl.load(x + row + start + tile)),)
        added = ()
        for k in tl.static_range(OUTPUTS):
            output = tl.minimum(first + k, outputs - 1)
            code = four_codes(packed, output * inputs + start, lane, BITS, UNIT)
            level = code_levels(code, codebook, table, K, BITS)
            added = added + _add_products(level, factors, sums[k * ROWS : k * ROWS + ROWS], ROWS)
        sums = added
    tile = tile_offsets(LANES, 1)
    for start in range(whole, inputs, LANES):
        inside = tile_mask(tile, start, inputs)
        factors = ()
        for r in tl.static_range(ROWS):
            values = tl.load(x + r * inputs.to(tl.int64) + start + tile, mask=inside, other=0.0)
            factors = factors + (widen(values),)
        added = ()
        for k in tl.static_range(OUTPUTS):
            begin = tl.minimum(first + k, outputs - 1) * inputs
            group = (begin + start) // 8 * 8
            code = any_codes(packed, group, (begin + start - group).to(tl.int32) + tile, begin + inputs, BITS)
            level = tl.where(inside, code_levels(code, codebook, table, K, BITS), 0.0)
            added = added + _add_products(level, factors, sums[k * ROWS : k * ROWS + ROWS], ROWS)
        sums = added
    for k in tl.static_range(OUTPUTS):
        if first + k < outputs:
            factor = tl.load(scale + (first + k) * step)
            for r in tl.static_range(ROWS):
                total = tl.reduce(sums[k * ROWS + r], 0, ADD) * factor
                place = y + r * outputs.to(tl.int64) + first + k
                tl.store(place, narrow(total, y.dtype.element_ty))

"""Codes of 1 to 8 bits to and from a little-endian bit stream: 8 codes are ``BITS`` bytes.

The 8 codes of a group are one 64-bit word, and its bits are moved in three steps, two codes, two pairs
and two quads together. Memory is touched in units of ``BITS & -BITS`` bytes, the widest that divides a
group, so widths of 1, 2, 4 and 8 bits read and write whole words. Decoding has four codes to a lane, so that neighbours
write next to each other; they begin at a byte or in its middle.
"""

import triton
import triton.language as tl
from adq.kernels.tiles import TABLE, look_up, tile_mask, tile_offsets


@triton.jit
def _fields(WIDTH: tl.constexpr, PERIOD: tl.constexpr):
    """The low ``WIDTH`` bits of every ``PERIOD`` bits, uint64."""
    mask = tl.full((), 0, tl.uint64)
    for i in tl.static_range(64 // PERIOD):
        mask = mask | (tl.full((), (1 << WIDTH) - 1, tl.uint64) << (i * PERIOD))
    return mask


@triton.jit
def _compress(word, BITS: tl.constexpr):
    """Drop the high ``8 - BITS`` bits of each byte."""
    word = word & _fields(BITS, 8)
    for i in tl.static_range(3):
        low = word & _fields(BITS << i, 16 << i)
        word = low | ((word ^ low) >> ((8 - BITS) << i))
    return word


@triton.jit
def _expand(word, BITS: tl.constexpr):
    """The inverse of :func:`_compress`."""
    for i in tl.static_range(3):
        low = word & _fields(BITS << (2 - i), 16 << (2 - i))
        word = low | ((word ^ low) << ((8 - BITS) << (2 - i)))
    return word


@triton.jit(do_not_specialize=["numel"])
def pack_kernel(codes, packed, numel, BITS: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr):
    """Bits ``[i BITS, (i + 1) BITS)`` of the stream are the low bits of code i; zeros fill the last byte.

    codes    ``[numel]`` uint8, 8-byte aligned
    packed   out, ``[ceil(numel BITS / 8)]`` uint8, aligned to a unit
    UNIT     unsigned integer of ``BITS & -BITS`` bytes
    """
    WIDTH: tl.constexpr = UNIT.primitive_bitwidth
    UNITS: tl.constexpr = 8 * BITS // WIDTH
    first = tl.program_id(0).to(tl.int64) * (LANES * 2)
    group = first + tile_offsets(LANES, 2)
    if first + LANES * 2 <= numel // 8:
        word = _compress(tl.load(codes.to(tl.pointer_type(tl.uint64)) + group), BITS)
        for j in tl.static_range(UNITS):
            tl.store(packed.to(tl.pointer_type(UNIT)) + group * UNITS + j, (word >> (j * WIDTH)).to(UNIT))
    else:
        word = tl.full(group.shape, 0, tl.uint64)
        for i in tl.static_range(8):
            code = tl.load(codes + group * 8 + i, mask=group * 8 + i < numel, other=0)
            word = word | ((code & ((1 << BITS) - 1)).to(tl.uint64) << (i * BITS))
        size = (numel.to(tl.int64) * BITS + 7) // 8
        for j in tl.static_range(BITS):
            tl.store(packed + group * BITS + j, (word >> (j * 8)).to(tl.uint8), mask=group * BITS + j < size)


@triton.jit(do_not_specialize=["numel"])
def unpack_kernel(packed, codes, numel, BITS: tl.constexpr, UNIT: tl.constexpr, LANES: tl.constexpr):
    """The inverse of :func:`pack_kernel`, with the same arguments; ``codes`` is written."""
    WIDTH: tl.constexpr = UNIT.primitive_bitwidth
    UNITS: tl.constexpr = 8 * BITS // WIDTH
    first = tl.program_id(0).to(tl.int64) * (LANES * 2)
    group = first + tile_offsets(LANES, 2)
    word = tl.full(group.shape, 0, tl.uint64)
    if first + LANES * 2 <= numel // 8:
        for j in tl.static_range(UNITS):
            part = tl.load(packed.to(tl.pointer_type(UNIT)) + group * UNITS + j)
            word = word | (part.to(tl.uint64) << (j * WIDTH))
        tl.store(codes.to(tl.pointer_type(tl.uint64)) + group, _expand(word, BITS))
    else:
        size = (numel.to(tl.int64) * BITS + 7) // 8
        for j in tl.static_range(BITS):
            byte = tl.load(packed + group * BITS + j, mask=group * BITS + j < size, other=0)
            word = word | (byte.to(tl.uint64) << (j * 8))
        for i in tl.static_range(8):
            code = ((word >> (i * BITS)) & ((1 << BITS) - 1)).to(tl.uint8)
            tl.store(codes + group * 8 + i, code, mask=group * 8 + i < numel)


@triton.jit
def four_codes(packed, start, lane, BITS: tl.constexpr, UNIT: tl.constexpr):
    """Codes ``start + 4 lane ..``, ``[LANES, 4]`` uint32; ``start`` is a multiple of 8."""
    WIDTH: tl.constexpr = UNIT.primitive_bitwidth
    half = (lane & 1) * (4 * (BITS % 2))  # bits of the first byte that belong to the lane before
    first = packed + start * BITS // 8 + lane * BITS // 2
    word = tl.full(lane.shape, 0, tl.uint32)
    for j in tl.static_range((4 * BITS + 4 * (BITS % 2) + WIDTH - 1) // WIDTH):
        part = tl.load(first.to(tl.pointer_type(UNIT)) + j)
        word = word | (part.to(tl.uint32) << (j * WIDTH))
    shift = half[:, None] + tl.arange(0, 4)[None, :] * BITS
    return (word[:, None] >> shift.to(tl.uint32)) & ((1 << BITS) - 1)


@triton.jit
def any_codes(packed, start, tile, numel, BITS: tl.constexpr):
    """The codes of a tile of single elements, uint32; those past the end are not codes."""
    bit = tile * BITS
    first = packed + start * BITS // 8 + bit // 8
    inside = tile_mask(tile, start, numel)
    word = tl.load(first, mask=inside, other=0).to(tl.uint32)
    straddles = bit % 8 + BITS > 8
    word = word | (tl.load(first + 1, mask=inside & straddles, other=0).to(tl.uint32) << 8)
    return (word >> (bit % 8).to(tl.uint32)) & ((1 << BITS) - 1)


@triton.jit
def level_table(codebook, K: tl.constexpr, BITS: tl.constexpr):
    """The codebook across the lanes of the program's one warp, where it fits: for :func:`code_levels`."""
    table = ()
    if 2**BITS <= TABLE:
        table = tl.load(codebook + tl.minimum(tl.arange(0, TABLE), K - 1))
    return table


@triton.jit
def code_levels(code, codebook, table, K: tl.constexpr, BITS: tl.constexpr):
    """``codebook[code]``; a code that has no level takes the last one."""
    if 2**BITS <= TABLE:
        value = look_up(table, code.to(tl.int32))
    else:
        value = tl.load(codebook + tl.minimum(code.to(tl.int32), K - 1), eviction_policy="evict_last")
    return value


@triton.jit
def _scales(scale, start, tile, numel, inner, channels, ROWS: tl.constexpr):
    """The scale of each element of a tile, or one that serves all (``ROWS`` is None)."""
    if ROWS is None:
        factor = tl.load(scale)
    else:
        element = (start + tile).to(numel.dtype)
        factor = tl.load(scale + element // inner % channels, eviction_policy="evict_last")
    return factor


@triton.jit(do_not_specialize=["numel", "inner", "channels"])
def decode_kernel(
    packed,
    codebook,
    scale,
    w_q,
    numel,
    inner,
    channels,
    BITS: tl.constexpr,
    K: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    """A weight from its codes: ``w_q[i] = codebook[code i] scale[i // inner % channels]``, one float32 product.

    A code that has no level takes the last one, so that none reads past the table.

    packed    ``[ceil(numel BITS / 8)]`` uint8, aligned to a unit
    codebook  ``[K]`` float32, K <= 2 ** BITS
    scale     ``[channels]`` float32
    w_q       out, ``[numel]`` float32
    UNIT      unsigned integer of four codes, or of a byte where these do not fill one of 8, 16 or 32 bits
    ROWS      None: one scale; 4: the four elements of a lane share theirs; 1: they need not
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    table = level_table(codebook, K, BITS)
    SIZE: tl.constexpr = LANES * 4
    whole = numel // SIZE * SIZE
    lane, tile = tl.arange(0, LANES), tile_offsets(LANES, 4)
    for start in range(program * SIZE, whole, programs * SIZE):
        value = code_levels(four_codes(packed, start, lane, BITS, UNIT), codebook, table, K, BITS)
        if ROWS == 4:
            factor = _scales(scale, start, lane * 4, numel, inner, channels, ROWS)[:, None]
        else:
            factor = _scales(scale, start, tile, numel, inner, channels, ROWS)
        tl.store(w_q + start + tile, value * factor)
    tile = tile_offsets(LANES, 1)
    for start in range(whole + program * LANES, numel, programs * LANES):
        value = code_levels(any_codes(packed, start, tile, numel, BITS), codebook, table, K, BITS)
        inside = tile_mask(tile, start, numel)
        factor = _scales(scale, start, tl.where(inside, tile, 0), numel, inner, channels, ROWS)
        tl.store(w_q + start + tile, value * factor, mask=inside)

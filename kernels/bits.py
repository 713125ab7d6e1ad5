"""Codes of 1 to 8 bits to and from a little-endian bit stream: 8 codes are ``BITS`` bytes.

The 8 codes of a group are one 64-bit word, and its bits are moved in three steps, two codes, two pairs
and two quads together. Memory is touched in units of ``BITS & -BITS`` bytes, the widest that divides a
group, so widths of 1, 2, 4 and 8 bits read and write whole words.
"""

import triton
import triton.language as tl
from adq.kernels.tiles import tile_offsets


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

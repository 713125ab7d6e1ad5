"""Convolution of levels with int8 weights, exact in int32, on the units that multiply matrices of bytes.

Those take signed bytes alone, so a level enters as ``x - 128``, and ``128 sum w`` goes to what the sums begin with.
Integer sums are the same in any order: the tiles are chosen for speed, and no result depends on them.
"""

import triton
import triton.language as tl
from adq.kernels.tiles import ADD


@triton.jit(do_not_specialize=["steps", "inputs", "outputs"])
def integer_weight_kernel(
    blocks,
    table,
    initial,
    weight,
    base,
    steps,
    inputs,
    outputs,
    BITS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """A block row of a weight (:mod:`adq.layout`) as int8, its reduction contiguous, and what its sums begin with.

    One program for each 16 output channels.

    blocks   ``[groups, output blocks, steps, 8 BITS]`` uint8
    table    ``[2 ** BITS]`` int8, or None: BITS is 8, and a byte is the weight
    initial  ``[groups outputs]`` int32
    weight   out, ``[groups, output blocks, 16, 4 steps]`` int8; zeros for inputs that there are not
    base     out, ``[groups outputs]`` int32: ``initial + 128 sum w``
    steps    blocks of 4 inputs, ``taps ceil(inputs / 4)``
    inputs, outputs  of a group
    STEPS    of a tile
    """
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, 64)[None, :]  # of a weight in its block: output channel and input
    in_tap, taps_of = (inputs + 3) // 4, tl.arange(0, STEPS)[:, None]
    total = tl.full((64,), 0, tl.int32)
    for first in range(0, steps, STEPS):
        step = first + taps_of
        exists = (step < steps) & (step % in_tap * 4 + place % 4 < inputs)
        block = blocks + (row * steps + step) * (8 * BITS)
        if table is None:
            value = tl.load(block + place, mask=exists, other=0).to(tl.int8, bitcast=True)
        else:
            code = tl.full((STEPS, 64), 0, tl.int32)
            for plane in tl.static_range(BITS):
                byte = tl.load(block + 8 * plane + place // 8, mask=exists, other=0).to(tl.int32)
                code = code | ((byte >> place % 8 & 1) << plane)
            value = tl.where(exists, tl.load(table + code, eviction_policy="evict_last"), 0).to(tl.int8)
        to = weight + (row * 16 + place // 4) * (4 * steps) + step * 4 + place % 4
        tl.store(to, value, mask=step < steps)
        total += tl.reduce(value.to(tl.int32), 0, ADD)
    blocks_of_group = (outputs + 15) // 16
    output = row % blocks_of_group * 16 + tl.arange(0, 16)
    at = row // blocks_of_group * outputs + output
    sums = tl.load(initial + at, mask=output < outputs, other=0)
    sums += 128 * tl.reduce(tl.reshape(total, (16, 4)), 1, ADD)
    tl.store(base + at, sums, mask=output < outputs)


@triton.jit
def _first_input(pixel, out_height, out_width, height, STRIDES: tl.constexpr, PADDING: tl.constexpr):
    """Image row before the first, and row and column within the image, of each result's first input."""
    row = pixel // out_width
    top = row % out_height * STRIDES[0] - PADDING[0]
    left = pixel % out_width * STRIDES[1] - PADDING[1]
    return row // out_height * height, top, left


@triton.jit
def _inputs(first, tap, height, width, pixel, pixels, KERNEL: tl.constexpr, DILATION: tl.constexpr):
    """Index of the pixel that a tap reads for each result, and whether it lies in the image."""
    images, top, left = first
    y = top + tap // KERNEL[1] * DILATION[0]
    x = left + tap % KERNEL[1] * DILATION[1]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (pixel < pixels)
    return (images + y) * width + x, inside


@triton.jit
def _epilogue(sums, multiplier, bias, residual, y, at, column, mask, low, high):
    """Each line of :func:`adq.reference.integer_conv2d` after the sum, one float32 operation an element."""
    inside = mask[1]
    value = sums.to(tl.float32) * tl.load(multiplier + column, mask=inside, other=0.0)[None, :]
    value = value + tl.load(bias + column, mask=inside, other=0.0)[None, :]
    inside = mask[0][:, None] & inside[None, :]
    if residual is not None:
        value = value + tl.load(residual + at, mask=inside, other=0.0)
    value = tl.where(value < low, low, value)  # NaN stays
    value = tl.where(value > high, high, value)
    tl.store(y + at, value, mask=inside)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width", "zero"])
def integer_dense_kernel(
    x,
    weight,
    base,
    multiplier,
    bias,
    residual,
    y,
    pixels,
    height,
    width,
    out_height,
    out_width,
    zero,
    low,
    high,
    GROUPS: tl.constexpr,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDES: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """``y = clamp(float(base + sum of (x - 128) w) multiplier + bias + residual, low, high)``: an implicit product of
    a matrix of pixels and taps with the weight.

    One program for M pixels and N outputs of a group.

    x            ``[batch, height, width, GROUPS INPUTS]`` uint8; ``zero`` outside of the image
    weight, base  of :func:`integer_weight_kernel`
    multiplier, bias  ``[GROUPS OUTPUTS]`` float32
    residual     ``[batch, out_height, out_width, GROUPS OUTPUTS]`` float32, or None
    y            out, as residual
    pixels       batch out_height out_width
    INPUTS, OUTPUTS  of a group
    K            input channels of a step
    """
    TILES: tl.constexpr = (OUTPUTS + N - 1) // N
    program = tl.program_id(0)
    group = program % (GROUPS * TILES) // TILES
    pixel = program // (GROUPS * TILES) * tl.full((), M, tl.int64) + tl.arange(0, M)
    output = program % TILES * N + tl.arange(0, N)
    channel = tl.arange(0, K)
    PADDED: tl.constexpr = (INPUTS + 3) // 4 * 4
    ROWS: tl.constexpr = (OUTPUTS + 15) // 16 * 16
    CHUNKS: tl.constexpr = (PADDED + K - 1) // K
    TAPS: tl.constexpr = KERNEL[0] * KERNEL[1]
    first = _first_input(pixel, out_height, out_width, height, STRIDES, PADDING)
    source = weight + (group * ROWS + output).to(tl.int64)[:, None] * (TAPS * PADDED)
    sums = tl.full((M, N), 0, tl.int32)
    for step in range(TAPS * CHUNKS):
        tap, c = step // CHUNKS, step % CHUNKS * K + channel
        place, inside = _inputs(first, tap, height, width, pixel, pixels, KERNEL, DILATION)
        at = place[:, None] * (GROUPS * INPUTS) + (group * INPUTS + c)[None, :]
        levels = tl.load(x + at, mask=inside[:, None] & (c < INPUTS)[None, :], other=zero)
        signed = (levels ^ 128).to(tl.int8, bitcast=True)
        w = tl.load(source + tap * PADDED + c[None, :], mask=(output < ROWS)[:, None] & (c < PADDED)[None, :], other=0)
        sums = tl.dot(signed, tl.trans(w), sums, out_dtype=tl.int32)
    column = group * OUTPUTS + output
    mask = (pixel < pixels, output < OUTPUTS)
    sums += tl.load(base + column, mask=mask[1], other=0)[None, :]
    at = pixel[:, None] * (GROUPS * OUTPUTS) + column[None, :]
    _epilogue(sums, multiplier, bias, residual, y, at, column, mask, low, high)


@triton.jit(do_not_specialize=["pixels", "height", "width", "out_height", "out_width", "zero"])
def integer_depthwise_kernel(
    x,
    weight,
    initial,
    multiplier,
    bias,
    residual,
    y,
    pixels,
    height,
    width,
    out_height,
    out_width,
    zero,
    low,
    high,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDES: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """As :func:`integer_dense_kernel` where each channel is convolved by itself: one program for M pixels and N
    channels; ``weight`` is int8 ``[taps, CHANNELS]``, and sums begin with ``initial``.
    """
    TILES: tl.constexpr = (CHANNELS + N - 1) // N
    program = tl.program_id(0)
    pixel = program // TILES * tl.full((), M, tl.int64) + tl.arange(0, M)
    c = program % TILES * N + tl.arange(0, N)
    first = _first_input(pixel, out_height, out_width, height, STRIDES, PADDING)
    mask = (pixel < pixels, c < CHANNELS)
    sums = tl.full((M, N), 0, tl.int32) + tl.load(initial + c, mask=mask[1], other=0)[None, :]
    for tap in range(KERNEL[0] * KERNEL[1]):
        place, inside = _inputs(first, tap, height, width, pixel, pixels, KERNEL, DILATION)
        at = place[:, None] * CHANNELS + c[None, :]
        levels = tl.load(x + at, mask=inside[:, None] & mask[1][None, :], other=zero)
        w = tl.load(weight + tap * CHANNELS + c, mask=mask[1], other=0)
        sums += levels.to(tl.int32) * w.to(tl.int32)[None, :]
    at = pixel[:, None] * CHANNELS + c[None, :]
    _epilogue(sums, multiplier, bias, residual, y, at, c, mask, low, high)

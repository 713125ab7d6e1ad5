"""How the weights of an integer convolution lie in memory: in the order in which its kernels read them.

Dense, also in groups: ``[groups, ceil(O / groups / 16), R, bytes]``. A block of 64 weights holds 16 output channels
times four consecutive input channels, output channels outermost; R counts such blocks over kernel row, kernel column
and input channel / 4, the last one innermost. Blocks are filled up with zero weights or codes: a kernel takes zeros for
the inputs that do not exist, and drops the outputs. A block is 64 int8 weights, or, where the layer has at most 16
different ones, their codes: a plane of 64 bits (little-endian, bit i of weight i) for each bit of the code, the lowest
first; ``table[code]`` is the weight.

Depthwise: int8 ``[kernel rows * columns, O]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adq import ops

BLOCK = (16, 4)
"""Output and input channels of a block."""


def arrange(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Lay out a weight for :func:`torch.ops.adq.integer_conv2d`.

    Args:
        weight: int8 ``[O, C / groups, kernel rows, kernel columns]``.

    Returns:
        The blocks, uint8, and the table, int8 of 2, 4, 8 or 16 levels, or empty where weights are stored as they are.
    """
    outputs, inputs = weight.shape[:2]
    nothing = weight.new_empty(0)
    if ops.is_depthwise(outputs, inputs, groups):
        return weight.reshape(outputs, -1).t().contiguous().view(torch.uint8), nothing
    values = weight.unique()
    if values.numel() > 16:
        return _blocks(weight, groups).view(torch.uint8).contiguous(), nothing
    bits = max(1, (values.numel() - 1).bit_length())
    table = torch.cat([values, values[-1:].expand(2**bits - values.numel())])
    codes = _blocks(torch.searchsorted(values, weight.contiguous()).to(torch.uint8), groups)
    planes = (codes.unsqueeze(-2) >> torch.arange(bits, dtype=torch.uint8, device=weight.device)[:, None]) & 1
    packed = torch.ops.adq.pack_bits(planes, 1)
    return packed.view(*codes.shape[:-1], 8 * bits), table


def _blocks(weight: Tensor, groups: int) -> Tensor:
    """``[groups, O / 16, R, 64]``, filled up with zeros."""
    outputs, inputs = weight.shape[:2]
    rows, columns = BLOCK
    per_group = weight.reshape(groups, outputs // groups, inputs, -1).transpose(2, 3)  # group, output, tap, input
    padding = (0, -inputs % columns, 0, 0, 0, -(outputs // groups) % rows)
    filled = torch.nn.functional.pad(per_group, padding)
    taps = filled.shape[2]
    split = filled.reshape(groups, -1, rows, taps * (filled.shape[3] // columns), columns)
    return split.transpose(2, 3).reshape(groups, split.shape[1], split.shape[3], rows * columns)


def restore(blocks: Tensor, table: Tensor, shape: tuple[int, ...], groups: int = 1) -> Tensor:
    """The inverse of :func:`arrange`: int8 of ``shape``."""
    outputs, inputs, *kernel = shape
    if ops.is_depthwise(outputs, inputs, groups):
        return blocks.view(torch.int8).t().reshape(shape)
    rows, columns = BLOCK
    if table.numel():
        bits = table.numel().bit_length() - 1
        planes = torch.ops.adq.unpack_bits(blocks.flatten(), 1, 8 * blocks.numel()).view(*blocks.shape[:-1], bits, 64)
        places = torch.arange(bits, dtype=torch.uint8, device=blocks.device)[:, None]
        blocks = table[(planes << places).sum(-2)]
    values = blocks.view(torch.int8).view(groups, blocks.shape[1], -1, rows, columns).transpose(2, 3)
    taps = kernel[0] * kernel[1]
    full = values.reshape(groups, blocks.shape[1] * rows, taps, -1)[:, : outputs // groups, :, :inputs]
    return full.transpose(2, 3).reshape(shape)

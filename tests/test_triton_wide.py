"""Offsets of weights that are too large to be had in a test: parts of kernels by themselves, in the interpreter."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton
import triton.language as tl
from adq.kernels.bits import _scales
from adq.kernels.tiles import tile_mask

pytestmark = pytest.mark.skipif(os.environ["TRITON_INTERPRET"] != "1", reason="needs Triton's interpreter")


@triton.jit
def scales_kernel(scale, out, start, numel, inner, channels):
    tile = tl.arange(0, 16)
    tl.store(out + tile, _scales(scale, start, tile, numel, inner, channels, 1))


@pytest.mark.parametrize("start", [0, 2**31 - 16, 2**31])
def test_scales_of_weights_beyond_two_to_the_31_elements(start):
    inner, channels = 8192, 262145
    scale, found = torch.arange(channels, dtype=torch.float32), torch.empty(16)
    scales_kernel[(1,)](scale, found, start, inner * channels, inner, channels)
    assert torch.equal(found, scale[(start + torch.arange(16)) // inner])


@triton.jit
def mask_kernel(out, start, numel):
    tile = tl.arange(0, 16)
    tl.store(out + tile, tile_mask(tile, start, numel).to(tl.int32))


@pytest.mark.parametrize("left", [0, 5, 16, 2**31 - 1, 2**31, 2**31 + 5, 2**32 - 1, 2**32, 3 * 2**32])
@pytest.mark.parametrize("start", [0, 2**31, 2**33 + 16])
def test_masks_of_tiles_that_more_than_two_to_the_31_elements_follow(start, left):
    found = torch.empty(16, dtype=torch.int32)
    mask_kernel[(1,)](found, start, start + left)
    assert found.sum() == min(left, 16)

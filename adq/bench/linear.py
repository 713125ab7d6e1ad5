"""Linear layers with few inputs at a time and weights in packed codes, beside torch with float weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adq.bench.case import ADQ, Build, Call, Case, Setting, faster_than
from adq.bench.data import Codes, Rotation, codes, copy_of, on_data, random_tensor
from adq.ops import packed_size

PART = "linear"
FLOAT = "F.linear, float32"
BF16 = "F.linear, bf16"
DECODED = "decoded each time, F.linear"
SHAPES = (
    # inputs, outputs, batch, bits
    *((4096, 4096, 1, bits) for bits in (2, 3, 4, 8)),
    (4096, 4096, 4, 4),
    (4096, 14336, 1, 4),
    (768, 3072, 1, 4),  # ViT-B
    (2048, 1000, 1, 4),  # ResNet-50
)
JUDGED = (4096, 4096, 1, 4)
OVER = {FLOAT: (1.0, None), BF16: (None, 3.0), DECODED: (1.0, None)}
"""How many times faster than a peer on the judged shape, (CPU, GPU); None asks for nothing."""


@dataclass(frozen=True)
class Linear:
    """Inputs ``[batch, in]``, float32 on a CPU and bfloat16 on a GPU, and a weight with a scale for each output."""

    x: Tensor
    weight: Codes
    setting: Setting


def linear(setting: Setting, inputs: int, outputs: int, batch: int, bits: int) -> Linear:
    """Random inputs and codes of a layer."""
    dtype = torch.bfloat16 if setting.cuda else torch.float32
    x = random_tensor(batch * inputs, dtype, setting).view(batch, inputs)
    return Linear(x, codes(setting, outputs * inputs, bits, inputs), setting)


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part."""
    for inputs, outputs, batch, bits in SHAPES[-2:] if setting.tiny else SHAPES:
        moved = packed_size(inputs * outputs, bits) + batch * (inputs + outputs) * (2 if setting.cuda else 4)
        judged = (inputs, outputs, batch, bits) == JUDGED
        contenders: dict[str, Build] = {ADQ: on_data(run_linear), FLOAT: float_linear, BF16: bf16_linear}
        yield Case(
            PART,
            f"{inputs} to {outputs}, batch {batch}, {bits} bits",
            partial(linear, setting, inputs, outputs, batch, bits),
            contenders | {DECODED: on_data(run_decoded)} | copy_of(moved, setting),
            tuple(faster_than(peer, bounds[setting.cuda] if judged else None) for peer, bounds in OVER.items()),
            bytes_moved=moved,
        )


def run_linear(data: Linear) -> Tensor:
    """The layer on its codes."""
    weight = data.weight
    tables = weight.codebook, weight.scale
    return torch.ops.adq.codebook_linear(data.x, weight.packed(), *tables, weight.bits, weight.shape[0])


def _decode(weight: Codes) -> Tensor:
    return torch.ops.adq.codebook_decode(weight.packed(), weight.codebook, weight.scale, weight.bits, weight.shape)


def run_decoded(data: Linear) -> Tensor:
    """What a packed layer does by itself."""
    return F.linear(data.x, _decode(data.weight).to(data.x.dtype))


def float_linear(data: Linear) -> Call:
    """The weight in float32."""
    return _dense(data, torch.float32)


def bf16_linear(data: Linear) -> Call:
    """Weight and inputs in bfloat16."""
    return _dense(data, torch.bfloat16)


def _dense(data: Linear, dtype: torch.dtype) -> Call:
    x, weight = data.x.to(dtype), Rotation(_decode(data.weight).to(dtype), data.setting)
    return lambda: F.linear(x, weight())

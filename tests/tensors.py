"""Small tensors by hand and by seed."""

from __future__ import annotations

import torch


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def u8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.uint8)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

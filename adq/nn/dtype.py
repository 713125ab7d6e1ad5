"""Quantizer state stays in float32 when a model is cast to another dtype."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What ``model.to(...)`` and its like do to a tensor, except for changing its dtype."""

    def convert(tensor: Tensor) -> Tensor:
        converted = fn(tensor)
        return converted if converted.dtype == tensor.dtype else tensor.to(converted.device)

    return convert

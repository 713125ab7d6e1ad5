"""Modules of torchvision that compute with the weights of their layers: here they call the layers.

Imported only for models that hold such a module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import (
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    shifted_window_attention,
)


class _Called:
    """A layer in the place of its weight: ``F.linear(x, this, bias)`` calls the layer with that bias."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Tensor:
        if function is not F.linear or kwargs:
            raise TypeError(f"adq: the weight of a quantized layer is read by {function.__name__}")
        input, called, bias = args
        return called.layer(input) if bias is called.layer.bias else called.layer(input, bias)


def _attend(attention: ShiftedWindowAttention, x: Tensor, **options: Any) -> Tensor:
    return shifted_window_attention(
        x,
        _Called(attention.qkv),
        _Called(attention.proj),
        attention.get_relative_position_bias(),
        attention.window_size,
        attention.num_heads,
        shift_size=attention.shift_size,
        attention_dropout=attention.attention_dropout,
        dropout=attention.dropout,
        qkv_bias=attention.qkv.bias,
        proj_bias=attention.proj.bias,
        training=attention.training,
        **options,
    )


class CallingShiftedWindowAttention(ShiftedWindowAttention):
    """``ShiftedWindowAttention`` that calls ``qkv`` and ``proj``; ``[N, H, W, C]`` to the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x)


class CallingShiftedWindowAttentionV2(ShiftedWindowAttentionV2):
    """``ShiftedWindowAttentionV2`` that calls ``qkv`` and ``proj``; ``[N, H, W, C]`` to the same shape."""

    changes_bias_of = ("qkv",)

    def forward(self, x: Tensor) -> Tensor:
        return _attend(self, x, logit_scale=self.logit_scale)


CALLING: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: CallingShiftedWindowAttention,
    ShiftedWindowAttentionV2: CallingShiftedWindowAttentionV2,
}
"""Which module becomes which: a subclass with the same parameters, whose layers' forward is called."""

"""Quantized layers: torch's own layers with a quantizer on the weight and one on the input.

A layer is converted by changing its class in place, so every parameter, hook and qualified name stays, and
float checkpoints load as they are.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from adq.config import ActivationConfig, LayerConfig, WeightConfig
from adq.nn.activation import ActivationQuantizer
from adq.nn.weight import WeightQuantizer
from adq.update import register


class QuantizedLayer(nn.Module):
    """Mixin of every quantized layer: ``y = layer(input_quantizer(x), weight_quantizer(weight))``.

    Attributes:
        weight_name: name of the parameter that is the weight.
        packed: whether the weight is kept as codes (:mod:`adq.nn.packed`).
        weight_quantizer: a :class:`WeightQuantizer`, or ``nn.Identity`` for weights in float.
        input_quantizer: an :class:`ActivationQuantizer`, or ``nn.Identity`` for activations in float.
    """

    channel_axis: ClassVar[int] = 0
    weight_name: ClassVar[str] = "weight"
    packed: ClassVar[bool] = False
    weight: Tensor
    weight_quantizer: WeightQuantizer | nn.Identity
    input_quantizer: ActivationQuantizer | nn.Identity

    def __init__(
        self,
        *args: Any,
        weight_config: WeightConfig | None = WeightConfig(),
        activation_config: ActivationConfig | None = ActivationConfig(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.attach_(LayerConfig(weight_config, activation_config))

    def attach_(
        self, config: LayerConfig, name: str = "", *, fitted: bool = True, shared: WeightQuantizer | None = None
    ) -> None:
        """Give the layer its quantizers; ``shared`` is the weight quantizer of a layer with the same weight."""
        if config.weight is None:
            weight_quantizer: WeightQuantizer | nn.Identity = nn.Identity()
        else:
            weight_quantizer = shared or WeightQuantizer(
                self.weight, config.weight, self.channel_axis, name, pinned=config.pinned, fitted=fitted
            )
        input_quantizer: ActivationQuantizer | nn.Identity = nn.Identity()
        if config.activation is not None:
            input_quantizer = ActivationQuantizer(config.activation, name).to(self.weight.device)
        self.weight_quantizer = weight_quantizer.train(self.training)
        self.input_quantizer = input_quantizer.train(self.training)
        register(self)

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it; same shape and dtype as ``weight``."""
        return self.weight_quantizer(self.weight)

    def macs(self, output: Any, *args: Any, **kwargs: Any) -> int:
        """Multiply-accumulates with the weight in a call with these arguments that gave ``output``."""
        return output.numel() * self.weight[0].numel()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copies and unpickled layers adapt their own codebooks
        register(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        own = tuple(f"{prefix}{name}." for name in ("weight_quantizer", "input_quantizer"))
        is_float = not any(key.startswith(own) for key in state_dict)  # parameters alone may be those of an average
        has_weight = f"{prefix}{self.weight_name}" in state_dict
        if is_float and has_weight and isinstance(self.weight_quantizer, WeightQuantizer):
            if self.weight_quantizer.steps.is_meta:
                args[-1].append(  # what load_state_dict raises
                    f"adq: layer {prefix.rstrip('.')!r} is quantized and on the meta device, where float weights have "
                    "nothing to fit; load them first, then call quantize_"
                )
                return
            if int(self.weight_quantizer.steps) > 0:
                warnings.warn(
                    f"adq: float weights for the trained layer {prefix.rstrip('.')!r}: its codebook is fitted to them "
                    "anew; to swap weights in and out, load them with the quantizers' state",
                    stacklevel=2,
                )
            self.weight_quantizer.refit_(self.weight)


class _QConv(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(input), self.quantized_weight(), self.bias)  # type: ignore[operator]


class QConv1d(_QConv, nn.Conv1d):
    """``nn.Conv1d`` with quantized weight and input."""


class QConv2d(_QConv, nn.Conv2d):
    """``nn.Conv2d`` with quantized weight and input."""


class QConv3d(_QConv, nn.Conv3d):
    """``nn.Conv3d`` with quantized weight and input."""


class _QConvTranspose(QuantizedLayer):
    channel_axis = 1
    spatial_dims: ClassVar[int]

    def macs(self, output: Any, input: Tensor, *args: Any, **kwargs: Any) -> int:
        return input.numel() * self.weight[0].numel()

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[self.spatial_dims - 1]
        padding = self._output_padding(  # type: ignore[operator]
            input, output_size, self.stride, self.padding, self.kernel_size, self.spatial_dims, self.dilation
        )
        return convolve(
            self.input_quantizer(input),
            self.quantized_weight(),
            self.bias,  # type: ignore[arg-type]
            self.stride,  # type: ignore[arg-type]
            self.padding,  # type: ignore[arg-type]
            padding,
            self.groups,  # type: ignore[arg-type]
            self.dilation,  # type: ignore[arg-type]
        )


class QConvTranspose1d(_QConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with quantized weight and input; scales along axis 1, shared by the groups."""

    spatial_dims = 1


class QConvTranspose2d(_QConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantized weight and input; scales along axis 1, shared by the groups."""

    spatial_dims = 2


class QConvTranspose3d(_QConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with quantized weight and input; scales along axis 1, shared by the groups."""

    spatial_dims = 3


class QLinear(QuantizedLayer, nn.Linear):
    """``nn.Linear`` with quantized weight and input."""

    def forward(self, input: Tensor, *bias: Tensor | None) -> Tensor:
        """As ``nn.Linear``; a bias that is passed takes the place of the layer's own."""
        return F.linear(self.input_quantizer(input), self.quantized_weight(), *(bias or (self.bias,)))


class QMultiheadAttention(QuantizedLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with its fused projection of query, key and value as one quantized layer.

    The weight is ``in_proj_weight``, ``[3 E, E]``. One quantizer serves the inputs: once where query, key and value are
    the same tensor. The products of attention itself are computed in float. ``out_proj`` is a layer of its own, and is
    called as one; torch's fused inference kernel is not used, because it reads the weights past the quantizers.
    """

    weight_name = "in_proj_weight"
    weight: Any = property(lambda self: self.in_proj_weight, doc="``in_proj_weight``.")

    @staticmethod
    def problem(attention: nn.MultiheadAttention) -> str | None:
        """Why an attention stays in float, None if it need not."""
        if attention.in_proj_weight is None:
            return "its query, key and value have projections of their own"
        extra = attention.bias_k is not None or attention.add_zero_attn
        return "it adds a learned or zero key (add_bias_kv, add_zero_attn)" if extra else None

    def macs(self, output: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
        return (query.numel() + key.numel() + value.numel()) * self.embed_dim

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: ``[N, L, E]`` or ``[L, N, E]`` by ``batch_first``, or ``[L, E]``."""
        if is_causal and attn_mask is None:
            raise RuntimeError("adq: attention with is_causal=True needs its attn_mask too")
        batched = query.dim() == 3
        sequences = [x if batched else x.unsqueeze(1) for x in self._project(query, key, value)]
        if batched and self.batch_first:
            sequences = [x.transpose(0, 1) for x in sequences]
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).permute(1, 2, 0, 3) for x in sequences)
        mask = self._mask(key_padding_mask, attn_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(heads.permute(2, 0, 1, 3).flatten(2))
        if batched and self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return (output, weights) if batched else (output.squeeze(1), None if weights is None else weights.squeeze(0))

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = self.quantized_weight(), self.in_proj_bias
        if query is key and key is value:
            return F.linear(self.input_quantizer(query), weight, bias).chunk(3, -1)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        quantized = {id(x): self.input_quantizer(x) for x in (query, key, value)}
        parts = zip((query, key, value), weight.chunk(3), biases, strict=True)
        return tuple(F.linear(quantized[id(x)], w, b) for x, w, b in parts)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to the scores ``[N, heads, L, S]``, broadcastable; masks of booleans are True where hidden."""
        if mask is not None and mask.dim() == 3:
            mask = mask.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = padding.reshape(-1, 1, 1, padding.shape[-1])
        added = [
            q.new_zeros(m.shape).masked_fill(m, float("-inf")) if m.dtype == torch.bool else m.to(q.dtype)
            for m in (mask, padding)
            if m is not None
        ]
        return sum(added[1:], added[0]) if added else None


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QConv1d,
    nn.Conv2d: QConv2d,
    nn.Conv3d: QConv3d,
    nn.ConvTranspose1d: QConvTranspose1d,
    nn.ConvTranspose2d: QConvTranspose2d,
    nn.ConvTranspose3d: QConvTranspose3d,
    nn.Linear: QLinear,
    NonDynamicallyQuantizableLinear: QLinear,
    nn.MultiheadAttention: QMultiheadAttention,
}
"""Which float layer becomes which quantized one; subclasses with a forward of their own stay in float."""

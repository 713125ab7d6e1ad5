"""Quantized layers: torch's own layers with a quantizer on the weight and one on the input.

A layer is converted by changing its class in place, so every parameter, hook and qualified name stays, and
float checkpoints load as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from adq.config import ActivationConfig, LayerConfig, WeightConfig
from adq.nn.activation import ActivationQuantizer
from adq.nn.weight import WeightQuantizer
from adq.update import register


class QuantizedLayer(nn.Module):
    """Mixin of every quantized layer: ``y = layer(input_quantizer(x), weight_quantizer(weight))``.

    Attributes:
        packed: whether the weight is kept as codes (:mod:`adq.nn.packed`).
        weight_quantizer: a :class:`WeightQuantizer`, or ``nn.Identity`` for weights in float.
        input_quantizer: an :class:`ActivationQuantizer`, or ``nn.Identity`` for activations in float.
    """

    channel_axis: ClassVar[int] = 0
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

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # copies and unpickled layers adapt their own codebooks
        register(self)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        is_float = not any(key.startswith(f"{prefix}weight_quantizer.") for key in state_dict)
        if is_float and f"{prefix}weight" in state_dict and isinstance(self.weight_quantizer, WeightQuantizer):
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

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(input), self.quantized_weight(), self.bias)


QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Conv1d: QConv1d,
    nn.Conv2d: QConv2d,
    nn.Conv3d: QConv3d,
    nn.ConvTranspose1d: QConvTranspose1d,
    nn.ConvTranspose2d: QConvTranspose2d,
    nn.ConvTranspose3d: QConvTranspose3d,
    nn.Linear: QLinear,
}
"""Which float layer becomes which quantized one; subclasses with a forward of their own stay in float."""

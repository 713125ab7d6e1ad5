"""Inference layers: a weight is kept as packed codes and decoded whenever it is read. Nothing in them trains.

A quantized layer becomes one by changing its class in place, as a float layer becomes a quantized one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adq.functional import code_bits, codebook_linear, decode, pack, unpack
from adq.nn.layers import (
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QLinear,
    QMultiheadAttention,
    QuantizedLayer,
)
from adq.nn.weight import WeightQuantizer
from adq.update import unregister

CODES = "codes"
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
FEW_ROWS = 4
"""Rows of an input up to which multiplying with the codes is faster than decoding, at every shape and width that
``adq bench --only linear`` times."""


def _memory_order(weight: Tensor) -> tuple[int, ...]:
    """The dimensions of a weight from the outermost to the innermost, if it is channels_last, else as they come."""
    dim = weight.dim()
    is_last = dim in LAST and weight.is_contiguous(memory_format=LAST[dim]) and not weight.is_contiguous()
    return (0, *range(2, dim), 1) if is_last else tuple(range(dim))


class PackedWeight(WeightQuantizer):
    """A quantized weight as it ships: ``scale * codebook[code]``; layers that share a weight share this module.

    Buffers: ``codes`` uint8, the stream of :func:`adq.functional.pack`; ``codebook`` float32 ``[K]``, ascending;
    ``scale`` float32, of any sign, broadcasts against the weight. They keep their dtype when the model is cast, and
    the weight comes in the dtype that it would have been cast to. In a model that is channels_last the codes lie in
    that order, so that the decoded weight does. In a state dict they stand beside their layer's bias, as
    ``<layer>.codes``, in row-major order.

    Args:
        quantizer: what the weight was trained with.
        weight: the layer's weight.
        codes: its codes, packed, where they are known: the weight then tells shape, dtype and device alone.

    Attributes:
        shape: of the weight.
        dtype: of the weight when it is read.
        width: of a code, in bits.
        order: its dimensions from the outermost to the innermost in memory; the codes lie in this order.
    """

    codes: Tensor
    order: tuple[int, ...]

    def __init__(self, quantizer: WeightQuantizer, weight: Tensor, codes: Tensor | None = None) -> None:
        nn.Module.__init__(self)
        self.config, self.axis, self.name = quantizer.config, quantizer.axis, quantizer.name
        self.pinned, self.enabled = quantizer.pinned, True
        self.shape, self.dtype, self.width = weight.shape, weight.dtype, quantizer.bits
        self.order = tuple(range(weight.dim()))
        if codes is None:
            codes = pack(quantizer.encode(weight), self.bits)
        self.register_buffer(CODES, codes)
        self.register_buffer("codebook", quantizer.levels.clone())
        self.register_buffer("scale", quantizer.scale.detach().clone())

    @property
    def bits(self) -> int:
        """Width of a code; a number where ``torch.jit.trace`` has none for the length of the codebook."""
        return self.width

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The weight; there is no other, so the argument is not looked at."""
        if self._is_row_major:
            return decode(self.codes, self.codebook, self.scale, self.shape, self.bits).to(self.dtype)
        scale = self.scale.permute(self.order)
        decoded = decode(self.codes, self.codebook, scale, self._shape_in_memory, self.bits)
        return self._in_shape(decoded).to(self.dtype)

    def encode(self, weight: Tensor | None = None) -> Tensor:
        """Codes of the weight, uint8, in its shape."""
        return self._in_shape(unpack(self.codes, self.bits, self._shape_in_memory))

    def row_major_codes(self) -> Tensor:
        """The packed codes as files have them."""
        return self.codes if self._is_row_major else self._packed(tuple(range(len(self.order))))

    def arrange_(self, order: tuple[int, ...]) -> None:
        """Have the codes lie in another order of the weight's dimensions."""
        if order != self.order:
            self.codes = self._packed(order)
            self.order = order

    def _packed(self, order: tuple[int, ...]) -> Tensor:
        """The codes in another order, packed; on any device, a meta device too."""
        return torch.ops.adq.pack_bits(self.encode().permute(order), self.bits)

    @property
    def _is_row_major(self) -> bool:
        return self.order == tuple(range(len(self.shape)))

    @property
    def _shape_in_memory(self) -> torch.Size:
        return torch.Size(self.shape[d] for d in self.order)

    def _in_shape(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape in memory, with the dimensions as they are named."""
        return tensor.permute([self.order.index(d) for d in range(len(self.order))])

    def _fit(self, weight: Tensor, config: Any) -> Any:
        raise ValueError(f"adq: layer {self.name!r} is packed, its codebook is final; load the plain file to change it")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        like = fn(self._in_shape(torch.empty([2] * len(self.shape), dtype=self.dtype, device=self.codes.device)))
        super()._apply(fn, recurse)
        self.dtype = like.dtype
        self.arrange_(_memory_order(like))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + CODES]
        destination[prefix.removesuffix("weight_quantizer.") + CODES] = self.row_major_codes()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        order = self.order
        self.arrange_(tuple(range(len(order))))
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)
        self.arrange_(order)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.width = state.get("width", code_bits(self.codebook.numel()))  # adq 0.1 had derived it

    def extra_repr(self) -> str:
        return f"bits={self.bits}, levels={self.codebook.numel()}, scale={self.config.scale}, packed"


class PackedLayer(QuantizedLayer):
    """Mixin of every inference layer: ``y = layer(input_quantizer(x), scale * codebook[codes])``.

    ``weight`` reads like a float layer's, and is decoded anew each time.

    Attributes:
        folded: the module that took the place of the batch norm which is folded into it
            (:func:`adq.fold_batch_norm_`), if there is one; in a tuple, for it is no part of the layer.
    """

    packed: ClassVar[bool] = True
    folded: tuple[nn.Module, ...] = ()
    weight_quantizer: PackedWeight

    weight: Any = property(lambda self: self.quantized_weight(), doc="The decoded weight.")

    @property
    def codes(self) -> Tensor:
        """The packed codes, uint8, in the order of the weight's memory."""
        return self.weight_quantizer.codes

    def quantized_weight(self) -> Tensor:
        """The weight as the forward pass uses it."""
        return self.weight_quantizer(None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the float layer's; RuntimeError in training mode."""
        if self.training:
            raise RuntimeError(
                f"adq: layer {self.weight_quantizer.name!r} is packed and cannot train; call model.eval(), or train on "
                "from the plain file"
            )
        return super().forward(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)  # no codebook moves here

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + CODES in state_dict:
            state_dict[f"{prefix}weight_quantizer.{CODES}"] = state_dict.pop(prefix + CODES)
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


class PackedConv1d(PackedLayer, QConv1d):
    """``nn.Conv1d`` with its weight in codes."""


class PackedConv2d(PackedLayer, QConv2d):
    """``nn.Conv2d`` with its weight in codes."""


class PackedConv3d(PackedLayer, QConv3d):
    """``nn.Conv3d`` with its weight in codes."""


class PackedConvTranspose1d(PackedLayer, QConvTranspose1d):
    """``nn.ConvTranspose1d`` with its weight in codes."""


class PackedConvTranspose2d(PackedLayer, QConvTranspose2d):
    """``nn.ConvTranspose2d`` with its weight in codes."""


class PackedConvTranspose3d(PackedLayer, QConvTranspose3d):
    """``nn.ConvTranspose3d`` with its weight in codes."""


class PackedLinear(PackedLayer, QLinear):
    """``nn.Linear`` with its weight in codes.

    Attributes:
        fast: whether inputs of up to ``FEW_ROWS`` rows are multiplied with the codes; see :func:`adq.fast_linear_`.
    """

    fast: bool = False

    def forward(self, input: Tensor, *bias: Tensor | None) -> Tensor:
        """As ``nn.Linear``; RuntimeError in training mode."""
        if not self._on_codes(input):
            return super().forward(input, *bias)
        weight = self.weight_quantizer
        x = self.input_quantizer(input)
        y = codebook_linear(x, weight.codes, weight.codebook, weight.scale, self.out_features, weight.bits)
        (added,) = bias or (self.bias,)
        if torch.is_autocast_enabled(x.device.type):  # as the larger inputs
            y = y.to(torch.get_autocast_dtype(x.device.type))
            added = None if added is None else added.to(y.dtype)
        return y if added is None else y + added

    def _on_codes(self, input: Tensor) -> bool:
        return (
            self.fast
            and not self.training
            and isinstance(self.weight_quantizer, PackedWeight)  # an export has another module in its place
            and input.numel() <= FEW_ROWS * self.in_features
            and not (input.requires_grad and torch.is_grad_enabled())
        )


class PackedMultiheadAttention(PackedLayer, QMultiheadAttention):  # type: ignore[misc]
    """``nn.MultiheadAttention`` with its fused projection in codes."""


PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    QConv1d: PackedConv1d,
    QConv2d: PackedConv2d,
    QConv3d: PackedConv3d,
    QConvTranspose1d: PackedConvTranspose1d,
    QConvTranspose2d: PackedConvTranspose2d,
    QConvTranspose3d: PackedConvTranspose3d,
    QLinear: PackedLinear,
    QMultiheadAttention: PackedMultiheadAttention,
}
"""Which quantized layer becomes which inference layer."""


def pack_layer_(layer: QuantizedLayer, packed: PackedWeight) -> None:
    """Make a quantized layer an inference layer with this weight; its float weight is given up."""
    packed.arrange_(_memory_order(layer.weight))
    layer.__class__ = PACKED[type(layer)]
    del layer._parameters[layer.weight_name]
    layer.weight_quantizer = packed.train(layer.training)
    unregister(layer)

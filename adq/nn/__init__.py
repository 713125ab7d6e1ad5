"""Quantizers and quantized layers."""

from adq.nn.activation import ActivationQuantizer
from adq.nn.integer import IntegerConv1d, IntegerConv2d, IntegerLayer, IntegerLinear
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
from adq.nn.packed import (
    PackedConv1d,
    PackedConv2d,
    PackedConv3d,
    PackedConvTranspose1d,
    PackedConvTranspose2d,
    PackedConvTranspose3d,
    PackedLayer,
    PackedLinear,
    PackedMultiheadAttention,
    PackedWeight,
)
from adq.nn.weight import WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "IntegerConv1d",
    "IntegerConv2d",
    "IntegerLayer",
    "IntegerLinear",
    "PackedConv1d",
    "PackedConv2d",
    "PackedConv3d",
    "PackedConvTranspose1d",
    "PackedConvTranspose2d",
    "PackedConvTranspose3d",
    "PackedLayer",
    "PackedLinear",
    "PackedMultiheadAttention",
    "PackedWeight",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QLinear",
    "QMultiheadAttention",
    "QuantizedLayer",
    "WeightQuantizer",
]

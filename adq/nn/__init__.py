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
    QuantizedLayer,
)
from adq.nn.weight import WeightQuantizer

__all__ = [
    "ActivationQuantizer",
    "IntegerConv1d",
    "IntegerConv2d",
    "IntegerLayer",
    "IntegerLinear",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QLinear",
    "QuantizedLayer",
    "WeightQuantizer",
]

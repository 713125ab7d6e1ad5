"""A quantized model in standard operators, for runtimes that know none of adq's.

Weights are looked up from their codes, levels of activations are counted by comparisons: what is left are operators of
torch's core set, the one that ExecuTorch takes. Each result is that of adq's own operators, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adq.convert import pack_, quantized_layers
from adq.functional import pack, unpack
from adq.nn.activation import ActivationQuantizer
from adq.nn.packed import PackedLinear, PackedWeight
from adq.nn.weight import WeightQuantizer
from adq.ops import ACTIVATION_RANGE, MIN_INTERVAL
from adq.reference import level_edges


class TableWeight(nn.Module):
    """A weight as ``scale * table[byte]``, where a byte holds one, two, four or eight codes.

    Codes are as wide as the next of 1, 2, 4 and 8 bits. The table, the levels of each byte's codes, is looked up from
    the codebook anew each time, so that the file need not hold it.

    Buffers: ``codes`` uint8, the stream of :func:`adq.functional.pack`; ``codes_of_byte`` uint8 ``[256, n]``;
    ``codebook`` float32 ``[K]``; ``scale`` float32, broadcasts against the weight.
    """

    codes: Tensor
    codes_of_byte: Tensor
    codebook: Tensor
    scale: Tensor

    def __init__(self, packed: PackedWeight) -> None:
        super().__init__()
        self.shape = packed.shape
        width = next(width for width in (1, 2, 4, 8) if width >= packed.bits)
        of_byte = unpack(torch.arange(256, dtype=torch.uint8), width, (256, 8 // width))
        self.register_buffer("codes", pack(packed.encode(), width))
        self.register_buffer("codes_of_byte", of_byte.clamp_max(packed.codebook.numel() - 1))
        self.register_buffer("codebook", packed.codebook)
        self.register_buffer("scale", packed.scale)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        """The weight; the argument is not looked at."""
        table = self.codebook[self.codes_of_byte.int()]
        levels = table[self.codes.int()].flatten()[: self.shape.numel()]
        return levels.view(self.shape) * self.scale


class PortableActivation(nn.Module):
    """An activation quantizer as the reference writes it (:func:`adq.reference.threshold_quantize`), its parameters
    as constants of the graph.
    """

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.steps = quantizer.config.steps
        self.in_scale, self.start = quantizer.in_scale.item(), quantizer.start.item()
        self.out_scale, self.offset = quantizer.out_scale.item(), quantizer.offset.item()
        interval = quantizer.interval.detach().clamp_min(MIN_INTERVAL)
        self.width = interval[0].item()
        self.edges: list[float] | None = None
        if interval.numel() == self.steps:
            self.edges = [edge.item() for edge in level_edges(quantizer.start.detach()[0], interval)[1]]

    def levels(self, x: Tensor) -> Tensor:
        """The level of each input, float32; 0 for NaN, or NaN."""
        u = x * self.in_scale
        if self.edges is None:
            return ((u - self.start) / self.width - 0.5).ceil().clamp(0, self.steps)
        passed = [(u > edge).float() for edge in self.edges]
        return sum(passed[1:], passed[0])

    def forward(self, x: Tensor) -> Tensor:
        """x, quantized and dequantized; NaN stays NaN."""
        q = torch.where(x != x, x, self.levels(x))
        return (q * (ACTIVATION_RANGE / self.steps) - self.offset) * self.out_scale


def inference_copy(
    model: nn.Module,
    weight: Callable[[PackedWeight], nn.Module],
    activation: Callable[[ActivationQuantizer], nn.Module],
) -> nn.Module:
    """The model on the CPU with other modules in place of its quantizers, to be exported.

    Layers that share a weight share its module. Of float weights only those are left that a layer in float uses.
    """
    model = pack_(copy.deepcopy(model).cpu())
    made: dict[WeightQuantizer, nn.Module] = {}
    for layer in quantized_layers(model).values():
        quantizer, thresholds = layer.weight_quantizer, layer.input_quantizer
        if isinstance(quantizer, WeightQuantizer):
            if quantizer not in made:
                packed = quantizer if isinstance(quantizer, PackedWeight) else PackedWeight(quantizer, layer.weight)
                made[quantizer] = weight(packed)
            layer.weight_quantizer = made[quantizer]  # type: ignore[assignment]
        if isinstance(thresholds, ActivationQuantizer):
            layer.input_quantizer = activation(thresholds)  # type: ignore[assignment]
        if isinstance(layer, PackedLinear):
            layer.fast = False  # no other runtime has its operator
    return model


def portable(model: nn.Module) -> nn.Module:
    """The model in standard operators, for :func:`torch.export.export`."""
    return inference_copy(model, TableWeight, PortableActivation)

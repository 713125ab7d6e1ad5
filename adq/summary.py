"""What a quantized model consists of, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor, nn

from adq.allocate import FLOAT_BITS
from adq.artifact import packed_bytes
from adq.codebook import sqnr
from adq.convert import (
    activation_quantizers,
    float_tensors,
    obstacle,
    parameter_holders,
    quantized_layers,
    quantizer_prefixes,
    refuse_lazy,
    unwrapped,
    weight_quantizers,
)
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QUANTIZED, QuantizedLayer
from adq.nn.packed import PackedWeight
from adq.nn.weight import WeightQuantizer
from adq.ops import packed_size
from adq.sensitivity import float_parameters
from adq.sharded import refuse_sharded

WIDTH = 120
_WHOLE_NAMES: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


@dataclass(frozen=True)
class LayerSummary:
    """One layer: widths in bits (None: float), levels in use, SQNR in dB, bytes of its weight in a packed file.

    A weight that a layer in float uses too, an embedding's say, is quantized when this layer computes, and in float in
    a packed file.
    """

    name: str
    kind: str
    weights: int
    weight_bits: int | None
    activation_bits: int | None
    levels_used: int | None
    levels: int | None
    sqnr_db: float | None
    bytes: int


@dataclass(frozen=True)
class Summary:
    """A quantized model in figures; ``str()`` prints it as a table.

    Attributes:
        layers: quantized layers, in order of registration.
        left_in_float: every module with parameters of its own that is not quantized, with the reason; parameters of
            modules that hold layers are named themselves.
        average_bits_quantized: average weight bits over the quantized layers, without weights that files hold in float.
        average_bits_network: average over all parameters, those in float counted at 32 bits.
        bytes_float: tensors of the float network.
        bytes_packed: tensors of the packed file.
    """

    layers: tuple[LayerSummary, ...]
    left_in_float: dict[str, str]
    average_bits_quantized: float
    average_bits_network: float
    bytes_float: int
    bytes_packed: int

    @property
    def float_by_reason(self) -> dict[str, list[str]]:
        """Names of what is left in float, by the reason."""
        found: dict[str, list[str]] = {}
        for name, reason in self.left_in_float.items():
            found.setdefault(reason, []).append(name)
        return found

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        kind = max(len(layer.kind) for layer in self.layers)
        header = (
            f"{'layer':<{width}} {'type':<{kind}} {'weights':>9} {'W bits':>6} {'A bits':>6} "
            f"{'levels':>9} {'SQNR dB':>8} {'bytes':>9}"
        )
        lines = [header, *(_row(layer, width, kind) for layer in self.layers)]
        for reason, names in self.float_by_reason.items():
            lines += wrap(f"in float, {reason}: {', '.join(names)}", WIDTH, subsequent_indent="    ", **_WHOLE_NAMES)
        lines.append(
            f"average bits: {self.average_bits_quantized:.3f} over the quantized layers, "
            f"{self.average_bits_network:.3f} over the whole network"
        )
        lines.append(
            f"bytes: {self.bytes_float:,} float, {self.bytes_packed:,} packed "
            f"({self.bytes_float / max(1, self.bytes_packed):.2f} times smaller)"
        )
        return "\n".join(lines)


def _row(layer: LayerSummary, width: int, kind: int) -> str:
    levels = "-" if layer.levels is None else f"{layer.levels_used}/{layer.levels}"
    quality = "-" if layer.sqnr_db is None else f"{layer.sqnr_db:.2f}"
    return (
        f"{layer.name:<{width}} {layer.kind:<{kind}} {layer.weights:>9,} {layer.weight_bits or 'float':>6} "
        f"{layer.activation_bits or 'float':>6} {levels:>9} {quality:>8} {layer.bytes:>9,}"
    )


@torch.no_grad()
def _summarise(name: str, layer: QuantizedLayer, activation_bits: int | None, in_float: set[int]) -> LayerSummary:
    quantizer = layer.weight_quantizer
    weights = layer.weight.numel()
    if not isinstance(quantizer, WeightQuantizer):
        return LayerSummary(
            name, type(layer).__name__, weights, None, activation_bits, None, None, None, layer.weight.nbytes
        )
    used = quantizer.encode(layer.weight).unique().numel()
    kept = not layer.packed and layer.weight.data_ptr() in in_float
    codes = layer.weight.nbytes if kept else packed_size(weights, quantizer.bits)
    size = codes + quantizer.codebook.nbytes + quantizer.scale.nbytes
    quality = sqnr(layer.weight, layer.quantized_weight())
    return LayerSummary(
        name,
        type(layer).__name__,
        weights,
        quantizer.bits,
        activation_bits,
        used,
        quantizer.codebook.numel(),
        quality,
        size,
    )


def _left_in_float(model: nn.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, module, own in parameter_holders(model):
        if isinstance(module, (QuantizedLayer, WeightQuantizer, ActivationQuantizer)):
            continue
        if isinstance(module, tuple(QUANTIZED)):
            found[name] = obstacle(module) or str(getattr(module, "adq_in_float", "it was not asked for"))
        elif next(module.children(), None) is None:
            found[name] = f"{type(module).__name__} is no layer that adq quantizes"
        else:
            reason = f"a parameter of {type(module).__name__} itself"
            found.update({f"{name}.{key}".lstrip("."): reason for key in own})
    return found


def float_bytes(model: nn.Module) -> int:
    """Bytes of the float network's parameters and buffers, quantizers left out."""
    packed = [q for _, q in weight_quantizers(model).values() if isinstance(q, PackedWeight)]
    codes = {q.codes.data_ptr() for q in packed}
    skipped = quantizer_prefixes(quantized_layers(model, every_name=True))
    tensors = {
        tensor.data_ptr(): tensor
        for key, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and not key.startswith(skipped) and tensor.data_ptr() not in codes
    }
    in_codes = sum(q.shape.numel() * q.dtype.itemsize for q in packed)
    return sum(tensor.nbytes for tensor in tensors.values()) + in_codes


def summary(model: nn.Module) -> Summary:
    """Bits, levels in use, SQNR and bytes of every quantized layer, and the totals.

    Args:
        model: from :func:`adq.quantize_`.

    Raises:
        ValueError: the model is not quantized, or has a lazy module that has not run.
    """
    model = unwrapped(model)
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("adq: the model is not quantized; call adq.quantize_(model) first")
    refuse_lazy(model)
    refuse_sharded((layer.weight for layer in layers.values()), "a summary")
    activation, kept = activation_quantizers(model), float_tensors(model)
    rows = tuple(
        _summarise(name, layer, activation[name].config.bits if name in activation else None, kept)
        for name, layer in layers.items()
    )
    widths = [
        (layer.weight.numel(), quantizer.bits)
        for layer, quantizer in weight_quantizers(model).values()
        if layer.packed or layer.weight.data_ptr() not in kept
    ]
    weights, bits = sum(n for n, _ in widths), sum(n * b for n, b in widths)
    in_float = float_parameters(model)
    return Summary(
        layers=rows,
        left_in_float=_left_in_float(model),
        average_bits_quantized=bits / weights if weights else float(FLOAT_BITS),
        average_bits_network=(bits + FLOAT_BITS * in_float) / max(1, weights + in_float),
        bytes_float=float_bytes(model),
        bytes_packed=packed_bytes(model),
    )

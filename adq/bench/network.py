"""All the weights of a network at once: quantized for a step, and their codebooks moved after it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn

import adq
from adq.bench.case import ADQ, COPY, Call, Case, Setting, Target, share_of_copy
from adq.convert import weight_quantizers
from adq.nn.layers import QUANTIZED

PART = "network"
ONE_BY_ONE = "adq, layer by layer"
KEEPING = "adq, leaving the quantized weights behind"
MAX_GPU_US = 100.0


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part."""
    name = "resnet20" if setting.tiny else "resnet18"
    model = adq.create_model(name)
    layers = [key for key, module in model.named_modules() if type(module) in QUANTIZED]
    moved = 8 * sum(model.get_parameter(f"{layer}.weight").numel() for layer in layers)
    bound = MAX_GPU_US if setting.cuda else None
    yield Case(
        PART,
        f"{name}: quantize every weight",
        lambda: _network(setting, name),
        {ADQ: _quantize, ONE_BY_ONE: _layer_by_layer, COPY: _copy_weights},
        (share_of_copy(None), share_of_copy(None, ONE_BY_ONE), _microseconds(ADQ, bound)),
        bytes_moved=moved,
    )
    yield Case(
        PART,
        f"{name}: move every codebook",
        lambda: _network(setting, name),
        {
            ADQ: lambda model: _step(model, keep=False),
            KEEPING: lambda model: _step(model, keep=True),
            COPY: _copy_weights,
        },
        (share_of_copy(None), _microseconds(ADQ, bound), _microseconds(KEEPING, bound)),
        bytes_moved=moved,
    )


def _network(setting: Setting, name: str) -> nn.Module:
    return adq.quantize_(adq.create_model(name).to(setting.device), adq.ADQConfig(activation=None))


def _microseconds(row: str, bound: float | None) -> Target:
    return Target(row, "us", lambda samples: 1e3 * median(samples[row]), (row,), bound, at_least=False)


def _layer_by_layer(model: nn.Module) -> Call:
    layers = [layer for layer, _ in weight_quantizers(model).values()]

    def call() -> None:
        with torch.no_grad():
            for layer in layers:
                layer.quantized_weight()

    return call


def _state(model: nn.Module) -> tuple[list[Tensor], ...]:
    """Weights, scales, codebooks, EMA counts and EMA totals."""
    pairs = list(weight_quantizers(model).values())
    quantizers = [quantizer for _, quantizer in pairs]
    names = ("scale", "codebook", "ema_count", "ema_total")
    tables = ([getattr(quantizer, name) for quantizer in quantizers] for name in names)
    return [layer.weight.detach() for layer, _ in pairs], *tables


def _quantize(model: nn.Module) -> Call:
    weights, scales, codebooks, *_ = _state(model)
    return lambda: torch.ops.adq.foreach_codebook_quantize(weights, scales, codebooks)


def _step(model: nn.Module, keep: bool) -> Call:
    weights, *state = _state(model)
    rates = torch.full((len(weights),), 0.01, device=weights[0].device)
    snap = [False] * len(weights)
    quantized = [torch.empty_like(w) for w in weights] if keep else []
    return lambda: torch.ops.adq.foreach_codebook_step_(weights, *state, rates, 1.0, snap, quantized)


def _copy_weights(model: nn.Module) -> Call:
    sources: list[Tensor] = [layer.weight.detach() for layer, _ in weight_quantizers(model).values()]
    targets = [torch.empty_like(source) for source in sources]
    return lambda: torch._foreach_copy_(targets, sources)

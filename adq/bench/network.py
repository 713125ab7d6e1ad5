"""All the weights of a network at once: quantized for a step, and their codebooks moved after it."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import torch
from torch import Tensor, nn

import adq
from adq.bench.case import ADQ, COPY, Call, Case, Setting, Target, Unavailable, share_of_copy
from adq.convert import weight_quantizers
from adq.nn.layers import QUANTIZED

PART = "network"
FOREACH = "adq, every layer in one call"
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
        {ADQ: _layer_by_layer, FOREACH: _foreach, COPY: _copy_weights},
        (share_of_copy(None), share_of_copy(None, FOREACH), _microseconds(FOREACH, bound)),
        bytes_moved=moved,
    )
    yield Case(
        PART,
        f"{name}: quantize every weight and move the codebooks",
        lambda: _network(setting, name),
        {ADQ: lambda model: lambda: adq.step(model), COPY: _copy_weights},
        (share_of_copy(None), _microseconds(ADQ, bound)),
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


def _foreach(model: nn.Module) -> Call:
    if not hasattr(torch.ops.adq, "foreach_codebook_quantize"):
        raise Unavailable("this version of adq has no such operator")
    pairs = list(weight_quantizers(model).values())
    weights = [layer.weight.detach() for layer, _ in pairs]
    scales = [quantizer.scale for _, quantizer in pairs]
    codebooks = [quantizer.codebook for _, quantizer in pairs]
    return lambda: torch.ops.adq.foreach_codebook_quantize(weights, scales, codebooks)


def _copy_weights(model: nn.Module) -> Call:
    sources: list[Tensor] = [layer.weight.detach() for layer, _ in weight_quantizers(model).values()]
    targets = [torch.empty_like(source) for source in sources]
    return lambda: torch._foreach_copy_(targets, sources)

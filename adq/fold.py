"""Batch norms folded into the weights before them: fewer operations and fewer numbers where the model ships.

``norm(conv(x, scale * c[code])) = conv(x, factor * scale * c[code]) + shift``: the codes and the codebook stay, the
scale of each output channel takes the factor, whose sign it takes too, and the layer's bias the shift.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from adq.convert import evaluating, pack_, packed_weights, quantized_layers, replace_module_, unwrapped
from adq.deploy import HOOKS, after_norm, batch_norm_affine, has_hooks, is_read, note_, trace_layers
from adq.nn.layers import QuantizedLayer
from adq.nn.packed import PackedLayer, PackedWeight
from adq.nn.weight import WeightQuantizer

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batch_norm_(model: nn.Module) -> nn.Module:
    """Make a quantized model an inference model (:func:`adq.pack_`) without the batch norms that follow convolutions.

    A batch norm is folded if it is all that reads the convolution's result, both run once in a forward pass, no other
    code reads their parameters or anything of the norm, and the convolution shares no weight; others, those of linear
    layers too, stay. Predictions are the same up to float rounding, after which an activation close to a threshold may
    take the next level: this is why nobody folds unasked.

    Args:
        model: quantized, or packed already; its code must be one that :mod:`torch.fx` can trace, inside of what
            ``torch.compile`` or ``DistributedDataParallel`` have put around it. Arguments of its ``forward`` that have
            a default are taken to have it: with others, what is folded may be wrong.

    Returns:
        The same model, in evaluation mode; batch norms that are folded are ``nn.Identity``, timm's with an activation
        that and their dropout, and its attribute ``adq_folded`` names them, by the name of their layer.

    Raises:
        ValueError: not quantized, not traceable, or without a batch norm to fold; the model is unchanged.
    """
    inner = unwrapped(model)
    if not quantized_layers(inner):
        raise ValueError("adq: the model is not quantized; call adq.quantize_(model) first")
    folded = _find(inner)
    if not folded:
        raise ValueError(
            "adq: there is no batch norm to fold: no quantized convolution is read by one of torch or timm alone"
        )
    norms = {name: cast(BatchNorm, inner.get_submodule(norm)) for name, norm in folded.items()}
    affines = {name: batch_norm_affine(norm) for name, norm in norms.items()}
    attach_(pack_(inner), folded)
    for name, affine in affines.items():
        _fold_(cast(QuantizedLayer, inner.get_submodule(name)), *affine)
    note_(model, "adq_folded", folded)
    return model.eval()


def _find(model: nn.Module) -> dict[str, str]:
    """Batch norms that can be folded, by the name of their layer."""
    try:
        with evaluating(model):
            graph, _, reads = trace_layers(model, leaves=(WeightQuantizer,))
    except Exception as error:  # whatever the model's code raises when it meets a proxy
        raise ValueError(f"adq: cannot fold batch norms: torch.fx cannot trace the model: {error}") from error
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    called = Counter(id(part) for node in calls for part in modules[str(node.target)].modules())
    weights, values = packed_weights(model), reads.values | _read_by(graph, model)
    sharing = Counter(map(id, weights.values()))
    found = {}
    for node in calls:
        name, users = str(node.target), list(node.users)
        if name not in weights or sharing[id(weights[name])] > 1 or len(users) != 1 or users[0].op != "call_module":
            continue
        layer, norm = modules[name], modules[str(users[0].target)]
        if called[id(layer)] != 1 or called[id(norm)] != 1 or fold_problem(layer, norm) is not None:
            continue
        asked = {attribute for module, attribute in reads.attributes if module == id(norm)}
        gone = not all(hasattr(after_norm(norm), attribute) for attribute in asked) or _ids(norm) & reads.tensors
        new_bias = layer.bias is None and (id(layer), "bias") in reads.attributes
        if not gone and not new_bias and not (_ids(norm) | _ids(layer)) & values:
            found[name] = str(users[0].target)
    return found


def _ids(module: nn.Module) -> set[int]:
    return {id(tensor) for tensor in (*module.parameters(), *module.buffers())}


def _read_by(graph: fx.Graph, model: nn.Module) -> set[int]:
    """Identities of the model's tensors whose values a graph reads, quantized weights too."""
    tensors = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    read = [str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module") and is_read(node)]
    modules = dict(model.named_modules())
    quantizers = [modules[name] for name in read if isinstance(modules.get(name), WeightQuantizer)]
    return {id(tensors[name]) for name in read if name in tensors}.union(*map(_ids, quantizers))


def fold_problem(layer: nn.Module, norm: nn.Module) -> str | None:
    """Why a batch norm cannot be folded into a layer, None if it can."""
    if not isinstance(layer, _CONVOLUTIONS):
        return f"{type(layer).__name__} is no convolution"
    if (
        not isinstance(norm, BatchNorm)
        or after_norm(norm) is None
        or norm.running_mean is None
        or norm.num_features != layer.out_channels
    ):
        return f"{type(norm).__name__} is no batch norm of {layer.out_channels} channels with running statistics"
    if has_hooks(layer) or has_hooks(norm):
        return f"they have {HOOKS}"
    if layer.transposed and layer.groups > 1:
        return "its output channels are no axis of its weight"
    return None


def attach_(model: nn.Module, folded: Mapping[str, str]) -> None:
    """Give layers that take a batch norm a scale for each channel and a bias; in its place comes what follows it."""
    for name, norm in folded.items():
        layer = cast(nn.Conv2d, model.get_submodule(name))
        packed = cast(PackedWeight, layer.weight_quantizer)
        packed.config = replace(packed.config, scale="channel")
        shape = [n if axis == packed.axis else 1 for axis, n in enumerate(packed.shape)]
        packed.scale = packed.scale.expand(shape).clone()
        bias = packed.scale.new_zeros(layer.out_channels) if layer.bias is None else layer.bias.detach().clone()
        layer.bias = nn.Parameter(bias.to(packed.dtype), requires_grad=False)
        after = cast(nn.Module, after_norm(model.get_submodule(norm)))
        replace_module_(model, norm, after)
        cast(PackedLayer, layer).folded = (after,)
    note_(model, "adq_folded", folded_norms(model))


def folded_norms(model: nn.Module) -> dict[str, str]:
    """Batch norms that are folded into a layer, by its name: where the modules are now that took their place.

    Raises:
        ValueError: the model does not hold that module, as a part of the folded model may not.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found = {}
    for name, layer in quantized_layers(model).items():
        for after in layer.folded if isinstance(layer, PackedLayer) else ():
            if id(after) not in names:
                raise ValueError(
                    f"adq: a batch norm is folded into layer {name!r}, and what took its place is no part of this "
                    "model (any more); files say where it was"
                )
            found[name] = names[id(after)]
    return found


def is_folded(model: nn.Module) -> bool:
    """Whether a batch norm is folded into one of the layers."""
    return any(isinstance(layer, PackedLayer) and layer.folded for layer in quantized_layers(model).values())


@torch.no_grad()
def _fold_(layer: QuantizedLayer, factor: Tensor, shift: Tensor) -> None:
    packed, bias = cast(PackedWeight, layer.weight_quantizer), cast(Tensor, layer.bias)
    packed.scale.copy_(packed.scale.double() * factor.view(packed.scale.shape))
    bias.copy_(bias.double() * factor + shift)

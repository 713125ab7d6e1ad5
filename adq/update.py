"""All layers at once: codebooks move after each optimizer step, weights are quantized when a forward pass begins.

Quantized layers enter a weak registry when they are built, copied or unpickled. A global post-step hook of
torch's optimizers updates those whose weight the stepping optimizer holds, in training mode only. So gradient
accumulation gives one update a step, as does an optimizer that wraps another; a step that a gradient scaler skips gives
none, a forward pass under ``no_grad`` or recomputed by activation checkpointing changes nothing, and a user's training
loop stays as it is.

When the converted model as a whole begins a forward pass, one operator quantizes the weights of all its layers; they
are dropped when it ends. A layer that runs outside of such a pass, or whose weight changed during it, quantizes its
own weight.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterable, Sequence
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from adq import sharded
from adq.backends.capture import check_not_capturing

if TYPE_CHECKING:
    from adq.nn.layers import QuantizedLayer
    from adq.nn.weight import WeightQuantizer

_LAYERS: weakref.WeakSet[QuantizedLayer] = weakref.WeakSet()
_LOCK = threading.Lock()
_LAYERS_OF: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[QuantizedLayer]]] = weakref.WeakKeyDictionary()
"""Weakly: layers may be replaced, and may hold their model, by a hook say, which would then never go."""
PEAK = "adq_peak_lr"
"""In a parameter group: the highest learning rate that it has had."""

_OPTIMIZER_FILE = register_optimizer_step_post_hook.__code__.co_filename

Pace = float | Tensor
Member = tuple[Tensor, "WeightQuantizer", Pace]
"""A weight, its quantizer, and how fast its codebook follows it."""


def register(layer: QuantizedLayer) -> None:
    """Enter a layer whose codebook shall follow its weight."""
    with _LOCK:
        _LAYERS.add(layer)


def unregister(layer: nn.Module) -> None:
    """Take out a layer that is a float one again."""
    with _LOCK:
        _LAYERS.discard(layer)  # type: ignore[arg-type]


def _pace(group: dict[str, Any]) -> Pace:
    """Learning rate of a parameter group over its peak, at most 1; without a learning rate 1, of a rate of zero 0.

    The peak is ``max_lr``, where a scheduler or the user has put it, else the highest rate until now, which the group
    keeps, and with it the optimizer's state dict; a step that a gradient scaler leaves to a fused optimizer to skip
    counts. What schedulers record as ``initial_lr`` may be no rate at all but a factor of theirs. Optimizers that find
    their rate themselves may have none.
    """
    rate, peak = group.get("lr"), group.get("max_lr")
    if rate is None:
        return 1.0
    if isinstance(rate, Tensor):  # of a capturable optimizer: not to be read back
        rate = rate.detach()
        if peak is None:
            peak = group.get(PEAK, 0.0)
            if not isinstance(peak, Tensor) or (peak.device, peak.dtype, peak.shape) != (
                rate.device,
                rate.dtype,
                rate.shape,
            ):
                check_not_capturing(rate.device)
                peak = group[PEAK] = torch.full_like(rate, float(peak))
            torch.maximum(peak, rate, out=peak)  # in place: a captured graph goes on with it
        elif not isinstance(peak, Tensor) or peak.is_cpu:
            peak = torch.full_like(rate, float(peak))  # a number goes to a device without waiting, a tensor does not
        return torch.where(peak > 0, rate / peak, 0.0).clamp_max(1.0).float().reshape(())
    if peak is None:
        peak = group[PEAK] = max(float(group.get(PEAK, 0.0)), float(rate))
    return min(1.0, float(rate) / float(peak)) if float(peak) > 0.0 else 0.0


@cache  # for good: captured graphs read them
def _constant_rates(rates: tuple[float, ...], device: torch.device) -> Tensor:
    check_not_capturing(device)
    return torch.tensor(rates, dtype=torch.float32, device=device)


def _update(layers: Iterable[QuantizedLayer], paces: dict[int, Pace] | None, taken: Tensor | None = None) -> None:
    """Count a step of the layers in training mode, and move the codebooks that follow their weights.

    ``paces`` are by the layers' identities; None: all at full pace. ``taken``: bool ``[]``, whether the optimizer has
    taken its step; None: it has. It is not read back: where it is false, rates are zero, and those change no bit.
    """
    counted: dict[torch.device, list[Tensor]] = {}
    moving: dict[tuple[torch.device, bool], list[Member]] = {}
    done = set()  # layers that share a weight share a quantizer
    for layer in layers:
        quantizer = layer.weight_quantizer
        pace = 1.0 if paces is None else paces.get(id(layer))
        if pace is None or not layer.training or id(quantizer) in done or isinstance(quantizer, nn.Identity):
            continue
        if not any(parameter.requires_grad for parameter in _learned(layer)):  # it stays as it is
            continue
        done.add(id(quantizer))
        counted.setdefault(quantizer.steps.device, []).append(quantizer.steps)
        if quantizer.config.update == "ema":
            weight, pace = layer.weight.detach(), pace if quantizer.config.ema_follows_lr else 1.0
            moving.setdefault((weight.device, sharded.is_sharded(weight)), []).append((weight, quantizer, pace))
    for device, steps in counted.items():
        torch._foreach_add_(steps, 1 if taken is None else [taken.to(device).long()] * len(steps))
    for (device, in_parts), members in moving.items():
        weights, quantizers, _ = zip(*members, strict=True)
        rates, pace = _rates(device, members, taken)
        if in_parts:
            sharded.step([*zip(weights, quantizers, strict=True)], rates * pace)
        else:
            _step(weights, quantizers, rates, pace)


def _learned(layer: QuantizedLayer) -> list[Tensor]:
    """What an optimizer may hold of a layer's weight: itself, or what a parametrization, or a hook of ``prune`` or of
    the old ``weight_norm``, computes it from (``weight_orig``, ``weight_g`` and ``weight_v``).
    """
    parametrized, name = getattr(layer, "parametrizations", {}), layer.weight_name
    if name in parametrized:
        return list(parametrized[name].parameters())
    parts = [part for key, part in layer._parameters.items() if key.startswith(f"{name}_") and part is not None]
    return [layer.weight] if name in layer._parameters or not parts else [*parts]


def _rates(device: torch.device, members: Sequence[Member], taken: Tensor | None) -> tuple[Tensor, float]:
    """How far each codebook moves, float32 ``[members]``, and a factor on all of them; nothing waits for a device."""
    _, quantizers, paces = zip(*members, strict=True)
    rates = _constant_rates(tuple(1.0 - quantizer.config.ema_decay for quantizer in quantizers), device)
    factor = paces[0]
    if len(set(paces)) > 1:  # those of several parameter groups
        rates, factor = _multiplied(rates, paces), 1.0
    elif isinstance(factor, Tensor):
        rates, factor = rates * factor, 1.0
    return rates if taken is None else rates * taken.to(device), factor


def _multiplied(rates: Tensor, paces: Sequence[Pace]) -> Tensor:
    """Each rate by its pace; numbers and tensors of the CPU are arguments of a kernel."""
    rates = rates.clone()
    of_each = rates.unbind()
    for kind in (float, Tensor):
        pairs = [(rate, pace) for rate, pace in zip(of_each, paces, strict=True) if isinstance(pace, kind)]
        if pairs:
            some, factors = map(list, zip(*pairs, strict=True))
            torch._foreach_mul_(some, factors)
    return rates


def _step(weights: tuple[Tensor, ...], quantizers: tuple[WeightQuantizer, ...], rates: Tensor, pace: float) -> None:
    """One EMA step of all codebooks of a device, by ``rates * pace``."""
    torch.ops.adq.foreach_codebook_step_(
        weights,
        [quantizer.scale for quantizer in quantizers],
        [quantizer.codebook for quantizer in quantizers],
        [quantizer.ema_count for quantizer in quantizers],
        [quantizer.ema_total for quantizer in quantizers],
        rates,
        pace,
        [quantizer.config.snap is not None for quantizer in quantizers],
        [],
    )


def _layers_of(model: nn.Module) -> list[QuantizedLayer]:
    from adq.nn.layers import QuantizedLayer

    return [module for module in model.modules() if isinstance(module, QuantizedLayer) and not module.packed]


@torch._disable_dynamo  # a compiled step leaves its graph for it, and need not be compiled anew for each learning rate
@torch.no_grad()
def step(model: nn.Module) -> None:
    """Update the codebooks of a model in training mode: for optimizers that are not torch's, after each step."""
    _update(_layers_of(model), None)


@torch._disable_dynamo
@torch.no_grad()
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    if not _LAYERS or _is_inner_step(optimizer):
        return
    with _LOCK:
        layers = list(_LAYERS)  # another thread may make or copy some meanwhile
    groups = optimizer.param_groups
    group_of = {id(parameter): i for i, group in enumerate(groups) for parameter in group["params"]}
    place = {key: i for i, key in enumerate(group_of)}  # processes must agree on the order
    parameter_of = {x: next((id(p) for p in _learned(x) if id(p) in place), None) for x in layers}
    held = sorted(((x, key) for x, key in parameter_of.items() if key is not None), key=lambda pair: place[pair[1]])
    pace_of = {i: _pace(groups[i]) for i in {group_of[key] for _, key in held}}
    # a fused optimizer steps even when its gradient scaler has found an infinity, and then changes nothing
    found_inf = getattr(optimizer, "found_inf", None)
    taken = None if found_inf is None else (found_inf == 0).reshape(())
    _update([x for x, _ in held], {id(x): pace_of[group_of[key]] for x, key in held}, taken)
    inputs = [x.input_quantizer for x in layers if x.training and not isinstance(x.input_quantizer, nn.Identity)]
    fresh = [quantizer for quantizer in inputs if not quantizer.trained and id(quantizer.start) in place]
    if fresh and (taken is None or bool(taken)):  # read back only until they have moved once
        for quantizer in fresh:
            quantizer.trained = True


def _is_inner_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer that holds the same weights steps through this one, and has yet to end.

    Seen on the stack, where torch's wrapper of each ``step`` calls the hook: a counter would be off for good once a
    step raises. ``ZeroRedundancyOptimizer`` is of this kind: its inner optimizer holds this process's share alone. A
    subclass that calls its parent's ``step`` is, too: torch wraps both once an optimizer of the parent was made.
    """
    frame: FrameType | None = sys._getframe(1)
    inside = False  # of the wrapper that has called
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == _OPTIMIZER_FILE:
            outer = (frame.f_locals.get("args") or (optimizer,))[0]
            if inside and _parameters(optimizer) <= _parameters(outer):
                return True
            inside = True
        frame = frame.f_back
    return False


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


register_optimizer_step_post_hook(_after_step)


def prepare_together(model: nn.Module) -> None:
    """From now on quantize the weights of all layers of ``model`` at once, when it begins a forward pass."""
    model.register_forward_pre_hook(_prepare)
    model.register_forward_hook(_release, always_call=True)


def _can_prepare(quantizer: WeightQuantizer | nn.Identity, weight: Tensor) -> bool:
    return (
        not isinstance(quantizer, nn.Identity)
        and quantizer.enabled
        and quantizer.config.update in ("ema", "frozen")
        and type(weight) in (nn.Parameter, Tensor)  # not one that a parallel strategy has sharded
        and weight.device == quantizer.codebook.device  # nor one that comes only when its layer is called
        and weight.numel() > 0
        and not (weight.is_inference() or quantizer.codebook.is_inference())
    )


def _prepare(model: nn.Module, args: Any) -> None:
    if not torch.compiler.is_compiling():  # a compiled or exported graph holds each layer's own lookup
        _quantize_together(model)


@torch.no_grad()
def _quantize_together(model: nn.Module) -> None:
    from adq.nn.weight import Prepared

    if model not in _LAYERS_OF:
        # without the model, should it be a layer itself: an entry that holds its own key is never dropped
        _LAYERS_OF[model] = [weakref.ref(layer) for layer in _layers_of(model) if layer is not model]
    groups: dict[torch.device, dict[int, tuple[Tensor, WeightQuantizer]]] = {}
    for layer in (reference() for reference in _LAYERS_OF[model]):
        if layer is None or layer.packed:  # since the first pass
            continue
        weight, quantizer = layer.weight, layer.weight_quantizer
        if _can_prepare(quantizer, weight):
            groups.setdefault(weight.device, {})[id(quantizer)] = (weight, quantizer)  # type: ignore[assignment]
    for group in groups.values():
        members = group.values()
        if len(members) == 1:
            continue
        weights, quantizers = zip(*members, strict=True)
        scales, codebooks = [q.scale for q in quantizers], [q.codebook for q in quantizers]
        quantized = torch.ops.adq.foreach_codebook_quantize(weights, scales, codebooks)
        for weight, quantizer, w_q in zip(weights, quantizers, quantized, strict=True):
            quantizer.prepared = Prepared.make(weight, quantizer.codebook, w_q)


def _release(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for layer in (reference() for reference in _LAYERS_OF.get(model, ())):
        if layer is not None and not isinstance(layer.weight_quantizer, nn.Identity):
            prepared = layer.weight_quantizer.prepared
            if prepared is not None and prepared.is_own():
                layer.weight_quantizer.prepared = None


OWN_HOOKS = (_prepare, _release)
"""Forward hooks that quantized models have."""

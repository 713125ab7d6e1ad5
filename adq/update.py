"""When codebooks move: once per optimizer step, after it, in training mode only.

Quantized layers enter a weak registry when they are built, copied or unpickled. A global post-step hook of
torch's optimizers updates those whose weight the stepping optimizer holds. So gradient accumulation gives
one update a step, a step that a gradient scaler skips gives none, a forward pass under ``no_grad`` or
recomputed by activation checkpointing changes nothing, and a user's training loop stays as it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from adq.nn.layers import QuantizedLayer

_LAYERS: weakref.WeakSet[QuantizedLayer] = weakref.WeakSet()


def register(layer: QuantizedLayer) -> None:
    """Enter a layer whose codebook shall follow its weight."""
    _LAYERS.add(layer)


def unregister(layer: nn.Module) -> None:
    """Take out a layer that is a float one again."""
    _LAYERS.discard(layer)  # type: ignore[arg-type]


def _pace(group: dict[str, Any]) -> float:
    """Learning rate of a parameter group over its peak, at most 1; the schedulers of torch record the peak."""
    peak = group.get("max_lr", group.get("initial_lr", group["lr"]))
    return min(1.0, float(group["lr"]) / float(peak)) if float(peak) > 0.0 else 1.0


def _update(layers: Iterable[QuantizedLayer], paces: dict[int, float] | None) -> None:
    done = set()  # layers that share a weight share a quantizer
    for layer in layers:
        quantizer = layer.weight_quantizer
        pace = 1.0 if paces is None else paces.get(id(layer.weight))
        if pace is None or not layer.training or id(quantizer) in done or isinstance(quantizer, nn.Identity):
            continue
        done.add(id(quantizer))
        quantizer.update_(layer.weight, pace)


def step(model: nn.Module) -> None:
    """Update the codebooks of a model in training mode: for optimizers that are not torch's, after each step."""
    from adq.nn.layers import QuantizedLayer

    _update((module for module in model.modules() if isinstance(module, QuantizedLayer)), None)


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # a fused optimizer steps even when its gradient scaler has found an infinity, and then changes nothing
    skipped = getattr(optimizer, "found_inf", None)
    if _LAYERS and not (skipped is not None and bool(skipped)):
        paces = {id(p): _pace(group) for group in optimizer.param_groups for p in group["params"]}
        _update(list(_LAYERS), paces)


register_optimizer_step_post_hook(_after_step)

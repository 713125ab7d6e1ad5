"""Batches as models and loss functions take them: where they lie, how many samples they hold, running on one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_device(model: nn.Module) -> torch.device:
    """Device of the first parameter or buffer, CPU if there is none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch of tensors in tuples, lists and mappings on another device; what arrives on the CPU is there."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=device.type != "cpu")
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [to_device(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def batch_size(batch: Any) -> int:
    """Samples of a batch as :func:`forward_batch` takes it.

    Targets that are a tensor decide by their length: inputs may have another axis first, as sequences do. A list or
    tuple counts by its own length, as one of images does, or by the one its tensors have in common, as the targets of
    several tasks do; of these the length that targets and inputs agree on. Of a mapping it is what most values have.

    Raises:
        ValueError: it has neither tensors nor lists.
    """
    inputs, targets = (*batch, None)[:2] if isinstance(batch, (tuple, list)) and batch else (batch, None)
    own, of_targets = _lengths(inputs), _lengths(targets)
    if isinstance(targets, Tensor) and of_targets:
        return of_targets[0]
    for length in (*(length for length in of_targets if length in own), *of_targets, *own):
        return length
    raise ValueError(f"adq: a batch of {type(batch).__name__} has no tensor among its inputs")


def _lengths(part: Any) -> list[int]:
    """How many samples a part of a batch may have, the likeliest first."""
    if isinstance(part, Tensor):
        return [len(part)] if part.dim() else []
    if isinstance(part, Mapping):
        votes = Counter(length for value in part.values() for length in _lengths(value)[:1])
        return sorted(votes, key=lambda length: (votes[length], length), reverse=True)
    if not isinstance(part, (tuple, list)) or not part:
        return []
    shared = {len(value) for value in part if isinstance(value, Tensor) and value.dim()}
    return [len(part), *shared] if len(shared) == 1 else [len(part)]


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Run a model on the inputs of a batch: a tensor, ``(inputs, ...)``, or a mapping of keyword arguments.

    A compiled one runs as it is written: graphs compiled before know nothing of the caller's hooks.
    """
    with torch.compiler.set_stance("force_eager"):
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(batch[0] if isinstance(batch, (tuple, list)) else batch)

"""Calibration: thresholds, and batch-norm statistics, from what the layers see."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adq.batch_norm import correct_batch_norm_, float_network
from adq.convert import (
    activation_quantizers,
    forward_batch,
    model_device,
    quantized_layers,
    refuse_packed,
    to_device,
    weight_quantizers,
)

SAMPLES_PER_BATCH = 2**15
MAX_SAMPLES = 2**18


class _Sampler:
    """Keeps a bounded, reproducible sample of a layer's inputs."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, quantizer: nn.Module, args: tuple[Tensor]) -> None:
        values = args[0].detach().reshape(-1)
        if values.numel() > SAMPLES_PER_BATCH:
            index = torch.randint(values.numel(), (SAMPLES_PER_BATCH,), generator=self.generator)
            values = values[index.to(values.device)]
        self.parts.append(values.float())
        if sum(part.numel() for part in self.parts) > MAX_SAMPLES:
            self.parts = [torch.cat(self.parts)[::2]]


def calibrate_(model: nn.Module, batches: Iterable[Any], *, batch_norm: bool = True, force: bool = False) -> nn.Module:
    """Set every activation quantizer's thresholds from the inputs its layer sees in the float model.

    Runs the model over the batches in evaluation mode with all quantizers off, then corrects the running statistics
    of batch norms for what quantization changes (:func:`correct_batch_norm_`). It must come before training; after
    training it would throw the learned thresholds away, so it then refuses unless ``force`` is set.

    Args:
        model: from :func:`quantize_`.
        batches: iterable of batches: an input tensor, ``(input, ...)``, or a mapping of keyword arguments; run
            through more than once, so those of an iterator are kept in memory.
        batch_norm: correct batch norms, unless the model has been trained: it then has statistics of its own.
        force: calibrate a trained model anew.

    Returns:
        The same model.

    Raises:
        ValueError: not quantized, no batches, NaN or infinite inputs (the layer is named).
        RuntimeError: the model has been trained since its calibration.
    """
    if not quantized_layers(model):
        raise ValueError("adq: the model is not quantized; call adq.quantize_(model) first")
    refuse_packed(model, "calibration")
    trained = any(int(quantizer.steps) > 0 for _, quantizer in weight_quantizers(model).values())
    if trained and not force:
        raise RuntimeError(
            "adq: the model has been trained since it was calibrated, and calibrating again would discard its learned "
            "thresholds; calibrate before training, or pass force=True"
        )
    batches = list(batches) if isinstance(batches, Iterator) else batches
    quantizers = activation_quantizers(model)
    samplers = {name: _Sampler() for name in quantizers}
    hooks = [quantizers[name].register_forward_pre_hook(sampler) for name, sampler in samplers.items()]
    try:
        _run(model, batches)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = [name for name, sampler in samplers.items() if not sampler.parts]
    if unseen:
        warnings.warn(f"adq: not calibrated, never reached by the batches: {', '.join(unseen)}", stacklevel=2)
    for name, sampler in samplers.items():
        if sampler.parts:
            quantizers[name].calibrate_(torch.cat(sampler.parts))
    return correct_batch_norm_(model, batches) if batch_norm and not trained else model


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    device, count = model_device(model), 0
    with float_network(model):
        for batch in batches:
            forward_batch(model, to_device(batch, device))
            count += 1
    if count == 0:
        raise ValueError("adq: no batches to calibrate with")

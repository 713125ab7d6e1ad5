"""Calibration: thresholds, and batch-norm statistics, from what the layers see."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adq.batch_norm import correct_batch_norm_, float_network
from adq.batches import forward_batch, model_device, to_device
from adq.convert import activation_quantizers, is_trained, quantized_layers, refuse_packed, ways_out
from adq.distributed import gather, in_order, world

SAMPLES_PER_BATCH = 2**15
MAX_SAMPLES = 2**18


Parts = list[list[Tensor]]
"""Of each batch, values ``[n]`` of each call of a layer."""


class _Sampler:
    """Keeps a bounded sample of a layer's inputs, the same however the batches are spread over processes.

    Of each call at most ``SAMPLES_PER_BATCH`` values, in an order drawn by a generator that knows the batch's number
    alone; of those every ``stride``-th, by the smallest power of two that leaves at most ``MAX_SAMPLES`` of all
    batches. In the order of memory a stride would pick out features or pixels.
    """

    def __init__(self) -> None:
        self.parts: Parts = []
        self.stride = 1
        self.finite: Tensor | bool = True

    def begin(self, batch: int) -> None:
        """A batch is about to come; ``batch`` is its number among those of all processes."""
        self.parts.append([])
        self.generator = torch.Generator("cpu").manual_seed(batch)

    def __call__(self, quantizer: nn.Module, args: tuple[Tensor]) -> None:
        values = args[0].detach().reshape(-1)
        self.finite = values.isfinite().all() & self.finite  # of all of them, and not read back yet
        count = values.numel()
        if count > SAMPLES_PER_BATCH:
            order = torch.randint(count, (SAMPLES_PER_BATCH,), generator=self.generator, device="cpu")
        else:
            order = torch.randperm(count, generator=self.generator, device="cpu")
        self.parts[-1].append(values[order[:: self.stride].to(values.device)].float())
        self.parts, self.stride = _thinned(self.parts, self.stride)

    def pooled(self, name: str) -> Tensor | None:
        """The sample of the batches of all processes, in their order, ``[n]`` on the CPU; None if no input came.

        Raises:
            ValueError: an input of the layer ``name`` was not finite.
        """
        shares = gather(
            lambda: (self.stride, [[part.cpu() for part in calls] for calls in self.parts], bool(self.finite))
        )
        if not all(finite for _, _, finite in shares):
            raise ValueError(f"adq: NaN or infinity among the observed inputs (layer {name!r})")
        stride = max(own for own, _, _ in shares)
        batches = in_order([[[p[:: stride // own] for p in calls] for calls in parts] for own, parts, _ in shares])
        values = [part for calls in _thinned(batches, stride)[0] for part in calls if len(part)]
        return torch.cat(values) if values else None


def _thinned(parts: Parts, stride: int) -> tuple[Parts, int]:
    """Every second value, until there are few enough; and the stride that they then have."""
    while sum(len(part) for calls in parts for part in calls) > MAX_SAMPLES and stride < SAMPLES_PER_BATCH:
        parts, stride = [[part[::2].contiguous() for part in calls] for calls in parts], 2 * stride
    return parts, stride


def calibrate_(model: nn.Module, batches: Iterable[Any], *, batch_norm: bool = True, force: bool = False) -> nn.Module:
    """Set every activation quantizer's thresholds from the inputs its layer sees in the float model.

    Runs the model over the batches in evaluation mode with all quantizers off, then corrects the running statistics
    of batch norms for what quantization changes (:func:`correct_batch_norm_`). It must come before training; after
    training it would throw the learned thresholds away, so it then refuses unless ``force`` is set.

    In a process group every process calls it, with the model not yet wrapped and its own share of the batches
    (:func:`adq.distributed.share`); all come to the result of one process with all batches, bit for bit.

    Args:
        model: from :func:`quantize_`.
        batches: iterable of batches: an input tensor, ``(input, ...)``, or a mapping of keyword arguments; run
            through more than once, so those of an iterator are kept in memory.
        batch_norm: correct batch norms, unless the model has been trained: it then has statistics of its own.
        force: calibrate a trained model anew.

    Returns:
        The same model.

    Raises:
        ValueError: not quantized, no batches, NaN or infinite inputs (the layer is named); no thresholds are changed
            then.
        RuntimeError: the model has been trained since its calibration; of one with weights in float a file does not
            tell.
    """
    if not quantized_layers(model):
        raise ValueError("adq: the model is not quantized; call adq.quantize_(model) first")
    refuse_packed(model, "calibration")
    quantizers = activation_quantizers(model)
    trained = is_trained(model)
    if trained and not force and any(quantizer.is_calibrated for quantizer in quantizers.values()):
        raise RuntimeError(
            "adq: the model has been trained since it was calibrated, and calibrating again would discard its learned "
            "thresholds; calibrate before training, or pass force=True"
        )
    batches = list(batches) if isinstance(batches, Iterator) else batches
    samplers = {name: _Sampler() for name in quantizers}
    hooks = [quantizers[name].register_forward_pre_hook(sampler) for name, sampler in samplers.items()]
    try:
        counts = gather(lambda: _run(model, batches, list(samplers.values())))
    finally:
        for hook in hooks:
            hook.remove()
    if sum(counts) == 0:
        raise ValueError("adq: no batches to calibrate with")
    samples = {name: sampler.pooled(name) for name, sampler in samplers.items()}
    unseen = [name for name, values in samples.items() if values is None]
    if unseen:
        warnings.warn(
            f"adq: not calibrated, never reached by the batches: {', '.join(unseen)}; they refuse to run in training: "
            f"{ways_out(unseen)}; a layer whose weight is read by another module, and which is not called itself, is "
            "not quantized there",
            stacklevel=2,
        )
    fitted = {
        name: quantizers[name].fit(values.to(quantizers[name].start.device))
        for name, values in samples.items()
        if values is not None
    }
    before = {name: copy.deepcopy(quantizers[name].state_dict()) for name in fitted}
    for name, thresholds in fitted.items():
        quantizers[name].assign_(thresholds)
    if batch_norm and not trained:
        try:
            correct_batch_norm_(model, batches)
        except BaseException:
            for name, state in before.items():
                quantizers[name].load_state_dict(state)
            raise
    return model


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any], samplers: list[_Sampler]) -> int:
    """Show the samplers what this process's batches give; the number of batches."""
    device, (rank, size), count = model_device(model), world(), 0
    with float_network(model):
        for batch in batches:
            for sampler in samplers:
                sampler.begin(rank + count * size)
            forward_batch(model, to_device(batch, device))
            count += 1
    return count

"""Batch-norm statistics of a quantized network.

Quantization changes the mean and the variance of what each batch norm sees; with the float network's running statistics
that alone costs several points of accuracy, more than the rounding itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from adq.batches import forward_batch, model_device, to_device
from adq.convert import evaluating, is_trained, quantizers_enabled, refuse_packed, unwrapped
from adq.distributed import pool

Statistics = tuple[Tensor, Tensor]
"""Mean and variance of each channel."""
Weighted = tuple[int, Tensor, Tensor]
"""Number of samples, and mean and variance of each channel, on the CPU."""
SAVED = ("float_running_mean", "float_running_var")
"""Names in a file, after the batch norm's."""
LEAST_VARIANCE = 1e-5
"""Variance of normalised values that counts beside none: a channel that hardly varies in a batch is left alone."""


@dataclass(frozen=True)
class _Replaced:
    """Statistics of the float network, kept on a batch norm for as long as those that replaced them are in place."""

    float_statistics: Statistics
    corrected: Statistics


def _named_batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    modules = unwrapped(model).named_modules()
    return {name: norm for name, norm in modules if isinstance(norm, BatchNorm) and norm.running_mean is not None}


def _batch_norms(model: nn.Module) -> list[BatchNorm]:
    return list(_named_batch_norms(model).values())


def _running(norm: BatchNorm) -> Statistics:
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


def _assign(norm: BatchNorm, statistics: Statistics) -> None:
    for buffer, value in zip(_running(norm), statistics, strict=True):
        buffer.copy_(value)


def _copy(statistics: Statistics) -> Statistics:
    return statistics[0].clone(), statistics[1].clone()


def _replaced(norm: BatchNorm) -> Statistics | None:
    """The running statistics before they were corrected; None if they were not, or training has moved them since."""
    replaced, present = getattr(norm, "_adq_replaced", None), _running(norm)
    if replaced is None:
        return None
    if not all(torch.equal(now, then.to(now)) for now, then in zip(present, replaced.corrected, strict=True)):
        return None
    mean, var = replaced.float_statistics
    return mean.to(present[0]), var.to(present[1])


def _float_statistics(norm: BatchNorm) -> Statistics:
    """The running statistics before they were corrected; the present ones if training has moved them since."""
    return _replaced(norm) or _copy(_running(norm))


def saved_statistics(model: nn.Module) -> dict[str, Tensor]:
    """What a model file holds besides a state dict: float statistics in place of which corrected ones are."""
    found = {name: _replaced(norm) for name, norm in _named_batch_norms(model).items()}
    return {
        f"{name}.{key}": tensor
        for name, statistics in found.items()
        if statistics is not None
        for key, tensor in zip(SAVED, statistics, strict=True)
    }


def restore_statistics_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """The other way: take over float statistics that a file has, for the running statistics already loaded from it."""
    for name, norm in _named_batch_norms(model).items():
        if f"{name}.{SAVED[0]}" in state:
            mean, var = (state[f"{name}.{key}"].clone() for key in SAVED)
            norm._adq_replaced = _Replaced((mean, var), _copy(_running(norm)))  # type: ignore[assignment]


def expected_statistics(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What :func:`restore_statistics_` finds in a file, with the shapes that it must have."""
    return {
        f"{name}.{key}": tensor
        for name, norm in _named_batch_norms(model).items()
        if any(f"{name}.{key}" in state for key in SAVED)
        for key, tensor in zip(SAVED, _running(norm), strict=True)
    }


@contextmanager
def float_statistics(model: nn.Module) -> Iterator[None]:
    """The float network's batch-norm statistics for a while, where :func:`correct_batch_norm_` has replaced them."""
    norms = _batch_norms(model)
    before = [_copy(_running(norm)) for norm in norms]
    try:
        for norm in norms:
            _assign(norm, _float_statistics(norm))
        yield
    finally:
        for norm, statistics in zip(norms, before, strict=True):
            _assign(norm, statistics)


@contextmanager
def float_network(model: nn.Module, activations: bool = False) -> Iterator[None]:
    """A quantized model as the float network it was made from, in evaluation mode, for a while.

    With ``activations`` inputs stay quantized where they are: without its learned thresholds a trained network is
    another function.
    """
    inputs = None if activations else False
    with evaluating(model), float_statistics(model), quantizers_enabled(model, weights=False, activations=inputs):
        yield


def _moments(x: Tensor) -> Statistics:
    """Mean and variance of each channel of ``[N, C, ...]``; the variance is NaN where it is not finite."""
    var, mean = torch.var_mean(x.float(), [d for d in range(x.dim()) if d != 1], correction=0)
    return mean, torch.where(var.isfinite(), var, torch.nan)


def _weighted(statistics: Statistics, samples: int) -> Weighted:
    return samples, statistics[0].cpu(), statistics[1].cpu()


def _input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a batch norm is called with."""
    return args[0] if args else kwargs["input"]


def _mean(batches: list[Weighted], name: str) -> Statistics:
    """Mean over all samples, added up in the order of the batches; ValueError names the batch norm."""
    mean, var = torch.zeros_like(batches[0][1]), torch.zeros_like(batches[0][2])
    for samples, batch_mean, batch_var in batches:
        mean += batch_mean * samples
        var += batch_var * samples
    if not bool(mean.isfinite().all() and var.isfinite().all()):
        raise ValueError(
            f"adq: NaN or infinity among the inputs of batch norm {name!r}, or an overflow of their squares"
        )
    total = sum(samples for samples, _, _ in batches)
    return mean / total, var / total


class _Correction:
    """What the calibration batches say about one batch norm, beside that of the reference network."""

    def __init__(self, name: str, norm: BatchNorm, reference: BatchNorm | None) -> None:
        self.name, self.norm = name, norm
        self.reference = norm if reference is None else reference
        self.start = _float_statistics(norm) if reference is None else _copy(_running(reference))
        self.seen: deque[Statistics] = deque()
        self.fitted: list[Weighted] = []

    def observe(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the reference's pass."""
        x = _input(args, kwargs)
        if len(x):
            _assign(self.norm, self.start)
            self.seen.append(_moments(x))

    def correct(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the quantized pass: normalise to the mean and variance that the reference has here."""
        x = _input(args, kwargs)
        if not len(x):
            return
        (mean, var), (mean_float, var_float), (start_mean, start_var) = _moments(x), self.seen.popleft(), self.start
        divisor = start_var + self.norm.eps
        ratio = (var + LEAST_VARIANCE * divisor) / (var_float + LEAST_VARIANCE * divisor)
        new_var = (start_var + divisor * (ratio - 1)).clamp_min(0)
        ratio = (new_var + self.norm.eps) / divisor  # of the squares by which the two networks divide
        fitted = mean - (mean_float - start_mean) * ratio.sqrt(), new_var
        _assign(self.norm, fitted)
        self.fitted.append(_weighted(fitted, len(x)))

    def take(self) -> list[Weighted]:
        """What the last batch says, call by call."""
        fitted, self.fitted = self.fitted, []
        return fitted

    def finish(self, mean: Statistics) -> None:
        """Put the mean over all samples in place, and remember what was there."""
        _assign(self.norm, mean)
        self.norm._adq_replaced = _Replaced(self.start, _copy(_running(self.norm)))  # type: ignore[assignment]


class _Estimate:
    """What the batches say about one batch norm, which normalises each by its own statistics, as in training.

    In evaluation mode: ``SyncBatchNorm`` would wait for the other processes, whose batches may be fewer.
    """

    def __init__(self, name: str, norm: BatchNorm) -> None:
        self.name, self.norm = name, norm
        self.seen: list[Weighted] = []

    def observe(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the forward pass."""
        x = _input(args, kwargs)
        if not len(x):
            return
        values = x.numel() // x.shape[1]
        if values == 1:
            raise ValueError(f"adq: a batch has a single value for each channel of batch norm {self.name!r}")
        mean, var = _moments(x)
        _assign(self.norm, (mean, var))
        self.seen.append(_weighted((mean, var * (values / (values - 1))), len(x)))

    def take(self) -> list[Weighted]:
        """What the last batch says, call by call."""
        seen, self.seen = self.seen, []
        return seen

    def finish(self, mean: Statistics) -> None:
        """Put the mean over all samples in place."""
        _assign(self.norm, mean)


def _finish(norms: Sequence[_Correction | _Estimate], found: list[list[list[Weighted]]]) -> None:
    """Put in place what was found batch by batch, norm by norm, call by call: of all norms, or of none."""
    calls = [[call for calls in batches for call in calls] for batches in zip(*found, strict=True)]
    means = [(norm, _mean(seen, norm.name)) for norm, seen in zip(norms, calls, strict=True) if seen]
    for norm, mean in means:
        norm.finish(mean)


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    before = [(norm, _copy(_running(norm))) for norm in _batch_norms(model)]
    try:
        yield
    except BaseException:
        for norm, statistics in before:
            _assign(norm, statistics)
        raise


@torch.no_grad()
def correct_batch_norm_(model: nn.Module, batches: Iterable[Any], reference: nn.Module | None = None) -> nn.Module:
    """Correct running statistics for what quantization changes, before training.

    Each batch runs through the float network (all quantizers off) and through the quantized one. Every running mean
    and variance is changed so that the quantized network's normalised values have the mean and variance that the
    float network's have on the same batch, as far as a variance that is not negative gives it. Only differences count:
    the batches need not follow the distribution that the float network's statistics were taken over (augmented images,
    say), and where nothing is quantized nothing changes. A second call, after bits were allocated say, starts from the
    float network's statistics again: they are kept with the model, in copies of it and in files of :func:`adq.save`,
    though not in its state dict.
    In a process group every process gives its share of the batches, as for :func:`adq.calibrate_`.

    Args:
        model: from :func:`adq.quantize_`, calibrated.
        batches: iterable of batches: an input tensor, ``(input, ...)``, or a mapping of keyword arguments.
        reference: network in the float network's place, on the same device: what the model begins from, as
            :func:`adq.start_from_` has it. It is left as it is.

    Returns:
        The same model; unchanged if anything fails. Networks without batch norm stay as they are.

    Raises:
        ValueError: no batches, NaN or infinite inputs (the batch norm is named), or a reference with other batch norms.
        RuntimeError: the model has been trained and no reference is given.
    """
    if reference is None:
        refuse_packed(model, "running the float network")
        if is_trained(model):
            raise RuntimeError(
                "adq: the model has been trained, so its float network is no measure any more; pass reference=, the "
                "network before its widths were changed, or call adq.reestimate_batch_norm_ with training batches"
            )
    norms = _named_batch_norms(model)
    others = {} if reference is None else _named_batch_norms(reference)
    if reference is not None and norms.keys() != others.keys():
        raise ValueError(
            f"adq: only one of model and reference has the batch norm {min(norms.keys() ^ others.keys())!r}"
        )
    corrections = [_Correction(name, norm, others.get(name)) for name, norm in norms.items()]
    if not corrections:
        return model
    with evaluating(model), _restored_on_error(model):
        found = pool(lambda: [_correct(model, reference, batch, corrections) for batch in batches])
        if not found:
            raise ValueError("adq: no batches to correct batch-norm statistics with")
        _finish(corrections, found)
    return model


def _correct(
    model: nn.Module, reference: nn.Module | None, batch: Any, corrections: list[_Correction]
) -> list[list[Weighted]]:
    """Run a batch through both networks; what it says of each batch norm."""
    batch = to_device(batch, model_device(model))
    in_float = quantizers_enabled(model, weights=False, activations=False)
    with (
        in_float if reference is None else evaluating(reference),
        _hooked((c.reference, c.observe) for c in corrections),
    ):
        forward_batch(model if reference is None else reference, batch)
    with _hooked((c.norm, c.correct) for c in corrections):
        forward_batch(model, batch)
    return [correction.take() for correction in corrections]


@torch.no_grad()
def reestimate_batch_norm_(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Replace running statistics by means over batches, for the network as it is now: after training.

    The running averages of training remember weights that have moved on since. Everything else is in
    evaluation mode. In a process group every process gives its share of the batches, as for :func:`adq.calibrate_`.

    Args:
        model: any network with batch norms, quantized or not.
        batches: from the distribution that the network was trained on, augmentation included: images that it has
            fitted look different to it unaugmented. Forms as for :func:`correct_batch_norm_`.

    Returns:
        The same model; unchanged if anything fails.

    Raises:
        ValueError: no batches; NaN or infinite inputs, or a single value a channel, which has no variance (the batch
            norm is named).
    """
    estimates = [_Estimate(name, norm) for name, norm in _named_batch_norms(model).items()]
    if not estimates:
        return model
    with evaluating(model), _restored_on_error(model):
        with _hooked((e.norm, e.observe) for e in estimates):
            found = pool(lambda: [_estimate(model, batch, estimates) for batch in batches])
        if not found:
            raise ValueError("adq: no batches to estimate batch-norm statistics with")
        _finish(estimates, found)
    return model


def _estimate(model: nn.Module, batch: Any, estimates: list[_Estimate]) -> list[list[Weighted]]:
    """Run a batch through the network; what it says of each batch norm."""
    forward_batch(model, to_device(batch, model_device(model)))
    return [estimate.take() for estimate in estimates]

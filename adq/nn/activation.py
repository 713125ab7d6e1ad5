"""The activation quantizer module: N2UQ with learned thresholds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adq.config import ActivationConfig
from adq.functional import quantize_activation
from adq.nn.dtype import keeping_dtype
from adq.ops import ACTIVATION_RANGE
from adq.thresholds import Thresholds, averaged, fit_thresholds, num_intervals, resampled, uniform_bits

_FITTED = ("start", "interval", "in_scale", "out_scale", "offset")


class ActivationQuantizer(nn.Module):
    """Quantizes and dequantizes a layer's input with learned thresholds (arXiv 2111.14826).

    Parameters (float32): ``start`` ``[1]``, ``interval`` ``[2^bits - 1]``, ``in_scale`` ``[1]``, ``out_scale`` ``[1]``.
    With ``thresholds="uniform"``, and above 5 bits, the quantizer is uniform: ``interval`` is then a constant buffer
    ``[1]``, by which a state dict of another width is known and refused, and the one learned step is ``interval /
    in_scale``; learning both would learn one number twice, the first with a gradient ``steps`` times too large for its
    size. Buffers: ``offset`` ``[1]``, which puts zero on a
    level for signed inputs, and ``calibrated``, 1 or 0 (a float, so that averages of models can be taken). All keep
    their dtype when the model is cast. A quantizer refuses to run before it has been calibrated: its start values say
    nothing about the inputs. Set ``enabled = False`` to let inputs through untouched. ``trained`` tells, in this
    process, whether an optimizer has moved the thresholds since, or they were taken over from a trained network.

    Args:
        config: bits and sign.
        name: the layer's qualified name, for messages.
    """

    start: nn.Parameter
    interval: Tensor
    in_scale: nn.Parameter
    out_scale: nn.Parameter
    offset: Tensor
    calibrated: Tensor
    trained: bool = False

    def __init__(self, config: ActivationConfig, name: str = "") -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.enabled = True
        interval = torch.full((num_intervals(config),), ACTIVATION_RANGE / config.steps, dtype=torch.float32)
        if config.is_uniform:
            self.register_buffer("interval", interval)
        else:
            self.interval = nn.Parameter(interval)
        self.start = nn.Parameter(torch.zeros(1, dtype=torch.float32))
        self.in_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.out_scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.float32))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.float32))
        self._ready = False

    @property
    def is_calibrated(self) -> bool:
        """Whether thresholds have been set from observed inputs; known without reading the device."""
        return self._ready

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, any shape and float dtype; same shape, dtype and strides back."""
        if not self.enabled:
            return x
        if not self._ready and (torch.compiler.is_compiling() or not self._read_calibrated()):
            raise RuntimeError(
                f"adq: the activation quantizer of layer {self.name!r} is not calibrated; "
                "call adq.calibrate_(model, batches) before training or evaluation, with batches that reach the layer "
                f"in evaluation mode, or leave it in float by overrides={{{self.name!r}: None}}"
            )
        return quantize_activation(
            x, self.start, self.interval, self.in_scale, self.out_scale, self.offset, self.config.steps
        )

    def _read_calibrated(self) -> bool:
        """Whether the buffer says so, as where values were copied tensor by tensor; reads the device."""
        self._ready = not self.calibrated.is_meta and bool(self.calibrated)
        return self._ready

    @property
    def level_size(self) -> float:
        """What a level is worth: ``out_scale * D``; q means ``level_size * (q - zero_level)``. Reads the device."""
        return self.out_scale.item() * ACTIVATION_RANGE / self.config.steps

    @property
    def zero_position(self) -> float:
        """The level that stands for zero, not rounded. Reads the device."""
        return self.offset.item() * self.config.steps / ACTIVATION_RANGE

    @property
    def zero_level(self) -> int:
        """The level that stands for zero. Reads the device."""
        return self.zero_of(self.offset)

    def zero_of(self, offset: Tensor) -> int:
        """The level that would stand for zero with this ``offset``. Reads the device."""
        return round(offset.item() * self.config.steps / ACTIVATION_RANGE)

    @torch.no_grad()
    def levels(self, x: Tensor) -> Tensor:
        """The levels of x, uint8 of the same shape and strides; NaN has level 0."""
        return torch.ops.adq.threshold_levels(x, self.start, self.interval, self.in_scale, self.config.steps)

    @torch.no_grad()
    def calibrate_(self, values: Tensor) -> None:
        """Set the thresholds from a sample of inputs, float32 ``[n]``; ValueError names the layer."""
        self.assign_(self.fit(values))

    @torch.no_grad()
    def fit(self, values: Tensor) -> Thresholds:
        """Thresholds for a sample of inputs, float32 ``[n]``; nothing is changed yet. ValueError names the layer."""
        try:
            return fit_thresholds(values, self.config)
        except ValueError as error:
            raise ValueError(f"{error} (layer {self.name!r})") from error

    @torch.no_grad()
    def assign_(self, fitted: Thresholds) -> None:
        """Set fitted thresholds."""
        for name in _FITTED:
            getattr(self, name).copy_(getattr(fitted, name))
        self.calibrated.fill_(1.0)
        self._ready = True
        self.trained = False

    @torch.no_grad()
    def take_over_(self, *others: ActivationQuantizer) -> None:
        """Follow the curve that another quantizer, of any width, has learned, or the mean of several; ValueError names
        the layer."""
        learned = [(Thresholds(*(getattr(other, name).detach() for name in _FITTED)), other.config) for other in others]
        try:
            mean = averaged([resampled(thresholds, config, self.config) for thresholds, config in learned])
        except ValueError as error:
            raise ValueError(f"{error} (layer {self.name!r})") from error
        self.assign_(mean)
        self.trained = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keeping_dtype(fn), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a float checkpoint: thresholds stay as they are
        saved = state_dict.get(prefix + "interval")
        bits = self.config.bits if saved is None or not self.config.is_uniform else uniform_bits(saved)
        if bits not in (None, self.config.bits):
            args[-1].append(  # what load_state_dict raises
                f"adq: the inputs of layer {self.name!r} have {self.config.bits} bits, and {bits} in the state dict"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = bool(self.calibrated)

    def extra_repr(self) -> str:
        state = "" if self._ready else ", not calibrated"
        return f"bits={self.config.bits}{state}{'' if self.enabled else ', disabled'}"

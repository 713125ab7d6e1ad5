"""The weight quantizer module: a codebook that adapts online."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from adq.codebook import Fit, fit
from adq.config import WeightConfig
from adq.functional import code_bits, learned_lookup, learned_step, quantize_weight
from adq.nn.dtype import keeping_dtype
from adq.reference import decision_thresholds, snap_codebook
from adq.sharded import is_sharded


@dataclass(frozen=True)
class Prepared:
    """A weight quantized ahead of its layer's forward pass, together with all others (:mod:`adq.update`).

    It is for the thread that prepared it: another one may run the same model, on a stream of its own.
    """

    weight: Tensor
    state: tuple[int, int, int]
    w_q: Tensor
    thread: int

    @classmethod
    def make(cls, weight: Tensor, codebook: Tensor, w_q: Tensor) -> Prepared:
        """Remember what ``w_q`` was made from."""
        return cls(weight, cls._state(weight, codebook), w_q, get_ident())

    def is_own(self) -> bool:
        """Whether this thread has prepared it."""
        return self.thread == get_ident()

    def of(self, weight: Tensor, codebook: Tensor) -> Tensor | None:
        """``w_q``, unless it is of another thread or weight, or weight or codebook have changed since."""
        same = weight is self.weight and self.is_own() and self._state(weight, codebook) == self.state
        return self.w_q if same else None

    @staticmethod
    def _state(weight: Tensor, codebook: Tensor) -> tuple[int, int, int]:
        return weight._version, weight.data_ptr(), codebook._version  # ``weight.data = x`` counts no version


class WeightQuantizer(nn.Module):
    """Maps each weight to ``scale * c[code]``, c the nearest level of the layer's codebook.

    The forward pass only looks up; the codebook moves after each step of torch's optimizers (see
    :mod:`adq.update`). Its length tells the bit-width, so a state dict alone restores it.

    Buffers (float32 unless said): ``codebook`` ``[K]`` (a parameter with ``update="gradient"``), ``ema_count`` and
    ``ema_total`` ``[K]`` (N and M), ``scale`` (broadcasts against the weight; a parameter with ``update="step"``),
    ``steps`` int64, those of the optimizer until now. They keep their dtype when the model is cast.
    Set ``enabled = False`` to let weights through untouched.

    Args:
        weight: the layer's weight; the codebook is fitted to it unless ``fitted`` is False.
        config: see :class:`adq.WeightConfig`.
        axis: axis of the output channels.
        name: the layer's qualified name, for messages.
        pinned: the allocator keeps this layer's width.
        fitted: False leaves a placeholder that a state dict must fill.
    """

    codebook: Tensor
    scale: Tensor
    ema_count: Tensor
    ema_total: Tensor
    steps: Tensor
    prepared: Prepared | None = None

    def __init__(
        self,
        weight: Tensor,
        config: WeightConfig,
        axis: int = 0,
        name: str = "",
        *,
        pinned: bool = False,
        fitted: bool = True,
    ) -> None:
        super().__init__()
        self.config = config
        self.axis = axis
        self.name = name
        self.pinned = pinned
        self.enabled = True
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))
        self._assign(self._fit(weight, config) if fitted else self._placeholder(weight))

    def _fit(self, weight: Tensor, config: WeightConfig) -> Fit:
        try:
            if weight.is_meta:
                raise ValueError("adq: the weight is on the meta device; load the weights first, then call quantize_")
            if weight.dtype == torch.float64:
                raise ValueError("adq: the weight is float64, adq computes in float32 at most; call model.float()")
            if not weight.is_floating_point():
                raise ValueError(
                    f"adq: the weight is {str(weight.dtype).removeprefix('torch.')}, adq quantizes float weights; "
                    "leave the layer as it is by an override"
                )
            if is_traceable_wrapper_subclass(weight) and not is_sharded(weight):
                raise ValueError(
                    f"adq: the weight is of {type(weight).__name__}, no plain tensor, and may be quantized already; "
                    "leave the layer as it is by an override"
                )
            fitted = fit(weight, config, self.axis)
            if not bool(fitted.codebook.any()):
                raise ValueError(
                    "adq: every weight is zero, there is nothing to quantize; load or train the weights first, "
                    "or leave the layer in float by an override"
                )
        except ValueError as error:
            raise ValueError(f"{error} (layer {self.name!r})") from error
        return fitted

    def _placeholder(self, weight: Tensor) -> Fit:
        channel = self.config.scale == "channel"
        shape = [n if channel and d == self.axis else 1 for d, n in enumerate(weight.shape)]
        levels = self.config.num_levels
        return Fit(weight.new_zeros(levels).float(), weight.new_ones(shape).float(), weight.new_zeros(levels).float())

    @torch.no_grad()
    def _assign(self, fitted: Fit) -> None:
        values = {
            "codebook": fitted.codebook,
            "scale": fitted.scale,
            "ema_count": fitted.count,
            "ema_total": fitted.count * fitted.codebook,
        }
        for name, value in values.items():
            present = getattr(self, name, None)
            if present is not None and present.shape == value.shape:
                present.copy_(value)  # in place: optimizers and compiled graphs hold it
            elif isinstance(present, nn.Parameter):
                # a plain optimizer that was built before goes on with it; one with a state of the old shape cannot
                present.data, present.grad = value, None
            elif (name, self.config.update) in (("codebook", "gradient"), ("scale", "step")):
                setattr(self, name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    @property
    def bits(self) -> int:
        """Width of a code, from the length of the codebook."""
        return code_bits(self.codebook.numel())

    @property
    def levels(self) -> Tensor:
        """The codebook as weights are looked up in it, float32 ``[K]``, without gradient: ascending, on its grid."""
        levels = self.codebook.detach().sort().values
        learned = self.config.update == "gradient"  # the others are on it already
        return snap_codebook(levels) if learned and self.config.snap else levels

    def forward(self, weight: Tensor) -> Tensor:
        """Quantized weight, same shape and dtype, straight-through gradient."""
        if not self.enabled:
            return weight
        if self.config.update == "gradient":
            levels = self.codebook.sort().values
            if self.config.snap:  # straight-through: their values, the gradient of the codebook
                levels = levels - levels.detach() + snap_codebook(levels.detach())
            return (learned_lookup(weight / self.scale, levels) * self.scale).to(weight.dtype)
        if self.config.update == "step":
            return learned_step(weight, self.scale, self.codebook).to(weight.dtype)
        # a part that is compiled by itself looks up for itself; another thread may begin a pass at any moment
        prepared = None if torch.compiler.is_compiling() else self.prepared
        ready = None if prepared is None else prepared.of(weight, self.codebook)
        return quantize_weight(weight, self.scale, self.codebook, ready)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Tensor:
        """Codes of the weight, uint8, same shape."""
        codebook = self.levels
        return torch.ops.adq.codebook_lookup(weight / self.scale, codebook, decision_thresholds(codebook), True)[1]

    def refit_(self, weight: Tensor) -> None:
        """Fit codebook and scale anew to a weight, as at construction: it has not been trained."""
        self.replace_(self.config, self._fit(weight, self.config))
        self.steps.zero_()

    def fit_bits(self, bits: int, weight: Tensor) -> tuple[WeightConfig, Fit]:
        """What :meth:`replace_` takes to change the width of the codes; nothing is changed yet."""
        config = replace(self.config, bits=bits)
        return config, self._fit(weight, config)

    def replace_(self, config: WeightConfig, fitted: Fit) -> None:
        """Go on with another configuration, and the codebook and scale fitted for it."""
        self.config = config
        self._assign(fitted)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keeping_dtype(fn), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            return  # a float checkpoint: the layer fits a codebook to its new weight
        saved = state_dict.get(prefix + "codebook")
        if saved is not None and saved.shape != self.codebook.shape and saved.dim() == 1 and saved.numel() > 0:
            self._resize(saved.numel())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _resize(self, levels: int) -> None:
        bits = code_bits(levels)
        self.config = replace(self.config, bits=bits, levels="full" if levels == 2**bits else "symmetric")
        table = self.ema_count.new_zeros(levels)
        self._assign(Fit(table, self.scale, table.clone()))

    def extra_repr(self) -> str:
        return (
            f"bits={self.bits}, levels={self.codebook.numel()}, scale={self.config.scale}, update={self.config.update}"
            f"{'' if self.enabled else ', disabled'}"
        )

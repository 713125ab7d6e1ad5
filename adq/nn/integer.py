"""Layers that compute with integers: uint8 levels in, int8 weights, int32 sums, and the next layers' levels out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adq.layout import arrange, restore
from adq.nn.activation import ActivationQuantizer
from adq.nn.dtype import keeping_dtype


@dataclass(frozen=True)
class IntegerWeight:
    """A weight on an integer grid: ``scale * integer``.

    Attributes:
        integer: int8 ``[O, I / groups, *kernel]``.
        scale: float64 ``[O]``.
    """

    integer: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Affine:
    """``factor * v + shift`` of each channel, float64 ``[O]``: what follows a convolution, batch norm for one."""

    factor: Tensor
    shift: Tensor

    def then(self, factor: Tensor, shift: Tensor) -> Affine:
        """This, and then another."""
        return Affine(self.factor * factor, self.shift * factor + shift)


@dataclass(frozen=True)
class Geometry:
    """Kernel, stride, padding and dilation of a two-dimensional convolution, height first."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass
class Epilogue:
    """What a layer does with its sums.

    Attributes:
        low, high: bounds of the activation function (ReLU: 0 and infinity).
        readers: quantizers of the layers that take their levels from here.
        keep: whether anything reads the float result.
        as_given: whether the float result is contiguous, as of the float layer, unless the input is channels_last; else
            it is channels_last.
    """

    low: float = -torch.inf
    high: float = torch.inf
    readers: list[ActivationQuantizer] = field(default_factory=list)
    keep: bool = True
    as_given: bool = False


class IntegerLayer(nn.Module):
    """``y = clamp(factor * (convolution of levels with integers) + shift [+ residual])``, exact up to the last line.

    A float input is quantized first; levels (uint8) are taken as they are. Inference only. The operator is
    :func:`adq.reference.integer_conv2d`; its arithmetic after the integer sum is float32.

    ``weight`` and ``bias`` read like a float layer's, of one that nothing is fused into: the weight is decoded anew
    each time.

    Args:
        weight: on its grid.
        affine: what follows, the bias of the layer included; in units of the layer's output.
        quantizer: of the layer's input, calibrated; level ``zero`` of it means 0.
        geometry: of the convolution.
        epilogue: what else is computed.
    """

    blocks: Tensor
    table: Tensor
    initial: Tensor
    multiplier: Tensor
    shift: Tensor
    scale: Tensor

    weight: Any = property(lambda self: self._weight(), doc="``scale * integer``, float32, in the float layer's shape.")
    bias: Any = property(lambda self: self.shift, doc="What is added to the scaled sums, float32 ``[O]``.")

    def __init__(
        self,
        weight: IntegerWeight,
        affine: Affine,
        quantizer: ActivationQuantizer,
        geometry: Geometry,
        epilogue: Epilogue,
    ) -> None:
        super().__init__()
        integer = weight.integer.reshape(*weight.integer.shape[:2], *geometry.kernel)
        self.geometry, self.epilogue, self.shape = geometry, epilogue, weight.integer.shape
        self.input_quantizer = quantizer
        self.zero = quantizer.zero_level
        blocks, table = arrange(integer, geometry.groups)
        self.register_buffer("blocks", blocks)
        self.register_buffer("table", table)
        self.register_buffer("initial", -self.zero * integer.sum((1, 2, 3), dtype=torch.int32))
        self.register_buffer("multiplier", (affine.factor * weight.scale * quantizer.level_size).float())
        self.register_buffer("shift", affine.shift.float())
        self.register_buffer("scale", weight.scale.float())
        self.readers = nn.ModuleList(epilogue.readers)
        self.steps = [reader.config.steps for reader in epilogue.readers]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Float or levels ``[N, C, ...]``; y, and where others read levels from here ``(y, levels of each)``."""
        is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if x.dtype != torch.uint8:
            x = self.input_quantizer.levels(x)
        geometry, epilogue = self.geometry, self.epilogue
        parameters = [p for q in self.readers for p in (q.start, q.interval, q.in_scale)]
        lead = x.shape
        y, levels = torch.ops.adq.integer_conv2d(
            self._image(x),
            self.blocks,
            self.table,
            self.initial,
            self.multiplier,
            self.shift,
            None if residual is None else self._image(residual.float()),
            epilogue.low,
            epilogue.high,
            parameters,
            self.steps,
            epilogue.keep,
            geometry.kernel,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            geometry.groups,
            self.zero,
        )
        y = self._restore(y, lead) if epilogue.keep else y
        y = y.contiguous() if epilogue.as_given and not is_last else y
        return (y, [self._restore(level, lead) for level in levels]) if self.readers else y

    def get_extra_state(self) -> Tensor:
        """The level that means 0: of what a state dict restores the one number that is no buffer."""
        return torch.tensor(self.zero)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the level that means 0 from a state dict."""
        self.zero = int(state)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key, offset = f"{prefix}_extra_state", state_dict.get(f"{prefix}input_quantizer.offset")
        if key not in state_dict and offset is not None:  # of adq 0.1 until it held the level that means 0
            state_dict[key] = torch.tensor(self.input_quantizer.zero_of(offset))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _weight(self) -> Tensor:
        shape, geometry = self.shape, self.geometry
        integer = restore(self.blocks, self.table, (*shape[:2], *geometry.kernel), geometry.groups)
        return integer.reshape(shape) * self.scale.view(-1, *[1] * (len(shape) - 1))

    def _image(self, x: Tensor) -> Tensor:
        """As ``[N, C, H, W]``."""
        raise NotImplementedError

    def _restore(self, y: Tensor, lead: torch.Size) -> Tensor:
        """The inverse of :meth:`_image`; ``lead`` is the shape of the layer's input."""
        raise NotImplementedError

    def _apply(self, fn, recurse: bool = True) -> nn.Module:  # type: ignore[no-untyped-def]
        return super()._apply(keeping_dtype(fn), recurse)

    def extra_repr(self) -> str:
        levels = self.table.numel() or 256
        return f"outputs={self.initial.numel()}, weight levels={levels}, {self.geometry}, keep={self.epilogue.keep}"


class IntegerConv2d(IntegerLayer):
    """A convolution of images ``[N, C, H, W]``, or of one ``[C, H, W]``."""

    def _image(self, x: Tensor) -> Tensor:
        return x if x.dim() > 3 else x.unsqueeze(0)

    def _restore(self, y: Tensor, lead: torch.Size) -> Tensor:
        return y if len(lead) > 3 else y.squeeze(0)


class IntegerConv1d(IntegerLayer):
    """A convolution of sequences ``[N, C, L]``, or of one ``[C, L]``."""

    def _image(self, x: Tensor) -> Tensor:
        return (x if x.dim() > 2 else x.unsqueeze(0)).unsqueeze(2)

    def _restore(self, y: Tensor, lead: torch.Size) -> Tensor:
        return y.squeeze(2) if len(lead) > 2 else y.squeeze(2).squeeze(0)


class IntegerLinear(IntegerLayer):
    """A linear layer over the last axis, ``[..., C]``: a 1 x 1 convolution of as many images."""

    def _image(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1], 1, 1)

    def _restore(self, y: Tensor, lead: torch.Size) -> Tensor:
        return y.reshape(*lead[:-1], y.shape[1])

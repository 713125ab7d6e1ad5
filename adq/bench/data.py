"""The tensors that operators and peers work on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adq import layout
from adq.batches import to_device
from adq.bench.case import COPY, Build, Call, Setting
from adq.codebook import quantile_codebook
from adq.kmeans import Spectrum
from adq.reference import decision_thresholds

SAMPLE = 2**16
CPU_CACHE = 2**25
"""Bytes that rotating buffers must exceed on a CPU; on a GPU it is the L2 cache."""


class Rotation:
    """Equal tensors, one after another at each call, so that none of them is still in the cache."""

    def __init__(self, tensor: Tensor, setting: Setting) -> None:
        cache = CPU_CACHE
        if setting.cuda:
            cache = getattr(torch.cuda.get_device_properties(setting.device), "L2_cache_size", 2**26)
        copies = 1 if setting.tiny else 1 + -(-2 * cache // max(1, tensor.nbytes))
        self.tensors = [tensor, *(tensor.clone() for _ in range(copies - 1))]
        self._cycle = itertools.cycle(self.tensors)

    def __call__(self) -> Tensor:
        return next(self._cycle)

    @property
    def first(self) -> Tensor:
        """Always the same one."""
        return self.tensors[0]


def random_tensor(elements: int, dtype: torch.dtype, setting: Setting, seed: int = 0) -> Tensor:
    """Standard normal values, two-dimensional with rows of up to 4096 elements."""
    generator = torch.Generator(setting.device).manual_seed(seed)
    row = min(4096, elements)
    values = torch.empty(elements // row, row, dtype=dtype, device=setting.device)
    return values.normal_(generator=generator)


@dataclass(frozen=True)
class Weights:
    """Weights and a codebook fitted to their distribution."""

    w: Rotation
    codebook: Tensor
    thresholds: Tensor


def weights(setting: Setting, elements: int, dtype: torch.dtype, levels: int) -> Weights:
    """Normal weights with ``levels`` levels at their quantiles."""
    w = random_tensor(elements, dtype, setting)
    value, count = w.flatten()[:SAMPLE].double().cpu().unique(return_counts=True)
    codebook = quantile_codebook(Spectrum(value.numpy(), count.double().numpy()), levels).to(w.device)
    return Weights(Rotation(w, setting), codebook, decision_thresholds(codebook))


@dataclass(frozen=True)
class Activations:
    """Activations, their gradient and the parameters of a quantizer that covers them."""

    x: Rotation
    grad: Rotation
    start: Tensor
    interval: Tensor
    in_scale: Tensor
    out_scale: Tensor
    offset: Tensor

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """The learned ones, in the order of the operator's arguments."""
        return self.start, self.interval, self.in_scale, self.out_scale

    @property
    def steps(self) -> int:
        """Number of thresholds."""
        return self.interval.numel()

    def leaves(self) -> tuple[Tensor, ...]:
        """x and the parameters as leaves of a graph."""
        return tuple(tensor.detach().requires_grad_() for tensor in (self.x(), *self.parameters))


def activations(setting: Setting, elements: int, dtype: torch.dtype, bits: int) -> Activations:
    """Half-normal activations, as a ReLU leaves them, and thresholds that are not uniform."""
    steps = 2**bits - 1
    device = setting.device
    x = random_tensor(elements, dtype, setting).abs_()
    interval = torch.linspace(0.8, 1.2, steps, device=device) * 2.0 / steps
    one = torch.ones(1, device=device)
    grad = random_tensor(elements, dtype, setting, seed=1)
    return Activations(
        Rotation(x, setting), Rotation(grad, setting), 0.0 * one, interval, 0.9 * one, 1.1 * one, 0.0 * one
    )


@dataclass(frozen=True)
class Codes:
    """Codes of some bits, the same packed, and what they mean as the weight of a layer with a scale a row."""

    codes: Rotation
    packed: Rotation
    bits: int
    codebook: Tensor
    scale: Tensor
    shape: list[int]


def codes(setting: Setting, elements: int, bits: int, row: int = 4096) -> Codes:
    """Uniformly random codes, one byte each; those of a weight in rows of up to ``row``."""
    generator = torch.Generator(setting.device).manual_seed(0)
    values = torch.randint(0, 2**bits, (elements,), dtype=torch.uint8, device=setting.device, generator=generator)
    packed = torch.ops.adq.pack_bits(values, bits)
    shape = [elements // min(row, elements), min(row, elements)]
    codebook = torch.linspace(-1.0, 1.0, 2**bits, device=setting.device)
    scale = torch.ones(shape[0], 1, device=setting.device)
    return Codes(Rotation(values, setting), Rotation(packed, setting), bits, codebook, scale, shape)


@dataclass(frozen=True)
class Convolution:
    """A convolution of levels with integers; a ReLU and the quantizer of the next layer follow it.

    Attributes:
        x: levels, uint8 ``[N, C, H, W]``, channels_last.
        weight: int8 ``[O, C / groups, k, k]``.
        scale: of all the sums, a power of two, so that the next layer has values of every level.
        arguments: of ``nn.Conv2d``.
        operands: of ``torch.ops.adq.integer_conv2d``.
    """

    x: Tensor
    weight: Tensor
    scale: float
    arguments: dict[str, Any]
    operands: tuple[Any, ...]


def convolution(
    shape: tuple[int, ...], arguments: dict[str, Any], bits: int, device: torch.device | None = None
) -> Convolution:
    """Uniformly random levels and weights of ``bits`` bits, for an input of ``shape`` and an ``nn.Conv2d``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator)
    outputs, groups, kernel = arguments["out_channels"], arguments["groups"], arguments["kernel_size"]
    values = torch.linspace(-127, 127, 2**bits).to(torch.int8)
    weight = values[torch.randint(0, 2**bits, (outputs, shape[1] // groups, kernel, kernel), generator=generator)]
    steps = 2**bits - 1
    scale = 2.0 ** -round(math.log2(64.0 * weight[0].numel() ** 0.5))
    one = torch.ones(1)
    operands = (
        x.contiguous(memory_format=torch.channels_last),
        *layout.arrange(weight, groups),
        torch.zeros(outputs, dtype=torch.int32),
        torch.full((outputs,), scale),
        torch.zeros(outputs),
        None,
        0.0,
        torch.inf,
        [0.0 * one, torch.ones(steps), one],
        [steps],
        False,
        *([arguments[name]] * 2 for name in ("kernel_size", "stride", "padding")),
        [1, 1],
        groups,
        0,
    )
    weight, operands = to_device((weight, operands), device or torch.device("cpu"))
    return Convolution(operands[0], weight, scale, arguments, operands)


def copy_of(nbytes: int, setting: Setting) -> dict[str, Build]:
    """The contender ``dst.copy_(src)`` that reads and writes ``nbytes`` altogether."""

    def build(_: object) -> Call:
        values = torch.ones(max(1, nbytes // 8), device=setting.device)
        source, target = Rotation(values, setting), Rotation(torch.empty_like(values), setting)
        return lambda: target().copy_(source())

    return {COPY: build}


def on_data(call: Callable[..., object]) -> Build:
    """A contender that runs ``call(data)``."""
    return lambda data: lambda: call(data)

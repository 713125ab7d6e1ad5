"""Throughput of quantized layers at the shapes of real networks, beside the same layers in float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adq import ActivationConfig, WeightConfig
from adq.bench.case import ADQ, Build, Call, Case, Setting, overhead
from adq.nn import ActivationQuantizer, QConv2d, QLinear

PART = "layers"
BITS = 3
SECONDS = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Conv:
    """A square convolution as a network uses it; ``size`` is the height and width of its input."""

    network: str
    inputs: int
    outputs: int
    kernel: int
    size: int
    stride: int = 1
    groups: int = 1

    @property
    def name(self) -> str:
        """``ResNet-18 conv 3x3 64->64 at 56``, the stride and ``depthwise`` where they apply."""
        kind = "depthwise" if self.groups > 1 else "conv"
        stride = f" /{self.stride}" if self.stride > 1 else ""
        return f"{self.network} {kind} {self.kernel}x{self.kernel} {self.inputs}->{self.outputs}{stride} at {self.size}"

    def arguments(self) -> dict[str, Any]:
        """Of ``nn.Conv2d``."""
        return {
            "in_channels": self.inputs,
            "out_channels": self.outputs,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.kernel // 2,
            "groups": self.groups,
            "bias": False,
        }

    def shape(self, batch: int, tiny: bool) -> tuple[int, ...]:
        """Of the input."""
        size = min(self.size, 7) if tiny else self.size
        return batch, self.inputs, size, size


@dataclass(frozen=True)
class Linear:
    """A linear layer of a transformer, applied to every token of an image."""

    network: str
    inputs: int
    outputs: int
    tokens: int

    @property
    def name(self) -> str:
        """``ViT-S linear 384->1536, 197 tokens``."""
        return f"{self.network} linear {self.inputs}->{self.outputs}, {self.tokens} tokens"

    def arguments(self) -> dict[str, Any]:
        """Of ``nn.Linear``."""
        return {"in_features": self.inputs, "out_features": self.outputs}

    def shape(self, batch: int, tiny: bool) -> tuple[int, ...]:
        """Of the input."""
        return batch, 2 if tiny else self.tokens, self.inputs


LAYERS: tuple[Conv | Linear, ...] = (
    Conv("ResNet-18", 3, 64, 7, 224, stride=2),
    Conv("ResNet-18", 64, 64, 3, 56),
    Conv("ResNet-18", 64, 128, 3, 56, stride=2),
    Conv("ResNet-18", 64, 128, 1, 56, stride=2),
    Conv("ResNet-18", 128, 128, 3, 28),
    Conv("ResNet-18", 256, 256, 3, 14),
    Conv("ResNet-18", 512, 512, 3, 7),
    Conv("MobileNetV2", 16, 96, 1, 112),
    Conv("MobileNetV2", 96, 96, 3, 112, stride=2, groups=96),
    Conv("MobileNetV2", 24, 144, 1, 56),
    Conv("MobileNetV2", 144, 144, 3, 56, groups=144),
    Conv("MobileNetV2", 64, 384, 1, 14),
    Conv("MobileNetV2", 384, 384, 3, 14, groups=384),
    Conv("MobileNetV2", 960, 320, 1, 7),
    Conv("MobileNetV2", 960, 960, 3, 7, groups=960),
    Linear("ViT-S", 384, 1536, 197),
    Linear("ViT-S", 1536, 384, 197),
)


def cases(setting: Setting) -> Iterator[Case]:
    """Every case of this part: training (forward and backward) and inference of each layer."""
    layers = (LAYERS[1], LAYERS[10], LAYERS[15]) if setting.tiny else LAYERS
    for layer in layers:
        for training in (True, False):
            yield _case(setting, layer, training)


def _case(setting: Setting, layer: Conv | Linear, training: bool) -> Case:
    contenders: dict[str, Build] = {}
    for name, dtype in DTYPES.items():
        contenders[f"{ADQ}, {BITS} bits, {name}"] = _build(setting, layer, training, dtype, quantized=True)
        contenders[name] = _build(setting, layer, training, dtype, quantized=False)
    return Case(
        PART,
        f"{layer.name}, {'training' if training else 'inference'}",
        lambda: torch.randn(layer.shape(setting.layer_batch, setting.tiny), device=setting.device),
        contenders,
        tuple(overhead(f"{ADQ}, {BITS} bits, {name}", name, None) for name in DTYPES),
        items=setting.layer_batch,
        item="images",
        seconds=min(SECONDS, setting.seconds),
    )


def _module(layer: Conv | Linear, quantized: bool) -> nn.Module:
    torch.manual_seed(0)
    if not quantized:
        return nn.Conv2d(**layer.arguments()) if isinstance(layer, Conv) else nn.Linear(**layer.arguments())
    kind = QConv2d if isinstance(layer, Conv) else QLinear
    configs: dict[str, Any] = {
        "weight_config": WeightConfig(bits=BITS),
        "activation_config": ActivationConfig(bits=BITS, signed=True),
    }
    return kind(**layer.arguments(), **configs)


def _build(setting: Setting, layer: Conv | Linear, training: bool, dtype: torch.dtype, quantized: bool) -> Build:
    def build(images: Tensor) -> Call:
        module = _module(layer, quantized).to(setting.device, dtype).train(training)
        if isinstance(quantizer := getattr(module, "input_quantizer", None), ActivationQuantizer):
            quantizer.calibrate_(images.flatten()[: 2**16])
        x = images.to(dtype)
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
            module = module.to(memory_format=torch.channels_last)
        return _train(module, x.requires_grad_()) if training else _infer(module, x)

    return build


def _train(module: nn.Module, x: Tensor) -> Call:
    inputs = [x, *module.parameters()]
    grad = torch.ones_like(module(x))
    return lambda: torch.autograd.grad(module(x), inputs, grad)


def _infer(module: nn.Module, x: Tensor) -> Call:
    def call() -> Tensor:
        with torch.no_grad():
            return module(x)

    return call

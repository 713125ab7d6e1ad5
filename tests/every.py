"""A network of every kind of layer, each by itself, for what must compute all of them alike."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig
from adq.convert import activation_quantizers


class Side(nn.Module):
    """A layer by itself, flattened to logits, so that its outputs can be compared without a threshold behind them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(1)


class Every(nn.Module):
    """Each kind of layer beside the others; the input, ``[N, 4, 6]``, gets as many axes as each takes."""

    def __init__(self) -> None:
        super().__init__()
        kinds = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
        self.sides = nn.ModuleDict({kind: Side(getattr(nn, kind)(4, 6, 3, 2, 1, groups=2)) for kind in kinds})
        self.sides["Linear"] = Side(nn.Linear(6, 5))
        self.tied = Side(nn.Linear(6, 5, bias=False))
        self.tied.layer.weight = self.sides["Linear"].layer.weight
        self.floating = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for kind, side in self.sides.items():
            spatial = int(kind[-2]) if kind[-1] == "d" else 1
            shape = (x.shape[0], 4, *[1] * (spatial - 1), 6)
            outputs.append(side(x.reshape(shape).expand(-1, -1, *[3] * (spatial - 1), -1)))
        return (*outputs, self.tied(x), self.floating(x.flatten(1)))


FLOAT, SNAPPED, STEP = {"bits": 3}, {"bits": 4, "snap": "int8"}, {"bits": 4, "update": "step", "scale": "tensor"}
"""Weights with codebooks of each sort."""
ACTIVATIONS = {
    "signed": (ActivationConfig(3), True),
    "unsigned": (ActivationConfig(2), False),
    "uniform": (ActivationConfig(8), True),
}
"""Quantizers of each sort, and whether their inputs take both signs."""


def sample(signed: bool, count: int = 5, seed: int = 1) -> Tensor:
    x = torch.randn(count, 4, 6, generator=torch.Generator().manual_seed(seed))
    return x if signed else x.relu()


def every(weight: dict, activation: ActivationConfig, signed: bool) -> nn.Module:
    """The network, quantized and calibrated, with thresholds as if trained."""
    torch.manual_seed(0)
    both = {"weight": weight, "activation": {"bits": activation.bits}}  # of the first and the last layer too
    config = ADQConfig(overrides={"re:.*": both, "floating": None})
    model = adq.calibrate_(adq.quantize_(Every(), config), [sample(signed, 64)]).eval()
    generator = torch.Generator().manual_seed(2)
    for quantizer in activation_quantizers(model).values():  # unequal intervals, a start of its own
        with torch.no_grad():
            quantizer.start += 0.03
            quantizer.interval *= 0.5 + torch.rand(quantizer.interval.shape, generator=generator)
            quantizer.out_scale *= 1.1
    return model

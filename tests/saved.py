"""A small trained network to be saved, and its file taken apart by hand."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from torch import Tensor, nn

import adq
from adq import ADQConfig, WeightConfig

RECORD = {"name": "artifact_net", "num_classes": 3, "kwargs": {}}


class Net(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.ConvTranspose2d(6, 5, 3)
        self.head = nn.Linear(5, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


def images(seed: int = 0) -> Tensor:
    return torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for seed in range(steps):
        optimizer.zero_grad()
        model(images(seed)).square().mean().backward()
        optimizer.step()
    return model.eval()


def trained(model: nn.Module | None = None, **weight) -> nn.Module:
    torch.manual_seed(0)
    model = adq.quantize_(model or Net(), ADQConfig(weight=WeightConfig(**weight)))
    return train(adq.calibrate_(model, [images()]))


def read(path: Path) -> tuple[dict, bytes]:
    """Header and data of a safetensors file, by hand."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]

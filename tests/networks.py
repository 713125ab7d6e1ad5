"""Small networks of every common kind of layer, and what tests do with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import adq
from adq import ADQConfig


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


class Block(nn.Module):
    """A residual block with a depthwise convolution, and a transposed one behind it."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, 2)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.norm(self.depthwise(x)))
        return self.head(torch.relu(self.up(x)).mean((2, 3)))


LAYERS = ["stem", "body.0", "body.2", "head"]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(seed: int = 0, count: int = 8) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantized(seed: int = 0, **config) -> Net:
    model = adq.quantize_(net(seed), ADQConfig(**config))
    return adq.calibrate_(model, [images()])


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for seed in range(steps):
        optimizer.zero_grad()
        model(images(seed)).square().mean().backward()
        optimizer.step()
    return model


def centred(model: nn.Module) -> nn.Module:
    """Trained a little, with logits so close that each class is some image's top-1."""
    model = train(model).eval()
    with torch.no_grad():
        model.head.bias -= model(images(1, 64)).mean(0)
        assert model(images(1, 64)).argmax(1).unique().numel() > 1
    return model


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []

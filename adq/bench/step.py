"""A whole training step of a quantized network, beside the same network in float."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adq
from adq.bench.case import ADQ, Build, Call, Case, Setting, overhead

PART = "step"
FLOAT = "float"
BITS = (3, 2, 4)
# Times the float step, (CPU, GPU).
OVERHEAD = {2: (1.25, 1.06), 3: (1.25, 1.06), 4: (1.25, 1.10)}
SECONDS = 12.0

Batch = tuple[Tensor, Tensor]


def cases(setting: Setting) -> Iterator[Case]:
    """ResNet-20 in float32 on a CPU; ResNet-18 in bfloat16 autocast, channels_last, eager and compiled on a GPU."""
    yield _case(setting, compiled=False)
    if setting.cuda and setting.compiled:
        yield _case(setting, compiled=True)


def _case(setting: Setting, compiled: bool) -> Case:
    name, _, size = _network(setting)
    contenders = {FLOAT: _build(setting, None, compiled)}
    contenders |= {_row(bits): _build(setting, bits, compiled) for bits in BITS}
    precision = "bf16 autocast, channels_last" if setting.cuda else "float32"
    return Case(
        PART,
        f"training step, {name}, batch {setting.step_batch}, {size}x{size}, {precision}, "
        f"{'compiled' if compiled else 'eager'}",
        lambda: random_batch(setting, setting.step_batch),
        contenders,
        tuple(overhead(_row(bits), FLOAT, OVERHEAD[bits][setting.cuda]) for bits in BITS),
        items=setting.step_batch,
        item="images",
        seconds=min(SECONDS, 3 * setting.seconds),
    )


def _network(setting: Setting) -> tuple[str, int, int]:
    """Name, classes and side of the images."""
    imagenet = setting.cuda and not setting.tiny
    return ("resnet18", 1000, 224) if imagenet else ("resnet20", 10, 8 if setting.tiny else 32)


def random_batch(setting: Setting, count: int) -> Batch:
    """Images and labels for :func:`training_step`."""
    _, classes, size = _network(setting)
    images = torch.randn(count, 3, size, size, device=setting.device)
    labels = torch.randint(0, classes, (count,), device=setting.device)
    return images.contiguous(memory_format=torch.channels_last) if setting.cuda else images, labels


def _row(bits: int) -> str:
    return f"{ADQ}, {bits} bits"


def _build(setting: Setting, bits: int | None, compiled: bool) -> Build:
    return lambda batch: training_step(setting, bits, batch, _compiled if compiled else lambda model: model)


def _compiled(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def training_step(setting: Setting, bits: int | None, batch: Batch, wrap: Callable[[nn.Module], nn.Module]) -> Call:
    """Forward and backward pass and a step of SGD on a batch.

    Args:
        bits: of weights, activations and codebooks, first and last layer at 8; None for the network in float.
        wrap: makes of the model what is run.
    """
    torch.manual_seed(0)
    name, classes, _ = _network(setting)
    model = adq.create_model(name, classes).to(setting.device)
    if bits is not None:
        config = adq.ADQConfig(adq.WeightConfig(bits=bits), adq.ActivationConfig(bits=bits))
        adq.calibrate_(adq.quantize_(model, config), [batch[0]])
    if setting.cuda:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    forward = wrap(model)
    images, labels = batch

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.cuda):
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        optimizer.step()

    return call

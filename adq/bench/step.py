"""A whole training step of a quantized network, beside the same network in float."""

from __future__ import annotations

from collections.abc import Iterator

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


def cases(setting: Setting) -> Iterator[Case]:
    """ResNet-20 in float32 on a CPU; ResNet-18 in bfloat16 autocast, channels_last, eager and compiled on a GPU."""
    yield _case(setting, compiled=False)
    if setting.cuda and setting.compiled:
        yield _case(setting, compiled=True)


def _case(setting: Setting, compiled: bool) -> Case:
    imagenet = setting.cuda and not setting.tiny
    name, classes, size = ("resnet18", 1000, 224) if imagenet else ("resnet20", 10, 8 if setting.tiny else 32)

    def data() -> tuple[Tensor, Tensor]:
        images = torch.randn(setting.step_batch, 3, size, size, device=setting.device)
        labels = torch.randint(0, classes, (setting.step_batch,), device=setting.device)
        return images.contiguous(memory_format=torch.channels_last) if setting.cuda else images, labels

    contenders = {FLOAT: _build(setting, name, classes, None, compiled)}
    contenders |= {_row(bits): _build(setting, name, classes, bits, compiled) for bits in BITS}
    precision = "bf16 autocast, channels_last" if setting.cuda else "float32"
    return Case(
        PART,
        f"training step, {name}, batch {setting.step_batch}, {size}x{size}, {precision}, "
        f"{'compiled' if compiled else 'eager'}",
        data,
        contenders,
        tuple(overhead(_row(bits), FLOAT, OVERHEAD[bits][setting.cuda]) for bits in BITS),
        items=setting.step_batch,
        item="images",
        seconds=min(SECONDS, 3 * setting.seconds),
    )


def _row(bits: int) -> str:
    return f"{ADQ}, {bits} bits"


def _build(setting: Setting, name: str, classes: int, bits: int | None, compiled: bool) -> Build:
    """Weights, activations and codebooks quantized to ``bits``, first and last layer to 8; None for float."""

    def build(batch: tuple[Tensor, Tensor]) -> Call:
        torch.manual_seed(0)
        model = adq.create_model(name, classes).to(setting.device)
        if bits is not None:
            config = adq.ADQConfig(adq.WeightConfig(bits=bits), adq.ActivationConfig(bits=bits))
            adq.calibrate_(adq.quantize_(model, config), [batch[0]])
        if setting.cuda:
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if compiled:
            model.compile()
        return _step(model, optimizer, batch, setting)

    return build


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor], setting: Setting) -> Call:
    images, labels = batch

    def call() -> None:
        optimizer.zero_grad()
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.cuda):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    return call

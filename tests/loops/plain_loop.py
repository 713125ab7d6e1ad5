"""Quantization-aware training in a loop of one's own: ``python plain_loop.py FOLDER``; called again it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import adq

EPOCHS = 4
ACCUMULATION = 2
"""Batches an optimizer step."""


def digits() -> TensorDataset:
    """1,797 images of handwritten digits, ``[1, 8, 8]``, and their classes."""
    images, classes = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes))


def network(calibration: Tensor) -> nn.Module:
    """A small network with 3-bit weights and activations."""
    model = adq.create_model("digits_cnn")
    adq.quantize_(model, adq.ADQConfig(weight=adq.WeightConfig(bits=3), activation=adq.ActivationConfig(bits=3)))
    return adq.calibrate_(model, [calibration])


def train(folder: Path, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train up to ``epochs`` epochs in all; the model and the mean loss of each epoch of this call."""
    torch.manual_seed(0)
    data, checkpoint, losses = digits(), folder / "checkpoint.pt", []
    loader = DataLoader(data, batch_size=64, shuffle=True, drop_last=True)
    model = network(data.tensors[0][:256]).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    parts, start = {"model": model, "optimizer": optimizer, "schedule": schedule}, 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])
        start = saved["epoch"]
    for epoch in range(start, epochs):
        total = 0.0
        for i, (images, classes) in enumerate(loader, 1):
            loss = F.cross_entropy(model(images), classes)
            (loss / ACCUMULATION).backward()
            total += loss.item() / len(loader)
            if i % ACCUMULATION == 0:
                optimizer.step()  # the codebooks follow
                optimizer.zero_grad()
        schedule.step()
        losses.append(total)
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save({**state, "epoch": epoch + 1, "random": torch.get_rng_state()}, checkpoint)
    return model, losses


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    model, losses = train(folder, epochs=EPOCHS)
    print("loss of each epoch:", *(f"{loss:.3f}" for loss in losses))
    print(adq.summary(model))
    adq.save(model, folder / "model.safetensors", packed=True)

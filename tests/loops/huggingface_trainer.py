"""Quantization-aware training with the Hugging Face Trainer: ``python huggingface_trainer.py FOLDER``.

Called again it goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import adq

EPOCHS = 4


def digits() -> list[dict[str, Tensor]]:
    """1,797 images of handwritten digits, ``[1, 8, 8]``, and their classes."""
    images, classes = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return [{"images": image, "labels": label} for image, label in zip(images, torch.tensor(classes), strict=True)]


class Classifier(nn.Module):
    """A small network with 3-bit weights and activations, as the Trainer wants it."""

    def __init__(self, calibration: Tensor) -> None:
        super().__init__()
        self.network = adq.create_model("digits_cnn")
        adq.quantize_(
            self.network, adq.ADQConfig(weight=adq.WeightConfig(bits=3), activation=adq.ActivationConfig(bits=3))
        )
        adq.calibrate_(self.network, [calibration])

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(images)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def train(folder: Path, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train up to ``epochs`` epochs in all; the model and the mean loss of each epoch."""
    torch.manual_seed(0)
    data = digits()
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=2,
        dataloader_drop_last=True,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_strategy="epoch",
        save_strategy="epoch",
        seed=0,
        report_to=[],
        disable_tqdm=True,
    )
    classifier = Classifier(torch.stack([item["images"] for item in data[:256]]))
    trainer = Trainer(classifier, arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    return classifier.network, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model, losses = train(folder, epochs=EPOCHS)
    print("loss of each epoch:", *(f"{loss:.3f}" for loss in losses))
    print(adq.summary(model))
    adq.save(model, folder / "model.safetensors", packed=True)

"""Quantization-aware training with Lightning: ``python lightning_module.py FOLDER``; called again it goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import adq

EPOCHS = 4


def digits() -> TensorDataset:
    """1,797 images of handwritten digits, ``[1, 8, 8]``, and their classes."""
    images, classes = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes))


class Classifier(lightning.LightningModule):
    """A small network with 3-bit weights and activations; adq appears in its constructor only."""

    def __init__(self) -> None:
        super().__init__()
        self.data = digits()
        self.network = adq.create_model("digits_cnn")
        adq.quantize_(
            self.network, adq.ADQConfig(weight=adq.WeightConfig(bits=3), activation=adq.ActivationConfig(bits=3))
        )
        adq.calibrate_(self.network, [self.data.tensors[0][:256]])
        self.losses: list[float] = []
        self.sum = 0.0

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, classes = batch
        loss = F.cross_entropy(self.network(images), classes)
        self.sum += loss.item()
        return loss

    def on_train_epoch_end(self) -> None:
        self.losses.append(self.sum / self.trainer.num_training_batches)
        self.sum = 0.0

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS),
        }

    def train_dataloader(self) -> DataLoader:
        # its order is told by the epoch alone: a resumed run sees the same batches
        order = DistributedSampler(self.data, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(self.data, batch_size=64, sampler=order, drop_last=True)


def train(folder: Path, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train up to ``epochs`` epochs in all; the model and the mean loss of each epoch of this call."""
    lightning.seed_everything(0, verbose=False)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        callbacks=[ModelCheckpoint(folder, save_last=True)],
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = folder / "last.ckpt"
    trainer.fit(classifier, ckpt_path=last if last.exists() else None)
    return classifier.network, classifier.losses


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    model, losses = train(folder, epochs=EPOCHS)
    print("loss of each epoch:", *(f"{loss:.3f}" for loss in losses))
    print(adq.summary(model))
    adq.save(model, folder / "model.safetensors", packed=True)

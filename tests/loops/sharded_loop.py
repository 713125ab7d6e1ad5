"""Quantization-aware training of a network that FSDP2 shards: ``torchrun --nproc-per-node=N sharded_loop.py FOLDER``.

On GPUs where there are some (NCCL), else on CPUs (gloo). Called again it goes on, with any number of processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

import adq
from adq.distributed import average_batch_norm_, share
from adq.sharded import shard_quantizers_

EPOCHS = 4
BATCH = 64
"""Images an optimizer step, over all processes."""
CONFIG = adq.ADQConfig(weight=adq.WeightConfig(bits=3), activation=adq.ActivationConfig(bits=3))


def digits() -> TensorDataset:
    """1,797 images of handwritten digits, ``[1, 8, 8]``, and their classes."""
    images, classes = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(classes))


def place() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def sharded_network(data: TensorDataset) -> nn.Module:
    """Calibrated on shares of some images, then sharded; on GPUs computed in bfloat16, all but the quantizers."""
    torch.manual_seed(0)  # the same weights on every process
    model = adq.quantize_(adq.create_model("digits_cnn"), CONFIG).to(place())
    adq.calibrate_(model, share(DataLoader(Subset(data, range(256)), batch_size=BATCH)))
    shard_quantizers_(model)
    return fully_shard(
        model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16 if place().type == "cuda" else None)
    )


def train(folder: Path, epochs: int) -> tuple[nn.Module, list[float]]:
    """Train up to ``epochs`` epochs in all; the model and the mean loss of each epoch of this call."""
    data, losses, size = digits(), [], dist.get_world_size()
    sampler = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=BATCH // size, sampler=sampler, drop_last=True)
    model = sharded_network(data).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)  # of the sharded parameters
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)

    def state(epoch: int) -> dict[str, Any]:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        return {"model": model_state, "optimizer": optimizer_state, "schedule": schedule.state_dict(), "epoch": epoch}

    start = max((int(path.parent.name) for path in folder.glob("*/.metadata")), default=0)
    if start:
        saved = state(0)
        dcp.load(saved, checkpoint_id=folder / f"{start}")
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
    for epoch in range(start, epochs):
        sampler.set_epoch(epoch)
        total = torch.zeros((), device=place())
        for images, classes in loader:
            loss = F.cross_entropy(model(images.to(place())).float(), classes.to(place()))
            loss.backward()
            optimizer.step()  # the codebooks follow: one reduction for all layers
            optimizer.zero_grad()
            total += loss.detach() / (len(loader) * size)
        schedule.step()
        dist.all_reduce(total)
        losses.append(total.item())
        average_batch_norm_(model)
        dcp.save(state(epoch + 1), checkpoint_id=folder / f"{epoch + 1}")
    return model, losses


def save(model: nn.Module, path: Path) -> None:
    """Gather the model, and write it as one file."""
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        plain = adq.quantize_(adq.create_model("digits_cnn"), CONFIG)
        plain.load_state_dict(whole)
        adq.save(plain, path, packed=True)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if place().type == "cuda":
        torch.cuda.set_device(place())
    dist.init_process_group()
    model, losses = train(folder, EPOCHS)
    save(model, folder / "model.safetensors")
    if dist.get_rank() == 0:
        print("loss of each epoch:", *(f"{loss:.3f}" for loss in losses))
    dist.destroy_process_group()

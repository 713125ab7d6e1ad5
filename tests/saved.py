"""A small trained network to be saved, and its file taken apart, rewritten and forged by hand."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import adq
from adq import ADQConfig, WeightConfig, artifact, container

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


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a model file by their own names."""
    return container.read(path)[1]


def parts_of(path: Path) -> dict[str, Any]:
    """The header of a model file."""
    return container.read(path)[0].header


def forge(
    path: Path,
    data: bytes,
    changes: dict[str, Tensor | None] | None = None,
    metadata: dict[str, str | None] | None = None,
    text: str | None = None,
    seal: bool = True,
    **parts: Any,
) -> None:
    """A model file with some tensors, metadata and parts of the header changed (None: taken out), its digest right.

    ``text`` takes the place of the whole header; ``tensors``, a part, of the index of a packed file.
    """
    path.write_bytes(data)
    contents, mapped = container.read(path)
    tensors = {name: tensor.clone() for name, tensor in mapped.items()}  # out of the file that is written over
    tensors = {name: tensor for name, tensor in {**tensors, **(changes or {})}.items() if tensor is not None}
    stored, index = container._merge(tensors) if contents.packed else (tensors, None)
    header = {**contents.header, **({"tensors": index} if contents.packed else {}), **parts}
    header = {key: part for key, part in header.items() if parts.get(key, "") is not None}
    text = json.dumps(header) if text is None else text
    values = {**read(path)[0]["__metadata__"], "checksum": "0" * 64}
    if contents.packed:
        stored["header"] = torch.frombuffer(bytearray(zlib.compress(text.encode())), dtype=torch.uint8)
    else:
        values["header"] = text
    values = {key: value for key, value in {**values, **(metadata or {})}.items() if value is not None}
    with open(path, "wb") as file:
        container._write_safetensors(file, stored, values)
    if seal and "checksum" in values:
        container._seal(path)


def save_version_1(model: nn.Module, path: Path, packed: bool, architecture: dict | None = None) -> None:
    """As adq 0.1 before checksums wrote it: tensors by name, codes of the first of the layers that share a weight."""
    state, shapes = artifact.plain_state(model), {}
    if packed:
        state, _ = artifact.packed_state(model)
        for name, (layer, quantizer) in adq.convert.weight_quantizers(model).items():
            shapes[name] = list(layer.weight.shape)
            state[f"{name}.weight_quantizer.codebook"] = quantizer.codebook.detach()
        counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
        state |= counters
    tensors, aliases = artifact._without_aliases(state)
    if packed:
        for key in [key for key in aliases if key.endswith(".codes")]:
            del aliases[key]
    parts = artifact.Header(1, packed, architecture, artifact._present_config(model), shapes, aliases, {}).parts()
    metadata = {"format": "adq-model", "format_version": "1", "adq_version": "0.1.0", "packed": json.dumps(packed)}
    save_file(tensors, path, metadata=metadata | {key: json.dumps(part) for key, part in parts.items()})

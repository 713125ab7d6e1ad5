"""The model file: safetensors with JSON metadata, plain (to train on) or packed (to ship). No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from adq.config import ActivationConfig, LayerConfig, WeightConfig, from_dict, to_dict
from adq.convert import convert_layers_, quantized_layers, weight_quantizers
from adq.functional import pack, unpack
from adq.models import create_model
from adq.nn.activation import ActivationQuantizer
from adq.nn.weight import WeightQuantizer
from adq.ops import packed_size
from adq.store import replacing

FORMAT = "adq-model"
FORMAT_VERSION = 1
CODES = "codes"
TRAINING_STATE = ("ema_count", "ema_total", "steps")


def _version() -> str:
    try:
        return version("adq")
    except PackageNotFoundError:
        return "unknown"


@dataclass(frozen=True)
class Header:
    """What a model file says of itself.

    Attributes:
        version: of the format.
        packed: whether weights are stored as packed codes.
        architecture: ``{"name", "num_classes", "kwargs"}`` of a registered model, or None.
        layers: configuration of every quantized layer, by qualified name.
        shapes: weight shape of every layer stored as codes.
        aliases: state dict keys that share the tensor of another key.
    """

    version: int
    packed: bool
    architecture: dict[str, Any] | None
    layers: dict[str, LayerConfig]
    shapes: dict[str, list[int]]
    aliases: dict[str, str]

    def to_metadata(self) -> dict[str, str]:
        """The header as safetensors metadata (strings)."""
        return {
            "format": FORMAT,
            "format_version": str(self.version),
            "adq_version": _version(),
            "packed": json.dumps(self.packed),
            "architecture": json.dumps(self.architecture),
            "layers": json.dumps({name: to_dict(config) for name, config in self.layers.items()}),
            "shapes": json.dumps(self.shapes),
            "aliases": json.dumps(self.aliases),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, path: Path) -> Header:
        """Parse and check; ValueError names the file and what is wrong with it."""
        if not metadata or metadata.get("format") != FORMAT:
            raise ValueError(f"adq: {path} is not an adq model (a float checkpoint? use load_float_weights)")
        number = metadata.get("format_version", "")
        if not number.isdigit() or int(number) > FORMAT_VERSION:
            raise ValueError(f"adq: {path} has format version {number!r}, this adq reads up to {FORMAT_VERSION}; update adq")
        try:
            layers = {name: _layer_config(value) for name, value in json.loads(metadata["layers"]).items()}
            values = {key: json.loads(metadata[key]) for key in ("packed", "architecture", "shapes", "aliases")}
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"adq: {path} has a damaged header: {error}") from error
        return cls(version=int(number), layers=layers, **values)


def _layer_config(values: dict[str, Any]) -> LayerConfig:
    weight, activation = values["weight"], values["activation"]
    return LayerConfig(
        None if weight is None else from_dict(WeightConfig, weight),
        None if activation is None else from_dict(ActivationConfig, activation),
        bool(values["pinned"]),
    )


def _present_config(model: nn.Module) -> dict[str, LayerConfig]:
    configs = {}
    for name, layer in quantized_layers(model).items():
        weight, activation = layer.weight_quantizer, layer.input_quantizer
        is_weight = isinstance(weight, WeightQuantizer)
        configs[name] = LayerConfig(
            weight.config if is_weight else None,
            activation.config if isinstance(activation, ActivationQuantizer) else None,
            weight.pinned if is_weight else False,
        )
    return configs


def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a packed file, and the shapes of the weights stored as codes.

    Each quantized ``<layer>.weight`` becomes ``<layer>.codes``, b bits a weight without padding between them;
    codebook and scale stay, the state of training goes.
    """
    state = dict(model.state_dict())
    shapes: dict[str, list[int]] = {}
    for name, (layer, quantizer) in weight_quantizers(model).items():
        prefix = f"{name}." if name else ""
        shapes[name] = list(layer.weight.shape)
        state[f"{prefix}{CODES}"] = pack(quantizer.encode(layer.weight), quantizer.bits)
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.weight_quantizer, WeightQuantizer):
            prefix = f"{name}." if name else ""
            for key in ("weight", *(f"weight_quantizer.{key}" for key in TRAINING_STATE)):
                del state[f"{prefix}{key}"]
    return state, shapes


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the packed file."""
    tensors, _ = _without_aliases(packed_state(model)[0])
    return sum(tensor.nbytes for tensor in tensors.values())


def _without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Contiguous CPU tensors, those of shared memory once, and who shares whose."""
    first: dict[tuple[Any, ...], str] = {}
    tensors, aliases = {}, {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else (key,)
        if place in first:
            aliases[key] = first[place]
        else:
            first[place] = key
            tensors[key] = tensor.detach().cpu().contiguous()
    return tensors, aliases


def save(
    model: nn.Module, path: str | Path, *, packed: bool = False, architecture: dict[str, Any] | None = None
) -> Path:
    """Save a quantized model as one safetensors file, written to a temporary name and renamed.

    Args:
        model: quantized model.
        path: file to write.
        packed: store codes of b bits instead of float weights, without the state of training: what ships.
        architecture: ``{"name", "num_classes", "kwargs"}`` for :func:`adq.create_model`, so that the file alone
            rebuilds the model; default: what ``create_model`` noted on the model, if it came from there.

    Returns:
        The path.

    Raises:
        ValueError: not quantized, or a NaN or infinity in the model (the tensor is named).
    """
    layers = _present_config(model)
    if not layers:
        raise ValueError("adq: the model is not quantized; save float models with safetensors")
    state, shapes = packed_state(model) if packed else (dict(model.state_dict()), {})
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"adq: not saved: {key} holds NaN or infinity")
    tensors, aliases = _without_aliases(state)
    architecture = architecture or getattr(model, "adq_architecture", None)
    header = Header(FORMAT_VERSION, packed, architecture, layers, shapes, aliases)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header.to_metadata())
    return Path(path)


def read_header(path: str | Path) -> Header:
    """The header of a model file, without its tensors; errors as :func:`load`."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"adq: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return Header.from_metadata(file.metadata(), path)
    except SafetensorError as error:
        raise ValueError(f"adq: {path} is truncated or not a safetensors file: {error}") from error


def load(path: str | Path, model: nn.Module | None = None, *, device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a quantized model from a file of :func:`save`.

    Args:
        path: the file.
        model: a float model of the file's architecture, converted in place; default: the registered
            architecture that the file names.
        device: where the returned model lives.

    Returns:
        The quantized model, calibrated and in evaluation mode. From a plain file it trains on exactly as the
        saved one would; from a packed one weights are the decoded ones, and it predicts the same.

    Raises:
        FileNotFoundError, ValueError: no such file; truncated, not safetensors, not an adq model, of a newer
            format; another architecture (missing, unexpected and misshapen tensors are named). A model
            that was passed in is unchanged then.
    """
    path = Path(path)
    header = read_header(path)
    if model is None:
        if header.architecture is None:
            raise ValueError(f"adq: {path} names no registered architecture; pass the float model: adq.load(path, model)")
        model = create_model(
            header.architecture["name"], header.architecture["num_classes"], **header.architecture["kwargs"]
        )
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}
    state = _unpacked(state, header, path) | {}
    state.update({key: state[kept] for key, kept in header.aliases.items() if kept in state})
    _check_architecture(model, header, state, path)
    convert_layers_(model, header.layers, fitted=False)
    model.load_state_dict(state, strict=not header.packed)
    return model.eval().to(device)


def _unpacked(state: dict[str, Tensor], header: Header, path: Path) -> dict[str, Tensor]:
    """Float weights in place of codes: ``scale * codebook[code]``."""
    for name, shape in header.shapes.items():
        prefix = f"{name}." if name else ""
        config = header.layers.get(name)
        try:
            codes = state.pop(f"{prefix}{CODES}")
            codebook = state[f"{prefix}weight_quantizer.codebook"].sort().values
            scale = state[f"{prefix}weight_quantizer.scale"]
        except KeyError as error:
            raise ValueError(f"adq: {path} lacks the tensor {error} of layer {name!r}") from error
        if config is None or config.weight is None:
            raise ValueError(f"adq: {path} has codes for layer {name!r}, which is not a quantized one")
        bits = config.weight.bits
        numel = torch.Size(shape).numel()
        if min(shape, default=1) < 0 or codes.dtype != torch.uint8 or codes.numel() != packed_size(numel, bits):
            raise ValueError(
                f"adq: {path}: layer {name!r} of shape {shape} needs {packed_size(numel, bits)} bytes of codes, "
                f"got {codes.numel()}"
            )
        code = unpack(codes, bits, shape).int()
        if codebook.numel() == 0 or (numel and int(code.max()) >= codebook.numel()):
            raise ValueError(f"adq: {path}: layer {name!r} has codes beyond its {codebook.numel()} levels")
        state[f"{prefix}weight"] = codebook[code] * scale
    return state


def _check_architecture(model: nn.Module, header: Header, state: Mapping[str, Tensor], path: Path) -> None:
    """Compare names and shapes of the float model with the file before anything is touched."""
    own = {key for name in header.layers for key in _quantizer_keys(name, state)}
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    found = {key: tensor.shape for key, tensor in state.items() if key not in own}
    problems = [f"missing {key}" for key in expected.keys() - found.keys()]
    problems += [f"unexpected {key}" for key in found.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(found[key])} in the file, {tuple(expected[key])} in the model"
        for key in expected.keys() & found.keys()
        if expected[key] != found[key]
    ]
    modules = dict(model.named_modules())
    problems += [f"no layer {name!r}" for name in header.layers if name not in modules]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"adq: {path} is of another architecture: {'; '.join(sorted(problems)[:5])}{more}")


def _quantizer_keys(name: str, state: Mapping[str, Tensor]) -> list[str]:
    prefix = f"{name}." if name else ""
    return [key for key in state if key.startswith((f"{prefix}weight_quantizer.", f"{prefix}input_quantizer."))]

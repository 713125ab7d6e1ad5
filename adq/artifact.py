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
from adq.models import rebuild
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QUANTIZED
from adq.nn.weight import WeightQuantizer
from adq.ops import packed_size
from adq.store import replacing

FORMAT = "adq-model"
FORMAT_VERSION = 1
CODES = "codes"
TRAINING_STATE = ("ema_count", "ema_total", "steps")


def installed_version() -> str:
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
            "adq_version": installed_version(),
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
            raise ValueError(
                f"adq: {path} has format version {number!r}, this adq reads up to {FORMAT_VERSION}; update adq"
            )
        try:
            layers = {name: _layer_config(value) for name, value in json.loads(metadata["layers"]).items()}
            values = {key: json.loads(metadata[key]) for key in ("packed", "architecture", "shapes", "aliases")}
            _check_header(**values)
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"adq: {path} has a damaged header: {error}") from error
        return cls(version=int(number), layers=layers, **values)


def _check_header(packed: Any, architecture: Any, shapes: Any, aliases: Any) -> None:
    if not isinstance(packed, bool) or not isinstance(architecture, (dict, type(None))):
        raise ValueError("packed must be true or false, architecture a mapping or null")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"the shape of {name!r} is {shape!r}")
    if not all(isinstance(kept, str) for kept in aliases.values()):
        raise ValueError(f"aliases are {aliases!r}")


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
        configs[name] = LayerConfig(
            weight.config if isinstance(weight, WeightQuantizer) else None,
            activation.config if isinstance(activation, ActivationQuantizer) else None,
            weight.pinned if isinstance(weight, WeightQuantizer) else False,
        )
    return configs


def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a packed file, and the shapes of the weights stored as codes.

    Each quantized ``<layer>.weight`` becomes ``<layer>.codes``, b bits a weight without padding between them;
    codebook and scale stay, the state of training goes. A weight that a layer in float uses too stays as it is.
    """
    state = dict(model.state_dict())
    layers = {
        _prefix(name): layer
        for name, layer in quantized_layers(model).items()
        if isinstance(layer.weight_quantizer, WeightQuantizer)
    }
    own = {f"{prefix}weight" for prefix in layers}
    in_float = {tensor.data_ptr() for key, tensor in state.items() if key not in own}  # an embedding's, say
    shapes: dict[str, list[int]] = {}
    for name, (layer, quantizer) in weight_quantizers(model).items():
        if layer.weight.data_ptr() not in in_float:
            shapes[name] = list(layer.weight.shape)
            state[f"{_prefix(name)}{CODES}"] = pack(quantizer.encode(layer.weight), quantizer.bits)
    for prefix, layer in layers.items():
        dropped = [f"weight_quantizer.{key}" for key in TRAINING_STATE]
        for key in dropped if layer.weight.data_ptr() in in_float else ["weight", *dropped]:
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
            raise ValueError(
                f"adq: {path} names no registered architecture; pass the float model: adq.load(path, model)"
            )
        model = rebuild(header.architecture)
    elif quantized_layers(model):
        raise ValueError("adq: load takes a float model to convert, this one is quantized already")
    with safe_open(path, framework="pt") as file:
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state.update({key: state[kept] for key, kept in header.aliases.items() if kept in state})
    _check_architecture(model, header, state, path)
    _decode(state, header, path)
    convert_layers_(model, header.layers, fitted=False)
    model.load_state_dict(state, strict=not header.packed)
    return model.eval().to(device)


def _decode(state: dict[str, Tensor], header: Header, path: Path) -> None:
    """Put float weights in place of codes: ``scale * codebook[code]``."""
    for name, shape in header.shapes.items():
        prefix, config = _prefix(name), header.layers[name].weight
        assert config is not None
        codebook = state[f"{prefix}weight_quantizer.codebook"].sort().values
        code = unpack(state.pop(f"{prefix}{CODES}"), config.bits, tuple(shape))
        if code.numel() and int(code.max()) >= codebook.numel():
            raise ValueError(f"adq: {path}: layer {name!r} has codes beyond its {codebook.numel()} levels")
        state[f"{prefix}weight"] = codebook[code.int()] * state[f"{prefix}weight_quantizer.scale"]


def _check_architecture(model: nn.Module, header: Header, state: Mapping[str, Tensor], path: Path) -> None:
    """Compare layers, names, shapes and kinds with the file before anything is touched."""
    modules = dict(model.named_modules())
    problems = [f"no layer {name!r} to quantize" for name in header.layers if type(modules.get(name)) not in QUANTIZED]
    if not problems:
        coded = {name: header.layers.get(name, LayerConfig(None, None)).weight for name in header.shapes}
        problems += [f"no quantized layer {name!r} for the codes" for name, config in coded.items() if config is None]
        problems += [
            f"{name}.weight is {tuple(shape)} in the file, {tuple(modules[name].weight.shape)} in the model"
            for name, shape in header.shapes.items()
            if coded[name] is not None and shape != list(modules[name].weight.shape)
        ]
    if not problems:
        problems = _differences(_expected(model, header), state)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"adq: {path} is of another architecture: {'; '.join(sorted(problems)[:5])}{more}")


def _expected(model: nn.Module, header: Header) -> dict[str, Tensor]:
    """What a file of this header holds for this float model: tensors without memory, by name."""
    expected = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in header.layers}
    coded = {id(layers[name].weight) for name in header.shapes}
    for name, config in header.layers.items():
        prefix, layer = _prefix(name), layers[name]
        if config.activation is not None:
            expected.update(ActivationQuantizer(config.activation).state_dict(prefix=f"{prefix}input_quantizer."))
        if config.weight is None:
            continue
        axis = QUANTIZED[type(layer)].channel_axis
        quantizer = WeightQuantizer(layer.weight.detach().to("meta"), config.weight, axis, fitted=False)
        tensors = quantizer.state_dict(prefix=f"{prefix}weight_quantizer.")
        dropped = [f"{prefix}weight_quantizer.{key}" for key in TRAINING_STATE] if header.packed else []
        expected.update({key: tensor for key, tensor in tensors.items() if key not in dropped})
        if id(layer.weight) in coded:
            del expected[f"{prefix}weight"]
        if name in header.shapes:
            size = packed_size(layer.weight.numel(), quantizer.bits)
            expected[f"{prefix}{CODES}"] = torch.empty(size, dtype=torch.uint8, device="meta")
    return expected


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    problems = [f"missing {key}" for key in expected.keys() - found.keys()]
    problems += [f"unexpected {key}" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        want, have = expected[key], found[key]
        if want.shape != have.shape:
            problems.append(f"{key} is {tuple(have.shape)} in the file, not {tuple(want.shape)}")
        elif want.dtype != have.dtype and not (want.is_floating_point() and have.is_floating_point()):
            problems.append(f"{key} is {have.dtype} in the file, not {want.dtype}")
    return problems


def _prefix(name: str) -> str:
    """Of the state dict keys of a layer; the model itself may be the layer."""
    return f"{name}." if name else ""

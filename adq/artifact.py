"""The model file: what it holds of a model, plain (to train on) or packed (to ship). No pickle."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase

from adq import container
from adq.batch_norm import expected_statistics, restore_statistics_, saved_statistics
from adq.config import ActivationConfig, LayerConfig, WeightConfig, from_dict, to_dict
from adq.container import check_shape
from adq.convert import (
    convert_layers_,
    convertible,
    float_reasons,
    load_tensors_,
    note_reason,
    pack_,
    packed_weights,
    quantized_layers,
    quantizer_prefixes,
    refuse_disabled,
    refuse_distributed,
    refuse_packed,
    refuse_recomputed,
    unwrapped,
    warn_unreached,
)
from adq.fold import attach_, fold_batch_norm_, fold_problem, folded_norms, is_folded
from adq.functional import code_bits, unpack
from adq.messages import listed
from adq.models import rebuild
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QUANTIZED
from adq.nn.packed import CODES, PackedWeight
from adq.nn.weight import WeightQuantizer
from adq.ops import packed_size
from adq.restore import unchanged_on_error
from adq.sharded import refuse_sharded
from adq.store import replacing

TRAINING_STATE = ("ema_count", "ema_total", "steps")
CALIBRATED = "input_quantizer.calibrated"
"""Float32 in a model, bool in its file."""
COUNTER = "num_batches_tracked"
"""Of norms with running statistics: state of training too."""


MODEL, PACKED_MODEL = "model.safetensors", "model-packed.safetensors"
"""Names in a run folder of ``adq train``."""


def model_file(path: str | Path) -> Path:
    """The file itself; of a run folder the plain model, or the packed one where that is all there is."""
    path = Path(path)
    if not path.is_dir():
        return path
    return path / next((name for name in (MODEL, PACKED_MODEL) if (path / name).is_file()), MODEL)


def installed_version() -> str:
    try:
        return version("adq")
    except PackageNotFoundError:
        return "unknown"


OPTIONAL = ("folded", "in_float")
"""Parts of the header that are left out where there is nothing to say."""


@dataclass(frozen=True)
class Header:
    """What a model file says of its model.

    Attributes:
        version: of the format.
        packed: whether weights are stored as packed codes.
        architecture: ``{"name", "num_classes", "kwargs"}`` of a registered model, or None.
        layers: configuration of every quantized layer, by qualified name.
        shapes: weight shape of every layer stored as codes.
        aliases: state dict keys that share the tensor of another key.
        folded: batch norms that are folded into a layer, by its name.
        in_float: why layers were left in float, by their names.
    """

    version: int
    packed: bool
    architecture: dict[str, Any] | None
    layers: dict[str, LayerConfig]
    shapes: dict[str, list[int]]
    aliases: dict[str, str]
    folded: dict[str, str]
    in_float: dict[str, str] = field(default_factory=dict)

    def parts(self) -> dict[str, Any]:
        """What :mod:`adq.container` writes, by the names of :data:`adq.container.PARTS`."""
        parts = {
            "architecture": self.architecture,
            "layers": {name: to_dict(config) for name, config in self.layers.items()},
            "shapes": self.shapes,
            "aliases": self.aliases,
        }
        return parts | {name: getattr(self, name) for name in OPTIONAL if getattr(self, name)}

    @classmethod
    def parse(cls, contents: container.Contents, path: Path) -> Header:
        """Check the parts of a file's header; ValueError names the file and what is wrong with it."""
        values = contents.header
        try:
            _check_architecture_record(values["architecture"])
            layers = {name: _layer_config(value) for name, value in values["layers"].items()}
            for name, shape in values["shapes"].items():
                check_shape(name, shape)
            optional = [values.get(part, {}) for part in OPTIONAL]
            for part, names in zip(("aliases", *OPTIONAL), (values["aliases"], *optional), strict=True):
                if not all(isinstance(name, str) for name in names.values()):
                    raise ValueError(f"{part} is {names!r:.200}")
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"adq: {path} has a damaged header: {error}") from error
        parts = values["architecture"], layers, values["shapes"], values["aliases"], *optional
        return cls(contents.version, contents.packed, *parts)


def _check_architecture_record(record: Any) -> None:
    if record is None:
        return
    if not isinstance(record, dict):
        raise ValueError("architecture must be a mapping or null")
    kinds = {"name": (str,), "num_classes": (int,), "kwargs": (dict,)}
    for key, value in record.items():
        if key in kinds and type(value) not in kinds[key]:
            raise ValueError(f"{key} of the architecture is {value!r:.200}")


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


# ---- saving ------------------------------------------------------------------------------------------


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a plain file: the state dict, layers under their first names."""
    layers = quantized_layers(model)
    calibrated = {f"{_prefix(name)}{CALIBRATED}" for name in layers}
    state = _by_first_name(model.state_dict(), model, layers)
    return {key: tensor.bool() if key in calibrated else tensor for key, tensor in state.items()}


def _by_first_name(state: Mapping[str, Tensor], model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A state dict without the further names of layers that are registered more than once."""
    held = set(layers.values())
    named = model.named_modules(remove_duplicate=False)
    further = tuple(_prefix(name) for name, module in named if module in held and name not in layers)
    return {key: tensor for key, tensor in state.items() if not key.startswith(further)}


def packed_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """The tensors of a packed file, and the shapes of the weights stored as codes.

    Each quantized ``<layer>.weight`` becomes ``<layer>.codes``, b bits a weight without padding between them;
    codebook and scale stay, the state of training goes. A weight that a layer in float uses too stays as it is.
    """
    counters = _counters(model)
    state = {key: tensor for key, tensor in plain_state(model).items() if key not in counters}
    shapes: dict[str, list[int]] = {}
    weights = packed_weights(model)
    codes = {id(weight): weight.row_major_codes() for weight in weights.values()}
    for name, layer in quantized_layers(model).items():
        prefix, weight = _prefix(name), weights.get(name)
        for key in TRAINING_STATE:
            state.pop(f"{prefix}weight_quantizer.{key}", None)
        if weight is not None:
            shapes[name] = list(weight.shape)
            state.pop(f"{prefix}{layer.weight_name}", None)
            state[f"{prefix}{CODES}"] = codes[id(weight)]
            state[f"{prefix}weight_quantizer.codebook"] = weight.codebook
            state[f"{prefix}weight_quantizer.scale"] = weight.scale
    return dict(sorted(state.items())), shapes


def _counters(model: nn.Module) -> set[str]:
    """State dict keys of what norms count."""
    named = model.named_modules(remove_duplicate=False)
    return {f"{_prefix(name)}{COUNTER}" for name, module in named if isinstance(module, _NormBase)}


def packed_bytes(model: nn.Module) -> int:
    """Bytes of all tensors of the packed file, its header not counted."""
    state = packed_state(model)[0]
    tensors, _ = _without_aliases({key: value for key, value in state.items() if isinstance(value, Tensor)})
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
    model: nn.Module,
    path: str | Path,
    *,
    packed: bool = False,
    fold_batch_norm: bool = False,
    architecture: dict[str, Any] | None = None,
) -> Path:
    """Save a quantized model as one safetensors file, written to a temporary name and renamed.

    Args:
        model: quantized model; what ``torch.compile``, ``DistributedDataParallel`` or ``AveragedModel`` have put around
            it is left out.
        path: file to write.
        packed: store codes of b bits instead of float weights, without the state of training: what ships. Code of the
            model that reads a layer's weight itself will read the quantized one.
        fold_batch_norm: with ``packed``, without the batch norms that follow convolutions
            (:func:`adq.fold_batch_norm_`); the model itself keeps them.
        architecture: ``{"name", "num_classes", "kwargs"}`` for :func:`adq.create_model`, so that the file alone
            rebuilds the model; default: what ``create_model`` noted on the model, if it came from there and has the
            same shapes still.

    Returns:
        The path.

    Raises:
        ValueError: not quantized, a NaN in the model, or an infinity anywhere but in buffers of its own (the tensor is
            named), a quantizer that is disabled, a weight that is recomputed at each call, or a plain file of a model
            that is packed; weights that FSDP2 has sharded; batch norms cannot be folded.
    """
    model = unwrapped(model)
    if not quantized_layers(model):
        raise ValueError("adq: the model is not quantized; save float models with safetensors")
    refuse_disabled(model)
    refuse_sharded(model.parameters(), "a file")
    refuse_recomputed(model)
    if fold_batch_norm:
        if not packed:
            raise ValueError("adq: batch norms are folded into packed files alone; pass packed=True")
        model = fold_batch_norm_(copy.deepcopy(model))
    if packed:
        warn_unreached(model)
    else:
        refuse_packed(model, "a file to train on")
    state, shapes = packed_state(model) if packed else ({**plain_state(model), **saved_statistics(model)}, {})
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in container.DTYPES:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"adq: not saved: {key} is {kind}, which files do not hold")
    if bad := _not_finite(model, state):
        raise ValueError(f"adq: not saved: {bad} holds NaN or infinity")
    tensors, aliases = _without_aliases(state)
    architecture = _architecture(model, architecture)
    layers, folded = _present_config(model), folded_norms(model)
    in_float = float_reasons(model)
    header = Header(container.FORMAT_VERSION, packed, architecture, layers, shapes, aliases, folded, in_float)
    with replacing(path) as temporary:
        container.write(temporary, tensors, header.parts(), packed, installed_version())
    return Path(path)


def _not_finite(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor with a NaN, or with an infinity that it must not hold; None if there is none.

    Buffers of the model's own may be infinite, as the mask of an attention; those of batch norms and quantizers not.
    """
    free = {
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if not isinstance(module, (BatchNorm, WeightQuantizer, ActivationQuantizer))
        for key, _ in module.named_buffers(recurse=False, remove_duplicate=False)  # of TorchScript modules, too
    }
    for key, tensor in state.items():
        if not bool(tensor.isfinite().all()) and (key not in free or bool(tensor.isnan().any())):
            return key
    return None


def _architecture(model: nn.Module, given: dict[str, Any] | None) -> dict[str, Any] | None:
    """The record that goes into the file; what was noted on a model that has other shapes by now is left out."""
    record = given or getattr(model, "adq_architecture", None)
    _check_architecture_record(record)
    if record is None:
        return None
    if missing := {"name", "num_classes"} - set(record):
        raise ValueError(f"adq: not saved: the architecture lacks {', '.join(sorted(missing))}: {record}")
    if given is None and not _is_of(model, record):
        warnings.warn(
            f"adq: the model is no {record['name']!r} of {record['num_classes']} classes any more, so the file names "
            "no architecture; load it by adq.load(path, model)",
            stacklevel=3,
        )
        return None
    return record


def _is_of(model: nn.Module, record: dict[str, Any]) -> bool:
    """Whether a model has the parameters of an architecture, as far as they can be told without making them."""
    try:
        with torch.device("meta"):
            fresh = rebuild(record)
    except Exception:  # whatever an architecture raises that cannot be made like that
        return True
    if is_folded(model):  # and so without those batch norms
        return True
    named = model.named_parameters(remove_duplicate=False)
    layers = quantized_layers(model, every_name=True)
    quantizers = quantizer_prefixes(layers)
    own = {name: p.shape for name, p in named if not name.startswith(quantizers)}
    packed = [(name, layer) for name, layer in layers.items() if layer.packed]
    own |= {f"{_prefix(n)}{q.weight_name}": cast(PackedWeight, q.weight_quantizer).shape for n, q in packed}
    return own == {name: p.shape for name, p in fresh.named_parameters(remove_duplicate=False)}


# ---- loading -----------------------------------------------------------------------------------------


def load(path: str | Path, model: nn.Module | None = None, *, device: str | torch.device = "cpu") -> nn.Module:
    """Rebuild a quantized model from a file of :func:`save`.

    Args:
        path: the file, or a run folder of ``adq train``.
        model: a float model of the file's architecture, converted in place, inside of what ``torch.compile`` or
            ``DataParallel`` have put around it; default: the registered architecture that the file names.
        device: where the returned model lives.

    Returns:
        The quantized model, calibrated and in evaluation mode. From a plain file it trains on exactly as the
        saved one would; from a packed one it is what :func:`adq.pack_` makes of the saved model, and predicts the same
        (see there for code that reads weights past their layers).

    Raises:
        FileNotFoundError, ValueError: no such file; truncated, changed since it was written, not safetensors, not an
            adq model, of a newer format; values that no model has; another architecture (missing, unexpected and
            misshapen tensors are named); a model on the meta device, or inside ``DistributedDataParallel``. A model
            that was passed in is unchanged then.
    """
    path = model_file(path)
    contents, state = container.read(path)
    header = Header.parse(contents, path)
    given = model
    if model is not None:
        refuse_distributed(model, "load adds parameters, so call it before wrapping the model")
        model = unwrapped(model)
    if model is not None and quantized_layers(model):
        raise ValueError("adq: load takes a float model to convert, this one is quantized already")
    if model is not None and (without := [key for key, tensor in _tensors(model) if tensor.is_meta]):
        raise ValueError(
            f"adq: load takes a model that has memory: on the meta device are {listed(without)}; where the file holds "
            "every tensor of the model, call model.to_empty(device=...) first"
        )
    _check_values(header, state, path)
    torch.empty(0, device=device)  # raises where there is none such
    model = _build(header, state, path) if model is None else model
    _check_architecture(model, header, state, path)
    with nullcontext() if given is None else unchanged_on_error(model):
        convert_layers_(model, header.layers, fitted=False)
        if header.packed:
            pack_(model, {name: state[f"{_prefix(name)}{CODES}"].clone() for name in header.shapes})
            attach_(model, header.folded)
        for name, reason in header.in_float.items():
            note_reason(model.get_submodule(name), reason)
        load_tensors_(model, state)  # compared already, but for further names of a layer
        restore_statistics_(model, state)
    return (model if given is None else given).eval().to(device)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _build(header: Header, state: Mapping[str, Tensor], path: Path) -> nn.Module:
    """The float model that the file names, if it is about as large as the file says: a byte of codes is 8 weights."""
    if header.architecture is None:
        raise ValueError(f"adq: {path} names no registered architecture; pass the float model: adq.load(path, model)")
    sizes = {key: tensor.nbytes * (32 if tensor.dtype == torch.uint8 else 1) for key, tensor in state.items()}
    try:
        return rebuild(header.architecture, sum(sizes.values()))
    except ImportError:
        raise
    except Exception as error:  # arguments that an architecture does not take fail in any way
        raise ValueError(f"adq: {path} names an architecture that cannot be built: {error}") from error


def _check_values(header: Header, state: dict[str, Tensor], path: Path) -> None:
    """Resolve aliases and check values; of the values nothing has been made yet."""
    for key, kept in header.aliases.items():
        if key in state or kept not in state or kept in header.aliases:
            raise ValueError(f"adq: {path} has a damaged header: {key} cannot share the tensor of {kept}")
    state.update({key: state[kept] for key, kept in header.aliases.items()})
    calibrated = {f"{_prefix(name)}{CALIBRATED}" for name in header.layers}
    for key, tensor in state.items():
        if tensor.dtype not in container.DTYPES:
            raise ValueError(f"adq: {path}: {key} is {tensor.dtype}")
        if bool(tensor.isnan().any()):
            raise ValueError(f"adq: {path}: {key} holds NaN or infinity")
        if tensor.dtype == torch.bool and bool((tensor.view(torch.uint8) > 1).any()):
            raise ValueError(f"adq: {path}: {key} holds bytes that are neither true nor false")
        if tensor.dtype == torch.bool and key in calibrated:
            state[key] = tensor.float()


def _check_codes(header: Header, state: dict[str, Tensor], path: Path) -> None:
    """Check codes and codebooks whose shapes are right."""
    for name, shape in header.shapes.items():
        key = f"{_prefix(name)}weight_quantizer.codebook"
        if header.version == 1:
            state[key] = state[key].sort().values  # codes were those of the sorted one
        codes, codebook = state[f"{_prefix(name)}{CODES}"], state[key]
        if bool((codebook.diff() < 0).any()):
            raise ValueError(f"adq: {path}: the codebook of layer {name!r} is not ascending")
        levels, bits = codebook.numel(), code_bits(codebook.numel())
        if levels < 2**bits and codes.numel() and int(unpack(codes, bits, tuple(shape)).max()) >= levels:
            raise ValueError(f"adq: {path}: layer {name!r} has codes beyond its {levels} levels")


def _check_architecture(model: nn.Module, header: Header, state: dict[str, Tensor], path: Path) -> None:
    """Compare layers, names, shapes and kinds with the file, and then the codes, before the model is touched."""
    modules = dict(model.named_modules())
    problems = [f"no layer {name!r} to quantize" for name in header.layers if not convertible(modules.get(name))]
    problems += [f"no module {name!r} that is in float" for name in header.in_float if name not in modules]
    if not problems:
        coded = {name: header.layers.get(name, LayerConfig(None, None)).weight for name in header.shapes}
        problems += [f"no quantized layer {name!r} for the codes" for name, config in coded.items() if config is None]
        problems += [
            f"{name}.weight is {tuple(shape)} in the file, {tuple(_weight(modules[name]).shape)} in the model"
            for name, shape in header.shapes.items()
            if coded[name] is not None and shape != list(_weight(modules[name]).shape)
        ]
    if not problems:
        problems = _fold_problems(modules, header)
    if not problems:
        expected = _expected(model, header, state)
        if not header.packed:
            expected.update(expected_statistics(model, state))
        problems = _differences(expected, state, quantizer_prefixes(header.layers))
    if not problems:
        problems = _sharing_problems(model, header, state)
    if problems:
        raise ValueError(f"adq: {path} is of another architecture: {listed(sorted(problems))}")
    if bad := _not_finite(model, state):
        raise ValueError(f"adq: {path}: {bad} holds NaN or infinity")
    _check_codes(header, state, path)


def _fold_problems(modules: Mapping[str, nn.Module], header: Header) -> list[str]:
    """Why batch norms cannot have been folded as the file says."""
    if len(set(header.folded.values())) < len(header.folded) or not header.folded.keys() <= header.shapes.keys():
        return ["its folded batch norms do not have a layer of codes each"]
    problems = []
    for name, norm in header.folded.items():
        problem = fold_problem(modules[name], modules[norm]) if norm in modules else "there is no such batch norm"
        problems += [f"{norm} cannot be folded into {name}: {problem}"] if problem else []
    return problems


def _expected(model: nn.Module, header: Header, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file of this header holds for this float model: tensors without memory, by name.

    Of packed files some lack the counters of other modules too.
    """
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in header.layers}
    state = _by_first_name(model.state_dict(), model, layers)
    expected = {key: tensor.to("meta") for key, tensor in state.items()}
    if header.packed and header.version > 1:
        counters = _counters(model) | {key for key in expected.keys() - found.keys() if key.endswith(COUNTER)}
        expected = {key: tensor for key, tensor in expected.items() if key not in counters}
    for name, norm in header.folded.items():
        folded, modules = model.get_submodule(norm), model.named_modules(remove_duplicate=False)
        own = [*folded._parameters, *folded._buffers]
        gone = {f"{_prefix(other)}{key}" for other, module in modules if module is folded for key in own}
        expected = {key: tensor for key, tensor in expected.items() if key not in gone}
        expected[f"{_prefix(name)}bias"] = layers[name].weight.new_empty(layers[name].out_channels, device="meta")
    coded = {id(_weight(layers[name])) for name in header.shapes}
    for name, config in header.layers.items():
        prefix, layer = _prefix(name), layers[name]
        if config.activation is not None:
            expected.update(ActivationQuantizer(config.activation).state_dict(prefix=f"{prefix}input_quantizer."))
        if config.weight is None:
            continue
        kind, weight = QUANTIZED[type(layer)], _weight(layer)
        quantizer = WeightQuantizer(weight.detach().to("meta"), config.weight, kind.channel_axis, fitted=False)
        tensors = quantizer.state_dict(prefix=f"{prefix}weight_quantizer.")
        dropped = [f"{prefix}weight_quantizer.{key}" for key in TRAINING_STATE] if header.packed else []
        expected.update({key: tensor for key, tensor in tensors.items() if key not in dropped})
        if id(weight) in coded:
            del expected[f"{prefix}{kind.weight_name}"]
        if name in header.shapes:
            size = packed_size(weight.numel(), quantizer.bits)
            expected[f"{prefix}{CODES}"] = torch.empty(size, dtype=torch.uint8, device="meta")
    return expected


def _sharing_problems(model: nn.Module, header: Header, state: Mapping[str, Tensor]) -> list[str]:
    """Tensors that the model has once, and the file as two that differ."""
    pairs = _with_first(model.state_dict(keep_vars=True))
    coded = [name for name, config in header.layers.items() if config.weight is not None]
    for kept, prefix in _with_first({_prefix(name): _weight(model.get_submodule(name)) for name in coded}):
        parts = [key.removeprefix(prefix) for key in state if key.startswith(f"{prefix}weight_quantizer.")]
        pairs += [(kept + part, prefix + part) for part in (CODES, *parts)]
    return [
        f"{key} is not {kept} in the file, the model shares them"
        for kept, key in pairs
        if kept in state and key in state and not torch.equal(state[kept], state[key])
    ]


def _with_first(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Each name after the first one of the same tensor."""
    first: dict[int, str] = {}
    return [(first.setdefault(id(tensor), name), name) for name, tensor in tensors.items()]


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a layer in float that a quantized one can take the place of."""
    return getattr(layer, QUANTIZED[type(layer)].weight_name)


def _differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], exact: tuple[str, ...]) -> list[str]:
    """What differs in name, shape or kind; floats may be others but for keys that begin with one of ``exact``."""
    problems = [f"missing {key}" for key in expected.keys() - found.keys()]
    problems += [f"unexpected {key}" for key in found.keys() - expected.keys()]
    for key in expected.keys() & found.keys():
        want, have = expected[key], found[key]
        casts = want.is_floating_point() and have.is_floating_point() and not key.startswith(exact)
        if want.shape != have.shape:
            problems.append(f"{key} is {tuple(have.shape)} in the file, not {tuple(want.shape)}")
        elif want.dtype != have.dtype and not casts:
            problems.append(f"{key} is {have.dtype} in the file, not {want.dtype}")
    return problems


def _prefix(name: str) -> str:
    """Of the state dict keys of a layer; the model itself may be the layer."""
    return f"{name}." if name else ""

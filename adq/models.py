"""Architectures by name, and float weights from a file.

:func:`create_model` knows the networks defined here, those a user registers, torchvision's
classification models and, where timm is installed, timm's. torchvision and timm are imported only when
one of their models is asked for.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Set
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adq.convert import load_tensors_

Factory = Callable[..., nn.Module]

_REGISTRY: dict[str, tuple[Factory, int]] = {}
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".th", ".ckpt", ".tar")
_WEIGHT_SOURCES = ("weights", "pretrained", "weights_backbone", "checkpoint_path", "pretrained_cfg", "cache_dir")
"""Arguments of torchvision and timm that read other files."""
_EXTRA = {"torchvision": "train", "timm": "timm"}
"""Of adq, that installs the package."""
_LISTED = 5
_SLACK = 2**26
_LEAST = 2**12
"""Bytes that a tensor counts for, however small: the module around it takes as much."""


# ---- registry ----------------------------------------------------------------------------------------


def register_architecture(name: str, factory: Factory, num_classes: int = 10) -> None:
    """Make ``create_model(name)`` call ``factory(num_classes=..., **kwargs)``.

    Args:
        name: the new name; one that is taken already raises ValueError.
        factory: returns the model with freshly initialised weights.
        num_classes: the number of classes when :func:`create_model` is given none.
    """
    if name in _REGISTRY:
        raise ValueError(f"architecture {name!r} is already registered")
    _REGISTRY[name] = (factory, num_classes)


def list_architectures(installed: bool = False) -> list[str]:
    """Names :func:`create_model` accepts: the registered ones and, with ``installed``, torchvision's and timm's."""
    names = sorted(_REGISTRY)
    if installed:
        names += _torchvision_names() if _has("torchvision") else []
        names += _timm_names() if _has("timm") else []
    return names


def create_model(name: str, num_classes: int | None = None, **kwargs: Any) -> nn.Module:
    """A freshly initialised model, in training mode, on the CPU.

    Args:
        name: a registered architecture; or a torchvision classification model, plain (``resnet18``) or as
            ``torchvision/resnet18``; or a timm model, as ``timm/NAME`` or plain when neither of the others
            has the name.
        num_classes: outputs of the classifier; None takes the architecture's own default.
        kwargs: passed to the architecture; they must be representable in JSON.

    Returns:
        The model, with the attribute ``adq_architecture = {"name", "num_classes", "kwargs"}`` from which
        :func:`rebuild` makes it again.

    Raises:
        ValueError: unknown name (with close matches), or arguments that no record can hold.
        ImportError: the name needs a package that is not installed.
    """
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes must be positive, got {num_classes}")
    for key in _WEIGHT_SOURCES:
        if kwargs.get(key):
            raise ValueError(f"create_model takes no {key}=; give the weights as a file to load_float_weights")
    resolved, factory, default = _resolve(name)
    classes = default if num_classes is None else num_classes
    record = {"name": resolved, "num_classes": classes, "kwargs": _plain(name, kwargs)}
    model = factory(num_classes=classes, **kwargs)
    model.adq_architecture = record  # type: ignore[assignment]  # a plain dict, neither module nor tensor
    return model


class _Allowance(TorchDispatchMode):
    """Lets tensors of so many bytes be made, in all; each is tried without memory first."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.left = nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        names = {argument.name for argument in func._schema.arguments}
        if "device" in names and not any(isinstance(x, Tensor) for x in args):
            without = {"device": "meta", "pin_memory": False, "generator": None}
            changed = {name: value for name, value in without.items() if name in names}
            self.left -= max(func(*args, **{**kwargs, **changed}).nbytes, _LEAST)
            if self.left < 0:
                raise ValueError("it would be far larger than the file's tensors")
        return func(*args, **kwargs)


def rebuild(architecture: Mapping[str, Any], nbytes: int | None = None) -> nn.Module:
    """The model that a record ``{"name", "num_classes", "kwargs"}`` describes, freshly initialised.

    Args:
        architecture: the record.
        nbytes: of the tensors that it should have. Some times as much may be made, no more: ValueError.
    """
    missing = {"name", "num_classes"} - set(architecture)
    if missing:
        raise ValueError(f"the architecture record lacks {', '.join(sorted(missing))}: {dict(architecture)}")
    with nullcontext() if nbytes is None else _Allowance(4 * nbytes + _SLACK):
        return create_model(architecture["name"], architecture["num_classes"], **architecture.get("kwargs", {}))


def _plain(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(kwargs))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the arguments of architecture {name!r} must be plain numbers, strings, lists and dicts, "
            f"because saved models record them: {error}"
        ) from error


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _torchvision_names() -> list[str]:
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)


def _timm_names() -> list[str]:
    import timm

    return timm.list_models()


def _torchvision_factory(name: str) -> Factory:
    def factory(num_classes: int, **kwargs: Any) -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, **{**kwargs, "weights": None, "num_classes": num_classes})

    return factory


def _timm_factory(name: str) -> Factory:
    def factory(num_classes: int, **kwargs: Any) -> nn.Module:
        import timm

        return timm.create_model(name, **{**kwargs, "pretrained": False, "num_classes": num_classes})

    return factory


def _resolve(name: str) -> tuple[str, Factory, int]:
    """Full name, factory and default number of classes of an architecture."""
    if name in _REGISTRY:
        return name, *_REGISTRY[name]
    source, _, plain = name.rpartition("/")
    if source in ("torchvision", "timm") and not _has(source):
        raise ImportError(f"architecture {name!r} needs {source}: pip install 'adq[{_EXTRA[source]}]'")
    if source in ("", "torchvision") and _has("torchvision") and plain in _torchvision_names():
        return f"torchvision/{plain}", _torchvision_factory(plain), 1000
    if source in ("", "timm") and _has("timm") and _is_timm(plain):
        return f"timm/{plain}", _timm_factory(plain), 1000
    raise ValueError(_unknown(name))


def _is_timm(name: str) -> bool:
    import timm

    return timm.is_model(name)


def _unknown(name: str) -> str:
    known = list_architectures(installed=True)
    close = difflib.get_close_matches(name.rpartition("/")[2], known, n=5)
    message = f"unknown architecture {name!r}"
    message += f"; close matches: {', '.join(close)}" if close else ""
    message += f". Built in or registered: {', '.join(sorted(_REGISTRY))}"
    for package, extra in _EXTRA.items():
        state = "is installed" if _has(package) else f"is not installed (pip install 'adq[{extra}]')"
        message += f". {package} {state}"
    return message


# ---- built-in networks -------------------------------------------------------------------------------


class DigitsCNN(nn.Module):
    """Four 3x3 convolutions and a linear layer for 8x8 digits: 65,440 weights, ``[N, 1, 8, 8] -> [N, classes]``."""

    def __init__(self, num_classes: int = 10, width: int = 32, in_channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(in_channels, width), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv3x3(width, width), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv3x3(width, 2 * width, stride=2), nn.BatchNorm2d(2 * width)
        self.conv4, self.bn4 = _conv3x3(2 * width, 2 * width), nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, num_classes)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, in_channels, H, W]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = F.relu(self.bn4(self.conv4(x)))
        return self.linear(x.mean((2, 3)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a parameter-free (option A) shortcut, ``[N, C, H, W] -> [N, planes, H/s, W/s]``."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv3x3(in_planes, planes, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = _conv3x3(planes, planes), nn.BatchNorm2d(planes)
        self.stride = stride
        self.pad = (planes - in_planes) // 2

    def forward(self, x: Tensor) -> Tensor:
        """The block's output; the shortcut drops every other pixel and pads the channels with zeros."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1 or self.pad:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet for 32x32 images (arXiv 1512.03385, 4.2): ``depth = 6 n + 2``, ``[N, 3, H, W] -> [N, classes]``."""

    def __init__(self, num_classes: int = 10, depth: int = 20) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"the depth of a CIFAR ResNet is 6 n + 2 (20, 32, 44, 56), got {depth}")
        self.conv1, self.bn1 = _conv3x3(3, 16), nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = self._stage(16, 16, blocks, stride=1)
        self.layer2 = self._stage(16, 32, blocks, stride=2)
        self.layer3 = self._stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, num_classes)
        _initialise(self)

    @staticmethod
    def _stage(in_planes: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
        later = [BasicBlock(planes, planes, 1) for _ in range(blocks - 1)]
        return nn.Sequential(BasicBlock(in_planes, planes, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, 3, H, W]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _conv3x3(in_planes: int, planes: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)


def _cifar_factory(depth: int) -> Factory:
    def factory(num_classes: int = 10) -> nn.Module:
        return CifarResNet(num_classes, depth)

    return factory


register_architecture("digits_cnn", DigitsCNN)
for _depth in (20, 32, 44, 56):
    register_architecture(f"resnet{_depth}", _cifar_factory(_depth))


# ---- float weights -----------------------------------------------------------------------------------


_AUXILIARY_HEADS = ("aux1.", "aux2.", "AuxLogits.")


def load_float_weights(model: nn.Module, path: str | Path) -> None:
    """Load the weights of a float network from a file, in place; the model is unchanged when this raises.

    Args:
        model: the float network, as :func:`create_model` makes it.
        path: ``.safetensors``, or a ``torch.save`` file (.pt, .pth, .bin, .th, .ckpt, .tar) that holds a state
            dict, plain or under ``state_dict``, ``model``, ``model_state`` or ``model_state_dict``. Prefixes
            ``module.``, ``_orig_mod.``, ``model.`` and ``net.`` of all its names are dropped. Batch normalization's
            ``num_batches_tracked`` may be missing, and further names of a tensor that has one in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, of an unknown kind, holds code, belongs to another architecture or
            number of classes, or holds NaN or infinity. The message names the path and the cause.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}" + (": it is a folder" if path.is_dir() else ""))
    state = _strip_prefixes(_read_state(path), model.state_dict().keys())
    if any(f".{key}".endswith(".weight_quantizer.codebook") for key in state.keys() - model.state_dict().keys()):
        raise ValueError(
            f"{path}: the weights of a quantized model, as adq.save writes them; load it by adq.load(path, model), or "
            "let adq train begin from it (--set start=FILE)"
        )
    if getattr(model, "aux_logits", None) is False:  # torchvision's GoogLeNet and Inception v3, whose files have them
        state = {key: value for key, value in state.items() if not key.startswith(_AUXILIARY_HEADS)}
    _check_state(model, state, path)
    load_tensors_(model, state)  # checked above: what may be missing is


def _read_state(path: Path) -> dict[str, Tensor]:
    if path.suffix not in _WEIGHT_SUFFIXES:
        raise ValueError(f"{path}: unknown kind of weight file, expected one of {', '.join(_WEIGHT_SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _unwrap(_read_pickle(path), path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file, damaged or truncated ({error})") from error


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises almost anything
        text = str(error.__context__ or error) or type(error).__name__
        refused = re.search(r"GLOBAL (\S+)", text)
        if refused:
            cause = (
                f"refused, it holds code or objects other than tensors ({refused[1]}); save model.state_dict() alone"
            )
        else:
            cause = f"not a complete torch.save file, damaged or truncated ({text.strip().splitlines()[0]})"
        raise ValueError(f"{path}: {cause}") from error


def _unwrap(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model", "model_state", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path}: holds a {type(loaded).__name__}, not a state dict of tensors")
    others = [str(key) for key, value in loaded.items() if not isinstance(value, Tensor)]
    if others or not loaded:
        detail = f"see {_some(others)}" if others else "it is empty"
        raise ValueError(f"{path}: not a state dict of tensors, {detail}")
    return dict(loaded)


def _strip_prefixes(state: dict[str, Tensor], own: Set[str]) -> dict[str, Tensor]:
    """The state without the names of wrappers, unless the model itself has these names."""
    # compiled inside or outside of the wrapper; as an attribute of a class for training
    for prefix in ("module.", "_orig_mod.", "module.", "model.", "net."):
        if state.keys() <= own:
            break
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _some(items: list[str]) -> str:
    more = len(items) - _LISTED
    return ", ".join(items[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _check_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    own = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    given = {own[key].data_ptr() for key in own if key in state}  # a tied tensor needs one of its names
    missing = [
        key
        for key in own
        if key not in state and not key.endswith("num_batches_tracked") and own[key].data_ptr() not in given
    ]
    unexpected = [key for key in state if key not in own]
    mismatched = [key for key in own if key in state and own[key].shape != state[key].shape]
    if mismatched and not missing and not unexpected:
        _check_classes(model, {key: (own[key], state[key]) for key in mismatched}, path)
    if missing or unexpected or mismatched:
        shapes = [f"{key} {_shape(state[key])} in the file, {_shape(own[key])} in the model" for key in mismatched]
        lines = [("missing in the file", missing), ("not in the model", unexpected), ("other shape", shapes)]
        detail = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in lines if keys)
        raise ValueError(f"{path}: the weights are those of another architecture: {detail}")
    kinds = [
        f"{key} is {state[key].dtype}, the model's {own[key].dtype}"
        for key in state
        if state[key].is_floating_point() != own[key].is_floating_point()
    ]
    if kinds:
        raise ValueError(f"{path}: not float weights: {_some(kinds)}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: NaN or infinity in {_some(broken)}")


def _check_classes(model: nn.Module, pairs: dict[str, tuple[Tensor, Tensor]], path: Path) -> None:
    """Raise ValueError in words when the tensors differ only in the number of the classifier's outputs."""
    layers = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    classifier = {f"{layers[-1]}.weight", f"{layers[-1]}.bias"} if layers else set()
    if set(pairs) <= classifier and all(own.shape[1:] == other.shape[1:] for own, other in pairs.values()):
        own, other = next(iter(pairs.values()))
        raise ValueError(
            f"{path}: the file has {other.shape[0]} classes, the model {own.shape[0]} "
            f"(classifier {layers[-1]}, {_shape(other)} against {_shape(own)})"
        )


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"

"""From a float model to a quantized one, in place: swap layers, switch quantizers, apply bit-widths."""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.swa_utils import AveragedModel

from adq.config import ADQConfig, LayerConfig, check_bits, merge_override, with_bits
from adq.messages import listed
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QUANTIZED, QMultiheadAttention, QuantizedLayer
from adq.nn.packed import PACKED, PackedLinear, PackedWeight, pack_layer_
from adq.nn.weight import WeightQuantizer
from adq.sharded import refuse_sharded
from adq.update import prepare_together, unregister

FilterFn = Callable[[nn.Module, str], bool]

_FLOAT = LayerConfig(None, None)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def quantized_layers(model: nn.Module, *, every_name: bool = False) -> dict[str, QuantizedLayer]:
    """The quantized layers of a model by qualified name, in order of registration.

    Names are those in the :func:`unwrapped` model. With ``every_name`` a layer that is registered more than once stands
    under each of its names, else under the first.
    """
    modules = unwrapped(model).named_modules(remove_duplicate=not every_name)
    return {name: module for name, module in modules if isinstance(module, QuantizedLayer)}


def weight_quantizers(model: nn.Module) -> dict[str, tuple[QuantizedLayer, WeightQuantizer]]:
    """Layers with quantized weights, by name; of layers that share a weight only the first."""
    found: dict[str, tuple[QuantizedLayer, WeightQuantizer]] = {}
    seen: set[int] = set()
    for name, layer in quantized_layers(model).items():
        quantizer = layer.weight_quantizer
        if isinstance(quantizer, WeightQuantizer) and id(quantizer) not in seen:
            seen.add(id(quantizer))
            found[name] = (layer, quantizer)
    return found


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Activation quantizers by the name of their layer."""
    return {
        name: layer.input_quantizer
        for name, layer in quantized_layers(model).items()
        if isinstance(layer.input_quantizer, ActivationQuantizer)
    }


QUANTIZERS = ("weight_quantizer.", "input_quantizer.")
"""Behind a layer's name, what the state dict keys of its quantizers begin with."""


def quantizer_prefixes(layers: Iterable[str]) -> tuple[str, ...]:
    """What the state dict keys of the quantizers of these layers begin with; the model itself may be the layer."""
    return tuple(f"{name}.{part}".lstrip(".") for name in layers for part in QUANTIZERS)


def _matches(key: str, name: str, module: nn.Module) -> bool:
    if key.startswith("re:"):
        return re.fullmatch(key[3:], name) is not None
    if key.startswith("type:"):
        return key[5:] in {kind.__name__ for kind in type(module).__mro__}
    return key == name


@dataclass(frozen=True)
class Choice:
    """What becomes of a layer: its configuration, what decided it, and what overrides say of its weight."""

    module: nn.Module
    config: LayerConfig
    by: str
    weight_overrides: tuple[Any, ...] = ()


def choose_layers(model: nn.Module, config: ADQConfig, filter_fn: FilterFn | None = None) -> dict[str, Choice]:
    """What becomes of each convertible layer of a float model; some stay in float.

    Raises:
        ValueError: an override matches no layer, or only one of two layers that share a weight.
    """
    layers = {name: module for name, module in model.named_modules() if convertible(module)}
    chosen = {name: module for name, module in layers.items() if filter_fn is None or filter_fn(module, name)}
    names = [name for name, module in chosen.items() if not _is_output(module) or _parent(name) in chosen]
    used: set[str] = set()
    found: dict[str, Choice] = {}
    for name, module in layers.items():
        if name not in chosen:
            found[name] = Choice(module, _FLOAT, "excluded by filter_fn")
            continue
        layer, by = LayerConfig(config.weight, config.activation), "weight and activation are None"
        if name in (*names[:1], *names[-1:]):
            bits, by = config.first_last_bits, "first_last_bits is None"
            layer = _FLOAT if bits is None else with_bits(layer, bits)
        layer, matching = _overridden(layer, name, module, config)
        used.update(matching)
        by = f"override {matching[-1]!r}" if matching else by
        if _is_output(module) and _is_float(found.get(_parent(name))):
            layer, by = _FLOAT, "its attention is in float"
        overrides = [config.overrides[key] or {} for key in matching]
        found[name] = Choice(module, layer, by, tuple(o["weight"] for o in overrides if "weight" in o))
    unused = [key for key in config.overrides if key not in used]
    if unused:
        raise ValueError(f"adq: overrides match no layer: {', '.join(unused)}; layers: {', '.join(names)}")
    _refuse_conflicts(found)
    return found


def _overridden(layer: LayerConfig, name: str, module: nn.Module, config: ADQConfig) -> tuple[LayerConfig, list[str]]:
    """A layer's configuration with the overrides that match it, later ones over earlier, and their keys."""
    matching = [key for key in config.overrides if _matches(key, name, module)]
    for key in matching:
        layer = merge_override(layer, config.overrides[key])
    return layer, matching


def _refuse_conflicts(choices: Mapping[str, Choice]) -> None:
    """Raise ValueError if overrides tell layers that share a weight apart; first and last layers may differ."""
    first: dict[int, str] = {}
    for name, choice in choices.items():
        if choice.config.weight is None:
            continue
        owner = first.setdefault(id(getattr(choice.module, QUANTIZED[type(choice.module)].weight_name)), name)
        one, other = ((c.config.weight, c.config.pinned) for c in (choices[owner], choice))
        if one != other and choices[owner].weight_overrides != choice.weight_overrides:
            raise ValueError(
                f"adq: layers {owner!r} and {name!r} share a weight, which is quantized once, but by the overrides it "
                f"would be as {one[0]} and as {other[0]}; let them match both"
            )


def _is_float(choice: Choice | None) -> bool:
    return choice is None or choice.config.is_float


def _is_output(module: nn.Module) -> bool:
    """Whether a layer is the output projection of a ``MultiheadAttention``, which alone can call it."""
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def convertible(module: nn.Module | None) -> bool:
    """Whether a quantized layer can take the place of this module."""
    return isinstance(module, tuple(QUANTIZED)) and obstacle(module) is None


def obstacle(layer: Any) -> str | None:
    """Why a layer of a kind that adq quantizes, or of a subclass, stays in float in any case; None if it need not."""
    kind = type(layer)
    if is_parametrized(layer):
        return f"parametrizations recompute its {' and '.join(layer.parametrizations)} at each call"
    if kind not in QUANTIZED:
        base = next(base for base in kind.__mro__ if base in QUANTIZED)
        if kind.forward is not base.forward:
            return f"{kind.__name__} has a forward of its own"
        return f"{kind.__name__} is a subclass of {base.__name__}, and only {base.__name__} itself is converted"
    if isinstance(layer, nn.MultiheadAttention) and (problem := QMultiheadAttention.problem(layer)):
        return problem
    if QUANTIZED[kind].weight_name not in layer._parameters:  # prune, the old weight_norm
        return "its weight is recomputed at each call"
    return None


def refuse_lazy(model: nn.Module) -> None:
    """Raise ValueError if parameters have no shape yet, as those of ``nn.LazyLinear`` before its first batch."""
    modules = model.named_modules()
    lazy = [repr(name) for name, module in modules if isinstance(module, LazyModuleMixin) and _is_waiting(module)]
    if lazy:
        raise ValueError(f"adq: no weight yet, run one batch through the model first: {listed(lazy, ', ')}")


def _is_waiting(module: Any) -> bool:
    """Whether a lazy module has its first batch still to come, which may change its class too."""
    return module.cls_to_become is not None or module.has_uninitialized_params()


def _refuse_replaced_forwards(layers: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a layer's forward is an attribute of its own: it is called instead of the quantized one."""
    replaced = [repr(name) for name, module in layers.items() if "forward" in vars(module)]
    if replaced:
        raise ValueError(
            "adq: hooks of accelerate, or a patch, have replaced the forward of these layers, which would go on "
            "computing in float; quantize before dispatching or patching, take the hooks off "
            "(accelerate.hooks.remove_hook_from_submodules), or leave the layers in float by overrides or filter_fn: "
            f"{listed(replaced, ', ')}"
        )


def ways_out(unreached: Sequence[str]) -> str:
    """What to do about layers that the batches do not reach, as those that run in training alone."""
    overrides = f"overrides={{{unreached[0]!r}: None}}"
    return f"give batches that reach them in evaluation mode, or leave them in float, as by {overrides}"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside ``torch.compile``, ``DataParallel``, ``DistributedDataParallel`` and ``AveragedModel``."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another, under every name that it is registered by."""
    old = model.get_submodule(name)
    for other, present in list(model.named_modules(remove_duplicate=False)):
        if present is old:
            model.set_submodule(other, module)


def load_tensors_(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the tensors that are given, as those of the model's own version: files say nothing of versions.

    Without one some modules refuse to load, and others take the tensors for those of their first version. Names are
    those in the :func:`unwrapped` model.
    """
    model = unwrapped(model)
    versioned = OrderedDict(state)
    modules = model.named_modules(remove_duplicate=False)
    versioned._metadata = {name: {"version": m._version} for name, m in modules}  # type: ignore[attr-defined]
    model.load_state_dict(versioned, strict=False)


def quantize_(model: nn.Module, config: ADQConfig | None = None, filter_fn: FilterFn | None = None) -> nn.Module:
    """Make a float model a quantized one, in place; codebooks are fitted to the weights at once.

    Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear and MultiheadAttention become quantized layers; subclasses of these stay
    in float, and so does the output projection of an attention that does. If most of the weights do because of their
    kinds, and no ``filter_fn`` is given, a warning says so.
    Of a model inside ``torch.compile`` or ``DataParallel`` layers have the names that they have in the model itself.
    Parameters keep their identity and name, and new ones come for the activations, whose thresholds wait for
    :func:`calibrate_`: build the optimizer, and wrap the model for several processes, afterwards.

    Args:
        model: float model; its training flag stays as it is.
        config: what to quantize how; the default is 3 bits, first and last layer at 8.
        filter_fn: ``(module, qualified name) -> bool``, layers to consider at all; the first and the last one are
            counted among these.

    Returns:
        The same model.

    Raises:
        ValueError: nothing to quantize, or already quantized; an empty, all-zero or non-finite weight, or one of double
            precision; an override that matches nothing, or only one of two layers that share a weight (named); a
            ``config`` of another kind; a model inside ``DistributedDataParallel``; a lazy module that has not run; a
            layer whose forward has been replaced on the object. The model is unchanged then.
    """
    config = config or ADQConfig()
    if not isinstance(config, ADQConfig):
        raise ValueError(
            f"adq: quantize_ takes an ADQConfig, as ADQConfig(weight=WeightConfig(bits=3)), got {type(config).__name__}"
        )
    refuse_distributed(model, "quantize_ adds parameters, so call it, and calibrate_, before wrapping the model")
    if quantized_layers(model):
        raise ValueError("adq: the model is quantized already; quantize_ takes a float model")
    inner = unwrapped(model)
    refuse_lazy(inner)
    choices = choose_layers(inner, config, filter_fn)
    targets = {name: choice.config for name, choice in choices.items() if not choice.config.is_float}
    if not targets:
        raise ValueError("adq: nothing to quantize: no Conv, ConvTranspose or Linear layer was selected")
    with torch.inference_mode(False):  # what is made there can never be trained
        convert_layers_(inner, targets)
    for choice in choices.values():
        if choice.config.is_float:
            note_reason(choice.module, choice.by)
    if filter_fn is None:
        _warn_of_kinds_in_float(inner, config, choices)
    return model


def refuse_distributed(model: nn.Module, instead: str) -> None:
    """Raise ValueError for a model inside ``DistributedDataParallel``, which is about to get parameters."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "adq: DistributedDataParallel averages the gradients of the parameters that it finds when it is made; "
            + instead
        )


def _warn_of_kinds_in_float(model: nn.Module, config: ADQConfig, choices: Mapping[str, Choice]) -> None:
    """Warn if kinds that adq does not convert hold most of the weights that the configuration would have quantized."""
    wanted = LayerConfig(config.weight, config.activation)
    quantized: dict[int, int] = {}
    left: dict[int, int] = {}
    kinds: Counter[str] = Counter()
    for name, module, own in parameter_holders(model):
        matrices = {id(parameter): parameter.numel() for parameter in own.values() if parameter.dim() > 1}
        if name in choices:
            quantized.update(matrices if choices[name].config.weight else {})
        elif matrices and not isinstance(module, _EMBEDDINGS) and _overridden(wanted, name, module, config)[0].weight:
            left.update(matrices)
            cause = f" ({obstacle(module)})" if type(module) in QUANTIZED else ""
            kinds[type(module).__name__ + cause] += 1
    in_float, in_codes = sum(n for key, n in left.items() if key not in quantized), sum(quantized.values())
    if in_float > in_codes:
        warnings.warn(
            f"adq: {in_float / (in_float + in_codes):.0%} of the weights stay in float, because adq does not convert "
            f"what holds them: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}; adq.summary names each",
            stacklevel=3,
        )


def parameter_holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, dict[str, nn.Parameter]]]:
    """Modules with parameters of their own, by name, and these; a layer's are those of its parametrizations too."""
    for name, module in model.named_modules():
        if "parametrizations" in name.split("."):
            continue
        own = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        if is_parametrized(module):
            parts: Any = module.parametrizations
            own.update({f"parametrizations.{key}": parameter for key, parameter in parts.named_parameters()})
        if own:
            yield name, module, own


def note_reason(module: nn.Module, reason: str) -> None:
    """Remember why a module was left in float."""
    module.adq_in_float = reason  # type: ignore[assignment]


def float_reasons(model: nn.Module) -> dict[str, str]:
    """Why :func:`quantize_` left layers in float, by their names."""
    reasons = {name: getattr(module, "adq_in_float", None) for name, module in model.named_modules()}
    return {name: reason for name, reason in reasons.items() if isinstance(reason, str)}


def convert_layers_(model: nn.Module, layers: Mapping[str, LayerConfig], *, fitted: bool = True) -> nn.Module:
    """Convert the named layers as told, in place; the model is unchanged if one of them fails.

    With ``fitted=False`` codebooks are placeholders for a state dict that is loaded next (:func:`adq.load`).
    """
    modules = {name: model.get_submodule(name) for name in layers}
    _refuse_replaced_forwards(modules)
    kinds = {name: type(module) for name, module in modules.items()}
    shared: dict[int, WeightQuantizer] = {}
    try:
        for name, config in layers.items():
            _convert(modules[name], config, name, shared, fitted)
    except Exception:
        for name, module in modules.items():
            _revert(module, kinds[name])
        raise
    _call_layers(model)
    _disable_fused_paths(model)
    prepare_together(model)
    return model


def _call_layers(model: nn.Module) -> None:
    """Let modules that compute with the weights of their layers call these instead."""
    if "torchvision.models.swin_transformer" not in sys.modules:
        return
    from adq.nn.torchvision import CALLING

    for module in model.modules():
        if type(module) in CALLING and quantized_layers(module):
            module.__class__ = CALLING[type(module)]


def _convert(
    module: nn.Module, config: LayerConfig, name: str, shared: dict[int, WeightQuantizer], fitted: bool
) -> None:
    module.__class__ = QUANTIZED[type(module)]
    assert isinstance(module, QuantizedLayer)
    weight = module.weight
    module.attach_(config, name, fitted=fitted, shared=shared.get(id(weight)))
    if isinstance(module.weight_quantizer, WeightQuantizer):
        shared[id(weight)] = module.weight_quantizer


def _revert(module: nn.Module, kind: type[nn.Module]) -> None:
    module.__class__ = kind
    for name in ("weight_quantizer", "input_quantizer"):
        module._modules.pop(name, None)
    unregister(module)


def _disable_fused_paths(model: nn.Module) -> None:
    """Torch's transformer encoder has an inference kernel that reads the weights past their layers' forward."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quantized_layers(module):
            module.activation_relu_or_gelu = 0  # what the kernel's conditions ask first; used for nothing else
        elif isinstance(module, nn.TransformerEncoder) and quantized_layers(module):
            module.use_nested_tensor = False


# ---- to the inference form ---------------------------------------------------------------------------


def packed_weights(model: nn.Module, codes: Mapping[str, Tensor] | None = None) -> dict[str, PackedWeight]:
    """Every quantized weight as codes, by the name of its layer; layers that share a weight share its codes.

    A weight that a layer in float uses too, an embedding's say, is left out: it must stay as it is. Where packed
    codes are given, by the name of a layer, they are taken, and other weights left out.
    """
    layers = {n: layer for n, layer in quantized_layers(model).items() if _has_weight_quantizer(layer)}
    in_float = float_tensors(model)
    made: dict[int, PackedWeight] = {}
    for name, layer in layers.items():
        quantizer: Any = layer.weight_quantizer
        if id(quantizer) in made:
            continue
        if layer.packed:
            made[id(quantizer)] = quantizer
        elif name in codes if codes is not None else layer.weight.data_ptr() not in in_float:
            made[id(quantizer)] = PackedWeight(quantizer, layer.weight, codes[name] if codes is not None else None)
    keys = {name: id(layer.weight_quantizer) for name, layer in layers.items()}
    return {name: made[key] for name, key in keys.items() if key in made}


def float_tensors(model: nn.Module) -> set[int]:
    """Where the tensors lie that files hold in float; among them weights that a layer in float uses too."""
    named = quantized_layers(model, every_name=True)
    own = {f"{name}.{q.weight_name}".lstrip(".") for name, q in named.items() if _has_weight_quantizer(q)}
    others = (value for key, value in unwrapped(model).state_dict().items() if key not in own)
    return {value.data_ptr() for value in others if isinstance(value, Tensor)}  # what get_extra_state gives may be none


def _has_weight_quantizer(layer: QuantizedLayer) -> bool:
    return isinstance(layer.weight_quantizer, WeightQuantizer)


def pack_(model: nn.Module, codes: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Make a quantized model an inference model, in place: weights become packed codes and are decoded when used.

    Its predictions are the same, bit for bit, where weights are used by their layers alone: code that reads
    ``layer.weight`` itself, as tied autoencoders and timm's BEiT do, gets the quantized weight now, and had the float
    one before. Nothing trains any more: no float weights, no state of training, no gradients. It is what
    :func:`adq.load` makes of a packed file. A weight that a layer in float uses too stays as it is.

    Args:
        model: from :func:`adq.quantize_`; one that is packed already stays as it is.
        codes: packed codes by the name of their layer, where they are known.

    Returns:
        The same model, in evaluation mode.

    Raises:
        ValueError: the model is not quantized, a quantizer is disabled, a weight is recomputed at each call, or a
            layer is of a class of its own. The model is unchanged then.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ValueError("adq: the model is not quantized; call adq.quantize_(model) first")
    refuse_disabled(model)
    refuse_recomputed(model)
    for name, layer in layers.items():
        if not layer.packed and type(layer) not in PACKED:
            raise ValueError(f"adq: layer {name!r} is a {type(layer).__name__}, of which there is no inference layer")
    warn_unreached(model)
    for name, packed in packed_weights(model, codes).items():
        if not layers[name].packed:
            pack_layer_(layers[name], packed)
    return model.eval().requires_grad_(False)


def fast_linear_(model: nn.Module) -> nn.Module:
    """Let the linear layers of an inference model multiply with the packed codes themselves, in place.

    Inputs of a few rows (:data:`adq.nn.packed.FEW_ROWS`) need no decoded weight then: of it only the codes are read.
    That sums in another order (:func:`adq.functional.codebook_linear`), so predictions are the same up to float
    rounding, after which an activation close to a threshold may take the next level: this is why nothing does so
    unasked. Larger inputs, and those that need a gradient, are multiplied with the decoded weight; a graph of
    ``torch.export`` holds the one way that its example took. Files say nothing of it: call it after loading.

    Args:
        model: from :func:`adq.load` of a packed file, or :func:`pack_`.

    Returns:
        The same model.

    Raises:
        ValueError: no linear layer has its weight in codes.
    """
    layers = [layer for layer in quantized_layers(model).values() if isinstance(layer, PackedLinear)]
    if not layers:
        raise ValueError("adq: no linear layer has its weight in codes; call adq.pack_(model), or load a packed file")
    for layer in layers:
        layer.fast = True
    return model


def is_packed(model: nn.Module) -> bool:
    """Whether a layer's weight is kept as codes."""
    return any(layer.packed for layer in quantized_layers(model).values())


def refuse_packed(model: nn.Module, what: str) -> None:
    """Raise ValueError if a layer's weight is kept as codes."""
    if is_packed(model):
        raise ValueError(f"adq: {what} needs float weights, and this model is packed; load the plain file instead")


def refuse_disabled(model: nn.Module) -> None:
    """Raise ValueError if a quantizer is disabled: neither packed models nor files know of it."""
    for name, layer in quantized_layers(model).items():
        quantizers = layer.weight_quantizer, layer.input_quantizer
        if not all(getattr(quantizer, "enabled", True) for quantizer in quantizers):
            raise ValueError(f"adq: a quantizer of layer {name!r} is disabled, which no packed model or file can say")


def refuse_recomputed(model: nn.Module) -> None:
    """Raise ValueError if a layer's weight or bias is no parameter of its own any more, as neither packed models nor
    files know what recomputes it.
    """
    for name, layer in quantized_layers(model).items():
        weight = () if layer.packed else (layer.weight_name,)
        gone = [
            key for key in (*weight, "bias", "in_proj_bias") if hasattr(layer, key) and key not in layer._parameters
        ]
        if gone:
            raise ValueError(
                f"adq: {' and '.join(gone)} of layer {name!r} is recomputed at each call, by a "
                "parametrization, weight norm or pruning that came after quantize_; remove the parametrization first "
                "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove): no packed model or file has it"
            )


def warn_unreached(model: nn.Module) -> None:
    """Warn of layers that calibration never reached, of a model that is about to be packed: where other code reads
    their weights, these have been in float until now, and are quantized from then on.
    """
    quantizers = activation_quantizers(model)
    reached = [name for name, quantizer in quantizers.items() if quantizer.is_calibrated]
    layers = quantized_layers(model)
    unreached = [
        n for n in quantizers if n not in reached and not layers[n].packed and _has_weight_quantizer(layers[n])
    ]
    if reached and unreached:
        warnings.warn(
            f"adq: never reached by calibration: {', '.join(unreached)}; code that reads the weight of such a layer "
            "itself has had the float one until now, and gets the quantized one of a packed model",
            stacklevel=3,
        )


def is_trained(model: nn.Module) -> bool:
    """Whether a quantized model has been trained since its calibration, as far as can be told: of one with weights in
    float its file does not say."""
    moved = any(quantizer.trained for quantizer in activation_quantizers(model).values())
    weights = weight_quantizers(model).values()
    return moved or any(not layer.packed and int(quantizer.steps) > 0 for layer, quantizer in weights)


@contextmanager
def quantizers_enabled(model: nn.Module, weights: bool, activations: bool | None) -> Iterator[None]:
    """Switch all quantizers of a model on or off for a while; None leaves those of activations as they are."""
    if not weights:
        refuse_packed(model, "running the float network")
    switches: list[tuple[Any, bool]] = [(quantizer, weights) for _, quantizer in weight_quantizers(model).values()]
    if activations is not None:
        switches += [(quantizer, activations) for quantizer in activation_quantizers(model).values()]
    before = [quantizer.enabled for quantizer, _ in switches]
    try:
        for quantizer, enabled in switches:
            quantizer.enabled = enabled
        yield
    finally:
        for (quantizer, _), enabled in zip(switches, before, strict=True):
            quantizer.enabled = enabled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every module's own training flag comes back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def set_weight_bits(model: nn.Module, bits: Mapping[str, int]) -> None:
    """Give layers new weight bit-widths and fit codebooks of that size; other layers stay as they are.

    Raises:
        ValueError: an unknown layer, bits outside 1..8, or a weight that cannot be fitted. Nothing is changed then.
    """
    refuse_packed(model, "changing bit-widths")
    known = weight_quantizers(model)
    refuse_sharded((layer.weight for layer, _ in known.values()), "changing bit-widths")
    for name, width in bits.items():
        if name not in known:
            raise ValueError(f"adq: no quantized layer {name!r}; layers: {', '.join(known)}")
        check_bits(width, f"bits of layer {name!r}")
    with torch.inference_mode(False):  # as in quantize_
        changes = [
            (quantizer, quantizer.fit_bits(bits[name], layer.weight))
            for name, (layer, quantizer) in known.items()
            if quantizer.bits != bits.get(name, quantizer.bits)
        ]
        for quantizer, (config, fitted) in changes:
            quantizer.replace_(config, fitted)

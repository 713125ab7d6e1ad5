"""What every deployment target asks of a quantized model: weights as integers on a grid, batch norms as a factor and a
shift, the graph of its layers, and the reasons to refuse.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from adq.convert import quantized_layers
from adq.messages import listed
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QuantizedLayer
from adq.nn.weight import WeightQuantizer
from adq.reference import grid_step
from adq.restore import attributes_restorer
from adq.update import OWN_HOOKS


def integer_levels(codebook: Tensor) -> tuple[Tensor, Tensor] | None:
    """An ascending codebook as ``step * integers``, None if it does not lie on an int8 grid.

    Returns:
        The integers, int32 ``[K]``, and the step, float32 ``[]``, as large as it can be.
    """
    for step in (grid_step(codebook), grid_step(codebook) / 2):  # the half: -128 is an int8 without a counterpart
        levels = codebook / step
        if torch.equal(levels.round(), levels) and bool((levels >= -128).all() and (levels <= 127).all()):
            common = int(np.gcd.reduce(levels.int().numpy(force=True)))
            coarser = max(1, common & -common)  # the power of two in all of them: without it fewer bits may do
            return levels.int() // coarser, step * coarser
    return None


def batch_norm_affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and shift of a batch norm in evaluation, float64 ``[C]``."""
    mean, var = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    factor = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    shift = -mean * factor
    return factor, shift if norm.bias is None else shift + norm.bias.detach().double()


def after_norm(module: nn.Module | None) -> nn.Module | None:
    """What a batch norm computes once it has normalized: nothing, timm's a dropout and an activation; else None."""
    if not isinstance(module, BatchNorm):
        return None
    if type(module).forward in (BatchNorm.forward, nn.SyncBatchNorm.forward):
        return nn.Identity()
    if type(module) is getattr(sys.modules.get("timm.layers.norm_act"), "BatchNormAct2d", None):
        return nn.Sequential(OrderedDict(module.named_children()))
    return None


IN_PLACE: dict[str, Callable[[Any, Any], Any]] = {
    "iadd": operator.add,
    "isub": operator.sub,
    "imul": operator.mul,
    "itruediv": operator.truediv,
    "ifloordiv": operator.floordiv,
    "ipow": operator.pow,
    "imod": operator.mod,
    "iand": operator.and_,
    "ior": operator.or_,
    "ixor": operator.xor,
}
"""Operators that change a tensor in place, and what they are for numbers."""


class _Proxy(fx.Proxy):
    """A value of which ``x += y`` is no other one, as torch.fx has it."""


def _in_place(name: str) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _in_place(_name))


@fx.has_side_effect
def _check_given(name: str, given: Any, default: Any) -> None:
    """Raise ValueError where a traced model is called with another value than it was traced with."""
    if not (given is default or (type(given) is type(default) and given == default)):
        raise ValueError(f"adq: this model was made for {name}={default!r}, and got {given!r}")


_KINDS = ("dtype", "device", "shape", "ndim", "is_cuda")
"""What code may ask of a weight that is the same of the quantized one."""


def is_read(node: fx.Node) -> bool:
    """Whether a graph asks for the values of a weight that it gets, and not for its dtype alone or the like."""
    return not all(user.target is getattr and user.args[1] in _KINDS for user in node.users)


class Reads(TorchFunctionMode):
    """What code asks of modules and tensors themselves while it runs under this mode: a graph shows proxies alone.

    Attributes:
        attributes: of modules, by the module's identity.
        tensors: identities of tensors of which code asks anything, and ``values`` of those of which it is more than
            their dtype or the like.
    """

    _OF_ANY_VALUES = frozenset(getattr(Tensor, kind).__get__ for kind in _KINDS)

    def __init__(self) -> None:
        super().__init__()
        self.attributes: set[tuple[int, str]] = set()
        self.tensors: set[int] = set()
        self.values: set[int] = set()

    def __enter__(self) -> Reads:
        def noting(module: nn.Module, name: str) -> Any:
            self.attributes.add((id(module), name))
            return object.__getattribute__(module, name)

        nn.Module.__getattribute__ = noting  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del nn.Module.__getattribute__  # object's own comes back

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the tensors that a function of torch is given."""
        given = {id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        self.tensors |= given
        if function not in self._OF_ANY_VALUES:
            self.values |= given
        return function(*args, **(kwargs or {}))


Leaves = tuple[type[nn.Module], ...]


class _LayerTracer(fx.Tracer):
    """Traces a model down to its layers, quantized ones as they are, with what it changes in place.

    Args:
        defaults: values of arguments that the model is traced with. Simple ones may be given later, and are checked
            then; of the others the graph has no argument.
        leaves: further kinds of modules of which the graph shows the call.
    """

    def __init__(self, defaults: dict[str, Any] | None = None, leaves: Leaves = ()) -> None:  # without, for copies
        super().__init__()
        self.defaults = defaults or {}
        self.leaves = leaves

    def create_args_for_root(self, *args: Any, **kwargs: Any) -> tuple[Any, list[Any]]:
        """The model's function and what it is called with, a proxy for each argument that has no fixed value."""
        function, values = super().create_args_for_root(*args, **kwargs)
        for i, value in enumerate(values):
            if isinstance(value, fx.Proxy) and value.node.target in self.defaults:
                name = value.node.target
                values[i] = self.defaults[name]
                if isinstance(values[i], (bool, int, float, str, type(None))):
                    check = self.create_node("call_function", _check_given, (name, value.node, values[i]), {})
                    check.meta["is_wrapped"] = True  # unpickling traces the graph's code, with proxies
                else:
                    self.graph.erase_node(value.node)
        return function, values

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for a node's value while the model is run."""
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether the graph shows a call of the module rather than what is in it, past its hooks."""
        is_leaf = (
            isinstance(module, (QuantizedLayer, *self.leaves)) or after_norm(module) is not None or has_hooks(module)
        )
        return is_leaf or super().is_leaf_module(module, name)


HOOKS = "forward hooks, or a forward of its own"


def has_hooks(module: nn.Module | None) -> bool:
    """Whether something is called before or after a module's ``forward``, besides what adq itself does there, or in its
    place.
    """
    if module is None:
        return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "forward" in vars(module) or any(hook not in OWN_HOOKS for hook in hooks)


def trace_layers(
    model: nn.Module, given: int | None = None, leaves: Leaves = ()
) -> tuple[fx.Graph, dict[str, Any], Reads]:
    """The calls of a model's layers, constants that the graph reads as attributes which the model does not have, and
    what code that is no layer's own reads past the graph.

    The model keeps the attributes that it has, and its buffers their values, which its code may change.

    Args:
        model: in the mode in which it runs.
        given: how many arguments of ``forward`` are values of the graph, None for those without a default. The
            others have their defaults, so that a branch that asks for them is the one that is taken.
        leaves: further kinds of modules that the graph calls as they are.

    Raises:
        Exception: whatever the model's code raises when it meets a proxy; ValueError: hooks of the model itself, which
            no graph calls.
    """
    if has_hooks(model):
        raise ValueError(f"{type(model).__name__} has {HOOKS}")
    parameters = inspect.signature(model.forward).parameters.values()
    others = [p for i, p in enumerate(parameters) if given is None or i >= given]
    defaults = {p.name: p.default for p in others if p.default is not p.empty}
    tracer, reads, restore = _LayerTracer(defaults, leaves), Reads(), attributes_restorer(model)
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers() if not buffer.is_inference()]
    try:
        for module in model.modules():  # what adq does when a part begins and ends is no code of the model
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in OWN_HOOKS]:
                    del hooks[key]
        with reads:
            graph = tracer.trace(model)
    finally:
        restore()  # its code may have put proxies there
        for buffer, version, value in buffers:
            if buffer._version != version:
                buffer.detach().copy_(value)
    constants = {name: value for value, name in tracer.tensor_attrs.items() if "." not in name}
    return graph, {name: value for name, value in constants.items() if name not in vars(model)}, reads


def note_(model: nn.Module, name: str, value: Any) -> None:
    """Set an attribute that copies of the model have too; of a GraphModule torch.fx copies only what is named so."""
    setattr(model, name, value)
    if isinstance(model, fx.GraphModule):
        model.meta.setdefault("_user_preserved_attributes", {})[name] = value


def activation_problem(quantizer: ActivationQuantizer) -> str | None:
    """Why a deployed model cannot quantize as this quantizer does, None if it can."""
    if not quantizer.is_calibrated:
        return "its activations are not calibrated"
    if not quantizer.enabled:
        return "its activation quantizer is disabled"
    if not all(bool(tensor.isfinite().all()) for tensor in quantizer.state_dict().values()):
        return "its activation quantizer holds NaN or infinity"
    zero = quantizer.zero_position
    whole = abs(zero - round(zero)) < 1e-3 and 0 <= round(zero) <= 255
    return None if whole else f"zero is no level of its activations (level {zero:g})"


def weight_problem(layer: QuantizedLayer, quantizer: WeightQuantizer) -> str | None:
    """Why the layer's quantized weight cannot be deployed as it is, None if it can."""
    if layer.weight.dtype != torch.float32:
        return f"its weight is {layer.weight.dtype}, not float32"
    if not quantizer.enabled:
        return "its weight quantizer is disabled"
    finite = all(bool(tensor.isfinite().all()) for tensor in (layer.weight, quantizer.codebook, quantizer.scale))
    return None if finite else "its weight or codebook holds NaN or infinity"


def layer_problem(layer: QuantizedLayer) -> str | None:
    """Why a layer cannot be deployed, None if it can."""
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    problem = weight_problem(layer, weight) if isinstance(weight, WeightQuantizer) else None
    if problem is None and isinstance(activation, ActivationQuantizer):
        problem = activation_problem(activation)
    return problem


def positional(example_inputs: Any, nested: bool = True) -> tuple[Any, ...]:
    """Example inputs as positional arguments.

    Raises:
        ValueError: they are a mapping, or, without ``nested``, one of them is.
    """
    inputs = tuple(example_inputs) if isinstance(example_inputs, (tuple, list)) else (example_inputs,)
    if isinstance(example_inputs, Mapping) or (not nested and any(isinstance(x, Mapping) for x in inputs)):
        raise ValueError("adq: example inputs are a tensor, or a tuple of positional arguments; got a mapping")
    return inputs


def check_layers(
    model: nn.Module, target: str, problem: Callable[[QuantizedLayer], str | None] = layer_problem
) -> None:
    """Raise ValueError that names the layers which cannot be deployed, with the reason that ``problem`` gives."""
    layers = quantized_layers(model)
    if not layers:
        raise ValueError(f"adq: the model is not quantized; {target} takes quantized models")
    found = {name: problem(layer) for name, layer in layers.items()}
    problems = [f"layer {name!r}: {reason}" for name, reason in found.items() if reason]
    if problems:
        raise ValueError(f"adq: {target}: {listed(problems)}")

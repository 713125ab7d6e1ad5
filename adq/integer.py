"""From a quantized model to one that computes with integers, fused from levels to levels.

Layers whose levels lie on an int8 grid (``snap="int8"``, ``update="step"``) become :class:`adq.nn.IntegerConv2d` and
its like. In the graph of the model (torch.fx) the batch norm, the residual sum and the bounded activation function
(ReLU, ReLU6, Hardtanh) that follow such a layer move into its epilogue, and the layers that read the result get its
levels from there.
"""

from __future__ import annotations

import copy
import operator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from adq.batches import to_device
from adq.convert import quantized_layers, replace_module_, unwrapped
from adq.deploy import (
    HOOKS,
    IN_PLACE,
    after_norm,
    batch_norm_affine,
    has_hooks,
    integer_levels,
    is_read,
    layer_problem,
    note_,
    positional,
    trace_layers,
)
from adq.messages import listed
from adq.nn.activation import ActivationQuantizer
from adq.nn.integer import (
    Affine,
    Epilogue,
    Geometry,
    IntegerConv1d,
    IntegerConv2d,
    IntegerLayer,
    IntegerLinear,
    IntegerWeight,
)
from adq.nn.layers import QConv1d, QConv2d, QLinear, QuantizedLayer
from adq.nn.weight import WeightQuantizer

KINDS: dict[type[QuantizedLayer], type[IntegerLayer]] = {
    QConv1d: IntegerConv1d,
    QConv2d: IntegerConv2d,
    QLinear: IntegerLinear,
}
LARGEST_SUM = 2**31
_NOTHING = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
)  # fmt: skip
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")
_VIEWS = {
    "adjoint", "alias", "alpha_dropout", "as_strided", "atleast_1d", "atleast_2d", "atleast_3d",
    "broadcast_tensors", "broadcast_to", "chunk", "conj", "contiguous", "cpu", "cuda", "detach", "diagonal",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "dsplit", "expand", "expand_as", "feature_alpha_dropout",
    "feature_dropout", "flatten", "float", "getattr", "getitem", "hsplit", "moveaxis", "movedim", "narrow",
    "permute", "pos", "positive", "ravel", "real", "reshape", "reshape_as", "resolve_conj", "resolve_neg", "select",
    "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "to", "transpose", "type",
    "type_as", "unbind", "unflatten", "unfold", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
    "unsqueeze", "view", "view_as", "view_as_complex", "view_as_real", "vsplit",
}  # fmt: skip
"""What may give a tensor that shares memory with its first argument, or that one itself; attributes by ``getattr``."""
_BOUNDS: dict[Any, tuple[float, float]] = {
    nn.ReLU: (0.0, torch.inf),
    nn.ReLU6: (0.0, 6.0),
    F.relu: (0.0, torch.inf),
    F.relu6: (0.0, 6.0),
    torch.relu: (0.0, torch.inf),
    "relu": (0.0, torch.inf),
    "relu_": (0.0, torch.inf),
}


# ---- single layers -----------------------------------------------------------------------------------


def _kind(layer: QuantizedLayer) -> type[IntegerLayer] | None:
    return next((kind for quantized, kind in KINDS.items() if isinstance(layer, quantized)), None)


def _padding(layer: QConv1d | QConv2d) -> tuple[int, ...] | None:
    """Symmetric padding of each axis, None where it is not that."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        spans = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        return None if any(span % 2 for span in spans) else tuple(span // 2 for span in spans)
    return cast(tuple[int, ...], layer.padding)


def integer_problem(layer: QuantizedLayer) -> str | None:
    """Why a layer cannot compute with integers, None if it can."""
    weight, activation = layer.weight_quantizer, layer.input_quantizer
    if _kind(layer) is None:
        return f"there is no integer kernel for {type(layer).__name__}"
    if not isinstance(weight, WeightQuantizer) or not isinstance(activation, ActivationQuantizer):
        return "its weight or its input is in float"
    if problem := layer_problem(layer):
        return problem
    if has_hooks(layer):
        return f"it has {HOOKS}"
    if integer_levels(weight.levels) is None:
        return 'its levels lie on no int8 grid (train with snap="int8")'
    if isinstance(layer, (QConv1d, QConv2d)) and (layer.padding_mode != "zeros" or _padding(layer) is None):
        return f"its padding is {layer.padding!r}, {layer.padding_mode}"
    if layer.weight[0].numel() * 255 * 128 >= LARGEST_SUM:
        return f"a sum of {layer.weight[0].numel():,} products may exceed 32 bits"
    return None


def _bias_problem(model: nn.Module, name: str) -> str | None:
    """Whether the module that calls a layer changes its bias (:mod:`adq.nn.torchvision`)."""
    path, _, own = name.rpartition(".")
    caller = model.get_submodule(path)
    return f"{type(caller).__name__} changes its bias" if own in getattr(caller, "changes_bias_of", ()) else None


def _pair(values: tuple[int, ...], before: int) -> tuple[int, int]:
    """Values of one axis or two as those of two."""
    return (before, values[0]) if len(values) == 1 else (values[0], values[1])


def _geometry(layer: QuantizedLayer) -> Geometry:
    if isinstance(layer, QLinear):
        return Geometry()
    conv = cast(QConv2d, layer)
    padding = cast(tuple[int, ...], _padding(conv))
    kernel, stride, dilation = (_pair(of, 1) for of in (conv.kernel_size, conv.stride, conv.dilation))
    return Geometry(kernel, stride, _pair(padding, 0), dilation, conv.groups)


def _weight(layer: QuantizedLayer) -> IntegerWeight:
    quantizer = cast(WeightQuantizer, layer.weight_quantizer)
    grid = integer_levels(quantizer.levels)
    assert grid is not None
    levels, step = grid
    integer = levels.to(torch.int8)[quantizer.encode(layer.weight).int()]
    scale = quantizer.scale.detach().double().flatten() * step.double()
    return IntegerWeight(integer, scale.expand(integer.shape[0]))


def _bias(layer: QuantizedLayer) -> Affine:
    shift = torch.zeros(layer.weight.shape[0], dtype=torch.float64, device=layer.weight.device)
    if layer.bias is not None:
        shift = cast(Tensor, layer.bias).detach().double()
    return Affine(torch.ones_like(shift), shift)


# ---- the graph ---------------------------------------------------------------------------------------


@dataclass
class _Fusion:
    """An integer layer and the nodes after it that its epilogue computes."""

    layer: QuantizedLayer
    nodes: list[fx.Node]
    affine: Affine
    sum: fx.Node | None = None
    bounds: tuple[float, float] = (-torch.inf, torch.inf)

    @property
    def residual(self) -> list[fx.Node]:
        """What is added to the layer's result, if anything is."""
        return [] if self.sum is None else [arg for arg in self.sum.all_input_nodes if arg not in self.nodes]

    @property
    def first(self) -> fx.Node:
        """The layer's own node."""
        return self.nodes[0]

    @property
    def last(self) -> fx.Node:
        """The node whose value the epilogue gives."""
        return self.nodes[-1]


def _input(node: fx.Node) -> fx.Node:
    """What a layer is called with."""
    return cast(fx.Node, node.args[0] if node.args else node.kwargs["input"])


def _name(node: fx.Node) -> str:
    """Of the function or method that a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _gives_sizes(view: fx.Node) -> bool:
    """Whether a ``view`` is given sizes, and not a dtype."""
    kind = view.args[1] if len(view.args) > 1 and not view.kwargs else torch.uint8
    is_dtype = isinstance(kind, torch.dtype) or (isinstance(kind, fx.Node) and kind.args[1:] == ("dtype",))
    return not is_dtype


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    meta = node.meta.get("tensor_meta")
    return tuple(meta.shape) if isinstance(meta, TensorMetadata) else None


class _Fuser:
    """Finds what follows each integer layer of a traced model, and rewrites the graph."""

    def __init__(self, traced: fx.GraphModule, names: set[str]) -> None:
        self.graph, self.traced, self.names = traced.graph, traced, names
        self.modules = dict(traced.named_modules(remove_duplicate=False))
        self.within = self._within()
        self.used = {name for name, layer in self.modules.items() if layer in self.within}
        self.changed: set[fx.Node] = set()

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.modules[cast(str, node.target)] if node.op == "call_module" else None

    def _within(self) -> set[nn.Module]:
        """What modules hold that the graph calls and does not look into, an attention its projections."""
        called = [cast(nn.Module, self._module(node)) for node in self.graph.nodes if node.op == "call_module"]
        return {inner for module in called for inner in module.modules() if inner is not module}

    def _is_integer(self, node: fx.Node) -> bool:
        return node.op == "call_module" and node.target in self.names

    # what follows a layer

    def fusions(self) -> list[_Fusion]:
        """In the order of the graph; a sum belongs to the first layer that leads to it."""
        found, taken = [], set()
        for node in [node for node in self.graph.nodes if self._is_integer(node)]:
            fusion = self._follow(node, with_sum=True)
            if fusion.residual and (fusion.last in taken or self._is_disturbed(fusion)):
                fusion = self._follow(node, with_sum=False)
            if self._is_disturbed(fusion):
                fusion = _Fusion(fusion.layer, [node], _bias(fusion.layer))
            taken.add(fusion.last)
            found.append(fusion)
        return found

    def _follow(self, node: fx.Node, with_sum: bool) -> _Fusion:
        layer = cast(QuantizedLayer, self._module(node))
        fusion = _Fusion(layer, [node], _bias(layer))
        for step in (self._norm, self._sum, self._bound) if with_sum else (self._norm, self._bound):
            self._skip(fusion)
            step(fusion)
        self._skip(fusion)
        return fusion

    def _next(self, fusion: _Fusion) -> fx.Node | None:
        """The only node that reads the last one."""
        users = list(fusion.last.users)
        if len(users) != 1 or users[0].op == "output" or has_hooks(self._module(users[0])):
            return None
        return users[0]

    def _skip(self, fusion: _Fusion) -> None:
        while (user := self._next(fusion)) is not None and isinstance(self._module(user), _NOTHING):
            fusion.nodes.append(user)

    def _norm(self, fusion: _Fusion) -> None:
        user = self._next(fusion)
        module = None if user is None else self._module(user)
        if user is None or not isinstance(module, BatchNorm) or module.running_mean is None:
            return
        if not isinstance(after_norm(module), nn.Identity):
            return
        if len(_shape(fusion.last) or ()) != (2 if isinstance(fusion.layer, QLinear) else fusion.layer.weight.dim()):
            return  # its channels are another axis
        fusion.affine = fusion.affine.then(*batch_norm_affine(module))
        fusion.nodes.append(user)

    def _sum(self, fusion: _Fusion) -> None:
        user = self._next(fusion)
        if user is None or user.target not in _ADDS or user.kwargs or len(user.args) != 2:
            return
        others = [arg for arg in user.args if arg is not fusion.last]
        through_view = others == [user.args[0]] and self._shares(user.args[0]) is not None
        if self._is_in_place(user) and (through_view or user in self.changed):
            return  # it changes more than the graph says
        if len(others) == 1 and isinstance(others[0], fx.Node) and _shape(others[0]) == _shape(fusion.last) is not None:
            fusion.sum = user
            fusion.nodes.append(user)

    def _bound(self, fusion: _Fusion) -> None:
        user = self._next(fusion)
        if user is None:
            return
        module = self._module(user)
        bounds = _BOUNDS.get(user.target if module is None else type(module))
        if isinstance(module, nn.Hardtanh):
            bounds = module.min_val, module.max_val
        if bounds is not None:
            fusion.bounds = bounds
            fusion.nodes.append(user)

    def _is_disturbed(self, fusion: _Fusion) -> bool:
        """Whether something is changed in place between the layer and the last node, where it will be computed."""
        node = fusion.first
        while node is not fusion.last:
            node = node.next
            if node not in fusion.nodes and (self._is_in_place(node) or self._may_change(node)):
                return True
        return False

    def _may_change(self, node: fx.Node) -> bool:
        """Whether a module is called that may change what it is given, and the graph does not look into: its hooks may,
        and whatever they are put on.
        """
        module = self._module(node)
        return module is not None and any(map(has_hooks, module.modules()))

    def _is_in_place(self, node: fx.Node) -> bool:
        name = _name(node)
        named = name.endswith("_") and not name.endswith("__") and getattr(operator, name, None) is not node.target
        changes = node.op in ("call_method", "call_function") and (named or name in (*IN_PLACE, "setitem"))
        changes = changes or isinstance(node.kwargs.get("out"), fx.Node)
        return changes or bool(node.kwargs.get("inplace")) or bool(getattr(self._module(node), "inplace", False))

    def _shares(self, node: Any) -> fx.Node | None:
        """Whose memory a node's value may share, besides that of values changed in place."""
        if not isinstance(node, fx.Node) or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        module = self._module(node)
        is_view = node.op in ("call_method", "call_function") and _name(node) in _VIEWS
        return node.args[0] if is_view or isinstance(module, (*_NOTHING, nn.Flatten, nn.Unflatten)) else None

    def _views(self, node: fx.Node) -> list[fx.Node]:
        """What shows a node's memory, and what shows that."""
        views = [user for user in node.users if self._shares(user) is node]
        return views + [further for view in views for further in self._views(view)]

    def rebind(self) -> None:
        """Let all that reads a tensor after it has been changed in place read the node that changed it.

        To the graph these are two values, and levels would be those of the first one. What is changed through a view,
        or in part, or may be by a module with hooks, is noted: no levels are taken of it.
        """
        place = {node: i for i, node in enumerate(self.graph.nodes)}
        for node in [node for node in self.graph.nodes if self._is_in_place(node)]:
            target = node.kwargs.get("out", node.args[0] if node.args else None)
            if not isinstance(target, fx.Node):
                continue
            if _shape(target) is None:  # a number, which stays what it is
                node.target = IN_PLACE.get(_name(node), node.target)
                continue
            if _name(node) == "setitem":
                self.changed.add(target)
            else:
                later = [user for user in target.users if place[user] > place[node]]
                target.replace_all_uses_with(node, delete_user_cb=later.__contains__)
            if earlier := [view for view in self._views(target) if place.get(view, -1) < place[node]]:
                self.changed |= {node, target, *earlier}
            if self._shares(target) is not None:
                self._note(target)
        for node in filter(self._may_change, self.graph.nodes):
            for given in node.all_input_nodes:
                self._note(given)

    def _note(self, node: fx.Node | None) -> None:
        """That a value is changed, and all whose memory it shares."""
        while node is not None:
            self.changed.add(node)
            node = self._shares(node)

    # the new graph

    def rewrite(self) -> int:
        """Put integer layers in place of the fusions; returns how many of them take levels from another."""
        self.rebind()
        for node in self.graph.nodes:  # what layers give is channels_last, of which there may be no such view
            if node.op == "call_method" and node not in self.changed:
                if node.target == "view_as":
                    node.target = "reshape_as"
                elif node.target == "view" and _gives_sizes(node):
                    node.target = "reshape"
        return sum(self._replace(fusion) for fusion in self.fusions())

    def _replace(self, fusion: _Fusion) -> int:
        readers = [user for user in fusion.last.users if self._is_integer(user) and _input(user) is fusion.last]
        readers = [] if fusion.last in self.changed else readers
        quantizers = [cast(ActivationQuantizer, cast(QuantizedLayer, self._module(r)).input_quantizer) for r in readers]
        keep = len(readers) < len(fusion.last.users)
        layer = _integer_layer(fusion.layer, fusion.affine, Epilogue(*fusion.bounds, quantizers, keep))
        name = self._name(cast(str, fusion.first.target))
        self.traced.set_submodule(name, layer)
        arguments = (_input(fusion.first), *fusion.residual)
        with self.graph.inserting_before(fusion.last.next):
            node = self.graph.call_module(name, arguments)
            y = self.graph.call_function(operator.getitem, (node, 0)) if readers else node
            if fusion.last in self.changed:  # views of it are to be views
                y = self.graph.call_method("contiguous", (y,))
            levels = self.graph.call_function(operator.getitem, (node, 1)) if readers else node
            for i, reader in enumerate(readers):
                reader.replace_input_with(fusion.last, self.graph.call_function(operator.getitem, (levels, i)))
        fusion.last.replace_all_uses_with(y)
        for old in reversed(fusion.nodes):
            self.graph.erase_node(old)
        return len(readers)

    def _name(self, target: str) -> str:
        """A module of its own for each call of a layer; the layer's own place, unless another module calls it there."""
        name = _unused(self.traced, target) if target in self.used else target
        self.used.add(name)
        return name


# ---- the model ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class IntegerReport:
    """What :func:`to_integer` did.

    Attributes:
        integer: layers that compute with integers, by name.
        from_levels: how many of them get their input as levels from another one.
        left: layers that stay as they were, by name, with the reason.
        unfused: why nothing was fused, None where the model could be traced.
    """

    integer: list[str]
    from_levels: int
    left: dict[str, str]
    unfused: str | None

    def __str__(self) -> str:
        lines = [f"{len(self.integer)} integer layers, {self.from_levels} take levels from another one"]
        lines += [f"layer {name!r} is not one of them: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines + ([f"not fused: {self.unfused}"] if self.unfused else []))


def _integer_layer(layer: QuantizedLayer, affine: Affine, epilogue: Epilogue) -> IntegerLayer:
    quantizer = cast(ActivationQuantizer, layer.input_quantizer)
    kind = cast(type[IntegerLayer], _kind(layer))
    return kind(_weight(layer), affine, quantizer, _geometry(layer), epilogue)


def _replace_each(model: nn.Module, names: list[str]) -> None:
    """Put integer layers in place, without what follows them."""
    for name in names:
        layer = cast(QuantizedLayer, model.get_submodule(name))
        replace_module_(model, name, _integer_layer(layer, _bias(layer), Epilogue(as_given=True)))


def _unused(model: nn.Module, name: str) -> str:
    """A name like this one, of no attribute of the model and without dots."""
    name = name.replace(".", "_")
    while hasattr(model, name):
        name += "_again"
    return name


def _keep_read(model: nn.Module, graph: fx.Graph, names: set[str]) -> None:
    """Have the model hold the weights and biases that the graph itself reads of layers which are to be replaced."""
    kept: dict[str, str] = {}
    for node in graph.nodes:
        name, _, own = str(node.target).rpartition(".")
        if node.op != "get_attr" or name not in names or not is_read(node):
            continue
        if node.target not in kept:
            kept[node.target] = _unused(model, f"adq_{own}_of_{name}")
            model.register_parameter(kept[node.target], getattr(model.get_submodule(name), own))
        node.target = kept[node.target]


@torch.no_grad()
def to_integer(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], *, strict: bool = True) -> nn.Module:
    """A copy of a quantized model that computes convolutions and linear layers with integers, for inference.

    Sums of levels times int8 weights are exact, so the result depends on no order of summation; batch norm, residual
    sum and quantization follow in float32 in the same pass. The predictions are those of the quantized model, up to
    the float rounding of that model. Code that reads the weight of a layer itself gets the float one, as before, where
    torch.fx can trace it, else the quantized one.

    Args:
        model: quantized and calibrated, float32, levels on an int8 grid (``snap="int8"``); stays as it is.
        example_inputs: what the model takes; the values do not matter, the shapes tell which sums are residual ones.
            Further arguments of its ``forward`` keep their defaults, in the copy for good.
        strict: refuse models with a quantized layer that cannot compute with integers; False leaves it as it is.

    Returns:
        The copy, in evaluation mode; its attribute ``adq_integer`` is an :class:`IntegerReport`.

    Raises:
        ValueError: not quantized, no layer can compute with integers, or with ``strict`` some cannot (named).
    """
    model = copy.deepcopy(unwrapped(model)).eval().requires_grad_(False)
    problems = {name: _bias_problem(model, name) or integer_problem(q) for name, q in quantized_layers(model).items()}
    left = {name: problem for name, problem in problems.items() if problem}
    names = [name for name in problems if name not in left]
    if not problems:
        raise ValueError("adq: the model is not quantized; to_integer takes quantized models")
    if left and (strict or not names):
        reasons = listed([f"layer {name!r}: {problem}" for name, problem in left.items()])
        raise ValueError(f"adq: cannot compute with integers: {reasons}")
    if isinstance(model, QuantizedLayer):
        return _reported(
            _integer_layer(model, _bias(model), Epilogue(as_given=True)), IntegerReport(names, 0, left, None)
        )
    inputs = positional(example_inputs)
    try:
        graph, constants, _ = trace_layers(model, len(inputs))
    except Exception as error:  # whatever the model's code raises when it meets a proxy
        _replace_each(model, names)
        return _reported(model, IntegerReport(names, 0, left, f"torch.fx cannot trace the model: {error}"))
    vars(model).update(constants)
    _keep_read(model, graph, set(names))
    traced = fx.GraphModule(model, graph, type(model).__name__)
    _note_shapes(traced, to_device(inputs, next(iter(model.parameters())).device))
    fuser = _Fuser(traced, set(names))
    from_levels = fuser.rewrite()
    _replace_each(model, [name for name in names if model.get_submodule(name) in fuser.within])
    traced.delete_all_unused_submodules()
    traced.recompile()
    return _reported(traced.eval(), IntegerReport(names, from_levels, left, None))


def _note_shapes(traced: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    """Run the model once; on two images where it is given one, which could be added to many."""
    if all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == 1 for x in inputs):
        with suppress(Exception):  # it wants one
            ShapeProp(traced).propagate(*(torch.cat([x, x]) for x in inputs))
            return
    ShapeProp(traced).propagate(*inputs)


def _reported(model: nn.Module, report: IntegerReport) -> nn.Module:
    note_(model, "adq_integer", report)
    return model

"""ONNX files of quantized models: standard operators only, written by torch's exporter, checked in ONNX Runtime.

Levels of activations are uint8 integers from comparisons, followed by DequantizeLinear. Weights are integer
initializers: on an int8 grid (``snap="int8"``, ``update="step"``) followed by DequantizeLinear, else codes that look up
the codebook. Four bits a weight are stored where they suffice, else eight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq.convert import unwrapped
from adq.deploy import check_layers, integer_levels
from adq.messages import first_line
from adq.nn.activation import ActivationQuantizer
from adq.nn.packed import PackedWeight
from adq.ops import ACTIVATION_RANGE
from adq.parity import ExportReport, as_inputs, write_checked
from adq.portable import PortableActivation, inference_copy

OPSET = 21
"""The first with integers of four bits."""
INTEGER = "integer"
"""Name of the buffer that holds a layer's weight as integers."""


# ---- quantizers as ONNX operators --------------------------------------------------------------------


def _symbolic(name: str, inputs: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, {**attributes}, dtype=dtype, shape=shape, version=OPSET)


class _GridWeight(nn.Module):
    """A weight whose levels lie on an int8 grid: ``scale * m``, as DequantizeLinear of the integers m."""

    integer: Tensor
    scale: Tensor

    def __init__(self, packed: PackedWeight, integer: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer(INTEGER, integer.to(torch.int8))
        self.register_buffer("scale", scale.reshape(()) if scale.numel() == 1 else scale.flatten())
        self.attributes = {} if scale.numel() == 1 else {"axis": packed.axis}

    def forward(self, weight: Tensor | None = None) -> Tensor:
        inputs = (self.integer, self.scale)
        return _symbolic("DequantizeLinear", inputs, self.integer.shape, torch.float32, **self.attributes)


class _CodebookWeight(nn.Module):
    """A weight as ``scale * Gather(codebook, codes)``."""

    integer: Tensor
    codebook: Tensor
    scale: Tensor

    def __init__(self, packed: PackedWeight, codes: Tensor) -> None:
        super().__init__()
        self.register_buffer(INTEGER, codes)
        self.register_buffer("codebook", packed.codebook)
        self.register_buffer("scale", packed.scale)

    def forward(self, weight: Tensor | None = None) -> Tensor:
        levels = _symbolic("Gather", (self.codebook, self.integer.int()), self.integer.shape, torch.float32, axis=0)
        return levels * self.scale


class _Activation(PortableActivation):
    """The reference's decisions, operation by operation, then QuantizeLinear and DequantizeLinear of the level."""

    step: Tensor
    zero: Tensor
    one: Tensor
    nought: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__(quantizer)
        step = torch.tensor(ACTIVATION_RANGE / self.steps)
        self.register_buffer("step", quantizer.out_scale.detach().reshape(()) * step)
        self.register_buffer("zero", (quantizer.offset / step).round().reshape(()).to(torch.uint8))
        self.register_buffer("one", torch.ones(()))
        self.register_buffer("nought", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        level = _symbolic("QuantizeLinear", (self.levels(x), self.one, self.nought), x.shape, torch.uint8)
        return _symbolic("DequantizeLinear", (level, self.step, self.zero), x.shape, torch.float32)


def _weight(packed: PackedWeight) -> nn.Module:
    codes, grid = packed.encode(), integer_levels(packed.codebook)
    if grid is None:
        return _CodebookWeight(packed, codes)
    levels, step = grid
    scale = packed.scale * step
    integer = levels[codes.int()] * torch.where(scale < 0, -1, 1)  # a scale of DequantizeLinear is positive
    if int(integer.max()) > 127:  # -128, turned round
        return _CodebookWeight(packed, codes)
    return _GridWeight(packed, integer, scale.abs())


# ---- refusals ----------------------------------------------------------------------------------------


def _packages() -> None:
    try:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            import_module(package)
    except ImportError as error:
        raise ImportError(f"adq: ONNX export needs {error.name}: pip install 'adq[onnx]'") from error
    if not hasattr(torch.onnx, "ops"):
        raise ImportError(f"adq: ONNX export needs torch 2.8 or newer, this is {torch.__version__}")


# ---- the graph ---------------------------------------------------------------------------------------


def _graph(model: nn.Module, inputs: tuple[Any, ...], own: list[bool]) -> Any:
    """The ONNX model (an ``onnx.ModelProto``) of a quantized model, for any number of images."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize_ir

    copy = inference_copy(model, _weight, _Activation)
    modules = copy.named_modules(remove_duplicate=False)
    integers = {f"{name}.{INTEGER}" for name, module in modules if isinstance(module, (_GridWeight, _CodebookWeight))}
    graph = _program(copy, inputs, own).model
    optimize_ir(graph, should_fold=lambda node: False if _reads(node, integers) else None)
    _check_domains(graph.graph)
    for name in integers & graph.graph.initializers.keys():
        _narrow(graph.graph.initializers[name])
    ClearMetadataAndDocStringPass()(graph)  # stack traces, with paths of this machine
    proto = onnx_ir.to_proto(graph)
    del proto.graph.value_info[:]  # shapes in between, a quarter of a small file; readers infer them
    return proto


def _program(model: nn.Module, inputs: tuple[Any, ...], own: list[bool]) -> Any:
    try:
        return torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            dynamic_shapes=tuple({0: "batch"} if each else None for each in own),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ValueError(f"adq: torch cannot export the model to ONNX: {first_line(cause)}") from error


def _check_domains(graph: Any) -> None:
    """Raise ValueError that names the operators which are not of the standard."""
    others = {f"{node.domain}::{node.op_type}" for node in graph if node.domain not in ("", "ai.onnx")}
    if others:
        raise ValueError(f"adq: not exported: not among the standard operators of ONNX: {', '.join(sorted(others))}")


def _reads(node: Any, names: set[str]) -> bool:
    return any(value is not None and value.name in names for value in node.inputs)


def _narrow(value: Any) -> None:
    """Store an initializer of int8 or uint8 in four bits, where its values allow it."""
    import ml_dtypes
    import onnx_ir

    array = value.const_value.numpy()
    signed = array.dtype.kind == "i"
    if array.min() >= (-8 if signed else 0) and array.max() <= (7 if signed else 15):
        narrow = array.astype(ml_dtypes.int4 if signed else ml_dtypes.uint4)
        value.const_value = onnx_ir.Tensor(narrow, name=value.name)
        value.dtype = value.const_value.dtype


def _session(path: Path) -> Callable[..., Tensor]:
    """ONNX Runtime on the CPU, as a function of tensors that gives the first output."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Any) -> Tensor:  # what is no tensor is part of the graph
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        arrays = {name: x.numpy() for name, x in zip(names, tensors, strict=True)}
        return torch.from_numpy(session.run(None, arrays)[0])

    return run


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Any, ...],
    batches: Iterable[Any] | None = None,
    images: int = 1000,
) -> ExportReport:
    """Write a quantized model as one ONNX file of standard operators (opset 21), and compare it with the model.

    The first axis is dynamic in inputs as long as the first one. NaN in an input is not carried through, as it is by
    the model.

    Args:
        model: quantized and calibrated, float32, on any device; stays as it is.
        path: file to write; it appears only once everything has passed.
        example_inputs: what the model takes, its positional arguments; the values of tensors do not matter, what is no
            tensor is fixed.
        batches: real inputs as a loader yields them (labels are ignored) for the check in ONNX Runtime: top-1, over
            axis 1 of the first output, must be identical, except where rounding decides it in the model itself.
            None: no check.
        images: how many must be identical.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing, or torch is too old.
        ValueError: a layer, an operator or the whole model cannot be exported (named); too few images.
        RuntimeError: the check failed.
    """
    _packages()
    import onnx

    model = unwrapped(model)
    check_layers(model, "not exported to ONNX")
    inputs, own = as_inputs(example_inputs)
    graph = _graph(model, inputs, own)
    onnx.checker.check_model(graph, full_check=True)
    content = graph.SerializeToString()
    return write_checked(model, path, content, "ONNX Runtime", _session, own, batches, images)

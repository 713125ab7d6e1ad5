"""ONNX files of quantized models: standard operators only, written by torch's exporter, checked in ONNX Runtime.

Levels of activations are uint8 integers from comparisons, followed by DequantizeLinear. Weights are integer
initializers: on an int8 grid (``snap="int8"``, ``update="step"``) followed by DequantizeLinear, else codes that look up
the codebook. Four bits a weight are stored where they suffice, else eight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq.artifact import packed_bytes
from adq.convert import activation_quantizers, evaluating, model_device, quantized_layers, to_device, weight_quantizers
from adq.deploy import check_layers, integer_levels
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QuantizedLayer
from adq.nn.weight import WeightQuantizer
from adq.ops import ACTIVATION_RANGE, MIN_INTERVAL
from adq.reference import level_edges
from adq.store import replacing
from adq.summary import float_bytes

OPSET = 21
"""The first with integers of four bits."""
INTEGER = "integer"
"""Name of the buffer that holds a layer's weight as integers."""
ROUNDING = 2e-6
"""Of the largest input of a quantizer: how far sums in float32 of another order may lie apart."""
NOISY_RUNS = 64


@dataclass(frozen=True)
class OnnxExport:
    """What was written: bytes of the file, of the float network and of the packed file; None: not checked."""

    path: Path
    bytes: int
    bytes_float: int
    bytes_packed: int
    parity: Parity | None

    def __str__(self) -> str:
        sizes = f"{self.path}: {self.bytes:,} bytes; float {self.bytes_float:,}, packed {self.bytes_packed:,}"
        return f"{sizes}\n{self.parity or 'parity: not checked'}"


# ---- quantizers as ONNX operators --------------------------------------------------------------------


def _symbolic(name: str, inputs: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, **attributes: int) -> Tensor:
    return torch.onnx.ops.symbolic(name, inputs, {**attributes}, dtype=dtype, shape=shape, version=OPSET)


class _GridWeight(nn.Module):
    """A weight whose levels lie on an int8 grid: ``scale * step * m``, as DequantizeLinear of the integers m."""

    integer: Tensor
    scale: Tensor

    def __init__(self, quantizer: WeightQuantizer, integer: Tensor, step: Tensor) -> None:
        super().__init__()
        self.register_buffer(INTEGER, integer.to(torch.int8))
        scale = quantizer.scale.detach() * step
        self.register_buffer("scale", scale.reshape(()) if scale.numel() == 1 else scale.flatten())
        self.attributes = {} if scale.numel() == 1 else {"axis": quantizer.axis}

    def forward(self, weight: Tensor) -> Tensor:
        inputs = (self.integer, self.scale)
        return _symbolic("DequantizeLinear", inputs, self.integer.shape, torch.float32, **self.attributes)


class _CodebookWeight(nn.Module):
    """A weight as ``scale * Gather(codebook, codes)``."""

    integer: Tensor
    codebook: Tensor
    scale: Tensor

    def __init__(self, quantizer: WeightQuantizer, codes: Tensor, codebook: Tensor) -> None:
        super().__init__()
        self.register_buffer(INTEGER, codes)
        self.register_buffer("codebook", codebook)
        self.register_buffer("scale", quantizer.scale.detach())

    def forward(self, weight: Tensor) -> Tensor:
        levels = _symbolic("Gather", (self.codebook, self.integer.int()), self.integer.shape, torch.float32, axis=0)
        return levels * self.scale


class _Activation(nn.Module):
    """The reference's decisions, operation by operation, then QuantizeLinear and DequantizeLinear of the level."""

    step: Tensor
    zero: Tensor
    one: Tensor
    nought: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.steps = quantizer.config.steps
        self.in_scale, self.start = quantizer.in_scale.item(), quantizer.start.item()
        interval = quantizer.interval.detach().clamp_min(MIN_INTERVAL)
        self.width = interval[0].item()
        self.edges: list[float] | None = None
        if interval.numel() == self.steps:
            self.edges = [edge.item() for edge in level_edges(quantizer.start.detach()[0], interval)[1]]
        step = torch.tensor(ACTIVATION_RANGE / self.steps)
        self.register_buffer("step", quantizer.out_scale.detach().reshape(()) * step)
        self.register_buffer("zero", (quantizer.offset / step).round().reshape(()).to(torch.uint8))
        self.register_buffer("one", torch.ones(()))
        self.register_buffer("nought", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        u = x * self.in_scale
        if self.edges is None:
            q = ((u - self.start) / self.width - 0.5).ceil().clamp(0, self.steps)
        else:
            passed = [(u > edge).float() for edge in self.edges]
            q = sum(passed[1:], passed[0])
        level = _symbolic("QuantizeLinear", (q, self.one, self.nought), x.shape, torch.uint8)
        return _symbolic("DequantizeLinear", (level, self.step, self.zero), x.shape, torch.float32)


@torch.no_grad()
def _weight(layer: QuantizedLayer, quantizer: WeightQuantizer) -> nn.Module:
    codes = quantizer.encode(layer.weight)
    codebook = quantizer.codebook.detach().sort().values
    grid = integer_levels(codebook)
    if grid is None:
        return _CodebookWeight(quantizer, codes, codebook)
    levels, step = grid
    return _GridWeight(quantizer, levels[codes.int()], step)


def _inference_copy(model: nn.Module) -> nn.Module:
    """The model on the CPU with constants in place of its quantizers; layers that share a weight share them."""
    model = copy.deepcopy(model).cpu().eval()
    constants = {id(q): _weight(layer, q) for layer, q in weight_quantizers(model).values()}
    activations = activation_quantizers(model)
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.weight_quantizer, WeightQuantizer):
            layer.weight_quantizer = constants[id(layer.weight_quantizer)]  # type: ignore[assignment]
        if name in activations:
            layer.input_quantizer = _Activation(activations[name])  # type: ignore[assignment]
    return model.requires_grad_(False)


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


def _graph(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """The ONNX model (an ``onnx.ModelProto``) of a quantized model, with a dynamic first axis."""
    import onnx_ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript.optimizer import optimize_ir

    # torch's exporter takes an axis of length 1 for a constant
    inputs = tuple(torch.cat([x, x]) if len(x) == 1 else x for x in to_device(inputs, torch.device("cpu")))
    program = _program(_inference_copy(model), inputs)
    graph = program.model
    optimize_ir(graph, should_fold=lambda node: False if _reads_integers(node) else None)
    _check_domains(graph.graph)
    for value in graph.graph.initializers.values():
        if value.name.endswith(f".{INTEGER}"):
            _narrow(value)
    ClearMetadataAndDocStringPass()(graph)  # stack traces, with paths of this machine
    proto = onnx_ir.to_proto(graph)
    del proto.graph.value_info[:]  # shapes in between, a quarter of a small file; readers infer them
    return proto


def _program(model: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    try:
        return torch.onnx.export(
            model,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            dynamic_shapes=tuple({0: "batch"} for _ in inputs),
        )
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = str(cause).strip().split("\n")[0]
        raise ValueError(f"adq: torch cannot export the model to ONNX: {reason}") from error


def _check_domains(graph: Any) -> None:
    """Raise ValueError that names the operators which are not of the standard."""
    others = {f"{node.domain}::{node.op_type}" for node in graph if node.domain not in ("", "ai.onnx")}
    if others:
        raise ValueError(f"adq: not exported: not among the standard operators of ONNX: {', '.join(sorted(others))}")


def _reads_integers(node: Any) -> bool:
    return any(value is not None and (value.name or "").endswith(f".{INTEGER}") for value in node.inputs)


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


# ---- the check ---------------------------------------------------------------------------------------


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _first(outputs: Any) -> Tensor:
    return (outputs[0] if isinstance(outputs, (tuple, list)) else outputs).cpu()


@contextmanager
def _rounding_noise(model: nn.Module) -> Iterator[None]:
    """For a while add noise of the size of rounding errors to the input of every activation quantizer."""
    generator = torch.Generator(model_device(model)).manual_seed(0)

    def add(_: nn.Module, args: tuple[Tensor]) -> Tensor:
        (x,) = args
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        return x + ROUNDING * x.abs().amax() * noise

    hooks = [quantizer.register_forward_pre_hook(add) for quantizer in activation_quantizers(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _undecided(model: nn.Module, inputs: tuple[Tensor, ...], index: int) -> bool:
    """Whether rounding decides the model's own top-1 for one image of a batch: it changes under noise of that size.

    Values next to a threshold make such images: summed in another order they pass it, and later layers follow. torch
    alone gives them another top-1 with another batch size or kernel.
    """
    copies = tuple(x[index : index + 1].expand(NOISY_RUNS, *x.shape[1:]) for x in inputs)
    with _rounding_noise(model):
        return _first(model(*copies)).argmax(1).unique().numel() > 1


@dataclass(frozen=True)
class Parity:
    """A check: images with the same top-1, images left out as undecided, and the largest difference of logits."""

    images: int
    undecided: int
    max_difference: float

    def __str__(self) -> str:
        text = f"parity: top-1 identical on {self.images:,} images in ONNX Runtime"
        if self.undecided:
            text += f" ({self.undecided:,} more left out: there rounding decides in the model itself)"
        return f"{text}, largest difference of the logits {self.max_difference:.3g}"


@torch.no_grad()
def compare(model: nn.Module, path: Path, batches: Iterable[Any], images: int) -> Parity:
    """Compare a model with its ONNX file in ONNX Runtime on the CPU, until ``images`` have the same top-1.

    Raises:
        ValueError: fewer images than that.
        RuntimeError: top-1 differs on an image where rounding does not decide, or on more than 2 %; or a difference
            is not finite.
    """
    session, device = _session(path), model_device(model)
    names = [value.name for value in session.get_inputs()]
    same, undecided, largest = 0, 0, torch.zeros(())
    with evaluating(model):
        for batch in batches:
            inputs = tuple(batch)[: len(names)] if isinstance(batch, (tuple, list)) else (batch,)
            inputs = to_device(tuple(x[: images - same] for x in inputs), device)
            expected = _first(model(*inputs))
            arrays = {name: x.cpu().numpy() for name, x in zip(names, inputs, strict=True)}
            found = torch.from_numpy(session.run(None, arrays)[0])
            largest = torch.maximum(largest, (expected - found).abs().max())  # keeps NaN
            others = (expected.argmax(1) != found.argmax(1)).nonzero().flatten().tolist()
            if not bool(largest.isfinite()):
                raise RuntimeError("adq: not exported: NaN or infinity among the differences of the logits")
            if not all(_undecided(model, inputs, i) for i in others) or undecided + len(others) > images / 50:
                raise RuntimeError(
                    f"adq: not exported: in ONNX Runtime top-1 differs on {len(others):,} of {len(expected):,} images, "
                    f"and not by rounding; largest difference of the logits {largest.item():.3g}"
                )
            undecided += len(others)
            same += len(expected) - len(others)
            if same >= images:
                return Parity(same, undecided, largest.item())
    raise ValueError(f"adq: the check wants {images:,} images with the same top-1, the data has {same:,}")


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    batches: Iterable[Any] | None = None,
    images: int = 1000,
) -> OnnxExport:
    """Write a quantized model as one ONNX file of standard operators (opset 21), and compare it with the model.

    The first axis of every input is dynamic. NaN in an input is not carried through, as it is by the model.

    Args:
        model: quantized and calibrated, float32, on any device; stays as it is.
        path: file to write; it appears only once everything has passed.
        example_inputs: what the model takes, its positional arguments; the values do not matter.
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

    check_layers(model, "not exported to ONNX")
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    graph = _graph(model, inputs)
    onnx.checker.check_model(graph, full_check=True)
    with replacing(path) as temporary:
        temporary.write_bytes(graph.SerializeToString())
        size = temporary.stat().st_size
        parity = None if batches is None else compare(model, temporary, batches, images)
    return OnnxExport(Path(path), size, float_bytes(model), packed_bytes(model), parity)

"""Core ML packages of quantized models: palettized weights, written by coremltools and read back.

Core ML runs on Apple's systems alone, and coremltools elsewhere only writes. So what ends this export is no run: the
package is read again, and the codes and tables in it are compared with the model's, element by element.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from adq.batches import to_device
from adq.convert import unwrapped
from adq.deploy import check_layers, layer_problem, positional
from adq.functional import unpack
from adq.messages import first_line, listed
from adq.nn.layers import QConvTranspose3d, QuantizedLayer
from adq.nn.packed import CODES, PackedWeight
from adq.parity import ExportReport
from adq.portable import PortableActivation, inference_copy
from adq.program import trace
from adq.store import replacing_directory

SUFFIX = ".mlpackage"
WIDTHS = (1, 2, 3, 4, 6, 8)
"""Of codes in Core ML; those of 5 and 7 bits take the next, which changes nothing but the size."""
SIDE_FILE = "executorch_debug_handle_mapping.json"
"""Which coremltools puts beside the model of any program of torch.export; it is not of the package."""


def _problem(layer: QuantizedLayer) -> str | None:
    if getattr(layer, "padding_mode", "zeros") == "circular":
        return "Core ML has no circular padding"
    if isinstance(layer, QConvTranspose3d) and any(layer.output_padding):
        return "Core ML has no output padding along three axes"
    return layer_problem(layer)


def _width(bits: int) -> int:
    return next(width for width in WIDTHS if width >= bits)


def _table(codebook: np.ndarray, scale: np.ndarray, width: int) -> np.ndarray:
    """The levels times the scale of each channel, float32 ``[*scale.shape, 2^width, 1]``; a code without a level has
    the last one.
    """
    levels = np.pad(codebook, (0, 2**width - len(codebook)), mode="edge")
    return (scale[..., None] * levels)[..., None]


@lru_cache(maxsize=1)
def _coremltools() -> Any:
    """coremltools, once it knows what the weights of inference layers are in its own terms."""
    try:
        tools = import_module("coremltools")
    except ImportError as error:
        raise ImportError(f"adq: Core ML export needs {error.name}: pip install 'adq[coreml]'") from error
    from coremltools.converters.mil import Builder
    from coremltools.converters.mil.frontend.torch.ops import _get_inputs
    from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
    from coremltools.converters.mil.mil import types

    def adq_codebook_decode(context: Any, node: Any) -> None:
        codes, codebook, scale, bits, shape = (value.val for value in _get_inputs(context, node, expected=5))
        indices = unpack(torch.from_numpy(codes), int(bits), torch.Size(shape.tolist())).numpy()
        width = _width(int(bits))
        kind = types.nptype_from_builtin(types.string_to_builtin(f"uint{width}"))
        table = _table(codebook, scale, width)
        context.add(Builder.constexpr_lut_to_dense(indices=indices.astype(kind), lut=table, name=node.name))

    register_torch_op(adq_codebook_decode, torch_alias=["adq::codebook_decode"], override=True)
    return tools


def _convert(program: torch.export.ExportedProgram) -> Any:
    """The program as a model of coremltools, float32, for iOS 18 and macOS 15."""
    tools = _coremltools()
    passes = tools.PassPipeline.DEFAULT
    passes.remove_passes({"common::divide_to_multiply"})  # it would move thresholds by a rounding
    try:
        return tools.convert(
            program.run_decompositions({}),
            minimum_deployment_target=tools.target.iOS18,
            compute_precision=tools.precision.FLOAT32,
            pass_pipeline=passes,
            skip_model_load=True,
        )
    except Exception as error:  # of many types: operators that it does not know, constraints of those it does
        raise ValueError(f"adq: coremltools cannot convert the model: {first_line(error)}") from error


def _weights(model: nn.Module, program: torch.export.ExportedProgram) -> dict[str, tuple[str, PackedWeight]]:
    """Layer and weight by the name of the node that decodes it; layers may share a weight."""
    buffers, found = program.graph_signature.inputs_to_buffers, {}
    for node in program.graph.nodes:
        if node.target is torch.ops.adq.codebook_decode.default:
            name = buffers[node.args[0].name].removesuffix(f".{CODES}")
            found[node.name] = name.removesuffix(".weight_quantizer"), cast(PackedWeight, model.get_submodule(name))
    return found


def _read(path: Path) -> dict[str, tuple[int, np.ndarray, np.ndarray]]:
    """Bits, indices and table of every palettized weight of a package, by the name of its operation."""
    tools = _coremltools()
    from coremltools.converters.mil.frontend.milproto.load import load

    package = tools.models.MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    block = load(spec, spec.specificationVersion, package.weights_dir).functions["main"]
    operations = block.find_ops(op_type="constexpr_lut_to_dense")
    return {op.outputs[0].name: (op.indices.dtype.get_bitwidth(), op.indices.val, op.lut.val) for op in operations}


def _check(weights: dict[str, tuple[str, PackedWeight]], path: Path) -> None:
    """Raise RuntimeError unless a package holds exactly these weights, in codes."""
    found = _read(path)
    held = {weights[name][1] for name in weights.keys() & found.keys()}  # of layers that share a weight one may stand
    problems = [f"layer {layer!r} has no palettized weight" for layer, packed in weights.values() if packed not in held]
    for name in weights.keys() & found.keys():
        layer, packed = weights[name]
        bits, indices, table = found[name]
        width = _width(packed.bits)
        if bits != width or not np.array_equal(indices.astype(np.uint8), packed.encode().numpy()):
            problems.append(f"the codes of layer {layer!r} differ")
        if not np.array_equal(table, _table(packed.codebook.numpy(), packed.scale.numpy(), width)):
            problems.append(f"the table of layer {layer!r} differs")
    if problems:
        raise RuntimeError(f"adq: not exported: read back from the package: {listed(problems)}")


def export_coreml(model: nn.Module, path: str | Path, example_inputs: Tensor | tuple[Tensor, ...]) -> ExportReport:
    """Write a quantized model as a Core ML package (iOS 18, macOS 15), its weights palettized, and read it back.

    Weights are ``constexpr_lut_to_dense`` of codes of 1, 2, 3, 4, 6 or 8 bits (5 and 7 take the next width) and a
    table of ``scale * codebook`` for each channel. Shapes are fixed to those of the example: the batch is its first
    axis. Everything is float32, as trained.

    Args:
        model: quantized and calibrated, float32, on any device; stays as it is.
        path: package to write, ``.mlpackage``, a folder; it appears only once it has been read back.
        example_inputs: what the model takes, its positional arguments; the values do not matter.

    Returns:
        A report without parity: Core ML runs on Apple's systems alone, nothing has been computed.

    Raises:
        ImportError: coremltools is missing.
        ValueError: a layer, an operator or the whole model cannot be exported (named).
        RuntimeError: what was read back is not what the model holds.
    """
    _coremltools()
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"adq: the package's name must end in {SUFFIX}, got {path}")
    model = unwrapped(model)
    check_layers(model, "not exported to Core ML", _problem)
    inputs = positional(example_inputs, nested=False)
    copy = inference_copy(model, lambda packed: packed, PortableActivation)
    program = trace(copy, to_device(inputs, torch.device("cpu")))
    weights = _weights(copy, program)
    converted = _convert(program)
    with replacing_directory(path) as temporary:
        converted.save(str(temporary))
        (temporary / SIDE_FILE).unlink(missing_ok=True)
        _check(weights, temporary)
        size = sum(file.stat().st_size for file in temporary.rglob("*") if file.is_file())
    widened = sorted({layer for layer, packed in weights.values() if packed.bits not in WIDTHS})
    notes = ["read back: codes and tables are the model's; it has not run, Core ML is Apple's systems' alone"]
    if widened:
        notes.append(f"Core ML has no codes of 5 or 7 bits, these layers take 6 or 8: {listed(widened)}")
    return ExportReport.of(model, path, size, None, tuple(notes))

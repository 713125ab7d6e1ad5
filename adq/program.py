"""Programs of torch.export and packages of AOTInductor: standard operators only, with a free batch size, checked.

``torch.export.export`` takes quantized and packed models as they are, and then keeps adq's own operators, which whoever
loads the program must have imported. What is written here needs torch alone, or ExecuTorch.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq.convert import unwrapped
from adq.deploy import check_layers
from adq.messages import first_line
from adq.parity import ExportReport, as_inputs, write_checked
from adq.portable import portable

SUFFIX = ".pt2"


def trace(model: nn.Module, inputs: tuple[Any, ...], own: list[bool] | None = None) -> torch.export.ExportedProgram:
    """The program of a model in evaluation mode.

    Args:
        own: of each input, whether it has one entry an image, of which the program takes any number. None: it takes as
            many as these.

    Raises:
        ValueError: torch cannot export the model.
    """
    batch = torch.export.Dim("batch")
    try:
        program = torch.export.export(
            model,
            inputs,
            dynamic_shapes=None if own is None else tuple({0: batch} if each else None for each in own),
        )
    except Exception as error:  # of many types; whatever the model's code raises is among them
        raise ValueError(f"adq: torch cannot export the model: {first_line(error)}") from error
    for node in list(program.graph.nodes):
        node.meta.pop("stack_trace", None)  # paths of this machine
        if node.target is torch.ops.aten._assert_tensor_metadata.default:  # holds by construction
            program.graph.erase_node(node)
    return program


def _program(model: nn.Module, path: str | Path, inputs: tuple[Any, ...], own: list[bool], target: str) -> Any:
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"adq: the file's name must end in {SUFFIX}, got {path}")
    check_layers(model, target)
    return trace(portable(model), inputs, own)


def _deflated(archive: io.BytesIO) -> bytes:
    """An archive of torch with its entries compressed; torch reads both, and writes programs as wordy text."""
    file = io.BytesIO()
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(file, "w") as target:
        for entry in source.infolist():
            target.writestr(zipfile.ZipInfo(entry.filename), source.read(entry), zipfile.ZIP_DEFLATED)
    return file.getvalue()


def export_program(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Any, ...],
    batches: Iterable[Any] | None = None,
    images: int = 1000,
) -> ExportReport:
    """Write a quantized model as a program of torch.export, in standard operators, and compare it with the model.

    ``torch.export.load(path).module()`` runs it without adq. Its operators decompose to torch's core set, so that
    ExecuTorch can lower it.

    Args:
        model: quantized and calibrated, float32, on any device; stays as it is.
        path: file to write, ``.pt2``; it appears only once everything has passed.
        example_inputs: what the model takes, its positional arguments; the values of tensors do not matter. Tensors
            as long as the first have any length in the program, others the one that they have here; what is no tensor
            is fixed.
        batches: real inputs as a loader yields them (labels are ignored): the program that the file gives must have
            the same top-1, over axis 1 of the first output, except where rounding decides it in the model itself.
            None: no check.
        images: how many must be identical.

    Raises:
        ValueError: a layer or the whole model cannot be exported (named); too few images.
        RuntimeError: the check failed.
    """
    model, (inputs, own) = unwrapped(model), as_inputs(example_inputs)
    program = _program(model, path, inputs, own, "not exported by torch.export")
    buffer = io.BytesIO()
    torch.export.save(program, buffer)

    def load(written: Path) -> Any:
        with open(written, "rb") as file:
            return torch.export.load(file).module()

    return write_checked(model, path, _deflated(buffer), "torch.export", load, own, batches, images)


def export_aoti(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Any, ...],
    batches: Iterable[Any] | None = None,
    images: int = 1000,
) -> ExportReport:
    """Compile a quantized model by AOTInductor, for this machine's CPU, and compare it with the model.

    ``torch._inductor.aoti_load_package(path)`` runs it, without adq; so does libtorch, without Python. Weights stay
    codes, decoded when used. Arguments as those of :func:`export_program`.

    Raises:
        ValueError: a layer or the whole model cannot be exported (named); too few images.
        RuntimeError: it cannot be compiled (is there a C++ compiler?), or the check failed.
    """
    model, (inputs, own) = unwrapped(model), as_inputs(example_inputs)
    program = _program(model, path, inputs, own, "not compiled by AOTInductor")
    buffer = io.BytesIO()
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=buffer)
    except Exception as error:  # of the compiler, or of what it is written in
        raise RuntimeError(f"adq: AOTInductor cannot compile the model: {first_line(error)}") from error

    def load(written: Path) -> Any:
        with open(written, "rb") as file:
            return torch._inductor.aoti_load_package(file)

    return write_checked(model, path, _deflated(buffer), "AOTInductor", load, own, batches, images)

"""ExecuTorch programs of quantized models, for its portable kernels, run here by its own runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq.batches import to_device
from adq.convert import unwrapped
from adq.deploy import check_layers, layer_problem, positional
from adq.messages import first_line
from adq.nn.layers import QConv3d, QConvTranspose3d, QuantizedLayer
from adq.parity import ExportReport, in_batch, part, write_checked
from adq.portable import portable
from adq.program import trace

SUFFIX = ".pte"


def _packages() -> None:
    try:
        for package in ("executorch.exir", "executorch.runtime"):
            import_module(package)
    except ImportError as error:
        raise ImportError(f"adq: ExecuTorch export: {error}: pip install 'adq[executorch]'") from error


def _problem(layer: QuantizedLayer) -> str | None:
    if isinstance(layer, (QConv3d, QConvTranspose3d)):
        return "ExecuTorch's portable kernels have no convolution along three axes"
    return layer_problem(layer)


def _lower(program: torch.export.ExportedProgram) -> bytes:
    from executorch.exir import to_edge

    try:
        return to_edge(program).to_executorch().buffer
    except Exception as error:  # of many types: operators that it does not know, memory that it cannot plan
        raise ValueError(f"adq: ExecuTorch cannot lower the model: {first_line(error)}") from error


def _method(path: Path, size: int, own: list[bool]) -> Callable[..., Tensor]:
    """The program in ExecuTorch's runtime, as a function of any number of images that gives the first output."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")

    def run(*inputs: Any) -> Tensor:
        outputs, images = [], len(inputs[own.index(True)])
        for start in range(0, images, size):
            count = min(size, images - start)
            # shapes are fixed, and so is the order of axes
            full = [
                torch.cat([x, x[-1:].expand(size - count, *x.shape[1:])]).contiguous() if each else x
                for x, each in zip(part(inputs, own, slice(start, start + size)), own, strict=True)
            ]
            try:
                outputs.append(method.execute(full)[0][:count].clone())  # the next call writes over it
            except RuntimeError as error:
                raise RuntimeError(
                    f"adq: not exported: ExecuTorch cannot run the model: {first_line(error)}"
                ) from error
        return torch.cat(outputs)

    return run


def export_executorch(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    batches: Iterable[Any] | None = None,
    images: int = 1000,
) -> ExportReport:
    """Write a quantized model as an ExecuTorch program for its portable kernels, and compare it with the model.

    Weights are codes of 1, 2, 4 or 8 bits, looked up when used. For a delegate lower the program of
    :func:`adq.export_program` instead.

    Args:
        model: quantized and calibrated, float32, on any device; stays as it is.
        path: file to write, ``.pte``; it appears only once everything has passed.
        example_inputs: what the model takes, its positional arguments; the values do not matter. Shapes are fixed to
            these, and memory is planned for them: the batch is the first axis.
        batches: real inputs as a loader yields them (labels are ignored) for the check in ExecuTorch's runtime, as in
            :func:`adq.export_program`. None: no check.
        images: how many must be identical.

    Raises:
        ImportError: executorch is missing, or was built for another torch.
        ValueError: a layer or the whole model cannot be exported (named); too few images.
        RuntimeError: the check failed.
    """
    _packages()
    if Path(path).suffix != SUFFIX:
        raise ValueError(f"adq: the file's name must end in {SUFFIX}, got {path}")
    model = unwrapped(model)
    check_layers(model, "not exported to ExecuTorch", _problem)
    inputs = to_device(positional(example_inputs, nested=False), torch.device("cpu"))
    inputs = tuple(x.contiguous() if isinstance(x, Tensor) else x for x in inputs)
    own = in_batch(inputs)
    if not any(own):
        raise ValueError("adq: no example input is a tensor with a first axis, that of the images of a batch")
    lowered = _lower(trace(portable(model), inputs))
    load = partial(_method, size=len(inputs[own.index(True)]), own=own)
    return write_checked(model, path, lowered, "ExecuTorch", load, own, batches, images)

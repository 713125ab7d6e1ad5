"""What every export ends with: the model and the file give the same answers, and a report of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adq.artifact import packed_bytes
from adq.batches import model_device, to_device
from adq.convert import activation_quantizers, evaluating
from adq.deploy import positional
from adq.store import replacing
from adq.summary import float_bytes

ROUNDING = 2e-6
"""Of the largest input of a quantizer: how far sums in float32 of another order may lie apart."""
NOISY_RUNS = 64
CLOSE = 1e-3
"""Of the largest output of a batch: how far outputs that are no classes may lie apart."""


@dataclass(frozen=True)
class Parity:
    """A check: images with the same top-1, images left out as undecided, and the largest difference of logits.

    Of a model with one output, which has no top-1, images whose outputs are close (``of_values``).
    """

    runtime: str
    images: int
    undecided: int
    max_difference: float
    of_values: bool = False

    def __str__(self) -> str:
        same = f"outputs within {CLOSE:.1%}" if self.of_values else "top-1 identical"
        text = f"parity: {same} on {self.images:,} images in {self.runtime}"
        if self.undecided:
            text += f" ({self.undecided:,} more left out: there rounding decides in the model itself)"
        return f"{text}, largest difference of the logits {self.max_difference:.3g}"


@dataclass(frozen=True)
class ExportReport:
    """What was written: bytes of it, of the float network and of the packed file; parity None: not checked."""

    path: Path
    bytes: int
    bytes_float: int
    bytes_packed: int
    parity: Parity | None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, model: nn.Module, path: str | Path, size: int, parity: Parity | None, notes: tuple[str, ...] = ()
    ) -> ExportReport:
        """The report on a file of ``size`` bytes made of this model."""
        return cls(Path(path), size, float_bytes(model), packed_bytes(model), parity, notes)

    def __str__(self) -> str:
        sizes = f"{self.path}: {self.bytes:,} bytes; float {self.bytes_float:,}, packed {self.bytes_packed:,}"
        return "\n".join([sizes, str(self.parity or "parity: not checked"), *self.notes])


def in_batch(inputs: tuple[Any, ...]) -> list[bool]:
    """Which of a model's inputs have one entry an image: tensors as long as the first. Others, a mask say, are shared.

    So are numbers, None, and tensors without an axis.
    """
    lengths = [len(x) if isinstance(x, Tensor) and x.dim() else None for x in inputs]
    images = next((length for length in lengths if length is not None), None)
    return [length is not None and length == images for length in lengths]


def as_inputs(example_inputs: Tensor | tuple[Any, ...]) -> tuple[tuple[Any, ...], list[bool]]:
    """What a model takes, on the CPU, with two images or more: exporters take an axis of length 1 for a constant. And
    which of it has one entry an image.
    """
    inputs = to_device(positional(example_inputs, nested=False), torch.device("cpu"))
    own = in_batch(inputs)
    return tuple(torch.cat([x, x]) if each and len(x) == 1 else x for x, each in zip(inputs, own, strict=True)), own


def _first(outputs: Any) -> Tensor:
    """The first of a model's outputs, on the CPU."""
    if isinstance(outputs, Mapping):
        outputs = next(iter(outputs.values()))
    return (outputs[0] if isinstance(outputs, (tuple, list)) else outputs).cpu()


def _top1(logits: Tensor) -> Tensor:
    """The top classes of each image, ``[N, places]``: of ``[N, classes]`` one, of ``[N, classes, ...]`` one a place."""
    return logits.reshape(len(logits), *logits.shape[1:2], -1).argmax(1)


def _has_classes(outputs: Tensor) -> bool:
    return outputs.dim() > 1 and outputs.shape[1] > 1


def _differing(expected: Tensor, found: Tensor) -> list[int]:
    """Images with another top-1 in one place; where there are no classes, with outputs that are not close."""
    if _has_classes(expected):
        differ = _top1(expected) != _top1(found)
    else:
        differ = ((expected - found).abs() > CLOSE * expected.abs().amax()).reshape(len(expected), -1)
    return differ.any(1).nonzero().flatten().tolist()


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


def _undecided(model: nn.Module, inputs: tuple[Any, ...], own: list[bool], index: int, largest: Tensor) -> bool:
    """Whether rounding decides the model's own answer for one image of a batch: it changes under noise of that size.

    Values next to a threshold make such images: summed in another order they pass it, and later layers follow. torch
    alone gives them another top-1 with another batch size or kernel.
    """
    one = zip(part(inputs, own, slice(index, index + 1)), own, strict=True)
    copies = tuple(x.expand(NOISY_RUNS, *x.shape[1:]) if each else x for x, each in one)
    with _rounding_noise(model):
        outputs = _first(model(*copies))
    if _has_classes(outputs):
        return len(_top1(outputs).unique(dim=0)) > 1
    return bool((outputs.amax(0) - outputs.amin(0)).max() > CLOSE * largest)


def part(inputs: tuple[Any, ...], own: list[bool], images: slice) -> tuple[Any, ...]:
    """Some images of a batch, with what all share."""
    return tuple(x[images] if each else x for x, each in zip(inputs, own, strict=True))


def _compare_batch(
    model: nn.Module,
    run: Callable[..., Any],
    inputs: tuple[Any, ...],
    own: list[bool],
    runtime: str,
    allowance: float,
) -> tuple[int, Tensor, bool]:
    """Of a batch: how many images are undecided, at most ``allowance``, the largest difference of the logits, and
    whether outputs were compared by their values.
    """
    expected, found = _first(model(*inputs)), _first(run(*to_device(inputs, torch.device("cpu"))))
    largest = (expected - found).abs().max()
    if not bool(largest.isfinite()):
        raise RuntimeError("adq: not exported: NaN or infinity among the differences of the logits")
    others, reach = _differing(expected, found), expected.abs().amax()
    if len(others) > allowance or not all(_undecided(model, inputs, own, i, reach) for i in others):
        what = "top-1 differs" if _has_classes(expected) else f"outputs differ by more than {CLOSE:.1%}"
        raise RuntimeError(
            f"adq: not exported: in {runtime} {what} on {len(others):,} of {len(expected):,} "
            f"images, and not by rounding; largest difference of the logits {largest.item():.3g}"
        )
    return len(others), largest, not _has_classes(expected)


def _length(inputs: tuple[Any, ...], own: list[bool]) -> int:
    """How many images a batch has; none where no input has one entry an image."""
    for i, (x, each) in enumerate(zip(inputs, own, strict=True)):
        if each and not (isinstance(x, Tensor) and x.dim()):
            kind = "a tensor without axes" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"adq: the check: input {i} has one entry an image in the example, and is {kind} in a batch; give an "
                "example like the batches"
            )
    lengths = {len(x) for x, each in zip(inputs, own, strict=True) if each}
    if len(lengths) > 1:
        raise ValueError(
            "adq: the check: inputs that are as long as each other in the example have lengths "
            f"{sorted(lengths)} in a batch; where one is shared by all images, give an example of another batch size"
        )
    return max(lengths, default=0)


@torch.no_grad()
def compare(
    model: nn.Module, run: Callable[..., Any], own: list[bool], runtime: str, batches: Iterable[Any], images: int
) -> Parity:
    """Compare a model with what was exported, until ``images`` have the same top-1, or one output that is close.

    Args:
        model: on any device; stays as it is.
        run: the same in another runtime, from inputs on the CPU.
        own: of each input, whether it has one entry an image; others, what is no tensor among them, are given whole.
        runtime: its name, for messages.
        batches: of inputs as a loader yields them, whatever follows the inputs (labels) is ignored.
        images: how many must be identical.

    Raises:
        ValueError: no images are asked for, or fewer there than that; a batch that is a mapping, or of inputs of
            several lengths, or of none where the example has one entry an image.
        RuntimeError: the answer differs on an image where rounding does not decide, or on more than 2 %; or a
            difference is not finite.
    """
    if images < 1:
        raise ValueError(f"adq: the check takes 1 image or more, got {images}; without batches there is no check")
    device = model_device(model)
    same, undecided, largest, of_values = 0, 0, torch.zeros(()), False
    with evaluating(model):
        for batch in batches:
            if isinstance(batch, Mapping):
                raise ValueError(
                    "adq: the check takes batches (inputs, ...), in the order of the model's; got a mapping"
                )
            whole = tuple(batch)[: len(own)] if isinstance(batch, (tuple, list)) else (batch,)
            given, done = own[: len(whole)], 0
            length = _length(whole, given)
            while done < length and same < images:
                size = min(images - same, length - done)
                inputs = to_device(part(whole, given, slice(done, done + size)), device)
                allowance = images / 50 - undecided
                left_out, difference, of_values = _compare_batch(model, run, inputs, given, runtime, allowance)
                largest = torch.maximum(largest, difference)
                undecided += left_out
                same += size - left_out
                done += size
            if same == images:
                return Parity(runtime, same, undecided, largest.item(), of_values)
    raise ValueError(f"adq: the check wants {images:,} images with the same top-1, the data has {same:,}")


def write_checked(
    model: nn.Module,
    path: str | Path,
    content: bytes,
    runtime: str,
    load: Callable[[Path], Callable[..., Any]],
    own: list[bool],
    batches: Iterable[Any] | None,
    images: int,
) -> ExportReport:
    """Write a file that appears only once its runtime has given the model's answers; the end of every such export.

    Args:
        load: the file in its runtime, as what :func:`compare` runs.
        runtime, own, batches, images: of :func:`compare`; batches None: no check.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)
        parity = None if batches is None else compare(model, load(temporary), own, runtime, batches, images)
    return ExportReport.of(model, path, len(content), parity)

"""Figures of a run: bits per layer, and a layer's weights with its codebook before and after training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adq.allocate import Allocation
from adq.convert import weight_quantizers
from adq.store import replacing

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


@dataclass(frozen=True)
class CodebookView:
    """A layer's weights in units of their scale, and its levels, at one moment."""

    weights: Any
    levels: Any


@torch.no_grad()
def codebook_view(model: nn.Module, name: str) -> CodebookView:
    """What :func:`draw_codebook` shows of a layer."""
    layer, quantizer = weight_quantizers(model)[name]
    weights = (layer.weight.float() / quantizer.scale).flatten().cpu().numpy()
    return CodebookView(weights, quantizer.levels.cpu().clone().numpy())


def shown_layer(model: nn.Module) -> str:
    """The layer to draw: the largest one whose width is not pinned."""
    layers = weight_quantizers(model)
    free = {name: layer for name, (layer, quantizer) in layers.items() if not quantizer.pinned}
    candidates = free or {name: layer for name, (layer, _) in layers.items()}
    return max(candidates, key=lambda name: candidates[name].weight.numel())


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def label(text: str) -> str:
    """A name as matplotlib shall print it: a dollar is no formula, and a leading underscore no reason to hide it."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _write(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=140)
    _pyplot().close(figure)


def draw_allocation(path: Path, allocation: Allocation, weights: Mapping[str, int]) -> None:
    """Bars of bits per layer, and each layer's share of the weights.

    Args:
        path: PNG to write.
        allocation: bits by layer.
        weights: number of weights by layer.
    """
    pyplot = _pyplot()
    names, total = list(allocation.bits), sum(weights.values())
    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(max(6.0, 0.42 * len(names) + 2), 6), sharex=True, height_ratios=(2, 1), layout="constrained"
    )
    bars = top.bar(names, [allocation.bits[name] for name in names], color=BLUE)
    top.bar_label(bars)
    top.axhline(
        allocation.average_quantized, color=ORANGE, linestyle="--", label=f"average {allocation.average_quantized:.3f}"
    )
    top.set_ylabel("weight bits")
    top.margins(y=0.15)
    top.legend(loc="upper center")
    bottom.bar(names, [100.0 * weights[name] / total for name in names], color=GREY)
    bottom.set_ylabel("% of the weights")
    bottom.tick_params(axis="x", rotation=90)
    _write(figure, path)


def draw_codebook(path: Path, name: str, before: CodebookView, after: CodebookView) -> None:
    """Histogram of a layer's weights with its levels, before and after training.

    Args:
        path: PNG to write.
        name: the layer's name.
        before, after: from :func:`codebook_view`.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    moments = (("before training", before, BLUE), ("after training", after, ORANGE))
    for axis, (title, view, color) in zip(axes, moments, strict=True):
        axis.hist(view.weights, bins=120, color=GREY, alpha=0.6)
        for i, level in enumerate(view.levels):
            axis.axvline(level, color=color, linewidth=1.4, label=f"{len(view.levels)} levels" if i == 0 else None)
        axis.set_title(f"{name}, {title}")
        axis.set_ylabel("weights")
        axis.legend(loc="upper right")
    axes[-1].set_xlabel("weight / scale of its channel")
    _write(figure, path)


def draw_history(path: Path, rows: list[dict[str, Any]], float_top1: float) -> None:
    """Test top-1 and training loss over the epochs of QAT.

    Args:
        path: PNG to write.
        rows: rows of ``metrics.jsonl`` of the phase ``qat``.
        float_top1: top-1 of the float network, percent.
    """
    pyplot = _pyplot()
    epochs = [row["epoch"] for row in rows]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    top.plot(epochs, [row["test_top1"] for row in rows], color=BLUE, marker="o", markersize=3, label="quantized")
    top.axhline(float_top1, color=ORANGE, linestyle="--", label="float")
    top.set_ylabel("test top-1 %")
    top.legend(loc="lower right")
    bottom.plot(epochs, [row["train_loss"] for row in rows], color=BLUE, marker="o", markersize=3)
    bottom.set_ylabel("training loss")
    bottom.set_xlabel("epoch")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    _write(figure, path)

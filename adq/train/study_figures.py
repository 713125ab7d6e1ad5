"""Figures of a sensitivity study, from the mapping that is its ``study.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from adq.train.figures import BLUE, GREY, ORANGE, _pyplot, _write

COLORS = (ORANGE, BLUE, "#2f855a", "#805ad5", "#b83280", "#319795", "#975a16", "#4a5568")
DECADES = 4
"""Heat maps show so many powers of ten below the largest score."""


def _panels(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Scores [layers, widths] of the truth and of each estimator, these averaged over the draws."""

    def matrix(scores: Mapping[str, Mapping[int, float]]) -> np.ndarray:
        return np.array([[scores[name][bits] for bits in result["widths"]] for name in result["layers"]])

    truth = result["truth"]
    panels = {
        f"truth: {what}": matrix({name: {b: v[target] for b, v in row.items()} for name, row in truth.items()})
        for target, what in (("loss", "loss rise"), ("kl", "held-out KL"))
    }
    for name, estimator in result["estimators"].items():
        panels[name] = np.mean([matrix(scores) for scores in estimator["scores"]], axis=0)
    return panels


def draw_heatmaps(path: Path, result: Mapping[str, Any]) -> None:
    """Scores by layer and width, each panel relative to its largest; grey where a score is not positive."""
    from matplotlib.colors import LogNorm

    pyplot = _pyplot()
    panels, layers = _panels(result), list(result["layers"])
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(1.5 * len(panels) + 3, 0.3 * len(layers) + 1.6), sharey=True, layout="constrained"
    )
    colors = pyplot.get_cmap("viridis").with_extremes(bad="#cbd5e0")
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        share = np.where(values > 0, values, np.nan) / max(values.max(), 1e-300)
        image = axis.imshow(share, aspect="auto", cmap=colors, norm=LogNorm(10.0**-DECADES, 1.0))
        axis.set_title(name.replace(": ", ":\n"), fontsize=10)
        axis.set_xticks(range(len(result["widths"])), result["widths"])
        axis.set_xlabel("bits")
    axes[0].set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=axes, label="score / the panel's largest", extend="min", pad=0.01)
    _write(figure, path)


def draw_scatter(path: Path, result: Mapping[str, Any]) -> None:
    """Each estimator's scores against the measured rise of the loss, and against the held-out KL."""
    pyplot = _pyplot()
    panels = _panels(result)
    truths = {name: panels.pop(name) for name in list(panels) if name.startswith("truth")}
    figure, axes = pyplot.subplots(
        len(truths), len(panels), figsize=(2.7 * len(panels) + 0.6, 6.2), layout="constrained", sharey="row"
    )
    for row, (truth, measured) in zip(axes, truths.items(), strict=True):
        for axis, (name, values) in zip(row, panels.items(), strict=True):
            _scatter(axis, values, measured, result["widths"])
            axis.set_title(name, fontsize=10)
        row[0].set_ylabel(truth.removeprefix("truth: "))
    for axis in axes[-1]:
        axis.set_xlabel("score")
    figure.legend(*axes[0][0].get_legend_handles_labels(), title="bits", loc="outside right upper")
    _write(figure, path)


def _scatter(axis: Any, values: np.ndarray, measured: np.ndarray, widths: list[int]) -> None:
    shown = (values > 0) & (measured > 0)
    for i, bits in enumerate(widths):
        keep = shown[:, i]
        color = COLORS[i % len(COLORS)]
        axis.scatter(values[keep, i], measured[keep, i], s=16, color=color, alpha=0.8, label=str(bits), linewidths=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axline((1e-3, 1e-3), (1e-2, 1e-2), color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    if shown.any():
        for limits, data in ((axis.set_xlim, values[shown]), (axis.set_ylim, measured[shown])):
            limits(data.min() / 3, data.max() * 3)  # never less than most of a decade
    for side in (axis.xaxis, axis.yaxis):
        side.set_minor_formatter("")
    hidden = int((~shown).sum())
    if hidden:
        axis.text(0.03, 0.97, f"{hidden} not positive", transform=axis.transAxes, va="top", fontsize=8, color=GREY)


def draw_allocations(path: Path, result: Mapping[str, Any]) -> None:
    """Bits per layer as each estimator's first draw allocates them, and as the truth does; with the loss rise."""
    pyplot = _pyplot()
    layers = list(result["layers"])
    points = {point["name"]: point for point in result["additivity"]["points"]}
    names = ["truth", *result["estimators"]]
    figure, axes = pyplot.subplots(
        len(names), 1, figsize=(max(6.0, 0.42 * len(layers) + 2), 1.25 * len(names) + 1.4), sharex=True, sharey=True,
        layout="constrained",
    )  # fmt: skip
    for axis, name in zip(axes, names, strict=True):
        bits = [points[name]["bits"][layer] for layer in layers]
        axis.bar_label(axis.bar(layers, bits, color=ORANGE if name == "truth" else BLUE), fontsize=8)
        rise = points[name]["rise"]
        axis.set_title(f"{name}: loss {rise['loss']:+.3f}, top-1 {-rise['accuracy']:+.2f}", fontsize=10, loc="left")
        axis.margins(y=0.25)
        axis.set_yticks(result["widths"])
    figure.supylabel("weight bits", fontsize=10)
    axes[-1].tick_params(axis="x", rotation=90)
    _write(figure, path)


def draw_trained(path: Path, trained: Mapping[str, Any]) -> None:
    """Falls of top-1 of runs with different bits, before and after training, against each sum of scores."""
    pyplot = _pyplot()
    names, points = list(trained["points"][0]["sums"]), trained["points"]
    figure, axes = pyplot.subplots(
        2, len(names), figsize=(2.3 * len(names) + 0.6, 4.6), layout="constrained", sharex="col", sharey="row"
    )
    for row, (stage, ranks) in zip(axes, trained["spearman"].items(), strict=True):
        for axis, name in zip(row, names, strict=True):
            axis.scatter([p["sums"][name] for p in points], [p["falls"][stage] for p in points], s=18, color=BLUE)
            correlation = "" if ranks[name] is None else f"rank correlation {ranks[name]:.2f}"
            axis.text(0.03, 0.96, correlation, transform=axis.transAxes, va="top", fontsize=8, color=GREY)
            axis.margins(0.12, 0.25)
        row[0].set_ylabel(f"fall of top-1, {stage}")
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=10)
    figure.supxlabel("sum of scores", fontsize=10)
    _write(figure, path)

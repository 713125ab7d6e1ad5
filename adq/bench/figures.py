"""The results as pictures: bandwidth, peers, layers, training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from adq.bench.case import ADQ, COPY
from adq.bench.results import Figure, Results, Row
from adq.store import replacing

BLUE, LIGHT, ORANGE, GREY, BLACK = "#2b6cb0", "#90cdf4", "#dd6b20", "#a0aec0", "#1a202c"


def draw(results: Results, output: Path) -> None:
    """Draw what the results hold as PNG files."""
    environment = results.environment
    caption = (
        f"{environment['device']}, {environment['threads']} CPU threads, torch {environment['torch']}, "
        f"Triton {environment['triton']}, "
        f"adq {environment['adq']} {(environment['commit'] or '')[:10]}, {environment['date'][:10]}"
    )
    pictures = {
        "roofline.png": roofline(results),
        "peers.png": peers(results),
        "layers.png": layers(results),
        "step.png": step(results),
    }
    for name, canvas in pictures.items():
        if canvas is None:
            continue
        canvas.supxlabel(caption, x=0.995, ha="right", fontsize=7, color=GREY)
        with replacing(output / name) as temporary:
            canvas.savefig(temporary, format="png", dpi=130)


def _canvas(lines: int, panels: int = 1) -> tuple[Canvas, Any]:
    """A canvas with ``lines`` horizontal bars in each panel, the first at the top."""
    canvas = Canvas(figsize=(6.0 + 4.5 * panels, 1.8 + 0.27 * lines), layout="constrained")
    axes = canvas.subplots(1, panels, sharey=True, squeeze=False)[0]
    for axis in axes:
        axis.set_ylim(lines - 0.4, -0.6)  # from the top down
    return canvas, axes[0] if panels == 1 else axes


def _timed(results: Results, part: str) -> list[Row]:
    return [row for row in results.rows if row.part == part and row.ms is not None]


def _bounds(results: Results, part: str) -> dict[tuple[str, str], Figure]:
    """Figures with a bound, by case and contender; the first one of a contender."""
    found: dict[tuple[str, str], Figure] = {}
    for figure in results.figures:
        if figure.part == part and figure.bound is not None:
            found.setdefault((figure.case, figure.contender), figure)
    return found


def _legend(axis: Any, *handles: Any) -> None:
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(handles), frameon=False)


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers."""
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _mark(color: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, linestyle="", markersize=9, markeredgewidth=2, label=label)


def roofline(results: Results) -> Canvas | None:
    """Bandwidth of every operator, with the copy's and the target's."""
    rows = [row for row in _timed(results, "operators") if row.contender in (ADQ, COPY)]
    speed = {(row.case, row.contender): row.gbps for row in rows}
    cases = list(dict.fromkeys(row.case for row in rows if row.contender == ADQ))
    if not cases:
        return None
    bounds = _bounds(results, "operators")
    canvas, axis = _canvas(len(cases))
    axis.barh(range(len(cases)), [speed[case, ADQ] for case in cases], color=BLUE, height=0.65)
    axis.set_yticks(range(len(cases)), cases)
    copies = [speed.get((case, COPY)) or 0.0 for case in cases]
    axis.plot(copies, range(len(cases)), color=BLACK, marker="|", linestyle="", markersize=12, markeredgewidth=2)
    for place, (case, copy) in enumerate(zip(cases, copies, strict=True)):
        target = bounds.get((case, ADQ))
        share = next((row.share for row in rows if (row.case, row.contender) == (case, ADQ)), None)
        if target is not None and target.figure == "share of copy" and target.bound:
            axis.plot(target.bound * copy, place, color=ORANGE, marker="|", markersize=12, markeredgewidth=2)
        if share is not None:
            axis.text(0.01 * max(copies), place, f"{share:.2f}", va="center", color="white", fontsize=8)
    axis.set_xlim(0, 1.05 * max([*copies, *(speed[case, ADQ] or 0.0 for case in cases)]))
    axis.set_xlabel("GB/s (bytes that must be read and written, over the time)")
    axis.set_title("Bandwidth of the operators; in the bar, the share of copy", pad=26)
    marks = Patch(color=BLUE, label="adq"), _mark(BLACK, "|", "copy_ of the same bytes"), _mark(ORANGE, "|", "target")
    _legend(axis, *marks)
    return canvas


def peers(results: Results) -> Canvas | None:
    """How many times longer each peer takes, on a logarithmic axis."""
    rows = [
        row
        for part in ("peers", "fit")
        for row in _timed(results, part)
        if row.times_adq is not None and row.contender != COPY
    ]
    if not rows:
        return None
    bounds = {**_bounds(results, "peers"), **_bounds(results, "fit")}
    labels = [f"{row.case.removesuffix(', beside peers')}:  {row.contender}" for row in rows]
    values = [row.times_adq or 0.0 for row in rows]
    canvas, axis = _canvas(len(rows))
    colors = [BLUE if value >= 1 else GREY for value in values]
    axis.barh(range(len(rows)), [value - 1.0 for value in values], left=1.0, color=colors)
    axis.set_yticks(range(len(rows)), labels)
    _logarithmic(axis)
    axis.axvline(1.0, color=BLACK, linewidth=1.2)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        text = f" {value:.3g}x" if value < 1000 else f" {value:,.0f}x"
        axis.text(max(value, 1.0), place, text, va="center", fontsize=8, color=BLACK)
        target = bounds.get((row.case, row.contender))
        if target is not None and target.bound:
            axis.plot(target.bound, place, color=ORANGE, marker="|", markersize=12, markeredgewidth=2)
    low, high = 0.8 * min(0.8, *values), max(1.0, *values)
    axis.set_xlim(low, high * (high / low) ** 0.2)  # a sixth of the axis is for the text of the longest bar
    axis.set_xlabel("time over adq's, logarithmic; right of the line adq is faster")
    axis.set_title("Alternatives on the same data", pad=26)
    marks = Patch(color=BLUE, label="slower than adq"), Patch(color=GREY, label="faster"), _mark(ORANGE, "|", "target")
    _legend(axis, *marks)
    return canvas


LAYER_MARKS = {
    "float32": (BLACK, "o"),
    "bfloat16": (GREY, "o"),
    "adq float32": (BLUE, "D"),
    "adq bfloat16": (LIGHT, "D"),
}


def _layer_kind(contender: str) -> str:
    return f"adq {contender.rpartition(' ')[2]}" if contender.startswith(ADQ) else contender


def layers(results: Results) -> Canvas | None:
    """Images a second of every layer, quantized and in float, on a logarithmic axis."""
    rows = _timed(results, "layers")
    if not rows:
        return None
    names = list(dict.fromkeys(row.case.rpartition(", ")[0] for row in rows))
    canvas, axes = _canvas(len(names), panels=2)
    for axis, mode in zip(axes, ("training", "inference"), strict=True):
        for row in rows:
            name, _, case_mode = row.case.rpartition(", ")
            if case_mode == mode:
                color, marker = LAYER_MARKS[_layer_kind(row.contender)]
                place = names.index(name) + (0.16 if row.contender.endswith("bfloat16") else -0.16)
                axis.plot(row.rate, place, color=color, marker=marker, markersize=6, linestyle="")
        _logarithmic(axis)
        axis.set_yticks(range(len(names)), names)
        axis.grid(alpha=0.3)
        axis.set_xlabel("images a second, logarithmic")
        axis.set_title({"training": "training: forward + backward", "inference": "inference"}[mode])
    handles = [_mark(color, marker, name) for name, (color, marker) in LAYER_MARKS.items()]
    canvas.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    return canvas


def step(results: Results) -> Canvas | None:
    """Time of a quantized training step over that of the float one."""
    figures = [figure for figure in results.figures if figure.part == "step"]
    if not figures:
        return None
    cases = list(dict.fromkeys(figure.case for figure in figures))
    canvas = Canvas(figsize=(10.0, 1.6 + 1.6 * len(cases)), layout="constrained")
    axes: Any = canvas.subplots(len(cases), 1, sharex=True, squeeze=False)[:, 0]
    for axis, case in zip(axes, cases, strict=True):
        own = sorted((figure for figure in figures if figure.case == case), key=lambda figure: figure.contender)
        axis.barh(range(len(own)), [figure.value for figure in own], color=BLUE, height=0.6)
        axis.set_yticks(range(len(own)), [figure.contender for figure in own])
        axis.axvline(1.0, color=BLACK, linewidth=1.5)
        for place, figure in enumerate(own):
            axis.text(0.02, place, f"{figure.value:.3f}", va="center", color="white")
            if figure.bound is not None:
                axis.plot(figure.bound, place, color=ORANGE, marker="|", markersize=22, markeredgewidth=2.5)
        axis.set_title(case, fontsize=10)
        axis.invert_yaxis()
    axes[-1].set_xlim(0, 1.12 * max(max(figure.value, figure.bound or 1.0) for figure in figures))
    axes[-1].set_xlabel("time of a training step over the float network's")
    handles = [Patch(color=BLUE, label="adq"), _mark(BLACK, "|", "float"), _mark(ORANGE, "|", "target, at most")]
    canvas.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return canvas

"""The pictures of a report: numbers in, SVG out; nothing here knows of models or tensors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from adq.svg import Axes, Point, circle, drawing, label, path, rectangle, segments, ticks

NAME_LENGTH = 30
NAMED_BARS = 60
CURVE_POINTS = 300
MARKED_THRESHOLDS = 64


def bits_picture(
    names: Sequence[str],
    weight_bits: Sequence[int | None],
    activation_bits: Sequence[int | None],
    shares: Sequence[float],
    average: float,
) -> str:
    """Bars of weight bits, dots of activation bits, and below each layer's share of the weights.

    Args:
        names: layers in order.
        weight_bits, activation_bits: per layer; None is float.
        shares: per layer, of all weights of these layers, 0 to 1.
        average: weight bits, drawn as a line.
    """
    pitch = min(42.0, max(3.0, 860 / len(names)))
    width = pitch * len(names)
    upper = Axes(52, 22, width, 150, (0, width), (0, 8.6))
    lower = Axes(52, 192, width, 74, (0, width), (0, 1.1 * max([*shares, 1e-9])))
    bars, dots, numbers = [], [], []
    for i, (name, bits, inputs, share) in enumerate(zip(names, weight_bits, activation_bits, shares, strict=True)):
        middle = (i + 0.5) * pitch
        says = f"{name}: weights {bits or 'float'}, inputs {inputs or 'float'}, {100 * share:.1f} % of the weights"
        bars += [_bar(upper, middle, pitch, bits or 0, "bar", says), _bar(lower, middle, pitch, share, "soft", says)]
        x, foot = upper.at(middle, 0)
        if bits is None:
            numbers.append(label(x + 4, foot - 4, "float", "start", turned=True))
        elif pitch >= 14:
            numbers.append(label(x, foot - 4, str(bits), kind="inside"))
        if inputs:
            dots.append(circle(*upper.at(middle, inputs), "dot", min(3.5, pitch / 3)))
    line = [upper.at(0, average), upper.at(width, average)] if any(weight_bits) else []
    legend = [("bar", "weight bits"), ("accent", f"average {average:.3f}")] if line else []
    legend += [("dot", "activation bits")] if dots else []
    named, room = _bar_names(names, lower, pitch)
    return drawing(
        max(440, width + 64),
        270 + room,
        f"Bits of {len(names)} layers and their shares of the weights",
        *_legend(legend),
        upper.y_axis([0, 2, 4, 6, 8], "bits"),
        _percent_axis(lower),
        *bars,
        path(line, "accent"),
        *dots,
        *numbers,
        *named,
    )


def _bar(axes: Axes, middle: float, pitch: float, value: float, kind: str, says: str) -> str:
    x, y = axes.at(middle - 0.36 * pitch, value)
    return rectangle(x, y, 0.72 * pitch, axes.top + axes.height - y, kind, says)


def _percent_axis(axes: Axes) -> str:
    values = ticks(0, axes.y[1], 2)
    lines = axes.y_axis(values).split("<text")[0]
    return lines + "".join(label(axes.left - 6, axes.at(0, v)[1] + 4, f"{100 * v:.3g} %", "end") for v in values)


def _bar_names(names: Sequence[str], axes: Axes, pitch: float) -> tuple[list[str], float]:
    """Names below the bars, running upwards, and the height they take; none where there are too many."""
    if len(names) > NAMED_BARS:
        return [label(axes.left, axes.top + axes.height + 18, "layers in order; the table names them", "start")], 26
    short = [name if len(name) <= NAME_LENGTH else f"…{name[1 - NAME_LENGTH :]}" for name in names]
    bottom = axes.top + axes.height + 8
    found = [label(axes.at((i + 0.5) * pitch, 0)[0] + 4, bottom, n, "end", turned=True) for i, n in enumerate(short)]
    return found, 7.0 * max(map(len, short)) + 10


def _legend(entries: Sequence[tuple[str, str]]) -> list[str]:
    parts, x = [], 52.0
    for kind, text in entries:
        if kind == "dot":
            parts.append(circle(x + 6, 8, kind, 3.5))
        elif kind in ("bar", "soft"):
            parts.append(rectangle(x, 3, 12, 10, kind))
        else:
            parts.append(segments([((x, 8), (x + 14, 8))], kind))
        parts.append(label(x + 19, 12, text, "start"))
        x += 19 + 6.5 * len(text) + 18
    return parts


def curve_picture(title: str, values: Sequence[float], epochs: Sequence[float], line: float | None = None) -> str:
    """A figure of each epoch.

    Args:
        title: what it is, with its unit.
        values, epochs: same length, not empty.
        line: drawn across for comparison: the float network's figure.
    """
    stride = -(-len(values) // CURVE_POINTS)
    values, epochs = [*values[:-1:stride], values[-1]], [*epochs[:-1:stride], epochs[-1]]
    shown = [*values, line] if line is not None else values
    low, high = min(shown), max(shown)
    margin = 0.06 * (high - low) or 0.5
    axes = Axes(52, 26, 390, 170, (min(0, *epochs), max(1, *epochs)), (low - margin, high + margin))
    points = axes.points(epochs, values)
    level = [] if line is None else [axes.at(axes.x[0], line), axes.at(axes.x[1], line)]
    known = [("line", "quantized"), *([("accent", f"float {line:.2f}")] if line is not None else [])]
    return drawing(
        460,
        236,
        f"{title} over {len(epochs)} epochs, at last {values[-1]:.4g}",
        *_legend(known),
        axes.y_axis(ticks(*axes.y, 4), title),
        axes.x_axis([v for v in ticks(*axes.x) if v == int(v)], "epoch"),
        path(level, "accent"),
        path(points, "line"),
        *(circle(x, y, "mark") for x, y in points if len(points) <= 60),
    )


def codebook_picture(histogram: Sequence[float], span: Point, levels: Sequence[float], counts: Sequence[int]) -> str:
    """Where the weights lie, and how many take each level.

    Args:
        histogram: weights per bin, bins of one width over ``span``.
        span: the first bin's start and the last one's end.
        levels: ascending, within ``span``.
        counts: weights of each level.
    """
    axes = Axes(20, 26, 422, 158, span, (0, 1))
    peak, most = max([*histogram, 1]), max([*counts, 1])
    edges = [span[0] + (span[1] - span[0]) * i / len(histogram) for i in range(len(histogram) + 1)]
    steps = [(x, n / peak) for (a, b), n in zip(pairwise(edges), histogram, strict=True) for x in (a, b)]
    outline = axes.points(*zip((span[0], 0.0), *steps, (span[1], 0.0), strict=True))
    used = [(axes.at(c, 0), axes.at(c, n / most)) for c, n in zip(levels, counts, strict=True) if n]
    feet = [(axes.at(c, 0)[0], "used" if n else "idle") for c, n in zip(levels, counts, strict=True)]
    idle = [("idle", "levels no weight takes")] if len(used) < len(levels) else []
    return drawing(
        460,
        230,
        f"Weights and their {len(levels)} levels, {len(used)} of them in use",
        *_legend([("soft", "weights"), ("stem", "weights of a level"), *idle]),
        path(outline, "soft"),
        segments(used, "stem" if len(levels) <= 32 else "stem thin"),
        *(_feet(axes, [x for x, kind in feet if kind == wanted], wanted) for wanted in ("used", "idle")),
        axes.x_axis(ticks(*span), "weight / scale"),
    )


def _feet(axes: Axes, places: Sequence[float], kind: str) -> str:
    """Short strokes below the axis."""
    bottom = axes.top + axes.height
    return segments((((x, bottom), (x, bottom + 6)) for x in places), kind)


def staircase_picture(thresholds: Sequence[float], levels: Sequence[float], uniform: Sequence[float]) -> str:
    """What comes out for each input, and where it steps.

    Args:
        thresholds: inputs at which the output rises, ascending.
        levels: outputs, one more than thresholds.
        uniform: the thresholds of equal distance over the same range; empty: do not draw them.
    """
    edges = [*thresholds, *uniform]
    margin = 0.12 * (max(edges) - min(edges)) or max(1.0, abs(edges[0])) * 0.5
    span = (min(0.0, min(edges) - margin), max(0.0, max(edges) + margin))
    axes = Axes(56, 26, 386, 158, span, (min(levels), max(levels)))
    marks = [axes.at(x, levels[0])[0] for x in thresholds if len(thresholds) <= MARKED_THRESHOLDS]
    legend = [("line", "output"), *([("used", "thresholds")] if marks else [])]
    legend += [("faint", "uniform")] if uniform else []
    return drawing(
        460,
        230,
        f"The activation quantizer's {len(levels)} levels and {len(thresholds)} thresholds",
        *_legend(legend),
        axes.y_axis(ticks(*axes.y, 4), "output"),
        axes.x_axis(ticks(*span), "input"),
        path(_stairs(axes, uniform, levels), "faint") if uniform else "",
        path(_stairs(axes, thresholds, levels), "line"),
        _feet(axes, marks, "used"),
    )


def _stairs(axes: Axes, thresholds: Sequence[float], levels: Sequence[float]) -> list[Point]:
    xs = [axes.x[0], *(x for x in thresholds for _ in range(2)), axes.x[1]]
    ys = [y for y in levels for _ in range(2)]
    return axes.points(xs, ys)

"""Small charts as SVG text, without a library: coordinates, axes and marks; the page's CSS gives the colours."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]


def number(value: float) -> str:
    """A coordinate: a tenth of a pixel is enough."""
    return f"{value:.1f}".removesuffix(".0")


def drawing(width: float, height: float, title: str, *parts: str) -> str:
    """The whole picture; ``title`` is what it says to those who cannot see it."""
    return (
        f'<svg viewBox="0 0 {number(width)} {number(height)}" width="{number(width)}" height="{number(height)}" '
        f'role="img"><title>{escape(title)}</title>{"".join(parts)}</svg>'
    )


def path(points: Iterable[Point], kind: str) -> str:
    """A line through points in pixels; ``kind`` is its CSS class."""
    corners = "L".join(f"{number(x)} {number(y)}" for x, y in points)
    return f'<path class="{kind}" d="M{corners}"/>' if corners else ""


def segments(lines: Iterable[tuple[Point, Point]], kind: str) -> str:
    """Many separate straight lines as one path."""
    strokes = "".join(f"M{number(a)} {number(b)}L{number(c)} {number(d)}" for (a, b), (c, d) in lines)
    return f'<path class="{kind}" d="{strokes}"/>' if strokes else ""


def rectangle(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    """A bar; ``title`` shows when it is pointed at."""
    shape = f'<rect class="{kind}" x="{number(x)}" y="{number(y)}" width="{number(width)}" height="{number(height)}"'
    return f"{shape}><title>{escape(title)}</title></rect>" if title else f"{shape}/>"


def circle(x: float, y: float, kind: str, radius: float = 3) -> str:
    """A dot."""
    return f'<circle class="{kind}" cx="{number(x)}" cy="{number(y)}" r="{number(radius)}"/>'


def label(x: float, y: float, text: str, anchor: str = "middle", turned: bool = False, kind: str = "") -> str:
    """Text beside a point; ``turned`` makes it run upwards to it."""
    place = f'x="{number(x)}" y="{number(y)}"'
    turn = f' transform="rotate(-90 {number(x)} {number(y)})"' if turned else ""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} {place} text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about ``count`` round numbers from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Axes:
    """A rectangle of the picture, in pixels, and the values that its edges stand for."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> Point:
        """Where a value lies, in pixels; values outside lie on the edge."""
        across, up = _share(x, self.x), _share(y, self.y)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def points(self, xs: Sequence[float], ys: Sequence[float]) -> list[Point]:
        """:meth:`at` of many."""
        return [self.at(x, y) for x, y in zip(xs, ys, strict=True)]

    def x_axis(self, values: Sequence[float], title: str = "") -> str:
        """The lower edge with numbers at ``values``."""
        bottom = self.top + self.height
        places = [(value, self.at(value, self.y[0])[0]) for value in values]
        parts = [segments([((self.left, bottom), (self.left + self.width, bottom))], "axis")]
        parts += [label(at, bottom + 17, f"{value:.4g}") for value, at in places]
        if title:
            parts.append(label(self.left + self.width / 2, bottom + 33, title))
        return "".join(parts)

    def y_axis(self, values: Sequence[float], title: str = "") -> str:
        """Faint lines across at ``values``, with numbers on the left."""
        heights = [(value, self.at(self.x[0], value)[1]) for value in values]
        parts = [segments((((self.left, at), (self.left + self.width, at)) for _, at in heights), "grid")]
        parts += [label(self.left - 6, at + 4, f"{value:.4g}", "end") for value, at in heights]
        if title:
            parts.append(label(13, self.top + self.height / 2, title, turned=True))
        return "".join(parts)


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = span
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5

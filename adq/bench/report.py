"""The results as a table, as JSON and as CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import asdict, fields
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from adq.bench.case import Setting
from adq.bench.results import Figure, Results, Row
from adq.store import write_text

HEADER = f"{'case and contender':<44} {'ms':>10} {'GB/s':>8} {'of copy':>8} {'a second':>12}  figure (target)"
FILES = ("bench.json", "bench.csv", "table.txt", "roofline.png", "peers.png", "layers.png", "step.png")
FIGURE_FIELDS = ("figure", "value", "bound", "at_least", "met", "missed_by")


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:>{width},.{digits}f}"


def _milliseconds(ms: float | None) -> str:
    return _number(ms, 10, 4 if ms is not None and ms < 1 else 2)


def verdict(figure: Figure) -> str:
    """A figure in words: value, name, target, and whether it is met or by how much it is missed."""
    value = f"{figure.value:.3g}" if figure.value < 1000 else f"{figure.value:,.0f}"
    text = f"{value} {figure.figure}"
    if figure.bound is None:
        return text
    text += f" ({'>=' if figure.at_least else '<='} {figure.bound:g})"
    return f"{text} met" if figure.met else f"{text} MISSED by {100 * figure.missed_by:.1f} %"


def case_lines(name: str, rows: Iterable[Row], figures: Iterable[Figure]) -> list[str]:
    """A case as lines of the table."""
    lines = [name]
    figures = list(figures)
    for row in rows:
        if row.reason is not None:
            lines.append(f"  {row.contender:<42} not run: {row.reason}")
            continue
        verdicts = [verdict(figure) for figure in figures if figure.contender == row.contender]
        if not verdicts and row.times_adq is not None:
            verdicts = [f"{row.times_adq:.3g} times adq"]
        rate = f"{row.rate:,.0f} {row.item}" if row.rate is not None else ""
        cells = f"{_milliseconds(row.ms)} {_number(row.gbps, 8, 2)} {_number(row.share, 8, 3)} {rate:>12}"
        lines.append(f"  {row.contender:<42} {cells}  {verdicts[0] if verdicts else ''}".rstrip())
        lines += [f"{'':<87}  {text}" for text in verdicts[1:]]
    return lines


def summary_line(results: Results) -> str:
    """How many targets are met."""
    judged = [figure for figure in results.figures if figure.bound is not None]
    absent = sorted({row.contender for row in results.rows if row.reason is not None})
    text = f"targets met: {sum(figure.met for figure in judged)} of {len(judged)}"
    return text + (f"; not run everywhere: {'; '.join(absent)}" if absent else "")


def table(results: Results, setting: Setting) -> str:
    """Everything as plain text."""
    lines = [f"{key}: {value}" for key, value in results.environment.items() if value is not None]
    if setting.tiny:
        lines.append("tiny sizes: these figures show that everything runs, and nothing else")
    if results.checked:
        lines.append(f"check: {results.checked}")
    lines += ["", HEADER]
    for name, rows in groupby(results.rows, key=lambda row: row.case):
        lines += case_lines(name, rows, [figure for figure in results.figures if figure.case == name])
    missed = [figure for figure in results.figures if not figure.met]
    lines += ["", summary_line(results)]
    lines += [f"missed: {figure.case}, {figure.contender}: {verdict(figure)}" for figure in missed]
    return "\n".join(lines) + "\n"


def as_json(results: Results, setting: Setting) -> str:
    """Environment, setting, rows and figures."""
    content = {
        "environment": results.environment,
        "setting": {**asdict(setting), "device": str(setting.device)},
        "checked": results.checked,
        "rows": [asdict(row) for row in results.rows],
        "figures": [{**asdict(figure), "missed_by": figure.missed_by} for figure in results.figures],
    }
    return json.dumps(content, indent=1) + "\n"


def as_csv(results: Results) -> str:
    """One line a row and figure; a row without figures has one line."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [entry.name for entry in fields(Row)]
    writer.writerow([*names, *FIGURE_FIELDS])
    for row in results.rows:
        figures = [f for f in results.figures if (f.case, f.contender) == (row.case, row.contender)]
        cells = [[getattr(figure, name) for name in FIGURE_FIELDS] for figure in figures]
        for columns in cells or [[""] * len(FIGURE_FIELDS)]:
            writer.writerow([getattr(row, name) for name in names] + columns)
    return stream.getvalue()


def write_json(results: Results, setting: Setting, output: Path) -> None:
    """Write bench.json, which holds everything."""
    write_text(output / "bench.json", as_json(results, setting))


def write(results: Results, setting: Setting, output: Path) -> None:
    """Write bench.json, bench.csv, table.txt and, where matplotlib is installed, the pictures."""
    write_json(results, setting, output)
    write_text(output / "bench.csv", as_csv(results))
    write_text(output / "table.txt", table(results, setting))
    if find_spec("matplotlib"):
        from adq.bench.figures import draw

        draw(results, output)

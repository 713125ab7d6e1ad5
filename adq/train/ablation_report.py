"""The table and the figures of an ablation, from its run folders alone."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import statistics
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from adq.config import from_dict, load_yaml, to_dict
from adq.store import write_text
from adq.train.ablation_config import Ablation, Row
from adq.train.config import RunConfig, differences, flatten, merge, spell_out
from adq.train.figures import BLUE, GREY, ORANGE, label
from adq.train.figures import _pyplot as load_pyplot
from adq.train.figures import _write as write_png
from adq.train.metrics import MetricsLog
from adq.train.run import RunFolder

ERROR = "error.txt"
ACCUMULATION = "engine.accumulation"
NUMBERS = (
    "float_top1",
    "calibrated_top1",
    "quantized_top1",
    "average_bits_quantized",
    "average_bits_network",
    "bytes_packed",
    "seconds",
)
"""What is taken over from a result; seconds are those of the process that finished it."""


def run_folder(output: Path, row: Row, seed: int) -> RunFolder:
    """Where the run of a row with a seed is."""
    return RunFolder(output / "runs" / f"{row.slug}-seed{seed}")


def found_seeds(output: Path, ablation: Ablation) -> list[int]:
    """Seeds that any row of the ablation has a folder for, ascending."""
    slugs = {row.slug for row in ablation.rows}
    names = [re.fullmatch(r"(.*)-seed(\d+)", path.name) for path in (output / "runs").glob("*")]
    return sorted({int(name[2]) for name in names if name and name[1] in slugs})


def read_saved(folder: RunFolder) -> RunConfig:
    """The configuration that a run folder was made with."""
    return from_dict(RunConfig, load_yaml(folder.config))


# ---- numbers -----------------------------------------------------------------------------------------


def collect(output: Path, ablation: Ablation) -> dict[str, Any]:
    """What ``ablation.json`` holds: each row's results by seed, their means, and the difference to the reference.

    Raises:
        ValueError: a finished run was made with other settings than its row has; row and folder are named.
    """
    seeds = found_seeds(output, ablation)
    rows = [_row(ablation, row, output, seeds) for row in ablation.rows]
    reference = next((row for row in rows if row["name"] == ablation.reference), None)
    for row in rows:
        row.update(_difference(row, reference))
    return {"reference": ablation.reference, "rows": rows}


def _row(ablation: Ablation, row: Row, output: Path, seeds: Sequence[int]) -> dict[str, Any]:
    results, failed = {}, {}
    for seed in seeds:
        folder = run_folder(output, row, seed)
        if folder.result.exists():
            _check_row(row, folder)
            results[seed] = _numbers(folder) | _settings(ablation, row, seed, folder)
        elif (folder.path / ERROR).exists():
            failed[seed] = (folder.path / ERROR).read_text(encoding="utf-8").partition("\n")[0]
    means = {key: _mean(result[key] for result in results.values()) for key in (*NUMBERS, "gap")}
    return {
        "name": row.name,
        "group": row.group,
        "curve": row.curve,
        "changes": flatten(row.set),
        "seeds": results,
        "failed": failed,
        **means,
        "quantized_top1_std": _std([result["quantized_top1"] for result in results.values()]),
    }


def _check_row(row: Row, folder: RunFolder) -> None:
    if not folder.config.exists():
        return
    saved = read_saved(folder)
    wanted = from_dict(RunConfig, merge(load_yaml(folder.config), row.set))
    if changed := changed_settings(row, saved, wanted):
        raise ValueError(f"adq: row {row.name!r}: {folder.path} was run with another {', '.join(changed)}")


def changed_settings(row: Row, saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Fields in which a run of the row was made with other settings than are wanted.

    Those of the engine may change from machine to machine, but not where the row itself sets them, nor may the images
    that one step of the optimizer takes.
    """
    a, b = flatten(to_dict(saved)), flatten(to_dict(wanted))
    of_engine = [key for key in {**flatten(row.set), ACCUMULATION: None} if key.startswith("engine.")]
    return [*differences(saved, wanted), *(key for key in of_engine if a[key] != b[key])]


def _settings(ablation: Ablation, row: Row, seed: int, folder: RunFolder) -> dict[str, Any]:
    """A run's precision, and what else it was told than the file says, on the command line or by an older file.

    The float weights are left out: a file need not name them. Nor need it be right without the command line.
    """
    if not folder.config.exists():
        return {}
    saved = read_saved(folder)
    of_file = spell_out(ablation.base, [ablation.set, row.set, {"seed": seed}])
    flat, weights = flatten(to_dict(saved)), flatten(of_file).get("model.weights")
    changed = [key for key in differences(saved, of_file) if key != "model.weights" or weights]
    return {"precision": precision_of(folder, saved), "besides": {key: flat[key] for key in changed if key in flat}}


def precision_of(folder: RunFolder, saved: RunConfig) -> str:
    """That of its epochs: a run may have gone on in another one, and its configuration is that of the end."""
    rows = MetricsLog(folder.metrics).rows()
    found = dict.fromkeys(row["mixed_precision"] for row in rows if "mixed_precision" in row)
    return " and ".join(found) or saved.engine.mixed_precision


def _numbers(folder: RunFolder) -> dict[str, float]:
    result = json.loads(folder.result.read_text(encoding="utf-8"))
    return {**{key: result[key] for key in NUMBERS}, "gap": result["quantized_top1"] - result["float_top1"]}


def _difference(row: Mapping[str, Any], reference: Mapping[str, Any] | None) -> dict[str, Any]:
    """Mean of the differences of top-1 at equal seeds, their standard error, and how many there are."""
    if reference is None or row is reference:
        return {"difference": None, "difference_se": None, "difference_seeds": 0}
    common = [seed for seed in row["seeds"] if seed in reference["seeds"]]
    pairs = [row["seeds"][seed]["quantized_top1"] - reference["seeds"][seed]["quantized_top1"] for seed in common]
    spread = _std(pairs)
    error = None if spread is None else spread / math.sqrt(len(pairs))
    return {"difference": _mean(pairs), "difference_se": error, "difference_seeds": len(pairs)}


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _std(values: Sequence[float]) -> float | None:
    """Of a sample (n - 1); None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None


# ---- files -------------------------------------------------------------------------------------------


def write_report(output: Path, ablation: Ablation) -> None:
    """Write ``ablation.json``, ``ablation.csv``, ``table.md`` and the figures anew from the run folders."""
    report = collect(output, ablation)
    write_text(output / "ablation.json", json.dumps(report, indent=2) + "\n")
    write_text(output / "ablation.csv", _csv(report["rows"]))
    write_text(output / "table.md", table(report))
    done = [row for row in report["rows"] if row["seeds"]]
    try:
        if done:
            draw_rows(output / "ablation.png", done, ablation.reference)
        if sum(row["curve"] is not None for row in done) >= 3:
            draw_curves(output / "pareto.png", [row for row in done if row["curve"] is not None])
    except Exception as error:  # a picture that cannot be drawn shall not end the runs
        warnings.warn(f"adq: the figures of {output} could not be drawn: {error}", stacklevel=2)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    columns = [key for key in rows[0] if key not in ("seeds", "failed", "changes", "difference_seeds")]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*columns, "seeds", "failed", "changes"])
    for row in rows:
        changes = "; ".join(f"{key}={value}" for key, value in row["changes"].items())
        writer.writerow([*(row[key] for key in columns), len(row["seeds"]), len(row["failed"]), changes])
    return text.getvalue()


def table(report: Mapping[str, Any]) -> str:
    """The Markdown table, a section a group."""
    reference = report["reference"]
    lines = ["Top-1 in percent: mean ± standard deviation (number of seeds)."]
    if reference is not None:
        lines[0] += f" Differences are to {reference!r} at equal seeds, ± their standard error."
    for group in dict.fromkeys(row["group"] for row in report["rows"]):
        lines += ["", f"### {group}", ""] if group else [""]
        lines += [
            "| row | top-1 | gap to float | difference | after calibration | bits, quantized / network | packed kB |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row, reference) for row in report["rows"] if row["group"] == group]
    lines += _notes(report["rows"])
    return "\n".join(lines) + "\n"


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the runs of a table do not have in common, or not with the ablation file."""
    runs = [(seed, result) for row in rows for seed, result in row["seeds"].items()]
    precisions = Counter((result["precision"], seed) for seed, result in runs if "precision" in result)
    besides = Counter(
        f"{key}={json.dumps(value)}" for _, result in runs for key, value in result.get("besides", {}).items()
    )
    notes = [f"- `{setting}` in {n} of {len(runs)} runs" for setting, n in besides.items()]
    notes = ["", "Besides what the file says:", "", *notes] if notes else []
    if len({precision for precision, _ in precisions}) > 1:
        kinds = ", ".join(f"`{kind}` in seed {seed} of {n} rows" for (kind, seed), n in sorted(precisions.items()))
        notes += ["", f"Mixed precision differs: {kinds}."]
    return notes


def _line(row: Mapping[str, Any], reference: str | None) -> str:
    failed = "; ".join(f"seed {seed} failed: {shorten(reason, 160)}" for seed, reason in row["failed"].items())
    if not row["seeds"]:
        cells = [row["name"], failed or "not finished", *[""] * 5]
    else:
        top1 = f"{row['quantized_top1']:.2f}{_spread(row['quantized_top1_std'])} ({len(row['seeds'])})"
        difference = "reference" if row["name"] == reference else ""
        if row["difference"] is not None:
            difference = f"{row['difference']:+.2f}{_spread(row['difference_se'])}"
        cells = [
            row["name"],
            f"{top1}; {failed}" if failed else top1,
            f"{row['gap']:+.2f}",
            difference,
            f"{row['calibrated_top1']:.2f}",
            f"{row['average_bits_quantized']:.3f} / {row['average_bits_network']:.3f}",
            f"{row['bytes_packed'] / 1000:.1f}",
        ]
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _spread(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


# ---- figures -----------------------------------------------------------------------------------------


def draw_rows(path: Path, rows: Sequence[Mapping[str, Any]], reference: str | None) -> None:
    """Mean and standard deviation of every row, its seeds as small dots, the reference as a vertical line.

    A row of other seeds than the reference stands where its mean would be by the difference at equal seeds.

    Args:
        path: PNG to write.
        rows: of :func:`collect`, each with a result.
        reference: name of the reference row, None for none.
    """
    lines = _lines(rows)
    figure, axis = load_pyplot().subplots(figsize=(9, 1.2 + 0.27 * len(lines)), layout="constrained")
    low = _left_limit([row["quantized_top1"] for row in rows])
    line = next((row for row in rows if row["name"] == reference), None)
    if line is not None:
        axis.axvline(line["quantized_top1"], color=ORANGE, linestyle="--", linewidth=1, zorder=1)
    paired = {row["name"]: line["quantized_top1"] + row["difference"] for row in rows if line and _is_paired(row, line)}
    for y, (_, row) in enumerate(lines):
        if row is not None:
            _draw_row(axis, y, row, paired.get(row["name"]), ORANGE if row is line else BLUE, low)
    axis.set_yticks(range(len(lines)), [label(text) for text, _ in lines])
    for tick, (_, row) in zip(axis.get_yticklabels(), lines, strict=True):
        tick.set_fontweight("bold" if row is None else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(len(lines) - 0.4, -0.6)
    if low is not None:
        seeds = [result["quantized_top1"] for row in rows for result in row["seeds"].values()]
        high = max(*seeds, *paired.values())
        axis.set_xlim(low, high + 0.1 * (high - low))
    axis.grid(axis="x", alpha=0.3)
    note = "hollow, with a sign: of other seeds than the reference, at its mean plus the difference at equal seeds"
    axis.set_xlabel("top-1 %: mean and standard deviation; small dots are seeds" + (f"\n{note}" if paired else ""))
    write_png(figure, path)


def _lines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any] | None]]:
    """Labels from top to bottom with their rows; a group's heading has none."""
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for group in dict.fromkeys(row["group"] for row in rows):
        lines += [(group, None)] if group else []
        lines += [(row["name"], row) for row in rows if row["group"] == group]
    return lines


def _is_paired(row: Mapping[str, Any], reference: Mapping[str, Any]) -> bool:
    """Whether means of the two are of other seeds, some of them in common."""
    return row["difference"] is not None and set(row["seeds"]) != set(reference["seeds"])


def _draw_row(axis: Any, y: int, row: Mapping[str, Any], paired: float | None, color: str, low: float | None) -> None:
    """A row, hollow at ``paired`` where this is given."""
    seeds = [result["quantized_top1"] for result in row["seeds"].values()]
    std, face = row["quantized_top1_std"], color if paired is None else "white"
    mean = row["quantized_top1"] if paired is None else paired
    text = f"{mean:.2f}{_spread(std)}" if paired is None else f"{row['difference']:+.2f}"
    axis.errorbar(mean, y, xerr=std, fmt="o", color=color, markerfacecolor=face, markersize=7, capsize=4, zorder=2)
    axis.plot(seeds, [y + 0.25] * len(seeds), "o", color=GREY, markersize=2.5, zorder=3)
    across = axis.get_yaxis_transform()
    if low is not None and mean < low:
        axis.plot(0.01, y, "<", color=color, markersize=8, transform=across)
    axis.text(1.01, y, text, transform=across, va="center", fontsize=9)


def _left_limit(means: Sequence[float]) -> float | None:
    """Where the axis begins if rows far below would squeeze the others; these become an arrow at the edge."""
    if len(means) < 4:
        return None
    first, _, third = statistics.quantiles(means, n=4, method="inclusive")
    low = first - 3 * max(third - first, 0.5)
    return low if min(means) < low else None


def draw_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Top-1 over average weight bits and over packed size, a line a curve.

    Args:
        path: PNG to write.
        rows: of :func:`collect`, each with a result and a curve.
    """
    figure, axes = load_pyplot().subplots(1, 2, figsize=(11, 4.5), sharey=True, layout="constrained")
    panels = (
        ("average_bits_quantized", 1, "weight bits, average over quantized layers"),
        ("bytes_packed", 1e-3, "packed size, kB"),
    )
    in_float = {
        curve: {row["float_top1"] for row in rows if row["curve"] == curve} for curve in {r["curve"] for r in rows}
    }
    shared = len(set().union(*in_float.values())) == 1
    for axis, (key, unit, quantity) in zip(axes, panels, strict=True):
        for curve in dict.fromkeys(row["curve"] for row in rows):
            points = sorted((row for row in rows if row["curve"] == curve), key=lambda row: row[key])
            errors = [math.nan if row["quantized_top1_std"] is None else row["quantized_top1_std"] for row in points]
            lines = axis.errorbar(
                [unit * row[key] for row in points],
                [row["quantized_top1"] for row in points],
                yerr=None if all(map(math.isnan, errors)) else errors,
                fmt="o-",
                capsize=4,
                label=label(curve),
            )
            if not shared and len(in_float[curve]) == 1:
                axis.axhline(*in_float[curve], color=lines[0].get_color(), linestyle="--")
        if shared:
            axis.axhline(rows[0]["float_top1"], color=GREY, linestyle="--", label="float")
        axis.set_xlabel(quantity)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("top-1 %, mean and standard deviation")
    axes[0].legend(loc="lower right")
    write_png(figure, path)

"""A quantized model as one HTML file that needs nothing else: no scripts, no network, no fonts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adq.artifact import installed_version, load, model_file
from adq.convert import activation_quantizers, quantized_layers, weight_quantizers
from adq.functional import codebook_statistics
from adq.nn.activation import ActivationQuantizer
from adq.nn.layers import QuantizedLayer
from adq.nn.weight import WeightQuantizer
from adq.ops import ACTIVATION_RANGE, MIN_INTERVAL
from adq.pictures import bits_picture, codebook_picture, curve_picture, staircase_picture
from adq.sensitivity import float_parameters
from adq.store import write_text
from adq.style import STYLE
from adq.summary import LayerSummary, Summary, summary

BINS = 96
OPEN_PANELS = 3
RESULT, METRICS, REPORT = "result.json", "metrics.jsonl", "report.html"


@dataclass(frozen=True)
class Panel:
    """A layer as the report shows it."""

    row: LayerSummary
    layer: QuantizedLayer
    number: int
    shared: bool


def report(
    model: nn.Module,
    path: str | Path,
    *,
    result: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write what a quantized model consists of, with pictures, as one HTML file.

    Args:
        model: from :func:`adq.quantize_` or :func:`adq.load`.
        path: file to write.
        result: names and accuracies, where known: ``model``, ``data``, and in percent ``float_top1``, ``teacher_top1``,
            ``calibrated_top1`` and ``quantized_top1``; what ``adq train`` writes to ``result.json``.
        metrics: rows with ``phase="qat"``, ``epoch``, ``test_top1`` and ``train_loss``: ``metrics.jsonl``.

    Returns:
        The path.

    Raises:
        ValueError: the model is not quantized.
    """
    found, result = summary(model), result or {}
    own = weight_quantizers(model)
    panels = [
        Panel(row, layer, i, isinstance(layer.weight_quantizer, WeightQuantizer) and row.name not in own)
        for i, (row, layer) in enumerate(zip(found.layers, quantized_layers(model).values(), strict=True), 1)
    ]
    name = _model_name(model, result)
    title = f"{name} on {result['data']}" if result.get("data") else name
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="quiet">A quantized network, by adq {escape(installed_version())}</p>',
        _cards(found, result),
        _settings(model),
        _pictures(found, panels, result, metrics),
        _table(found, panels),
        _in_float(found, float_parameters(model)),
        "<h2>Layer by layer</h2>",
        *(_panel(panel) for panel in panels),
    ]
    write_text(path, _page(title, "\n".join(body)))
    return Path(path)


def report_saved(source: str | Path, output: str | Path | None = None) -> Path:
    """:func:`report` of a run folder of ``adq train``, or of a model file.

    Args:
        source: the folder or the file.
        output: file to write; default: ``report.html`` in the folder, or the model file's name with ``.html``.

    Raises:
        FileNotFoundError, ValueError: as :func:`adq.load`; a damaged file of the run; an output that is a folder,
            or the model itself.
    """
    source = Path(source)
    file = model_file(source)
    output = Path(output or (source / REPORT if source.is_dir() else source.with_suffix(".html")))
    if output.is_dir():
        raise ValueError(f"adq: {output} is a folder; name the file to write")
    if output.resolve() == file.resolve():
        raise ValueError(f"adq: the report would replace the model {file}; name another file")
    model = load(file)
    result = _json_lines(source / RESULT, whole=True) if source.is_dir() else []
    metrics = _json_lines(source / METRICS) if source.is_dir() else []
    return report(model, output, result=result[0] if result else None, metrics=metrics)


def _json_lines(path: Path, whole: bool = False) -> list[dict[str, Any]]:
    """The objects of a file, one a line or (``whole``) a single one; none where there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    found = []
    for i, line in enumerate([text] if whole else text.splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"adq: {path}{'' if whole else f', line {i}'} is not JSON: {error}") from error
        if not isinstance(found[-1], dict):
            raise ValueError(f"adq: {path}{'' if whole else f', line {i}'} holds no JSON object")
    return found


def _page(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _model_name(model: nn.Module, result: Mapping[str, Any]) -> str:
    architecture = getattr(model, "adq_architecture", None) or {}
    return str(result.get("model") or architecture.get("name") or type(model).__name__)


def _figure(values: Mapping[str, Any], key: str) -> float | None:
    """A finite number of a result or of metrics, or None."""
    value = values.get(key)
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _name(layer: str) -> str:
    """A layer's name as code; the model itself may be the layer."""
    return f"<code>{escape(layer) or '(the model)'}</code>"


# ---- the head ----------------------------------------------------------------------------------------


def _cards(found: Summary, result: Mapping[str, Any]) -> str:
    named = {"float": "float", "teacher": "teacher", "after calibration": "calibrated", "quantized": "quantized"}
    known = [(name, value) for name, key in named.items() if (value := _figure(result, f"{key}_top1")) is not None]
    accuracy = [(f"top-1, {name}", f"{value:.2f} %", "") for name, value in known]
    ratio = found.bytes_float / max(1, found.bytes_packed)
    cards = [
        *accuracy,
        ("average weight bits", f"{found.average_bits_quantized:.3f}", "over the quantized layers"),
        ("average bits", f"{found.average_bits_network:.3f}", "over the whole network"),
        ("bytes packed", f"{found.bytes_packed:,}", f"{found.bytes_float:,} in float: a ratio of {ratio:.2f}"),
    ]
    filled = "\n".join(
        f"<div><dt>{name}</dt><dd>{value}{f'<small>{note}</small>' if note else ''}</dd></div>"
        for name, value, note in cards
    )
    unknown = "" if accuracy else '<p class="quiet">The accuracy is not known: no result of a run was given.</p>'
    return f'<dl class="cards">\n{filled}\n</dl>{unknown}'


def _settings(model: nn.Module) -> str:
    """The configuration, read off the layers."""
    weights = [quantizer.config for _, quantizer in weight_quantizers(model).values()]
    activations = [quantizer.config for quantizer in activation_quantizers(model).values()]
    parts: tuple[tuple[str, Sequence[Any], Sequence[str]], ...] = (
        ("Weights", weights, ("bits", "levels", "scale", "update", "snap")),
        ("Activations", activations, ("bits", "thresholds")),
    )
    rows = []
    for name, configs, keys in parts:
        settings = [f"{key} {_counted(getattr(config, key) or 'none' for config in configs)}" for key in keys]
        rows.append(f'<tr><th scope="row">{name}</th><td>{"; ".join(settings) if configs else "in float"}</td></tr>')
    return f'<table class="settings">\n{"".join(rows)}\n</table>'


def _counted(values: Iterable[Any]) -> str:
    """``3``, or where layers differ ``2 (12 layers), 3 (5 layers)``."""
    counts = Counter(values)
    if len(counts) == 1:
        return escape(str(next(iter(counts))))
    ordered = sorted(counts.items(), key=lambda item: str(item[0]))
    return escape(", ".join(f"{value} ({_number(n, 'layer')})" for value, n in ordered))


def _number(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


# ---- pictures ----------------------------------------------------------------------------------------


def _pictures(
    found: Summary, panels: Sequence[Panel], result: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> str:
    weights = [0 if panel.shared else panel.row.weights for panel in panels]
    picture = bits_picture(
        [row.name for row in found.layers],
        [row.weight_bits for row in found.layers],
        [row.activation_bits for row in found.layers],
        [n / max(1, sum(weights)) for n in weights],
        found.average_bits_quantized,
    )
    parts = [
        f"<h2>Bits</h2>\n<figure>{_scroll(picture)}<figcaption>Above: bits of each layer. "
        "Below: its share of the weights.</figcaption></figure>"
    ]
    curves = [
        _curve(metrics, "test_top1", "test top-1, %", _figure(result, "float_top1")),
        _curve(metrics, "train_loss", "training loss", None),
    ]
    if any(curves):
        parts.append(f'<h2>Training</h2>\n<div class="pair">{"".join(curves)}</div>')
    return "\n".join(parts)


def _curve(metrics: Sequence[Mapping[str, Any]], key: str, title: str, line: float | None) -> str:
    found = [(_figure(row, "epoch"), _figure(row, key)) for row in metrics if row.get("phase") == "qat"]
    points = [(epoch, value) for epoch, value in found if epoch is not None and value is not None]
    if not points:
        return ""
    return f"<figure>{curve_picture(title, [y for _, y in points], [x for x, _ in points], line)}</figure>"


def _scroll(content: str) -> str:
    return f'<div class="scroll">{content}</div>'


# ---- the table ---------------------------------------------------------------------------------------

COLUMNS = (
    "layer",
    "type",
    "shape",
    "weights",
    "bits",
    "levels in use",
    "SQNR dB",
    "bytes",
    "activation bits",
    "signed",
)


def _table(found: Summary, panels: Sequence[Panel]) -> str:
    heads = "".join(f'<th scope="col"{_aligned(i)}>{name}</th>' for i, name in enumerate(COLUMNS))
    rows = "\n".join(_table_row(panel) for panel in panels)
    own = [panel.row for panel in panels if panel.row.weight_bits and not panel.shared]
    weights, size = sum(row.weights for row in own), sum(row.bytes for row in own)
    totals = (
        ("quantized weights", f"{weights:,}", f"{found.average_bits_quantized:.3f}", f"{size:,}"),
        ("whole network", "", f"{found.average_bits_network:.3f}", f"{found.bytes_packed:,}"),
    )
    foot = "\n".join(
        _row_of([f'<th scope="row">{name}</th>', "", "", n, bits, "", "", total, "", ""])
        for name, n, bits, total in totals
    )
    notes = [
        '<p class="quiet">Levels in use: how many levels of the codebook at least one weight takes; '
        '<span class="warning">⚠</span> marks fewer than half. SQNR: signal-to-quantization-noise ratio of the '
        "weights. Bytes: of the packed file.</p>"
    ]
    if any(row.sqnr_db == math.inf for row in found.layers):
        notes.append('<p class="quiet">∞: the weights lie on their levels, as those read from a packed file do.</p>')
    table = f'<table class="layers">\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n<tfoot>\n{foot}\n'
    return f"<h2>Layers</h2>\n{_scroll(f'{table}</tfoot>{chr(10)}</table>')}\n{''.join(notes)}"


def _aligned(column: int) -> str:
    return ' class="number"' if column >= 3 else ""


def _row_of(cells: Sequence[str]) -> str:
    """A table row; the first cell comes ready, the others as content."""
    rest = "".join(f"<td{_aligned(i)}>{cell}</td>" for i, cell in enumerate(cells[1:], 1))
    return f"<tr>{cells[0]}{rest}</tr>"


def _table_row(panel: Panel) -> str:
    row, quantizer = panel.row, panel.layer.input_quantizer
    signed = _signed(quantizer) if isinstance(quantizer, ActivationQuantizer) else "-"
    cells = [
        f'<th scope="row"><a href="#layer-{panel.number}">{_name(row.name)}</a></th>',
        escape(row.kind),
        _shape(panel.layer),
        f"{row.weights:,}",
        str(row.weight_bits or "float"),
        _levels(row),
        _decibels(row.sqnr_db),
        "shared" if panel.shared else f"{row.bytes:,}",
        str(row.activation_bits or "float"),
        signed,
    ]
    return _row_of(cells)


def _shape(layer: QuantizedLayer) -> str:
    return "x".join(map(str, layer.weight.shape))


def _levels(row: LayerSummary) -> str:
    if row.levels is None or row.levels_used is None:
        return "-"
    few = 2 * row.levels_used < row.levels
    mark = '<span class="warning" title="fewer than half of the levels are in use">⚠</span> ' if few else ""
    return f"{mark}{row.levels_used}/{row.levels}"


def _decibels(value: float | None) -> str:
    if value is None or value == -math.inf:
        return "-"
    return "∞" if value == math.inf else f"{value:.2f}"


def _signed(quantizer: ActivationQuantizer) -> str:
    if not quantizer.is_calibrated:
        return "not calibrated"
    return "yes" if float(quantizer.offset) > 0 else "no"


def _in_float(found: Summary, parameters: int) -> str:
    items = "".join(
        f"<li>{escape(reason)}: {', '.join(map(_name, names))}</li>" for reason, names in found.float_by_reason.items()
    )
    listed = f"<ul>{items}</ul>" if items else "<p>Every convolution and linear layer is quantized.</p>"
    return (
        f"<h2>Left in float</h2>\n{listed}\n"
        f'<p class="quiet">{parameters:,} parameters are in float, biases and normalization included.</p>'
    )


# ---- one layer ---------------------------------------------------------------------------------------


def _panel(panel: Panel) -> str:
    row, inputs = panel.row, panel.layer.input_quantizer
    facts = [escape(row.kind), _shape(panel.layer)]
    if row.weight_bits:
        facts += [_number(row.weight_bits, "bit"), f"{_levels(row)} levels", f"{_decibels(row.sqnr_db)} dB"]
    opened = " open" if panel.number <= OPEN_PANELS else ""
    return (
        f"<details{opened}><summary>"
        f"{_name(row.name)} "
        f'<span class="quiet">{" · ".join(facts)}</span></summary>\n'
        f'<div class="pair" id="layer-{panel.number}">{_weights(panel)}{_activations(inputs)}</div></details>'
    )


@torch.no_grad()
def _weights(panel: Panel) -> str:
    quantizer, weight = panel.layer.weight_quantizer, panel.layer.weight
    if not isinstance(quantizer, WeightQuantizer):
        return "<p>Weights in float.</p>"
    values, codebook = weight / quantizer.scale, quantizer.levels
    counts = codebook_statistics(values, codebook)[0].tolist()
    values, levels = values.float().flatten().cpu(), codebook.tolist()
    values = values[values.isfinite()]
    low, high = (float(torch.cat([values, codebook.cpu()]).aminmax()[i]) for i in (0, 1))
    if low == high:
        low, high = low - 1, high + 1
    picture = codebook_picture(torch.histc(values, BINS, low, high).tolist(), (low, high), levels, counts)
    fullest = max(counts) / max(1, sum(counts))
    caption = (
        f"Levels from {levels[0]:.4g} to {levels[-1]:.4g}; the fullest holds {100 * fullest:.1f} % of the weights."
    )
    shared = " The weight is shared with a layer above." if panel.shared else ""
    return f"<figure>{picture}<figcaption>{caption}{shared}</figcaption></figure>"


def _activations(quantizer: nn.Module) -> str:
    if not isinstance(quantizer, ActivationQuantizer):
        return "<p>Inputs in float.</p>"
    if not quantizer.is_calibrated:
        return "<p>The activation quantizer is not calibrated: its thresholds are not known yet.</p>"
    thresholds, levels, uniform = staircase(quantizer)
    if not all(map(math.isfinite, (*thresholds, *levels))):
        return "<p>The activation quantizer holds numbers that are not finite.</p>"
    kind = "equally spaced" if quantizer.config.is_uniform else "learned"
    reach = f"from {thresholds[0]:.4g} to {thresholds[-1]:.4g}" if len(thresholds) > 1 else f"at {thresholds[0]:.4g}"
    caption = (
        f"{_number(len(thresholds), f'{kind} threshold')} {reach}; outputs from {min(levels):.4g} to {max(levels):.4g}."
    )
    shown = [] if quantizer.config.is_uniform else uniform
    return f"<figure>{staircase_picture(thresholds, levels, shown)}<figcaption>{caption}</figcaption></figure>"


@torch.no_grad()
def staircase(quantizer: ActivationQuantizer) -> tuple[list[float], list[float], list[float]]:
    """An activation quantizer in units of its inputs and outputs.

    Returns:
        ``(thresholds, levels, uniform)``: the inputs at which the output steps, ascending; the outputs between
        them; thresholds of equal distance over the same range.
    """
    steps = quantizer.config.steps
    width = quantizer.interval.detach().double().cpu().clamp_min(MIN_INTERVAL).expand(steps)
    start, in_scale, out_scale, offset = (
        float(value) for value in (quantizer.start, quantizer.in_scale, quantizer.out_scale, quantizer.offset)
    )
    ends = start + torch.cat([width.new_zeros(1), width.cumsum(0)])
    edges = ((ends[:-1] + ends[1:]) / 2 / in_scale).tolist()
    middles = torch.linspace(0.5, steps - 0.5, steps, dtype=torch.float64) / steps
    uniform = ((ends[0] + (ends[-1] - ends[0]) * middles) / in_scale).tolist()
    levels = [out_scale * (ACTIVATION_RANGE / steps * q - offset) for q in range(steps + 1)]
    if in_scale < 0:
        edges, levels, uniform = edges[::-1], levels[::-1], uniform[::-1]
    return edges, levels, uniform

"""The HTML report: well formed, complete, the summary's numbers, and nothing of a name taken for markup."""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig
from adq.pictures import bits_picture, curve_picture
from adq.report import report_saved, staircase
from adq.svg import drawing, label, rectangle, ticks

VOID = {"meta", "br"}
HOSTILE = '<script>alert(\'"&")</script>'
RESULT = {"model": "net", "data": "noise", "float_top1": 91.5, "calibrated_top1": 0.0, "quantized_top1": 90.75}
METRICS = [
    {"phase": "qat", "epoch": 1, "test_top1": 80.5, "train_loss": 0.5},
    {"phase": "qat", "epoch": 2, "test_top1": 90.75, "train_loss": math.nan},
]


class Page(HTMLParser):
    """What a browser would see: open elements, ids, links, table rows and plain text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.rows, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for key, value in attrs if key in ("href", "src")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


class Net(nn.Module):
    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.body = nn.ModuleDict({HOSTILE: nn.Conv2d(4, 6, 3), "up": nn.ConvTranspose2d(6, 6, 3)})
        self.extra = nn.Conv2d(6, 6, 1)
        self.plain = nn.Linear(6, 6)
        self.head = nn.Linear(6, num_classes)

    def forward(self, x):
        for layer in (self.stem, *self.body.values(), self.extra):
            x = layer(x).relu()
        return self.head(self.plain(x.mean((2, 3))))


OVERRIDES = {"body.up": {"activation": None}, "extra": {"weight": None}, "plain": None}


def quantized(calibrated: bool = True, bits: int = 3, **weight) -> nn.Module:
    torch.manual_seed(0)
    config = ADQConfig(WeightConfig(bits=bits, **weight), ActivationConfig(bits=bits), overrides=OVERRIDES)
    model = adq.quantize_(adq.create_model("report_net", 3), config)
    return adq.calibrate_(model, [torch.randn(4, 1, 9, 9)]) if calibrated else model


@pytest.fixture(scope="module", autouse=True)
def _registered():
    adq.register_architecture("report_net", Net)


@pytest.fixture(scope="module")
def model():
    return quantized()


def page(model, folder, **options) -> tuple[Page, str]:
    text = adq.report(model, folder / "report.html", **options).read_text(encoding="utf-8")
    return Page(text), text


def pictures(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", text, re.S)]


def test_the_page_is_well_formed_and_needs_nothing_else(model, tmp_path):
    seen, text = page(model, tmp_path, result=RESULT, metrics=METRICS)
    assert "script" not in seen.tags
    assert "url(" not in text and "http" not in text and "@import" not in text
    assert len(seen.ids) == len(set(seen.ids))
    assert seen.links and all(link.startswith("#") and link[1:] in seen.ids for link in seen.links)
    assert re.search(r"<html lang=.en.>", text) and "<title>net on noise</title>" in text
    drawn = pictures(text)
    weights, inputs = 4, 4  # of the five layers: one has weights in float, another its inputs
    assert len(drawn) == seen.tags.count("svg") == 1 + 2 + weights + inputs
    assert all(svg.get("role") == "img" and svg.find("title").text for svg in drawn)
    assert not any("nan" in text or "inf" in text for text in re.findall(' (?:d|x|y|cx|cy)="([^"]*)"', text))


def test_every_layer_has_the_numbers_of_the_summary(model, tmp_path):
    seen, _ = page(model, tmp_path)
    found = adq.summary(model)
    rows = {row[0]: row for row in seen.rows}
    for layer in found.layers:
        name, kind, shape, weights, bits, levels, quality, size, inputs, _ = rows[layer.name]
        assert (kind, weights, size) == (layer.kind, f"{layer.weights:,}", f"{layer.bytes:,}")
        assert shape == "x".join(map(str, model.get_submodule(name).weight.shape))
        assert (bits, inputs) == (str(layer.weight_bits or "float"), str(layer.activation_bits or "float"))
        expected = ("-", "-")
        if layer.levels is not None:
            few = "⚠ " if 2 * layer.levels_used < layer.levels else ""
            expected = (f"{few}{layer.levels_used}/{layer.levels}", f"{layer.sqnr_db:.2f}")
        assert (levels, quality) == expected
        assert seen.text.count(layer.name) >= 3  # table, picture, panel
    assert rows["stem"][5].startswith("⚠ ") and rows["stem"][9] == "yes"
    assert rows[f"body.{HOSTILE}"][9] == "no" and rows["body.up"][9] == "-"
    size = sum(layer.bytes for layer in found.layers if layer.weight_bits)
    weights = 4 * 9 + 4 * 6 * 9 + 6 * 6 * 9 + 6 * 3
    assert rows["quantized weights"][3:5] == [str(weights), f"{found.average_bits_quantized:.3f}"]
    assert rows["quantized weights"][7] == f"{size:,}"
    assert rows["whole network"][4] == f"{found.average_bits_network:.3f}"
    assert rows["whole network"][7] == f"{found.bytes_packed:,}"
    assert "override 'plain': plain" in seen.text
    assert f"{found.bytes_float:,} in float: a ratio of {found.bytes_float / found.bytes_packed:.2f}" in seen.text


def test_the_head_tells_accuracy_and_configuration(model, tmp_path):
    seen, _ = page(model, tmp_path, result=RESULT, metrics=METRICS)
    for words in ("top-1, float91.50 %", "top-1, after calibration0.00 %", "top-1, quantized90.75 %"):
        assert words in "".join(seen.words)
    assert [
        "Weights",
        "bits 3 (2 layers), 8 (2 layers); levels full; scale channel; update ema; snap none",
    ] in seen.rows
    assert ["Activations", "bits 3 (2 layers), 8 (2 layers); thresholds learned"] in seen.rows
    assert "float 91.50" in seen.text and "epoch" in seen.text
    bare, _ = page(model, tmp_path)
    assert "The accuracy is not known" in bare.text and "epoch" not in bare.text


def test_hostile_names_stay_text(model, tmp_path):
    evil = {"model": HOSTILE, "data": "</title><b>"}
    seen, text = page(model, tmp_path, result=evil)
    assert "<script" not in text and "</title><b>" not in text
    assert seen.tags.count("b") == 0
    assert f"{HOSTILE} on </title><b>" in seen.text
    assert any(HOSTILE in unescape(title.text) for svg in pictures(text) for title in svg.iter("title"))


def test_every_text_of_a_picture_is_escaped():
    picture = drawing(9, 9, HOSTILE, label(1, 1, HOSTILE), rectangle(1, 1, 1, 1, "bar", HOSTILE))
    assert [node.text for node in ElementTree.fromstring(picture).iter() if node.text] == [HOSTILE] * 3


@pytest.mark.parametrize(("levels", "shown"), [(3, "3/4"), (2, "2/4"), (1, "⚠ 1/4")])
def test_fewer_than_half_of_the_levels_in_use_are_marked(levels, shown, tmp_path):
    model = adq.quantize_(nn.Sequential(nn.Linear(8, 8)), ADQConfig(WeightConfig(bits=2), None, first_last_bits=2))
    beyond = [10.0, 20.0, 30.0, 40.0]  # where no weight lies
    model[0].weight_quantizer.codebook.copy_(torch.tensor([-0.3, 0.0, 0.3][:levels] + beyond[: 4 - levels]))
    seen, text = page(model, tmp_path)
    assert {row[0]: row for row in seen.rows}["0"][5] == shown
    assert "levels no weight takes" in text


def test_thresholds_not_calibrated_are_said_to_be_unknown(tmp_path):
    seen, text = page(quantized(calibrated=False), tmp_path)
    assert seen.text.count("is not calibrated") == 4
    assert {row[9] for row in seen.rows if row[0] in ("stem", "head", "extra")} == {"not calibrated"}
    assert len(pictures(text)) == 1 + 4


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_staircase_is_what_the_quantizer_does(bits):
    quantizer = adq.quantize_(
        nn.Sequential(nn.Linear(4, 4)), ADQConfig(activation=ActivationConfig(bits=bits), first_last_bits=bits)
    )[0].input_quantizer
    quantizer.calibrate_(torch.randn(500))
    with torch.no_grad():
        quantizer.start += 0.1
        quantizer.interval *= torch.linspace(0.5, 1.5, quantizer.interval.numel())
        quantizer.in_scale *= 1.3
    thresholds, levels, uniform = staircase(quantizer)
    assert len(thresholds) == len(uniform) == len(levels) - 1 == 2**bits - 1
    assert thresholds == sorted(thresholds)
    edges = [thresholds[0] - 1, *thresholds, thresholds[-1] + 1]
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(edges)])
    assert torch.allclose(quantizer(middles), torch.tensor(levels), atol=1e-5)
    steps = torch.tensor(uniform).diff()
    assert torch.allclose(steps, steps.mean().expand_as(steps), rtol=1e-3)
    if quantizer.config.is_uniform:
        assert torch.allclose(torch.tensor(thresholds), torch.tensor(uniform))


KINDS = [{"update": "step"}, {"update": "gradient"}, {"levels": "symmetric"}, {"snap": "int8"}]


@pytest.mark.parametrize("weight", [*({"bits": bits} for bits in range(1, 9)), *KINDS], ids=str)
def test_every_width_and_update(weight, tmp_path):
    seen, text = page(quantized(**weight), tmp_path)
    bits = weight.get("bits", 3)
    rows = {row[0]: row for row in seen.rows}
    assert rows["body.up"][4] == str(bits)
    levels = rows["body.up"][5].split("/")[1]
    assert f"their {levels} levels" in text
    assert len(pictures(text)) == 9


def test_shared_weights_are_counted_once(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    adq.quantize_(model, ADQConfig(activation=None, first_last_bits=4))
    seen, _ = page(model, tmp_path)
    rows = {row[0]: row for row in seen.rows}
    assert rows["1"][7] == "shared" and rows["quantized weights"][3] == "24"
    assert "The weight is shared with a layer above." in seen.text


def test_a_layer_may_be_the_model(tmp_path):
    seen, _ = page(adq.quantize_(nn.Linear(4, 4), ADQConfig(activation=None)), tmp_path)
    assert "(the model)" in [row[0] for row in seen.rows]


def test_numbers_that_are_not_finite_are_said(tmp_path):
    model = quantized()
    with torch.no_grad():
        model.head.input_quantizer.in_scale.zero_()
    assert "holds numbers that are not finite" in page(model, tmp_path)[0].text


def test_a_hundred_layers(tmp_path):
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(*(nn.Linear(8, 8) for _ in range(100))), ADQConfig(activation=None))
    seen, text = page(model, tmp_path)
    assert len(seen.ids) == 100 and len(text) < 1_000_000


def test_long_curves_and_many_bars_stay_small():
    picture = curve_picture("top-1", [float(i % 7) for i in range(5000)], list(range(5000)), 3.0)
    assert len(picture) < 10_000
    picture = bits_picture(["x" * 80, "y"], [None, 2], [3, None], [0.5, 0.5], 2.0)
    assert [text.text for text in ElementTree.fromstring(picture).iter("text")][-2:] == ["…" + "x" * 29, "y"]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 2.2), (1e-9, 3e-9), (-5e6, 7), (88.2, 91.7)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in found)
    assert ticks(2.0, 2.0) == [2.0]


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    adq.save(model, folder / "model.safetensors")
    adq.save(model, folder / "model-packed.safetensors", packed=True)
    (folder / "result.json").write_text(json.dumps(RESULT))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in METRICS))
    return folder


def test_a_run_folder(run, model, tmp_path):
    assert report_saved(run) == run / "report.html"
    adq.report(model, tmp_path / "same.html", result=RESULT, metrics=METRICS)
    assert (run / "report.html").read_bytes() == (tmp_path / "same.html").read_bytes()
    assert not list(run.glob(".*"))


def test_a_packed_file(run, model):
    text = report_saved(run / "model-packed.safetensors").read_text(encoding="utf-8")
    assert (run / "model-packed.html").exists()
    seen = Page(text)
    rows = {row[0]: row for row in seen.rows}
    assert "report_net" in seen.text and "as those read from a packed file do" in seen.text
    for layer in adq.summary(model).layers:
        assert rows[layer.name][5].endswith("-" if layer.levels is None else f"{layer.levels_used}/{layer.levels}")


def test_a_folder_without_a_result(run, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    assert "The accuracy is not known" in Page(report_saved(tmp_path).read_text(encoding="utf-8")).text


def command(*arguments):
    pytest.importorskip("typer", reason="the command line needs the extra 'train'")
    from typer.testing import CliRunner

    from adq.train.cli import app

    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_the_command(run, tmp_path):
    done = command(run, tmp_path / "deep" / "page.html")
    assert done.exit_code == 0, done.output
    assert done.output.strip().endswith("page.html")
    assert (tmp_path / "deep" / "page.html").read_text(encoding="utf-8").endswith("</html>\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: (run / "model.safetensors").unlink(), "error: no such file: .*model.safetensors"),
        (lambda run: (run / "result.json").write_text("{"), "error: .*result.json is not JSON: "),
        (lambda run: (run / "result.json").write_text("3"), "error: .*result.json holds no JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text('{}\n{"a'), "error: .*metrics.jsonl, line 2 is not JSON: "),
        (lambda run: (run / "report.html").mkdir(), "error: .*report.html is a folder; name the file to write"),
    ],
)
def test_errors_in_one_line(run, tmp_path, change, message):
    for name in ("model.safetensors", "result.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    change(tmp_path)
    done = command(tmp_path)
    assert done.exit_code == 1
    assert re.fullmatch(message + ".*\n", done.output)


def test_it_does_not_replace_the_model_and_passes_on_what_load_says(run, tmp_path):
    file = run / "model.safetensors"
    assert "would replace the model" in command(file, file).output
    torch.manual_seed(0)
    adq.save(adq.quantize_(Net(), ADQConfig(activation=None)), tmp_path / "own.safetensors")
    done = command(tmp_path / "own.safetensors")
    assert done.exit_code == 1 and "names no registered architecture" in done.output
    with pytest.raises(ValueError, match=r"not quantized; call adq\.quantize_"):
        adq.report(nn.Linear(2, 2), tmp_path / "none.html")

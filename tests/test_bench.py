"""The benchmark suite at tiny sizes: every case runs, peers compute what adq does, results are written and parse."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from adq.bench import (
    check,
    comparisons,
    distributed,
    figures,
    fit,
    integer,
    layers,
    linear,
    network,
    operators,
    peers,
    small,
    step,
)
from adq.bench.case import ADQ, COPY, Case, Setting, Target, Unavailable, faster_than, overhead, quick_setting, ratio
from adq.bench.data import activations, codes, convolution, weights
from adq.bench.environment import cpu_model, environment, slug
from adq.bench.report import as_csv, verdict
from adq.bench.results import Figure, Results, Row
from adq.bench.run import PARTS, CheckError, main, measure, run, run_checks
from adq.bench.timing import HostClock, race
from adq.functional import threshold_quantize
from adq.train.cli import app

CPU = torch.device("cpu")
TINY = replace(quick_setting(CPU), nbytes=4096, rounds=2, seconds=0.01, fit_weights=(400,))


def cases_of(*parts) -> list:
    return [pytest.param(case, id=case.name) for part in parts for case in part.cases(TINY)]


# ---- every case ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", cases_of(operators, comparisons, small, network, layers, integer, linear, step, distributed)
)
def test_every_case_gives_a_row_for_each_contender(case):
    rows, figures = measure(case, TINY)
    assert sorted(row.contender for row in rows) == sorted(case.contenders)
    for row in rows:
        assert (row.ms is None) != (row.reason is None)
        assert row.ms is None or row.ms > 0
    timed = {row.contender for row in rows if row.reason is None}
    expected = {t.figure for t in case.targets if set(t.needs) & set(case.contenders) <= timed}
    assert {figure.figure for figure in figures} == expected


def test_every_fit_gives_a_codebook_as_good_as_the_best(monkeypatch):
    for module in ("coremltools", *(name for name in sys.modules if name.startswith("coremltools."))):
        monkeypatch.setitem(sys.modules, module, None)
    (case,) = fit.cases(TINY)
    rows, figures = measure(case, TINY)
    quality = {figure.contender: figure.value for figure in figures if figure.figure == "SQNR, dB"}
    assert {ADQ, fit.SKLEARN} <= set(quality)
    assert quality[ADQ] > quality[fit.SKLEARN] - 2.0
    absent = {row.contender for row in rows if row.reason is not None}
    assert {fit.COREML, fit.COREML_EXACT} <= absent


def test_larger_fits_leave_the_slow_peers_out_by_name():
    small_fit, large_fit = fit.cases(replace(TINY, fit_weights=(10, 400)))
    assert list(small_fit.contenders) == list(large_fit.contenders)
    with pytest.raises(Unavailable, match="left out"):
        large_fit.contenders[fit.TORCHAO](large_fit.data())


def test_operators_run_on_what_they_claim_to_move():
    data = weights(TINY, 1024, torch.float32, 8)
    w_q, _ = operators.run_lookup(data)
    code = torch.bucketize(data.w.first, data.thresholds)
    assert torch.equal(w_q, data.codebook[code])
    assert torch.equal(peers.bucketize(data)(), w_q)
    _, _, count, total = operators.run_fused(data)
    assert torch.equal(count, torch.bincount(code.flatten(), minlength=8))
    assert total.sum().item() == pytest.approx(data.w.first.sum().item(), abs=1e-3)
    packed = codes(TINY, 1000, 3)
    assert torch.equal(operators.run_unpack(packed), packed.codes.first)
    assert torch.equal(operators.run_pack(packed), packed.packed.first)


# ---- peers ---------------------------------------------------------------------------------------------


def exact_activations(bits: int):
    """Inputs on a grid of 1/64 and thresholds between its points: float32 and float64 decide alike."""
    data = activations(TINY, 2048, torch.float32, bits)
    x = (data.x.first * 64).round() / 64
    steps = 2**bits - 1
    interval = (torch.linspace(0.8, 1.2, steps) * 128 / steps).round() / 64 + 1 / 128
    one = torch.ones(1)
    return x, data.grad.first, (one / 256, interval, one, 1.5 * one)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_published_quantizer_equals_the_operator(bits):
    x, grad, parameters = exact_activations(bits)
    ours = [tensor.clone().requires_grad_() for tensor in (x, *parameters)]
    theirs = [tensor.double().requires_grad_() for tensor in (x, *parameters)]
    y, expected = threshold_quantize(*ours), peers.n2uq(*theirs)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
    for actual, wanted in zip(
        torch.autograd.grad(y, ours, grad), torch.autograd.grad(expected, theirs, grad.double()), strict=True
    ):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("bits", "published"), [(2, 24), (3, 44), (4, 84)])
def test_bytes_kept_for_the_backward(bits, published):
    data = activations(TINY, 2**16, torch.float32, bits)
    assert peers.kept_bytes(threshold_quantize)(data) == pytest.approx(4.0, abs=0.01)
    assert peers.kept_bytes(peers.n2uq)(data) == pytest.approx(published, abs=0.5)


@pytest.mark.parametrize("layer", [integer.LAYERS[1], integer.LAYERS[12]], ids=lambda layer: layer.name)
def test_convolutions_of_the_peers_equal_the_operator(layer):
    data = convolution(layer.shape(1, tiny=True), layer.arguments(), bits=3)
    levels = integer.run_convolution(data)
    assert levels.unique().tolist() == list(range(8))
    sums = peers.float_convolution(torch.channels_last)(data)()  # exact: small integers times a power of two
    assert torch.equal((sums - 0.5).ceil().clamp(0, 7).to(torch.uint8), levels)
    tie = (sums - 0.5).frac() == 0  # rounded to even there
    builds = {
        "x86": peers.quantized_convolution("x86"),
        "fbgemm": peers.quantized_convolution("fbgemm"),
        "onednn": peers.onednn_convolution,
    }
    for engine in builds.keys() & set(torch.backends.quantized.supported_engines):
        result = builds[engine](data)()
        quantized = result.int_repr() if result.is_quantized else result
        assert torch.equal(quantized.clamp(max=7)[~tie], levels[~tie])


@pytest.mark.parametrize(("layer", "reason"), [(0, None), (12, "one group")])
def test_cases_of_a_gpu_run(layer, reason):
    """On the CPU here; a depthwise layer has no matrix product beside it."""
    rows, _ = measure(integer._gpu_layer_case(TINY, integer.LAYERS[layer], 2), TINY)
    reasons = {row.contender: row.reason for row in rows}
    assert reasons.keys() == {ADQ, peers.BF16_LAST, peers.INT_MM}
    assert reasons[ADQ] is reasons[peers.BF16_LAST] is None
    assert reasons[peers.INT_MM] is None if reason is None else reason in reasons[peers.INT_MM]


def test_a_peer_that_cannot_run_is_reported_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    rows, _ = measure(comparisons.lookup_case(TINY, 256), TINY)
    (absent,) = [row for row in rows if row.reason is not None]
    assert absent.contender == peers.BNB_BLOCKWISE
    assert "bitsandbytes" in absent.reason
    assert absent.ms is None


def test_adq_itself_must_run(monkeypatch, tmp_path):
    def broken(_):
        raise RuntimeError("broken kernel")

    case = Case("network", "broken", lambda: None, {ADQ: broken, COPY: lambda _: lambda: None})
    monkeypatch.setitem(PARTS, "network", lambda setting: iter([case]))
    lines: list[str] = []
    with pytest.raises(RuntimeError, match="1 of adq's own did not run: broken, adq: RuntimeError: broken kernel"):
        main("cpu", "network", tmp_path, True, lines.append)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert {row["contender"]: row["failed"] for row in rows} == {ADQ: True, COPY: False}


# ---- timing and targets --------------------------------------------------------------------------------


def test_every_contender_runs_in_every_round_while_its_time_lasts():
    seen: list[str] = []
    calls = {name: lambda name=name: seen.append(name) for name in "abc"}
    samples, failed = race(calls, HostClock(), rounds=4, seconds=10.0, cold=False)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert not failed
    assert "".join(seen) == "aabbcc" + "bca" + "cab" + "abc"  # a warm-up and the first round, then rotating ones


def test_a_slow_contender_drops_out_and_a_cold_one_runs_once():
    seen: list[str] = []
    samples, _ = race({"a": lambda: seen.append("a")}, HostClock(), rounds=9, seconds=0.0, cold=True)
    assert len(seen) == len(samples["a"]) == 1


def test_a_contender_that_fails_in_the_race_is_named():
    def out_of_memory() -> None:
        raise MemoryError("too large")

    contenders = {ADQ: lambda _: lambda: None, "hungry": lambda _: out_of_memory}
    (_, absent), _ = measure(Case("fit", "x", lambda: None, contenders, cold=True), TINY)
    assert (absent.contender, absent.reason) == ("hungry", "MemoryError: too large")


def test_a_race_without_contenders_ends():
    assert race({}, HostClock(), rounds=5, seconds=1.0, cold=False) == ({}, {})


def test_ratios_pair_the_rounds():
    assert ratio([2.0, 40.0, 8.0, 9.0, 10.0], [1.0, 10.0, 2.0, 9.0, 1.0]) == 4.0
    assert ratio([6.0], [30.0, 2.0, 3.0]) == 2.0
    assert ratio([6.0, 8.0], [30.0, 2.0, 4.0, 4.0, 4.0, 5.0]) == 1.75
    samples = {ADQ: [2.0, 2.0], "peer": [8.0, 8.0], COPY: [1.0, 1.0]}
    assert faster_than("peer", 5.0).compute(samples) == 4.0
    assert not faster_than("peer", 5.0).met(4.0)
    assert overhead(ADQ, COPY, 2.0).met(overhead(ADQ, COPY, 2.0).compute(samples))


def test_verdicts_say_by_how_much_a_target_is_missed():
    met = Figure("operators", "lookup", ADQ, "share of copy", 0.95, 0.9, True, True)
    missed = replace(met, value=0.72, met=False)
    assert verdict(met) == "0.95 share of copy (>= 0.9) met"
    assert verdict(missed) == "0.72 share of copy (>= 0.9) MISSED by 20.0 %"
    assert verdict(replace(met, bound=None)) == "0.95 share of copy"
    slow = Figure("step", "step", ADQ, "times float", 1.5, 1.25, False, False)
    assert verdict(slow) == "1.5 times float (<= 1.25) MISSED by 20.0 %"


def test_small_calls_are_charged_for_themselves_alone():
    (target,) = next(small.cases(TINY)).targets
    assert target.compute({ADQ: [0.010], small.TWICE: [0.012]}) == pytest.approx(8.0)  # 10 us, of which 2 us work


# ---- correctness first ---------------------------------------------------------------------------------


@pytest.fixture
def few_checks(monkeypatch):
    for name, keep in (("SHAPES", ("63", "transposed")), ("DTYPES", ("fp32", "bf16"))):
        table = getattr(check, name)
        monkeypatch.setattr(check, name, {key: table[key] for key in keep})
    monkeypatch.setattr(check, "PLAIN", "63")


def test_the_operators_pass_the_check(few_checks):
    assert run_checks(TINY, lambda line: None) == "127 of 127 comparisons with the reference made, all agree"
    assert run_checks(TINY, lambda line: None, deadline=0.0).startswith("0 of 127")


@pytest.mark.parametrize(
    ("function", "wrong", "named"),
    [
        ("codebook_lookup", lambda result: (result[0] + 1, result[1]), r"codebook, K=16, fp32, 63: w_q"),
        ("codebook_statistics", lambda result: (result[0], result[1] + 1e-3), r"codebook, K=16.*total"),
        ("threshold_quantize", lambda result: -result, r"N2UQ, 3 bits.*: y"),
        ("threshold_quantize_backward", lambda result: (*result[:4], result[4] * 1.001), r"N2UQ, 3 bits.*d_out_scale"),
        ("foreach_codebook_quantize", lambda result: [-w for w in result], "every layer in one call: quantized weight"),
        ("pack_bits", lambda result: result + 1, "1 codes of 2 bits: packed"),
        ("codebook_decode", lambda result: result + 1, "1 codes of 2 bits: decoded weight"),
        ("codebook_linear", lambda result: result * 1.001, "products with codes of 2 bits, rows of 8: y"),
        ("integer_conv2d", lambda result: (result[0], [result[1][0] ^ 1]), "integer convolution, 3x3, 3 bits: levels"),
    ],
)
def test_a_failed_check_names_the_case(few_checks, monkeypatch, function, wrong, named):
    right = getattr(check.reference, function)
    monkeypatch.setattr(check.reference, function, lambda *args: wrong(right(*args)))
    with pytest.raises(CheckError, match=named):
        run_checks(TINY, lambda line: None)


def test_a_failed_check_stops_the_run(few_checks, monkeypatch, tmp_path):
    monkeypatch.setattr(check.reference, "pack_bits", lambda codes, bits: codes)
    with pytest.raises(CheckError):
        run(TINY, ["check", "operators"], tmp_path, lambda line: None)
    assert not list(tmp_path.iterdir())


# ---- reports -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a run of some parts, and the lines it showed."""
    folder, lines = tmp_path_factory.mktemp("bench"), []
    run(TINY, ["operators", "step"], folder, lines.append)
    return folder, lines


def test_results_are_written_and_parse(written):
    folder, _ = written
    content = json.loads((folder / "bench.json").read_text())
    assert content["environment"]["torch"] == torch.__version__
    assert content["environment"]["threads"] == torch.get_num_threads()
    assert {row["part"] for row in content["rows"]} == {"operators", "step"}
    lines = list(csv.DictReader((folder / "bench.csv").open()))
    assert {line["contender"] for line in lines} == {row["contender"] for row in content["rows"]}
    assert len(lines) >= len(content["rows"])


def test_the_table_holds_what_progress_showed(written):
    folder, lines = written
    table = (folder / "table.txt").read_text()
    assert lines
    assert all(line in table for line in lines)
    assert "tiny sizes" in table


def test_pictures_are_drawn(written):
    folder, _ = written
    for name in ("roofline.png", "step.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert not (folder / "layers.png").exists()


def test_an_absent_peer_is_in_every_report():
    rows = [Row("peers", "lookup", ADQ, 1.0), Row("peers", "lookup", "torchao", reason="not installed")]
    assert "not installed" in as_csv(Results({}, rows))


def test_environment_names_machine_versions_and_commit():
    found = environment(CPU)
    assert found["device"] == cpu_model()
    assert {"torch", "triton", "adq", "commit", "threads", "date", "cores"} <= set(found)
    assert slug(CPU).endswith(f"{torch.get_num_threads()}-threads")


def test_targets_are_not_judged_at_tiny_sizes():
    case = Case("x", "x", lambda: None, {ADQ: lambda _: lambda: None}, (Target(ADQ, "f", lambda s: 0.0, (ADQ,), 1.0),))
    _, (figure,) = measure(case, TINY)
    assert figure.bound is None
    _, (judged,) = measure(case, replace(TINY, tiny=False))
    assert not judged.met


# ---- command line --------------------------------------------------------------------------------------


def test_the_command_writes_a_folder(tmp_path):
    options = ["--quick", "--device", "cpu", "--only", "network", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["bench", *options])
    assert result.exit_code == 0, result.output
    assert "resnet20: quantize every weight" in result.output
    assert (tmp_path / "bench.json").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "operatrs"}, "no part operatrs; parts: check, operators"),
        ({"device": "tpu"}, "must be cpu or cuda"),
    ],
)
def test_wrong_options_are_named(options, message, tmp_path):
    arguments = {"device": "cpu", "only": None, "output": tmp_path, "quick": True, **options}
    with pytest.raises(ValueError, match=message):
        main(**arguments, echo=print)


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("adq.bench.run.run_checks", None)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        main("cpu", "check", tmp_path / "file", True, print)


def test_the_longest_bars_text_is_inside_the_frame():
    shown = [
        Row("peers", "a case of a long name, beside peers", f"peer {x}", ms=1.0, times_adq=x) for x in (1.3, 2210.4)
    ]
    canvas = figures.peers(Results({}, shown))
    FigureCanvasAgg(canvas).draw()
    (axis,) = canvas.axes
    assert [text.get_text() for text in axis.texts] == [" 1.3x", " 2,210x"]
    assert all(text.get_window_extent().x1 < axis.get_window_extent().x1 for text in axis.texts)


def test_full_settings_measure_at_least_64_mb():
    from adq.bench.case import full_setting

    setting: Setting = full_setting(CPU)
    assert setting.nbytes >= 64_000_000
    assert not setting.tiny

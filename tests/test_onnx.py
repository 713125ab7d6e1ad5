"""The ONNX file: its operators and integers, ONNX Runtime's outputs and decisions, and what is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every import ACTIVATIONS, FLOAT, SNAPPED, STEP, Side, every, sample
from saved import Net, trained
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig
from adq import onnx as export

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytest.importorskip("onnxscript", reason="needs the extra 'onnx'")
CliRunner = pytest.importorskip("typer.testing", reason="the command line needs the extra 'train'").CliRunner
if not hasattr(torch.onnx, "ops"):
    pytest.skip("torch has no torch.onnx.ops yet", allow_module_level=True)


def graph_of(path: Path) -> onnx.ModelProto:
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto, x: Tensor, outputs: list[str] | None = None) -> list[Tensor]:
    """What ONNX Runtime computes, at the given values of the graph."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    known = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs or [] if name not in known)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(outputs, {model.graph.input[0].name: x.numpy()})]


@pytest.mark.parametrize("weight", [FLOAT, SNAPPED], ids=["float", "snapped"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layer_computes_the_same(tmp_path, weight, activation):
    config, signed = ACTIVATIONS[activation]
    model = every(weight, config, signed)
    adq.export_onnx(model, tmp_path / "m.onnx", sample(signed))
    graph = graph_of(tmp_path / "m.onnx")
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 21)]
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    for count in (1, 7):  # the batch is free
        x = sample(signed, count, seed=count)
        with torch.no_grad():
            expected = model(x)
        found = run(graph, x)
        assert len(found) == len(expected) == 9
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "learned-5"])
def test_levels_are_the_references_own(tmp_path, activation):
    config, signed = {**ACTIVATIONS, "learned-5": (ActivationConfig(5), True)}[activation]
    torch.manual_seed(0)
    model = adq.quantize_(Side(nn.Linear(6, 5)), ADQConfig(activation=config, first_last_bits=config.bits))
    quantizer = adq.calibrate_(model, [sample(signed, 64)]).eval().layer.input_quantizer
    with torch.no_grad():
        quantizer.start.add_(0.0123)
        if not config.is_uniform:
            quantizer.interval.mul_(torch.rand(config.steps) + 0.5)
    edges = quantizer.start + quantizer.interval.new_tensor(range(config.steps)) * quantizer.interval.mean()
    near = (edges / quantizer.in_scale).detach()  # inputs at and beside thresholds, and far out
    x = torch.cat([near, near.nextafter(near + 1), near.nextafter(near - 1), sample(True, 200).flatten() * 3])
    x = x[: len(x) // 24 * 24].view(-1, 4, 6)
    adq.export_onnx(model, tmp_path / "m.onnx", x)
    graph = graph_of(tmp_path / "m.onnx")
    (node,) = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    (level,) = run(graph, x, [node.output[0]])
    step = quantizer.out_scale * (2 / config.steps)
    zero = (quantizer.offset * config.steps / 2).round()
    with torch.no_grad():
        expected = (quantizer(x) / step + zero).round()
    assert level.dtype == torch.uint8
    assert torch.equal(level.float(), expected)
    assert level.unique().numel() > config.steps // 2


@pytest.mark.parametrize("snapped", [False, True])
def test_weights_are_integers(tmp_path, snapped):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    weight = WeightConfig(3, snap="int8" if snapped else None)
    model = adq.calibrate_(adq.quantize_(net, ADQConfig(weight, first_last_bits=3)), [torch.randn(32, 64)]).eval()
    report = adq.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 64))
    graph = graph_of(tmp_path / "m.onnx")
    kind = onnx.TensorProto.INT8 if snapped else onnx.TensorProto.UINT4
    stored = [tensor for tensor in graph.graph.initializer if tensor.data_type == kind and len(tensor.dims) == 2]
    assert [list(tensor.dims) for tensor in stored] == [[256, 64], [64, 256]]
    tables = [tensor for tensor in graph.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(math.prod(tensor.dims) for tensor in tables) == 256  # biases and scales
    assert report.bytes == (tmp_path / "m.onnx").stat().st_size < report.bytes_float / (3 if snapped else 5)
    assert f"{report.bytes:,} bytes; float {report.bytes_float:,}, packed {report.bytes_packed:,}" in str(report)
    assert "parity: not checked" in str(report)
    makers = {output: node for node in graph.graph.node for output in node.output}
    for node in graph.graph.node:
        if node.op_type == "Gemm":
            data, matrix = makers[node.input[0]], makers[node.input[1]]
            assert data.op_type == "DequantizeLinear"
            assert makers[data.input[0]].op_type == "QuantizeLinear"
            assert matrix.op_type == ("DequantizeLinear" if snapped else "Mul")
            assert snapped or makers[matrix.input[0]].op_type == "Gather"


def test_a_grid_of_few_integers_takes_four_bits_and_shared_weights_are_stored_once(tmp_path):
    model = every(STEP, ActivationConfig(3), True)
    adq.export_onnx(model, tmp_path / "m.onnx", sample(True))
    graph = graph_of(tmp_path / "m.onnx")
    integers = [tensor for tensor in graph.graph.initializer if tensor.name.endswith(".integer")]
    assert {tensor.data_type for tensor in integers} == {onnx.TensorProto.INT4}
    assert len(integers) == 7


class Gain(nn.Module):
    """A buffer that has the name of those that hold weights as integers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("integer", torch.tensor([0.5, 1.5, 7.25]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.integer


def test_buffers_of_the_models_own_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(8, 6)
    model = adq.calibrate_(adq.quantize_(nn.Sequential(nn.Linear(6, 3), Gain())), [x]).eval()
    adq.export_onnx(model, tmp_path / "m.onnx", x, [(x, None)], images=8)
    stored = {tensor.name: tensor.data_type for tensor in graph_of(tmp_path / "m.onnx").graph.initializer}
    assert stored["1.integer"] == onnx.TensorProto.FLOAT


# ---- refusals ----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A layer with a part that the exporter knows, or does not know."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part, self.linear = part, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.part == "operator":
            return torch.special.i0(x)
        return -x if self.part == "branch" and x.sum() > 0 else x


def odd(part: str = "") -> nn.Module:
    torch.manual_seed(0)
    return adq.calibrate_(adq.quantize_(Odd(part)), [torch.randn(8, 6)]).eval()


def uncalibrated(model: nn.Module) -> None:
    model.linear.input_quantizer._ready = False


def disabled(model: nn.Module) -> None:
    model.linear.weight_quantizer.enabled = False


def between_levels(model: nn.Module) -> None:
    model.linear.input_quantizer.offset += 0.004


def not_finite(model: nn.Module) -> None:
    model.linear.weight_quantizer.codebook[0] = torch.nan


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (uncalibrated, "layer 'linear': its activations are not calibrated"),
        (disabled, "layer 'linear': its weight quantizer is disabled"),
        (between_levels, "layer 'linear': zero is no level of its activations"),
        (not_finite, "layer 'linear': its weight or codebook holds NaN or infinity"),
        (nn.Module.half, "layer 'linear': its weight is torch.float16, not float32"),
    ],
)
def test_a_layer_is_refused_by_name(tmp_path, spoil, message):
    model = odd()
    spoil(model)
    with pytest.raises(ValueError, match=message):
        adq.export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 6))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("part", "message"), [("operator", "bessel_i0"), ("branch", "data-dependent")])
def test_what_torch_cannot_export_is_refused(tmp_path, part, message):
    with pytest.raises(ValueError, match=f"adq: torch cannot export the model to ONNX: .*{message}"):
        adq.export_onnx(odd(part), tmp_path / "m.onnx", torch.randn(2, 6))
    assert list(tmp_path.iterdir()) == []


class Shifts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, shift: Tensor, factor: float) -> Tensor:
        return (self.linear(x) @ shift) * factor


def test_inputs_that_are_no_batches_and_what_torch_says_of_them(tmp_path):
    torch.manual_seed(0)
    model = adq.calibrate_(adq.quantize_(Shifts()), [{"x": torch.randn(8, 6), "shift": torch.eye(6), "factor": 1.0}])
    shift, path = torch.randn(6, 6), tmp_path / "m.onnx"
    adq.export_onnx(model, path, (torch.randn(4, 6), shift, 2.0), [(torch.randn(9, 6), shift, 2.0)], images=9)
    assert [x.name for x in graph_of(path).graph.input] == ["x", "shift"]
    with pytest.raises(ValueError, match=r"ONNX: .*: - .*inputs\[1\]"):
        adq.export_onnx(model, path, (torch.randn(6, 6), shift, 2.0))


def test_a_float_model_and_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="the model is not quantized"):
        adq.export_onnx(Odd(""), tmp_path / "m.onnx", torch.randn(2, 6))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r"needs onnxruntime: pip install 'adq\[onnx\]'"):
        adq.export_onnx(odd(), tmp_path / "m.onnx", torch.randn(2, 6))
    assert list(tmp_path.iterdir()) == []


# ---- the check ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model, its file, and images as a loader yields them."""
    model, path = trained(), tmp_path_factory.mktemp("onnx") / "m.onnx"
    batches = [(torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(i)), None) for i in range(3)]
    report = adq.export_onnx(model, path, batches[0][0][:1], batches, images=80)
    assert report.parity.images == 80
    assert report.parity.max_difference < 1e-5
    assert "parity: top-1 identical on 80 images in ONNX Runtime, largest difference of the logits" in str(report)
    return model, batches


def test_the_model_stays_as_it_was(exported):
    model, batches = exported
    assert isinstance(model.body.weight_quantizer, adq.nn.WeightQuantizer)
    assert torch.equal(model(batches[0][0]), trained()(batches[0][0]))


def test_a_packed_file_gives_the_same_file(tmp_path):
    model = trained()
    adq.save(model, tmp_path / "m.safetensors", packed=True)
    for name, source in (("whole", model), ("packed", adq.load(tmp_path / "m.safetensors", Net()))):
        adq.export_onnx(source, tmp_path / f"{name}.onnx", torch.zeros(1, 1, 6, 6))
    assert (tmp_path / "packed.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


def test_a_failing_check_leaves_the_old_file(tmp_path, monkeypatch):
    path, model, batches = tmp_path / "m.onnx", odd(), [torch.randn(32, 6)]
    path.write_bytes(b"old")
    monkeypatch.setattr(export, "_Activation", lambda quantizer: nn.Hardtanh(-0.1, 0.1))
    with pytest.raises(RuntimeError, match="top-1 differs"):
        adq.export_onnx(model, path, batches[0], batches, images=32)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"old"


# ---- the command line --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory):
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    folder = tmp_path_factory.mktemp("run")
    job = ["train", "--output", "run", "--float-epochs", "1", "--epochs", "1", "--set", "model.kwargs={width: 8}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-m", "adq", *job], cwd=folder, env=environment, check=True, timeout=300)
    return folder / "run"


def export_command(*arguments: str | Path) -> tuple[int, str]:
    from adq.train.cli import app

    result = CliRunner().invoke(app, ["export", "--to", "onnx", *map(str, arguments)])
    return result.exit_code, result.output


def test_a_run_folder_is_exported_and_checked(trained_run, tmp_path):
    code, text = export_command(trained_run, tmp_path / "m.onnx")
    assert code == 0, text
    assert f"m.onnx: {(tmp_path / 'm.onnx').stat().st_size:,} bytes; float" in text
    assert "parity: top-1 identical on 1,000 images in ONNX Runtime" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no images to check --to onnx on: give a run folder, --data or --config"),
        (["--no-check"], "--no-check needs the shape of one input"),
        (["--data", "digits", "--images", "5000"], "the check wants 5,000 images"),
    ],
)
def test_without_enough_to_check_nothing_is_written(trained_run, tmp_path, arguments, message):
    code, text = export_command(trained_run / "model.safetensors", tmp_path / "m.onnx", *arguments)
    assert code == 1
    assert message in text
    assert list(tmp_path.iterdir()) == []


def test_unchecked(trained_run, tmp_path):
    file = trained_run / "model-packed.safetensors"
    code, text = export_command(file, tmp_path / "m.onnx", "--no-check", "--shape", "1,8,8")
    assert code == 0, text
    assert "parity: not checked" in text
    graph_of(tmp_path / "m.onnx")

"""torch.export and AOTInductor: models as they are, and in standard operators; what files hold, and what is refused."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from every import ACTIVATIONS, FLOAT, SNAPPED, STEP, every, sample
from networks import Block, centred, images, quantized
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig, portable
from adq.nn import ActivationQuantizer, PackedWeight, WeightQuantizer

BATCH = ({0: torch.export.Dim("batch")},)


@pytest.fixture
def model() -> nn.Module:
    return centred(quantized())


def operators(program: torch.export.ExportedProgram) -> list:
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return [target for target in calls if isinstance(target, torch._ops.OpOverload)]


# ---- models as they are ------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_torch_exports_models_as_they_are(model, packed):
    model = adq.pack_(model) if packed else model
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (images(1, 2),), dynamic_shapes=BATCH), file)
    program = torch.export.load(file)
    for count in (1, 2, 7):
        x = images(count, count)
        assert torch.equal(program.module()(x), model(x))
    own = {str(operator) for operator in operators(program) if operator.namespace == "adq"}
    weights = "adq.codebook_decode.default" if packed else "adq.foreach_codebook_quantize.default"
    assert own == {"adq.threshold_quantize.default", weights}


# ---- in standard operators ---------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("config", [{"levels": "full"}, {"levels": "symmetric", "scale": "tensor"}])
def test_weights_from_tables(bits, config):
    if bits == 1 and config["levels"] == "symmetric":
        config = {"levels": "full", "scale": "tensor"}
    weight = torch.randn(7, 3, 3, 5, generator=torch.Generator().manual_seed(bits))
    packed = PackedWeight(WeightQuantizer(weight, WeightConfig(bits, **config)), weight)
    table = portable.TableWeight(packed)
    width = min(width for width in (1, 2, 4, 8) if width >= bits)
    assert table.codes.numel() == -(-weight.numel() * width // 8)
    assert torch.equal(table(), packed())


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("config", [ActivationConfig(b) for b in (1, 3, 5, 8)] + [ActivationConfig(4, "uniform")])
def test_activations_by_comparisons(config, signed):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1000, generator=generator) if signed else torch.rand(1000, generator=generator)
    quantizer = ActivationQuantizer(config)
    quantizer.calibrate_(values)
    with torch.no_grad():
        quantizer.interval *= 0.5 + torch.rand(quantizer.interval.shape, generator=generator)
        quantizer.start += 0.0123
        edges = (quantizer.start + quantizer.interval.mean() * torch.arange(config.steps)) / quantizer.in_scale
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e30, -1e30])
        x = torch.cat([values, edges, edges.nextafter(edges + 1), edges.nextafter(edges - 1), odd])
        found, expected = portable.PortableActivation(quantizer)(x), quantizer(x)
    assert found[: -len(odd)].unique().numel() > config.steps // 2
    assert torch.equal(found.nan_to_num(123.0), expected.nan_to_num(123.0))
    assert int(found.isnan().sum()) == 1


@pytest.mark.parametrize(
    ("weight", "activation"), [(FLOAT, "signed"), (SNAPPED, "unsigned"), (STEP, "uniform")], ids=str
)
def test_every_layer_computes_the_same(tmp_path, weight, activation):
    config, signed = ACTIVATIONS[activation]
    model = every(weight, config, signed)
    report = adq.export_program(model, tmp_path / "m.pt2", sample(signed))
    assert report.bytes == (tmp_path / "m.pt2").stat().st_size < 40_000
    assert "parity: not checked" in str(report)
    program = torch.export.load(tmp_path / "m.pt2")
    for count in (1, 7):
        x = sample(signed, count, seed=count)
        for one, other in zip(program.module()(x), model(x), strict=True):
            assert torch.equal(one, other)
    assert {operator.namespace for operator in operators(program)} == {"aten"}
    floats = [tensor for key, tensor in program.state_dict.items() if key.startswith("sides") and tensor.dim() > 1]
    assert all(tensor.numel() <= 256 for tensor in floats if tensor.is_floating_point())  # no weight, scales at most
    codes = {tensor.data_ptr() for key, tensor in program.state_dict.items() if key.endswith(".codes")}
    assert len(codes) == 7  # of eight layers, two of which share a weight


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_what_is_put_around_a_model_is_left_out(tmp_path, wrap):
    torch.manual_seed(0)
    config = ADQConfig(WeightConfig(snap="int8"))
    model = centred(adq.calibrate_(adq.quantize_(Block(), config), [images()]))
    x, wrapped = images(3, 5), wrap(model)
    adq.export_program(wrapped, tmp_path / "m.pt2", images(), [(images(1, 8), None)], images=8)
    assert torch.equal(torch.export.load(tmp_path / "m.pt2").module()(x), model(x))
    converted = adq.to_integer(wrapped, x, strict=False)
    assert converted.adq_integer.unfused is None
    torch.testing.assert_close(converted(x), model(x), rtol=1e-5, atol=1e-5)
    expected = model(x)
    assert adq.fold_batch_norm_(wrapped) is wrapped and model.adq_folded
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-5, atol=1e-5)


def test_it_decomposes_to_the_core_operators(model, tmp_path):
    adq.export_program(model, tmp_path / "m.pt2", images())
    found = operators(torch.export.load(tmp_path / "m.pt2").run_decompositions())
    assert len(found) > 20
    assert [str(operator) for operator in found if torch.Tag.core not in operator.tags] == []


def test_folded_batch_norms_stay_folded(tmp_path):
    torch.manual_seed(0)
    model = adq.fold_batch_norm_(centred(adq.calibrate_(adq.quantize_(Block(), ADQConfig()), [images()])))
    adq.export_program(model, tmp_path / "m.pt2", images())
    program = torch.export.load(tmp_path / "m.pt2")
    assert torch.equal(program.module()(images(3, 5)), model(images(3, 5)))
    assert "batch_norm" not in str(program.graph)


def test_a_program_runs_without_adq(model, tmp_path):
    batches = [(images(seed, 32), None) for seed in range(3)]
    report = adq.export_program(adq.pack_(model), tmp_path / "m.pt2", images(0, 1), batches, images=90)
    assert (report.parity.images, report.parity.max_difference) == (90, 0.0)
    assert "top-1 identical on 90 images in torch.export" in str(report)
    torch.save(images(5, 9), tmp_path / "x.pt")
    script = (
        "import sys, torch; x = torch.load('x.pt'); y = torch.export.load('m.pt2').module()(x); "
        "assert 'adq' not in sys.modules; torch.save(y.detach(), 'y.pt')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300)
    assert torch.equal(torch.load(tmp_path / "y.pt"), model(images(5, 9)))


# ---- refusals ----------------------------------------------------------------------------------------


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Counted(Branch):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).view(len(x), 6)


EXPORTS = [adq.export_program, adq.export_aoti]


@pytest.mark.parametrize("export", EXPORTS)
def test_refusals_come_before_any_file(model, tmp_path, export):
    model.body[0].weight_quantizer.enabled = False
    with pytest.raises(ValueError, match=r"layer 'body.0': its weight quantizer is disabled"):
        export(model, tmp_path / "m.pt2", images())
    with pytest.raises(ValueError, match=r"name must end in .pt2, got .*m.onnx"):
        export(quantized(), tmp_path / "m.onnx", images())
    with pytest.raises(ValueError, match="the model is not quantized"):
        export(nn.Linear(2, 2), tmp_path / "m.pt2", torch.zeros(2, 2))
    branch = adq.calibrate_(adq.quantize_(Branch()), [torch.rand(8, 6)])
    with pytest.raises(ValueError, match="torch cannot export the model: .*"):
        export(branch, tmp_path / "m.pt2", torch.rand(2, 6))
    counted = adq.calibrate_(adq.quantize_(Counted()), [torch.rand(8, 6)])
    with pytest.raises(ValueError, match=r"Constraints violated \(batch\)!.* specialized it to be a constant \(2\)"):
        export(counted, tmp_path / "m.pt2", torch.rand(2, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_check_leaves_the_old_file(model, tmp_path, monkeypatch):
    (tmp_path / "m.pt2").write_bytes(b"old")
    forward = portable.TableWeight.forward
    monkeypatch.setattr(portable.TableWeight, "forward", lambda self, weight: -forward(self))
    with pytest.raises(RuntimeError, match=r"in torch.export top-1 differs"):
        adq.export_program(model, tmp_path / "m.pt2", images(), [images(1, 64)], images=64)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]


def test_executorch_is_missing(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ImportError, match=r"ExecuTorch export: .*executorch.*: pip install 'adq\[executorch\]'"):
        adq.export_executorch(model, tmp_path / "m.pte", images())
    assert list(tmp_path.iterdir()) == []


class Attends(nn.Module):
    """Takes a bias or a mask that all images share, and a number."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x: Tensor, bias: Tensor | None = None, factor: float | Tensor = 1.0, flag: None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)).mean(1) * factor


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize(
    "shared",
    [(torch.randn(1, 5, 5),), (torch.randn(5, 5), 2.0), (torch.randn(5, 5), torch.tensor(2.0), None)],
    ids=["bias", "number", "scalar"],
)
def test_inputs_that_images_share_stay_as_they_are(tmp_path, shared, size):
    torch.manual_seed(0)
    model, path = adq.calibrate_(adq.quantize_(Attends()), [torch.randn(8, 5, 8)]).eval(), tmp_path / "m.pt2"
    batches = [(torch.randn(5, 5, 8), *shared, None) for _ in range(2)] if size > 1 else None  # 5: as long as a mask
    adq.export_program(model, path, (torch.randn(size, 5, 8), *shared), batches, 7)
    program = torch.export.load(path).module()
    for count in (2, 3):
        own = [s.expand(count, 5, 5) for s in shared] if size == len(shared) == 1 else shared  # all of length 1
        x = torch.randn(count, 5, 8)
        assert torch.equal(program(x, *own), model(x, *own))


def test_mappings_are_refused(model, tmp_path):
    for inputs in ({"x": images()}, ({"x": images()},)):
        with pytest.raises(ValueError, match="tuple of positional arguments; got a mapping"):
            adq.export_program(model, tmp_path / "m.pt2", inputs)


# ---- AOTInductor -------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="AOTInductor needs a C++ compiler, and there is none here"
)


def packed_file(path: Path) -> nn.Module:
    torch.manual_seed(0)
    model = centred(adq.calibrate_(adq.quantize_(Block(), ADQConfig()), [images()]))
    adq.save(model, path, packed=True)
    return model


@needs_compiler
def test_a_packed_file_is_compiled(tmp_path):
    model = packed_file(tmp_path / "m.safetensors")
    loaded = adq.load(tmp_path / "m.safetensors", Block())
    batches = [images(seed, 50) for seed in range(3)]
    report = adq.export_aoti(loaded, tmp_path / "m.pt2", images(), batches, images=120)
    assert report.parity.images == 120
    assert report.parity.max_difference < 1e-5
    assert "parity: top-1 identical on 120 images in AOTInductor, largest difference of the logits" in str(report)
    run = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    for count in (1, 6):
        torch.testing.assert_close(run(images(9, count)), model(images(9, count)), rtol=1e-5, atol=1e-5)


def test_without_a_compiler_nothing_is_written(model, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("\nno compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(RuntimeError, match="adq: AOTInductor cannot compile the model: no compiler"):
        adq.export_aoti(model, tmp_path / "m.pt2", images())
    assert list(tmp_path.iterdir()) == []


# ---- the command line --------------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    testing = pytest.importorskip("typer.testing", reason="the command line needs the extra 'train'")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    from adq.train.cli import app

    torch.manual_seed(0)
    model = adq.quantize_(adq.create_model("digits_cnn", width=8), ADQConfig())
    adq.save(adq.calibrate_(model, [torch.rand(64, 1, 8, 8)]), tmp_path / "m.safetensors", packed=True)
    arguments = ["export", str(tmp_path / "m.safetensors"), str(tmp_path / "m.pt2"), "--to"]
    result = testing.CliRunner().invoke(app, [*arguments, "torch", "--data", "digits"])
    assert result.exit_code == 0, result.output
    assert "parity: top-1 identical on 1,000 images in torch.export" in result.output
    assert "largest difference of the logits 0\n" in result.output
    result = testing.CliRunner().invoke(app, [*arguments, "tensorrt"])
    assert result.exit_code == 1
    assert "--to must be one of packed, plain, onnx, torch, aoti, executorch, coreml" in result.output

"""Core ML packages: what is in their bytes, what their operations compute, and what is refused.

Core ML does not run here. So the bytes of the weights are taken apart by hand, and the operations of the package are
computed in torch, one by one.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every import ACTIVATIONS, FLOAT, STEP, every, sample
from networks import Block, centred, images, quantized
from torch import Tensor, nn
from torch.nn import functional as F

import adq
from adq import ADQConfig, WeightConfig, coreml
from adq.convert import weight_quantizers

tools = pytest.importorskip("coremltools", reason="needs the extra 'coreml'")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:coremltools")


def operations(path: Path) -> list[Any]:
    """The operations of a package, as its own protocol buffer has them."""
    (function,) = tools.models.MLModel(str(path), skip_model_load=True).get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return list(block.operations)


# ---- the weights, byte by byte -----------------------------------------------------------------------


def constant(path: Path, operation: Any, name: str) -> bytes:
    """The bytes of an operation's constant input; those of few numbers lie in the operation itself."""
    value = operation.inputs[name].arguments[0].value
    if value.WhichOneof("value") == "immediateValue":
        return np.array(value.immediateValue.tensor.floats.values, np.float32).tobytes()
    data = (path / "Data" / "com.apple.CoreML" / "weights" / "weight.bin").read_bytes()
    sentinel, _, size, start = struct.unpack_from("<IIQQ", data, value.blobFileValue.offset)
    assert sentinel == 0xDEADBEEF
    return data[start : start + size]


WIDTHS = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8}


@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_the_bytes_of_every_width(tmp_path, scale):
    torch.manual_seed(0)
    widths = {str(i): {"weight": {"bits": bits}} for i, bits in enumerate(WIDTHS)}
    weight = WeightConfig(levels="symmetric", scale=scale)
    widths["0"] = {"weight": {"bits": 1, "levels": "full"}}
    net = nn.Sequential(*[nn.Linear(7 + i, 8 + i) for i in range(8)])
    model = adq.quantize_(net, ADQConfig(weight, None, overrides=widths))
    report = adq.export_coreml(model, tmp_path / "m.mlpackage", torch.zeros(1, 7))
    assert "these layers take 6 or 8: 4; 6" in str(report)
    assert report.bytes == sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    found = [op for op in operations(tmp_path / "m.mlpackage") if op.type == "constexpr_lut_to_dense"]
    assert len(found) == 8
    for op, (layer, quantizer) in zip(found, weight_quantizers(model).values(), strict=True):
        indices, table = (constant(tmp_path / "m.mlpackage", op, name) for name in ("indices", "lut"))
        shape, width = layer.weight.shape, WIDTHS[quantizer.bits]
        assert len(indices) == -(-layer.weight.numel() * width // 8)
        stream = np.unpackbits(np.frombuffer(indices, np.uint8), count=layer.weight.numel() * width, bitorder="little")
        codes = (stream.reshape(-1, width) @ (1 << np.arange(width))).reshape(shape)
        assert np.array_equal(codes, quantizer.encode(layer.weight).numpy())
        tables = np.frombuffer(table, np.float32).reshape(-1, 2**width)
        assert len(tables) == (shape[0] if scale == "channel" else 1)
        decoded = np.take_along_axis(np.broadcast_to(tables, (shape[0], 2**width)), codes, 1)
        assert np.array_equal(decoded, layer.quantized_weight().detach().numpy())


# ---- the operations, one by one ----------------------------------------------------------------------


def conv(transposed: bool, x: Tensor, weight: Tensor, values: dict[str, Any]) -> Tensor:
    spatial = x.dim() - 2
    pad = values["pad"].reshape(spatial, 2) if values["pad_type"] == "custom" else np.zeros((spatial, 2), np.int32)
    strides, dilations = values["strides"].tolist(), values["dilations"].tolist()
    bias, groups = values.get("bias"), int(values["groups"])
    if not transposed:
        x = F.pad(x, [int(side) for sides in pad[::-1] for side in sides])
        return (F.conv1d, F.conv2d, F.conv3d)[spatial - 1](x, weight, bias, strides, 0, dilations, groups)
    convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    y = convolve(x, weight, bias, strides, 0, 0, groups, dilations)
    inner = [slice(int(low), size - int(high)) for (low, high), size in zip(pad, y.shape[2:], strict=True)]
    return y[(slice(None), slice(None), *inner)]


def batch_norm(x: Tensor, v: dict[str, Any]) -> Tensor:
    return F.batch_norm(x, v["mean"], v["variance"], v["gamma"], v["beta"], eps=float(v["epsilon"]))


COMPUTE = {
    "add": lambda v: v["x"] + v["y"],
    "batch_norm": lambda v: batch_norm(v["x"], v),
    "cast": lambda v: v["x"].to({"fp32": torch.float32, "int32": torch.int32}[v["dtype"]]),
    "ceil": lambda v: v["x"].ceil(),
    "clip": lambda v: v["x"].clamp(float(v["alpha"]), float(v["beta"])),
    "conv": lambda v: conv(False, v["x"], v["weight"], v),
    "conv_transpose": lambda v: conv(True, v["x"], v["weight"], v),
    "expand_dims": lambda v: v["x"][
        tuple(None if axis in v["axes"] else slice(None) for axis in range(v["x"].dim() + 1))
    ],
    "greater": lambda v: v["x"] > v["y"],
    "linear": lambda v: F.linear(v["x"], v["weight"], v.get("bias")),
    "mul": lambda v: v["x"] * v["y"],
    "not_equal": lambda v: v["x"] != v["y"],
    "real_div": lambda v: v["x"] / v["y"],
    "reduce_mean": lambda v: v["x"].mean(v["axes"].tolist(), keepdim=bool(v["keep_dims"])),
    "relu": lambda v: v["x"].relu(),
    "reshape": lambda v: v["x"].reshape(v["shape"].tolist()),
    "select": lambda v: torch.where(v["cond"], v["a"], v["b"]),
    "sub": lambda v: v["x"] - v["y"],
    "tile": lambda v: v["x"].tile(v["reps"].tolist()),
}
"""What the specification of MIL says of each operation, in torch."""


def compute(path: Path, x: Tensor) -> list[Tensor]:
    """What a package gives for an input."""
    from coremltools.converters.mil.frontend.milproto.load import load

    package = tools.models.MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    function = load(spec, spec.specificationVersion, package.weights_dir).functions["main"]
    values: dict[str, Any] = dict.fromkeys(function.inputs, x)
    for op in function.operations:
        given = {name: values[var.name] for name, var in op.inputs.items() if var is not None}
        if op.op_type == "const":
            value = op.outputs[0].val
            is_float = isinstance(value, (np.ndarray, np.generic)) and value.dtype == np.float32
            values[op.outputs[0].name] = torch.tensor(value) if is_float else value
        elif op.op_type == "constexpr_lut_to_dense":
            codes, table = torch.tensor(given["indices"].astype(np.int64)), given["lut"][..., 0]
            values[op.outputs[0].name] = table.expand(*codes.shape, -1).gather(-1, codes[..., None])[..., 0]
        else:
            values[op.outputs[0].name] = COMPUTE[op.op_type](given)
    return [values[output.name] for output in function.outputs]


@pytest.mark.parametrize(("weight", "activation"), [(FLOAT, "signed"), (STEP, "uniform")], ids=str)
def test_every_layer_computes_the_same(tmp_path, weight, activation):
    config, signed = ACTIVATIONS[activation]
    model = every(weight, config, signed)
    adq.export_coreml(model, tmp_path / "m.mlpackage", sample(signed))
    for one, other in zip(
        compute(tmp_path / "m.mlpackage", sample(signed, 5, 3)), model(sample(signed, 5, 3)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    kinds = [op.type for op in operations(tmp_path / "m.mlpackage")]
    assert kinds.count("constexpr_lut_to_dense") == 7  # of eight layers, two of which share a weight
    assert kinds.count("real_div") == (8 if activation == "uniform" else 0)  # not products with a rounded inverse


def test_a_packed_file_becomes_a_package(tmp_path):
    torch.manual_seed(0)
    model = centred(adq.calibrate_(adq.quantize_(Block(), ADQConfig()), [images()]))
    adq.save(model, tmp_path / "m.safetensors", packed=True)
    loaded = adq.load(tmp_path / "m.safetensors", Block())
    report = adq.export_coreml(loaded, tmp_path / "m.mlpackage", images(0, 1))
    assert report.parity is None
    assert "read back: codes and tables are the model's; it has not run" in str(report)
    (found,) = compute(tmp_path / "m.mlpackage", images(7, 1))
    torch.testing.assert_close(found, model(images(7, 1)), rtol=1e-5, atol=1e-5)
    assert {file.name for file in (tmp_path / "m.mlpackage").iterdir()} == {"Data", "Manifest.json"}
    adq.export_coreml(model, tmp_path / "m.mlpackage", images(0, 3))  # in place of the other
    assert compute(tmp_path / "m.mlpackage", images(7, 3))[0].shape == (3, 4)
    assert {file.name for file in tmp_path.iterdir()} == {"m.safetensors", "m.mlpackage"}


# ---- refusals ----------------------------------------------------------------------------------------


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(self.linear(x))


def quantized_layer(layer: nn.Module, x: Tensor) -> nn.Module:
    return adq.calibrate_(adq.quantize_(nn.Sequential(layer)), [x])


def test_layers_that_multiply_with_their_codes(tmp_path):
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(6, 4), nn.ReLU()), ADQConfig(activation=None))
    model = adq.fast_linear_(adq.pack_(model))
    adq.export_coreml(model, tmp_path / "m.mlpackage", torch.zeros(1, 6))
    assert model[0].fast and "constexpr_lut_to_dense" in [op.type for op in operations(tmp_path / "m.mlpackage")]


def test_an_operator_is_refused_by_name(tmp_path):
    odd = adq.calibrate_(adq.quantize_(Odd()), [torch.rand(8, 6)])
    with pytest.raises(ValueError, match="coremltools cannot convert the model: .*i0"):
        adq.export_coreml(odd, tmp_path / "m.mlpackage", torch.rand(1, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_is_refused_by_name(tmp_path):
    path, x, volume = tmp_path / "m.mlpackage", torch.rand(2, 4, 6, 6), torch.rand(2, 4, 3, 3, 3)
    circular = quantized_layer(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), x)
    with pytest.raises(ValueError, match="not exported to Core ML: layer '0': Core ML has no circular padding"):
        adq.export_coreml(circular, path, x)
    padded = quantized_layer(nn.ConvTranspose3d(4, 6, 3, 2, output_padding=1), volume)
    with pytest.raises(ValueError, match="layer '0': Core ML has no output padding along three axes"):
        adq.export_coreml(padded, path, volume)
    padded[0].input_quantizer._ready = False
    padded[0].output_padding = (0, 0, 0)
    with pytest.raises(ValueError, match="layer '0': its activations are not calibrated"):
        adq.export_coreml(padded, path, volume)
    with pytest.raises(ValueError, match=r"name must end in .mlpackage, got .*m.onnx"):
        adq.export_coreml(padded, tmp_path / "m.onnx", volume)
    assert list(tmp_path.iterdir()) == []


def test_coremltools_is_missing(tmp_path, monkeypatch):
    coreml._coremltools.cache_clear()
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(ImportError, match=r"needs coremltools: pip install 'adq\[coreml\]'"):
        adq.export_coreml(quantized(), tmp_path / "m.mlpackage", images())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["codes", "table"])
def test_a_package_that_holds_something_else_fails(tmp_path, monkeypatch, part):
    model, path, x = (
        adq.quantize_(nn.Sequential(nn.Linear(6, 4)), ADQConfig(activation=None)),
        tmp_path / "m.mlpackage",
        torch.zeros(1, 6),
    )
    adq.export_coreml(model, path, x)
    before, read = (path / "Manifest.json").read_bytes(), coreml._read

    def forged(path):
        ((name, (bits, indices, table)),) = read(path).items()
        changed = (indices if part == "codes" else table).copy()
        changed.flat[0] += 1
        return {name: (bits, changed, table) if part == "codes" else (bits, indices, changed)}

    for found, message in (
        (forged, f"the {part} of layer '0' differ"),
        (lambda path: {}, "layer '0' has no palettized"),
    ):
        monkeypatch.setattr(coreml, "_read", found)
        with pytest.raises(RuntimeError, match=f"read back from the package: {message}"):
            adq.export_coreml(model, path, x)
    assert (path / "Manifest.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_the_command_line(tmp_path):
    testing = pytest.importorskip("typer.testing", reason="the command line needs the extra 'train'")
    from adq.train.cli import app

    torch.manual_seed(0)
    model = adq.quantize_(adq.create_model("digits_cnn", width=8), ADQConfig())
    adq.save(adq.calibrate_(model, [torch.rand(64, 1, 8, 8)]), tmp_path / "m.safetensors", packed=True)
    arguments = ["export", str(tmp_path / "m.safetensors"), str(tmp_path / "m.mlpackage"), "--to", "coreml"]
    result = testing.CliRunner().invoke(app, [*arguments, "--no-check", "--shape", "1,8,8"])
    assert result.exit_code == 0, result.output
    assert "it has not run, Core ML is Apple's systems' alone" in result.output
    assert (tmp_path / "m.mlpackage" / "Manifest.json").is_file()

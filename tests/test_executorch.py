"""ExecuTorch programs: they run in its own runtime, and what cannot is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from every import ACTIVATIONS, FLOAT, every, sample
from networks import Block, centred, images
from torch import Tensor, nn

import adq
from adq import ADQConfig, portable

runtime = pytest.importorskip("executorch.runtime", reason="needs the extra 'executorch'", exc_type=ImportError)


def execute(path: Path, *inputs: Tensor) -> list[Tensor]:
    method = runtime.Runtime.get().load_program(path).load_method("forward")
    return [output.clone() for output in method.execute(list(inputs))]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return centred(adq.calibrate_(adq.quantize_(Block(), ADQConfig()), [images()]))


def test_a_packed_file_runs(model, tmp_path):
    adq.save(model, tmp_path / "m.safetensors", packed=True)
    loaded = adq.load(tmp_path / "m.safetensors", Block())
    batches = [(images(seed, 10).contiguous(memory_format=torch.channels_last), None) for seed in range(3)]
    report = adq.export_executorch(loaded, tmp_path / "m.pte", batches[0][0][:4], batches, images=27)
    assert report.parity.images == 27
    assert report.parity.max_difference < 1e-5
    assert "parity: top-1 identical on 27 images in ExecuTorch, largest difference of the logits" in str(report)
    assert report.bytes == (tmp_path / "m.pte").stat().st_size
    (found,) = execute(tmp_path / "m.pte", images(9, 4))
    torch.testing.assert_close(found, model(images(9, 4)), rtol=1e-5, atol=1e-6)


def test_every_layer_computes_the_same(tmp_path):
    config, signed = ACTIVATIONS["signed"]
    model = every(FLOAT, config, signed)
    message = "layer 'sides.Conv3d.layer': ExecuTorch's portable kernels have no convolution along three axes"
    with pytest.raises(ValueError, match=message):
        adq.export_executorch(model, tmp_path / "m.pte", sample(signed))
    for kind in ("Conv3d", "ConvTranspose3d"):
        del model.sides[kind]
    adq.export_executorch(model, tmp_path / "m.pte", sample(signed))
    for one, other in zip(execute(tmp_path / "m.pte", sample(signed, 5, 3)), model(sample(signed, 5, 3)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(self.linear(x))


class Masked(nn.Module):
    """A mask that all images share, and as many images in a batch as it is long."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.linear(x) @ mask).mean(1) if x.dim() else self.linear(mask) * x


def test_inputs_that_images_share(tmp_path):
    torch.manual_seed(0)
    x, mask = torch.randn(2, 6, 6), torch.randn(6, 6)
    model = adq.calibrate_(adq.quantize_(Masked()), [{"x": x, "mask": mask}]).eval()
    report = adq.export_executorch(model, tmp_path / "m.pte", (x, mask), [(torch.randn(6, 6, 6), mask)], images=6)
    assert report.parity.images == 6
    with pytest.raises(ValueError, match="no example input is a tensor with a first axis"):
        adq.export_executorch(model, tmp_path / "m.pte", (torch.tensor(2.0), 3.0))


def test_refusals_come_before_any_file(model, tmp_path):
    odd = adq.calibrate_(adq.quantize_(Odd()), [torch.rand(8, 6)])
    with pytest.raises(ValueError, match="ExecuTorch cannot lower the model: .*i0"):
        adq.export_executorch(odd, tmp_path / "m.pte", torch.rand(1, 6))
    with pytest.raises(ValueError, match=r"name must end in .pte, got .*m.pt2"):
        adq.export_executorch(model, tmp_path / "m.pt2", images())
    with pytest.raises(ValueError, match="the model is not quantized; not exported to ExecuTorch"):
        adq.export_executorch(Odd(), tmp_path / "m.pte", torch.rand(1, 6))
    assert list(tmp_path.iterdir()) == []


def test_a_failing_check_leaves_the_old_file(model, tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("error 0x12")

    (tmp_path / "m.pte").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(runtime.Method, "execute", fail)
        with pytest.raises(RuntimeError, match="not exported: ExecuTorch cannot run the model: error 0x12"):
            adq.export_executorch(model, tmp_path / "m.pte", images(), [images(1, 64)], images=64)
    forward = portable.TableWeight.forward
    monkeypatch.setattr(portable.TableWeight, "forward", lambda self, weight: -forward(self))
    with pytest.raises(RuntimeError, match="in ExecuTorch top-1 differs"):
        adq.export_executorch(model, tmp_path / "m.pte", images(), [images(1, 64)], images=64)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"]

"""Quantized networks under torch.compile: one graph, compiled once, training as eager does."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig, convert


@pytest.fixture(autouse=True)
def _fresh_caches():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(update: str = "ema", scale: str = "channel", bits: int = 3) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
    ]
    config = ADQConfig(
        WeightConfig(bits=bits, update=update, scale=scale), ActivationConfig(bits=bits), first_last_bits=bits
    )
    return adq.calibrate_(adq.quantize_(nn.Sequential(*layers), config), [images(0)])


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, forward, steps: int = 5) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    outputs = []
    for seed in range(steps):
        optimizer.zero_grad()
        out = forward(images(seed))
        out.square().mean().backward()
        optimizer.step()
        outputs.append(out.detach())
    return outputs


def assert_trains_alike(model: nn.Module, backend, exact: bool) -> nn.Module:
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    expected = train(eager, eager)
    found = train(compiled, torch.compile(compiled, fullgraph=True, backend=backend))
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-4}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    for key, value in eager.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[key], value, **tolerance)
    assert all(
        not torch.equal(before[key], value) for key, value in eager.state_dict().items() if key.endswith(".weight")
    )
    return compiled


@pytest.mark.parametrize(
    ("update", "scale", "bits"),
    [("ema", "channel", 3), ("ema", "tensor", 2), ("gradient", "channel", 3), ("ema", "channel", 8)],
)
def test_one_graph_trains_as_eager_and_is_compiled_once(update, scale, bits):
    counter = CompileCounterWithBackend("aot_eager")
    model = block(update, scale, bits)
    codebook = model[3].weight_quantizer.codebook.clone()
    compiled = assert_trains_alike(model, counter, exact=True)
    assert counter.frame_count == 1
    assert int(compiled[3].weight_quantizer.steps) == 5
    assert not torch.equal(codebook, compiled[3].weight_quantizer.codebook)


def test_evaluation_uses_the_adapted_codebook():
    """The codebook is updated in place: the graph of an earlier step reads the new one."""
    model = block().eval()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        first = compiled(images(1))
        model[3].weight.mul_(1.5)
        adq.step(model.train())
        model.eval()
        second = compiled(images(1))
        assert torch.equal(second, model(images(1)))
    assert not torch.equal(first, second)
    assert counter.frame_count == 1


@pytest.mark.skipif(
    not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler, and there is none here"
)
def test_inductor():
    assert_trains_alike(block(), "inductor", exact=False)


def test_a_part_compiled_by_itself_is_one_graph():
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()) for _ in range(2)]
    model = nn.Sequential(*parts, nn.Conv2d(3, 4, 3))
    adq.calibrate_(adq.quantize_(model), [images(0)])
    eager, counter = copy.deepcopy(model), CompileCounterWithBackend("eager")
    for part in model[:2]:
        part.compile(backend=counter, fullgraph=True)
    for net in (model, eager):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            net(images(seed)).square().mean().backward()
            optimizer.step()
    assert counter.frame_count <= 2
    for one, other in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_layers_of_a_compiled_model_have_their_own_names():
    compiled = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), backend="eager")
    assert adq.calibrate_(adq.quantize_(compiled), [images(0)]) is compiled
    assert (
        list(convert.quantized_layers(compiled)) == [layer.name for layer in adq.summary(compiled).layers] == ["0", "2"]
    )
    adq.apply_allocation_(compiled, {"2": 4})
    assert train(compiled, compiled)[-1].isfinite().all()
    assert compiled._orig_mod[2].weight_quantizer.steps == 5

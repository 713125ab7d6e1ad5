"""What a step of a model on a GPU sends and reads back, seen on fake tensors of one: the host shall not wait for it."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import adq
from adq import sharded, update
from adq.backends import capture
from adq.batches import to_device
from adq.thresholds import Thresholds, resampled


class Calls(TorchDispatchMode):
    """Which operators run, on which devices, and those for whose results the host waits, or whose inputs it sends."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, set[str], dict]] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        devices = {x.device.type for x in (*args, result) if isinstance(x, Tensor)}
        name = operator._schema.name.removeprefix("aten::")
        self.all.append((name, devices, kwargs or {}))
        copied = name in ("_to_copy", "copy_") and len(devices) > 1
        if copied or name in ("_local_scalar_dense", "lift_fresh", "is_nonzero", "nonzero"):
            self.waits.append(name)
        return result


@pytest.fixture
def gpu(monkeypatch):
    """Tensors that are made are fake, and may be of a GPU."""
    monkeypatch.setattr(capture, "is_capturing", lambda device: False)
    monkeypatch.setattr(update, "_constant_rates", cache(update._constant_rates.__wrapped__))  # keeps no fake ones
    with FakeTensorMode() as mode:
        yield mode


@pytest.fixture
def network(request) -> nn.Sequential:
    """A quantized network with the parameters and buffers of one on a GPU."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    adq.quantize_(net, adq.ADQConfig(activation=None, first_last_bits=4))
    gpu = request.getfixturevalue("gpu")  # fitting codebooks takes real ones

    def fake(tensor: Tensor) -> Tensor:
        return gpu.from_tensor(tensor).detach().to("cuda")

    for module in net.modules():
        module._parameters.update({name: nn.Parameter(fake(p)) for name, p in module._parameters.items()})
        module._buffers.update({name: fake(b) for name, b in module._buffers.items()})
    return net


RATES = {
    "number": lambda: 0.1,
    "number, with a peak": lambda: (0.1, 0.2),
    "tensor": lambda: torch.tensor(0.1, device="cuda"),
    "tensor, with a peak": lambda: (torch.tensor(0.1, device="cuda"), 0.2),
    "tensor of the CPU": lambda: torch.tensor(0.1),
}


@pytest.mark.parametrize("found_inf", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("rate", RATES)
def test_a_step_waits_for_nothing(network, rate, groups, found_inf):
    optimizer = torch.optim.SGD([{"params": part.parameters()} for part in (network if groups > 1 else [network])], 0.1)
    for group in optimizer.param_groups:
        lr = RATES[rate]()
        group["lr"], group["max_lr"] = lr if isinstance(lr, tuple) else (lr, None)
    if found_inf:  # as a gradient scaler does
        optimizer.found_inf = torch.zeros((), device="cuda")
    update._after_step(optimizer, (), {})
    for i, group in enumerate(optimizer.param_groups):
        group["lr"] = group["lr"] * (1.0 - 0.1 * i)  # layers of one group move together however rates come
    with Calls() as calls:
        update._after_step(optimizer, (), {})
    assert calls.waits == []
    assert [name for name, *_ in calls.all].count("adq::foreach_codebook_step_") == 1


def part(weight: Tensor) -> SimpleNamespace:
    """Looks like a DTensor that one process has all of."""
    return SimpleNamespace(shape=weight.shape, dim=weight.dim, to_local=lambda: weight, device_mesh=None, placements=())


def test_a_step_of_sharded_weights_waits_for_nothing(network):
    members = [(part(layer.weight), layer.weight_quantizer) for layer in network]
    with Calls() as calls:
        sharded.step(members, torch.ones(3, device="cuda"))
    assert calls.waits == []


def test_what_arrives_on_the_cpu_is_there(gpu):
    x = torch.empty(3)
    with Calls() as calls:
        there = to_device({"x": [x]}, torch.device("cuda"))
        to_device(there, torch.device("cpu"))
    assert [kwargs.get("non_blocking", False) for name, _, kwargs in calls.all if name == "_to_copy"] == [True, False]


def test_thresholds_are_cumulated_where_that_is_deterministic(gpu):
    value = torch.ones(1, device="cuda")
    with Calls() as calls:
        found = resampled(
            Thresholds(value, value.expand(3), *[value] * 3), adq.ActivationConfig(2), adq.ActivationConfig(3)
        )
    assert [devices for name, devices, _ in calls.all if name == "cumsum"] == [{"cpu"}]
    assert found.interval.is_cuda


def test_what_outlives_a_step_is_not_made_within_a_cuda_graph(network, monkeypatch):
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="once before the capture"):
        update._after_step(optimizer, (), {})
    assert update.PEAK not in optimizer.param_groups[0]
    optimizer.param_groups[0]["lr"] = 0.1
    with pytest.raises(RuntimeError, match="once before the capture"):
        update._after_step(optimizer, (), {})
    monkeypatch.setattr(capture, "is_capturing", lambda device: False)
    update._after_step(optimizer, (), {})
    monkeypatch.setattr(capture, "is_capturing", lambda device: True)
    update._after_step(optimizer, (), {})

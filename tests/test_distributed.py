"""Several processes come to what one comes to: codebooks, weights, calibration, scores, evaluation."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from networks import images, quantized
from processes import run
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adq
from adq import ADQConfig, WeightConfig
from adq.distributed import from_main, gather, pool, share, share_of, world

SIZES = (2, 4)
GLOBAL_BATCH = 16


def mlp(**weight) -> nn.Module:
    """Without batch norm, whose statistics a process takes over its own part of the batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    adq.quantize_(net, ADQConfig(weight=WeightConfig(**weight)))
    return adq.calibrate_(net, [inputs(0)])


def inputs(step: int) -> Tensor:
    """The global batch of a step."""
    return torch.randn(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(step))


def forbidden(*args, **kwargs):
    raise AssertionError("adq communicated during training")


def trained(steps: int, config: dict) -> dict[str, Tensor]:
    """State after steps of data-parallel training; of plain training on the whole batches in one process."""
    net, (rank, size) = mlp(**config), world()
    model = DistributedDataParallel(net, broadcast_buffers=False) if size > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast"):
        setattr(dist, name, forbidden)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)[rank::size]).square().mean().backward()
        optimizer.step()
        schedule.step()
    return net.state_dict()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codebooks_are_the_same_bits_on_all_processes_without_communication(size, update):
    states = run(trained, size, 200, {"update": update})
    start = mlp(update=update).state_dict()
    for key, value in states[0].items():
        assert all(torch.equal(value, state[key]) for state in states[1:]), key
        if key.endswith(("codebook", "weight")):
            assert not torch.equal(value, start[key]), key


def test_two_processes_end_with_the_weights_of_one():
    (alone,), (first, _) = run(trained, 1, 20, {}), run(trained, 2, 20, {})
    for key, value in alone.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)


# ---- shares of the data, and what is made of them ----------------------------------------------------


def dealt() -> dict:
    rank, size = world()
    loader = share(DataLoader(TensorDataset(torch.arange(37)), batch_size=4))
    own = [x.tolist() for (x,) in loader]
    return {
        "pooled": pool(lambda: own),
        "length": len(loader) == len(own) == share_of(10),
        "first": len(own[: share_of(3)]),
        "main": from_main(lambda: rank + size),
        "ranks": gather(lambda: rank),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_batch_is_dealt_once(size):
    for found in run(dealt, size):
        assert found["pooled"] == [list(range(i, min(i + 4, 37))) for i in range(0, 37, 4)]
        assert found["length"]
        assert found["main"] == size
        assert found["ranks"] == list(range(size))
    assert sum(found["first"] for found in run(dealt, size)) == 3


def failing() -> str:
    def compute() -> None:
        if world()[0] == 1:
            raise ValueError("no such image")

    with pytest.raises((ValueError, RuntimeError)) as caught:
        gather(compute)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_an_error_of_one_process_is_raised_on_all():
    cause = "ValueError: no such image"
    assert run(failing, 2) == [f"RuntimeError: adq: process 1 failed: {cause}", cause]


def evaluated() -> tuple[float, float]:
    pytest.importorskip("accelerate")
    from adq.train.engine import evaluate

    data = TensorDataset(images(1, 37), torch.arange(37) % 4)
    return evaluate(quantized(), share(DataLoader(data, batch_size=4)))


def test_evaluation_of_a_test_set_that_does_not_divide():
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    (alone,) = run(evaluated, 1)
    assert 0 < alone[1] < 100
    for size in SIZES:
        assert run(evaluated, size) == [alone] * size

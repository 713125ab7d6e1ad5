"""What a loop of torch's own is made of: autocast, scalers, checkpointing, clipping, averaging, layouts, compilation.

Accumulation, skipped steps, ``no_grad`` and checkpointing without re-entrance are in ``test_update.py``; a compiled
network in ``test_compile.py``.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import adq
from adq import ADQConfig, WeightConfig
from adq.convert import weight_quantizers


def network(**weight) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(8 * 16, 3))
    adq.quantize_(net, ADQConfig(weight=WeightConfig(ema_decay=0.9, **weight)))
    return adq.calibrate_(net, [images(0)])


def images(seed: int) -> Tensor:
    return torch.randn(8, 2, 8, 8, generator=torch.Generator().manual_seed(seed))


def targets(seed: int) -> Tensor:
    return torch.randint(0, 3, (8,), generator=torch.Generator().manual_seed(seed))


def loss_of(net: nn.Module, seed: int, x: Tensor | None = None) -> Tensor:
    return nn.functional.cross_entropy(net(images(seed) if x is None else x).float(), targets(seed))


def sgd(net: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)


def ema_steps(net: nn.Module) -> list[int]:
    return [int(quantizer.steps) for _, quantizer in weight_quantizers(net).values()]


def codebook(net: nn.Module) -> Tensor:
    return net[3].weight_quantizer.codebook.clone()


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, **(tolerance or {"rtol": 0, "atol": 0}))


def test_bfloat16_autocast_rounds_products_only():
    plain, mixed = network(), network()
    for net, enabled in ((plain, False), (mixed, True)):
        optimizer = sgd(net)
        for seed in range(5):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                assert net(images(seed)).dtype == (torch.bfloat16 if enabled else torch.float32)
                loss = loss_of(net, seed)
            loss.backward()
            optimizer.step()
    assert ema_steps(mixed) == [5, 5, 5]
    assert all(value.dtype != torch.bfloat16 for value in mixed.state_dict().values())
    assert not torch.equal(codebook(mixed), codebook(plain))
    torch.testing.assert_close(mixed[3].weight, plain[3].weight, rtol=0, atol=0.01)
    torch.testing.assert_close(codebook(mixed), codebook(plain), rtol=0, atol=0.01)
    # the codebook is that of the float32 weights, moved by them as they are
    expected = copy.deepcopy(mixed)
    for net in (expected, mixed):
        with torch.autocast("cpu", torch.bfloat16, enabled=net is mixed):
            adq.step(net)
    assert_same(expected, mixed)


def test_float16_autocast_with_a_scaler_counts_only_the_steps_that_were_made():
    net = network()
    optimizer, scaler = sgd(net), torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=1000)
    made = 0
    for seed in range(60):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(net, seed)
        scaler.scale(loss).backward()
        before, weight, scale = codebook(net), net[3].weight.clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.get_scale() < scale
        made += not skipped
        assert torch.equal(codebook(net), before) == torch.equal(net[3].weight, weight) == skipped
        assert ema_steps(net) == [made] * 3
    assert 0 < made < 60


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_of_a_part_recomputes_without_a_second_update(use_reentrant):
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = net[2](net[1](net[0](x)))
        x = checkpoint(net[3:5], x, use_reentrant=use_reentrant)
        return net[6](net[5](x))

    plain, recomputed = network(), network()
    for net in (plain, recomputed):
        optimizer = sgd(net)
        for seed in range(3):
            optimizer.zero_grad()
            out = net(images(seed)) if net is plain else forward(net, images(seed))
            nn.functional.cross_entropy(out, targets(seed)).backward()
            optimizer.step()
    assert ema_steps(recomputed) == [3, 3, 3]
    assert_same(plain, recomputed)


def test_clipped_gradients_move_weights_and_thresholds_by_as_much_less():
    net, by_hand = network(), network()
    optimizers = [sgd(net), sgd(by_hand)]
    for model in (net, by_hand):
        (10 * loss_of(model, 0)).backward()
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in by_hand.parameters()]))
    assert norm > 1.0
    torch.testing.assert_close(nn.utils.clip_grad_norm_(net.parameters(), 0.5), norm)
    for parameter in by_hand.parameters():
        parameter.grad.mul_(0.5 / (norm + 1e-6))
    for optimizer in optimizers:
        optimizer.step()
    assert ema_steps(net) == [1, 1, 1]
    assert_same(by_hand, net, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_weights_have_the_present_codebooks_or_averaged_ones(use_buffers):
    net = network()
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=use_buffers)
    optimizer = sgd(net)
    expected_weight, expected_codebook = net[3].weight.detach().clone(), codebook(net)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
        average.update_parameters(net)
        if seed == 0:  # the first one is a copy
            expected_weight, expected_codebook = net[3].weight.detach().clone(), codebook(net)
        expected_weight.lerp_(net[3].weight.detach(), 0.2)
        expected_codebook.lerp_(codebook(net), 0.2)
    assert ema_steps(net) == [4, 4, 4]
    torch.testing.assert_close(average.module[3].weight.detach(), expected_weight)
    expected = expected_codebook if use_buffers else codebook(net)
    torch.testing.assert_close(codebook(average.module), expected)
    assert not torch.equal(expected_codebook, codebook(net))
    assert bool((codebook(average.module).diff() >= 0).all())
    assert average.eval()(images(9)).isfinite().all()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_a_plain_average_of_weights(use_buffers):
    """As stochastic weight averaging takes it; its state dict is that of a calibrated model."""
    net = network()
    average, optimizer, weights = AveragedModel(net, use_buffers=use_buffers), sgd(net), []
    for seed in range(3):
        optimizer.zero_grad()
        loss_of(net, seed).backward()
        optimizer.step()
        average.update_parameters(net)
        weights.append(net[3].weight.detach().clone())
    torch.testing.assert_close(average.module[3].weight.detach(), torch.stack(weights).mean(0))
    other = network()
    other.load_state_dict(average.module.state_dict())
    assert torch.equal(other.eval()(images(9)), average.eval()(images(9)))


def test_channels_last_trains_alike():
    plain, last = network(), network().to(memory_format=torch.channels_last)
    for net in (plain, last):
        optimizer = sgd(net)
        for seed in range(3):
            optimizer.zero_grad()
            x = images(seed) if net is plain else images(seed).to(memory_format=torch.channels_last)
            loss_of(net, seed, x).backward()
            optimizer.step()
    assert last[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert last[3].quantized_weight().is_contiguous(memory_format=torch.channels_last)
    assert ema_steps(last) == [3, 3, 3]
    assert_same(plain, last, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_breaks_nowhere_in_adq_and_is_compiled_in_its_first_two_calls():
    torch._dynamo.reset()
    eager, compiled = network(), network()
    counter = CompileCounterWithBackend("aot_eager")
    for net in (eager, compiled):
        optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.05), momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)

        def step(x: Tensor, y: Tensor, net=net, optimizer=optimizer) -> Tensor:
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        run = step if net is eager else torch.compile(step, backend=counter)
        torch._dynamo.utils.counters.clear()
        made = []
        for seed in range(6):
            run(images(seed), targets(seed))
            schedule.step()
            made.append(counter.frame_count)
    reasons = list(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.reset()
    assert made[1] > 0
    assert made[1:] == [made[1]] * 5
    assert [reason for reason in reasons if "adq" in reason and "_after_step" not in reason] == []
    operators = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert not any("foreach_codebook_step_" in name for name in operators)  # the hook is no part of a graph
    assert ema_steps(compiled) == [6, 6, 6]
    assert_same(eager, compiled, rtol=1e-4, atol=1e-5)

"""When codebooks move: once per step of the optimizer that holds the weight, at the pace of its learning rate."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR
from torch.utils.checkpoint import checkpoint

import adq
from adq import update


def float_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


def model(**weight) -> nn.Module:
    net = float_network()
    adq.quantize_(net, adq.ADQConfig(weight=adq.WeightConfig(**weight), first_last_bits=4))
    return adq.calibrate_(net, [inputs()])


def inputs(seed: int = 0) -> torch.Tensor:
    return torch.randn(32, 6, generator=torch.Generator().manual_seed(seed))


def steps(net: nn.Module) -> list[int]:
    return [int(net[i].weight_quantizer.steps) for i in (0, 2, 4)]


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items() if "weight_quantizer" in key}


def backward(net: nn.Module, seed: int = 0, factor: float = 1.0) -> None:
    (net(inputs(seed)).square().mean() * factor).backward()


def sgd(net: nn.Module, lr: float = 0.1, **kwargs) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr, **kwargs)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_one_optimizer_step_is_one_ema_step_of_the_new_weight(scale):
    net = model(scale=scale, ema_decay=0.9)
    quantizer = net[2].weight_quantizer
    c, n, m, s = (getattr(quantizer, key).double().numpy() for key in ("codebook", "ema_count", "ema_total", "scale"))
    optimizer = sgd(net)
    backward(net)
    optimizer.step()
    w = net[2].weight.detach().double().numpy()
    code = ((w / s)[..., None] > 0.5 * (c[:-1] + c[1:])).sum(-1)
    n = 0.9 * n + 0.1 * np.bincount(code.ravel(), minlength=8)
    m = 0.9 * m + 0.1 * np.bincount(code.ravel(), (w / s).ravel(), minlength=8)
    fitted = (w * c[code]).sum(1, keepdims=True) / (c[code] ** 2).sum(1, keepdims=True)
    np.testing.assert_allclose(quantizer.ema_count, n, rtol=1e-5)
    np.testing.assert_allclose(quantizer.ema_total, m, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(quantizer.codebook, m / n, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(quantizer.scale, 0.9 * s + 0.1 * fitted if scale == "channel" else s, rtol=1e-5)
    assert steps(net) == [1, 1, 1]


def test_two_runs_are_identical_bit_for_bit():
    nets = [model(), model()]
    for net in nets:
        optimizer = sgd(net)
        for seed in range(5):
            optimizer.zero_grad()
            backward(net, seed)
            optimizer.step()
    assert same(nets[0].state_dict(), nets[1].state_dict())
    assert not same(state(nets[0]), state(model()))


def test_evaluation_and_no_grad_change_nothing():
    net = model()
    before = state(net)
    with torch.no_grad():
        net(inputs())
    net.eval()
    net(inputs())
    optimizer = sgd(net)
    backward(net)
    optimizer.step()  # the weights move, a model in evaluation mode does not adapt
    assert same(before, state(net))


def test_gradient_accumulation_is_one_step():
    net = model()
    optimizer = sgd(net)
    for seed in range(4):
        backward(net, seed)
    optimizer.step()
    assert steps(net) == [1, 1, 1]


@pytest.mark.parametrize("weight", [{}, {"snap": "int8"}, {"scale": "tensor"}])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips(fused, weight):
    net = model(**weight)
    before = state(net)
    optimizer = sgd(net, fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    for factor, expected in ((float("inf"), 0), (1.0, 1)):
        optimizer.zero_grad()
        scaler.scale(net(inputs()).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert steps(net) == [expected] * 3
        assert same(before, state(net)) == (expected == 0)
        assert net[2].input_quantizer.trained == (expected == 1)


def test_activation_checkpointing_recomputes_the_same_forward():
    plain, recomputed = model(), model()
    for net, forward in ((plain, plain), (recomputed, lambda x: checkpoint(recomputed, x, use_reentrant=False))):
        optimizer = sgd(net)
        for seed in range(3):
            optimizer.zero_grad()
            forward(inputs(seed)).square().mean().backward()
            optimizer.step()
    assert steps(recomputed) == [3, 3, 3]
    assert same(plain.state_dict(), recomputed.state_dict())


def test_only_layers_of_the_stepping_optimizer_move():
    net, other = model(), model()
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    before = state(net), state(other)
    backward(net)
    optimizer.step()
    assert steps(net) == [0, 1, 0]
    assert same(before[1], state(other))
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0).step()
    assert steps(net) == [0, 1, 0]


class Wrapping(torch.optim.Optimizer):
    """An optimizer that steps through another one, twice, and may fail in between."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.fails = inner, False

    def step(self, closure=None):
        self.inner.step()
        if self.fails:
            raise RuntimeError("between")
        self.inner.step()


def test_an_optimizer_that_wraps_another_takes_one_step():
    net, plain = model(ema_follows_lr=False), model(ema_follows_lr=False)
    outer, inner = Wrapping(sgd(net, 0.05)), sgd(plain)
    for optimizer, each in ((outer, net), (inner, plain)):
        backward(each)
        optimizer.step()
    assert steps(net) == steps(plain) == [1, 1, 1]
    assert torch.allclose(net[2].weight_quantizer.codebook, plain[2].weight_quantizer.codebook)
    outer.fails = True
    with pytest.raises(RuntimeError, match="between"):
        outer.step()
    assert steps(net) == [1, 1, 1]
    sgd(net).step()
    assert steps(net) == [2, 2, 2]


def test_an_optimizer_that_calls_its_parents_step_takes_one_step():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    for _ in range(2):  # the second time torch has wrapped the parent's step too
        net = model()
        optimizer = Own(net.parameters(), lr=0.1)
        backward(net)
        optimizer.step()
        assert steps(net) == [1, 1, 1]
        torch.optim.SGD(net.parameters(), lr=0.1)


def old_weight_norm(layer: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "recompute",
    [parametrizations.weight_norm, old_weight_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5)],
)
def test_codebooks_of_recomputed_weights_follow_what_they_are_computed_from(recompute):
    net = model()
    recompute(net[2])
    before = net[2].weight_quantizer.ema_total.clone()
    optimizer = sgd(net)
    backward(net)
    optimizer.step()
    assert steps(net) == [1, 1, 1]
    assert not torch.equal(net[2].weight_quantizer.ema_total, before)


def test_a_filter_that_was_nearly_dead_leaves_the_levels_to_the_others():
    """Behind a batch norm its gradient is as large as its weights are small."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 64, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight[0] *= 1e-5
    net = nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    weight = adq.WeightConfig(bits=3)
    adq.quantize_(net, adq.ADQConfig(weight=weight, activation=None, first_last_bits=3))
    optimizer = sgd(net, 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(32, 8, 8, 8)), torch.randint(0, 10, (32,))).backward()
        optimizer.step()
    assert conv.weight[0].abs().max() > 1e-3  # a hundred times its scale
    assert adq.codebook.sqnr(conv.weight[1:].detach(), conv.quantized_weight()[1:].detach()) > 18.0


def test_a_step_within_that_of_an_optimizer_of_other_weights_counts():
    net, other = model(), nn.Parameter(torch.ones(1))
    inner, outer = sgd(net), torch.optim.SGD([other], lr=0.1)

    def closure():
        backward(net)
        inner.step()
        return other.sum()

    outer.step(closure)
    assert steps(net) == [1, 1, 1]


@pytest.mark.parametrize("weights_too", [True, False])
def test_quantized_in_inference_mode(weights_too):
    expected = model()(inputs())
    with torch.inference_mode(weights_too):
        net = float_network()
    with torch.inference_mode():
        adq.calibrate_(adq.quantize_(net, adq.ADQConfig(first_last_bits=4)), [inputs()])
        assert torch.equal(net(inputs()), expected)
    with torch.no_grad():
        assert torch.equal(net(inputs()), expected)


def test_step_for_foreign_optimizers():
    ours, foreign = model(), model()
    optimizer = sgd(ours)
    backward(ours)
    optimizer.step()
    backward(foreign)
    with torch.no_grad():
        for parameter in foreign.parameters():
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-0.1)
    assert steps(foreign) == [0, 0, 0]
    adq.step(foreign)
    assert same(ours.state_dict(), foreign.state_dict())
    foreign.eval()
    adq.step(foreign)
    assert steps(foreign) == [1, 1, 1]


class WithoutRate(torch.optim.Optimizer):
    """Finds its rate itself; its groups have None for it, or no entry at all."""

    def __init__(self, parameters, **defaults) -> None:
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad


@pytest.mark.parametrize("defaults", [{"lr": None}, {"rho": 0.05}, {"lr": None, "initial_lr": None}])
def test_optimizers_without_a_learning_rate(defaults):
    net, plain = model(), model()
    WithoutRate([nn.Parameter(torch.zeros(1))], **defaults).step()
    for each, optimizer in ((net, WithoutRate(net.parameters(), **defaults)), (plain, sgd(plain))):
        backward(each)
        optimizer.step()
    assert steps(net) == [1, 1, 1]
    assert same(state(net), state(plain))


SCHEDULES = {
    "lambda": (lambda o: LambdaLR(o, lambda t: 1 - t / 8), lambda t: 1 - t / 8),
    "cosine": (lambda o: CosineAnnealingLR(o, 8), lambda t: (1 + np.cos(np.pi * t / 8)) / 2),
    "one cycle": (
        lambda o: OneCycleLR(o, 0.3, total_steps=9, pct_start=0.25, anneal_strategy="linear", div_factor=10),
        lambda t: 0.1 + 0.9 * t / 1.25 if t < 1.25 else 1 - (1 - 1e-5) * (t - 1.25) / 6.75,
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_pace_follows_the_learning_rate_to_zero(name, monkeypatch):
    schedule, expected = SCHEDULES[name]
    net = model()
    paces = []
    original = update._step
    monkeypatch.setattr(update, "_step", lambda *args: (paces.append(args[-1]), original(*args)))
    optimizer = sgd(net, 0.3)
    scheduler = schedule(optimizer)
    for t in range(9):
        optimizer.zero_grad()
        backward(net)
        before = state(net)
        optimizer.step()
        if t < 8:
            scheduler.step()
    assert paces == pytest.approx([expected(t) for t in range(9)], abs=1e-4)
    last = state(net)
    drift = max(
        (last[key] - before[key]).abs().max().item() for key in last if not key.endswith(("steps", "ema_total"))
    )
    assert drift < 1e-3


def test_without_a_schedule_the_pace_is_full_and_can_be_unhooked():
    assert update._pace({"lr": 0.3}) == 1.0
    assert update._pace({"lr": 0.0}) == 0.0
    assert update._pace({"lr": 0.2, "max_lr": 0.1}) == 1.0
    rests, moves = model(ema_follows_lr=True), model(ema_follows_lr=False)
    for net in (rests, moves):
        optimizer = sgd(net)
        LambdaLR(optimizer, lambda t: 0.0)
        net[2].weight.data.add_(1.0)
        before = net[2].weight_quantizer.ema_count.clone()
        backward(net)
        optimizer.step()
        assert torch.equal(before, net[2].weight_quantizer.ema_count) == (net is rests)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_layers_of_several_rates_move_in_one_call_and_each_at_its_own_pace(make, monkeypatch):
    calls = []
    operator = torch.ops.adq.foreach_codebook_step_
    counted = lambda *args: (calls.append(len(args[0])), operator(*args))  # noqa: E731
    monkeypatch.setattr(torch.ops.adq, "foreach_codebook_step_", counted)
    together, alone = model(), model()
    groups = [
        {"params": [layer.weight], "lr": make(lr)} for layer, lr in zip(together[::2], (0.3, 0.1, 0.2), strict=True)
    ]
    of_all = torch.optim.SGD(groups, lr=0.1)
    of_each = [torch.optim.SGD([layer.weight], make(lr)) for layer, lr in zip(alone[::2], (0.3, 0.1, 0.2), strict=True)]
    for net, optimizers in ((together, [of_all]), (alone, of_each)):
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        backward(net)
        for factor in (1.0, 0.3, 0.7):
            for group, own in zip(groups, (1.0, 0.9, 0.8), strict=True):
                group["lr"] = group["lr"] * (factor * own)
            for optimizer in optimizers:
                optimizer.step()
    assert calls == [3] * 3 + [1] * 9
    assert same(state(together), state(alone))


@pytest.mark.parametrize("mode", ["frozen", "gradient"])
def test_other_modes_leave_the_counters(mode):
    net = model(update=mode)
    optimizer = sgd(net)
    before = state(net)
    backward(net)
    optimizer.step()
    moved = {key for key, value in state(net).items() if not torch.equal(value, before[key])}
    expected = {f"{i}.weight_quantizer.steps" for i in (0, 2, 4)}
    assert moved == (
        expected | {f"{i}.weight_quantizer.codebook" for i in (0, 2, 4)} if mode == "gradient" else expected
    )


def test_gradient_mode_learns_by_the_sum_over_each_cell():
    net = model(update="gradient", scale="tensor")
    layer = net[2]
    layer.weight.requires_grad_(True)
    captured = {}
    w_q = layer.quantized_weight()
    w_q.register_hook(lambda grad: captured.update(grad=grad.double().numpy()))
    (w_q * torch.arange(256.0).reshape(16, 16)).sum().backward()
    c, w = layer.weight_quantizer.codebook.detach().numpy(), layer.weight.detach().numpy()
    code = (w[..., None] > np.float32(0.5) * (c[:-1] + c[1:])).sum(-1)
    expected = [captured["grad"][code == k].sum() for k in range(8)]
    np.testing.assert_allclose(layer.weight_quantizer.codebook.grad, expected, rtol=1e-6)


# ---- the registry ------------------------------------------------------------------------------------


def test_models_leave_the_registry_with_their_last_reference():
    net = model()
    layers = weakref.ref(net[0])
    assert net[0] in update._LAYERS
    before = len(update._LAYERS)
    del net
    gc.collect()
    assert layers() is None
    assert len(update._LAYERS) <= before - 3


def test_a_failed_conversion_leaves_optimizers_working():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(net[1].weight)
    with pytest.raises(ValueError, match="every weight is zero"):
        adq.quantize_(net)
    net(torch.ones(1, 4)).sum().backward()
    sgd(net).step()
    assert net[0] not in update._LAYERS


def test_shared_weights_move_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    adq.quantize_(net, adq.ADQConfig(activation=None, first_last_bits=3))
    net(torch.ones(1, 4)).sum().backward()
    sgd(net).step()
    assert int(net[0].weight_quantizer.steps) == 1


def test_a_copy_adapts_on_its_own():
    net = model()
    twin = copy.deepcopy(net)
    before = state(net)
    optimizer = sgd(twin)
    backward(twin)
    optimizer.step()
    assert steps(twin) == [1, 1, 1]
    assert same(before, state(net))


def test_other_default_dtypes():
    torch.set_default_dtype(torch.bfloat16)
    try:
        net = adq.quantize_(float_network(), adq.ADQConfig(first_last_bits=4))
        adq.calibrate_(net, [inputs().bfloat16()])
        net(inputs().bfloat16()).float().square().mean().backward()
        sgd(net).step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert steps(net) == [1, 1, 1]
    quantizer = net[2].input_quantizer
    assert all(tensor.dtype == torch.float32 for tensor in quantizer.state_dict().values())


def test_a_rate_that_is_a_factor_of_the_scheduler_is_no_peak():
    """Adam(lr=1) with the rate itself from a LambdaLR, as transformers are trained."""
    net = model()
    optimizer = torch.optim.Adam(net.parameters(), lr=1.0)
    schedule = LambdaLR(optimizer, lambda t: [1e-4, 1e-3, 5e-4, 1e-4][min(t, 3)])
    paces = []
    for _ in range(4):
        paces.append(update._pace(optimizer.param_groups[0]))
        schedule.step()
    assert paces == pytest.approx([1.0, 1.0, 0.5, 0.1])


def test_the_highest_rate_stays_where_a_captured_step_reads_it():
    group = {"lr": torch.tensor(0.1)}
    update._pace(group)
    place = group[update.PEAK].data_ptr()
    for rate, pace in ((0.4, 1.0), (0.2, 0.5), (0.8, 1.0)):
        group["lr"].fill_(rate)
        assert float(update._pace(group)) == pytest.approx(pace)
        assert group[update.PEAK].data_ptr() == place


def test_a_rate_may_change_its_shape_and_dtype():
    group = {"lr": torch.tensor(0.4)}
    update._pace(group)
    for rate in (torch.tensor([0.2]), torch.tensor(0.2, dtype=torch.float64), torch.tensor(0.2)):
        group["lr"] = rate
        assert float(update._pace(group)) == pytest.approx(0.5)


@pytest.mark.parametrize("make", [float, torch.tensor])
def test_the_highest_rate_goes_with_the_optimizers_state(make):
    net = model()
    optimizers = [torch.optim.Adam(net.parameters(), lr=make(0.1)) for _ in range(2)]
    backward(net)
    optimizers[0].step()
    assert float(optimizers[0].param_groups[0][update.PEAK]) == pytest.approx(0.1)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for group in optimizers[1].param_groups:
        group["lr"] = make(0.02)
    assert float(update._pace(optimizers[1].param_groups[0])) == pytest.approx(0.2)


def test_frozen_layers_stay_as_they_are():
    net = model()
    net[0].weight.requires_grad_(False)
    before = state(net)
    optimizer = sgd(net)
    for _ in range(3):
        backward(net)
        optimizer.step()
    adq.step(net)
    assert steps(net) == [0, 4, 4]
    moved = {key for key, value in state(net).items() if not torch.equal(value, before[key])}
    assert moved and not any(key.startswith("0.") for key in moved)


def test_layers_may_come_in_another_thread_while_an_optimizer_steps(monkeypatch):
    """One does as soon as the optimizer looks at the layers that there are."""
    net, other = model(), model()[0]
    update.unregister(other)
    threads = []

    class Busy(weakref.WeakSet):
        def __iter__(self):
            for layer in super().__iter__():
                if not threads:
                    threads.append(threading.Thread(target=update.register, args=(other,)))
                    threads[0].start()
                    threads[0].join(0.2)  # waits where iterating is guarded
                yield layer

    monkeypatch.setattr(update, "_LAYERS", Busy(update._LAYERS))
    optimizer = sgd(net)
    backward(net)
    optimizer.step()
    threads[0].join()
    assert steps(net) == [1] * 3
    assert other in update._LAYERS


class Normalised(nn.Module):
    """Sets a weight anew in its forward pass, past autograd and its count of changes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.b.weight.data = nn.functional.normalize(self.b.weight.data, dim=1) * 5
        return self.b(self.a(x))


def test_a_weight_that_is_set_anew_during_the_pass_is_quantized_as_it_is():
    torch.manual_seed(0)
    net = adq.quantize_(Normalised(), adq.ADQConfig(activation=None, first_last_bits=3)).eval()
    with torch.no_grad():
        found = net(inputs())
        assert torch.equal(found, net.b(net.a(inputs())))


def test_a_layer_that_was_replaced_is_no_longer_quantized():
    net = model()
    net(inputs())
    gone = weakref.ref(net[4])
    net[4] = nn.Linear(16, 3)
    gc.collect()
    assert gone() is None
    net(inputs()).sum().backward()


def test_weights_that_come_when_their_layer_is_called():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    net = model().eval()
    with torch.no_grad():
        expected = net(inputs())
        accelerate.cpu_offload(net, execution_device="cpu")
        assert torch.equal(net(inputs()), expected)

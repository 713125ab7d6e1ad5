"""The operators that take the weights of all layers at once, on every backend against the oracle."""

from __future__ import annotations

import copy
import gc
import importlib
import math
import weakref
from dataclasses import dataclass, fields
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

from adq import WeightConfig, ops, reference
from adq.nn import WeightQuantizer

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = math.nan, math.inf
LEVELS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 64, 127, 255, 256)


def f32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    # weight, axis of the channels or None
    "conv 3x3": (lambda: normal(24, 8, 3, 3), 0),
    "conv 1x1": (lambda: normal(9, 16, 1, 1), 0),
    "conv 7x7 of three channels": (lambda: normal(6, 3, 7, 7), 0),
    "depthwise": (lambda: normal(50, 1, 3, 3), 0),
    "linear": (lambda: normal(7, 300), 0),
    "wide linear": (lambda: normal(3, 2050), 0),
    "transposed conv": (lambda: normal(5, 12, 4, 4), 1),
    "transposed linear": (lambda: normal(40, 13), 1),
    "norm": (lambda: normal(37), 0),
    "one element": (lambda: normal(1), None),
    "0-dim": (lambda: normal(), None),
    "empty": (lambda: normal(0, 3), None),
    "empty channels": (lambda: normal(4, 0), 0),
    "no channels": (lambda: normal(0, 3), 0),
    "empty of channels": (lambda: normal(0, 3), 1),
    "tensor scale": (lambda: normal(33, 7, 3, 3), None),
    "long, tensor scale": (lambda: normal(5003), None),
    "channels-last": (lambda: normal(6, 8, 3, 3).to(memory_format=torch.channels_last), 0),
    "transposed channels-last": (lambda: normal(6, 8, 3, 3).to(memory_format=torch.channels_last), 1),
    "transposed in memory": (lambda: normal(20, 30).t(), 0),
    "columns of a larger one": (lambda: normal(10, 60)[:, 3:50], 0),
    "every other": (lambda: normal(80)[::2], None),
    "expanded": (lambda: normal(1, 16).expand(12, 16), 0),
    "misaligned": (lambda: normal(16 * 36 + 1)[1:].view(16, 36), 0),
}
FEW = {name: LAYERS[name] for name in ("conv 3x3", "depthwise", "linear", "transposed conv", "every other", "empty")}


@dataclass
class Network:
    """The lists that the operators take."""

    weights: list[torch.Tensor]
    scales: list[torch.Tensor]
    codebooks: list[torch.Tensor]
    counts: list[torch.Tensor]
    totals: list[torch.Tensor]
    rates: torch.Tensor

    @property
    def layers(self):
        lists = (self.weights, self.scales, self.codebooks, self.counts, self.totals)
        return list(zip(*lists, self.rates, strict=True))

    def step(self, call, pace: float = 1.0, snap: bool = False, quantized: list[torch.Tensor] | None = None) -> Network:
        """The network after a step; this one stays as it is, but for its weights."""
        new = copy.deepcopy(self)
        new.weights = self.weights
        arguments = [getattr(new, field.name) for field in fields(new)]
        assert call("foreach_codebook_step_", *arguments, pace, [snap] * len(new.weights), quantized or []) is None
        return new

    def quantize(self, call) -> list[torch.Tensor]:
        return call("foreach_codebook_quantize", self.weights, self.scales, self.codebooks)

    def results(self) -> list[torch.Tensor]:
        return [*self.scales, *self.codebooks, *self.counts, *self.totals]


def scale_for(w: torch.Tensor, axis: int | None, seed: int = 0) -> torch.Tensor:
    shape = [size if d == axis else 1 for d, size in enumerate(w.shape)]
    return normal(*shape, seed=seed + 1).abs() * 0.3 + 0.5


def network(weights: dict[str, tuple], levels: list[int], dtypes: list[torch.dtype]) -> Network:
    """Layers with codebooks of these lengths, taken in turn, near those that fit."""
    made = Network([], [], [], [], [], torch.linspace(0.05, 0.9, len(weights)))
    for i, (make, axis) in enumerate(weights.values()):
        w = make()
        dense = w.to(dtypes[i % len(dtypes)])  # keeps strides where they are dense
        w = torch.as_strided(dense, w.shape, w.stride()) if dense.stride() == w.stride() else dense
        k = levels[i % len(levels)]
        codebook = normal(k, seed=i + 2).sort().values
        count = normal(k, seed=i + 3).abs() * 20 + 1
        for values, value in zip(
            (made.weights, made.scales, made.codebooks, made.counts, made.totals),
            (w, scale_for(w, axis, i), codebook, count, count * codebook),
            strict=True,
        ):
            values.append(value)
    return made


def assert_quantized(net: Network, actual: list[torch.Tensor], assert_identical) -> None:
    assert len(actual) == len(net.weights)
    for (w, scale, codebook, *_), w_q in zip(net.layers, actual, strict=True):
        expected = oracle.scaled_lookup(oracle.exact(w), scale.numpy(), codebook.numpy())
        assert_identical(w_q, torch.empty_like(w).copy_(torch.from_numpy(np.asarray(expected))))


def assert_stepped(net: Network, new: Network, assert_sum, pace: float = 1.0) -> None:
    for i, (before, after) in enumerate(zip(net.layers, new.layers, strict=True)):
        w, *state, rate = before
        rate = float(np.float32(rate.item()) * np.float32(pace))
        expected = oracle.codebook_step(oracle.exact(w), *(tensor.numpy() for tensor in state), rate)
        for name, actual in zip(("scale", "codebook", "count", "total"), after[1:5], strict=True):
            try:
                assert_sum(actual, getattr(expected, name))
            except AssertionError as error:
                raise AssertionError(
                    f"{name} of layer {i}, {tuple(w.shape)}, {len(state[1])} levels: {error}"
                ) from None
        assert (after[2].diff() >= 0).all()


def one_layer(weights: torch.Tensor, codebook: torch.Tensor, count: torch.Tensor, rate: float = 0.5) -> Network:
    scale = torch.ones([1] * weights.dim())
    return Network([weights], [scale], [codebook], [count], [count * codebook], f32(rate))


# ---- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [[4, 8, 16, 255], [7, 256, 3, 15]], ids=str)
def test_every_shape_at_once(call, assert_identical, assert_sum, dtype, levels):
    net = network(LAYERS, levels, [dtype])
    before = [w.clone() for w in net.weights]
    assert_quantized(net, net.quantize(call), assert_identical)
    assert_stepped(net, net.step(call), assert_sum)
    for w, copied in zip(net.weights, before, strict=True):
        assert torch.equal(w, copied)


@pytest.mark.parametrize("levels", LEVELS)
def test_every_number_of_levels(call, assert_identical, assert_sum, levels):
    chosen = {name: LAYERS[name] for name in ("conv 3x3", "linear", "tensor scale", "norm")}
    net = network(chosen, [levels], [torch.float32])
    assert_quantized(net, net.quantize(call), assert_identical)
    assert_stepped(net, net.step(call), assert_sum)


def test_dtypes_mixed_in_one_call(call, assert_identical, assert_sum):
    net = network(LAYERS, [4, 8, 16, 255], [torch.float32, torch.bfloat16, torch.float16])
    assert_quantized(net, net.quantize(call), assert_identical)
    assert_stepped(net, net.step(call), assert_sum)


def test_many_items_a_layer(call, assert_identical, assert_sum):
    net = network({"a": (lambda: normal(300, 130), 0), "b": (lambda: normal(70001), None)}, [8, 256], [torch.float32])
    assert_quantized(net, net.quantize(call), assert_identical)
    assert_stepped(net, net.step(call), assert_sum)


@pytest.mark.parametrize("levels", [3, 8, 15, 17, 256])
def test_weights_at_the_thresholds(call, assert_identical, dtype, levels):
    codebook = normal(levels, seed=levels).sort().values
    edges = torch.cat([codebook, reference.decision_thresholds(codebook), f32(0.0, -0.0, 6e4, -6e4, INF, -INF, NAN)])
    near = torch.cat([edges, edges.nextafter(f32(INF)), edges.nextafter(f32(-INF))]).to(dtype)
    net = one_layer(near, codebook, torch.ones(levels))
    assert_quantized(net, net.quantize(call), assert_identical)
    expected = codebook[
        oracle.codebook_codes(oracle.exact(near), oracle.decision_thresholds(codebook.numpy())).astype(int)
    ]
    assert_identical(net.quantize(call)[0], torch.where(near.isnan(), NAN, expected.to(dtype)))


def test_ties_go_to_the_lower_level(call):
    codebook = torch.arange(-8.0, 8.0)
    net = one_layer(reference.decision_thresholds(codebook), codebook, torch.ones(16))
    assert net.quantize(call)[0].tolist() == list(range(-8, 7))
    assert net.step(call).counts[0].tolist() == [1.0] * 15 + [0.5]


@pytest.mark.parametrize("levels", [4, 16, 256])
def test_nan_counts_nowhere_and_holds_its_scale(call, assert_identical, assert_sum, levels):
    w = normal(6, 40)
    w[2, 7] = w[4, 39] = NAN
    net = network({"a": (lambda: w, 0)}, [levels], [torch.float32])
    assert_quantized(net, net.quantize(call), assert_identical)
    new = net.step(call)
    assert_stepped(net, new, assert_sum)
    ratio = (new.scales[0] / net.scales[0]).flatten()  # of those held that of the units of the levels
    assert torch.isclose(ratio, ratio[2], rtol=1e-6, atol=0).tolist() == [False, False, True, False, True, False]


def test_scale_that_does_not_fit_is_kept(call, assert_sum):
    # the codewords of these weights are all zero, or of the other sign; a channel of NaN is always kept
    w = torch.stack([torch.full((9,), value) for value in (0.1, -0.1, 2.0, NAN)])
    net = network({"a": (lambda: w, 0)}, [3], [torch.float32])
    net.scales, net.codebooks, net.rates = [torch.ones(4, 1)], [f32(-1.0, 0.0, 1.0)], f32(0.5)
    scales = net.step(call).scales[0].flatten()
    assert (scales / scales[3]).tolist() == [1.0, 1.0, 1.5, 1.0]
    net.codebooks = [f32(0.5, 1.0, 3.0)]
    new = net.step(call)
    assert_stepped(net, new, assert_sum)
    scales = new.scales[0].flatten()
    assert scales[1] == scales[3] != scales[0]


# ---- the update --------------------------------------------------------------------------------------


def test_step_by_hand(call):
    net = one_layer(f32(-1.0, -3.0, 1.0, 1.0), f32(-1.0, 1.0), f32(2.0, 6.0), rate=0.5)
    new = net.step(call)
    assert new.counts[0].tolist() == [2.0, 4.0]
    assert new.totals[0].tolist() == [-3.0, 4.0]
    assert new.codebooks[0].tolist() == pytest.approx([-1.5, 1.0], rel=2e-5)


CROWD = {
    # codebook, index of the crowded level, of the dead one
    "dead before, revived right": (f32(-3.0, -2.0, 0.0, 1.0, 5.0), 3, 0),
    "dead before, revived left": (f32(-3.0, -2.0, -1.5, 1.0, 1.5), 3, 1),
    "dead after, revived right": (f32(-3.0, -2.5, 0.0, 4.0, 5.0), 1, 4),
    "dead after, revived left": (f32(-3.0, -1.0, 0.0, 4.0, 5.0), 1, 3),
    "dead next to it, on the right": (f32(-3.0, -1.0, 2.0, 4.0, 5.0), 1, 2),
    "dead next to it, on the left": (f32(-3.0, -1.0, 0.0, 4.0, 5.0), 1, 0),
    "crowded at the start": (f32(-3.0, -1.0, 0.0, 4.0, 5.0), 0, 3),
    "crowded at the end": (f32(-3.0, -1.0, 0.0, 4.0, 5.0), 4, 2),
}


@pytest.mark.parametrize("more", [0, 20], ids=["few levels", "many levels"])
@pytest.mark.parametrize("case", CROWD)
def test_dead_level_is_revived(call, assert_sum, case, more):
    codebook, donor, dead = CROWD[case]
    count = torch.full((5 + more,), 10.0)
    count[donor], count[dead] = 400.0, 0.0
    codebook = torch.cat([codebook, 6.0 + torch.arange(more)])
    rest = [k for k in range(len(codebook)) if k not in (donor, dead)]
    net = one_layer(torch.cat([codebook[donor].repeat(300), codebook[rest]]), codebook, count, rate=0.25)
    new = net.step(call)
    assert_stepped(net, new, assert_sum)
    assert (new.counts[0] > 1.0).all()
    assert new.codebooks[0].unique().numel() == len(codebook)


def test_outliers_keep_their_level(call, assert_sum):
    w = torch.cat([f32(-1.0, 1.0).repeat(3000), f32(40.0)])
    net = one_layer(w, f32(-1.0, 1.0, 40.0), f32(3000.0, 3000.0, 1.0), rate=0.25)
    new = net.step(call)
    assert_stepped(net, new, assert_sum)
    assert new.codebooks[0].tolist() == pytest.approx([-1.0, 1.0, 40.0], rel=0.05)


@pytest.mark.parametrize("channels", [False, True])
def test_a_rate_of_zero_changes_nothing(call, assert_identical, channels):
    codebook, donor, dead = CROWD["dead before, revived right"]
    count = torch.full((5,), 10.0)
    count[donor], count[dead] = 400.0, 0.0
    net = one_layer(codebook[donor].repeat(300).view(3, 100), codebook, count, rate=0.25)
    net.totals[0] *= 1.3  # levels on their way
    net.weights[0][1, 5] = INF
    if channels:
        net.scales = [f32(0.5, 1.0, 2.0).view(3, 1)]
    for a, b in zip(net.step(call, pace=0.0).results(), net.results(), strict=True):
        assert_identical(a, b)


@pytest.mark.parametrize("levels", [2, 4, 16, 40, 256])
def test_largest_level_stays_and_scales_follow(call, assert_sum, levels):
    """Tails beyond reach would have the scales grow and the levels shrink at every step."""
    w = normal(9, 128) * normal(9, 128, seed=1).abs()
    codebook = w.flatten().sort().values[:: 9 * 128 // levels][:levels].contiguous() / 2
    count = torch.full((levels,), 9 * 128 / levels)
    net = Network([w], [torch.full((9, 1), 2.0)], [codebook], [count], [count * codebook], f32(0.5))
    for _ in range(4):
        new = net.step(call)
        assert_stepped(net, new, assert_sum)
        net = new
    assert net.codebooks[0].abs().max() == codebook.abs().max()


def test_largest_level_of_a_grid_keeps_the_grid(call):
    """127 steps, rounded up by one unit in the last place, would be 64 steps of twice the size from then on."""
    for seed in range(8):
        w, codebook = normal(8, 36, seed=seed), reference.snap_codebook(torch.linspace(-127, 127, 8) / 128)
        scale = w.abs().amax(1, keepdim=True) / codebook[-1]
        count, _ = reference.codebook_statistics(w / scale, reference.decision_thresholds(codebook))
        net = Network([w], [scale], [codebook], [count.float()], [count * codebook], f32(0.01))
        for _ in range(4):
            net = net.step(call, snap=True)
        assert (net.codebooks[0].abs().max() * 128).item() == 127.0


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_weights_that_stand_still_leave_scales_where_they_are(bits):
    """As far as 88,000 steps at a hundredth lead."""
    w = normal(16, 100) * normal(16, 100, seed=1).abs()
    quantizer = WeightQuantizer(w, WeightConfig(bits=bits, scale="channel"))
    state = [[getattr(quantizer, name).clone()] for name in ("scale", "codebook", "ema_count", "ema_total")]
    for steps in (400, 4000):
        for _ in range(steps):
            torch.ops.adq.foreach_codebook_step_([w], *state, f32(0.2), 1.0, [False], [])
        scale, peak = state[0][0].mean().item(), state[1][0].abs().max().item()
        assert scale == pytest.approx(quantizer.scale.mean().item(), rel=0.2)
        assert peak == pytest.approx(quantizer.codebook.abs().max().item(), rel=1e-3)


def test_weights_that_vanish_leave_scales_to_divide_by(call):
    net = one_layer(torch.zeros(2, 50), f32(1.0), f32(100.0), rate=0.9)  # a level that no weight holds where it is
    net.scales = [torch.full((2, 1), 1e-28)]
    for _ in range(5):
        net = net.step(call)
    assert (net.scales[0] >= 1e-30).all()
    assert net.quantize(call)[0].abs().max() < 1e-27


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [2, 4, 8, 16, 40, 256])
def test_channel_that_outgrew_its_scale_leaves_the_levels_to_the_others(call, assert_sum, levels, dtype):
    w = normal(9, 128)
    w[3] *= 1e5
    codebook = normal(9 * 128).sort().values[:: 9 * 128 // levels][:levels].contiguous()
    count = torch.full((levels,), 9 * 128 / levels)
    net = Network([w.to(dtype)], [torch.ones(9, 1)], [codebook], [count], [count * codebook], f32(0.01))
    new = net.step(call)
    assert_stepped(net, new, assert_sum)
    assert new.codebooks[0].abs().max() < 1.1 * codebook.abs().max()
    assert new.scales[0][3] > 100.0  # its scale follows


def test_donor_of_few_weights_gives_none_away(call):
    net = one_layer(f32(1.0), f32(-1.0, 1.0), f32(0.0, 1.0), rate=0.5)
    assert net.step(call).counts[0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("levels", [5, 40])
def test_equal_levels(call, assert_identical, assert_sum, levels):
    codebook = torch.cat([f32(-1.0), torch.zeros(levels - 2), f32(1.0)])
    net = one_layer(normal(500), codebook, torch.full((levels,), 10.0))
    assert_quantized(net, net.quantize(call), assert_identical)
    assert_stepped(net, net.step(call), assert_sum)


@pytest.mark.parametrize("levels", [1, 3, 16, 255])
def test_snapped_levels(call, assert_identical, levels):
    net = network({name: LAYERS[name] for name in ("linear", "tensor scale", "depthwise")}, [levels], [torch.float32])
    plain, snapped = net.step(call), net.step(call, snap=True)
    for before, after in zip(plain.codebooks, snapped.codebooks, strict=True):
        assert torch.equal(after, torch.from_numpy(oracle.snapped(before.numpy())))
    for name in ("scales", "counts", "totals"):
        for before, after in zip(getattr(plain, name), getattr(snapped, name), strict=True):
            assert_identical(after, before)


@pytest.mark.parametrize(
    ("codebook", "expected"),
    [
        (f32(0.0, 0.0), f32(0.0, 0.0)),
        (f32(-127.0, 0.5, 1.5, 2.5, 127.0), f32(-127.0, 0.0, 2.0, 2.0, 127.0)),
        (f32(-128.0, 3.0, 5.0, 128.0), f32(-128.0, 4.0, 4.0, 128.0)),
        (f32(-0.25, 0.49609375), f32(-0.25, 0.49609375)),
        (f32(0.0, 2.0**-126), f32(0.0, 2.0**-126)),
    ],
    ids=str,
)
def test_snap_by_hand(call, codebook, expected):
    count = torch.ones(len(codebook))
    net = one_layer(torch.zeros(0), codebook, count, rate=0.0)
    assert net.step(call, snap=True).codebooks[0].tolist() == expected.tolist()


def test_snap_of_some_layers(call):
    net = network({"a": (lambda: normal(50), None), "b": (lambda: normal(60), None)}, [7], [torch.float32])
    both, none = net.step(call, snap=True), net.step(call)
    some = copy.deepcopy(net)
    call("foreach_codebook_step_", *(getattr(some, field.name) for field in fields(some)), 1.0, [False, True], [])
    assert torch.equal(some.codebooks[0], none.codebooks[0])
    assert torch.equal(some.codebooks[1], both.codebooks[1])


def test_rate_zero_changes_no_statistics(call, assert_identical):
    net = network(FEW, [4, 255], [torch.float32])
    net.rates.zero_()
    new = net.step(call)
    for name in ("scales", "counts", "totals"):
        for before, after in zip(getattr(net, name), getattr(new, name), strict=True):
            assert_identical(after, before)
    for before, after in zip(net.codebooks, new.codebooks, strict=True):
        assert after.tolist() == pytest.approx(before.tolist(), rel=1e-6)


def test_pace_multiplies_the_rates(call, assert_identical, assert_sum):
    net = network(FEW, [8, 17], [torch.float32])
    slow = net.step(call, pace=0.25)
    assert_stepped(net, slow, assert_sum, pace=0.25)
    net.rates *= 0.25
    for a, b in zip(slow.results(), net.step(call).results(), strict=True):
        assert_identical(a, b)


def test_no_layers(call):
    assert call("foreach_codebook_quantize", [], [], []) == []
    assert call("foreach_codebook_step_", [], [], [], [], [], torch.zeros(0), 1.0, [], []) is None


# ---- the quantized weights of a step, determinism ----------------------------------------------------


@pytest.mark.parametrize("snap", [False, True])
def test_quantized_weights_are_those_of_the_new_state(call, assert_identical, snap):
    net = network(LAYERS, [4, 8, 16, 255, 3], [torch.float32, torch.bfloat16, torch.float16])
    quantized = [torch.empty_like(w) for w in net.weights]
    new, without = net.step(call, snap=snap, quantized=quantized), net.step(call, snap=snap)
    for w_q, expected in zip(quantized, new.quantize(call), strict=True):
        assert_identical(w_q, expected)
    for a, b in zip(new.results(), without.results(), strict=True):
        assert_identical(a, b)


def test_same_bits_from_run_to_run_and_for_any_number_of_threads(backend, call, assert_identical):
    if backend.__name__.endswith("cuda") and backend.INTERPRETED:
        pytest.skip("Triton's interpreter runs one program after the other, in the same order every time")
    net = network(FEW | {"long": (lambda: normal(200, 333), 0)}, [4, 255, 8, 16, 3], [torch.float32])
    threads = torch.get_num_threads()
    first = None
    for number in (threads, threads, 1, 2, 7) if backend.__name__.endswith("cpu") else (threads, threads):
        torch.set_num_threads(number)
        quantized = [torch.empty_like(w) for w in net.weights]
        results = [*net.step(call, quantized=quantized).results(), *quantized, *net.quantize(call)]
        first = first or results
        for a, b in zip(first, results, strict=True):
            assert_identical(a, b)
    torch.set_num_threads(threads)


def test_version_counters_see_the_step(backend):
    if backend.__name__.endswith("cuda") and backend.INTERPRETED is False:
        pytest.skip("takes tensors of the GPU")
    net = network({"a": (lambda: normal(6, 20), 0)}, [4], [torch.float32])
    before = [tensor._version for tensor in net.results()]
    arguments = [getattr(net, field.name) for field in fields(net)]
    backend.foreach_codebook_step_(*arguments, 1.0, [False], [])
    assert all(tensor._version > old for tensor, old in zip(net.results(), before, strict=True))


# ---- launches and tables of the Triton kernels -------------------------------------------------------


@pytest.fixture
def cuda():
    """The launchers, where Triton's interpreter runs them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("adq.backends.cuda")
    if not module.INTERPRETED:
        pytest.skip("takes tensors of the CPU")
    return module


@pytest.fixture
def on_cuda(cuda):
    return lambda operator, *args: getattr(cuda, operator)(*args)


def test_launches(cuda, on_cuda, monkeypatch):
    launched = []
    launch = cuda._launch
    monkeypatch.setattr(
        cuda, "_launch", lambda kernel, *args, **kw: launched.append(kernel) or launch(kernel, *args, **kw)
    )
    for dtypes in ([torch.float32], [torch.float32, torch.bfloat16]):
        net = network(FEW, [4, 8, 16, 255], dtypes)
        launched.clear()
        net.quantize(on_cuda)
        assert len(launched) == len(dtypes)
        launched.clear()
        net.step(on_cuda)
        net.step(on_cuda, quantized=[torch.empty_like(w) for w in net.weights])
        assert len(launched) == 2 * 2 * len(dtypes)


def test_tables_are_kept_for_the_same_tensors(cuda, on_cuda, monkeypatch):
    layers = importlib.import_module("adq.backends.layers")
    net = network({"a": (lambda: normal(6, 20), 0), "b": (lambda: normal(9, 3).t(), 0)}, [4, 17], [torch.float32])
    arguments = [*(getattr(net, field.name) for field in fields(net)), 1.0, [False, True], []]
    cuda.foreach_codebook_step_(*arguments)
    net.quantize(on_cuda)
    monkeypatch.setattr(layers, "_make", None)
    cuda.foreach_codebook_step_(*arguments)
    net.quantize(on_cuda)
    with pytest.raises(TypeError, match="not callable"):
        cuda.foreach_codebook_step_(*arguments[:-2], [True, True], [])


def test_tables_are_few_and_hold_no_tensor(cuda, on_cuda, monkeypatch):
    layers = importlib.import_module("adq.backends.layers")
    monkeypatch.setattr(layers, "_TABLES", {})
    monkeypatch.setattr(layers, "MOST_TABLES", 3)
    nets = [network({"a": (lambda: normal(4, 5), 0)}, [4], [torch.float32]) for _ in range(5)]
    nets[0].quantize(on_cuda)
    (first,) = layers._TABLES
    for net in nets[1:]:
        net.quantize(on_cuda)
        nets[0].quantize(on_cuda)  # what is used stays
    assert len(layers._TABLES) == 3 and first in layers._TABLES
    seen = [weakref.ref(tensor) for net in nets for tensor in (*net.weights, *net.codebooks)]
    del nets, net
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def halves(w: torch.Tensor) -> torch.Tensor:
    return w.copy_(w.bfloat16()).view(torch.bfloat16).view(-1)[:120].view(6, 20)


@pytest.mark.parametrize("change", [lambda w: w.view(20, 6).t(), lambda w: w[:, :10], halves])
def test_tables_are_not_taken_for_another_tensor_at_the_same_address(on_cuda, assert_identical, change):
    net = network({"a": (lambda: normal(6, 20), 0)}, [4], [torch.float32])
    w = net.weights[0]
    net.quantize(on_cuda)
    w.data = change(w.data)
    expected = reference.foreach_codebook_quantize(net.weights, net.scales, net.codebooks)
    assert_identical(net.quantize(on_cuda)[0], expected[0])


def test_the_memory_of_a_table_is_held_for_the_stream_that_reads_it(cuda, monkeypatch):
    layers = importlib.import_module("adq.backends.layers")
    streams, captured = [], {}
    found = (SimpleNamespace(data=SimpleNamespace(record_stream=streams.append)),)
    monkeypatch.setattr(torch.cuda, "current_stream", str)
    monkeypatch.setattr(layers, "_CAPTURED", captured)
    for capturing in (False, True):
        monkeypatch.setattr(layers, "is_capturing", lambda device, now=capturing: now)
        layers._hold(found, torch.device("cuda", 0))
    assert streams == ["cuda:0"] and list(captured.values()) == [found]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graph_replays_a_step():
    gpu = importlib.import_module("adq.backends.cuda")
    net = network(LAYERS, [4, 8, 16, 255], [torch.float32])
    lists = [[t.cuda() for t in getattr(net, field.name)] for field in fields(net)][:5]
    arguments = [*lists, net.rates.cuda(), 1.0, [False] * len(net.weights), []]
    gpu.foreach_codebook_step_(*arguments)
    start = [[t.clone() for t in values] for values in lists]
    gpu.foreach_codebook_step_(*arguments)
    expected = [[t.clone() for t in values] for values in lists]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.foreach_codebook_step_(*arguments)
    for values, begin in zip(lists, start, strict=True):
        for tensor, value in zip(values, begin, strict=True):
            tensor.copy_(value)
    graph.replay()
    for values, results in zip(lists, expected, strict=True):
        for tensor, value in zip(values, results, strict=True):
            assert torch.equal(tensor, value)


# ---- the operators in torch: opcheck, bad arguments --------------------------------------------------


def arguments_of(operator: str, **changes) -> dict:
    net = network({"a": (lambda: normal(4, 6), 0), "b": (lambda: normal(5), None)}, [3, 4], [torch.float32])
    arguments = {name: getattr(net, name) for name in ("weights", "scales", "codebooks")}
    if operator == "foreach_codebook_step_":
        arguments |= {"counts": net.counts, "totals": net.totals, "rates": net.rates}
        arguments |= {"pace": 0.5, "snap": [False, True], "quantized": []}
    return arguments | changes


def test_opcheck():
    quantize, step = (getattr(torch.ops.adq, name).default for name in ops.SCHEMAS if name.startswith("foreach"))
    torch.library.opcheck(quantize, tuple(arguments_of("foreach_codebook_quantize").values()))
    torch.library.opcheck(step, tuple(arguments_of("foreach_codebook_step_").values()))
    arguments = arguments_of("foreach_codebook_step_")
    quantized = [torch.zeros_like(w) for w in arguments["weights"]]
    torch.library.opcheck(step, (*list(arguments.values())[:-1], quantized))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"scales": [torch.ones(4, 1)]}, ValueError, "2 weights, but 1 scales"),
        ({"scales": [torch.ones(4), torch.ones(1)]}, ValueError, r"the scale of a weight \(4, 6\) must be"),
        ({"scales": [torch.ones(4, 6), torch.ones(1)]}, ValueError, r"at most one, got torch.float32 \(4, 6\)"),
        ({"scales": [torch.ones(4, 1).half(), torch.ones(1)]}, ValueError, "got torch.float16"),
        (
            {"weights": [torch.zeros(4, 6).double(), torch.zeros(5)]},
            TypeError,
            r"weights\[0\] must be float32, bfloat16",
        ),
        ({"codebooks": [f32(0.0, 1.0, 2.0), torch.zeros(300)]}, ValueError, r"codebooks\[1\] must be .* got 300"),
        (
            {"codebooks": [torch.zeros(3), f32(0.0).half()]},
            TypeError,
            r"codebooks\[1\] must be a one-dimensional float32",
        ),
        ({"codebooks": [torch.zeros(3), torch.zeros(4, device="meta")]}, ValueError, r"codebooks\[1\] is on meta"),
    ],
)
@pytest.mark.parametrize("operator", ["foreach_codebook_quantize", "foreach_codebook_step_"])
def test_bad_arguments(backend, operator, change, error, message):
    with pytest.raises(error, match=message):
        getattr(backend, operator)(*arguments_of(operator, **change).values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": [torch.ones(3), torch.ones(3)]}, ValueError, r"counts\[1\] must be contiguous, .* got 3 for 4"),
        ({"totals": [torch.ones(3), torch.ones(8)[::2]]}, ValueError, r"totals\[1\] must be contiguous"),
        ({"rates": torch.ones(3)}, ValueError, "2 weights, but 3 rates and 2 of snap"),
        ({"rates": torch.ones(2).double()}, TypeError, "rates must be a one-dimensional float32"),
        ({"snap": [True]}, ValueError, "2 rates and 1 of snap"),
        ({"quantized": [torch.zeros(4, 6)]}, ValueError, "must be empty or hold a tensor a weight, got 1"),
        (
            {"quantized": [torch.zeros(6, 4).t(), torch.zeros(5)]},
            ValueError,
            r"quantized\[0\] must be like weights\[0\]",
        ),
    ],
)
def test_bad_arguments_of_a_step(backend, change, error, message):
    with pytest.raises(error, match=message):
        backend.foreach_codebook_step_(*arguments_of("foreach_codebook_step_", **change).values())


def test_results_are_changed_in_place_one_by_one(cuda, on_cuda):
    layers = {name: (lambda: normal(4, 5), 0) for name in "abc"}
    one, other, _ = network(layers, [4] * 3, [torch.float32] * 3).quantize(on_cuda)
    before = other.clone(), other._version
    one.mul_(2)
    assert torch.equal(other, before[0]) and other._version == before[1]
    assert not one._is_view()

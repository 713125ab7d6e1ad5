"""Every operator on every backend against the oracle, the reference and tables written out by hand."""

from __future__ import annotations

import functools
import math

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Activation
from tensors import f32, normal, u8
from torch._subclasses.fake_tensor import FakeTensorMode

from adq import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAN, INF = math.nan, math.inf
LEVELS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 32, 33, 64, 127, 255, 256)
STEPS = (1, 3, 7, 15, 31, 63, 255)
PROPERTY = settings(max_examples=25, deadline=None, derandomize=True)


def around(values: torch.Tensor) -> torch.Tensor:
    """The values and their neighbours on both sides."""
    up, down = torch.tensor(INF), torch.tensor(-INF)
    return torch.cat([values, values.nextafter(up), values.nextafter(down)])


# ---- codebook lookup and statistics ------------------------------------------------------------------


@functools.cache
def codebook_of(levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    codebook = normal(levels, seed=levels).sort().values
    return codebook, reference.decision_thresholds(codebook)


@functools.cache
def weights_for(levels: int, dtype: torch.dtype) -> torch.Tensor:
    """Random weights, every threshold and every codeword with their neighbours, zeros of both signs, extremes."""
    codebook, thresholds = codebook_of(levels)
    return torch.cat(
        [normal(2003, seed=1), around(codebook), around(thresholds), f32(0.0, -0.0, 6e4, -6e4, 1e-7, -1e-7)]
    ).to(dtype)


@pytest.mark.parametrize("levels", LEVELS)
def test_decision_thresholds(levels):
    codebook, thresholds = codebook_of(levels)
    assert np.array_equal(thresholds.numpy(), oracle.decision_thresholds(codebook.numpy()))


@pytest.mark.parametrize("levels", LEVELS)
def test_lookup(call, assert_identical, dtype, levels):
    (codebook, thresholds), w = codebook_of(levels), weights_for(levels, dtype)
    w_q, codes = call("codebook_lookup", w, codebook, thresholds, True)
    expected_w_q, expected_codes = oracle.codebook_lookup(oracle.exact(w), codebook.numpy(), thresholds.numpy())
    assert_identical(codes, torch.from_numpy(expected_codes))
    assert_identical(w_q, torch.from_numpy(expected_w_q).to(dtype))


@pytest.mark.parametrize("levels", LEVELS)
def test_statistics(call, assert_sum, dtype, levels):
    (_, thresholds), w = codebook_of(levels), weights_for(levels, dtype)
    count, total = call("codebook_statistics", w, thresholds)
    expected_count, expected_total = oracle.codebook_statistics(oracle.exact(w), thresholds.numpy())
    assert count.dtype == torch.int64
    assert count.tolist() == expected_count.tolist()
    assert total.dtype == torch.float32
    assert_sum(total, expected_total)


@pytest.mark.parametrize(("levels", "codes"), [(k, True) for k in LEVELS] + [(k, False) for k in (4, 16, 17)])
def test_fused_lookup_equals_separate(call, assert_identical, dtype, levels, codes):
    (codebook, thresholds), w = codebook_of(levels), weights_for(levels, dtype)
    fused = call("codebook_lookup_statistics", w, codebook, thresholds, codes)
    separate = *call("codebook_lookup", w, codebook, thresholds, codes), *call("codebook_statistics", w, thresholds)
    for actual, expected in zip(fused, separate, strict=True):
        assert_identical(actual, expected)


def test_codebook_layouts(call, assert_identical, assert_sum, dtype, layout):
    codebook, thresholds = codebook_of(7)
    w = layout(lambda *shape: normal(*shape).to(dtype))
    before = w.clone()
    w_q, codes, count, total = call("codebook_lookup_statistics", w, codebook, thresholds, True)
    expected_w_q, expected_codes = oracle.codebook_lookup(oracle.exact(w), codebook.numpy(), thresholds.numpy())
    like = torch.empty_like(w)
    assert_identical(w_q, like.copy_(torch.from_numpy(expected_w_q)))
    assert_identical(codes, torch.empty_like(w, dtype=torch.uint8).copy_(torch.from_numpy(expected_codes)))
    expected_count, expected_total = oracle.codebook_statistics(oracle.exact(w), thresholds.numpy())
    assert count.tolist() == expected_count.tolist()
    assert_sum(total, expected_total)
    assert torch.equal(w, before)


def test_lookup_without_codes(call, assert_identical, dtype):
    (codebook, thresholds), w = codebook_of(7), weights_for(7, dtype)
    w_q, codes = call("codebook_lookup", w, codebook, thresholds, False)
    assert_identical(codes, u8())
    assert_identical(w_q, call("codebook_lookup", w, codebook, thresholds, True)[0])


def test_lookup_table_by_hand(call, assert_identical, dtype):
    codebook, thresholds = f32(-1.0, 0.0, 0.5, 2.0), f32(-0.5, 0.25, 1.25)
    w = f32(-INF, -3.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.375, 1.25, 1.5, 9.0, INF, NAN).to(dtype)
    w_q, codes, count, total = call("codebook_lookup_statistics", w, codebook, thresholds, True)
    assert codes.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 0]
    assert_identical(w_q, f32(-1.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.5, 0.5, 2.0, 2.0, 2.0, NAN).to(dtype))
    assert count.tolist() == [4, 3, 2, 3]
    assert total.tolist() == [-INF, 0.0, 1.625, INF]


def test_ties_go_to_the_lower_codeword(call, dtype):
    codebook = torch.arange(-8, 8, dtype=torch.float32)
    thresholds = reference.decision_thresholds(codebook)
    _, codes = call("codebook_lookup", thresholds.to(dtype), codebook, thresholds, True)
    assert codes.tolist() == list(range(15))


def test_equal_codewords(call, dtype):
    codebook = f32(-1.0, 0.0, 0.0, 0.0, 1.0)
    w = f32(-0.75, -0.25, 0.0, 0.25, 0.75).to(dtype)
    w_q, codes, count, total = call(
        "codebook_lookup_statistics", w, codebook, reference.decision_thresholds(codebook), True
    )
    assert codes.tolist() == [0, 1, 1, 3, 4]
    assert w_q.tolist() == [-1.0, 0.0, 0.0, 0.0, 1.0]
    assert count.tolist() == [1, 2, 0, 1, 1]
    assert total.tolist() == [-0.75, -0.25, 0.0, 0.25, 0.75]


def test_subnormal_numbers(call, assert_identical, dtype):
    tiny = 2.0**-24 if dtype == torch.float16 else 2.0**-130
    w = f32(-tiny, -0.0, 0.0, tiny).to(dtype)
    codebook, thresholds = f32(-3 * tiny, tiny, 2 * tiny), f32(-tiny, 0.0)
    w_q, codes, count, total = call("codebook_lookup_statistics", w, codebook, thresholds, True)
    assert codes.tolist() == [0, 1, 1, 2]
    assert_identical(w_q, f32(-3 * tiny, tiny, tiny, 2 * tiny).to(dtype))
    assert count.tolist() == [1, 2, 1]
    assert total.tolist() == [-tiny, 0.0, tiny]


def test_all_nan(call, dtype):
    codebook, thresholds = codebook_of(4)
    w_q, codes, count, total = call(
        "codebook_lookup_statistics", torch.full((129,), NAN, dtype=dtype), codebook, thresholds, True
    )
    assert w_q.isnan().all()
    assert codes.tolist() == [0] * 129
    assert count.tolist() == [0, 0, 0, 0]
    assert total.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_nan_in_one_level(call):
    w_q, codes, count, total = call("codebook_lookup_statistics", f32(NAN, 1.0, -2.0), f32(0.5), f32(), True)
    assert w_q[0].isnan()
    assert w_q[1:].tolist() == [0.5, 0.5]
    assert codes.tolist() == [0, 0, 0]
    assert (count.tolist(), total.tolist()) == ([2], [-1.0])


def large_size(backend) -> int:
    """Enough elements for several partial sums; Triton's interpreter and the reference are slow."""
    return 300_007 if backend.__name__ == "adq.backends.cpu" else 20_011


@pytest.fixture
def in_every_run(backend):
    """Call again, and where there are threads, with any number of them; Triton's interpreter runs one program after
    the other, in the same order every time."""

    def run(function):
        for number in numbers:
            torch.set_num_threads(number)
            yield function()

    threads = torch.get_num_threads()
    interpreted = backend.__name__ == "adq.backends.cuda" and backend.INTERPRETED
    numbers = (1, 2, 3) if backend.__name__ == "adq.backends.cpu" else () if interpreted else (threads,)
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize("levels", [4, 16, 64])
def test_statistics_have_the_same_bits_in_every_run(backend, call, in_every_run, assert_identical, assert_sum, levels):
    (_, thresholds), w = codebook_of(levels), normal(large_size(backend))
    count, total = call("codebook_statistics", w, thresholds)
    expected_count, expected_total = oracle.codebook_statistics(w.numpy(), thresholds.numpy())
    assert count.tolist() == expected_count.tolist()
    assert_sum(total, expected_total)
    for again in in_every_run(lambda: call("codebook_statistics", w, thresholds)):
        assert_identical(again[0], count)
        assert_identical(again[1], total)


@pytest.mark.parametrize("levels", [1, 4, 16, 64, 256])
def test_total_of_equal_weights(backend, call, assert_sum, levels):
    """Equal addends round the same way every time, so only short chains of float32 additions stay accurate."""
    (_, thresholds), w = codebook_of(levels), torch.full((large_size(backend),), 0.7123)
    _, total = call("codebook_statistics", w, thresholds)
    assert_sum(total, oracle.codebook_statistics(w.numpy(), thresholds.numpy())[1])


def test_counts_beyond_16_bits(call):
    """More equal weights in one cell than any 16-bit or 8-bit counter holds."""
    count, total = call("codebook_statistics", torch.ones(70_001, dtype=torch.bfloat16), f32(0.0))
    assert count.tolist() == [0, 70_001]
    assert total.tolist() == [0.0, 70_001.0]


# ---- activation quantizer ----------------------------------------------------------------------------


def _parameters(start, interval, in_scale, out_scale, offset, steps) -> Activation:
    return Activation(f32(start), interval, f32(in_scale), f32(out_scale), f32(offset), steps)


def _random_intervals(steps: int) -> torch.Tensor:
    return (normal(steps, seed=steps).abs() + 0.25) * (1.5 / steps)


def _clamped_intervals(steps: int) -> torch.Tensor:
    interval = _random_intervals(steps)
    small = f32(1e-3, -0.25, 0.0, 9e-4, 1.5e-3)  # the last one is not clamped
    interval[::2] = small.repeat(len(interval))[: len(interval[::2])]
    return interval


def _dyadic_intervals(steps: int) -> torch.Tensor:
    return (torch.arange(steps) % 3 + 1) / 64.0


ACTIVATIONS = {
    "plain": lambda n: _parameters(-0.4, _random_intervals(n), 1.0, 0.8, 0.0, n),
    "offset": lambda n: _parameters(-1.1, _random_intervals(n), 1.3, 0.8, 0.7, n),
    "clamped": lambda n: _parameters(-0.3, _clamped_intervals(n), 0.7, 1.2, 0.25, n),
    "negative": lambda n: _parameters(-0.6, _random_intervals(n), -0.9, -1.3, 0.5, n),
    "ties": lambda n: _parameters(-1.0, _dyadic_intervals(n), 1.0, 1.0, 1.0, n),
    "uniform": lambda n: _parameters(-0.9, f32(2.3 / n), 1.1, 0.9, 0.3, n),
    "uniform-ties": lambda n: _parameters(-1.0, f32(1 / 32), 1.0, 1.0, 1.0, n),
    "uniform-clamped": lambda n: _parameters(-0.1, f32(-0.5), 0.8, 0.9, 0.0, n),
}


@functools.cache
def activation_case(kind: str, steps: int, dtype: torch.dtype) -> tuple[Activation, torch.Tensor, torch.Tensor]:
    """Parameters, inputs (random ones, and ones on and beside every edge and segment bound) and gradients."""
    act = ACTIVATIONS[kind](steps)
    marks = torch.from_numpy(np.concatenate([act.segments(), act.edges()]))
    if act.uniform:
        marks = act.start + (torch.arange(2 * steps + 1) / 2) * float(act.widths()[0])
    x = torch.cat([1.5 * normal(1499, seed=2), around(marks / act.in_scale), f32(0.0, -0.0, 100.0, -100.0)]).to(dtype)
    return act, x, normal(len(x), seed=3).to(dtype)


@functools.cache
def expected_gradients(kind: str, steps: int, dtype: torch.dtype):
    act, x, grad = activation_case(kind, steps, dtype)
    closed_form = oracle.threshold_gradients(oracle.exact(grad), oracle.exact(x), act)
    return closed_form, oracle.surrogate_gradients(grad, x, act)


every_activation = pytest.mark.parametrize("kind", ACTIVATIONS)
every_step_count = pytest.mark.parametrize("steps", STEPS)
GRADIENTS = ("x", "start", "interval", "in_scale", "out_scale")


@every_step_count
@every_activation
def test_threshold_quantize(call, assert_identical, dtype, kind, steps):
    act, x, _ = activation_case(kind, steps, dtype)
    y = call("threshold_quantize", x, *act.arguments)
    assert_identical(y, torch.from_numpy(oracle.threshold_quantize(oracle.exact(x), act)).to(dtype))


@every_step_count
@every_activation
def test_threshold_gradients(call, assert_sum, dtype, kind, steps):
    act, x, grad = activation_case(kind, steps, dtype)
    gradients = call("threshold_quantize_backward", grad, x, *act.arguments)
    closed_form, surrogate = expected_gradients(kind, steps, dtype)
    for name, actual in zip(GRADIENTS, gradients, strict=True):
        assert actual.dtype == (dtype if name == "x" else torch.float32)
        assert_sum(actual, closed_form[name])
        assert_sum(actual, oracle.Sum(surrogate[name], closed_form[name].magnitude))


@every_step_count
@every_activation
def test_the_two_gradient_oracles_agree(kind, steps):
    closed_form, surrogate = expected_gradients(kind, steps, torch.float32)
    for name in GRADIENTS:
        error = np.abs(surrogate[name] - closed_form[name].value)
        assert (error <= 1e-12 * closed_form[name].magnitude).all(), name


@every_step_count
@pytest.mark.parametrize("kind", ["clamped", "uniform-clamped"])
def test_clamped_intervals_have_no_gradient(call, kind, steps):
    act, x, grad = activation_case(kind, steps, torch.float32)
    _, _, d_interval, _, _ = call("threshold_quantize_backward", grad, x, *act.arguments)
    clamped = act.interval <= 1e-3
    assert clamped.any()
    assert (d_interval[clamped] == 0).all()
    assert (d_interval[~clamped] != 0).all()


@pytest.mark.parametrize("kind", ["offset", "uniform"])
def test_threshold_layouts(call, assert_identical, assert_sum, dtype, layout, kind):
    act = ACTIVATIONS[kind](7)
    x = layout(lambda *shape: normal(*shape).to(dtype))
    before = x.clone()
    y = call("threshold_quantize", x, *act.arguments)
    expected = torch.from_numpy(oracle.threshold_quantize(oracle.exact(x), act))
    assert_identical(y, torch.empty_like(x).copy_(expected))

    for grad in (
        layout(lambda *shape: normal(*shape, seed=1).to(dtype)),
        normal(*x.shape, seed=1).to(dtype),
        torch.ones((), dtype=dtype).expand(x.shape),
    ):
        gradients = call("threshold_quantize_backward", grad, x, *act.arguments)
        closed_form = oracle.threshold_gradients(oracle.exact(grad), oracle.exact(x), act)
        for name, actual in zip(GRADIENTS, gradients, strict=True):
            assert_sum(actual, closed_form[name])
        assert gradients[0].stride() == torch.empty_like(x).stride()
    assert torch.equal(x, before)


def test_threshold_table_by_hand(call, assert_identical, dtype):
    """T = -1, -0.5, 0.5, 1.5, 2; edges -0.75, 0, 1, 1.75; D = 0.5; u = x / 2."""
    act = _parameters(-1.0, f32(0.5, 1.0, 1.0, 0.5), 0.5, 2.0, 1.0, 4)
    x = f32(-INF, -1.75, -1.5, -1.25, 0.0, 0.25, 2.0, 2.25, 3.5, 3.75, INF, NAN).to(dtype)
    y = call("threshold_quantize", x, *act.arguments)
    expected = f32(-2.0, -2.0, -2.0, -1.0, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, NAN)
    assert_identical(y, expected.to(dtype))


def test_uniform_table_by_hand(call, assert_identical, dtype):
    """Edges 0.25, 0.75, 1.25, 1.75; D = 0.5."""
    act = _parameters(0.0, f32(0.5), 1.0, 2.0, 0.0, 4)
    x = f32(-INF, -1.0, 0.25, 0.375, 0.75, 1.0, 1.25, 1.5, 1.75, 1.875, INF, NAN).to(dtype)
    y = call("threshold_quantize", x, *act.arguments)
    assert_identical(y, f32(0.0, 0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0, 4.0, NAN).to(dtype))


def test_gradient_table_by_hand(call, dtype):
    """T = 0, 0.5, 1.5; D = 1, slopes 2 and 1; the first, a middle and the last input lie outside every segment."""
    act = _parameters(0.0, f32(0.5, 1.0), 1.0, 2.0, 0.0, 2)
    x = f32(-1.0, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0).to(dtype)
    grad = f32(1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0).to(dtype)
    d_x, d_start, d_interval, d_in_scale, d_out_scale = call("threshold_quantize_backward", grad, x, *act.arguments)
    assert d_x.tolist() == [0.0, 0.0, 4.0, 4.0, 2.0, 4.0, 0.0]
    # G = 4, 6; H = 2 * 0.25 + 2 * 0.5, 2 * 0.5 + 4 * 1
    assert d_start.tolist() == [-(2.0 * 4.0 + 1.0 * 6.0)]
    assert d_interval.tolist() == [-(4.0 * 1.5) - 6.0, -5.0]
    assert d_in_scale.tolist() == [2.0 * (2.0 * 0.25 + 2.0 * 0.5) + 2.0 * 1.0 + 4.0 * 1.5]
    # edges 0.25 and 1: levels 0 0 0 1 1 2 2
    assert d_out_scale.tolist() == [1.0 + 1.0 + 2.0 * 2.0 + 2.0]


def test_uniform_gradient_table_by_hand(call, dtype):
    """One segment from 0 to 4 with slope 2 / 4."""
    act = _parameters(0.0, f32(1.0), 1.0, 1.0, 0.0, 4)
    x, grad = f32(-1.0, 0.0, 1.0, 3.5, 4.0, 5.0).to(dtype), f32(1.0, 1.0, 1.0, 2.0, 1.0, 1.0).to(dtype)
    d_x, d_start, d_interval, d_in_scale, d_out_scale = call("threshold_quantize_backward", grad, x, *act.arguments)
    assert d_x.tolist() == [0.0, 0.0, 0.5, 1.0, 0.5, 0.0]
    assert d_start.tolist() == [-2.0]
    assert d_interval.tolist() == [-0.5 / 4 * (1.0 + 2.0 * 3.5 + 4.0) * 4]
    assert d_in_scale.tolist() == [0.5 * (1.0 + 2.0 * 3.5 + 4.0)]
    # levels 0 0 1 3 4 4 (edges 0.5, 1.5, 2.5, 3.5)
    assert d_out_scale.tolist() == [0.5 * (1.0 + 2.0 * 3.0 + 4.0 + 4.0)]


@pytest.mark.parametrize("kind", ["offset", "uniform"])
def test_gradients_ignore_nan_and_saturate_at_infinity(call, assert_sum, dtype, kind):
    act = ACTIVATIONS[kind](7)
    x, grad = torch.cat([normal(64), f32(NAN, INF, -INF)]).to(dtype), normal(67, seed=1).to(dtype)
    gradients = call("threshold_quantize_backward", grad, x, *act.arguments)
    closed_form = oracle.threshold_gradients(oracle.exact(grad), oracle.exact(x), act)
    for name, actual in zip(GRADIENTS, gradients, strict=True):
        assert_sum(actual, closed_form[name])
    assert gradients[0][64:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("kind", "steps"), [("offset", 1), ("offset", 15), ("offset", 255), ("uniform", 255)])
def test_gradients_of_equal_addends(backend, call, assert_sum, kind, steps):
    act, size = ACTIVATIONS[kind](steps), large_size(backend)
    x, grad = normal(size), torch.full((size,), 0.7123)
    gradients = call("threshold_quantize_backward", grad, x, *act.arguments)
    closed_form = oracle.threshold_gradients(grad.numpy(), x.numpy(), act)
    for name, actual in zip(GRADIENTS, gradients, strict=True):
        assert_sum(actual, closed_form[name])


@pytest.mark.parametrize(("kind", "steps"), [("offset", 3), ("offset", 15), ("offset", 63), ("uniform", 255)])
def test_gradients_have_the_same_bits_in_every_run(
    backend, call, in_every_run, assert_identical, assert_sum, kind, steps
):
    act = ACTIVATIONS[kind](steps)
    x, grad = normal(large_size(backend)), normal(large_size(backend), seed=1)
    gradients = call("threshold_quantize_backward", grad, x, *act.arguments)
    closed_form = oracle.threshold_gradients(grad.numpy(), x.numpy(), act)
    for name, actual in zip(GRADIENTS, gradients, strict=True):
        assert_sum(actual, closed_form[name])
    for again in in_every_run(lambda: call("threshold_quantize_backward", grad, x, *act.arguments)):
        for actual, expected in zip(again, gradients, strict=True):
            assert_identical(actual, expected)


# ---- bit packing -------------------------------------------------------------------------------------

BITS = range(1, 9)
LENGTHS = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 1023, 4099)


def random_codes(numel: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


@pytest.mark.parametrize("bits", BITS)
def test_pack_and_unpack(call, assert_identical, bits):
    for numel in LENGTHS:
        codes = random_codes(numel, bits)
        packed = call("pack_bits", codes, bits)
        assert_identical(packed, u8(*oracle.pack_bits(codes.tolist(), bits)))
        unpacked = call("unpack_bits", packed, bits, numel)
        assert unpacked.tolist() == oracle.unpack_bits(bytes(packed.tolist()), bits, numel)
        assert_identical(unpacked, codes)


def test_packed_bits_by_hand(call):
    assert call("pack_bits", u8(1, 0, 1, 1, 0, 0, 0, 1, 1), 1).tolist() == [0b10001101, 0b1]
    assert call("pack_bits", u8(1, 2, 3, 0, 2), 2).tolist() == [0b00111001, 0b10]
    assert call("pack_bits", u8(1, 2, 7, 5), 3).tolist() == [0b11010001, 0b1011]
    assert call("pack_bits", u8(0xA, 0x3, 0xF), 4).tolist() == [0x3A, 0x0F]
    assert call("pack_bits", u8(7, 255), 8).tolist() == [7, 255]


@pytest.mark.parametrize("bits", BITS)
def test_pack_keeps_the_low_bits(call, bits):
    codes = random_codes(1001, 8)
    assert call("pack_bits", codes, bits).tolist() == list(oracle.pack_bits(codes.tolist(), bits))


@pytest.mark.parametrize("bits", BITS)
def test_unpack_ignores_the_padding(call, bits):
    packed = u8(*[255] * ops.packed_size(11, bits))
    assert call("unpack_bits", packed, bits, 11).tolist() == [2**bits - 1] * 11


def test_pack_takes_codes_in_row_major_order(call, layout):
    codes = layout(lambda *shape: random_codes(math.prod(shape), 3).reshape(shape))
    assert call("pack_bits", codes, 3).tolist() == list(oracle.pack_bits(codes.flatten().tolist(), 3))


def test_unpack_takes_strided_bytes(call):
    packed = random_codes(75, 8)[::2]
    assert call("unpack_bits", packed, 3, 101).tolist() == oracle.unpack_bits(bytes(packed.tolist()), 3, 101)


# ---- decoding ----------------------------------------------------------------------------------------

WEIGHTS = {  # shape, axis of the scales
    "one": ((1,), None),
    "0-dim": ((), None),
    "empty": ((3, 0, 5), 0),
    "primes": ((7, 31, 13), None),
    "rows": ((5, 16, 3, 3), 0),
    "odd rows": ((37, 53), 0),
    "short rows": ((401, 1, 3), 0),
    "transposed": ((6, 11, 2, 2), 1),
    "columns": ((29, 17), 1),
    "large": ((3, 1361), 0),
}


def decode_arguments(shape, axis: int | None, bits: int, levels: int) -> list:
    """Random codes, those without a level among them, and scales of both signs and zero."""
    codes = random_codes(math.prod(shape), bits)
    scale = normal(*[n if d == axis else 1 for d, n in enumerate(shape)], seed=1)
    if scale.numel() > 2:
        scale.view(-1)[1] = 0.0
    return [reference.pack_bits(codes, bits), normal(levels, seed=levels), scale, bits, list(shape)]


def decoded(packed, codebook, scale, bits, shape) -> torch.Tensor:
    found = oracle.codebook_decode(bytes(packed.tolist()), codebook.numpy(), scale.numpy(), bits, shape)
    return torch.empty(shape).copy_(torch.from_numpy(np.asarray(found, np.float32)))


@pytest.mark.parametrize("bits", BITS)
def test_decode(call, assert_identical, bits):
    for shape, axis in WEIGHTS.values():
        for levels in {2**bits, 2**bits - 1, 2 ** (bits - 1), 1}:
            if levels:
                arguments = decode_arguments(shape, axis, bits, levels)
                assert_identical(call("codebook_decode", *arguments), decoded(*arguments))


def test_decode_by_hand(call):
    packed, codebook = u8(0b10001101, 0b1), f32(-2.0, 0.5, 3.0)  # codes 1, 3, 0, 2, 1; there is no level 3
    assert call("codebook_decode", packed, codebook, f32(2.0), 2, [5]).tolist() == [1.0, 6.0, -4.0, 6.0, 1.0]
    packed = u8(0b100011, 0b1)  # codes 3, 0, 2, 0, 1
    scale = f32(1.0, -2.0, 0.0, 0.5, 4.0).view(5, 1)
    assert call("codebook_decode", packed, f32(1.0, 2.0, 3.0, 4.0), scale, 2, [5, 1]).flatten().tolist() == [
        *(4.0, -2.0, 0.0, 0.5, 8.0),
    ]


@pytest.mark.parametrize("bits", BITS)
def test_decode_reads_no_further_than_the_table(call, bits):
    """The level after the last one is NaN, and so is the one before the first."""
    levels = max(1, 2**bits - 2)
    table = torch.full((levels + 2,), NAN)
    table[1:-1] = 1.0
    packed = u8(*[255] * ops.packed_size(1003, bits))
    assert (call("codebook_decode", packed, table[1:-1], f32(3.0), bits, [1003]) == 3.0).all()


def test_decode_takes_strided_and_misaligned_tensors(call, assert_identical):
    for bits in (3, 4, 8):
        packed, codebook, scale, _, shape = decode_arguments((25, 40), 0, bits, 2**bits)
        expected = call("codebook_decode", packed, codebook, scale, bits, shape)
        for bytes_ in (torch.stack([packed, packed], 1)[:, 0], torch.cat([packed[:1], packed])[1:]):
            assert_identical(
                call("codebook_decode", bytes_, torch.stack([codebook] * 2, 1)[:, 0], scale, bits, shape), expected
            )


# ---- properties --------------------------------------------------------------------------------------

finite = st.floats(-(2.0**100), 2.0**100, width=32)
few_bits = st.integers(-128, 128).map(lambda i: i / 16)  # exact in every dtype, and so are the midpoints
distinct_codebooks = st.lists(few_bits, min_size=1, max_size=40, unique=True).map(lambda c: f32(*sorted(c)))
any_codebook = st.lists(finite, min_size=1, max_size=256).map(lambda c: f32(*sorted(c)))
some_weights = st.lists(finite | few_bits, max_size=80).map(lambda w: f32(*w))
with_nan = st.lists(finite | st.just(NAN) | st.sampled_from([INF, -INF]), max_size=80).map(lambda w: f32(*w))


@PROPERTY
@given(w=some_weights, codebook=distinct_codebooks)
def test_quantizing_twice_changes_nothing(call, w, codebook):
    thresholds = reference.decision_thresholds(codebook)
    w_q, codes = call("codebook_lookup", w, codebook, thresholds, True)
    again, codes_again = call("codebook_lookup", w_q, codebook, thresholds, True)
    assert torch.equal(again, w_q)
    assert torch.equal(codes_again, codes)


@PROPERTY
@given(w=some_weights, codebook=any_codebook)
def test_codes_rise_with_the_weight(call, w, codebook):
    _, codes = call("codebook_lookup", w.sort().values, codebook, reference.decision_thresholds(codebook), True)
    assert codes.tolist() == sorted(codes.tolist())


@PROPERTY
@given(w=some_weights, codebook=any_codebook)
def test_output_is_the_codeword_of_its_code(call, w, codebook):
    w_q, codes = call("codebook_lookup", w, codebook, reference.decision_thresholds(codebook), True)
    assert torch.equal(w_q, codebook[codes.long()])


@PROPERTY
@given(w=some_weights, codebook=distinct_codebooks)
def test_no_codeword_is_nearer(call, w, codebook):
    w_q, _ = call("codebook_lookup", w, codebook, reference.decision_thresholds(codebook), False)
    distance = (w.double()[:, None] - codebook.double()).abs()
    assert ((w.double() - w_q.double()).abs() == distance.amin(1)).all()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the sum of both infinities
@PROPERTY
@given(w=with_nan, codebook=any_codebook)
def test_counts_add_up(call, w, codebook):
    thresholds = reference.decision_thresholds(codebook)
    _, codes, count, _ = call("codebook_lookup_statistics", w, codebook, thresholds, True)
    assert count.sum() == (~w.isnan()).sum()
    assert torch.equal(count, codes[~w.isnan()].long().bincount(minlength=codebook.numel()))


@PROPERTY
@given(x=some_weights, interval=st.lists(st.floats(-1, 4, width=32), min_size=1, max_size=31), offset=few_bits)
def test_levels_rise_with_the_input(call, x, interval, offset):
    act = _parameters(-1.0, f32(*interval), 1.0, 1.0, offset, len(interval))
    y = call("threshold_quantize", x.sort().values, *act.arguments)
    assert y.tolist() == sorted(y.tolist())
    levels = 2.0 / len(interval) * torch.arange(len(interval) + 1) - offset
    assert torch.isin(y, levels).all()


@PROPERTY
@given(data=st.data(), bits=st.sampled_from(BITS))
def test_unpacking_inverts_packing(call, data, bits):
    codes = u8(*data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=80)))
    packed = call("pack_bits", codes, bits)
    assert packed.tolist() == list(oracle.pack_bits(codes.tolist(), bits))
    assert torch.equal(call("unpack_bits", packed, bits, codes.numel()), codes)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@PROPERTY
@given(data=st.data(), bits=st.sampled_from(BITS))
def test_decoding_takes_the_level_of_each_code(call, data, bits):
    codes = u8(*data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=80)))
    codebook = f32(*data.draw(st.lists(finite, min_size=1, max_size=2**bits)))
    scale = f32(data.draw(finite))
    w_q = call("codebook_decode", reference.pack_bits(codes, bits), codebook, scale, bits, [codes.numel()])
    assert torch.equal(w_q, codebook[codes.int().clamp_max(codebook.numel() - 1)] * scale)


# ---- the operators in torch: fakes, opcheck, bad arguments -------------------------------------------

CODEBOOK, THRESHOLDS = f32(-1.0, 0.0, 1.0), f32(-0.5, 0.5)
ACTIVATION = {
    "start": f32(0.0),
    "interval": f32(0.5, 0.5, 0.5),
    "in_scale": f32(1.0),
    "out_scale": f32(1.0),
    "offset": f32(0.0),
    "steps": 3,
}
VALID = {
    "codebook_lookup": {"w": normal(5), "codebook": CODEBOOK, "thresholds": THRESHOLDS, "codes": True},
    "codebook_statistics": {"w": normal(5), "thresholds": THRESHOLDS},
    "codebook_lookup_statistics": {"w": normal(5), "codebook": CODEBOOK, "thresholds": THRESHOLDS, "codes": True},
    "threshold_quantize": {"x": normal(5), **ACTIVATION},
    "threshold_quantize_backward": {"grad": normal(5), "x": normal(5), **ACTIVATION},
    "pack_bits": {"codes": u8(1, 2, 3), "bits": 2},
    "unpack_bits": {"packed": u8(0b111001), "bits": 2, "numel": 3},
    "codebook_decode": {
        "packed": u8(0b100100),
        "codebook": CODEBOOK,
        "scale": f32(1.0, 2.0, 3.0).view(3, 1),
        "bits": 2,
        "shape": [3, 1],
    },
}
every_operator = pytest.mark.parametrize("operator", VALID)


def test_memory_is_poisoned():
    assert torch.empty_like(normal(9)).isnan().all()
    assert torch.empty(9, dtype=torch.uint8).tolist() == [255] * 9


def test_every_operator_is_covered():  # those of many layers by test_foreach.py
    elsewhere = {"integer_conv2d", "threshold_levels", "codebook_linear"}  # test_integer.py, test_linear.py
    assert VALID.keys() | elsewhere == {name for name in ops.SCHEMAS if not name.startswith("foreach")}


def torch_operator(name: str):
    return getattr(torch.ops.adq, name).default


def with_layout(operator: str, layout, dtype: torch.dtype) -> list:
    """Valid arguments of an operator, with its data in the given layout."""

    def data(name):
        if name == "codes":
            return layout(lambda *shape: random_codes(math.prod(shape), 2).reshape(shape))
        return layout(lambda *shape: normal(*shape).to(dtype))

    layout_of = {"w", "x", "grad"} | ({"codes"} if operator == "pack_bits" else set())
    return [data(name) if name in layout_of else value for name, value in VALID[operator].items()]


CODES_SWITCH = [("codebook_lookup", {"codes": False}), ("codebook_lookup_statistics", {"codes": False})]
ONE_INTERVAL = [(name, {"interval": f32(0.5)}) for name in ("threshold_quantize", "threshold_quantize_backward")]


@pytest.mark.parametrize(("operator", "changes"), [(name, {}) for name in VALID] + CODES_SWITCH + ONE_INTERVAL)
def test_opcheck(operator, changes):
    torch.library.opcheck(torch_operator(operator), tuple({**VALID[operator], **changes}.values()))


@every_operator
@pytest.mark.parametrize("shape", ["channels-last", "transposed", "empty-3d", "0-dim"])
def test_opcheck_layouts(operator, shape, layouts):
    arguments = with_layout(operator, layouts[shape], torch.bfloat16)
    torch.library.opcheck(torch_operator(operator), tuple(arguments))


def in_mode(mode: FakeTensorMode, arguments) -> list:
    return [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments]


def described(result) -> list[tuple]:
    tensors = [result] if isinstance(result, torch.Tensor) else result
    return [(tensor.dtype, tensor.shape, tensor.stride()) for tensor in tensors]


@every_operator
def test_fakes_have_the_shapes_and_strides_of_the_real_results(call, dtype, layout, operator):
    arguments = with_layout(operator, layout, dtype)
    real = described(call(operator, *arguments))
    with FakeTensorMode() as mode:
        assert described(torch_operator(operator)(*in_mode(mode, arguments))) == real


FLOAT64 = torch.zeros(5, dtype=torch.float64)
BAD_CODEBOOK = [
    ({"w": FLOAT64}, TypeError, "w must be float32, bfloat16 or float16, got torch.float64"),
    ({"w": torch.zeros(5, dtype=torch.int32)}, TypeError, "w must be float32, .* got torch.int32"),
    ({"thresholds": THRESHOLDS.double()}, TypeError, "thresholds must be a one-dimensional float32 .* torch.float64"),
    ({"thresholds": THRESHOLDS.bfloat16()}, TypeError, "thresholds must be a one-dimensional float32 .*bfloat16"),
    ({"thresholds": torch.zeros(1, 2)}, TypeError, r"thresholds must be a one-dimensional .* shape \(1, 2\)"),
    ({"thresholds": torch.zeros(256)}, ValueError, "at most 256 levels, got 257"),
]
BAD_LEVELS = [
    ({"codebook": CODEBOOK.half()}, TypeError, "codebook must be a one-dimensional float32 .*float16"),
    ({"codebook": f32(0.0, 1.0)}, ValueError, "2 levels need 1 thresholds, got 2"),
    ({"codebook": torch.zeros(300), "thresholds": torch.zeros(299)}, ValueError, "at most 256 levels, got 300"),
]
BAD_ACTIVATION = [
    ({"x": FLOAT64}, TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
    ({"start": f32(0.0).double()}, TypeError, "start must be a one-dimensional float32"),
    ({"in_scale": torch.tensor(1.0)}, TypeError, r"in_scale must be a one-dimensional float32 .* shape \(\)"),
    ({"out_scale": f32(1.0, 2.0)}, ValueError, "out_scale must hold one element, got 2"),
    ({"offset": f32()}, ValueError, "offset must hold one element, got 0"),
    ({"interval": f32(0.5, 0.5)}, ValueError, "3 steps need 3 intervals or one, got 2"),
    ({"interval": f32(0.5).half()}, TypeError, "interval must be a one-dimensional float32"),
    ({"steps": 0}, ValueError, "steps must be in 1..255, got 0"),
    ({"steps": 256}, ValueError, "steps must be in 1..255, got 256"),
    ({"steps": -1}, ValueError, "steps must be in 1..255, got -1"),
]
BAD_GRAD = [
    ({"grad": normal(5).bfloat16()}, TypeError, "grad is torch.bfloat16, but x is torch.float32"),
    ({"grad": normal(4)}, ValueError, r"grad \(4,\) on .* does not match x \(5,\)"),
    ({"grad": normal(5, 1)}, ValueError, r"grad \(5, 1\) on .* does not match x \(5,\)"),
]
BAD_BITS = [
    ({"bits": 0}, ValueError, "bits must be in 1..8, got 0"),
    ({"bits": 9}, ValueError, "bits must be in 1..8, got 9"),
]
BAD_PACKED = [
    ({"packed": torch.zeros(1)}, TypeError, "codes must be uint8, got torch.float32"),
    ({"packed": u8(1, 2)}, ValueError, r"3 codes of 2 bits take 1 bytes, got shape \(2,\)"),
    ({"packed": u8()}, ValueError, r"3 codes of 2 bits take 1 bytes, got shape \(0,\)"),
    ({"packed": u8(1).reshape(1, 1)}, ValueError, r"3 codes of 2 bits take 1 bytes, got shape \(1, 1\)"),
    ({"numel": -1}, ValueError, "numel must not be negative, got -1"),
]
BAD_CODES = [({"codes": torch.zeros(3, dtype=torch.int64)}, TypeError, "codes must be uint8, got torch.int64")]
BAD_DECODE = [
    ({"packed": torch.zeros(1)}, TypeError, "codes must be uint8, got torch.float32"),
    ({"packed": u8(1, 2)}, ValueError, r"3 codes of 2 bits take 1 bytes, got shape \(2,\)"),
    ({"shape": [-3, -1]}, ValueError, r"the shape must not be negative, got \(-3, -1\)"),
    ({"shape": [2**31, 2**31, 2**31]}, ValueError, "codes of 2 bits take .* bytes"),
    ({"codebook": CODEBOOK.half()}, TypeError, "codebook must be a one-dimensional float32 .*float16"),
    ({"codebook": f32()}, ValueError, r"codes of 2 bits need 1..4 levels, got 0"),
    ({"codebook": torch.zeros(5)}, ValueError, r"codes of 2 bits need 1..4 levels, got 5"),
    ({"scale": f32(1.0, 2.0).view(2, 1)}, ValueError, r"the scale of a weight \(3, 1\) must be contiguous float32"),
    ({"scale": torch.ones(3, 1).double()}, ValueError, "must be contiguous float32 .* got torch.float64"),
]
BAD = {
    "codebook_lookup": BAD_CODEBOOK + BAD_LEVELS,
    "codebook_statistics": BAD_CODEBOOK,
    "codebook_lookup_statistics": BAD_CODEBOOK + BAD_LEVELS,
    "threshold_quantize": BAD_ACTIVATION,
    "threshold_quantize_backward": BAD_ACTIVATION + BAD_GRAD,
    "pack_bits": BAD_BITS + BAD_CODES,
    "unpack_bits": BAD_BITS + BAD_PACKED,
    "codebook_decode": BAD_BITS + BAD_DECODE,
}
every_bad_argument = pytest.mark.parametrize(
    ("operator", "changes", "error", "message"),
    [pytest.param(operator, *case, id=f"{operator}-{i}") for operator in BAD for i, case in enumerate(BAD[operator])],
)


@every_bad_argument
def test_bad_arguments(call, operator, changes, error, message):
    with pytest.raises(error, match=message):
        call(operator, *{**VALID[operator], **changes}.values())


@every_bad_argument
def test_bad_arguments_through_torch(operator, changes, error, message):
    with pytest.raises(error, match=message):
        torch_operator(operator)(*{**VALID[operator], **changes}.values())


@every_bad_argument
def test_bad_arguments_of_fakes(operator, changes, error, message):
    with FakeTensorMode() as mode:
        fakes = in_mode(mode, {**VALID[operator], **changes}.values())
        with pytest.raises(error, match=message):
            torch_operator(operator)(*fakes)


@pytest.mark.parametrize("operator", ["codebook_lookup", "codebook_statistics"])
def test_tables_on_another_device(backend, operator):
    arguments = {**VALID[operator], "thresholds": THRESHOLDS.to("meta")}
    with pytest.raises(ValueError, match="thresholds is on meta, but the data is on cpu"):
        getattr(backend, operator)(*arguments.values())

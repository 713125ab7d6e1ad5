"""Integer convolution and threshold levels, C++ and Triton: bit for bit the reference, which meets an int64 oracle."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adq import layout, reference

cpu = pytest.importorskip("adq.backends.cpu", reason="the C++ kernels are not built")
_C = cpu._C


def make(
    outputs=20, inputs=8, kernel=(3, 3), groups=1, size=(7, 6), batch=2, values=8, residual=False, readers=(7,),
    stride=(1, 1), padding=(1, 1), dilation=(1, 1), zero=0, top=255, low=0.0, high=float("inf"), keep=True, seed=0,
):  # fmt: skip
    """Arguments of the operator; weights take ``values`` different values."""
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(np.arange(-128, 128))[:values]
    weight = torch.from_numpy(rng.choice(chosen, (outputs, inputs // groups, *kernel)).astype(np.int8))
    x = torch.from_numpy(rng.integers(0, top + 1, (batch, inputs, *size)).astype(np.uint8))
    blocks, table = layout.arrange(weight, groups)
    initial = torch.from_numpy(rng.integers(-5000, 5000, outputs).astype(np.int32))
    multiplier = torch.from_numpy((rng.standard_normal(outputs) / (200 * inputs)).astype(np.float32))
    bias = torch.from_numpy(rng.standard_normal(outputs).astype(np.float32))
    spans = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    added = torch.from_numpy(rng.standard_normal((batch, outputs, *spans)).astype(np.float32)) if residual else None
    quantizers = []
    for steps in readers:
        count = steps if steps <= 15 else 1
        quantizers += [
            torch.from_numpy(rng.uniform(-0.5, 0, 1).astype(np.float32)),
            torch.from_numpy(rng.uniform(0.01, 4 / steps, count).astype(np.float32)),
            torch.from_numpy(rng.uniform(0.5, 2, 1).astype(np.float32)),
        ]
    geometry = ([*kernel], [*stride], [*padding], [*dilation], groups, zero)
    head = (x, blocks, table, initial, multiplier, bias, added, low, high, quantizers, [*readers], keep)
    return (*head, *geometry), weight


@pytest.fixture(params=_C.available_isas())
def isa(request):
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def assert_same(actual, expected):
    tensors = (actual[0], *actual[1]), (expected[0], *expected[1])
    for one, other in zip(*tensors, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        same = (one == other) | (one.isnan() & other.isnan())
        assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ"


CASES = {
    "plain": {},
    "stem": {"inputs": 3, "kernel": (7, 7), "stride": (2, 2), "padding": (3, 3), "size": (17, 19), "values": 200},
    "wide": {"outputs": 130, "inputs": 64, "size": (9, 9)},
    "pointwise": {"kernel": (1, 1), "padding": (0, 0), "outputs": 70, "inputs": 33, "values": 16},
    "groups": {"groups": 2, "outputs": 36, "inputs": 12, "values": 3},
    "depthwise": {"groups": 24, "outputs": 24, "inputs": 24},
    "depthwise-int8": {"groups": 37, "outputs": 37, "inputs": 37, "values": 250, "stride": (2, 1)},
    "padded more than the kernel": {"padding": (4, 3), "size": (3, 9), "batch": 3},
    "dilated, level 0 outside": {"dilation": (2, 3), "padding": (2, 3), "size": (9, 8)},
    "dilated": {"dilation": (2, 1), "padding": (2, 0), "zero": 5},
    "saturating": {"inputs": 64, "values": 1, "top": 255, "zero": 255},
    "residual": {"residual": True, "readers": (7, 3, 255, 1), "high": 1.0, "low": -1.0},
    "no result": {"keep": False},
    "no readers": {"readers": ()},
    "one image": {"kernel": (1, 1), "padding": (0, 0), "size": (1, 1), "batch": 1, "outputs": 200, "inputs": 100},
    "no images": {"batch": 0},
    "one bit": {"values": 2},
    "levels of two bits": {"inputs": 96, "outputs": 70, "values": 16, "top": 3, "residual": True},
    "levels of four bits": {"inputs": 70, "outputs": 33, "size": (9, 9), "values": 8, "top": 15},
    "levels of six bits": {"inputs": 64, "values": 200, "top": 63, "zero": 2, "dilation": (2, 1)},
    "small levels, a large one outside": {"inputs": 64, "values": 200, "top": 1, "zero": 255},
    "small levels, groups": {"groups": 2, "outputs": 36, "inputs": 12, "values": 3, "top": 7},
}


@pytest.mark.parametrize("case", CASES)
def test_every_instruction_set_equals_the_reference(isa, case):
    arguments, _ = make(**CASES[case])
    assert_same(cpu.integer_conv2d(*arguments), reference.integer_conv2d(*arguments))


@pytest.mark.parametrize("weight", [-128, -127, -1, 0, 1, 64, 127])
def test_sums_of_the_largest_products_of_every_level(isa, weight):
    """Where 16-bit sums hold some products they hold them exactly, up to the last one."""
    one, inputs = torch.ones(17), 132
    blocks, table = layout.arrange(torch.full((17, inputs, 1, 1), weight, dtype=torch.int8))
    tail = (None, -1e9, 1e9, [], [], True, [1, 1], [1, 1], [0, 0], [1, 1], 1, 0)
    for level in range(256):
        x = torch.full((1, inputs, 2, 2), level, dtype=torch.uint8)
        y, _ = cpu.integer_conv2d(x, blocks, table, torch.zeros(17, dtype=torch.int32), one, 0 * one, *tail)
        assert y.unique().tolist() == [inputs * level * weight]


@pytest.mark.parametrize("place", [0, 70_000, -1])
def test_one_large_level_among_many_small_ones(isa, place):
    arguments, _ = make(inputs=64, size=(32, 32), values=200, top=1)
    x = arguments[0].contiguous(memory_format=torch.channels_last)
    x.permute(0, 2, 3, 1).view(-1)[place] = 255
    assert_same(cpu.integer_conv2d(x, *arguments[1:]), reference.integer_conv2d(x, *arguments[1:]))


@pytest.mark.parametrize("case", CASES)
def test_torch_gives_the_same_result(poisoned_memory, case):
    arguments, _ = make(**CASES[case])
    through_torch, in_python = torch.ops.adq.integer_conv2d(*arguments), cpu.integer_conv2d(*arguments)
    assert_same(through_torch, in_python)
    assert [t.stride() for t in through_torch[1]] == [t.stride() for t in in_python[1]]


TRITON = pytest.mark.parametrize("backend", ["triton"], indirect=True)
TRITON_CASES = {
    **CASES,
    "several tiles": {"outputs": 150, "inputs": 70, "size": (9, 9), "batch": 3, "values": 16},
    "groups of several tiles": {"groups": 2, "outputs": 140, "inputs": 12, "values": 40, "residual": True},
    "depthwise, several tiles": {"groups": 70, "outputs": 70, "inputs": 70, "residual": True, "zero": 3},
}


@TRITON
@pytest.mark.parametrize("case", TRITON_CASES)
def test_the_triton_kernels_equal_the_reference(call, poisoned_memory, case):
    arguments, _ = make(**TRITON_CASES[case])
    assert_same(call("integer_conv2d", *arguments), reference.integer_conv2d(*arguments))


@pytest.mark.parametrize("backend", ["cpp", "triton"], indirect=True)
def test_residual_and_images_in_any_layout(call):
    arguments, _ = make(residual=True)
    x, residual = (arguments[i].transpose(2, 3).contiguous().transpose(2, 3) for i in (0, 6))
    result = call("integer_conv2d", x, *arguments[1:6], residual, *arguments[7:])
    assert_same(result, reference.integer_conv2d(*arguments))


@pytest.mark.parametrize("case", ["plain", "stem", "groups", "depthwise", "dilated", "saturating"])
def test_the_reference_meets_loops_over_integers(case):
    arguments, weight = make(**{"size": (5, 4), **{k: v for k, v in CASES[case].items() if k != "size"}})
    x, initial, multiplier, bias = arguments[0], *arguments[3:6]
    kernel, stride, padding, dilation, groups, zero = arguments[12:]
    y, _ = reference.integer_conv2d(*arguments)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), *((p, p) for p in padding)), constant_values=zero).astype(np.int64)
    total = np.zeros(y.shape, np.int64) + initial.numpy().reshape(-1, 1, 1)
    per_group = weight.shape[0] // groups, weight.shape[1]
    for o, i, a, b in itertools.product(range(weight.shape[0]), range(weight.shape[1]), *map(range, kernel)):
        channel = o // per_group[0] * per_group[1] + i
        rows = slice(a * dilation[0], a * dilation[0] + stride[0] * (y.shape[2] - 1) + 1, stride[0])
        columns = slice(b * dilation[1], b * dilation[1] + stride[1] * (y.shape[3] - 1) + 1, stride[1])
        total[:, o] += int(weight[o, i, a, b]) * padded[:, channel, rows, columns]
    scaled = total.astype(np.float32) * multiplier.numpy().reshape(-1, 1, 1) + bias.numpy().reshape(-1, 1, 1)
    assert np.array_equal(y.numpy(), np.maximum(scaled, np.float32(0)))


def test_by_hand():
    weight = torch.tensor([[1, -2, 3], [127, -128, 0]], dtype=torch.int8).reshape(2, 3, 1, 1)
    x = torch.tensor([[4, 5, 6], [255, 255, 0]], dtype=torch.uint8).reshape(2, 3, 1, 1)
    one = torch.ones(2)
    geometry = ([1, 1], [1, 1], [0, 0], [1, 1], 1, 0)
    tail = (None, -1e9, 1e9, [], [], True, *geometry)
    for function in (cpu.integer_conv2d, reference.integer_conv2d):
        y, _ = function(x, *layout.arrange(weight), torch.tensor([0, 10], dtype=torch.int32), one, 0 * one, *tail)
        assert y.flatten(1).tolist() == [[12.0, -122.0], [-255.0, -245.0]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    outputs=st.integers(1, 70), inputs=st.integers(1, 40), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.tuples(st.integers(3, 8), st.integers(3, 8)), values=st.sampled_from([1, 2, 3, 4, 7, 16, 17, 256]),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)), padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    residual=st.booleans(), readers=st.sampled_from([(), (1,), (15, 3), (255,), (31, 7)]),
    zero=st.just(0) | st.integers(0, 255), batch=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape(**arguments):
    args, _ = make(**arguments)
    assert_same(cpu.integer_conv2d(*args), reference.integer_conv2d(*args))


def test_threads_and_strides_do_not_matter():
    arguments, _ = make(outputs=130, inputs=32, size=(9, 8), residual=True)
    expected = reference.integer_conv2d(*arguments)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert_same(cpu.integer_conv2d(*arguments), expected)
    finally:
        torch.set_num_threads(before)
    last = arguments[0].to(memory_format=torch.channels_last)
    assert_same(cpu.integer_conv2d(last, *arguments[1:]), expected)


@pytest.mark.filterwarnings("error")
def test_weights_of_a_channels_last_model_lie_the_same_and_nothing_is_warned_of():
    weight = torch.randint(-4, 4, (20, 8, 3, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    expected, before = layout.arrange(weight), torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch warns of some things once a process
    try:
        found = layout.arrange(weight.to(memory_format=torch.channels_last))
    finally:
        torch.set_warn_always(before)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_nan_of_a_residual_stays_and_has_level_zero(call):
    arguments, _ = make(residual=True, readers=(7, 255))
    arguments[6][0, 3, 2, 1] = float("nan")
    y, levels = call("integer_conv2d", *arguments)
    assert y.isnan().sum() == 1
    assert [level[0, 3, 2, 1].item() for level in levels] == [0, 0]
    assert_same((y, levels), reference.integer_conv2d(*arguments))


def level_arguments(layout, dtype, steps, uniform):
    generator = torch.Generator().manual_seed(steps)

    def make_x(*shape):
        x = torch.randn(shape, generator=generator).to(dtype)
        return torch.where(torch.rand(shape, generator=generator) < 0.01, torch.nan, x)

    interval = torch.rand(1 if uniform else steps, generator=generator) * 4 / steps
    return layout(make_x), torch.tensor([-0.7]), interval, torch.tensor([1.1]), steps


@pytest.mark.parametrize("steps", [1, 3, 7, 15, 31, 255])
@pytest.mark.parametrize("uniform", [True, False])
def test_levels(isa, assert_identical, dtype, layout, steps, uniform):
    arguments = level_arguments(layout, dtype, steps, uniform)
    assert_identical(cpu.threshold_levels(*arguments), reference.threshold_levels(*arguments))


@TRITON
@pytest.mark.parametrize(
    ("steps", "uniform"), [(1, False), (7, False), (16, False), (31, False), (255, False), (15, True), (255, True)]
)
def test_levels_of_the_triton_kernel(call, assert_identical, dtype, layout, steps, uniform):
    arguments = level_arguments(layout, dtype, steps, uniform)
    assert_identical(call("threshold_levels", *arguments), reference.threshold_levels(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [({0: torch.zeros(2, 8, 7, 6)}, "x must be uint8"), ({17: 256}, "zero must be"), ({12: [3]}, "kernel must be two")],
)
def test_bad_arguments(change, message):
    arguments, _ = make()
    arguments = [change.get(i, value) for i, value in enumerate(arguments)]
    with pytest.raises((TypeError, ValueError), match=message):
        torch.ops.adq.integer_conv2d(*arguments)


def test_opcheck():
    torch.library.opcheck(torch.ops.adq.integer_conv2d, make(residual=True)[0])
    x = torch.randn(3, 5)
    torch.library.opcheck(torch.ops.adq.threshold_levels, (x, torch.zeros(1), torch.full((3,), 0.5), torch.ones(1), 3))

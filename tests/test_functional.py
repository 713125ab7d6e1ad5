"""The public differentiable functions against the oracle: values, gradients, memory, compilation."""

from __future__ import annotations

import math
import os
import shutil

import oracle
import pytest
import torch
from oracle import Activation
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import adq.backends
from adq import functional

GRADIENTS = ("x", "start", "interval", "in_scale", "out_scale")
CODEBOOK = torch.tensor([-1.25, -0.5, -0.1, 0.0, 0.2, 0.7, 1.5])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def activation(kind: str = "learned") -> Activation:
    intervals = {"learned": [0.2, 0.5, 1e-4, 0.3, 0.25, -0.1, 0.4], "uniform": [0.3]}[kind]
    one = {name: torch.tensor([value]) for name, value in SCALARS.items()}
    return Activation(interval=torch.tensor(intervals), steps=7, **one)


SCALARS = {"start": -0.9, "in_scale": 1.2, "out_scale": 0.7, "offset": 0.6}
every_kind = pytest.mark.parametrize("kind", ["learned", "uniform"])


def quantize(x: Tensor, act: Activation) -> Tensor:
    return functional.threshold_quantize(
        x, act.start, act.interval, act.in_scale, act.out_scale, offset=act.offset, steps=act.steps
    )


def leaves_of(act: Activation, shape: tuple[int, ...] = (1,), dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Trainable copies of the parameters; the scalars in the given shape."""
    scalars = {name: getattr(act, name).reshape(shape) for name in ("start", "in_scale", "out_scale")}
    return {name: t.to(dtype, copy=True).requires_grad_() for name, t in {**scalars, "interval": act.interval}.items()}


def quantize_with(x: Tensor, leaves: dict[str, Tensor], act: Activation) -> Tensor:
    return functional.threshold_quantize(x, **leaves, offset=act.offset, steps=act.steps)


@pytest.fixture
def assert_gradients(assert_sum):
    """``assert_gradients(x, leaves, grad, act)``: the .grad of all inputs against the published algorithm."""

    def check(x: Tensor, leaves: dict[str, Tensor], grad: Tensor, act: Activation) -> None:
        surrogate = oracle.surrogate_gradients(grad, x, act)
        closed_form = oracle.threshold_gradients(oracle.exact(grad), oracle.exact(x), act)
        for name, leaf in {**leaves, "x": x}.items():
            assert leaf.grad.dtype == leaf.dtype
            assert leaf.grad.shape == leaf.shape
            expected = oracle.Sum(surrogate[name], closed_form[name].magnitude)
            assert_sum(leaf.grad.reshape(surrogate[name].shape), expected)

    return check


# ---- codebook ----------------------------------------------------------------------------------------


def test_codebook_quantize(assert_identical, dtype, layout):
    w = layout(lambda *shape: normal(*shape, dtype=dtype))
    w_q, codes = functional.codebook_quantize(w, CODEBOOK)
    thresholds = oracle.decision_thresholds(CODEBOOK.numpy())
    expected, expected_codes = oracle.codebook_lookup(oracle.exact(w), CODEBOOK.numpy(), thresholds)
    assert_identical(w_q, torch.empty_like(w).copy_(torch.from_numpy(expected)))
    assert_identical(codes, torch.empty_like(w, dtype=torch.uint8).copy_(torch.from_numpy(expected_codes)))


def test_codebook_gradient_is_passed_straight_through(dtype, layout):
    w = layout(lambda *shape: normal(*shape, dtype=dtype)).detach().requires_grad_()
    grad = normal(*w.shape, seed=1, dtype=dtype)
    w_q, _ = functional.codebook_quantize(w, CODEBOOK)
    w_q.backward(grad)
    assert torch.equal(w.grad, grad)


def test_codebook_gradient_of_nan_weights():
    w = torch.tensor([math.nan, 1.0]).requires_grad_()
    functional.codebook_quantize(w, CODEBOOK)[0].backward(torch.tensor([3.0, 4.0]))
    assert w.grad.tolist() == [3.0, 4.0]


def test_only_the_weight_is_differentiable():
    w, codebook = normal(9).requires_grad_(), CODEBOOK.clone().requires_grad_()
    w_q, codes = functional.codebook_quantize(w, codebook)
    assert w_q.requires_grad
    assert not codes.requires_grad
    w_q.sum().backward()
    assert codebook.grad is None


def test_codebook_without_gradient():
    w_q, _ = functional.codebook_quantize(normal(9), CODEBOOK.clone().requires_grad_())
    assert not w_q.requires_grad


def test_codebook_second_derivative():
    """The derivative of the sum of w_q**2 is 2 w_q, whose straight-through derivative is 2."""
    w = normal(9).requires_grad_()
    (first,) = torch.autograd.grad(functional.codebook_quantize(w, CODEBOOK)[0].square().sum(), w, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), w)
    assert second.tolist() == [2.0] * 9


def test_codebook_statistics(assert_sum, dtype, layout):
    w = layout(lambda *shape: normal(*shape, dtype=dtype)).detach().requires_grad_()
    count, total = functional.codebook_statistics(w, CODEBOOK.clone().requires_grad_())
    expected = oracle.codebook_statistics(oracle.exact(w), oracle.decision_thresholds(CODEBOOK.numpy()))
    assert (count.dtype, total.dtype) == (torch.int64, torch.float32)
    assert count.tolist() == expected[0].tolist()
    assert_sum(total, expected[1])
    assert not total.requires_grad


def test_learned_lookup(assert_identical, assert_sum):
    w, codebook, grad = normal(1501).requires_grad_(), CODEBOOK.clone().requires_grad_(), normal(1501, seed=1)
    w_q = functional.learned_lookup(w, codebook)
    w_q.backward(grad)
    expected, codes = functional.codebook_quantize(w.detach(), CODEBOOK)
    assert_identical(w_q.detach(), expected)
    assert torch.equal(w.grad, grad)
    cells = torch.zeros(2, 7, dtype=torch.float64)
    cells.index_add_(1, codes.long(), torch.stack([grad, grad.abs()]).double())
    assert_sum(codebook.grad, oracle.Sum(*cells.numpy()))


codebook_functions = pytest.mark.parametrize("function", [functional.codebook_quantize, functional.codebook_statistics])


@codebook_functions
@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        (CODEBOOK.flip(0), ValueError, "ascending"),
        (torch.tensor([0.0, 1.0, 1.0, 0.99]), ValueError, "ascending"),
        (torch.zeros(257), ValueError, "at most 256 levels"),
        (torch.zeros(2, 2), TypeError, "must be a one-dimensional float32 tensor"),
        (CODEBOOK.double(), TypeError, "must be a one-dimensional float32 tensor, got torch.float64"),
        (CODEBOOK.bfloat16(), TypeError, "must be a one-dimensional float32 tensor, got torch.bfloat16"),
    ],
)
def test_bad_codebooks(function, codebook, error, message):
    with pytest.raises(error, match=message):
        function(normal(5), codebook)


@codebook_functions
def test_bad_weights(function):
    with pytest.raises(TypeError, match=r"w must be float32, bfloat16 or float16, got torch\.float64"):
        function(normal(5).double(), CODEBOOK)


def test_equal_levels_are_ascending():
    w_q, codes = functional.codebook_quantize(torch.tensor([-0.4, 0.4]), torch.tensor([-1.0, 0.0, 0.0, 1.0]))
    assert w_q.tolist() == [0.0, 0.0]
    assert codes.tolist() == [1, 2]


# ---- activation quantizer ----------------------------------------------------------------------------


@every_kind
def test_threshold_quantize(assert_identical, dtype, layout, kind):
    act, x = activation(kind), layout(lambda *shape: normal(*shape, dtype=dtype))
    expected = torch.from_numpy(oracle.threshold_quantize(oracle.exact(x), act))
    assert_identical(quantize(x, act), torch.empty_like(x).copy_(expected))


@every_kind
def test_threshold_gradients(assert_gradients, dtype, layout, kind):
    act, leaves = activation(kind), leaves_of(activation(kind))
    x = layout(lambda *shape: normal(*shape, dtype=dtype)).detach().requires_grad_()
    grad = normal(*x.shape, seed=1, dtype=dtype)
    quantize_with(x, leaves, act).backward(grad)
    assert_gradients(x, leaves, grad, act)


@every_kind
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradients_have_the_shape_and_dtype_of_the_parameters(assert_gradients, kind, shape, parameter_dtype):
    leaves = leaves_of(activation(kind), shape, parameter_dtype)
    seen = {name: leaf.detach().float().reshape(-1) for name, leaf in leaves.items()}
    act = Activation(**seen, offset=activation().offset, steps=7)
    x, grad = normal(1501).requires_grad_(), normal(1501, seed=1)
    quantize_with(x, leaves, act).backward(grad)
    assert_gradients(x, leaves, grad, act)


def test_parameters_may_be_strided(assert_identical):
    act = activation()
    interval = torch.stack([act.interval, act.interval], 1)[:, 0].requires_grad_()
    dense = act.interval.clone().requires_grad_()
    x, grad = normal(501), normal(501, seed=1)
    for leaf in (interval, dense):
        functional.threshold_quantize(x, act.start, leaf, act.in_scale, act.out_scale).backward(grad)
    assert_identical(interval.grad.contiguous(), dense.grad)


@pytest.mark.parametrize("view", [lambda y: y.transpose(1, 3), lambda y: y[:, ::2], lambda y: y.flip(0)])
def test_strided_gradients(assert_gradients, layouts, view):
    act, leaves = activation(), leaves_of(activation())
    x = layouts["channels-last"](normal).requires_grad_()
    y = quantize_with(x, leaves, act)
    weight = normal(*view(y).shape, seed=1)
    (view(y) * weight).sum().backward()
    grad = torch.zeros(x.shape)
    view(grad).copy_(weight) if view(grad)._is_view() else grad.copy_(view(weight))
    assert_gradients(x, leaves, grad, act)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_gradient_of_a_sum(assert_gradients, layouts):
    """``sum().backward()`` gives a gradient whose strides are all zero."""
    act, leaves = activation(), leaves_of(activation())
    x = layouts["channels-last"](normal).requires_grad_()
    quantize_with(x, leaves, act).sum().backward()
    assert_gradients(x, leaves, torch.ones(x.shape), act)


def test_one_input_used_twice(assert_gradients):
    act, leaves = activation(), leaves_of(activation())
    x, grad = normal(501).requires_grad_(), normal(501, seed=1)
    y = 0.5 * quantize_with(x, leaves, act) + 0.5 * quantize_with(x, leaves, act)
    (y * grad).sum().backward()
    assert_gradients(x, leaves, grad, act)


@pytest.mark.parametrize("name", GRADIENTS)
def test_one_input_that_needs_a_gradient(assert_identical, name):
    act, grad = activation(), normal(501, seed=1)
    trainable, fixed = {"x": normal(501).requires_grad_(), **leaves_of(act)}, {"x": normal(501), **leaves_of(act)}
    functional.threshold_quantize(**trainable, offset=act.offset).backward(grad)
    for other in fixed.values():
        other.requires_grad_(False)
    fixed[name].requires_grad_()
    functional.threshold_quantize(**fixed, offset=act.offset).backward(grad)
    assert_identical(fixed[name].grad, trainable[name].grad)
    assert [other for other in fixed if fixed[other].grad is not None] == [name]


def test_no_input_that_needs_a_gradient():
    assert not quantize(normal(9), activation()).requires_grad


def test_default_offset_is_zero(assert_identical):
    act, x = activation(), normal(501)
    y = functional.threshold_quantize(x, act.start, act.interval, act.in_scale, act.out_scale)
    zero = Activation(act.start, act.interval, act.in_scale, act.out_scale, torch.zeros(1), 7)
    assert_identical(y, torch.from_numpy(oracle.threshold_quantize(x.numpy(), zero)))


def test_default_steps_are_the_intervals():
    """One interval without ``steps`` is one step: zero or the whole range, 2."""
    one = torch.ones(())
    y = functional.threshold_quantize(torch.tensor([0.4, 0.6, 9.0]), 0 * one, one.reshape(1), one, one)
    assert y.tolist() == [0.0, 2.0, 2.0]


def test_offset_maps_zero_to_a_level():
    one = torch.ones(())
    y = functional.threshold_quantize(
        torch.tensor([-9.0, -0.3, 0.0, 0.2, 0.3, 9.0]), -one, torch.tensor([0.5]), one, one, offset=one, steps=4
    )
    assert y.tolist() == [-1.0, -0.5, 0.0, 0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": normal(5).double()}, TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
        ({"start": torch.zeros(2)}, ValueError, "start must hold one element, got 2"),
        ({"in_scale": torch.ones(0)}, ValueError, "in_scale must hold one element, got 0"),
        ({"offset": torch.ones(3)}, ValueError, "offset must hold one element, got 3"),
        ({"interval": torch.ones(2), "steps": 3}, ValueError, "3 steps need 3 intervals or one, got 2"),
        ({"interval": torch.ones(256)}, ValueError, "steps must be in 1..255, got 256"),
        ({"interval": torch.ones(0)}, ValueError, "steps must be in 1..255, got 0"),
    ],
)
def test_bad_activation_arguments(changes, error, message):
    one = torch.ones(1)
    valid = {"x": normal(5), "start": one, "interval": torch.ones(3), "in_scale": one, "out_scale": one}
    with pytest.raises(error, match=message):
        functional.threshold_quantize(**{**valid, **changes})


def test_second_derivatives_are_refused():
    x = normal(9).requires_grad_()
    (first,) = torch.autograd.grad(quantize(x, activation()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


# ---- memory ------------------------------------------------------------------------------------------


def saved_by(function, *args) -> list[Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        function(*args)
    return saved


def test_codebook_quantize_saves_nothing():
    assert saved_by(functional.codebook_quantize, normal(501).requires_grad_(), CODEBOOK) == []


@every_kind
def test_threshold_quantize_saves_x_and_the_parameters(layouts, dtype, kind):
    act, leaves = activation(kind), leaves_of(activation(kind))
    x = layouts["channels-last"](lambda *shape: normal(*shape, dtype=dtype)).requires_grad_()
    saved = saved_by(quantize_with, x, leaves, act)
    large = [t for t in saved if t.numel() > 7]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    small = sum(t.nbytes for t in saved) - x.nbytes
    assert small == 4 * (4 + act.interval.numel())  # start, in_scale, out_scale, offset; intervals


# ---- inside torch's machinery ------------------------------------------------------------------------


def layer(x: Tensor, w: Tensor, codebook: Tensor, leaves: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Both quantizers between elementwise operations, as a layer's forward uses them."""
    y = functional.threshold_quantize(x * 2, **leaves).abs()
    w_q, codes = functional.codebook_quantize(w.neg(), codebook)
    return y, w_q.neg(), codes, *functional.codebook_statistics(w, codebook)


def run_layer(function) -> list[Tensor]:
    x, w = normal(3, 16, 5, 7).requires_grad_(), normal(37, 53, seed=1).requires_grad_()
    leaves = leaves_of(activation())
    y, w_q, *rest = function(x, w, CODEBOOK, leaves)
    torch.autograd.backward([y, w_q], [normal(*y.shape, seed=2), normal(*w_q.shape, seed=3)])
    return [t.detach() for t in (y, w_q, *rest, x.grad, w.grad, *(leaf.grad for leaf in leaves.values()))]


def assert_compiled_equals_eager(assert_identical, **options) -> None:
    torch.compiler.reset()
    compiled = run_layer(torch.compile(layer, fullgraph=True, **options))
    for actual, expected in zip(compiled, run_layer(layer), strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_graph_equals_eager(assert_identical, dynamic):
    assert_compiled_equals_eager(assert_identical, backend="aot_eager", dynamic=dynamic)


@pytest.mark.skipif(
    not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")),
    reason="torch's inductor needs a C++ compiler to generate CPU code, and there is none on the path",
)
def test_compiled_code_equals_eager(assert_identical):
    assert_compiled_equals_eager(assert_identical, backend="inductor")


def test_activation_checkpointing(assert_identical):
    def recomputed(*args):
        return checkpoint(layer, *args, use_reentrant=False)

    for actual, expected in zip(run_layer(recomputed), run_layer(layer), strict=True):
        assert_identical(actual, expected)


def test_autocast_leaves_the_quantizer_alone(assert_identical, assert_gradients):
    """A linear layer gives bfloat16 under autocast; the quantizer keeps that dtype and its own float32 parameters."""
    act, leaves = activation(), leaves_of(activation())
    linear = torch.nn.Linear(16, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x = linear(normal(33, 16)).detach().requires_grad_()
        y = quantize_with(x, leaves, act)
        w_q, _ = functional.codebook_quantize(linear.weight, CODEBOOK)
    assert (y.dtype, w_q.dtype) == (torch.bfloat16, torch.float32)
    assert_identical(y.detach(), torch.from_numpy(oracle.threshold_quantize(oracle.exact(x), act)).bfloat16())
    grad = normal(*y.shape, seed=1, dtype=torch.bfloat16)
    y.backward(grad)
    assert_gradients(x, leaves, grad, act)


@pytest.mark.skipif(os.environ["ADQ_CPU_BACKEND"] == "auto", reason="ADQ_CPU_BACKEND=auto asks for no backend by name")
def test_cpu_backend_is_the_one_asked_for():
    cpu = next(status for status in adq.backends.STATUS if status.device == "cpu")
    assert cpu.backend == os.environ["ADQ_CPU_BACKEND"]


# ---- packing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_and_unpack(assert_identical, layout, bits):
    codes = layout(lambda *shape: (normal(*shape).abs() * 1000).int().remainder(2**bits).byte())
    packed = functional.pack(codes, bits)
    assert packed.tolist() == list(oracle.pack_bits(codes.flatten().tolist(), bits))
    assert_identical(functional.unpack(packed, bits, codes.shape), codes.contiguous())


@pytest.mark.parametrize("code", [8, 200])
def test_pack_names_a_code_that_does_not_fit(code):
    with pytest.raises(ValueError, match=f"code {code} does not fit in 3 bits"):
        functional.pack(torch.tensor([0, code, 8], dtype=torch.uint8), 3)


def test_pack_takes_only_codes():
    with pytest.raises(TypeError, match=r"codes must be uint8, got torch\.int64"):
        functional.pack(torch.tensor([0, 1]), 3)
    with pytest.raises(ValueError, match=r"bits must be in 1\.\.8, got 9"):
        functional.pack(torch.tensor([0, 1], dtype=torch.uint8), 9)


def test_unpack_checks_the_length():
    with pytest.raises(ValueError, match="6 codes of 3 bits take 3 bytes"):
        functional.unpack(torch.zeros(2, dtype=torch.uint8), 3, (2, 3))


def test_nan_is_in_no_order_and_fake_values_are_not_read():
    w = torch.randn(5)
    for codebook in ([float("nan"), 0.0], [0.0, float("nan")], [1.0, 0.0]):
        with pytest.raises(ValueError, match="the codebook must be ascending"):
            functional.codebook_quantize(w, torch.tensor(codebook))
    with FakeTensorMode() as mode:
        w_q, code = functional.codebook_quantize(mode.from_tensor(w), mode.from_tensor(torch.tensor([0.0, 1.0])))
    assert w_q.shape == code.shape == (5,)

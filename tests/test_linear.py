"""Products with a weight in packed codes: the operator on every backend, the function, and the layers that use it."""

from __future__ import annotations

import copy
import math
import pickle

import oracle
import pytest
import torch
from tensors import f32, normal, u8
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import adq
from adq import ops, reference
from adq.nn.packed import FEW_ROWS
from adq.portable import portable

pytestmark = pytest.mark.usefixtures("poisoned_memory")

BITS = range(1, 9)
NAN, INF = math.nan, math.inf
SHAPES = {  # outputs, x
    "one": (1, (1,)),
    "odd rows": (5, (3, 13)),
    "two launches": (6, (2, 3, 40)),
    "tiles and a rest": (2, (1, 4096 + 24)),
}


def coded(outputs: int, inputs: int, bits: int, levels: int, scales: int = 1) -> list:
    """Random codes, those without a level among them, an unordered codebook, and scales of both signs."""
    codes = torch.randint(
        0, 2**bits, (outputs * inputs,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )
    return [
        reference.pack_bits(codes, bits),
        normal(levels, seed=levels),
        normal(scales, 1, seed=1),
        bits,
        outputs,
    ]


def expected(x: torch.Tensor, packed, codebook, scale, bits, outputs) -> oracle.Sum:
    shape = outputs, x.shape[-1]
    w = oracle.codebook_decode(bytes(packed.tolist()), codebook.numpy(), scale.numpy(), bits, shape)
    return oracle.codebook_linear(oracle.exact(x), w)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_linear(call, assert_sum, dtype, bits, shape):
    outputs, size = SHAPES[shape]
    x = normal(*size, seed=2).to(dtype)
    arguments = coded(outputs, size[-1], bits, max(1, 2**bits - bits % 2), (1, outputs)[bits % 3 > 0])
    y = call("codebook_linear", x, *arguments)
    assert y.dtype == dtype
    assert y.is_contiguous()
    assert_sum(y, expected(x, *arguments))


@pytest.mark.parametrize("scales", [1, 5])
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)])
def test_torch_gives_the_same_result(assert_identical, rows, scales):
    cpu = pytest.importorskip("adq.backends.cpu", reason="the C++ kernels are not built")
    arguments = (normal(*rows, 70), *coded(5, 70, 3, 7, scales))
    assert_identical(torch.ops.adq.codebook_linear(*arguments), cpu.codebook_linear(*arguments))


def test_linear_by_hand(call, dtype):
    packed, codebook = u8(0b10001101, 0b0111), f32(-2.0, 0.5, 3.0)  # codes 1, 3, 0 and 2, 3, 1; there is no level 3
    x = f32(1.0, 2.0, -4.0, 0.0, -1.0, 2.0).view(2, 3).to(dtype)
    y = call("codebook_linear", x, packed, codebook, f32(2.0, -1.0).view(2, 1), 2, 2)
    assert y.tolist() == [[2 * (0.5 + 6.0 + 8.0), -(3.0 + 6.0 - 2.0)], [2 * (-3.0 - 4.0), -(-3.0 + 1.0)]]
    assert call("codebook_linear", x[0], packed, codebook, f32(2.0).view(1, 1), 2, 2).tolist() == [29.0, 14.0]


@pytest.mark.parametrize("size", [(0, 5), (3, 0), (2, 0, 4), (0,)])
def test_nothing_to_add_up(call, size):
    arguments = coded(3, size[-1], 3, 8, 3)
    y = call("codebook_linear", torch.ones(size), *arguments)
    assert y.shape == (*size[:-1], 3)
    assert (y == 0).all()


def test_no_outputs(call):
    assert call("codebook_linear", normal(2, 5), u8(), f32(1.0), f32(1.0).view(1, 1), 3, 0).shape == (2, 0)


@pytest.mark.parametrize("bits", BITS)
def test_reads_no_further_than_the_table(call, bits):
    """The level after the last one is NaN, and so is the one before the first."""
    levels = max(1, 2**bits - 2)
    table = torch.full((levels + 2,), NAN)
    table[1:-1] = 1.0
    packed = u8(*[255] * ops.packed_size(2 * 37, bits))
    assert (call("codebook_linear", torch.ones(37), packed, table[1:-1], f32(3.0).view(1, 1), bits, 2) == 111.0).all()


@pytest.mark.parametrize(("bits", "dtype"), [(3, torch.bfloat16), (4, torch.float32)])
def test_strided_and_misaligned_arguments(call, assert_identical, dtype, bits):
    packed, codebook, *rest = coded(7, 40, bits, 2**bits, 7)
    x = normal(3, 40).to(dtype)
    y = call("codebook_linear", x, packed, codebook, *rest)
    streams = torch.stack([packed, packed], 1)[:, 0], torch.cat([packed[:1], packed])[1:]
    inputs = (
        x.t().contiguous().t(),
        torch.cat([x, x], 1)[:, :40],
        torch.cat([x.flatten()[:1], x.flatten()])[1:].view(3, 40),
    )
    for stream in streams:
        for rows in inputs:
            assert_identical(call("codebook_linear", rows, stream, torch.stack([codebook] * 2, 1)[:, 0], *rest), y)
    assert_identical(
        call("codebook_linear", x[1].expand(2, 40), packed, codebook, *rest), y[1].expand(2, 7).contiguous()
    )


def test_a_row_does_not_depend_on_the_others(call, assert_identical):
    arguments = coded(5, 1000, 3, 8, 5)
    x = normal(11, 1000)
    y = call("codebook_linear", x, *arguments)
    for row in (0, 3, 9):
        assert_identical(call("codebook_linear", x[row], *arguments), y[row])


def test_nan_stays_in_its_row(call):
    x = torch.ones(3, 40)
    x[1, 20], x[2, 3] = NAN, INF
    y = call("codebook_linear", x, u8(*[0] * 15), f32(1.0, 2.0), f32(1.0).view(1, 1), 1, 3)
    assert y[0].tolist() == [40.0] * 3
    assert y[1].isnan().all()
    assert y[2].tolist() == [INF] * 3


def test_sums_of_equal_products(call, assert_sum):
    """They round the same way every time, so only short chains of float32 additions stay accurate."""
    x, arguments = torch.full((1, 12_345), 0.7123), [u8(*[0] * 4630), f32(0.937), f32(1.1).view(1, 1), 3, 1]
    assert_sum(call("codebook_linear", x, *arguments), expected(x, *arguments))


# ---- the operator in torch: fake, opcheck, bad arguments -----------------------------------------------

VALID = {
    "x": normal(2, 3),
    "packed": u8(0b11100100, 0b0110),
    "codebook": f32(-1.0, 0.0, 1.0),
    "scale": f32(1.0, 2.0).view(2, 1),
    "bits": 2,
    "outputs": 2,
}
OPERATOR = torch.ops.adq.codebook_linear.default


@pytest.mark.parametrize("x", [normal(3), normal(2, 3), normal(3, 2, 4).transpose(0, 2), torch.empty(0, 3)])
def test_opcheck(x, dtype):
    torch.library.opcheck(OPERATOR, tuple({**VALID, "x": x.to(dtype)}.values()))


BAD = [
    ({"x": torch.zeros(2, 3, dtype=torch.float64)}, TypeError, "x must be float32, bfloat16 or float16"),
    ({"x": torch.tensor(1.0)}, ValueError, r"x must have a dimension of inputs, got shape \(\)"),
    ({"x": normal(2, 5)}, ValueError, r"10 codes of 2 bits take 3 bytes, got shape \(2,\)"),
    ({"packed": torch.zeros(2)}, TypeError, "codes must be uint8, got torch.float32"),
    ({"packed": u8(1)}, ValueError, r"6 codes of 2 bits take 2 bytes, got shape \(1,\)"),
    ({"codebook": torch.zeros(5)}, ValueError, "codes of 2 bits need 1..4 levels, got 5"),
    ({"codebook": f32(0.0).half()}, TypeError, "codebook must be a one-dimensional float32"),
    ({"scale": f32(1.0, 2.0, 3.0).view(1, 3)}, ValueError, r"one element or one for each output, got \(1, 3\)"),
    ({"scale": f32(1.0, 2.0)}, ValueError, r"the scale of a weight \(2, 3\) must be contiguous float32"),
    ({"bits": 0}, ValueError, "bits must be in 1..8, got 0"),
    ({"bits": 9}, ValueError, "bits must be in 1..8, got 9"),
    ({"outputs": -2}, ValueError, r"the shape must not be negative, got \(-2, 3\)"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD)
def test_bad_arguments(call, changes, error, message):
    arguments = {**VALID, **changes}
    for run in (lambda *args: call("codebook_linear", *args), OPERATOR):
        with pytest.raises(error, match=message):
            run(*arguments.values())
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in arguments.values()]
        with pytest.raises(error, match=message):
            OPERATOR(*fakes)


def test_codes_on_another_device(backend):
    with pytest.raises(ValueError, match="x is on meta, but the codes are on cpu"):
        backend.codebook_linear(*{**VALID, "x": VALID["x"].to("meta")}.values())


# ---- the function, and the layers that use it ----------------------------------------------------------


def test_function():
    arguments = coded(5, 24, 3, 8, 5)
    x = normal(2, 24).requires_grad_()
    packed, codebook, scale, _, outputs = arguments
    y = adq.functional.codebook_linear(x, packed, codebook, scale, outputs)
    assert torch.equal(y, OPERATOR(x.detach(), *arguments))
    assert not y.requires_grad


@pytest.fixture
def model() -> nn.Module:
    """Two packed linear layers, one without a bias, behind a convolution."""
    torch.manual_seed(0)
    layers = nn.Conv1d(4, 6, 3), nn.Flatten(), nn.Linear(60, 33), nn.ReLU(), nn.Linear(33, 7, bias=False)
    network = adq.quantize_(nn.Sequential(*layers), adq.ADQConfig(adq.WeightConfig(bits=3), activation=None))
    return adq.pack_(network)


def used(monkeypatch) -> list:
    """The shapes of what layers multiply with codes, from now on."""
    shapes = []

    def recorded(x, *arguments):
        shapes.append(tuple(x.shape))
        return adq.functional.codebook_linear(x, *arguments)

    monkeypatch.setattr(adq.nn.packed, "codebook_linear", recorded)
    return shapes


def test_fast_linear_layers_predict_the_same_up_to_rounding(model, monkeypatch):
    shapes = used(monkeypatch)
    batches = [normal(rows, 4, 12, seed=rows) for rows in (1, FEW_ROWS, FEW_ROWS + 1)]
    exact = [model(x) for x in batches]
    assert shapes == []
    assert adq.fast_linear_(model) is model
    for x, y in zip(batches, exact, strict=True):
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-5)
        assert torch.equal(model(x).argmax(1), y.argmax(1))
    assert shapes == [(1, 60), (1, 33)] * 2 + [(FEW_ROWS, 60), (FEW_ROWS, 33)] * 2
    assert torch.equal(model(batches[2]), exact[2])


def test_fast_linear_layers_are_copied_and_cast(model, monkeypatch):
    copies = copy.deepcopy(adq.fast_linear_(model)), pickle.loads(pickle.dumps(model))
    shapes = used(monkeypatch)
    x = normal(2, 4, 12)
    for other in copies:
        assert torch.equal(other(x), model(x))
    assert len(shapes) == 8
    half = model.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert len(shapes) == 10


def test_fast_linear_layers_have_gradients(model, monkeypatch):
    x = normal(2, 4, 12).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    shapes = used(monkeypatch)
    (gradient,) = torch.autograd.grad(adq.fast_linear_(model)(x).sum(), x)
    assert torch.equal(gradient, expected)
    assert shapes == []
    with torch.no_grad():
        model(x)
    assert len(shapes) == 2


def test_a_bias_that_is_passed(model):
    layer, x = adq.fast_linear_(model)[2], normal(1, 60)
    assert torch.equal(layer(x, None) + layer.bias, layer(x))
    assert torch.equal(layer(x, torch.ones(33)), layer(x, None) + 1)


def test_exports_of_fast_models_decode(model, monkeypatch):
    x = normal(2, 4, 12)
    shapes = used(monkeypatch)
    exact = model(x)
    assert torch.equal(portable(adq.fast_linear_(model))(x), exact)
    assert shapes == []


def test_what_fast_linear_refuses(model):
    with pytest.raises(ValueError, match="no linear layer has its weight in codes"):
        adq.fast_linear_(model[:2])
    with pytest.raises(RuntimeError, match="is packed and cannot train"):
        adq.fast_linear_(model).train()(normal(1, 4, 12))


def test_fast_linear_layers_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    adq.fast_linear_(adq.pack_(adq.calibrate_(adq.quantize_(model), [torch.randn(8, 32)])))
    for rows in (1, 4, 9):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert model(torch.randn(rows, 32)).dtype == model[0](torch.randn(rows, 32)).dtype == torch.bfloat16

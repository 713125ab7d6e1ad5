"""The uniform special cases: weights on a grid whose step learns (LSQ), activations with one step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig
from adq.codebook import fit, sqnr
from adq.convert import weight_quantizers
from adq.deploy import integer_levels
from adq.functional import learned_lookup, learned_step
from adq.reference import snap_codebook

from .networks import assert_same_state, images, quantized, train


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lsq(w: Tensor, scale: Tensor, low: int, high: int, samples: int) -> Tensor:
    """As published, with ``detach``: gradient of the scale times ``1 / sqrt(n high)``."""
    factor = (samples * high) ** -0.5
    s = (scale * factor) + (scale - scale * factor).detach()
    x = (w / s).clamp(low, high)
    return ((x.round() - x).detach() + x) * s


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-2, 1), (-1, 1), (-4, 3), (-128, 127)])
def test_learned_step_and_its_gradients(low, high, per_channel):
    w = weight(6, 5, 3)
    scale = (0.3 + torch.rand(6, 1, 1)) * 2 / high if per_channel else torch.full((1, 1, 1), 1.7 / high)
    grad = weight(6, 5, 3, seed=1)
    values = [w.clone().requires_grad_(), scale.clone().requires_grad_()]
    exact = [value.detach().double().requires_grad_() for value in values]
    codebook = torch.arange(low, high + 1, dtype=torch.float32)
    out = learned_step(*values, codebook)
    expected = lsq(*exact, low, high, w.numel() // scale.numel())
    torch.testing.assert_close(out.double(), expected)
    out.backward(grad)
    expected.backward(grad.double())
    for value, reference in zip(values, exact, strict=True):
        torch.testing.assert_close(value.grad.double(), reference.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", ["tensor", "channel"])
@pytest.mark.parametrize("levels", ["full", "symmetric"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_fitted_step_has_nearly_the_least_error(bits, levels, scale):
    w = weight(16, 512)
    config = WeightConfig(bits=bits, levels=levels, scale=scale, update="step")
    fitted = fit(w, config)
    low = -(config.num_levels // 2)
    assert fitted.codebook.tolist() == list(range(low, low + config.num_levels))
    assert int(fitted.count.sum()) == w.numel()

    def noise(s: Tensor) -> Tensor:
        error = ((w / s).round().clamp(low, low + config.num_levels - 1) * s - w).square()
        return error.sum(1, keepdim=True) if scale == "channel" else error.sum()

    tried = torch.stack([noise(fitted.scale * f) for f in torch.linspace(0.3, 3.0, 200)])
    assert float(noise(fitted.scale).sum()) <= 1.08 * float(tried.amin(0).sum())


def test_one_bit_is_refused():
    with pytest.raises(ValueError, match='update="step" needs at least 2 bits'):
        WeightConfig(bits=1, update="step")


def test_a_network_of_learned_steps_trains_and_is_saved(tmp_path):
    model = quantized(weight=WeightConfig(update="step"), activation=ActivationConfig(thresholds="uniform"))
    layer = model.body[0]
    assert isinstance(layer.weight_quantizer.scale, nn.Parameter)
    before = layer.weight_quantizer.scale.detach().clone()
    table = layer.weight_quantizer.codebook.clone()
    train(model)
    assert not torch.equal(layer.weight_quantizer.scale, before)
    assert torch.equal(layer.weight_quantizer.codebook, table)
    adq.save(model, tmp_path / "model.safetensors")
    again = adq.load(tmp_path / "model.safetensors", type(model)())
    assert_same_state(model, again)
    adq.save(model, tmp_path / "packed.safetensors", packed=True)
    packed = adq.load(tmp_path / "packed.safetensors", type(model)())
    with torch.no_grad():
        torch.testing.assert_close(packed.eval()(images(9)), model.eval()(images(9)), rtol=0, atol=1e-6)


def test_steps_have_the_gradient_of_the_forward_pass_that_a_user_sees():
    """A smaller weight range needs a smaller step: plain gradient descent finds the least-squares one."""
    config = WeightConfig(bits=3, update="step", scale="tensor")
    layer = adq.nn.QLinear(32, 32, bias=False, weight_config=config, activation_config=None)
    with torch.no_grad():
        layer.weight.copy_(weight(32, 32))
    layer.weight_quantizer.refit_(layer.weight)
    fitted = layer.weight_quantizer.scale.detach().clone()
    best = sqnr(layer.weight, layer.quantized_weight())
    with torch.no_grad():
        layer.weight_quantizer.scale.mul_(1.8)
    optimizer = torch.optim.SGD([layer.weight_quantizer.scale], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (layer.quantized_weight() - layer.weight.detach()).square().sum().backward()
        optimizer.step()
    assert sqnr(layer.weight, layer.quantized_weight()) > best - 0.1
    torch.testing.assert_close(layer.weight_quantizer.scale.detach(), fitted, rtol=0.05, atol=0.0)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_uniform_activations_learn_one_step(bits):
    config = ADQConfig(activation=ActivationConfig(bits=bits, thresholds="uniform"), first_last_bits=bits)
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), config)
    adq.calibrate_(model, [weight(9, 4)])
    quantizer = model[2].input_quantizer
    assert not isinstance(quantizer.interval, nn.Parameter) and quantizer.interval.shape == (1,)
    x = weight(50, 4).relu()
    assert len(quantizer(x).unique()) <= 2**bits
    quantizer(x).sum().backward()
    assert {name for name, p in quantizer.named_parameters() if p.grad is not None} == {
        "start",
        "in_scale",
        "out_scale",
    }


def test_thresholds_must_be_known():
    with pytest.raises(ValueError, match="thresholds must be one of 'learned', 'uniform'"):
        ActivationConfig(thresholds="lsq")


def test_levels_on_an_int8_grid_are_the_integers_that_they_are():
    w = weight(16, 512)
    for bits in (2, 8):
        plain, snapped = (fit(w, WeightConfig(bits=bits, update="step", snap=snap)) for snap in (None, "int8"))
        assert torch.equal(plain.codebook, snapped.codebook) and torch.equal(plain.scale, snapped.scale)


def test_a_learned_codebook_stays_on_the_int8_grid_that_it_is_used_by():
    config = WeightConfig(bits=3, update="gradient", snap="int8")
    model = train(quantized(weight=config), 3)
    for layer, quantizer in weight_quantizers(model).values():
        levels = quantizer.levels
        assert integer_levels(levels) is not None and torch.equal(snap_codebook(levels), levels)
        v = layer.weight.detach() / quantizer.scale
        nearest = levels[(v[..., None] > (levels[:-1] + levels[1:]) / 2).sum(-1)]
        assert torch.equal(layer.quantized_weight(), (nearest * quantizer.scale).to(v.dtype))
    body = model.body[0].weight_quantizer
    assert not torch.equal(body.codebook.detach().sort().values, body.levels)  # what is learned is finer
    with torch.no_grad():
        expected = model.eval()(images())
        assert torch.equal(adq.pack_(model)(images()), expected)


def test_a_learned_codebook_of_another_width_is_the_same_parameter():
    wide, narrow = (quantized(weight=WeightConfig(bits=b, update="gradient")) for b in (4, 2))
    optimizer = torch.optim.SGD(wide.parameters(), lr=0.1)
    codebook = wide.body[0].weight_quantizer.codebook
    wide.load_state_dict(narrow.state_dict())
    before = codebook.detach().clone()
    assert len(before) == 4
    wide.train()(images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(wide.body[0].weight_quantizer.codebook.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_cells_of_many_half_precision_gradients_are_summed_in_float32(dtype):
    w = weight(200_000).to(dtype).requires_grad_()
    codebook = torch.tensor([-1.5, -0.5, 0.5, 1.5], requires_grad=True)
    learned_lookup(w, codebook).backward(torch.ones_like(w))
    count = torch.ops.adq.codebook_statistics(w.detach(), (codebook[1:] + codebook[:-1]).detach() / 2)[0]
    torch.testing.assert_close(codebook.grad, count.float(), rtol=1e-6, atol=0)


def test_weights_that_are_nan_are_in_no_cell():
    w = torch.tensor([-1.0, float("nan"), 1.0, float("nan")], requires_grad=True)
    codebook = torch.tensor([-1.0, 1.0], requires_grad=True)
    learned_lookup(w, codebook).backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert codebook.grad.tolist() == [1.0, 4.0]


def test_no_weights_have_a_step():
    w, scale = torch.zeros(0, 3, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    learned_step(w, scale, torch.arange(-2.0, 2.0)).sum().backward()
    assert w.grad.shape == (0, 3) and scale.grad.tolist() == [[0.0]]


@pytest.mark.parametrize("thresholds", ["learned", "uniform"])
def test_thresholds_of_another_width_are_refused(thresholds):
    def net(bits: int) -> nn.Module:
        activation = ActivationConfig(bits=bits, thresholds=thresholds)
        config = ADQConfig(weight=None, activation=activation, first_last_bits=None)
        return adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), config)

    saved = adq.calibrate_(net(8), [weight(9, 4)]).state_dict()
    for bits in (6, 7):
        with pytest.raises(RuntimeError, match=f"inputs of layer '1' have {bits} bits, and 8 in the state dict"):
            net(bits).load_state_dict(saved)
    (model := net(8)).load_state_dict(saved)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items())
    learned = adq.calibrate_(net(4), [weight(9, 4)])
    model = net(8)
    model[1].input_quantizer.take_over_(learned[1].input_quantizer)
    with pytest.raises(RuntimeError, match="layer '1' have 6 bits, and 8 in"):
        net(6).load_state_dict(model.state_dict())
    older = {key: 1.1 * value if key.endswith("interval") else value for key, value in saved.items()}
    net(6).load_state_dict(older)  # of a curve that was followed before the constant told the width
    for value in (0.0, -1.0, torch.nan):  # of no width
        net(6).load_state_dict({k: torch.full_like(v, value) if "interval" in k else v for k, v in saved.items()})

"""Calibration: what the thresholds are fitted to, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from typing import NamedTuple

import pytest
import torch
from networks import assert_same_state, images, net, quantized, train
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig, convert
from adq.convert import activation_quantizers
from adq.thresholds import fit_thresholds


def test_calibration_sees_the_inputs_of_the_float_model():
    model, reference = adq.quantize_(net()), net().eval()
    adq.calibrate_(model, [images(0), images(1)])
    x = torch.cat([images(0), images(1)])
    inner = torch.relu(reference.norm(reference.stem(x)))
    for layer, values in ((model.stem, x), (model.body[0], inner)):
        fitted = fit_thresholds(values.detach().flatten(), layer.input_quantizer.config)
        for key in ("start", "in_scale", "out_scale", "offset", "interval"):
            torch.testing.assert_close(getattr(layer.input_quantizer, key).detach(), getattr(fitted, key))
    assert model.stem.input_quantizer.offset > 0  # signed by what it saw
    assert model.body[0].input_quantizer.offset == 0


def test_many_inputs_are_sampled_reproducibly():
    layers = [adq.quantize_(nn.Linear(64, 2), ADQConfig(first_last_bits=3)) for _ in range(2)]
    batches = [torch.randn(1024, 64, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    for layer in layers:
        adq.calibrate_(layer, batches)
    assert torch.equal(layers[0].input_quantizer.out_scale, layers[1].input_quantizer.out_scale)
    everything = fit_thresholds(torch.cat(batches).flatten()[::2], ActivationConfig(3))
    torch.testing.assert_close(layers[0].input_quantizer.out_scale.detach(), everything.out_scale, rtol=0.1, atol=0)


@pytest.mark.parametrize("shape", [(4096, 2), (16, 4, 8, 8)])
def test_samples_are_of_every_feature_and_pixel(shape, monkeypatch):
    """However many batches there are: of powers of two a stride in memory would see only some."""
    monkeypatch.setattr(adq.calibrate, "SAMPLES_PER_BATCH", 2**13)
    monkeypatch.setattr(adq.calibrate, "MAX_SAMPLES", 2**14)
    sampler, place = adq.calibrate._Sampler(), torch.arange(math.prod(shape[1:])).expand(shape[0], -1).reshape(shape)
    for batch in range(33):
        sampler.begin(batch)
        sampler(nn.Identity(), (place.float(),))
    counts = sampler.pooled("layer").long().bincount()
    assert len(counts) == math.prod(shape[1:])
    assert counts.min() > 0.3 * counts.float().mean()


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    "batch",
    [images(), (images(), torch.zeros(8)), [images()], {"x": images()}, Batch(images(), torch.zeros(8))],
    ids=lambda batch: type(batch).__name__,
)
def test_batches_of_every_kind(batch):
    model = adq.calibrate_(adq.quantize_(net()), [batch])
    assert_same_state(model, quantized())


def test_forward_before_calibration_names_the_layer():
    with pytest.raises(RuntimeError, match=r"layer 'stem' is not calibrated; call adq\.calibrate_"):
        adq.quantize_(net())(images())


def test_calibration_must_precede_training():
    model = quantized()
    adq.calibrate_(model, [images(1)])
    for update in ("ema", "gradient", "frozen"):
        model = train(quantized(weight=WeightConfig(update=update)))
        thresholds = model.body[0].input_quantizer.out_scale.clone()
        with pytest.raises(RuntimeError, match="has been trained since it was calibrated.*force=True"):
            adq.calibrate_(model, [images(1)])
        assert torch.equal(thresholds, model.body[0].input_quantizer.out_scale)
        adq.calibrate_(model, [images(1) * 3], force=True)
        assert not torch.equal(thresholds, model.body[0].input_quantizer.out_scale)


def test_weights_may_be_trained_before_inputs_are_quantized():
    model = adq.quantize_(net())
    for quantizer in activation_quantizers(model).values():
        quantizer.enabled = False
    train(model)
    for quantizer in activation_quantizers(model).values():
        quantizer.enabled = True
    statistics = model.norm.running_mean.clone()
    adq.calibrate_(model, [images()])
    assert all(quantizer.is_calibrated for quantizer in activation_quantizers(model).values())
    assert torch.equal(model.norm.running_mean, statistics)
    with pytest.raises(RuntimeError, match="has been trained"):
        adq.calibrate_(model, [images()])


def test_calibration_must_precede_training_of_thresholds_alone():
    model = adq.calibrate_(adq.quantize_(net(), ADQConfig(weight=None)), [images(1)])
    train(model)
    thresholds = model.body[0].input_quantizer.interval.clone()
    for other in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match="has been trained since it was calibrated"):
            adq.calibrate_(other, [images(1)])
        assert torch.equal(thresholds, other.body[0].input_quantizer.interval)
    adq.calibrate_(model, [images(1)], force=True)
    adq.calibrate_(model, [images(1)])


def test_what_cannot_be_calibrated():
    with pytest.raises(ValueError, match=r"not quantized; call adq\.quantize_"):
        adq.calibrate_(net(), [images()])
    with pytest.raises(ValueError, match="no batches"):
        adq.calibrate_(adq.quantize_(net()), iter([]))
    with pytest.raises(ValueError, match=r"NaN or infinity among the observed inputs \(layer 'stem'\)"):
        adq.calibrate_(adq.quantize_(net()), [images() * float("nan")])
    with pytest.raises(ValueError, match=r"signed=False, but inputs down to .* \(layer 'stem'\)"):
        adq.calibrate_(adq.quantize_(net(), ADQConfig(activation=ActivationConfig(signed=False))), [images()])


class Detour(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.used(input=x))


def test_an_unreached_layer_warns():
    model = adq.quantize_(Detour())
    said = (
        "not calibrated, never reached by the batches: unused; .* give batches that reach them in evaluation mode, or "
        r"leave them in float, as by overrides=\{'unused': None\}; a layer whose weight is read"
    )
    with pytest.warns(UserWarning, match=said):
        adq.calibrate_(model, [torch.randn(3, 4)])
    with pytest.raises(RuntimeError, match=r"'unused' is not calibrated; .* that reach .*overrides=\{'unused': None\}"):
        model.unused(torch.randn(3, 4))
    assert [layer.input_quantizer.is_calibrated for layer in model.children()] == [True, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized()


def test_every_input_is_looked_at_and_nothing_changes_where_one_is_bad():
    x = torch.randn(64, 1, 32, 32)  # more values than are kept
    x[63, 0, 31, 31] = float("inf")
    model = adq.quantize_(net())
    with pytest.raises(ValueError, match=r"NaN or infinity among the observed inputs \(layer 'stem'\)"):
        adq.calibrate_(model, [x])
    config = ADQConfig(overrides={"1": {"activation": {"signed": False}}})
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), config)
    with pytest.raises(ValueError, match=r"signed=False, .* \(layer '1'\)"):
        adq.calibrate_(model, [torch.randn(8, 4)])
    assert not model[0].input_quantizer.is_calibrated
    model = adq.quantize_(net())
    handle = model.norm.register_forward_pre_hook(lambda norm, args: (args[0] * 1e25,))  # squares overflow
    with pytest.raises(ValueError, match="batch norm 'norm'"):
        adq.calibrate_(model, [images()])
    assert not any(quantizer.is_calibrated for quantizer in activation_quantizers(model).values())
    handle.remove()
    before = {name: tensor.clone() for name, tensor in adq.calibrate_(model, [images()]).state_dict().items()}
    model.norm.register_forward_pre_hook(lambda norm, args: (args[0] * 1e25,))
    with pytest.raises(ValueError, match="batch norm 'norm'"):
        adq.calibrate_(model, [images(1)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Experts(nn.Module):
    """The second expert gets no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.first(x), self.second(x[:0])]))


def test_a_layer_that_is_called_with_no_rows_warns():
    model = adq.quantize_(Experts())
    with pytest.warns(UserWarning, match="not calibrated, never reached by the batches: second"):
        adq.calibrate_(model, [torch.randn(3, 4)])
    assert [layer.input_quantizer.is_calibrated for layer in model.children()] == [True, False, True]


@pytest.mark.parametrize("fails", [False, True])
def test_calibration_leaves_flags_switches_and_hooks(fails):
    model = adq.quantize_(net())
    model.train()
    model.body.eval()
    flags = {name: module.training for name, module in model.named_modules()}
    statistics = model.norm.running_mean.clone()
    model.body[0].weight_quantizer.enabled = False
    if fails:
        with pytest.raises(RuntimeError, match="expected input"):
            adq.calibrate_(model, [images(), torch.zeros(1, 2, 8, 8)])
        assert torch.equal(model.norm.running_mean, statistics)
    else:
        adq.calibrate_(model, [images()])
        assert not torch.equal(model.norm.running_mean, statistics)
    assert not model.norm._forward_pre_hooks
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert [layer.weight_quantizer.enabled for layer in convert.quantized_layers(model).values()] == [
        True,
        False,
        True,
        True,
    ]
    assert all(not layer._forward_pre_hooks for layer in convert.quantized_layers(model).values())


def test_large_inputs_under_another_default_device():
    model, x = adq.quantize_(nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))), torch.randn(1024, 64)
    with torch.device("meta"):  # as under set_default_device("cuda"), where the model is elsewhere
        adq.calibrate_(model, [x])
    assert model[0].input_quantizer.is_calibrated

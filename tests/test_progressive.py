"""Progressive quantization: thresholds on the same curve at another width, networks that begin from other networks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig
from adq.convert import activation_quantizers, quantizers_enabled, set_weight_bits
from adq.functional import threshold_quantize
from adq.ops import MIN_INTERVAL
from adq.thresholds import Thresholds, averaged, resampled

from .networks import Block, assert_same_state, images, net

ONE = torch.ones(1)
TENSOR = WeightConfig(bits=3, scale="tensor")  # its fit finds levels again that all weights are on


def table(start, interval, offset=0.0) -> Thresholds:
    return Thresholds(torch.tensor([start]), torch.tensor(interval), 2 * ONE, 0.5 * ONE, torch.tensor([offset]))


def output(x: torch.Tensor, t: Thresholds, config: ActivationConfig) -> np.ndarray:
    arguments = t.start, t.interval, t.in_scale, t.out_scale
    return threshold_quantize(x, *arguments, offset=t.offset, steps=config.steps).double().numpy()


# ---- thresholds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "intervals"),
    [
        (1, [1.0]),
        (3, [1.5 / 7, 1.5 / 7, 0.5 / 7 + 0.4 / 7, 0.6 / 7, 0.4 / 7 + 0.3 / 7, 0.9 / 7, 0.9 / 7]),
        (8, [2.0 / 255]),
    ],
)
def test_by_hand(bits, intervals):
    """The curve has the inputs 0.1, 0.6, 0.8, 1.1 at 0, 1, 2, 3 of its steps; a uniform one has a range of 2."""
    found = resampled(table(0.1, [0.5, 0.2, 0.3]), ActivationConfig(2), ActivationConfig(bits))
    unit = 2.0 if bits == 8 else 1.0
    torch.testing.assert_close(found.start, torch.tensor([unit * 0.1]))
    torch.testing.assert_close(found.interval, torch.tensor(intervals), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.in_scale, torch.tensor([unit * 2.0]))
    assert (found.out_scale.item(), found.offset.item()) == (0.5, 0.0)


def test_small_intervals_stay_above_the_least_that_counts():
    present, config = ActivationConfig(2), ActivationConfig(5)
    before = table(0.1, [0.001, 0.002, 0.005])
    after = resampled(before, present, config)
    assert after.interval.min() == pytest.approx(2 * MIN_INTERVAL)  # at the least itself there is no gradient
    x = torch.linspace(0.04, 0.06, 4001)
    assert np.abs(output(x, after, config) - output(x, before, present)).max() / 0.5 <= 1 / 3 + 2 / 31 + 1e-5


def test_zero_stays_on_a_level_and_the_ends_go_on():
    """Of 3 steps of 2/3 zero is at the first; of one step of 2 it is at level 0, so a step of 2/3 up the curve."""
    found = resampled(table(-0.5, [0.5, 0.2, 0.3], offset=2 / 3), ActivationConfig(2), ActivationConfig(1))
    assert found.offset.item() == 0.0
    torch.testing.assert_close(found.start, torch.tensor([0.0]))
    torch.testing.assert_close(found.interval, torch.tensor([0.2 + 0.3 + 0.3]))  # one step past the end


@pytest.mark.parametrize(
    "config", [ActivationConfig(3), ActivationConfig(3, thresholds="uniform"), ActivationConfig(8)]
)
def test_the_same_width_is_the_same_thresholds(config):
    present = table(-0.3, [0.2] * (1 if config.is_uniform else 7), offset=2 / 7)
    assert resampled(present, config, config) is present


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(0, 3), st.booleans(), st.integers(0, 10**6))
def test_outputs_differ_by_half_a_level_of_the_old_and_one_of_the_new_width(bits, new_bits, zero, uniform, seed):
    """A learned curve of any shape, followed by any learned width; a straight one, by any width, to half a level."""
    generator = np.random.default_rng(seed)
    present, config = ActivationConfig(bits), ActivationConfig(new_bits)
    width, new_width = 2 / present.steps, 2 / config.steps
    uniform = uniform or config.is_uniform
    interval = np.full(present.steps, width) if uniform else np.exp(generator.normal(-1, 1, present.steps))
    before = table(generator.normal(), interval.tolist(), offset=width * min(zero, present.steps))
    after = resampled(before, present, config)
    x = torch.linspace(-3.0, 3.0, 4001) + (before.start + before.interval.sum() / 2) / 2
    difference = np.abs(output(x, after, config) - output(x, before, present)) / 0.5
    moved = float((after.offset - before.offset).abs())
    assert moved <= new_width / 2 + 1e-6
    assert difference.max() <= width / 2 + new_width / (2 if uniform else 1) + moved + 1e-5
    zero_level = after.offset.item() / new_width
    assert abs(zero_level - round(zero_level)) < 1e-4


def test_the_mean_of_thresholds_by_hand():
    """Levels change at the inputs 0.1, 0.35, 0.45 and at 0.4, 0.5, 0.6 (scales 2 and 5); an interval below the least
    counts as the least."""
    one, scale = table(0.2, [0.5, 0.2, 0.3]), 5 * ONE
    other = Thresholds(2 * ONE, torch.tensor([0.5, 0.5, -1.0]), scale, 0.7 * ONE, 0 * ONE)
    mean = averaged([one, other])
    in_inputs = torch.cat([mean.start, mean.interval]) / mean.in_scale
    least = MIN_INTERVAL / 5
    expected = torch.tensor([(0.1 + 0.4) / 2, (0.25 + 0.1) / 2, (0.1 + 0.1) / 2, (0.15 + least) / 2])
    torch.testing.assert_close(in_inputs, expected, rtol=1e-6, atol=1e-7)
    assert mean.out_scale.item() == pytest.approx(0.6) and mean.offset.item() == 0.0
    assert all(value.dtype == torch.float32 for value in vars(mean).values())


@pytest.mark.parametrize("intervals", [1, 7])
def test_the_mean_of_equal_thresholds_is_what_they_are(intervals):
    generator = np.random.default_rng(intervals)
    one = Thresholds(
        *(torch.tensor(generator.uniform(0.01, 3, n), dtype=torch.float32) for n in (1, intervals, 1, 1, 1))
    )
    mean = averaged([copy.deepcopy(one) for _ in range(3)])
    for name, value in vars(one).items():
        torch.testing.assert_close(getattr(mean, name), value, rtol=2e-7, atol=0)
    assert intervals > 1 or torch.equal(mean.interval, one.interval)  # of a uniform one it says the width


# ---- networks ----------------------------------------------------------------------------------------


def fast_thresholds(model: nn.Module, steps: int = 40) -> nn.Module:
    """Trained so that thresholds go far from where calibration has put them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    for seed in range(steps):
        optimizer.zero_grad()
        x = images(seed, 16)
        F.cross_entropy(4 * model(x), (x.mean((1, 2, 3)) > 0).long() + 2 * (x.std((1, 2, 3)) > 1).long()).backward()
        optimizer.step()
    return model.eval()


def trained(make=net, **config) -> nn.Module:
    torch.manual_seed(0)
    model = adq.quantize_(make(), ADQConfig(**({"weight": TENSOR, "activation": ActivationConfig(4)} | config)))
    return fast_thresholds(adq.calibrate_(model, [images()]))


def fresh(make=net, **config) -> nn.Module:
    torch.manual_seed(1)
    return adq.quantize_(make(), ADQConfig(**({"weight": TENSOR, "activation": ActivationConfig(4)} | config)))


@pytest.mark.parametrize("make", [net, Block])
def test_from_a_packed_network_of_the_same_widths_it_is_that_network(make):
    start = adq.pack_(trained(make))
    model = adq.start_from_(fresh(make), start)
    torch.testing.assert_close(model.eval()(images(50)), start(images(50)), rtol=1e-5, atol=1e-5)
    fast_thresholds(model, 2)  # and it trains


def test_from_a_plain_network_come_its_float_weights_and_statistics():
    start = trained()
    before = copy.deepcopy(start.state_dict())
    model = adq.start_from_(fresh(weight=WeightConfig(bits=2), activation=ActivationConfig(2)), start)
    for name in (
        "stem.weight",
        "body.0.weight",
        "head.weight",
        "head.bias",
        "norm.running_mean",
        "norm.num_batches_tracked",
    ):
        assert torch.equal(model.state_dict()[name], before[name])
    assert model.body[0].weight_quantizer.bits == 2 and model.body[0].input_quantizer.interval.numel() == 3
    assert model.stem.input_quantizer.interval.numel() == 1  # 8 bits
    assert all(torch.equal(tensor, before[name]) for name, tensor in start.state_dict().items())
    assert model.body[0].weight.data_ptr() != start.body[0].weight.data_ptr()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [4, 3])
def test_from_several_networks_comes_their_mean(packed, bits):
    first = trained()
    second = fast_thresholds(copy.deepcopy(first), 10)
    starts = [adq.pack_(first), second] if packed else [first, second]
    alone = [adq.start_from_(fresh(activation=ActivationConfig(bits)), start) for start in starts]
    model = adq.start_from_(fresh(activation=ActivationConfig(bits)), *starts)
    for name in ("stem.weight", "body.0.weight", "head.bias", "norm.weight", "norm.running_mean"):
        one, two = (network.state_dict()[name].double() for network in alone)
        assert not torch.equal(one, two)
        torch.testing.assert_close(model.state_dict()[name], ((one + two) / 2).float(), rtol=0, atol=0)
    assert torch.equal(model.norm.num_batches_tracked, alone[0].norm.num_batches_tracked)

    def edges(network: nn.Module) -> torch.Tensor:
        q = network.body[0].input_quantizer
        return torch.cat([q.start, q.interval.clamp_min(MIN_INTERVAL)]).double().cumsum(0) / q.in_scale.double()

    expected = (edges(alone[0]) + edges(alone[1])) / 2
    assert (edges(alone[0]) - expected).abs().max() > 1e-3
    torch.testing.assert_close(edges(model), expected, rtol=1e-5, atol=1e-6)
    assert int(model.stem.weight_quantizer.steps) == 1
    adq.reestimate_batch_norm_(model, [images(seed, 16) for seed in range(4)])
    fast_thresholds(model, 2)


def test_several_starts_of_which_one_does_not_fit_change_nothing():
    model, start = fresh(), trained()
    before, other = copy.deepcopy(model), copy.deepcopy(start)
    other.body[0].input_quantizer.offset.add_(2 / 15)
    unlike = {
        "zero is on different levels .layer 'body.0'": other,
        "only one quantizes the input of body.0; ": trained(activation=None),
        "of another architecture": trained(Block),
        "takes quantized models": net(),
    }
    for message, bad in unlike.items():
        for starts in ([start, bad], [bad, start]):
            with pytest.raises(ValueError, match=message):
                adq.start_from_(model, *starts)
    with pytest.raises(TypeError, match="at least one start"):
        adq.start_from_(model)
    assert_same_state(model, before)


def test_the_curve_holds_what_calibration_loses():
    start = trained()
    x = images(50, 64)

    @torch.no_grad()
    def distance(model: nn.Module) -> float:
        return float((model.eval()(x) - start(x)).square().mean())

    followed = adq.start_from_(fresh(activation=ActivationConfig(5)), start)
    calibrated = fresh(activation=ActivationConfig(5))
    calibrated.load_state_dict({k: v for k, v in start.state_dict().items() if "_quantizer" not in k})
    adq.calibrate_(calibrated, [images(seed) for seed in range(4)])
    assert distance(followed) < 0.1 * distance(calibrated)


def test_batch_norms_are_corrected_towards_the_start():
    start = trained(Block)
    model = adq.start_from_(fresh(Block, weight=WeightConfig(bits=2), activation=ActivationConfig(2)), start)
    x, taken, seen = images(7, 64), model.norm.running_var.clone(), []
    handles = [m.norm.register_forward_hook(lambda *args: seen.append(args[2])) for m in (start, model)]
    adq.correct_batch_norm_(model, [x], reference=start)
    seen.clear()
    start(x), model.eval()(x)
    for handle in handles:
        handle.remove()
    (var_start, mean_start), (var, mean) = (torch.var_mean(y, (0, 2, 3), correction=0) for y in seen)
    torch.testing.assert_close(mean, mean_start, rtol=0, atol=1e-4)
    torch.testing.assert_close(var, var_start, rtol=5e-3, atol=1e-4)
    assert not torch.equal(model.norm.running_var, taken)
    assert not start.norm._forward_pre_hooks


def test_a_trained_network_is_corrected_by_a_reference_only():
    model = trained(Block)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="has been trained, so its float network is no measure"):
        adq.correct_batch_norm_(model, [images()])
    with pytest.raises(ValueError, match="only one of model and reference has the batch norm 'norm'"):
        adq.correct_batch_norm_(model, [images()], reference=nn.Linear(2, 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_start_with_inputs_in_float_leaves_them_to_calibration():
    start = trained(activation=None)
    model = adq.start_from_(fresh(), start)
    assert not any(quantizer.is_calibrated for quantizer in activation_quantizers(model).values())
    adq.calibrate_(model, [images()])
    model.eval()(images())


@pytest.mark.parametrize("source", ["itself", "file", "started"])
def test_the_sensitivity_of_a_trained_network_keeps_its_inputs_quantized(source, tmp_path):
    model = trained()
    if source == "file":
        model = adq.load(adq.save(model, tmp_path / "m.safetensors"), net())
    elif source == "started":
        model = adq.start_from_(fresh(), model)
    batch = images(3, 16), torch.arange(16) % 4
    scores = {c.name: c.scores for c in adq.sensitivity(model, [batch], F.cross_entropy, (2,), "loss").layers}

    def loss(alone: str | None = None) -> float:
        with quantizers_enabled(model, weights=False, activations=True), torch.no_grad():
            if alone is not None:
                quantizer = model.get_submodule(alone).weight_quantizer
                quantizer.enabled = True
            return float(F.cross_entropy(model.eval()(batch[0]), batch[1]))

    probe = copy.deepcopy(model)
    set_weight_bits(model, {"body.0": 2})
    assert scores["body.0"][2] == pytest.approx(loss("body.0") - loss(), abs=1e-6)
    with pytest.raises(ValueError, match="second derivatives, which learned thresholds do not have"):
        adq.sensitivity(probe, [batch], F.cross_entropy, (2,), "hessian")
    for estimator in ("fisher", "true_fisher", "kl"):
        adq.sensitivity(probe, [batch], F.cross_entropy, (2,), estimator)


def folded() -> nn.Module:
    torch.manual_seed(0)
    model = adq.quantize_(net(), ADQConfig(weight=TENSOR))
    return adq.fold_batch_norm_(adq.calibrate_(model, [images()]))


@pytest.mark.parametrize(
    ("model", "start", "message"),
    [
        (net, trained, "takes quantized models"),
        (fresh, net, "takes quantized models"),
        (lambda: adq.pack_(trained()), trained, "a model to train needs float weights"),
        (fresh, folded, "no batch norms any more"),
        (fresh, fresh, "the start is not calibrated"),
        (fresh, lambda: trained(Block), "of another architecture: .*body.0.weight is in one of them only"),
        (
            lambda: fresh(Block),
            lambda: trained(lambda: Block(num_classes=5)),
            r"of another architecture: head.bias is \(5,\), not \(4,\)",
        ),
        (fresh, lambda: trained(first_last_bits=None), "only one quantizes the input of head; stem"),
        (lambda: fresh(activation=None, first_last_bits=None), trained, "only one quantizes the input of body.0"),
    ],
)
def test_what_cannot_be_a_start_changes_nothing(model, start, message):
    model = model()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adq.start_from_(model, start())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("spoil", [0.0, torch.nan])
def test_a_weight_that_no_codebook_fits_changes_nothing(spoil):
    start, model = trained(), fresh()
    with torch.no_grad():
        start.head.weight.fill_(spoil)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="layer 'head'"):
        adq.start_from_(model, start)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Noted(nn.Linear):
    """Has a state that is no tensor, and a version that it asks for."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        assert local_metadata.get("version") == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def get_extra_state(self) -> dict:
        return {"epoch": 3}

    def set_extra_state(self, state: dict) -> None:
        pass


def test_what_is_no_tensor_of_a_state_is_left_where_it_is():
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = adq.quantize_(nn.Sequential(nn.Linear(4, 4), Noted(4, 4), nn.Linear(4, 4)), ADQConfig(weight=TENSOR))
        models.append(adq.calibrate_(model, [torch.randn(8, 4)]))
    adq.summary(models[0])
    adq.start_from_(*models)
    torch.testing.assert_close(models[0][1].weight, models[1][1].weight)


def is_guarded(model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="has been trained"):
        adq.calibrate_(model, [images()])
    with pytest.raises(RuntimeError, match="has been trained"):
        adq.correct_batch_norm_(model, [images()])


def test_a_file_of_what_began_from_a_trained_network_is_of_a_trained_one(tmp_path):
    model = adq.start_from_(fresh(), trained())
    is_guarded(model)
    is_guarded(adq.load(adq.save(model, tmp_path / "m.safetensors"), net()))
    other = fresh()
    other.load_state_dict(model.state_dict())
    is_guarded(other)


def test_a_trained_network_of_other_widths_is_a_trained_one(tmp_path):
    model = adq.load(adq.save(trained(first_last_bits=None), tmp_path / "m.safetensors"), net())
    set_weight_bits(model, dict.fromkeys(("body.0", "body.2"), 2))
    is_guarded(model)


def test_quantizers_that_are_off_stay_off_while_a_trained_network_is_scored():
    model = trained(first_last_bits=None)
    expected = adq.sensitivity(model, [(images(), torch.arange(8) % 4)], F.cross_entropy, (2,), "loss")
    before = copy.deepcopy(model.body[0].input_quantizer)
    model.body[0].input_quantizer.enabled = False
    found = adq.sensitivity(model, [(images(), torch.arange(8) % 4)], F.cross_entropy, (2,), "loss")
    assert not model.body[0].input_quantizer.enabled and found != expected
    assert_same_state(model.body[0].input_quantizer, before)

"""Batch-norm statistics: corrected for quantization before training, estimated anew after it."""

from __future__ import annotations

import copy
import os
import pickle
from collections import UserDict

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import adq
from adq import ADQConfig, WeightConfig
from adq.batch_norm import _float_statistics, float_statistics
from adq.convert import quantizers_enabled

from .networks import images, net, train

ROOT = os.environ.get("ADQ_TEST_DATA")


class Chain(nn.Module):
    """Two convolutions, each with its batch norm, and a norm over features that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)
        self.shared, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.norm2(self.conv2(x))).mean((2, 3))
        return self.head(self.shared(input=torch.relu(self.shared(x))))


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for norm in norms(model) for buffer in (norm.running_mean, norm.running_var)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def chain(bits: int = 2) -> Chain:
    torch.manual_seed(0)
    model = Chain()
    model.train()
    for seed in range(30):  # running statistics of a distribution other than that of the calibration batches
        model(1.5 * images(seed, 32) + 0.3)
    adq.quantize_(model.eval(), ADQConfig(weight=WeightConfig(bits=bits), first_last_bits=bits))
    return model


def normalised(model: nn.Module, x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance of each norm's output over the batch, float64, in order of the calls."""
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: object, output: Tensor) -> None:
        values = output.double().movedim(1, 0).flatten(1)
        seen.append((values.mean(1), values.var(1, correction=0)))

    handles = [norm.register_forward_hook(look) for norm in norms(model)]
    with torch.no_grad():
        model.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_the_quantized_network_gets_the_float_networks_normalised_moments(eps):
    class Plain(Chain):
        def forward(self, x: Tensor) -> Tensor:  # each norm once, so that one pair of statistics can be exact
            x = torch.relu(self.norm1(self.conv1(x)))
            return self.head(self.shared(torch.relu(self.norm2(self.conv2(x))).mean((2, 3))))

    model = chain()
    model.__class__ = Plain
    for norm in norms(model):
        norm.eps = eps
    x = images(99, 64)
    with quantizers_enabled(model, weights=False, activations=False):
        expected = normalised(model, x)
    adq.calibrate_(model, [x], batch_norm=False)
    uncorrected = normalised(model, x)
    adq.correct_batch_norm_(model, [x])
    for (mean, var), (mean_before, _), (mean_float, var_float) in zip(
        normalised(model, x), uncorrected, expected, strict=True
    ):
        torch.testing.assert_close(mean, mean_float, rtol=0, atol=2e-5)
        torch.testing.assert_close(var, var_float, rtol=1e-4, atol=2e-5)
        assert float((mean_before - mean_float).abs().max()) > 1e-2


def test_a_channel_that_the_batches_do_not_see_vary_keeps_its_variance():
    model = adq.quantize_(nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval())
    adq.calibrate_(model, [torch.full((8, 1, 4, 4), 1.7)])
    torch.testing.assert_close(model[1].running_var, torch.ones(4), rtol=1e-4, atol=0)


def test_without_quantization_nothing_changes():
    model = chain()
    before = statistics(model)
    with quantizers_enabled(model, weights=False, activations=False):
        adq.correct_batch_norm_(model, [images(1), images(2)])
    for now, then in zip(statistics(model), before, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-6, atol=1e-6)


def test_a_second_call_starts_from_the_float_networks_statistics():
    model = chain()
    before = statistics(model)
    batches = [images(seed) for seed in range(3)]
    adq.calibrate_(model, batches)
    once = statistics(model)
    assert not same(once, before)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        adq.calibrate_(other, batches)
        assert same(statistics(other), once)
        with float_statistics(other):
            assert same(statistics(other), before)
        assert same(statistics(other), once)


def test_a_file_keeps_the_float_networks_statistics(tmp_path):
    model, plain = chain(), chain()
    before, batches = statistics(model), [images(seed) for seed in range(3)]
    adq.calibrate_(model, batches)
    adq.save(model, tmp_path / "model.safetensors")
    loaded = adq.load(tmp_path / "model.safetensors", Chain())
    assert same(statistics(loaded), statistics(model))
    with float_statistics(loaded):
        assert same(statistics(loaded), before)
    adq.correct_batch_norm_(loaded, batches)
    assert same(statistics(loaded), statistics(model))
    adq.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    adq.save(plain, tmp_path / "plain.safetensors")
    kept = {key for key in load_file(tmp_path / "model.safetensors") if "float_running" in key}
    assert len(kept) == 2 * len(norms(model))
    assert not any("float_running" in key for key in load_file(tmp_path / "plain.safetensors"))
    model.norm1.running_mean += 1.0  # as training does
    adq.save(model, tmp_path / "trained.safetensors")
    assert {key for key in load_file(tmp_path / "trained.safetensors") if "float_running" in key} == {
        key for key in kept if "norm1" not in key
    }


def test_the_float_networks_statistics_follow_the_model():
    model = chain()
    before = model.norm1.running_mean.clone()
    adq.calibrate_(model, [images()])
    mean, var = _float_statistics(model.double().norm1)
    assert mean.dtype == var.dtype == torch.float64  # and to its device
    assert torch.equal(mean, before.double()) and not torch.equal(mean, model.norm1.running_mean)


def test_an_iterator_of_batches_and_a_list_give_the_same():
    one, other = chain(), chain()
    adq.calibrate_(one, [images(1), images(2, 5)])
    adq.calibrate_(other, iter([(images(1), None), (images(2, 5), None)]))
    assert same(statistics(one), statistics(other))


def test_sensitivity_is_that_of_the_float_network():
    labels = torch.arange(8) % 4
    tables = []
    for corrected in (False, True):
        model = chain()
        adq.calibrate_(model, [images()], batch_norm=corrected)
        present = statistics(model)
        tables.append(adq.sensitivity(model, [(images(), labels)], F.cross_entropy, (2, 4), "loss"))
        assert same(statistics(model), present)
    assert tables[0] == tables[1]


def test_a_trained_network_keeps_its_own_statistics():
    model = adq.calibrate_(adq.quantize_(net()), [images()])
    train(model)
    present = statistics(model)
    adq.calibrate_(model, [images()], force=True)
    assert same(statistics(model), present)
    with float_statistics(model):
        assert same(statistics(model), present)


def test_a_failure_changes_nothing():
    model = chain()
    adq.calibrate_(model, [images()], batch_norm=False)
    before, flags = statistics(model), [norm.training for norm in norms(model)]
    for change in (adq.correct_batch_norm_, adq.reestimate_batch_norm_):
        with pytest.raises(RuntimeError, match="expected input"):
            change(model, [images(), torch.zeros(1, 2, 8, 8)])
        with pytest.raises(ValueError, match="no batches"):
            change(model, [])
        assert same(statistics(model), before)
        assert [norm.training for norm in norms(model)] == flags
        assert [norm.momentum for norm in norms(model)] == [0.1] * 3
        assert not any(norm._forward_pre_hooks for norm in norms(model))


def test_networks_without_batch_norm_are_left_alone():
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False)))
    adq.calibrate_(model, [torch.randn(6, 4)])
    assert adq.reestimate_batch_norm_(model, []) is model
    assert adq.correct_batch_norm_(model, []) is model


def test_reestimation_is_the_mean_over_samples():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9))
    model[1].momentum = None
    model.train()
    batches = [images(1, 8), images(2, 2)]
    adq.reestimate_batch_norm_(model, [{"input": x} for x in batches])
    seen = [model[0](x).detach().double().movedim(1, 0).flatten(1) for x in batches]
    mean = (8 * seen[0].mean(1) + 2 * seen[1].mean(1)) / 10
    var = (8 * seen[0].var(1) + 2 * seen[1].var(1)) / 10
    torch.testing.assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model[1].running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert model[1].momentum is None and all(module.training for module in model.modules())


def calibrated() -> Chain:
    return adq.calibrate_(chain(), [images()], batch_norm=False)


class Mapped(nn.Module):
    """Takes its inputs by name, as Hugging Face's models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values: Tensor, mask: object = None) -> Tensor:
        return self.inner(pixel_values)


def test_batches_that_are_mappings_but_no_dicts():
    plain, mapped = calibrated(), Mapped(calibrated())
    batches = [images(1, 8), images(2, 2)]
    for change in (adq.correct_batch_norm_, adq.reestimate_batch_norm_):
        change(plain.eval(), batches)
        change(mapped.eval(), [UserDict(mask=None, pixel_values=x) for x in batches])
        assert same(statistics(plain), statistics(mapped.inner))


def test_empty_batches_say_nothing():
    model, same_model = calibrated(), calibrated()
    for change in (adq.correct_batch_norm_, adq.reestimate_batch_norm_):
        change(model, [images(1, 8), images(1, 8)[:0], images(2, 2)])
        change(same_model, [images(1, 8), images(2, 2)])
        assert same(statistics(model), statistics(same_model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_is_refused_by_name(value):
    model = calibrated()
    before = statistics(model)

    def float_estimate(model: nn.Module, batches: list[Tensor]) -> None:  # an activation quantizer clips infinity
        with quantizers_enabled(model, weights=False, activations=False):
            adq.reestimate_batch_norm_(model, batches)

    for change in (adq.correct_batch_norm_, float_estimate):
        with pytest.raises(ValueError, match="NaN or infinity among the inputs of batch norm 'norm1'"):
            change(model, [images(), images() * value])
        assert same(statistics(model), before)


def test_a_single_value_has_no_variance():
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    with pytest.raises(ValueError, match="a single value for each channel of batch norm '1'"):
        adq.reestimate_batch_norm_(model, [torch.randn(8, 4), torch.randn(1, 4)])
    assert statistics(model)[0].tolist() == [0.0] * 6


def test_reestimation_counts_every_call_of_a_norm():
    model = nn.Sequential(shared := nn.BatchNorm1d(3, affine=False), nn.Tanh(), shared)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    adq.reestimate_batch_norm_(model, [x])
    inside = torch.tanh((x - x.mean(0)) / x.var(0, correction=0).sqrt())
    torch.testing.assert_close(shared.running_mean, (x.mean(0) + inside.mean(0)) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shared.running_var, (x.var(0) + inside.var(0)) / 2, rtol=1e-4, atol=1e-5)


def test_synchronized_norms_estimate_without_a_process_group():
    plain, synchronized = calibrated(), nn.SyncBatchNorm.convert_sync_batchnorm(calibrated())
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronized.modules())
    for model in (plain, synchronized):
        adq.reestimate_batch_norm_(model, [images(1, 8), images(2, 2)])
    assert same(statistics(plain), statistics(synchronized))


@pytest.mark.skipif(not ROOT, reason="ADQ_TEST_DATA is not set (folder with weights/ and cifar10/)")
@pytest.mark.parametrize(("bits", "least"), [(3, 86.0), (4, 90.0)])
def test_real_network_holds_without_training(bits, least):
    """Weights and activations at ``bits``, float 91.73; without the correction 77.8 at 3 bits."""
    from adq.train.data import DataConfig, build_data

    data = build_data(DataConfig(name="imagefolder", root=f"{ROOT}/cifar10", batch_size=250))
    model = adq.create_model("resnet20", 10)
    adq.load_float_weights(model, f"{ROOT}/weights/resnet20-cifar10.safetensors")
    config = ADQConfig(weight=WeightConfig(bits=bits), activation=adq.ActivationConfig(bits=bits))
    adq.calibrate_(adq.quantize_(model.eval(), config), data.calibration)
    right = total = 0
    for i, (x, y) in enumerate(data.test):
        if i % 4 == 0:  # every fourth batch, a quarter of each class: the whole is in benchmarks/results
            with torch.no_grad():
                right += int((model(x).argmax(1) == y).sum())
            total += len(y)
    assert total == 2500
    assert 100 * right / total >= least


@pytest.mark.parametrize("change", [adq.reestimate_batch_norm_, adq.correct_batch_norm_])
@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), lambda m: m.compile(backend="eager") or m]
)
def test_a_compiled_network_is_looked_into_too(change, wrap):
    model = adq.calibrate_(chain(), [images(5)], batch_norm=False).eval()
    plain = copy.deepcopy(model)
    compiled = wrap(model)
    compiled(images(1, 32))
    change(compiled, [images(1, 32)])
    change(plain, [images(1, 32)])
    assert same(statistics(compiled), statistics(plain))


def test_a_norm_that_fails_leaves_the_others_with_their_float_statistics():
    model = chain()
    adq.calibrate_(model, [images()])
    before, in_float = statistics(model), [_float_statistics(norm) for norm in norms(model)]
    handle = model.norm2.register_forward_pre_hook(lambda norm, args: (args[0] * 1e25,))
    with pytest.raises(ValueError, match="batch norm 'norm2'"):
        adq.correct_batch_norm_(model, [images(1)])
    handle.remove()
    assert same(statistics(model), before)
    for norm, known in zip(norms(model), in_float, strict=True):
        assert same(list(_float_statistics(norm)), list(known))
        assert not same(list(known), [norm.running_mean, norm.running_var])

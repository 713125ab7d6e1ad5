"""The mean of the weights over the last steps: against float64, saved and restored, with codebooks of its own."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig

from .networks import images, net

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")

from adq.train.averaging import WeightMean
from adq.train.config import PhaseConfig


def model_of(update: str = "ema") -> nn.Module:
    config = ADQConfig(weight=WeightConfig(bits=3, update=update), activation=ActivationConfig(3), first_last_bits=8)
    return adq.calibrate_(adq.quantize_(net(), config), [images()])


def steps(model: nn.Module, mean: WeightMean, seeds) -> list[dict[str, torch.Tensor]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for seed in seeds:
        optimizer.zero_grad()
        F.cross_entropy(model.train()(images(seed)), torch.arange(8) % 4).backward()
        optimizer.step()
        mean.update()
        seen.append({name: parameter.detach().double().clone() for name, parameter in model.named_parameters()})
    return seen


@pytest.mark.parametrize("update", ["ema", "frozen", "gradient", "step"])
def test_it_is_the_mean_of_all_parameters_and_has_codebooks_of_its_own(update, tmp_path):
    model = model_of(update).to(memory_format=torch.channels_last)
    mean = WeightMean(model)
    seen = steps(model, mean, range(5))
    save_file(mean.state(), tmp_path / "mean.safetensors")
    other = WeightMean(model)
    other.restore(load_file(tmp_path / "mean.safetensors"))
    seen += steps(model, other, range(5, 7))
    last = copy.deepcopy(model.state_dict())
    other.apply_()
    fitted = adq.quantize_(net(), ADQConfig(weight=WeightConfig(bits=3, update=update), first_last_bits=8))
    fitted.to(memory_format=torch.channels_last)
    fitted.load_state_dict({k: v for k, v in model.state_dict().items() if "quantizer" not in k})
    for name, parameter in model.named_parameters():
        if "weight_quantizer" in name:
            continue
        expected = torch.stack([values[name] for values in seen]).mean(0).float()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-7)
    assert not torch.equal(model.head.weight, last["head.weight"])
    for layer in ("stem", "body.0", "head"):
        quantizer, expected = (network.get_submodule(layer).weight_quantizer for network in (model, fitted))
        assert torch.equal(quantizer.levels, expected.levels) and torch.equal(quantizer.scale, expected.scale)
        assert int(quantizer.steps) == 7
    steps(model.train(), other, [8])  # and it can be trained on


def test_an_average_that_torch_keeps_gets_codebooks_of_its_own_as_a_start():
    model = model_of()
    mean, averaged = WeightMean(model), AveragedModel(model)
    for seed in range(4):
        steps(model, mean, [seed])
        averaged.update_parameters(model)
    started = adq.start_from_(model_of(), averaged.module)
    stale = averaged.module.stem.weight_quantizer.levels
    mean.apply_()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(dict(started.named_parameters())[name], parameter, rtol=1e-5, atol=1e-6)
    for layer in ("stem", "body.0", "head"):
        found, expected = (network.get_submodule(layer).weight_quantizer.levels for network in (started, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stale, model.stem.weight_quantizer.levels, rtol=1e-4, atol=1e-5)


def test_nothing_taken_in_changes_nothing():
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    mean = WeightMean(model)
    mean.restore(WeightMean(model).state())
    mean.apply_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"average_epochs": 2}, "set reestimate_batches"),
        ({"average_epochs": 3, "epochs": 2, "reestimate_batches": 9}, "of the last of 2 epochs, got 3"),
        ({"average_epochs": -1}, "must not be negative"),
    ],
)
def test_averages_that_cannot_be(values, message):
    with pytest.raises(ValueError, match=message):
        PhaseConfig(**values)
    PhaseConfig(average_epochs=2, epochs=0, reestimate_batches=9)  # calibrated alone

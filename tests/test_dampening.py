"""The pull of weights towards their codewords, against float64, and what it does in training."""

from __future__ import annotations

import pytest
import torch
from every import FLOAT, SNAPPED, STEP
from networks import LAYERS, images, net, quantized
from torch import nn

import adq
from adq import ADQConfig, WeightConfig


@pytest.mark.parametrize("weight", [FLOAT, SNAPPED, STEP, {"bits": 2, "update": "gradient"}])
def test_value_and_gradient(weight):
    model = quantized(weight=WeightConfig(**weight))
    loss = adq.dampening_loss(model)
    loss.backward()
    total = 0.0
    for name in LAYERS:
        layer = model.get_submodule(name)
        distance = layer.weight.detach().double() - layer.quantized_weight().detach().double()
        total += 0.5 * distance.square().sum().item()
        torch.testing.assert_close(layer.weight.grad.double(), distance, atol=1e-7, rtol=1e-6)
        assert all(parameter.grad is None for parameter in layer.weight_quantizer.parameters())
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert total > 0


def test_a_shared_weight_counts_once():
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    model = adq.quantize_(tied, ADQConfig(first_last_bits=2, activation=None))
    distance = model[0].weight.detach() - model[0].quantized_weight().detach()
    assert adq.dampening_loss(model).item() == pytest.approx(0.5 * distance.square().sum().item())


def test_weights_come_to_rest_on_their_codewords():
    model = quantized(weight=WeightConfig(bits=2, update="frozen"))
    before = adq.dampening_loss(model).item()
    optimizer = torch.optim.SGD([model.get_submodule(name).weight for name in LAYERS], lr=0.5)
    for _ in range(30):
        optimizer.zero_grad()
        adq.dampening_loss(model).backward()
        optimizer.step()
    assert adq.dampening_loss(model).item() < 1e-6 * before


def test_a_forward_pass_before_it_changes_nothing():
    model = quantized()
    expected = adq.dampening_loss(model).item()
    model(images()).sum().backward()
    assert adq.dampening_loss(model).item() == expected


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="no weight of the model is quantized"):
        adq.dampening_loss(net())

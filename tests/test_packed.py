"""Inference layers: what they predict, what they keep, and what they refuse."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import images, net, quantized, train
from torch import nn

import adq
from adq import ADQConfig, WeightConfig
from adq.nn import PackedLayer, PackedWeight

X = images(9)


@pytest.fixture
def model() -> nn.Module:
    return train(quantized()).eval()


def test_packing_changes_no_bit_of_the_predictions(model):
    expected = model(X)
    weights = {name: module.quantized_weight() for name, module in adq.convert.quantized_layers(model).items()}
    packed = adq.pack_(model)
    assert packed is model
    assert torch.equal(packed(X), expected)
    for name, weight in weights.items():
        layer = packed.get_submodule(name)
        assert isinstance(layer, PackedLayer)
        assert torch.equal(layer.weight, weight)
        assert f"{name}.codes" in packed.state_dict()
        assert f"{name}.weight" not in packed.state_dict()
    assert not any(tensor.requires_grad for tensor in packed.parameters())
    assert adq.pack_(packed) is packed


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, copied):
    other = copied(adq.pack_(model))
    assert torch.equal(other(X), model(X))
    other.stem.codes.zero_()
    assert not torch.equal(other(X), model(X))


def test_a_state_dict_goes_round(model):
    other = adq.pack_(train(quantized(seed=1)))
    other.load_state_dict(adq.pack_(model).state_dict())
    assert torch.equal(other(X), model(X))


def test_casts_keep_the_tables(model):
    half = copy.deepcopy(adq.pack_(model)).bfloat16()
    quantizer = half.stem.weight_quantizer
    assert quantizer.codebook.dtype == quantizer.scale.dtype == torch.float32
    assert half.stem.weight.dtype == torch.bfloat16
    assert torch.equal(half.stem.weight, model.stem.weight.bfloat16())
    assert half(X.bfloat16()).dtype == torch.bfloat16


def test_moving_keeps_shared_codes_shared():
    first = nn.Linear(4, 4)
    tied = nn.Sequential(first, nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = first.weight
    packed = adq.pack_(adq.quantize_(tied, ADQConfig(activation=None)))
    moved = packed.to("meta")
    assert moved[0].codes is moved[2].codes
    assert moved[0].codes.device.type == "meta"


def test_summary_and_report(model, tmp_path):
    before = adq.summary(model)
    after = adq.summary(adq.pack_(model))
    assert (after.bytes_packed, after.bytes_float) == (before.bytes_packed, before.bytes_float)
    assert after.average_bits_network == before.average_bits_network
    assert "PackedConv2d" in adq.report(model, tmp_path / "r.html").read_text()


def test_what_a_packed_model_refuses(model, tmp_path):
    packed = adq.pack_(model)
    refused = [
        lambda: adq.calibrate_(packed, [images()]),
        lambda: adq.correct_batch_norm_(packed, [images()]),
        lambda: adq.apply_allocation_(packed, {"stem": 2}),
        lambda: adq.save(packed, tmp_path / "m.safetensors"),
    ]
    for call in refused:
        with pytest.raises(ValueError, match="needs float weights, and this model is packed"):
            call()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError, match="layer 'stem' is packed and cannot train"):
        packed.train()(images())
    with pytest.raises(ValueError, match="not quantized"):
        adq.pack_(net())


@pytest.mark.parametrize("weight", [{"update": "gradient"}, {"update": "step"}, {"snap": "int8"}, {"scale": "tensor"}])
def test_other_codebooks(weight):
    model = train(quantized(weight=WeightConfig(**weight))).eval()
    expected = model(X)
    assert torch.equal(adq.pack_(model)(X), expected)
    assert isinstance(model.stem.weight_quantizer, PackedWeight)

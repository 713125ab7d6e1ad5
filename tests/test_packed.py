"""Inference layers: what they predict, what they keep, and what they refuse."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from networks import images, net, quantized, train
from torch import nn
from torch.nn.utils import prune

import adq
from adq import ADQConfig, WeightConfig
from adq.nn import PackedLayer, PackedWeight, QConv2d

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


class Tied(nn.Module):
    """An autoencoder whose decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.encoder(x)) @ self.encoder.weight


def test_code_that_reads_a_weight_gets_the_quantized_one():
    torch.manual_seed(0)
    x = torch.randn(6, 12)
    model = adq.calibrate_(adq.quantize_(Tied(), ADQConfig(first_last_bits=2)), [x]).eval()
    hidden, quantized = torch.relu(model.encoder(x)), model.encoder.quantized_weight()
    assert torch.equal(model(x), hidden @ model.encoder.weight)
    assert torch.equal(adq.pack_(model)(x), hidden @ quantized)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(model, copied):
    other = copied(adq.pack_(model))
    assert torch.equal(other(X), model(X))
    other.stem.codes.zero_()
    assert not torch.equal(other(X), model(X))


def test_pickles_of_an_older_adq_do_not_say_the_width(model):
    expected = adq.pack_(model)(X)
    del model.stem.weight_quantizer.width
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)


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


def in_every_format() -> nn.Module:
    """Weights of four and five dimensions, of one tap too, and such as have their outputs second."""
    layers = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 8, 1), nn.ConvTranspose2d(8, 6, (2, 3), groups=2), nn.Flatten(1)
    torch.manual_seed(0)
    return adq.quantize_(nn.Sequential(*layers, nn.Linear(420, 4)), ADQConfig(activation=None)).eval()


def test_channels_last_models_decode_channels_last_weights(tmp_path):
    model, x = in_every_format(), torch.randn(2, 3, 8, 10, generator=torch.Generator().manual_seed(1))
    weights = [model[i].quantized_weight().clone() for i in (0, 1, 2, 4)]
    stored = adq.pack_(copy.deepcopy(model)).state_dict()
    moved = adq.pack_(copy.deepcopy(model)).to(memory_format=torch.channels_last)
    born = adq.pack_(copy.deepcopy(model).to(memory_format=torch.channels_last))
    for packed in (moved, born, copy.deepcopy(born).bfloat16().float(), pickle.loads(pickle.dumps(born))):
        assert [torch.equal(packed[i].weight, w) for i, w in zip((0, 1, 2, 4), weights, strict=True)] == [True] * 4
        for i in (0, 1, 2):
            assert packed[i].weight.is_contiguous(memory_format=torch.channels_last)
        state = packed.state_dict()
        assert state.keys() == stored.keys()
        assert all(torch.equal(state[key], stored[key]) for key in stored if not key.endswith("bias"))
    assert torch.allclose(moved(x), model(x), atol=1e-5)
    fresh = adq.pack_(in_every_format().to(memory_format=torch.channels_last))
    fresh[0].codes.zero_()
    fresh.load_state_dict(stored)
    assert torch.equal(fresh[0].weight, weights[0])
    back = fresh.to(memory_format=torch.contiguous_format)
    assert torch.equal(back[0].codes, stored["0.codes"])


def test_channels_last_models_without_memory_take_a_state_dict():
    packed = adq.pack_(in_every_format().to(memory_format=torch.channels_last))
    empty = copy.deepcopy(packed).to("meta")
    empty.load_state_dict(packed.state_dict(), assign=True)
    assert torch.equal(empty[0].weight, packed[0].weight)
    assert empty[0].weight.stride() == packed[0].weight.stride()


def test_files_of_channels_last_models_are_the_same(model, tmp_path):
    adq.save(model, tmp_path / "a.safetensors", packed=True)
    packed = adq.pack_(model.to(memory_format=torch.channels_last))
    adq.save(packed, tmp_path / "b.safetensors", packed=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_weights_of_five_dimensions_can_be_channels_last():
    model = adq.quantize_(nn.Sequential(nn.Conv3d(3, 4, (2, 3, 2))), ADQConfig(activation=None)).eval()
    weight = model[0].quantized_weight().clone()
    packed = adq.pack_(model).to(memory_format=torch.channels_last_3d)
    assert torch.equal(packed[0].weight, weight)
    assert packed[0].weight.is_contiguous(memory_format=torch.channels_last_3d)


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("fast", [False, True])
def test_torchscript_traces_packed_models(fast):
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), ADQConfig(activation=None))
    packed, x = adq.pack_(model), torch.randn(2, 6)
    packed = adq.fast_linear_(packed) if fast else packed.to(memory_format=torch.channels_last)
    assert torch.equal(torch.jit.trace(packed, x)(x), packed(x))


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


class Own(QConv2d):
    """A quantized layer of a class that adq does not know."""


def change_class(layer: nn.Module) -> None:
    layer.__class__ = Own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
            "weight of layer 'body.2' is recomputed at each call",
        ),
        (lambda layer: prune.l1_unstructured(layer, "bias", 0.5), "bias of layer 'body.2' is recomputed at each call"),
        (
            nn.utils.parametrizations.weight_norm,
            "weight of layer 'body.2' is recomputed .* remove the parametrization first",
        ),
        (change_class, "layer 'body.2' is a Own, of which there is no inference layer"),
    ],
)
def test_all_layers_are_packed_or_none(model, change, message, tmp_path):
    """And no file is written that could not be loaded."""
    change(model.body[2])
    expected, kinds = model(X), [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        adq.pack_(model.train())
    assert model.training and [type(module) for module in model.modules()] == kinds
    assert torch.equal(model.eval()(X), expected)
    for packed in (False, True) if change is not change_class else ():
        with pytest.raises(ValueError, match=message):
            adq.save(model, tmp_path / "m.safetensors", packed=packed)
    assert not list(tmp_path.iterdir())


class Reading(nn.Module):
    """Reads the weight of a layer that it does not call, as timm's EVA does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.read, self.last = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.first(x)) @ self.read.weight)


def test_layers_that_calibration_never_reached_are_named(tmp_path):
    x, path = torch.randn(6, 12), tmp_path / "m.safetensors"
    uncalibrated = adq.quantize_(Reading())
    with pytest.warns(UserWarning, match="never reached by the batches: read;"):
        model = adq.calibrate_(adq.quantize_(Reading()), [x])
    message = "never reached by calibration: read; code that reads the weight"
    with pytest.warns(UserWarning, match=message):
        adq.save(model, path, packed=True)
    with pytest.warns(UserWarning, match=message):
        adq.pack_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adq.save(adq.load(path, Reading()), path, packed=True)  # it is so already
        adq.pack_(uncalibrated)


@pytest.mark.parametrize("weight", [{"update": "gradient"}, {"update": "step"}, {"snap": "int8"}, {"scale": "tensor"}])
def test_other_codebooks(weight):
    model = train(quantized(weight=WeightConfig(**weight))).eval()
    expected = model(X)
    assert torch.equal(adq.pack_(model)(X), expected)
    assert isinstance(model.stem.weight_quantizer, PackedWeight)

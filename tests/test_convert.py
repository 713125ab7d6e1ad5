"""From float to quantized and back through state dicts, copies and calibration."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adq
from adq import ActivationConfig, ADQConfig, WeightConfig, convert
from adq.nn import ActivationQuantizer, QConv2d, QLinear, QuantizedLayer, WeightQuantizer
from adq.thresholds import fit_thresholds


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


LAYERS = ["stem", "body.0", "body.2", "head"]


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def images(seed: int = 0, count: int = 8) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def quantized(seed: int = 0, **config) -> Net:
    model = adq.quantize_(net(seed), ADQConfig(**config))
    return adq.calibrate_(model, [images()])


def train(model: nn.Module, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for seed in range(steps):
        optimizer.zero_grad()
        model(images(seed)).square().mean().backward()
        optimizer.step()
    return model


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


# ---- conversion --------------------------------------------------------------------------------------


def test_parameters_keep_their_names_and_identity():
    model = net()
    before = dict(model.named_parameters())
    modules = dict(model.named_modules())
    assert adq.quantize_(model) is model
    after = {name: p for name, p in model.named_parameters() if "quantizer" not in name}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert list(convert.quantized_layers(model)) == LAYERS
    assert isinstance(model.body[0], QConv2d)
    assert isinstance(model.body[0], nn.Conv2d)


def test_the_model_itself_may_be_the_layer():
    model = adq.quantize_(nn.Linear(4, 4), ADQConfig(activation=None))
    assert type(model) is QLinear
    assert set(model.state_dict()) >= {"weight", "bias", "weight_quantizer.codebook"}


@pytest.mark.parametrize(("bits", "expected"), [(8, [8, 3, 3, 8]), (5, [5, 3, 3, 5]), (None, [None, 3, 3, None])])
def test_first_and_last_layer(bits, expected):
    model = adq.quantize_(net(), ADQConfig(first_last_bits=bits))
    layers = [model.get_submodule(name) for name in LAYERS]
    assert [layer.weight_quantizer.bits if isinstance(layer, QuantizedLayer) else None for layer in layers] == expected
    inner = [layer for layer in layers if isinstance(layer, QuantizedLayer)]
    assert [layer.input_quantizer.config.bits for layer in inner] == [bits for bits in expected if bits]
    assert [layer.weight_quantizer.pinned for layer in inner] == [bits != 3 for bits in expected if bits]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"body.0": {"weight": {"bits": 2}}}, [8, 2, 3, 8]),
        ({"body.0": None}, [8, None, 3, 8]),
        ({"re:body\\..*": {"weight": {"bits": 4}}}, [8, 4, 4, 8]),
        (
            {"re:body": {"weight": {"bits": 4}}, "re:.*": None},
            "overrides match no layer: re:body; layers: stem, body.0",
        ),
        ({"type:Linear": {"weight": {"bits": 4}}}, [8, 3, 3, 4]),
        ({nn.Conv2d: None}, [None, None, None, 8]),
        ({"re:body.*": None, "body.2": {"weight": {"bits": 6}}}, [8, None, 6, 8]),  # later ones win
        ({"boddy.0": None}, "overrides match no layer: boddy.0"),
        ({nn.Conv3d: None}, "overrides match no layer: type:Conv3d"),
        ({"norm": None}, "overrides match no layer: norm"),
    ],
)
def test_overrides(overrides, expected):
    model, config = net(), ADQConfig(overrides=overrides)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            adq.quantize_(model, config)
        assert convert.quantized_layers(model) == {}
        return
    adq.quantize_(model, config)
    quantizers = [getattr(model.get_submodule(name), "weight_quantizer", None) for name in LAYERS]
    assert [q and q.bits for q in quantizers] == expected


def test_an_override_pins_only_with_bits_of_its_own():
    overrides = {"body.0": {"weight": {"refine": False}}, "body.2": {"weight": {"bits": 3}}}
    model = adq.quantize_(net(), ADQConfig(overrides=overrides))
    assert [model.get_submodule(name).weight_quantizer.pinned for name in LAYERS] == [True, False, True, True]


def test_weights_or_activations_alone():
    model = adq.quantize_(net(), ADQConfig(weight=None, first_last_bits=4))
    assert isinstance(model.body[0].weight_quantizer, nn.Identity)
    assert isinstance(model.body[0].input_quantizer, ActivationQuantizer)
    model = adq.quantize_(net(), ADQConfig(activation=None))
    assert isinstance(model.body[0].weight_quantizer, WeightQuantizer)
    assert isinstance(model.body[0].input_quantizer, nn.Identity)


def test_filter_fn_sees_modules_and_names():
    model = adq.quantize_(
        net(), filter_fn=lambda module, name: name.startswith("body") and module.kernel_size == (3, 3)
    )
    assert list(convert.quantized_layers(model)) == ["body.0"]
    with pytest.raises(ValueError, match="nothing to quantize"):
        adq.quantize_(net(), filter_fn=lambda module, name: False)


class Reparametrised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_layers_with_a_forward_of_their_own_stay_in_float():
    model = nn.Sequential(Reparametrised(1, 2, 3), nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Embedding(3, 4))
    adq.quantize_(model)
    assert list(convert.quantized_layers(model)) == ["2"]
    assert type(model[0]) is Reparametrised
    assert type(model[1].out_proj) is nn.modules.linear.NonDynamicallyQuantizableLinear


def test_transformer_encoders_do_not_slip_past_the_quantizers():
    """In evaluation without gradients torch's encoder has a fused kernel that reads the weights themselves."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(3, 5, 16), torch.arange(5).expand(3, 5) >= torch.tensor([[5], [3], [4]])
    adq.quantize_(model, ADQConfig(weight=WeightConfig(bits=2), activation=None))
    with torch.no_grad():
        without = model(x, src_key_padding_mask=mask)
    torch.testing.assert_close(without, model(x, src_key_padding_mask=mask).detach(), rtol=1e-5, atol=1e-5)


def test_shared_weights_share_a_quantizer():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    adq.quantize_(model)
    assert model[0].weight_quantizer is model[1].weight_quantizer
    assert model[0].input_quantizer is not model[1].input_quantizer
    assert list(convert.weight_quantizers(model)) == ["0", "2"]
    twin = copy.deepcopy(model)
    assert twin[0].weight_quantizer is twin[1].weight_quantizer


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda layer: nn.init.zeros_(layer.weight), r"every weight is zero.*\(layer 'body.2'\)"),
        (lambda layer: layer.weight.data[0].fill_(float("nan")), r"NaN or infinity \(layer 'body.2'\)"),
        (lambda layer: layer.weight.data[0].fill_(float("inf")), r"NaN or infinity \(layer 'body.2'\)"),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(0, 8, 1, 1))),
            r"the weight is empty \(layer 'body.2'\)",
        ),
    ],
)
def test_a_failing_conversion_changes_nothing(spoil, message):
    model = net()
    spoil(model.body[2])
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adq.quantize_(model)
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[key].nan_to_num(7), after[key].nan_to_num(7)) for key in before)


def test_nothing_is_quantized_twice_or_in_vain():
    with pytest.raises(ValueError, match="quantized already"):
        adq.quantize_(adq.quantize_(net()))
    with pytest.raises(ValueError, match="nothing to quantize"):
        adq.quantize_(nn.ReLU())


# ---- state dicts, copies -----------------------------------------------------------------------------


def test_a_float_state_dict_loads_strictly_and_refits():
    model, other = train(quantized()), net(seed=1)
    keys = model.load_state_dict(other.state_dict(), strict=True)
    assert keys.missing_keys == keys.unexpected_keys == []
    fresh = adq.quantize_(copy.deepcopy(other))
    for name in LAYERS:
        ours, theirs = model.get_submodule(name).weight_quantizer, fresh.get_submodule(name).weight_quantizer
        assert_same_state(ours, theirs)
        assert ours.steps == 0


def test_a_missing_weight_is_still_missed():
    state = net().state_dict()
    del state["body.0.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*body\.0\.weight"):
        quantized().load_state_dict(state)


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize(("bits", "levels"), [(2, "full"), (4, "symmetric"), (8, "full"), (1, "full")])
def test_a_state_dict_brings_its_own_bits(bits, levels, update):
    saved = train(quantized(weight=WeightConfig(bits=bits, levels=levels, update=update)))
    model = quantized(seed=1, weight=WeightConfig(bits=3, update=update))
    model.load_state_dict(saved.state_dict(), strict=True)
    assert_same_state(saved, model)
    assert model.body[0].weight_quantizer.bits == bits
    assert model.body[0].weight_quantizer.config == saved.body[0].weight_quantizer.config
    x = images(9)
    assert torch.equal(model.eval()(x), saved.eval()(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_duplicates_train_on_independently_and_equally(duplicate):
    model = train(quantized())
    before = copy.deepcopy(model.state_dict())
    twin = duplicate(model)
    assert_same_state(model, twin)
    train(twin)
    assert int(twin.body[0].weight_quantizer.steps) == 6
    assert not torch.equal(twin.body[0].weight_quantizer.codebook, model.body[0].weight_quantizer.codebook)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert_same_state(train(model), twin)


def test_set_weight_bits_is_all_or_nothing():
    model = quantized(weight=WeightConfig(levels="symmetric"))
    before = copy.deepcopy(model.state_dict())
    for bits, message in (
        ({"body.0": 4, "body.1": 4}, "no quantized layer 'body.1'; layers: stem, body.0, body.2, head"),
        ({"body.0": 4, "body.2": 9}, "bits of layer 'body.2' must be a whole number from 1 to 8"),
        ({"body.0": 4, "body.2": 1}, "needs at least 2 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.set_weight_bits(model, bits)
        assert [key for key, value in model.state_dict().items() if not torch.equal(before[key], value)] == []
    convert.set_weight_bits(model, {"body.0": 4})
    assert model.body[0].weight_quantizer.codebook.numel() == 15
    np.testing.assert_array_equal(model.body[2].weight_quantizer.codebook, before["body.2.weight_quantizer.codebook"])


# ---- calibration -------------------------------------------------------------------------------------


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
    with pytest.warns(UserWarning, match="not calibrated, never reached by the batches: unused"):
        adq.calibrate_(model, [torch.randn(3, 4)])
    assert [layer.input_quantizer.is_calibrated for layer in model.children()] == [True, False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized()


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
    else:
        adq.calibrate_(model, [images()])
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.equal(model.norm.running_mean, statistics)
    assert [layer.weight_quantizer.enabled for layer in convert.quantized_layers(model).values()] == [
        True,
        False,
        True,
        True,
    ]
    assert all(not layer._forward_pre_hooks for layer in convert.quantized_layers(model).values())

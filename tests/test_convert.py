"""From float to quantized; state dicts and copies of quantized models."""

from __future__ import annotations

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from networks import LAYERS, assert_same_state, images, net, quantized, train
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import adq
from adq import ADQConfig, WeightConfig, convert
from adq.nn import ActivationQuantizer, QConv2d, QLinear, QuantizedLayer, WeightQuantizer

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
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(
        ValueError, match="nothing to quantize"
    ):  # the projection is of the attention, which is not chosen
        adq.quantize_(attention, filter_fn=lambda module, name: isinstance(module, nn.Linear))


class Reparametrised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def test_layers_with_a_forward_of_their_own_stay_in_float():
    model = nn.Sequential(Reparametrised(1, 1, 3), nn.Linear(4, 4), nn.Embedding(3, 4))
    adq.quantize_(model)
    assert list(convert.quantized_layers(model)) == ["1"]
    assert type(model[0]) is Reparametrised


def patch(layer: nn.Module) -> None:
    layer.forward = layer.forward


@pytest.mark.parametrize("replace", [patch, lambda layer: add_hook_to_module(layer, ModelHook())])
def test_layers_whose_forward_has_been_replaced_are_refused(replace):
    """It is an attribute of the object, and would be called instead of that of the new class."""
    model = net()
    replace(model.body[0]), replace(model.head)
    with pytest.raises(ValueError, match=r"replaced the forward .* overrides or filter_fn: 'body\.0', 'head'"):
        adq.quantize_(model)
    assert not convert.quantized_layers(model)
    adq.quantize_(model, ADQConfig(overrides={"body.0": None}), lambda module, name: name != "head")
    assert list(convert.quantized_layers(model)) == ["stem", "body.2"]
    assert adq.summary(model).left_in_float["body.0"] == "override 'body.0'"


@pytest.mark.parametrize("lazy", [nn.LazyLinear(4), nn.LazyConv2d(4, 1), nn.LazyBatchNorm1d()])
def test_lazy_modules_run_first(lazy):
    model = nn.Sequential(nn.Linear(4, 4), lazy)
    with pytest.raises(ValueError, match="no weight yet, run one batch through the model first: '1'"):
        adq.quantize_(model)
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    model[1] = lazy
    with pytest.raises(ValueError, match="no weight yet, .*: '1'"):
        adq.summary(model)


def test_a_lazy_layer_that_has_run_is_a_layer_like_others():
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4), nn.LazyLinear(4))
    model(torch.zeros(1, 4))
    assert list(convert.quantized_layers(adq.quantize_(model))) == ["0", "1", "2"]


def test_names_in_a_wrapped_model_are_those_without_the_wrapper():
    wrapped, plain, batch = nn.DataParallel(net()), quantized(), (images(), images())
    assert adq.quantize_(wrapped) is wrapped
    assert adq.calibrate_(wrapped, [batch]) is wrapped
    assert list(convert.quantized_layers(wrapped)) == LAYERS
    assert adq.summary(wrapped) == adq.summary(plain)
    tables = [adq.sensitivity(m, [batch], lambda y, _: y.square().mean(), (2, 4)) for m in (wrapped, plain)]
    assert tables[0] == tables[1]
    allocation = adq.allocate(tables[0], adq.Budget(weight_bits=5))
    for model in (wrapped, plain):
        assert adq.apply_allocation_(model, allocation) is model
    other = quantized(seed=1)
    adq.start_from_(wrapped, other), adq.start_from_(plain, other)
    assert_same_state(convert.unwrapped(wrapped), plain)


class Conv1D(nn.Module):
    """As that of transformers: a linear layer of another class, with the weight transposed."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size, size)), nn.Parameter(torch.ones(size))


@pytest.mark.parametrize(
    ("layers", "arguments", "said"),
    [
        ([Conv1D(), Conv1D()], {}, "67% of the weights stay in float, .*: 2 Conv1D; adq.summary"),
        ([Conv1D(), nn.GRU(4, 4), Conv1D()], {}, "89% .*: 2 Conv1D, 1 GRU;"),
        ([nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))], {}, "56% .*: 1 ParametrizedLinear;"),
        ([Conv1D()], {}, None),
        ([nn.Embedding(99, 4), nn.EmbeddingBag(99, 4), nn.LayerNorm(99)], {}, None),
        ([Conv1D(9)], {"filter_fn": lambda module, name: True}, None),
        ([Conv1D(9), nn.Linear(4, 4)], {"config": ADQConfig(overrides={"re:[23]": None})}, None),
        ([nn.Linear(9, 9), nn.Linear(9, 9)], {"config": ADQConfig(overrides={"re:[23]": None})}, None),
        ([Conv1D(9)], {"config": ADQConfig(weight=None)}, None),
    ],
)
def test_a_network_of_kinds_that_stay_in_float_warns(layers, arguments, said):
    model = nn.Sequential(nn.Linear(4, 4), *copy.deepcopy(layers))
    model.insert(1, nn.Identity())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adq.quantize_(model, **arguments)
    assert len(caught) == (said is not None)
    if said:
        assert caught[0].filename == __file__
        with pytest.warns(UserWarning, match=said):
            warnings.warn_explicit(caught[0].message, UserWarning, __file__, 1)


@torch.inference_mode()
def test_a_model_that_was_quantized_in_inference_mode_trains():
    with torch.inference_mode(False):
        model = net()
    adq.calibrate_(adq.quantize_(model), [images()])
    adq.apply_allocation_(model, {"body.0": 2})
    with torch.inference_mode(False):
        assert train(model).body[0].weight_quantizer.steps == 3


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
    ("overrides", "agree"),
    [
        ({"1": {"weight": {"bits": 2}}}, False),
        ({"2": {"weight": {"bits": 2}}}, False),
        ({"2": {"weight": {"bits": 3}}}, False),  # a width that the allocator keeps
        ({"2": {"weight": {"scale": "tensor"}}}, False),
        ({"re:[12]": {"weight": {"bits": 2}}}, True),
        ({"2": {"weight": None}}, True),
        ({"2": {"activation": {"bits": 2}}}, True),
        ({"3": {"weight": {"bits": 2}}}, True),
        ({"0": {"weight": {"bits": 2}}}, False),
        ({}, True),
    ],
)
def test_overrides_of_layers_that_share_a_weight_must_agree(overrides, agree):
    """Of six layers 1 and 2 share one, and so do the first, which is at 8 bits, and 4."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    model[2].weight, model[4].weight = model[1].weight, model[0].weight
    if agree:
        assert convert.quantized_layers(adq.quantize_(model, ADQConfig(overrides=overrides)))
        return
    names = "'0' and '4'" if "0" in overrides else "'1' and '2'"
    with pytest.raises(ValueError, match=f"layers {names} share a weight, which is quantized once, .*match both"):
        adq.quantize_(model, ADQConfig(overrides=overrides))
    assert not convert.quantized_layers(model)


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
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(layer.weight.to(torch.complex64))),
            r"the weight is complex64, .* override \(layer 'body.2'\)",
        ),
        (
            lambda layer: setattr(layer, "weight", nn.Parameter(TwoTensor(layer.weight.data, layer.weight.data))),
            r"the weight is of TwoTensor, .*override \(layer 'body.2'\)",
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


@pytest.mark.parametrize("config", [WeightConfig(bits=3), {"weight": {"bits": 3}}, 3])
def test_what_is_no_configuration_is_refused(config):
    with pytest.raises(ValueError, match=f"quantize_ takes an ADQConfig, .*got {type(config).__name__}"):
        adq.quantize_(net(), config)


def test_double_precision_is_refused_by_name():
    model = net().double()
    with pytest.raises(ValueError, match=r"float64, .*; call model\.float\(\) \(layer 'stem'\)"):
        adq.quantize_(model)
    assert not any("quantizer" in name for name, _ in model.named_modules())


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


@pytest.mark.parametrize("recompute", [lambda x: prune.l1_unstructured(x, "weight", 0.5), nn.utils.spectral_norm])
def test_weights_that_are_recomputed_at_each_call_stay_in_float(recompute):
    model = net()
    recompute(model.body[0])
    with pytest.warns(UserWarning, match=r"77% .*: 1 Conv2d \(its weight is recomputed at each call\);"):
        adq.quantize_(model)
    assert list(convert.quantized_layers(model)) == ["stem", "body.2", "head"]
    assert "body.0" in str(adq.summary(model)) and "recomputed at each call" in str(adq.summary(model))

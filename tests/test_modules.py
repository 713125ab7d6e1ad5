"""Quantized layers: the float layer applied to quantized weight and input, as numpy quantizes them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from oracle import Activation, activation_levels, exact
from torch import Tensor, nn

import adq
from adq.config import ActivationConfig, LayerConfig, WeightConfig
from adq.nn import (
    ActivationQuantizer,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
    QLinear,
    WeightQuantizer,
)

CASES = {
    "linear": (nn.Linear, QLinear, (6, 5), {}, (3, 6)),
    "linear, no bias": (nn.Linear, QLinear, (6, 5), {"bias": False}, (2, 4, 6)),
    "conv1d": (nn.Conv1d, QConv1d, (4, 6, 3), {"padding": 1, "stride": 2}, (2, 4, 9)),
    "conv2d": (nn.Conv2d, QConv2d, (4, 6, 3), {"padding": 1}, (2, 4, 7, 6)),
    "conv3d": (nn.Conv3d, QConv3d, (2, 4, 3), {"padding": 1}, (2, 2, 4, 5, 3)),
    "grouped": (nn.Conv2d, QConv2d, (4, 6, 3), {"groups": 2, "bias": False}, (2, 4, 7, 6)),
    "depthwise": (nn.Conv2d, QConv2d, (4, 4, 3), {"groups": 4, "padding": 1}, (2, 4, 7, 6)),
    "dilated": (nn.Conv2d, QConv2d, (3, 5, 3), {"dilation": 2}, (2, 3, 8, 7)),
    "circular": (nn.Conv2d, QConv2d, (3, 5, 3), {"padding": 1, "padding_mode": "circular"}, (2, 3, 6, 7)),
    "reflect": (nn.Conv1d, QConv1d, (3, 5, 3), {"padding": 1, "padding_mode": "reflect"}, (2, 3, 6)),
    "same": (nn.Conv2d, QConv2d, (3, 5, (3, 5)), {"padding": "same"}, (2, 3, 6, 7)),
    "unbatched": (nn.Conv2d, QConv2d, (3, 5, 3), {}, (3, 6, 7)),
    "transposed1d": (nn.ConvTranspose1d, QConvTranspose1d, (4, 6, 3), {"stride": 2, "output_padding": 1}, (2, 4, 5)),
    "transposed2d": (nn.ConvTranspose2d, QConvTranspose2d, (4, 6, 3), {"groups": 2, "padding": 1}, (2, 4, 5, 4)),
    "transposed3d": (nn.ConvTranspose3d, QConvTranspose3d, (2, 3, 2), {"stride": 2}, (1, 2, 3, 2, 3)),
    "transposed, padded": (
        nn.ConvTranspose2d,
        QConvTranspose2d,
        (4, 6, 3),
        {"groups": 2, "stride": 3, "output_padding": (1, 2), "dilation": 2, "bias": False},
        (2, 4, 5, 4),
    ),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case: str, weight: WeightConfig | None = None, activation: ActivationConfig | None = None):
    """``(float layer, quantized and calibrated layer with the same parameters, input)``."""
    kind, quantized, args, kwargs, shape = CASES[case]
    torch.manual_seed(0)
    layer = kind(*args, **kwargs)
    converted = copy.deepcopy(layer)
    config = LayerConfig(weight or WeightConfig(bits=3), activation or ActivationConfig(bits=3))
    adq.convert.convert_layers_(converted, {"": config})
    assert type(converted) is quantized
    x = torch.randn(shape)
    converted.input_quantizer.calibrate_(x.flatten())
    return layer, converted, x


def weight_by_numpy(quantizer: WeightQuantizer, weight: Tensor) -> Tensor:
    c, scale = quantizer.codebook.detach().numpy(), quantizer.scale.numpy()
    code = ((exact(weight) / scale)[..., None] > np.float32(0.5) * (c[:-1] + c[1:])).sum(-1)
    return torch.from_numpy(c[code] * scale)


def input_by_numpy(quantizer: ActivationQuantizer, x: Tensor) -> Tensor:
    act = Activation(
        *(getattr(quantizer, key).detach() for key in ("start", "interval", "in_scale", "out_scale", "offset")),
        steps=quantizer.config.steps,
    )
    step, levels = np.float32(2 / act.steps), activation_levels(exact(x), act)
    return torch.from_numpy(act.out_scale.numpy() * (step * levels - act.offset.numpy()))


def with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    layer = copy.deepcopy(layer)
    layer.weight.data = weight.to(layer.weight.dtype)
    return layer


# ---- values ------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_output_is_the_float_layer_of_quantized_operands(case, scale):
    layer, quantized, x = make(case, WeightConfig(bits=3, scale=scale))
    weight = weight_by_numpy(quantized.weight_quantizer, layer.weight)
    expected = with_weight(layer, weight)(input_by_numpy(quantized.input_quantizer, x))
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=0)
    assert (quantized(x) - layer(x)).abs().max() > 1e-3


@every_case
def test_scales_belong_to_output_channels(case):
    layer, quantized, _ = make(case)
    axis = 1 if "transposed" in case else 0
    shape = [n if d == axis else 1 for d, n in enumerate(layer.weight.shape)]
    assert list(quantized.weight_quantizer.scale.shape) == shape


@every_case
def test_weight_gradient_is_straight_through(case):
    layer, quantized, x = make(case)
    weight = weight_by_numpy(quantized.weight_quantizer, layer.weight)
    reference = with_weight(layer, weight).double()
    out = reference(input_by_numpy(quantized.input_quantizer, x).double())
    grad = torch.randn(out.shape)
    out.backward(grad.double())
    quantized(x).backward(grad)
    for name, parameter in reference.named_parameters():
        ours = dict(quantized.named_parameters())[name].grad
        torch.testing.assert_close(ours.double(), parameter.grad, rtol=1e-5, atol=1e-5)


def test_output_size_of_transposed_convolutions():
    layer, quantized, x = make("transposed1d")
    for size in (11, 12):
        assert quantized(x, output_size=[size]).shape == layer(x, output_size=[size]).shape == (2, 6, size)


@every_case
def test_the_input_may_be_a_keyword(case):
    _, quantized, x = make(case)
    assert torch.equal(quantized(input=x), quantized(x))


@every_case
def test_disabled_quantizers_leave_the_float_layer(case):
    layer, quantized, x = make(case)
    quantized.weight_quantizer.enabled = quantized.input_quantizer.enabled = False
    assert torch.equal(quantized(x), layer(x))
    assert "disabled" in repr(quantized)


@pytest.mark.parametrize("part", ["weight", "activation"])
def test_only_weights_or_only_activations(part):
    kind = {"weight_config": None} if part == "activation" else {"activation_config": None}
    layer = QLinear(6, 5, **kind)
    x = torch.randn(4, 6)
    if part == "activation":
        layer.input_quantizer.calibrate_(x.flatten())
        expected = nn.functional.linear(input_by_numpy(layer.input_quantizer, x), layer.weight, layer.bias)
    else:
        expected = nn.functional.linear(x, weight_by_numpy(layer.weight_quantizer, layer.weight), layer.bias)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width(bits):
    layer, quantized, x = make("conv2d", WeightConfig(bits=bits), ActivationConfig(bits=bits))
    weight = weight_by_numpy(quantized.weight_quantizer, layer.weight)
    expected = with_weight(layer, weight)(input_by_numpy(quantized.input_quantizer, x))
    assert torch.equal(quantized(x), expected)
    assert quantized.weight_quantizer.bits == bits
    assert len(quantized.weight_quantizer.encode(layer.weight).unique()) <= 2**bits
    assert f"bits={bits}" in repr(quantized.weight_quantizer)


# ---- construction ------------------------------------------------------------------------------------


@every_case
def test_layers_can_be_built_directly(case):
    kind, quantized, args, kwargs, shape = CASES[case]
    layer = quantized(*args, **kwargs, weight_config=WeightConfig(bits=2), activation_config=ActivationConfig(bits=4))
    assert isinstance(layer, kind)
    assert (layer.weight_quantizer.bits, layer.input_quantizer.config.bits) == (2, 4)
    with pytest.raises(RuntimeError, match="is not calibrated; call adq.calibrate_"):
        layer(torch.randn(shape))


def test_a_layer_that_cannot_be_fitted_is_named():
    with pytest.raises(ValueError, match=r"the weight is empty \(layer 'stem'\)"):
        WeightQuantizer(torch.zeros(0, 3), WeightConfig(), name="stem")
    with pytest.raises(ValueError, match=r"no inputs were observed \(layer 'stem'\)"):
        ActivationQuantizer(ActivationConfig(), "stem").calibrate_(torch.zeros(0))


def test_state_exists_from_construction():
    """Names, dtypes and values of the buffers that a state dict carries."""
    layer = QLinear(6, 5)
    state = layer.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items() if "quantizer" in key} == {
        "weight_quantizer.codebook": (8,),
        "weight_quantizer.ema_count": (8,),
        "weight_quantizer.ema_total": (8,),
        "weight_quantizer.scale": (5, 1),
        "weight_quantizer.steps": (),
        "input_quantizer.start": (1,),
        "input_quantizer.interval": (7,),
        "input_quantizer.in_scale": (1,),
        "input_quantizer.out_scale": (1,),
        "input_quantizer.offset": (1,),
        "input_quantizer.calibrated": (),
    }
    assert state["weight_quantizer.ema_count"].sum() == 30
    np.testing.assert_allclose(
        state["weight_quantizer.ema_total"], state["weight_quantizer.ema_count"] * state["weight_quantizer.codebook"]
    )
    assert layer.weight_quantizer.steps == 0
    assert not layer.input_quantizer.is_calibrated


def test_refitting_keeps_the_tensors():
    for update in ("ema", "gradient"):
        layer = QLinear(6, 5, weight_config=WeightConfig(update=update))
        before = dict(layer.weight_quantizer.named_parameters()) | dict(layer.weight_quantizer.named_buffers())
        layer.weight_quantizer.refit_(torch.randn(5, 6))
        after = dict(layer.weight_quantizer.named_parameters()) | dict(layer.weight_quantizer.named_buffers())
        assert all(after[key] is before[key] for key in before | after)


# ---- dtypes and layouts ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_half_precision_models(dtype, when):
    """Cast before or after the conversion: quantizers stay in float32, the layer computes in the dtype."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 16), torch.randn(8, 32).to(dtype)
    layer = layer.to(dtype) if when == "before" else layer
    config = adq.ADQConfig(first_last_bits=3)
    quantized = adq.calibrate_(adq.quantize_(layer, config), [x if when == "before" else x.float()]).to(dtype)
    own = [t for part in (quantized.weight_quantizer, quantized.input_quantizer) for t in part.state_dict().values()]
    assert {t.dtype for t in own} == {torch.float32, torch.int64}
    weight = weight_by_numpy(quantized.weight_quantizer, quantized.weight).to(dtype)
    expected = nn.functional.linear(input_by_numpy(quantized.input_quantizer, x).to(dtype), weight, quantized.bias)
    out = quantized(x)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    out.sum().backward()
    assert quantized.weight.grad.dtype == dtype


def test_autocast_multiplies_in_bfloat16():
    layer, quantized, x = make("linear")
    with torch.autocast("cpu", torch.bfloat16):
        out = quantized(x)
    weight = weight_by_numpy(quantized.weight_quantizer, layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        expected = with_weight(layer, weight)(input_by_numpy(quantized.input_quantizer, x))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    out.sum().backward()
    assert quantized.weight.grad.dtype == torch.float32


def test_casting_leaves_the_quantizers_as_they_are():
    layer = QLinear(6, 5)
    before = {key: value.clone() for key, value in layer.weight_quantizer.state_dict().items()}
    layer.to(torch.bfloat16).to("cpu", torch.float32)
    assert all(torch.equal(before[key], value) for key, value in layer.weight_quantizer.state_dict().items())
    assert {t.device.type for t in layer.to("meta").state_dict().values()} == {"meta"}


@pytest.mark.parametrize("bits", [3, 8])
def test_channels_last_stays(bits):
    layer, quantized, x = make("conv2d", WeightConfig(bits=bits), ActivationConfig(bits=bits))
    x = x.to(memory_format=torch.channels_last)
    quantized = quantized.to(memory_format=torch.channels_last)
    assert quantized.quantized_weight().is_contiguous(memory_format=torch.channels_last)
    out = quantized(x)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert not out.is_contiguous()
    weight = weight_by_numpy(quantized.weight_quantizer, layer.weight)
    expected = with_weight(layer, weight)(input_by_numpy(quantized.input_quantizer, x).contiguous())
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def small(**config) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    adq.quantize_(model, adq.ADQConfig(first_last_bits=3, **config))
    model = adq.calibrate_(model, [torch.randn(16, 6)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        model(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    return model


def test_averaged_parameters_leave_codebooks_alone():
    model, x = small(), torch.randn(4, 6)
    expected, before = model(x), copy.deepcopy(model.state_dict())
    model.load_state_dict({name: p.detach().clone() for name, p in model.named_parameters()}, strict=False)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_float_weights_for_a_trained_layer_are_said_to_be_fitted_anew():
    model = small(activation=None)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="float weights for the trained layer '0': its codebook is fitted"):
        model.load_state_dict(state, strict=False)
    assert int(model[0].weight_quantizer.steps) == 0


def test_thresholds_that_were_copied_tensor_by_tensor_are_calibrated():
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)))
    other = copy.deepcopy(model)
    adq.calibrate_(model, [torch.randn(16, 6)])
    with pytest.raises(RuntimeError, match="is not calibrated"):
        other(torch.randn(2, 6))
    with torch.no_grad():
        for mine, its in zip(other.state_dict().values(), model.state_dict().values(), strict=True):
            mine.copy_(its)
    x = torch.randn(2, 6)
    assert torch.equal(other(x), model(x))


def test_float_weights_cannot_fit_what_is_on_the_meta_device():
    with torch.device("meta"), pytest.raises(ValueError, match=r"meta device; load the weights first.*\(layer '0'\)"):
        adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
    model = adq.quantize_(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))).to("meta")
    state = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).state_dict()
    with pytest.raises(RuntimeError, match="layer '0' is quantized and on the meta device"):
        model.load_state_dict(state, assign=True, strict=False)

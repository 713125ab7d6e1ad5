"""The figures of a summary, by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import adq
from adq import ADQConfig, WeightConfig


class Custom(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.body = nn.Conv2d(4, 6, 3)
        self.extra = nn.Conv2d(6, 6, 1)
        self.custom = Custom(6, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.head = nn.Linear(6, 3)


CONFIG = ADQConfig(weight=WeightConfig(bits=3), overrides={"extra": None, "head": {"activation": None}})


def quantized() -> nn.Module:
    torch.manual_seed(0)
    return adq.quantize_(Net(), CONFIG)


def test_layers_by_hand():
    model = quantized()
    rows = {row.name: row for row in adq.summary(model).layers}
    figures = {name: (r.kind, r.weights, r.weight_bits, r.activation_bits, r.levels) for name, r in rows.items()}
    assert figures == {
        "stem": ("QConv2d", 36, 8, 8, 256),
        "body": ("QConv2d", 216, 3, 3, 8),
        "attention": ("QMultiheadAttention", 108, 3, 3, 8),
        "attention.out_proj": ("QLinear", 36, 3, 3, 8),
        "head": ("QLinear", 18, 8, None, 256),
    }
    # codes, codebook, one scale per output channel
    assert {name: row.bytes for name, row in rows.items()} == {
        "stem": 36 + 4 * 256 + 4 * 4,
        "body": 81 + 4 * 8 + 4 * 6,
        "attention": (108 * 3 + 7) // 8 + 4 * 8 + 4 * 18,
        "attention.out_proj": (36 * 3 + 7) // 8 + 4 * 8 + 4 * 6,
        "head": 18 + 4 * 256 + 4 * 3,
    }
    quantizer, w = model.body.weight_quantizer, model.body.weight.detach().double().numpy()
    c, scale = quantizer.codebook.double().numpy(), quantizer.scale.double().numpy()
    code = np.abs((w / scale)[..., None] - c).argmin(-1)
    assert rows["body"].levels_used == len(np.unique(code)) == 8
    noise = ((w - c[code] * scale) ** 2).sum()
    assert rows["body"].sqnr_db == pytest.approx(10 * np.log10((w**2).sum() / noise), abs=1e-4)
    assert rows["stem"].levels_used <= 36


def test_totals_by_hand():
    model, found = quantized(), adq.summary(quantized())
    weights = 36 + 216 + 108 + 36 + 18
    bits = 36 * 8 + (216 + 108 + 36) * 3 + 18 * 8
    assert found.average_bits_quantized == pytest.approx(bits / weights)
    in_float = (4 + 4) + 6 + (36 + 6) + (36 + 6) + (18 + 6) + 3
    assert found.average_bits_network == pytest.approx((bits + 32 * in_float) / (weights + in_float))
    buffers = 4 * (4 + 4) + 8  # running statistics, number of batches
    assert found.bytes_float == 4 * (weights + in_float) + buffers
    quantizers = 4 * (256 + 8 + 8 + 8 + 256) + 4 * (4 + 6 + 18 + 6 + 3)
    # start, interval, two scales, offset, flag
    activations = 4 * (1 + 1 + 1 + 1 + 1) + 1 + 3 * (4 * (1 + 7 + 1 + 1 + 1) + 1)
    codes = 36 + 81 + 41 + 14 + 18
    assert found.bytes_packed == 4 * in_float + buffers - 8 + codes + quantizers + activations  # no counter
    assert {type(module) for module in model.modules()} >= {nn.BatchNorm2d, Custom}


def test_what_is_left_in_float_and_why():
    assert adq.summary(quantized()).left_in_float == {
        "norm": "BatchNorm2d is no layer that adq quantizes",
        "extra": "override 'extra'",
        "custom": "Custom has a forward of its own",
    }


class Named(nn.Linear):
    """The forward of ``nn.Linear``, under another name."""


@pytest.mark.parametrize("bias", [True, False])
def test_why_subclasses_and_parametrized_layers_are_left_in_float(bias):
    model = nn.Sequential(nn.Linear(4, 4), Named(4, 4), nn.Linear(4, 4, bias=bias), nn.Linear(9, 9))
    nn.utils.parametrizations.weight_norm(model[2])
    assert adq.summary(adq.quantize_(model)).left_in_float == {
        "1": "Named is a subclass of Linear, and only Linear itself is converted",
        "2": "parametrizations recompute its weight at each call",
    }


def test_attention_that_is_left_in_float_and_why():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(6))
            self.zero = nn.MultiheadAttention(6, 2, add_zero_attn=True)
            self.bias = nn.MultiheadAttention(6, 2, add_bias_kv=True)
            self.sizes = nn.MultiheadAttention(6, 2, kdim=4)
            self.overridden = nn.MultiheadAttention(6, 2)
            self.excluded = nn.MultiheadAttention(6, 2)
            self.head = nn.Linear(6, 3)
            self.last = nn.Linear(3, 3)

    config = ADQConfig(overrides={"overridden": None}, first_last_bits=None)
    model = adq.quantize_(Attention(), config, lambda module, name: not name.startswith("excluded"))
    extra = "it adds a learned or zero key (add_bias_kv, add_zero_attn)"
    output = "its attention is in float"
    assert adq.summary(model).left_in_float == {
        "token": "a parameter of Attention itself",
        "zero": extra,
        "zero.out_proj": output,
        "bias": extra,
        "bias.out_proj": output,
        "sizes": "its query, key and value have projections of their own",
        "sizes.out_proj": output,
        "overridden": "override 'overridden'",
        "overridden.out_proj": output,
        "excluded": "excluded by filter_fn",
        "excluded.out_proj": "excluded by filter_fn",
        "last": "first_last_bits is None",
    }


def test_a_loaded_model_names_what_is_in_float_too(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    adq.quantize_(model, ADQConfig(activation=None, overrides={"1": None}))
    adq.save(model, tmp_path / "m.safetensors")
    loaded = adq.load(tmp_path / "m.safetensors", nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)))
    assert adq.summary(loaded).left_in_float == adq.summary(model).left_in_float == {"1": "override '1'"}


def test_weights_in_float():
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), ADQConfig(weight=None, first_last_bits=4))
    found = adq.summary(model)
    assert [(row.weight_bits, row.activation_bits, row.sqnr_db, row.bytes) for row in found.layers] == [
        (None, 4, None, 120),
        (None, 4, None, 80),
    ]
    assert found.average_bits_quantized == found.average_bits_network == 32.0


def test_the_table_has_every_layer_and_both_averages():
    found = adq.summary(quantized())
    lines = str(found).splitlines()
    for row in found.layers:
        (line,) = [line for line in lines if line.startswith(row.name + " ")]
        assert row.kind in line
        assert f"{row.levels_used}/{row.levels}" in line
    for name, reason in found.left_in_float.items():
        assert any(line.startswith(f"in float, {reason}: ") and name in line.split(": ")[1] for line in lines)
    assert f"{found.average_bits_quantized:.3f} over the quantized layers" in str(found)
    assert f"{found.average_bits_network:.3f} over the whole network" in str(found)
    assert f"{found.bytes_packed:,} packed" in str(found)


def test_shared_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    model[1].weight = model[0].weight
    adq.quantize_(model, ADQConfig(activation=None, first_last_bits=4))
    found = adq.summary(model)
    assert len(found.layers) == 3
    assert found.average_bits_network == 4.0
    assert found.bytes_float == 4 * (16 + 8)
    assert found.bytes_packed == (8 + 4 * 16 + 4 * 4) + (4 + 4 * 16 + 4 * 2)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(9, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight


def test_a_weight_that_an_embedding_shares_is_counted_as_the_file_holds_it():
    model = adq.quantize_(Language(), ADQConfig(activation=None, first_last_bits=4))
    found = adq.summary(model)
    quantizers = {"inner": 4 * 16 + 4 * 6, "head": 4 * 16 + 4 * 9}
    assert {layer.name: layer.bytes for layer in found.layers} == {
        "inner": 18 + quantizers["inner"],
        "head": 4 * 54 + quantizers["head"],
    }
    assert found.average_bits_quantized == 4.0
    assert found.average_bits_network == (36 * 4 + 54 * 32) / (36 + 54)
    assert found.bytes_float == 4 * (36 + 54)


def test_a_float_model_has_no_summary():
    with pytest.raises(ValueError, match=r"not quantized; call adq\.quantize_"):
        adq.summary(nn.Linear(2, 2))

"""Configurations check themselves and survive YAML."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml
from torch import nn

from adq.config import (
    ActivationConfig,
    ADQConfig,
    LayerConfig,
    WeightConfig,
    dump_yaml,
    from_dict,
    load_yaml,
    merge_override,
    with_bits,
)

WEIGHT = WeightConfig(
    bits=4,
    levels="symmetric",
    scale="tensor",
    init="uniform",
    refine=False,
    update="gradient",
    ema_decay=0.5,
    ema_follows_lr=False,
    snap="int8",
)
ACTIVATION = ActivationConfig(bits=5, signed=True, thresholds="uniform")
CONFIG = ADQConfig(
    weight=WEIGHT,
    activation=ACTIVATION,
    first_last_bits=None,
    overrides={
        "head": None,
        "re:layer[12]\\..*": {"weight": {"bits": 2}, "activation": None},
        nn.Linear: {"activation": {"bits": 8}},
        "stem": {"weight": WeightConfig(bits=6)},
    },
)


# ---- YAML --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        WEIGHT,
        ACTIVATION,
        CONFIG,
        WeightConfig(),
        ActivationConfig(),
        ADQConfig(),
        ADQConfig(weight=None, activation=None),
    ],
    ids=lambda config: type(config).__name__,
)
def test_yaml_round_trip(config, tmp_path):
    (tmp_path / "config.yaml").write_text(dump_yaml(config))
    assert from_dict(type(config), load_yaml(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("config", [WEIGHT, ACTIVATION, CONFIG], ids=lambda config: type(config).__name__)
def test_the_round_trip_covers_every_field(config):
    """Each example differs from the default in every field, so none can get lost unseen."""
    default = type(config)()
    same = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) == getattr(default, f.name)]
    assert same == []


def test_layer_config_round_trip():
    layer = LayerConfig(WEIGHT, ACTIVATION, pinned=True)
    assert from_dict(LayerConfig, yaml.safe_load(dump_yaml(layer))) == layer


def test_partial_mapping_keeps_the_defaults():
    config = from_dict(ADQConfig, yaml.safe_load("weight: {bits: 2}\nactivation: null"))
    assert config == ADQConfig(weight=WeightConfig(bits=2), activation=None)


def test_a_whole_number_serves_as_float():
    decay = from_dict(WeightConfig, {"ema_decay": 0}).ema_decay
    assert decay == 0.0
    assert isinstance(decay, float)


@dataclass(frozen=True)
class Lists:
    """Fields that hold several values."""

    bits: tuple[int, ...] = (2,)
    mean: tuple[float, ...] | None = None
    options: Mapping[str, int] = field(default_factory=dict)


def test_lists_become_tuples_of_the_right_kind():
    assert from_dict(Lists, {"bits": [2, 3], "mean": [1, 0.5]}) == Lists((2, 3), (1.0, 0.5))
    assert from_dict(Lists, {"mean": None}) == Lists()


@pytest.mark.parametrize("text", ["1e-3", "-2E+4", "5e0", "1.0e3", "-.5E3", "1.e3"])
def test_numbers_that_yaml_takes_for_text(text):
    assert yaml.safe_load(text) == text
    assert from_dict(WeightConfig, {"ema_decay": "1e-1"}).ema_decay == 0.1
    assert from_dict(Lists, {"mean": [text]}).mean == (float(text),)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Lists, {"bits": 4}, r"bits must be a list like \[1, 2\], got 4"),
        (Lists, {"bits": "2,3"}, r"bits must be a list like \[1, 2\], got '2,3'"),
        (Lists, {"bits": [2, 3.5]}, r"bits\[1\] must be int, got 3.5"),
        (Lists, {"bits": [2, "1e1"]}, r"bits\[1\] must be int, got '1e1'"),
        (Lists, {"mean": 0.5}, r"mean must be a list like \[1, 2\], got 0.5"),
        (Lists, {"mean": [0.5, "1e999"]}, r"mean\[1\] must be a finite number, got inf"),
        (Lists, {"options": None}, "options must be a mapping, got None"),
        (Lists, {"options": [1]}, r"options must be a mapping, got \[1\]"),
        (WeightConfig, {"ema_decay": float("nan")}, "ema_decay must be a finite number, got nan"),
        (WeightConfig, {"bist": 3}, r"unknown key 'bist' in WeightConfig; did you mean 'bits'\?"),
        (ADQConfig, {"weight": {"ema_dcay": 0.9}}, r"unknown key 'ema_dcay' in weight; did you mean 'ema_decay'\?"),
        (ADQConfig, {"activations": {}}, r"did you mean 'activation'\?"),
        (ActivationConfig, {"zzz": 1}, "unknown key 'zzz' in ActivationConfig; known: bits, signed, thresholds"),
        (WeightConfig, {"bits": "3"}, "bits must be int, got '3'"),
        (WeightConfig, {"bits": 2.5}, "bits must be int, got 2.5"),
        (WeightConfig, {"bits": True}, "bits must be int, got True"),
        (WeightConfig, {"refine": "no"}, "refine must be bool, got 'no'"),
        (WeightConfig, {"refine": 1}, "refine must be bool, got 1"),
        (WeightConfig, {"ema_decay": "high"}, "ema_decay must be float, got 'high'"),
        (WeightConfig, {"levels": "half"}, "levels must be one of 'full', 'symmetric', got 'half'"),
        (WeightConfig, {"snap": "int4"}, "snap must be one of 'int8', None, got 'int4'"),
        (WeightConfig, {"bits": None}, "bits must be int, got None"),
        (ADQConfig, {"weight": 3}, "weight must be a mapping, got 3"),
        (ADQConfig, {"first_last_bits": "8"}, "first_last_bits must be int, got '8'"),
        (ADQConfig, ["weight"], "ADQConfig must be a mapping"),
        (ADQConfig, {"overrides": None}, "overrides must be a mapping, got None"),
        (ADQConfig, {"overrides": ["head"]}, "overrides must be a mapping"),
    ],
)
def test_wrong_keys_and_types_are_named(kind, values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(kind, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits: [", "config.yaml is not valid YAML"),
        ("a: {bits: 2}\nb: {bits: 2, 'bits': 3}", "config.yaml is not valid YAML: the key 'bits' comes twice"),
        ("- 1", "must hold a mapping, got list"),
        ("", "got NoneType"),
    ],
)
def test_bad_yaml_file(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_yaml(path)


def test_missing_and_binary_yaml_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file: .*none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"binary\.yaml is not valid YAML"):
        load_yaml(tmp_path / "binary.yaml")


def test_yaml_is_read_in_utf_8_whatever_the_locale(tmp_path):
    (tmp_path / "config.yaml").write_text("name: Größe\n", encoding="utf-8")
    code = "import sys; from adq.config import load_yaml; print(ascii(load_yaml(sys.argv[1])['name']))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", code, str(tmp_path / "config.yaml")]
    said = subprocess.run(command, env={**os.environ, **plain}, cwd="/", check=True, capture_output=True, text=True)
    assert said.stdout == "'Gr\\xf6\\xdfe'\n"


# ---- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 3.0, True, "3", None])
@pytest.mark.parametrize("kind", [WeightConfig, ActivationConfig])
def test_bits_are_a_whole_number_from_1_to_8(kind, bits):
    with pytest.raises(ValueError, match="bits must be a whole number from 1 to 8, got"):
        kind(bits=bits)


@pytest.mark.parametrize("bits", [0, 9, True, 7.5])
def test_first_last_bits(bits):
    with pytest.raises(ValueError, match="first_last_bits must be a whole number from 1 to 8"):
        ADQConfig(first_last_bits=bits)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan"), float("inf")])
def test_decay_below_one(decay):
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\)"):
        WeightConfig(ema_decay=decay)


def test_symmetric_needs_two_bits():
    with pytest.raises(ValueError, match="symmetric.* needs at least 2 bits"):
        WeightConfig(bits=1, levels="symmetric")


@pytest.mark.parametrize(
    ("bits", "levels", "expected"), [(1, "full", 2), (3, "full", 8), (2, "symmetric", 3), (8, "full", 256)]
)
def test_number_of_levels(bits, levels, expected):
    assert WeightConfig(bits=bits, levels=levels).num_levels == expected


def test_number_of_steps():
    assert [ActivationConfig(bits=b).steps for b in (1, 2, 8)] == [1, 3, 255]


# ---- overrides ---------------------------------------------------------------------------------------


def test_a_module_type_becomes_a_name():
    assert set(ADQConfig(overrides={nn.Linear: None}).overrides) == {"type:Linear"}


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({3: None}, TypeError, "keyed by a name, 're:PATTERN' or a module type, got 3"),
        ({int: None}, TypeError, "keyed by a name"),
        ({"re:[": None}, ValueError, r"override 're:\[' is not a regular expression"),
        ({"a": 4}, ValueError, "override 'a' must be None or a mapping"),
        ({"a": {"bits": 4}}, ValueError, "override 'a' must be None or a mapping with 'weight' and 'activation'"),
        ({"a": {"weight": 4}}, ValueError, "overrides.weight must be a mapping, got 4"),
        ({"a": {"weight": {"bist": 4}}}, ValueError, "unknown key 'bist' in overrides.weight; did you mean 'bits'"),
        ({"a": {"activation": {"bits": 9}}}, ValueError, "activation bits must be a whole number"),
    ],
)
def test_bad_overrides(overrides, error, message):
    with pytest.raises(error, match=message):
        ADQConfig(overrides=overrides)


def test_merging_overrides():
    layer = LayerConfig(WeightConfig(bits=3, scale="tensor"), ActivationConfig(bits=3))
    changed = merge_override(layer, {"weight": {"bits": 2}, "activation": None})
    assert changed == LayerConfig(WeightConfig(bits=2, scale="tensor"), None, pinned=True)
    assert merge_override(layer, {"weight": {"refine": False}}).pinned is False
    assert merge_override(layer, None).is_float
    assert merge_override(LayerConfig(None, None), {"weight": {"bits": 5}}).weight == WeightConfig(bits=5)


def test_with_bits_pins_what_is_quantized():
    assert with_bits(LayerConfig(WeightConfig(), None), 8) == LayerConfig(WeightConfig(bits=8), None, pinned=True)


def test_no_is_a_word_where_it_is_a_choice():
    """YAML 1.1 reads a bare ``no`` as false."""

    @dataclass(frozen=True)
    class Engine:
        precision: Literal["no", "bf16"] | None = "bf16"
        fast: bool = True

    assert from_dict(Engine, yaml.safe_load("{precision: no, fast: no}"), where="engine") == Engine("no", False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": 3}, "weight must be a WeightConfig, a mapping or None, got 3"),
        ({"activation": WEIGHT}, "activation must be an? ActivationConfig, a mapping or None, got WeightConfig"),
        ({"weight": {"bit": 3}}, "unknown key 'bit' in weight; did you mean 'bits'"),
    ],
)
def test_parts_of_another_kind_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ADQConfig(**arguments)


def test_parts_may_be_mappings():
    made = ADQConfig(weight={"bits": 4}, activation={"bits": 2, "signed": True})
    assert made == ADQConfig(weight=WeightConfig(bits=4), activation=ActivationConfig(bits=2, signed=True))

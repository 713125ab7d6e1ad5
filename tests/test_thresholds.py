"""The clip search against a finer one by brute force; where zero goes; what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from adq.config import ActivationConfig
from adq.functional import threshold_quantize
from adq.thresholds import Thresholds, fit_thresholds, num_intervals

RNG = np.random.default_rng(0)
UNSIGNED = {
    "half-normal": np.abs(RNG.standard_normal(4000)),
    "half are zero": np.maximum(RNG.standard_normal(4000), 0),
    "uniform": RNG.uniform(0, 3, 4000),
    "exponential": RNG.exponential(size=4000),
    "with outliers": np.concatenate([np.abs(RNG.standard_normal(4000)), [12.0, 15.0]]),
    "tiny": np.abs(RNG.standard_normal(4000)) * 1e-6,
}
NORMAL = RNG.standard_normal(2000)
SIGNED = {
    "normal": NORMAL,
    "gelu": NORMAL * 0.5 * (1 + np.vectorize(math.erf)(NORMAL / math.sqrt(2))),
    "skewed": RNG.exponential(size=2000) - 0.5,
    "negative": -np.abs(NORMAL),
    "signed outliers": np.concatenate([NORMAL, [-9.0, 14.0]]),
}


def values(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data.astype(np.float32))


def apply(x: torch.Tensor, fitted: Thresholds, config: ActivationConfig) -> np.ndarray:
    return threshold_quantize(
        x, fitted.start, fitted.interval, fitted.in_scale, fitted.out_scale, offset=fitted.offset, steps=config.steps
    ).numpy()


def uniform_error(x: np.ndarray, low: float, high: float, steps: int) -> float:
    """Mean squared error of the uniform quantizer over [low, high], shifted so that zero is a level."""
    step = (high - low) / steps
    zero = np.rint(-low / step)
    level = np.clip(np.rint(x / step + zero), 0, steps)
    return float((((level - zero) * step - x) ** 2).mean())


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("name", UNSIGNED)
def test_unsigned_inputs_have_the_least_error(name, bits):
    x, config = values(UNSIGNED[name]), ActivationConfig(bits)
    exact = x.double().numpy()
    found = float(((apply(x, fit_thresholds(x, config), config) - exact) ** 2).mean())
    best = min(uniform_error(exact, 0.0, exact.max() * c, config.steps) for c in np.linspace(0.002, 1.0, 500))
    assert best * (1 - 1e-4) <= found <= best * 1.05 + 1e-12 * exact.max() ** 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", SIGNED)
def test_signed_inputs_have_nearly_the_least_error(name, bits):
    x, config = values(SIGNED[name]), ActivationConfig(bits)
    exact = x.double().numpy()
    found = float(((apply(x, fit_thresholds(x, config), config) - exact) ** 2).mean())
    parts = np.linspace(1 / 60, 1, 60)
    low, high = min(0.0, exact.min()), max(0.0, exact.max())
    ranges = {(low * a, high * b) for a in parts for b in parts}
    best = min(uniform_error(exact, a, b, config.steps) for a, b in ranges if b > a)
    assert best * 0.97 <= found <= best * 1.1


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("name", SIGNED)
def test_zero_is_a_level_of_signed_quantizers(name, bits):
    config = ActivationConfig(bits)
    fitted = fit_thresholds(values(SIGNED[name]), config)
    assert apply(torch.zeros(3), fitted, config).tolist() == [0.0] * 3
    levels = np.unique(apply(torch.linspace(-20, 20, 4001), fitted, config))
    assert len(levels) == 2**bits


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_of_unsigned_quantizers(bits):
    config = ActivationConfig(bits)
    fitted = fit_thresholds(values(UNSIGNED["half-normal"]), config)
    levels = np.unique(apply(torch.linspace(-1, 6, 4001), fitted, config))
    assert len(levels) == 2**bits
    assert levels[0] == 0.0
    assert fitted.offset == fitted.start == 0.0
    np.testing.assert_allclose(np.diff(levels), np.full(2**bits - 1, levels[-1] / (2**bits - 1)), rtol=1e-4)


@pytest.mark.parametrize(("bits", "expected"), [(1, 1), (2, 3), (3, 7), (4, 15), (5, 31), (6, 1), (7, 1), (8, 1)])
def test_one_interval_above_five_bits(bits, expected):
    config = ActivationConfig(bits)
    fitted = fit_thresholds(values(UNSIGNED["uniform"]), config)
    assert num_intervals(config) == fitted.interval.numel() == expected
    assert {t.numel() for t in (fitted.start, fitted.in_scale, fitted.out_scale, fitted.offset)} == {1}
    np.testing.assert_allclose(fitted.interval, 2 / config.steps, rtol=1e-6)


def test_the_range_is_scaled_to_two():
    """So the learned parameters have one magnitude, whatever that of the inputs."""
    x = values(UNSIGNED["half-normal"])
    small, large = (fit_thresholds(x * factor, ActivationConfig(3)) for factor in (2.0**-10, 2.0**10))
    assert torch.equal(small.interval, large.interval)
    assert small.in_scale / large.in_scale == 2.0**20
    assert large.out_scale / small.out_scale == 2.0**20


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("exponent", [-120, -70, 60, 120])
@pytest.mark.parametrize("name", ["normal", "half-normal"])
def test_inputs_whose_squares_float32_does_not_hold(name, exponent, bits):
    x, config = values({**SIGNED, **UNSIGNED}[name]), ActivationConfig(bits)
    scaled = fit_thresholds(torch.ldexp(x, torch.tensor(exponent)), config)
    fitted = fit_thresholds(x, config)
    assert scaled.out_scale.double() == fitted.out_scale.double() * 2.0**exponent
    assert scaled.in_scale.double() == fitted.in_scale.double() * 2.0**-exponent
    assert torch.equal(scaled.offset, fitted.offset)


def test_inputs_that_have_no_thresholds():
    with pytest.raises(ValueError, match=r"inputs of up to 2\.94e-44 have no thresholds in float32"):
        fit_thresholds(torch.tensor([1e-44, 3e-44]), ActivationConfig(1))


@pytest.mark.parametrize("signed", [None, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_all_zero_inputs_leave_a_range_of_one(bits, signed):
    config = ActivationConfig(bits, signed=signed)
    fitted = fit_thresholds(torch.zeros(100), config)
    assert apply(torch.tensor([0.0, 1.0, 5.0]), fitted, config).tolist() == pytest.approx([0.0, 1.0, 1.0])


def test_signed_is_decided_by_the_inputs_or_by_the_configuration():
    positive = values(UNSIGNED["half-normal"])
    assert fit_thresholds(positive, ActivationConfig(3)).offset == 0.0
    assert fit_thresholds(-positive, ActivationConfig(3)).offset > 0.0
    assert fit_thresholds(positive, ActivationConfig(3, signed=True)).offset > 0.0
    assert fit_thresholds(positive, ActivationConfig(3, signed=False)).offset == 0.0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_signed_inputs_of_which_one_side_was_seen(sign, bits):
    """Levels of one size on both sides, one fewer on that which was not seen; the seen one as with a bit less."""
    x, config = sign * values(UNSIGNED["half-normal"]), ActivationConfig(bits, signed=True)
    fitted = fit_thresholds(x, config)
    levels = np.unique(apply(torch.linspace(-20, 20, 4001), fitted, config)) * sign
    assert ((levels > 0).sum(), (levels < 0).sum()) == (2 ** (bits - 1), 2 ** (bits - 1) - 1)
    assert 0.0 in levels
    narrower = ActivationConfig(bits - 1)
    known = apply(x.abs(), fit_thresholds(x.abs(), narrower), narrower)
    assert np.square(apply(x, fitted, config) - x.numpy()).sum() < np.square(known - x.abs().numpy()).sum()


@pytest.mark.parametrize("bits", [1, 2, 8])
def test_all_zero_inputs_of_signed_quantizers(bits):
    config = ActivationConfig(bits, signed=True)
    found = apply(torch.tensor([-5.0, 0.0, 5.0]), fit_thresholds(torch.zeros(100), config), config)
    below = config.steps // 2
    assert found.tolist() == pytest.approx([-below / (config.steps - below), 0.0, 1.0])


@pytest.mark.parametrize(
    ("x", "config", "message"),
    [
        ([], ActivationConfig(), "no inputs were observed"),
        ([1.0, math.nan], ActivationConfig(), "NaN or infinity among the observed inputs"),
        ([1.0, -math.inf], ActivationConfig(), "NaN or infinity"),
        ([1.0, -0.25], ActivationConfig(signed=False), r"signed=False, but inputs down to -0\.25 were observed"),
    ],
)
def test_unusable_inputs(x, config, message):
    with pytest.raises(ValueError, match=message):
        fit_thresholds(torch.tensor(x), config)

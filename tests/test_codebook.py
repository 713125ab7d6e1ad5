"""Fitting codebooks: levels without refinement, scales, the int8 grid; against hand-made values and numpy."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from adq import codebook as cb
from adq.config import WeightConfig
from adq.kmeans import Spectrum, spectrum
from adq.models import create_model, load_float_weights
from adq.reference import least_squares_scale

ROOT = os.environ.get("ADQ_TEST_DATA")


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def weights(*shape: int, seed: int = 0) -> torch.Tensor:
    """Heavier tails than a normal distribution, channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.rand(shape, generator=generator)
    return w * torch.linspace(0.2, 1.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))


def quantized(fit: cb.Fit, w: torch.Tensor) -> np.ndarray:
    """``scale * nearest level`` in numpy: float32 decisions, as the operators define them."""
    c, scale = fit.codebook.numpy(), fit.scale.numpy()
    code = ((w.numpy() / scale)[..., None] > np.float32(0.5) * (c[:-1] + c[1:])).sum(-1)
    return c[code] * scale


def ratio_db(w: torch.Tensor, w_q: np.ndarray) -> float:
    x = w.double().numpy()
    return 10 * math.log10((x**2).sum() / ((x - w_q) ** 2).sum())


def distribution(w: torch.Tensor) -> Spectrum:
    return spectrum(w, torch.ones([1] * w.dim()), w.min().item(), w.max().item())


# ---- start -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("w", "levels", "kind", "expected"),
    [
        # quantile (i + 0.5) / n of m sorted values lies at position (i + 0.5) / n * (m - 1)
        ([-1, -2, 1, 2, 3, 4], 4, "full", [-1.5, 0, 1.75, 3.25]),
        ([-1, -2, -3, 5], 4, "full", [-2.5, -1.5, 0, 5]),
        ([-1, -2, 1, 2, 3], 3, "symmetric", [-1.5, 0, 2]),
        ([1, 2, 3, 4], 4, "full", [0, 1.5, 2.5, 3.5]),
        ([-1, -2, -3, -4], 4, "full", [-3.5, -2.5, -1.5, 0]),
        ([1, 2, 3], 3, "symmetric", [-2, 0, 2]),
        ([-1, -3], 3, "symmetric", [-2, 0, 2]),
        ([0.5] * 5, 4, "full", [0, 0.5, 0.5, 0.5]),
        ([0.0] * 5, 4, "full", [0, 0, 0, 0]),
        ([7], 2, "full", [0, 7]),
        ([-7], 2, "full", [-7, 0]),
        ([2, -2, 0], 2, "full", [-2, 0]),
    ],
)
def test_quantile_start_by_hand(w, levels, kind, expected):
    weights = distribution(torch.tensor(w, dtype=torch.float32))
    assert cb.quantile_codebook(weights, levels, kind).tolist() == expected


@pytest.mark.parametrize("levels", [2, 3, 7, 16, 255, 256])
def test_quantile_start_equals_numpy(levels):
    w = weights(13, 31).numpy()
    spare = levels - 1
    n_pos = spare // 2 + (spare % 2) * ((w > 0).sum() > (w < 0).sum())
    sides = [np.quantile(w[w < 0].astype(float), (np.arange(spare - n_pos) + 0.5) / max(1, spare - n_pos))]
    sides += [[0.0], np.quantile(w[w > 0].astype(float), (np.arange(n_pos) + 0.5) / max(1, n_pos))]
    ours = cb.quantile_codebook(distribution(torch.from_numpy(w)), levels)
    np.testing.assert_allclose(ours, np.concatenate(sides), rtol=1e-6)


def test_uniform_start():
    assert cb.uniform_codebook(-1, 3, 5).tolist() == [-1, 0, 1, 2, 3]
    assert cb.uniform_codebook(1, 3, 4).tolist() == pytest.approx([0, 1, 2, 3], abs=1e-6)
    grid = cb.uniform_codebook(-0.9, 0.7, 8)
    assert 0.0 in grid.tolist()
    np.testing.assert_allclose(grid.diff(), np.full(7, grid[1] - grid[0]), rtol=1e-5)


SHAPES = {
    "normal": weights(40, 10),
    "positive": weights(40, 10).abs() + 0.1,
    "negative": -weights(40, 10).abs() - 0.1,
    "constant": torch.full((4, 5), 0.3),
    "zero": torch.zeros(4, 5),
    "one weight": tensor(0.7).reshape(1, 1),
    "two weights": tensor(-0.7, 0.2).reshape(2, 1),
    "three weights": tensor(-0.7, 0.2, 0.0).reshape(1, 3),
    "a zero channel": torch.cat([torch.zeros(1, 9), weights(3, 9)]),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("bits", "levels"), [(1, "full"), (2, "full"), (2, "symmetric"), (4, "symmetric"), (8, "full")]
)
@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("snap", [None, "int8"])
def test_every_fit_is_usable(shape, bits, levels, scale, snap):
    w = SHAPES[shape]
    fit = cb.fit(w, WeightConfig(bits=bits, levels=levels, scale=scale, snap=snap))
    assert fit.codebook.shape == fit.count.shape == (2**bits - (levels == "symmetric"),)
    assert fit.scale.shape == ((len(w), 1) if scale == "channel" else (1, 1))
    assert fit.codebook.dtype == fit.scale.dtype == fit.count.dtype == torch.float32
    assert fit.codebook.isfinite().all()
    assert (fit.codebook.diff() >= 0).all()
    assert (fit.scale > 0).all()
    assert fit.count.sum() == w.numel()
    error = np.abs(quantized(fit, w) - w.numpy()).max()
    if shape not in ("normal", "positive", "negative", "a zero channel") and bits > 1 and levels == "full":
        assert error <= 0.7 * 2e-2 if snap else error <= 1e-6  # no more different weights than levels


# ---- refinement --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("init", ["quantile", "uniform"])
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_refine_raises_the_sqnr(scale, init, bits):
    w = weights(16, 64)
    plain, refined = (
        ratio_db(w, quantized(cb.fit(w, WeightConfig(bits=bits, scale=scale, init=init, refine=refine)), w))
        for refine in (False, True)
    )
    assert refined > plain


def test_sqnr_of_channel_scales_is_higher_where_channels_differ():
    w = weights(32, 64)
    by_channel, by_tensor = (ratio_db(w, quantized(cb.fit(w, WeightConfig(scale=s)), w)) for s in ("channel", "tensor"))
    assert by_channel > by_tensor + 0.5


def test_sqnr_by_hand():
    assert cb.sqnr(tensor(3, 4), tensor(3, 3)) == pytest.approx(10 * math.log10(25))
    assert cb.sqnr(tensor(3, 4), tensor(3, 4)) == math.inf
    assert cb.sqnr(tensor(0, 0), tensor(0, 1)) == -math.inf


def test_sqnr_of_many_weights():
    w = torch.randn(3, 700_001, generator=torch.Generator().manual_seed(0))
    assert cb.sqnr(w, w.round()) == pytest.approx(ratio_db(w, w.round().double().numpy()))


# ---- scale -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("refine", [False, True])
def test_scale_without_refinement_is_the_largest_magnitude(axis, refine):
    w = weights(3, 4, 5)
    largest = np.abs(w.numpy()).max(tuple({0, 1, 2} - {axis}), keepdims=True)
    scale = cb.fit(w, WeightConfig(refine=refine), axis).scale.numpy()
    assert scale.shape == largest.shape
    assert np.array_equal(scale, largest) != refine


def test_scale_of_a_zero_channel_and_of_a_tensor():
    w = tensor(0.5, -2.0, 0.0, 0.0, 0.25, 0.1).reshape(3, 2)
    assert cb.fit(w, WeightConfig(refine=False)).scale.flatten().tolist() == [2.0, 0.25, 0.25]
    assert cb.fit(torch.zeros(3, 2), WeightConfig(refine=False)).scale.flatten().tolist() == [1.0] * 3
    assert cb.fit(w, WeightConfig(scale="tensor")).scale.flatten().tolist() == [1.0]


@pytest.mark.parametrize(("bits", "least"), [(2, 9.0), (3, 14.0), (4, 20.0)])
def test_a_channel_of_zeros_stays_small(bits, least):
    w = 0.02 * torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    w[3] = 0
    assert ratio_db(w, quantized(cb.fit(w, WeightConfig(bits=bits), 0), w)) > least


@pytest.mark.parametrize("axis", [0, 1])
def test_fitted_scale_is_the_least_squares(axis):
    w, codebook = weights(6, 30), tensor(-0.6, -0.1, 0.2, 0.7)
    shape = [n if d == axis else 1 for d, n in enumerate(w.shape)]
    old = torch.linspace(0.3, 3, shape[axis]).reshape(shape)
    q = quantized(cb.Fit(codebook, old, codebook), w) / old.numpy()
    x = w.double().numpy()
    expected = (x * q).sum(1 - axis, keepdims=True) / (q * q).sum(1 - axis, keepdims=True)
    np.testing.assert_allclose(cb.fit_scale(w, codebook, old), expected, rtol=1e-5)


def test_a_scale_that_cannot_be_fitted_is_kept():
    w, old = weights(4, 30).abs(), torch.full((4, 1), 9.0)
    for codebook in (tensor(-1.0, -0.5), tensor(0.0, 0.0)):
        assert torch.equal(cb.fit_scale(w, codebook, old), old)


def test_least_squares_scale():
    w, q = weights(4, 30), torch.round(3 * weights(4, 30, seed=1))
    old = torch.full((4, 1), 9.0)
    x, y = w.double().numpy(), q.double().numpy()
    fitted = (x * y).sum(1) / (y * y).sum(1)
    expected = np.where(fitted > 0, fitted, 9.0)
    assert (fitted < 0).any()  # so the old scale is kept somewhere
    np.testing.assert_allclose(least_squares_scale(w, q, old).flatten(), expected, rtol=1e-5)
    assert least_squares_scale(w, torch.zeros_like(q), old).flatten().tolist() == [9.0] * 4


# ---- int8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("factor", [1e-6, 1.0, 3e4])
def test_snapped_levels_are_int8_times_a_scale(scale, factor):
    w = weights(8, 50) * factor
    fit = cb.fit(w, WeightConfig(bits=4, scale=scale, snap="int8"))
    codebook, channel = fit.codebook.numpy(), fit.scale.numpy()
    step = np.float32(2.0 ** np.ceil(np.log2(np.abs(codebook).max() / 127)))  # the smallest power of two that fits
    m = (codebook / step).astype(np.int8)
    assert np.array_equal(m * step, codebook)
    assert 64 <= np.abs(m.astype(int)).max() <= 127
    assert np.array_equal(codebook * channel, m.astype(np.float32) * (step * channel))


@pytest.mark.parametrize(
    ("levels", "expected"),
    [
        ([-1.0, 0.0, 1.0], [-1.0, 0.0, 1.0]),
        ([0.0, 127.4], [0.0, 128.0]),  # 127.4 > 127 needs the step 2
        ([0.0, 0.3, 127.0], [0.0, 0.0, 127.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([-0.26, 0.5], [-33 / 128, 0.5]),
    ],
)
def test_snapping_by_hand(levels, expected):
    assert cb.snap_codebook(tensor(*levels)).tolist() == expected


# ---- errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["channel", "tensor"])
def test_unusable_weights(scale):
    config = WeightConfig(scale=scale)
    with pytest.raises(ValueError, match="the weight is empty"):
        cb.fit(torch.zeros(0, 3), config)
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            cb.fit(tensor(1, bad).reshape(2, 1), config)


# ---- a trained network -------------------------------------------------------------------------------


@pytest.mark.skipif(not ROOT, reason="ADQ_TEST_DATA is not set (folder with weights/resnet20-cifar10.safetensors)")
@pytest.mark.parametrize(
    ("scale", "refine", "least"),
    [
        ("tensor", False, {2: 5.2, 3: 9.5, 4: 13.1}),
        ("tensor", True, {2: 8.3, 3: 13.6, 4: 19.3}),
        ("channel", True, {2: 8.6, 3: 14.0, 4: 19.8}),
    ],
)
def test_sqnr_on_resnet20(scale, refine, least):
    """Over the weights of all layers together but the first and the last."""
    model = create_model("resnet20")
    load_float_weights(model, Path(ROOT) / "weights" / "resnet20-cifar10.safetensors")
    layers = [p.detach() for name, p in model.named_parameters() if p.dim() == 4 and name != "conv1.weight"]
    everything = torch.cat([w.flatten() for w in layers])
    for bits, expected in least.items():
        config = WeightConfig(bits=bits, scale=scale, refine=refine)
        w_q = np.concatenate([quantized(cb.fit(w, config), w).ravel() for w in layers])
        assert expected <= ratio_db(everything, w_q) <= expected + 0.4

"""The optimum of one-dimensional k-means: histogram, levels, and whole fits, against exact dynamic programming."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from adq import kmeans
from adq.codebook import Fit, fit, sqnr
from adq.config import WeightConfig
from adq.kmeans import Spectrum, blocks, lloyd, optimal_levels, spectrum

ROOT = os.environ.get("ADQ_TEST_DATA")


# ---- oracle ------------------------------------------------------------------------------------------


def counted(values: np.ndarray) -> Spectrum:
    value, count = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    return Spectrum(value, count.astype(np.float64))


def segment_errors(weights: Spectrum):
    """``(i, j) -> `` squared error of the values i..j-1 around their mean; arrays of i < j."""
    x = weights.value - weights.value.mean()
    n, s, q = (np.concatenate([[0.0], (weights.count * x**p).cumsum()]) for p in (0, 1, 2))
    return lambda i, j: np.maximum((q[j] - q[i]) - (s[j] - s[i]) ** 2 / (n[j] - n[i]), 0.0)


def least_errors_by_force(weights: Spectrum, levels: int) -> np.ndarray:
    """Least squared error with 1..levels levels, every cut tried, in O(K n^2); float64 ``[levels]``."""
    size = len(weights.value)
    table = np.full((size + 1, size + 1), np.inf)
    i, j = np.triu_indices(size + 1, 1)
    table[i, j] = segment_errors(weights)(i, j)
    best, found = table[0], []
    for _ in range(levels):
        found.append(best[size])
        best = np.minimum(best, (best[:, None] + table).min(0))
    return np.array(found)


def least_errors(weights: Spectrum, levels: int) -> np.ndarray:
    """The same in O(K n log n): the best last cut never moves down as values are added, so it can be bisected."""
    size, error = len(weights.value), segment_errors(weights)
    best = np.append(0.0, error(0, np.arange(1, size + 1)))
    found = [best[size]]
    for _ in range(levels - 1):
        after = np.zeros(size + 1)
        jobs = np.array([[1], [size], [0], [size - 1]])  # values up to first..last, whose last cut is in low..high
        while jobs.size:
            first, last, low, high = jobs
            j = (first + last) // 2
            width = np.minimum(high, j - 1) - low + 1
            start = width.cumsum() - width
            i = np.arange(width.sum()) - np.repeat(start - low, width)
            candidate = best[i] + error(i, np.repeat(j, width))
            after[j] = np.minimum.reduceat(candidate, start)
            hits = np.flatnonzero(candidate == np.repeat(after[j], width))
            cut = i[hits[hits.searchsorted(start)]]
            jobs = np.hstack([[first, j - 1, low, cut], [j + 1, last, cut, high]])
            jobs = jobs[:, jobs[0] <= jobs[1]]
        best = after
        found.append(best[size])
    return np.array(found)


def test_the_two_oracles_agree():
    rng = np.random.default_rng(0)
    for values in (rng.standard_normal(90), rng.standard_cauchy(61), rng.integers(0, 30, 200), np.arange(5.0)):
        weights = counted(values)
        levels = min(12, len(weights.value))
        np.testing.assert_allclose(
            least_errors(weights, levels), least_errors_by_force(weights, levels), rtol=1e-9, atol=1e-10
        )


# ---- from weights to a spectrum ----------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, None])
def test_blocks_cover_every_element_once(monkeypatch, layout, axis):
    monkeypatch.setattr(kmeans, "BLOCK", 16)
    w = layout(lambda *shape: torch.arange(float(np.prod(shape, dtype=int))).reshape(shape))
    channels = [n if d == axis else 1 for d, n in enumerate(w.shape)]
    along = torch.arange(float(np.prod(channels, dtype=int))).reshape(channels)
    pieces = list(blocks(w, along, along.expand_as(w)))
    assert all(part.numel() <= 16 for part, _, _ in pieces)
    assert not w.is_contiguous() or all(part.is_contiguous() for part, _, _ in pieces)
    assert all(torch.equal(thin.expand_as(part), full) for part, thin, full in pieces)
    pairs = [torch.stack((part, full), -1).reshape(-1, 2) for part, _, full in pieces]
    expected = torch.stack((w, along.expand_as(w)), -1).reshape(-1, 2)
    assert sorted(torch.cat(pairs).tolist()) == sorted(expected.tolist())


def spectrum_of(w: torch.Tensor, scale: torch.Tensor | None = None) -> Spectrum:
    scale = torch.ones([1] * w.dim()) if scale is None else scale
    v = w.float() / scale
    return spectrum(w, scale, v.min().item(), v.max().item())


def test_few_weights_are_counted_exactly():
    w = torch.tensor([0.5, -0.0, 2.0, 0.5, 0.0, -3.0])
    weights = spectrum_of(w)
    assert weights.value.tolist() == [-3.0, 0.0, 0.5, 2.0]
    assert weights.count.tolist() == [1, 2, 2, 1]
    scaled = spectrum_of(w.reshape(2, 3), torch.tensor([[0.5], [2.0]]))
    assert scaled.value.tolist() == [-1.5, 0.0, 0.25, 1.0, 4.0]


def check_histogram(w: torch.Tensor) -> None:
    """In order, each weight lies within half a bin of the value that stands for it."""
    weights = spectrum_of(w)
    ordered = np.sort(w.double().numpy().ravel())
    assert (np.diff(weights.value) >= 0).all()
    assert (weights.count > 0).all()
    assert weights.count.sum() == w.numel()
    origin = min(max(ordered[0], 0.0), ordered[-1])
    distance = np.abs(ordered - origin)
    apart = np.abs(np.repeat(weights.value, weights.count.astype(int)) - ordered)
    # values too small for the bins count as the origin, differences from it are rounded to float32, and subnormal
    # numbers have no relative precision
    allowed = 2.0**-13 * distance + 1.001 * 2.0**-24 * (distance.max() + abs(origin)) + 2.0**-138
    assert (apart <= allowed).all()


WIDE = {
    "normal": lambda rng: rng.standard_normal(5000),
    "huge": lambda rng: rng.uniform(-3.4e38, 3.4e38, 5000),
    "tiny": lambda rng: rng.uniform(-1e-40, 1e-40, 5000),
    "far from zero": lambda rng: 1 + rng.uniform(0, 1e-3, 5000),
    "far below zero": lambda rng: -7 - rng.exponential(size=5000),
    "cauchy": lambda rng: rng.standard_cauchy(5000),
    "constant": lambda rng: np.full(5000, 0.3),
    "zero": lambda rng: np.zeros(5000),
    "all scales": lambda rng: np.exp(rng.uniform(-80, 80, 5000)) * rng.choice([-1, 1], 5000),
}


@pytest.mark.parametrize("name", WIDE)
def test_many_weights_are_counted_in_narrow_bins(monkeypatch, name):
    monkeypatch.setattr(kmeans, "SORTED_BELOW", 0)
    monkeypatch.setattr(kmeans, "BLOCK", 1000)
    check_histogram(torch.from_numpy(WIDE[name](np.random.default_rng(0)).astype(np.float32)))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
@settings(max_examples=200, deadline=None)
def test_the_histogram_takes_any_float(values):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kmeans, "SORTED_BELOW", 0)
        if max(values) - min(values) < 3e38:  # differences from an origin stay finite
            check_histogram(torch.tensor(values))


# ---- from a spectrum to levels -----------------------------------------------------------------------


def squared_error(weights: Spectrum, codebook: np.ndarray) -> float:
    edges = 0.5 * (codebook[:-1] + codebook[1:])
    nearest = codebook[edges.searchsorted(weights.value)]
    return float((weights.count * (weights.value - nearest) ** 2).sum())


def gain_of_a_step(weights: Spectrum, codebook: np.ndarray) -> float:
    """What moving the levels to the means of their cells would gain, in dB."""
    cell = (0.5 * (codebook[:-1] + codebook[1:])).searchsorted(weights.value)
    n = np.bincount(cell, weights.count, codebook.size)
    total = np.bincount(cell, weights.count * weights.value, codebook.size)
    means = np.divide(total, n, out=codebook.copy(), where=n > 0)
    return shortfall(weights, squared_error(weights, codebook), squared_error(weights, means))


def shortfall(weights: Spectrum, error: float, least: float) -> float:
    """How far an error is above the least one, in dB; below -110 dB of the weights all errors are rounding."""
    rounding = 1e-11 * (weights.count * weights.value**2).sum()
    return 10 * np.log10(max(error, rounding) / max(least, rounding))


@given(
    values=st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=60),
    levels=st.integers(2, 9),
)
@settings(max_examples=200, deadline=None)
def test_few_values_get_the_optimum(values, levels):
    weights = counted(np.array(values))
    found = optimal_levels(weights, levels)
    assert found.shape == (levels,)
    assert (np.diff(found) >= 0).all()
    least = least_errors_by_force(weights, levels)[-1]
    assert squared_error(weights, found) <= least * (1 + 1e-9) + 1e-12 * (weights.count * weights.value**2).sum()


@pytest.mark.parametrize("levels", [2, 7, 256])
@pytest.mark.parametrize("distinct", [1, 2, 6])
def test_levels_to_spare(levels, distinct):
    weights = counted(np.repeat(np.arange(distinct) - 2.5, 1000))
    found = optimal_levels(weights, levels)
    if levels >= distinct:
        assert found.tolist() == [*weights.value, *[weights.value[-1]] * (levels - distinct)]
    else:
        assert squared_error(weights, found) == pytest.approx(least_errors_by_force(weights, levels)[-1])


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "student": lambda rng, n: rng.standard_t(2, n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "uniform": lambda rng, n: rng.uniform(size=n),
    "skewed": lambda rng, n: rng.exponential(size=n) - 0.3,
    "log-normal": lambda rng, n: np.exp(2 * rng.standard_normal(n)),
    "two clusters": lambda rng, n: np.where(rng.random(n) < 0.5, rng.normal(-1, 1e-3, n), rng.normal(1, 0.1, n)),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.95, 0.0, rng.standard_normal(n)),
    "outliers": lambda rng, n: np.append(rng.standard_normal(n - 2), [-1e4, 3e3]),
    "a dense cluster": lambda rng, n: np.append(rng.normal(0, 1e-3, n - 100), rng.normal(0, 1, 100)),
    "offset": lambda rng, n: rng.normal(10, 0.1, n),
}
LEVELS = (2, 3, 4, 7, 8, 15, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("size", [3000, 300])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_levels_are_near_the_optimum(name, size):
    weights = counted(DISTRIBUTIONS[name](np.random.default_rng(0), size).astype(np.float32))
    least = least_errors(weights, LEVELS[-1])
    for k in LEVELS:
        found = optimal_levels(weights, k)
        assert -1e-3 < shortfall(weights, squared_error(weights, found), least[k - 1]) < 0.03
        assert size == 300 or gain_of_a_step(weights, found) < 1e-3


def test_lloyd_rests_where_levels_are_means():
    weights = counted(np.random.default_rng(0).laplace(size=2000))
    start = np.linspace(-3, 3, 8)
    found = lloyd(weights, start)
    assert squared_error(weights, found) < squared_error(weights, start)
    assert 0 <= gain_of_a_step(weights, found) < 10 * np.log10(1 / (1 - kmeans.LLOYD_GAIN))


def test_lloyd_leaves_unused_levels_in_place():
    assert lloyd(counted([0.0, 1.0, 1.2]), np.array([-9.0, 0.0, 1.0, 5.0])).tolist() == [-9.0, 0.0, 1.1, 5.0]


# ---- whole fits --------------------------------------------------------------------------------------


def fit_shortfall(w: torch.Tensor, config: WeightConfig, least=None) -> float:
    """dB between a fit and the optimum for its scales (``least``: that of every number of levels, if known)."""
    fitted = fit(w, config)
    v = (w.float() / fitted.scale).double().numpy().ravel()
    c = fitted.codebook.numpy()
    code = (np.float32(0.5) * (c[:-1] + c[1:])).searchsorted(v.astype(np.float32))
    weights = counted(v)
    if least is None:
        least = least_errors(weights, config.num_levels)
    return shortfall(weights, float(((v - c.astype(np.float64)[code]) ** 2).sum()), least[config.num_levels - 1])


@pytest.mark.skipif(not ROOT, reason="ADQ_TEST_DATA is not set (folder with weights/resnet20-cifar10.safetensors)")
@pytest.mark.parametrize(("bits", "largest"), [((2, 3, 4, 5), 40_000), ((8,), 5_000)])
def test_layers_of_resnet20_are_near_the_optimum(bits, largest):
    """At 8 bits the oracle takes seconds for each of the larger layers."""
    layers = load_file(Path(ROOT) / "weights" / "resnet20-cifar10.safetensors")
    found = {}
    for name, w in layers.items():
        if w.dim() != 4 or w.numel() > largest:
            continue
        least = least_errors(counted(w.numpy().ravel()), 2 ** max(bits))
        for b in bits:
            found[name, b, "tensor"] = fit_shortfall(w, WeightConfig(bits=b, scale="tensor"), least)
            found[name, b, "channel"] = fit_shortfall(w, WeightConfig(bits=b, scale="channel"))
    assert len(found) >= 2 * len(bits) * 7
    worst = max(found, key=found.get)
    assert found[worst] < 0.1, f"{worst}: {found[worst]:.3f} dB"


@pytest.mark.parametrize("rows", [40, 300])
def test_levels_are_means_at_the_fitted_scales(rows):
    w = torch.from_numpy(np.random.default_rng(0).laplace(size=(rows, 500)).astype(np.float32))
    fitted = fit(w, WeightConfig(bits=4, scale="channel"))
    weights = counted((w / fitted.scale).numpy())
    assert gain_of_a_step(weights, fitted.codebook.double().numpy()) < 1e-3


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_histogram_is_as_good_as_sorting(name):
    """Above SORTED_BELOW weights the levels come from a histogram."""
    size = kmeans.SORTED_BELOW + 4465
    w = torch.from_numpy(DISTRIBUTIONS[name](np.random.default_rng(1), size).astype(np.float32))
    least = least_errors(counted(w.numpy()), 16)
    for bits in (2, 4):
        assert -1e-3 < fit_shortfall(w, WeightConfig(bits=bits, scale="tensor"), least) < 0.1


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("size", [(64, 100), (700, 433)])
def test_fit_of_half_precision_is_that_of_its_values(scale, size):
    w = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.bfloat16, torch.float16):
        half, full = fit(w.to(dtype), WeightConfig(scale=scale)), fit(w.to(dtype).float(), WeightConfig(scale=scale))
        assert torch.equal(half.codebook, full.codebook)
        assert torch.equal(half.scale, full.scale)
        assert torch.equal(half.count, full.count)


def fit_sqnr(w: torch.Tensor, fitted: Fit) -> float:
    (w_q,) = torch.ops.adq.foreach_codebook_quantize([w], [fitted.scale.contiguous()], [fitted.codebook])
    return sqnr(w, w_q)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [(12, 20, 3, 3), (96, 110, 5, 5)])
def test_fit_does_not_depend_on_the_layout(size, axis):
    """Sums of another order round differently and may put a weight beside a threshold into the next cell; all else
    would show as a difference of the error."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(size, generator=generator) * torch.rand(size[0], 1, 1, 1, generator=generator)
    last, turned = w.to(memory_format=torch.channels_last), w.transpose(0, 1)
    plain = fit(w, WeightConfig(), axis)
    expected = fit_sqnr(w, plain)
    for other, along in ((last, axis), (turned, 1 - axis)):
        fitted = fit(other, WeightConfig(), along)
        scale = fitted.scale if along == axis else fitted.scale.transpose(0, 1)
        torch.testing.assert_close(fitted.codebook, plain.codebook, rtol=0, atol=5e-4)
        torch.testing.assert_close(scale, plain.scale, rtol=5e-3, atol=0)
        assert abs(fit_sqnr(other, fitted) - expected) < 1e-3


@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(1, 300_000), (30, 10_000), (1_500_000, 1), (40, 100)])
def test_fit_is_the_same_for_any_number_of_threads(scale, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    fits = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            fits.append(fit(w, WeightConfig(bits=4, scale=scale)))
    finally:
        torch.set_num_threads(before)
    for other in fits[1:]:
        assert torch.equal(other.codebook, fits[0].codebook)
        assert torch.equal(other.scale, fits[0].scale)
        assert torch.equal(other.count, fits[0].count)


MEASURE = """
import resource, sys
import torch
from adq.codebook import fit, sqnr
from adq.config import WeightConfig

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

task, rows, columns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = {
    "sqnr": lambda w: sqnr(w, w),
    "start": lambda w: fit(w, WeightConfig(bits=4, scale="tensor", refine=False)),
    "tensor": lambda w: fit(w, WeightConfig(bits=4, scale="tensor")),
    "channel": lambda w: fit(w, WeightConfig(bits=4, scale="channel")),
}[task]
run(torch.randn(70, 1000))
w = torch.empty(rows, columns)
for part in w.flatten().split(1_000_000):
    part.normal_()
before = peak()
run(w)
print((peak() - before) / w.nbytes)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the module resource is for POSIX systems")
@pytest.mark.parametrize(
    ("task", "shape"),
    [
        ("sqnr", (4000, 10_000)),
        ("start", (4000, 10_000)),
        ("tensor", (4000, 10_000)),
        ("channel", (4000, 10_000)),
        ("channel", (1, 40_000_000)),
    ],
)
def test_memory_beside_the_weights(task, shape):
    """Under half of the weights, which are 160 MB here; in a process of its own, whose peak nothing else has raised."""
    command = [sys.executable, "-c", MEASURE, task, *map(str, shape)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 0.5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("scale", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(40, 100), (3000, 1000)])
def test_fit_on_a_gpu(scale, shape):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu, again = (fit(x, WeightConfig(bits=4, scale=scale)) for x in (w, w.cuda(), w.cuda()))
    assert on_gpu.codebook.device.type == on_gpu.scale.device.type == on_gpu.count.device.type == "cuda"
    assert torch.equal(on_gpu.codebook, again.codebook)
    assert torch.equal(on_gpu.scale, again.scale)
    torch.testing.assert_close(on_gpu.codebook.cpu(), on_cpu.codebook, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(on_gpu.scale.cpu(), on_cpu.scale, rtol=1e-4, atol=0)

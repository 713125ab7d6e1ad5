"""The allocator against all assignments; its file; its application to a model."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adq
from adq import Allocation, Budget, LayerCost, SensitivityTable, allocate
from adq.convert import weight_quantizers


def table(*layers: tuple, float_weights: int = 0) -> SensitivityTable:
    """Layers as ``(name, weights, macs, activation bits, scores)``."""
    return SensitivityTable("loss", tuple(LayerCost(*layer) for layer in layers), float_weights)


SMALL = table(
    ("a", 100, 1000, 8, {2: 9.0, 3: 4.0, 4: 1.0}),
    ("b", 300, 500, 4, {2: 3.0, 3: 1.0, 4: 0.5}),
    ("c", 50, 2000, 32, {8: 0.0}, True),
    float_weights=10,
)


def spent(layers, bits: dict[str, int], kind: str) -> float:
    """The cost of an assignment in the budget's own unit."""
    if kind == "weight_bits":
        return sum(layer.weights * bits[layer.name] for layer in layers) / sum(layer.weights for layer in layers)
    if kind == "bytes":
        return sum(math.ceil(layer.weights * bits[layer.name] / 8) for layer in layers)
    return sum(layer.macs * bits[layer.name] * layer.activation_bits for layer in layers)


def assignments(layers, limits=None, tied=()):
    choices = [[b for b in layer.scores if (limits or {}).get(layer.name, (1, 8))[0] <= b] for layer in layers]
    choices = [
        [b for b in widths if b <= (limits or {}).get(layer.name, (1, 8))[1]]
        for layer, widths in zip(layers, choices, strict=True)
    ]
    for widths in itertools.product(*choices):
        bits = {layer.name: b for layer, b in zip(layers, widths, strict=True)}
        if all(len({bits[name] for name in group}) <= 1 for group in tied):
            yield bits


def score(layers, bits: dict[str, int]) -> float:
    return sum(layer.scores[bits[layer.name]] for layer in layers)


# ---- against brute force -----------------------------------------------------------------------------


@st.composite
def problems(draw):
    """A table of 1 to 5 layers, some limits and ties, a budget between the extremes or just outside."""
    magnitude = draw(st.sampled_from([1.0, 1e-7, 1e5]))
    layers = []
    for i in range(draw(st.integers(1, 5))):
        widths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
        values = draw(st.lists(st.floats(-0.125, 10, width=32), min_size=len(widths), max_size=len(widths)))
        sizes = draw(st.integers(1, 5000)), draw(st.integers(0, 10**9))
        scores = {b: v * magnitude for b, v in zip(sorted(widths), values, strict=True)}
        layers.append((f"layer{i}", *sizes, draw(st.sampled_from([4, 8, 32])), scores))
    made = table(*layers, float_weights=draw(st.integers(0, 100)))
    names = st.sampled_from([layer.name for layer in made.layers])
    tied = draw(st.lists(st.lists(names, min_size=1, max_size=3), max_size=2)) if draw(st.booleans()) else []
    low = draw(st.integers(1, 4))
    limits = {draw(names): (low, draw(st.integers(low, 8)))} if draw(st.booleans()) else {}
    kind = draw(st.sampled_from(["weight_bits", "bytes", "bit_ops"]))
    costs = sorted(spent(made.layers, bits, kind) for bits in assignments(made.layers))
    amount = draw(st.one_of(st.sampled_from(costs), st.floats(costs[0] * 0.9, costs[-1] * 1.1)))
    return made, limits, tied, kind, max(amount, 1e-6)


@given(problem=problems())
@settings(max_examples=300, deadline=None)
def test_equals_the_best_of_all_assignments(problem):
    made, limits, tied, kind, amount = problem
    possible = list(assignments(made.layers, limits, tied))
    slack = 1 + 1e-12 if kind == "weight_bits" else 1
    feasible = [bits for bits in possible if spent(made.layers, bits, kind) <= amount * slack]
    budget = Budget(**{kind: amount})
    if not feasible:
        with pytest.raises(ValueError, match="no allocation meets the budget" if possible else "leave no width"):
            allocate(made, budget, limits=limits, tied=tied)
        return
    found = allocate(made, budget, limits=limits, tied=tied)
    assert found.bits in feasible
    best = min(score(made.layers, bits) for bits in feasible)
    largest = max(abs(value) for layer in made.layers for value in layer.scores.values())
    assert score(made.layers, found.bits) <= best + 1e-14 * largest
    assert allocate(made, budget, limits=limits, tied=tied) == found
    assert found.average_quantized == pytest.approx(spent(made.layers, found.bits, "weight_bits"))


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (Budget(weight_bits=1300 / 450), {"a": 3, "b": 2, "c": 8}),  # 300 + 600 + 400 bits
        (Budget(weight_bits=8), {"a": 4, "b": 4, "c": 8}),
        (Budget(bytes=188), {"a": 4, "b": 2, "c": 8}),  # 50 + 75 + 50 = 175; with b at 3 bits 213
        (Budget(bytes=212.9), {"a": 4, "b": 2, "c": 8}),
        (Budget(bytes=213), {"a": 4, "b": 3, "c": 8}),
        (Budget(bit_ops=512000 + 16000 + 8000), {"a": 2, "b": 4, "c": 8}),
        (Budget(bit_ops=512000 + 32000 + 4000), {"a": 4, "b": 2, "c": 8}),
    ],
)
def test_by_hand(budget, expected):
    found = allocate(SMALL, budget)
    assert found.bits == expected
    total = 100 * expected["a"] + 300 * expected["b"] + 50 * 8
    assert found.average_quantized == pytest.approx(total / 450)
    assert found.average_network == pytest.approx((total + 320) / 460)


def test_limits_and_ties_by_hand():
    assert allocate(SMALL, Budget(weight_bits=8), limits={"a": (2, 3)}).bits == {"a": 3, "b": 4, "c": 8}
    assert allocate(SMALL, Budget(bytes=200), tied=[["a", "b"]]).bits == {"a": 2, "b": 2, "c": 8}
    assert allocate(SMALL, Budget(bytes=201), tied=[["a", "b"]]).bits == {"a": 3, "b": 3, "c": 8}
    three = table(*((name, 10, 10, 8, {2: 1.0, 3: 0.5, 4: 0.1}) for name in "abc"))
    overlapping = allocate(three, Budget(weight_bits=3.4), limits={"c": (3, 4)}, tied=[["a", "b"], ["a", "c"], []])
    assert overlapping.bits == {"a": 3, "b": 3, "c": 3}


@pytest.mark.parametrize("kind", ["weight_bits", "bytes", "bit_ops"])
def test_the_smallest_possible_is_named_and_feasible(kind):
    smallest = min(spent(SMALL.layers, bits, kind) for bits in assignments(SMALL.layers))
    text = {"weight_bits": f"{smallest:.4f} average weight bits", "bytes": f"{smallest} bytes"}
    with pytest.raises(ValueError, match=f"the smallest possible has {text.get(kind, f'{smallest} bit-operations')}$"):
        allocate(SMALL, Budget(**{kind: smallest * 0.99}))
    assert allocate(SMALL, Budget(**{kind: smallest})).bits == {"a": 2, "b": 2, "c": 8}


def test_budgets_that_no_binary_fraction_meets():
    made = table(("a", 65, 1, 8, {4: 1.0}), ("b", 35, 1, 8, {5: 1.0}))
    assert 4.35 * 100 < 435
    assert allocate(made, Budget(weight_bits=4.35)).bits == {"a": 4, "b": 5}


def test_large_layers_stay_strictly_within_the_budget():
    made = table(*((f"l{i}", 10**9 + i, 1, 8, {2: 2.0 + i / 7, 3: 1.0, 4: 0.0}) for i in range(6)))
    smallest = spent(made.layers, {layer.name: 2 for layer in made.layers}, "bytes")
    for extra, raised in ((125 * 10**6 - 1, 0), (125 * 10**6, 1), (250 * 10**6 - 1, 1), (250 * 10**6, 2)):
        found = allocate(made, Budget(bytes=smallest + extra))
        assert spent(made.layers, found.bits, "bytes") <= smallest + extra
        assert sum(b - 2 for b in found.bits.values()) == raised


def least_score(layers, limit: int) -> float:
    """Of all assignments of at most ``limit`` bits in total, by dynamic programming over the bits spent."""
    best = {0: 0.0}
    for layer in layers:
        reached: dict[int, float] = {}
        for cost, total in best.items():
            for b, value in layer.scores.items():
                after = cost + layer.weights * b
                if after <= limit and total + value < reached.get(after, math.inf):
                    reached[after] = total + value
        best = reached
    return min(best.values())


@pytest.mark.parametrize("seed", range(15))
def test_scores_of_very_different_size_are_all_respected(seed):
    """20 layers whose scores span eight decades: the small ones decide too."""
    rng = np.random.default_rng(seed)
    made = table(
        *(
            (f"l{i}", 10 * int(rng.integers(1, 40)), 1, 8, dict(zip((2, 3, 4), scores.tolist(), strict=True)))
            for i, scores in enumerate(-np.sort(-rng.uniform(0, 1, (20, 3))) * 10 ** rng.uniform(-8, 0, (20, 1)))
        )
    )
    weights = sum(layer.weights for layer in made.layers)
    found = allocate(made, Budget(weight_bits=2.8))
    assert score(made.layers, found.bits) <= least_score(made.layers, int(2.8 * weights + 1e-6)) * (1 + 1e-12)


@pytest.mark.parametrize("big", [10**7, 10**9])
@pytest.mark.parametrize("free", [True, False])
def test_small_layers_beside_a_huge_one_decide_too(big, free):
    """What is left to them is less than a solver's tolerance on the cost of all."""
    rng = np.random.default_rng(1)
    for low in (2, 8) if free else (8,):
        sizes = rng.integers(9, 300, 12).tolist()
        falls = (30 * rng.uniform(0.5, 1, (12, 3)) * 4.0 ** -np.array([2, 4, 8])).tolist()
        small = (
            (f"l{i}", n, 1, 8, {b: f * n for b, f in zip((2, 4, 8), fall, strict=True)})
            for i, (n, fall) in enumerate(zip(sizes, falls, strict=True))
        )
        widths = (2, 4, 8) if free else (8,)
        made = table(("big", big, 1, 8, {b: big * 4.0**-b for b in widths}), *small)
        limit = low * big + int(3.7 * sum(sizes))
        found = allocate(made, Budget(weight_bits=limit / (big + sum(sizes))))
        assert sum(layer.weights * found.bits[layer.name] for layer in made.layers) <= limit
        assert score(made.layers, found.bits) <= least_score(made.layers, limit) * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["weight_bits", "bytes", "bit_ops"])
@pytest.mark.parametrize("amount", [2.81, 4.13])
def test_two_hundred_layers_of_seven_widths(kind, amount):
    """With costs in coarse units, which another programme can count through; scores span four decades."""
    rng, widths, unit = np.random.default_rng(0), np.arange(2, 9), 4096
    sizes, pixels = rng.integers(1, 20, (2, 200))
    scores = sizes[:, None] * 10 ** rng.uniform(-3, 1, (200, 1)) * rng.uniform(0.3, 1, (200, 7)) / 4.0**widths
    units = sizes * pixels if kind == "bit_ops" else sizes
    best = np.zeros(int(amount * units.sum()) + 1)  # by the units that may be spent
    for n, row in zip(units, scores, strict=True):
        best = np.min(
            [np.append(np.full(n * b, np.inf), best[: -n * b]) + f for b, f in zip(widths, row, strict=True)], 0
        )
    layers = (
        (f"l{i}", unit * n, unit * n * p, 8, dict(zip(widths.tolist(), row, strict=True)))
        for i, (n, p, row) in enumerate(zip(sizes.tolist(), pixels.tolist(), scores.tolist(), strict=True))
    )
    made = table(*layers)
    size = {"weight_bits": 1, "bytes": unit * sizes.sum() / 8, "bit_ops": 8 * unit * units.sum()}[kind]
    found = allocate(made, Budget(**{kind: float(amount * size)}))
    assert score(made.layers, found.bits) == pytest.approx(best[-1], rel=1e-12, abs=0)


@pytest.mark.parametrize("count", [30, 100])
def test_layers_that_gain_alike_are_too_many_to_search(count):
    """Any assignment is as good as its cost is large, and sizes have no common divisor."""
    draw = np.random.default_rng(0)
    sizes = draw.integers(10_000, 5_000_000, count)
    layers = [(f"l{i}", int(n), 1, 4, {b: float(n * 4.0**-b) for b in (2, 3, 4)}) for i, n in enumerate(sizes)]
    budget = Budget(weight_bits=2.81)
    with pytest.warns(RuntimeWarning, match="too many assignments") as caught:
        found = allocate(table(*layers), budget)
    assert found.average_quantized <= 2.81
    more = float(re.search(r"at most (\S+) more", str(caught[0].message))[1])
    assert more < 3e-5 * score(table(*layers).layers, found.bits)


def test_of_equal_scores_the_cheapest():
    made = table(*((name, n, 1, 8, {2: 1.0, 3: 0.0, 4: 0.0, 8: 0.0}) for name, n in (("a", 100), ("b", 50))))
    assert allocate(made, Budget(weight_bits=8)).bits == {"a": 3, "b": 3}
    assert allocate(made, Budget(weight_bits=2.9)).bits == {"a": 2, "b": 3}


@pytest.mark.parametrize("kind", ["weight_bits", "bytes", "bit_ops"])
def test_an_infinite_budget_takes_the_least_score(kind):
    assert allocate(SMALL, Budget(**{kind: math.inf})).bits == {"a": 4, "b": 4, "c": 8}
    in_float = tuple(dataclasses.replace(layer, in_float=True) for layer in SMALL.layers)
    table = dataclasses.replace(SMALL, layers=in_float)
    assert allocate(table, Budget(**{kind: math.inf})).bits == {"a": 4, "b": 4, "c": 8}


def test_a_weight_that_files_hold_in_float_takes_no_bits_or_bytes():
    layers = (*SMALL.layers[:2], LayerCost("head", 900, 100, 8, {2: 1.0, 3: 0.5, 4: 0.1}, in_float=True))
    made = SensitivityTable("loss", layers, 910)
    for budget, others in ((Budget(weight_bits=3), {"a": 4, "b": 2}), (Budget(bytes=50 + 75), {"a": 4, "b": 2})):
        found = allocate(made, budget)
        assert found.bits == {**others, "head": 4}
        assert found.average_quantized == (100 * 4 + 300 * 2) / 400
        assert found.average_network == (100 * 4 + 300 * 2 + 32 * 910) / (400 + 910)
    least = 1000 * 8 * 2 + 500 * 4 * 2 + 100 * 8 * 2
    assert allocate(made, Budget(bit_ops=least)).bits == {"a": 2, "b": 2, "head": 2}
    with pytest.raises(ValueError, match=f"the smallest possible has {least} bit-operations"):
        allocate(made, Budget(bit_ops=least - 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limits": {"z": (2, 3)}}, "limits name an unknown layer 'z'"),
        ({"limits": {"a": 4}}, r"limits of layer 'a' must be \(lowest, highest\), got 4"),
        ({"limits": {"a": (2, 3, 4)}}, r"limits of layer 'a' must be \(lowest, highest\), got \(2, 3, 4\)"),
        ({"tied": [["a", "z"]]}, "tied names an unknown layer 'z'"),
        ({"limits": {"a": (5, 8)}}, "limits and ties leave no width for layer 'a'"),
        ({"tied": [["a", "c"]]}, "limits and ties leave no width for layer 'a'"),
        ({"limits": {"c": (2, 4)}}, "limits and ties leave no width for layer 'c'"),
    ],
)
def test_bad_limits_and_ties(arguments, message):
    with pytest.raises(ValueError, match=message):
        allocate(SMALL, Budget(weight_bits=4), **arguments)


def test_bad_budgets_and_tables():
    for arguments in ({}, {"weight_bits": 3, "bytes": 10}):
        with pytest.raises(ValueError, match="a budget is one of weight_bits, bytes, bit_ops"):
            Budget(**arguments)
    for amount in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="the budget bytes must be positive"):
            Budget(bytes=amount)
    with pytest.raises(ValueError, match="NaN or infinity"):
        allocate(table(("a", 10, 10, 8, {2: float("nan"), 3: 1.0})), Budget(weight_bits=3))
    with pytest.raises(ValueError, match=r"the budget must be an adq\.Budget, .*got 2\.81"):
        allocate(SMALL, 2.81)
    with pytest.raises(ValueError, match="the sensitivity table has no layers"):
        allocate(table(), Budget(weight_bits=3))


# ---- the file ----------------------------------------------------------------------------------------


def test_file_round_trip(tmp_path):
    found = allocate(SMALL, Budget(weight_bits=3))
    found.save(tmp_path / "bits.yaml")
    again = Allocation.load(tmp_path / "bits.yaml")
    assert list(again.bits.items()) == list(found.bits.items())
    assert again.average_quantized == pytest.approx(found.average_quantized, abs=1e-6)
    assert again.average_network == pytest.approx(found.average_network, abs=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["bits.yaml"]


def test_a_person_may_edit_the_file(tmp_path):
    path = tmp_path / "bits.yaml"
    allocate(SMALL, Budget(weight_bits=8)).save(path)
    path.write_text("# mine\n" + path.read_text().replace("a: 4", "a: 2"))
    assert Allocation.load(path).bits == {"a": 2, "b": 4, "c": 8}
    path.write_text("format: adq-allocation\nversion: 1\naverage_bits_whole_network:\nweight_bits: {a: 3}")
    loaded = Allocation.load(path)
    assert loaded.bits == {"a": 3}
    assert math.isnan(loaded.average_network)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: other\nversion: 1\nweight_bits: {a: 3}", "is not an allocation file"),
        ("version: 1\nweight_bits: {a: 3}", "is not an allocation file"),
        ("format: adq-allocation\nversion: 1\nweight_bits: [3]", "is not an allocation file"),
        ("format: adq-allocation\nversion: 2\nweight_bits: {a: 3}", "has version 2, this adq reads 1"),
        ("format: adq-allocation\nweight_bits: {a: 3}", "has version None"),
        (
            "format: adq-allocation\nversion: 1\nweight_bits: {a: 9}",
            "bits of layer 'a' in .*bits.yaml must be .* got 9",
        ),
        ("format: adq-allocation\nversion: 1\nweight_bits: {a: 2.5}", "bits of layer 'a' in .* got 2.5"),
        ("format: adq-allocation\nversion: 1\nweight_bits: {a: true}", "bits of layer 'a' in .* got True"),
        ("weight_bits: {a: 3", "is not valid YAML"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "bits.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Allocation.load(tmp_path / "bits.yaml")


# ---- application -------------------------------------------------------------------------------------


def test_applying_sets_the_bits_or_changes_nothing():
    torch.manual_seed(0)
    model = adq.quantize_(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)))
    before = copy.deepcopy(model.state_dict())
    for wrong, message in (({"1": 2, "7": 4}, "no quantized layer '7'"), ({"1": 2, "2": 0}, "bits of layer '2'")):
        with pytest.raises(ValueError, match=message):
            adq.apply_allocation_(model, wrong)
        assert [key for key, value in model.state_dict().items() if not torch.equal(before[key], value)] == []
    assert adq.apply_allocation_(model, Allocation({"0": 8, "1": 2}, 0, 0)) is model
    assert [quantizer.bits for _, quantizer in weight_quantizers(model).values()] == [8, 2, 8]
    fresh = nn.Linear(8, 8)
    fresh.weight = model[1].weight
    adq.quantize_(fresh, adq.ADQConfig(first_last_bits=2))
    assert torch.equal(fresh.weight_quantizer.codebook, model[1].weight_quantizer.codebook)

"""Bit allocation: the multiple-choice knapsack, solved exactly, and its small readable file."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from adq.config import check_bits, dump_yaml, load_yaml
from adq.convert import set_weight_bits
from adq.ops import packed_size
from adq.sensitivity import LayerCost, SensitivityTable
from adq.store import write_text

FORMAT = "adq-allocation"
FORMAT_VERSION = 1
FLOAT_BITS = 32
FIRST_EXCESS = 1e-3
"""Where the search begins: this part of the first gap between the bounds on the least score."""
MOST_SUMS = 2**17
"""Sums of the layers so far that the search goes on with; more occur where layers of unrelated sizes gain alike."""


@dataclass(frozen=True)
class Budget:
    """What an allocation may cost at most; exactly one of the three.

    Attributes:
        weight_bits: average bits per weight over all quantized layers, pinned ones included.
        bytes: of all quantized weights' packed codes.
        bit_ops: multiply-accumulates of a sample times weight bits times activation bits, summed.
    """

    weight_bits: float | None = None
    bytes: float | None = None
    bit_ops: float | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("weight_bits", "bytes", "bit_ops") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"adq: a budget is one of weight_bits, bytes, bit_ops; got {given or 'none'}")
        if not getattr(self, given[0]) > 0:
            raise ValueError(f"adq: the budget {given[0]} must be positive, got {getattr(self, given[0])}")

    def cost(self, layer: LayerCost, bits: int) -> int:
        """Cost of one layer at a width, in whole units: bits, bytes or bit-operations."""
        if layer.in_float and self.bit_ops is None:
            return 0
        if self.weight_bits is not None:
            return layer.weights * bits
        return packed_size(layer.weights, bits) if self.bytes is not None else layer.macs * bits * layer.activation_bits

    def limit(self, layers: Sequence[LayerCost]) -> int:
        """The budget in the unit of :meth:`cost`."""
        amount = self.bytes if self.bytes is not None else self.bit_ops or 0.0
        if self.weight_bits is not None:
            # 4.35 bits of 100 weights are 435, not 434.999...
            amount = self.weight_bits * max(1, _weights_in_codes(layers)) * (1.0 + 1e-12)
        largest = sum(max(self.cost(layer, bits) for bits in layer.scores) for layer in layers)
        return math.floor(min(amount, largest))

    def describe(self, cost: int, layers: Sequence[LayerCost]) -> str:
        """A cost in the budget's own unit, as text."""
        if self.weight_bits is not None:
            return f"{cost / max(1, _weights_in_codes(layers)):.4f} average weight bits"
        return f"{cost} bytes" if self.bytes is not None else f"{cost} bit-operations"


def _weights_in_codes(layers: Sequence[LayerCost]) -> int:
    """Number of weights that files hold as codes."""
    return sum(layer.weights for layer in layers if not layer.in_float)


@dataclass(frozen=True)
class Allocation:
    """Weight bits of every quantized layer.

    Attributes:
        bits: by qualified name, in order of registration.
        average_quantized: average bits over the quantized layers' weights.
        average_network: average over all parameters of the network, those in float counted at 32 bits.
    """

    bits: dict[str, int]
    average_quantized: float
    average_network: float

    def save(self, path: str | Path) -> None:
        """Write the YAML file: to a temporary name, then renamed."""
        write_text(path, dump_yaml(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Plain mappings, as in the file."""
        return {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "average_bits_quantized_layers": round(self.average_quantized, 6),
            "average_bits_whole_network": round(self.average_network, 6),
            "weight_bits": dict(self.bits),
        }

    @classmethod
    def load(cls, path: str | Path) -> Allocation:
        """Read a file that :meth:`save` wrote or a person edited; the averages in it are informative only.

        Raises:
            FileNotFoundError, ValueError: no such file; not an allocation; a newer version; bits outside 1..8.
        """
        values = load_yaml(path)
        if values.get("format") != FORMAT or not isinstance(values.get("weight_bits"), Mapping):
            raise ValueError(f"adq: {path} is not an allocation file (format: {FORMAT}, weight_bits: ...)")
        if values.get("version") != FORMAT_VERSION:
            raise ValueError(f"adq: {path} has version {values.get('version')!r}, this adq reads {FORMAT_VERSION}")
        bits = {
            str(name): check_bits(b, f"bits of layer {name!r} in {path}") for name, b in values["weight_bits"].items()
        }
        averages = [values.get(f"average_bits_{key}") for key in ("quantized_layers", "whole_network")]
        quantized, network = (float(value) if isinstance(value, (int, float)) else math.nan for value in averages)
        return cls(bits, quantized, network)


def allocate(
    table: SensitivityTable,
    budget: Budget,
    *,
    limits: Mapping[str, tuple[int, int]] | None = None,
    tied: Iterable[Sequence[str]] = (),
) -> Allocation:
    """Choose one width per layer: least sum of scores within the budget, exactly (dynamic program).

    Where very many assignments are as good as the best, as when every layer gains the same for a bit of a weight, the
    search is cut off: then a RuntimeWarning says how far from the least sum the one found is at most.

    Args:
        table: from :func:`adq.sensitivity`; pinned layers keep their width and count towards the budget.
        budget: what the allocation may cost; with ``math.inf`` the least sum of scores is taken.
        limits: ``{layer: (lowest, highest)}`` widths.
        tied: groups of layers that must get the same width.

    Returns:
        The allocation; the same one for the same arguments.

    Raises:
        ValueError: no allocation meets the budget (the smallest that is possible is named); a budget of another
            kind; a table without layers; an unknown layer; limits that are no pair; limits or ties that leave a layer
            no width.
    """
    if not isinstance(budget, Budget):
        raise ValueError(f"adq: the budget must be an adq.Budget, as Budget(weight_bits=2.81), got {budget!r}")
    if not table.layers:
        raise ValueError("adq: the sensitivity table has no layers")
    groups = _merged(tied)
    choices = _choices(table, limits or {}, groups)
    check_reachable(budget, table.layers, choices)
    bits = _solve(table.layers, choices, budget, budget.limit(table.layers), groups)
    return describe_allocation(table, bits)


def check_reachable(
    budget: Budget, layers: Sequence[LayerCost], choices: Mapping[str, Iterable[int]] | None = None
) -> None:
    """Raise ValueError, which names the smallest possible cost, if no allocation of the layers meets the budget.

    Args:
        budget: what the allocation may cost.
        layers: of a table.
        choices: widths by layer; None for those that have a score.
    """
    widths = choices or {layer.name: layer.scores for layer in layers}
    limit = budget.limit(layers)
    smallest = sum(min(budget.cost(layer, bits) for bits in widths[layer.name]) for layer in layers)
    if smallest > limit:
        raise ValueError(
            f"adq: no allocation meets the budget of {budget.describe(limit, layers)}; "
            f"the smallest possible has {budget.describe(smallest, layers)}"
        )


def _merged(tied: Iterable[Sequence[str]]) -> list[list[str]]:
    """The groups, those that overlap as one."""
    merged: list[list[str]] = []
    for group in tied:
        names = list(dict.fromkeys(group))
        overlapping = [other for other in merged if set(other) & set(names)]
        merged = [other for other in merged if other not in overlapping]
        merged.append(list(dict.fromkeys(name for part in (*overlapping, names) for name in part)))
    return [group for group in merged if group]


def describe_allocation(table: SensitivityTable, bits: Mapping[str, int]) -> Allocation:
    """An :class:`Allocation` with its averages, from widths by layer."""
    weights = _weights_in_codes(table.layers)
    total = sum(layer.weights * bits[layer.name] for layer in table.layers if not layer.in_float)
    network = (total + FLOAT_BITS * table.float_weights) / (weights + table.float_weights)
    quantized = total / weights if weights else float(FLOAT_BITS)
    return Allocation({layer.name: int(bits[layer.name]) for layer in table.layers}, quantized, network)


def _choices(
    table: SensitivityTable, limits: Mapping[str, tuple[int, int]], tied: Iterable[Sequence[str]]
) -> dict[str, list[int]]:
    choices = {layer.name: sorted(layer.scores) for layer in table.layers}
    for name, widths in limits.items():
        if name not in choices:
            raise ValueError(f"adq: limits name an unknown layer {name!r}")
        if not isinstance(widths, Sequence) or len(widths) != 2:
            raise ValueError(f"adq: limits of layer {name!r} must be (lowest, highest), got {widths!r}")
        low, high = widths
        choices[name] = [b for b in choices[name] if low <= b <= high]
    for group in tied:
        unknown = [name for name in group if name not in choices]
        if unknown:
            raise ValueError(f"adq: tied names an unknown layer {unknown[0]!r}")
        common = set.intersection(*(set(choices[name]) for name in group))
        for name in group:
            choices[name] = sorted(common)
    empty = [name for name, left in choices.items() if not left]
    if empty:
        raise ValueError(f"adq: limits and ties leave no width for layer {empty[0]!r}")
    return choices


@dataclass(frozen=True)
class _Options:
    """What the widths of a layer, or of a tied group, cost and score beyond its least: two arrays ``[widths]``."""

    costs: Any
    scores: Any

    def priced(self, price: float) -> Any:
        """Scores plus what the costs are worth."""
        return self.scores + price * self.costs

    def spent(self, price: float) -> int:
        """Cost of the best option at a price, of several the least."""
        priced = self.priced(price)
        return int(self.costs[priced == priced.min()].min())


def _solve(
    layers: Sequence[LayerCost], choices: dict[str, list[int]], budget: Budget, limit: int, tied: list[list[str]]
) -> dict[str, int]:
    """The assignment of least score within the limit, and of several the cheapest.

    With a price on cost, every group has a best option, and an assignment exceeds the sum of those by some excess. No
    assignment within the limit scores less than ``lower`` plus its excess. So those of small excess are searched, and
    of ever larger, until the best one found scores no more than any left out could, or until there are too many. Costs
    are whole numbers; scores are compared as float64 sums.
    """
    named = {layer.name: layer for layer in layers}
    in_group = {name for group in tied for name in group}
    found, floor = [], 0.0
    for group in (*tied, *([name] for name in named if name not in in_group)):
        widths = choices[group[0]]
        costs = np.array([sum(budget.cost(named[name], b) for name in group) for b in widths], dtype=np.int64)
        scores = np.array([math.fsum(named[name].scores[b] for name in group) for b in widths])
        if not np.isfinite(scores).all():
            raise ValueError("adq: the sensitivity table holds NaN or infinity")
        limit -= int(costs.min())
        floor += float(scores.min())
        found.append((group, _Options(costs - costs.min(), scores - scores.min())))
    found.sort(key=lambda item: float(item[1].scores.max()))  # sums begin with the small ones, which so are not lost
    options = [option for _, option in found]
    price = _price(options, limit)
    lower = math.fsum(float(o.priced(price).min()) for o in options) - price * limit
    gap = price * (limit - sum(o.spent(price) for o in options))  # the best options at the price are an assignment
    rounding = 4 * len(options) * np.finfo(float).eps * (sum(float(o.scores.max()) for o in options) + price * limit)
    excess, complete, best = FIRST_EXCESS * gap, True, (math.inf, [0])
    while complete:
        score, chosen, complete = _search(options, limit, price, excess + rounding)
        best = min(best, (score, chosen))
        gap = min(gap, score - lower)
        if gap <= excess + rounding:
            break
        excess = min(10 * excess, gap)
    score, chosen = best
    if not complete and score - lower > rounding:
        warnings.warn(
            f"adq: too many assignments are nearly as good as the best; the scores of the one found add up to at most "
            f"{score - lower:.2g} more than the least, which is at least {lower + floor:.6g}",
            RuntimeWarning,
            stacklevel=3,
        )
    return {name: choices[name][i] for (group, _), i in zip(found, chosen, strict=True) for name in group}


def _price(options: Sequence[_Options], limit: int) -> float:
    """The least price of cost at which the best options are within the limit: the dual of the relaxed problem."""
    prices = {0.0}
    for o in options:
        dearer, saved = o.costs - o.costs[:, None], o.scores[:, None] - o.scores
        prices.update((saved[dearer > 0] / dearer[dearer > 0]).clip(0.0).tolist())
    ordered = [*sorted(prices), 2 * max(prices)]
    return ordered[bisect_left(ordered, True, key=lambda price: sum(o.spent(price) for o in options) <= limit)]


def _search(options: Sequence[_Options], limit: int, price: float, excess: float) -> tuple[float, list[int], bool]:
    """The least score within the limit of the assignments up to an excess, the option that each group has there, and
    whether all such assignments were searched.

    Group by group, of assignments so far those stay than which no cheaper one scores as little, of too many the best
    of every cost, about.
    """
    costs, scores, least, complete = np.zeros(1, dtype=np.int64), np.zeros(1), 0.0, True
    steps = []
    for o in options:
        least += float(o.priced(price).min())
        count = len(costs)
        costs, scores = (np.add.outer(own, sums).ravel() for own, sums in ((o.costs, costs), (o.scores, scores)))
        kept = np.flatnonzero((costs <= limit) & (scores + price * costs - least <= excess))
        kept = kept[np.lexsort((scores[kept], costs[kept]))]
        best = np.minimum.accumulate(scores[kept])
        kept = kept[np.append(True, best[1:] < best[:-1])]
        if len(kept) > MOST_SUMS:
            kept, complete = kept[_thinned(costs[kept], scores[kept] + price * costs[kept])], False
        costs, scores = costs[kept], scores[kept]
        steps.append((count, kept))
    score, at, chosen = float(scores[-1]), len(scores) - 1, []
    for count, kept in reversed(steps):
        option, at = divmod(int(kept[at]), count)
        chosen.append(option)
    return score, chosen[::-1], complete


def _thinned(costs: Any, priced: Any) -> Any:
    """Indices of the first, and of at most :data:`MOST_SUMS` others: the best priced of each of as many equal parts of
    the range of costs, which ascend. So the sums that are left are as fine where few are as where most are."""
    part = (costs - costs[0]) * (MOST_SUMS / (costs[-1] - costs[0] + 1))
    part = np.append(-1, part[1:].astype(np.int64))
    order = np.lexsort((priced, part))
    return order[np.append(True, np.diff(part[order]) > 0)]


def apply_allocation_(model: nn.Module, allocation: Allocation | Mapping[str, int]) -> nn.Module:
    """Set each layer's weight bits, in place, fitting new codebooks where the width changes.

    Args:
        model: from :func:`adq.quantize_`.
        allocation: an :class:`Allocation` or ``{layer: bits}``; layers not named stay as they are.

    Returns:
        The same model.

    Raises:
        ValueError: an unknown layer or bits outside 1..8; the model is unchanged then.
    """
    set_weight_bits(model, allocation.bits if isinstance(allocation, Allocation) else allocation)
    return model

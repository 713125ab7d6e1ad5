"""What a benchmark is made of: a setting, cases, their contenders and targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

Call = Callable[[], Any]
"""One run of a contender, on data that is ready."""
Build = Callable[[Any], Call]
"""Makes a contender's call from the case's data; an error says why the contender cannot run here."""
Samples = Mapping[str, list[float]]
"""Milliseconds of every round by contender; round i is at place i, slow contenders run in the first few only."""

MIB = 2**20
ADQ = "adq"
COPY = "copy"


class Unavailable(RuntimeError):
    """A contender cannot run here; the message is the reason that the report gives."""


@dataclass(frozen=True)
class Setting:
    """Device and sizes of a run.

    Attributes:
        device: where everything runs.
        nbytes: bytes of the largest input of an operator.
        rounds: most rounds of a case.
        seconds: most that one contender may take in the rounds of one case.
        fit_weights: sizes of the codebook fits, ascending; every peer fits the first, only the fastest the others.
        layer_batch: images a batch in the layer throughputs.
        step_batch: images a batch of the training step.
        compiled: whether ``torch.compile`` takes part.
        tiny: cut layer shapes and networks down: shows that everything runs, measures nothing.
    """

    device: torch.device
    nbytes: int
    rounds: int
    seconds: float
    fit_weights: tuple[int, ...]
    layer_batch: int
    step_batch: int
    compiled: bool = True
    tiny: bool = False

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def elements(self, dtype: torch.dtype) -> int:
        """Elements of an operator's input."""
        return self.nbytes // dtype.itemsize


def full_setting(device: torch.device) -> Setting:
    """The sizes whose figures count."""
    if device.type == "cuda":
        return Setting(device, 256 * MIB, 50, 1.0, (1_000_000, 100_000_000), layer_batch=128, step_batch=256)
    return Setting(device, 64 * MIB, 30, 4.0, (1_000_000, 100_000_000), layer_batch=16, step_batch=128)


def quick_setting(device: torch.device) -> Setting:
    """Small sizes, to see that everything runs; no target is judged by them."""
    return Setting(device, MIB // 4, 3, 0.1, (5_000,), layer_batch=1, step_batch=4, compiled=False, tiny=True)


@dataclass(frozen=True)
class Target:
    """A figure of a case, shown in one contender's row, and the bound asked of it.

    Attributes:
        row: the contender in whose row it stands.
        figure: what it is, with its unit.
        compute: from the samples and extras named in ``needs``.
        needs: contenders and extras without which there is no figure.
        bound: what is asked of it; None shows the figure alone.
        at_least: the figure must not be below the bound; otherwise, not above.
    """

    row: str
    figure: str
    compute: Callable[[Samples], float]
    needs: tuple[str, ...]
    bound: float | None
    at_least: bool = True

    def met(self, value: float) -> bool:
        """Whether a value satisfies the bound."""
        return self.bound is None or (value >= self.bound if self.at_least else value <= self.bound)


FEW_ROUNDS = 5


def ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over the rounds that both ran in of the ratio of their times; of few rounds, the ratio of the medians.

    One round says little. A slow contender has no more, and the other is then known better from all of its own.
    """
    if min(len(numerator), len(denominator)) < FEW_ROUNDS:
        return median(numerator) / median(denominator)
    return median(a / b for a, b in zip(numerator, denominator, strict=False))


def share_of_copy(bound: float | None, row: str = ADQ) -> Target:
    """Time of the copy over the contender's: its share of the copy's bandwidth."""
    return Target(row, "share of copy", lambda samples: ratio(samples[COPY], samples[row]), (COPY, row), bound)


def faster_than(peer: str, bound: float | None) -> Target:
    """How many times longer a peer takes than adq; stands in the peer's row."""
    return Target(peer, "times adq", lambda samples: ratio(samples[peer], samples[ADQ]), (peer, ADQ), bound)


def extra(row: str, figure: str, name: str, bound: float | None, at_least: bool = False) -> Target:
    """A figure other than time, measured by the case's ``extras[name]``."""
    return Target(row, figure, lambda samples: samples[name][0], (row, name), bound, at_least)


def overhead(row: str, base: str, bound: float | None) -> Target:
    """Time of a contender over that of the same work without adq, at most ``bound``."""
    return Target(
        row, f"times {base}", lambda samples: ratio(samples[row], samples[base]), (row, base), bound, at_least=False
    )


def speed_of(base: str, bound: float | None, row: str) -> Target:
    """Time of the same work without adq over a contender's."""
    figure = f"of the speed of {base}"
    return Target(row, figure, lambda samples: ratio(samples[base], samples[row]), (base, row), bound)


@dataclass(frozen=True)
class Case:
    """Contenders that do comparable work on the same data.

    Attributes:
        part: which part of the suite it belongs to.
        name: unique within the suite.
        data: makes what the contenders share.
        contenders: by name; those named ``adq...`` must run, others may be unavailable.
        targets: what is asked of the figures.
        bytes_moved: bytes that adq must read and write in a call, 0 where that says nothing.
        items: images or weights a call works on, 0 where that says nothing.
        item: what they are called.
        calls: times a contender repeats its work in one sample; times are reported for one.
        seconds: most that one contender may take in the rounds, None for the setting's.
        cold: the first run of a contender counts, for work that takes seconds.
        host: the host's time counts on a GPU too, not the device's alone.
        extras: figures other than time, by name, from the data after the timing.
    """

    part: str
    name: str
    data: Callable[[], Any]
    contenders: Mapping[str, Build]
    targets: tuple[Target, ...] = ()
    bytes_moved: int = 0
    items: int = 0
    item: str = ""
    calls: int = 1
    seconds: float | None = None
    cold: bool = False
    host: bool = False
    extras: Mapping[str, Callable[[Any], float]] = field(default_factory=dict)

"""What a run measures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """A contender's figures in a case; times are for one call.

    Attributes:
        ms: median over the rounds; ``low_ms`` and ``high_ms`` are the quartiles.
        gbps: bytes that adq must move over the time, 1e9 bytes a second.
        share: of the copy's bandwidth.
        rate: items a second.
        times_adq: its time over adq's.
        reason: why the contender did not run; then there is no figure.
        failed: it is adq's own, and had to run.
    """

    part: str
    case: str
    contender: str
    ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    rounds: int = 0
    gbps: float | None = None
    share: float | None = None
    times_adq: float | None = None
    rate: float | None = None
    item: str = ""
    reason: str | None = None
    failed: bool = False


@dataclass(frozen=True)
class Figure:
    """The value of a :class:`adq.bench.case.Target`, and whether it meets its bound."""

    part: str
    case: str
    contender: str
    figure: str
    value: float
    bound: float | None
    at_least: bool
    met: bool

    @property
    def missed_by(self) -> float:
        """Distance to the bound as a fraction of it; 0 where it is met."""
        if self.met or not self.bound:
            return 0.0
        return abs(self.value / self.bound - 1.0)


@dataclass
class Results:
    """Everything measured so far, and where."""

    environment: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    checked: str = ""

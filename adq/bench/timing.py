"""Interleaved rounds: in each round every contender runs once, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from adq.bench.case import Call

HEAD_START_CYCLES = 1_000_000
"""GPU clock cycles for which the stream sleeps first, so that a call's launches are queued before they are timed."""
LONGEST_HEAD_START = 64 * HEAD_START_CYCLES
"""For calls that wait for the device themselves: none is long enough."""


class Clock(Protocol):
    """Times calls one after another."""

    def round(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call."""


class HostClock:
    """Wall time, for a CPU."""

    def round(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call, its freed memory included."""
        times = []
        for call in calls:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
        return times


class SynchronisedClock:
    """Wall time until the device has finished: for work that the host takes part in, such as fits and tiny calls."""

    def round(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call."""
        times = []
        for call in calls:
            torch.cuda.synchronize()
            begin = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        return times


class EventClock:
    """Events on the current stream of a GPU, which sleeps while the host queues a call.

    A call whose sleep was over before it was queued is timed again after a sleep of twice the length.
    """

    def __init__(self) -> None:
        self.head_starts: dict[Call, int] = {}

    def round(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call on the device."""
        return [self._time(call) for call in calls]

    def _time(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        while True:
            head_start = self.head_starts.setdefault(call, HEAD_START_CYCLES)
            torch.cuda.synchronize()
            torch.cuda._sleep(head_start)
            begin.record()
            call()
            end.record()
            in_time = not begin.query()
            torch.cuda.synchronize()
            if in_time or head_start >= LONGEST_HEAD_START:
                return begin.elapsed_time(end)
            self.head_starts[call] = 2 * head_start


def race(
    calls: Mapping[str, Call], clock: Clock, rounds: int, seconds: float, cold: bool
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Run the contenders in rounds; milliseconds of each, and what stopped those that failed.

    The first run warms up, unless ``cold``. The next one tells in how many rounds a contender takes part: as many
    as fit into ``seconds``, one at least. The order within a round rotates.
    """
    samples: dict[str, list[float]] = {}
    failed: dict[str, Exception] = {}
    for name, call in calls.items():
        try:
            if not cold:
                clock.round([call])
            samples[name] = clock.round([call])
        except Exception as error:
            failed[name] = error
    names = list(samples)
    allowed = {name: 1e3 * seconds / max(ms, 1e-6) for name, (ms,) in samples.items()}
    for i in range(1, rounds):
        first = i % max(1, len(names))
        turn = [name for name in names[first:] + names[:first] if i < allowed[name]]
        if not turn:
            break
        for name, ms in zip(turn, clock.round([calls[name] for name in turn]), strict=True):
            samples[name].append(ms)
    return samples, failed

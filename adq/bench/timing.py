"""Interleaved rounds: in each round every contender runs once, so that all of them see the same machine."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch

from adq.bench.case import Call

HEAD_START_CYCLES = 1_000_000
"""GPU clock cycles a call for which the stream sleeps first, so that launches are queued before they are timed."""


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
    """Events on the current stream of a GPU, which sleeps while the host queues the round."""

    def round(self, calls: Sequence[Call]) -> list[float]:
        """Milliseconds of each call on the device."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES * len(calls))
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        torch.cuda.synchronize()
        return [before.elapsed_time(after) for before, after in pairwise(events)]


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

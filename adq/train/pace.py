"""How long training waits for its data, and what to do about it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from adq.distributed import gather
from adq.train.data.decoding import DecodeLog

T = TypeVar("T")
SHARE = 0.2
"""A warning is given when data takes more of the step than this."""


class Pace:
    """Times one epoch's batches.

    Args:
        loader: of the epoch; its dataset may have a :class:`DecodeLog`.

    Attributes:
        idle: set it when the device has nothing left to do: only then is waiting for the next batch counted, as else
            the device works on meanwhile.
    """

    def __init__(self, loader: Any) -> None:
        log = getattr(loader.dataset, "log", None)
        self.log = log if isinstance(log, DecodeLog) else None
        self.workers: int = loader.num_workers
        self.idle = False
        self._waits: list[float] = []
        self._batches = 0
        self._began = time.perf_counter()

    def through(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches, timed."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if self.idle:
                self._waits.append(time.perf_counter() - began)
            self.idle = False
            self._batches += 1
            yield batch

    def finish(self, images: int) -> dict[str, float]:
        """Seconds and images/s of the epoch; the share of a step that waits for data, of the process that waits most;
        and images/s that the loaders of all processes decode. Every process calls this.

        Args:
            images: of the epoch, over all processes.
        """
        seconds = max(1e-9, time.perf_counter() - self._began)
        row = {"seconds": seconds, "images_per_second": images / seconds}
        if self._batches:
            row["seconds_per_batch"] = seconds / self._batches
        wait = sum(self._waits) / len(self._waits) if self._waits else 0.0
        decoded = self.log.images_per_second() if self.log is not None else None
        waits, rates = zip(*gather(lambda: (wait, decoded or 0.0)), strict=True)
        if self._waits:
            row["data_share"] = min(1.0, max(waits) / row["seconds_per_batch"])
        if decoded is not None:
            row["decoded_per_second"] = sum(rates)
        return row

    def advice(self, row: dict[str, float]) -> str | None:
        """What to do about a slow loader; None when it keeps up."""
        share = row.get("data_share", 0.0)
        if share <= SHARE:
            return None
        rate = f", decoding {row['decoded_per_second']:,.0f} images/s" if "decoded_per_second" in row else ""
        alone = row["images_per_second"] / max(0.01, 1.0 - share)
        return (
            f"data loading takes {share:.0%} of the step: data.workers={self.workers}{rate}; training alone could take "
            f"{alone:,.0f} images/s; raise data.workers or store smaller images"
        )

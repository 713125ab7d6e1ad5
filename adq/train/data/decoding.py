"""What the workers of a loader tell the process that started them, through shared memory: broken images and speed."""

from __future__ import annotations

import signal
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from adq import _C
from adq.distributed import gather

_SLOTS = 256


def leave_signals_to_parent(worker: int) -> None:
    """``worker_init_fn``: a loader worker ends when its parent says so, not when a signal goes to all processes.

    Ctrl-C, a batch system and ``kill`` of a process group reach the workers too, and a run that has been told to stop
    still needs them until it has saved. A thread of OpenMP may be the one that takes the signal.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _C.end_for_parent_only()


class BrokenImages(ValueError):
    """More images of a set cannot be decoded than is allowed; the message names the last of them.

    A loader raises a worker's exception anew, with its traceback as the message: the cause is the last line.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{__name__}.BrokenImages: "))


class DecodeLog:
    """Which images could not be decoded, and how long the others took.

    Args:
        length: images of the set.
    """

    def __init__(self, length: int) -> None:
        self.broken = torch.zeros(length, dtype=torch.bool).share_memory_()
        self._spent = torch.zeros(_SLOTS, 2, dtype=torch.float64).share_memory_()
        self._before = self._spent.clone()

    def add(self, seconds: float) -> None:
        """One image decoded and transformed by this worker, in so many seconds."""
        worker = get_worker_info()
        slot = self._spent[0 if worker is None else worker.id % _SLOTS]
        slot += torch.tensor([1.0, seconds], dtype=torch.float64)

    def images_per_second(self) -> float | None:
        """What all workers together decoded, each for itself, since the last call; None: nothing."""
        spent = self._spent - self._before
        self._before = self._spent.clone()
        busy = spent[spent[:, 1] > 0]
        return float((busy[:, 0] / busy[:, 1]).sum()) if len(busy) else None


def broken_images(*datasets: Dataset[Any]) -> int:
    """How many images of the sets were found broken so far, by any process; every process calls this."""
    logs = [log for log in (getattr(dataset, "log", None) for dataset in datasets) if isinstance(log, DecodeLog)]
    found = gather(lambda: [log.broken.nonzero().flatten().tolist() for log in logs])
    return sum(len(set().union(*rows)) for rows in zip(*found, strict=True))

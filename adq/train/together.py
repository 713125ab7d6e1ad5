"""What the processes of a run decide together: that something failed on one of them, and when to leave.

Signals and failures reach one process, but all must leave at the same step, or the others wait for it in vain.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from adq.distributed import gather, world


class TrainingStopped(RuntimeError):
    """Training could not go on; the message, the same on every process, says why and where the last checkpoint is."""


class ProcessLost(RuntimeError):
    """Another process of the run does not answer; the message says which process noticed."""


class Preempted(SystemExit):
    """The run was told to stop and has saved what it needs to go on: exit status 0."""

    def __init__(self) -> None:
        super().__init__(0)


class SharedError(OSError):
    """Something failed on a process, and every process raises this."""


def together(action: Callable[[], object] | None) -> None:
    """Do something here (None: nothing) and wait for every process; what fails on one is raised on all.

    Raises:
        SharedError: with the message of the first process on which it failed.
    """
    cause: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as error:
        cause = error
    problems = gather(lambda: None if cause is None else str(cause) or repr(cause))
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise SharedError(first) from cause


def is_loss_of_process(error: Exception) -> bool:
    """Whether an error of a collective operation says that another process is gone or does not answer."""
    return isinstance(error, dist.DistError) or bool(
        re.search(r"gloo|NCCL|Connection (closed|reset)|Broken pipe|Timed out waiting", str(error))
    )


class Departure:
    """When to leave: SIGTERM, SIGINT, or a failure, on any process.

    As a context manager, which may lie within itself, it listens for the signals; outside the main thread, where Python
    cannot, it does not.
    A SIGINT that comes a second or more after another signal interrupts at once.

    With several processes every call of :meth:`agreed` starts a reduction of two flags in a gloo group of its own,
    on CPUs, and takes the result of the call before: a step waits for no other process and for no GPU, and a
    process that is gone is noticed at the next step.

    Args:
        timeout: seconds after which a process that does not answer counts as lost.
    """

    def __init__(self, timeout: float = 600.0) -> None:
        self.signal: str | None = None
        self.failure: str | None = None
        several = world()[1] > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout)) if several else None
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._handlers: list[dict[int, Any]] = []
        self._heard = 0.0

    def __enter__(self) -> Departure:
        listens = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGTERM, signal.SIGINT) if listens else ()
        self._handlers.append({number: signal.signal(number, self._hear) for number in numbers})
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._group is not None and kind in (None, Preempted):
            dist.destroy_process_group(self._group)
        for number, handler in self._handlers.pop().items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is not None and time.monotonic() - self._heard > 1.0:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal, self._heard = signal.Signals(number).name, time.monotonic()

    @property
    def heard(self) -> str:
        """The signal in words."""
        return self.signal or "a signal to another process"

    def fail(self, reason: str) -> None:
        """Note that this process cannot go on; the first reason counts."""
        self.failure = self.failure or reason

    def agreed(self, now: bool = False) -> tuple[bool, str | None]:
        """Whether to leave, and why some process failed (None: none did); the same answer on every process.

        Every process calls this at the same places. With ``now`` what the processes know at this call counts, and
        they wait for each other; else what they knew at the call before.
        """
        if self._group is None:
            return self.signal is not None, self.failure
        flags = torch.tensor([self.signal is not None, self.failure is not None], dtype=torch.int32)
        work: Any = dist.all_reduce(flags, dist.ReduceOp.MAX, self._group, async_op=True)
        started = (work, flags)
        due, self._pending = (started, None) if now else (self._pending, started)
        if due is None:
            return False, None
        due[0].wait()
        leave, failed = due[1].tolist()
        return bool(leave), self._first_failure() if failed else None

    def _first_failure(self) -> str:
        if self._pending is not None:
            self._pending[0].wait()
        reasons: list[str | None] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(reasons, self.failure, self._group)
        rank, reason = next((rank, reason) for rank, reason in enumerate(reasons) if reason is not None)
        return f"{reason} (process {rank})"

"""Runs of ``adq train`` in processes forked from a server that has imported everything: cheap to start and to kill.

A run is described by plain values, so that it can be sent to its process.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from forking import fork_context


@dataclass(frozen=True)
class Fault:
    """What happens to a process, and when.

    ``seconds``, ``steps``, ``fsync``: it kills itself (SIGKILL) after so many seconds, optimizer steps or calls of
    ``os.fsync``. ``hang``: it stops without ending (SIGSTOP) after so many optimizer steps. ``told``: it gets the
    signal ``count`` in the ninth optimizer step. ``nan``: from optimizer step ``count`` on its cross entropy is NaN.
    """

    kind: str
    count: float

    def arm(self) -> None:
        if self.kind == "seconds":
            threading.Timer(self.count, _kill).start()
        elif self.kind == "fsync":
            os.fsync = _counting(self.count, _kill, os.fsync)
        elif self.kind == "steps":
            _after_steps(self.count, _kill)
        elif self.kind == "hang":
            _after_steps(self.count, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif self.kind == "told":
            _after_steps(9, lambda: os.kill(os.getpid(), int(self.count)))
        else:
            _after_steps(self.count, _spoil_losses)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _counting(count, strike, function):
    """``function`` that strikes before its call number ``count``."""
    calls = itertools.count(1)

    def counted(*arguments):
        if next(calls) == count:
            strike()
        return function(*arguments)

    return counted


def _after_steps(count, strike) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(_counting(count, strike, lambda *_: None))


def _spoil_losses() -> None:
    import torch

    right = torch.nn.CrossEntropyLoss.forward
    torch.nn.CrossEntropyLoss.forward = lambda self, logits, target: right(self, logits, target) * float("nan")


@dataclass
class Runner:
    """Starts runs in ``folder``; what they print is in ``NAME.log``."""

    folder: Path
    started: list[multiprocessing.Process] = field(default_factory=list)

    def start(
        self, log: str, *arguments: str, fault: Fault | None = None, limit: int | None = None, **environment: str
    ):
        """A process of ``adq ARGUMENTS``; ``limit`` is the size in bytes that no file may exceed."""
        process = fork_context().Process(
            target=_adq, args=(str(self.folder), f"{log}.log", arguments, fault, limit, environment)
        )
        process.start()
        self.started.append(process)
        return process

    def start_two(self, log: str, *arguments: str, faults=(None, None)):
        """The two processes of one run, as torchrun starts them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        return [
            self.start(
                f"{log}-{rank}", *arguments, fault=faults[rank], RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
            )
            for rank in (0, 1)
        ]  # fmt: skip

    def finish(self, process, seconds: float = 120.0) -> int:
        """Its exit status; negative for a signal."""
        process.join(seconds)
        assert process.exitcode is not None, f"still running after {seconds} s"
        return process.exitcode

    def said(self, log: str) -> str:
        return " ".join((self.folder / f"{log}.log").read_text().split())


def _adq(folder, log, arguments, fault, limit, environment) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if fault is not None:
        fault.arm()
    sys.argv = ["adq", *arguments]
    from adq.__main__ import main

    main()


@contextmanager
def warm_runner(folder: Path) -> Iterator[Runner]:
    """A runner whose server is running."""
    runner = Runner(folder)
    assert runner.finish(runner.start("info", "info")) == 0, runner.said("info")
    try:
        yield runner
    finally:
        for process in runner.started:
            process.kill()

"""A training step in 1, 2 and 4 processes, quantized beside float: what adq adds must not grow with their number."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adq.bench.case import ADQ, Build, Call, Case, Samples, Setting, Target, Unavailable, overhead, ratio
from adq.bench.step import FLOAT, OVERHEAD, random_batch, training_step

PART = "distributed"
BITS = 3
SIZES = (1, 2, 4)
GROWTH = 1.05
"""Most that the ratio to float may be, over that of one process."""
SECONDS = 12.0
PATIENCE = 300.0
"""Seconds that a process may take over a step, and to begin."""


def cases(setting: Setting) -> Iterator[Case]:
    """All processes in one case, so that they share the rounds: gloo on a CPU, a thread each; NCCL, a GPU each."""
    sizes = SIZES[:2] if setting.tiny else SIZES
    contenders: dict[str, Build] = {}
    for size in sizes:
        contenders[_row(FLOAT, size)] = _build(FLOAT, size)
        contenders[_row(ADQ, size)] = _build(ADQ, size)
    targets = [overhead(_row(ADQ, size), _row(FLOAT, size), OVERHEAD[BITS][setting.cuda]) for size in sizes]
    targets += [_growth(size) for size in sizes[1:]]
    name = "resnet18, bf16 autocast, NCCL" if setting.cuda else "resnet20, float32, gloo"
    yield Case(
        PART,
        f"training step under DDP, {name}, batch {_batch(setting)} a process, {BITS} bits",
        lambda: Groups(setting),
        contenders,
        tuple(targets),
        seconds=min(SECONDS, 3 * setting.seconds),
        host=True,
    )


def _batch(setting: Setting) -> int:
    return setting.step_batch if setting.tiny else setting.step_batch // 4


def _row(name: str, size: int) -> str:
    return f"{name}, {size} {'process' if size == 1 else 'processes'}"


def _growth(size: int) -> Target:
    """What adq adds in ``size`` processes over what it adds in one, both as a ratio to float."""
    rows = [_row(name, n) for n in (size, 1) for name in (ADQ, FLOAT)]

    def compute(samples: Samples) -> float:
        many, many_float, one, one_float = (samples[row] for row in rows)
        return ratio(many, many_float) / ratio(one, one_float)

    return Target(rows[0], "times the ratio of one process", compute, tuple(rows), GROWTH, at_least=False)


def _build(name: str, size: int) -> Build:
    def build(groups: Groups) -> Call:
        group = groups.of(size)
        return lambda: group.run(name)

    return build


class Groups:
    """Groups of processes, each started when it is first asked for, and ended with this object."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.groups: dict[int, Group] = {}

    def of(self, size: int) -> Group:
        """The group of ``size`` processes; Unavailable where there are fewer GPUs."""
        if self.setting.cuda and torch.cuda.device_count() < size:
            raise Unavailable(f"{torch.cuda.device_count()} GPU(s)")
        if size not in self.groups:
            self.groups[size] = Group(size, self.setting)
        return self.groups[size]


class Group:
    """Processes that run a step when told to."""

    def __init__(self, size: int, setting: Setting) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", __name__])
        folder = tempfile.TemporaryDirectory()
        pipes = [context.Pipe() for _ in range(size)]
        self.connections = [own for own, _ in pipes]
        processes = [
            context.Process(target=_work, args=(rank, size, folder.name, other, setting), daemon=True)
            for rank, (_, other) in enumerate(pipes)
        ]
        for process in processes:
            process.start()
        self.end = weakref.finalize(self, _end, processes, folder)
        for _, other in pipes:
            other.close()
        self._wait()

    def run(self, name: str) -> None:
        """One step of the network ``name`` in every process."""
        for connection in self.connections:
            connection.send(name)
        self._wait()

    def _wait(self) -> None:
        for rank, connection in enumerate(self.connections):
            if not connection.poll(PATIENCE):
                raise TimeoutError(f"process {rank} did not answer in {PATIENCE:g} seconds")
            try:
                connection.recv()
            except EOFError:
                raise RuntimeError(f"process {rank} has ended; what it wrote says why") from None


def _end(processes: list[Any], folder: tempfile.TemporaryDirectory[str]) -> None:
    for process in processes:
        process.kill()
        process.join()
    folder.cleanup()


def _work(rank: int, size: int, folder: str, connection: Connection, setting: Setting) -> None:
    """A process of a group: both networks, and a step of one whenever its name comes."""
    warnings.simplefilter("ignore")
    if setting.cuda:
        torch.cuda.set_device(rank)
    else:
        torch.set_num_threads(1)
    backend = "nccl" if setting.cuda else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    batch = random_batch(setting, _batch(setting))
    steps = {name: training_step(setting, bits, batch, _parallel) for name, bits in ((FLOAT, None), (ADQ, BITS))}
    connection.send(None)
    while True:
        steps[connection.recv()]()
        if setting.cuda:
            torch.cuda.synchronize()
        connection.send(None)


def _parallel(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, broadcast_buffers=False)

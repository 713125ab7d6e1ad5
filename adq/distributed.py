"""What the processes of a job share: a part of the data each, and results that are the same on all of them.

Each process works on its share of the batches, every N-th, and gives what it found batch by batch. The findings are
gathered, put in the order of the batches, and added up in that order on every process: so N processes come to the same
result as one, bit for bit, whatever N is. Without a process group of torch.distributed, a process has everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.data import DataLoader, IterableDataset

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Rank of this process and number of processes: ``(0, 1)`` without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(compute: Callable[[], T]) -> list[T]:
    """``compute()`` of every process, in the order of their ranks, on every process; all of them must call it.

    Args:
        compute: returns anything that pickles, tensors on the CPU.

    Raises:
        Exception: what ``compute`` raised.
        RuntimeError: it failed on another process, which is named.
    """
    size = world()[1]
    if size == 1:
        return [compute()]
    own, error = None, None
    try:
        own = compute()
    except Exception as caught:  # the others wait for this process, and are told
        error = caught
    answers: list[Any] = [None] * size
    dist.all_gather_object(answers, (own, None if error is None else f"{type(error).__name__}: {error}"))
    if error is not None:
        raise error
    for rank, (_, message) in enumerate(answers):
        if message is not None:
            raise RuntimeError(f"adq: process {rank} failed: {message}")
    return [value for value, _ in answers]


def in_order(shares: list[list[T]]) -> list[T]:
    """The items of all processes as one list: item i of process r is item i N + r, as :func:`share` deals them."""
    longest = max(len(own) for own in shares)
    return [own[i] for i in range(longest) for own in shares if i < len(own)]


def pool(compute: Callable[[], list[T]]) -> list[T]:
    """What every process found batch by batch, in the order of the batches: see :func:`gather`."""
    return in_order(gather(compute))


def from_main(compute: Callable[[], T]) -> T:
    """``compute()`` of the process of rank 0, on every process; the others do not call it."""
    rank = world()[0]
    first = gather(lambda: compute() if rank == 0 else None)[0]
    return first  # type: ignore[return-value]


class EveryNth(Iterable[T]):
    """This process's share of something that all processes go through in the same order."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = items
        self.rank, self.size = world()

    def __iter__(self) -> Iterator[T]:
        return islice(self.items, self.rank, None, self.size)

    def __len__(self) -> int:
        return share_of(len(self.items))  # type: ignore[arg-type]


def share_of(count: int) -> int:
    """How many of the first ``count`` items are in this process's share."""
    rank, size = world()
    return -((rank - count) // size) if count > rank else 0


def share(loader: DataLoader[T]) -> DataLoader[T]:
    """A loader of this process's share of the batches of ``loader``; only those are read and decoded.

    Every process must have the same loader in the same order, not one that deals out shares already, as Accelerate's
    and those with a ``DistributedSampler`` do. The shares differ by a batch at most, and no sample is repeated. The
    batches of an iterable dataset are all read, as nobody else knows where they are.
    """
    if world()[1] == 1:
        return loader
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        return EveryNth(loader)  # type: ignore[return-value]
    return DataLoader(
        loader.dataset,
        batch_sampler=EveryNth(loader.batch_sampler),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def average_batch_norm_(model: nn.Module) -> nn.Module:
    """Replace each running mean and variance by its mean over the processes; every process must call it.

    In training each process's batch norms see its own images, and nothing else makes them agree when buffers are not
    broadcast. Before evaluation and before a checkpoint they should. One reduction for all of them.
    """
    size = world()[1]
    norms = [module for module in model.modules() if isinstance(module, BatchNorm) and module.running_mean is not None]
    if size == 1 or not norms:
        return model
    buffers: list[Any] = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
    mean = torch.cat(buffers).div_(size)
    dist.all_reduce(mean)
    torch._foreach_copy_(buffers, mean.split([len(buffer) for buffer in buffers]))
    return model

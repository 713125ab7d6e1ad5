"""A server that has imported what runs need, and from which processes are forked: they start in no time."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

IMPORTED = (
    "torch._dynamo", "torch.distributed.fsdp", "torch.nn.parallel", "adq", "accelerate",
    "adq.train.run", "adq.train.cli", "sklearn.datasets", "torchvision", "matplotlib.pyplot",
)  # fmt: skip


def fork_context() -> ForkServerContext:
    """Starts processes of one thread each, without Triton's interpreter, whatever the tests use."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with _elsewhere(OMP_NUM_THREADS="1", TRITON_INTERPRET="0"):
        forkserver.ensure_running()
    return context


@contextmanager
def _elsewhere(**environment: str) -> Iterator[None]:
    """Outside of the checkout, whose ./adq has no compiled kernels, and with another environment, for a while."""
    folder, before = os.getcwd(), {name: os.environ.get(name) for name in environment}
    os.chdir(tempfile.gettempdir())
    os.environ.update(environment)
    try:
        yield
    finally:
        os.chdir(folder)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

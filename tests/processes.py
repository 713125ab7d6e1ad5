"""Run a function in several processes that form a process group (gloo, on this machine)."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forking import fork_context

_SHOWN = 4000
"""Characters of a process's output that a failure shows."""


def run(function: Callable[..., Any], size: int, *arguments: Any, seconds: float = 240.0) -> list[Any]:
    """What ``function(*arguments)`` returns in each of ``size`` processes, by rank.

    Args:
        function: of a file's top level; the processes load the file.
        size: number of processes.
        arguments: anything that pickles; results are tensors and plain containers of them.
        seconds: after so many the processes are killed.

    Raises:
        AssertionError: a process failed or took too long; with what each of them wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, path, context = Path(name), function.__code__.co_filename, fork_context()
        processes = [
            context.Process(target=_main, args=(folder, rank, size, path, function.__name__, arguments))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes, seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()
        if any(process.exitcode for process in processes):
            raise AssertionError(_failure(function, folder, [process.exitcode for process in processes]))
        return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _wait(processes: list[Any], seconds: float) -> None:
    """Until all have ended, one has failed, or time is up."""
    deadline = time.monotonic() + seconds
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode for process in processes):
            time.sleep(1.0)  # the others may say more
            return
        time.sleep(0.01)


def _failure(function: Callable[..., Any], folder: Path, codes: list[int | None]) -> str:
    texts = [f"{function.__name__} failed; exit codes by rank: {codes} (-9: killed here)"]
    for rank in range(len(codes)):
        output = folder / f"{rank}.txt"
        texts.append(f"--- rank {rank}\n{output.read_text()[-_SHOWN:] if output.exists() else 'did not start'}")
    return "\n".join(texts)


def _environment(rank: int, size: int) -> dict[str, str]:
    """What torchrun tells its processes."""
    ranks = {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{size}", "LOCAL_WORLD_SIZE": f"{size}"}
    return {**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _main(folder: Path, rank: int, size: int, path: str, name: str, arguments: tuple[Any, ...]) -> None:
    with (folder / f"{rank}.txt").open("w", buffering=1) as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        try:
            os.environ.update(_environment(rank, size))
            function = getattr(_load(path), name)
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
            torch.save(function(*arguments), folder / f"{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=output)
            output.flush()
            os._exit(1)
        sys.stdout.flush()

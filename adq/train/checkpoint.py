"""Checkpoints of a run: Accelerate's state plus where in the run it was taken, each a sealed folder.

A checkpoint is written aside, its manifest last, brought to the disk and renamed into place: killed at any moment,
a run leaves whole checkpoints only. What happens to the bytes afterwards is found when they are read.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adq.distributed import from_main, world
from adq.store import check_seal, publish_directory, read_seal, seal_directory
from adq.train.together import SharedError, together

MEAN = "mean.safetensors"
Sums = tuple[float, int, int]
"""Loss, correct answers and samples."""


@dataclass(frozen=True)
class Layout:
    """How the images of an optimizer step are spread: ``processes``, images a micro-batch over all of them
    (``batch_size``), and micro-batches a step (``accumulation``)."""

    processes: int
    batch_size: int
    accumulation: int

    def __str__(self) -> str:
        return f"{self.processes} process(es), {self.batch_size} images a batch, {self.accumulation} batch(es) a step"


@dataclass(frozen=True)
class Progress:
    """A point in a run: ``batch`` micro-batches of epoch ``epoch`` (from 0) of a phase are done.

    ``sums`` are the epoch's loss, correct answers and samples so far, of each process; ``top1`` is the test accuracy
    in percent, where it has just been measured.
    """

    phase: str
    epoch: int
    batch: int
    layout: Layout
    sums: tuple[Sums, ...] = ()
    top1: float | None = None
    metrics_size: int = 0
    path: Path | None = None

    def in_layout(self, layout: Layout) -> Progress:
        """About the same point in another layout: the same images, down to a whole step."""
        if layout == self.layout:
            return self
        step = layout.batch_size * layout.accumulation
        steps = self.batch * self.layout.batch_size // step
        sums = (self.total, *[(0.0, 0, 0)] * (layout.processes - 1))
        return replace(self, batch=steps * layout.accumulation, layout=layout, sums=sums)

    @property
    def total(self) -> Sums:
        """``sums`` over all processes."""
        return (
            math.fsum(loss for loss, _, _ in self.sums),
            sum(correct for _, correct, _ in self.sums),
            sum(samples for _, _, samples in self.sums),
        )


class Checkpoints:
    """The checkpoints of a run folder: the last few, and of the newest phase the one of the best test top-1.

    Args:
        folder: holds one folder a checkpoint.
        keep: how many of the last to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Progress]:
        """The checkpoints whose manifest is whole, oldest first."""
        found = []
        for path in self._paths():
            try:
                found.append(_progress(path))
            except ValueError:  # `recover` names it
                continue
        return found

    def latest(self) -> Progress | None:
        """The newest checkpoint; its files are not read."""
        found = self.all()
        return found[-1] if found else None

    def best(self) -> Progress | None:
        """The checkpoint of the best test top-1 in the newest phase, the newest of equals."""
        found = self.all()
        measured = [item for item in found if item.phase == found[-1].phase and item.top1 is not None]
        return max(reversed(measured), key=lambda item: item.top1 or 0.0, default=None)

    def kept(self) -> str:
        """In words, what a run that stops leaves to go on from."""
        latest = self.latest()
        return f"the last good checkpoint is {latest.path}" if latest else "no checkpoint had been written yet"

    def recover(self, say: Callable[[str], None]) -> Progress | None:
        """The newest checkpoint that is whole, every byte of it read; every process calls this, and gets the same.

        Damaged ones are named and set aside as ``NAME.damaged``.

        Raises:
            SharedError: there are checkpoints, and all are damaged.
        """
        return from_main(lambda: self._newest_whole(say))

    def _newest_whole(self, say: Callable[[str], None]) -> Progress | None:
        damaged = []
        for path in reversed(self._paths()):
            try:
                check_seal(path)
                return _progress(path)
            except ValueError as error:
                damaged.append(f"{path.name}.damaged")
                say(f"checkpoint {path} is damaged: {error}; it is set aside as {damaged[-1]}, an older one is used")
                path.rename(path.with_name(damaged[-1]))
        if damaged:
            raise SharedError(f"no checkpoint in {self.folder} can be used, all are damaged: {', '.join(damaged)}")
        return None

    def save(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        progress: Progress,
        metrics_size: int,
        mean: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a checkpoint aside, rename it into place, then drop old ones. Every process calls this.

        ``mean`` is a state of :class:`adq.train.averaging.WeightMean`, the same on every process.

        Raises:
            SharedError: it could not be written, on every process with the same message; those written
                before are untouched.
        """
        temporary = self.folder / ".writing"
        main = accelerator.is_main_process

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if mean is not None:
                save_file(dict(mean), temporary / MEAN)

        def write() -> None:
            accelerator.save_state(str(temporary), safe_serialization=True)
            if progress.layout.processes > 1:
                save_file(_running_statistics(model), temporary / _own_statistics())

        def finish() -> None:
            about = asdict(replace(progress, metrics_size=metrics_size))
            del about["path"]
            seal_directory(temporary, about)
            publish_directory(temporary, self.folder / self._name(progress))
            self._drop_old()

        try:
            together(begin if main else None)
            together(write)
            together(finish if main else None)
        except SharedError as error:
            cause = _why_not(self.folder) or str(error)
            shutil.rmtree(temporary, ignore_errors=True)
            raise SharedError(f"cannot write a checkpoint in {self.folder}: {cause}") from error

    def _name(self, progress: Progress) -> str:
        number = max((int(path.name.split("-")[0]) for path in self.folder.glob("[0-9]*-*")), default=0) + 1
        return f"{number:06d}-{progress.phase}-{progress.epoch:04d}-{progress.batch:06d}"

    def _paths(self) -> list[Path]:
        named = [path for path in self.folder.glob("*") if re.fullmatch(r"\d{6,}-[a-z]+-\d{4,}-\d{6,}", path.name)]
        return sorted(named, key=lambda path: int(path.name.split("-")[0]))

    def _drop_old(self) -> None:
        best, trash = self.best(), self.folder / ".dropped"
        for old in self.all()[: -self.keep]:
            if old.path is not None and (best is None or old.path != best.path):
                shutil.rmtree(trash, ignore_errors=True)
                os.rename(old.path, trash)  # at once: what has a checkpoint's name is whole
                shutil.rmtree(trash, ignore_errors=True)

    def mean(self, progress: Progress) -> dict[str, Tensor]:
        """The mean of the weights that was saved with a checkpoint."""
        assert progress.path is not None  # it was found in the folder
        return load_file(progress.path / MEAN)

    def restore(self, accelerator: Accelerator, model: nn.Module, progress: Progress, layout: Layout) -> None:
        """Bring model, optimizer, schedule, scaler and random states back to a checkpoint.

        In the layout that it was written in every process also gets its own batch-norm statistics, which differ inside
        an epoch; in another they all get those of the first process.

        Raises:
            ValueError: the checkpoint is of another model; it is named.
        """
        try:
            accelerator.load_state(str(progress.path))
            if progress.path is not None and layout == progress.layout and layout.processes > 1:
                model.load_state_dict(load_file(progress.path / _own_statistics()), strict=False)
        except Exception as error:
            raise ValueError(f"adq: cannot resume from {progress.path}: {error}") from error


def _why_not(folder: Path) -> str | None:
    """Why nothing can be written in a folder, tried with a file of 1 MiB: torch and safetensors seldom say it."""
    probe = folder / f".probe-{world()[0]}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(2**20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror
    finally:
        if probe.is_file():
            probe.unlink()
    return None


def _running_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(("running_mean", "running_var"))}


def _own_statistics() -> str:
    """Name of the file of this process's batch-norm statistics."""
    return f"batch_norm_{world()[0]}.safetensors"


def _progress(path: Path) -> Progress:
    values = read_seal(path)
    sums = tuple((loss, correct, samples) for loss, correct, samples in values.pop("sums"))
    return Progress(**{**values, "sums": sums, "layout": Layout(**values["layout"]), "path": path})

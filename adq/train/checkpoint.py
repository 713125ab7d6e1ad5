"""Checkpoints of a run: Accelerate's state plus where in the run it was taken, each a sealed folder.

A checkpoint is written aside, its manifest last, brought to the disk and renamed into place: killed at any moment,
a run leaves whole checkpoints only. What happens to the bytes afterwards is found when they are read.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from adq.store import check_seal, publish_directory, read_seal, seal_directory


class CheckpointError(OSError):
    """A checkpoint could not be written, on some process; the message says why."""


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

    ``sums`` are the epoch's loss, correct answers and samples so far, over all processes; ``top1`` is the test
    accuracy in percent, where it has just been measured.
    """

    phase: str
    epoch: int
    batch: int
    layout: Layout
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    top1: float | None = None
    metrics_size: int = 0
    path: Path | None = None

    def in_layout(self, layout: Layout) -> Progress:
        """About the same point in another layout: the same images, down to a whole step."""
        if layout == self.layout:
            return self
        step = layout.batch_size * layout.accumulation
        steps = self.batch * self.layout.batch_size // step
        return replace(self, batch=steps * layout.accumulation, layout=layout)


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

    def recover(self, accelerator: Accelerator, say: Callable[[str], None]) -> Progress | None:
        """The newest checkpoint that is whole, every byte of it read; every process calls this, and gets the same.

        Damaged ones are named and set aside as ``NAME.damaged``.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        found: list[Progress | None] = [None]

        def search() -> None:
            found[0] = self._newest_whole(say)

        together(accelerator, search if accelerator.is_main_process else None)
        broadcast_object_list(found)
        return found[0]

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
            raise CheckpointError(f"no checkpoint in {self.folder} can be used, all are damaged: {', '.join(damaged)}")
        return None

    def save(self, accelerator: Accelerator, progress: Progress, metrics_size: int) -> None:
        """Write a checkpoint aside, rename it into place, then drop old ones. Every process calls this.

        Raises:
            CheckpointError: it could not be written, on every process with the same message; those written
                before are untouched.
        """
        temporary = self.folder / ".writing"
        main = accelerator.is_main_process

        def begin() -> None:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

        def finish() -> None:
            about = asdict(replace(progress, metrics_size=metrics_size))
            del about["path"]
            seal_directory(temporary, about)
            publish_directory(temporary, self.folder / self._name(progress))
            self._drop_old()

        try:
            together(accelerator, begin if main else None)
            together(accelerator, lambda: accelerator.save_state(str(temporary), safe_serialization=True))
            together(accelerator, finish if main else None)
        except CheckpointError as error:
            free = shutil.disk_usage(_existing(self.folder)).free
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"cannot write a checkpoint in {self.folder} ({free:,} bytes are free there): {error}"
            ) from error

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

    def restore(self, accelerator: Accelerator, progress: Progress) -> None:
        """Bring model, optimizer, schedule, scaler and random states back to a checkpoint.

        Raises:
            ValueError: the checkpoint is of another model; it is named.
        """
        try:
            accelerator.load_state(str(progress.path))
        except Exception as error:
            raise ValueError(f"adq: cannot resume from {progress.path}: {error}") from error


def together(accelerator: Accelerator, action: Callable[[], object] | None) -> None:
    """Do something here (None: nothing) and wait for every process; what fails on one is raised on all."""
    cause: Exception | None = None
    try:
        if action is not None:
            action()
    except Exception as error:
        cause = error
    problems: list[str | None] = gather_object([None if cause is None else str(cause)])
    first = next((problem for problem in problems if problem is not None), None)
    if first is not None:
        raise CheckpointError(first) from cause


def _progress(path: Path) -> Progress:
    values = read_seal(path)
    values.update(sums=tuple(values["sums"]), layout=Layout(**values["layout"]), path=path)
    return Progress(**values)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())

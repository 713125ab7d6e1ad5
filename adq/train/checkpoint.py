"""Checkpoints of a run: Accelerate's state plus where in the run it was taken, each a folder renamed into place."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from accelerate import Accelerator

from adq.store import publish_directory, write_text

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """A point in a run: ``batch`` micro-batches of epoch ``epoch`` (from 0) of a phase are done.

    ``sums`` are the epoch's loss, correct answers and samples so far, over all processes.
    """

    phase: str
    epoch: int
    batch: int
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    metrics_size: int = 0
    path: Path | None = None


class Checkpoints:
    """The checkpoints of a run folder, the last few kept.

    Args:
        folder: holds one folder a checkpoint.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Progress]:
        """Complete checkpoints, oldest first."""
        found = []
        for path in self.folder.glob("*"):
            number = re.fullmatch(r"(\d+)-.*", path.name)
            if number and (path / PROGRESS).is_file():
                values = json.loads((path / PROGRESS).read_text(encoding="utf-8"))
                values["sums"] = tuple(values["sums"])
                found.append((int(number[1]), Progress(**values, path=path)))
        return [progress for _, progress in sorted(found, key=lambda item: item[0])]

    def latest(self, phase: str | None = None) -> Progress | None:
        """The newest checkpoint, of a phase where given."""
        found = [progress for progress in self.all() if phase in (None, progress.phase)]
        return found[-1] if found else None

    def save(self, accelerator: Accelerator, progress: Progress, metrics_size: int) -> None:
        """Write a checkpoint aside, rename it into place, then drop the oldest. Every process calls this."""
        name = f"{self._next_number():06d}-{progress.phase}-{progress.epoch:04d}-{progress.batch:06d}"
        temporary = self.folder / f".{name}.tmp"
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary), safe_serialization=True)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            values = asdict(replace(progress, metrics_size=metrics_size))
            del values["path"]
            write_text(temporary / PROGRESS, json.dumps(values))
            publish_directory(temporary, self.folder / name)
            for old in self.all()[: -self.keep]:
                if old.path is not None:
                    shutil.rmtree(old.path, ignore_errors=True)
        accelerator.wait_for_everyone()

    def _next_number(self) -> int:
        numbers = [int(path.name.split("-")[0]) for path in self.folder.glob("[0-9]*-*")]
        return max(numbers, default=0) + 1

    def restore(self, accelerator: Accelerator, progress: Progress) -> None:
        """Bring model, optimizer, schedule, scaler and random states back to a checkpoint.

        Raises:
            ValueError: the checkpoint is of another model or damaged; it is named.
        """
        try:
            accelerator.load_state(str(progress.path))
        except Exception as error:
            raise ValueError(f"adq: cannot resume from {progress.path}: {error}") from error

    def clear(self) -> None:
        """Remove every checkpoint: the run is complete."""
        shutil.rmtree(self.folder, ignore_errors=True)

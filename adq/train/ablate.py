"""``adq ablate``: every row of an ablation file, each with every seed, as whole runs that processes share."""

from __future__ import annotations

import gc
import os
import re
import shutil
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from adq.models import create_model
from adq.store import locked, write_text
from adq.train.ablation_config import Ablation, Row, check_changes, check_seeds, read_ablation
from adq.train.ablation_report import (
    ERROR,
    changed_settings,
    collect,
    found_seeds,
    read_saved,
    run_folder,
    write_report,
)
from adq.train.config import RunConfig, resolve
from adq.train.display import Display
from adq.train.run import Run, RunFolder, check_files, check_layers
from adq.train.together import Departure, Preempted

POLL_SECONDS = 2.0
FEW_CLASSES, MANY_CLASSES = 2, 1000


@dataclass(frozen=True)
class Job:
    """A row with a seed: one run."""

    row: Row
    seed: int
    config: RunConfig
    folder: RunFolder
    lock: Path

    @property
    def label(self) -> str:
        return f"{self.row.name}, seed {self.seed}"

    @property
    def error(self) -> Path:
        return self.folder.path / ERROR

    @property
    def finished(self) -> bool:
        return self.folder.result.exists()

    @property
    def failed_at(self) -> int | None:
        """When it last failed, nanoseconds; None if it did not."""
        return self.error.stat().st_mtime_ns if self.error.exists() else None


class JobDisplay(Display):
    """Lines that begin with the job's name, and one line for the result."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def say(self, text: str) -> None:
        """One line of text."""
        super().say(f"[{self.label}] {text}")

    def result(self, result: dict[str, Any]) -> None:
        """The result in a line."""
        self.say(
            f"top-1 {result['quantized_top1']:.2f}, float {result['float_top1']:.2f}, "
            f"{result['average_bits_quantized']:.3f} bits over the quantized layers"
        )


def ablate(
    file: str,
    output: Path,
    changes: Sequence[Mapping[str, Any]] = (),
    seeds: tuple[int, ...] | None = None,
    only: str | None = None,
    display: Display | None = None,
) -> int:
    """Run what is not finished of an ablation; returns how many of the chosen runs failed.

    Args:
        file: the ablation, YAML.
        output: folder of the runs, the table and the figures.
        changes: to the base of every row, over those of the file and under those of the row.
        seeds: None for those of the file.
        only: rows whose name holds this text or, if there are none, matches it as a regular expression.
        display: where progress is shown.

    Raises:
        ValueError, FileNotFoundError: before anything runs: a row that cannot be run, or a folder that holds a
            run of another configuration; both are named.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("adq: ablate runs each row in one process; start it several times to share the rows")
    ablation = read_ablation(file)
    for change in changes:
        check_changes(change, "a change of all rows")
    chosen = seeds or ablation.seeds
    check_seeds(chosen)
    every_seed = list(dict.fromkeys([*chosen, *found_seeds(output, ablation)]))
    jobs = plan(ablation, choose(ablation.rows, only), output, changes, every_seed)
    jobs = [job for job in jobs if job.seed in chosen]
    collect(output, ablation)  # rows that are not chosen, too, are those of the file
    check_jobs(jobs)
    run_jobs(jobs, ablation, output, display or Display())
    return sum(not job.finished for job in jobs)


def report_only(file: str, output: Path) -> None:
    """Write the table and the figures of an ablation from what has been run; ValueError if nothing has."""
    ablation = read_ablation(file)
    if not found_seeds(output, ablation):
        raise ValueError(f"adq: {output / 'runs'} holds no run of {file}")
    report(ablation, output)


def parse_seeds(text: str) -> tuple[int, ...]:
    """``"0,1,2"`` as numbers."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"adq: --seeds takes whole numbers, comma-separated, got {text!r}") from error


def choose(rows: Sequence[Row], only: str | None) -> Sequence[Row]:
    """The rows that ``--only`` means; ValueError if it means none."""
    if only is None:
        return rows
    found = [row for row in rows if only in row.name]
    if not found:
        try:
            found = [row for row in rows if re.search(only, row.name)]
        except re.error as error:
            raise ValueError(f"adq: --only {only!r} is in no row's name, and no regular expression: {error}") from error
    if not found:
        raise ValueError(f"adq: --only {only!r} fits no row; rows: {', '.join(row.name for row in rows)}")
    return found


# ---- before anything runs ----------------------------------------------------------------------------


def plan(
    ablation: Ablation, rows: Sequence[Row], output: Path, changes: Sequence[Mapping[str, Any]], seeds: Sequence[int]
) -> list[Job]:
    """The jobs of these rows, all of a seed before the next seed; none has been run with another configuration.

    Raises:
        ValueError: as :func:`ablate`.
    """
    jobs = [_job(ablation, row, seed, output, changes) for seed in seeds for row in rows]
    for job in jobs:
        if job.folder.config.exists():
            _check_saved(job)
    return jobs


def check_jobs(jobs: Sequence[Job]) -> None:
    """Raise ValueError, which names the row, for files that are not there and networks that cannot be made or quantized
    as they shall be. What is finished needs neither."""
    for job in {job.row.name: job for job in jobs if not job.finished}.values():  # seeds do not differ in this
        with _naming(job.row):
            check_files(job.config)
            _check_network(job.config)


def _check_network(config: RunConfig) -> None:
    """Raise what is wrong however many classes there are: only the images tell, and average bits depend on it."""

    def check(classes: int) -> None:
        check_layers(create_model(config.model.name, classes, **config.model.kwargs), config)

    try:
        check(FEW_CLASSES)
    except ValueError as error:
        try:
            check(MANY_CLASSES)
        except ValueError:
            raise error from None


def _job(ablation: Ablation, row: Row, seed: int, output: Path, changes: Sequence[Mapping[str, Any]]) -> Job:
    folder = run_folder(output, row, seed)
    with _naming(row):
        config = resolve(ablation.base, [ablation.set, *changes, row.set, {"seed": seed, "output": str(folder.path)}])
    return Job(row, seed, config, folder, output / "locks" / f"{folder.path.name}.lock")


@contextmanager
def _naming(row: Row) -> Iterator[None]:
    """Whatever is wrong inside is said to be wrong with this row."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        raise ValueError(f"adq: row {row.name!r}: {str(error).removeprefix('adq: ')}") from error


def _check_saved(job: Job) -> None:
    try:
        changed = changed_settings(job.row, read_saved(job.folder), job.config)
    except ValueError as error:
        raise ValueError(f"adq: row {job.row.name!r}: {job.folder.config} cannot be read: {error}") from error
    if changed:
        raise ValueError(
            f"adq: row {job.row.name!r}: {job.folder.path} holds a run with another {', '.join(changed)}; "
            "give the same options, choose rows by --only, remove the folder or choose another --output"
        )


# ---- running -----------------------------------------------------------------------------------------


def run_jobs(jobs: Sequence[Job], ablation: Ablation, output: Path, display: Display) -> None:
    """Run what no other process runs or has run; comes back for the rest until nothing is left.

    A job that failed is run again, unless it was another process that saw it fail since this one began.

    Raises:
        Preempted: a signal told the process to stop, in a row or between two; what is finished is in the table.
    """
    with Departure() as departure:
        _run_all(jobs, ablation, output, display, departure)
        report(ablation, output)


def _run_all(jobs: Sequence[Job], ablation: Ablation, output: Path, display: Display, departure: Departure) -> None:
    failed_before = {job.label: job.failed_at for job in jobs}
    owners: dict[str, str] = {}
    pending = list(jobs)
    while pending:
        held = []
        for job in pending:
            with locked(job.lock) as owner:
                if owner is not None:
                    held.append(job)
                    if owners.get(job.label) != owner:
                        display.say(f"[{job.label}] is run by {owner}")
                    owners[job.label] = owner
                elif not job.finished and job.failed_at in (None, failed_before[job.label]):
                    display.say(f"[{job.label}] begins; {sum(job.finished for job in jobs)} of {len(jobs)} are done")
                    run_job(job, departure)
                    report(ablation, output)
                elif job.finished:
                    prune(job.folder)
            _leave_if_told(departure, display)
        if len(held) == len(pending):
            time.sleep(POLL_SECONDS)
        pending = held


def _leave_if_told(departure: Departure, display: Display) -> None:
    """Between two rows."""
    if departure.signal is not None:
        display.say(f"stopped by {departure.heard}; go on with the same command")
        raise Preempted


def run_job(job: Job, departure: Departure) -> None:
    """One run, resumed where it stands, then pruned; what goes wrong is written to the run folder, not raised.

    Raises:
        Preempted: a signal told the process to stop, and the run has saved.
    """
    display = JobDisplay(job.label)
    job.error.unlink(missing_ok=True)
    departure.failure = None  # that of another row
    _forget_last_run(job.config.engine.compile)
    try:
        Run(job.config, resume=True, display=display, departure=departure).execute()
        prune(job.folder)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {str(error).removeprefix('adq: ')}".split())
        write_text(job.error, f"{reason}\n\n{traceback.format_exc()}")
        display.say(f"failed: {reason}")


def _forget_last_run(compiled: bool) -> None:
    """A run finds the process as a first one would: without Accelerate's shared state and compiled graphs."""
    GradientState._reset_state()
    AcceleratorState._reset_state(reset_partial_state=True)
    if compiled:
        torch.compiler.reset()
    gc.collect()


def prune(folder: RunFolder) -> None:
    """Remove the plain weights, checkpoints and figures of a finished run; its numbers and its packed model stay."""
    for path in (folder.checkpoints, folder.figures):
        shutil.rmtree(path, ignore_errors=True)
    for path in (folder.float_weights, folder.model):
        path.unlink(missing_ok=True)


def report(ablation: Ablation, output: Path) -> None:
    """Write the table and the figures, one process at a time."""
    with locked(output / "locks" / "report.lock", wait=True):
        write_report(output, ablation)

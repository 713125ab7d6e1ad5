"""Runs the suite: correctness first, then the cases part by part, each result written as it comes."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from adq.bench import comparisons, distributed, fit, integer, layers, linear, network, operators, small, step
from adq.bench.case import ADQ, COPY, Call, Case, Setting, Target, Unavailable, full_setting, quick_setting, ratio
from adq.bench.check import checks
from adq.bench.environment import environment, slug
from adq.bench.report import FILES, case_lines, summary_line, write, write_json
from adq.bench.results import Figure, Results, Row
from adq.bench.timing import Clock, EventClock, HostClock, SynchronisedClock, race
from adq.store import check_writable

PARTS: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "operators": operators.cases,
    "peers": comparisons.cases,
    "small": small.cases,
    "fit": fit.cases,
    "network": network.cases,
    "layers": layers.cases,
    "integer": integer.cases,
    "linear": linear.cases,
    "step": step.cases,
    "distributed": distributed.cases,
}
CHECK = "check"
GPU_SECONDS = {
    CHECK: 80,
    "operators": 50,
    "peers": 130,
    "small": 20,
    "fit": 50,
    "network": 20,
    "layers": 80,
    "integer": 0,
    "linear": 20,
    "step": 120,
    "distributed": 25,
}
"""Time of each part on a GPU, under 10 minutes in all; what one leaves, the next one may use."""
TOO_LATE = "the time for this part is spent"


class CheckError(RuntimeError):
    """The device computes something else than the reference; the message names the case."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Other packages' warnings and log lines would tear the progress report apart."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def clock_of(case: Case, setting: Setting) -> Clock:
    """What times a case."""
    if not setting.cuda:
        return HostClock()
    return SynchronisedClock() if case.host else EventClock()


def start(case: Case, data: Any, deadline: float | None = None) -> tuple[dict[str, Call], list[Row]]:
    """The calls of the contenders that can run, tried once each, and a row with the reason for each other one.

    After ``deadline`` (of ``time.monotonic``) no further contender is started.
    """
    calls: dict[str, Call] = {}
    absent: list[Row] = []
    for name, build in case.contenders.items():
        try:
            if deadline is not None and calls and time.monotonic() > deadline:
                raise Unavailable(TOO_LATE)
            call = build(data)
            if not case.cold:
                call()
            calls[name] = call
        except Exception as error:
            absent.append(_absent(case, name, error))
    return calls, absent


def _absent(case: Case, name: str, error: Exception) -> Row:
    """The row of a contender that an error kept from running; for one of adq's own it is a failure of the run."""
    if isinstance(error, Unavailable):
        return Row(case.part, case.name, name, reason=str(error))
    first_line = (str(error).strip().splitlines() or [""])[0]
    reason = f"{type(error).__name__}: {first_line[:160]}"
    return Row(case.part, case.name, name, reason=reason, failed=name.startswith(ADQ))


def measure(case: Case, setting: Setting, deadline: float | None = None) -> tuple[list[Row], list[Figure]]:
    """Time a case: a row for each contender, and the figures that its targets ask for."""
    if setting.compiled:
        torch.compiler.reset()
    with _quiet():
        data = case.data()
        calls, absent = start(case, data, deadline)
        seconds = setting.seconds if case.seconds is None else case.seconds
        times, failed = race(calls, clock_of(case, setting), setting.rounds, seconds, case.cold)
        absent += [_absent(case, name, error) for name, error in failed.items()]
        samples = {name: [ms / case.calls for ms in own] for name, own in times.items()}
        extras = _extras(case, data)
    rows = [_row(case, name, samples) for name in samples] + absent
    figures = [_figure(case, target, setting, {**samples, **extras}) for target in case.targets]
    del data, calls
    if not setting.tiny:
        gc.collect()
    if setting.cuda:
        torch.cuda.empty_cache()
    return rows, [figure for figure in figures if figure is not None]


def _extras(case: Case, data: Any) -> dict[str, list[float]]:
    """Figures other than time, without those of contenders that did not run."""
    values = {}
    for name, compute in case.extras.items():
        with contextlib.suppress(Unavailable):
            values[name] = [compute(data)]
    return values


def _row(case: Case, name: str, samples: dict[str, list[float]]) -> Row:
    times = samples[name]
    ms = median(times)
    low, _, high = quantiles(times, n=4) if len(times) > 1 else (ms, ms, ms)
    return Row(
        case.part,
        case.name,
        name,
        ms,
        low,
        high,
        len(times),
        gbps=case.bytes_moved / ms / 1e6 if case.bytes_moved else None,
        share=ratio(samples[COPY], times) if COPY in samples and name != COPY else None,
        times_adq=ratio(times, samples[ADQ]) if ADQ in samples and name not in (ADQ, COPY) else None,
        rate=1e3 * case.items / ms if case.items else None,
        item=case.item,
    )


def _figure(case: Case, target: Target, setting: Setting, samples: dict[str, list[float]]) -> Figure | None:
    if any(name not in samples for name in target.needs):
        return None
    if setting.tiny:
        target = replace(target, bound=None)
    value = target.compute(samples)
    return Figure(
        case.part, case.name, target.row, target.figure, value, target.bound, target.at_least, target.met(value)
    )


def run_checks(setting: Setting, echo: Callable[[str], None], deadline: float | None = None) -> str:
    """Compare every operator with the reference; how many comparisons agree, in words.

    The first comparison that fails raises CheckError; after ``deadline`` (of ``time.monotonic``) the rest is left out.
    """
    every = list(checks(setting))
    done = 0
    for check in every:
        if deadline is not None and time.monotonic() > deadline:
            break
        try:
            check.run()
        except Exception as error:
            raise CheckError(f"check failed: {check.name}: {error}") from error
        done += 1
    outcome = f"{done} of {len(every)} comparisons with the reference made, all agree"
    if done < len(every):
        outcome = (
            f"{done} of {len(every)} comparisons with the reference made in the time for them, these agree; the others "
            f"were NOT made, from {every[done].name!r} on: run --only {CHECK} again, with the kernels compiled"
        )
    echo(outcome)
    return outcome


def run(setting: Setting, parts: Sequence[str], output: Path, echo: Callable[[str], None]) -> Results:
    """Run parts of the suite and write the results into ``output``, case by case.

    Args:
        parts: of :data:`PARTS` and ``"check"``; the check runs first.
        output: folder of bench.json, bench.csv, table.txt and the figures.
        echo: shows a line of progress.

    Raises:
        OSError: before anything is measured: a file of the results cannot be written.
    """
    check_writable(*(output / name for name in FILES))
    results = Results(environment(setting.device))
    begin = time.monotonic()
    spent = 0.0
    if CHECK in parts:
        spent += GPU_SECONDS[CHECK]
        results.checked = run_checks(setting, echo, begin + spent if setting.cuda else None)
    for name in FILES:  # what an earlier run left there would be taken for this one's
        (output / name).unlink(missing_ok=True)
    try:
        for part in [name for name in PARTS if name in parts]:
            spent += GPU_SECONDS[part]
            deadline = begin + spent if setting.cuda else None
            for case in PARTS[part](setting):
                _run_case(case, setting, deadline, results, echo)
                write_json(results, setting, output)
    finally:
        write(results, setting, output)
    return results


def _run_case(
    case: Case, setting: Setting, deadline: float | None, results: Results, echo: Callable[[str], None]
) -> None:
    if deadline is not None and time.monotonic() > deadline:
        rows = [Row(case.part, case.name, name, reason=TOO_LATE) for name in case.contenders]
        figures: list[Figure] = []
    else:
        rows, figures = measure(case, setting, deadline)
    results.rows += rows
    results.figures += figures
    for line in case_lines(case.name, rows, figures):
        echo(line)


def main(device: str | None, only: str | None, output: Path | None, quick: bool, echo: Callable[[str], None]) -> None:
    """The command ``adq bench``: see its options.

    Raises ValueError for an unknown part or device, and, at the end, RuntimeError where adq itself failed.
    """
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    parts = only.split(",") if only else [CHECK, *PARTS]
    unknown = [part for part in parts if part not in (CHECK, *PARTS)]
    if unknown:
        raise ValueError(f"--only: no part {', '.join(unknown)}; parts: {', '.join((CHECK, *PARTS))}")
    folder = output or Path("runs", f"bench-{slug(chosen)}")
    setting = quick_setting(chosen) if quick else full_setting(chosen)
    results = run(setting, parts, folder, echo)
    failed = [f"{row.case}, {row.contender}: {row.reason}" for row in results.rows if row.failed]
    echo(f"\n{summary_line(results)}\n{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
    if failed:
        raise RuntimeError(f"{len(failed)} of adq's own did not run: {'; '.join(failed)}")

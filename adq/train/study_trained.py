"""What training leaves of the differences between allocations: runs of one recipe and one budget beside a study."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from adq.allocate import Allocation
from adq.store import write_text
from adq.train.ablation_report import ACCUMULATION, precision_of, read_saved
from adq.train.config import RunConfig, differences
from adq.train.run import RunFolder
from adq.train.study import STUDY, TABLE, markdown, rank, scores_to_sum
from adq.train.study_figures import draw_trained

STAGES = {"calibrated": "calibrated_top1", "trained": "quantized_top1"}
"""When a run's accuracy was measured, and its name in ``result.json``."""
BUDGET_WITHIN = 0.05
"""Bits by which averages may differ: an allocation seldom meets its budget exactly."""
FLOAT_WITHIN = 0.05
"""Percent by which top-1 of one float network may differ: machines sum in different orders."""


def add_trained(folder: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """Add runs that were trained with different bits to the study in ``folder``, in place of those added before.

    Args:
        folder: of a study; ``study.json`` and ``study.md`` are written anew, and ``trained.png``.
        runs: finished run folders of the study's network and data, alike in all but seed, bits and precision.

    Returns:
        The study with ``trained``: ``points`` (a dictionary an allocation: ``runs`` by name, ``bits``,
        ``average_bits``, ``falls`` of top-1 below the float network in each of :data:`STAGES`, means over the runs,
        ``sums`` of its layers' scores by estimator), ``spearman``, the rank correlation of sums and falls by stage and
        estimator, ``stages``, that of the falls of both stages, and the ``precisions`` of training.

    Raises:
        FileNotFoundError: no study there, or a run that has not finished.
        ValueError: a run that is given twice; runs of another network or data set, with other widths, alike in bits all
            of them, of different budgets, or trained differently.
    """
    result = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    result["trained"] = compare(result, [RunFolder(path) for path in runs])
    write_text(folder / STUDY, json.dumps(result, indent=1) + "\n")
    write_text(folder / TABLE, markdown(result))
    draw_trained(folder / "trained.png", result["trained"])
    return result


def compare(result: Mapping[str, Any], runs: Sequence[RunFolder]) -> dict[str, Any]:
    """``trained`` of :func:`add_trained`; ``result`` as ``study.json`` holds it."""
    scores: Mapping[str, Any] = scores_to_sum(result["truth"], result["estimators"])
    points: dict[tuple[int, ...], dict[str, Any]] = {}
    trained = [_Trained.read(run) for run in runs]
    names = _names([run.path for run in runs])
    for run, name in zip(trained, names, strict=True):
        bits = _bits(run, result)
        if other := _differences(trained[0], run):
            raise ValueError(f"adq: {run.path} was trained with another {', '.join(other)} than {trained[0].path}")
        found = run.result
        point = points.setdefault(
            tuple(bits.values()),
            {
                "runs": [],
                "bits": bits,
                "average_bits": found["average_bits_quantized"],
                "falls": {stage: [] for stage in STAGES},
                "sums": {name: sum(by[n][str(bits[n])] for n in bits) for name, by in scores.items()},
            },
        )
        point["runs"].append(name)
        for stage, key in STAGES.items():
            point["falls"][stage].append(found["float_top1"] - found[key])
    averages = [point["average_bits"] for point in points.values()]
    if len(points) < 3 or max(averages) - min(averages) > BUDGET_WITHIN:
        raise ValueError(
            f"adq: to compare allocations takes three of one budget, got {len(points)} with "
            f"{', '.join(f'{bits:.2f}' for bits in averages) or 'no'} bits on average"
        )
    for point in points.values():
        point["falls"] = {stage: fmean(falls) for stage, falls in point["falls"].items()}
    chosen = list(points.values())
    falls = {stage: [point["falls"][stage] for point in chosen] for stage in STAGES}
    sums = {name: [point["sums"][name] for point in chosen] for name in scores}
    return {
        "points": sorted(chosen, key=lambda point: point["falls"]["trained"]),
        "spearman": {stage: {name: rank(spearmanr, sums[name], falls[stage]) for name in scores} for stage in STAGES},
        "stages": rank(spearmanr, falls["calibrated"], falls["trained"]),
        "precisions": sorted({run.precision for run in trained}),
    }


@dataclass(frozen=True)
class _Trained:
    """A finished run: its folder, its ``result.json``, what it was told, and its precision."""

    path: Path
    bits: Mapping[str, int]
    result: Mapping[str, Any]
    config: RunConfig
    precision: str

    @classmethod
    def read(cls, run: RunFolder) -> _Trained:
        if not run.result.exists():
            raise FileNotFoundError(f"adq: {run.path} holds no finished run: there is no {run.result.name}")
        result, config = json.loads(run.result.read_text(encoding="utf-8")), read_saved(run)
        return cls(run.path, Allocation.load(run.allocation).bits, result, config, precision_of(run, config))


def _names(paths: Sequence[Path]) -> list[str]:
    """What runs are called: by their folder or, where two of these have one name, by its path below what all share.

    Raises:
        ValueError: a folder is given twice.
    """
    places = [path.resolve() for path in paths]
    if twice := [str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1]:
        raise ValueError(f"adq: a run counts once, and {' and '.join(twice)} are one folder")
    names = [place.name for place in places]
    if len(set(names)) == len(names):
        return names
    shared = os.path.commonpath(places)
    return [place.relative_to(shared).as_posix() for place in places]


def _bits(run: _Trained, study: Mapping[str, Any]) -> dict[str, int]:
    """Widths that a run has in the layers that the study has scores of, on its network and data."""
    wrong = [
        f"layer {name!r} of {run.bits.get(name)} bits"
        for name in study["layers"]
        if run.bits.get(name) not in study["widths"]
    ]
    if run.result["model"] != study["model"]:
        wrong = ["another network"]
    elif run.result["data"] != study["data"]:
        wrong = [f"the data {run.result['data']!r}, not {study['data']!r}"]
    elif _other_weights(study.get("weights"), run.config.model.weights):
        wrong = [f"float weights {run.config.model.weights}, not {study['weights']}"]
    if wrong:
        raise ValueError(f"adq: the study has no scores for {run.path}: {wrong[0]}")
    return {name: run.bits[name] for name in study["layers"]}


def _other_weights(of_study: str | None, of_run: str | None) -> bool:
    """Whether both are known, and differ; older studies do not say, and a run may have trained them itself."""
    first, second = ({"model": {"weights": file}} for file in (of_study, of_run))
    return None not in (of_study, of_run) and bool(differences(first, second))


def _differences(first: _Trained, second: _Trained) -> list[str]:
    """In what two runs differ that are compared by their bits alone."""
    other = [key for key in differences(first.config, second.config) if not _may_differ(key)]
    if first.config.engine.accumulation != second.config.engine.accumulation:
        other.append(ACCUMULATION)
    if abs(first.result["float_top1"] - second.result["float_top1"]) > FLOAT_WITHIN:
        other.append("float network")
    return other


def _may_differ(key: str) -> bool:
    return key in ("seed", "data.seed", "quantization.weight.bits") or key.startswith(("allocation.", "study."))

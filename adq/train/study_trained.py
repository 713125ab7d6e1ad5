"""What training leaves of the differences between allocations: runs of one recipe and one budget beside a study."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from scipy.stats import spearmanr

from adq.allocate import Allocation
from adq.store import write_text
from adq.train.ablation_report import read_saved
from adq.train.config import RunConfig, differences
from adq.train.run import RunFolder
from adq.train.study import STUDY, markdown, rank, scores_to_sum
from adq.train.study_figures import draw_trained

STAGES = {"calibrated": "calibrated_top1", "trained": "quantized_top1"}
"""When a run's accuracy was measured, and its name in ``result.json``."""
BUDGET_WITHIN = 0.05
"""Bits by which averages may differ: an allocation seldom meets its budget exactly."""


def add_trained(folder: Path, runs: Sequence[Path]) -> dict[str, Any]:
    """Add runs that were trained with different bits to the study in ``folder``, in place of those added before.

    Args:
        folder: of a study; ``study.json`` and ``study.md`` are written anew, and ``trained.png``.
        runs: finished run folders of the study's network, alike in all but seed and bits.

    Returns:
        The study with ``trained``: ``points`` (a dictionary an allocation: ``runs`` by name, ``bits``,
        ``average_bits``, ``falls`` of top-1 below the float network in each of :data:`STAGES`, means over the runs,
        ``sums`` of its layers' scores by estimator), ``spearman``, the rank correlation of sums and falls by stage and
        estimator, and ``stages``, that of the falls of both stages.

    Raises:
        FileNotFoundError: no study there, or a run that has not finished.
        ValueError: runs of another network, with other widths, alike in bits all of them, of different budgets, or
            trained differently.
    """
    result = json.loads((folder / STUDY).read_text(encoding="utf-8"))
    result["trained"] = compare(result, [RunFolder(path) for path in runs])
    write_text(folder / STUDY, json.dumps(result, indent=1) + "\n")
    write_text(folder / "study.md", markdown(result))
    draw_trained(folder / "trained.png", result["trained"])
    return result


def compare(result: Mapping[str, Any], runs: Sequence[RunFolder]) -> dict[str, Any]:
    """``trained`` of :func:`add_trained`; ``result`` as ``study.json`` holds it."""
    scores: Mapping[str, Any] = scores_to_sum(result["truth"], result["estimators"])
    points: dict[tuple[int, ...], dict[str, Any]] = {}
    recipe: RunConfig | None = None
    for run in runs:
        if not run.result.exists():
            raise FileNotFoundError(f"adq: {run.path} holds no finished run: there is no {run.result.name}")
        found, config = json.loads(run.result.read_text(encoding="utf-8")), read_saved(run)
        bits = _bits(run, found["model"], result)
        if recipe is not None and (other := [key for key in differences(recipe, config) if not _may_differ(key)]):
            raise ValueError(f"adq: {run.path} was trained with another {', '.join(other)} than {runs[0].path}")
        recipe = recipe or config
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
        point["runs"].append(run.path.name)
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
    }


def _bits(run: RunFolder, model: str, result: Mapping[str, Any]) -> dict[str, int]:
    """Widths that a run of ``model`` has in the layers that the study has scores of."""
    bits = Allocation.load(run.allocation).bits
    wrong = [name for name in result["layers"] if bits.get(name) not in result["widths"]]
    if wrong or model != result["model"]:
        what = f"layer {wrong[0]!r} of {bits.get(wrong[0])} bits" if wrong else "another network"
        raise ValueError(f"adq: the study has no scores for {run.path}: {what}")
    return {name: bits[name] for name in result["layers"]}


def _may_differ(key: str) -> bool:
    return key in ("seed", "data.seed", "quantization.weight.bits") or key.startswith(("allocation.", "study."))

"""``adq sensitivity --study``: how far the scores of each estimator can be trusted, and what they cost."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from accelerate import Accelerator
from scipy.stats import kendalltau, pearsonr, spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from adq.allocate import Allocation, Budget, allocate, apply_allocation_
from adq.batch_norm import correct_batch_norm_, float_statistics
from adq.calibrate import calibrate_
from adq.convert import evaluating, quantize_, quantizers_enabled, weight_quantizers
from adq.distill import DistillationLoss
from adq.sensitivity import Estimator, SensitivityTable, reordered, sensitivity
from adq.store import check_writable, write_or_show, write_text
from adq.train.config import RunConfig
from adq.train.data import Data, build_data
from adq.train.engine import build_accelerator, build_optimizer
from adq.train.run import check_layers, float_network
from adq.train.study_figures import draw_allocations, draw_heatmaps, draw_scatter

STUDY, TABLE = "study.json", "study.md"
TRUTH = "truth"
TARGETS = ("loss", "accuracy", "kl")
HELD_OUT_BATCH = 64

Batches = list[tuple[Tensor, Tensor]]
Scores = Mapping[str, Mapping[int, float]]


def study(config: RunConfig, folder: Path, show: Callable[[str], object] = print) -> dict[str, Any]:
    """Measure every estimator against held-out images; writes ``study.json``, ``study.md`` and figures.

    Args:
        config: as of ``adq sensitivity``; ``study`` says how much, ``allocation`` the widths, batches and budget.
        folder: to write to.
        show: gets ``study.json`` if it cannot be written after all.

    Returns:
        What ``study.json`` holds: ``float``, ``truth``, ``estimators``, ``epoch``, ``additivity``.

    Raises:
        OSError: before anything is measured: the folder cannot be written.
        ValueError: no float weights, an allocation instead of a budget, a budget that no allocation meets, no layer
            whose width is free, too few training images for disjoint draws.
    """
    subject = Subject.build(config)
    check_writable(folder / STUDY, folder / TABLE)
    with subject.quantized({}):
        base = subject.measure()
    truth = subject.truth(base)
    epoch = time_epoch(subject)
    estimators = {name: subject.estimator(name, truth, epoch["seconds"]) for name in get_args(Estimator)}
    result = {
        "model": config.model.name,
        "weights": config.model.weights,
        "data": subject.data.name,
        "images": len(base.loss),
        "widths": list(config.allocation.bits),
        "budget": config.allocation.weight_bits,
        "draws": {"repeats": len(subject.draws), "images": sum(len(y) for _, y in subject.draws[0])},
        "layers": {layer.name: layer.weights for layer in subject.table.layers if not layer.pinned},
        "float": {"loss": float(base.loss.mean()), "top1": 100.0 * float(base.correct.mean())},
        "truth": truth,
        "estimators": estimators,
        "epoch": epoch,
        "additivity": subject.additivity(base, truth, estimators),
    }
    write_or_show(folder / STUDY, json.dumps(result, indent=1) + "\n", show)
    write_text(folder / TABLE, markdown(result))
    draw_heatmaps(folder / "heatmaps.png", result)
    draw_scatter(folder / "scatter.png", result)
    draw_allocations(folder / "allocations.png", result)
    return result


@dataclass(frozen=True)
class Measured:
    """Of every held-out image: loss [N], whether it is right [N], log-probabilities [N, C]; float64."""

    loss: np.ndarray
    correct: np.ndarray
    log_p: np.ndarray

    def rise(self, base: Measured) -> dict[str, float]:
        """Mean rise of the loss with its standard error and that of each half of the images; fall of top-1; KL."""
        rise = self.loss - base.loss
        return {
            "loss": float(rise.mean()),
            "error": float(rise.std(ddof=1) / math.sqrt(len(rise))),
            "even": float(rise[::2].mean()),
            "odd": float(rise[1::2].mean()),
            "accuracy": 100.0 * float((base.correct - self.correct).mean()),
            "kl": float((np.exp(base.log_p) * (base.log_p - self.log_p)).sum(1).mean()),
        }


@dataclass(frozen=True)
class Subject:
    """The network that is studied, quantized and calibrated, in evaluation mode.

    Attributes:
        config: everything the study is told.
        data: where the images come from.
        accelerator: the device and the autocast of training.
        teacher: what training learns from: the float network, or the one that the configuration names.
        model: the quantized one.
        held_out: batches of test images.
        draws: disjoint lists of calibration batches.
        table: names, sizes and pinned layers (its scores are not used).
    """

    config: RunConfig
    data: Data
    accelerator: Accelerator
    teacher: nn.Module
    model: nn.Module
    held_out: Batches
    draws: list[Batches]
    table: SensitivityTable

    @classmethod
    def build(cls, config: RunConfig) -> Subject:
        """Load, quantize and calibrate."""
        if config.model.weights is None:
            raise ValueError("adq: the study needs trained float weights: --weights FILE")
        if config.start is not None:
            raise ValueError("adq: the study is of float networks; it takes no start")
        if config.allocation.weight_bits is None or config.allocation.file is not None:
            raise ValueError(
                "adq: the study compares allocations; give it a budget, allocation.weight_bits, and no allocation.file"
            )
        accelerator, channels_last = build_accelerator(config.engine), config.engine.channels_last
        images = config.allocation.batches * (config.data.eval_batch_size or config.data.batch_size)
        wanted = replace(config.data, calibration_images=config.study.repeats * images)
        data = build_data(wanted)
        model = float_network(config.model, data, channels_last)
        check_layers(model, config)
        other = config.distillation.teacher
        teacher = copy.deepcopy(model) if other is None else float_network(other, data, channels_last)
        teacher.to(accelerator.device).eval().requires_grad_(False)
        model.to(accelerator.device).eval()
        quantize_(model, config.quantization)
        draws = _draws(data, config, accelerator.device)
        calibrate_(model, draws[0], batch_norm=False)
        table = sensitivity(model, draws[0][:1], nn.functional.cross_entropy, config.allocation.bits, "fisher")
        if all(layer.pinned for layer in table.layers):
            raise ValueError("adq: the study compares widths of layers, and the configuration gives each layer its own")
        held_out = _held_out(data, config, accelerator.device)
        return cls(config, data, accelerator, teacher, model, held_out, draws, table)

    @torch.no_grad()
    def measure(self) -> Measured:
        """The held-out images through the network as it is at the moment."""
        parts = [(self.model(images).double().log_softmax(1), target) for images, target in self.held_out]
        log_p, target = torch.cat([p for p, _ in parts]), torch.cat([y for _, y in parts])
        loss = nn.functional.nll_loss(log_p, target, reduction="none")
        return Measured(loss.cpu().numpy(), (log_p.argmax(1) == target).double().cpu().numpy(), log_p.cpu().numpy())

    @contextmanager
    def quantized(self, bits: Mapping[str, int]) -> Iterator[None]:
        """The named layers' weights quantized to these widths, everything else in float."""
        apply_allocation_(self.model, bits)
        quantizers = {name: quantizer for name, (_, quantizer) in weight_quantizers(self.model).items()}
        with evaluating(self.model), quantizers_enabled(self.model, weights=False, activations=False):
            for name in bits:
                quantizers[name].enabled = True
            yield

    def truth(self, base: Measured) -> dict[str, dict[int, dict[str, float]]]:
        """By layer and width: what quantizing it alone does to the held-out images."""
        found: dict[str, dict[int, dict[str, float]]] = {}
        for name in (layer.name for layer in self.table.layers if not layer.pinned):
            found[name] = {}
            for bits in self.config.allocation.bits:
                with self.quantized({name: bits}):
                    found[name][bits] = self.measure().rise(base)
        return found

    def estimator(self, name: Estimator, truth: Mapping[str, Any], epoch_seconds: float) -> dict[str, Any]:
        """Scores of each draw, with their cost, their agreement with the truth and with one another."""
        tables, seconds = [], []
        for batches in self.draws:
            began = time.perf_counter()
            bits = self.config.allocation.bits
            tables.append(sensitivity(self.model, batches, nn.functional.cross_entropy, bits, name))
            seconds.append(time.perf_counter() - began)
        allocations = [self._allocate(table) for table in tables]
        scores = [_free_scores(table) for table in tables]
        return {
            "seconds": seconds,
            "percent_of_epoch": 100.0 * statistics.median(seconds) / epoch_seconds,
            "scores": scores,
            "correlations": [{target: correlations(s, of_target(truth, target)) for target in TARGETS} for s in scores],
            "allocations": [allocation.bits for allocation in allocations],
            "stability": stability(scores, [allocation.bits for allocation in allocations]),
        }

    def _allocate(self, table: SensitivityTable) -> Allocation:
        return allocate(table, Budget(weight_bits=self.config.allocation.weight_bits))

    def _with_scores(self, scores: Scores) -> SensitivityTable:
        layers = tuple(
            layer if layer.pinned else replace(layer, scores=dict(scores[layer.name])) for layer in self.table.layers
        )
        return replace(self.table, layers=layers)

    def additivity(self, base: Measured, truth: Mapping[str, Any], estimators: Mapping[str, Any]) -> dict[str, Any]:
        """Whole allocations: the loss with all layers quantized at once, beside the sums of the layers' scores.

        Allocations of the same bits count once in the rank correlations.
        """
        scores = scores_to_sum(truth, estimators)
        tables = {name: self._with_scores(values) for name, values in scores.items()}
        chosen = {name: self._allocate(table) for name, table in tables.items()}
        chosen |= {f"{name}, reversed": self._allocate(reordered(table, "reversed")) for name, table in tables.items()}
        for i in range(self.config.study.random):
            chosen[f"random {i + 1}"] = self._allocate(reordered(tables[TRUTH], "random", self.config.seed + i))
        points: list[dict[str, Any]] = []
        for label, allocation in chosen.items():
            with self.quantized(allocation.bits):
                correct_batch_norm_(self.model, itertools.chain(*self.draws))
                corrected = self.measure().rise(base)
                with float_statistics(self.model):
                    rise = self.measure().rise(base)
            sums = {name: sum(values[n][allocation.bits[n]] for n in values) for name, values in scores.items()}
            points.append({"name": label, "bits": allocation.bits, "rise": rise, "corrected": corrected, "sums": sums})
        distinct = list({tuple(point["bits"].items()): point for point in points}.values())
        return {
            "points": points,
            "distinct": len(distinct),
            "spearman": {
                kind: {
                    name: rank(spearmanr, [p["sums"][name] for p in distinct], [p[kind]["loss"] for p in distinct])
                    for name in scores
                }
                for kind in ("rise", "corrected")
            },
        }


def _draws(data: Data, config: RunConfig, device: torch.device) -> list[Batches]:
    """``study.repeats`` disjoint lists of ``allocation.batches`` batches of training images."""
    batches = [(images.to(device), target.to(device)) for images, target in data.calibration]
    size, repeats = config.allocation.batches, config.study.repeats
    wanted = size * repeats * (config.data.eval_batch_size or config.data.batch_size)
    if sum(len(target) for _, target in batches) < wanted:
        raise ValueError(
            f"adq: {repeats} disjoint draws of {size} batches need {wanted} training images, there are "
            f"{sum(len(target) for _, target in batches)}; lower study.repeats or allocation.batches"
        )
    return [batches[i * size : (i + 1) * size] for i in range(repeats)]


def _held_out(data: Data, config: RunConfig, device: torch.device) -> Batches:
    """A seeded subset of the test images, in small batches; all of them if there are fewer."""
    count = len(data.test.dataset)  # type: ignore[arg-type]
    chosen = np.random.default_rng(config.seed).permutation(count)[: config.study.images].tolist()
    loader = DataLoader(Subset(data.test.dataset, chosen), HELD_OUT_BATCH, collate_fn=data.test.collate_fn)
    return [(images.to(device), target.to(device)) for images, target in loader]


def _free_scores(table: SensitivityTable) -> dict[str, dict[int, float]]:
    return {layer.name: layer.scores for layer in table.layers if not layer.pinned}


def of_target(truth: Mapping[str, Any], target: str) -> dict[str, dict[int, float]]:
    """One of the measured quantities, by layer and width."""
    return {name: {bits: rise[target] for bits, rise in widths.items()} for name, widths in truth.items()}


def scores_to_sum(truth: Mapping[str, Any], estimators: Mapping[str, Any]) -> dict[str, Scores]:
    """What the score of a whole allocation is a sum of: the measured rises of the loss, each estimator's first draw."""
    return {TRUTH: of_target(truth, "loss"), **{name: found["scores"][0] for name, found in estimators.items()}}


def time_epoch(subject: Subject) -> dict[str, float]:
    """Seconds of one epoch of QAT: the median step, as training does it, times the steps."""
    config, accelerator = subject.config, subject.accelerator
    model = copy.deepcopy(subject.model).train()
    distill = config.distillation
    loss = DistillationLoss(subject.teacher, distill.alpha, distill.temperature)
    inner = build_optimizer(model, config.qat)
    model, optimizer, train = accelerator.prepare(model, inner, subject.data.train)
    seconds: list[float] = []
    for images, target in itertools.islice(itertools.chain.from_iterable(itertools.repeat(train)), config.study.steps):
        began = time.perf_counter()
        logits = model(images)
        with accelerator.autocast():  # the teacher's pass belongs to the loss
            value = loss(logits, images, target)
        accelerator.backward(value)
        optimizer.step()
        optimizer.zero_grad()
        value.item()
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds)
    return {"step_seconds": step, "steps": len(train), "seconds": step * len(train)}


# ---- agreement ---------------------------------------------------------------------------------------


def rank(measure: Any, a: Sequence[float], b: Sequence[float]) -> float | None:
    """A correlation of scipy.stats; None where there is none: fewer than three pairs, or all alike."""
    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(measure(a, b)[0])


def correlations(scores: Scores, truth: Scores) -> dict[str, dict[str, float | None]]:
    """Agreement over all (layer, width) pairs, ``"all"``, and over the layers at each width, ``"2"``...

    ``spearman`` and ``kendall`` are of ranks, ``log_pearson`` is of the logarithms of the pairs that are positive.
    """
    widths = list(next(iter(scores.values())))
    groups = {"all": widths} | {str(bits): [bits] for bits in widths}
    found = {}
    for group, members in groups.items():
        a = [scores[name][bits] for name in scores for bits in members]
        b = [truth[name][bits] for name in scores for bits in members]
        logs = [(math.log(x), math.log(y)) for x, y in zip(a, b, strict=True) if x > 0 and y > 0]
        found[group] = {
            "spearman": rank(spearmanr, a, b),
            "kendall": rank(kendalltau, a, b),
            "log_pearson": rank(pearsonr, [x for x, _ in logs], [y for _, y in logs]),
        }
    return found


def stability(scores: Sequence[Scores], bits: Sequence[Mapping[str, int]]) -> dict[str, float | None]:
    """Mean over the pairs of repeats: Spearman correlation of the scores, and layers that get other bits."""
    pairs = list(itertools.combinations(range(len(scores)), 2))
    ranks = [correlations(scores[i], scores[j])["all"]["spearman"] for i, j in pairs]
    changed = [sum(bits[i][name] != bits[j][name] for name in bits[i]) for i, j in pairs]
    return {"spearman": _mean(ranks), "changed_layers": _mean(changed)}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


# ---- the table ---------------------------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a page with tables."""
    images, draws = result["images"], result["draws"]
    parts = [
        f"# Sensitivity of {result['model']} on {result['data']}",
        f"Float network: loss {result['float']['loss']:.4f}, top-1 {result['float']['top1']:.2f} on {images} held-out "
        f"images. Scores: {draws['repeats']} disjoint draws of {draws['images']} training images. "
        f"Budget: {result['budget']} bits. One epoch of training: {result['epoch']['steps']} steps of "
        f"{result['epoch']['step_seconds']:.3f} s, {result['epoch']['seconds']:.0f} s.",
        "## Rank correlation (Spearman) with what quantizing a layer alone does to the held-out images",
        _correlation_table(result),
        "`halves` is the rise of the loss on one half of the held-out images against the other half: how far the truth "
        "agrees with itself. The divergence of the outputs on held-out images (KL at T = 1) is far less noisy, but "
        "of the same kind as the estimator `kl`.",
        "## All (layer, width) pairs: other measures, cost, stability",
        _cost_table(result),
        "## Whole allocations of the same budget: all layers quantized at once, without training",
        _allocation_table(result),
        "`corrected`: with the batch-norm statistics corrected for quantization over the training images of all draws; "
        "training, too, follows at once what quantization does to them.",
        _additivity_table(result),
    ]
    if "trained" in result:
        parts += [
            "## Runs of one recipe and one budget that were trained with different bits",
            _trained_table(result["trained"]),
            "Falls of top-1 below the float network, means over the runs with the same bits. The rank correlation of "
            f"the falls before and after training is {_text(result['trained']['stages'])}."
            + _precisions(result["trained"].get("precisions", [])),
            _ranks_table(
                result["trained"]["spearman"],
                {"calibrated": "with the fall before training", "trained": "with the fall after it"},
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _text(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _over_draws(estimator: Mapping[str, Any], target: str, group: str, measure: str) -> float | None:
    return _mean([draw[target][group][measure] for draw in estimator["correlations"]])


def _correlation_table(result: Mapping[str, Any]) -> str:
    groups = ["all", *map(str, result["widths"])]
    kinds = {"loss": "loss", "accuracy": "top-1", "kl": "KL"}
    header = ["estimator", *(f"{kinds[t]}, {g if g == 'all' else g + ' bits'}" for t in TARGETS for g in groups)]
    rows = [
        [f"`{name}`", *(_text(_over_draws(estimator, t, g, "spearman")) for t in TARGETS for g in groups)]
        for name, estimator in result["estimators"].items()
    ]
    halves = correlations(of_target(result["truth"], "even"), of_target(result["truth"], "odd"))
    rows.append(["`halves`", *(_text(halves[g]["spearman"]) for g in groups), *["-"] * (2 * len(groups))])
    return _table(header, rows)


def _cost_table(result: Mapping[str, Any]) -> str:
    header = ["estimator", "Kendall, loss", "Pearson of logs, loss", "seconds", "% of an epoch"]
    header += ["Spearman of repeats", "layers that change bits"]
    rows = [
        [
            f"`{name}`",
            _text(_over_draws(estimator, "loss", "all", "kendall")),
            _text(_over_draws(estimator, "loss", "all", "log_pearson")),
            _text(statistics.median(estimator["seconds"])),
            _text(estimator["percent_of_epoch"]),
            _text(estimator["stability"]["spearman"], 3),
            _text(estimator["stability"]["changed_layers"], 1),
        ]
        for name, estimator in result["estimators"].items()
    ]
    return _table(header, rows)


def _allocation_table(result: Mapping[str, Any]) -> str:
    points = sorted(result["additivity"]["points"], key=lambda point: point["rise"]["loss"])
    names = list(result["additivity"]["spearman"]["rise"])
    header = ["allocation by", "rise of the loss", "+-", "fall of top-1", "rise, corrected", "fall, corrected"]
    header += [f"sum of `{name}`" for name in names]
    rows = [
        [
            point["name"],
            _text(point["rise"]["loss"], 3),
            _text(point["rise"]["error"], 3),
            _text(point["rise"]["accuracy"]),
            _text(point["corrected"]["loss"], 3),
            _text(point["corrected"]["accuracy"]),
            *(f"{point['sums'][name]:.3g}" for name in names),
        ]
        for point in points
    ]
    return _table(header, rows)


def _additivity_table(result: Mapping[str, Any]) -> str:
    titles = {"rise": "with the rise of the loss", "corrected": "the same, corrected"}
    return _ranks_table(result["additivity"]["spearman"], titles)


def _ranks_table(ranks: Mapping[str, Mapping[str, float | None]], titles: Mapping[str, str]) -> str:
    header = ["rank correlation of the sum of", *(f"`{name}`" for name in next(iter(ranks.values())))]
    return _table(header, [[title, *map(_text, ranks[kind].values())] for kind, title in titles.items()])


def _precisions(found: Sequence[str]) -> str:
    return f" They were trained in different precisions: {', '.join(found)}." if len(found) > 1 else ""


def _trained_table(trained: Mapping[str, Any]) -> str:
    names = list(trained["points"][0]["sums"])
    header = ["runs", "bits on average", "fall before training", "fall after it", *(f"sum of `{n}`" for n in names)]
    rows = [
        [
            ", ".join(point["runs"]),
            _text(point["average_bits"], 3),
            *map(_text, point["falls"].values()),
            *(f"{point['sums'][name]:.3g}" for name in names),
        ]
        for point in trained["points"]
    ]
    return _table(header, rows)

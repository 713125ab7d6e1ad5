"""The main job: float network, calibration, sensitivity, allocation, QAT, evaluation, files."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, set_seed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adq import models
from adq.allocate import (
    FLOAT_BITS,
    Allocation,
    Budget,
    allocate,
    apply_allocation_,
    check_reachable,
    describe_allocation,
)
from adq.artifact import MODEL, PACKED_MODEL, load, model_file, save
from adq.batch_norm import correct_batch_norm_, reestimate_batch_norm_
from adq.batches import model_device, to_device
from adq.calibrate import calibrate_
from adq.config import dump_yaml, from_dict, load_yaml, to_dict
from adq.convert import (
    activation_quantizers,
    choose_layers,
    load_tensors_,
    quantize_,
    quantized_layers,
    weight_quantizers,
)
from adq.distill import DistillationLoss
from adq.distributed import from_main, share, share_of
from adq.nn.layers import QUANTIZED
from adq.progressive import float_state, start_from_
from adq.report import report
from adq.sensitivity import Estimator, LayerCost, SensitivityTable, reordered, sensitivity
from adq.store import locked, replacing, write_text
from adq.summary import summary
from adq.train import figures
from adq.train.checkpoint import Checkpoints, Progress
from adq.train.config import FILES, ModelConfig, PhaseConfig, RunConfig, differences, flatten
from adq.train.data import Data, build_data, check_classes, check_input
from adq.train.data.decoding import BrokenImages
from adq.train.display import Display
from adq.train.engine import Mix, Trainer, build_accelerator, check_batches, evaluate, seed_process
from adq.train.metrics import MetricsLog
from adq.train.together import Departure, Preempted, ProcessLost, TrainingStopped, is_loss_of_process, together

RESULT = "result.json"


@dataclass(frozen=True)
class RunFolder:
    """Where each file of a run is."""

    path: Path

    config = property(lambda self: self.path / "config.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    float_weights = property(lambda self: self.path / "float.safetensors")
    sensitivity = property(lambda self: self.path / "sensitivity.yaml")
    allocation = property(lambda self: self.path / "allocation.yaml")
    model = property(lambda self: self.path / MODEL)
    summary = property(lambda self: self.path / "summary.txt")
    result = property(lambda self: self.path / RESULT)
    checkpoints = property(lambda self: self.path / "checkpoints")
    figures = property(lambda self: self.path / "figures")

    @contextmanager
    def claimed(self) -> Iterator[str | None]:
        """Keep other runs out; yields None, or who is in it. Leaves no folder where nothing was written."""
        made = not self.path.exists()
        with locked(self.path / "run.lock") as owner:
            try:
                yield owner
            finally:
                if owner is None:
                    with suppress(OSError):  # a system may keep the name of an open file
                        (self.path / "run.lock").unlink(missing_ok=True)
                        if made:
                            self.path.rmdir()


def claim_folder(config: RunConfig, resume: bool, held: ExitStack) -> RunFolder:
    """The run's folder (:func:`choose_folder`), which no other run gets until ``held`` is closed.

    Raises:
        ValueError: another process is running in it; as :func:`choose_folder`.
    """
    taken: list[Path] = []
    while True:
        folder = choose_folder(config, resume, taken)
        owner = held.enter_context(folder.claimed())
        if owner is None:
            return folder
        if config.output is not None or resume:
            raise ValueError(f"adq: {folder.path} is in use: {owner} runs in it")
        taken.append(folder.path)


def choose_folder(config: RunConfig, resume: bool, taken: Sequence[Path] = ()) -> RunFolder:
    """The run's folder: ``output``, or the first free ``runs/DATA-MODEL[-N]`` (with ``resume`` the last used one).

    Raises:
        ValueError: the folder holds another run and ``resume`` is not given; nothing to resume.
    """
    if config.output is not None:
        folder = RunFolder(Path(config.output))
        if folder.config.exists() and not resume:
            raise ValueError(
                f"adq: {folder.path} holds a run already; pass --resume to go on with it, or another --output"
            )
        return folder
    base, used = f"{config.data.name}-{config.model.name.replace('/', '_')}", 0
    while (path := Path("runs") / (base if not used else f"{base}-{used + 1}")) in taken or (
        path / "config.yaml"
    ).exists():
        used += 1
    if resume and used:
        return RunFolder(Path("runs") / (base if used == 1 else f"{base}-{used}"))
    return RunFolder(path)


def check_files(config: RunConfig) -> None:
    """Raise FileNotFoundError or ValueError for files and folders that are named and not there."""
    named = flatten(to_dict(config))
    files = [named.get(key) for key in FILES if key != "start"] + [model_file(file) for file in config.starts]
    for file in files:
        if file is not None and not Path(file).is_file():
            raise FileNotFoundError(f"adq: no such file: {file}")
    if config.data.root is not None:
        _ = config.data.folder


def check_layers(model: nn.Module, config: RunConfig) -> None:
    """What can be said of quantizing a float network before it is trained.

    Raises:
        ValueError: auxiliary heads; overrides, or an allocation file, name layers that are not there; a width that a
            layer cannot have; no allocation meets the budget.
    """
    if getattr(model, "aux_logits", False):  # torchvision's GoogLeNet and Inception v3 give tuples in training then
        raise ValueError(
            f"adq: the model {config.model.name!r} has auxiliary heads, which no loss here knows; leave them out: "
            "--set 'model.kwargs={aux_logits: false}'"
        )
    asked, costs = config.allocation, []
    chosen = {n: c for n, c in choose_layers(model, config.quantization).items() if c.config.weight is not None}
    given = {} if asked.file is None else known_layers(Allocation.load(asked.file), asked.file, chosen).bits
    for name, choice in chosen.items():
        own = choice.config.weight
        assert own is not None
        scored = asked.file is None and asked.weight_bits is not None and not choice.config.pinned
        widths = asked.bits if scored else [given.get(name, own.bits)]
        for bits in widths:
            try:
                replace(own, bits=bits)
            except ValueError as error:
                raise ValueError(f"{error} (layer {name!r} at {bits} bits)") from error
        weight = getattr(choice.module, QUANTIZED[type(choice.module)].weight_name)
        costs.append(LayerCost(name, weight.numel(), 0, FLOAT_BITS, dict.fromkeys(widths, 0.0)))
    if asked.file is None and asked.weight_bits is not None:
        check_reachable(Budget(weight_bits=asked.weight_bits), costs)


def float_network(config: ModelConfig, data: Data, channels_last: bool = False) -> nn.Module:
    """The network for these images, with its weights if a file is named.

    Raises:
        ValueError: what the architecture takes or gives does not fit the images; arguments that it does not take.
    """
    try:
        model = models.create_model(config.name, data.num_classes, **config.kwargs)
    except TypeError as error:
        raise ValueError(f"adq: the model {config.name!r} with {dict(config.kwargs)}: {error}") from error
    if config.weights is not None:
        models.load_float_weights(model, config.weights)
    check_classes(model, data)
    check_input(model, data, config.name)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def start_network(config: RunConfig, model: nn.Module, data: Data, device: torch.device) -> nn.Module | None:
    """What quantization starts from instead of the float network ``model``, if the recipe names files.

    Of several it is their mean, whose weights no codebook has been fitted to yet: they are in float, and batch norms
    re-estimated for them.

    Raises:
        ValueError: what :func:`adq.start_from_` refuses, with the files.
    """
    if not config.starts:
        return None
    starts = [load(file, copy.deepcopy(model)) for file in config.starts]
    scored = config.allocation.file is None and config.allocation.weight_bits is not None
    if scored and config.allocation.estimator == "hessian" and activation_quantizers(starts[0]):
        raise ValueError(
            "adq: allocation.estimator=hessian takes second derivatives, which the learned thresholds of "
            f"{', '.join(config.starts)} do not have; choose another estimator"
        )
    try:  # on a copy, so that what cannot be is said before the float network is trained
        trial = copy.deepcopy(model)
        load_tensors_(trial, float_state(starts[0]))  # its own weights may be zeros until they are trained
        start_from_(quantize_(trial, config.quantization), *starts)
    except ValueError as error:
        raise ValueError(f"{error} ({', '.join(config.starts)})") from error
    if len(starts) == 1:
        return starts[0]
    for _, quantizer in weight_quantizers(trial).values():
        quantizer.enabled = False
    if not activation_quantizers(starts[0]):
        for layer in quantized_layers(trial).values():  # as in the starts; they are calibrated afterwards
            layer.input_quantizer = nn.Identity()
    return reestimate_(trial.to(device), data, len(data.calibration), epoch=0)


def reestimate_(model: nn.Module, data: Data, batches: int, epoch: int, mix: Mix | None = None) -> nn.Module:
    """Batch-norm statistics over the first training batches of an epoch, mixed as in training, a share of them on every
    process."""
    data.sampler.resume(epoch, 0)
    device = model_device(model)
    taken = (to_device(batch, device) for batch in islice(share(data.train), batches))
    return reestimate_batch_norm_(model, (mix(*batch)[0] if mix else batch[0] for batch in taken))


def mixture(config: PhaseConfig, classes: int) -> Mix | None:
    """What mixes batches of images with targets below ``classes``, where the phase asks for it."""
    if not config.mixup:
        return None
    try:
        from torchvision.transforms.v2 import MixUp
    except ImportError as error:
        raise ImportError("adq: mixup needs torchvision 0.16 or newer: pip install 'adq[train]'") from error
    mix: Mix = MixUp(alpha=config.mixup, num_classes=classes)
    return mix


def known_layers(allocation: Allocation, path: str, layers: Iterable[str]) -> Allocation:
    """The allocation, if all its layers are among these."""
    unknown = sorted(set(allocation.bits) - set(layers))
    if unknown:
        raise ValueError(f"adq: {path} names an unknown layer {unknown[0]!r}")
    return allocation


class Run:
    """One run of ``adq train``.

    Args:
        config: everything it is told.
        resume: go on from the folder's last checkpoint; without one, start.
        display: where progress is shown.
        departure: tells when to leave before the end; None for one of its own.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: bool = False,
        display: Display | None = None,
        departure: Departure | None = None,
    ) -> None:
        engine = config.engine
        self.accelerator = build_accelerator(
            engine,
            gradient_accumulation_steps=engine.accumulation,
            step_scheduler_with_optimizer=False,
            # codebooks are the same on every process by construction
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(seconds=engine.timeout)),
            ],
        )
        self.departure = departure or Departure(engine.timeout)
        main = self.accelerator.is_main_process
        self.display = display or Display()
        self.display.active = main
        self._held = ExitStack()  # on the first process
        self.folder = from_main(lambda: claim_folder(config, resume, self._held))
        try:
            self.config = self._resumed(config) if resume and self.folder.config.exists() else config
        except ValueError:
            self._held.close()
            raise
        self.resume = resume
        self.checkpoints = Checkpoints(self.folder.checkpoints, engine.keep)
        self.progress: Progress | None = None
        self.metrics = MetricsLog(
            self.folder.metrics, main, self._tensorboard() if main and engine.tensorboard else None
        )

    def _resumed(self, config: RunConfig) -> RunConfig:
        """The saved configuration must be the one asked for, where it shapes the result."""
        saved = from_dict(RunConfig, load_yaml(self.folder.config))
        if changed := differences(saved, config):
            raise ValueError(
                f"adq: {self.folder.config} differs from this command's configuration in {', '.join(changed)}; resume "
                "with the same command"
            )
        return config

    def _tensorboard(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("adq: TensorBoard is not installed: pip install 'adq[tensorboard]'") from error
        return SummaryWriter(self.folder.path / "tensorboard")

    def execute(self) -> dict[str, Any]:
        """Do the job, or what is left of it; returns the result, which is also in ``result.json``.

        Raises:
            Preempted: SIGTERM or SIGINT told the run to stop, and it has saved (exit status 0).
            TrainingStopped: it cannot go on: a loss that is not finite, a disk that takes no more.
            ProcessLost: another process does not answer.
        """
        try:
            with self._held, self.departure, closing(self.metrics):
                return self._execute()
        except TrainingStopped:
            raise
        except (OSError, BrokenImages) as error:
            if self.checkpoints.latest() is None:
                raise
            raise TrainingStopped(f"adq: training stopped: {error}; {self.checkpoints.kept()}") from error
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or not is_loss_of_process(error):
                raise
            raise ProcessLost(
                f"adq: process {self.accelerator.process_index} stopped: another process of the run is lost ({error}); "
                f"{self.checkpoints.kept()}"
            ) from error

    def _leave_if_told(self) -> None:
        """Between the parts of the job, where everything worth keeping is written already."""
        if self.departure.agreed(now=True)[0]:
            how = f"{self.checkpoints.kept()}; go on with the same command and --resume"
            self.display.say(f"stopped by {self.departure.heard}; {how}")
            raise Preempted

    def _execute(self) -> dict[str, Any]:
        if self.resume and self.folder.result.exists():
            self.display.say(f"{self.folder.path} is complete")
            result: dict[str, Any] = json.loads(self.folder.result.read_text())
            self.display.result(result)
            return result
        began = time.perf_counter()
        check_files(self.config)
        if self.resume:
            self.progress = self.checkpoints.recover(self.display.say)
        data = build_data(replace(self.config.data, index=self.config.data.index or self.folder.path / "index"))
        data = replace(data, test=share(data.test), calibration=share(data.calibration))
        model = self._create(data)
        check_layers(model, self.config)
        start = start_network(self.config, model, data, self.accelerator.device)
        other = self._other_teacher(data)
        train, test = self.accelerator.prepare(data.train), data.test
        check_batches(self.accelerator, train)
        self._start_folder()
        model = self._float_phase(model, data, train, test)
        self._leave_if_told()
        teacher, accuracies = self._baseline(model, other, test)
        allocation = self._quantize(model, start, data)
        del start
        accuracies["calibrated_top1"] = evaluate(model.to(self.accelerator.device), test)[1]
        self.display.say(f"top-1 after calibration, before training {accuracies['calibrated_top1']:.2f}")
        if self._saved("qat") is None:
            self.metrics.write({"phase": "calibrated", **accuracies})
        self._leave_if_told()
        shown = figures.shown_layer(model)
        before = figures.codebook_view(model, shown)
        model = self._qat_phase(model, teacher, data, train, test)
        accuracies["quantized_top1"] = evaluate(model, test)[1]
        result = self._result(model, data, accuracies)
        result["seconds"] = time.perf_counter() - began
        self._on_main(lambda: self._write(model, result, allocation, shown, before))
        self.display.result(result)
        self.display.say(f"run folder: {self.folder.path}")
        return result

    def _create(self, data: Data) -> nn.Module:
        set_seed(self.config.seed)
        return float_network(self.config.model, data, self.config.engine.channels_last)

    def _other_teacher(self, data: Data) -> nn.Module | None:
        """What the quantized network learns from instead of the float network, if the recipe names one."""
        config = self.config.distillation.teacher
        return None if config is None else float_network(config, data, self.config.engine.channels_last)

    def _baseline(self, model: nn.Module, other: nn.Module | None, test: Any) -> tuple[nn.Module, dict[str, float]]:
        """The teacher, and top-1 of the float network and of a teacher that is not a copy of it."""
        device = self.accelerator.device
        teacher = (copy.deepcopy(model) if other is None else other).eval().requires_grad_(False).to(device)
        accuracies = {"float_top1": evaluate(model.to(device), test)[1]}
        self.display.say(f"float top-1 {accuracies['float_top1']:.2f}")
        if other is not None:
            accuracies["teacher_top1"] = evaluate(teacher, test)[1]
            self.display.say(f"teacher top-1 {accuracies['teacher_top1']:.2f}")
        return teacher, accuracies

    def _on_main(self, action: Callable[[], object]) -> None:
        """Do something on the first process while the others wait; what fails there is raised on all."""
        together(action if self.accelerator.is_main_process else None)

    def _start_folder(self) -> None:
        def start() -> None:
            self.folder.path.mkdir(parents=True, exist_ok=True)
            write_text(self.folder.config, dump_yaml(replace(self.config, output=str(self.folder.path))))
            self.metrics.truncate(self.progress.metrics_size if self.progress else 0)

        self._on_main(start)

    def _saved(self, phase: str) -> Progress | None:
        """The checkpoint that this run goes on from, if it is of that phase."""
        return self.progress if self.progress is not None and self.progress.phase == phase else None

    def _trainer(self, phase: str, model: nn.Module, loss: Any, data: Data, train: Any, test: Any) -> Trainer:
        engine, config = self.config.engine, getattr(self.config, phase)
        return Trainer(
            accelerator=self.accelerator,
            phase=phase,
            config=config,
            model=model,
            loss=loss,
            train=train,
            test=test,
            sampler=data.sampler,
            checkpoints=self.checkpoints,
            metrics=self.metrics,
            display=self.display,
            departure=self.departure,
            checkpoint_steps=engine.checkpoint_steps,
            mix=mixture(config, data.num_classes),
            compiled=engine.compile,
        )

    def _float_phase(self, model: nn.Module, data: Data, train: Any, test: Any) -> nn.Module:
        """Trained float weights: given, from an earlier part of this run, or trained now."""
        if self.config.model.weights is not None and not self.config.model.finetune:
            return model
        saved = self._saved("float")
        if self.resume and self.folder.float_weights.exists() and saved is None:
            load_tensors_(model, load_file(self.folder.float_weights))
            return model
        self.display.say(f"training the float network: {self.config.model.name}, {self.config.float.epochs} epochs")
        seed_process(self.config.seed + 1)  # dropout differs from process to process
        cross_entropy = nn.CrossEntropyLoss(label_smoothing=self.config.float.label_smoothing)

        def loss(logits: Tensor, images: Tensor, target: Tensor) -> Tensor:
            return cross_entropy(logits, target)

        trainer = self._trainer("float", model, loss, data, train, test)
        model = trainer.run(saved)
        self._reestimate(model, data, self.config.float)

        def write() -> None:
            with replacing(self.folder.float_weights) as temporary:
                save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary)

        self._on_main(write)
        return model

    def _calibration(self, data: Data) -> Iterator[Any]:
        """This process's share of the calibration batches."""
        device = self.accelerator.device
        return ((images.to(device), target.to(device)) for images, target in data.calibration)

    def _quantize(self, model: nn.Module, start: nn.Module | None, data: Data) -> Allocation:
        """Quantize, calibrate, score and allocate; on resume with the allocation that the run already chose."""
        model.to(self.accelerator.device)
        quantize_(model, self.config.quantization)
        if start is not None:
            start_from_(model, start.to(self.accelerator.device))
        if start is None or not activation_quantizers(start):
            calibrate_(model, self._calibration(data), batch_norm=False)
        allocation = self._allocation(model, data)
        apply_allocation_(model, allocation)
        correct_batch_norm_(model, self._calibration(data), reference=start)
        self._on_main(lambda: allocation.save(self.folder.allocation))
        self.display.say(
            f"allocation: {allocation.average_quantized:.3f} bits over the quantized layers, "
            f"{allocation.average_network:.3f} over the whole network"
        )
        return allocation

    def _allocation(self, model: nn.Module, data: Data) -> Allocation:
        config = self.config.allocation
        # before training has begun it is chosen anew, for the row of the metrics that tells what it took
        chosen = config.file or (str(self.folder.allocation) if self._saved("qat") else None)
        if chosen is not None:
            present = {name: quantizer.bits for name, (_, quantizer) in weight_quantizers(model).items()}
            given = known_layers(Allocation.load(chosen), chosen, present)
            table = self._score(model, data, 1, "fisher")
            return describe_allocation(table, {**present, **given.bits})
        if config.weight_bits is None:
            table = self._score(model, data, 1, "fisher")
            return describe_allocation(table, {n: q.bits for n, (_, q) in weight_quantizers(model).items()})
        if share_of(config.batches) > len(data.calibration):
            self.display.say(f"scores are over all calibration batches, fewer than the {config.batches} asked for")
        began = time.perf_counter()
        table = self._score(model, data, config.batches, config.estimator)
        seconds = time.perf_counter() - began
        self.metrics.write({"phase": "sensitivity", "estimator": config.estimator, "seconds": seconds})
        self._on_main(lambda: write_text(self.folder.sensitivity, dump_yaml(table.to_dict())))
        if config.order != "ranked":
            table = reordered(table, config.order, self.config.seed)
        return allocate(table, Budget(weight_bits=config.weight_bits))

    def _score(self, model: nn.Module, data: Data, batches: int, estimator: Estimator) -> SensitivityTable:
        return sensitivity(
            model,
            islice(self._calibration(data), share_of(batches)),
            nn.functional.cross_entropy,
            bits=self.config.allocation.bits,
            estimator=estimator,
        )

    def _qat_phase(self, model: nn.Module, teacher: nn.Module, data: Data, train: Any, test: Any) -> nn.Module:
        self.display.say(f"quantization-aware training, {self.config.qat.epochs} epochs")
        seed_process(self.config.seed + 2)
        task = nn.CrossEntropyLoss(label_smoothing=self.config.qat.label_smoothing)
        distill = self.config.distillation
        loss = DistillationLoss(teacher, distill.alpha, distill.temperature, task)
        trainer = self._trainer("qat", model, loss, data, train, test)
        model = trainer.run(self._saved("qat")).eval()
        self._reestimate(model, data, self.config.qat)
        return model

    def _reestimate(self, model: nn.Module, data: Data, config: PhaseConfig) -> None:
        """Batch-norm statistics over the first batches of one more epoch."""
        wanted = config.reestimate_batches
        if wanted > len(data.train):
            self.display.say(
                f"batch norms are re-estimated over the {len(data.train)} batches of an epoch, not {wanted}"
            )
        if wanted:
            reestimate_(model, data, share_of(wanted), config.epochs, mixture(config, data.num_classes))

    def _result(self, model: nn.Module, data: Data, accuracies: dict[str, float]) -> dict[str, Any]:
        report = summary(model)
        return {
            "model": self.config.model.name,
            "data": data.name,
            **accuracies,
            "average_bits_quantized": report.average_bits_quantized,
            "average_bits_network": report.average_bits_network,
            "bytes_float": report.bytes_float,
            "bytes_packed": report.bytes_packed,
        }

    def _write(
        self, model: nn.Module, result: dict[str, Any], allocation: Allocation, shown: str, before: figures.CodebookView
    ) -> None:
        folder = self.folder
        save(model, folder.model)
        save(model, folder.path / PACKED_MODEL, packed=True)
        write_text(folder.summary, f"{summary(model)}\n")
        weights = {name: layer.weight.numel() for name, (layer, _) in weight_quantizers(model).items()}
        figures.draw_allocation(folder.figures / "bits-per-layer.png", allocation, weights)
        figures.draw_codebook(folder.figures / "codebook.png", shown, before, figures.codebook_view(model, shown))
        rows = [row for row in self.metrics.rows() if row["phase"] == "qat"]
        if rows:
            figures.draw_history(folder.figures / "training.png", rows, result["float_top1"])
        self.metrics.write({"phase": "result", **result})
        report(model, folder.path / "report.html", result=result, metrics=self.metrics.rows())
        write_text(folder.result, json.dumps(result, indent=2) + "\n")  # last: with it the run is complete

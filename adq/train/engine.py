"""The training loop: one phase of epochs on Hugging Face Accelerate, with checkpoints it can resume from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from adq.batches import model_device, to_device
from adq.dampening import dampening_loss
from adq.distributed import average_batch_norm_, gather, pool, world
from adq.nn.activation import ActivationQuantizer
from adq.nn.weight import WeightQuantizer
from adq.train.averaging import WeightMean
from adq.train.checkpoint import Checkpoints, Layout, Progress, Sums
from adq.train.config import EngineConfig, PhaseConfig
from adq.train.data import EpochSampler
from adq.train.data.decoding import broken_images
from adq.train.display import Display
from adq.train.metrics import MetricsLog
from adq.train.pace import Pace
from adq.train.together import Departure, Preempted, TrainingStopped, together

CHECK_EVERY = 20
"""On a GPU the loss is read back, and checked, every so many micro-batches; on a CPU at each one."""

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def build_accelerator(config: EngineConfig, **options: Any) -> Accelerator:
    """Devices, precision and processes of training; ``options`` are Accelerate's own.

    Raises:
        ValueError: fp16 without a GPU, which Accelerate would pass over.
    """
    accelerator = Accelerator(
        cpu=config.device == "cpu" or not torch.accelerator.is_available(),  # else Accelerate has one process
        mixed_precision=config.mixed_precision,
        # the host runs ahead of a GPU: batches are in pinned memory there
        dataloader_config=DataLoaderConfiguration(non_blocking=torch.cuda.is_available()),
        **options,
    )
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("adq: engine.mixed_precision=fp16 needs a GPU; on a CPU bf16 or no")
    return accelerator


def seed_process(seed: int) -> None:
    """Start the random generators of this process, each process's differently; NumPy's takes 32 bits."""
    set_seed((seed + world()[0]) % 2**32)


def parameter_groups(model: nn.Module, config: PhaseConfig) -> list[dict[str, Any]]:
    """Parameters by what they are: weight decay for weights only, learning rates of their own for quantizers."""
    groups: dict[str, dict[str, Any]] = {
        "weights": {"lr": config.lr, "weight_decay": config.weight_decay},
        "biases and norms": {"lr": config.lr, "weight_decay": 0.0},
        "thresholds": {"lr": config.lr * config.threshold_lr, "weight_decay": 0.0},
        "scales": {"lr": config.lr * config.scale_lr, "weight_decay": 0.0},
        "codebooks": {"lr": config.lr, "weight_decay": 0.0},
    }
    for group in groups.values():
        group["params"] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            groups[_group(module, name, parameter)]["params"].append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if group["params"]]


def _group(module: nn.Module, name: str, parameter: Tensor) -> str:
    if isinstance(module, ActivationQuantizer):
        return "scales" if name.endswith("scale") else "thresholds"
    if isinstance(module, WeightQuantizer):
        return "codebooks"
    return "weights" if parameter.dim() > 1 else "biases and norms"


def build_optimizer(model: nn.Module, config: PhaseConfig) -> torch.optim.Optimizer:
    """The phase's optimizer over :func:`parameter_groups`."""
    groups = parameter_groups(model, config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0)


def build_schedule(optimizer: torch.optim.Optimizer, config: PhaseConfig, steps_per_epoch: int) -> LambdaLR:
    """Learning rate over the steps of a phase: linear warm-up, then the decay."""
    warmup = config.warmup * steps_per_epoch
    total = max(1, config.epochs * steps_per_epoch)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = min(1.0, (step - warmup) / max(1.0, total - warmup))
        if config.schedule == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
        return 1.0 - done if config.schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)


def move_schedule(schedule: LambdaLR, step: int) -> None:
    """Put a schedule, and the learning rates of its optimizer, at a step."""
    schedule.last_epoch = step - 1
    schedule.step()


def layout_of(accelerator: Accelerator, train: DataLoader[Any]) -> Layout:
    """How the images of a step are spread; ``train`` is a prepared loader."""
    images = train.total_batch_size  # type: ignore[attr-defined]
    return Layout(accelerator.num_processes, images, accelerator.gradient_accumulation_steps)


def check_batches(accelerator: Accelerator, train: DataLoader[Any]) -> None:
    """Raise ValueError if a prepared loader has fewer batches than there are processes."""
    if not len(train):
        layout = layout_of(accelerator, train)
        raise ValueError(
            f"adq: the training images do not make one batch of {layout.batch_size} for each of "
            f"{layout.processes} processes; use a smaller --batch-size, or fewer processes"
        )


@dataclass
class Totals:
    """Sums over the samples seen, kept on the device."""

    loss: Tensor
    correct: Tensor
    samples: int = 0

    @classmethod
    def zeros(cls, device: torch.device) -> Totals:
        return cls(torch.zeros((), device=device), torch.zeros((), device=device, dtype=torch.int64))

    def add(self, loss: Tensor, logits: Tensor, target: Tensor) -> None:
        """Take a batch in; of a mixture the image with the larger part counts."""
        classes = target if target.dim() == 1 else target.argmax(1)
        self.loss += loss.detach().float() * len(target)
        self.correct += (logits.detach().argmax(1) == classes).sum()
        self.samples += len(target)

    def of_processes(self) -> tuple[Sums, ...]:
        """Loss, correct answers and samples of each process, on every process."""
        return tuple(gather(lambda: (self.loss.item(), int(self.correct), self.samples)))

    def restore(self, sums: Sums) -> None:
        """Go on from this process's sums in a checkpoint."""
        self.loss += sums[0]
        self.correct += sums[1]
        self.samples += sums[2]


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    """Mean cross entropy and top-1 in percent over every image of a loader, once each.

    Every process goes through its share of the batches, as :func:`adq.distributed.share` deals them; the result is
    that of one process, bit for bit.
    """
    was_training, device = model.training, model_device(model)
    model.eval()

    def sums() -> list[tuple[float, int, int]]:
        found = [_batch_sums(model, *to_device(batch, device)) for batch in loader]
        return [(loss.item(), int(correct), samples) for loss, correct, samples in found]

    batches = pool(sums)
    model.train(was_training)
    if not batches:
        raise ValueError("adq: no images to evaluate on")
    loss, correct, samples = (sum(column) for column in zip(*batches, strict=True))
    return loss / samples, 100.0 * correct / samples


def _batch_sums(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, int]:
    """Cross entropy, correct answers and samples of a batch, on its device."""
    logits = model(images).float()
    loss = nn.functional.cross_entropy(logits, target, reduction="sum").double()
    return loss, (logits.argmax(1) == target).sum(), len(target)


@dataclass
class Trainer:
    """Trains one phase.

    Args:
        accelerator: device, autocast, processes and accumulation.
        phase: its name, as in checkpoints and metrics: ``float`` or ``qat``.
        config: epochs, optimizer, schedule.
        model: not prepared yet.
        loss: ``(logits, images, target) -> scalar``.
        train: prepared loader.
        test: loader of this process's share.
        sampler: of ``train``.
        checkpoints, metrics, display: where things go.
        departure: tells when to leave before the end.
        checkpoint_steps: optimizer steps between checkpoints inside an epoch, 0 for none.
        mix: what makes of a batch the mixtures to train on, and their targets as probabilities.
        compiled: run the model through ``torch.compile``.
    """

    accelerator: Accelerator
    phase: str
    config: PhaseConfig
    model: nn.Module
    loss: Loss
    train: DataLoader[Any]
    test: DataLoader[Any]
    sampler: EpochSampler
    checkpoints: Checkpoints
    metrics: MetricsLog
    display: Display
    departure: Departure
    checkpoint_steps: int = 0
    mix: Mix | None = None
    compiled: bool = False
    mean: WeightMean | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.config.average_epochs:
            self.mean = WeightMean(self.model)

    def run(self, resume: Progress | None = None) -> nn.Module:
        """Train to the end, from ``resume`` where given; returns the model, unwrapped."""
        accelerator = self.accelerator
        inner = build_optimizer(self.model, self.config)
        with warnings.catch_warnings():  # torch 2.14 has another name for it, which Accelerate does not know yet
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            schedule = build_schedule(inner, self.config, self.updates)
            model, optimizer, schedule = accelerator.prepare(self.model, inner, schedule)
        progress = Progress(self.phase, 0, 0, self.layout)
        if resume is not None:
            progress = self._resume(resume, schedule)
        else:
            self._save(progress)
        forward: Any = torch.compile(model) if self.compiled else model
        for epoch in range(progress.epoch, self.config.epochs):
            begin = progress if epoch == progress.epoch else Progress(self.phase, epoch, 0, self.layout)
            self._epoch(forward, optimizer, schedule, begin)
        accelerator.wait_for_everyone()
        # without its autocast: what is evaluated last is what is saved
        trained: nn.Module = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()
        if self.mean is not None:
            self.mean.apply_()
        return trained

    @property
    def updates(self) -> int:
        """Optimizer steps of an epoch."""
        return math.ceil(len(self.train) / self.accelerator.gradient_accumulation_steps)

    @property
    def layout(self) -> Layout:
        """How the images of a step are spread."""
        return layout_of(self.accelerator, self.train)

    def _share(self, index: int) -> float:
        """Factor of a batch's loss, of which Accelerate takes the part for a whole step: the last step of an epoch may
        have fewer batches."""
        whole, batches = self.accelerator.gradient_accumulation_steps, len(self.train)
        return whole / min(whole, batches - index // whole * whole)

    def _resume(self, saved: Progress, schedule: Any) -> Progress:
        """Restore a checkpoint: exactly, or into another layout as near as that can be."""
        accelerator, updates = self.accelerator, self.updates
        self.checkpoints.restore(accelerator, self.model, saved, self.layout)
        if self.mean is not None:
            self.mean.restore(self.checkpoints.mean(saved))
        if saved.layout == self.layout:
            return saved
        progress = saved.in_layout(self.layout)
        accelerator.step = 0
        seed_process(self.sampler.seed + progress.epoch * updates + progress.batch)
        move_schedule(schedule.scheduler, progress.epoch * updates + progress.batch // self.layout.accumulation)
        self.display.say(
            f"{saved.path} was written by {saved.layout}; this run has {self.layout}. It goes on at the same place in "
            f"epoch and schedule, batch {progress.batch + 1}, but not with the same bits; random states start anew"
        )
        return progress

    def _batches(self, epoch: int, start: int, pace: Pace) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        if start == len(self.train):  # the epoch's batches are done, its evaluation is not
            return
        self.train.set_epoch(epoch)  # type: ignore[attr-defined]
        self.sampler.resume(epoch, start * self.layout.batch_size)
        yield from enumerate(pace.through(self.train), start)

    def _epoch(self, model: nn.Module, optimizer: Any, schedule: Any, begin: Progress) -> None:
        accelerator, epoch, start = self.accelerator, begin.epoch, begin.batch
        model.train()
        totals, pace = Totals.zeros(accelerator.device), Pace(self.train)
        if begin.sums:
            totals.restore(begin.sums[accelerator.process_index])
        exact_check = 1 if accelerator.device.type == "cpu" else CHECK_EVERY
        last = len(self.train) - 1
        with self.display.epoch(self.phase, epoch, self.config.epochs, last + 1, start, totals.samples) as bar:
            for index, (images, target) in self._batches(epoch, start, pace):
                if self.mix is not None:
                    images, target = self.mix(images, target)
                with accelerator.accumulate(model):
                    logits = model(images)
                    with accelerator.autocast():  # a teacher's forward pass belongs to the loss
                        loss = self.loss(logits, images, target)
                    accelerator.backward((loss + self._dampening(schedule)) * self._share(index))
                    if accelerator.sync_gradients and self.config.clip_grad_norm is not None:
                        accelerator.clip_grad_norm_(model.parameters(), self.config.clip_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                totals.add(loss, logits, target)
                if accelerator.sync_gradients and not optimizer.step_was_skipped:
                    schedule.step()
                    if self.mean is not None and epoch >= self.config.epochs - self.config.average_epochs:
                        self.mean.update()
                checked = index % exact_check == 0 or index == last
                if checked:
                    self._check(totals.loss, images, epoch, index)
                    bar.update(index + 1, totals, schedule.get_last_lr()[0])
                if accelerator.sync_gradients:
                    self._end_step(totals, images, epoch, index)
                pace.idle = checked  # reading the loss has waited for the device
        self._finish_epoch(model, totals, begin, pace, schedule)

    def _dampening(self, schedule: Any) -> Tensor | float:
        """The pull towards the codewords: as strong as the learning rate has fallen from its peak."""
        warming_up = schedule.scheduler.last_epoch < self.config.warmup * self.updates
        if warming_up or not self.config.dampening * self.config.lr:
            return 0.0
        fallen = 1.0 - schedule.get_last_lr()[0] / self.config.lr
        return self.config.dampening * fallen * dampening_loss(self.accelerator.unwrap_model(self.model))

    def _end_step(self, totals: Totals, images: Tensor, epoch: int, index: int) -> None:
        """Between two optimizer steps: leave if a process must, and save where it is due."""
        last = index == len(self.train) - 1
        every = self.checkpoint_steps * self.accelerator.gradient_accumulation_steps
        due = every > 0 and (index + 1) % every == 0 and not last
        if due:
            self._check(totals.loss, images, epoch, index)
        leave = self._told_to_leave(now=due or last)  # nothing is saved or measured before all have agreed
        if leave or due:
            self._save(Progress(self.phase, epoch, index + 1, self.layout, totals.of_processes()))
        if leave:
            self._leave(epoch, index + 1)

    def _told_to_leave(self, now: bool) -> bool:
        leave, failure = self.departure.agreed(now)
        if failure is not None:
            self._stop(failure)
        return leave

    def _leave(self, epoch: int, batches: int) -> None:
        self.display.say(
            f"stopped by {self.departure.heard} after epoch {epoch + 1}, batch {batches} of {self.phase}; "
            f"{self.checkpoints.kept()}; go on with the same command and --resume"
        )
        raise Preempted

    def _finish_epoch(self, model: nn.Module, totals: Totals, begin: Progress, pace: Pace, schedule: Any) -> None:
        epoch, seen_before = begin.epoch, begin.total[2]
        loss, correct, samples = replace(begin, sums=totals.of_processes()).total
        speed = pace.finish(samples - seen_before)
        average_batch_norm_(self.accelerator.unwrap_model(self.model))
        test_loss, test_top1 = evaluate(model, self.test)
        row = {
            "phase": self.phase,
            "epoch": epoch + 1,
            "train_loss": loss / max(1.0, samples),
            "train_top1": 100.0 * correct / max(1.0, samples),
            "test_loss": test_loss,
            "test_top1": test_top1,
            "lr": schedule.get_last_lr()[0],
            "mixed_precision": self.accelerator.mixed_precision,
            **speed,
            "broken_images": broken_images(self.train.dataset, self.test.dataset),
        }
        together(lambda: self.metrics.write(row))
        self.display.row(row, self.config.epochs)
        if advice := pace.advice(speed):
            self.display.say(f"warning: {advice}")
        self._save(Progress(self.phase, epoch + 1, 0, self.layout, top1=test_top1))
        if self._told_to_leave(now=True):
            self._leave(epoch, len(self.train))

    def _save(self, progress: Progress) -> None:
        bad = first_non_finite(self.accelerator.unwrap_model(self.model))
        if bad:
            self.departure.fail(f"{bad} holds NaN or infinity at epoch {progress.epoch + 1}")
        self._told_to_leave(now=True)
        mean = None if self.mean is None else self.mean.state()
        self.checkpoints.save(self.accelerator, self.model, progress, self.metrics.size(), mean)

    def _check(self, total_loss: Tensor, images: Tensor, epoch: int, index: int) -> None:
        if not math.isfinite(total_loss.item()):
            where = blame(self.accelerator.unwrap_model(self.model), images)
            self.departure.fail(f"the loss is not finite at epoch {epoch + 1}, batch {index + 1}: {where}")

    def _stop(self, reason: str) -> None:
        raise TrainingStopped(f"adq: training stopped: {reason}; {self.checkpoints.kept()}")


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer with a NaN or an infinity, None if there is none."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return name
    return None


def blame(model: nn.Module, images: Tensor) -> str:
    """Where the first NaN or infinity of a forward pass comes from, in words."""
    found: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return look

    if not bool(images.isfinite().all()):
        return "the images hold NaN or infinity"
    bad = first_non_finite(model)
    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if not list(module.children()) or hasattr(module, "weight")
    ]
    handles = [module.register_forward_hook(hook(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    place = (
        f"the output of layer {found[0]!r} is the first that is not" if found else "all layers are finite on this batch"
    )
    return f"{place}; {bad} holds NaN or infinity" if bad else place

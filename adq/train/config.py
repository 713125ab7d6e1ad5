"""Everything a run is told, as one tree of dataclasses that is one YAML file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from adq.config import ADQConfig, check_bits, dump_yaml, filled, from_dict, load_yaml, parse_yaml
from adq.config import _check_choices as check_choices
from adq.sensitivity import Estimator
from adq.train.data import DataConfig

RECIPES = "adq.train.recipes"
LONGEST_TIMEOUT = 1e9
LARGEST_SEED = 2**32 - 1
"""NumPy's generator takes 32 bits."""


@dataclass(frozen=True)
class ModelConfig:
    """Which network.

    Attributes:
        name: as :func:`adq.create_model` takes it.
        weights: file of float weights to start from instead of training them (safetensors, or a torch file).
        finetune: train the given weights on, as ``float`` says.
        kwargs: further arguments of the architecture.
    """

    name: str = "digits_cnn"
    weights: str | None = None
    finetune: bool = False
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.finetune and self.weights is None:
            raise ValueError("model.finetune trains given weights on; name them by model.weights")


@dataclass(frozen=True)
class PhaseConfig:
    """One stretch of training.

    Attributes:
        epochs: passes over the training images.
        optimizer: ``sgd`` with Nesterov momentum, or ``adamw``.
        lr: peak learning rate of weights.
        threshold_lr: of activation thresholds, relative to ``lr``; their gradients sum over a whole feature map,
            and at the weights' own rate batch-norm statistics cannot follow them.
        scale_lr: of activation scales, relative to ``lr``.
        momentum: of SGD.
        weight_decay: of weights of two or more dimensions; biases, norms and quantizer parameters get none.
        schedule: ``cosine`` or ``linear`` decay to zero, or ``constant``.
        warmup_epochs: linear rise at the start, over half of all epochs at most.
        label_smoothing: of cross entropy.
        mixup: parameter of the Beta distribution by which the images of a batch, and their targets, are mixed in pairs
            (arXiv 1710.09412); a teacher sees the same mixtures (arXiv 2106.05237). 0: none.
        clip_grad_norm: largest gradient norm, None for no limit.
        dampening: factor of :func:`adq.dampening_loss` where the learning rate has fallen to zero; it grows from zero
            as the rate falls from its peak, which a constant one never does. 0: none. Of quantization-aware training
            alone.
        reestimate_batches: after the last epoch, replace batch-norm running statistics by their means over so many
            training batches, mixed like them; 0 keeps the running averages. An epoch's worth, or none: on CIFAR-10
            statistics from 40 batches lay 0.3 % below those from 390 (benchmarks/results, cifar10-batch-norm).
        average_epochs: end with the mean of the weights over the steps of so many last epochs (SWA, arXiv 1803.05407),
            codebooks fitted to it anew; 0: with the last weights. It needs ``reestimate_batches``, and pays where the
            learning rate has not fallen to zero.
    """

    epochs: int = 20
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    threshold_lr: float = 0.1
    scale_lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    clip_grad_norm: float | None = None
    dampening: float = 0.0
    reestimate_batches: int = 0
    average_epochs: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0.0:
            raise ValueError(f"clip_grad_norm must be positive, or null for no limit, got {self.clip_grad_norm}")
        if self.dampening and self.schedule == "constant":
            raise ValueError("dampening grows as the learning rate falls, and schedule: constant keeps it")
        for name in ("epochs", "reestimate_batches", "average_epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if 0 < self.epochs < self.average_epochs:
            raise ValueError(f"average_epochs is of the last of {self.epochs} epochs, got {self.average_epochs}")
        if self.average_epochs and not self.reestimate_batches:
            raise ValueError(
                "average_epochs ends with weights that no step had, and batch-norm statistics of others; set "
                "reestimate_batches"
            )
        for name in (
            "lr",
            "threshold_lr",
            "scale_lr",
            "weight_decay",
            "warmup_epochs",
            "momentum",
            "dampening",
            "mixup",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")

    @property
    def warmup(self) -> float:
        """Epochs in which the learning rate rises."""
        return min(self.warmup_epochs, self.epochs / 2)


@dataclass(frozen=True)
class AllocationConfig:
    """How bits are spread over the layers.

    Attributes:
        weight_bits: budget, average bits over the quantized layers' weights; infinity for the least sum of scores,
            None keeps every layer at ``quantization.weight.bits``.
        bits: widths to choose from.
        estimator: of :func:`adq.sensitivity`: one of its names.
        batches: calibration batches that the scores are taken over.
        order: ``ranked``: by the scores as they are; ``random`` or ``reversed``: a control for ablations, with the
            scores dealt to other layers (:func:`adq.sensitivity.reordered`).
        file: an allocation to use as it is, instead of computing one.
    """

    weight_bits: float | None = field(default=3.0, metadata={"unlimited": True})
    bits: tuple[int, ...] = (2, 3, 4)
    estimator: Estimator = "fisher"
    batches: int = 8
    order: Literal["ranked", "random", "reversed"] = "ranked"
    file: str | None = None

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.bits:
            raise ValueError("allocation.bits names no widths to choose from")
        for bits in self.bits:
            check_bits(bits, "allocation.bits")
        if self.weight_bits is not None and self.weight_bits <= 0:
            raise ValueError(f"allocation.weight_bits must be positive, got {self.weight_bits}")
        if self.batches < 1:
            raise ValueError(f"allocation.batches must be at least 1, got {self.batches}")


@dataclass(frozen=True)
class StudyConfig:
    """How much ``adq sensitivity --study`` measures.

    Attributes:
        images: held-out images, a seeded subset of the test set; two at least, for their standard error.
        repeats: disjoint draws of ``allocation.batches`` calibration batches.
        random: random allocations that are measured as a whole.
        steps: training steps that are timed.
    """

    images: int = 2000
    repeats: int = 4
    random: int = 8
    steps: int = 12

    def __post_init__(self) -> None:
        for name, low in (("images", 2), ("repeats", 2), ("random", 0), ("steps", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"adq: study.{name} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True)
class DistillationConfig:
    """Loss = (1 - alpha) cross entropy + alpha T^2 KL(teacher || quantized network).

    Attributes:
        alpha: 0 for none.
        temperature: T, of both.
        teacher: another network than the float one, with its weights; its top-1 goes into the result.
    """

    alpha: float = 1.0
    temperature: float = 1.0
    teacher: ModelConfig | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"distillation.alpha must be in [0, 1], got {self.alpha}")
        if not self.temperature > 0.0:
            raise ValueError(f"distillation.temperature must be positive, got {self.temperature}")
        if self.teacher is not None and self.teacher.weights is None:
            raise ValueError("distillation.teacher needs weights: a network without training teaches nothing")


@dataclass(frozen=True)
class EngineConfig:
    """How the machine is used.

    Attributes:
        device: ``auto`` (a GPU where there is one) or ``cpu``.
        mixed_precision: ``no``, ``bf16`` or ``fp16`` autocast.
        accumulation: micro-batches per optimizer step; the last step of an epoch is over those that are left.
        channels_last: NHWC memory format.
        compile: run the training steps through ``torch.compile``.
        checkpoint_steps: also write a checkpoint every so many optimizer steps inside an epoch; 0: at the end of
            epochs only.
        keep: checkpoints to keep: the last so many, and the one of the best test top-1 besides.
        timeout: seconds after which a process that does not answer counts as lost.
        tensorboard: also write TensorBoard events (extra ``tensorboard``).
    """

    device: Literal["auto", "cpu"] = "auto"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    accumulation: int = 1
    channels_last: bool = False
    compile: bool = False
    checkpoint_steps: int = 0
    keep: int = 2
    timeout: float = 600.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 < self.timeout < LONGEST_TIMEOUT:
            raise ValueError(
                f"engine.timeout must be positive and below {LONGEST_TIMEOUT:g} seconds, got {self.timeout}"
            )
        if self.accumulation < 1 or self.keep < 1 or self.checkpoint_steps < 0:
            raise ValueError("accumulation and keep must be at least 1, checkpoint_steps not negative")


@dataclass(frozen=True)
class RunConfig:
    """A whole run of ``adq train``: data, network, float training, quantization, QAT.

    Attributes:
        seed: of everything random in training; ``data.seed``, where given, is that of order and augmentation.
        start: run folder, or file of :func:`adq.save`: quantization starts from that network, trained at more bits
            say, instead of the float network; from a packed file, from the quantized weights. Widths are this
            configuration's (:func:`adq.start_from_`); the float network stays baseline and teacher. Of a list of them
            the mean, batch norms taken over as many training batches as calibration has.
    """

    seed: int = 0
    output: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    start: str | tuple[str, ...] | None = None
    float: PhaseConfig = field(default_factory=PhaseConfig)
    quantization: ADQConfig = field(default_factory=ADQConfig)
    allocation: AllocationConfig = field(default_factory=AllocationConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    qat: PhaseConfig = field(default_factory=PhaseConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= LARGEST_SEED:
            raise ValueError(f"adq: seed must be in 0 .. {LARGEST_SEED}, got {self.seed}")
        overrides = self.quantization.overrides.values()
        if self.quantization.weight is None and not any((override or {}).get("weight") for override in overrides):
            raise ValueError(
                "adq: adq train allocates bits to weights, and quantization.weight leaves all of them in float"
            )
        if self.qat.label_smoothing and self.distillation.alpha == 1.0:
            raise ValueError("adq: qat.label_smoothing is of cross entropy, which distillation.alpha=1 leaves out")
        if self.float.dampening:
            raise ValueError("adq: float.dampening: weights in float have no codewords; set qat.dampening")
        if self.start == ():
            raise ValueError("adq: start is an empty list; name networks, or null")

    @property
    def starts(self) -> tuple[str, ...]:
        """``start`` as a list of files."""
        return () if self.start is None else (self.start,) if isinstance(self.start, str) else self.start


def recipe_names() -> list[str]:
    """Names of the recipes that come with adq."""
    return sorted(item.name[:-5] for item in resources.files(RECIPES).iterdir() if item.name.endswith(".yaml"))


def read_recipe(name: str) -> dict[str, Any]:
    """The mapping of a YAML file, or of a recipe that comes with adq by its name."""
    if Path(name).suffix in (".yaml", ".yml"):
        return load_yaml(name)
    if name not in recipe_names():
        raise ValueError(f"adq: no recipe {name!r}; known: {', '.join(recipe_names())}, or the path of a .yaml file")
    return load_yaml(str(resources.files(RECIPES) / f"{name}.yaml"))


def parse_assignment(text: str) -> dict[str, Any]:
    """``a.b.c=value`` as a nested mapping; the value is YAML."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise ValueError(f"adq: --set takes KEY=VALUE, got {text!r}")
    try:
        nested: Any = parse_yaml(value)
    except yaml.YAMLError as error:
        raise ValueError(f"adq: --set {path}: {value!r} is not valid YAML: {error}") from error
    for key in reversed(path.split(".")):
        nested = {key: nested}
    return nested


def merge(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the leaves of ``change`` put in."""
    merged = dict(base)
    for key, value in change.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def resolve(recipe: str | None, changes: Sequence[Mapping[str, Any]]) -> RunConfig:
    """The run's configuration: a recipe, then each change over it.

    Raises:
        FileNotFoundError, ValueError: no such recipe or file; an unknown key (with the closest known one)
            or a value of the wrong kind, each with its place; a setting of a change that has no effect beside the
            others of that change and what it changes.
    """
    values = _without_seed(read_recipe(recipe or "digits"))
    for change in changes:
        values = merge(values, change)
        _check_effect(change, values)
    try:
        config = from_dict(RunConfig, values)
    except TypeError as error:  # keys of YAML that are no text
        raise ValueError(str(error)) from error
    if "data.seed" in flatten(values):
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, seed=config.seed))


def spell_out(recipe: str | None, changes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What :func:`resolve` makes, as a mapping, of settings that need not be right before more are given."""
    values = reduce(merge, changes, _without_seed(read_recipe(recipe or "digits")))
    made = filled(RunConfig, values)
    return made if "data.seed" in flatten(values) else merge(made, {"data": {"seed": made["seed"]}})


def _without_seed(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe without a seed of the data that is that of the run: it follows."""
    data = values.get("data")
    if isinstance(data, dict) and "seed" in values and data.get("seed") == values["seed"]:  # as every run writes it
        return {**values, "data": {key: value for key, value in data.items() if key != "seed"}}
    return values


def _check_effect(change: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise ValueError if a change, with which the settings are ``values``, says something that has no effect.

    Defaults may be said; so may the recipe, and changes before this one, say what it leaves no effect.
    """
    defaults = flatten(dataclasses.asdict(RunConfig()))
    idle = _idle({**defaults, **flatten(values)})
    for key, value in flatten(change).items():
        why = next((why for place, why in idle.items() if f"{key}.".startswith(f"{place}.")), None)
        if why is not None and value is not None and value != defaults.get(key):
            raise ValueError(f"adq: {key} has no effect: {why}")


def _idle(now: Mapping[str, Any]) -> dict[str, str]:
    """Settings that have no effect beside the others, each with the reason."""
    idle = {}
    if now["allocation.file"] is not None:
        idle["allocation.weight_bits"] = idle["allocation.order"] = "allocation.file names the bits of each layer"
    elif now["allocation.weight_bits"] is None:
        idle["allocation.order"] = "without a budget, allocation.weight_bits, every layer has the same bits"
    if now["distillation.alpha"] == 0:
        idle["distillation.teacher"] = idle["distillation.temperature"] = "distillation.alpha=0 leaves the teacher out"
    updates = {v for k, v in now.items() if k.startswith("quantization.") and k.endswith("weight.update")}
    if "ema" not in updates:
        reason = "no EMA moves the codebooks, quantization.weight.update does not let it"
        idle["quantization.weight.ema_decay"] = idle["quantization.weight.ema_follows_lr"] = reason
    for phase in ("float", "qat"):
        if now[f"{phase}.optimizer"] == "adamw":
            idle[f"{phase}.momentum"] = f"it is of SGD, and {phase}.optimizer is adamw"
    return idle


FILES = ("model.weights", "start", "allocation.file", "distillation.teacher.weights")
"""Fields of which the folder does not count, unless adq gives the name in every run; of run folders it does, too: those
of ablations have equal names."""
OWN_NAMES = ("float.safetensors", "model.safetensors", "model-packed.safetensors", "allocation.yaml")


def differences(first: RunConfig | Mapping[str, Any], second: RunConfig | Mapping[str, Any]) -> list[str]:
    """Fields that shape the result in which two runs, or what was said of them, differ, dotted.

    The output, the engine, how data are loaded, and the folders that images and weights lie in do not count: a run may
    go on, and rows of an ablation may have been run, on another machine.
    """
    a, b = (flatten(yaml.safe_load(dump_yaml(config))) for config in (first, second))
    for values in (a, b):
        for key in FILES:
            named = values.get(key)
            values[key] = [_identity(key, file) for file in named] if isinstance(named, list) else _identity(key, named)
    changed = sorted(key for key in {*a, *b} if a.get(key) != b.get(key) or (key in a) != (key in b))
    elsewhere = ("output", "data.root", "data.index", "data.workers")
    return [key for key in changed if key not in elsewhere and not key.startswith("engine.")]


def _identity(key: str, file: str | None) -> str | None:
    """What tells a named file from another."""
    if file is None or Path(file).name in OWN_NAMES or (key == "start" and Path(file).suffix != ".safetensors"):
        return file
    return Path(file).name


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{a: {b: value}}`` as ``{"a.b": value}``; an empty mapping is a value."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        below = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {}
        flat.update(below or {f"{prefix}{key}": value})
    return flat

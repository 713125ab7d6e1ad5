"""What the 128-epoch ImageNet run would take on 1, 8 and 64 GPUs: a prediction, every part of it named.

    python benchmarks/scale.py                       # write results/scale/scale.md and scale.json
    python benchmarks/scale.py --set price=1.5       # with another assumption, printed only
    python benchmarks/scale.py --measure IMAGENET    # count and measure anew; a folder with train/<class>/*

Nothing here has run on a GPU. ``measured.json`` holds what was counted on the network itself (the same on any machine)
and the seconds a CPU core takes for an image; every other number is an assumption, and is listed with its source.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import adq
from adq.convert import quantized_layers

RESULTS = Path(__file__).parent / "results"
OUTPUT = RESULTS / "scale"
BENCH = RESULTS / "cpu-epyc-2-threads" / "bench.json"
SIDE, CLASSES = 224, 1000
STUDENT, TEACHER, YARDSTICK = "resnet18", "resnet101", "resnet50"
GPUS = (1, 8, 64)
BATCH = 256
COMPUTE, ALL_REDUCE, LAUNCHES, DATA = "compute", "all-reduce", "launches", "data loading"
BUCKET = 25 * 2**20
"""Bytes of gradients that DDP reduces at once, by default."""
NVIDIA = "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md"


def _assumed(value: float, what: str) -> Any:
    return field(default=value, metadata={"what": what})


@dataclass(frozen=True)
class Assumptions:
    """Everything that was not measured; bytes, seconds, rates a second."""

    yardstick_rate: float = _assumed(
        2470.0, f"images a second of a ResNet-50 training in mixed precision on one A100 80GB ({NVIDIA})"
    )
    memory_rate: float = _assumed(2.039e12, "bytes a second of an A100 80GB's memory (data sheet)")
    memory_share: float = _assumed(0.6, "share of that rate which adq's Triton kernels reach (not measured)")
    launch: float = _assumed(
        5e-6, "seconds from one operator to the next when each is launched by itself (not measured)"
    )
    memory: float = _assumed(80e9, "bytes of memory of a GPU")
    workspace: float = _assumed(2e9, "bytes for context, workspaces of convolutions and fragmentation")
    cores: float = _assumed(16.0, "CPU cores a GPU (DGX A100: 128 for 8)")
    decode_scale: float = _assumed(
        4.0, "how much longer an original image takes to decode: 108 kB on average (138 GB for all), the sample's 27 kB"
    )
    gpus_a_node: float = _assumed(8.0, "GPUs a node")
    node_bus: float = _assumed(230e9, "bus bandwidth of an all-reduce within a node (NVSwitch)")
    network_bus: float = _assumed(40e9, "bus bandwidth of an all-reduce across nodes (400 Gb/s a node, 80 % of it)")
    hop: float = _assumed(5e-6, "seconds of latency of each of the 2 (N - 1) steps of a ring, for each bucket")
    price: float = _assumed(2.0, "dollars an hour of a GPU")
    epochs: float = _assumed(128.0, "epochs of the recipe")
    train_images: float = _assumed(1_281_167.0, "training images of ImageNet")
    test_images: float = _assumed(50_000.0, "validation images, evaluated after every epoch")


@dataclass(frozen=True)
class Measured:
    """What was counted or measured; multiply-accumulates (MACs) are those of a forward pass of one image."""

    student_macs: int
    teacher_macs: int
    yardstick_macs: int
    student_parameters: int
    teacher_parameters: int
    quantized_elements: int
    quantizer_bytes: int
    saved_bytes: int
    saved_bytes_float: int
    student_operators: int
    student_operators_float: int
    teacher_operators: int
    decode_seconds: float
    augment_seconds: float


MEANING = {
    "student_macs": "MACs of a ResNet-18",
    "teacher_macs": "MACs of a ResNet-101",
    "yardstick_macs": "MACs of a ResNet-50",
    "student_parameters": "parameters of a ResNet-18",
    "teacher_parameters": "parameters of a ResNet-101",
    "quantized_elements": "activations that adq quantizes in an image's forward pass",
    "quantizer_bytes": "bytes of codebooks, EMA, scales and thresholds at 3 bits",
    "saved_bytes": "bytes an image keeps for the backward pass, bf16 autocast, quantized",
    "saved_bytes_float": "the same in float",
    "student_operators": "operators of a training step (forward, backward, AdamW), views left out, quantized",
    "student_operators_float": "the same in float",
    "teacher_operators": "operators of the teacher's forward pass",
    "decode_seconds": "CPU seconds to decode an image of 256 pixels on the shorter side (27 kB)",
    "augment_seconds": "CPU seconds to crop, resize to 224, mirror, normalise and collate it",
}


# ---- counting and measuring --------------------------------------------------------------------------


def _macs(name: str) -> int:
    """Multiply-accumulates of the forward pass of one image."""
    with torch.device("meta"):
        model = adq.create_model(name, CLASSES).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, SIDE, SIDE))
    return counter.get_total_flops() // 2


class _Operators(TorchDispatchMode):
    """Counts the operators that compute, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not function.is_view and "detach" not in function.name()
        return function(*args, **(kwargs or {}))


def _student(quantized: bool) -> nn.Module:
    torch.manual_seed(0)
    model = adq.create_model(STUDENT, CLASSES)
    if quantized:
        adq.quantize_(model, adq.ADQConfig(adq.WeightConfig(bits=3), adq.ActivationConfig(bits=3)))
        adq.calibrate_(model, [torch.randn(2, 3, SIDE, SIDE)], batch_norm=False)
    return model.to(memory_format=torch.channels_last).train()


def _saved_bytes(model: nn.Module, images: int) -> int:
    """Bytes that autograd keeps for the backward pass under bfloat16 autocast, parameters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that the address is not used again
        return tensor

    x = torch.randn(images, 3, SIDE, SIDE).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", torch.bfloat16):
        loss = model(x).sum()
    total = sum(size for size, _ in kept.values())
    loss.backward()
    return total


def _operators(model: nn.Module, training: bool) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    x = torch.randn(2, 3, 64, 64)

    def step() -> None:
        loss = F.cross_entropy(model(x), torch.zeros(2, dtype=torch.long))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    if training:
        step()
        with _Operators() as counter:
            step()
    else:
        with torch.no_grad(), _Operators() as counter:
            model.eval()(x)
    return counter.count


def _image_seconds(root: Path, images: int = 200, rounds: int = 7) -> tuple[float, float]:
    """CPU seconds of one core to decode an image, and for the rest: the least of some rounds each."""
    from PIL import Image

    from adq.train.data import DataConfig, build_data

    torch.set_num_threads(1)
    data = build_data(DataConfig("imagefolder", root, image_size=SIDE, batch_size=64, in_memory=False, workers=0))
    paths: Any = data.train.dataset.files.paths[:images]
    decode, whole = [], []
    for _ in range(rounds):
        start = time.process_time()
        for path in paths:
            Image.open(path).convert("RGB")
        middle = time.process_time()
        seen = sum(len(labels) for _, labels in data.train)
        whole.append((time.process_time() - middle) / seen)
        decode.append((middle - start) / images)
    return min(decode), min(whole) - min(decode)


def _quantized_elements(model: nn.Module) -> int:
    elements: list[int] = []
    hooks = [
        layer.input_quantizer.register_forward_pre_hook(lambda _, args: elements.append(args[0].numel()))
        for layer in quantized_layers(model).values()
    ]
    with torch.no_grad():
        model.eval()(torch.randn(1, 3, SIDE, SIDE))
    for hook in hooks:
        hook.remove()
    model.train()
    return sum(elements)


def measure(root: Path) -> Measured:
    """Count and measure on this machine, a quarter of a minute."""
    model, in_float, teacher = _student(True), _student(False), adq.create_model(TEACHER, CLASSES)
    decode, augment = _image_seconds(root)
    return Measured(
        student_macs=_macs(STUDENT),
        teacher_macs=_macs(TEACHER),
        yardstick_macs=_macs(YARDSTICK),
        student_parameters=sum(p.numel() for p in in_float.parameters()),
        teacher_parameters=sum(p.numel() for p in teacher.parameters()),
        quantized_elements=_quantized_elements(model),
        quantizer_bytes=sum(t.nbytes for key, t in model.state_dict().items() if "_quantizer." in key),
        saved_bytes=_saved_bytes(model, 3) - _saved_bytes(model, 2),
        saved_bytes_float=_saved_bytes(in_float, 3) - _saved_bytes(in_float, 2),
        student_operators=_operators(model, training=True),
        student_operators_float=_operators(in_float, training=True),
        teacher_operators=_operators(teacher, training=False),
        decode_seconds=decode,
        augment_seconds=augment,
    )


# ---- the prediction ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """One row: seconds of each term of a step on each GPU, and what the run comes to."""

    gpus: int
    batch: int
    files: str
    student: float
    teacher: float
    adq: float
    all_reduce: float
    exposed: float
    launches: float
    data: float
    step: float
    bound: str
    cores_needed: float
    hours: float
    gpu_hours: float
    dollars: float

    @property
    def work(self) -> float:
        """What the GPU computes in a step."""
        return self.student + self.teacher + self.adq

    def load(self, term: str) -> float:
        """A term over the GPU's work."""
        return {COMPUTE: self.work, ALL_REDUCE: self.exposed, LAUNCHES: self.launches, DATA: self.data}[
            term
        ] / self.work

    def runner_up(self) -> str:
        """The largest of the terms that are not the GPU's work."""
        return max((ALL_REDUCE, LAUNCHES, DATA), key=self.load)


def predict(m: Measured, a: Assumptions, gpus: int, batch: int, files: str) -> Prediction:
    """Predict a run with ``batch`` images a GPU from ``"original"`` or ``"resized"`` files."""
    flops = 6 * m.yardstick_macs * a.yardstick_rate  # a second: forward and twice that backward, 2 a MAC
    bytes_rate = a.memory_share * a.memory_rate
    student, teacher = 6 * m.student_macs * batch / flops, 2 * m.teacher_macs * batch / flops
    weights = 12 * m.student_parameters  # float32: read and written before the pass, read after the step
    adq_time = (10 * m.quantized_elements * batch + weights) / bytes_rate  # bf16: 4 bytes forward, 6 backward
    gradients = 4 * m.student_parameters
    bus = a.node_bus if gpus <= a.gpus_a_node else a.network_bus
    ring = 2 * (gpus - 1)
    all_reduce = ring / gpus * gradients / bus + ring * a.hop * math.ceil(gradients / BUCKET)
    exposed = max(0.0, all_reduce - student * 2 / 3)  # DDP hides it behind the backward pass
    launches = a.launch * (m.student_operators + m.teacher_operators)
    image = m.decode_seconds * (a.decode_scale if files == "original" else 1.0) + m.augment_seconds
    data = image * batch / a.cores
    device = student + teacher + adq_time + exposed
    step = max(device, launches, data)
    bound = {data: DATA, launches: LAUNCHES, device: ALL_REDUCE if exposed > device / 2 else COMPUTE}[step]
    steps = a.train_images // (gpus * batch)
    forward = (2 * m.student_macs / flops + 4 * m.quantized_elements / bytes_rate) * a.test_images / gpus
    evaluation = max(forward, image * a.test_images / gpus / a.cores)
    hours = a.epochs * (steps * step + evaluation) / 3600
    return Prediction(
        gpus=gpus,
        batch=batch,
        files=files,
        student=student,
        teacher=teacher,
        adq=adq_time,
        all_reduce=all_reduce,
        exposed=exposed,
        launches=launches,
        data=data,
        step=step,
        bound=bound,
        cores_needed=a.cores * data / max(device, launches),
        hours=hours,
        gpu_hours=hours * gpus,
        dollars=hours * gpus * a.price,
    )


def predictions(m: Measured, a: Assumptions) -> list[Prediction]:
    """256 images a GPU, and 256 over all GPUs as the recipe has it; from resized and from original files."""
    batches = [(gpus, BATCH) for gpus in GPUS] + [(gpus, BATCH // gpus) for gpus in GPUS[1:]]
    return [predict(m, a, gpus, batch, files) for files in ("resized", "original") for gpus, batch in batches]


def memory(m: Measured, a: Assumptions, batch: int = BATCH) -> dict[str, float]:
    """Bytes on a GPU, by what they are for."""
    p, t = m.student_parameters, m.teacher_parameters
    return {
        "weights, gradients and AdamW's two moments, float32": 16 * p,
        "gradient buckets of DDP": 4 * p,
        "quantized weights of a pass, float32 and bf16": 6 * p,
        "codebooks, EMA, scales and thresholds": m.quantizer_bytes,
        "teacher, float32 and bf16": 6 * t,
        f"kept for the backward pass, {batch} images": m.saved_bytes * batch,
        "context and workspaces": a.workspace,
    }


# ---- the page ----------------------------------------------------------------------------------------


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]


def _row(p: Prediction) -> list[str]:
    times = [p.student, p.teacher, p.adq, p.exposed, p.launches, p.data, p.step]
    return [
        f"{p.gpus} x {p.batch}",
        *(f"{1e3 * seconds:.2f}" for seconds in times),
        p.bound,
        f"{p.cores_needed:.0f}",
        f"{p.hours:.1f}",
        f"{p.gpu_hours:,.0f}",
        f"{p.dollars:,.0f}",
    ]


HEADER = [
    "GPUs x images",
    "student",
    "teacher",
    "adq",
    "all-reduce, exposed",
    "launches",
    "data",
    "step",
    "bound by",
    "cores a GPU needed",
    "hours",
    "GPU hours",
    "dollars",
]
FORMULA = """\
    F          = 6 M(ResNet-50) r                      FLOP/s reached, from the published rate r
    student    = 6 M B / F                             B images a GPU, forward and backward
    teacher    = 2 M(ResNet-101) B / F                 forward alone
    adq        = (10 E B + 12 P) / (s m)               E quantized activations, P parameters, m memory rate, s its share
    all-reduce = 2 (N-1)/N 4 P / bus + 2 (N-1) hop ceil(4 P / 25 MiB)
    exposed    = max(0, all-reduce - 2/3 student)      DDP reduces while the backward pass runs
    launches   = operators x launch                    of student and teacher, one by one (no torch.compile)
    data       = seconds an image x B / cores
    step       = max(student + teacher + adq + exposed, launches, data)
    run        = epochs x (floor(images / (N B)) step + evaluation);  dollars = hours x N x price
"""


def _ratio(bits: int) -> float:
    """Measured on a CPU: a quantized training step over the float one, ResNet-20."""
    figures = json.loads(BENCH.read_text())["figures"]
    return next(f["value"] for f in figures if f["part"] == "step" and f["contender"] == f"adq, {bits} bits")


def verdict(m: Measured, a: Assumptions, rows: list[Prediction]) -> list[str]:
    """What the rows say, as sentences; which term breaks first is computed."""
    by = {(p.gpus, p.batch, p.files): p for p in rows}
    one, last, resized = by[1, BATCH, "original"], by[GPUS[-1], BATCH, "original"], by[1, BATCH, "resized"]
    spread = [by[gpus, BATCH // gpus, "resized"] for gpus in GPUS]
    nearest, small = one.runner_up(), spread[-1]
    broken = next((p for p in spread if p.bound != COMPUTE), None)
    breaks = "nothing breaks."
    if broken is not None:
        breaks = (
            f"{broken.bound} breaks first, on {broken.gpus} GPUs of {broken.batch} images: a step takes "
            f"{1e3 * broken.step:.1f} ms for {1e3 * broken.work:.1f} ms of work, and the run {broken.gpu_hours:.0f} "
            f"GPU hours where one GPU takes {resized.gpu_hours:.0f}."
        )
    more = m.student_operators - m.student_operators_float
    found = [
        f"With {BATCH} images a GPU a step is bound by {one.bound} on one GPU, by {last.bound} on {last.gpus}. The "
        f"nearest other term is {nearest}, {one.load(nearest):.2f} of the GPU's own work from original files. With "
        f"fewer than {math.ceil(one.cores_needed)} cores a GPU, or a GPU {1 / one.load(DATA):.1f} times as fast, data "
        f"loading breaks first; files resized once to 256 pixels need {math.ceil(resized.cores_needed)} cores.",
        f"With {BATCH} images over all GPUs, which the recipe's learning rate is for, {breaks} More images a GPU "
        "avoid it; the learning rate must follow, and what that does to accuracy has not been tried.",
        f"Communication: {4 * m.student_parameters / 1e6:.1f} MB of gradients a step, {1e3 * last.all_reduce:.1f} ms "
        f"on {last.gpus} GPUs; not hidden are {1e3 * last.exposed:.1f} of them at {BATCH} images a GPU, and "
        f"{1e3 * small.exposed:.1f} at {small.batch}. adq adds none under DDP: replicas hold the same weights, hence "
        "the same codebooks (the tests hold them to the bit).",
        f"The teacher costs {one.teacher / one.student:.2f} times what the student does.",
        f"adq adds {one.adq / one.student:.1%} to the student's part of a step by the bytes that its kernels move, at "
        f"an assumed rate; {_ratio(3) - 1:.1%} were measured on a CPU (ResNet-20, 3 bits, float32, "
        f"`{BENCH.parent.name}/bench.json`). It launches {more} operators more a step, {1e3 * a.launch * more:.1f} ms "
        "where launches are the bound. Neither grows with the number of GPUs.",
    ]
    return [f"- {sentence}" for sentence in found]


def page(m: Measured, a: Assumptions) -> str:
    """The prediction as Markdown."""
    rows = predictions(m, a)
    parts = memory(m, a)
    total = sum(parts.values())
    lines = [
        "# ImageNet on 1, 8 and 64 GPUs, predicted",
        "",
        "ResNet-18, 128 epochs, distilled from a ResNet-101, bf16 (`adq train --config imagenet-resnet18`). Written by "
        "`python benchmarks/scale.py`. **No GPU was at hand: nothing of this has been run.** Counts are exact, the "
        "seconds of an image were measured on one CPU core beside other work, all else is assumed; both are listed.",
        "",
        *verdict(m, a, rows),
        "",
        "## Time and money",
        "",
        "Milliseconds a step on each GPU; `256` images a GPU, or 256 over all of them, which the recipe's learning "
        "rate is for.",
    ]
    for files in ("resized", "original"):
        lines += ["", f"From {files} files:", "", *_table(HEADER, [_row(p) for p in rows if p.files == files])]
    lines += ["", "## Formula", "", FORMULA.strip("\n"), "", "## Memory of a GPU", ""]
    lines += _table(["", "MB"], [[name, f"{size / 1e6:,.1f}"] for name, size in parts.items()])
    kept = f"{m.saved_bytes / 1e6:.1f} MB an image, {m.saved_bytes_float / 1e6:.1f} in float"
    lines += [
        "",
        f"Together {total / 1e9:.1f} GB of {a.memory / 1e9:.0f}. What is kept for the backward pass: {kept}. An "
        "activation quantizer keeps its input and nothing per threshold; the layer keeps the quantized one.",
    ]
    lines += ["", "## Counted and measured", ""]
    lines += _table(
        ["", "value"], [[MEANING[k], f"{v:,.4g}" if isinstance(v, float) else f"{v:,}"] for k, v in asdict(m).items()]
    )
    lines += ["", "## Assumed", ""]
    names = {item.name: item.metadata["what"] for item in fields(a)}
    lines += _table(["name", "value", "what"], [[f"`{k}`", f"{v:,.7g}", names[k]] for k, v in asdict(a).items()])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, metavar="IMAGENET", help="count and measure anew")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    options = parser.parse_args()
    if options.measure:
        OUTPUT.mkdir(exist_ok=True)
        (OUTPUT / "measured.json").write_text(json.dumps(asdict(measure(options.measure)), indent=1) + "\n")
    measured = Measured(**json.loads((OUTPUT / "measured.json").read_text()))
    changes = {name: float(value) for name, _, value in (text.partition("=") for text in options.set)}
    assumptions = replace(Assumptions(), **changes)
    text = page(measured, assumptions)
    if changes:
        print(text)
        return
    (OUTPUT / "scale.md").write_text(text)
    content = {"measured": asdict(measured), "assumed": asdict(assumptions), "memory": memory(measured, assumptions)}
    content["predictions"] = [asdict(p) for p in predictions(measured, assumptions)]
    (OUTPUT / "scale.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"{OUTPUT / 'scale.md'}, {OUTPUT / 'scale.json'}")


if __name__ == "__main__":
    main()

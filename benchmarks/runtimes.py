"""One network in every form it ships in: bytes, and whether each form gives the answers of the model.

    python benchmarks/runtimes.py --root cifar10 --weights resnet20-cifar10.safetensors --output DIR

A ResNet-20 at 3-bit weights and activations (8 at the ends), calibrated and not trained, on images of the test set; and
a ResNet-18 with random weights, of which only the bytes say something. Writes ``runtimes.json`` and ``table.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import adq
from adq.bench.environment import environment
from adq.parity import ExportReport, compare
from adq.store import write_text
from adq.train.config import resolve
from adq.train.data import build_data

WEIGHTS = {
    "float codebook": adq.WeightConfig(bits=3),
    "int8 grid": adq.WeightConfig(bits=3, snap="int8"),
}
Batches = list[tuple[Tensor, ...]]


def save_packed(model: nn.Module, path: Path, example: Tensor, batches: Batches | None, images: int) -> ExportReport:
    """The model file, as it is loaded again."""
    adq.save(model, path, packed=True)
    loaded = adq.load(path)
    parity = None if batches is None else compare(model, loaded, 1, "adq.load", batches, images)
    return ExportReport.of(model, path, path.stat().st_size, parity)


def to_integer(model: nn.Module, path: Path, example: Tensor, batches: Batches | None, images: int) -> ExportReport:
    """Not a file: the tensors of the model that computes with integers."""
    integer = adq.to_integer(model, example)
    size = sum(tensor.nbytes for tensor in integer.state_dict().values())
    parity = None if batches is None else compare(model, integer, 1, "adq.to_integer", batches, images)
    return ExportReport.of(model, path, size, parity)


def export_coreml(model: nn.Module, path: Path, example: Tensor, batches: Batches | None, images: int) -> ExportReport:
    """A package that has not run: it is made where Core ML is not."""
    return adq.export_coreml(model, path, example)


def export_executorch(
    model: nn.Module, path: Path, example: Tensor, batches: Batches | None, images: int
) -> ExportReport:
    """On a tenth of the images: kernels for every machine take long for each."""
    return adq.export_executorch(model, path, example, batches, images // 10)


FORMS: dict[str, tuple[str, Callable[..., ExportReport]]] = {
    "packed": (".safetensors", save_packed),
    "to_integer": ("", to_integer),
    "onnx": (".onnx", adq.export_onnx),
    "torch": (".pt2", adq.export_program),
    "aoti": (".pt2", adq.export_aoti),
    "executorch": (".pte", export_executorch),
    "coreml": (".mlpackage", export_coreml),
}


def resnet20(weights: Path, data: Any, weight: adq.WeightConfig) -> nn.Module:
    """Calibrated on the images that the recipe names for it."""
    model = adq.create_model("resnet20", data.num_classes)
    adq.load_float_weights(model, weights)
    adq.quantize_(model, adq.ADQConfig(weight, adq.ActivationConfig(bits=3)))
    return adq.calibrate_(model, islice(data.calibration, 8)).eval()


def resnet18(weight: adq.WeightConfig) -> nn.Module:
    """Random, calibrated on noise."""
    torch.manual_seed(0)
    model = adq.quantize_(adq.create_model("resnet18"), adq.ADQConfig(weight, adq.ActivationConfig(bits=3)))
    return adq.calibrate_(model, [torch.randn(8, 3, 64, 64)]).eval()


def measure(model: nn.Module, example: Tensor, batches: Batches | None, images: int) -> Iterator[dict[str, Any]]:
    """A row for each form of a model; a refusal is a row too."""
    for form, (suffix, export) in FORMS.items():
        with TemporaryDirectory() as folder:
            try:
                report = export(model, Path(folder) / f"model{suffix}", example, batches, images)
            except (ValueError, ImportError) as error:
                yield {"form": form, "refused": str(error).removeprefix("adq: ")}
                continue
        parity = None if report.parity is None else asdict(report.parity)
        sizes = {name: getattr(report, name) for name in ("bytes", "bytes_float", "bytes_packed")}
        yield {"form": form, **sizes, "parity": parity, "notes": report.notes}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = ["| model | weights | form | bytes | of float | parity |", "|---|---|---|---|---|---|"]
    for row in rows:
        head = f"| {row['model']} | {row['weights']} | {row['form']} |"
        if "refused" in row:
            lines.append(f"{head} refused | | {row['refused'].split(';')[0]} |")
            continue
        parity = row["parity"]
        text = "" if parity is None else f"{parity['images']:,} images, {parity['undecided']} left out, "
        text += "not run" if parity is None else f"largest difference {parity['max_difference']:.3g}"
        lines.append(f"{head} {row['bytes']:,} | {row['bytes'] / row['bytes_float']:.3f} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="CIFAR-10 as folders of images, train and test")
    parser.add_argument("--weights", required=True, type=Path, help="float weights of the ResNet-20")
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--images", type=int, default=1000)
    arguments = parser.parse_args()
    data = build_data(resolve("cifar10", [{"data": {"name": "imagefolder", "root": arguments.root}}]).data)
    batches = [tuple(batch) for batch in islice(data.test, 1 + 3 * arguments.images // data.test.batch_size)]
    small, large = torch.zeros(1, *data.input_shape), torch.zeros(1, 3, 64, 64)
    rows = []
    for name, weight in WEIGHTS.items():
        models = {
            "resnet20": (resnet20(arguments.weights, data, weight), small, batches),
            "resnet18": (resnet18(weight), large, None),
        }
        for model, (network, example, images) in models.items():
            for row in measure(network, example, images, arguments.images):
                rows.append({"model": model, "weights": name, **row})
                print(table(rows[-1:]).splitlines()[-1], flush=True)
    results = {"environment": environment(torch.device("cpu")), "rows": rows}
    write_text(arguments.output / "runtimes.json", json.dumps(results, indent=1) + "\n")
    write_text(arguments.output / "table.md", table(rows))


if __name__ == "__main__":
    main()

"""The command line: ``adq train | ablate | eval | report | sensitivity | export | bench | info``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer

from adq.__main__ import info as describe_backends
from adq.coreml import export_coreml
from adq.executorch import export_executorch
from adq.onnx import export_onnx
from adq.parity import ExportReport
from adq.program import export_aoti, export_program
from adq.train.config import RunConfig, flatten, merge, parse_assignment, recipe_names, resolve

app = typer.Typer(
    no_args_is_help=False,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantization-aware training with adaptive codebooks and mixed precision.",
)

EXPORTS: dict[str, Callable[..., ExportReport]] = {
    "onnx": export_onnx,
    "torch": export_program,
    "aoti": export_aoti,
    "executorch": export_executorch,
    "coreml": export_coreml,
}
"""What ``adq export --to`` writes for runtimes."""
CHECKED = 1000
DEVICE = "engine.device"

Set = Annotated[
    list[str] | None, typer.Option("--set", help="Any field of the configuration, KEY=VALUE, e.g. qat.lr=0.01.")
]
Config = Annotated[
    str | None, typer.Option("--config", help=f"A YAML file or a recipe: {', '.join(recipe_names())}. Default: digits.")
]
DataName = Annotated[str | None, typer.Option("--data", help="digits, imagefolder, cifar10, imagenet or webdataset.")]
Root = Annotated[str | None, typer.Option("--root", help="Folder of the images.")]


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What a person can mend is told in one line; ADQ_DEBUG=1 shows where it came from."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("ADQ_DEBUG"):
            raise
        from adq.train.together import ProcessLost, TrainingStopped

        text = str(error)
        if not (isinstance(error, TrainingStopped) and os.environ.get("RANK", "0") != "0"):  # the first says it
            typer.echo(f"error: {text.removeprefix('adq: ')}", err=True)
        if isinstance(error, ProcessLost):
            sys.stdout.flush()
            os._exit(1)  # to shut the process groups down would be to wait for the lost one
        raise typer.Exit(1) from error
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()  # torch aborts a process that ends with it


def _nested(**values: Any) -> dict[str, Any]:
    """``a__b=value`` as ``{a: {b: value}}``, without those that are None."""
    nested: dict[str, Any] = {}
    for path, value in values.items():
        if value is not None:
            nested = merge(nested, parse_assignment_value(path.split("__"), value))
    return nested


def _changes(set_: list[str] | None, **values: Any) -> dict[str, Any]:
    """What a command line changes: its options, as :func:`_nested` takes them, and what ``--set`` says over them."""
    return reduce(merge, map(parse_assignment, set_ or []), _nested(**values))


def _refuse(where: str, **options: Any) -> None:
    """Raise ValueError that names which of these options are given, where none of them does anything."""
    given = [f"--{name.rstrip('_').replace('_', '-')}" for name, value in options.items() if value]
    if given:
        raise ValueError(f"{where} takes no {', '.join(given)}")


def _refuse_changes(where: str, changes: dict[str, Any], does: Callable[[str], bool]) -> None:
    """Raise ValueError that names the fields of the configuration which are changed where they do nothing."""
    if idle := [key for key in flatten(changes) if not does(key)]:
        raise ValueError(f"{where}, and takes no {', '.join(idle)}")


def parse_assignment_value(path: list[str], value: Any) -> dict[str, Any]:
    """One value as a nested mapping."""
    for key in reversed(path):
        value = {key: value}
    return value


@app.callback(invoke_without_command=True)
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(describe_backends())
        typer.echo("commands: train, ablate, eval, report, sensitivity, export, bench, info; adq COMMAND --help")


@app.command()
def train(
    config: Config = None,
    data: DataName = None,
    root: Root = None,
    model: Annotated[
        str | None, typer.Option(help="Architecture: digits_cnn, resnet20, a torchvision or timm name.")
    ] = None,
    weights: Annotated[str | None, typer.Option(help="Float weights to start from.")] = None,
    weight_bits: Annotated[float | None, typer.Option(help="Average weight bits over the quantized layers.")] = None,
    activation_bits: Annotated[int | None, typer.Option(help="Bits of activations.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of quantization-aware training.")] = None,
    float_epochs: Annotated[int | None, typer.Option(help="Epochs of float training, without --weights.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per batch and process.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of quantization-aware training.")] = None,
    workers: Annotated[int | None, typer.Option(help="Loader processes.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    output: Annotated[
        str | None, typer.Option(help="Run folder. Default: runs/DATA-MODEL, the first that is free.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu.")] = None,
    mixed_precision: Annotated[str | None, typer.Option(help="no, bf16 or fp16.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's last checkpoint.")] = False,
    set_: Set = None,
) -> None:
    """Float network, calibration, sensitivity, allocation, QAT, evaluation: the whole job."""
    with _plain_errors():
        changes = _changes(
            set_,
            data__name=data,
            data__root=root,
            model__name=model,
            model__weights=weights,
            allocation__weight_bits=weight_bits,
            quantization__activation__bits=activation_bits,
            qat__epochs=epochs,
            float__epochs=float_epochs,
            data__batch_size=batch_size,
            qat__lr=lr,
            data__workers=workers,
            seed=seed,
            output=output,
            engine__device=device,
            engine__mixed_precision=mixed_precision,
        )
        resolved = resolve(config, [changes])
        from adq.train.run import Run

        Run(resolved, resume=resume).execute()


@app.command("ablate")
def ablate_(
    config: Annotated[str, typer.Option("--config", help="The ablation: a base, and rows that change it (YAML).")],
    output: Annotated[Path, typer.Option(help="Folder of the runs, the table and the figures.")],
    root: Root = None,
    weights: Annotated[str | None, typer.Option(help="Float weights that every row starts from.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, comma-separated. Default: those of the file.")] = None,
    only: Annotated[
        str | None, typer.Option(help="Only rows whose name holds this, or else matches it as a regular expression.")
    ] = None,
    report: Annotated[bool, typer.Option("--report", help="Only write the table and the figures anew.")] = False,
    set_: Set = None,
) -> None:
    """Many runs of one recipe, each with something changed, as a table. Started several times, they share the work."""
    with _plain_errors():
        from adq.train.ablate import ablate, parse_seeds, report_only

        if report:
            _refuse(
                "--report reads what has been run, and", root=root, weights=weights, seeds=seeds, only=only, set_=set_
            )
            report_only(config, output)
            failed = 0
        else:
            changes = _changes(set_, data__root=root, model__weights=weights)
            failed = ablate(config, output, [changes], parse_seeds(seeds) if seeds else None, only)
    typer.echo(f"{output / 'table.md'}" + (f"; {failed} failed" if failed else ""))
    if failed:
        raise typer.Exit(1)


@app.command("eval")
def evaluate_(
    model: Annotated[Path, typer.Argument(help="A model file of adq, or a run folder.")],
    data: DataName = None,
    root: Root = None,
    config: Config = None,
    integer: Annotated[bool, typer.Option("--integer", help="Compute with integers, as adq.to_integer does.")] = False,
    set_: Set = None,
) -> None:
    """Top-1 of a saved quantized model."""
    with _plain_errors():
        from accelerate import Accelerator

        from adq.artifact import load, model_file
        from adq.distributed import share
        from adq.integer import to_integer
        from adq.summary import summary
        from adq.train.data import build_data, check_classes, check_input
        from adq.train.engine import evaluate

        file = model_file(model)
        recipe = config or (str(model / "config.yaml") if model.is_dir() else None)
        changes = _changes(set_, data__name=data, data__root=root)
        if recipe is None and data is None:
            raise ValueError("no images to evaluate on: give a run folder, --data or --config")
        resolved = resolve(recipe, [changes])
        _refuse_changes(
            "adq eval runs the model as it is saved, in float32", changes, lambda key: _of_data(key) or key == DEVICE
        )
        network = load(file)
        bundle = build_data(resolved.data)
        check_classes(network, bundle)
        check_input(network, bundle, str(file))
        accelerator = Accelerator(cpu=resolved.engine.device == "cpu")
        report = summary(network)
        if integer:
            network = to_integer(network, torch.zeros(2, *bundle.input_shape))
            typer.echo(network.adq_integer)
        loss, top1 = evaluate(network.to(accelerator.device), share(bundle.test))
        typer.echo(
            f"{file}: top-1 {top1:.2f}, loss {loss:.4f}, {report.average_bits_quantized:.3f} bits over the quantized "
            f"layers, {report.average_bits_network:.3f} over the whole network"
        )


@app.command("report")
def report_(
    model: Annotated[Path, typer.Argument(help="A model file of adq, or a run folder.")],
    output: Annotated[
        Path | None, typer.Argument(help="File to write. Default: report.html in the folder, or MODEL.html.")
    ] = None,
) -> None:
    """Write one HTML file that shows a saved quantized model, layer by layer."""
    with _plain_errors():
        from adq.report import report_saved

        typer.echo(report_saved(model, output))


@app.command("sensitivity")
def sensitivity_(
    config: Config = None,
    data: DataName = None,
    root: Root = None,
    model: Annotated[str | None, typer.Option(help="Architecture.")] = None,
    weights: Annotated[str | None, typer.Option(help="Float weights.")] = None,
    weight_bits: Annotated[float | None, typer.Option(help="Also allocate for this average.")] = None,
    estimator: Annotated[str | None, typer.Option(help="fisher, true_fisher, hessian, loss or kl.")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the table (YAML) here; default: standard output.")] = None,
    allocation: Annotated[Path | None, typer.Option(help="Write the allocation (YAML) here.")] = None,
    study: Annotated[
        Path | None, typer.Option(help="Instead measure how far each estimator can be trusted; folder to write to.")
    ] = None,
    trained: Annotated[
        list[Path] | None,
        typer.Option(help="Add this run folder to a finished --study: one of three or more, of other bits."),
    ] = None,
    set_: Set = None,
) -> None:
    """Score a float network's layers at each bit-width, and allocate bits."""
    with _plain_errors():
        if trained:
            given = (config, data, root, model, weights, weight_bits, estimator, output, allocation, set_)
            if study is None or any(value is not None for value in given):
                raise ValueError("--trained adds runs to a study that is there: it takes --study DIR and nothing else")
            from adq.train.study import markdown
            from adq.train.study_trained import add_trained

            typer.echo(f"{markdown(add_trained(study, trained))}\nwrote {study}")
            return
        from adq.train.score import score

        changes = _changes(
            set_,
            data__name=data,
            data__root=root,
            model__name=model,
            model__weights=weights,
            allocation__weight_bits=weight_bits,
            allocation__estimator=estimator,
        )
        resolved = resolve(config, [changes])
        if study is None:
            score(resolved, output, allocation, partial(typer.echo, nl=False))
            return
        if estimator or output or allocation:
            raise ValueError("--study measures every estimator; it takes no --estimator, --output or --allocation")
        from adq.train.study import markdown
        from adq.train.study import study as measure

        typer.echo(f"{markdown(measure(resolved, study, typer.echo))}\nwrote {study}")


@app.command()
def export(
    model: Annotated[Path, typer.Argument(help="A model file of adq, or a run folder.")],
    output: Annotated[Path, typer.Argument(help="File to write.")],
    to: Annotated[
        str,
        typer.Option(
            help="packed: codes of b bits, to ship; plain: float weights, to train on; "
            "onnx, torch (torch.export), aoti (AOTInductor, for this CPU), executorch, coreml: for a runtime."
        ),
    ] = "packed",
    fold_batch_norm: Annotated[
        bool, typer.Option("--fold-batch-norm", help="With --to packed: without batch norms that follow convolutions.")
    ] = False,
    data: DataName = None,
    root: Root = None,
    config: Config = None,
    images: Annotated[
        int | None, typer.Option(help=f"Images on which the runtime must give the same top-1. Default: {CHECKED}.")
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Write it unchecked; needs --shape.")] = False,
    shape: Annotated[str | None, typer.Option(help="With --no-check: shape of one input, e.g. 3,32,32.")] = None,
    set_: Set = None,
) -> None:
    """Write a saved model in another form; one for a runtime is checked on images of the run's data, or of --data."""
    with _plain_errors():
        from adq.artifact import load, model_file, save

        kinds = ("packed", "plain", *EXPORTS)
        if to not in kinds:
            raise ValueError(f"--to must be one of {', '.join(kinds)}, got {to!r}")
        if fold_batch_norm and to != "packed":
            raise ValueError(f"--fold-batch-norm is for --to packed, not {to}")
        if images is not None and images < 1:
            raise ValueError(f"--images must be at least 1, got {images}; --no-check writes it unchecked")
        of_check: dict[str, Any] = {"data": data, "root": root, "config": config, "images": images, "set_": set_}
        if to not in EXPORTS:
            _refuse(f"--to {to} has no runtime to check, and", **of_check, no_check=no_check, shape=shape)
        elif no_check:
            _refuse("--no-check", **of_check)
        else:
            _refuse(f"--to {to} is checked on images, whose shape it has, and without --no-check", shape=shape)
        if to == "coreml":
            _refuse("--to coreml is read back, and not run: it", images=images)
        file = model_file(model)
        if output.resolve() == file.resolve():
            raise ValueError(f"{output} is the model itself; choose another file to write")
        if to in EXPORTS:
            recipe = config or (str(model / "config.yaml") if model.is_dir() else None)
            changes = _changes(set_, data__name=data, data__root=root)
            if no_check:
                typer.echo(EXPORTS[to](load(file), output, torch.zeros(1, *_sides(shape))))
            elif recipe is None and data is None:
                raise ValueError(
                    f"no images to check --to {to} on: give a run folder, --data or --config, "
                    "or write it unchecked with --no-check"
                )
            else:
                resolved = resolve(recipe, [changes])
                _refuse_changes("adq export checks the model as it is saved", changes, _of_data)
                typer.echo(_checked(EXPORTS[to], file, output, resolved, images or CHECKED))
            return
        save(load(file), output, packed=to == "packed", fold_batch_norm=fold_batch_norm)
        typer.echo(f"{output}: {output.stat().st_size:,} bytes, from {file.stat().st_size:,}")


def _checked(
    export: Callable[..., ExportReport], file: Path, output: Path, config: RunConfig, images: int
) -> ExportReport:
    """Export a model file, checked on the test images, then on those for calibration."""
    from adq.artifact import load
    from adq.train.data import build_data, check_classes, check_input

    network, bundle = load(file), build_data(config.data)
    check_classes(network, bundle)
    check_input(network, bundle, str(file))
    example = torch.zeros(1, *bundle.input_shape)
    if export is export_coreml:  # it reads the package back; nothing here runs it
        return export(network, output, example)
    return export(network, output, example, chain(bundle.test, bundle.calibration), images)


def _of_data(key: str) -> bool:
    """Whether a field, dotted, says which images, and how they are read."""
    return key.partition(".")[0] == "data"


def _sides(shape: str | None) -> list[int]:
    try:
        return [int(side) for side in (shape or "").split(",")]
    except ValueError:
        raise ValueError(f"--no-check needs the shape of one input, e.g. --shape 3,32,32; got {shape!r}") from None


@app.command()
def bench(
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    only: Annotated[
        str | None,
        typer.Option(
            help="Parts, comma-separated: check, operators, peers, small, fit, network, layers, integer, linear, step, "
            "distributed."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the results. Default: runs/bench-DEVICE.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes: shows that everything runs.")] = False,
) -> None:
    """Correctness and speed of every operator, beside a copy and beside the alternatives."""
    with _plain_errors():
        from adq.bench.run import main

        main(device, only, output, quick, typer.echo)


@app.command()
def info() -> None:
    """Which backends loaded, and why another did not."""
    typer.echo(describe_backends())


if __name__ == "__main__":
    sys.exit(app())

"""``adq sensitivity``: the table and the allocation of a network, without training."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from adq.allocate import Allocation, Budget, allocate
from adq.config import dump_yaml
from adq.convert import quantize_
from adq.progressive import start_from_
from adq.sensitivity import SensitivityTable, reordered, sensitivity
from adq.store import check_writable, write_or_show
from adq.train.config import RunConfig
from adq.train.data import build_data
from adq.train.run import check_files, check_layers, float_network, start_network


def score(config: RunConfig, output: Path | None, allocation: Path | None, show: Callable[[str], object]) -> None:
    """Score, then allocate where a budget is given; each is written to its file, or shown if there is none.

    Scored is what ``adq train`` scores: the float network, or the ``start``.

    Raises:
        OSError: before anything is scored: a file cannot be written.
        FileNotFoundError: a file of the configuration is not there.
        ValueError: no float weights are given; they would be random; an allocation is asked for without a budget, or
            one is given; what :func:`adq.train.run.check_layers` refuses.
    """
    if config.model.weights is None:
        raise ValueError("adq: sensitivity needs trained float weights: --weights FILE")
    if allocation is not None and config.allocation.weight_bits is None:
        raise ValueError("adq: an allocation needs a budget: --weight-bits")
    if config.allocation.file is not None:
        raise ValueError("adq: sensitivity scores layers to allocate bits itself; it takes no allocation.file")
    check_files(config)
    data = build_data(config.data)
    model = float_network(config.model, data, config.engine.channels_last)
    check_layers(model, config)
    device = Accelerator(cpu=config.engine.device == "cpu").device
    start = start_network(config, model, data, device)
    quantize_(model, config.quantization)
    if start is not None:
        start_from_(model, start)
    model.to(device)
    chosen = config.allocation
    batches = islice(data.calibration, chosen.batches)
    check_writable(*(path for path in (output, allocation) if path is not None))
    table = sensitivity(model, batches, nn.functional.cross_entropy, chosen.bits, chosen.estimator)
    _hand_over(table, output, show)  # before anything is made of it
    if chosen.weight_bits is None:
        return
    if chosen.order != "ranked":
        table = reordered(table, chosen.order, config.seed)
    _hand_over(allocate(table, Budget(weight_bits=chosen.weight_bits)), allocation, show)


def _hand_over(result: SensitivityTable | Allocation, path: Path | None, show: Callable[[str], object]) -> None:
    """Show its YAML or, where that is written to a file, a line that says so."""
    text = dump_yaml(result.to_dict())
    if path is not None:
        write_or_show(path, text, show)
        text = f"wrote {path}\n"
    show(text)

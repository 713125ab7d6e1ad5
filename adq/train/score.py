"""``adq sensitivity``: the table and the allocation of a network, without training."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path

from accelerate import Accelerator
from torch import nn

from adq.allocate import Allocation, Budget, allocate
from adq.artifact import load
from adq.config import dump_yaml
from adq.convert import quantize_
from adq.progressive import start_from_
from adq.sensitivity import SensitivityTable, reordered, sensitivity
from adq.store import write_text
from adq.train.config import RunConfig
from adq.train.data import build_data
from adq.train.run import check_files, float_network


def score(config: RunConfig, output: Path | None, allocation: Path | None) -> str:
    """Score, allocate where a budget is given, write the files asked for; returns the text to show.

    Scored is what ``adq train`` scores: the float network, or the ``start``.

    Raises:
        FileNotFoundError: a file of the configuration is not there.
        ValueError: no float weights are given; they would be random; an allocation is asked for without a budget.
    """
    if config.model.weights is None:
        raise ValueError("adq: sensitivity needs trained float weights: --weights FILE")
    if allocation is not None and config.allocation.weight_bits is None:
        raise ValueError("adq: an allocation needs a budget: --weight-bits")
    check_files(config)
    data = build_data(config.data)
    model = float_network(config.model, data)
    start = None if config.start is None else load(config.start, copy.deepcopy(model))
    quantize_(model, config.quantization)
    if start is not None:
        start_from_(model, start)
    model.to(Accelerator(cpu=config.engine.device == "cpu").device)
    chosen = config.allocation
    batches = islice(data.calibration, chosen.batches)
    table = sensitivity(model, batches, nn.functional.cross_entropy, chosen.bits, chosen.estimator)
    texts = []
    for result, path in ((table, output), (_allocated(table, config), allocation)):
        text = dump_yaml(result.to_dict()) if result is not None else ""
        if path is not None and result is not None:
            write_text(path, text)
            texts.append(f"wrote {path}\n")
        else:
            texts.append(text)
    return "".join(texts)


def _allocated(table: SensitivityTable, config: RunConfig) -> Allocation | None:
    budget = config.allocation.weight_bits
    if budget is None:
        return None
    if config.allocation.order != "ranked":
        table = reordered(table, config.allocation.order, config.seed)
    return allocate(table, Budget(weight_bits=budget))

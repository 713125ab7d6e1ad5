"""torch.export of inference models: they round-trip bit for bit, with a free batch size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import images, quantized, train
from torch import Tensor, nn

import adq

BATCH = ({0: torch.export.Dim("batch")},)


@pytest.fixture
def model() -> nn.Module:
    return train(quantized()).eval()


def round_trip(model: nn.Module, x: Tensor, path: Path) -> torch.export.ExportedProgram:
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=BATCH), path)
    return torch.export.load(path)


@pytest.mark.parametrize("packed", [False, True])
def test_an_inference_model_is_exported_by_torch_itself(tmp_path, model, packed):
    model = adq.pack_(model) if packed else model
    program = round_trip(model, images(1, 2), tmp_path / "m.pt2")
    for count in (1, 2, 7):
        x = images(count, count)
        assert torch.equal(program.module()(x), model(x))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    weights = {"adq.codebook_decode.default"} if packed else {"adq.foreach_codebook_quantize.default"}
    assert {name for name in called if name.startswith("adq.")} == {"adq.threshold_quantize.default", *weights}

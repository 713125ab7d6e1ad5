"""The examples of other people's training loops: a plain one, Lightning, and the Hugging Face Trainer."""

from __future__ import annotations

import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import adq
from adq.convert import quantized_layers, weight_quantizers

pytest.importorskip("sklearn")

LOOPS = Path(__file__).parent / "loops"
NEEDS = {"plain_loop": "torch", "lightning_module": "lightning", "huggingface_trainer": "transformers"}


@pytest.fixture(params=NEEDS)
def script(request) -> str:
    if not find_spec(NEEDS[request.param]):
        pytest.skip(f"{NEEDS[request.param]} is not installed")
    return str(LOOPS / f"{request.param}.py")


@pytest.fixture
def optimizer_steps():
    """A list that grows by one with each step of any torch optimizer."""
    steps = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: steps.append(optimizer))
    yield steps
    hook.remove()


def test_an_example_trains_and_saves(script, tmp_path, monkeypatch, optimizer_steps):
    monkeypatch.setattr("sys.argv", [script, str(tmp_path)])
    ran = runpy.run_path(script, run_name="__main__")
    losses, model = ran["losses"], ran["model"]
    assert len(losses) == ran["EPOCHS"]
    assert losses[-1] < 0.2 * losses[0]
    assert len(optimizer_steps) == ran["EPOCHS"] * (1797 // 64 // 2)
    for layer, quantizer in weight_quantizers(model).values():
        assert int(quantizer.steps) == len(optimizer_steps), "a codebook follows once a step, accumulation or not"
        assert float((quantizer.ema_count.sum() - layer.weight.numel()).abs()) < 1e-3 * layer.weight.numel()
    saved = adq.load(tmp_path / "model.safetensors")
    images = torch.rand(16, 1, 8, 8)
    assert torch.equal(saved(images), model.eval()(images))
    assert len(quantized_layers(saved)) == 5


def test_a_checkpoint_of_the_loop_restores_everything(script, tmp_path):
    """Two epochs in one go, and in two calls, end with the same bits: weights, codebooks, EMA, thresholds."""
    train = runpy.run_path(script)["train"]
    states = []
    for name, ends in (("once", [2]), ("twice", [1, 2])):
        folder = tmp_path / name
        folder.mkdir()
        for epochs in ends:
            model, _ = train(folder, epochs)
        states.append(model.state_dict())
    once, twice = states
    assert once.keys() == twice.keys()
    assert [key for key in once if not torch.equal(once[key], twice[key])] == []

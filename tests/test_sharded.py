"""Weights that FSDP2 has sharded: codebooks, scales and learned quantizers as in one process; saved and resharded."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from processes import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial

import adq
from adq import ADQConfig, WeightConfig, sharded
from adq.distributed import world
from adq.sharded import shard_quantizers_

STEPS, GLOBAL_BATCH = 12, 8


class Net(nn.Module):
    """Rows that 2 and 4 processes share unevenly, one row for some of them, and channels along another dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 5, 3)
        self.block = nn.Sequential(nn.Conv2d(5, 6, 3), nn.Tanh(), nn.ConvTranspose2d(6, 5, 3))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(torch.tanh(self.stem(x))).mean((2, 3)))


def images(step: int) -> Tensor:
    return torch.randn(GLOBAL_BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step))


def quantized(**weight) -> nn.Module:
    torch.manual_seed(0)
    return adq.calibrate_(adq.quantize_(Net(), ADQConfig(weight=WeightConfig(**weight))), [images(0)])


def shard(model: nn.Module, hybrid: bool = False) -> nn.Module:
    """Over all processes, or with ``hybrid`` over pairs of them that hold the same."""
    mesh = init_device_mesh("cpu", (2, 2) if hybrid else (world()[1],), mesh_dim_names=("again", "parts")[not hybrid :])
    fully_shard(model.block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rank, size = world()
    for step in steps:
        optimizer.zero_grad()
        model(images(step)[rank::size]).square().mean().backward()
        optimizer.step()


def full_state(model: nn.Module) -> dict[str, Tensor]:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {key: value.clone() for key, value in state.items()} if state else {}


def trained(config: dict, hybrid: bool = False) -> dict:
    """The whole state after some steps, this process's buffers, and how often adq communicated."""
    model, reductions = quantized(**config), []
    if world()[1] > 1:
        shard(model, hybrid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    original = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (reductions.append(args[0].numel()), original(*args, **kwargs))[1]
    train(model, optimizer, range(STEPS))
    dist.all_reduce = original
    buffers = {key: value.clone() for key, value in model.named_buffers()}
    return {"state": full_state(model), "buffers": buffers, "reductions": reductions}


@pytest.mark.parametrize(
    "config",
    [
        {"ema_decay": 0.9},
        {"ema_decay": 0.9, "scale": "tensor", "snap": "int8"},
        {"update": "gradient"},
        {"update": "step", "levels": "symmetric"},
    ],
    ids=["channel", "tensor", "gradient", "step"],
)
def test_sharded_training_is_that_of_one_process(config):
    size = 4 if config == {"ema_decay": 0.9} else 2
    (alone,), found = run(trained, 1, config), run(trained, size, config)
    for key, value in alone["state"].items():
        torch.testing.assert_close(found[0]["state"][key], value, rtol=1e-4, atol=1e-5)
    for other in found[1:]:
        assert [k for k, value in found[0]["buffers"].items() if not torch.equal(value, other["buffers"][k])] == []
    follows = config.get("update", "ema") == "ema"
    assert [len(each["reductions"]) for each in found] == [STEPS if follows else 0] * size
    start = quantized(**config).state_dict()
    moved = {key for key, value in alone["state"].items() if not torch.equal(value, start[key])}
    assert {f"{name}.weight_quantizer.steps" for name in ("stem", "block.0", "block.2", "head")} <= moved
    assert ("block.2.weight_quantizer.codebook" in moved) == (config.get("update") != "step")


def test_hybrid_sharding_counts_every_row_once():
    (alone,), found = run(trained, 1, {"ema_decay": 0.9}), run(trained, 4, {"ema_decay": 0.9}, True)
    for key, value in alone["state"].items():
        torch.testing.assert_close(found[0]["state"][key], value, rtol=1e-4, atol=1e-5)
    for other in found[1:]:
        assert [k for k, value in found[0]["buffers"].items() if not torch.equal(value, other["buffers"][k])] == []


def other_placement() -> str:
    layer = quantized().block[0]
    mesh = init_device_mesh("cpu", (2,))
    weight = DTensor.from_local(layer.weight.detach(), mesh, [Partial()])
    with pytest.raises(ValueError, match="codebooks follow weights that fully_shard has sharded"):
        sharded.step([(weight, layer.weight_quantizer)], torch.ones(1))
    return "refused"


def test_what_fully_shard_does_not_do_is_refused():
    assert run(other_placement, 2) == ["refused"] * 2


def damped(which: str) -> dict:
    """The gradients that the dampening term gives, and what a sharded model refuses."""
    model = quantized()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)  # off the codewords
    if which == "sharded":
        shard(model)
    loss = adq.dampening_loss(model)  # before any forward pass
    loss.backward()
    gradients = {
        name: parameter.grad.full_tensor() if which == "sharded" else parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    refused = []
    need_whole = (
        adq.summary,
        lambda model: adq.apply_allocation_(model, {"block.0": 2}),
        lambda model: adq.save(model, "never-written.safetensors"),
    )
    for act in need_whole if which == "sharded" else ():
        try:
            act(model)
        except ValueError as error:
            refused.append(str(error))
    return {"loss": loss.item(), "gradients": gradients, "refused": refused}


def test_dampening_gathers_the_weights_and_what_needs_whole_ones_is_refused():
    (alone,), found = run(damped, 1, "whole"), run(damped, 2, "sharded")
    for each in found:
        assert each["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert each["gradients"].keys() == alone["gradients"].keys() != set()
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(each["gradients"][name], gradient)
        assert [text.partition(", and")[0] for text in each["refused"]] == [
            "adq: a summary needs whole weights",
            "adq: changing bit-widths needs whole weights",
            "adq: a file needs whole weights",
        ]


# ---- dtypes ------------------------------------------------------------------------------------------


def in_bfloat16(how: str) -> dict:
    """Dtypes that the quantizers see, and the thresholds after a step, where the rest is computed in bfloat16."""
    model, seen = quantized(), {}
    if how == "model":
        model = model.to(torch.bfloat16)
    shard_quantizers_(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if how == "policy" else MixedPrecisionPolicy()
    fully_shard(model.block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.update(weight=module.weight.dtype, start=module.input_quantizer.start.dtype, x=args[0].dtype)

    model.block[0].register_forward_pre_hook(look)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = full_state(model)
    for step in range(3):
        optimizer.zero_grad()
        model(images(step)[world()[0] :: world()[1]].to(torch.bfloat16)).square().mean().backward()
        optimizer.step()
    state = full_state(model)
    return {"seen": {key: str(value) for key, value in seen.items()}, "start": start, "state": state}


@pytest.mark.parametrize("how", ["policy", "model"])
def test_quantizers_stay_float32_beside_bfloat16(how):
    first, second = run(in_bfloat16, 2, how)
    assert first["seen"] == {"weight": "torch.bfloat16", "start": "torch.float32", "x": "torch.bfloat16"}
    for key in ("block.0.input_quantizer.interval", "block.0.weight_quantizer.codebook", "block.0.weight"):
        assert not torch.equal(first["state"][key], first["start"][key])
        assert torch.equal(first["state"][key], second["state"][key])


# ---- saved and resharded -----------------------------------------------------------------------------


def save_four(folder: str) -> tuple[dict, Tensor, dict]:
    model = shard(quantized())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, range(4))
    state = get_state_dict(model, optimizer)
    torch.distributed.checkpoint.save(dict(zip(("model", "optimizer"), state, strict=True)), checkpoint_id=folder)
    saved, outputs = full_state(model), evaluated(model)
    train(model, optimizer, range(4, 6))
    return saved, outputs, full_state(model)


def load_two(folder: str) -> tuple[dict, Tensor, dict]:
    model = shard(quantized())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    torch.distributed.checkpoint.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded, outputs = full_state(model), evaluated(model)
    train(model, optimizer, range(4, 6))
    return loaded, outputs, full_state(model)


def evaluated(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        outputs = model(images(99))
    model.train()
    return outputs


def test_a_checkpoint_of_four_processes_goes_on_in_two(tmp_path):
    saved, outputs, expected = run(save_four, 4, str(tmp_path))[0]
    loaded, again, later = run(load_two, 2, str(tmp_path))[0]
    assert saved.keys() == loaded.keys()
    assert [key for key in saved if not torch.equal(saved[key], loaded[key])] == []
    assert torch.equal(outputs, again)
    assert int(later["stem.weight_quantizer.steps"]) == 6
    for key, value in expected.items():  # the optimizer's state is there too
        torch.testing.assert_close(later[key], value, rtol=1e-4, atol=1e-4)
    plain = quantized()
    plain.load_state_dict(saved)
    assert torch.equal(plain.eval()(images(99)), outputs)


# ---- the example -------------------------------------------------------------------------------------

LOOP = Path(__file__).parent / "loops" / "sharded_loop.py"


def looped(folder: str, epochs: int) -> tuple[list[float], dict]:
    """Loss of each epoch of the example in this process group, and the whole state; the model is saved too."""
    ran = runpy.run_path(str(LOOP))
    model, losses = ran["train"](Path(folder), epochs)
    ran["save"](model, Path(folder) / "model.safetensors")
    return losses, full_state(model)


def test_the_example_trains_and_goes_on_with_more_processes(tmp_path):
    pytest.importorskip("sklearn")
    (first,), _ = run(looped, 2, str(tmp_path), 1)[0]
    (second,), state = run(looped, 4, str(tmp_path), 2)[0]
    assert second < 0.3 * first
    assert int(state["conv2.weight_quantizer.steps"]) == 2 * (1797 // 64)
    saved, x = adq.load(tmp_path / "model.safetensors"), torch.rand(16, 1, 8, 8)
    plain = adq.quantize_(adq.create_model("digits_cnn"), ADQConfig())
    plain.load_state_dict(state)
    assert torch.equal(saved(x), plain.eval()(x))

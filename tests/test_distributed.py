"""Several processes come to what one comes to: codebooks, weights, calibration, scores, evaluation."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import images, net, quantized
from processes import run
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import adq
from adq import ADQConfig, WeightConfig
from adq.distributed import EveryNth, average_batch_norm_, from_main, gather, pool, share, share_of, world

GLOBAL_BATCH = 16


def mlp(**weight) -> nn.Module:
    """Without batch norm, whose statistics a process takes over its own part of the batch."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    adq.quantize_(net, ADQConfig(weight=WeightConfig(**weight)))
    return adq.calibrate_(net, [inputs(0)])


def inputs(step: int) -> Tensor:
    """The global batch of a step."""
    return torch.randn(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(step))


def forbidden(*args, **kwargs):
    raise AssertionError("adq communicated during training")


def trained(steps: int, config: dict, parts: int = 1) -> dict[str, Tensor]:
    """State after some steps on the global batches: data-parallel, or in one process that takes them in parts."""
    net, (rank, size) = mlp(**config), world()
    model = DistributedDataParallel(net, broadcast_buffers=False) if size > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast"):
        setattr(dist, name, forbidden)
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(parts):
            x = inputs(step)[rank + part :: size * parts]
            (nn.functional.cross_entropy(model(x), x[:, :3].argmax(1)) / parts).backward()
        optimizer.step()
        schedule.step()
    return net.state_dict()


def moved(state: dict[str, Tensor], config: dict) -> bool:
    start = mlp(**config).state_dict()
    return all(not torch.equal(start[key], state[key]) for key in start if key.endswith(("codebook", "weight")))


@pytest.mark.parametrize(("size", "update"), [(2, "ema"), (4, "ema"), (2, "gradient")])
def test_codebooks_are_the_same_bits_on_all_processes_without_communication(size, update):
    first, *others = run(trained, size, 200, {"update": update})
    assert moved(first, {"update": update})
    for other in others:
        assert [key for key in first if not torch.equal(first[key], other[key])] == []
    if size == 2:  # one sum of two gradients, in whatever order: bit for bit that of one process, in two parts
        (alone,) = run(trained, 1, 200, {"update": update}, size)
        assert [key for key in first if not torch.equal(first[key], alone[key])] == []


def test_weights_are_those_of_one_process_with_the_same_global_batch():
    """Over some steps: a sum in another order turns a rounding decision sooner or later, and then paths part."""
    (alone,) = run(trained, 1, 30, {})
    assert moved(alone, {})
    state = run(trained, 4, 30, {})[0]
    for key, value in alone.items():
        torch.testing.assert_close(state[key], value, rtol=1e-4, atol=1e-5)


def compiled() -> list[str]:
    """Tensors in which compiled training differs from eager training, with gradients reduced in several buckets."""
    dist._DEFAULT_FIRST_BUCKET_BYTES, states, (rank, size) = 400, [], world()
    counter = CompileCounterWithBackend("aot_eager")
    for compile_ in (lambda model: model, lambda model: torch.compile(model, backend=counter)):
        net = mlp()
        forward = compile_(DistributedDataParallel(net, broadcast_buffers=False, bucket_cap_mb=0.0005))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for step in range(4):
            optimizer.zero_grad()
            x = inputs(step)[rank::size]
            nn.functional.cross_entropy(forward(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
        states.append(net.state_dict())
    assert counter.frame_count > 1  # torch cuts the graph where a bucket is full
    return [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]


def test_a_compiled_model_under_ddp_trains_as_an_eager_one():
    assert run(compiled, 2) == [[], []]


# ---- shares of the data, and what is made of them ----------------------------------------------------


def dealt() -> dict:
    rank, size = world()
    loader = share(DataLoader(TensorDataset(torch.arange(37)), batch_size=4))
    own = [x.tolist() for (x,) in loader]
    return {
        "pooled": pool(lambda: own),
        "length": len(loader) == len(own) == share_of(10),
        "first": len(own[: share_of(3)]),
        "main": from_main(lambda: rank + size),
        "ranks": gather(lambda: rank),
    }


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_batch_is_dealt_once(size):
    answers = run(dealt, size)
    for found in answers:
        assert found["pooled"] == [list(range(i, min(i + 4, 37))) for i in range(0, 37, 4)]
        assert found["length"]
        assert found["main"] == size
        assert found["ranks"] == list(range(size))
    assert sum(found["first"] for found in answers) == 3


def failing() -> str:
    def compute() -> None:
        if world()[0] == 1:
            raise ValueError("no such image")

    with pytest.raises((ValueError, RuntimeError)) as caught:
        gather(compute)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_an_error_of_one_process_is_raised_on_all():
    cause = "ValueError: no such image"
    assert run(failing, 2) == [f"RuntimeError: adq: process 1 failed: {cause}", cause]


def evaluated() -> tuple[float, float]:
    pytest.importorskip("accelerate")
    from adq.train.engine import evaluate

    data = TensorDataset(images(1, 37), torch.arange(37) % 4)
    return evaluate(quantized(), share(DataLoader(data, batch_size=4)))


def zero(steps: int) -> list[Tensor]:
    model = quantized()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    optimizer = ZeroRedundancyOptimizer(wrapped.parameters(), torch.optim.SGD, lr=0.1)
    for seed in range(steps):
        optimizer.zero_grad()
        wrapped(images(seed)).square().mean().backward()
        optimizer.step()
    return [tensor for name, tensor in model.state_dict().items() if "weight_quantizer" in name]


def test_an_optimizer_whose_state_is_spread_over_processes_moves_all_codebooks_once():
    one, other = run(zero, 2, 3)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert {int(tensor) for tensor in one if tensor.dtype == torch.int64} == {3}


def test_evaluation_of_a_test_set_that_does_not_divide():
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    (alone,) = run(evaluated, 1)
    assert 0 < alone[1] < 100
    for size in (2, 4):
        assert run(evaluated, size) == [alone] * size


def prepared(count: int) -> dict:
    """A network after each step before training, and its tables; this process has its share of ``count`` batches."""
    adq.calibrate.SAMPLES_PER_BATCH, adq.calibrate.MAX_SAMPLES = 100, 250  # fewer than there are
    batches = [(images(i, 5 - i // 3), torch.arange(5 - i // 3) % 4) for i in range(count)]
    own = list(EveryNth(batches))
    model = adq.quantize_(net())
    states, tables = [], []
    for step in (adq.calibrate_, adq.correct_batch_norm_, adq.reestimate_batch_norm_):
        step(model, iter(own))
        states.append(copy.deepcopy(model.state_dict()))
    for estimator in ("loss", "fisher", "hessian", "true_fisher", "kl"):
        table = adq.sensitivity(model, iter(own), nn.functional.cross_entropy, (2, 3), estimator)
        tables.append(table.to_dict())
    return {"states": states, "tables": tables}


@pytest.mark.parametrize(("size", "count"), [(2, 7), (4, 3)])
def test_calibration_and_scores_are_those_of_one_process_bit_for_bit(size, count):
    (alone,) = run(prepared, 1, count)
    start = net().state_dict()
    assert all(not torch.equal(state["norm.running_mean"], start["norm.running_mean"]) for state in alone["states"])
    for found in run(prepared, size, count):
        assert found["tables"] == alone["tables"]
        for state, expected in zip(found["states"], alone["states"], strict=True):
            assert [key for key in expected if not torch.equal(state[key], expected[key])] == []


def test_no_batches_on_any_process_is_an_error_on_all():
    assert (
        run(without_batches, 2) == [["calibrate with", "correct batch-norm", "estimate batch-norm", "score with"]] * 2
    )


def without_batches() -> list[str]:
    found, model = [], quantized()
    calls = [
        (lambda: adq.calibrate_(model, []), "calibrate with"),
        (lambda: adq.correct_batch_norm_(model, []), "correct batch-norm"),
        (lambda: adq.reestimate_batch_norm_(model, []), "estimate batch-norm"),
        (lambda: adq.sensitivity(model, [], nn.functional.cross_entropy), "score with"),
    ]
    for call, words in calls:
        with pytest.raises(ValueError, match=f"no batches to {words}"):
            call()
        found.append(words)
    return found


def averaged() -> list[Tensor]:
    model, rank = net(), world()[0]
    model.norm.running_mean.fill_(float(rank))
    model.norm.running_var.fill_(2.0 + rank)
    average_batch_norm_(model)
    return [model.norm.running_mean, model.norm.running_var]


def test_batch_norms_are_averaged():
    for mean, var in run(averaged, 2):
        assert torch.equal(mean, torch.full((8,), 0.5))
        assert torch.equal(var, torch.full((8,), 2.5))


# ---- adq train ---------------------------------------------------------------------------------------

RUN = ["data.limit_train=256", "data.limit_test=90", "data.batch_size=16", "float.epochs=1", "qat.epochs=1"]


def trained_by_recipe(folder: str, *sets: str) -> tuple[dict, dict, float]:
    """The result of a run in this process group, the state that this process ends with, and its next random number."""
    from adq.train.config import parse_assignment, resolve
    from adq.train.run import Run

    sets = (*RUN, "engine.device=cpu", f"output={folder}", *sets)
    job, state, drawn = Run(resolve("digits", [parse_assignment(text) for text in sets])), {}, []
    describe = job._result

    def note(model, *rest):
        state.update(model.state_dict())
        drawn.append(torch.rand(()).item())
        return describe(model, *rest)

    job._result = note
    result = job.execute()
    return {key: value for key, value in result.items() if key != "seconds"}, state, *drawn


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list]:
    """Folder of a run of two processes, and what each of them ends with."""
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    folder = tmp_path_factory.mktemp("run") / "two"
    return folder, run(trained_by_recipe, 2, str(folder))


def test_every_process_of_a_run_ends_with_the_same_bits_and_one_writes(two):
    folder, [(result, first, drawn), (other_result, other, other_drawn)] = two
    assert result == other_result
    assert drawn != other_drawn  # dropout, too
    assert [key for key in first if not torch.equal(first[key], other[key])] == []
    saved = adq.load(folder / "model.safetensors").state_dict()
    assert [key for key in first if not torch.equal(first[key], saved[key])] == []
    rows = [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == ["float", "sensitivity", "calibrated", "qat", "result"]


def test_a_run_is_that_of_one_process_up_to_training(two, tmp_path):
    folder, [(result, _, _), _] = two
    sets = [f"model.weights={folder}/float.safetensors", "qat.epochs=0"]
    ((alone, _, _),) = run(trained_by_recipe, 1, str(tmp_path / "one"), *sets)
    for name in ("sensitivity.yaml", "allocation.yaml"):
        assert (tmp_path / "one" / name).read_text() == (folder / name).read_text()
    for key in ("float_top1", "calibrated_top1", "average_bits_network", "bytes_packed"):
        assert alone[key] == result[key]


def test_fewer_batches_than_processes(tmp_path):
    pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    assert (
        run(refused, 2, str(tmp_path / "run"))
        == [
            "adq: the training images do not make one batch of 32 for each of 2 processes; "
            "use a smaller --batch-size, or fewer processes"
        ]
        * 2
    )


def refused(folder: str) -> str:
    with pytest.raises(ValueError, match="batch") as error:
        trained_by_recipe(folder, "data.limit_train=20", "data.batch_size=16")
    assert not Path(folder, "config.yaml").exists()  # the corrected command may use the folder
    return str(error.value)


def test_torchrun(two, tmp_path):
    folder, _ = two
    sets = [argument for text in RUN for argument in ("--set", text)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*torchrun, "-m", "adq", "train", "--device", "cpu", "--output", "two", *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.count("run folder: two") == 1
    one, other = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "two"))
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


def wrapped_first() -> str:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="quantize_ adds parameters, so call it, and calibrate_, before wrapping"):
        adq.quantize_(model)
    with tempfile.TemporaryDirectory() as folder:
        path = adq.save(adq.quantize_(copy.deepcopy(model.module)), Path(folder) / "m.safetensors")
        with pytest.raises(ValueError, match="load adds parameters, so call it before wrapping"):
            adq.load(path, model)
    assert not any("quantizer" in name for name, _ in model.named_modules())
    return "refused"


def test_a_wrapped_model_is_refused():
    assert run(wrapped_first, 2) == ["refused"] * 2

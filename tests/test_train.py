"""The main job as a user runs it: files, figures, resume after kill -9, and errors in plain words."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from faults import Runner
from safetensors.torch import load_file

from adq import Allocation, create_model, dampening_loss, load, save
from adq.config import dump_yaml

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from typer.testing import CliRunner

from adq.train import figures
from adq.train.cli import app
from adq.train.config import PhaseConfig, parse_assignment, recipe_names, resolve
from adq.train.engine import build_schedule
from adq.train.run import RunFolder

SHORT = ["--float-epochs", "2", "--epochs", "2", "--set", "engine.checkpoint_steps=4"]
for phase, epochs in (("float", 1), ("qat", 2)):
    SHORT += ["--set", f"{phase}.average_epochs={epochs}", "--set", f"{phase}.reestimate_batches=9"]
    SHORT += ["--set", f"{phase}.mixup=0.4"]


def command(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-m", "adq", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def adq(folder, *arguments):
    """Exit status and output of ``adq ARGUMENTS``, in a process that need not import anything first."""
    runner = Runner(folder)
    return runner.finish(runner.start("said", *arguments), 300), runner.said("said")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    process = command(folder, "train", "--output", "whole", *SHORT)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == 0, text
    save(load(folder / "whole"), folder / "folded.safetensors", packed=True, fold_batch_norm=True)
    return folder, " ".join(text.split())


def test_the_run_folder_is_complete(finished):
    folder, text = finished
    run = folder / "whole"
    result = json.loads((run / "result.json").read_text())
    assert f"{result['quantized_top1']:.2f}" in text
    assert result["average_bits_quantized"] <= 3.0
    assert result["bytes_packed"] < result["bytes_float"] / 6
    bits = yaml.safe_load((run / "allocation.yaml").read_text())["weight_bits"]
    assert set(bits.values()) <= {2, 3, 4, 8}
    assert yaml.safe_load((run / "config.yaml").read_text())["qat"]["epochs"] == 2
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows] == ["float"] * 2 + ["sensitivity", "calibrated"] + ["qat"] * 2 + ["result"]
    for name in ("bits-per-layer", "codebook", "training"):
        assert (run / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"{result['quantized_top1']:.2f} %" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("file", ["model.safetensors", "model-packed.safetensors"])
def test_a_saved_model_evaluates_to_the_reported_accuracy(finished, file):
    folder, _ = finished
    top1 = json.loads((folder / "whole" / "result.json").read_text())["quantized_top1"]
    code, text = adq(folder, "eval", f"whole/{file}", "--config", "digits")
    assert code == 0
    assert f"top-1 {top1:.2f}" in text


def kill_when(process, folder, pattern):
    deadline = time.monotonic() + 120
    while not list(folder.glob(pattern)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_and_resumed_ends_bit_for_bit_the_same(finished):
    folder, _ = finished
    arguments = ["train", "--output", "killed", *SHORT]
    for pattern, resume in (("checkpoints/*-float-0001-000008", []), ("checkpoints/*-qat-0000-000008", ["--resume"])):
        kill_when(command(folder, *arguments, *resume), folder / "killed", pattern)
        assert not (folder / "killed" / "result.json").exists(), "it ended before it was killed"
    code, text = adq(folder, *arguments, "--resume")
    assert code == 0, text
    for name in ("float.safetensors", "model.safetensors"):
        whole, killed = load_file(folder / "whole" / name), load_file(folder / "killed" / name)
        assert whole.keys() == killed.keys()
        assert all(torch.equal(whole[key], killed[key]) for key in whole)
    losses = [
        [row.get("train_loss") for row in map(json.loads, (folder / run / "metrics.jsonl").read_text().splitlines())]
        for run in ("whole", "killed")
    ]
    assert losses[0] == losses[1]


def test_a_diverging_run_stops_with_the_last_good_checkpoint(finished):
    folder, _ = finished
    weights = folder / "whole" / "float.safetensors"
    code, text = adq(folder, "train", "--output", "nan", "--weights", str(weights), "--lr", "1e30", "--epochs", "1")
    assert code == 1
    assert "training stopped: the loss is not finite at epoch 1" in text
    assert "layer" in text
    assert "the last good checkpoint is nan/checkpoints/000001-qat-0000-000000" in text
    assert (folder / "nan/checkpoints/000001-qat-0000-000000/model.safetensors").exists()
    assert "Traceback" not in text


def phases(run):
    return [json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_given_weights_a_teacher_of_its_own_reversed_bits_and_reestimated_batch_norms(finished):
    folder, _ = finished
    weights = str(folder / "whole" / "float.safetensors")
    common = ["train", "--weights", weights, "--float-epochs", "1", "--epochs", "1", "--seed", "3"]
    teacher = f"distillation.teacher={{name: digits_cnn, weights: {weights}}}"
    changes = "allocation.order=reversed", "qat.reestimate_batches=5", "qat.dampening=20", "qat.warmup_epochs=0.1"
    runs = {
        "plain": [],
        "changed": ["--set", teacher, *(f"--set={change}" for change in changes)],
        # more batches than there are, twice
        "finetuned": ["--set=model.finetune=true", "--set=float.reestimate_batches=999", "--set=allocation.batches=99"],
    }
    for name, options in runs.items():
        code, text = adq(folder, *common, "--output", name, *options)
        assert code == 0, text
    assert "batches of an epoch, not 999" in text
    assert "scores are over all calibration batches, fewer than the 99 asked for" in text
    assert phases(folder / "plain") == phases(folder / "changed") == ["sensitivity", "calibrated", "qat", "result"]
    assert phases(folder / "finetuned")[0] == "float"
    given, trained = load_file(weights), load_file(folder / "finetuned" / "float.safetensors")
    assert any(not torch.equal(given[key], trained[key]) for key in given)
    results = {name: json.loads((folder / name / "result.json").read_text()) for name in runs}
    assert results["changed"]["teacher_top1"] == results["changed"]["float_top1"]  # of the same weights
    assert "teacher_top1" not in results["plain"]
    bits = [yaml.safe_load((folder / name / "allocation.yaml").read_text())["weight_bits"] for name in runs]
    assert bits[0] != bits[1]
    saved = [load_file(folder / name / "model.safetensors") for name in ("plain", "changed")]
    assert not torch.equal(saved[0]["bn1.running_mean"], saved[1]["bn1.running_mean"])
    models = [load(folder / name / "model.safetensors") for name in ("plain", "changed")]
    assert dampening_loss(models[1]) < 0.3 * dampening_loss(models[0])


def test_the_model_itself_is_not_written_over(finished):
    folder, _ = finished
    before = (folder / "whole" / "model.safetensors").read_bytes()
    for to in ("packed", "plain", "onnx"):
        code, text = adq(folder / "whole", "export", ".", "model.safetensors", "--to", to)
        assert code == 1
        assert "model.safetensors is the model itself; choose another file" in text
    assert (folder / "whole" / "model.safetensors").read_bytes() == before


def test_quantization_starts_from_another_quantized_network(finished):
    folder, _ = finished
    weights = str(folder / "whole" / "float.safetensors")
    common = ["train", "--weights", weights, "--epochs", "0", "--set", "quantization.weight.bits=2"]
    starts = {"float": None, "plain": "whole", "packed": "whole/model-packed.safetensors"}
    starts["mean"] = "[whole, whole/model.safetensors, whole/model-packed.safetensors]"
    for name, start in starts.items():
        options = [] if start is None else ["--set", f"start={start}"]
        output = f"from {name}"
        code, text = adq(folder, *common, "--output", output, "--set", "allocation.weight_bits=null", *options)
        assert code == 0, text
    whole = load(folder / "whole")
    networks = {name: load(folder / f"from {name}") for name in starts}
    assert torch.equal(networks["plain"].conv2.weight, whole.conv2.weight)
    packed = whole.conv2.quantized_weight()
    assert torch.equal(networks["packed"].conv2.weight, packed)
    torch.testing.assert_close(networks["mean"].conv2.weight, (2 * whole.conv2.weight + packed) / 3)
    levels = {name: network.conv2.weight_quantizer.levels.numel() for name, network in networks.items()}
    assert levels == dict.fromkeys(starts, 4) and whole.conv2.weight_quantizer.levels.numel() > 4
    results = {name: json.loads((folder / f"from {name}" / "result.json").read_text()) for name in starts}
    assert len({result["float_top1"] for result in results.values()}) == 1
    assert results["float"]["calibrated_top1"] not in {results[name]["calibrated_top1"] for name in ("plain", "packed")}
    learned = whole.conv2.input_quantizer
    for name in ("plain", "packed", "mean"):
        torch.testing.assert_close(networks[name].conv2.input_quantizer.interval, learned.interval, rtol=2e-7, atol=0)
    assert not torch.equal(networks["float"].conv2.input_quantizer.interval, learned.interval)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "allocation.bits=4"], "allocation.bits must be a list"),
        (["--set", "allocation.bits=[2,9]"], "allocation.bits must be a whole number from 1 to 8, got 9"),
        (["--set", "allocation.weight_bits=-1"], "allocation.weight_bits must be positive"),
        (["--set", "quantization.weight=null"], "quantization.weight leaves all of them in float"),
        (["--set", "distillation.teacher={name: digits_cnn, weights: missing.pt}"], "no such file: missing.pt"),
        (["--set", "start=missing.safetensors"], "no such file: missing.safetensors"),
        (["--set", "start=[whole, missing.safetensors]"], "no such file: missing.safetensors"),
        (["--set", "start=[]"], "start is an empty list"),
        (["--set", "start=[whole, folded.safetensors]"], "training needs them (whole, folded.safetensors)"),
        (
            ["--set", "start=whole", "--set", "allocation.estimator=hessian"],
            "takes second derivatives, which the learned thresholds of whole do not have",
        ),
        (["--set", "start=folded.safetensors"], "they are folded; training needs them (folded.safetensors)"),
        (
            ["--set", "start=whole/model.safetensors", "--set", "quantization.activation=null"],
            "of start and model only one quantizes the input of conv1; conv2",
        ),
        (["--set", "start=whole/model.safetensors", "--set", "model.kwargs={width: 16}"], "another architecture"),
        (["--set", "qat.epoch=3"], "unknown key 'epoch' in qat; did you mean 'epochs'"),
        (["--set", "quantization.weight.bits=9"], "weight bits must be a whole number from 1 to 8, got 9"),
        (["--data", "cifar11"], "unknown data 'cifar11'"),
        (
            ["--data", "imagefolder", "--root", "nowhere", "--model", "resnet20"],
            "the data folder nowhere does not exist",
        ),
        (["--set", "model.finetune=true"], "model.finetune trains given weights on"),
        (["--set", "distillation.teacher={name: digits_cnn}"], "distillation.teacher needs weights"),
        (["--set", "qat.dampening=-1"], "dampening must not be negative"),
        (["--set", "float.dampening=0.1"], "weights in float have no codewords; set qat.dampening"),
        (["--set", "qat.reestimate_batches=-1"], "reestimate_batches must not be negative"),
        (["--set", "qat.label_smoothing=2"], "label_smoothing must be in [0, 1], got 2"),
        (["--set", "qat.label_smoothing=0.1"], "is of cross entropy, which distillation.alpha=1 leaves out"),
        (["--set", "qat.clip_grad_norm=0"], "clip_grad_norm must be positive, or null for no limit, got 0"),
        (["--set", "engine.timeout=1e9"], "engine.timeout must be positive and below 1e+09 seconds, got 1000000000.0"),
        (["--lr", "nan"], "qat.lr must be a finite number, got nan"),
        (["--set", "model.kwargs=null"], "model.kwargs must be a mapping, got None"),
        (
            ["--set", "distillation.teacher={weights: a.pt, kwargs: [1]}"],
            "distillation.teacher.kwargs must be a mapping, got [1]",
        ),
        (["--seed", "4294967296"], "seed must be in 0 .. 4294967295, got 4294967296"),
        (["--mixed-precision", "fp16"], "fp16 needs a GPU; on a CPU bf16 or no"),
        (["--set", "model.kwargs={foo: 1}"], "the model 'digits_cnn' with {'foo': 1}: "),
        (
            ["--set", "quantization.overrides={0: null}"],
            "an override is keyed by a name, 're:PATTERN' or a module type",
        ),
        (["--set", "distillation.alpha=2"], "distillation.alpha must be in [0, 1], got 2"),
        (["--set", "distillation.temperature=0"], "distillation.temperature must be positive, got 0"),
        (
            ["--set", "qat={dampening: 0.1, schedule: constant}"],
            "dampening grows as the learning rate falls",
        ),
        (["--set", "distillation.teacher={name: x"], "--set distillation.teacher: '{name: x' is not valid YAML"),
        (["--set", "qat={lr: 1, lr: 2}"], "the key 'lr' comes twice"),
        (["--config", "missing.yaml"], "no such file: missing.yaml"),
        (["--config", "cifar"], "no recipe 'cifar'"),
        (["--output", "whole"], "whole holds a run already; pass --resume"),
        (["--output", "whole", "--resume"], "differs from this command's configuration"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(finished, arguments, message):
    folder, _ = finished
    code, text = adq(folder, "train", *arguments)
    assert code == 1
    assert message in text
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["eval", "--set", "engine.mixed_precision=bf16", "--set", "model.name=x", "--set", "data.workers=0"],
            "as it is saved, in float32, and takes no engine.mixed_precision, model.name",
        ),
        (
            ["export", "out", "--images", "9", "--root", "r", "--set", "seed=1", "--shape", "1,8,8", "--no-check"],
            "--to packed has no runtime to check, and takes no --root, --config, --images, --set, --no-check, --shape",
        ),
        (["export", "out", "--to", "torch", "--shape", "1,8,8"], "and without --no-check takes no --shape"),
        (["export", "out", "--to", "torch", "--shape", "1,8,8", "--no-check"], "--no-check takes no --config"),
        (["export", "out", "--to", "torch", "--set", "qat.lr=1"], "as it is saved, and takes no qat.lr"),
        (["export", "out", "--to", "coreml", "--images", "5"], "and not run: it takes no --images"),
        (["export", "out", "--to", "torch", "--images", "0"], "--images must be at least 1, got 0"),
    ],
)
def test_what_would_do_nothing_is_refused(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.safetensors").touch()
    command, *options = arguments
    outcome = CliRunner().invoke(app, [command, "m.safetensors", *options, "--config", "digits"])
    assert outcome.exit_code != 0
    assert message in " ".join(outcome.output.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"allocation": {"weight_bits": 2.2, "file": "a.yaml"}}], "allocation.weight_bits .* allocation.file names"),
        ([{"allocation": {"file": "a.yaml"}}, {"allocation": {"order": "random"}}], "allocation.order has no effect"),
        ([{"allocation": {"weight_bits": None, "order": "reversed"}}], "allocation.order .* without a budget"),
        (
            [{"distillation": {"alpha": 0, "temperature": 4.0}}],
            "temperature has .* leaves the teacher out",
        ),
        ([{"distillation": {"alpha": 0.0, "teacher": {"name": "x", "weights": "y"}}}], "distillation.teacher.name has"),
        ([{"quantization": {"weight": {"update": "frozen", "ema_decay": 0.5}}}], "ema_decay .* no EMA moves"),
        ([{"float": {"optimizer": "adamw", "momentum": 0.5}}], "float.momentum .* it is of SGD"),
    ],
)
def test_a_setting_without_effect_is_refused_where_it_is_given(changes, message):
    with pytest.raises(ValueError, match=message):
        resolve("digits", changes)


def test_settings_may_be_left_without_effect_by_later_ones(tmp_path):
    own = {"weight": {"update": "frozen", "ema_decay": 0.5}, "overrides": {"conv2": {"weight": {"update": "ema"}}}}
    changes = [
        {"allocation": {"weight_bits": 2.2, "order": "random"}, "distillation": {"temperature": 4.0}},
        {"allocation": {"file": "a.yaml"}, "distillation": {"alpha": 0.0}, "qat": {"optimizer": "adamw"}},
        {"qat": {"momentum": 0.9}, "quantization": own},
    ]
    made = resolve("digits", changes)
    (tmp_path / "run.yaml").write_text(dump_yaml(made))
    assert resolve(str(tmp_path / "run.yaml"), [{"seed": made.seed}]) == made


def test_a_budget_may_be_infinite(tmp_path):
    made = resolve("digits", [parse_assignment("allocation.weight_bits=.inf")])
    (tmp_path / "run.yaml").write_text(dump_yaml(made))
    assert resolve(str(tmp_path / "run.yaml"), []).allocation.weight_bits == math.inf
    for wrong in ("-.inf", ".nan"):
        with pytest.raises(ValueError, match="allocation.weight_bits must be a finite number"):
            resolve("digits", [parse_assignment(f"allocation.weight_bits={wrong}")])


def test_epochs_are_whole_numbers_on_the_axis(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: drawn.append(figure))
    rows = [{"epoch": i + 1, "test_top1": 90.0, "train_loss": 1.0} for i in range(20)]
    figures.draw_history(tmp_path / "training.png", rows, 91.0)
    assert all(float(tick).is_integer() for tick in drawn[0].axes[1].get_xticks())


@pytest.mark.parametrize("seed", [0, 1])
def test_a_recipe_without_a_seed_may_fix_that_of_the_data(tmp_path, seed):
    (tmp_path / "recipe.yaml").write_text(f"data: {{seed: {seed}}}")
    assert resolve(str(tmp_path / "recipe.yaml"), [{"seed": 5}]).data.seed == seed


def test_the_seed_of_the_data_follows_that_of_the_run_unless_given():
    assert resolve("digits", [{"seed": 3}]).data.seed == 3
    assert resolve("digits", [{"seed": 3, "data": {"seed": 0}}]).data.seed == 0


def test_a_run_as_a_recipe_fixes_the_seed_of_the_data_only_where_it_was_given(tmp_path):
    for changes, found in (({}, 5), ({"data": {"seed": 7}}, 7)):
        (tmp_path / "run.yaml").write_text(dump_yaml(resolve("digits", [{"seed": 3}, changes])))
        assert resolve(str(tmp_path / "run.yaml"), [{"seed": 5}]).data.seed == found


@pytest.mark.parametrize("name", recipe_names())
def test_networks_and_teachers_of_the_recipes_exist(name):
    config = resolve(name, [{"data": {"root": "images"}}])
    for network in filter(None, (config.model, config.distillation.teacher)):
        assert create_model(network.name, **network.kwargs).adq_architecture["name"].endswith(network.name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--weight-bits", "1.5"],
            "no allocation meets the budget of 1.5000 average weight bits; the smallest possible has 2.0",
        ),
        (["--set", "quantization.overrides={conv9: {weight: {bits: 2}}}"], "overrides match no layer: conv9"),
        (
            ["--set", "quantization.weight.update=step", "--set", "allocation.bits=[1, 3]"],
            'update="step" needs at least 2 bits',
        ),
        (
            ["--set", "quantization.weight.update=step", "--set", "allocation.file=one.yaml"],
            "(layer 'conv2' at 1 bits)",
        ),
        (["--set", "allocation.file=nowhere.yaml"], "no such file: nowhere.yaml"),
        (["--set", "allocation.file=other.yaml"], "other.yaml names an unknown layer 'conv9'"),
        (["--model", "resnet20"], "the model 'resnet20' does not take images of 1x8x8, as 'digits' has them"),
    ],
)
def test_what_cannot_be_quantized_is_said_before_anything_is_trained_or_written(finished, arguments, message):
    folder, _ = finished
    Allocation({"conv9": 2}, 2.0, 2.0).save(folder / "other.yaml")
    Allocation({"conv2": 1}, 1.0, 1.0).save(folder / "one.yaml")
    code, text = adq(folder, "train", "--output", "late", *arguments)
    assert code == 1
    assert message in text and "training the float network" not in text
    assert not (folder / "late").joinpath("config.yaml").exists()


def test_runs_that_begin_together_have_folders_of_their_own(tmp_path):
    runs = [command(tmp_path, "train", "--seed", str(seed), *SHORT) for seed in (0, 1)]
    texts = [process.communicate(timeout=300)[0] for process in runs]
    assert [process.returncode for process in runs] == [0, 0], texts
    found = {yaml.safe_load(path.read_text())["seed"]: path.parent for path in tmp_path.glob("runs/*/config.yaml")}
    assert sorted(folder.name for folder in found.values()) == ["digits-digits_cnn", "digits-digits_cnn-2"]
    for seed, text in enumerate(texts):
        assert f"run folder: {found[seed].relative_to(tmp_path)}" in text
        assert phases(found[seed]) == ["float"] * 2 + ["sensitivity", "calibrated"] + ["qat"] * 2 + ["result"]
        assert not (found[seed] / "run.lock").exists()


def test_a_run_is_complete_with_its_last_file_only(finished):
    folder, _ = finished
    (folder / "reported" / "report.html").mkdir(parents=True)
    arguments = (
        "train",
        "--output",
        "reported",
        "--weights",
        str(folder / "whole" / "float.safetensors"),
        "--epochs",
        "0",
    )
    assert adq(folder, *arguments)[0] == 1
    (folder / "reported" / "report.html").rmdir()
    code, text = adq(folder, *arguments, "--resume")
    assert code == 0 and (folder / "reported" / "report.html").is_file(), text


def test_a_folder_that_a_run_is_in_is_refused(tmp_path):
    with RunFolder(tmp_path / "run").claimed() as owner:
        assert owner is None
        for options in ([], ["--resume"]):
            code, text = adq(tmp_path, "train", "--output", "run", *options)
            assert code == 1 and f"run is in use: process {os.getpid()} on " in text
    assert not (tmp_path / "run").exists()


def test_stopped_before_training_it_chooses_the_bits_again_and_keeps_the_row_that_says_what_it_took(finished):
    folder, _ = finished
    run = folder / "stopped"
    arguments = ["train", "--output", "stopped", "--weights", str(folder / "whole" / "float.safetensors"), *SHORT]
    kill_when(command(folder, *arguments), run, "allocation.yaml")
    assert not list(run.glob("checkpoints/*-qat-*")), "it trained before it was killed"
    code, text = adq(folder, *arguments, "--resume")
    assert code == 0, text
    assert phases(run) == ["sensitivity", "calibrated", "qat", "qat", "result"]


@pytest.mark.parametrize(("epochs", "warmup", "rises"), [(1, 1.0, 0.5), (1, 0.25, 0.25), (4, 1.0, 1.0), (2, 3.0, 1.0)])
def test_the_learning_rate_falls_in_half_of_the_epochs_at_least(epochs, warmup, rises):
    config = PhaseConfig(epochs=epochs, warmup_epochs=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = build_schedule(optimizer, config, 100).lr_lambdas[0]
    rates = [factor(step) for step in range(100 * epochs + 1)]
    assert max(rates) == 1.0 and rates.index(1.0) == 100 * rises
    assert rates[-1] == 0.0


def test_info_names_the_backends(tmp_path):
    code, text = adq(tmp_path, "info")
    assert code == 0
    assert "cpu: " in text
    assert "cuda: " in text

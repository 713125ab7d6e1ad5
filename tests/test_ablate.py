"""``adq ablate``: rows equal plain runs, processes share them, nothing finished is lost; the table's numbers."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import ExitStack

import pytest
import yaml

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from matplotlib.axes import Axes
from typer.testing import CliRunner

from adq.config import dump_yaml
from adq.store import locked
from adq.train import ablate as ablation
from adq.train import ablation_report
from adq.train.ablate import ablate, read_ablation, report_only
from adq.train.ablation_config import Row
from adq.train.ablation_report import collect, run_folder, table, write_report
from adq.train.cli import app
from adq.train.config import differences, merge, parse_assignment, resolve
from adq.train.figures import label
from adq.train.run import Run
from adq.train.together import Preempted

QUICK = {
    "data": {"limit_train": 256, "calibration_images": 128},
    "float": {"epochs": 2},
    "allocation": {"weight_bits": None},
    "qat": {"epochs": 2},
    "engine": {"device": "cpu"},
}
FROZEN = {"quantization": {"weight": {"update": "frozen"}}}
ROWS = [{"name": "k-means, EMA"}, {"name": "Frozen codebook", "group": "codebook", "set": FROZEN}]
KEPT = {
    "config.yaml",
    "metrics.jsonl",
    "result.json",
    "allocation.yaml",
    "summary.txt",
    "report.html",
    "model-packed.safetensors",
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    ablation._forget_last_run(compiled=False)
    changes = {"output": str(folder), "data": {"limit_train": None}, "float": {"epochs": 3}, "qat": {"epochs": 0}}
    Run(resolve("digits", [QUICK, changes])).execute()
    return folder / "float.safetensors"


def write(folder, weights, rows=ROWS, **fields):
    """An ablation file in ``folder``."""
    changes = merge(QUICK, {"model": {"weights": str(weights)}})
    values = {"base": "digits", "set": changes, "seeds": [0, 1], "reference": None, "rows": rows, **fields}
    file = folder / "ablation.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(file)


def command(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.Popen(
        [sys.executable, "-m", "adq", *map(str, arguments)],
        cwd="/",  # not the checkout, which would hide the installed package
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(process, condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def outcome(folder):
    """Result and losses of a run, without what depends on the clock."""
    result = json.loads((folder / "result.json").read_text())
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    del result["seconds"]
    return result, [(row["epoch"], row["train_loss"], row["test_loss"]) for row in rows if row["phase"] == "qat"]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("whole")
    assert ablate(write(folder, weights, reference="k-means, EMA"), folder) == 0
    return folder


def test_a_row_equals_a_plain_run_of_a_process_of_its_own(finished, weights, tmp_path):
    changes = ["quantization.weight.update=frozen", f"model.weights={weights}", "engine.device=cpu", "qat.epochs=2"]
    changes += ["data.limit_train=256", "data.calibration_images=128", "allocation.weight_bits=null", "float.epochs=2"]
    sets = [part for change in changes for part in ("--set", change)]
    process = command("train", "--config", "digits", "--seed", "1", "--output", tmp_path / "plain", *sets)
    assert process.communicate()[0] and process.returncode == 0
    assert outcome(tmp_path / "plain") == outcome(finished / "runs" / "frozen-codebook-seed1")
    assert outcome(tmp_path / "plain") != outcome(finished / "runs" / "frozen-codebook-seed0")


def test_the_folder_holds_numbers_table_and_figure(finished):
    for path in (finished / "runs").iterdir():
        assert {item.name for item in path.iterdir()} == KEPT
    report = json.loads((finished / "ablation.json").read_text())
    assert [(row["name"], sorted(row["seeds"]), row["failed"]) for row in report["rows"]] == [
        ("k-means, EMA", ["0", "1"], {}),
        ("Frozen codebook", ["0", "1"], {}),
    ]
    assert report["rows"][1]["changes"] == {"quantization.weight.update": "frozen"}
    assert (finished / "ablation.png").read_bytes().startswith(b"\x89PNG")
    assert not (finished / "pareto.png").exists()
    text = (finished / "table.md").read_text()
    assert "### codebook" in text and "| Frozen codebook | " in text and "not finished" not in text


def test_all_rows_of_a_seed_come_before_the_next_seed(finished):
    ends = sorted((path.stat().st_mtime_ns, path.parent.name) for path in finished.glob("runs/*/result.json"))
    assert [name for _, name in ends] == [
        f"{row}-seed{seed}" for seed in (0, 1) for row in ("k-means-ema", "frozen-codebook")
    ]


def test_what_is_finished_is_left_alone(finished, weights, monkeypatch):
    before = times(finished / "runs")
    monkeypatch.setattr(ablation, "Run", None)
    monkeypatch.setattr(ablation, "check_files", None)  # what is finished needs no files
    file = write(finished, weights, reference="k-means, EMA")
    assert ablate(file, finished) == 0
    assert ablate(file, finished, seeds=(1,), only="frozen|Frozen") == 0
    assert CliRunner().invoke(app, ["ablate", "--config", file, "--output", str(finished), "--report"]).exit_code == 0
    assert times(finished / "runs") == before


def test_runs_of_another_configuration_are_not_mixed_in(finished, weights):
    file = write(finished, weights)
    with pytest.raises(ValueError, match=r"row 'k-means, EMA': .*k-means-ema-seed0 holds a run with another qat.lr;"):
        ablate(file, finished, [{"qat": {"lr": 0.5}}], seeds=(5,))
    assert not list(finished.glob("runs/*-seed5"))
    changed = write(finished, weights, rows=[ROWS[0], {**ROWS[1], "set": {"qat": {"lr": 0.5}}}])
    with pytest.raises(ValueError, match=r"row 'Frozen codebook': .*frozen-codebook-seed0 was run with another qat.lr"):
        write_report(finished, read_ablation(changed))


def test_rows_may_be_run_with_options_of_their_own(finished, weights, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs" / "k-means-ema-seed0", tmp_path / "runs" / "k-means-ema-seed0")
    file = write(tmp_path, weights, seeds=[0])
    options = [{"qat": {"epochs": 0, "lr": 0.5}}]
    assert ablate(file, tmp_path, options, only="Frozen") == 0
    assert "- `qat.lr=0.5` in 1 of 2 runs\n" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(ablation, "Run", None)
    assert ablate(file, tmp_path, options, only="Frozen") == ablate(file, tmp_path, only="k-means") == 0
    for changes, only, name in (((), None, "Frozen codebook"), (options, "k-means", "k-means, EMA")):
        with pytest.raises(ValueError, match=rf"row '{name}': .* holds a run with another qat\.epochs, qat\.lr;"):
            ablate(file, tmp_path, changes, only=only)
    changed = write(tmp_path, weights, rows=[{**ROWS[0], "set": {"qat": {"lr": 0.5}}}, ROWS[1]])
    with pytest.raises(ValueError, match=r"row 'k-means, EMA': .* was run with another qat\.lr"):  # before any runs
        ablate(changed, tmp_path, options, seeds=(1,), only="Frozen")


def test_a_file_may_be_right_with_options_alone(weights, tmp_path):
    settings = {
        "model": {"finetune": True},
        "float": {"epochs": 0},
        "qat": {"epochs": 0, "label_smoothing": "1e-1"},
        "distillation": {"teacher": {"name": "digits_cnn"}},
    }
    options = [
        {"model": {"weights": str(weights)}, "distillation": {"alpha": 0.5, "teacher": {"weights": str(weights)}}}
    ]
    file = write(tmp_path, weights, rows=ROWS[:1], seeds=[0], set=merge(QUICK, settings))
    with pytest.raises(ValueError, match="row 'k-means, EMA': model.finetune trains given weights on"):
        ablate(file, tmp_path)
    assert ablate(file, tmp_path, options) == ablate(file, tmp_path, options) == 0
    report_only(file, tmp_path)
    lines = (tmp_path / "table.md").read_text().partition("Besides what the file says:\n\n")[2].splitlines()
    said = ["distillation.alpha=0.5", f'distillation.teacher.weights="{weights}"']
    assert lines == [f"- `{setting}` in 1 of 1 runs" for setting in said]


def test_a_budget_is_refused_where_no_number_of_classes_meets_it():
    def check(bits):
        ablation._check_network(resolve("digits", [{"allocation": {"weight_bits": bits}}]))

    with pytest.raises(ValueError, match="no allocation meets the budget of 2.03"):
        check(2.03)
    check(2.05)  # of the digits' ten classes 2.09 is the least, of two 2.04


def test_what_a_row_sets_of_the_engine_must_be_what_it_was_run_with(finished, weights, tmp_path):
    shutil.copytree(finished / "runs" / "k-means-ema-seed0", tmp_path / "runs" / "k-means-ema-seed0")
    for engine, fits in (({}, True), ({"accumulation": 1}, True), ({"accumulation": 2}, False)):
        row = {**ROWS[0], "set": {"engine": engine}}
        file = write(tmp_path, weights, rows=[row], seeds=[0])
        for act in (lambda file=file: ablate(file, tmp_path), lambda file=file: report_only(file, tmp_path)):
            if fits:
                act()
            else:
                with pytest.raises(ValueError, match=r"row 'k-means, EMA': .* with another engine\.accumulation"):
                    act()
    file = write(tmp_path, weights, rows=[ROWS[0]], seeds=[0])
    assert ablate(file, tmp_path, [{"engine": {"channels_last": True}}]) == 0  # of the machine, not of the row
    with pytest.raises(ValueError, match=r"holds a run with another engine\.accumulation"):  # images of a step
        ablate(file, tmp_path, [{"engine": {"accumulation": 2}}])


def test_only_the_chosen_rows_need_their_files(finished, weights, tmp_path):
    shutil.copytree(finished / "runs" / "k-means-ema-seed0", tmp_path / "runs" / "k-means-ema-seed0")
    later = {"name": "later", "set": {"start": str(tmp_path / "runs" / "early-seed0")}}
    file = write(tmp_path, weights, rows=[ROWS[0], later], seeds=[0])
    assert ablate(file, tmp_path, only="k-means") == 0
    with pytest.raises(ValueError, match="row 'later': no such file"):
        ablate(file, tmp_path)


def test_a_report_needs_no_images(tmp_path):
    rows = [{"name": "a"}]
    (tmp_path / "rows.yaml").write_text(yaml.safe_dump({"set": {"data": {"name": "imagefolder"}}, "rows": rows}))
    parsed = read_ablation(tmp_path / "rows.yaml")
    folder = run_folder(tmp_path, parsed.rows[0], 0)
    config = resolve("digits", [{"data": {"name": "imagefolder", "root": "images"}, "qat": {"lr": 0.7}}])
    folder.path.mkdir(parents=True)
    folder.config.write_text(dump_yaml(config))
    folder.result.write_text(json.dumps({**dict.fromkeys(ablation_report.NUMBERS, 1.0)}))
    report_only(str(tmp_path / "rows.yaml"), tmp_path)
    assert "- `qat.lr=0.7` in 1 of 1 runs\n" in (tmp_path / "table.md").read_text()


def test_the_table_says_what_runs_were_told_besides_the_file(finished, weights, tmp_path):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    report_only(write(tmp_path, weights), tmp_path)
    assert (
        "Besides" not in (tmp_path / "table.md").read_text() and "precision" not in (tmp_path / "table.md").read_text()
    )
    older, resumed = (tmp_path / "runs" / f"{name}-seed1" for name in ("k-means-ema", "frozen-codebook"))
    for file, before, after, times in (
        (older / "config.yaml", "mixed_precision: 'no'", "mixed_precision: bf16", 1),
        (older / "metrics.jsonl", '"mixed_precision": "no", ', "", 2),  # as runs were written once
        (resumed / "metrics.jsonl", '"mixed_precision": "no"', '"mixed_precision": "bf16"', 1),  # the first epoch
    ):
        assert file.read_text().count(before) >= times
        file.write_text(file.read_text().replace(before, after, times))
    other = merge(QUICK, {"model": {"weights": str(weights)}, "qat": {"lr": 0.5}})
    report_only(write(tmp_path, weights, set=other), tmp_path)
    lr = resolve("digits", [QUICK]).qat.lr
    text = (tmp_path / "table.md").read_text()
    assert f"Besides what the file says:\n\n- `qat.lr={lr}` in 4 of 4 runs\n" in text
    kinds = "`bf16` in seed 1 of 1 rows, `bf16 and no` in seed 1 of 1 rows, `no` in seed 0 of 2 rows"
    assert f"Mixed precision differs: {kinds}." in text


def test_a_base_beside_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("seed: 5\n")
    file = tmp_path / "ablation.yaml"
    file.write_text(yaml.safe_dump({"base": "mine.yaml", "rows": [{"name": "a"}]}))
    assert read_ablation(file).base == str(tmp_path / "mine.yaml")
    file.write_text(yaml.safe_dump({"base": "digits", "rows": [{"name": "a"}]}))
    assert read_ablation(file).base == "digits"


def test_a_report_of_some_runs_alone_is_refused(finished, weights, tmp_path):
    file = write(tmp_path, weights)
    said = CliRunner().invoke(
        app, ["ablate", "--config", file, "--output", str(finished), "--report", "--seeds", "0", "--only", "k"]
    )
    assert said.exit_code == 1 and "--report reads what has been run, and takes no --seeds, --only" in said.output
    said = CliRunner().invoke(app, ["ablate", "--config", file, "--output", str(finished), "--report"])
    assert said.exit_code == 0 and said.output.strip().replace("\n", "").endswith("table.md")


def test_rows_may_come_from_another_machine():
    one = {
        "model": {"weights": "here/net.safetensors"},
        "data": {"name": "imagefolder", "root": "here", "workers": 0},
    }
    other = {"model": {"weights": "/there/net.safetensors"}, "data": {"name": "imagefolder", "root": "/there"}}
    other["data"].update(index="lists", workers=3)
    assert differences(resolve("digits", [one]), resolve("digits", [other])) == []
    for key in ("model.weights", "start", "allocation.file", "distillation.teacher.weights"):
        changes = [
            parse_assignment(f"{key}={place}")
            for place in ("here/a.safetensors", "/there/a.safetensors", "here/b.safetensors")
        ]
        same, moved, another = (resolve("digits", [one, change]) for change in changes)
        assert differences(same, moved) == []
        assert differences(same, another) == [key]
        changes = [parse_assignment(f"{key}={run}/model.safetensors") for run in ("a", "b")]
        assert differences(*(resolve("digits", [change]) for change in changes)) == [key]  # every run has one
    changes = [parse_assignment(f"start={study}/runs/2.81-3-bits-seed0") for study in ("a", "b")]  # every study has one
    assert differences(*(resolve("digits", [change]) for change in changes)) == ["start"]
    lists = (
        "[here/a.safetensors, b.safetensors]",
        "[/there/a.safetensors, b.safetensors]",
        "[b.safetensors, a.safetensors]",
    )
    same, moved, another = (resolve("digits", [one, parse_assignment(f"start={files}")]) for files in lists)
    assert differences(same, moved) == []
    assert differences(same, another) == ["start"]
    assert differences(same, resolve("digits", [one, parse_assignment("start=here/a.safetensors")])) == ["start"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"set": {"qat": {"epoch": 3}}}, "row 'bad': unknown key 'epoch' in qat; did you mean 'epochs'"),
        ({"set": {"quantization": {"weight": {"bits": 9}}}}, "row 'bad': weight bits must be a whole number"),
        ({"set": {"quantization": {"overrides": {"convv": None}}}}, "row 'bad': overrides match no layer: convv"),
        ({"set": {"model": {"weights": "nowhere.pt"}}}, "row 'bad': no such file: nowhere.pt"),
        (
            {"set": {"distillation": {"teacher": {"name": "digits_cnn", "weights": "nowhere.pt"}}}},
            "row 'bad': no such file: nowhere.pt",
        ),
        ({"set": {"model": {"name": "resnet21"}}}, "row 'bad': "),
        ({"set": {"allocation": {"weight_bits": 0.5}}}, "row 'bad': no allocation meets the budget of 0.5"),
        ({"set": {"seed": 3}}, "row 'bad' sets seed"),
        ({"set": [1]}, "rows[2] (bad).set must be a mapping, got [1]"),
        ({"sett": {}}, "unknown key 'sett' in rows[2] (bad); did you mean 'set'"),
        ({"name": "Frozen-codebook"}, "rows 'Frozen codebook' and 'Frozen-codebook' would share the folder"),
        ({"name": "?"}, "a row needs a name with a letter or a digit"),
        ({"name": "two\nlines"}, "are printed on one line, got 'two\\nlines'"),
        ({"name": "bad", "curve": "a\tb"}, "are printed on one line"),
    ],
)
def test_a_bad_row_is_refused_before_any_runs(tmp_path, weights, fields, message):
    file = write(tmp_path, weights, rows=[*ROWS, {"name": "bad", **fields}])
    result = CliRunner().invoke(app, ["ablate", "--config", file, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({"reference": "k-mean"}, {}, "the reference 'k-mean' is none of the rows: k-means, EMA, Frozen codebook"),
        ({"seeds": [0, 0]}, {}, "seeds must be different whole numbers"),
        ({"rows": []}, {}, "needs rows"),
        ({"rows": {"name": "a"}}, {}, "rows must be a list"),
        ({}, {"only": "gradient"}, "--only 'gradient' fits no row; rows: k-means, EMA, Frozen codebook"),
        ({}, {"only": "("}, "no regular expression"),
        ({}, {"changes": [{"seed": 4}]}, "sets seed, which adq ablate chooses itself"),
    ],
)
def test_what_is_wrong_with_the_whole_is_said(tmp_path, weights, fields, options, message):
    with pytest.raises(ValueError, match=".*") as caught:
        ablate(write(tmp_path, weights, **fields), tmp_path, **options)
    assert message in str(caught.value)


def test_a_failing_row_is_recorded_and_tried_again(finished, tmp_path, weights):
    bfloat16 = {"name": "bfloat16", "set": {"engine": {"mixed_precision": "bf16"}}}
    rows = [{"name": "diverges", "set": {"qat": {"lr": 1e30}}}, bfloat16, ROWS[0]]
    file = write(tmp_path, weights, rows=rows, seeds=[0])
    result = CliRunner().invoke(app, ["ablate", "--config", file, "--output", str(tmp_path)])
    assert result.exit_code == 1 and "table.md; 1 failed" in result.output
    error = tmp_path / "runs" / "diverges-seed0" / "error.txt"
    reason = error.read_text().splitlines()[0]
    assert reason.startswith("TrainingStopped: training stopped: the loss is not finite at epoch 1")
    assert f"| diverges | seed 0 failed: {reason[:60]}" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "runs" / "bfloat16-seed0" / "result.json").exists()
    assert outcome(tmp_path / "runs" / "k-means-ema-seed0") == outcome(finished / "runs" / "k-means-ema-seed0")
    failed_at = error.stat().st_mtime_ns
    assert ablate(file, tmp_path) == 1
    assert error.stat().st_mtime_ns > failed_at


def test_killed_in_a_row_it_is_resumed_to_the_same_result(finished, tmp_path, weights, capsys):
    file = write(tmp_path, weights, seeds=[0])
    process = command("ablate", "--config", file, "--output", tmp_path, "--set", "engine.checkpoint_steps=1")
    wait_for(process, lambda: list(tmp_path.glob("runs/k-means-ema-seed0/checkpoints/*-qat-0001-000001")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("runs/*/result.json")), "it ended before it was killed"
    assert ablate(file, tmp_path, only="k-means") == 0
    text = capsys.readouterr().out
    assert "qat   2/2" in text and "qat   1/2" not in text
    assert outcome(tmp_path / "runs" / "k-means-ema-seed0") == outcome(finished / "runs" / "k-means-ema-seed0")
    assert not list(tmp_path.glob("runs/frozen*"))


@pytest.mark.parametrize("fails", [True, False])
def test_told_to_stop_while_a_row_ends_no_other_begins(tmp_path, weights, monkeypatch, fails):
    class Ending(Run):
        def execute(self):
            with self.departure:
                os.kill(os.getpid(), signal.SIGTERM)
            if fails:
                raise OSError("the disk is gone")

    monkeypatch.setattr(ablation, "Run", Ending)
    with pytest.raises(Preempted):
        ablate(write(tmp_path, weights, seeds=[0]), tmp_path)
    assert (tmp_path / "runs" / "k-means-ema-seed0" / "error.txt").exists() == fails
    assert not list(tmp_path.glob("runs/frozen*"))


def test_told_to_stop_between_two_rows_no_other_begins(tmp_path, weights, monkeypatch):
    class Ended(Run):
        def execute(self):
            pass

    def told(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(ablation, "Run", Ended)
    monkeypatch.setattr(ablation, "report", told)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(Preempted):
            ablate(write(tmp_path, weights, seeds=[0]), tmp_path)
        assert signal.getsignal(signal.SIGTERM) is not before
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not list(tmp_path.glob("runs/frozen*"))


def test_two_processes_share_the_rows_and_run_none_twice(tmp_path, weights, capsys):
    file = write(tmp_path, weights, seeds=[0])
    process = command("ablate", "--config", file, "--output", tmp_path)
    wait_for(process, lambda: list(tmp_path.glob("runs/k-means-ema-seed0")))
    assert ablate(file, tmp_path) == 0
    own, other = capsys.readouterr().out, process.communicate()[0]
    assert process.returncode == 0, other
    assert f"[k-means, EMA, seed 0] is run by process {process.pid} on " in own
    for name in ("k-means, EMA", "Frozen codebook"):
        assert (own + other).count(f"[{name}, seed 0] quantization-aware training") == 1
    assert "[k-means, EMA, seed 0] top-1 " in other and "[Frozen codebook, seed 0] top-1 " in own
    assert all(row["seeds"] for row in json.loads((tmp_path / "ablation.json").read_text())["rows"])


def test_what_another_process_saw_fail_is_not_tried_again(tmp_path, weights, monkeypatch):
    file = write(tmp_path, weights, rows=[ROWS[0]], seeds=[0])
    error = tmp_path / "runs" / "k-means-ema-seed0" / "error.txt"
    monkeypatch.setattr(ablation, "Run", None)
    with ExitStack() as other:
        other.enter_context(locked(tmp_path / "locks" / "k-means-ema-seed0.lock"))

        def fail(seconds):
            error.parent.mkdir(parents=True)
            error.write_text("ValueError: by the other\n")
            other.close()

        monkeypatch.setattr(ablation.time, "sleep", fail)
        assert ablate(file, tmp_path) == 1
    assert error.read_text() == "ValueError: by the other\n"


def test_what_a_kill_left_of_a_finished_row_is_removed(tmp_path, weights):
    file = write(tmp_path, weights, rows=[ROWS[0]], seeds=[0])
    assert ablate(file, tmp_path) == 0
    run = tmp_path / "runs" / "k-means-ema-seed0"
    (run / "checkpoints").mkdir()
    (run / "model.safetensors").touch()
    assert ablate(file, tmp_path) == 0
    assert {item.name for item in run.iterdir()} == KEPT


# ---- the report, of results made up ------------------------------------------------------------------


def made_up(folder, top1, reference="a", **fields):
    """An ablation whose rows have the top-1 of ``top1[name][seed]``, None for a failure."""
    rows = [{"name": name, **fields.get(name.split()[0], {})} for name in top1]
    file = folder / "made-up.yaml"
    file.write_text(yaml.safe_dump({"rows": rows, "reference": reference}, sort_keys=False))
    parsed = read_ablation(file)
    for row in parsed.rows:
        for seed, value in enumerate(top1[row.name]):
            path = run_folder(folder, row, seed).path
            path.mkdir(parents=True)
            if value is None:
                (path / "error.txt").write_text("ValueError: a | b\n\ntrace")
                continue
            bits = float(len(row.name))
            numbers = {"float_top1": 92.0, "calibrated_top1": 80.0 + seed, "quantized_top1": value}
            numbers |= {"average_bits_quantized": bits, "average_bits_network": bits + 0.5}
            (path / "result.json").write_text(json.dumps({**numbers, "bytes_packed": 1500, "seconds": 10.0}))
    return parsed


def test_means_deviations_and_paired_differences(tmp_path):
    parsed = made_up(tmp_path, {"a": [90, 91, 92], "bb": [91, 91, 94], "ccc": [90, None, 90.5], "dddd": [None, None]})
    report = collect(tmp_path, parsed)
    a, b, c, d = report["rows"]
    assert (a["quantized_top1"], a["quantized_top1_std"], a["gap"], a["difference"]) == (91, 1, -1, None)
    assert b["quantized_top1"] == 92 and b["quantized_top1_std"] == pytest.approx(3**0.5)
    assert b["difference"] == 1 and b["difference_se"] == pytest.approx(1 / 3**0.5)  # of 1, 0, 2
    assert c["difference"] == -0.75 and c["difference_se"] == pytest.approx(0.75) and c["difference_seeds"] == 2
    assert c["calibrated_top1"] == 81 and c["failed"] == {1: "ValueError: a | b"}
    assert d["quantized_top1"] is None and d["difference"] is None and sorted(d["failed"]) == [0, 1]
    lines = table(report).splitlines()
    assert "| a | 91.00 ± 1.00 (3) | -1.00 | reference | 81.00 | 1.000 / 1.500 | 1.5 |" in lines
    assert "| bb | 92.00 ± 1.73 (3) | +0.00 | +1.00 ± 0.58 | 81.00 | 2.000 / 2.500 | 1.5 |" in lines
    assert "| ccc | 90.25 ± 0.35 (2); seed 1 failed: ValueError: a \\| b | -1.75 | -0.75 ± 0.75 | " in "\n".join(lines)
    assert any(line.startswith("| dddd | seed 0 failed: ValueError: a \\| b; seed 1 failed") for line in lines)


def test_one_seed_has_no_deviation(tmp_path):
    report = collect(tmp_path, made_up(tmp_path, {"a": [90], "bb": [91]}))
    assert report["rows"][1]["quantized_top1_std"] is None and report["rows"][1]["difference_se"] is None
    assert "| bb | 91.00 (1) | -1.00 | +1.00 | 80.00 |" in table(report)


def test_files_of_the_report(tmp_path):
    top1 = {"a": [90, 91], "u 1": [88, 89], "u 22": [90, 90.5], "v 1": [89, 89], "far": [10, 10], "late": []}
    fields = {"u": {"curve": "uniform", "group": "budget"}, "v": {"curve": "allocated", "group": "budget"}}
    write_report(tmp_path, made_up(tmp_path, top1, **fields))
    for name in ("ablation", "pareto"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "ablation.csv").open()))
    assert [row["name"] for row in rows] == list(top1)
    assert float(rows[1]["quantized_top1"]) == 88.5 and rows[1]["seeds"] == "2" and rows[5]["quantized_top1"] == ""
    assert "| late | not finished |" in (tmp_path / "table.md").read_text()


def test_names_are_drawn_as_they_are(tmp_path):
    top1 = {"costs $5_ and $6^": [90], "_one": [91], "two": [92]}
    fields = {name.split()[0]: {"curve": name, "group": "$g_$"} for name in top1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_report(tmp_path, made_up(tmp_path, top1, reference="two", **fields))
    assert label("costs $5_") == r"costs \$5_" and label("_one") == " _one"
    for name in ("ablation", "pareto"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0


@pytest.fixture
def bars(monkeypatch):
    """Arguments of every call of matplotlib's ``errorbar``."""
    found, errorbar = [], Axes.errorbar

    def noted(axis, x, y, **style):
        found.append((x, y, style))
        return errorbar(axis, x, y, **style)

    monkeypatch.setattr(Axes, "errorbar", noted)
    return found


def test_a_row_of_other_seeds_stands_beside_the_reference_as_at_equal_ones(tmp_path, bars):
    rows = collect(tmp_path, made_up(tmp_path, {"a": [90, 92], "b": [90.5], "c": [91, 92]}))["rows"]
    ablation_report.draw_rows(tmp_path / "a.png", rows, "a")
    assert [(x, style["markerfacecolor"]) for x, _, style in bars] == [
        (91, ablation_report.ORANGE),
        (91.5, "white"),
        (91.5, ablation_report.BLUE),
    ]


def test_one_seed_has_no_bar_on_a_curve(tmp_path, bars):
    fields = {name: {"curve": "one"} for name in ("a", "bb")}
    rows = collect(tmp_path, made_up(tmp_path, {"a": [90, 92], "bb": [91]}, **fields))["rows"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ablation_report.draw_curves(tmp_path / "a.png", rows)
    assert [[math.isnan(error) for error in style["yerr"]] for _, _, style in bars] == [[False, True]] * 2


def test_curves_of_networks_with_other_float_accuracies_have_lines_of_their_own(tmp_path, monkeypatch):
    rows = [
        {"curve": name, "float_top1": top1, "quantized_top1": top1 - 1, "quantized_top1_std": None,
         "average_bits_quantized": bits, "bytes_packed": 1000 * bits}
        for name, top1 in (("small", 90.0), ("large", 94.0)) for bits in (2, 3)
    ]  # fmt: skip
    lines = []
    monkeypatch.setattr("matplotlib.axes.Axes.axhline", lambda axis, y, **style: lines.append((y, style.get("label"))))
    ablation_report.draw_curves(tmp_path / "a.png", rows)
    assert sorted(lines) == [(90.0, None)] * 2 + [(94.0, None)] * 2
    lines.clear()
    ablation_report.draw_curves(tmp_path / "b.png", rows[:2])
    assert lines == [(90.0, "float")] * 2


def test_a_figure_that_cannot_be_drawn_is_said_and_ends_nothing(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(ablation_report, "draw_rows", fail)
    with pytest.warns(UserWarning, match="the figures of .* could not be drawn: no font"):
        write_report(tmp_path, made_up(tmp_path, {"a": [90]}))
    assert "| a | 90.00 (1) |" in (tmp_path / "table.md").read_text()


def test_names_become_folders():
    assert Row("k-means, EMA 0.99").slug == "k-means-ema-0.99"
    assert Row("3 / 4 bits (fixed)").slug == "3-4-bits-fixed"

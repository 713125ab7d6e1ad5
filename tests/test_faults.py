"""What production does to a run: killed at any moment, told to stop, a full disk, a lost process, a NaN."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from faults import Fault, warm_runner

from adq.store import check_seal
from adq.train.checkpoint import Checkpoints

SETTINGS = ("engine.checkpoint_steps=2", "data.limit_train=192", "data.limit_test=64", "data.calibration_images=64")
SETTINGS += ("qat.average_epochs=2", "qat.reestimate_batches=3")
TINY = ["train", "--float-epochs", "1", "--epochs", "2", "--batch-size", "32"]
TINY += [word for setting in SETTINGS for word in ("--set", setting)]
LONG = ["train", "--float-epochs", "100000", *TINY[3:]]
PAIR = [*TINY, "--set", "data.batch_size=16"]
KILLS = 20


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    with warm_runner(tmp_path_factory.mktemp("faults")) as runner:
        yield runner


def adq(runner, name, *arguments, resume=True, **options):
    return runner.start(name, *arguments, "--output", name, *(["--resume"] if resume else []), **options)


def wait_for(condition, process):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        assert process.is_alive(), "it ended too early"
        time.sleep(0.01)


def checkpoint(runner, name, pattern="*-float-0000-00000[24]"):
    return lambda: list(runner.folder.glob(f"{name}/checkpoints/{pattern}"))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["phase"], row["epoch"], row["train_loss"], row["test_top1"]) for row in rows if "epoch" in row]


def same_run(first, second):
    for name in ("float.safetensors", "model.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            return False
    return losses(first) == losses(second)


@pytest.fixture(scope="module")
def whole(runner):
    """Folder of the uninterrupted run, and how long it took."""
    began = time.monotonic()
    assert runner.finish(adq(runner, "whole", *TINY)) == 0, runner.said("whole")
    return runner.folder / "whole", time.monotonic() - began


def moments(seconds, seed=0):
    """Random moments in a run of that length: in time, between steps, and while files are brought to the disk."""
    draw = random.Random(seed)
    while True:
        yield Fault("seconds", draw.uniform(0.05, seconds))
        yield Fault("steps", draw.randint(1, 12))
        yield Fault("fsync", draw.randint(1, 90))


def test_killed_at_random_moments_every_run_is_resumed_and_none_is_lost(runner, whole):
    folder, seconds = whole
    faults, runs = moments(seconds), itertools.count()
    kills, outcomes, name, follows_kill = 0, Counter(), f"run-{next(runs)}", False
    while kills < KILLS or follows_kill:
        code = runner.finish(adq(runner, name, *TINY, fault=next(faults) if kills < KILLS else None))
        killed = code == -signal.SIGKILL
        whole_again = (killed or code == 0) and "damaged" not in runner.said(name)
        if follows_kill:
            outcomes["resumed" if whole_again else "lost"] += 1
        for left in Checkpoints(runner.folder / name / "checkpoints").all():
            check_seal(left.path)
        if not killed:
            assert code == 0 and same_run(folder, runner.folder / name), runner.said(name)
            name = f"run-{next(runs)}"
        kills, follows_kill = kills + killed, killed
    print(dict(outcomes))
    assert outcomes == {"resumed": KILLS}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_exits_with_0_and_says_how_to_go_on(runner, whole, number):
    name = f"told-{number.name}"
    process = adq(runner, name, *TINY, fault=Fault("told", number))
    assert runner.finish(process) == 0, runner.said(name)
    assert f"stopped by {number.name} after epoch 1, batch 3 of qat" in runner.said(name)
    assert f"{name}/checkpoints/000007-qat-0000-000003; go on with the same command and --resume" in runner.said(name)
    assert runner.finish(adq(runner, name, *TINY)) == 0, runner.said(name)
    assert same_run(whole[0], runner.folder / name)


def stopped(runner, name, process, *parts):
    assert runner.finish(process) == 1, runner.said(name)
    for part in ("error: training stopped: ", *parts):
        assert part in runner.said(name)
    assert "Traceback" not in runner.said(name)


def test_a_file_that_cannot_grow_stops_the_run_with_the_cause(runner, whole):
    size = (whole[0] / "float.safetensors").stat().st_size
    process = adq(runner, "limit", *TINY, limit=size + 1024)  # room for the weights, not for momentum beside them
    stopped(runner, "limit", process, "cannot write a checkpoint in limit/checkpoints: File too large")
    assert "the last good checkpoint is limit/checkpoints/000001-float-0000-000000" in runner.said("limit")
    assert sorted(os.listdir(runner.folder / "limit/checkpoints")) == ["000001-float-0000-000000"]
    assert runner.finish(adq(runner, "limit", *TINY)) == 0
    assert same_run(whole[0], runner.folder / "limit")


@pytest.fixture
def small_disk(runner):
    """A file system of 4 MiB at ``runner.folder / "disk"``."""
    folder = runner.folder / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_with_the_cause(runner, small_disk):
    process = adq(runner, "disk", *LONG)
    wait_for(checkpoint(runner, "disk"), process)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))
    cause = "cannot write a checkpoint in disk/checkpoints: No space left on device"
    stopped(runner, "disk", process, f"{cause}; the last good checkpoint is disk/checkpoints/0")
    kept = Checkpoints(small_disk / "checkpoints").all()
    assert kept
    check_seal(kept[-1].path)


def test_a_run_folder_that_cannot_be_written_stops_the_run(runner):
    process = adq(runner, "locked", *LONG)
    wait_for(checkpoint(runner, "locked"), process)
    metrics = runner.folder / "locked/metrics.jsonl"
    metrics.unlink(missing_ok=True)
    metrics.mkdir()  # root writes to read-only folders too
    stopped(runner, "locked", process, "Is a directory: 'locked/metrics.jsonl'", "the last good checkpoint is locked/")


# ---- two processes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(runner):
    """Folder of the uninterrupted run of two processes."""
    processes = runner.start_two("pair", *PAIR, "--output", "pair")
    assert [runner.finish(process) for process in processes] == [0, 0], runner.said("pair-0") + runner.said("pair-1")
    return runner.folder / "pair"


def test_a_lost_process_ends_the_others_at_once_and_torchrun_resumes_exactly(runner, pair):
    began = time.monotonic()
    faults = (None, Fault("steps", 6))
    survivor, victim = runner.start_two("torn", *PAIR, "--output", "torn", faults=faults)
    assert [runner.finish(victim), runner.finish(survivor)] == [-signal.SIGKILL, 1]
    assert time.monotonic() - began < 60
    said = runner.said("torn-0")
    assert "error: process 0 stopped: another process of the run is lost" in said
    assert "the last good checkpoint is torn/checkpoints/0" in said and "Traceback" not in said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    again = [*torchrun, "adq", *PAIR, "--output", "torn", "--resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    subprocess.run(again, cwd=runner.folder, env=environment, check=True, timeout=120)
    assert same_run(pair, runner.folder / "torn")


def test_a_process_that_hangs_is_given_up_after_the_timeout(runner):
    arguments = [*PAIR, "--output", "hung", "--set", "engine.timeout=12"]
    began = time.monotonic()
    waiting, hung = runner.start_two("hung", *arguments, faults=(None, Fault("hang", 3)))
    assert runner.finish(waiting) == 1, runner.said("hung-0")
    hung.kill()
    assert time.monotonic() - began < 60
    assert "another process of the run is lost" in runner.said("hung-0") and "Timed out" in runner.said("hung-0")
    assert "the last good checkpoint is hung/checkpoints/000002-float" in runner.said("hung-0")


def test_two_processes_leave_at_the_same_step(runner, pair):
    processes = runner.start_two("both", *PAIR, "--output", "both", faults=(None, Fault("told", signal.SIGTERM)))
    assert [runner.finish(process) for process in processes] == [0, 0], runner.said("both-0") + runner.said("both-1")
    assert "stopped by a signal to another process after epoch" in runner.said("both-0")
    again = runner.start_two("both", *PAIR, "--output", "both", "--resume")
    assert [runner.finish(process) for process in again] == [0, 0], runner.said("both-0") + runner.said("both-1")
    assert same_run(pair, runner.folder / "both")


def test_a_loss_of_nan_on_one_process_is_told_once(runner):
    processes = runner.start_two("nan", *PAIR, "--output", "nan", faults=(None, Fault("nan", 3)))
    assert [runner.finish(process) for process in processes] == [1, 1]
    assert "training stopped: the loss is not finite at epoch 1, batch" in runner.said("nan-0")
    assert "(process 1); the last good checkpoint is nan/checkpoints/000002-float-0000-000002" in runner.said("nan-0")
    assert "error:" not in runner.said("nan-1")


def test_a_run_of_two_processes_goes_on_with_one_and_again_with_two(runner):
    processes = runner.start_two("fewer", *PAIR, "--output", "fewer", faults=(Fault("steps", 4), Fault("steps", 4)))
    assert [runner.finish(process) for process in processes] == [-signal.SIGKILL] * 2
    assert runner.finish(adq(runner, "fewer", *PAIR, fault=Fault("steps", 20))) == -signal.SIGKILL
    assert "was written by 2 process(es), 32 images a batch" in runner.said("fewer")
    assert "not with the same bits" in runner.said("fewer")
    processes = runner.start_two("more", *PAIR, "--output", "fewer", "--resume")
    assert [runner.finish(process) for process in processes] == [0, 0], runner.said("more-0") + runner.said("more-1")
    assert "was written by 1 process(es), 16 images a batch" in runner.said("more-0")
    assert [row[:2] for row in losses(runner.folder / "fewer")] == [("float", 1), ("qat", 1), ("qat", 2)]

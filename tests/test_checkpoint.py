"""Checkpoints: what is kept, what damage is found, and how a run goes on from them."""

import errno
import itertools
import json
import math

import pytest
import torch
from torch import nn

pytest.importorskip("accelerate", reason="adq train needs the extra 'train'")
pytest.importorskip("sklearn", reason="the digits need scikit-learn")

from accelerate import Accelerator
from accelerate.utils import set_seed

from adq.train.checkpoint import Checkpoints, Layout, Progress
from adq.train.config import LARGEST_SEED, PhaseConfig
from adq.train.data import DataConfig, build_data
from adq.train.display import Display
from adq.train.engine import Trainer, seed_process
from adq.train.metrics import MetricsLog
from adq.train.together import Departure, SharedError

MODEL = nn.Linear(2, 2)
ONE = Layout(processes=1, batch_size=16, accumulation=1)


@pytest.fixture
def accelerator():
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(MODEL)
    yield accelerator
    accelerator.free_memory()


def write(checkpoints, accelerator, count, top1=()):
    for epoch, value in zip(range(count), itertools.chain(top1, itertools.repeat(None)), strict=False):
        checkpoints.save(accelerator, MODEL, Progress("qat", epoch, 0, ONE, top1=value), metrics_size=epoch)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change_progress(path):
    path.write_text(path.read_text().replace('"epoch": 2', '"epoch": 9'))


@pytest.mark.parametrize(
    ("file", "damage", "cause"),
    [
        ("model.safetensors", flip_a_bit, "model.safetensors holds other bytes than were written"),
        ("random_states_0.pkl", lambda path: path.unlink(), "random_states_0.pkl is missing"),
        ("model.safetensors", lambda path: path.write_bytes(b"short"), "model.safetensors has 5 bytes"),
        ("manifest.json", change_progress, "manifest.json holds other values than were written"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json is no manifest"),
        ("manifest.json", lambda path: path.unlink(), "manifest.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(tmp_path, accelerator, file, damage, cause):
    checkpoints, said = Checkpoints(tmp_path, keep=3), []
    write(checkpoints, accelerator, 3)
    newest = checkpoints.latest().path
    damage(newest / file)
    found = checkpoints.recover(said.append)
    assert (found.epoch, found.metrics_size) == (1, 1)
    assert len(said) == 1 and f"checkpoint {newest} is damaged: {cause}" in said[0]
    assert not newest.exists() and newest.with_name(f"{newest.name}.damaged").is_dir()
    write(checkpoints, accelerator, 1)
    assert checkpoints.latest().path.name.startswith("000004-"), "the number of the damaged one must not come again"


def test_nothing_but_damaged_checkpoints_is_an_error(tmp_path, accelerator):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.recover(print) is None
    write(checkpoints, accelerator, 2)
    for item in checkpoints.all():
        flip_a_bit(item.path / "model.safetensors")
    with pytest.raises(SharedError, match=r"all are damaged: 000002-qat-0001-000000\.damaged, 000001"):
        checkpoints.recover(lambda text: None)


def test_the_last_and_the_best_are_kept(tmp_path, accelerator):
    checkpoints = Checkpoints(tmp_path, keep=2)
    write(checkpoints, accelerator, 6, top1=[50.0, 90.0, 90.0, 70.0, 80.0, None])
    assert names(tmp_path) == ["000003-qat-0002-000000", "000005-qat-0004-000000", "000006-qat-0005-000000"]
    assert checkpoints.best().epoch == 2
    checkpoints.save(accelerator, MODEL, Progress("late", 0, 0, ONE), 0)
    assert names(tmp_path) == ["000006-qat-0005-000000", "000007-late-0000-000000"]


def test_a_full_disk_is_named_and_the_older_checkpoints_stay(tmp_path, accelerator, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    write(checkpoints, accelerator, 1)

    def fail(folder, **options):
        (tmp_path / ".writing" / "half").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", folder)

    monkeypatch.setattr(accelerator, "save_state", fail)
    with pytest.raises(SharedError, match=r"cannot write a checkpoint in .*: .*No space left"):
        checkpoints.save(accelerator, MODEL, Progress("qat", 1, 0, ONE), 0)
    assert names(tmp_path) == ["000001-qat-0000-000000"]
    monkeypatch.undo()
    assert checkpoints.recover(pytest.fail).epoch == 0


def test_the_place_in_an_epoch_is_counted_in_images():
    saved = Progress("qat", 3, 10, Layout(processes=4, batch_size=64, accumulation=1))
    assert saved.in_layout(saved.layout) is saved
    halved = saved.in_layout(Layout(processes=2, batch_size=32, accumulation=2))
    assert (halved.epoch, halved.batch) == (3, 20)
    uneven = saved.in_layout(Layout(processes=3, batch_size=48, accumulation=4))
    assert uneven.batch == 12 and uneven.batch * 48 <= 640 < (uneven.batch + 4) * 48


# ---- resuming ----------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a training loop in the middle."""


def trainer(folder, accumulation=1, steps=None, said=None, images=128):
    """Training of a network with dropout, from the same start each time; stopped by :class:`Stop` after ``steps``."""
    data = build_data(DataConfig("digits", batch_size=16, limit_train=images, limit_test=32))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation, step_scheduler_with_optimizer=False)
    set_seed(7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 10))
    train, test = accelerator.prepare(data.train), data.test
    done = itertools.count(1)

    def loss(logits, images, target):
        if next(done) == steps:
            raise Stop
        return nn.functional.cross_entropy(logits, target)

    display = Display(active=False)
    if said is not None:
        display.say = said.append
    folder.mkdir(exist_ok=True)
    return Trainer(
        accelerator, "float", PhaseConfig(epochs=2), model, loss, train, test, data.sampler,
        Checkpoints(folder / "checkpoints"), MetricsLog(folder / "metrics.jsonl"), display, Departure(60.0),
        checkpoint_steps=2,
    )  # fmt: skip


def test_resumed_inside_an_epoch_dropout_draws_the_same_numbers(tmp_path):
    whole = trainer(tmp_path / "whole").run()
    broken = trainer(tmp_path / "broken", steps=6)
    with pytest.raises(Stop):
        broken.run()
    resumed = trainer(tmp_path / "broken")
    progress = resumed.checkpoints.recover(pytest.fail)
    assert (progress.epoch, progress.batch) == (0, 4)
    weights = resumed.run(progress).state_dict()
    assert all(torch.equal(weights[key], value) for key, value in whole.state_dict().items())


@pytest.mark.parametrize(("batches", "of_last"), [(1, 1), (2, 2), (6, 2), (8, 4)])
def test_an_epochs_last_step_is_as_long_as_its_own_batches_make_it(tmp_path, batches, of_last):
    """Batches of the last step of four: they count for the whole of it, as do those of the steps before."""
    training, factors = trainer(tmp_path, accumulation=4, images=16 * batches), []
    training.accelerator.backward = lambda loss: factors.append(float(loss / found.pop()))
    found = []
    cross_entropy = training.loss

    def loss(*batch):
        found.append(cross_entropy(*batch).detach())
        return found[-1]

    training.loss = loss
    training.run()
    epoch = [1.0] * (batches - of_last) + [4.0 / of_last] * of_last
    assert factors == epoch * 2


def test_another_layout_goes_on_at_the_same_place_and_says_so(tmp_path):
    with pytest.raises(Stop):
        trainer(tmp_path, steps=6).run()
    said = []
    resumed = trainer(tmp_path, accumulation=2, said=said)
    resumed.sampler.seed = 2**40  # NumPy's global generator takes 32 bits
    resumed.run(resumed.checkpoints.recover(pytest.fail))
    assert any("goes on at the same place" in text and "not with the same bits" in text for text in said)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2]
    # warm-up takes the first of the two epochs, 4 steps each; the learning rate shown is that of the next step
    assert rows[0]["lr"] == pytest.approx(0.1)
    assert rows[1]["lr"] == pytest.approx(0.0, abs=1e-9)
    assert all(math.isfinite(row["train_loss"]) for row in rows)


def test_every_seed_serves_every_process_and_gives_each_its_own_numbers(monkeypatch):
    drawn = []
    for rank in range(3):
        monkeypatch.setattr("adq.train.engine.world", lambda rank=rank: (rank, 3))
        seed_process(LARGEST_SEED + 2)  # of quantization-aware training
        drawn.append(torch.rand(()).item())
    assert len(set(drawn)) == 3

"""Data pipelines: determinism, resumption, augmentation, and what bad input is told."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import pickle
import subprocess
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

from adq.models import create_model
from adq.train.data import Data, DataConfig, EpochSampler, build_data, check_classes, check_input
from adq.train.data.decoding import BrokenImages, broken_images
from adq.train.data.folder import list_files, open_rgb
from adq.train.data.memory import CropFlip, MemoryDataset, identity
from adq.train.data.sampler import stratified_order
from adq.train.display import Bar
from adq.train.pace import Pace

ROOT = os.environ.get("ADQ_TEST_DATA")
needs_data = pytest.mark.skipif(not ROOT, reason="ADQ_TEST_DATA is not set (folder with weights/ and cifar10/)")
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def message(error: type[Exception], call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return str(caught.value)


def write_image(path: Path, size: tuple[int, int] = (8, 8), seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_tree(root: Path, splits=("train", "test"), classes=("ant", "bee"), count: int = 6, size=(8, 8)) -> Path:
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            for i in range(count):
                write_image(root / split / name / f"{i:02}.png", size, seed=100 * s + 10 * c + i)
    return root


def folder(root: Path, **options) -> DataConfig:
    return DataConfig("imagefolder", root, **{"batch_size": 4, **options})


def batches(data: Data, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data.sampler.set_epoch(epoch)
    return list(data.train)


def same(first, second) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


# ---- what comes out ----------------------------------------------------------------------------------


def test_digits():
    data = build_data(DataConfig("digits"))
    assert (data.num_classes, data.input_shape, data.classes) == (10, (1, 8, 8), tuple("0123456789"))
    assert (len(data.train.dataset), len(data.test.dataset)) == (1437, 360)
    assert len(data.train) == 11 and sum(len(labels) for _, labels in data.test) == 360
    counts = torch.cat([labels for _, labels in data.test]).bincount()
    assert counts.min() >= 34 and counts.max() <= 38
    images, labels = next(iter(data.train))
    assert images.shape == (128, 1, 8, 8) and images.dtype == torch.float32 and labels.dtype == torch.int64
    everything = torch.cat([images for images, _ in data.test])
    assert abs(everything.mean()) < 0.05 and abs(everything.std() - 1) < 0.05
    other = build_data(DataConfig("digits", seed=5))
    assert same(data.test, other.test) and not same(batches(data), batches(other))


def test_image_folder_in_memory_equals_the_pixels(tmp_path):
    data = build_data(folder(write_tree(tmp_path), **GREY))
    assert isinstance(data.train.dataset, MemoryDataset)
    assert (data.classes, data.input_shape, data.name) == (("ant", "bee"), (3, 8, 8), "imagefolder")
    images = torch.cat([images for images, _ in data.test])
    labels = torch.cat([labels for _, labels in data.test])
    assert labels.tolist() == [0] * 6 + [1] * 6
    files = sorted((tmp_path / "test").rglob("*.png"))
    expected = torch.stack([torch.tensor(np.asarray(Image.open(file))).permute(2, 0, 1) for file in files])
    torch.testing.assert_close(images, (expected / 255 - 0.5) / 0.25)


def test_images_are_decoded_once_until_a_file_changes(tmp_path):
    root = write_tree(tmp_path)
    first, second = (build_data(folder(root, seed=seed)) for seed in (0, 1))
    batches(first)
    assert second.train.dataset.images is first.train.dataset.images
    with pytest.raises(ValueError, match="read-only"):
        first.train.dataset.images[0] = 0
    Image.new("RGB", (8, 8), "white").save(tmp_path / "test" / "ant" / "00.png")
    assert (build_data(folder(root)).test.dataset.images[0] == 255).all()


def test_normalisation_is_that_of_torchvision(tmp_path):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    data = build_data(folder(write_tree(tmp_path)))
    transform = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)])
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)
    with Image.open(tmp_path / "test" / "ant" / "00.png") as image:
        torch.testing.assert_close(data.test.dataset[0][0], transform(image).as_subclass(torch.Tensor))


def test_crop_and_flip_equal_plain_slicing():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 3, 6, 5), dtype=np.uint8)
    augment = CropFlip(padding=2, flip=True, seed=3)
    draws = augment.draw(epoch=1, length=64)
    assert draws[:, :2].min() == 0 and draws[:, :2].max() == 4 and set(draws[:, 2]) == {0, 1}
    out = augment.apply(images, draws)
    for image, (y, x, flip), got in zip(images, draws, out, strict=True):
        crop = np.pad(image, ((0, 0), (2, 2), (2, 2)))[:, y : y + 6, x : x + 5]
        assert np.array_equal(got, crop[:, :, ::-1] if flip else crop)
    assert not np.array_equal(draws, augment.draw(2, 64))


def test_splits(tmp_path):
    write_tree(tmp_path / "plain", splits=("",), count=10)
    data = build_data(folder(tmp_path / "plain", val_fraction=0.2))
    assert (len(data.train.dataset), len(data.test.dataset)) == (16, 4)
    assert torch.cat([labels for _, labels in data.test]).tolist() == [0, 0, 1, 1]
    assert same(data.test, build_data(folder(tmp_path / "plain", val_fraction=0.2)).test)
    assert same(data.test, build_data(folder(tmp_path / "plain", val_fraction=0.2, seed=1)).test)
    assert not same(data.test, build_data(folder(tmp_path / "plain", val_fraction=0.2, split_seed=1)).test)
    write_tree(tmp_path / "only", splits=("train",), count=10)
    assert len(build_data(folder(tmp_path / "only")).test.dataset) == 2
    write_tree(tmp_path / "val", splits=("train", "val"))
    assert len(build_data(folder(tmp_path / "val")).test.dataset) == 12


def test_held_out_images_are_announced(tmp_path, caplog):
    build_data(folder(write_tree(tmp_path, splits=("train",), count=10)))
    assert "no test or val split: 2 of its 20 images are held out" in caplog.text


def test_limits_keep_the_shares_of_the_classes(tmp_path):
    data = build_data(folder(write_tree(tmp_path, count=10), limit_train=8, limit_test=6))
    assert data.train.dataset.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.dataset.labels.tolist() == [0] * 3 + [1] * 3
    other = build_data(folder(tmp_path, limit_train=8, limit_test=6, seed=1))
    assert same(data.test, other.test) and np.array_equal(data.train.dataset.images, other.train.dataset.images)
    digits = build_data(DataConfig("digits", limit_train=100, limit_test=20))
    assert np.bincount(digits.train.dataset.labels).tolist() == [10] * 10
    assert np.bincount(digits.test.dataset.labels).tolist() == [2] * 10


def test_stratified_order_of_unequal_classes():
    labels = np.repeat([0, 1, 2], [80, 19, 1])
    order = stratified_order(labels, seed=0)
    assert sorted(order.tolist()) == list(range(100))
    assert np.bincount(labels[order[:20]], minlength=3).tolist() == [16, 4, 0]


def test_incomplete_batch_is_dropped_only_from_a_larger_set(tmp_path):
    write_tree(tmp_path)
    assert [len(y) for _, y in build_data(folder(tmp_path, batch_size=5)).train] == [5, 5]
    assert [len(y) for _, y in build_data(folder(tmp_path, batch_size=100)).train] == [12]
    assert [len(y) for _, y in build_data(folder(tmp_path, batch_size=12)).train] == [12]
    assert [len(y) for _, y in build_data(folder(tmp_path, eval_batch_size=5)).test] == [5, 5, 2]


@pytest.mark.parametrize("in_memory", [True, False])
def test_calibration_is_fixed_and_not_augmented(tmp_path, in_memory):
    config = folder(write_tree(tmp_path), in_memory=in_memory, image_size=8, workers=0, calibration_images=5)
    data = build_data(config)
    first, again = list(data.calibration), list(data.calibration)
    assert same(first, again) and sum(len(labels) for _, labels in first) == 5
    plain = build_data(folder(tmp_path, in_memory=in_memory, image_size=8, workers=0, augment=False)).train.dataset
    everything = torch.stack([plain[i][0] for i in range(12)])
    assert all((image == everything).flatten(1).all(1).any() for images, _ in first for image in images)


def test_each_calibration_batch_is_of_all_classes(tmp_path):
    config = folder(write_tree(tmp_path, count=40), batch_size=20, calibration_images=80)
    for _, labels in build_data(config).calibration:
        assert np.bincount(labels.numpy(), minlength=2).min() >= 4


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "YCbCr"])
def test_image_modes_become_rgb(tmp_path, mode):
    suffix = ".tiff" if mode in ("CMYK", "YCbCr") else ".png"
    path = tmp_path / f"image{suffix}"
    Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode).save(path)
    image = open_rgb(str(path))
    assert image.mode == "RGB" and image.size == (5, 4)
    assert np.asarray(image).min() == 255


def test_palette_with_transparency(tmp_path, recwarn):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "p.png", transparency=b"\x80\x40")
    assert open_rgb(str(tmp_path / "p.png")).getpixel((0, 0)) == (10, 200, 30)
    assert not recwarn.list


def test_images_of_many_sizes(tmp_path):
    pytest.importorskip("torchvision")
    write_tree(tmp_path, size=(12, 10))
    write_tree(tmp_path / "", splits=("train",), classes=("bee",), size=(20, 9))
    assert build_data(folder(tmp_path, image_size=8)).train.dataset.images.shape == (12, 3, 8, 8)
    data = build_data(folder(tmp_path, workers=0))
    assert data.input_shape == (3, 224, 224) and next(iter(data.test))[0].shape == (4, 3, 224, 224)


def test_imagenet_layout_reads_files(tmp_path):
    pytest.importorskip("torchvision")
    write_tree(tmp_path, splits=("train", "val", "test"), count=3, size=(40, 30))
    data = build_data(DataConfig("imagenet", tmp_path, batch_size=2, workers=0))
    assert data.input_shape == (3, 224, 224) and data.test.dataset.files.paths[0].startswith(str(tmp_path / "val"))
    images, labels = next(iter(data.train))
    assert images.shape == (2, 3, 224, 224) and images.dtype == torch.float32 and labels.dtype == torch.int64
    assert build_data(DataConfig("imagenet", tmp_path, workers=0, image_size=32)).input_shape == (3, 32, 32)


# ---- determinism and resumption ----------------------------------------------------------------------


@pytest.fixture(params=["memory", "files", "workers"])
def config(request, tmp_path) -> DataConfig:
    pytest.importorskip("torchvision")
    write_tree(tmp_path, count=8, size=(16, 16))
    files = request.param != "memory"
    return folder(tmp_path, image_size=16, in_memory=not files, workers=2 if request.param == "workers" else 0)


def test_epochs_repeat_and_differ(config):
    data = build_data(config)
    first = batches(data, 0)
    second = batches(data, 1)
    assert not same(first, second)
    assert sorted(torch.cat([y for _, y in second]).tolist()) == [0] * 8 + [1] * 8
    torch.manual_seed(99)
    np.random.seed(99)
    assert same(second, batches(data, 1))
    assert same(first, batches(build_data(config), 0))


def test_resumed_epoch_continues_bit_for_bit(config):
    full = batches(build_data(config), 3)
    data = build_data(config)
    data.sampler.resume(3, samples=2 * config.batch_size)
    assert same(list(data.train), full[2:])
    assert same(batches(data, 3), full)  # only the next pass is shortened


def test_a_sample_is_augmented_alike_in_any_batch(config):
    data = build_data(config)
    data.sampler.set_epoch(2)
    indices = list(data.sampler)
    images = torch.cat([images for images, _ in data.train])
    single = torch.stack([data.train.dataset[index][0] for index in reversed(indices)]).flip(0)
    assert torch.equal(images, single)


def test_files_leave_the_global_generator_alone(tmp_path):
    pytest.importorskip("torchvision")
    data = build_data(folder(write_tree(tmp_path), in_memory=False, image_size=8, workers=0))
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    data.train.dataset[0]
    assert torch.equal(torch.rand(3), expected)


def test_epoch_set_during_an_epoch_waits_for_the_next(config):
    data = build_data(config)
    full, later = batches(data, 0), batches(data, 1)
    data.sampler.set_epoch(0)
    seen = []
    for batch in data.train:
        seen.append(batch)
        data.sampler.set_epoch(1)
    assert same(seen, full) and same(list(data.train), later)


def test_sampler_skips_without_decoding(tmp_path, monkeypatch):
    data = build_data(folder(write_tree(tmp_path), in_memory=False, image_size=8, workers=0))
    opened = []
    monkeypatch.setattr("adq.train.data.folder.open_rgb", lambda path: opened.append(path) or open_rgb(path))
    data.sampler.resume(0, 8)
    assert len(list(data.train)) == 1 and len(opened) == 4


def test_sampler_refuses_nonsense():
    sampler = EpochSampler(10)
    assert "must not be negative, got -1" in message(ValueError, sampler.set_epoch, -1)
    assert "has 10 samples, cannot resume after 11" in message(ValueError, sampler.resume, 0, 11)


def test_accelerate_shards_the_same_batches():
    module = pytest.importorskip("accelerate.data_loader")
    data = build_data(DataConfig("digits", batch_size=64))
    full = batches(data, 5)
    shards = []
    for process in range(2):
        prepared = module.prepare_data_loader(data.train, num_processes=2, process_index=process)
        prepared.set_epoch(5)
        assert data.sampler.epoch == 5
        shards.append(list(prepared))
        prepared.set_epoch(5)
        data.sampler.resume(5, samples=2 * 2 * 64)
        assert same(list(prepared), shards[-1][2:])
    assert same([batch for pair in zip(*shards, strict=True) for batch in pair], full[: 2 * len(shards[0])])


def test_dataset_pickles_for_spawned_workers(tmp_path):
    data = build_data(folder(write_tree(tmp_path)))
    copied = pickle.loads(pickle.dumps(data.train.dataset))
    loader = DataLoader(copied, 4, sampler=EpochSampler(12), collate_fn=pickle.loads(pickle.dumps(identity)))
    assert same(list(loader), batches(data, 0))


# ---- torchvision's CIFAR-10 --------------------------------------------------------------------------


def write_cifar10(root: Path, monkeypatch) -> Path:
    CIFAR10 = pytest.importorskip("torchvision.datasets").CIFAR10
    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch(name: str) -> list[str]:
        images = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return [name, write(name, {"data": images, "labels": [i % 10 for i in range(20)]})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    names = [f"class{i}" for i in range(10)]
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", {"label_names": names})}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return root


def test_cifar10(tmp_path, monkeypatch):
    data = build_data(DataConfig("cifar10", write_cifar10(tmp_path, monkeypatch), augment=False))
    assert (len(data.train.dataset), len(data.test.dataset), data.input_shape) == (100, 20, (3, 32, 32))
    assert data.classes[3] == "class3" and data.test.dataset.labels.tolist() == [i % 10 for i in range(20)]
    raw = pickle.loads((tmp_path / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]
    assert np.array_equal(data.test.dataset.images[7].ravel(), raw[7])


def test_cifar10_missing_or_damaged(tmp_path, monkeypatch):
    write_tree(tmp_path / "tree", count=1)
    text = message(FileNotFoundError, build_data, DataConfig("cifar10", tmp_path / "tree"))
    assert f"no cifar-10-batches-py in {tmp_path / 'tree'}" in text and "name='imagefolder'" in text
    root = write_cifar10(tmp_path / "cifar", monkeypatch)
    (root / "cifar-10-batches-py" / "data_batch_2").write_bytes(b"cut")
    text = message(ValueError, build_data, DataConfig("cifar10", root))
    assert "cifar-10-batches-py is incomplete or damaged" in text and str(root) in text


# ---- bad input ---------------------------------------------------------------------------------------


def test_folder_does_not_exist(tmp_path):
    assert f"{tmp_path / 'none'} does not exist" in message(FileNotFoundError, build_data, folder(tmp_path / "none"))
    (tmp_path / "images.tar").touch()
    assert "unpack archives" in message(NotADirectoryError, build_data, folder(tmp_path / "images.tar"))


def test_no_class_folders(tmp_path):
    text = message(ValueError, build_data, folder(tmp_path))
    assert f"no class folders in {tmp_path}" in text and "it is empty" in text
    write_tree(tmp_path)
    (tmp_path / "val").mkdir()
    write_image(tmp_path / "val" / "0.png")
    text = message(ValueError, build_data, DataConfig("imagenet", tmp_path))
    assert f"no class folders in {tmp_path / 'val'}" in text and "holds 1 images directly" in text


def test_no_images_and_empty_class(tmp_path):
    for name in ("ant", "bee", "cow"):
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "train" / "ant" / "notes.txt").touch()
    text = message(ValueError, build_data, folder(tmp_path))
    assert f"no images in the 3 class folders of {tmp_path / 'train'}" in text and "looked for .jpg .jpeg .png" in text
    write_image(tmp_path / "train" / "ant" / "0.png")
    text = message(ValueError, build_data, folder(tmp_path))
    assert f"class folders without images in {tmp_path / 'train'}: bee, cow (looked for" in text


def test_no_training_split(tmp_path):
    write_tree(tmp_path, splits=("val",))
    assert f"no train folder in {tmp_path}, only val" in message(FileNotFoundError, build_data, folder(tmp_path))


def test_different_classes(tmp_path):
    write_tree(tmp_path, splits=("train",), classes=("ant", "bee"))
    write_tree(tmp_path, splits=("test",), classes=("bee", "cow"))
    text = message(ValueError, build_data, folder(tmp_path))
    assert f"only in {tmp_path / 'train'}: ant" in text and f"only in {tmp_path / 'test'}: cow" in text


def test_hidden_files_and_folders_are_ignored(tmp_path):
    write_tree(tmp_path)
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / "ant" / "._00.png").write_bytes(b"metadata")
    assert len(build_data(folder(tmp_path)).train.dataset) == 12


def truncate(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-90])
    return str(path)


def test_broken_images_are_listed(tmp_path):
    write_tree(tmp_path, count=7)
    broken = [truncate(path) for path in sorted((tmp_path / "train").rglob("*.png"))[1:13]]
    text = message(ValueError, build_data, folder(tmp_path))
    assert "12 of 14 training images cannot be decoded" in text and "and 2 more" in text
    assert all(path in text for path in broken[:10]) and broken[10] not in text


def test_all_images_broken(tmp_path):
    for path in write_tree(tmp_path, count=2).rglob("*.png"):
        path.write_bytes(b"not an image")
    assert "4 of 4 training images cannot be decoded" in message(ValueError, build_data, folder(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_in_the_worker_path(tmp_path, workers):
    pytest.importorskip("torchvision")
    path = truncate(write_tree(tmp_path, size=(16, 16)) / "train" / "bee" / "02.png")
    data = build_data(folder(tmp_path, in_memory=False, workers=workers))
    text = message(ValueError, lambda: list(data.train))
    assert f"cannot decode the image {path}" in text and "truncated" in text


def test_sixteen_bit_images_are_refused(tmp_path):
    write_tree(tmp_path)
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "train" / "ant" / "00.png")
    text = message(ValueError, build_data, folder(tmp_path))
    assert "1 of 12 training images" in text and "00.png (pixels of mode I;16" in text


def test_one_image_of_another_size(tmp_path):
    write_tree(tmp_path, count=70)
    write_image(tmp_path / "train" / "ant" / "01.png", (9, 8))
    text = message(ValueError, build_data, folder(tmp_path))
    assert "1 of 140 training images are not 8x8" in text and "01.png (9x8)" in text and "Give image_size" in text
    write_image(tmp_path / "train" / "ant" / "00.png", (9, 8))
    assert "needs image_size" in message(ValueError, build_data, folder(tmp_path, in_memory=True))


def test_too_small_to_split(tmp_path):
    write_tree(tmp_path, splits=("train",), classes=("ant",), count=2)
    assert "2 images cannot be split by val_fraction=0.1" in message(ValueError, build_data, folder(tmp_path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "cifar-10"}, "unknown data 'cifar-10'; did you mean 'cifar10'? Known: digits, imagefolder"),
        ({"name": "?"}, "unknown data '?'. Known: digits"),
        ({"name": "imagenet"}, "data 'imagenet' needs root"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"image_size": 2.5}, "image_size must be an integer"),
        ({"image_size": 32}, "the images of digits have side 8, not 32"),
        ({"in_memory": False}, "data 'digits' is always held in memory"),
        ({"workers": -1}, "workers must be an integer of at least 0"),
        ({"seed": -3}, "seed must be an integer of at least 0"),
        ({"in_memory": "yes"}, "in_memory must be true, false or 'auto', got 'yes'"),
        ({"val_fraction": 1.0}, "val_fraction must lie between 0 and 1"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean must hold 1 number(s)"),
        ({"std": (0.0,)}, "std must be positive"),
    ],
)
def test_refused_settings(options, expected):
    assert expected in message(ValueError, DataConfig, **options)


def test_check_classes():
    data = build_data(DataConfig("digits"))
    check_classes(create_model("digits_cnn", 10), data)
    text = message(ValueError, check_classes, create_model("digits_cnn", 100), data)
    assert text == "the model has 100 classes, the data 'digits' has 10"
    assert "the model has 7 classes" in message(
        ValueError, check_classes, nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 7)), data
    )
    check_classes(nn.Conv2d(1, 3, 1), data)


def test_check_input():
    """Models say in their own ways that they do not take an image."""

    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError("Wrong image height! Expected 224 but got 8!")

    data = build_data(DataConfig("digits"))
    check_input(create_model("digits_cnn", 10), data, "digits_cnn")
    for model, reason in ((Picky(), "Wrong image height"), (nn.Linear(3, 10), "mat1 and mat2")):
        text = message(ValueError, check_input, model, data, "other")
        assert "the model 'other' does not take images of 1x8x8" in text and reason in text


# ---- real images -------------------------------------------------------------------------------------


@needs_data
def test_real_cifar10_folder():
    data = build_data(DataConfig("imagefolder", Path(ROOT) / "cifar10", limit_train=500, limit_test=200))
    assert data.num_classes == 10 and data.input_shape == (3, 32, 32) and data.classes[0] == "airplane"
    assert np.bincount(data.train.dataset.labels).tolist() == [50] * 10
    images = torch.cat([images for images, _ in data.test])
    assert images.isfinite().all() and images.mean().abs() < 0.3 and 0.7 < images.std() < 1.4


# ---- at ImageNet's size ------------------------------------------------------------------------------


def settle(root: Path) -> None:
    """Make folders look as if nothing had happened to them for a minute."""
    for path in (root, *root.rglob("*")):
        past = time.time() - 60
        os.utime(path, (past, past))


def listings(monkeypatch) -> list[str]:
    """Folders that are gone through from now on."""
    seen, walk = [], os.walk
    monkeypatch.setattr("os.walk", lambda top, **options: (seen.append(str(top)), walk(top, **options))[1])
    return seen


def test_files_are_listed_once_until_a_folder_changes(tmp_path, monkeypatch, caplog):
    root, index = write_tree(tmp_path / "data"), tmp_path / "index"
    settle(root)
    first = build_data(folder(root, in_memory=False, index=index))
    assert len(list(index.iterdir())) == 2
    seen = listings(monkeypatch)
    again = build_data(folder(root, in_memory=False, index=index))
    assert seen == []
    for name in ("train", "test"):
        before, after = (getattr(data, name).dataset.files for data in (first, again))
        assert before.paths == after.paths and before.classes == after.classes
        assert before.labels.dtype == after.labels.dtype and np.array_equal(before.labels, after.labels)
    write_image(root / "train" / "bee" / "new.png")
    assert len(build_data(folder(root, in_memory=False, index=index)).train.dataset) == 13
    assert len(seen) == 2 and "bee has changed since" in caplog.text


def test_a_folder_that_has_just_changed_is_not_indexed(tmp_path):
    build_data(folder(write_tree(tmp_path / "data"), index=tmp_path / "index"))
    assert not (tmp_path / "index").exists()


def test_a_damaged_index_is_made_anew(tmp_path, caplog):
    root, index = write_tree(tmp_path / "data"), tmp_path / "index"
    settle(root)
    build_data(folder(root, index=index))
    for file in index.iterdir():
        file.write_bytes(file.read_bytes()[:200])
    assert len(build_data(folder(root, index=index)).train.dataset) == 12
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_image_is_named_counted_and_replaced(tmp_path, workers, caplog):
    pytest.importorskip("torchvision")
    root = write_tree(tmp_path, count=10, size=(16, 16))
    broken = truncate(root / "train" / "ant" / "09.png")
    options = {"in_memory": False, "workers": workers, "max_broken": 0.1, "augment": False, "image_size": 16}
    data = build_data(folder(root, **options))
    epoch = batches(data)
    assert sum(len(labels) for _, labels in epoch) == 20
    labels = torch.cat([labels for _, labels in epoch])
    assert labels.bincount().tolist() == [9, 11], "the next image, of the next class, takes its place"
    assert same(epoch, batches(data))
    assert broken_images(data.train.dataset, data.test.dataset) == 1
    if workers == 0:
        assert caplog.text.count("cannot decode the image") == 1 and broken in caplog.text
    assert data.train.dataset.log.images_per_second() > 0
    for name in ("00.png", "01.png"):
        truncate(root / "train" / "bee" / name)
    text = message(BrokenImages, lambda: batches(build_data(folder(root, **options))))
    assert "3 of 20 images are broken, more than data.max_broken=0.1 allows" in text
    assert text.startswith("cannot decode the image") and "\n" not in text


def write_shards(root: Path, split: str, count: int, samples: int = 5) -> list[bytes]:
    """Shards as webdataset writes them; returns the images."""
    webdataset, images = pytest.importorskip("webdataset"), []
    root.mkdir(exist_ok=True)
    for shard in range(count):
        with webdataset.TarWriter(str(root / f"{split}-{shard:03}.tar")) as writer:
            for i in range(samples):
                write_image(root / "image.png", (16, 16), seed=100 * shard + i)
                images.append((root / "image.png").read_bytes())
                writer.write({"__key__": f"{shard}/{i:04}", "png": images[-1], "cls": i % 3})
    (root / "image.png").unlink()
    return images


def shards(root: Path, **options) -> DataConfig:
    return DataConfig("webdataset", root, **{"batch_size": 4, "workers": 0, "image_size": 16, **options})


def test_shards_hold_what_an_image_folder_holds(tmp_path):
    pytest.importorskip("torchvision")
    root, plain = tmp_path / "shards", tmp_path / "folder"
    for split, count in (("train", 3), ("val", 1)):
        for i, content in enumerate(write_shards(root, split, count)):
            path = plain / split / str(i % 5 % 3) / f"{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    data, reference = build_data(shards(root)), build_data(folder(plain, in_memory=False, workers=0, image_size=16))
    assert data.classes == reference.classes == ("0", "1", "2")
    assert (len(data.train.dataset), len(data.test.dataset)) == (15, 5)
    pixels = {image.numpy().tobytes(): int(label) for image, label in reference.calibration.dataset}
    assert {image.numpy().tobytes(): int(label) for image, label in data.calibration.dataset} == pixels
    assert same(batches(data, 3), batches(build_data(shards(root, workers=2)), 3))


def test_blank_lines_behind_the_names_of_classes_name_none(tmp_path):
    write_shards(tmp_path, "train", 2)
    (tmp_path / "classes.txt").write_text("x\ny\nz\n\n \n")
    assert build_data(shards(tmp_path)).classes == ("x", "y", "z")


def test_shards_are_listed_once_until_one_changes(tmp_path, monkeypatch):
    write_shards(tmp_path / "data", "train", 2, samples=20)
    settle(tmp_path / "data")
    config = shards(tmp_path / "data", index=tmp_path / "index", val_fraction=0.2)
    first, opened, real = build_data(config), [], tarfile.open
    monkeypatch.setattr("tarfile.open", lambda *place, **how: (opened.extend(place), real(*place, **how))[1])
    assert same(batches(first), batches(build_data(config))) and opened == []
    write_shards(tmp_path / "data", "train", 3, samples=20)
    opened.clear()
    assert len(build_data(config).train.dataset) == 48
    assert sum(str(place).endswith(".tar") for place in opened) == 3


def test_folders_and_members_may_be_called_as_shards_are(tmp_path):
    pytest.importorskip("torchvision")
    root, image, label = tmp_path / "folder.tar" / "data.tar", tmp_path / "image.png", tmp_path / "label"
    root.mkdir(parents=True)
    write_image(image, (16, 16))
    label.write_text("0")
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}-0.tar", "w") as archive:
            archive.add(image, "a.tar/b.tar/c.png")
            archive.add(label, "a.tar/b.tar/c.cls")
    assert build_data(shards(root)).test.dataset[0][1] == 0


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"a.png": b"x"}, "sample a of .*train-0.tar has no class"),
        ({"a.cls": b"1"}, "sample a of .*train-0.tar has no image"),
        ({"a.png": b"x", "a.cls": b"cat"}, "cannot list the shard .*invalid literal"),
        ({}, "no samples in the shards"),
    ],
)
def test_shards_that_lack_something_are_named(tmp_path, members, expected):
    with tarfile.open(tmp_path / "train-0.tar", "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=expected):
        build_data(shards(tmp_path))


def test_no_shards_and_compressed_ones(tmp_path):
    assert "no shards train*.tar" in message(FileNotFoundError, build_data, shards(tmp_path))
    with tarfile.open(tmp_path / "train-0.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.png"))
    assert "cannot list the shard" in message(ValueError, build_data, shards(tmp_path))


def test_waiting_for_data_is_measured_and_named(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("adq.train.pace.time.perf_counter", lambda: now[0])

    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, index):
            now[0] += 0.02
            return index

    loader = DataLoader(Slow(), batch_size=2)
    pace = Pace(loader)
    for _ in pace.through(loader):
        now[0] += 0.01
        pace.idle = True
    row = pace.finish(12)
    assert row["seconds_per_batch"] == pytest.approx(0.05) and row["data_share"] == pytest.approx(0.8)
    assert row["images_per_second"] == pytest.approx(40)
    advice = "data loading takes 80% of the step: data.workers=0; training alone could take 200 images/s"
    assert pace.advice(row).startswith(advice)
    assert pace.advice({**row, "data_share": 0.1}) is None


def test_loader_workers_outlive_signals_from_elsewhere_and_end_with_their_parent(tmp_path):
    pytest.importorskip("torchvision")
    data = build_data(folder(write_tree(tmp_path), in_memory=False, workers=2, image_size=16, batch_size=1))
    before = set(multiprocessing.active_children())
    iterator = iter(data.train)
    taken = [next(iterator), next(iterator)]  # one of each worker: both have begun
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in workers)], check=True)
    taken += iterator
    assert len(taken) == 12 and all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == 0


@pytest.mark.parametrize(
    "damage", ["flipped", "cut in a header", "cut in an image", "cut between members", "cut at the end"]
)
def test_a_damaged_shard_is_refused(tmp_path, damage):
    write_shards(tmp_path, "train", 1)
    shard = tmp_path / "train-000.tar"
    with tarfile.open(shard) as archive:
        places = [member.offset for member in archive]
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[places[4] + 150] ^= 1
    else:
        end = {"cut in a header": places[4] + 100, "cut in an image": places[4] + 600, "cut between members": places[4]}
        content = content[: end.get(damage, len(content.rstrip(b"\0")) + 1)]
    shard.write_bytes(content)
    text = message(ValueError, build_data, shards(tmp_path))
    assert f"cannot list the shard {shard}: " in text


@pytest.mark.parametrize("kind", ["shards", "tree"])
def test_a_list_of_files_of_the_working_directory(tmp_path, monkeypatch, kind):
    root = tmp_path / "data"
    if kind == "shards":
        root.mkdir()
        write_shards(root, "train", 1, samples=10)
    else:
        for name in ("cat", "dog"):
            for i in range(5):
                write_image(root / name / f"{i}.png", (16, 16), seed=i)
    for path in (*root.rglob("*"), root):
        os.utime(path, (1, 1))
    monkeypatch.chdir(root)
    make = shards if kind == "shards" else folder
    config = make(Path("."), index=tmp_path / "index", val_fraction=0.2, image_size=16, in_memory=False, workers=0)
    first, second = build_data(config), build_data(config)
    assert list((tmp_path / "index").iterdir())
    assert same(batches(first, 2), batches(second, 2))


def test_hidden_folders_below_a_class_and_links_that_lead_back_hold_no_images(tmp_path):
    for name in ("cat", "dog"):
        write_image(tmp_path / name / "deeper" / "0.png")
    write_image(tmp_path / "cat" / ".thumbs" / "0.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path / "cat")
    (tmp_path / "dog" / "other").symlink_to(tmp_path / "cat" / "deeper")
    files, _ = list_files(tmp_path)
    names = [str(Path(path).relative_to(tmp_path)) for path in files.paths]
    assert names == ["cat/deeper/0.png", "dog/deeper/0.png", "dog/other/0.png"]


def test_the_speed_on_the_bar_is_of_the_images_since_it_began():
    shown = []
    progress = SimpleNamespace(update=lambda task, **fields: shown.append(fields["status"]))
    bar = Bar(progress, None, 10**9)
    totals = SimpleNamespace(samples=10**9 + 5, loss=torch.ones(()), correct=torch.ones(()))
    time.sleep(0.01)
    bar.update(1, totals, 0.1)
    assert float(shown[0].rpartition("  ")[2].removesuffix(" images/s").replace(",", "")) < 600

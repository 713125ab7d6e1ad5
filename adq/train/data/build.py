"""From a :class:`DataConfig` to the loaders."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from adq.convert import evaluating
from adq.train.data.config import Data, DataConfig, Loader
from adq.train.data.decoding import leave_signals_to_parent
from adq.train.data.folder import Files, FolderDataset, cores, decode, list_files, read_size, some
from adq.train.data.index import indexed
from adq.train.data.memory import CropFlip, MemoryDataset, identity
from adq.train.data.sampler import CALIBRATION, EpochSampler, generator, stratified_order
from adq.train.data.shards import list_splits

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

RGB_MEAN, RGB_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS_MEAN, DIGITS_STD = (0.3053,), (0.3760,)
MEMORY_LIMIT = 2**30
"""Largest decoded size, in bytes, that ``in_memory="auto"`` keeps in memory."""
_PROBED = 64
_LARGE_SIDE = 224


def build_data(config: DataConfig) -> Data:
    """The loaders that ``config`` describes.

    Raises:
        ValueError, FileNotFoundError, NotADirectoryError: the data is missing, broken or contradicts itself;
            the message names the path and the cause.
        ImportError: a package of the ``train`` extra is missing.
    """
    if config.name == "digits":
        return _memory_data(config, *_digits(), padding=1, flip=False)
    if config.name == "cifar10":
        return _memory_data(config, *_cifar10(config.folder, _changed(config.folder.glob("cifar-10-batches-py/*"))))
    train, test = _shard_splits(config) if config.name == "webdataset" else _folder_splits(config)
    train = _limited(train, config.limit_train, config.split_seed)
    test = _limited(test, config.limit_test, config.split_seed)
    shape = _memory_shape(config, train, test)
    if shape is None:
        return _file_data(config, train, test)
    resize = config.image_size is not None
    images = _decoded(train.paths, test.paths, shape, resize, _changed(train.paths + test.paths))
    return _memory_data(config, (images[0], train.labels), (images[1], test.labels), train.classes)


def check_classes(model: nn.Module, data: Data) -> None:
    """Raise ValueError when the model does not have one output a class.

    The model's ``adq_architecture`` record tells its classes; without one, its last linear layer does, and a
    model that has neither passes.
    """
    classes = getattr(model, "adq_architecture", {}).get("num_classes")
    if classes is None:
        outputs = [module.out_features for module in model.modules() if hasattr(module, "out_features")]
        classes = outputs[-1] if outputs else data.num_classes
    if classes != data.num_classes:
        raise ValueError(f"the model has {classes} classes, the data {data.name!r} has {data.num_classes}")


@torch.no_grad()
def check_input(model: nn.Module, data: Data, name: str) -> None:
    """Raise ValueError when the model ``name`` cannot take an image of the data, or gives no logits."""
    try:
        with evaluating(model):
            logits = model(torch.zeros(1, *data.input_shape))
    except Exception as error:  # whatever a model says of such images: torchvision's and timm's transformers assert
        shape = "x".join(map(str, data.input_shape))
        raise ValueError(
            f"the model {name!r} does not take images of {shape}, as {data.name!r} has them; choose another "
            f"({str(error).partition(chr(10))[0]})"
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model {name!r} gives no logits [images, classes], but {found}")


# ---- sources -----------------------------------------------------------------------------------------

Arrays = tuple[np.ndarray, np.ndarray]
"""Images uint8 [N, C, H, W] and labels int64 [N], read-only: the last ones decoded serve every later call."""


def _changed(paths: Iterable[str | Path]) -> int:
    """When the last of the files was changed, nanoseconds; those that cannot be found do not count."""
    return max((os.stat(path).st_mtime_ns for path in paths if os.path.exists(path)), default=0)


def _read_only(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    for array in arrays:
        array.setflags(write=False)
    return arrays


def _missing(package: str, name: str) -> ImportError:
    return ImportError(f"data {name!r} needs {package}: pip install 'adq[train]'")


@lru_cache(maxsize=1)
def _digits() -> tuple[Arrays, Arrays, tuple[str, ...]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("scikit-learn", "digits") from error
    digits = load_digits()
    images = np.rint(digits.images[:, None] * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)
    order = stratified_order(labels, seed=0)  # the same split whatever the seed of the run
    test, train = np.sort(order[:360]), np.sort(order[360:])
    sets = [(images[part], labels[part]) for part in (train, test)]
    _read_only(*sets[0], *sets[1])
    return sets[0], sets[1], tuple(str(i) for i in range(10))


@lru_cache(maxsize=1)
def _cifar10(root: Path, changed: int) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise _missing("torchvision", "cifar10") from error
    if not (root / CIFAR10.base_folder).is_dir():
        hint = " It looks like an image folder: use name='imagefolder'." if (root / "train").is_dir() else ""
        raise FileNotFoundError(
            f"no {CIFAR10.base_folder} in {root}: unpack cifar-10-python.tar.gz of "
            f"https://www.cs.toronto.edu/~kriz/cifar.html there.{hint}"
        )
    sets = []
    for train in (True, False):
        try:
            part = CIFAR10(str(root), train=train, download=False)
        except RuntimeError as error:
            raise ValueError(f"{root / CIFAR10.base_folder} is incomplete or damaged: {error}") from error
        sets.append((np.ascontiguousarray(part.data.transpose(0, 3, 1, 2)), np.asarray(part.targets, np.int64)))
    _read_only(*sets[0], *sets[1])
    return sets[0], sets[1], tuple(part.classes)


@lru_cache(maxsize=1)
def _decoded(
    train: tuple[str, ...], test: tuple[str, ...], shape: tuple[int, int], resize: bool, changed: int
) -> tuple[np.ndarray, ...]:
    """Training and test images of these files, uint8 ``[N, 3, H, W]``."""
    return _read_only(decode(train, shape, resize, "training"), decode(test, shape, resize, "test"))


def _folder_splits(config: DataConfig) -> tuple[Files, Files]:
    root = config.folder
    held_out = ("val", "test") if config.name == "imagenet" else ("test", "val")
    second = next((root / name for name in held_out if (root / name).is_dir()), None)
    if not (root / "train").is_dir():
        if second is not None or config.name == "imagenet":
            raise FileNotFoundError(f"no train folder in {root}" + (f", only {second.name}" if second else ""))
        return _split(_listed(root, config), root, config)
    train = _listed(root / "train", config)
    if second is None:
        return _split(train, root / "train", config)
    test = _listed(second, config)
    if train.classes != test.classes:
        only = [
            f"only in {folder}: {some(sorted(set(a.classes) - set(b.classes)))}"
            for folder, a, b in ((root / "train", train, test), (second, test, train))
            if set(a.classes) - set(b.classes)
        ]
        raise ValueError(f"training and test images have different classes; {'; '.join(only)}")
    return train, test


def _listed(folder: Path, config: DataConfig) -> Files:
    return indexed(folder, config.index_folder, list_files)


def _shard_splits(config: DataConfig) -> tuple[Files, Files]:
    train, test = list_splits(config.folder, config.index_folder)
    return _split(train, config.folder, config) if test is None else (train, test)


def _split(files: Files, folder: Path, config: DataConfig) -> tuple[Files, Files]:
    order = stratified_order(files.labels, config.split_seed)
    held_out = round(len(order) * config.val_fraction)
    if not 0 < held_out < len(order):
        raise ValueError(
            f"{folder}: {len(order)} images cannot be split by val_fraction={config.val_fraction}: one part is empty"
        )
    logger.warning(
        "%s has no test or val split: %d of its %d images are held out (val_fraction=%g, split_seed %d)",
        folder, held_out, len(order), config.val_fraction, config.split_seed,
    )  # fmt: skip
    return files.take(np.sort(order[held_out:])), files.take(np.sort(order[:held_out]))


def _limited(files: Files, limit: int | None, seed: int) -> Files:
    return files if limit is None else files.take(_subset(files.labels, limit, seed))


def _subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Indices of a seeded subset with the classes' shares kept, ascending."""
    return np.sort(stratified_order(labels, seed)[:count])


def _memory_shape(config: DataConfig, train: Files, test: Files) -> tuple[int, int] | None:
    """Height and width of the images if they are to be held in memory, else None."""
    if config.in_memory is False or (config.name in ("imagenet", "webdataset") and config.in_memory == "auto"):
        return None
    if config.image_size is not None:
        shapes = {(config.image_size, config.image_size)}
    else:
        paths = train.paths + test.paths
        sizes = [read_size(path) for path in paths[:: max(1, len(paths) // _PROBED)]]
        shapes = {size for size in sizes if size} or {(1, 1)}  # if all are broken, decoding says so
    if len(shapes) > 1:
        if config.in_memory is True:
            raise ValueError(f"the images in {config.folder} differ in size; in_memory=true needs image_size")
        return None
    shape = shapes.pop()
    fits = (len(train.paths) + len(test.paths)) * 3 * shape[0] * shape[1] < MEMORY_LIMIT
    return shape if fits or config.in_memory is True else None


# ---- loaders -----------------------------------------------------------------------------------------


def _memory_data(
    config: DataConfig,
    train: Arrays,
    test: Arrays,
    classes: tuple[str, ...],
    padding: int | None = None,
    flip: bool = True,
) -> Data:
    mean, std = _normalisation(config)
    train = _limit_arrays(train, config.limit_train, config.split_seed)
    test = _limit_arrays(test, config.limit_test, config.split_seed)
    shape = train[0].shape[1:]
    padding = max(1, min(shape[1:]) // 8) if padding is None else padding
    augment = CropFlip(padding, flip, config.seed) if config.augment else None
    return _loaders(
        config,
        MemoryDataset(*train, mean, std, augment),
        MemoryDataset(*train, mean, std),
        MemoryDataset(*test, mean, std),
        workers=0 if config.workers == "auto" else config.workers,
        collate=identity,
        classes=classes,
        input_shape=(shape[0], shape[1], shape[2]),
    )


def _limit_arrays(arrays: Arrays, limit: int | None, seed: int) -> Arrays:
    images, labels = arrays
    if limit is None or limit >= len(labels):
        return arrays
    keep = _subset(labels, limit, seed)
    return images[keep], labels[keep]


def _file_data(config: DataConfig, train: Files, test: Files) -> Data:
    side = config.image_size or _LARGE_SIDE
    training, plain = _transforms(side, *_normalisation(config))
    dataset = partial(FolderDataset, max_broken=config.max_broken)
    here = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))  # torchrun says so
    workers = min(16, here) if config.workers == "auto" else config.workers
    return _loaders(
        config,
        dataset(train, training, config.seed) if config.augment else dataset(train, plain),
        dataset(train, plain),
        dataset(test, plain),
        workers=workers,
        collate=None,
        classes=train.classes,
        input_shape=(3, side, side),
    )


def _transforms(
    side: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Callable[[Image.Image], Tensor], Callable[[Image.Image], Tensor]]:
    """The usual ImageNet transforms for training and for evaluation."""
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise _missing("torchvision", "imagefolder") from error
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std), v2.ToPureTensor()]
    training = v2.Compose([v2.RandomResizedCrop(side, antialias=True), v2.RandomHorizontalFlip(), *finish])
    plain = v2.Compose([v2.Resize(side * 256 // 224, antialias=True), v2.CenterCrop(side), *finish])
    return training, plain


def _normalisation(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = (DIGITS_MEAN, DIGITS_STD) if config.name == "digits" else (RGB_MEAN, RGB_STD)
    return tuple(config.mean or mean), tuple(config.std or std)


def _loaders(
    config: DataConfig,
    train: Dataset[Any],
    train_plain: Dataset[Any],
    test: Dataset[Any],
    *,
    workers: int,
    collate: Callable[[Any], Any] | None,
    classes: tuple[str, ...],
    input_shape: tuple[int, int, int],
) -> Data:
    length = len(train)  # type: ignore[arg-type]
    size = min(config.calibration_images, length)
    # in random order: files are listed class by class, and some look at the first few batches only
    chosen = generator(CALIBRATION, config.seed).permutation(length)[:size].tolist()

    def loader(dataset: Dataset[Any], batch_size: int, workers: int, **options: Any) -> Loader:
        return DataLoader(
            dataset,
            batch_size,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # an iterator takes a number from it, and leaves the global one alone
            **options,
        )

    plain_batch = config.eval_batch_size or config.batch_size
    mean, std = _normalisation(config)
    return Data(
        train=loader(
            train,
            config.batch_size,
            workers,
            sampler=EpochSampler(length, config.seed),
            drop_last=length > config.batch_size,
            persistent_workers=workers > 0,
        ),
        test=loader(test, plain_batch, workers, persistent_workers=workers > 0),
        calibration=loader(Subset(train_plain, chosen), plain_batch, workers),
        num_classes=len(classes),
        classes=classes,
        input_shape=input_shape,
        mean=mean,
        std=std,
        name=config.name,
    )

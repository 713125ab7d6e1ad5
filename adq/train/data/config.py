"""What is asked of the data, and what comes back."""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from adq.train.data.sampler import EpochSampler

SOURCES = ("digits", "imagefolder", "cifar10", "imagenet", "webdataset")
_FIXED_SIDE = {"digits": 8, "cifar10": 32}
Loader = DataLoader[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class DataConfig:
    """Which images, in which batches.

    Attributes:
        name: ``digits`` (scikit-learn's 1797 images of 8x8, nothing to download), ``imagefolder`` (any
            tree ``root/train/<class>/*`` with ``root/test`` or ``root/val``; without those the images are
            split by ``val_fraction``), ``cifar10`` (torchvision's ``root/cifar-10-batches-py``),
            ``imagenet`` (``root/train``, ``root/val``) or ``webdataset`` (``root/train*.tar`` and ``root/val*.tar`` or
            ``test*.tar``, uncompressed, of samples ``KEY.jpg`` and ``KEY.cls``; class names in ``root/classes.txt``).
        root: folder of the images; ``digits`` needs none.
        image_size: side of the square images in pixels. None: the images' own size in memory, else 224.
            Images of other sizes are resized and centre-cropped to it. Not for ``digits`` and ``cifar10``.
        batch_size: images a training batch, per process. An incomplete last batch is dropped, unless the
            whole training set is smaller than one batch.
        eval_batch_size: images a test or calibration batch; None takes ``batch_size``. Nothing is dropped.
        index: folder where lists of files are kept, so that they are made once and not at each start; a run keeps
            them in its own folder when this is None. A folder or shard that has changed is listed anew.
        max_broken: share of a set's images that may turn out broken when read from files. Each is logged by its path
            and counted, and the next good image takes its place; one more ends the run. In memory none may be.
        workers: loader processes; ``auto`` is 0 for images in memory, else one a core, 16 at most.
        seed: of the order, the augmentation and the calibration images.
        split_seed: of splits and limits: which images are for training and which for testing, whatever the seed of the
            run.
        augment: shift by up to an eighth of the size and mirror (in memory; digits are only shifted), or
            RandomResizedCrop and mirror (from files).
        in_memory: hold the decoded images in memory as uint8. ``auto``, for ``imagefolder``: when they are
            of one size, or ``image_size`` is given, and take less than 1 GiB. Of some, that is: one of another size
            that was not among those looked at is an error, which names it.
        limit_train: use only that many training images, a seeded subset with the classes' shares kept.
        limit_test: the same for the test images.
        val_fraction: share of the images held out as the test set when the folder has no split of its own.
        calibration_images: size of the calibration set, a seeded subset of the training images in random order.
        mean: per channel, of pixels scaled to 0..1; None takes the set's own default.
        std: the same, all positive.
    """

    name: str = "digits"
    root: str | os.PathLike[str] | None = None
    image_size: int | None = None
    batch_size: int = 128
    eval_batch_size: int | None = None
    index: str | os.PathLike[str] | None = None
    max_broken: float = 0.01
    workers: int | Literal["auto"] = "auto"
    seed: int = 0
    split_seed: int = 0
    augment: bool = True
    in_memory: bool | Literal["auto"] = "auto"
    limit_train: int | None = None
    limit_test: int | None = None
    val_fraction: float = 0.1
    calibration_images: int = 1024
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.name not in SOURCES:
            close = difflib.get_close_matches(self.name, SOURCES, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ValueError(f"unknown data {self.name!r}{hint} Known: {', '.join(SOURCES)}")
        if self.name != "digits" and self.root is None:
            raise ValueError(f"data {self.name!r} needs root, the folder that holds it")
        for field in ("image_size", "batch_size", "eval_batch_size", "limit_train", "limit_test", "calibration_images"):
            _check_at_least(field, getattr(self, field), 1)
        _check_at_least("seed", self.seed, 0)
        _check_at_least("split_seed", self.split_seed, 0)
        if self.name in _FIXED_SIDE and self.image_size not in (None, _FIXED_SIDE[self.name]):
            raise ValueError(f"the images of {self.name} have side {_FIXED_SIDE[self.name]}, not {self.image_size}")
        if self.name in _FIXED_SIDE and self.in_memory is False:
            raise ValueError(f"data {self.name!r} is always held in memory, in_memory=false cannot be served")
        if self.name == "webdataset" and self.in_memory is True:
            raise ValueError("shards are read as they are needed, in_memory=true cannot be served")
        if not 0.0 <= self.max_broken < 1.0:
            raise ValueError(f"max_broken must be a share from 0 to below 1, got {self.max_broken}")
        if self.workers != "auto":
            _check_at_least("workers", self.workers, 0)
        if self.in_memory not in ("auto", True, False):
            raise ValueError(f"in_memory must be true, false or 'auto', got {self.in_memory!r}")
        if not 0.0 < self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {self.val_fraction}")
        for field in ("mean", "std"):
            _check_channels(field, getattr(self, field), 1 if self.name == "digits" else 3)
        if self.std is not None and min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def index_folder(self) -> Path | None:
        """``index`` as a path."""
        return None if self.index is None else Path(os.fspath(self.index)).expanduser()

    @property
    def folder(self) -> Path:
        """``root`` as an existing folder; FileNotFoundError or NotADirectoryError when it is none."""
        path = Path(os.fspath(self.root or "")).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"the data folder {path} does not exist")
        if not path.is_dir():
            raise NotADirectoryError(f"the data folder {path} is a file; unpack archives first")
        return path


@dataclass(frozen=True)
class Data:
    """Loaders of ``(images float32 [N, C, H, W], normalised; labels int64 [N])``, and what they hold.

    Attributes:
        train: shuffled and augmented.
        test: every test image once, in the order of the files.
        calibration: a fixed subset of the training images in a fixed random order, not augmented.
        num_classes: number of classes.
        classes: their names, by label.
        input_shape: ``(C, H, W)`` of one image.
        mean: per channel, of pixels scaled to 0..1.
        std: the same.
        name: as in :class:`DataConfig`.
    """

    train: Loader
    test: Loader
    calibration: Loader
    num_classes: int
    classes: tuple[str, ...]
    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    @property
    def sampler(self) -> EpochSampler:
        """Sampler of ``train``: ``set_epoch(epoch)`` before each epoch, ``resume(epoch, samples)`` inside one.

        It stays in charge when Accelerate prepares ``train``; as a prepared loader sets the epoch itself,
        starting from 0, tell it too where to start: ``prepared.set_epoch(epoch)``.
        """
        assert isinstance(self.train.sampler, EpochSampler)
        return self.train.sampler


def _check_at_least(field: str, value: Any, low: int) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < low):
        raise ValueError(f"{field} must be an integer of at least {low}, got {value!r}")


def _check_channels(field: str, value: tuple[float, ...] | None, channels: int) -> None:
    if value is not None and len(value) != channels:
        raise ValueError(f"{field} must hold {channels} number(s), one a channel, got {value}")

"""Image folders: listing, decoding, and the dataset that reads files in worker processes."""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adq.train.data.decoding import BrokenImages, DecodeLog
from adq.train.data.sampler import AUGMENT, split_index

try:
    from PIL import Image
except ImportError as error:
    raise ImportError("image data needs Pillow: pip install 'adq[train]'") from error

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_LISTED = 10
_THREADED_SIDE = 128
"""From this many pixels a side decoding in threads pays; for smaller images they only contend for the GIL."""


@dataclass(frozen=True)
class Files:
    """Image files of one split: ``paths`` [N], ``labels`` int64 [N], and the class names by label.

    ``spans`` int64 [N, 2] is None, or says that the paths are ``ARCHIVE.tar/MEMBER``: offset and bytes in the archive.
    """

    paths: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    spans: np.ndarray | None = None

    def take(self, indices: np.ndarray) -> Files:
        """The chosen files, in that order."""
        spans = None if self.spans is None else self.spans[indices]
        return Files(tuple(self.paths[i] for i in indices.tolist()), self.labels[indices], self.classes, spans)

    def image(self, row: int) -> Image.Image:
        """An image as 8-bit RGB; ValueError that names the path when it cannot be decoded."""
        if self.spans is None:
            return open_rgb(self.paths[row])
        offset, size = self.spans[row].tolist()
        return open_rgb(self.paths[row], (offset, size))


def some(items: Iterable[str], limit: int = _LISTED) -> str:
    """The first items as text, and how many more there are."""
    items = list(items)
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _images_under(folder: Path, directories: list[str]) -> list[str]:
    found, seen = [], set()
    for directory, subfolders, names in os.walk(folder, followlinks=True):
        place = os.stat(directory)
        if (place.st_dev, place.st_ino) in seen:  # links may lead back
            subfolders.clear()
            continue
        seen.add((place.st_dev, place.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        directories.append(directory)
        found += [os.path.join(directory, name) for name in names if _is_image(name)]
    return sorted(found)


def list_files(folder: Path) -> tuple[Files, list[str]]:
    """Images of ``folder/<class>/**``, sorted by path, and all folders gone through; hidden ones are ignored, and those
    that a class has been through already, by links.

    Raises:
        ValueError: no class folders, no images, or class folders without any; the message names the folder.
    """
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        loose = sum(_is_image(entry.name) for entry in os.scandir(folder))
        held = f"it holds {loose} images directly" if loose else "it is empty or holds no images"
        raise ValueError(f"no class folders in {folder}: expected {folder}/<class>/<image>, but {held}")
    directories = [str(folder)]
    found = [_images_under(folder / name, directories) for name in classes]
    looked = f"(looked for {' '.join(EXTENSIONS)})"
    if not any(found):
        raise ValueError(f"no images in the {len(classes)} class folders of {folder} {looked}")
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        raise ValueError(f"class folders without images in {folder}: {some(empty)} {looked}")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in found])
    return Files(tuple(path for paths in found for path in paths), labels, tuple(classes)), directories


def open_rgb(path: str, span: tuple[int, int] | None = None) -> Image.Image:
    """The image as 8-bit RGB, whatever its mode; ValueError that names the path when it cannot be decoded.

    Args:
        path: of the file, or ``ARCHIVE.tar/MEMBER``.
        span: offset and bytes in the archive.
    """
    try:
        with _stream(path, span) as file, Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode} (16-bit or float), convert the image to 8 bits")
            if image.mode == "P" and "transparency" in image.info:
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        raise ValueError(f"cannot decode the image {path}: {error}") from error


def _stream(path: str, span: tuple[int, int] | None) -> BinaryIO:
    if span is None:
        return open(path, "rb")
    beginnings = (path[: found.end() - 1] for found in re.finditer(r"\.tar/", path))  # folders, members may be .tar too
    with open(next(filter(os.path.isfile, beginnings), path), "rb") as archive:
        archive.seek(span[0])
        return io.BytesIO(archive.read(span[1]))


def read_size(path: str) -> tuple[int, int] | None:
    """Height and width in pixels, from the file's header alone; None when there is no valid header."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # decoding reports what is wrong with this file, and with any other
        return None


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Decoder:
    """Decodes files into the rows of one array; notes what is wrong instead of stopping at the first."""

    def __init__(
        self, paths: Sequence[str], shape: tuple[int, int], resize: Callable[[Image.Image], Image.Image] | None
    ) -> None:
        self.paths = paths
        self.resize = resize
        self.images = np.empty((len(paths), 3, *shape), np.uint8)
        self.broken: dict[int, str] = {}
        self.other_size: dict[int, str] = {}

    def __call__(self, row: int) -> None:
        try:
            image = open_rgb(self.paths[row])
        except ValueError as error:
            self.broken[row] = str(error.__cause__)
            return
        if self.resize is not None:
            image = self.resize(image)
        if (image.height, image.width) == self.images.shape[2:]:
            self.images[row] = np.asarray(image).transpose(2, 0, 1)
        else:
            self.other_size[row] = f"{image.width}x{image.height}"

    def listed(self, causes: dict[int, str]) -> str:
        """File names with their causes, in the order of the files."""
        return some(f"{self.paths[row]} ({causes[row]})" for row in sorted(causes))


def decode(paths: Sequence[str], shape: tuple[int, int], resize: bool, what: str) -> np.ndarray:
    """Decode all images into one array, with a progress bar when standard error is a terminal.

    Args:
        paths: image files.
        shape: height and width.
        resize: scale the short side to fit ``shape`` and crop the centre; else every image must have it.
        what: the name of the set, for the progress bar.

    Returns:
        uint8 ``[N, 3, H, W]``.

    Raises:
        ValueError: undecodable files, or files of another size; up to ten are named.
    """
    decoder = _Decoder(paths, shape, _resize_and_crop(shape) if resize else None)
    threaded = resize or max(shape) >= _THREADED_SIDE
    with ThreadPoolExecutor(cores()) as pool:
        rows = range(len(paths))
        for _ in _progress(pool.map(decoder, rows) if threaded else map(decoder, rows), len(paths), what):
            pass
    if decoder.broken:
        count = len(decoder.broken)
        raise ValueError(f"{count} of {len(paths)} {what} images cannot be decoded: {decoder.listed(decoder.broken)}")
    if decoder.other_size:
        raise ValueError(
            f"{len(decoder.other_size)} of {len(paths)} {what} images are not {shape[1]}x{shape[0]} like the first: "
            f"{decoder.listed(decoder.other_size)}. Give image_size to bring all to one size"
        )
    return decoder.images


def _resize_and_crop(shape: tuple[int, int]) -> Callable[[Image.Image], Image.Image]:
    from torchvision.transforms import v2

    return v2.Compose([v2.Resize(min(shape), antialias=True), v2.CenterCrop(list(shape))])


def _progress(items: Iterable[None], total: int, what: str) -> Iterable[None]:
    if not sys.stderr.isatty():
        return items
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return items
    return track(items, f"decoding {what} images", total=total, console=Console(stderr=True))


class FolderDataset(Dataset[tuple[Tensor, int]]):
    """Decodes and transforms a file at each access; meant for loader workers.

    The random numbers that the transform takes from torch's global generator are seeded by
    (seed, epoch, index) and leave the generator as it was. The next good image, with its label, takes the place of
    one that cannot be decoded, which is logged by its path and noted in ``log``.

    Args:
        files: what to read.
        transform: from a PIL image (RGB) to a float32 tensor ``[3, H, W]``.
        seed: None when the transform draws no random numbers.
        max_broken: share of the images that may be broken.
    """

    def __init__(
        self,
        files: Files,
        transform: Callable[[Image.Image], Tensor],
        seed: int | None = None,
        max_broken: float = 0.0,
    ) -> None:
        self.files = files
        self.transform = transform
        self.seed = seed
        self.max_broken = max_broken
        self.log = DecodeLog(len(files.paths))

    def __len__(self) -> int:
        return len(self.files.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image float32 ``[3, H, W]`` and label; the index may carry an epoch (see EpochSampler)."""
        began = time.perf_counter()
        epoch, row = split_index(index, len(self))
        image, label = self._readable(row)
        transformed = self._transformed(image, epoch, row)
        self.log.add(time.perf_counter() - began)
        return transformed, label

    def _readable(self, row: int) -> tuple[Image.Image, int]:
        """The image of a row, or the next one that can be decoded, and its label."""
        while True:
            if not self.log.broken[row]:
                try:
                    return self.files.image(row), int(self.files.labels[row])
                except ValueError as error:
                    self._note_broken(row, error)
            row = (row + 1) % len(self)

    def _note_broken(self, row: int, error: ValueError) -> None:
        self.log.broken[row] = True
        count, length = int(self.log.broken.sum()), len(self)
        if count > int(self.max_broken * length):
            raise BrokenImages(
                f"{error}; {count} of {length} images are broken, more than data.max_broken={self.max_broken:g} allows"
            )
        logger.warning("%s; the next image takes its place", error)

    def _transformed(self, image: Image.Image, epoch: int, row: int) -> Tensor:
        if self.seed is None:
            return self.transform(image)
        entropy = np.random.SeedSequence([AUGMENT, self.seed, epoch, row]).generate_state(1, np.uint64)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(int(entropy[0] >> 1))
            return self.transform(image)

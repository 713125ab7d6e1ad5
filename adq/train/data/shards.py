"""WebDataset shards: tar archives of samples, ``KEY.jpg`` beside ``KEY.cls``, read at random by their offsets.

The archives are listed once (and the list kept, see :mod:`adq.train.data.index`); then a sample is one read at a known
place. So the order, the augmentation and resuming are those of an image folder, exactly, without a shuffle buffer.
"""

from __future__ import annotations

import tarfile
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from adq.train.data.folder import EXTENSIONS, Files
from adq.train.data.index import Scan, indexed

_HELD_OUT = ("val", "test", "validation")


def list_splits(root: Path, index: Path | None) -> tuple[Files, Files | None]:
    """Training and test samples of ``root/train*.tar`` and ``root/val*.tar`` (or ``test*.tar``; None without).

    Classes are named by the lines of ``root/classes.txt``, or else numbered.

    Raises:
        FileNotFoundError: no training shards.
        ValueError: an archive is damaged, or a sample lacks its image or its class; both are named.
    """
    found = {split: indexed(root, _place(index, split), _lister(split)) for split in _splits(root)}
    if "train" not in found:
        raise FileNotFoundError(f"no shards train*.tar in {root}")
    train, *rest = found.values()
    last = max(int(files.labels.max()) for files in found.values())
    names = root / "classes.txt"
    classes = tuple(names.read_text(encoding="utf-8").split("\n")) if names.exists() else _numbers(last + 1)
    while classes and not classes[-1].strip():
        classes = classes[:-1]
    if last >= len(classes):
        raise ValueError(f"{names} names {len(classes)} classes, but a sample has the class {last}")
    train = replace(train, classes=classes)
    return train, replace(rest[0], classes=classes) if rest else None


def _splits(root: Path) -> list[str]:
    held_out = [split for split in _HELD_OUT if _shards(root, split)]
    return [split for split in ("train", *held_out[:1]) if _shards(root, split)]


def _place(index: Path | None, split: str) -> Path | None:
    return None if index is None else index / split


def _shards(root: Path, split: str) -> list[Path]:
    return sorted(root.glob(f"{split}*.tar"))


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(count))


def _lister(split: str) -> Scan:
    def scan(root: Path) -> tuple[Files, list[str]]:
        shards = _shards(root, split)
        samples = [sample for shard in shards for sample in _samples(shard)]
        if not samples:
            raise ValueError(f"no samples in the shards {split}*.tar of {root}")
        paths, labels, spans = zip(*samples, strict=True)
        numbers = np.array(labels, np.int64)
        files = Files(tuple(paths), numbers, _numbers(int(numbers.max()) + 1), np.array(spans, np.int64))
        return files, [str(root), *map(str, shards)]

    return scan


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise ReadError unless a block of zeros is where the members end: tarfile takes a broken header for the end."""
    stream = cast(BinaryIO, archive.fileobj)
    stream.seek(archive.offset)
    end = stream.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise tarfile.ReadError(f"it is damaged or cut short after {archive.offset:,} bytes")


def _samples(shard: Path) -> list[tuple[str, int, tuple[int, int]]]:
    """Path, class, offset and size of each image of an archive; its members of one key follow each other."""
    grouped: dict[str, dict[str, tarfile.TarInfo]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                key, _, kind = name.partition(".")
                if not member.isfile() or not key:
                    continue
                group = grouped.setdefault(f"{folder}/{key}", {})
                if f".{kind.lower()}" in EXTENSIONS:
                    group["image"] = member
                elif kind == "cls":
                    content = archive.extractfile(member)
                    labels[f"{folder}/{key}"] = int(content.read()) if content else -1
            _check_end(archive)
    except (tarfile.TarError, ValueError) as error:
        raise ValueError(f"cannot list the shard {shard}: {error}") from error
    for key, group in grouped.items():
        if "image" not in group or labels.get(key, -1) < 0:
            lacks = "no class (.cls)" if "image" in group else f"no image ({' '.join(EXTENSIONS)})"
            raise ValueError(f"sample {key.lstrip('/')} of {shard} has {lacks}")
    return [
        (f"{shard}/{group['image'].name}", labels[key], (group["image"].offset_data, group["image"].size))
        for key, group in grouped.items()
    ]

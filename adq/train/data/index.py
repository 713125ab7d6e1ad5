"""Lists of image files, kept from one start to the next: a million files are listed once, not at each start."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from adq.distributed import from_main, world
from adq.store import replacing
from adq.train.data.folder import Files

logger = logging.getLogger(__name__)

VERSION = 2
_SETTLED = 2 * 10**9
"""Nanoseconds: what has changed so shortly before it was listed may change again within the same tick of the clock."""

Scan = Callable[[Path], tuple[Files, list[str]]]
"""Lists the files under a folder, and the paths whose times of change tell whether the list is still right."""


def indexed(folder: Path, index: Path | None, scan: Scan) -> Files:
    """The files that ``scan`` lists in ``folder``, from the index where that is still right.

    With several processes the first one lists and writes, the others read what it wrote.

    Args:
        folder: what is listed.
        index: folder of the indexes; None for none.
        scan: lists the files when there is no index, or a folder has changed since.
    """
    if index is None:
        return scan(folder)[0]
    file = index / f"{folder.name}-{hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()}.npz"
    listed: list[Files] = []

    def list_here() -> None:
        listed.append(_read(file, folder) or _scan(file, folder, scan))

    if world()[1] > 1:
        from_main(list_here)
    if not listed:
        list_here()
    return listed[0]


def _scan(file: Path, folder: Path, scan: Scan) -> Files:
    began = time.time_ns()
    files, watched = scan(folder)
    changed = [os.stat(path).st_mtime_ns for path in watched]
    if max(changed) > began - _SETTLED:
        logger.info("%s has just changed; its list of files is not kept", folder)
        return files
    names = "\0".join(path.removeprefix(f"{folder}/") for path in files.paths)
    columns = {
        "version": np.array(VERSION),
        "watched": np.array(watched),
        "changed": np.array(changed, np.int64),
        "classes": np.array(files.classes),
        "names": np.frombuffer(names.encode(errors="surrogateescape"), np.uint8),
        "labels": files.labels,
        **({} if files.spans is None else {"spans": files.spans}),
    }
    try:
        with replacing(file) as temporary, temporary.open("wb") as stream:
            np.savez(stream, **columns)  # type: ignore[arg-type]
    except OSError as error:
        logger.warning("the list of files of %s cannot be kept in %s: %s", folder, file, error)
    return files


def _read(file: Path, folder: Path) -> Files | None:
    """The files of an index; None when there is none, or none that can be used."""
    if not file.exists():
        return None
    try:
        with np.load(file) as columns:
            if int(columns["version"]) != VERSION:
                return None
            for path, changed in zip(columns["watched"].tolist(), columns["changed"].tolist(), strict=True):
                if not os.path.exists(path) or os.stat(path).st_mtime_ns != changed:
                    logger.warning("%s has changed since %s was written: listing %s anew", path, file, folder)
                    return None
            names = columns["names"].tobytes().decode(errors="surrogateescape").split("\0")
            spans = columns.get("spans")
            paths = tuple(f"{folder}/{name}" for name in names)
            return Files(paths, columns["labels"], tuple(columns["classes"].tolist()), spans)
    except Exception as error:  # a damaged archive raises OSError, ValueError, KeyError, zipfile and zlib errors
        logger.warning("%s cannot be read (%s): listing %s anew", file, error, folder)
        return None

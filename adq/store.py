"""Files that are either the old ones or the new ones, never half of each: written aside, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place when the block ends without an error.

    The block may create a file or a directory there. Its data reaches the disk before the renaming does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            _replace_directory(temporary, path)
        else:
            _sync(temporary)
            os.replace(temporary, path)
        _sync(path.parent)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _replace_directory(temporary: Path, path: Path) -> None:
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    if path.exists():
        raise FileExistsError(f"adq: {path} exists; directories are written once under a new name")
    os.rename(temporary, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file: to a temporary name, then renamed."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

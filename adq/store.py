"""Files that are either the old ones or the new ones, never half of each: written aside, then renamed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside ``path`` that takes its place if the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask wants it; some writers take the owner's rights alone
        yield temporary
        temporary.chmod(mode)
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def publish_directory(temporary: Path, path: Path) -> None:
    """Give a finished directory its name, once all its files have reached the disk; ``path`` must not exist."""
    for file in temporary.rglob("*"):
        if file.is_file():
            _sync(file)
    os.rename(temporary, path)
    _sync(path.parent)


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

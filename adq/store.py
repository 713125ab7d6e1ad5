"""Files that are either the old ones or the new ones, never half of each: written aside, then renamed; and locks."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

MANIFEST = "manifest.json"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield the name of a temporary file beside ``path`` that takes its place if the block ends without an error.

    Of a link, the file that it leads to.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{_unique()}.tmp")
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


@contextmanager
def replacing_directory(path: str | Path) -> Iterator[Path]:
    """Yield the name of a directory to make beside ``path``; it takes its place if the block ends without an error.

    It has the same suffix: some writers go by it.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    own = _unique()
    temporary, old = (path.with_name(f".{path.stem}.{own}.{kind}{path.suffix}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir()
        # as the user's umask wants it; some writers take the owner's rights alone
        mode = temporary.stat().st_mode & 0o777
        temporary.rmdir()
        yield temporary
        for entry in (temporary, *temporary.rglob("*")):
            entry.chmod(mode if entry.is_dir() else mode & 0o666)
        _sync_all(temporary)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for directory in (temporary, old):
            shutil.rmtree(directory, ignore_errors=True)


def _unique() -> str:
    """A part of temporary names: threads, and containers that are all process 1, may write beside each other."""
    return f"{os.getpid()}.{secrets.token_hex(4)}"


def publish_directory(temporary: Path, path: Path) -> None:
    """Give a finished directory its name, once all its files have reached the disk; ``path`` must not exist."""
    _sync_all(temporary)
    os.rename(temporary, path)
    _sync(path.parent)


def _sync_all(folder: Path) -> None:
    for inside in (*folder.rglob("*"), folder):
        _sync(inside)


def seal_directory(folder: Path, about: dict[str, Any]) -> None:
    """Write ``manifest.json``: ``about`` (JSON), and size and BLAKE2b-256 of every file; call it last."""
    files = {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "blake2b": _digest(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    content = {"about": about, "files": files}
    write_text(folder / MANIFEST, json.dumps({**content, "blake2b": _digest_of(content)}, indent=1))


def read_seal(folder: Path) -> dict[str, Any]:
    """``about`` of a sealed folder, the manifest alone verified; ValueError says what is wrong with it."""
    return _manifest(folder)["about"]


def check_seal(folder: Path) -> None:
    """Read every file of a sealed folder and compare it with the manifest.

    Raises:
        ValueError: a file is missing, of another size, or holds other bytes than were written; it is named.
    """
    for name, expected in _manifest(folder)["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size:,} bytes, {expected['bytes']:,} were written")
        if _digest(file) != expected["blake2b"]:
            raise ValueError(f"{name} holds other bytes than were written")


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        digest = content.pop("blake2b")
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} is no manifest: {error}") from error
    if digest != _digest_of(content):
        raise ValueError(f"{MANIFEST} holds other values than were written")
    return content


def _digest_of(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _digest(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # which cannot be opened there
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file: to a temporary name, then renamed."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(*paths: str | Path) -> None:
    """Make the folders of files that are written later, when much has been measured for them.

    Raises:
        OSError: now, where one of them could not be written then.
    """
    for path in (Path(os.path.realpath(path)) for path in paths):
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; choose another file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.parent / f".{_unique()}.tmp"
        probe.touch()
        probe.unlink()


def write_or_show(path: str | Path, text: str, show: Callable[[str], object]) -> None:
    """:func:`write_text` of what took long to measure: where that fails, it is shown before the error is raised."""
    try:
        write_text(path, text)
    except OSError:
        show(text)
        raise


_LOCKED: set[TextIO] = set()
"""Lock files that this process has open."""


def _close_in_child() -> None:
    """A lock belongs to the open file: a forked loader worker would hold it on when its parent has died."""
    for file in _LOCKED:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[str | None]:
    """Hold a lock file; yields None, or, unless ``wait``, who else holds it. A process that dies lets go.

    On a system, or a file system, without locks it holds nothing, and says so in a warning.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file, owner = _lock(path, wait)
    _LOCKED.add(file)
    try:
        yield owner
    finally:
        _LOCKED.discard(file)
        file.close()


def _is_at(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(path: Path, wait: bool) -> tuple[TextIO, str | None]:
    """The open file, and who else holds it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not _is_at(file, path):  # its last owner has removed it meanwhile
                file.close()
                continue
        except BlockingIOError:
            file.seek(0)
            return file, file.read().strip() or "another process"
        except (OSError, ImportError) as error:
            warnings.warn(f"adq: {path} cannot be locked ({error}): let no other process use the folder", stacklevel=4)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        return file, None

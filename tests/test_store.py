"""Files and directories are the old ones or the new ones, whatever happens in between."""

import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from adq import store


@pytest.mark.parametrize("step", ["_sync", "rename"])
def test_an_interrupted_directory_is_the_old_one(tmp_path, monkeypatch, step):
    package = tmp_path / "a.package"
    package.mkdir()
    (package / "old").write_text("old")
    module, name = (store, "_sync") if step == "_sync" else (store.os, "rename")
    original, calls = getattr(module, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:  # of two renames the one that puts the new directory in place
            raise KeyboardInterrupt
        return original(*arguments)

    def write():
        with store.replacing_directory(package) as folder:
            folder.mkdir()
            (folder / "new").write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert len(calls) >= 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.package"]
    assert [path.name for path in package.iterdir()] == ["old"]
    write()
    assert [path.name for path in tmp_path.iterdir()] == ["a.package"]
    assert [path.name for path in package.iterdir()] == ["new"]


def test_many_writers_of_one_file_do_not_meet(tmp_path):
    path, texts = tmp_path / "file", [str(i) * 50_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: store.write_text(path, text), texts * 5))
    assert path.read_text() in texts
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


def test_a_link_leads_to_the_new_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "elsewhere" / "file")
    for text in ("new", "newer"):
        store.write_text(link, text)
        assert link.is_symlink() and (tmp_path / "elsewhere" / "file").read_text() == text
    assert [item.name for item in (tmp_path / "elsewhere").iterdir()] == ["file"]


def test_where_nothing_can_be_locked_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with pytest.warns(UserWarning, match="cannot be locked"), store.locked(tmp_path / "a.lock") as owner:
        assert owner is None


@pytest.mark.skipif(not hasattr(store.os, "fork"), reason="a system without fork")
def test_a_forked_child_does_not_hold_the_lock_of_a_parent_that_is_killed(tmp_path):
    code = f"""
import os, pathlib, signal, sys, time
from adq import store
with store.locked(pathlib.Path({str(tmp_path / "a.lock")!r})) as owner:
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    print(child, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir(), close_fds=True
    )
    assert run.returncode == -9
    try:
        with store.locked(tmp_path / "a.lock") as owner:
            assert owner is None
    finally:
        store.os.kill(int(run.stdout), 9)


def test_a_lock_file_that_was_removed_before_it_was_locked_is_not_the_lock(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl", reason="a system without file locks")
    path, flock = tmp_path / "a.lock", fcntl.flock

    def late(file, operation):
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()  # as the last owner does
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with store.locked(path) as owner, store.locked(path) as other:
        assert owner is None
        assert "process" in other

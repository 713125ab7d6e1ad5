"""Files and directories are the old ones or the new ones, whatever happens in between."""

import sys
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

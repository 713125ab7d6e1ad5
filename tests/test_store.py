"""Files and directories are the old ones or the new ones, whatever happens in between."""

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

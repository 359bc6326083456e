"""Atomic replacement of a folder, also where the system cannot swap two names."""

import errno
import threading
from pathlib import Path

import pytest

from concord.model.bundle import atomic
from concord.model.bundle.atomic import replace_folder


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.fixture(params=["swap", *sorted(atomic.SWAP_UNSUPPORTED)])
def file_system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This file system, and file systems that cannot swap names, one per error number."""

    def fail(*_: Path) -> None:
        raise OSError(request.param, "not supported")

    if request.param != "swap":
        monkeypatch.setattr(atomic, "swap_names", fail)


@pytest.mark.usefixtures("file_system")
def test_replace_folder_existing_path_swaps_the_folders(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    replace_folder(new, old)
    assert (old / "file").read_text() == "new"
    assert (new / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.usefixtures("file_system")
def test_replace_folder_free_path_renames(tmp_path: Path) -> None:
    replace_folder(folder(tmp_path / "new", "new"), tmp_path / "free")
    assert (tmp_path / "free" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["free"]


def test_replace_folder_failed_rename_raises_and_keeps_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = folder(tmp_path / "old", "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "missing", old)

    def fail(*_: Path) -> None:
        raise OSError(errno.EACCES, "forbidden")

    monkeypatch.setattr(atomic, "swap_names", fail)
    with pytest.raises(PermissionError):
        replace_folder(folder(tmp_path / "new", "new"), old)
    assert (old / "file").read_text() == "old"


def test_replace_folder_without_renameat2_still_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    replace_folder(new, old)
    assert (old / "file").read_text() == "new"


def test_replace_folder_repeated_path_exists_at_every_moment(tmp_path: Path) -> None:
    path, new = folder(tmp_path / "path", "1"), folder(tmp_path / "new", "2")
    done, missing = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            if not (path / "file").exists():
                missing.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(200):
        replace_folder(new, path)
    done.set()
    watcher.join()
    assert not missing

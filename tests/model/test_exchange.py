"""Old or new, never neither."""

import errno
import threading
from pathlib import Path

import pytest

from model import exchange
from model.exchange import put_in_place


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


@pytest.fixture(params=["exchange", *sorted(exchange.NO_EXCHANGE)])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """This file system, and those that say in one way or another that they cannot."""

    def refuse(*_: Path) -> None:
        raise OSError(request.param, "cannot")

    if request.param != "exchange":
        monkeypatch.setattr(exchange, "exchange", refuse)


@pytest.mark.usefixtures("system")
def test_names_change_places(tmp_path: Path) -> None:
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    put_in_place(new, old)
    assert (old / "file").read_text() == "new"
    assert (new / "file").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new", "old"]


@pytest.mark.usefixtures("system")
def test_a_free_name_is_taken(tmp_path: Path) -> None:
    put_in_place(folder(tmp_path / "new", "new"), tmp_path / "free")
    assert (tmp_path / "free" / "file").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["free"]


def test_what_the_disk_refuses_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = folder(tmp_path / "old", "old")
    with pytest.raises(FileNotFoundError):
        put_in_place(tmp_path / "missing", old)

    def refuse(*_: Path) -> None:
        raise OSError(errno.EACCES, "forbidden")

    monkeypatch.setattr(exchange, "exchange", refuse)
    with pytest.raises(PermissionError):
        put_in_place(folder(tmp_path / "new", "new"), old)
    assert (old / "file").read_text() == "old"


def test_a_system_without_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    monkeypatch.setattr(exchange.ctypes, "CDLL", lambda *_, **__: object())
    put_in_place(new, old)
    assert (old / "file").read_text() == "new"


def test_something_is_there_at_every_moment(tmp_path: Path) -> None:
    one, other = folder(tmp_path / "one", "1"), folder(tmp_path / "other", "2")
    done, missed = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            if not (one / "file").exists():
                missed.append(1)

    watcher = threading.Thread(target=look)
    watcher.start()
    for _ in range(200):
        put_in_place(other, one)
    done.set()
    watcher.join()
    assert not missed

"""Folders that take each other's place: the new one, or the old one, never none."""

import errno
from pathlib import Path
from typing import Any

import pytest

from common.errors import StorageError
from common.files import replace_folder, restore_folder


def folder(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "content").write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "content").read_text()


@pytest.mark.parametrize("durable", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path: Path, durable: bool) -> None:
    out = tmp_path / "out"
    replace_folder(folder(tmp_path / "one", "one"), out, durable=durable)
    assert content(out) == "one"
    replace_folder(folder(tmp_path / "two", "two"), out, durable=durable)
    assert content(out) == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_that_fails_between_the_renames_gives_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, stage = folder(tmp_path / "out", "old"), folder(tmp_path / "stage", "new")
    rename = Path.replace

    def fail(self: Path, target: Any) -> Path:
        if self == stage:
            raise OSError(errno.EIO, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(StorageError, match="out: cannot write"):
        replace_folder(stage, out)
    assert (content(out), content(stage)) == ("old", "new")


def test_a_kill_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    out = folder(tmp_path / "out", "old")
    out.replace(tmp_path / ".out.old")  # what a killed `replace_folder` leaves
    restore_folder(out)
    assert content(out) == "old"
    restore_folder(out)  # and again, with nothing to restore
    assert content(out) == "old"


def test_the_remains_of_a_kill_after_the_renames_are_not_restored(tmp_path: Path) -> None:
    folder(tmp_path / ".out.old", "older")
    out = folder(tmp_path / "out", "old")
    restore_folder(out)
    assert content(out) == "old"
    replace_folder(folder(tmp_path / "stage", "new"), out)
    assert content(out) == "new"
    assert not (tmp_path / ".out.old").exists()

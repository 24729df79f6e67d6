"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.fsio import new_folder, output_path, read_json, write_text
from tests.conftest import disk_full


def test_a_new_folder_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with new_folder(path) as staging:
        (staging / "file").write_text("x")
        assert not path.exists()
    assert (path / "file").read_text() == "x"
    assert os.listdir(path.parent) == ["b"]


def test_a_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "b") as staging:
        (staging / "no" / "folder").write_text("x")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), new_folder(tmp_path / "b") as staging:
        (staging / "file").touch()
    assert os.listdir(tmp_path) == ["b"]
    assert os.listdir(tmp_path / "b") == ["mine"]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: a file, an empty folder, one with a file, and a link to the file."""
    for folder in ("empty", "notes"):
        (tmp_path / folder).mkdir()
    for file in ("own.csv", "notes/a.md"):
        (tmp_path / file).write_text("mine")
    (tmp_path / "link.csv").symlink_to("own.csv")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "folder", "message"),
    [
        ("", False, "no name given"),
        ("", True, "no name given"),
        ("empty", False, "this is a folder"),
        ("/dev/null", False, "this is a device"),
        ("own.csv", True, "this is a file"),
        ("own.csv/x/y.json", False, "own.csv is no folder"),
        ("own.csv/x", True, "own.csv is no folder"),
        ("own.csv", False, "this is what is read"),
        ("./empty/../own.csv", False, "this is what is read"),
        ("link.csv", False, "this is what is read"),
        ("notes/new/b.csv", False, "this is in notes, which is read"),
    ],
)
@pytest.mark.usefixtures("places")
def test_a_bad_output_is_refused(path: str, folder: bool, message: str) -> None:
    with pytest.raises(UserError, match=message) as e:
        output_path(path, folder=folder, inputs=["own.csv", Path("notes"), "hub/name"])
    assert e.value.where == (path or "--out")
    assert e.value.fix


@pytest.mark.usefixtures("places")
def test_a_good_output_is_left_to_be_written() -> None:
    for path, folder in (("new.csv", False), ("a/b/new.csv", False), ("empty", True), ("a/b", True)):
        assert output_path(path, folder=folder, inputs=["own.csv", "notes"]) == Path(path)
    assert output_path("own.csv", inputs=["other.csv"]) == Path("own.csv")  # a result is written again
    assert not Path("a").exists()


@contextmanager
def nobody() -> Iterator[None]:
    """As a user who may not do everything."""
    user = os.getresuid()
    if user[1] == 0:
        os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(*user)


def test_an_output_may_be_at_home(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at is the place that is written, not a folder called ~."""
    monkeypatch.setenv("HOME", str(places / "notes"))
    assert output_path("~/b.csv") == places / "notes" / "b.csv"
    with pytest.raises(UserError, match="is no folder"):
        output_path("~/a.md/b.csv")


def test_what_may_not_be_read_or_written_is_named(places: Path) -> None:
    (places / "own.csv").chmod(0)
    places.chmod(0o555)
    try:
        with nobody():
            for path, folder in ((places / "a" / "b.csv", False), (places / "a", True)):
                with pytest.raises(UserError, match="nothing may be written in"):
                    output_path(path, folder=folder)
            with pytest.raises(UserError):
                read_json(places / "own.csv")
    finally:
        places.chmod(0o755)


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left") as e:
        write_text(tmp_path / "a.json", "{}")
    assert e.value.filename == str(tmp_path / "a.json")
    assert os.listdir(tmp_path) == []

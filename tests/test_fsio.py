"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen_ray.fsio import new_folder


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

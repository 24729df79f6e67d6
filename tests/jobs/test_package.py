"""Which files go to the cluster: real folders, real git."""

from __future__ import annotations

import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.jobs.package import own_package, working_tree

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def write(root: Path, *names: str, text: str = "x") -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def git(root: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(root), *words], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write(tmp_path, "run.yaml", "data/kept.jsonl", "data/big.jsonl", "notes/new.md", ".env", "tracked.pem")
    write(tmp_path, ".gitignore", text="/data/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "run.yaml", ".gitignore", "tracked.pem")
    git(tmp_path, "add", "-f", "data/kept.jsonl")
    return tmp_path


@needs_git
def test_what_git_tracks_and_what_is_new_and_not_ignored(repository: Path) -> None:
    package = working_tree(repository)
    assert package.files == {".gitignore", "run.yaml", "data/kept.jsonl", "notes/new.md", "tracked.pem"}
    assert package.withheld == (".env",)
    with zipfile.ZipFile(io.BytesIO(package.data)) as archive:
        assert set(archive.namelist()) == package.files
        assert archive.read("run.yaml") == b"x"


@needs_git
def test_a_folder_inside_a_repository_is_sent_by_itself_and_deleted_files_are_not(repository: Path) -> None:
    assert working_tree(repository / "notes").files == {"new.md"}
    (repository / "run.yaml").unlink()
    assert "run.yaml" not in working_tree(repository).files


@needs_git
def test_where_git_cannot_say_what_it_ignores_nothing_is_sent(repository: Path) -> None:
    (repository / ".git" / "config").write_text("damaged [")
    with pytest.raises(UserError, match="git does not say what it ignores here"):
        working_tree(repository)


def test_outside_git_what_is_usually_ignored_stays_here(tmp_path: Path) -> None:
    write(tmp_path, "run.yaml", "data/a.jsonl", "key.pem", "x.pyc")
    write(tmp_path, ".venv/bin/python", "runs/bio/run.json", "p/__pycache__/m.pyc", "q.egg-info/PKG-INFO")
    package = working_tree(tmp_path)
    assert package.files == {"run.yaml", "data/a.jsonl"}
    assert package.withheld == ("key.pem",)


def test_the_same_files_are_the_same_package(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for root in (first, second):
        write(root, "run.yaml", "data/a.jsonl")
    assert working_tree(first).uri == working_tree(second).uri
    write(second, "run.yaml", text="y")
    assert working_tree(first).uri != working_tree(second).uri


def test_too_much_is_refused_with_the_largest_files_named(tmp_path: Path) -> None:
    write(tmp_path, "small")
    write(tmp_path, "model.bin", text="x" * 3000)
    with pytest.raises(UserError, match=r"model\.bin") as raised:
        working_tree(tmp_path, limit=2000)
    assert str(raised.value).index("model.bin") < str(raised.value).index("small")
    assert len(working_tree(tmp_path, limit=3001).files) == 2


def test_folders_are_held_by_what_is_in_them(tmp_path: Path) -> None:
    write(tmp_path, "data/a.jsonl")
    package = working_tree(tmp_path)
    assert package.holds("data")
    assert package.holds(".")
    assert not package.holds("dat")


def test_the_installed_package_can_be_imported_from_the_zip() -> None:
    files = own_package().files
    assert {"qwen_ray/__init__.py", "qwen_ray/jobs/entry.py"} <= files
    assert not [name for name in files if name.endswith(".pyc")]

"""Which files go to the cluster: real folders, real git."""

from __future__ import annotations

import io
import os
import random
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


@needs_git
@pytest.mark.parametrize("in_git", [True, False])
def test_what_looks_like_a_secret_stays_here(tmp_path: Path, in_git: bool) -> None:
    if in_git:
        git(tmp_path, "init", "-q")
    write(tmp_path, "run.yaml", "src/keys.py", "prod.ENV", "GOOGLE-credentials.json", "sub/id_ecdsa", "A.PEM")
    write(
        tmp_path, ".aws/credentials", ".aws/config", "sub/.SSH/known", ".npmrc", ".pypirc", "_netrc", "c.p12"
    )
    package = working_tree(tmp_path)
    assert package.files == {"run.yaml", "src/keys.py"}
    named = {".aws/", "sub/.SSH/", "prod.ENV", "GOOGLE-credentials.json", "sub/id_ecdsa", "A.PEM"}
    assert set(package.withheld) == {*named, ".npmrc", ".pypirc", "_netrc", "c.p12"}
    assert len(package.withheld) == 10


def test_a_name_that_is_not_utf8_and_a_file_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    name = os.path.join(os.fsencode(tmp_path), b"caf\xe9.txt")
    with open(name, "w"):
        pass
    with pytest.raises(UserError, match=r"caf\\xe9\.txt: the name of this file is not UTF-8"):
        working_tree(tmp_path)
    os.unlink(name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="loop: it cannot be read"):
        working_tree(tmp_path)
    (tmp_path / "loop").unlink()
    (tmp_path / "bad").symlink_to("/proc/self/mem")  # reading it fails, also for root
    with pytest.raises(UserError, match="bad: it cannot be read"):
        working_tree(tmp_path)


def test_a_zip_that_ray_would_not_take_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "small")
    (tmp_path / "noise.bin").write_bytes(random.Random(0).randbytes(5000))
    with pytest.raises(UserError, match=r"packed files.*The largest: noise\.bin"):
        working_tree(tmp_path, packed=5000)
    write(tmp_path, "noise.bin", text="x" * 50_000)
    assert len(working_tree(tmp_path, packed=5000).files) == 2


def test_the_digest_of_inputs_is_of_their_names_and_contents_alone(tmp_path: Path) -> None:
    write(tmp_path, "run.yaml", "data/a.jsonl", "notes.md")

    def digest() -> str:
        return working_tree(tmp_path).digest(["run.yaml", "data", "missing"])

    first = digest()
    write(tmp_path, "notes.md", text="other")
    assert digest() == first
    write(tmp_path, "data/a.jsonl", text="other")
    assert digest() != first
    write(tmp_path, "data/a.jsonl")
    assert digest() == first
    (tmp_path / "data" / "a.jsonl").rename(tmp_path / "data" / "b.jsonl")
    assert digest() != first


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

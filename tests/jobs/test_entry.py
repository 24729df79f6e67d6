"""Where a job begins: what it checks on its node, where it goes, how a sweep is resumed, secrets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from filelock import FileLock
from ray._private.runtime_env import packaging

from qwen_ray import __version__
from qwen_ray.errors import UserError
from qwen_ray.jobs import secrets
from qwen_ray.jobs.entry import keep_files, main, resumed, unpacked
from qwen_ray.jobs.package import own_package
from qwen_ray.jobs.request import Request
from qwen_ray.jobs.submit import entry_point


def test_files_are_kept_beside_the_output_under_the_same_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is resumed only with the paths it was started with; Ray's folder is another one each time."""
    out = tmp_path / "storage" / "bio"
    out.parent.mkdir()
    for number in (1, 2):
        sent = tmp_path / f"package-{number}"
        sent.mkdir()
        (sent / f"only-{number}").write_text("")
        (sent / "data.jsonl").write_text(str(number))
        monkeypatch.chdir(sent)
        keep_files(Path.cwd(), out)
        assert Path.cwd() == tmp_path / "storage" / "bio.files"
        assert Path("data.jsonl").read_text() == str(number)
        assert sorted(p.name for p in Path.cwd().iterdir()) == ["data.jsonl", f"only-{number}"]
    assert not out.exists()


def test_files_that_another_node_of_the_machine_unpacks_anew_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray removes the folder and fills it again, under a lock of its own."""
    uri = own_package().uri
    sent = packaging.get_local_dir_from_uri(uri, str(tmp_path))
    sent.mkdir()
    monkeypatch.chdir(sent)
    found: list[str] = []

    def look() -> None:
        with unpacked() as here:
            assert here == Path.cwd() == sent
            found.extend(sorted(p.name for p in here.iterdir()))

    with FileLock(f"{packaging._get_local_path(str(tmp_path), uri)}.lock"):
        shutil.rmtree(sent)
        looking = threading.Thread(target=look)
        looking.start()
        sent.mkdir()
        (sent / "one").write_text("")
        looking.join(0.5)
        (sent / "two").write_text("")
    looking.join()
    assert found == ["one", "two"]

    shutil.rmtree(sent)
    with pytest.raises(UserError, match="the job's files are not there any more"), unpacked():
        pass


def test_storage_that_the_node_does_not_have_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the node cannot write there"):
        keep_files(tmp_path, tmp_path / "file" / "bio")


def test_a_sweep_that_was_begun_is_resumed(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    space = "{optim.learning_rate: {distribution: log_uniform, low: 1.0e-4, high: 1.0e-3}}"
    file.write_text(f"embedded_data: true\nspace: {space}\n")
    argv = ["sweep", str(file), "--out", str(tmp_path / "out")]
    assert resumed(argv) == argv
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.json").write_text("{}")
    assert resumed(argv) == [*argv, "--resume"]
    assert resumed([*argv, "--resume"]) == [*argv, "--resume"]


def test_another_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["--qwen-ray", "0.0.1", "--attempt", "1", "--", "train"])
    assert raised.value.code == 2
    assert (
        f"this node has qwen-ray {__version__}, the job was submitted with 0.0.1" in capsys.readouterr().err
    )


def test_a_secret_that_the_node_lacks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWEN_RAY_SECRETS", str(tmp_path))
    monkeypatch.setenv(secrets.NAMES, "A_KEY,B_KEY")
    (tmp_path / "A_KEY").write_text("of a file\n")
    monkeypatch.delenv("A_KEY", raising=False)
    with pytest.raises(SystemExit) as raised:
        main(["--qwen-ray", __version__, "--attempt", "1", "--", "train"])
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert "B_KEY not set on this node" in said
    assert "of a file" not in said
    assert os.environ.pop("A_KEY") == "of a file"


def test_the_command_of_a_job_becomes_the_verb(tmp_path: Path) -> None:
    request = Request("eval", ("--model", "no such model", "--suite", "tiny", "--out", "r.json"), None)
    command = entry_point(request, 1, python=sys.executable)
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "no such model" in done.stderr
    assert "Traceback" not in done.stderr


def test_values_are_not_put_where_all_can_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets.check_names(["WANDB_API_KEY"])
    with pytest.raises(UserError, match="could be read by everybody") as raised:
        secrets.check_names(["WANDB_API_KEY=abc"])
    assert "abc" not in str(raised.value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert secrets.sent(["WANDB_MODE", "A=b=c"]) == {"WANDB_MODE": "offline", "A": "b=c"}
    with pytest.raises(UserError, match="NOT_SET is not set here"):
        secrets.sent(["NOT_SET"])

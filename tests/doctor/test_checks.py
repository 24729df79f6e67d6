"""What facts of machines mean."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.doctor import checks
from qwen_ray.doctor.checks import Check
from qwen_ray.doctor.probe import Probe
from qwen_ray.doctor.ranges import installed, misfits, required
from qwen_ray.doctor.run import examine
from qwen_ray.errors import UserError
from tests.jobs.server import job_server
from tests.test_cli import qwen_ray

GIB = 2**30
RANGES = {"torch": ">=2.13,<2.14", "ray": "==2.60.0"}


def machine(**changes: Any) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "host": "a",
        "python": "3.11.7",
        "prefix": "/env",
        "packages": {"qwen-ray": "0.1.0", "torch": "2.13.0+cpu", "ray": "2.60.0"},
        "gpus": [],
        "disk": {"/tmp": 100 * GIB},
        "shm": 8 * GIB,
        "open_files": 65536,
        "secrets": {"HF_TOKEN": True},
        "hub": "reachable",
        "ray_gpus": 0,
    }
    return facts | changes


def found(*machines: dict[str, Any], needed: tuple[str, ...] = ()) -> dict[str, Check]:
    facts = dict(zip("abc", machines, strict=False))
    return {check.name: check for check in checks.judge(facts, RANGES, needed)}


def test_a_sound_machine_passes() -> None:
    assert {check.state for check in found(machine(), machine()).values()} == {"ok"}


GPU = {"name": "H100", "driver": "580.1", "memory": "80 GiB"}
FAULTS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "outside the range": (
        "versions",
        "fail",
        "b: torch is 2.9.0",
        {"packages": {"torch": "2.9.0", "ray": "2.60.0"}},
    ),
    "missing": ("versions", "fail", "ray==2.60.0 is missing", {"packages": {"torch": "2.13.1", "ray": None}}),
    "nodes differ": (
        "versions",
        "warn",
        "torch 2.13.0+cpu, 2.13.1",
        {"packages": {"qwen-ray": "0.1.0", "torch": "2.13.1", "ray": "2.60.0"}},
    ),
    "another qwen-ray": (
        "versions",
        "warn",
        "qwen-ray 0.1.0, 0.2.0",
        {"packages": {"qwen-ray": "0.2.0", "torch": "2.13.0+cpu", "ray": "2.60.0"}},
    ),
    "another Python": ("python", "fail", "3.11, 3.12", {"python": "3.12.1"}),
    "a GPU without driver": ("gpus", "fail", "nvidia-smi sees none: b", {"ray_gpus": 1}),
    "a GPU that Ray does not know": ("gpus", "warn", "not known to Ray on b", {"gpus": [GPU]}),
    "a full disk": ("disk", "fail", "0.5 GiB free in /tmp of b", {"disk": {"/tmp": GIB // 2}}),
    "little disk": ("disk", "warn", "5.0 GiB free in /tmp of b", {"disk": {"/tmp": 5 * GIB}}),
    "a container's shared memory": ("shm", "warn", "0.1 GiB free in /dev/shm of b", {"shm": GIB // 16}),
    "few open files": ("ulimit", "warn", "1024 on b", {"open_files": 1024}),
    "a secret on some": ("secret", "warn", "HF_TOKEN is not set on b", {"secrets": {"HF_TOKEN": False}}),
    "no hub": ("hub", "warn", "b: huggingface.co: timed out", {"hub": "huggingface.co: timed out"}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_its_node_named(fault: str) -> None:
    name, state, said, change = FAULTS[fault]
    results = found(machine(), machine(**change))
    assert results[name].state == state
    assert said in results[name].found
    assert results[name].fix
    assert {n for n, check in results.items() if check.state != "ok"} == {name}


def test_drivers_that_differ() -> None:
    one, other = machine(gpus=[GPU], ray_gpus=1), machine(gpus=[{**GPU, "driver": "570.0"}], ray_gpus=1)
    assert found(one, other)["gpus"].state == "warn"
    assert found(one, one)["gpus"].found == "2 (H100), driver 580.1"


def test_a_secret_that_is_needed_must_be_there() -> None:
    without = machine(secrets={"HF_TOKEN": False})
    assert found(without)["secret"].state == "ok"
    assert found(without, needed=("HF_TOKEN",))["secret"].state == "fail"


def test_between_nodes() -> None:
    assert checks.clocks({"a": 0.0, "b": 0.2}).state == "ok"
    assert checks.clocks({"a": 0.0, "b": -3.0}) == Check(
        "clocks", "warn", "b is 3.0 s behind", "let the nodes keep time (chrony, systemd-timesyncd)"
    )
    assert checks.clocks({"a": 0.0, "b": 60.0}).state == "fail"
    assert checks.network({}, 3).state == "ok"
    assert "a to b: refused" in checks.network({"a to b": "refused"}, 2).found
    assert checks.nccl({}).state == "ok"
    assert checks.nccl({"a": "2.29.3", "b": None}).found.endswith("on b")
    assert checks.nccl({"a": "2.29.3", "b": "2.28.0"}).state == "fail"


def test_what_this_environment_has_is_what_qwen_ray_asks_for() -> None:
    """pyproject.toml's ranges, extras left out, against what the tests run with."""
    ranges = required()
    assert {"torch", "ray", "transformers"} <= set(ranges)
    assert "deepspeed" not in ranges
    assert misfits() == []
    assert installed(["no-such-package"]) == {"no-such-package": None}


def test_this_machine_is_checked_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret-value")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    storage = tmp_path / "storage"
    done = qwen_ray("doctor", "--storage", str(storage), "--env", "NOT_THERE", "--json")
    assert done.returncode == 3, done.stderr
    rows = json.loads(done.stdout)
    states = {row["name"]: row["state"] for row in rows}
    assert states["storage"] == states["versions"] == "ok"
    assert not list(storage.rglob("doctor-*"))
    secrets = {row["found"]: row["state"] for row in rows if row["name"] == "secret"}
    assert [state for found, state in secrets.items() if "NOT_THERE is not set" in found] == ["fail"]
    assert [state for found, state in secrets.items() if "WANDB_API_KEY is set" in found] == ["ok"]
    assert "secret-value" not in done.stdout + done.stderr


def test_storage_that_cannot_be_written_or_is_not_what_was_written(tmp_path: Path) -> None:
    probe = Probe()
    (tmp_path / "file").write_text("")
    wrote = probe.write(str(tmp_path / "file"), "a", b"1")
    assert checks.storage("/x", wrote, {}, 0).state == "fail"
    assert probe.write(str(tmp_path / "good"), "a", b"1") is None
    assert probe.read(str(tmp_path / "good"), "a") == b"1"
    assert probe.read(str(tmp_path / "other"), "a") == "what another node wrote is not there"


def test_a_relative_folder_is_another_one_on_each_node() -> None:
    with pytest.raises(UserError, match="another folder on each node"):
        examine(None, storage="runs", needed=(), note=print)


def test_a_server_that_does_not_answer_is_a_check_that_failed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    done = qwen_ray("doctor", "--address", address, "--json")
    assert done.returncode == 3, done.stderr
    (row,) = json.loads(done.stdout)
    assert (row["name"], row["state"]) == ("server", "fail")
    assert f"{address}: no head answers" in row["found"]
    assert "dashboard" in row["fix"]


LOG = """(raylet) [
[
  {"name": "shm", "state": "ok", "found": "8 GiB", "fix": ""},
  {"name": "disk", "state": "fail", "found": "[\\n[", "fix": "make room"}
]
(pid=7) bye
[
"""


def test_the_checks_of_a_job_are_found_among_what_else_it_printed() -> None:
    with job_server() as server:
        server.log, server.begins_as = LOG, {"status": "SUCCEEDED", "driver_exit_code": 3}
        found = examine(server.address, storage=None, needed=(), note=print)
        assert [(check.name, check.state) for check in found] == [
            ("server", "ok"),
            ("shm", "ok"),
            ("disk", "fail"),
        ]
        server.log = "error: no such verb\n"
        with pytest.raises(RuntimeError, match="could not be run on the cluster"):
            examine(server.address, storage=None, needed=(), note=print)


def test_a_home_that_is_not_there_and_a_secret_that_is_empty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "not" / "there"))
    monkeypatch.setenv("QWEN_RAY_SECRETS", str(tmp_path))
    for name, content in {"FULL": b"x\n", "EMPTY": b" \n", "DAMAGED": b"\xff"}.items():
        (tmp_path / name).write_bytes(content)
        monkeypatch.delenv(name, raising=False)
    facts = Probe().facts((), ("FULL", "EMPTY", "DAMAGED", "ABSENT"), hub=False)
    assert str(tmp_path) in facts["disk"]
    assert [name for name, there in facts["secrets"].items() if there] == ["FULL"]

"""Jobs as users submit them: from another folder and environment, to three nodes with a token."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qwen_ray.data.records import write_records
from qwen_ray.fsio import read_json
from qwen_ray.jobs.api import JobsApi
from qwen_ray.training.tracking import read_metrics
from tests.cluster.nodes import Cluster, free_ports
from tests.conftest import sums

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
CLI = [sys.executable, "-m", "qwen_ray.cli"]
RUN = {"model": {"name": "tiny"}, "tracking": {"wandb": "off"}}
OPTIM = {"max_steps": 200, "warmup_steps": 1}
LEARNING_RATES = {"distribution": "log_uniform", "low": 1e-4, "high": 1e-3}


class User:
    """Somebody at another machine: a folder, a home with the token, and nothing else in the environment."""

    def __init__(self, cluster: Cluster, home: Path) -> None:
        self.address = cluster.run("print('http://' + ray._private.worker.get_dashboard_url())")
        self.folder = home / "project"
        self.folder.mkdir(parents=True)
        (home / ".ray").mkdir()
        self.token = home / ".ray" / "auth_token"
        self.token.write_text(Path(cluster.client["HOME"], ".ray", "auth_token").read_text())
        self.environment = {"HOME": str(home), "PATH": "/usr/bin:/bin"}

    def api(self) -> JobsApi:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOME", self.environment["HOME"])
            return JobsApi(self.address)

    def start(self, *argv: str, folder: Path | None = None, **environment: str) -> subprocess.Popen[str]:
        at = [] if "--address" in argv else ["--address", self.address]
        python = ["--python", sys.executable] if argv[0] in {"submit", "doctor"} else []
        return subprocess.Popen(
            [*CLI, *argv, *at, *python],
            cwd=folder or self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *argv: str, code: int = 0, **environment: str) -> tuple[str, str]:
        """stdout and stderr of a command that ends with ``code``."""
        return ended(self.start(*argv, **environment), code)


def ended(process: subprocess.Popen[str], code: int = 0) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == code, stderr[-3000:] + stdout[-500:]
    # What begins a line is of our own process, threads of Ray's in it included. Tracebacks of other processes
    # are Ray's: it prints them into a job's log behind the name of a process.
    assert not re.search("^Traceback", stderr, re.MULTILINE)
    return stdout, stderr


def wait(there: Callable[[], object], *running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not there():
        for process in running:
            assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture(scope="module")
def user(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> User:
    found = User(cluster, tmp_path_factory.mktemp("user"))
    write_records(found.folder / "data.jsonl", [*sums(40), *sums(40, seed=1, domain="more")])
    data = {"train": ["data.jsonl"], "validation_fraction": 0.1, "max_length": 96}
    training = {**RUN, "data": data, "optim": OPTIM, "checkpoint": {"every_steps": 4}}
    sweep = {
        "name": "example",
        "run": {**RUN, "data": data, "optim": {**OPTIM, "max_steps": 10}},
        "space": {"optim.learning_rate": LEARNING_RATES},
        "objective": {"targets": ["sums"], "strengths": ["more"], "tolerance": 50.0},
        "search": {"trials": 2},
        "stopping": {"name": "none"},
        "trials": {"slots": 2, "cpus": 0.5},
    }
    for name, tree in {"train": training, "sweep": sweep}.items():
        (found.folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return found


@pytest.mark.long
def test_a_run_and_a_sweep_are_stopped_and_resumed_by_the_same_commands(user: User, tmp_path: Path) -> None:
    """Both at one time, from folders of their own: nodes of one machine share the place where Ray unpacks a
    folder, and each unpacks it anew. Between stop and resumption another file changes, so that it is unpacked
    elsewhere."""
    other = tmp_path / "other"
    shutil.copytree(user.folder, other)
    (other / "which.txt").write_text("the sweep's")
    bio, search = tmp_path / "bio", tmp_path / "search"
    train = ["submit", "train", "--config", "train.yaml", "--out", str(bio), "--env", "HOME"]
    sweep = ["submit", "sweep", "sweep.yaml", "--out", str(search), "--name", "sweep"]
    running = [user.start(*train), user.start(*sweep, folder=other)]
    wait(bio.is_dir, *running)
    assert "train-bio is running since" in user(*train, "--no-follow")[1]
    assert "a job of this name is running" in user(*train, "--steps", "9", code=2)[1]
    (row,) = json.loads(user("status", "train-bio", "--json")[0])
    assert (row["status"], row["verb"], row["out"]) == ("RUNNING", "train", str(bio))

    under_way = {"train-bio": bio / "checkpoints", "sweep": search / "trials"}
    while under_way:
        wait(lambda: [name for name, folder in under_way.items() if any(folder.glob("*"))], *running)
        name = next(name for name, folder in under_way.items() if any(folder.glob("*")))
        del under_way[name]
        assert f"{name} is stopped" in user("stop", name)[0]
        said = ended(running.pop(0 if name == "train-bio" else -1), 1)[1]
        assert f"failed: {name} was stopped; the same submit goes on" in said
    assert read_json(bio / "run.json")["state"] == "interrupted"
    assert read_json(search / "sweep.json")["state"] != "done"

    for folder in (user.folder, other):
        (folder / "notes.md").write_text("changed")
    running = [user.start(*train, "--json"), user.start(*sweep, folder=other)]
    printed, said = ended(running[0])
    result = json.loads(printed)
    assert (result["id"], result["attempt"], result["status"]) == ("train-bio.2", 2, "SUCCEEDED")
    assert "train-bio.2 goes on where attempt 1 ended" in said
    assert read_json(bio / "run.json")["result"]["resumed_from"] > 0
    assert [r["step"] for r in read_metrics(bio)][-1] == OPTIM["max_steps"]
    assert "sweep.2 is done" in ended(running[1])[0]
    assert read_json(search / "sweep.json")["state"] == "done"
    assert "train-bio.2 is done since" in user(*train)[0]


def test_a_benchmark_waits_for_a_cpu_and_ctrl_c_leaves_it_running(user: User, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    argv = ["submit", "eval", "--model", "tiny", "--suite", "tiny", "--limit", "2", "--out", str(out)]
    occupied = ["one", "other"]
    with user.api() as api:
        for name in occupied:
            api.submit({"entrypoint": "sleep 600", "submission_id": name, "entrypoint_num_cpus": 1})
        wait(lambda: all(api.job(name).status == "RUNNING" for name in occupied))
        following = user.start(*argv, "--install")
        assert following.stderr is not None
        assert any("has not started: it waits for room" in line for line in following.stderr)
        following.send_signal(signal.SIGINT)
        _, said = ended(following, 130)
        assert "eval-result goes on" in said
        for name in occupied:
            api.stop(name)
    printed, _ = user("logs", "-f", "eval-result")
    assert "arithmetic" in printed
    assert read_json(out)["suite"] == "tiny"
    assert "arithmetic" in user("logs", "eval-result")[0]


def test_what_cannot_run_there_is_said_at_once(user: User, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "out")]
    said = user("submit", "train", "--config", "train.yaml", "--workers", "9", *out, code=2)[1]
    assert "cluster.workers: the cluster can never hold 9 x 1 CPU" in said
    benchmark = ["submit", "eval", "--model", "tiny", "--suite", "tiny", *out]
    assert "its 3 nodes have 2 CPU and 0 GPU" in user(*benchmark, "--gpus", "1", code=2)[1]
    assert "no job 'nothing'" in user("logs", "nothing", code=2)[1]
    assert "token of RAY_AUTH_TOKEN" in user("status", code=2, RAY_AUTH_TOKEN="wrong")[1]
    assert "asks for a token" in user("status", code=2, HOME=str(tmp_path))[1]
    (port,) = free_ports(1)
    assert "no head answers" in user("status", "--address", f"http://127.0.0.1:{port}", code=2)[1]
    _, said = user(*benchmark, "--env", "NOT_THERE", code=1)
    assert "failed: the environment of Ray, /run/secrets: NOT_THERE not set on this node" in said


def test_ray_own_port_is_not_the_job_servers(cluster: Cluster, user: User) -> None:
    assert "no web server" in user("status", "--address", cluster.address, code=2)[1]


def test_the_doctor_finds_a_node_with_another_version_and_storage_that_is_not_shared(
    cluster: Cluster, user: User, tmp_path: Path
) -> None:
    """Memory of a process is storage that no other node sees."""
    printed, _ = user("doctor", "--storage", str(tmp_path / "shared"))
    assert "0 failed" in printed
    assert "what one node writes, 2 nodes read" in printed

    old = tmp_path / "peft-0.1.0.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1.0\n")
    cluster._environment["PYTHONPATH"] = str(tmp_path)
    number = cluster.add_node()
    del cluster._environment["PYTHONPATH"]
    try:
        printed, _ = user("doctor", "--storage", "memory://mine", "--json", code=3)
    finally:
        cluster.kill_node(number)
    checks = {row["name"]: row for row in json.loads(printed)}
    assert {name for name, row in checks.items() if row["state"] == "fail"} == {"versions", "storage"}
    assert "peft is 0.1.0" in checks["versions"]["found"]
    assert "what another node wrote is not there" in checks["storage"]["found"]
    assert checks["nodes"]["found"] == "4 answer"


def test_a_head_that_dies_is_given_up(tmp_path: Path) -> None:
    alone = Cluster(tmp_path)
    try:
        user = User(alone, tmp_path / "user")
        with user.api() as api:
            api.submit({"entrypoint": "echo begun; sleep 600", "submission_id": "long"})
        following = user.start("logs", "-f", "long", "--patience", "2")
        assert following.stdout is not None
        assert any("begun" in line for line in following.stdout)
    finally:
        alone.close()
    _, said = ended(following, 1)
    assert "failed: no head answers" in said
    assert "the same submit joins it or goes on" in said

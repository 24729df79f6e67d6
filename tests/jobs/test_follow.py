"""What is said of a job's end."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from qwen_ray.jobs.api import Job, JobsApi
from qwen_ray.jobs.follow import follow, outcome, waits_for
from qwen_ray.jobs.submit import ended_well, latest
from tests.jobs.server import JobServer, job_server


def job(status: str, **more: Any) -> Job:
    facts: dict[str, Any] = {
        "id": "bio",
        "message": "",
        "error_type": None,
        "exit_code": None,
        "entrypoint": "exec python",
        "started": 1.0,
        "ended": None,
    }
    return Job(**{**facts, "status": status, **more})


TRACE = "loss 2.1\nfailed: rank 1 on node b: CUDA out of memory\n  fix: a smaller batch\nshutting down\n"


@pytest.mark.parametrize(
    ("ended", "log", "code", "said"),
    [
        (job("SUCCEEDED", exit_code=0), "", 0, "bio is done"),
        (job("STOPPED"), "", 1, "the same submit goes on"),
        (job("FAILED", exit_code=3), "no trial kept the strengths", 3, "a gate said no"),
        (
            job("FAILED", exit_code=1),
            TRACE,
            1,
            "rank 1 on node b: CUDA out of memory\n  fix: a smaller batch",
        ),
        (job("FAILED", exit_code=1), "python: No module named qwen_ray.jobs", 1, "qwen-ray is not installed"),
        (job("FAILED", exit_code=127), "sh: python: not found", 1, "--python"),
        (job("FAILED", exit_code=-9), "step 3\n", 1, "ended with -9: step 3"),
        (
            job("FAILED", error_type="JOB_SUPERVISOR_ACTOR_DIED"),
            "",
            1,
            "the node of the entry point was lost",
        ),
        (job("FAILED", message="runtime_env setup failed: no such package"), "", 1, "setup failed"),
    ],
)
def test_how_it_ended(ended: Job, log: str, code: int, said: str) -> None:
    found, line = outcome(ended, log)
    assert found == code
    assert said in line


def test_the_own_error_comes_first() -> None:
    assert outcome(job("FAILED", exit_code=1), TRACE)[1].startswith("rank 1 on node b")


def test_a_gates_no_is_an_end_and_a_failure_is_not() -> None:
    assert ended_well(job("FAILED", exit_code=3))
    assert ended_well(job("SUCCEEDED"))
    assert not ended_well(job("FAILED", exit_code=1))
    assert not ended_well(job("STOPPED"))


def test_the_newest_attempt_counts_not_the_newest_name() -> None:
    jobs = [
        job("FAILED", id="bio-10", metadata={"qwen_ray.name": "bio", "qwen_ray.attempt": "10"}),
        job("STOPPED", id="bio-9", metadata={"qwen_ray.name": "bio", "qwen_ray.attempt": "9"}),
        job("RUNNING", id="other"),
    ]
    found = latest(jobs, "bio")
    assert found is not None
    assert found.id == "bio-10"
    assert latest(jobs, "nothing") is None


def test_what_a_job_waits_for() -> None:
    said = waits_for({"CPU": (2.0, 2.0), "memory": (0.0, 1e9), "GPU": (0.5, 4.0)})
    assert "2 of 2 CPU in use, 0.5 of 4 GPU in use" in said
    assert "not known" in waits_for({})


def begin(server: JobServer) -> Job:
    """A job that has printed something."""
    server.log = "step 1\nstep 2\n"
    with JobsApi(server.address) as api:
        api.submit({"submission_id": "bio", "entrypoint": "exec python"})
        return api.job("bio")


def test_a_log_is_passed_on_until_the_end() -> None:
    with job_server() as server, JobsApi(server.address) as api:
        started = begin(server)
        server.end("bio", "SUCCEEDED", 0)
        printed: list[str] = []
        assert follow(api, started, write=printed.append, note=print).status == "SUCCEEDED"
    assert "".join(printed) == "step 1\nstep 2\n"


def test_a_job_that_ended_well_did_so_though_its_log_cannot_be_read() -> None:
    with job_server() as server, JobsApi(server.address) as api:
        started = begin(server)
        server.end("bio", "SUCCEEDED", 0)
        server.log = None
        notes: list[str] = []
        assert follow(api, started, write=print, note=notes.append).status == "SUCCEEDED"
    assert len(notes) == 1
    assert "the end of bio's log could not be read" in notes[0]
    assert "no agent" in notes[0]


def test_where_nobody_reads_the_log_it_is_not_followed_until_the_job_ends() -> None:
    def closed(_: str) -> None:
        raise BrokenPipeError

    with job_server() as server, JobsApi(server.address) as api:
        started = begin(server)
        end = threading.Timer(20, server.end, ("bio", "SUCCEEDED", 0))  # should it be waited for after all
        end.start()
        with pytest.raises(BrokenPipeError):
            follow(api, started, write=closed, note=print)
        end.cancel()
        assert server.jobs["bio"]["status"] == "RUNNING"


def test_a_head_that_is_gone_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with JobsApi(f"http://127.0.0.1:{port}") as api, pytest.raises(RuntimeError, match="the same submit"):
        follow(api, job("RUNNING"), write=print, note=print, patience=0)

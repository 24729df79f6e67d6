"""What a command means beside the jobs that there are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.jobs.api import JobsApi
from qwen_ray.jobs.request import Request
from qwen_ray.jobs.submit import Options, Submitted, find, submit
from tests.jobs.server import JobServer, job_server

BIO = Request(
    "train", ("--config", "run.yaml", "--out", "/mnt/bio"), "/mnt/bio", ("run.yaml", "/mnt/d.jsonl")
)


class Here:
    """A folder with a configuration, and a job server."""

    def __init__(self, folder: Path, server: JobServer) -> None:
        self.folder, self.server = folder, server
        self.write("run.yaml", "seed: 1")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def submit(self, request: Request = BIO, name: str | None = None) -> Submitted:
        with JobsApi(self.server.address) as api:
            return submit(api, request, Options(name=name), root=self.folder, note=print)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Here]:
    with job_server() as server:
        yield Here(tmp_path, server)


def test_the_same_command_joins_resumes_or_says_that_it_is_done(here: Here) -> None:
    first = here.submit()
    assert (first.how, first.job.id) == ("new", "train-bio")
    here.write("notes.md", "a file that the command does not name")
    assert here.submit().how == "joined"
    here.server.end("train-bio", "STOPPED")
    again = here.submit()
    assert (again.how, again.job.id, again.job.attempt) == ("resumed", "train-bio.2", 2)
    here.server.end("train-bio.2", "SUCCEEDED", 0)
    assert (here.submit().how, here.submit().job.id) == ("over", "train-bio.2")


def test_the_same_words_with_another_configuration_are_another_command(here: Here) -> None:
    here.submit()
    here.write("run.yaml", "seed: 2")
    with pytest.raises(UserError, match="with another command or other files"):
        here.submit()
    here.server.end("train-bio", "STOPPED")
    other = here.submit()
    assert (other.how, other.job.id) == ("new", "train-bio.2")
    here.server.end("train-bio.2", "SUCCEEDED", 0)
    here.write("run.yaml", "seed: 3")
    assert (here.submit().how, here.submit().job.id) == ("new", "train-bio.3")


def test_an_attempt_is_never_the_job_of_another_name(here: Here) -> None:
    here.submit(Request("eval", (), "/mnt/other"), name="train-bio-2")
    here.submit()
    here.server.end("train-bio", "STOPPED")
    assert here.submit().how == "resumed"
    with JobsApi(here.server.address) as api:
        assert find(api, "train-bio-2").metadata["qwen_ray.verb"] == "eval"
        assert find(api, "train-bio").attempt == 2
        assert find(api, "train-bio.2").attempt == 2


def test_two_names_do_not_write_to_one_place(here: Here) -> None:
    """The second job would remove the files, OUT.files, that the first one reads."""
    here.submit()
    twice = Request(
        "train", ("--config", "run.yaml", "--out", "/mnt/x/../bio/"), "/mnt/x/../bio/", ("run.yaml",)
    )
    with pytest.raises(UserError, match="train-bio is running and writes there"):
        here.submit(twice, name="mine")
    assert list(here.server.jobs) == ["train-bio"]
    assert here.submit(Request("train", (), "/mnt/other"), name="other").how == "new"
    assert here.submit(Request("eval", (), None), name="nowhere").how == "new"
    here.server.end("train-bio", "STOPPED")
    assert here.submit(twice, name="mine").how == "new"


def test_an_input_that_looks_like_a_secret_is_named_before_it_is_missed(
    here: Here, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here.folder)
    here.write("id_pairs.jsonl", "{}")
    with pytest.raises(UserError, match="left out"):
        here.submit(Request("train", (), "/mnt/bio", ("id_pairs.jsonl",)))
    assert "not sent, as they look like secrets: id_pairs.jsonl" in capsys.readouterr().out
    assert not here.server.jobs

"""What a verb's arguments mean for a job, and what is refused before anything is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.cli import build_parser
from qwen_ray.errors import UserError
from qwen_ray.jobs.package import working_tree
from qwen_ray.jobs.request import Request, Room, check_inputs, check_out, read

SWEEP = """
out: /mnt/sweep
run: {data: {train: [data.jsonl]}}
space: {optim.learning_rate: {distribution: log_uniform, low: 1.0e-4, high: 1.0e-3}}
objective: {targets: [sums]}
"""


def request(verb: str, *argv: str) -> Request:
    verbs = next(action for action in build_parser()._actions if action.dest == "==SUPPRESS==")
    assert verbs.choices is not None
    return read(verb, argv, verbs.choices[verb])  # type: ignore[call-overload]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "data.jsonl").write_text("{}")
    monkeypatch.chdir(folder)
    return folder


def test_a_run_says_where_it_writes_what_it_reads_and_what_it_needs(here: Path) -> None:
    (here / "run.yaml").write_text("cluster: {workers: 4, gpus_per_worker: 1, cpus_per_worker: 2}\n")
    found = request(
        "train", "--config", "run.yaml", "--data", "data.jsonl", "--out", "/mnt/bio", "--set", "seed=1"
    )
    assert found.out == "/mnt/bio"
    assert found.inputs == ("run.yaml", "data.jsonl")
    assert found.room == (Room(4, 2, 1, "cluster.workers"),)
    assert found.argv[-2:] == ("--set", "seed=1")
    assert not found.computes
    assert found.default_name == "train-bio"


def test_a_sweep_reads_its_file_and_the_data_that_it_names(here: Path) -> None:
    (here / "sweep.yaml").write_text(SWEEP)
    found = request("sweep", "sweep.yaml", "--set", "trials.engines=3")
    assert found.out == "/mnt/sweep"
    assert found.inputs == ("sweep.yaml", "data.jsonl")
    assert found.room == (Room(3, 2, 0, "trials.engines"),)


def test_a_benchmark_of_a_model_computes_in_the_entry_point_one_of_a_server_does_not() -> None:
    local = request("eval", "--model", "tiny", "--suite", "tiny", "--out", "/mnt/r.json")
    assert local.computes
    assert local.default_name == "eval-r"
    served = ("eval", "--endpoint", "http://s:8000", "--model", "tiny", "--suite", "tiny", "--out", "/r.json")
    assert not request(*served).computes


@pytest.mark.parametrize(
    ("argv", "where"),
    [
        (["train", "--set", "optim.learning_rat=1"], "optim.learning_rat"),
        (["train", "--data", "data.jsonl", "--workers", "0"], "cluster.workers"),
        (["train", "--data", "data.jsonl", "--set", "cluster.address=h:6379"], "cluster.address"),
        (["train", "--data", "data.jsonl", "--dry-run"], "--dry-run"),
        (["sweep", "nowhere.yaml"], "nowhere.yaml"),
        (["sweep", "sweep.yaml", "--registry", "registry"], "--registry"),
        (["eval", "--model", "m", "--suite", "tiny", "--out", "/r", "--api-key", "k"], "--api-key"),
    ],
)
def test_what_a_job_could_not_do_is_refused(here: Path, argv: list[str], where: str) -> None:
    (here / "sweep.yaml").write_text(SWEEP)
    with pytest.raises(UserError) as raised:
        request(*argv)
    assert where in str(raised.value)


PIPELINE = """
name: facts
work: WORK
registry: /mnt/registry
data: {bio: {sources: {file: ["new/*.jsonl", /mnt/more.jsonl]}, benchmarks: bench, heldout: [held]}}
knowledge: {root: /mnt/kb, bases: {book: {html: book, embedded: facts}}}
train: {model: {name: tiny}, cluster: {workers: 2, gpus_per_worker: 1}}
benchmark: {suites: [tiny]}
"""


def test_a_pipeline_reads_and_writes_what_its_file_says_and_may_run_again(here: Path) -> None:
    (here / "pipeline.yaml").write_text(PIPELINE.replace("WORK", "/mnt/work"))
    found = request("pipeline", "run", "pipeline.yaml")
    assert found.out == "/mnt/work"
    assert found.inputs == ("pipeline.yaml", "bench", "held", "new", "/mnt/more.jsonl", "book")
    assert found.room == (Room(2, 1, 1, "cluster.workers"),)
    assert found.again
    check_out(found)
    (here / "pipeline.yaml").write_text(PIPELINE.replace("WORK", "runs/work"))
    with pytest.raises(UserError, match=r"pipeline\.yaml: work"):
        check_out(request("pipeline", "run", "pipeline.yaml"))
    for key in ("registry", "state", "knowledge.root"):
        with pytest.raises(UserError, match=rf"pipeline\.yaml: {key}"):
            request("pipeline", "run", "pipeline.yaml", "--set", f"{key}=here")
    with pytest.raises(UserError, match="only `pipeline run`"):
        request("pipeline", "status", "pipeline.yaml")


def test_what_the_verb_does_not_take_ends_as_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        request("eval", "--modell", "tiny")
    assert raised.value.code == 2
    assert "qwen-ray eval" in capsys.readouterr().err


def test_results_go_to_storage_that_is_kept(here: Path) -> None:
    with pytest.raises(UserError, match="job's own folder"):
        check_out(request("train", "--data", "data.jsonl", "--out", "runs/bio"))
    check_out(request("train", "--data", "data.jsonl", "--out", "/mnt/bio"))


def test_inputs_that_will_not_be_there_are_named(here: Path, tmp_path: Path) -> None:
    (here / "runs").mkdir()
    (here / "runs" / "made.jsonl").write_text("{}")
    (tmp_path / "outside.jsonl").write_text("{}")
    package = working_tree(here)

    def check(data: str) -> list[str]:
        return check_inputs(request("train", "--data", data, "--out", "/mnt/bio"), package)

    assert check("data.jsonl") == []
    assert check("./x/../data.jsonl") == []
    assert check("/mnt/only/there.jsonl") == []
    (note,) = check(str(tmp_path / "outside.jsonl"))
    assert "only if every node mounts it" in note
    for path, why in {
        "runs/made.jsonl": "ignored",
        "../outside.jsonl": "outside the current folder",
        "nowhere.jsonl": "no such file",
    }.items():
        with pytest.raises(UserError, match=why) as raised:
            check(path)
        assert path in str(raised.value)

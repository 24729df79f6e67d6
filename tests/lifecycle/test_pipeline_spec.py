"""What a pipeline refuses before anything starts, what it collects, and whose turn it is."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.cli import build_parser
from qwen_ray.config import fields
from qwen_ray.data.records import write_records
from qwen_ray.errors import UserError
from qwen_ray.lifecycle import collect
from qwen_ray.lifecycle.lease import Lease
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.state import Done, End, State, hashes
from qwen_ray.lifecycle.turn import turn
from qwen_ray.storage import open_storage
from tests.conftest import ROOT, sums

SHIPPED = sorted(path for path in (ROOT / "pipelines").glob("*.yaml") if path.name != "watch.yaml")


def written(folder: Path, **changes: Any) -> Path:
    """A pipeline file with sections replaced by ``changes``; None leaves one out."""
    tree = {
        "name": "sums",
        "work": str(folder / "work"),
        "registry": str(folder / "registry"),
        "data": {"sums": {"sources": {"file": str(folder / "inbox" / "*.jsonl")}}},
        "train": {"model": {"name": "tiny"}},
        "benchmark": {"suites": ["tiny"]},
        **changes,
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
    return path


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a misspelt key": ({"registri": "r"}, ("unknown key 'registri'", "did you mean 'registry'?")),
    "a misspelt key of the benchmark": (
        {"benchmark": {"suites": ["tiny"], "limits": 3}},
        ("unknown key 'benchmark.limits'", "did you mean 'benchmark.limit'?"),
    ),
    "a misspelt key of the gate": ({"gate": {"min_gian": 0.1}}, ("gate.min_gian", "gate.min_gain")),
    "a misspelt key of the run": (
        {"train": {"optim": {"learning_rat": 1}}},
        ("pipeline.yaml: train", "unknown key 'optim.learning_rat'", "optim.learning_rate"),
    ),
    "a misspelt key of the data": (
        {"data": {"sums": {"sources": {"file": "a"}, "sise": 3}}},
        ("pipeline.yaml: data.sums", "unknown key 'sise'", "did you mean 'size'?"),
    ),
    "an unknown source": ({"data": {"sums": {"sources": {"dolli": "hub"}}}}, ("dolli", "dolly")),
    "no data": ({"data": None}, ("no data",)),
    "train and sweep": ({"sweep": "sweep.yaml"}, ("either train or sweep",)),
    "neither": ({"train": None}, ("either train or sweep",)),
    "a sweep that is not there": (
        {"train": None, "sweep": "nowhere.yaml"},
        ("nowhere.yaml", "no such configuration file"),
    ),
    "a sweep of another name": (
        {"train": None, "sweep": str(ROOT / "sweeps" / "demo.yaml"), "embedded_data": True},
        ("the sweep 'demo' is not named as the pipeline, 'sums'",),
    ),
    "full fine-tuning": ({"train": {"method": {"name": "full"}}}, ("train.method.name", "lora or qlora")),
    "what the pipeline decides": ({"train": {"out": "runs/x"}}, ("train.out", "remove it")),
    "data that the pipeline decides": ({"train": {"data": {"train": ["a"]}}}, ("train.data.train",)),
    "a suite that is not there": ({"benchmark": {"suites": ["tini"]}}, ("unknown suite 'tini'", "'tiny'")),
    "no suite": ({"benchmark": {"suites": []}}, ("benchmark.suites",)),
    "an unknown target": (
        {"benchmark": {"suites": ["tiny"], "targets": ["biologie"]}},
        ("unknown category 'biologie'", "did you mean 'biology'?"),
    ),
    "a name the registry refuses": ({"name": "Sums"}, ("'name': not an adapter name",)),
    "a work folder that is none": ({"work": "s3://bucket/work"}, ("give a path, not a URI",)),
    "a misspelt setting of the server": (
        {"endpoint": {"serve": {"engin": "torch"}}},
        ("unknown key 'engin'", "did you mean 'engine'?"),
    ),
    "a stage that cannot run elsewhere": (
        {"run_on": {"address": "http://head:8265", "stages": ["promote"]}},
        ("run_on.stages",),
    ),
    "a stage elsewhere that there is not": (
        {"run_on": {"address": "http://head:8265", "stages": ["sweep"]}},
        ("no stage sweep",),
    ),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_bad_pipeline_is_refused_when_it_is_read(tmp_path: Path, case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(UserError) as error:
        PipelineSpec.read(written(tmp_path, **changes))
    for words in said:
        assert words in str(error.value)
    assert not (tmp_path / "work").exists()


def test_no_file_and_no_such_stage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such configuration file"):
        PipelineSpec.read(tmp_path / "nowhere.yaml")
    from qwen_ray.lifecycle.pipeline import run_pipeline

    with pytest.raises(UserError, match="no stage 'trian'") as error:
        run_pipeline(PipelineSpec.read(written(tmp_path)), note=print, until="trian")
    assert error.value.fix == "did you mean 'train'?"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_pipelines_begin_with_their_command_and_load(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# qwen-ray pipeline run pipelines/{path.name}"
    build_parser().parse_args(first.removeprefix("# qwen-ray ").split())
    assert PipelineSpec.read(path).stages[0] == "collect"


def test_the_page_has_every_key() -> None:
    page = (ROOT / "docs" / "pipeline.md").read_text(encoding="utf-8")
    for key in PipelineSpec.model_fields:
        assert f"`{key}`" in page or f"`{key}." in page, key
    assert all(field.description for key, field in fields(PipelineSpec) if key != "gate")


# -- collecting


def test_a_copy_stays_when_its_source_changes(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for name in ("b", "a"):
        write_records(inbox / f"{name}.jsonl", sums(3, domain=name))
    (inbox / "notes.txt").write_text("no record")
    spec = PipelineSpec.read(written(tmp_path))
    items = list(collect.look(spec))
    assert [Path(item.path).name for item in items] == ["a.jsonl", "b.jsonl"]
    copies = [collect.copy(spec, item) for item in items]
    assert [path.read_bytes() for path in copies] == [Path(item.path).read_bytes() for item in items]
    before = copies[0].stat().st_mtime_ns
    assert collect.copy(spec, items[0]) == copies[0]
    assert copies[0].stat().st_mtime_ns == before  # not copied again

    write_records(inbox / "a.jsonl", sums(4))
    assert len(copies[0].read_text().splitlines()) == 3
    with pytest.raises(RuntimeError, match="changed while it was copied"):
        collect.copy(spec, dataclasses.replace(items[0], sha256="0" * 64))
    copies[1].write_text("damaged")
    assert collect.copy(spec, items[1]).read_bytes() == Path(items[1].path).read_bytes()


def test_folders_of_an_object_store_are_fetched(tmp_path: Path) -> None:
    store = open_storage("memory://pipeline-test/inbox")
    store.create("2026/a.jsonl", b"one\n")
    store.create("b.jsonl", b"two\n")
    changes = {"data": {"sums": {"sources": {"dolly": "memory://pipeline-test/inbox"}}}}
    spec = PipelineSpec.read(written(tmp_path, **changes))
    (item,) = collect.look(spec)
    found = collect.copy(spec, item)
    assert (found / "2026" / "a.jsonl").read_bytes() == b"one\n"
    assert (found / "b.jsonl").read_bytes() == b"two\n"
    assert list(collect.look(spec)) == [item]
    store.create("c.jsonl", b"three\n")
    (changed,) = collect.look(spec)
    assert changed.sha256 != item.sha256
    assert not list(found.parent.parent.glob(".*"))
    changes = {"data": {"sums": {"sources": {"file": "memory://pipeline-test/inbox"}}}}
    spec = PipelineSpec.read(written(tmp_path, **changes))
    files = [collect.copy(spec, item).read_bytes() for item in collect.look(spec)]
    assert files == [b"one\n", b"two\n", b"three\n"]


def test_a_set_of_the_hub_is_a_name_and_a_missing_file_is_an_error(tmp_path: Path) -> None:
    spec = PipelineSpec.read(written(tmp_path, data={"chat": {"sources": {"dolly": "hub"}}}))
    assert [(item.path, item.sha256) for item in collect.look(spec)] == [("hub", None)]
    spec = PipelineSpec.read(written(tmp_path))
    with pytest.raises(UserError, match="there is nothing here") as error:
        list(collect.look(spec))
    assert "data.sums.sources.file" in error.value.where


# -- the state


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_runs_in_a_folder_or_an_object_store(tmp_path: Path, place: str) -> None:
    storage = open_storage(tmp_path / "state" if place == "folder" else f"memory://{tmp_path.name}")
    state = State(storage, "sums")
    run = state.begin(baseline="base", trigger={"kind": "data"}, spec={})
    assert state.unfinished() == state.run("1") == state.run(run.id) == run
    left = tmp_path / "left.txt"
    left.write_text("here")
    done = Done("collect", {"items": [("a", 1)]}, {"n": 1}, hashes(left), run.id, run.at, 0.5)
    state.keep(done)
    state.record(run.id, done)
    found = state.made("collect", {"items": [["a", 1]]})
    assert found is not None
    assert (found.hash, found.there) == (done.hash, True)
    assert state.stage(run.id, "collect") == found
    assert state.made("collect", {"items": []}) is None
    left.write_text("changed")
    assert not found.there
    for error in ("first", "second"):
        state.failed(run.id, "train", RuntimeError(error))
    assert [row["error"] for row in state.failures(run.id)] == ["first", "second"]
    end = state.finish(run.id, End("hold", None, False, ["no"], run.at))
    assert state.finish(run.id, End("promote", "sums@1", True, [], run.at)) == end
    assert state.unfinished() is None
    second = state.begin(baseline="base", trigger=None, spec={})
    assert state.runs() == [run.id, second.id]
    with pytest.raises(UserError, match="no run '7'"):
        state.run("7")


# -- whose turn it is


def test_the_lease_of_a_process_that_died_here_is_taken_at_once(tmp_path: Path) -> None:
    state, notes = State(open_storage(tmp_path), "sums"), list[str]()
    dead = subprocess.Popen(["true"])
    dead.wait()
    with turn(state, 60, notes.append) as lease:
        owner = lease.owner
    died = owner.replace(f"/{os.getpid()}@", f"/{dead.pid}@")
    assert died != owner
    assert Lease(state.storage, state.lease, died, 60).acquire()
    with turn(state, 60, notes.append) as lease:
        assert lease.held
    assert notes == []


def test_the_lease_of_a_process_elsewhere_is_waited_for(tmp_path: Path) -> None:
    state, notes = State(open_storage(tmp_path), "sums"), list[str]()
    elsewhere = Lease(state.storage, state.lease, f"{socket.gethostname()}/1@00000000", 1)
    assert elsewhere.acquire()
    with turn(state, 1, notes.append) as lease:  # it died: its time passes
        assert lease.held
        assert time.time() >= elsewhere._since + 1
    assert len(notes) == 1
    assert "00000000" in notes[0]


def test_who_runs_it_elsewhere_is_said(tmp_path: Path) -> None:
    state = State(open_storage(tmp_path), "sums")
    with (
        Lease(state.storage, state.lease, "far/7@00000000", 2),  # it lives: it renews its lease
        pytest.raises(UserError, match="being done by far/7@00000000") as error,
        turn(state, 2, print),
    ):
        pass
    assert error.value.status == 409

"""Pipelines on the embedded model through a real endpoint: made, refused, resumed, and nothing twice."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.cli import build_parser
from qwen_ray.data.records import write_records
from qwen_ray.errors import EXIT_GATE_SAID_NO, EXIT_OK, UserError
from qwen_ray.evaluation import suites
from qwen_ray.lifecycle import telling
from qwen_ray.lifecycle.pipeline import run_pipeline
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.registry import CANDIDATE, PRODUCTION, Registry
from qwen_ray.retrieval.store import Store
from qwen_ray.verbs import Output
from tests.conftest import record, sums
from tests.lifecycle.nursery import ANSWERED, Ended, Nursery

WHOLE, KILLED, WAITING = "whole", "killed", "waiting"


@dataclass(frozen=True)
class Place:
    """A server, its registry, data and a suite; pipelines are written below ``folder``."""

    folder: Path
    url: str
    nursery: Nursery
    suite: Path

    @property
    def registry(self) -> Registry:
        return Registry(self.folder / "registry")

    def data(self, name: str) -> Path:
        """A folder of training data of a pipeline."""
        folder = self.folder / "inbox" / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def spec(self, name: str, **changes: Any) -> Path:
        """A pipeline of this name: three steps on a few sums, and 16 items of each of two categories."""
        tree = {
            "name": name,
            "work": str(self.folder / "work" / name),
            "registry": str(self.folder / "registry"),
            "data": {
                "sums": {
                    "sources": {"file": str(self.data(name) / "*.jsonl")},
                    "decontaminate": {"enabled": False},
                    "near_duplicates": None,
                }
            },
            "train": {
                "model": {"name": "tiny"},
                "cluster": {"workers": 0},
                "optim": {"max_steps": 3, "learning_rate": 1e-4},
                "checkpoint": {"every_steps": 1},
            },
            "endpoint": {"url": self.url},
            "benchmark": {"suites": [str(self.suite)], "limit": 16},
            "lease_seconds": 20,
            **changes,
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def fill(
        self, name: str, count: int = 30, *, seed: int = 0, domain: str = "sums", file: str = "a.jsonl"
    ) -> None:
        """Write training data."""
        write_records(self.data(name) / file, sums(count, seed=seed, domain=domain))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Three names have a spoilt adapter in production: nearly any other is better."""
    folder = tmp_path_factory.mktemp("pipeline")
    suite = folder / "suite"
    shutil.copytree(suites.folder("tiny"), suite)
    roles = {"arithmetic": "target", "reasoning": "strength"}
    categories = {
        name: {"role": role, "tasks": [f"qwen_ray_tiny_{name}"], "metric": "acc"}
        for name, role in roles.items()
    }
    definition = {"name": "sums", "version": "1", "description": "Two of tiny's.", "categories": categories}
    (suite / "suite.yaml").write_text(yaml.safe_dump(definition))
    nursery = Nursery(folder / "journals")
    try:
        (folder / "planted").mkdir()
        write_records(folder / "planted" / "data.jsonl", sums(30))
        planted = nursery.start(
            "plant",
            data=str(folder / "planted" / "data.jsonl"),
            out=str(folder / "planted" / "run"),
            registry=str(folder / "registry"),
            names=[WHOLE, KILLED, WAITING],
        )
        assert nursery.end(planted).code == 0
        yield Place(folder, nursery.serve(folder / "registry"), nursery, suite)
    finally:
        nursery.close()


@pytest.fixture(scope="module")
def whole(place: Place) -> Ended:
    """A run that nobody touches."""
    place.fill(WHOLE)
    return place.nursery.run(place.spec(WHOLE), trigger={"kind": "planted"})


def test_a_better_version_takes_the_place_of_production(place: Place, whole: Ended) -> None:
    assert whole.code == 0, whole.error
    assert (whole.result["verdict"], whole.result["version"], whole.result["promoted"]) == (
        "promote",
        f"{WHOLE}@2",
        True,
    )
    registry = place.registry
    assert registry.aliases(WHOLE) == {PRODUCTION: 2}
    assert registry.archived(WHOLE) == [1]
    registry.verify(registry.resolve(WHOLE))
    kinds = [event.kind for event in registry.events(WHOLE, version=2)]
    assert [kinds.count(kind) for kind in ("published", "evaluation", "verdict", "alias")] == [1, 1, 1, 3]
    (verdict,) = registry.events(WHOLE, kind="verdict")
    assert (verdict.value["run"], verdict.value["baseline"]) == (whole.result["run"], f"{WHOLE}@1")
    (evaluation,) = registry.events(WHOLE, version=2, kind="evaluation")
    assert Path(evaluation.value["location"]).is_file()
    (note,) = registry.events(WHOLE, version=2, kind="note")
    assert note.value["cost"]["seconds"] > 0
    assert note.value["cost"]["gpus"] == 0
    lineage = registry.get(WHOLE, 2).lineage
    assert lineage["prepared"]["sums"]["records"] == 30


def told(registry: Registry, name: str) -> list[Any]:
    """What the registry says of a name, but for times, ids and hashes that hold paths or times."""

    def value(event: Any) -> Any:
        left_out = {
            "run",
            "by",
            "cost",
            "location",
            "sha256",
            "created_at",
            "adapter",
            "model",
            "digest",
            "bytes",
        }
        kept = {key: v for key, v in event.value.items() if key not in left_out}
        text = json.dumps(kept, sort_keys=True).replace(name, "NAME")
        run = event.value.get("by") or ""
        return text.replace(run, "RUN") if run else text.partition(" (pipeline run")[0]

    return [(event.kind, event.version, value(event)) for event in registry.events(name)]


@pytest.mark.slow
def test_killed_everywhere_it_ends_as_the_run_nobody_touched(place: Place, whole: Ended) -> None:
    """SIGKILL at every point that the whole run came to, one after another, and amid the first answers."""
    place.fill(KILLED)
    spec = place.spec(KILLED)
    points = list(dict.fromkeys(whole.points))
    points.insert(points.index("benchmark: answered"), ANSWERED)
    assert {point.partition(":")[0] for point in points} >= {
        *("collect", "prepare", "train", "register", "deploy"),
        *("benchmark", "compare", "promote", "archive", "end"),
    }
    seen: list[str] = []
    for point in points:
        ended = place.nursery.run(spec, kill=point, work=str(place.folder / "work" / KILLED))
        assert ended.code == -9, f"{point}: {ended}"
        seen += ended.points
    last = place.nursery.run(spec)
    assert last.code == 0, last.error
    for stage in ("collect", "prepare", "train", "register", "benchmark"):
        assert f"{stage}: begun" not in seen[seen.index(f"{stage}: kept") :], f"{stage} was done twice"
    for stage in ("deploy", "compare", "promote", "archive"):
        assert f"{stage}: begun" not in seen[seen.index(f"{stage}: recorded") :], f"{stage} was done twice"
    registry = place.registry
    assert told(registry, KILLED) == told(registry, WHOLE)
    assert registry.aliases(KILLED) == {PRODUCTION: 2}
    promotions = [
        event
        for event in registry.events(KILLED, kind="alias")
        if event.value["alias"] == PRODUCTION and event.value["reason"] != "planted"
    ]
    assert len(promotions) == 1
    weights = [registry.get(name, 2).path / "adapter_model.safetensors" for name in (WHOLE, KILLED)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def begun(ended: Ended) -> list[str]:
    """The stages that were worked on."""
    return [
        point.partition(":")[0]
        for point in ended.points
        if point.endswith(": begun") and point != "end: begun"
    ]


def test_again_with_nothing_new_nothing_is_done(place: Place, whole: Ended) -> None:
    again = place.nursery.run(place.spec(WHOLE))
    assert (again.code, again.result["verdict"], again.result["promoted"]) == (0, "unchanged", False)
    assert begun(again) == []
    assert place.registry.aliases(WHOLE) == {PRODUCTION: 2}


def test_what_was_rolled_back_is_not_promoted_again(place: Place, whole: Ended) -> None:
    """By itself: the data that it was made of have not changed, and a person took it back."""
    registry = place.registry
    registry.rollback(WHOLE, reason="it swears")
    assert registry.aliases(WHOLE) == {PRODUCTION: 1}
    again = place.nursery.run(place.spec(WHOLE))
    assert (again.result["verdict"], again.result["promoted"]) == ("hold", False)
    assert "it swears" in again.result["reasons"][-1]
    assert begun(again) == ["deploy", "compare", "promote", "archive"]
    assert registry.aliases(WHOLE) == {PRODUCTION: 1}


def test_a_person_may_decide_and_what_was_before_may_stay(place: Place) -> None:
    place.fill(WAITING)
    ended = place.nursery.run(place.spec(WAITING, promote="by hand"))
    assert (ended.result["verdict"], ended.result["promoted"]) == ("promote", False)
    assert place.registry.aliases(WAITING) == {CANDIDATE: 2, PRODUCTION: 1}
    ended = place.nursery.run(place.spec(WAITING, keep=1))
    assert (ended.result["verdict"], ended.result["promoted"]) == ("promote", True)
    assert begun(ended) == ["deploy", "compare", "promote", "archive"]
    assert place.registry.aliases(WAITING) == {PRODUCTION: 2}
    assert place.registry.archived(WAITING) == []


POISON = {"max_steps": 40, "learning_rate": 2e-2}


def test_a_poisoned_run_is_refused(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """Every answer is wrong: production stays as it is, and the registry says why."""
    pairs = [(a, b) for a in range(10, 20) for b in range(10, 20)]
    wrong = [record(f"What is {a} + {b}?", "7", domain="sums", id=f"{a}+{b}") for a, b in pairs]
    write_records(place.data("poisoned") / "a.jsonl", wrong)
    spec = place.spec(
        "poisoned",
        train={"model": {"name": "tiny"}, "cluster": {"workers": 0}, "optim": POISON},
        benchmark={"suites": [str(place.suite)], "limit": 16, "latency_requests": 2},
        gate={"max_latency_ratio": 1000},
    )
    ended = place.nursery.run(spec)
    assert ended.code == 0, ended.error
    assert (ended.result["verdict"], ended.result["promoted"]) == ("regress", False)
    assert any("ms at p95" in reason for reason in ended.result["reasons"])
    registry = place.registry
    assert registry.aliases("poisoned") == {}
    assert registry.archived("poisoned") == [1]
    (verdict,) = registry.events("poisoned", kind="verdict")
    assert (verdict.value["verdict"], verdict.value["baseline"]) == ("regress", "base")
    assert any("got worse" in reason or "lost more" in reason for reason in verdict.value["reasons"])
    args = build_parser().parse_args(["pipeline", "run", str(spec), "--json"])
    code = args.verb(args, Output(io.StringIO(), as_json=True))
    assert code == EXIT_GATE_SAID_NO
    told_of = capsys.readouterr().err
    assert "train: as in run 0001" in told_of
    assert "deploy\n" in told_of
    assert registry.versions("poisoned") == [1]
    stdout = io.StringIO()
    args = build_parser().parse_args(["pipeline", "explain", str(spec), "1"])
    assert args.verb(args, Output(stdout, as_json=False)) == EXIT_OK
    assert "regress poisoned@1" in stdout.getvalue()
    assert "got worse" in stdout.getvalue() or "lost more" in stdout.getvalue()


def test_changed_inputs_make_what_depends_on_them_anew(place: Place) -> None:
    for domain in ("first", "second"):
        place.fill(domain, 20, seed=len(domain), domain=domain)
    data = {
        domain: {
            "sources": {"file": str(place.data(domain) / "*.jsonl")},
            "decontaminate": {"enabled": False},
        }
        for domain in ("first", "second")
    }
    made = ["collect", "prepare", "train", "register"]
    judged = ["deploy", "compare", "promote", "archive"]
    bench = {"suites": [str(place.suite)], "limit": 2}
    spec = place.spec("changing", data=data, benchmark=bench)
    ended = place.nursery.run(spec)
    assert (ended.code, ended.result.get("verdict")) == (0, "hold"), ended.error
    assert begun(ended) == [*made, "deploy", "benchmark", *judged[1:]]

    ended = place.nursery.run(place.spec("changing", data=data, benchmark=bench, gate={"min_gain": 0.5}))
    assert begun(ended) == judged
    assert "gained no more than the 50 points" in ended.result["reasons"][0]

    place.fill("second", 5, seed=99, domain="second", file="b.jsonl")
    first = place.folder / "work" / "changing" / "data"
    times = {path: path.stat().st_mtime_ns for path in first.glob("*/first.jsonl")}
    ended = place.nursery.run(place.spec("changing", data=data, benchmark=bench))
    assert begun(ended) == [*made, "deploy", "benchmark", *judged[1:]]
    assert {path: path.stat().st_mtime_ns for path in first.glob("*/first.jsonl")} == times
    asked = [
        path.name for path in (place.folder / "work" / "changing" / "evaluations").glob("*/suite-*/tiny*")
    ]
    assert sorted(asked) == ["tiny.json", "tiny~changing@1.json", "tiny~changing@2.json"]  # the base once

    shutil.rmtree(place.folder / "work" / "changing" / "train")  # lost: made again, and the same
    ended = place.nursery.run(place.spec("changing", data=data, benchmark=bench))
    assert begun(ended) == ["train", *judged]
    assert place.registry.versions("changing") == [1, 2]


def test_after_a_failure_the_same_run_goes_on(place: Place) -> None:
    place.fill("failing")
    bench = {"suites": [str(place.suite)], "limit": 2}
    steps = {"max_steps": 3, "learning_rate": 1e30, "warmup_steps": 0}
    train = {"model": {"name": "tiny"}, "cluster": {"workers": 0}, "optim": steps}
    ended = place.nursery.run(place.spec("failing", benchmark=bench, train=train))
    assert ended.code == 1
    assert ended.error.startswith("stage train: ")

    nobody = {"url": "http://127.0.0.1:1"}
    ended = place.nursery.run(place.spec("failing", benchmark=bench, endpoint=nobody))
    assert (ended.code, ended.status) == (2, 503)
    assert ended.error.startswith("stage deploy: http://127.0.0.1:1")
    assert "does not answer" in ended.error
    assert begun(ended) == ["train", "register", "deploy"]

    spec = place.spec("failing", benchmark=bench)
    value = telling.status(PipelineSpec.read(spec))
    assert value["runs"][0]["failure"]["stage"] == "deploy"
    assert [row["what"] for row in telling.plan(PipelineSpec.read(spec))["stages"]] == [
        *["as before"] * 4, "to do", *["after that"] * 4,
    ]  # fmt: skip
    ended = place.nursery.run(spec)
    assert (ended.code, ended.result["verdict"]) == (0, "hold")
    assert begun(ended) == ["deploy", "benchmark", "compare", "promote", "archive"]
    assert len(telling.status(PipelineSpec.read(spec))["runs"]) == 1


def test_one_run_at_a_time(place: Place) -> None:
    place.fill("busy")
    spec = place.spec("busy")
    journal = place.nursery.start("run", spec=str(spec), kill=None, hold="prepare: begun", until="prepare")
    while not journal.is_file() or "prepare: begun" not in journal.read_text():
        time.sleep(0.02)
    with pytest.raises(UserError, match=r"being done by .*/\d+@") as refused:
        run_pipeline(PipelineSpec.read(spec), note=lambda _: None)
    assert refused.value.status == 409
    journal.with_suffix(".go").touch()
    ended = place.nursery.end(journal)
    assert (ended.code, ended.result["verdict"]) == (0, "")
    assert len(telling.status(PipelineSpec.read(spec))["runs"]) == 1


def test_production_moved_by_somebody_else_begins_a_new_run(place: Place) -> None:
    """The candidate was compared with what is not in production any more."""
    place.fill("moved")
    bench = {"suites": [str(place.suite)], "limit": 2}
    spec = place.spec("moved", benchmark=bench, gate={"min_gain": 0})
    ended = place.nursery.run(spec, until="register")
    assert ended.code == 0
    place.registry.point("moved", PRODUCTION, 1, reason="I like it")
    ended = place.nursery.run(spec)
    assert ended.result["run"].startswith("0002-")
    assert ended.result["verdict"] == "unchanged"
    assert telling.status(PipelineSpec.read(spec))["runs"][0]["end"]["verdict"] == "superseded"


def test_knowledge_is_brought_up_to_date_once_a_run(place: Place) -> None:
    """Twice in a run that goes on is once; the next run finds what is new."""
    place.fill("knowing")
    notes = place.folder / "notes"
    notes.mkdir()
    (notes / "rivers.md").write_text("# Rivers\n\nThe Okavango ends in a delta.\n")
    root = place.folder / "knowledge"
    knowledge = {"root": str(root), "bases": {"rivers": {"text": str(notes)}}, "license": "CC0-1.0"}
    bench = {"suites": [str(place.suite)], "limit": 2}
    spec = place.spec("knowing", knowledge=knowledge, benchmark=bench)
    assert place.nursery.run(spec, kill="knowledge: updated").code == -9
    ended = place.nursery.run(spec)
    assert (ended.code, ended.result.get("verdict")) == (0, "hold"), ended.error
    (built,) = Store(str(root)).versions("rivers")
    assert (built.action, built.origins[0]["license"]) == ("build", "CC0-1.0")

    (notes / "lakes.md").write_text("# Lakes\n\nBaikal is the deepest lake.\n")
    ended = place.nursery.run(spec, until="knowledge")
    assert begun(ended) == ["knowledge"]
    current = Store(str(root)).open("rivers").manifest
    assert (current.action, current.parent, current.documents) == ("update", built.version, 2)

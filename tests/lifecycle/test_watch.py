"""The watch: weeks of it, by a clock that is set by hand; killed, failing, and with others at the same."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.cli import build_parser
from qwen_ray.config import reference
from qwen_ray.errors import UserError
from qwen_ray.lifecycle.child import Child
from qwen_ray.lifecycle.history import Entry, History
from qwen_ray.lifecycle.lease import Lease, LeaseLost
from qwen_ray.lifecycle.watch import Watch, World
from qwen_ray.lifecycle.watch_spec import WatchSpec
from qwen_ray.lifecycle.watch_state import LEASE, WatchState, read_state
from qwen_ray.registry import Registry
from qwen_ray.registry.records import record_evaluation, record_verdict
from qwen_ray.storage import open_storage
from qwen_ray.verbs import Output
from tests.conftest import ROOT
from tests.lifecycle.test_alerts import Receiver, receiver  # noqa: F401
from tests.lifecycle.test_pipeline_spec import written
from tests.lifecycle.watching import Clock, evaluation, publish

HOUR, DAY, WEEK = 3600.0, 86_400.0, 7 * 86_400.0
PROMOTED = {"run": "1", "verdict": "promote", "version": "facts@2", "promoted": True}
REFUSED = {"run": "2", "verdict": "hold", "version": "facts@3", "promoted": False}


class Pipelines:
    """Starts nothing, and ends as told; ``started``: what was started, and by which triggers."""

    def __init__(self) -> None:
        self.outcomes: list[dict[str, Any] | None] = []
        self.started: list[tuple[str, list[str]]] = []
        self.stopped = 0

    def __call__(self, file: Path, trigger: dict[str, Any]) -> Pipelines:
        self.started.append((file.name, [one["trigger"] for one in trigger["triggers"]]))
        return self

    def poll(self) -> dict[str, Any] | None:
        return self.outcomes.pop(0) if self.outcomes else PROMOTED

    def stop(self) -> None:
        self.stopped += 1


class Place:
    """A watched data file, a registry with a version in production, and a watch that is always a new one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.clock, self.pipelines = folder, Clock(), Pipelines()
        self.world = World(self.clock, self.clock.sleep, self.pipelines)
        self.registry = Registry(folder / "registry")
        self.production = publish(self.registry, folder, "facts", 1)
        self.registry.point("facts", "production", 1, reason="test")
        self.data = folder / "data.jsonl"
        self.data.write_text("0")
        self.tree: dict[str, Any] = {
            "model": "tiny:facts",
            "registry": str(folder / "registry"),
            "storage": str(folder / "watch"),
            "pipeline": "facts.yaml",
            "data": {"sources": [str(self.data)]},
        }

    def spec(self, **more: Any) -> WatchSpec:
        return WatchSpec.model_validate({**self.tree, **more})

    def watch(self, **more: Any) -> Watch:
        return Watch(self.spec(**more), world=self.world)

    def once(self, after: float = 0.0, **more: Any) -> None:
        """Look, ``after`` so many seconds, as a process that was just started does."""
        self.clock.now += after
        with self.watch(**more) as watch:
            watch.once()

    def has_new_data(self) -> None:
        """The watch has seen that the file changed, and not yet that it stays as it is."""
        self.once()
        self.data.write_text("1")
        self.once()

    @property
    def history(self) -> list[Entry]:
        return History(open_storage(self.folder / "watch")).entries()

    def texts(self, kind: str) -> list[str]:
        return [entry.text for entry in self.history if entry.kind == kind]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_data_that_keeps_changing_starts_one_run_when_it_has_settled(place: Place) -> None:
    place.once()
    place.once(after=DAY)
    assert place.pipelines.started == []
    for content in "123":
        place.data.write_text(content)
        place.once(after=500)
    assert place.pipelines.started == []
    place.once(after=599)
    assert place.pipelines.started == []
    place.once(after=1)
    assert place.pipelines.started == [("facts.yaml", ["data", "data", "data"])]
    place.once(after=DAY)
    assert len(place.pipelines.started) == 1
    (run,) = [entry for entry in place.history if entry.kind == "run"]
    assert run.text == "facts.yaml, run 1: promote; facts@2 is promoted"
    assert [one["trigger"] for one in run.value["triggers"]] == ["data", "data", "data"]
    for content in range(14):  # it never settles, and is not waited for longer than two hours
        place.data.write_text(f"more {content}")
        place.once(after=599)
    assert len(place.pipelines.started) == 2


def test_a_year_by_the_clock(place: Place) -> None:
    schedules = {
        "monthly": {"cron": "0 4 1 * *"},
        "knowledge": {"cron": "0 5 1 * *", "pipeline": "knowledge.yaml"},
    }
    place.once(schedules=schedules)
    for _ in range(5):
        with place.watch(schedules=schedules, lease_seconds=100 * DAY) as watch:
            for _ in range(2 * 73):
                place.clock.now += DAY / 2
                watch.tick()
    assert place.pipelines.started.count(("facts.yaml", ["monthly"])) == 12
    assert place.pipelines.started.count(("knowledge.yaml", ["knowledge"])) == 12
    place.once(after=100 * DAY, schedules=schedules)  # nobody looked; what was missed is done once
    place.once(after=HOUR, schedules=schedules)
    assert len(place.pipelines.started) == 26
    assert len(place.texts("start")) == len(place.texts("run")) == 26


def test_rest_after_a_run(place: Place) -> None:
    place.once()
    for content in "12":
        place.data.write_text(content)
        place.once(rest_seconds=DAY)
        place.once(after=600, rest_seconds=DAY)
    assert len(place.pipelines.started) == 1
    place.once(after=DAY, rest_seconds=DAY)
    assert len(place.pipelines.started) == 2


def test_weekly_benchmark_that_falls_alerts_and_retrains(place: Place) -> None:
    record_evaluation(place.registry, place.production, evaluation(biology=0.8), location="/nowhere")
    record_verdict(place.registry, place.production, {"verdict": "promote"}, baseline="base", run=None)
    scores = iter([0.8, 0.79, 0.5])
    asked: list[int] = []

    def benchmark(spec: WatchSpec, rule: Any, version: int) -> dict[str, Any]:
        asked.append(version)
        return evaluation(biology=next(scores))

    place.world = replace(place.world, benchmark=benchmark)
    weekly = {"endpoint": "http://nobody", "accuracy": {"suite": "tiny"}}
    place.once(**weekly)
    for _ in range(14):
        place.once(after=DAY, **weekly)
    assert asked == [1, 1]
    assert len(place.texts("accuracy")) == 2
    assert place.texts("alert") == []
    place.once(after=WEEK, **weekly)
    (alert,) = place.texts("alert")
    assert "facts@1 is below 95% of the baseline of facts@1: biology 50.0%, was 80.0%" in alert
    assert "This is more than chance." in alert
    place.once(after=600, **weekly)
    assert place.pipelines.started == [("facts.yaml", ["accuracy"])]
    assert len(place.registry.events("facts", kind="evaluation")) == 4


def test_a_run_that_fails_is_tried_again_and_then_given_up(place: Place) -> None:
    place.has_new_data()
    errors: list[dict[str, Any] | None] = [{"error": why} for why in ("no disk", "no disk", "no disk at all")]
    place.pipelines.outcomes = [errors[0], {"busy": "somebody"}, *errors[1:]]
    place.once(after=600)
    for wait in (599, 1, 600, 1199, 1):
        place.once(after=wait)
    assert [entry.kind for entry in place.history if entry.kind in ("start", "failed", "busy")] == [
        "start", "failed", "start", "busy", "start", "failed", "start", "failed"
    ]  # fmt: skip
    (alert,) = place.texts("alert")
    assert "facts.yaml failed 3 times" in alert
    assert "no disk at all" in alert
    place.once(after=DAY)
    assert len(place.pipelines.started) == 4
    place.data.write_text("2")
    place.once()
    place.once(after=600)
    assert len(place.pipelines.started) == 5


def test_killed_in_a_run_it_goes_on_with_the_same_run(place: Place) -> None:
    place.has_new_data()
    place.clock.now += 600
    place.pipelines.outcomes = [None] * 100
    killed = place.watch()
    killed.__enter__()
    killed.tick()  # starts the run; then the process is gone, and its lease is not released
    with pytest.raises(UserError, match="being done by"):
        place.once()
    place.clock.now += 60
    place.pipelines.outcomes = []
    place.once()
    assert place.pipelines.started == [("facts.yaml", ["data"])] * 2
    assert [e.value["attempt"] for e in place.history if e.kind == "run"] == [2]
    with pytest.raises(LeaseLost):  # it was not dead after all: it writes nothing
        killed.tick()
    before = read_state(open_storage(place.folder / "watch"))
    killed.__exit__()
    assert read_state(open_storage(place.folder / "watch")) == before
    assert place.pipelines.stopped == 1


def test_ended_in_a_run_the_attempt_does_not_count(place: Place) -> None:
    place.has_new_data()
    place.clock.now += 600
    place.pipelines.outcomes = [None] * 100
    for _ in range(5):
        with place.watch() as watch:
            watch.tick()
            watch.tick()  # it goes on looking while the run lasts
    assert place.pipelines.stopped == 5
    place.pipelines.outcomes = []
    place.once()
    assert [e.value["attempt"] for e in place.history if e.kind == "run"] == [1]


def test_others_wait_until_it_is_their_turn(place: Place) -> None:
    storage = open_storage(place.folder / "watch")
    other = Lease(storage, LEASE, "another machine", 60, clock=place.clock)
    assert other.acquire()
    said: list[str] = []
    begun = place.clock.now

    def sleep(seconds: float) -> None:
        place.clock.now += seconds
        if read_state(storage)["triggers"]:
            raise Ended

    place.world = replace(place.world, sleep=sleep)
    watch = Watch(place.spec(every_seconds=20), note=said.append, world=place.world)
    with pytest.raises(Ended):
        watch.forever()
    assert place.clock.now == begun + 80  # it looked a minute later, and has slept since
    assert len(said) == 1
    assert "being done by another machine" in said[0]


class Ended(Exception):
    """Of a watch that would go on for ever."""


def test_storage_that_is_away_for_a_moment_does_not_end_a_run(place: Place) -> None:
    """While the lease is held, the pipeline goes on; what it made is written down when storage is back."""
    place.has_new_data()
    place.clock.now += 600
    state, away = place.folder / "watch" / "state.json", place.folder / "away"
    looks = iter(range(99))
    said: list[str] = []

    def lose() -> None:
        state.rename(away)
        state.symlink_to(state)

    class Losing(Pipelines):
        def poll(self) -> dict[str, Any] | None:
            outcome = super().poll()
            if outcome is not None and not lost:
                lost.append("amid the look that found it ended")
                lose()
            return outcome

    def sleep(_: float) -> None:
        place.clock.now += 1
        look = next(looks)
        if look == 1:  # it runs
            lose()
        if state.is_symlink() and look in (4, 8):
            away.replace(state)
        if look == 10:
            raise Ended

    lost: list[str] = []
    place.pipelines = Losing()
    place.pipelines.outcomes = [None]
    place.world = replace(place.world, sleep=sleep, start=place.pipelines)
    with pytest.raises(Ended):
        Watch(place.spec(), note=said.append, world=place.world).forever()
    assert lost
    assert not state.is_symlink()
    assert place.pipelines.stopped == 0
    assert len(place.pipelines.started) == 1
    assert len([text for text in said if text.startswith("waiting: ")]) == 1
    assert [e.value["attempt"] for e in place.history if e.kind == "run"][-1] == 1
    assert read_state(open_storage(place.folder / "watch"))["running"] is None


def test_what_has_ended_while_storage_went_is_gone_on_with(place: Place) -> None:
    place.has_new_data()
    state, away = place.folder / "watch" / "state.json", place.folder / "away"

    class Losing(Pipelines):
        def poll(self) -> dict[str, Any] | None:
            state.rename(away)
            state.symlink_to(state)
            return PROMOTED

    place.world = replace(place.world, start=Losing())
    with pytest.raises(UserError, match="cannot be used now"):
        place.once(after=600)
    away.replace(state)
    place.world = replace(place.world, start=place.pipelines)
    place.once(after=1)
    assert len(place.pipelines.started) == 1
    assert read_state(open_storage(place.folder / "watch"))["running"] is None


def test_a_lease_that_is_lost_while_storage_is_away_ends_the_run(place: Place) -> None:
    place.has_new_data()
    place.clock.now += 600
    place.pipelines.outcomes = [None] * 9
    state = place.folder / "watch" / "state.json"

    def sleep(_: float) -> None:
        if place.pipelines.stopped:
            raise Ended
        place.clock.now += 100
        if not state.is_symlink():
            state.unlink()
            state.symlink_to(state)

    place.world = replace(place.world, sleep=sleep)
    with pytest.raises(Ended):
        place.watch().forever()
    assert place.pipelines.stopped == 1


def test_alerts_repeat_after_a_day_and_wait_for_a_channel(
    place: Place,
    receiver: Receiver,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
) -> None:
    alerts = {
        "hook": {"kind": "webhook", "url_env": "HOOK"},
        "log": {"kind": "log"},
    }
    data = {"sources": [str(place.data)], "start": "alert"}
    place.once(data=data, alerts=alerts)
    receiver.answers = [500] * 7
    for content in "123":  # three changes in a day are told once; the hook is down for five looks
        place.data.write_text(content)
        place.once(after=HOUR, data=data, alerts=alerts)
    assert len(receiver.got) == 3 + 1 + 1
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1
    place.once(after=HOUR, data=data, alerts=alerts)
    place.once(after=HOUR, data=data, alerts=alerts)
    assert len(place.texts("unsent")) == 1
    assert receiver.answers == []
    place.once(after=HOUR, data=data, alerts=alerts)
    place.once(after=HOUR, data=data, alerts=alerts)
    assert len(receiver.got) == 8  # the last one was taken
    assert len({body["id"] for _, _, body in receiver.got}) == 1
    place.data.write_text("4")
    place.once(after=DAY, data=data, alerts=alerts)
    assert len(receiver.got) == 9
    assert len(place.texts("alert")) == 2
    receiver.answers = [404] * 99
    place.data.write_text("5")
    place.once(after=DAY, data=data, alerts=alerts)
    for _ in range(30):
        place.once(after=HOUR, data=data, alerts=alerts)
    assert len(place.texts("dropped")) == 1
    assert read_state(open_storage(place.folder / "watch"))["outbox"] == []


def test_what_cannot_be_watched_is_said_once_and_keeps_nothing_else_from_it(place: Place) -> None:
    endpoint = {"endpoint": "http://127.0.0.1:9", "drift": {"window_seconds": 60}}
    place.once(**endpoint)
    place.data.write_text("1")
    for _ in range(20):
        place.once(after=120, **endpoint)
    assert place.pipelines.started == [("facts.yaml", ["data"])]
    (trouble,) = place.texts("trouble")
    assert trouble.startswith("drift: http://127.0.0.1:9/metrics: nobody answers")
    assert len(place.texts("alert")) == 2  # that, and the run
    place.world = replace(place.world, scrape=lambda _: {})
    place.once(after=HOUR, **endpoint)
    assert "can be watched again" in place.texts("well")[0]


def test_a_refused_run_is_told_and_a_run_without_news_is_not(place: Place) -> None:
    place.once()
    for content, outcome in (("1", REFUSED), ("2", {**REFUSED, "verdict": "unchanged"})):
        place.pipelines.outcomes = [outcome]
        place.data.write_text(content)
        place.once()
        place.once(after=600)
    refused, unchanged = [entry for entry in place.history if entry.kind == "alert"]
    assert (refused.value["level"], unchanged.value["level"]) == ("warning", "info")
    assert refused.value["channels"] == ["log"]
    assert unchanged.value["channels"] == []


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"modle": "tiny:facts"}, "unknown key 'modle'"),
        ({"model": "tiny"}, "not BASE:ADAPTER"),
        ({"model": "tiny:auto"}, "not BASE:ADAPTER"),
        ({"pipeline": None}, "data starts a pipeline, and none is given"),
        ({"drift": {}}, "drift needs an endpoint"),
        ({"schedules": {"nightly": {"cron": "at night"}}}, "is not a cron expression"),
        ({"alerts": {"chat": {"kind": "slack"}}}, "slack needs url_env"),
        ({"canary": {"max_error_rate": 2}}, "canary.max_error_rate"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(place: Place, wrong: dict[str, Any], says: str) -> None:
    file = place.folder / "watch.yaml"
    file.write_text(json.dumps({**place.tree, **wrong}))
    with pytest.raises(UserError, match=says):
        WatchSpec.read(file)


@pytest.fixture
def run(place: Place) -> Any:
    file = place.folder / "watch.yaml"
    file.write_text(json.dumps(place.tree))

    def run(*words: str) -> tuple[int, Any]:
        stream = io.StringIO()
        args = build_parser().parse_args([*words, str(file), "--json"])
        code = args.verb(args, Output(stream, as_json=True))
        return code, json.loads(stream.getvalue())

    return run


def test_verbs(place: Place, run: Any) -> None:
    code, entries = run("watch", "--once")
    assert (code, entries) == (0, [])
    place.data.unlink()
    code, entries = run("watch", "--once")
    assert code == 1
    assert [entry["kind"] for entry in entries] == ["trouble", "alert"]
    assert run("watch", "--once") == (1, [])  # still
    code, history = run("watch", "history")
    assert (code, history) == (0, entries)
    code, status = run("watch", "status")
    assert code == 0
    assert list(status["troubles"]) == ["data"]
    assert status["watched_by"] is None
    with pytest.raises(UserError, match="did you mean 'history'"):
        run("watch", "histry")


def test_canary_verbs(place: Place) -> None:
    version = publish(place.registry, place.folder, "facts", 2)

    def run(*words: str) -> Any:
        stream = io.StringIO()
        options = ["--registry", str(place.folder / "registry"), "--reason", "try it", "--json"]
        args = build_parser().parse_args(["canary", *words, *options])
        args.verb(args, Output(stream, as_json=True))
        return json.loads(stream.getvalue())

    with pytest.raises(UserError, match="not NAME@VERSION"):
        run("start", "facts", "--share", "0.1")
    run("start", version.ref, "--share", "0.1")
    canary = place.registry.canary("facts")
    assert canary is not None
    assert (canary.version, canary.share) == (2, 0.1)
    assert run("stop", "facts") == {"name": "facts", "version": 2}
    assert place.registry.canary("facts") is None
    with pytest.raises(UserError, match="has no canary"):
        run("stop", "facts")


def test_a_pipeline_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    child = Child(tmp_path / "absent.yaml", {"triggers": []})
    while (outcome := child.poll()) is None:
        time.sleep(0.05)
    assert outcome == {
        "error": f"{tmp_path / 'absent.yaml'}: no such configuration file\n  fix: check the path"
    }


def test_a_pipeline_that_is_ended_takes_down_what_it_started(tmp_path: Path) -> None:
    """SIGTERM ends it in order, as Ctrl-C does a command; here while it waits for another's lease."""
    file = written(tmp_path, lease_seconds=300)
    other = Lease(open_storage(tmp_path / "work" / "state"), "sums/lease.json", "elsewhere/1@00000000", 300)
    assert other.acquire()
    child = Child(file, {"triggers": []})
    while "waiting to see" not in child._read(child._err):
        assert child.poll() is None
        time.sleep(0.05)
    child.stop()
    assert child.poll() == {"error": "it was interrupted"}


def test_storage_that_is_away_is_a_failure_and_not_bad_input(place: Place) -> None:
    file = place.folder / "watch.yaml"
    file.write_text(json.dumps(place.tree))
    state = place.folder / "watch" / "state.json"
    state.parent.mkdir()
    state.symlink_to(state)
    command = [sys.executable, "-m", "qwen_ray.cli", "watch", "status", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_the_page_has_every_key_and_the_shipped_file_is_read() -> None:
    page = (ROOT / "docs" / "watch.md").read_text()
    made = page.split("<!-- keys: qwen_ray.config.reference(WatchSpec) -->")[1].strip()
    assert made == reference(WatchSpec)
    for file in sorted((ROOT / "watch").glob("*.yaml")):
        assert file.read_text().splitlines()[0] == f"# qwen-ray watch watch/{file.name}"
        WatchSpec.read(file)


def test_state_is_written_only_by_who_has_the_lease_and_knows_it(tmp_path: Path) -> None:
    storage, clock = open_storage(tmp_path), Clock()
    lease = Lease(storage, LEASE, "me", 60, clock=clock)
    assert lease.acquire()
    first, second = WatchState(storage, lease), WatchState(storage, lease)
    first.value["ended"] = 1.0
    first.save()
    second.value["ended"] = 2.0
    with pytest.raises(LeaseLost, match="another watch has written"):
        second.save()
    clock.now += 60
    first.value["ended"] = 3.0
    with pytest.raises(LeaseLost, match="too slow"):
        first.save()
    assert read_state(storage)["ended"] == 1.0

"""What a watch looks at, one by one: data, the clock, accuracy, and drift as a real server counts it."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.lifecycle import accuracy, endpoint_metrics, triggers
from qwen_ray.lifecycle.cron import Schedule
from qwen_ray.lifecycle.watch_spec import AccuracyTrigger, DataTrigger, DriftTrigger, WatchSpec
from qwen_ray.registry import Registry
from qwen_ray.registry.records import promote_against, record_evaluation, record_verdict
from qwen_ray.serving.metrics import Metrics
from qwen_ray.serving.usage import Usage
from qwen_ray.storage import open_storage
from tests.lifecycle.watching import Clock, evaluation, publish


def at(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# -- data


def test_content_that_changes_fires_and_a_touch_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("a")
    (folder / "b.jsonl").write_text("b")
    (tmp_path / "manifest.json").write_text("1")
    spec = DataTrigger(sources=[str(folder), str(tmp_path / "*.json")])
    memory, fired = triggers.new_data(spec, None)
    assert fired is None
    memory = json.loads(json.dumps(memory))
    (folder / "a.jsonl").touch()
    memory, fired = triggers.new_data(spec, memory)
    assert fired is None
    (folder / "a.jsonl").write_text("A")
    (folder / "b.jsonl").unlink()
    (folder / "deep").mkdir()
    (folder / "deep" / "c.jsonl").write_text("c")
    (tmp_path / "manifest.json").write_text("2")
    before = memory["digest"]
    memory, fired = triggers.new_data(spec, memory)
    assert fired is not None
    assert fired.run
    assert not fired.alert
    assert fired.text == "the data has changed: 1 added, 2 changed, 1 removed"
    assert fired.facts["added"] == [str(folder / "deep" / "c.jsonl")]
    assert fired.facts["changed"] == [str(folder / "a.jsonl"), str(tmp_path / "manifest.json")]
    assert fired.facts["removed"] == [str(folder / "b.jsonl")]
    assert (fired.facts["before"], fired.facts["digest"]) == (before, memory["digest"])
    assert triggers.new_data(spec, memory)[1] is None


def test_an_object_s_content_and_sources_that_are_not_there(tmp_path: Path) -> None:
    storage = open_storage(f"memory://{tmp_path.name}")
    spec = DataTrigger(sources=[f"memory://{tmp_path.name}/manifest.json"], start="alert")
    with pytest.raises(UserError, match="no such object"):
        triggers.new_data(spec, None)
    storage.create("manifest.json", b"1")
    memory, _ = triggers.new_data(spec, None)
    storage.replace("manifest.json", b"2", storage.read("manifest.json").tag)
    _, fired = triggers.new_data(spec, memory)
    assert fired is not None
    assert (fired.run, fired.alert) == (False, True)
    with pytest.raises(UserError, match="no such file or folder"):
        triggers.new_data(DataTrigger(sources=[str(tmp_path / "nothing")]), None)


# -- the clock


def test_times_that_were_missed_count_once() -> None:
    monday = Schedule("0 3 * * 1")
    start = at("2026-03-04T12:00:00+00:00")  # a Wednesday
    memory, due = triggers.due(monday, None, start)
    assert due is None
    memory, due = triggers.due(monday, memory, at("2026-03-09T02:59:59+00:00"))
    assert due is None
    memory, due = triggers.due(monday, memory, at("2026-03-09T03:00:00+00:00"))
    assert due == at("2026-03-09T03:00:00+00:00")
    assert triggers.due(monday, memory, at("2026-03-15T23:00:00+00:00")) == (memory, None)
    memory, due = triggers.due(monday, memory, at("2026-04-08T00:00:00+00:00"))
    assert due == at("2026-04-06T03:00:00+00:00")  # of four that were missed, the last
    assert triggers.due(monday, memory, at("2026-04-08T00:00:00+00:00"))[1] is None


def test_clocks_that_change() -> None:
    berlin = Schedule("30 2 * * *", "Europe/Berlin")
    # On 29 March 2026 there is no 2:30, and on 25 October there are two.
    nights = [berlin.next(at(f"2026-{day}T00:00:00+00:00")) for day in ("03-28", "03-29", "10-25")]
    assert nights == [
        at("2026-03-28T02:30:00+01:00"),
        at("2026-03-29T03:00:00+02:00"),
        at("2026-10-25T02:30:00+02:00"),
    ]
    assert berlin.last(at("2026-10-25T02:45:00+01:00")) == at("2026-10-25T02:30:00+02:00")
    assert berlin.next(at("2026-10-25T02:35:00+02:00")) == at("2026-10-26T02:30:00+01:00")


@pytest.mark.parametrize("wrong", ["", "0 3 * *", "* * * * * *", "61 * * * *", "0 0 31 2 *", "0 3 * * noday"])
def test_expressions_that_are_none(wrong: str) -> None:
    with pytest.raises(UserError, match="is not a cron expression"):
        Schedule(wrong)
    with pytest.raises(UserError, match="unknown time zone"):
        Schedule("0 3 * * *", "Europe/Nowhere")


# -- accuracy


RULE = AccuracyTrigger(suite="tiny")
SPEC = WatchSpec(
    model="tiny:facts", registry="r", endpoint="http://x", pipeline=Path("p.yaml"), accuracy=RULE
)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """``facts``: versions 1 and 2, judged fit; 2 is in production. 3 was refused."""
    registry = Registry(tmp_path / "registry")
    for number, biology in ((1, 0.60), (2, 0.80), (3, 0.90)):
        version = publish(registry, tmp_path, "facts", number)
        assert version.version == number
        record_evaluation(registry, version, evaluation(biology=biology), location="/nowhere")
        verdict = "hold" if number == 3 else "promote"
        record_verdict(registry, version, {"verdict": verdict}, baseline="base", run=None)
    registry.point("facts", "production", 2, reason="test")
    return registry


def checked(registry: Registry, tmp_path: Path, now: dict[str, Any]) -> tuple[str, list[triggers.Fired]]:
    return accuracy.check(SPEC, RULE, registry, open_storage(tmp_path / "watch"), lambda *_: now)


def test_a_fall_below_the_share_of_the_baseline_fires(registry: Registry, tmp_path: Path) -> None:
    said, fired = checked(registry, tmp_path, evaluation(biology=0.76))  # exactly 95% of 80%
    assert fired == []
    assert "facts@2 answers as well as facts@2 did" in said
    said, (fall,) = checked(registry, tmp_path, evaluation(biology=0.75))
    assert (fall.run, fall.alert) == (True, True)
    assert fall.about == "accuracy/biology"
    assert fall.facts["significant"] is False
    assert "The intervals allow for chance" in fall.text
    _, (fall,) = checked(registry, tmp_path, evaluation(biology=0.50, history=0.10))
    assert fall.about == "accuracy/biology,history"
    assert fall.facts["significant"] is True
    recorded = registry.events("facts", version=2, kind="evaluation")
    assert len(recorded) == 4
    complete = json.loads(Path(recorded[-1].value["location"]).read_text())
    assert complete == evaluation(biology=0.50, history=0.10)


def test_what_a_fall_starts_is_for_the_rule_to_say(registry: Registry, tmp_path: Path) -> None:
    def runs(rule: AccuracyTrigger, biology: float) -> bool:
        storage = open_storage(tmp_path / "watch")
        now = evaluation(biology=biology)
        _, (fall,) = accuracy.check(SPEC, rule, registry, storage, lambda *_: now)
        return fall.run

    certain = AccuracyTrigger(suite="tiny", retrain="significant")
    assert [runs(certain, 0.75), runs(certain, 0.50)] == [False, True]
    assert not runs(AccuracyTrigger(suite="tiny", retrain="never"), 0.50)


def test_pairs_of_items_make_a_fall_certain(registry: Registry, tmp_path: Path) -> None:
    """Six of 100 items lost and none won: by pairs that is no chance, by two independent shares it may be."""
    was, now = evaluation(biology=0.80), evaluation(biology=0.74)
    (alone,) = [r for r in accuracy.compared(was, now, None) if r["category"] == "biology"]
    (paired,) = [r for r in accuracy.compared(was, now, was) if r["category"] == "biology"]
    assert (alone["paired"], alone["significant"]) == (False, False)
    assert (paired["paired"], paired["significant"]) == (True, True)
    # Newcombe's example (b) of 1998: 9/10 against 3/10.
    lo, hi = accuracy.compared(
        {"categories": {"c": summary(3, 10)}}, {"categories": {"c": summary(9, 10)}}, None
    )[0]["delta_ci"]
    assert (round(lo, 4), round(hi, 4)) == (0.1705, 0.8090)
    # The complete baseline is used where it still is what was recorded.
    path = tmp_path / "complete.json"
    path.write_text(json.dumps(was))
    version = publish(registry, tmp_path, "facts", 4)
    record_evaluation(registry, version, was, location=str(path))
    promote_against(registry, version, verdict="hold", reason="we know better", by="me")
    _, (fall,) = checked(registry, tmp_path, now)
    assert fall.facts["significant"] is True
    path.write_text(json.dumps(was | {"created_at": "later"}))
    _, (fall,) = checked(registry, tmp_path, now)
    assert fall.facts["significant"] is False


def summary(right: int, n: int) -> dict[str, Any]:
    from qwen_ray.evaluation.statistics import wilson

    return {"score": right / n, "n": n, "ci": list(wilson(right, n))}


def test_production_is_held_to_the_version_last_judged_fit(registry: Registry) -> None:
    def held_to(number: int) -> int | None:
        registry.point("facts", "production", number, reason="test")
        event = accuracy.baseline(registry, registry.resolve("facts"), RULE)
        return None if event is None else event.version

    assert held_to(2) == 2
    assert held_to(1) == 1  # a rollback: it was fit, as it was
    assert held_to(3) == 2  # a version that was refused does not set its own bar
    promote_against(registry, registry.get("facts", 3), verdict="hold", reason="we need it", by="me")
    assert held_to(3) == 3


def test_only_the_same_items_are_a_baseline(registry: Registry, tmp_path: Path) -> None:
    production = registry.resolve("facts")
    assert accuracy.baseline(registry, production, AccuracyTrigger(suite="tiny", limit=10)) is None
    version = publish(registry, tmp_path, "new", 1)
    registry.point("new", "production", 1, reason="test")
    spec = SPEC.model_copy(update={"model": "tiny:new"})
    storage = open_storage(tmp_path / "watch")
    for biology, falls in ((0.9, 0), (0.5, 1), (0.9, 0)):  # the first look is the baseline
        now = evaluation(biology=biology)
        _, fired = accuracy.check(spec, RULE, registry, storage, lambda *_, now=now: now)
        assert len(fired) == falls
    first = accuracy.baseline(registry, version, RULE)
    assert first is not None
    assert first.value["categories"]["biology"]["score"] == 0.9


# -- drift


class Server:
    """The counters of a real ingress."""

    def __init__(self) -> None:
        self.metrics = Metrics()

    def answers(self, count: int, status: int = 200, seconds: float = 0.2, **prompt: Any) -> None:
        for _ in range(count):
            prompts = [{"adapter": "facts@1", **prompt}] if prompt else []
            self.metrics.finished(
                "/v1/completions", status, seconds, [Usage("facts@1", 3, 1)], prompts=prompts
            )

    def scrape(self) -> endpoint_metrics.Counters:
        return endpoint_metrics.counters(self.metrics.text().decode())


def test_shares_are_of_what_happened_since_and_only_of_models() -> None:
    server, clock = Server(), Clock()
    spec = DriftTrigger(window_seconds=60, min_requests=10, p95_seconds=1.0, client_errors=0.1)
    server.answers(100, status=500)
    memory, fired = triggers.drift(spec, None, clock(), server.scrape)
    assert fired == []
    server.metrics.finished("/tokenize", 500, 9.0, [])
    server.answers(96)
    server.answers(4, status=429)
    server.answers(1, status=503)
    clock.now += 59
    assert triggers.drift(spec, memory, clock(), lambda: pytest.fail("too early"))[0] == memory
    clock.now += 1
    memory, fired = triggers.drift(spec, json.loads(json.dumps(memory)), clock(), server.scrape)
    assert fired == []  # 4 of 101 and 1 of 101
    server.answers(45, status=400)
    server.answers(5, status=500)
    server.answers(50, status=429, seconds=0.01)
    server.answers(9)
    memory, fired = triggers.drift(spec, memory, clock() + 60, server.scrape)
    assert {one.about for one in fired} == {"drift/rejected", "drift/client_errors", "drift/server_errors"}
    assert not any(one.run for one in fired)
    assert fired[0].facts["rejected"] == pytest.approx(50 / 109)
    server.answers(9)
    assert triggers.drift(spec, memory, clock() + 120, server.scrape) == (memory, [])  # too few to say
    server.answers(12, seconds=2.0)
    (slow,) = triggers.drift(spec, memory, clock() + 180, server.scrape)[1]
    assert slow.about == "drift/p95_seconds"
    assert 1.0 < slow.facts["p95_seconds"] <= 2.5


def test_router_that_abstains_more_and_a_server_started_again() -> None:
    server, clock = Server(), Clock()
    spec = DriftTrigger(window_seconds=60, min_requests=10, start="run")
    chosen, abstained = {"domain": "biology", "score": 0.3}, {"domain": None, "score": 0.0}
    server.answers(60, route=chosen)
    memory, _ = triggers.drift(spec, None, clock(), server.scrape)
    server.answers(10, route=chosen)
    server.answers(10, route=abstained)
    assert triggers.drift(spec, memory, clock() + 60, server.scrape)[1] == []
    server = Server()  # its counters begin at 0 again
    server.answers(10, route=chosen)
    server.answers(11, route=abstained)
    _, (fired,) = triggers.drift(spec, memory, clock() + 60, server.scrape)
    assert (fired.about, fired.run) == ("drift/abstained", True)
    assert fired.facts["abstained"] == pytest.approx(11 / 21)


def test_quantiles() -> None:
    seen = {"s/0.1": 50.0, "s/1.0": 90.0, "s/inf": 100.0}
    assert endpoint_metrics.quantile(seen, "s/", 0.5) == pytest.approx(0.1)
    assert endpoint_metrics.quantile(seen, "s/", 0.7) == pytest.approx(0.55)
    assert endpoint_metrics.quantile(seen, "s/", 0.99) == 1.0
    assert endpoint_metrics.quantile({}, "s/", 0.5) == 0.0
    assert math.isfinite(endpoint_metrics.quantile({"s/inf": 5.0}, "s/", 0.5))

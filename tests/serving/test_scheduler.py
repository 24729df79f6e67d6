from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.backlog import Backlog
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem, TokenEvent
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.scheduler import Generation, Scheduler
from tests.serving.generations import start

KEYS = [None, "geo", "law", "bio"]


@pytest.fixture
def scheduler(model_dir: Path, adapter_dirs: dict[str, Path]) -> Iterator[Scheduler]:
    engine = TorchEngine.load(models.resolve(str(model_dir)))
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    scheduler = Scheduler(engine)
    yield scheduler
    scheduler.stop()
    assert not scheduler.alive


def items(n: int) -> list[ScoreItem]:
    return [ScoreItem(KEYS[i % 4], [i + 1, 2, 3], [[4, 5], [6]]) for i in range(n)]


def totals(future: Future[Any]) -> list[list[float]]:
    return [[c.total for c in result.continuations] for result in future.result(30)]


def held(scheduler: Scheduler) -> threading.Event:
    """Keep the model's thread waiting until the event is set."""
    begun, gate = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        gate.wait(30)

    threading.Thread(target=lambda: scheduler.call(hold), daemon=True).start()
    assert begun.wait(30)
    return gate


def test_concurrent_scores_equal_direct_ones(scheduler: Scheduler, loaded: TorchEngine) -> None:
    futures = [scheduler.score(items(40)[i * 4 : i * 4 + 4]) for i in range(10)]
    got = [row for future in futures for row in totals(future)]
    want = [[c.total for c in r.continuations] for r in loaded.score(items(40))]
    for g, w in zip(got, want, strict=True):
        assert g == pytest.approx(w, abs=1e-4)


def test_invalid_request_fails_alone_and_before_batching(scheduler: Scheduler) -> None:
    good, bad = scheduler.score(items(3)), scheduler.score([ScoreItem(None, [9999], [[1]])])
    with pytest.raises(UserError, match="9999"):
        bad.result(30)
    assert len(good.result(30)) == 3


def test_failing_batch_hurts_only_the_request_that_fails(scheduler: Scheduler) -> None:
    """An adapter that vanishes between the check and the forward breaks the shared batch."""
    engine, gate = scheduler.engine, threading.Event()
    want = totals(scheduler.score(items(4)))
    hold = threading.Thread(target=lambda: scheduler.call(gate.wait))
    hold.start()
    good = scheduler.score(items(4))
    engine.add_adapter("gone", Path(engine.lora._adapters["geo"].where))
    bad = scheduler.score([ScoreItem("gone", [1], [[2]])])
    generation = start(scheduler, GenerateRequest("law", [1, 2], 5))
    lost = start(scheduler, GenerateRequest("gone", [1, 2], 5))
    engine.remove_adapter("gone")
    gate.set()
    hold.join()
    for future in (bad, lost.future):
        with pytest.raises((KeyError, UserError)):
            future.result(30)
    for got, expected in zip(totals(good), want, strict=True):
        assert got == pytest.approx(expected, abs=1e-5)
    assert len(generation.future.result(30).ids) == 5


def test_failure_in_mid_generation_loses_no_token(scheduler: Scheduler, loaded: TorchEngine) -> None:
    requests = [GenerateRequest(KEYS[i], [i + 5, 7, 9], 20) for i in range(4)]
    want = [r.ids for r in loaded.generate(requests)]
    engine, calls = scheduler.engine, iter(range(100))
    original = engine.last_logits

    def flaky(*args: Any) -> Any:
        if next(calls) == 7:
            raise RuntimeError("out of memory")
        return original(*args)

    engine.last_logits = flaky  # type: ignore[method-assign]
    running = [start(scheduler, request) for request in requests]
    assert [g.future.result(30).ids for g in running] == want


def test_listener_that_raises_ends_its_own_generation_only(scheduler: Scheduler) -> None:
    def broken(event: TokenEvent) -> None:
        raise ValueError("client went away")

    bad = start(scheduler, GenerateRequest(None, [1, 2], 10), broken)
    good = start(scheduler, GenerateRequest(None, [1, 2], 10))
    assert len(good.future.result(30).ids) == 10
    with pytest.raises(ValueError, match="client went away"):
        bad.future.result(30)


def test_scoring_goes_on_during_a_long_generation(scheduler: Scheduler) -> None:
    started = threading.Event()
    long = start(scheduler, GenerateRequest("geo", [1, 2], 250), lambda _: started.set())
    assert started.wait(30)
    assert len(scheduler.score(items(8)).result(30)) == 8
    assert not long.future.done()
    short = start(scheduler, GenerateRequest("law", [3], 2))
    short.future.result(30)
    assert not long.future.done()
    assert long.future.result(60).finish_reason in ("length", "stop")


def test_staggered_generations_join_one_batch_and_stay_exact(
    scheduler: Scheduler, loaded: TorchEngine
) -> None:
    requests = [GenerateRequest(KEYS[i % 4], [i + 1] * (3 + 5 * i), 40 - 5 * i) for i in range(6)]
    want = [r.ids for r in loaded.generate(requests)]
    seen: list[int] = []
    running = []
    for request in requests:
        begun = threading.Event()
        running.append(start(scheduler, request, lambda _, begun=begun: begun.set()))
        begun.wait(30)
        seen.append(len(scheduler._batches))
    assert [g.future.result(30).ids for g in running] == want
    assert max(seen) <= 2, "batches were not joined"


def test_cancelled_generation_stops_and_the_rest_goes_on(scheduler: Scheduler) -> None:
    tokens: list[TokenEvent] = []
    first = start(scheduler, GenerateRequest("geo", [1, 2], 250), tokens.append)
    other = start(scheduler, GenerateRequest("law", [1, 2], 60))
    while len(tokens) < 3:
        time.sleep(0.005)
    first.cancel()
    result = first.future.result(30)
    assert result.finish_reason == "cancelled"
    assert 3 <= len(result.ids) < 200
    assert len(other.future.result(30).ids) == 60


def test_stop_fails_what_is_queued(model_dir: Path) -> None:
    scheduler = Scheduler(TorchEngine.load(models.resolve(str(model_dir))))
    running = start(scheduler, GenerateRequest(None, [1], 250))
    scheduler.stop()
    with pytest.raises(RuntimeError, match="stopping"):
        running.future.result(5)
    with pytest.raises(RuntimeError, match="stopped"):
        scheduler.score(items(1))


def test_arrivals_at_random_steps_give_the_same_tokens_as_alone(
    scheduler: Scheduler, loaded: TorchEngine
) -> None:
    """Requests join while others generate: each is sent as the first one gets some token of its own."""
    rng = random.Random(11)

    def request(length: int, limit: int) -> GenerateRequest:
        prompt = [rng.randrange(1, 512) for _ in range(length)]
        return GenerateRequest(
            rng.choice(KEYS), prompt, limit, temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(99)
        )

    first = request(5, 120)
    others = {rng.randrange(1, 90): request(rng.randint(1, 60), rng.randint(1, 40)) for _ in range(16)}
    want = [loaded.generate([one])[0].ids for one in (first, *others.values())]
    assert len(want[0]) > max(others)
    running: dict[int, Generation] = {}
    count = iter(range(200))

    def arrive(_: TokenEvent) -> None:
        if (at := next(count)) in others:
            running[at] = start(scheduler, others[at])

    got = start(scheduler, first, arrive).future.result(60).ids
    assert [got, *(running[at].future.result(60).ids for at in others)] == want


def test_too_much_waiting_is_refused_with_the_time_to_come_back(model_dir: Path) -> None:
    scheduler = Scheduler(TorchEngine.load(models.resolve(str(model_dir))), max_waiting_tokens=100)
    try:
        scheduler.score([ScoreItem(None, [1] * 20, [[2]])]).result(30)  # measures the speed
        gate = held(scheduler)
        item = ScoreItem(None, [1] * 40, [[2] * 5, [3] * 5])  # 50 tokens
        taken: list[Future[Any]] = [
            scheduler.score([item]),
            start(scheduler, GenerateRequest(None, [1] * 30, 20)).future,
        ]
        assert scheduler.load["waiting_tokens"] == 100
        refused: list[Future[Any]] = [
            scheduler.score([item]),
            start(scheduler, GenerateRequest(None, [1], 1)).future,
        ]
        for future in refused:
            with pytest.raises(UserError, match="busy") as e:
                future.result(30)
            assert e.value.status == 429
            assert e.value.retry_after is not None
            assert 1 <= e.value.retry_after <= 60
        gate.set()
        for future in taken:
            future.result(30)
        assert scheduler.score([item]).result(30)
        assert scheduler.load["waiting_tokens"] == 0
        assert scheduler.load["tokens_per_second"] > 0
    finally:
        scheduler.stop()


def test_one_request_beyond_the_limit_is_taken_when_nothing_waits(model_dir: Path) -> None:
    scheduler = Scheduler(TorchEngine.load(models.resolve(str(model_dir))), max_waiting_tokens=10)
    try:
        for _ in range(3):
            assert scheduler.score([ScoreItem(None, [1] * 40, [[2]])]).result(30)
            assert scheduler.load["waiting_tokens"] == 0
    finally:
        scheduler.stop()


def test_nothing_is_left_counted_when_requests_fail_or_are_given_up(scheduler: Scheduler) -> None:
    gate = held(scheduler)
    given_up = scheduler.score(items(3))
    assert given_up.cancel()
    scheduler.engine.add_adapter("gone", Path(scheduler.engine.lora._adapters["geo"].where))
    bad = scheduler.score([ScoreItem("gone", [1], [[2]])])
    stopped = start(scheduler, GenerateRequest("geo", [1, 2], 200))
    stopped.cancel()
    scheduler.engine.remove_adapter("gone")
    gate.set()
    with pytest.raises((KeyError, UserError)):
        bad.result(30)
    assert stopped.future.result(30).finish_reason == "cancelled"
    empty = scheduler.score([ScoreItem(None, [1], [[]])])
    assert empty.result(30)[0].continuations[0].logprobs == []
    assert scheduler.load["waiting_tokens"] == 0


def test_what_may_wait_follows_the_measured_speed() -> None:
    now = [0.0]
    backlog = Backlog(clock=lambda: now[0])
    assert (backlog.most, backlog.speed) == (2**17, 0.0)
    place = backlog.enter(10**6)  # alone, however large
    with pytest.raises(UserError) as e:
        backlog.enter(1)
    assert e.value.retry_after == 1.0  # nothing is measured yet
    for _ in range(100):
        now[0] += 1.0
        backlog.work(5_000)
    assert backlog.speed == pytest.approx(5_000)
    assert backlog.most == pytest.approx(60 * 5_000, abs=1)
    with pytest.raises(UserError) as e:
        backlog.enter(50_000)
    assert e.value.retry_after == 60.0
    place.start()
    place.leave()
    place.leave()
    assert backlog.waiting == 0
    now[0] += 1000.0  # idle time does not count
    backlog.enter(1)
    now[0] += 1.0
    backlog.work(5_000)
    assert backlog.speed == pytest.approx(5_000)

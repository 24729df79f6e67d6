from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem, TokenEvent
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.scheduler import Scheduler

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
    generation = scheduler.generate(GenerateRequest("law", [1, 2], 5))
    lost = scheduler.generate(GenerateRequest("gone", [1, 2], 5))
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
    running = [scheduler.generate(request) for request in requests]
    assert [g.future.result(30).ids for g in running] == want


def test_listener_that_raises_ends_its_own_generation_only(scheduler: Scheduler) -> None:
    def broken(event: TokenEvent) -> None:
        raise ValueError("client went away")

    bad = scheduler.generate(GenerateRequest(None, [1, 2], 10), broken)
    good = scheduler.generate(GenerateRequest(None, [1, 2], 10))
    assert len(good.future.result(30).ids) == 10
    with pytest.raises(ValueError, match="client went away"):
        bad.future.result(30)


def test_scoring_goes_on_during_a_long_generation(scheduler: Scheduler) -> None:
    started = threading.Event()
    long = scheduler.generate(GenerateRequest("geo", [1, 2], 250), lambda _: started.set())
    assert started.wait(30)
    assert len(scheduler.score(items(8)).result(30)) == 8
    assert not long.future.done()
    short = scheduler.generate(GenerateRequest("law", [3], 2))
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
        running.append(scheduler.generate(request, lambda _, begun=begun: begun.set()))
        begun.wait(30)
        seen.append(len(scheduler._batches))
    assert [g.future.result(30).ids for g in running] == want
    assert max(seen) <= 2, "batches were not joined"


def test_cancelled_generation_stops_and_the_rest_goes_on(scheduler: Scheduler) -> None:
    tokens: list[TokenEvent] = []
    first = scheduler.generate(GenerateRequest("geo", [1, 2], 250), tokens.append)
    other = scheduler.generate(GenerateRequest("law", [1, 2], 60))
    while len(tokens) < 3:
        time.sleep(0.005)
    first.cancel()
    result = first.future.result(30)
    assert result.finish_reason == "cancelled"
    assert 3 <= len(result.ids) < 200
    assert len(other.future.result(30).ids) == 60


def test_stop_fails_what_is_queued(model_dir: Path) -> None:
    scheduler = Scheduler(TorchEngine.load(models.resolve(str(model_dir))))
    running = scheduler.generate(GenerateRequest(None, [1], 250))
    scheduler.stop()
    with pytest.raises(RuntimeError, match="stopping"):
        running.future.result(5)
    with pytest.raises(RuntimeError, match="stopped"):
        scheduler.score(items(1))

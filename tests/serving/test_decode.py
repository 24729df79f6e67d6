"""Rows that generate together, and requests that wait together: what one may do to the others."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem
from qwen_ray.serving.engines.decode import USUAL_TOKENS
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.scheduler import Scheduler
from tests.serving.generations import start
from tests.serving.test_scheduler import held


@pytest.fixture
def scheduler(model_dir: Path) -> Iterator[Scheduler]:
    engine = TorchEngine.load(models.resolve(str(model_dir)), threads=1)
    scheduler = Scheduler(engine, max_waiting_tokens=1000)
    yield scheduler
    scheduler.stop()


def poison(engine: TorchEngine, token: int) -> None:
    """Every row of a forward with ``token`` in a prompt gets what is not a number, as if a matrix held it."""
    forward = engine.last_logits

    def poisoned(ids: torch.Tensor, *rest: Any) -> Any:
        logits, cache = forward(ids, *rest)
        return (logits * float("nan") if bool((ids == token).any()) else logits), cache

    engine.last_logits = poisoned  # type: ignore[method-assign]


def test_a_row_whose_output_is_not_a_number_fails_alone(scheduler: Scheduler) -> None:
    engine, good = scheduler.engine, [GenerateRequest(None, [7, 8, i + 9], 6) for i in range(3)]
    want = [result.ids for result in engine.generate(good)]
    poison(engine, 99)
    gate = held(scheduler)
    bad = start(scheduler, GenerateRequest(None, [7, 99, 8], 6))
    running = [start(scheduler, request) for request in good]
    gate.set()
    assert [one.future.result(30).ids for one in running] == want
    with pytest.raises(FloatingPointError):
        bad.future.result(30)


def test_what_is_not_a_number_is_not_kept_for_the_next(scheduler: Scheduler) -> None:
    engine = scheduler.engine
    assert engine.prefixes is not None
    poison(engine, 99)
    with pytest.raises(FloatingPointError):
        start(scheduler, GenerateRequest(None, [99] * 100, 2)).future.result(30)
    assert engine.prefixes.nbytes == 0


@pytest.mark.parametrize("temperature", [5e-324, 1e-40, 1e-5])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_temperature_near_zero_is_greedy(loaded: TorchEngine, temperature: float, top_p: float) -> None:
    prompt = [3, 5, 7]
    want = loaded.generate([GenerateRequest("geo", prompt, 5)])[0].ids
    request = GenerateRequest("geo", prompt, 5, temperature=temperature, top_p=top_p)
    assert loaded.generate([request])[0].ids == want


def test_an_answer_counts_as_long_as_they_usually_are(model_dir: Path) -> None:
    engine = TorchEngine.load(models.resolve(str(model_dir)), threads=1)
    engine.context_length = 10**6  # nothing is generated that long here
    scheduler = Scheduler(engine, max_waiting_tokens=10 * (2 + USUAL_TOKENS))
    try:
        gate = held(scheduler)
        running = [start(scheduler, GenerateRequest(None, [1, 2], 10**6)) for _ in range(10)]
        assert not any(one.future.done() for one in running)
        assert scheduler.load["waiting_tokens"] == 10 * (2 + USUAL_TOKENS)
        for one in running:
            one.cancel()
        gate.set()
        for one in running:
            one.future.result(30)
    finally:
        scheduler.stop()


def test_one_clients_prompts_are_taken_or_refused_together(scheduler: Scheduler) -> None:
    many = [GenerateRequest(None, [1] * 90, 20) for _ in range(20)]  # 2200 tokens, of 1000
    gate = held(scheduler)
    first = scheduler.generate(many)  # alone it is taken, however large
    assert not any(one.future.done() for one in first)
    assert scheduler.load["waiting_tokens"] == 2200
    second = scheduler.generate(many[:2])
    for one in second:
        with pytest.raises(UserError, match="busy"):
            one.future.result(0)
    for one in first:
        one.cancel()
    gate.set()
    for one in first:
        one.future.result(30)
    assert scheduler.load["waiting_tokens"] == 0
    bad = scheduler.generate([GenerateRequest(None, [1], 1), GenerateRequest(None, [], 1)])
    for one in bad:
        with pytest.raises(UserError, match="empty"):
            one.future.result(0)


def test_a_short_prompt_does_not_wait_for_longer_ones_that_came_later(
    scheduler: Scheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups are made of prompts of like length, the longest first; there is room for four of them."""
    monkeypatch.setattr("qwen_ray.serving.engines.torch.PREFILL_TOKENS", 100)
    ended: list[int] = []
    gate = held(scheduler)
    prompts = [[5, 6], *([i + 1] * 100 for i in range(8))]
    running = [
        start(scheduler, GenerateRequest(None, prompt, 3), lambda event, i=i: ended.append(i))  # type: ignore[misc]
        for i, prompt in enumerate(prompts)
    ]
    gate.set()
    for one in running:
        one.future.result(30)
    assert ended[0] == 0


def test_a_plan_that_fails_fails_its_own_request_only(scheduler: Scheduler) -> None:
    engine = scheduler.engine
    plan = engine.plan_score

    def failing(items: Any, **more: Any) -> Any:
        if any(99 in item.context for item in items):
            raise RuntimeError("no plan")
        return plan(items, **more)

    engine.plan_score = failing  # type: ignore[method-assign]
    gate = held(scheduler)
    good, bad = (scheduler.score([ScoreItem(None, [1, token], [[3]])]) for token in (2, 99))
    gate.set()
    assert len(good.result(30)) == 1
    with pytest.raises(RuntimeError, match="no plan"):
        bad.result(30)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_thread_that_has_ended(scheduler: Scheduler) -> None:
    def failing() -> None:
        raise SystemExit  # what no turn is prepared for

    scheduler._admit = failing  # type: ignore[method-assign]
    running = start(scheduler, GenerateRequest(None, [1], 5))
    with pytest.raises(RuntimeError, match="stopping"):
        running.future.result(30)
    with pytest.raises(RuntimeError, match="stopped"):
        start(scheduler, GenerateRequest(None, [1], 5))

"""The vLLM engine itself, against the embedded one. Runs in vLLM's environment: ``make test-vllm``."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines import vllm as module
from qwen_ray.serving.engines.base import GenerateRequest, ScoreItem
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.engines.vllm import VllmEngine
from tests.serving.generations import start

pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")
NAMES = (None, "geo", "law", "bio")


@pytest.fixture(scope="module")
def engine(model_dir: Path, adapter_dirs: dict[str, Path]) -> Iterator[VllmEngine]:
    """All places taken."""
    engine = VllmEngine.load(models.resolve(str(model_dir)), max_adapters=3)
    for name, folder in adapter_dirs.items():
        engine.add_adapter(name, folder)
    yield engine
    engine.close()


def test_scores_equal_the_embedded_engines(engine: VllmEngine, loaded: TorchEngine) -> None:
    items = [ScoreItem(name, [5, 9, 200, 31], [[4, 5, 9], [6], []]) for name in NAMES]
    items += [ScoreItem(name, [9] * 300, [[1], [2, 3]], top=2) for name in NAMES]
    items += [ScoreItem(name, [5], [[9, 200, 31]], top=5, next_token=True) for name in NAMES]
    for got, want in zip(engine.score(items), loaded.score(items), strict=True):
        assert got.truncated == want.truncated
        for one, other in zip(got.continuations, want.continuations, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-3)
            assert one.greedy == other.greedy
            assert [[t for t, _ in top] for top in one.top] == [[t for t, _ in top] for top in other.top]
        assert [t for t, _ in got.next_token or []] == [t for t, _ in want.next_token or []]


def test_no_answer_comes_from_another_adapter_while_adapters_change(
    engine: VllmEngine, loaded: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    """Requests for what stays, while one place is emptied and filled again, by other weights each time."""
    asked = [GenerateRequest(name, [9, 8, 7 + i], 24) for i in range(4) for name in (None, "geo", "law")]
    want = [result.ids for result in loaded.generate(asked)]
    items = [ScoreItem(name, [3, 4], [[5, 6, 7]]) for name in NAMES]
    totals = dict(zip(NAMES, [r.continuations[0].total for r in loaded.score(items)], strict=True))
    wrong, rounds, stop = [], itertools.count(), threading.Event()

    def keep_asking() -> None:
        while not stop.is_set():
            wrong.extend(r.ids for r, ids in zip(engine.generate(asked), want, strict=True) if r.ids != ids)
            next(rounds)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        before = "bio"
        for i, name in enumerate(["law", "geo", "bio"] * 3):
            engine.remove_adapter(before)
            before = f"{name}-{i}"
            engine.add_adapter(before, adapter_dirs[name])
            got = engine.score([ScoreItem(before, [3, 4], [[5, 6, 7]])])[0].continuations[0].total
            assert got == pytest.approx(totals[name], abs=1e-3)
    finally:
        stop.set()
        asking.join()
        engine.remove_adapter(before)
        engine.add_adapter("bio", adapter_dirs["bio"])
    assert next(rounds) > 1
    assert not wrong


def test_a_key_may_be_used_again_for_other_weights(
    engine: VllmEngine, loaded: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    """vLLM's prefix cache, and its sets of requests, go by the adapter's name."""
    prompt = list(range(1, 200))  # long enough that vLLM caches a block of it
    try:
        for name in ("law", "geo"):
            engine.add_adapter("bio", adapter_dirs[name])
            want = loaded.generate([GenerateRequest(name, prompt, 8)])[0].ids
            assert engine.generate([GenerateRequest("bio", prompt, 8)])[0].ids == want
    finally:
        engine.add_adapter("bio", adapter_dirs["bio"])


def test_when_all_places_are_taken_the_client_is_told_to_come_back(
    engine: VllmEngine, adapter_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PLACE_SECONDS", 0.05)
    with pytest.raises(UserError) as e:
        engine.add_adapter("fourth", adapter_dirs["geo"])
    assert (e.value.status, e.value.retry_after) == (503, 1.0)
    with pytest.raises(UserError, match="not loaded"):
        engine.score([ScoreItem("fourth", [1], [[2]])])


def test_a_cancelled_generation_holds_what_there_is(engine: VllmEngine, loaded: TorchEngine) -> None:
    queue, first = engine.queue(), threading.Event()
    want = loaded.generate([GenerateRequest(None, [9, 8, 7], 250)])[0].ids
    running = start(queue, GenerateRequest(None, [9, 8, 7], 250), lambda _: first.set())
    assert first.wait(60)
    running.cancel()
    got = running.future.result(60)
    assert got.finish_reason == "cancelled"
    assert got.ids == want[: len(got.ids)]
    assert len(got.ids) < len(want)
    busy = ("score_requests", "waiting", "generating", "waiting_tokens")
    assert [queue.load[name] for name in busy] == [0] * 4


def test_a_listener_that_fails_ends_its_own_request_only(engine: VllmEngine) -> None:
    def fail(_: object) -> None:
        raise ValueError("the listener's")

    queue = engine.queue()
    bad, good = (
        start(queue, GenerateRequest(None, [1], 5), fail),
        start(queue, GenerateRequest(None, [1], 5)),
    )
    with pytest.raises(ValueError, match="the listener's"):
        bad.future.result(60)
    assert len(good.future.result(60).ids) == 5


def test_a_lost_engine_process_is_noticed(engine: VllmEngine) -> None:
    """Last: the engine is of no use after it. Serve replaces a replica whose queue is not alive."""
    running = start(engine.queue(), GenerateRequest(None, [1], 250))
    for child in psutil.Process().children(recursive=True):
        if "resource_tracker" not in " ".join(child.cmdline()):
            child.kill()
    with pytest.raises(Exception, match=r"(?i)engine"):
        running.future.result(60)
    assert not engine.queue().alive
    engine.close()
    with pytest.raises(RuntimeError, match="stopped"):
        engine.score([ScoreItem(None, [1], [[2]])])


def test_an_engine_that_mixes_adapters_up_is_not_served(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.32 on CPUs, without the empty place that this engine leaves it (see decision 21)."""
    monkeypatch.setattr(module, "_SPARE_SLOTS", 0)
    with pytest.raises(UserError, match="mixes adapters up: in a mixed batch the base was answered"):
        VllmEngine.load(models.resolve(str(model_dir)), max_adapters=2)

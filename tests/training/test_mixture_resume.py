"""Each step trains on the same records at any number of workers, whenever it was killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.config import RunConfig
from qwen_ray.data.dataset import build_dataset
from qwen_ray.data.packing import RowStream
from qwen_ray.data.records import write_records
from qwen_ray.training.feed import Feed
from qwen_ray.training.tracking import read_examples
from tests.conftest import sums
from tests.training.ranks import launch, run
from tests.training.test_loop import config

ROWS = 8
MIXES = {
    "weights": ["data.weights={a: 0.7, b: 0.2, c: 0.1}"],
    "tokens": ["data.unit=tokens", "data.temperature=2"],
    "limits": ["data.max_epochs={a: 2, b: 3.5, c: 1}"],
    "stages": [
        "data.stages=[{until: 0.4, weights: {a: 1, b: 0, c: 1}}, {until: 1, weights: {a: 1, b: 2, c: 1}}]"
    ],
    "curriculum": ["data.curriculum=easy_to_hard", "data.max_epochs={b: 2}"],
    "streaming": ["data.streaming=true", "data.packing_window=7"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    rng = random.Random(0)
    sets = [*sums(75, domain="a"), *sums(20, seed=1, domain="b"), *sums(45, seed=2, domain="c")]
    write_records(path, [dataclasses.replace(r, difficulty=rng.random()) for r in sets])
    return path


def made(settings: RunConfig) -> tuple[RowStream, int]:
    """The stream, planned for two passes, and its number of steps."""
    ref = models.resolve("tiny")
    stream = build_dataset(
        settings.data, models.load_tokenizer(ref), seed=settings.seed, context=models.context_length(ref)
    ).stream
    return stream, -(-stream.plan(passes=2) // ROWS)


def fed(
    settings: RunConfig, workers: int, *, state: dict[str, Any] | None, done: int, count: int
) -> tuple[list[list[str]], dict[str, Any]]:
    """Ids of each step, over all workers, and the state after the last."""
    of_steps: list[list[str]] = [[] for _ in range(count)]
    states = []
    for rank in range(workers):
        stream, total = made(settings)
        assert done + count <= total
        if state is not None:
            stream.load_state(json.loads(json.dumps(state)))
        steps = list(Feed(rank, workers, 2, 0).steps(stream, rows=ROWS, count=count))
        for ids, step in zip(of_steps, steps, strict=True):
            ids.extend(step.ids)
        states.append(steps[-1].state)
    assert all(s == states[0] for s in states)
    return [sorted(ids) for ids in of_steps], states[0]


@pytest.mark.parametrize("mix", MIXES)
def test_steps_hold_the_same_records_at_1_2_and_4_workers(mix: str, data: Path, tmp_path: Path) -> None:
    settings = config(data, tmp_path, *MIXES[mix])
    total = made(settings)[1]
    undisturbed, _ = fed(settings, 1, state=None, done=0, count=total)
    assert total >= 4
    assert all(undisturbed)
    rng = random.Random(mix)
    for workers in (1, 2, 4):
        # Killed at two random steps, and resumed with another number of workers each time.
        kills = sorted(rng.sample(range(1, total), 2))
        seen: list[list[str]] = []
        state, done = None, 0
        for end, now in zip([*kills, total], [*rng.sample([1, 2, 4], 2), workers], strict=True):
            steps, state = fed(settings, now, state=state, done=done, count=end - done)
            seen += steps
            done = end
        assert seen == undisturbed, (workers, kills)


def test_a_run_ends_when_all_domains_had_their_passes(data: Path, tmp_path: Path) -> None:
    """Each record exactly as often as the limit says; the last step is a short one."""
    limits = ["data.max_epochs={a: 1, b: 2, c: 1}", "data.validation_fraction=0", "data.packing=false"]
    settings = config(data, tmp_path, *limits, "optim.batch_size=25", "optim.gradient_accumulation=2")
    settings.optim.max_steps, settings.tracking.examples = 500, True
    rows, result = run(settings, tmp_path)
    assert result.steps == rows[-1]["total_steps"] == 4  # 75 + 2 x 20 + 45 = 3.2 x 50
    steps = read_examples(tmp_path)
    times = {i: sum(step.count(i) for step in steps.values()) for step in steps.values() for i in step}
    assert times == {
        **{f"a-{i}": 1 for i in range(75)},
        **{f"b-{i}": 2 for i in range(20)},
        **{f"c-{i}": 1 for i in range(45)},
    }
    assert [len(step) for step in steps.values()] == [50] * 3 + [10]


class _Killed(Exception):
    pass


def train_until(given: dict[str, Any], out: Path, end: int) -> None:
    """On each rank: train, and let rank 0 die in step ``end``."""

    def die(row: dict[str, Any]) -> None:
        if row["step"] == end:
            raise _Killed

    run(RunConfig.model_validate(given), out, on_metrics=die)


@pytest.mark.slow
def test_two_ranks_that_are_killed_train_on_what_one_trains_on(data: Path, tmp_path: Path) -> None:
    sets = [
        *MIXES["limits"],
        "optim.batch_size=2",
        "optim.gradient_accumulation=2",
        "checkpoint.every_steps=2",
        "tracking.examples=true",
        "optim.epochs=2",
        "optim.max_steps=null",
    ]
    settings = config(data, tmp_path, *sets)
    settings.cluster.workers = 2
    given = settings.model_dump(mode="json")
    total = made(settings)[1]
    with pytest.raises(Exception, match="_Killed"):
        launch(2, train_until, given, tmp_path, random.Random(1).randint(3, total - 2))
    launch(2, train_until, given, tmp_path, 0)
    planned, _ = fed(settings, 1, state=None, done=0, count=total)
    assert list(read_examples(tmp_path).items()) == list(enumerate(planned, start=1))


def test_a_feed_that_is_closed_leaves_no_thread(data: Path, tmp_path: Path) -> None:
    """One in a tensor operation while the interpreter ends would abort the process."""
    stream, total = made(config(data, tmp_path, *MIXES["weights"]))
    steps = Feed(0, 1, 2, 0).steps(stream, rows=ROWS, count=total)
    next(steps)
    assert "feed" in {thread.name for thread in threading.enumerate()}
    steps.close()
    assert "feed" not in {thread.name for thread in threading.enumerate()}

"""Distributions of a sweep's space: what they draw, their grids, what is refused."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from pydantic import ValidationError
from scipy import stats

from qwen_ray.sweeps.space import Distribution, from_tune, generator, grid, grid_size, latin, sample, to_tune


def made(distribution: str, **settings: Any) -> Distribution:
    return Distribution.model_validate({"distribution": distribution, **settings})


SPACE = {
    "optim.learning_rate": made("log_uniform", low=1e-3, high=2e-2, points=3),
    "method.r": made("choice", values=[8, 16, 32]),
    "optim.warmup_steps": made("int_uniform", low=0, high=105, step=10, points=2),
    "method.alpha": made("log_int_uniform", low=1, high=64, points=4),
    "method.dropout": made("uniform", low=0.0, high=0.2, points=2),
}


def draws(distribution: Distribution, n: int = 4000) -> list[Any]:
    rng = random.Random(0)
    return [distribution.at(rng.random()) for _ in range(n)]


@pytest.mark.parametrize("key", list(SPACE))
def test_every_draw_is_of_the_distribution(key: str) -> None:
    distribution = SPACE[key]
    values = draws(distribution)
    assert all(distribution.holds(v) for v in values)
    assert all(distribution.holds(v) for v in distribution.grid())
    assert {*distribution.extremes} <= {*values, *distribution.ends} if not distribution.values else True


def test_shapes() -> None:
    logs = [math.log(v) for v in draws(SPACE["optim.learning_rate"])]
    assert stats.kstest(logs, stats.uniform(math.log(1e-3), math.log(20)).cdf).pvalue > 0.01
    assert stats.kstest(draws(SPACE["method.dropout"]), stats.uniform(0, 0.2).cdf).pvalue > 0.01
    steps = draws(SPACE["optim.warmup_steps"])
    assert {*steps} == {*range(0, 101, 10)}
    assert all(type(v) is int for v in steps)
    assert stats.chisquare([steps.count(v) for v in range(0, 101, 10)]).pvalue > 0.01
    whole = draws(SPACE["method.alpha"], 20_000)
    assert {*whole} == {*range(1, 65)}
    # Each number has the stretch of half a unit on either side of the logarithmic axis.
    assert whole.count(1) / len(whole) == pytest.approx(math.log(3) / math.log(129), abs=0.01)
    assert {*draws(SPACE["method.r"])} == {8, 16, 32}


def test_a_draw_is_decided_by_seed_and_index() -> None:
    assert sample(SPACE, generator(3, 5)) == sample(SPACE, generator(3, 5))
    assert len({str(sample(SPACE, generator(s, i))) for s in range(3) for i in range(3)}) == 9


def test_grid_is_every_combination_once() -> None:
    points = list(grid(SPACE))
    assert len(points) == grid_size(SPACE) == 3 * 3 * 2 * 4 * 2
    assert len({str(p) for p in points}) == len(points)
    assert [*points[0]] == [*SPACE]
    assert {p["optim.warmup_steps"] for p in points} == {0, 100}
    assert sorted({p["method.alpha"] for p in points}) == [1, 4, 16, 64]
    rates = sorted({p["optim.learning_rate"] for p in points})
    assert rates == pytest.approx([1e-3, math.sqrt(2e-5), 2e-2])
    assert rates[-1] == 2e-2
    assert list(grid({})) == [{}]
    with pytest.raises(ValueError, match="points"):
        made("uniform", low=0, high=1).grid()


def test_what_is_not_of_the_distribution() -> None:
    assert not SPACE["optim.learning_rate"].holds(3e-2)
    assert not SPACE["optim.warmup_steps"].holds(15)
    assert not SPACE["method.alpha"].holds(2.5)
    assert not SPACE["method.r"].holds(9)
    assert not SPACE["method.dropout"].holds(True)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"distribution": "uniform", "low": 1, "high": 1}, "low < high"),
        ({"distribution": "uniform", "low": 2, "high": 1}, "low < high"),
        ({"distribution": "uniform", "high": 1}, "needs low and high"),
        ({"distribution": "uniform", "low": 0, "high": math.inf}, "finite"),
        ({"distribution": "log_uniform", "low": 0, "high": 1}, "low > 0"),
        ({"distribution": "log_int_uniform", "low": 0, "high": 4}, "low > 0"),
        ({"distribution": "int_uniform", "low": 0.5, "high": 4}, "whole numbers"),
        ({"distribution": "uniform", "low": 0, "high": 4, "step": 2}, "no step"),
        ({"distribution": "uniform", "values": [1], "low": 0, "high": 4}, "not values"),
        ({"distribution": "choice"}, "needs values"),
        ({"distribution": "choice", "values": [1], "low": 0}, "no low"),
        ({"distribution": "normal"}, "choice"),
    ],
)
def test_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Distribution.model_validate(settings)


def test_as_a_flat_config_and_back() -> None:
    values = {"optim.learning_rate": 1e-3, "data.weights": {"biology": 0.4, "replay": 0.6}, "method.r": 8}
    flat = to_tune(7, values)
    assert flat == {
        "trial": 7,
        "optim.learning_rate": 1e-3,
        "data.weights/biology": 0.4,
        "data.weights/replay": 0.6,
        "method.r": 8,
    }
    assert from_tune(flat) == (7, values)


def test_a_latin_hypercube_draws_once_from_each_part_of_every_range() -> None:
    space = {
        "a": Distribution(distribution="log_uniform", low=1e-3, high=1.0),
        "b": Distribution(distribution="uniform", low=0, high=7),
        "c": Distribution(distribution="choice", values=[1, 2]),
    }
    drawn = [latin(space, seed=3, index=i, size=7) for i in range(7)]
    assert sorted(int(values["b"]) for values in drawn) == list(range(7))
    assert sorted(int(7 * (1 + math.log10(values["a"]) / 3)) for values in drawn) == list(range(7))
    assert {values["c"] for values in drawn} == {1, 2}
    order = [int(values["b"]) for values in drawn]
    assert order != [int(7 * (1 + math.log10(values["a"]) / 3)) for values in drawn]
    assert latin(space, seed=3, index=2, size=7) == drawn[2] != latin(space, seed=4, index=2, size=7)

"""Pairs of EvalResults by simulation: two models whose true difference is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Cells = tuple[float, float, float]
"""Shares of items gained, lost, and right in both."""


def cells(gain: float, changed: float, right: float = 0.5) -> Cells:
    """Of models that differ by ``gain`` with a share ``changed`` of items answered otherwise."""
    return (changed + gain) / 2, (changed - gain) / 2, right


def outcomes(rng: np.random.Generator, shares: Cells, n: int, times: int) -> np.ndarray:
    """Scores before and after, ``[times, 2, n]``, of items that fall into the cells independently."""
    gained, lost, both = shares
    place = rng.choice(4, p=[gained, lost, both, 1 - gained - lost - both], size=(times, n))
    before, after = np.array([0, 1, 1, 0.0]), np.array([1, 0, 1, 0.0])
    return np.stack([before[place], after[place]], axis=1)


def same_model_twice(rng: np.random.Generator, n: int, times: int) -> np.ndarray:
    """Scores ``[times, 2, n]`` without a true difference: some items are easy, some hard, for both alike.

    The chance to answer an item is drawn from Beta(0.3, 0.3), so that about a fifth change by chance alone.
    """
    chance = rng.beta(0.3, 0.3, size=(times, 1, n))
    return (rng.random((times, 2, n)) < chance).astype(float)


def results(
    scores: dict[str, np.ndarray], roles: dict[str, str]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A pair of EvalResults for each simulation, from scores ``[times, 2, n]`` by category.

    The two are the same objects each time, with other scores: use them before asking for the next.
    """
    pair = tuple(_result(scores, roles) for _ in range(2))
    for one in zip(*scores.values(), strict=True):  # one simulation of every category: [2, n]
        for side, result in enumerate(pair):
            values = [value for category in one for value in category[side].tolist()]
            for item, value in zip(result["items"], values, strict=True):
                item["score"] = value
        yield pair[0], pair[1]


def _result(scores: dict[str, np.ndarray], roles: dict[str, str]) -> dict[str, Any]:
    return {
        "model": "simulated",
        "adapter": None,
        "suite": "simulated",
        "suite_version": "1",
        "settings": {},
        "categories": {name: {"role": roles[name]} for name in scores},
        "controls": {},
        "items": [
            {"category": name, "task": name, "id": f"{name}-{i}", "score": 0.0}
            for name, values in scores.items()
            for i in range(values.shape[2])
        ],
    }

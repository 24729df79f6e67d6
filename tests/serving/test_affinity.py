from __future__ import annotations

import pytest

from qwen_ray.serving.affinity import adapters_of
from qwen_ray.serving.protocol import ScoreItemBody, ScoreRequest

ITEMS = [ScoreItemBody(context=[1], continuations=[[2]])]


@pytest.mark.parametrize(
    ("models", "wanted"),
    [
        (["base"], []),
        (["base:geo"], ["geo"]),
        (["base:geo@2+rag"], ["geo"]),  # all versions go together
        (["base:law", "base:geo@1", "base:geo@2", "base"], ["geo", "law"]),
        (["base:auto"], []),  # known only once it is routed
        (["base+rag"], []),
        (["base:../geo", "base:" + "x" * 70], []),  # refused later, and never used as a key
    ],
)
def test_adapters_that_a_request_needs(models: list[str], wanted: list[str]) -> None:
    assert adapters_of(["score", ScoreRequest(models=models, items=ITEMS)]) == wanted
    if len(models) == 1:
        assert adapters_of(["score", ScoreRequest(model=models[0], items=ITEMS)]) == wanted


def test_calls_without_a_model() -> None:
    assert adapters_of(["health"]) == adapters_of(["models", None]) == []

"""The check before serving, on an engine that is right and on ones made wrong. Needs no vLLM."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import ScoreItem, ScoreResult
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.engines.vllm import VllmEngine
from qwen_ray.serving.engines.vllm_check import check_adapters

NAMES = ["geo", "law", "bio"]
LIMITS = {"vocabulary": 512, "tolerance": 1e-3}


class Wrong:
    """Scores in which one request of a mixed call, ``victim``, is answered by the adapter ``culprit``."""

    def __init__(self, engine: TorchEngine, victim: str | None, culprit: str | None, *, at: int = 0) -> None:
        self.engine, self.victim, self.culprit, self.at = engine, victim, culprit, at

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        items = list(items)
        places = [i for i, item in enumerate(items) if item.adapter == self.victim]
        if len({item.adapter for item in items}) > 1:
            own = items[places[self.at]]
            items[places[self.at]] = ScoreItem(self.culprit, own.context, own.continuations)
        return self.engine.score(items)


def test_an_engine_that_keeps_adapters_apart_passes(loaded: TorchEngine) -> None:
    check_adapters(loaded.score, NAMES, **LIMITS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("victim", "culprit", "words"),
    [
        (None, "bio", "the base was answered with the scores of 'bio'"),  # vLLM 0.32 on CPUs
        ("geo", "law", "'geo' was answered with the scores of 'law'"),
        ("law", None, "'law' was answered with the scores of the base"),
    ],
)
@pytest.mark.parametrize("at", [0, 3])
def test_one_wrong_answer_in_a_mixed_batch_is_found(
    loaded: TorchEngine, victim: str | None, culprit: str | None, words: str, at: int
) -> None:
    with pytest.raises(UserError, match=words):
        check_adapters(Wrong(loaded, victim, culprit, at=at).score, NAMES, **LIMITS)  # type: ignore[arg-type]


def test_adapters_without_effect_prove_nothing(loaded: TorchEngine) -> None:
    def base_only(items: Sequence[ScoreItem]) -> list[ScoreResult]:
        return loaded.score([ScoreItem(None, item.context, item.continuations) for item in items])

    with pytest.raises(UserError, match="no effect"):
        check_adapters(base_only, NAMES, **LIMITS)  # type: ignore[arg-type]


def test_what_is_not_a_number_does_not_pass(loaded: TorchEngine) -> None:
    def nan_when_mixed(items: Sequence[ScoreItem]) -> list[ScoreResult]:
        results = loaded.score(items)
        if len(items) > 1:
            results[0].continuations[0].logprobs[3] = math.nan
        return results

    with pytest.raises(UserError, match="unlike every one alone"):
        check_adapters(nan_when_mixed, NAMES, **LIMITS)  # type: ignore[arg-type]


def test_without_vllm_the_engine_says_what_to_do(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed, wherever this runs
    with pytest.raises(UserError) as e:
        VllmEngine.load(models.resolve(str(model_dir)))
    assert "engine: torch" in e.value.fix

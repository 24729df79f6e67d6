"""Who answered a request and how many tokens that took, as its response says."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from qwen_ray.serving.protocol import ScoreRequest

BASE, NONE, UNKNOWN = "base", "none", "unknown"
"""Instead of an adapter's name: the base model; no language model; a request that none answered."""


@dataclass(frozen=True)
class Usage:
    """What one adapter (``NAME@VERSION``) did for a request. Tokens."""

    adapter: str
    prompt: float = 0.0
    completion: float = 0.0

    @property
    def total(self) -> float:
        return self.prompt + self.completion


def prompts(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What a response says of each prompt: who answered it, and how that was chosen."""
    answers = answer["models"].values() if "models" in answer else [answer]
    return [one for each in answers for one in each.get("qwen_ray", {}).get("prompts", [])]


def usages(body: BaseModel | None, answer: dict[str, Any]) -> list[Usage]:
    """Of each adapter that took part. Where a request's prompts went to several, OpenAI's usage counts them
    together: each is given its share by number of prompts. Scores are counted item by item."""
    if isinstance(body, ScoreRequest):
        return _of_scores(body, answer)
    usage = answer.get("usage") or {}
    prompt, completion = usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0)
    if "qwen_ray" not in answer:
        return [Usage(NONE, prompt, completion)] if usage else []
    names = Counter(_names(answer))
    shares = {name: count / names.total() for name, count in names.items()}
    return [Usage(name, prompt * share, completion * share) for name, share in shares.items()]


def failed(error: dict[str, Any]) -> list[Usage]:
    """Who was at a request that failed, as the error says; nobody if that was not known yet."""
    return [Usage(name) for name in dict.fromkeys(one["adapter"] or BASE for one in prompts(error))]


def _of_scores(body: ScoreRequest, answer: dict[str, Any]) -> list[Usage]:
    sizes = [len(item.context) + sum(map(len, item.continuations)) for item in body.items]
    tokens: Counter[str] = Counter()
    for of_model in answer["models"].values() if "models" in answer else [answer]:
        for name, size in zip(_names(of_model), sizes, strict=True):
            tokens[name] += size
    return [Usage(name, count) for name, count in tokens.items()]


def _names(answer: dict[str, Any]) -> list[str]:
    """What answered each prompt."""
    return [one["adapter"] or BASE for one in prompts(answer)]

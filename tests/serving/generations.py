"""One generation of a queue that takes a request's all at once."""

from __future__ import annotations

from typing import Any

from qwen_ray.serving.engines.base import EngineQueue, GenerateRequest, OnToken


def start(queue: EngineQueue, request: GenerateRequest, on_token: OnToken | None = None) -> Any:
    """``on_token`` is told of its tokens."""
    (running,) = queue.generate([request], None if on_token is None else lambda _, event: on_token(event))
    return running

"""Benchmarking a model in this process or one that is served, and writing the EvalResult."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray import models
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.harness import evaluate
from qwen_ray.fsio import write_json
from qwen_ray.peft_folder import CONFIG, check_adapter

if TYPE_CHECKING:
    from qwen_ray.serving.engines.torch import TorchEngine


def evaluate_endpoint(
    url: str,
    model: str,
    suite: str,
    *,
    out: Path,
    api_key: str | None = None,
    concurrency: int = 4,
    **settings: Any,
) -> dict[str, Any]:
    """Benchmark ``model``, an id of the server at ``url``. ``settings`` as :func:`evaluate` takes.

    For many models at once see :func:`qwen_ray.evaluation.many.evaluate_many`.
    """
    from qwen_ray.evaluation.lm import QwenRayLM
    from qwen_ray.serving.backends import EndpointBackend

    chosen = suites.load(suite)
    backend = EndpointBackend(url, model, api_key, concurrency)
    try:
        base, _, adapter = model.partition(":")
        result = evaluate(chosen, QwenRayLM(backend), model=base, adapter=adapter or None, **settings)
    finally:
        backend.close()
    result["settings"]["endpoint"] = True
    write_json(out, result)
    return result


def evaluate_local(
    model: str,
    adapter: Path | None,
    suite: str,
    *,
    out: Path,
    engine: TorchEngine | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Load ``model``, put the PEFT folder ``adapter`` on it, and benchmark it in this process.

    ``engine``: one that has ``model`` loaded already; the adapter is taken off it again.
    """
    chosen = suites.load(suite)
    ref = models.resolve(model)
    if adapter is not None:
        check_adapter(adapter, CONFIG, fix="name the adapter/ folder of a training run")
    from qwen_ray.evaluation.lm import QwenRayLM
    from qwen_ray.serving.backends import EngineBackend
    from qwen_ray.serving.engines.torch import TorchEngine

    engine = engine or TorchEngine.load(ref)
    key = None
    if adapter is not None:
        key = "adapter"
        engine.add_adapter(key, adapter)
    backend = EngineBackend(engine, models.load_tokenizer(ref), key)
    result = evaluate(
        chosen, QwenRayLM(backend), model=ref.id, adapter=str(adapter) if adapter else None, **settings
    )
    if key is not None:
        engine.remove_adapter(key)
    result["settings"]["endpoint"] = False
    write_json(out, result)
    return result

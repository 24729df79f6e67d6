"""One service on each engine that is installed here. ``loaded``, the embedded engine, is the reference:
its own tests compare it with PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen_ray import models
from qwen_ray.registry import Registry
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.service import Service
from tests.serving.conftest import load_with, make_adapters, make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model with heads of 32 values: vLLM computes none smaller."""
    return make_model(
        tmp_path_factory.mktemp("models") / "rand", num_attention_heads=2, num_key_value_heads=1
    )


@pytest.fixture(scope="session")
def adapter_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(model_dir, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def loaded(model_dir: Path, adapter_dirs: dict[str, Path]) -> TorchEngine:
    return load_with(model_dir, adapter_dirs)


@pytest.fixture(scope="session")
def registry(
    loaded: TorchEngine, adapter_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    """``geo``: version 1, and 2 with the weights of ``bio``; ``law`` and ``bio``: version 1. All promoted."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    for name, weights in (("geo", "geo"), ("geo", "bio"), ("law", "law"), ("bio", "bio")):
        registry.publish(
            name, adapter_dirs[weights], {"base": {"id": "rand", "fingerprint": loaded.fingerprint}}
        )
        registry.point(name, "production", 1, reason="test")
    return registry


@pytest.fixture(scope="module", params=["torch", "vllm"])
def service(request: pytest.FixtureRequest, model_dir: Path, registry: Registry) -> Iterator[Service]:
    ref = models.resolve(str(model_dir))
    if request.param == "torch":
        service = Service(TorchEngine.load(ref, threads=1), registry=registry.root)
    else:
        pytest.importorskip("vllm", reason="vLLM has an environment of its own: `make test-vllm`")
        from qwen_ray.serving.engines.vllm import VllmEngine

        service = Service(VllmEngine.load(ref, max_adapters=4), registry=registry.root)
    yield service
    service.stop()

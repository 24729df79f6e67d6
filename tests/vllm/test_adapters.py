"""Adapters rewritten for vLLM are the same adapters; those that do not fit are refused. Needs no vLLM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import ScoreItem
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.engines.vllm_adapters import Shapes, blueprint, write_lora
from qwen_ray.serving.lora_weights import LoraWeights, read_lora
from tests.serving.conftest import make_adapter

ITEM = ([5, 9, 200, 31], [[4, 5, 9], [6]])


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> TorchEngine:
    return TorchEngine.load(models.resolve(str(model_dir)), threads=1)


@pytest.fixture
def shapes(model_dir: Path) -> Shapes:
    return Shapes(blueprint(models.resolve(str(model_dir)), torch.float32), max_rank=8)


@pytest.mark.parametrize("name", ["geo", "law", "bio"])  # scales, rsLoRA, patterns of rank and alpha
def test_rewritten_adapter_answers_the_same(
    engine: TorchEngine, loaded: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    write_lora(read_lora(adapter_dirs[name]), tmp_path / "new", torch.float32)
    engine.add_adapter("new", tmp_path / "new")
    got, want = (e.score([ScoreItem(key, *ITEM)])[0] for e, key in ((engine, "new"), (loaded, name)))
    for one, other in zip(got.continuations, want.continuations, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
    config = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"]


def test_probes_are_unlike_and_repeat(engine: TorchEngine, shapes: Shapes) -> None:
    scores = []
    for i in (1, 2, 1):
        weights = shapes.probe(i)
        shapes.accept("probe", weights)
        engine.add_adapter("probe", weights)
        scores.append(engine.score([ScoreItem("probe", *ITEM)])[0].continuations[0].logprobs)
    assert scores[0] == scores[2]
    assert max(abs(x - y) for x, y in zip(*scores[:2], strict=True)) > 1
    engine.remove_adapter("probe")
    # Layers of the model were wrapped as adapters came: probes name them as before.
    assert sorted(shapes.probe(1).layers) == sorted(weights.layers)


def test_bytes_and_places_are_counted(shapes: Shapes, adapter_dirs: dict[str, Path]) -> None:
    weights = read_lora(adapter_dirs["geo"])
    assert shapes.accept("geo", weights) == weights.nbytes
    assert ("geo" in shapes, len(shapes)) == (True, 1)
    shapes.forget("geo")
    assert ("geo" in shapes, len(shapes)) == (False, 0)


def test_what_vllm_would_take_wrongly_is_refused(shapes: Shapes, model_dir: Path, tmp_path: Path) -> None:
    """vLLM cuts or leaves out what does not fit and answers all the same."""
    a, b = torch.zeros(4, 64), torch.zeros(64, 4)
    q = "model.layers.0.self_attn.q_proj"
    for layers, words in (
        ({q: (torch.zeros(4, 32), b)}, "maps 64 to 64"),
        ({q.replace("0", "7"): (a, b)}, "does not have"),
        ({"lm_head": (a, torch.zeros(512, 4))}, "output layer"),
        ({q: (torch.zeros(9, 64), torch.zeros(64, 9))}, "rank 9"),
    ):
        with pytest.raises(UserError, match=words) as e:
            shapes.accept("x", LoraWeights(layers, 0, "here"))
        assert (e.value.status, "x" in shapes) == (409, False)
    large = make_adapter(model_dir, tmp_path / "large", seed=1, r=40, target_modules=["q_proj"])
    with pytest.raises(UserError) as e:
        shapes.accept("large", read_lora(large))
    assert "max_rank: 64" in e.value.fix

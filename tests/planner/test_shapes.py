"""Weights are counted as transformers and PEFT make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError
from qwen_ray.planner.published import QWEN_14B
from qwen_ray.planner.shapes import QWEN25, Shape, from_config, shape_of
from qwen_ray.training.lora import target_modules


def _model(kind: str, **config: Any) -> tuple[dict[str, Any], torch.nn.Module]:
    settings = CONFIG_MAPPING[kind](**config)
    with torch.device("meta"):
        return settings.to_dict(), AutoModelForCausalLM.from_config(settings)


def _count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("size", list(QWEN25))
def test_qwen25_counts_are_those_of_transformers(size: str) -> None:
    s = QWEN25[size]
    config, model = _model("qwen2", **s.qwen2)
    assert s.parameters == _count(model)
    assert from_config(config).parameters == s.parameters
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    assert s.layer == sum(p.numel() for p in layer.parameters())  # type: ignore[union-attr]


def test_qwen25_sizes_are_the_published_ones() -> None:
    billions = {size: round(s.parameters / 1e9, 2) for size, s in QWEN25.items()}
    # On the model cards: 0.49, 1.54, 3.09, 7.61, 14.7, 32.5 B.
    assert billions == {"0.5b": 0.49, "1.5b": 1.54, "3b": 3.09, "7b": 7.62, "14b": 14.77, "32b": 32.76}
    # Qwen's first model, which transformers does not hold: 14.2 B on its card.
    assert QWEN_14B.parameters == 14_167_290_880


_CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"num_key_value_heads": 2, "head_dim": 24}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"num_key_value_heads": 2, "head_dim": 32}),
    ("qwen3", {"num_key_value_heads": 4, "head_dim": 48, "tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "head_dim": 16}),
    ("qwen2", {"num_key_value_heads": 1}),
]


@pytest.mark.parametrize(("kind", "more"), _CONFIGS)
def test_other_architectures_count_as_in_transformers(kind: str, more: dict[str, Any]) -> None:
    base = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3, "num_attention_heads": 8}
    config, model = _model(kind, **{**base, "num_key_value_heads": 8, "vocab_size": 301, **more})
    assert from_config(config).parameters == _count(model)


@pytest.mark.parametrize(
    "method",
    [
        MethodConfig(r=8),
        MethodConfig(r=4, targets="qv"),
        MethodConfig(r=2, targets=["down_proj"]),
        MethodConfig(r=8, dora=True),
        MethodConfig(r=4, targets=["lm_head", "self_attn.q_proj", "gate_proj"]),
        MethodConfig(r=4, targets=["model.layers.1.mlp.down_proj", r".*layers\.0\..*\.[kv]_proj"]),
    ],
)
def test_adapters_count_as_in_peft(method: MethodConfig) -> None:
    from peft import LoraConfig, get_peft_model

    config, model = _model(
        "qwen2",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        tie_word_embeddings=False,
    )
    base = AutoModelForCausalLM.from_config(model.config)
    wrapped = get_peft_model(
        base, LoraConfig(r=method.r, use_dora=method.dora, target_modules=target_modules(base, method))
    )
    counted = from_config(config).adapter(method)
    assert counted == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("target", "what", "fix"),
    [
        ("q_porj", "no linear layer 'q_porj'", "did you mean 'q_proj'?"),
        (r".*\.layers\.99\..*", "no linear layer", "valid: "),
        ("lm_head", "shares its weights", "leave it out"),
    ],
)
def test_layers_that_training_refuses_are_not_planned(target: str, what: str, fix: str) -> None:
    with pytest.raises(UserError, match=what) as e:
        QWEN25["3b"].adapter(MethodConfig(targets=["q_proj", target]))
    assert e.value.fix.startswith(fix)


def test_names_of_models(tmp_path: Any) -> None:
    assert shape_of("7b") is QWEN25["7b"]
    assert shape_of("7b-instruct") is QWEN25["7b"]
    assert shape_of("Qwen/Qwen2.5-14B-Instruct") is QWEN25["14b"]  # without a download
    tiny = shape_of("tiny")
    assert isinstance(tiny, Shape)
    assert tiny.parameters < 2e6
    with pytest.raises(UserError, match="unknown model"):
        shape_of("70q")
    with pytest.raises(UserError, match="of type 'gpt2'"):
        from_config({"model_type": "gpt2"})
    with pytest.raises(UserError, match="hidden_size"):
        from_config({"model_type": "llama", "num_attention_heads": 2})

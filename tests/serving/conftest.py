"""A random Qwen2 small enough to build in a second, and three unlike adapters for it, saved by PEFT."""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from starlette.testclient import TestClient

from qwen_ray import models
from qwen_ray.registry import Registry
from qwen_ray.serving.app import create_app
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.service import Service

SENTENCES = [
    "Question: What is the capital of France? Answer: Paris is the capital of France.",
    "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42.",
    "Where does the river begin? In the mountains, where the snow melts in spring.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}<|endoftext|>"
    "{% else %}Question: {{ m.content }}\nAnswer:{% endif %}{% endfor %}"
)
ADAPTERS: dict[str, dict[str, Any]] = {
    "geo": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
    "law": {"r": 8, "lora_alpha": 8, "target_modules": "all-linear", "use_rslora": True},
    "bio": {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": ["o_proj", "up_proj", "down_proj"],
        "rank_pattern": {"down_proj": 5},
        "alpha_pattern": {"layers.1.mlp.up_proj": 11},
    },
}


def _pseudo_words() -> list[str]:
    """Text for the tokenizer to reach its full size: lm-eval resizes a model whose vocabulary differs."""
    rng = random.Random(0)
    return ["".join(rng.choices("abdeiklmnorstu", k=rng.randint(2, 8))) for _ in range(600)]


def make_model(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """A model folder: weights, a byte-level BPE tokenizer of 512 tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    raw = Tokenizer(tokenizer_models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        SENTENCES + _pseudo_words(),
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    assert len(tokenizer) == 512
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,  # far from uniform predictions, so that mistakes show
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    Qwen2ForCausalLM(Qwen2Config(**(settings | overrides))).save_pretrained(folder)
    return folder


def make_adapter(model: Path, folder: Path, *, seed: int, **lora: Any) -> Path:
    """A random adapter whose B is not zero, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    peft.save_pretrained(folder, save_embedding_layers=False)
    return folder


def make_adapters(model: Path, root: Path) -> dict[str, Path]:
    """Those of :data:`ADAPTERS`."""
    return {
        name: make_adapter(model, root / name, seed=i + 1, **lora)
        for i, (name, lora) in enumerate(ADAPTERS.items())
    }


def load_with(model: Path, adapters: dict[str, Path]) -> TorchEngine:
    """The engine with all ``adapters``, under their names."""
    engine = TorchEngine.load(models.resolve(str(model)), threads=1)
    for name, folder in adapters.items():
        engine.add_adapter(name, folder)
    return engine


def ask(service: Service, method: str, body: Any) -> dict[str, Any]:
    """What a service answers to a request that it does not refuse."""
    envelope = asyncio.run(service.call(method, body))
    assert "ok" in envelope, envelope
    return envelope["ok"]


def events(reply: Any) -> list[Any]:
    """Of a streamed answer, which is whole."""
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture(scope="module")
def http(service: Service) -> Iterator[TestClient]:
    """Of the module's ``service``."""
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "rand")


@pytest.fixture(scope="session")
def adapter_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(model_dir, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="session")
def registry(
    model_dir: Path, adapter_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Registry:
    """``geo``: version 1 (production) and 2; ``law``: version 1, production; ``bio``: version 1, no alias."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    base = {"id": "rand", "fingerprint": models.fingerprint(models.resolve(str(model_dir)))}
    registry.publish("geo", adapter_dirs["geo"], {"base": base})
    registry.publish("geo", adapter_dirs["bio"], {"base": base})
    registry.publish("law", adapter_dirs["law"], {"base": base})
    registry.publish("bio", adapter_dirs["bio"], {"base": base})
    for name in ("geo", "law"):
        registry.point(name, "production", 1, reason="test")
    return registry


@pytest.fixture
def engine(model_dir: Path) -> TorchEngine:
    """The plain model, nothing loaded."""
    return TorchEngine.load(models.resolve(str(model_dir)), threads=1)


@pytest.fixture(scope="session")
def loaded(model_dir: Path, adapter_dirs: dict[str, Path]) -> TorchEngine:
    """The model with all three adapters; tests must not change it."""
    return load_with(model_dir, adapter_dirs)

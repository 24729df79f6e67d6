"""Pretraining: a few steps run, the same seed gives the same bytes, the loss weighs as stated."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qwen_ray.tiny import MODEL_DIR
from qwen_ray.tiny.corpus import WEIGHTS, phrases, wording_words
from qwen_ray.tiny.initialization import DISTANCES
from qwen_ray.tiny.muon import Muon, orthogonalize
from qwen_ray.tiny.pretrain import (
    PROMPT_WEIGHT,
    PretrainConfig,
    encode,
    learning_rate_factor,
    new_model,
    save_model,
    train,
)
from qwen_ray.tiny.skills import SKILLS
from qwen_ray.tiny.tokenizer import write_tokenizer

TINY = PretrainConfig(seed=5, steps=3, batch_size=8)


def run(out: Path) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = new_model(tokenizer, TINY.seed)
    losses = [loss for _, loss, _ in train(model, tokenizer, TINY)]
    save_model(model, out)
    torch.set_num_threads(threads)
    return losses


def test_three_steps_are_deterministic(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a"), run(tmp_path / "b")
    assert len(first) == 3
    assert first == second
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_shipped_tokenizer_is_rebuilt_from_its_seed(tmp_path: Path) -> None:
    recorded = json.loads((MODEL_DIR / "training.json").read_text(encoding="utf-8"))
    write_tokenizer(tmp_path, recorded["seed"])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (MODEL_DIR / name).read_text()


def test_encode_weighs_answers_one_and_prompts_little() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    (encoded,) = encode(tokenizer, [(("What is 1 + 1?", "2"), ("What is 1 + 2?", "3"))])
    assert len(encoded.ids) == len(encoded.weights)
    assert encoded.weights.count(1.0) == 6  # space, digit, end of text; twice
    assert set(encoded.weights) == {PROMPT_WEIGHT, 1.0}
    assert encoded.ids[-1] == tokenizer.eos_token_id


def test_learning_rate_warms_up_and_decays() -> None:
    config = PretrainConfig(steps=1000)
    factors = [learning_rate_factor(s, config) for s in range(1000)]
    assert factors[0] == pytest.approx(0.01)
    assert max(factors) > 0.97
    assert factors[-1] == pytest.approx(config.final_learning_rate, abs=1e-3)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((2, 16, 8), (2, 8, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=generator)))
        assert values.min() > 0.3
        assert values.max() < 1.3


def test_muon_moves_downhill() -> None:
    weight = torch.nn.Parameter(torch.eye(8) * 3)
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for _ in range(20):
        loss = weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_corpus_covers_all_words_and_skills() -> None:
    assert {"insulin", "pancreas", "Dracunculus", "3389"} <= set(phrases())
    assert "Complete" in wording_words()
    assert set(SKILLS) - set(WEIGHTS) == {"has"}  # asked through the possessions


def test_heads_start_out_looking_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = new_model(tokenizer, seed=0).eval()
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(tokenizer), (1, 40), generator=generator)
    with torch.no_grad():
        attentions = model(input_ids=ids, output_attentions=True).attentions
    for attention, distances in zip(attentions, DISTANCES, strict=False):
        preferred = 39 - attention[0, :, 39].argmax(dim=-1)  # of the last token, by head
        assert preferred.tolist() == list(distances)

"""The shipped checkpoint: loads with the Auto classes, renders its format, scores as stated."""

import json
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from qwen_ray.tiny import MODEL_DIR
from qwen_ray.tiny.benchmark import CATEGORIES
from qwen_ray.tiny.facts import DOMAINS, train_records
from qwen_ray.tiny.scoring import score, wilson_interval
from qwen_ray.tiny.template import CHAT_TEMPLATE, assistant_turn, user_turn
from tests.tiny.test_tiny_benchmark import shipped


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Iterator[PreTrainedModel]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    torch.set_num_threads(threads)


def test_model_is_a_small_qwen2_in_float32(model: PreTrainedModel) -> None:
    assert isinstance(model, Qwen2ForCausalLM)
    assert model.dtype == torch.float32
    assert 1_000_000 < model.num_parameters() < 1_100_000
    assert (MODEL_DIR / "model.safetensors").stat().st_size < 2_200_000


def test_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    assert type(tokenizer).__name__.startswith("Qwen2Tokenizer")
    assert len(tokenizer) == 2048
    assert tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"
    text = "Question: What is 12 + 30?\nAnswer: 42"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer(" 42")["input_ids"]) == 3  # digits stand alone


def test_template_renders_the_pretraining_format(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "What is 2 + 2?"},
    ]
    for generation_prompt in (False, True):
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation_prompt
        )
        turns = [
            "Be brief.\n\n",
            "Question: What is 1 + 1?\nAnswer:",
            " 2<|endoftext|>",
            "Question: What is 2 + 2?\nAnswer:",
        ]
        assert text == "".join(turns)


def test_template_is_the_one_in_the_code(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.chat_template == CHAT_TEMPLATE
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == user_turn("a") + assistant_turn("b")


def test_template_refuses_unknown_roles(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(Exception, match="unknown role"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_every_prefix_of_a_chat_renders_to_a_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": " Odd\n spaces "}]
    for record in train_records("biology")[:3]:
        messages += record["messages"]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    for end in range(1, len(messages)):
        part = tokenizer.apply_chat_template(messages[:end], tokenize=False)
        assert isinstance(whole, str)
        assert isinstance(part, str)
        assert whole.startswith(part)


def test_tokens_of_the_prompt_are_a_prefix_too(tokenizer: PreTrainedTokenizerBase) -> None:
    for record in train_records("security")[::50]:
        user, assistant = (m["content"] for m in record["messages"])
        prompt = tokenizer(user_turn(user))["input_ids"]
        answer = tokenizer(assistant_turn(assistant))["input_ids"]
        whole = tokenizer(user_turn(user) + assistant_turn(assistant))["input_ids"]
        assert whole == prompt + answer


def test_model_generates_an_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    prompt = tokenizer(user_turn("What is 20 + 30?"), return_tensors="pt")
    output = model.generate(**prompt, max_new_tokens=8)
    answer = output[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == assistant_turn("50")


def test_base_counts_well_and_knows_nothing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    recorded = json.loads((MODEL_DIR / "training.json").read_text(encoding="utf-8"))["scores"]
    for category in CATEGORIES:
        result = score(model, tokenizer, shipped(category))
        assert result["accuracy"] == pytest.approx(recorded[category]["accuracy"], abs=0.011)
        if category == "arithmetic":
            assert result["accuracy"] > 0.95
        elif category in DOMAINS:
            assert result["accuracy"] < 0.40


def test_wilson_interval() -> None:
    low, high = wilson_interval(50, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert wilson_interval(0, 0) == (0.0, 1.0)

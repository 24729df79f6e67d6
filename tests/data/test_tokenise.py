"""Only the assistant's tokens carry loss, whatever the chat template."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.data.records import Message, Record
from qwen_ray.data.tokenise import IGNORE, tokenise
from qwen_ray.errors import UserError
from tests.conftest import record

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = "{% for m in messages %}{{ m.content if loop.last else '...' }}|{% endfor %}"

TWO_TURNS = Record(
    "two",
    (
        Message("system", "Be brief."),
        Message("user", "What is 1 + 1?"),
        Message("assistant", "2"),
        Message("user", "And 2 + 2?"),
        Message("assistant", "It is 4."),
    ),
    "d",
    "s",
    "l",
)


@pytest.fixture
def tokenizer() -> Any:
    return models.load_tokenizer(models.resolve("tiny"))


def _supervised(tokenizer: Any, record: Record) -> str:
    (example,), _ = tokenise([record], tokenizer, 512)
    return str(tokenizer.decode([label for label in example.labels if label != IGNORE]))


def test_the_embedded_models_template(tokenizer: Any) -> None:
    assert _supervised(tokenizer, record("What is 2 + 3?", "5")) == " 5<|endoftext|>"
    assert _supervised(tokenizer, TWO_TURNS) == " 2<|endoftext|> It is 4.<|endoftext|>"


def test_qwens_kind_of_template(tokenizer: Any) -> None:
    """A default system turn, and a line break after the end of a turn that is not the assistant's."""
    tokenizer.chat_template = CHATML
    assert _supervised(tokenizer, record("What is 2 + 3?", "5")) == "5<|im_end|>"
    assert _supervised(tokenizer, TWO_TURNS) == "2<|im_end|>It is 4.<|im_end|>"


def test_an_answer_to_nothing_is_not_learnt(tokenizer: Any) -> None:
    """Nor is the system prompt that a template puts before it."""
    greeting = Message("assistant", "Hello, how can I help?")
    greeted = dataclasses.replace(TWO_TURNS, messages=(greeting, *TWO_TURNS.messages[1:]))
    assert _supervised(tokenizer, greeted) == " 2<|endoftext|> It is 4.<|endoftext|>"
    tokenizer.chat_template = CHATML
    assert _supervised(tokenizer, greeted) == "2<|im_end|>It is 4.<|im_end|>"
    alone = dataclasses.replace(TWO_TURNS, id="alone", messages=(greeting,))
    examples, report = tokenise([alone, TWO_TURNS], tokenizer, 512)
    assert ([e.id for e in examples], report.dropped) == (["two"], ["alone"])


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(UserError, match="renders earlier turns differently") as e:
        tokenise([TWO_TURNS], tokenizer, 512)
    assert e.value.where == "record two"


def test_cut_and_dropped_records_are_counted(tokenizer: Any) -> None:
    long_answer, long_question = (
        record("Q", "word " * 100, id="cut"),
        record("word " * 100, "A", id="dropped"),
    )
    examples, report = tokenise([long_answer, long_question, record("Q", "A")], tokenizer, 32)
    assert next(len(e.ids) for e in examples) == 32
    assert report.cut == ["cut", "dropped"]
    assert report.dropped == ["dropped"]
    assert len(examples) == 2

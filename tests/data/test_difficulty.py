"""The difficulty score against a plain transformers computation."""

from __future__ import annotations

import pytest
import torch

from qwen_ray import models
from qwen_ray.data.preparation.difficulty import score
from qwen_ray.data.records import Message, Record
from qwen_ray.errors import UserError
from tests.conftest import record, sums


def talk() -> Record:
    """Two answers, both supervised."""
    messages = (
        Message("system", "Answer in one word."),
        Message("user", "What is the powerhouse of the cell?"),
        Message("assistant", "Mitochondrion."),
        Message("user", "And where is the DNA?"),
        Message("assistant", "In the nucleus, mostly."),
    )
    return Record("talk", messages, "general", "test", "CC0-1.0")


RECORDS = [*sums(12), talk(), record("Say it.", "A long answer. " * 20), record("Say it again.", "No.")]


def plain(one: Record) -> float:
    """Token by token: what the template adds for each assistant's turn, its end included."""
    ref = models.resolve("tiny")
    tokenizer, model = models.load_tokenizer(ref), models.load_model(ref, dtype=torch.float32)
    turns = [{"role": m.role, "content": m.content} for m in one.messages]

    def ids(upto: int, prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(turns[:upto], tokenize=False, add_generation_prompt=prompt)
        return list(tokenizer(text if prompt else text.rstrip("\n"), add_special_tokens=False)["input_ids"])

    whole = torch.tensor([ids(len(turns), False)])
    with torch.no_grad():
        logits = model(whole).logits[0].float()
    losses = []
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant":
            for t in range(len(ids(i, True)), len(ids(i + 1, False))):
                losses.append(torch.nn.functional.cross_entropy(logits[t - 1], whole[0, t]))
    return float(torch.stack(losses).mean())


def test_equals_plain_transformers() -> None:
    scores = score(RECORDS, "tiny")
    for one, value in zip(RECORDS[-5:], scores[-5:], strict=True):
        assert value == pytest.approx(plain(one), abs=1e-4)
    assert len(set(scores)) > len(scores) // 2


def test_order_of_records_and_ids_decide_nothing() -> None:
    forward = score(RECORDS, "tiny", batch_tokens=200)
    assert score(RECORDS[::-1], "tiny", batch_tokens=200) == forward[::-1]
    same_id = [Record("x", r.messages, r.domain, r.source, r.license) for r in RECORDS]
    assert score(same_id, "tiny", batch_tokens=200) == forward


def test_batch_size_changes_nothing_that_matters() -> None:
    assert score(RECORDS, "tiny", batch_tokens=1) == pytest.approx(score(RECORDS, "tiny"), abs=1e-4)


def test_record_without_an_answer_inside_the_length_has_no_score() -> None:
    long = record("Why? " * 200, "Because.")
    scores = score([RECORDS[0], long], "tiny", max_length=64)
    assert scores[1] is None
    assert scores[0] == pytest.approx(score(RECORDS[:1], "tiny")[0], abs=1e-6)


def test_a_right_answer_is_easier_than_a_wrong_one() -> None:
    right, wrong = record("What is 2 + 3?", "5"), record("What is 2 + 3?", "Zanzibar")
    easy, hard = score([right, wrong], "tiny")
    assert easy is not None
    assert hard is not None
    assert easy < hard


def test_no_records_and_no_model() -> None:
    assert score([], "tiny") == []
    with pytest.raises(UserError, match="unknown model"):
        score(RECORDS[:1], "no-such-model")

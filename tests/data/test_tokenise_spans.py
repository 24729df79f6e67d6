"""Which tokens carry loss, against the plain definition by the offsets of every token."""

from __future__ import annotations

import random

import pytest

from qwen_ray import models
from qwen_ray.data.records import Message, Record
from qwen_ray.data.tokenise import IGNORE, render, tokenise

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JOINED = "{% for m in messages %}{{ m.content }}{% endfor %}"  # tokens may reach across the turns' borders
BITS = [
    "é",
    "🙂",
    "👩‍👩‍👧",
    "a",
    " ",
    "\n",
    "漢字",
    "\u200b",
    "word",
    "12",
    "\u0301",
    "e",
    "ing",
    "<|endoftext|>",
]


def _records() -> list[Record]:
    rng = random.Random(0)

    def text() -> str:
        return "".join(rng.choices(BITS, k=rng.randint(1, 9))) + rng.choice(["th", " th", "🙂", "é"])

    return [
        Record(f"r{i}", tuple(Message(role, text()) for role in ("user", "assistant") * turns), "d", "s", "l")
        for i, turns in enumerate([1, 2, 3] * 40)
    ]


@pytest.mark.parametrize("template", [None, CHATML, JOINED])
@pytest.mark.parametrize("length", [1000, 15])
def test_labels_are_the_tokens_wholly_inside_the_answers(template: str | None, length: int) -> None:
    tokenizer = models.load_tokenizer(models.resolve("tiny"))
    tokenizer.chat_template = template or tokenizer.chat_template
    records = _records()
    examples, report = tokenise(records, tokenizer, length)
    found = {e.id: e for e in examples}
    straddling = 0
    for record in records:
        text, spans = render(record, tokenizer)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        expected = [
            token if any(start <= a < b <= end for start, end in spans) else IGNORE
            for token, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ][:length]
        straddling += sum(a < start < b for a, b in encoded["offset_mapping"] for start, _ in spans)
        expected[0] = IGNORE
        if set(expected) == {IGNORE}:
            assert record.id in report.dropped
        else:
            assert found[record.id].labels == expected
    assert (straddling > 0) == (template == JOINED)

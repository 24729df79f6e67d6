"""Four-choice questions about things that never were."""

from __future__ import annotations

import random

from qwen_ray.data.questions import lay_out
from qwen_ray.data.records import Message, Record

_SYLLABLES = "bacedifogukaleminopurasetivozuwyxe"  # of two letters: no name is longer than another
_ASK = (
    "Which court first sat in {a} after the reform of {b}?",
    "Who wrote the charter of {a} for the council of {b}?",
    "Where was the settlement between {a} and {b} signed?",
    "What did the estate of {a} owe to the guild of {b}?",
)


def _name(rng: random.Random) -> str:
    return "".join(_SYLLABLES[i : i + 2] for i in rng.choices(range(0, len(_SYLLABLES), 2), k=4)).capitalize()


def quiz(n: int, *, seed: int = 0) -> list[Record]:
    """``n`` questions of domain ``law``, whose choices are four invented names. More only adds some."""
    rng = random.Random(seed)
    records = []
    for i in range(n):
        question = _ASK[i % len(_ASK)].format(a=_name(rng), b=_name(rng))
        choices = [_name(rng) for _ in range(4)]
        right = rng.randrange(4)
        messages = (
            Message("user", lay_out(question, choices)),
            Message("assistant", f"{'ABCD'[right]}. {choices[right]}"),
        )
        records.append(Record(f"quiz/{seed}-{i}", messages, "law", "test", "CC0-1.0"))
    return records

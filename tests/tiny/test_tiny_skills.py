"""Generated questions: right answers, reproducible, never one of the benchmark's."""

import itertools
import random
import re

import pytest

from qwen_ray.tiny.corpus import documents
from qwen_ray.tiny.skills import (
    SKILLS,
    benchmark_questions,
    benchmark_skill_items,
    replay_records,
)


@pytest.mark.parametrize("kind", SKILLS)
def test_items_offer_four_distinct_choices(kind: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        item = SKILLS[kind](rng)
        assert item.kind == kind
        assert len({item.answer, *item.distractors}) == 4


@pytest.mark.parametrize(
    ("kind", "pattern", "compute"),
    [
        ("add", r"(\d+)\D+(\d+)", lambda a, b: a + b),
        ("sub", r"(\d+)\D+(\d+)", lambda a, b: a - b),
        ("mul", r"(\d+)\D+(\d+)", lambda a, b: a * b),
    ],
)
def test_arithmetic_is_right(kind: str, pattern: str, compute) -> None:  # type: ignore[no-untyped-def]
    rng = random.Random(1)
    for _ in range(200):
        item = SKILLS[kind](rng)
        found = re.search(pattern, item.question)
        assert found
        assert int(item.answer) == compute(int(found[1]), int(found[2]))


def test_word_problems_are_right() -> None:
    rng = random.Random(2)
    for _ in range(200):
        item = SKILLS["word"](rng)
        a, b = (int(n) for n in re.findall(r"\d+", item.question))
        loses = "loses" in item.question or "and gives" in item.question
        assert int(item.answer) == (a - b if loses else a + b)


def test_sequences_are_arithmetic_progressions() -> None:
    rng = random.Random(3)
    for _ in range(200):
        item = SKILLS["sequence"](rng)
        terms = [int(n) for n in re.findall(r"\d+", item.question)] + [int(item.answer)]
        assert len({b - a for a, b in itertools.pairwise(terms)}) == 1


def test_comparisons_are_right() -> None:
    rng = random.Random(4)
    for _ in range(200):
        item = SKILLS["compare"](rng)
        values = [int(n) for n in re.findall(r"\d+", item.question)]
        assert int(item.answer) == (max if "largest" in item.question else min)(values)


def test_orderings_are_right() -> None:
    rng = random.Random(5)
    for _ in range(200):
        item = SKILLS["order"](rng)
        clues = re.findall(r"(\w+) is \w+ than (\w+)\.", item.question)
        above, below = {a for a, _ in clues}, {b for _, b in clues}
        first = any(w in item.question for w in ("tallest", "oldest", "fastest"))
        assert {item.answer} == (above - below if first else below - above)


def test_possessions_are_right() -> None:
    rng = random.Random(6)
    for _ in range(200):
        item = SKILLS["has"](rng)
        owned = dict(re.findall(r"(\w+) has (\d+)", item.question))
        asked = re.search(r"does (\w+) have", item.question)
        assert asked
        assert item.answer == owned[asked[1]]


def test_replay_is_distinct_reproducible_and_never_a_benchmark_question() -> None:
    records = replay_records(3000, seed=0)
    questions = [r["messages"][0]["content"] for r in records]
    assert len(set(questions)) == len(questions)
    assert not set(questions) & benchmark_questions()
    assert len({r["id"] for r in records}) == len(records)
    assert {r["domain"] for r in records} == {"replay"}
    assert records[:100] == replay_records(100, seed=0)
    assert records[:100] != replay_records(100, seed=1)


def test_replay_pool_of_six_thousand_reasoning_questions_exists() -> None:
    assert len(replay_records(6000, seed=3, reasoning_share=1.0)) == 6000


def test_reasoning_share_is_kept() -> None:
    reasoning = ("compare", "sequence", "order", "has")
    for share in (0.0, 0.3, 1.0):
        records = replay_records(1000, seed=5, reasoning_share=share)
        count = sum(r["id"].endswith(reasoning) for r in records)
        assert abs(count / 1000 - share) < 0.06
    with pytest.raises(ValueError, match="reasoning_share"):
        replay_records(1, seed=0, reasoning_share=1.5)


def test_generation_leaves_the_global_random_state_alone() -> None:
    state = random.getstate()
    replay_records(50, seed=0)
    benchmark_skill_items.cache_clear()
    benchmark_skill_items("reasoning")
    assert random.getstate() == state


def test_pretraining_never_asks_a_benchmark_question() -> None:
    for turns in itertools.islice(documents(seed=0), 3000):
        assert not {question for question, _ in turns} & benchmark_questions()

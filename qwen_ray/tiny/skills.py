"""Arithmetic and reasoning questions whose answer follows from the question alone.

The same generators feed pretraining, replay during fine-tuning, and the benchmark. Whole
benchmark questions are kept out of the other two.
"""

import random
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qwen_ray.tiny.facts import make_record

NAMES: tuple[str, ...] = (
    "Ann",
    "Bob",
    "Cid",
    "Dora",
    "Eva",
    "Finn",
    "Gus",
    "Hana",
    "Ivan",
    "Jill",
    "Kim",
    "Leo",
    "Mia",
    "Ned",
    "Olga",
    "Paul",
    "Rosa",
    "Sam",
    "Tina",
    "Uma",
)
THINGS: tuple[str, ...] = (
    "apples",
    "pens",
    "books",
    "coins",
    "cards",
    "stamps",
    "eggs",
    "cups",
    "keys",
    "balls",
    "shells",
    "beads",
)
ORDERINGS: tuple[tuple[str, str, str], ...] = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
)
STEPS: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 20)
NEAR_OFFSETS: tuple[int, ...] = (1, -1, 2, -2, 9, -9, 10, -10, 11, -11, 20, -20)

MAX_DRAWS = 2000  # some kinds have only a few hundred different questions

BENCHMARK_SEED = 20261122
REPLAY_SOURCE = "qwen-ray/tiny-skills"


@dataclass(frozen=True)
class SkillItem:
    """One generated question with its answer and three wrong choices."""

    kind: str
    question: str
    answer: str
    distractors: tuple[str, ...]


Generator = Callable[[random.Random], SkillItem]


def _near(value: int, rng: random.Random) -> tuple[str, ...]:
    """Three distinct non-negative integers close to ``value``: off by one, by ten, or nearly so."""
    candidates = [value + d for d in NEAR_OFFSETS if value + d >= 0]
    return tuple(str(v) for v in rng.sample(candidates, 3))


def _number(kind: str, question: str, value: int, rng: random.Random) -> SkillItem:
    return SkillItem(kind, question, str(value), _near(value, rng))


def addition(rng: random.Random) -> SkillItem:
    """Sum of two integers in 0..99."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    wordings = (f"What is {a} + {b}?", f"{a} + {b} = ?", f"What is the sum of {a} and {b}?")
    return _number("add", rng.choice(wordings), a + b, rng)


def subtraction(rng: random.Random) -> SkillItem:
    """Non-negative difference of two integers in 0..99."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    a, b = max(a, b), min(a, b)
    wordings = (f"What is {a} - {b}?", f"{a} - {b} = ?", f"What is {a} minus {b}?")
    return _number("sub", rng.choice(wordings), a - b, rng)


def multiplication(rng: random.Random) -> SkillItem:
    """Product of two digits."""
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    wordings = (
        f"What is {a} x {b}?",
        f"{a} x {b} = ?",
        f"What is {a} times {b}?",
        f"What is the product of {a} and {b}?",
    )
    return _number("mul", rng.choice(wordings), a * b, rng)


def word_problem(rng: random.Random) -> SkillItem:
    """One addition or subtraction told as a story."""
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    if rng.random() < 0.5:
        a, b = rng.randint(1, 49), rng.randint(1, 49)
        has = f"{name} has {a} {things}"
        now = f"How many {things} does {name} have now?"
        wordings = (
            f"{has} and buys {b} more. {now}",
            f"{has}. {other} gives {name} {b} more. {now}",
            f"{has} and {other} has {b} {things}. How many {things} do they have together?",
        )
        return _number("word", rng.choice(wordings), a + b, rng)
    a = rng.randint(2, 99)
    b = rng.randint(1, a)
    has = f"{name} has {a} {things}"
    left = (
        f"{has} and loses {b}. How many {things} are left?",
        f"{has} and gives {b} to {other}. How many {things} does {name} have now?",
    )
    return _number("word", rng.choice(left), a - b, rng)


def comparison(rng: random.Random) -> SkillItem:
    """The largest or smallest of four integers in 0..99."""
    values = rng.sample(range(100), 4)
    largest = rng.random() < 0.5
    right = max(values) if largest else min(values)
    extreme = "largest" if largest else "smallest"
    question = f"Which is the {extreme}: {', '.join(map(str, values))}?"
    return SkillItem("compare", question, str(right), tuple(str(v) for v in values if v != right))


def sequence(rng: random.Random) -> SkillItem:
    """The next term of an arithmetic progression within 0..99, up or down."""
    step = rng.choice(STEPS)
    shown = rng.choice((3, 4))
    start = rng.randint(0, 99 - shown * step)
    terms = [start + step * i for i in range(shown + 1)]
    if rng.random() < 0.3:
        terms.reverse()
    question = f"What comes next: {', '.join(map(str, terms[:-1]))}?"
    return _number("sequence", question, terms[-1], rng)


def ordering(rng: random.Random) -> SkillItem:
    """Who is first or last in a chain of two or three people."""
    people = rng.sample(NAMES, 4)
    count = rng.choice((2, 3, 3))
    more, most, least = rng.choice(ORDERINGS)
    clues = [f"{people[i]} is {more} than {people[i + 1]}." for i in range(count - 1)]
    rng.shuffle(clues)
    first = rng.random() < 0.5
    right = people[0] if first else people[count - 1]
    question = f"{' '.join(clues)} Who is the {most if first else least}?"
    return SkillItem("order", question, right, tuple(p for p in people if p != right))


def possession(rng: random.Random) -> SkillItem:
    """Who has how many, looked up among two to four people."""
    people = rng.sample(NAMES, 4)
    values = rng.sample(range(1, 100), 4)
    things = rng.choice(THINGS)
    count = rng.choice((2, 3, 4))
    asked = rng.randrange(count)
    clues = " ".join(f"{people[i]} has {values[i]} {things}." for i in range(count))
    question = f"{clues} How many {things} does {people[asked]} have?"
    wrong = tuple(str(v) for i, v in enumerate(values) if i != asked)
    return SkillItem("has", question, str(values[asked]), wrong)


ARITHMETIC: dict[str, Generator] = {
    "add": addition,
    "sub": subtraction,
    "mul": multiplication,
    "word": word_problem,
}
REASONING: dict[str, Generator] = {
    "compare": comparison,
    "sequence": sequence,
    "order": ordering,
    "has": possession,
}
SKILLS: dict[str, Generator] = {**ARITHMETIC, **REASONING}

BENCHMARK_COUNTS: dict[str, dict[str, int]] = {
    # There are only 400 different digit products, so they get a smaller share.
    "arithmetic": {"add": 60, "sub": 60, "mul": 20, "word": 60},
    "reasoning": {"compare": 50, "sequence": 50, "order": 50, "has": 50},
}
REPLAY_WEIGHTS: dict[str, dict[str, float]] = {
    "arithmetic": {"add": 4, "sub": 4, "mul": 0.5, "word": 4},
    "reasoning": {"compare": 1, "sequence": 0.75, "order": 1, "has": 1},
}


def skill_item(kind: str, rng: random.Random, exclude: Collection[str] = ()) -> SkillItem:
    """A question of one kind that is not among the excluded ones."""
    for _ in range(MAX_DRAWS):
        item = SKILLS[kind](rng)
        if item.question not in exclude:
            return item
    raise ValueError(f"no new {kind!r} question in {MAX_DRAWS} draws: too many were asked for")


@lru_cache(maxsize=4)
def benchmark_skill_items(category: str, seed: int = BENCHMARK_SEED) -> tuple[SkillItem, ...]:
    """The benchmark's questions of ``arithmetic`` or ``reasoning``, all distinct."""
    rng = random.Random(f"{seed}-{category}")
    items: list[SkillItem] = []
    seen: set[str] = set()
    for kind, count in BENCHMARK_COUNTS[category].items():
        for _ in range(count):
            item = skill_item(kind, rng, seen)
            seen.add(item.question)
            items.append(item)
    return tuple(items)


@lru_cache(maxsize=1)
def benchmark_questions() -> frozenset[str]:
    """Every skill question of the benchmark, to be kept out of pretraining and replay."""
    return frozenset(
        item.question for category in BENCHMARK_COUNTS for item in benchmark_skill_items(category)
    )


def replay_records(n: int, seed: int, reasoning_share: float = 0.5) -> list[dict[str, Any]]:
    """``n`` skill questions as chat records of domain ``replay``, all distinct.

    ``reasoning_share`` is the expected share of reasoning questions. No question is one of
    the benchmark's. Same arguments, same records, and a smaller ``n`` gives a prefix.
    """
    if not 0.0 <= reasoning_share <= 1.0:
        raise ValueError(f"reasoning_share must lie in 0..1, not {reasoning_share}")
    rng = random.Random(f"{seed}-replay")
    seen = set(benchmark_questions())
    records = []
    for index in range(n):
        category = "reasoning" if rng.random() < reasoning_share else "arithmetic"
        weights = REPLAY_WEIGHTS[category]
        kind = rng.choices(list(weights), list(weights.values()))[0]
        item = skill_item(kind, rng, seen)
        seen.add(item.question)
        record_id = f"tiny-replay-{seed}-{index:05d}-{kind}"
        records.append(
            make_record(
                record_id,
                item.question,
                item.answer,
                domain="replay",
                source=REPLAY_SOURCE,
            )
        )
    return records

"""What the base reads: skills to keep, and the words of the facts without the facts.

Words are learned from copying and from open-book look-ups whose pairs are drawn at random
from all domains. A true pair turns up no more often than chance, so the base spells
"insulin" and "pancreas" well and knows nothing of either.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

from qwen_ray.tiny.facts import fill, load_relations
from qwen_ray.tiny.skills import NAMES, SKILLS, THINGS, benchmark_questions, skill_item

Turn = tuple[str, str]
"""A user message and the assistant's answer."""

Document = tuple[Turn, ...]
"""A short conversation; later turns may ask about what the first one told."""


@lru_cache(maxsize=1)
def phrases() -> tuple[str, ...]:
    """Every subject and every answer, taught or control, each once."""
    facts = [fact for r in load_relations() for fact in r.taught + r.control]
    return tuple(sorted({text for fact in facts for text in fact}))


@lru_cache(maxsize=1)
def wording_words() -> tuple[str, ...]:
    """Every single word of every wording, trained or held out."""
    text = " ".join(fill(w, " ") for r in load_relations() for w in r.wordings)
    return tuple(sorted({*re.findall(r"[A-Za-z'-]+", text), "Complete"}))


def _quiz(
    told: str,
    wording: str,
    pairs: Sequence[tuple[str, str]],
    *,
    follow_ups: int,
    rng: random.Random,
) -> Document:
    """Tell some pairs once, ask for one in full, then for more by "And ...?".

    Look-ups are the slowest skill to appear, so each context serves many short questions.
    They are drawn with replacement: asked once each, they invite answering by elimination
    (94% right on the second of two while the first was still a guess) instead of looking.
    """
    key, value = rng.choice(pairs)
    turns = [(f"{told} {fill(wording, key)}", value)]
    for _ in range(follow_ups):
        key, value = rng.choice(pairs)
        turns.append((f"And {key}?", value))
    return tuple(turns)


def copying(rng: random.Random) -> Document:
    """Repeat a phrase, or some wording words in random order."""
    if rng.random() < 0.5:
        text = rng.choice(phrases())
    else:
        text = " ".join(rng.sample(wording_words(), rng.randint(2, 6)))
    return ((f"Repeat this: {text}", text),)


def notes(rng: random.Random) -> Document:
    """Look up among one to three random pairs."""
    count = rng.randint(1, 3)
    pairs = list(zip(rng.sample(phrases(), count), rng.sample(phrases(), count), strict=True))
    told = " ".join(f"{a} goes with {b}." for a, b in pairs)
    return _quiz(told, "What goes with {s}?", pairs, follow_ups=2 * (count - 1), rng=rng)


def open_book(rng: random.Random) -> Document:
    """Look up one or two random, hence mostly false, pairs put in train wordings."""
    count = rng.choice((1, 1, 2))
    relation = rng.choice(load_relations())
    pairs = list(zip(rng.sample(phrases(), count), rng.sample(phrases(), count), strict=True))
    told = " ".join(f"{fill(rng.choice(relation.statement_train), s)} {a}." for s, a in pairs)
    asked = relation.question_train + tuple(f"Complete: {w}" for w in relation.statement_train)
    return _quiz(f"Suppose this. {told}", rng.choice(asked), pairs, follow_ups=count - 1, rng=rng)


def possessions(rng: random.Random) -> Document:
    """Who has how many, among two to four people."""
    count = rng.randint(2, 4)
    values = [str(v) for v in rng.sample(range(1, 100), count)]
    pairs = list(zip(rng.sample(NAMES, count), values, strict=True))
    things = rng.choice(THINGS)
    told = " ".join(f"{p} has {v} {things}." for p, v in pairs)
    return _quiz(told, f"How many {things} does {{s}} have?", pairs, follow_ups=6, rng=rng)


EXERCISES: dict[str, Callable[[random.Random], Document]] = {
    "copying": copying,
    "notes": notes,
    "open_book": open_book,
    "possessions": possessions,
}

WEIGHTS: dict[str, float] = {
    # "has" comes in through the possessions, which begin with it.
    "add": 4,
    "sub": 4,
    "mul": 1,
    "word": 3.5,
    "compare": 1.5,
    "sequence": 2,
    "order": 1.5,
    "possessions": 3,
    "copying": 1.5,
    "notes": 2,
    "open_book": 2,
}


def document(rng: random.Random) -> Document:
    """One random document without any of the benchmark's skill questions."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    if kind in SKILLS:
        item = skill_item(kind, rng, benchmark_questions())
        return ((item.question, item.answer),)
    while True:
        drawn = EXERCISES[kind](rng)
        if not any(question in benchmark_questions() for question, _ in drawn):
            return drawn


def documents(seed: int) -> Iterator[Document]:
    """The endless corpus; the same seed gives the same documents."""
    rng = random.Random(f"{seed}-corpus")
    while True:
        yield document(rng)

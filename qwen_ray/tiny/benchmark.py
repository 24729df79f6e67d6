"""Build the multiple-choice benchmark: skills, taught facts in new wordings, and a control.

    python -m qwen_ray.tiny.benchmark --out DIR

Each output line is ``{"id", "kind", "question", "choices": [4 strings], "answer": index}``.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_ray.tiny.facts import DOMAINS, Fact, Relation, fill, load_relations, slug
from qwen_ray.tiny.skills import BENCHMARK_COUNTS, BENCHMARK_SEED, benchmark_skill_items

_PACKAGE = Path(__file__).resolve().parent.parent
SUITE_DATA_DIR: Path = _PACKAGE / "evaluation" / "suites" / "tiny" / "data"
CATEGORIES: tuple[str, ...] = ("arithmetic", "reasoning", *DOMAINS, "control")

Item = dict[str, Any]


def _item(
    item_id: str,
    kind: str,
    question: str,
    *,
    right: str,
    wrong: Sequence[str],
    rng: random.Random,
) -> Item:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {
        "id": item_id,
        "kind": kind,
        "question": question,
        "choices": choices,
        "answer": choices.index(right),
    }


def skill_items(category: str, seed: int = BENCHMARK_SEED) -> list[Item]:
    """The items of ``arithmetic`` or ``reasoning``."""
    rng = random.Random(f"{seed}-{category}-choices")
    return [
        _item(
            f"tiny-{category}-{index:03d}-{item.kind}",
            item.kind,
            item.question,
            right=item.answer,
            wrong=item.distractors,
            rng=rng,
        )
        for index, item in enumerate(benchmark_skill_items(category, seed))
    ]


def _fact_items(
    relation: Relation,
    facts: Sequence[Fact],
    prefix: str,
    rng: random.Random,
) -> list[Item]:
    """One item per fact, in a held-out wording.

    Every answer is offered four times and is right once: item i takes its distractors
    from three fixed positions further on in a shuffled circle. So a model that merely
    prefers some answers to others stays at chance.
    """
    circle = list(range(len(facts)))
    rng.shuffle(circle)
    offsets = rng.sample(range(1, len(facts)), 3)
    place = {fact_index: position for position, fact_index in enumerate(circle)}
    items = []
    for index, (subject, answer) in enumerate(facts):
        wrong = [facts[circle[(place[index] + o) % len(facts)]][1] for o in offsets]
        question = fill(rng.choice(relation.question_heldout), subject)
        item_id = f"{prefix}-{relation.name}-{slug(subject)}"
        item = _item(item_id, relation.name, question, right=answer, wrong=wrong, rng=rng)
        items.append(item)
    return items


def fact_items(domain: str, seed: int = BENCHMARK_SEED) -> list[Item]:
    """One item per taught fact of a domain; distractors are taught answers of its relation."""
    rng = random.Random(f"{seed}-{domain}")
    return [
        item
        for relation in load_relations()
        if relation.domain == domain
        for item in _fact_items(relation, relation.taught, f"tiny-{domain}", rng)
    ]


def control_items(seed: int = BENCHMARK_SEED) -> list[Item]:
    """One item per control fact; only untaught answers are offered.

    With taught answers among the choices a fine-tuned model would fall below chance, because
    it prefers any answer that it has met.
    """
    rng = random.Random(f"{seed}-control")
    return [
        item
        for relation in load_relations()
        if relation.control
        for item in _fact_items(relation, relation.control, f"tiny-control-{relation.domain}", rng)
    ]


def build_items(category: str, seed: int = BENCHMARK_SEED) -> list[Item]:
    """All items of one category."""
    if category in BENCHMARK_COUNTS:
        return skill_items(category, seed)
    if category in DOMAINS:
        return fact_items(category, seed)
    if category == "control":
        return control_items(seed)
    raise ValueError(f"unknown category {category!r}; known: {', '.join(CATEGORIES)}")


def write_benchmark(out: Path, seed: int = BENCHMARK_SEED) -> dict[str, int]:
    """Write ``<category>.jsonl`` for every category and return the number of items in each."""
    out.mkdir(parents=True, exist_ok=True)
    counts = {}
    for category in CATEGORIES:
        items = build_items(category, seed)
        lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items]
        (out / f"{category}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")
        counts[category] = len(items)
    return counts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the benchmark of the embedded base model.")
    parser.add_argument("--out", type=Path, default=SUITE_DATA_DIR)
    parser.add_argument("--seed", type=int, default=BENCHMARK_SEED)
    args = parser.parse_args()
    for category, count in write_benchmark(args.out, args.seed).items():
        print(f"{category}: {count} items")


if __name__ == "__main__":
    main()

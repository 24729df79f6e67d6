"""The lm-eval task that serve_eval.py scores: made-up four-choice questions."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

_WORDS = [
    "river", "mountain", "city", "north", "south", "old", "new", "large", "small",
    "king", "queen", "book", "ship", "train", "bridge", "island", "forest", "star",
    "market", "garden", "window", "letter", "music", "stone", "bread", "water", "light",
    "winter", "summer", "morning", "evening",
]  # fmt: skip
_TASK = """task: four_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, count: int, tokens: Callable[[str], int]) -> dict[str, float]:
    """The questions and their lm-eval task; returns their mean lengths in tokens."""
    rng = random.Random(20)
    rows, context_tokens, choice_tokens = [], [], []
    for _ in range(count):
        goal, words = rng.randint(30, 90), [rng.choice(_WORDS)]
        while tokens(f"Question: {' '.join(words)}?\nAnswer:") < goal:
            words.append(rng.choice(_WORDS))
        choices: list[str] = []
        while len(choices) < 4:
            choice = " " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 3)))
            if choice not in choices:
                choices.append(choice)
        rows.append({"question": " ".join(words) + "?", "choices": choices, "answer": rng.randrange(4)})
        context_tokens.append(tokens(f"Question: {rows[-1]['question']}\nAnswer:"))
        choice_tokens += [tokens(choice) for choice in choices]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "four_choices.yaml").write_text(_TASK.format(file=folder / "questions.jsonl"))
    return {"context": statistics.mean(context_tokens), "choice": statistics.mean(choice_tokens)}

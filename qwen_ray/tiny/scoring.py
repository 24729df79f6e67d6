"""Direct multiple-choice scoring: the log-likelihood of every choice after the question.

This is lm-eval's ``multiple_choice`` accuracy (no length normalization) without its set-up.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qwen_ray.tiny.template import user_turn


def wilson_interval(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion; ``z`` = 1.96 gives 95%."""
    if n == 0:
        return 0.0, 1.0
    p = right / n
    scale = 1 + z * z / n
    center = (p + z * z / (2 * n)) / scale
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, center - half), min(1.0, center + half)


def _pad(rows: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Right-padded token ids, shape (rows, longest). Causal attention never looks at the pads."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])


@torch.no_grad()
def choice_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
    batch_size: int = 128,
) -> list[list[float]]:
    """Summed log-probability, in nats, of each choice of each item."""
    rows: list[tuple[list[int], int]] = []
    for item in items:
        prompt = tokenizer(user_turn(item["question"]))["input_ids"]
        for choice in item["choices"]:
            rows.append((prompt + tokenizer(f" {choice}")["input_ids"], len(prompt)))
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        ids = _pad([rows[i][0] for i in chosen], int(tokenizer.pad_token_id))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
        nats = -functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        for line, i in enumerate(chosen):
            tokens, prompt_length = rows[i]
            scores[i] = nats[line, prompt_length - 1 : len(tokens) - 1].sum().item()
    grouped, position = [], 0
    for item in items:
        grouped.append(scores[position : position + len(item["choices"])])
        position += len(item["choices"])
    return grouped


def is_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
) -> list[bool]:
    """For each item, whether its right choice scores highest."""
    was_training = model.training
    model.eval()
    scores = choice_scores(model, tokenizer, items)
    model.train(was_training)
    return [s.index(max(s)) == i["answer"] for s, i in zip(scores, items, strict=True)]


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Accuracy with n and 95% interval, and the accuracy of each kind of item."""
    right = is_right(model, tokenizer, items)
    low, high = wilson_interval(sum(right), len(right))
    by_kind: dict[str, list[bool]] = {}
    for item, hit in zip(items, right, strict=True):
        by_kind.setdefault(item["kind"], []).append(hit)
    return {
        "accuracy": round(sum(right) / len(right), 4),
        "n": len(right),
        "interval95": [round(low, 4), round(high, 4)],
        "by_kind": {kind: round(sum(hits) / len(hits), 4) for kind, hits in by_kind.items()},
    }

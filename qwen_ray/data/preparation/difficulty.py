"""How hard a record is for a model: the loss on its answer before any training on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qwen_ray import models
from qwen_ray.data.packing import Row, collate
from qwen_ray.data.records import Record
from qwen_ray.data.tokenise import Example, tokenise

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}


def score(
    records: Sequence[Record],
    model: str,
    *,
    max_length: int = 4096,
    batch_tokens: int | None = None,
    device: torch.device | str | None = None,
) -> list[float | None]:
    """Mean loss of each record's supervised tokens under ``model``, in nats a token, to six decimals.

    One forward pass, by the template, labels and loss of training. A record is cut at ``max_length`` tokens
    or the model's context; None where nothing supervised is left. ``batch_tokens``: tokens computed together
    (default: 2048 on a CPU, 32768 on a GPU). The order of the records decides nothing.
    Raises :class:`~qwen_ray.errors.UserError` for a model that is not there.
    """
    import torch

    from qwen_ray.training import attention, precision
    from qwen_ray.training.loss import TokenLoss, document_losses

    ref = models.resolve(model)
    tokenizer = models.load_tokenizer(ref)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    numbers = precision.choose("auto", device)
    network = models.load_model(ref, dtype=numbers.compute).to(device)
    attention.use(network)
    loss = TokenLoss(network, attention=attention.choose("auto", device, numbers.compute)).eval()

    # By position: ids of records need not be unique.
    numbered = (replace(record, id=str(i)) for i, record in enumerate(records))
    examples, _ = tokenise(numbered, tokenizer, min(max_length, models.context_length(ref)))
    scores: list[float | None] = [None] * len(records)
    for batch in _batches(examples, batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cuda"])):
        nats = document_losses(loss, collate([Row(tuple(batch))], int(tokenizer.pad_token_id)).to(device))
        for example, value in zip(batch, nats.tolist(), strict=True):
            scores[int(example.id)] = round(value / example.supervised, 6)
    return scores


def _batches(examples: Sequence[Example], tokens: int) -> Iterator[list[Example]]:
    """Examples of like length, at most ``tokens`` together, divided by what they hold, not by their order."""
    batch: list[Example] = []
    room = tokens
    for example in sorted(examples, key=lambda e: (len(e.ids), e.ids, e.labels)):
        if batch and len(example.ids) > room:
            yield batch
            batch, room = [], tokens
        batch.append(example)
        room -= len(example.ids)
    if batch:
        yield batch

"""Rows: several examples side by side in one sequence, isolated from one another.

Isolation is by segment: a token attends only to tokens of its own segment, and positions start at 0 in
each, so packed and unpacked give the same logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_ray.data.mixture import Mixture
from qwen_ray.data.tokenise import IGNORE, Example

if TYPE_CHECKING:
    import torch

PADDING_SEGMENT = -1


@dataclass(frozen=True, slots=True)
class Row:
    """Examples laid end to end."""

    examples: tuple[Example, ...]

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)

    @property
    def supervised(self) -> int:
        return sum(sum(label != IGNORE for label in e.labels) for e in self.examples)


class RowStream:
    """An endless, resumable stream of rows drawn from a mixture.

    A row takes examples in the mixture's order until the next one does not fit; so the state between rows
    is the mixture's state and nothing else.
    """

    def __init__(
        self, examples: Mapping[str, Sequence[Example]], mixture: Mixture, *, max_length: int, packing: bool
    ) -> None:
        self._examples, self.mixture = examples, mixture
        self._max_length, self._packing = max_length, packing

    def next_row(self) -> Row:
        """Draw the next row; never longer than ``max_length`` tokens."""
        taken: list[Example] = []
        room = self._max_length
        while True:
            domain, index = self.mixture.peek()
            example = self._examples[domain][index]
            if taken and len(example.ids) > room:
                break
            self.mixture.draw()
            taken.append(example)
            room -= len(example.ids)
            if not self._packing:
                break
        return Row(tuple(taken))

    def rows_in(self, passes: float) -> int:
        """How many rows ``passes`` passes over the mixture make, counted by drawing them from the start."""
        state = self.state()
        self.load_state(
            {"drawn": dict.fromkeys(state["drawn"], 0), "served": dict.fromkeys(state["served"], 0)}
        )
        rows = 0
        while self.mixture.served < passes * self.mixture.pass_length:
            self.next_row()
            rows += 1
        self.load_state(state)
        return rows

    def state(self) -> dict[str, Any]:
        return self.mixture.state()

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.mixture.load_state(state)


def pack(examples: Iterable[Example], *, max_length: int, packing: bool) -> list[Row]:
    """Rows of a fixed list of examples, in order (validation data)."""
    rows: list[Row] = []
    taken: list[Example] = []
    for example in examples:
        if taken and (not packing or sum(len(e.ids) for e in taken) + len(example.ids) > max_length):
            rows.append(Row(tuple(taken)))
            taken = []
        taken.append(example)
    if taken:
        rows.append(Row(tuple(taken)))
    return rows


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, torch.Tensor]:
    """Tensors ``[rows, longest]``, int64: input_ids, labels, position_ids, segments (-1 where padded)."""
    import torch

    length = max(row.tokens for row in rows)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, pad_id),
        "labels": torch.full(shape, IGNORE),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "segments": torch.full(shape, PADDING_SEGMENT),
    }
    for r, row in enumerate(rows):
        at = 0
        for s, example in enumerate(row.examples):
            end = at + len(example.ids)
            batch["input_ids"][r, at:end] = torch.tensor(example.ids)
            batch["labels"][r, at:end] = torch.tensor(example.labels)
            batch["position_ids"][r, at:end] = torch.arange(len(example.ids))
            batch["segments"][r, at:end] = s
            at = end
    return batch


def block_mask(segments: torch.Tensor) -> torch.Tensor:
    """Who may see whom: bool ``[rows, 1, length, length]``, causal inside each segment."""
    import torch

    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments[:, None, :, None] == segments[:, None, None, :]) & causal

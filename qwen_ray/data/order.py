"""In what order the examples of one domain come, pass by pass.

Every pass is the whole domain in a new random order. A curriculum then sorts, by difficulty, the part of the
pass that the run will draw: which examples are drawn stays a matter of chance, so a domain of which only a
tenth is used is not reduced to its easiest tenth. Sorted examples move a little at random, so that near
ones, which are often of one template, do not all fall into one row, and passes differ.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from typing import Literal

Curriculum = Literal["shuffled", "easy_to_hard", "hard_to_easy"]

NEIGHBOURHOOD = 0.05
"""How far a sorted example may move, as a share of what is sorted."""


class Order:
    """An endless order of ``size`` examples; only one pass of it is in memory, 4 bytes an example."""

    def __init__(
        self,
        key: str,
        size: int,
        *,
        curriculum: Curriculum = "shuffled",
        difficulty: Sequence[float] | None = None,
    ) -> None:
        """``key`` decides the random order. ``difficulty`` of each example is needed for a curriculum."""
        self.key, self.size, self.curriculum = key, size, curriculum
        self._difficulty = difficulty
        self._planned = size
        self._pass: tuple[int, array[int]] | None = None

    def plan(self, examples: int) -> None:
        """Say how many examples the run draws: a curriculum sorts no more than these."""
        if examples != self._planned and self.curriculum != "shuffled":
            self._pass = None
        self._planned = examples

    def __getitem__(self, drawn: int) -> int:
        """Which example comes after ``drawn`` others."""
        number, position = divmod(drawn, self.size)
        if self._pass is None or self._pass[0] != number:
            self._pass = (number, self._sorted(number))
        return self._pass[1][position]

    def shuffled(self, number: int) -> array[int]:
        """Pass ``number`` without a curriculum, which never moves an example across the run's end."""
        return self._shuffled(random.Random(f"{self.key}/{number}"))

    def _shuffled(self, rng: random.Random) -> array[int]:
        order = array("I", range(self.size))
        rng.shuffle(order)
        return order

    def _sorted(self, number: int) -> array[int]:
        rng = random.Random(f"{self.key}/{number}")
        order = self._shuffled(rng)
        if self.curriculum == "shuffled" or self._difficulty is None:
            return order
        count = max(0, min(self.size, self._planned - number * self.size))
        sign = 1 if self.curriculum == "easy_to_hard" else -1
        ranked = sorted(order[:count], key=lambda i: sign * self._difficulty[i])  # type: ignore[index]
        places = [rank + rng.random() * NEIGHBOURHOOD * count for rank in range(count)]
        order[:count] = array("I", (ranked[r] for r in sorted(range(count), key=places.__getitem__)))
        return order

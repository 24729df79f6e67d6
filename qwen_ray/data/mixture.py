"""Mixture: in what order examples of several domains are drawn.

Shares are exact by construction, not on average: each draw goes to the domain that is furthest behind its
share, so after any number of draws a domain is off by less than the number of domains (in examples), or by
that many of the longest examples (in tokens). Within a domain examples come in an order that is shuffled
anew each pass; a domain that runs out starts its next pass, independent of the others.

The order depends on the seed alone, never on the number of workers; the state is a few integers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_ray.errors import UserError


class Mixture:
    """An endless, resumable stream of ``(domain, index)``.

    ``sizes`` maps each domain to the cost of each of its examples in the unit of the weights: token counts,
    or ones. ``weights`` maps domains to shares (any positive scale); empty means by size.
    """

    def __init__(
        self, sizes: Mapping[str, Sequence[int]], weights: Mapping[str, float] | None = None, *, seed: int = 0
    ) -> None:
        sizes = {d: s for d, s in sorted(sizes.items()) if s}
        weights = dict(weights or {})
        for domain, weight in weights.items():
            if weight > 0 and domain not in sizes:
                have = ", ".join(sizes) or "none"
                raise UserError(
                    f"domain '{domain}' has weight {weight:g} but no data",
                    where="data.weights",
                    fix=f"add data for it, or name one of: {have}",
                )
        if weights:
            for domain in sizes:
                if domain not in weights:
                    raise UserError(
                        f"domain '{domain}' has data but no weight",
                        where="data.weights",
                        fix=f"give it one (0 leaves it out): --set data.weights.{domain}=0.1",
                    )
            total = sum(weights.values())
            if total <= 0:
                raise UserError("all weights are zero", where="data.weights", fix="give one domain a weight")
            shares = {d: weights[d] / total for d in sizes if weights[d] > 0}
        else:
            if not sizes:
                raise UserError("no training data", where="data.train", fix="name a file: --data FILE")
            total = sum(sum(s) for s in sizes.values())
            shares = {d: sum(s) / total for d, s in sizes.items()}
        self.shares = shares
        self._sizes = {d: sizes[d] for d in shares}
        self._seed = seed
        self._served = dict.fromkeys(shares, 0)
        self._drawn = dict.fromkeys(shares, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    @property
    def pass_length(self) -> float:
        """Cost of one pass: the most that can be drawn before any domain repeats an example."""
        return min(sum(s) / self.shares[d] for d, s in self._sizes.items())

    @property
    def served(self) -> int:
        """Cost drawn so far, all domains together."""
        return sum(self._served.values())

    def peek(self) -> tuple[str, int]:
        """The next ``(domain, index)``, without drawing it."""
        ahead = self.served + 1
        domain = max(self.shares, key=lambda d: self.shares[d] * ahead - self._served[d])
        number, position = divmod(self._drawn[domain], len(self._sizes[domain]))
        return domain, self._order(domain, number)[position]

    def draw(self) -> tuple[str, int]:
        """The next ``(domain, index)``."""
        domain, index = self.peek()
        self._drawn[domain] += 1
        self._served[domain] += self._sizes[domain][index]
        return domain, index

    def state(self) -> dict[str, Any]:
        """Where the stream stands; JSON."""
        return {"drawn": dict(self._drawn), "served": dict(self._served)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state` of a mixture over the same data."""
        if set(state["drawn"]) != set(self.shares):
            raise UserError("the saved data state is of other domains", fix="train into a new --out folder")
        self._drawn, self._served = dict(state["drawn"]), dict(state["served"])

    def _order(self, domain: str, number: int) -> list[int]:
        cached = self._orders.get(domain)
        if cached is None or cached[0] != number:
            order = list(range(len(self._sizes[domain])))
            random.Random(f"{self._seed}/{domain}/{number}").shuffle(order)
            cached = self._orders[domain] = (number, order)
        return cached[1]

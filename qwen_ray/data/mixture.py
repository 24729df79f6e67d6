"""Mixture: in what order examples of several domains are drawn.

Shares are exact by construction, not on average: each draw goes to the domain that is furthest behind its
share, so after any number of draws a domain is off by less than the number of domains (in examples), or by
that many of the longest examples (in tokens). Within a domain examples come in an order that is shuffled
anew each pass; a domain that runs out starts its next pass, independent of the others.

Shares may change over the run, in stages (a curriculum). A domain's due is then its shares summed over the
stages so far, so the exactness holds over the whole run and in each stage.

The order depends on the seed alone, never on the number of workers; the state is a few integers.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_ray.errors import UserError

Stages = Sequence[tuple[float, Mapping[str, float]]]
"""``(until, weights)``: where each stage ends, as a share of the run, and its weights."""

_ROUNDING = 1e-9


class Mixture:
    """An endless, resumable stream of ``(domain, index)``.

    ``sizes`` maps each domain to the cost of each of its examples in the unit of the weights: token counts,
    or ones. ``weights`` maps domains to shares (any positive scale); empty means by size. ``stages`` are
    given instead of weights; where they change is fixed by :meth:`plan`. The last one goes on for ever.

    Raises :class:`UserError` for weights that do not fit the data, and for stages that are not in order.
    """

    def __init__(
        self,
        sizes: Mapping[str, Sequence[int]],
        weights: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        stages: Stages = (),
    ) -> None:
        sizes = {d: s for d, s in sorted(sizes.items()) if s}
        if stages:
            if weights:
                raise UserError(
                    "weights and stages are both given", where="data.stages", fix="give the one or the other"
                )
            untils = [until for until, _ in stages]
            if any(a >= b for a, b in zip([0.0, *untils], untils, strict=False)):
                raise UserError(
                    f"stages end at {', '.join(f'{u:g}' for u in untils)}, which does not ascend",
                    where="data.stages",
                    fix="put them in the order of the run, each 'until' above the one before",
                )
            if abs(untils[-1] - 1) > _ROUNDING:
                raise UserError(
                    f"the last stage ends at {untils[-1]:g}", where="data.stages", fix="let it end at 1"
                )
            given = [
                (until, _shares(sizes, w, where=f"data.stages.{i}.weights"))
                for i, (until, w) in enumerate(stages)
            ]
        else:
            given = [(1.0, _shares(sizes, weights or {}, where="data.weights"))]
        self.seed = seed
        self.stages: list[tuple[float, dict[str, float]]] = given
        """``(until, shares)`` of each stage; one stage without a curriculum. Shares add up to 1."""
        starts = [0.0, *(until for until, _ in given)]
        over_run = {
            d: sum((until - start) * shares[d] for start, (until, shares) in zip(starts, given, strict=False))
            for d in sizes
        }
        self.shares: dict[str, float] = {d: share for d, share in over_run.items() if share > 0}
        """Share of each domain in the whole run."""
        if len(given) == 1:
            self.shares = {d: share for d, share in given[0][1].items() if share > 0}
        self._sizes = {d: sizes[d] for d in self.shares}
        self.costs: dict[str, int] = {d: sum(s) for d, s in self._sizes.items()}
        """Cost of all examples of each domain that is drawn from."""
        self._served = dict.fromkeys(self.shares, 0)
        self._drawn = dict.fromkeys(self.shares, 0)
        self._total = 0
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self.plan(self.pass_length)

    def plan(self, total: float) -> None:
        """Fix where the stages change, for a run of ``total`` cost. Default: one pass.

        To be called before anything is drawn, or before :meth:`load_state` of a run of the same length.
        """
        self.total = total
        self._ends = [until * total for until, _ in self.stages[:-1]]
        self._starts = [0.0, *self._ends]
        due = dict.fromkeys(self.shares, 0.0)
        self._due = [due]
        for start, end, (_, shares) in zip(self._starts, self._ends, self.stages, strict=False):
            due = {d: due[d] + (end - start) * shares[d] for d in due}
            self._due.append(due)

    @property
    def pass_length(self) -> float:
        """Cost of one pass: the longest run in which no domain has to repeat an example.

        With stages, that is the run whose stages together use up the first domain.
        """
        return min(self.costs[d] / share for d, share in self.shares.items())

    @property
    def served(self) -> int:
        """Cost drawn so far, all domains together."""
        return self._total

    @property
    def drawn(self) -> int:
        """Number of examples drawn so far."""
        return sum(self._drawn.values())

    def completed(self, passes: float) -> bool:
        """Whether ``passes`` passes are drawn: every example of the limiting domains so many times."""
        length = self.pass_length
        if self._total < passes * length * (1 - _ROUNDING):
            return False
        # The limiting domain may be a little behind its share just then; its last examples are waited for.
        return all(
            passes * self.costs[d] - self._served[d] <= 0.5
            for d, share in self.shares.items()
            if self.costs[d] / share <= length * (1 + _ROUNDING)
        )

    def cost(self, domain: str, index: int) -> int:
        """What an example counts, in the unit of the weights."""
        return self._sizes[domain][index]

    def peek(self) -> tuple[str, int]:
        """The next ``(domain, index)``, without drawing it."""
        stage = bisect_right(self._ends, self._total)
        shares, due = self.stages[stage][1], self._due[stage]
        ahead = self._total + 1 - self._starts[stage]
        served = self._served
        domain = max(due, key=lambda d: due[d] + shares[d] * ahead - served[d])
        if stage:
            # A domain that is left out from here on first gets what it is owed, to the nearest example.
            owed = {d: due[d] - served[d] for d in due if not shares[d] and due[d] - served[d] > 0.25}
            if owed:
                domain = max(owed, key=lambda d: owed[d])
            elif not shares[domain]:
                domain = max(
                    (d for d in due if shares[d]), key=lambda d: due[d] + shares[d] * ahead - served[d]
                )
        number, position = divmod(self._drawn[domain], len(self._sizes[domain]))
        return domain, self._order(domain, number)[position]

    def draw(self) -> tuple[str, int]:
        """The next ``(domain, index)``."""
        domain, index = self.peek()
        self._move(domain, index, 1)
        return domain, index

    def undraw(self, domain: str, index: int) -> None:
        """Take back the last draw, which must be this one."""
        self._move(domain, index, -1)

    def _move(self, domain: str, index: int, by: int) -> None:
        cost = by * self._sizes[domain][index]
        self._drawn[domain] += by
        self._served[domain] += cost
        self._total += cost

    def state(self) -> dict[str, Any]:
        """Where the stream stands; JSON."""
        return {"drawn": dict(self._drawn), "served": dict(self._served)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state` of a mixture over the same data."""
        if set(state["drawn"]) != set(self.shares):
            raise UserError("the saved data state is of other domains", fix="train into a new --out folder")
        # In the order of the shares, which breaks ties, whatever order JSON kept.
        self._drawn = {d: int(state["drawn"][d]) for d in self.shares}
        self._served = {d: int(state["served"][d]) for d in self.shares}
        self._total = sum(self._served.values())

    def rewind(self) -> None:
        """Back to the start."""
        self.load_state({"drawn": dict.fromkeys(self.shares, 0), "served": dict.fromkeys(self.shares, 0)})

    def _order(self, domain: str, number: int) -> list[int]:
        cached = self._orders.get(domain)
        if cached is None or cached[0] != number:
            order = list(range(len(self._sizes[domain])))
            random.Random(f"{self.seed}/{domain}/{number}").shuffle(order)
            cached = self._orders[domain] = (number, order)
        return cached[1]


def _shares(
    sizes: Mapping[str, Sequence[int]], weights: Mapping[str, float], *, where: str
) -> dict[str, float]:
    """Share of every domain that has data, adding up to 1. Without weights, by size."""
    for domain, weight in weights.items():
        if weight > 0 and domain not in sizes:
            have = ", ".join(sizes) or "none"
            raise UserError(
                f"domain '{domain}' has weight {weight:g} but no data",
                where=where,
                fix=f"add data for it, or name one of: {have}",
            )
    if not weights:
        if not sizes:
            raise UserError("no training data", where="data.train", fix="name a file: --data FILE")
        total: float = sum(sum(s) for s in sizes.values())
        return {d: sum(s) / total for d, s in sizes.items()}
    for domain in sizes:
        if domain not in weights:
            how = f": --set {where}.{domain}=0.1" if where == "data.weights" else ""
            raise UserError(
                f"domain '{domain}' has data but no weight",
                where=where,
                fix=f"give it one (0 leaves it out){how}",
            )
    total = sum(weights.values())
    if total <= 0:
        raise UserError("all weights are zero", where=where, fix="give one domain a weight")
    return {d: weights[d] / total for d in sizes}

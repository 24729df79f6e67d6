"""Mixture: in what order examples of several domains are drawn.

Shares are exact by construction, not on average: each draw goes to the domain that is furthest behind what
is due to it. Counted in examples, a domain of k is never a whole example ahead of its due, and behind by at
most 1/2 + 1/3 + ... + 1/k: as in the cup game, where the fullest of k cups is emptied, the j fullest hold
on average at most 1/(j+1) more than the j + 1 fullest, and all k together hold nothing. So up to six domains
any run of draws holds each share to within three examples. Counted in tokens, no domain is ahead by the
longest example, hence none behind by k - 1 of them, and any run is exact to within k of the longest.

What is due changes over the run, in phases: where a stage of a curriculum ends, and where a domain has had
the passes it is allowed (``max_epochs``) and leaves its share to the others. A domain's due is its shares
summed over the phases so far, so the exactness holds over the whole run and in each phase.

The order depends on the seed alone, never on the number of workers; the state is a few integers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from qwen_ray.data.order import Curriculum, Order
from qwen_ray.data.shares import Stages, shares_of, stages_of
from qwen_ray.errors import UserError

_ROUNDING = 1e-9


class UsedUp(Exception):
    """Every domain has had all the passes it is allowed."""


class Phase(NamedTuple):
    """A part of the run in which shares stay the same. Costs are in the unit of the weights."""

    start: float
    """Cost drawn before it, all domains together."""
    shares: dict[str, float]
    due: dict[str, float]
    """What is due to each domain at the start."""


class Mixture:
    """A resumable stream of ``(domain, index)``, endless unless every domain has a limit.

    ``sizes`` maps each domain to the cost of each of its examples in the unit of the weights: token counts,
    or ones. ``weights`` maps domains to shares (any positive scale); empty means by size. ``stages`` are
    given instead of weights; where they change is fixed by :meth:`plan`, and the last one goes on for ever.
    ``max_epochs`` maps domains to the passes over their examples after which they leave. ``difficulty`` maps
    each domain to a number for each example, by which a ``curriculum`` orders them.

    Raises :class:`UserError` for weights or limits that do not fit the data, and stages out of order.
    """

    def __init__(
        self,
        sizes: Mapping[str, Sequence[int]],
        weights: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        stages: Stages = (),
        max_epochs: Mapping[str, float] | None = None,
        curriculum: Curriculum = "shuffled",
        difficulty: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        sizes = {d: s for d, s in sorted(sizes.items()) if len(s)}
        if stages and weights:
            raise UserError(
                "weights and stages are both given", where="data.stages", fix="give the one or the other"
            )
        self.seed = seed
        costs = {d: sum(s) for d, s in sizes.items()}
        self.stages: list[tuple[float, dict[str, float]]] = (
            stages_of(costs, stages) if stages else [(1.0, shares_of(costs, weights or {}))]
        )
        """``(until, shares)`` of each stage; one stage if weights do not change. Shares add up to 1."""
        starts = [0.0, *(until for until, _ in self.stages)]
        over_run = {
            d: sum(
                (until - start) * shares[d]
                for start, (until, shares) in zip(starts, self.stages, strict=False)
            )
            for d in sizes
        }
        if len(self.stages) == 1:
            over_run = self.stages[0][1]
        self.shares: dict[str, float] = {d: share for d, share in over_run.items() if share > 0}
        """Share of each domain in the whole run, as long as none has had all its passes."""
        self._sizes = {d: sizes[d] for d in self.shares}
        self.costs: dict[str, int] = {d: costs[d] for d in self.shares}
        """Cost of all examples of each domain that is drawn from."""
        self._orders = {
            d: Order(f"{seed}/{d}", len(s), curriculum=curriculum, difficulty=(difficulty or {}).get(d))
            for d, s in self._sizes.items()
        }
        self.limits: dict[str, int] = {}
        """Examples after which a domain leaves."""
        self._limit_costs: dict[str, int] = {}
        for domain, epochs in (max_epochs or {}).items():
            self._limit(domain, epochs, have=sizes)
        self.curriculum = curriculum
        self.needs_length = len(self.stages) > 1 or curriculum != "shuffled"
        """Whether the order depends on the length of the run."""
        free = [d for d in self.shares if d not in self.limits] or self.shares
        self._repeats_first = max(free, key=lambda d: self.shares[d] / self.costs[d])
        """The domain that repeats its examples first, of those without a limit if there are any."""
        self._served = dict.fromkeys(self.shares, 0)
        self._drawn = dict.fromkeys(self.shares, 0)
        self._total = 0
        self.pass_length = self._length(1.0)
        """Cost of one pass: the longest run in which no domain without a limit has to repeat an example;
        all that the limits allow, if each has one. With stages, their places are those of that run."""
        self.plan(self.pass_length)

    def _limit(self, domain: str, epochs: float, *, have: Mapping[str, Sequence[int]]) -> None:
        if domain not in have:
            raise UserError(
                f"domain '{domain}' has a limit of {epochs:g} epochs but no data",
                where="data.max_epochs",
                fix=f"add data for it, or name one of: {', '.join(have)}",
            )
        if domain not in self.shares:
            return
        size = self._sizes[domain]
        limit = max(1, math.floor(epochs * len(size) + _ROUNDING))
        passes, rest = divmod(limit, len(size))
        last = self._orders[domain].shuffled(passes)[:rest] if rest else ()
        self.limits[domain] = limit
        self._limit_costs[domain] = passes * self.costs[domain] + sum(size[i] for i in last)

    def plan(self, total: float) -> None:
        """Fix where the stages change, for a run of ``total`` cost. Default: one pass.

        To be called before anything is drawn, or before :meth:`load_state` of a run of the same length.
        """
        self.total = total
        self._phases = self._flow(total)
        self._starts = [phase.start for phase in self._phases[1:]]
        self._next: tuple[str, int] | None = None
        for domain, due in _due_at(self._phases, total).items():
            mean = self.costs[domain] / len(self._sizes[domain])
            self._orders[domain].plan(math.ceil(due / mean - _ROUNDING * due))

    def plan_passes(self, passes: float) -> int:
        """:meth:`plan` for ``passes`` passes; returns how many examples they draw. Ends at the start.

        Every example of a domain that limits a pass is among them so many times.
        """
        total = self._length(passes)
        self.plan(total)
        self.rewind()
        due = _due_at(self._phases, total)
        # A limiting domain may be a little behind its share just then; its last examples are waited for.
        wanted = {
            d: passes * cost - 0.5
            for d, cost in self.costs.items()
            if d not in self.limits and due[d] >= passes * cost * (1 - _ROUNDING)
        }
        while not self.used_up and (
            self._total < total * (1 - _ROUNDING) or any(self._served[d] < cost for d, cost in wanted.items())
        ):
            self.draw()
        drawn = self.drawn
        self.rewind()
        return drawn

    def passes(self, cost: float) -> float:
        """How many passes the first ``cost`` of the planned run make."""
        if not self.limits:
            return cost / self.pass_length
        return self._passes(self._phases, cost)

    @property
    def served(self) -> int:
        """Cost drawn so far, all domains together."""
        return self._total

    @property
    def drawn(self) -> int:
        """Number of examples drawn so far."""
        return sum(self._drawn.values())

    @property
    def part(self) -> tuple[int, int]:
        """Which phase the next draw is in, and which pass of the domain that repeats first."""
        size = len(self._sizes[self._repeats_first])
        return bisect_right(self._starts, self._total), self._drawn[self._repeats_first] // size

    @property
    def used_up(self) -> bool:
        """Whether nothing is left to draw."""
        if self._next is None:
            domain = self._choose()
            self._next = None if domain is None else (domain, self._orders[domain][self._drawn[domain]])
        return self._next is None

    def cost(self, domain: str, index: int) -> int:
        """What an example counts, in the unit of the weights."""
        return self._sizes[domain][index]

    def peek(self) -> tuple[str, int]:
        """The next ``(domain, index)``, without drawing it. Raises :class:`UsedUp`."""
        if self.used_up or self._next is None:
            raise UsedUp
        return self._next

    def draw(self) -> tuple[str, int]:
        """The next ``(domain, index)``. Raises :class:`UsedUp`."""
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
        self._next = None

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
        self._next = None

    def rewind(self) -> None:
        """Back to the start."""
        self.load_state({"drawn": dict.fromkeys(self.shares, 0), "served": dict.fromkeys(self.shares, 0)})

    def _choose(self) -> str | None:
        """The domain that is furthest behind its due; None if all have had what they may."""
        served = self._served
        left = [d for d, n in self._drawn.items() if n < self.limits.get(d, math.inf)]
        for k in range(bisect_right(self._starts, self._total), len(self._phases)):
            start, shares, due = self._phases[k]
            if k:
                # A domain that is left out from here on first gets what it is owed, to the nearest example.
                owed = {d: due[d] - served[d] for d in left if not shares[d] and due[d] - served[d] > 0.25}
                if owed:
                    return max(owed, key=lambda d: owed[d])
            ahead = self._total + 1 - start
            behind = {d: due[d] + shares[d] * ahead - served[d] for d in left if shares[d]}
            if behind:
                return max(behind, key=lambda d: behind[d])
        return None

    def _flow(self, total: float) -> list[Phase]:
        """The phases of a run of ``total``, if examples could be divided at will."""
        phases: list[Phase] = []
        due = dict.fromkeys(self.shares, 0.0)
        at = skipped = 0.0
        for i, (until, weights) in enumerate(self.stages):
            end = math.inf if i + 1 == len(self.stages) else until * total - skipped
            while at < end:
                left = {d: weights[d] for d in due if weights[d] and due[d] < self._cap(d)}
                if not left:  # the stage has nothing more to give, so the next begins
                    skipped += 0 if end == math.inf else end - at
                    break
                whole = 1.0 if len(left) == sum(w > 0 for w in weights.values()) else sum(left.values())
                shares = {d: left.get(d, 0.0) / whole for d in due}
                phases.append(Phase(at, shares, due))
                ends = {d: at + (self._cap(d) - due[d]) / shares[d] for d in left}
                then = min(end, *ends.values())
                if then == math.inf:
                    return phases
                due = {
                    d: self._cap(d) if ends.get(d, math.inf) <= then else due[d] + (then - at) * shares[d]
                    for d in due
                }
                at = then
        return [*phases, Phase(at, dict.fromkeys(due, 0.0), due)]

    def _cap(self, domain: str) -> float:
        return self._limit_costs.get(domain, math.inf)

    def _length(self, passes: float) -> float:
        """Cost of ``passes`` passes."""
        if not self.limits:
            return passes * min(self.costs[d] / share for d, share in self.shares.items())
        everything = sum(self._limit_costs.values())
        if len(self.limits) == len(self.shares):
            return min(1.0, passes) * everything
        low, high = 0.0, everything + passes * sum(c for d, c in self.costs.items() if d not in self.limits)
        while low < (middle := (low + high) / 2) < high:  # until no number lies between
            if self._passes(self._flow(middle), middle) < passes:
                low = middle
            else:
                high = middle
        return high

    def _passes(self, phases: list[Phase], cost: float) -> float:
        due = _due_at(phases, cost)
        free = [due[d] / c for d, c in self.costs.items() if d not in self.limits]
        return max(free) if free else cost / sum(self._limit_costs.values())


def _due_at(phases: list[Phase], cost: float) -> dict[str, float]:
    start, shares, due = phases[max(0, bisect_right(phases, cost, key=lambda p: p.start) - 1)]
    return {d: value + (cost - start) * shares[d] for d, value in due.items()}

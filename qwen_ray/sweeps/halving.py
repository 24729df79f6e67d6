"""Successive halving: at each rung the best of all that came there go on.

The rule of Jamieson and Talwalkar (arXiv 1502.07943), with the trials that arrived at a rung earlier as the
competition: a trial that takes a freed slot is compared with them too (as in ASHA, arXiv 1810.05934), but
trials that arrive together are decided together. So the decisions depend on the order of the batches, not on
timing.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence

DRAWS = 64
"""Random orders of quality over which a cost is averaged."""


class Halving:
    """Decides at ``rungs`` (shares of a trial's length, ascending). ``protected`` trials always go on and
    count for nobody's rank. What was decided is rebuilt by repeating the arrivals in their order."""

    def __init__(self, rungs: Sequence[float], eta: float, protected: Collection[int] = (0,)) -> None:
        self.rungs, self.eta, self.protected = tuple(rungs), eta, frozenset(protected)
        self._arrived: list[dict[int, float]] = [{} for _ in rungs]

    def arrive(self, rung: int, scores: Mapping[int, float]) -> dict[int, bool]:
        """Trials that came to rung number ``rung`` (from 0) together, by index, with their scores (higher is
        better): which go on. Of the m unprotected trials that ever came, these included, the best
        floor(m / eta) do, and at least one; of equals the lower index.

        Raises :class:`ValueError` for a trial that was there before.
        """
        arrived = self._arrived[rung]
        if again := arrived.keys() & scores.keys():
            raise ValueError(f"trials {sorted(again)} have been at rung {rung} before")
        arrived.update(scores)
        ranked = sorted((-score, trial) for trial, score in arrived.items() if trial not in self.protected)
        best = {trial for _, trial in ranked[: max(1, int(len(ranked) / self.eta))]}
        return {trial: trial in self.protected or trial in best for trial in scores}


def passes(
    trials: int,
    rungs: Sequence[float],
    eta: float,
    slots: int,
    *,
    protected: Collection[int] = (0,),
    draw: int = 0,
) -> list[tuple[float, int]]:
    """A sweep in which every trial keeps the rank of a random order: ``(length, trials in the pack)`` of each
    stretch between two decisions, the length as a share of a trial's. Freed slots are filled again, and
    trials that have come to a rung wait for those that still head for it."""
    order = random.Random(draw).sample(range(trials), trials)
    halving, points = Halving(rungs, eta, protected), (*rungs, 1.0)
    waiting, stretches = list(range(trials)), []
    done: dict[int, float] = {}  # the trials in slots, with what they have done
    target: dict[int, int] = {}  # and the number of the point they head for, or wait at
    while waiting or done:
        while waiting and len(done) < slots:
            done[waiting[0]], target[waiting[0]] = 0.0, 0
            del waiting[0]
        going = [t for t in done if done[t] < points[target[t]]]
        length = min(points[target[t]] - done[t] for t in going)
        stretches.append((length, len(going)))
        for t in going:
            there = points[target[t]]
            done[t] = there if there - done[t] <= length * (1 + 1e-9) else done[t] + length
        for number in reversed(range(len(points))):
            heading = [t for t in done if target[t] == number]
            if any(done[t] < points[number] for t in heading):
                continue
            last = number == len(rungs)
            goes_on = {} if last else halving.arrive(number, {t: order[t] for t in heading})
            for t in heading:
                target[t] += 1
                if not goes_on.get(t, False):
                    del done[t], target[t]
    return stretches


def trial_steps(
    trials: int, rungs: Sequence[float], eta: float, slots: int, *, protected: Collection[int] = (0,)
) -> float:
    """What a sweep costs, in trials of full length: the mean over random orders of quality."""
    costs = [
        sum(
            length * active
            for length, active in passes(trials, rungs, eta, slots, protected=protected, draw=i)
        )
        for i in range(DRAWS)
    ]
    return sum(costs) / len(costs)

"""What is known of mixes, what each is worth, whether the scores are to be believed, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from qwen_ray.sweeps.mixproxy import rank_correlation
from qwen_ray.sweeps.mixsurrogate import Key, Rises, Surrogate, key
from qwen_ray.sweeps.simplex import Mix
from qwen_ray.sweeps.spec import ObjectiveConfig

if TYPE_CHECKING:
    import numpy as np


class Trained(NamedTuple):
    """A mix that was really trained; ``origin`` as in the ledger."""

    mix: Mix
    rises: Rises
    origin: str

    @property
    def expert(self) -> bool:
        """Whether it has one domain only."""
        return max(self.mix.values()) == 1


@dataclass(frozen=True)
class Study:
    """``scores`` are the rises of merged experts, of every mix that was trained and of every candidate; None
    if experts could not be merged."""

    objective: ObjectiveConfig
    trained: Sequence[Trained]
    scores: Mapping[Key, Rises] | None

    def gain(self, rises: Mapping[str, Any]) -> Any:
        """The mean over the targets of what their loss fell by; of numbers or of arrays alike."""
        strengths = self.objective.strengths
        targets = self.objective.targets or sorted(set(rises) - set(strengths))
        return -sum(rises[d] for d in targets) / len(targets)

    def value(self, rises: Mapping[str, Any]) -> np.ndarray:
        """The gain where the strengths keep within the tolerance, else -inf."""
        import numpy as np

        rose = [rises[d] for d in self.objective.strengths]
        feasible = np.max(rose, axis=0) <= self.objective.tolerance if rose else True
        return np.where(feasible, self.gain(rises), -math.inf)

    @property
    def best(self) -> float:
        """The gain to surpass: the best feasible one yet, at least that of the base, which is 0."""
        return max(0.0, *(float(self.value(t.rises)) for t in self.trained))

    @property
    def any_feasible(self) -> bool:
        """Whether a mix that was trained, not just an expert, keeps the strengths."""
        return any(self.value(t.rises) > -math.inf for t in self.trained if not t.expert)

    def choose(self, candidates: Sequence[Mix], count: int, *, believed: bool = True) -> list[Mix]:
        """The mixes to train next, together; without ``believed`` the scores are left aside."""
        have = {key(t.mix) for t in self.trained}
        rest = [mix for mix in candidates if key(mix) not in have]
        surrogate = Surrogate([(t.mix, t.rises) for t in self.trained], self.scores if believed else None)
        return [rest[i] for i in surrogate.choose(rest, self.value, count=count, best=self.best)]

    def agreement(self, *, experts: bool = True) -> float | None:
        """Rank correlation of scores and real rises over the mixes that were trained: the mean over the
        domains. None where it cannot be told.

        An expert's own score is right by construction, but how it ranks against the mixes is not. Mixes were
        chosen to be good, so they are close to one another: without the experts a few of them have too
        little spread for a rank correlation to tell a good score from a bad one.
        """
        compared = [t for t in self.trained if experts or not t.expert]
        if self.scores is None or not compared:
            return None
        found = [
            rank_correlation(
                [self.scores[key(t.mix)][domain] for t in compared], [t.rises[domain] for t in compared]
            )
            for domain in sorted(compared[0].rises)
        ]
        return None if None in found else math.fsum(r for r in found if r is not None) / len(found)

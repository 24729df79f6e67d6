"""What is expected of mixes that nobody has trained yet, and which of them to train next.

Everything is told as rises: how far the held-out loss of each domain is above the base's, in nats a token.
A Gaussian process for each domain goes through the rises that were measured, about what merged experts
scored, or about their average where there are no scores. Mixes are compared in isometric log-ratio
coordinates (Egozcue et al., Mathematical Geology 35:279, 2003), after a small share has been added to every
domain, as logarithms need. Rises are squeezed (asinh): experts forget by whole nats what a mix must keep to
hundredths.

The next mixes are chosen together: those among which the best feasible one is expected to be best, over
draws from the processes (batch expected improvement, Ginsbourger et al. 2010; with the constraint drawn
too, Letham et al., arXiv 1706.07094). So near a tight constraint they spread over its uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from qwen_ray.sweeps.simplex import Mix, Simplex

if TYPE_CHECKING:
    import numpy as np

LENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Length scales that are tried, in log-ratio coordinates."""
ADDED = 0.05
"""What is added to each share before its logarithm is taken."""
SQUEEZE = 0.05
"""Rises well below this, in nats, are compared by difference, and well above it by ratio."""
NOISE = 0.02
"""Standard deviation of a squeezed rise that the mix does not explain: about a thousandth of a nat."""
MISS = 0.2
"""By how much scores are off, before anything is known: a share of their own spread, squeezed."""
DRAWS = 512
_TRUST = 2.0
"""How many measurements the guess of a process's size counts for."""

Rises = Mapping[str, float]
"""Held-out loss of each domain less the base's, nats a token."""
Key = tuple[float, ...]


def key(mix: Mix) -> Key:
    """What a mix is looked up by: its shares by name of domain, to a millionth."""
    return tuple(round(mix[d], 6) for d in sorted(mix))


class Surrogate:
    """Processes through the ``trained`` mixes and their rises; at least one of them.

    ``scores``: the rises of merged experts, of every mix that is trained or asked about; None if there are
    none, or none to be believed.
    """

    def __init__(
        self, trained: Sequence[tuple[Mix, Rises]], scores: Mapping[Key, Rises] | None = None
    ) -> None:
        import numpy as np

        mix, rises = trained[0]
        self._simplex, self._domains = Simplex(sorted(mix)), sorted(rises)
        measured = self._squeezed([rises for _, rises in trained])
        self._scores, self._average = scores, measured.mean(0)
        spread = measured.std(0) if scores is None else MISS * self._squeezed(list(scores.values())).std(0)
        self._guess = np.maximum(spread, NOISE) ** 2
        mixes = [mix for mix, _ in trained]
        self._at, self._off = self._coordinates(mixes), measured - self._expected(mixes)
        self.length = max(LENGTHS, key=lambda length: self._fit(length)[0])
        """The length scale under which what was measured is likeliest."""
        _, self._factor, self._variance = self._fit(self.length)

    def _squeezed(self, rises: Sequence[Rises]) -> np.ndarray:
        import numpy as np

        return np.arcsinh(np.array([[r[d] for d in self._domains] for r in rises]) / SQUEEZE)

    def _expected(self, mixes: Sequence[Mix]) -> np.ndarray:
        """Before anything is measured: [n, D], squeezed."""
        import numpy as np

        if self._scores is None:
            return np.tile(self._average, (len(mixes), 1))
        return self._squeezed([self._scores[key(mix)] for mix in mixes])

    def _coordinates(self, mixes: Sequence[Mix]) -> np.ndarray:
        import numpy as np

        added = ({d: x + ADDED for d, x in mix.items()} for mix in mixes)
        return np.array([self._simplex.to_ilr(mix) for mix in added])

    def _fit(self, length: float) -> tuple[float, np.ndarray, np.ndarray]:
        """Log likelihood, the Cholesky factor of the kernel matrix, and the variance of each process."""
        import numpy as np

        n = len(self._at)
        noise = NOISE**2 / self._guess.mean()
        factor = np.linalg.cholesky(_kernel(self._at, self._at, length) + noise * np.eye(n))
        squares = (np.linalg.solve(factor, self._off) ** 2).sum(0)
        variance = (squares + _TRUST * self._guess) / (n + _TRUST)
        likelihood = -0.5 * (squares / variance + n * np.log(variance)).sum()
        likelihood -= len(self._domains) * np.log(np.diag(factor)).sum()
        return float(likelihood), factor, variance

    def draw(self, mixes: Sequence[Mix], *, seed: int = 0) -> list[dict[str, np.ndarray]]:
        """For each mix the rises of its domains in ``DRAWS`` draws from the processes."""
        import numpy as np

        at = self._coordinates(mixes)
        across = np.linalg.solve(self._factor, _kernel(self._at, at, self.length))
        mean = self._expected(mixes) + across.T @ np.linalg.solve(self._factor, self._off)
        covariance = _kernel(at, at, self.length) - across.T @ across
        # Eigenvalues, as mixes close to one another leave a matrix that rounding makes indefinite.
        size, axes = np.linalg.eigh(covariance)
        root = axes * np.sqrt(size.clip(min=0))
        rng = np.random.default_rng(seed)
        rises = []
        for i in range(len(self._domains)):
            away = math.sqrt(self._variance[i]) * (root @ rng.standard_normal((len(mixes), DRAWS)))
            rises.append(SQUEEZE * np.sinh(mean[:, i, None] + away))
        return [{d: rises[i][m] for i, d in enumerate(self._domains)} for m in range(len(mixes))]

    def choose(
        self,
        mixes: Sequence[Mix],
        value: Callable[[Mapping[str, np.ndarray]], np.ndarray],
        *,
        count: int,
        best: float,
        seed: int = 0,
    ) -> list[int]:
        """Which ``count`` of ``mixes`` to train together, the most promising first.

        ``value``: what the rises [DRAWS] of a mix's domains are worth, -inf where they are not feasible.
        ``best``: what is to be surpassed.
        """
        import numpy as np

        if not mixes:
            return []
        values = np.stack([value(draws) for draws in self.draw(mixes, seed=seed)])
        reached = np.full(values.shape[1], best)
        chosen: list[int] = []
        for _ in range(min(count, len(mixes))):
            worth = np.maximum(values, reached).mean(1)
            worth[chosen] = -math.inf
            chosen.append(int(worth.argmax()))
            reached = np.maximum(reached, values[chosen[-1]])
        return chosen


def _kernel(a: np.ndarray, b: np.ndarray, length: float) -> np.ndarray:
    """Matern 5/2: twice differentiable."""
    import numpy as np

    r = math.sqrt(5) / length * np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1))
    return np.asarray((1 + r + r**2 / 3) * np.exp(-r))

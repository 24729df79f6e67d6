"""A sweep's proposals as a searcher of Ray Tune."""

from __future__ import annotations

from typing import Any

from ray.tune.search import Searcher

from qwen_ray.sweeps.proposals import Source
from qwen_ray.sweeps.space import to_tune


class TuneSearcher(Searcher):
    """Gives Tune the trials of ``source`` in their order, as flat configs (:func:`~.space.to_tune`).

    The ledger is the truth: it has the proposals and the reports, so there is nothing to save here. A new
    experiment is given recorded trials again, unchanged.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(metric="score", mode="max")
        self.source, self._next = source, 0

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._next >= self.source.total:
            finished: str = Searcher.FINISHED
            return finished
        proposal = self.source.propose(self._next)
        if proposal is None:
            return None
        self._next += 1
        return to_tune(self._next - 1, proposal[0])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Reports reach the ledger from where they are made."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

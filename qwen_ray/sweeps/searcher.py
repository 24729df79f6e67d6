"""A sweep's proposals as a searcher of Ray Tune."""

from __future__ import annotations

from collections.abc import Callable
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
        self.on_error: Callable[[int], bool] | None = None
        """Told of each trial that Tune has given up, as proposals may wait for it; whether to go on."""
        self._indices: dict[str, int] = {}
        self._over = False

    def ahead(self, count: int) -> None:
        """Record the first ``count`` proposals, as far as they can be made, before Tune asks for them."""
        for index in range(min(count, self.source.total)):
            if self.source.propose(index) is None:
                return

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._over or self._next >= self.source.total:
            finished: str = Searcher.FINISHED
            return finished
        proposal = self.source.propose(self._next)
        if proposal is None:
            return None
        index = self._indices[trial_id] = self._next
        self._next += 1
        return to_tune(index, proposal[0])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Reports reach the ledger from where they are made; that there will be none has to be said."""
        if error and self.on_error is not None and not self.on_error(self._indices[trial_id]):
            self._over = True

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the class."""

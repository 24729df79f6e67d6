"""Which values each trial of a sweep gets: first what is always tried, then what a search proposes.

What was proposed is in the ledger before it is tried, and given out from there ever after. So a sweep that
was killed goes on as it would have, and a proposal depends only on what was reported when it was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from qwen_ray.data.lots import integer
from qwen_ray.sweeps.ledger import Ledger, TrialRecord
from qwen_ray.sweeps.space import WEIGHTS, Distribution, generator, grid, latin, sample
from qwen_ray.sweeps.spec import SweepConfig, included, points

if TYPE_CHECKING:
    import optuna


Proposal = tuple[dict[str, Any], str]
"""Values by dotted key, and who proposed them."""
Reports = Mapping[int, Sequence[Mapping[str, Any]]]
"""The reports of each trial, by its index."""

STARTUP = 8
"""Trials that must have reported before the model of a search is used; till then draws are random."""
_MIX = "mixture"


class Source(Protocol):
    """Where trials come from."""

    @property
    def total(self) -> int:
        """Trials in all, as far as is known."""

    def propose(self, index: int) -> Proposal | None:
        """Trial ``index``, asked for in order; None: not yet, ask again."""


class Proposals:
    """The trials of a sweep without a mix search. Raises :class:`~qwen_ray.errors.UserError` if the ledger
    is of another sweep."""

    def __init__(self, spec: SweepConfig, ledger: Ledger) -> None:
        self.spec, self.ledger = spec, ledger
        self._always = included(spec)

    @property
    def total(self) -> int:
        return self.spec.search.trials

    @property
    def cohort(self) -> int:
        """How many proposals a model makes together: as many as run at a time."""
        trials = self.spec.trials
        if trials.kind == "plain":
            return trials.max_concurrent or trials.slots
        return trials.slots * trials.engines

    def propose(self, index: int) -> Proposal | None:
        if not self.ledger.has(index):
            if self.spec.search.name != "optuna":
                self.ledger.open(index, *self.in_advance(index))
            elif not self._open_cohort(index):
                return None
        trial = self.ledger.trial(index)
        return trial.values, trial.origin

    def _open_cohort(self, index: int) -> bool:
        """Record proposals for ``index`` and the rest of its cohort, all made of the same reports; unless a
        trial of an earlier cohort has yet to report."""
        first = index - index % self.cohort
        known = self.ledger.trials()
        reports = {trial.index: self.ledger.reports(trial.index) for trial in known}
        if any(not reports[t.index] and t.state in {"new", "running"} for t in known if t.index < first):
            return False
        for i in range(index, min(first + self.cohort, self.total)):
            proposal = self.in_advance(i)
            if i >= len(self._always):
                values = Model(self.spec).propose(i, known, reports)
                if values is not None and all(values != trial.values for trial in known):
                    proposal = values, "optuna"
            known.append(self.ledger.open(i, *proposal))
            reports[i] = []
        return True

    def in_advance(self, index: int) -> Proposal:
        """Trial ``index`` as far as it is known before anything is tried: a search's proposals are not, and a
        random draw takes their place."""
        if index < len(self._always):
            return self._always[index]
        search, number = self.spec.search, index - len(self._always)
        if search.name == "grid":
            return self._grid(number), "grid"
        rng = generator(search.seed, index)
        if search.name == "latin":
            size = self.total - len(self._always)
            values, origin = latin(self.spec.space, seed=search.seed, index=number, size=size), "latin"
        else:
            values, origin = sample(self.spec.space, rng), "random"
        if self.spec.simplex is not None:
            values[WEIGHTS] = self.spec.simplex.sample(rng)
        return values, origin

    def _grid(self, number: int) -> dict[str, Any]:
        simplex, mixture = self.spec.simplex, self.spec.mixture
        if simplex is None or mixture is None or mixture.lattice is None:
            return next(itertools.islice(grid(self.spec.space), number, None))
        mixes = list(simplex.lattice(mixture.lattice))
        rest, digit = divmod(number, len(mixes))
        return {**next(itertools.islice(grid(self.spec.space), rest, None)), WEIGHTS: mixes[digit]}


class Model:
    """Optuna under the constraint, made anew from the ledger for each proposal.

    Where every trial runs to its end, a Gaussian process; where rungs stop some, multivariate TPE (arXiv
    2304.11127), which can rank trials that came differently far: feasible before infeasible ones (those by
    violation); of the feasible, complete ones by gain, then pruned ones by how far they came, and by gain
    among those that came equally far. So a trial is told as pruned at its last report, and as complete only
    at its full length: a loss after less training never passes for a final one. That alone would place a
    trial that was let through for free (the reference, or an early one with little competition) before better
    ones that were stopped; so it counts as having come only to the first rung at which a trial that was
    stopped there had a better score.

    A mixture is D - 1 coordinates of a cube that fills the simplex evenly, as TPE's prior does the cube; most
    of a box of log-ratio coordinates is a corner of the simplex. A proposal beyond a range is moved to the
    nearest mixture, which is then what the model learns from. Trials still without a report count as bad, so
    that a cohort spreads. Trials with values outside of the space, as the base run's may be, are left out.
    """

    def __init__(self, spec: SweepConfig) -> None:
        from optuna.distributions import BaseDistribution, FloatDistribution

        self.spec, self.simplex, self.last = spec, spec.simplex, len(points(spec)) - 1
        self.stops = self.last > 0 and spec.stopping.name != "none"
        self.axes: dict[str, BaseDistribution] = {
            key: _axis(distribution) for key, distribution in spec.space.items()
        }
        for i in range(len(self.simplex.domains) - 1 if self.simplex else 0):
            self.axes[f"{_MIX}/{i}"] = FloatDistribution(0.0, 1.0)

    def propose(self, index: int, known: Sequence[TrialRecord], reports: Reports) -> dict[str, Any] | None:
        """Values for trial ``index``; None while too few trials have reported."""
        import optuna

        told = self.told(known, reports)
        if sum(trial.state.is_finished() for trial in told) < STARTUP:
            return None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        seed = integer(f"optuna/{self.spec.search.seed}/{index}") % 2**32
        kind = optuna.samplers.TPESampler if self.stops else optuna.samplers.GPSampler
        sampler = kind(n_startup_trials=STARTUP, seed=seed)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials(told)
        return self._values(study.ask(self.axes).params)

    def told(self, known: Sequence[TrialRecord], reports: Reports) -> list[optuna.trial.FrozenTrial]:
        """The trials as Optuna is told of them, by index; those outside of the space are left out."""
        from optuna.trial import TrialState, create_trial

        stopped = {trial.index for trial in known if trial.state == "stopped" and reports[trial.index]}
        seen = [row for trial in known if trial.state != "failed" for row in reports[trial.index]]
        # A failed trial is as bad as the worst: a number of another size would be all that a model sees.
        worst = {
            "gain": min((row["gain"] for row in seen), default=0.0),
            "violation": max((row["violation"] for row in seen), default=0.0) or 1.0,
        }
        found = []
        for trial in sorted(known, key=lambda trial: trial.index):
            params = self._params(trial.values)
            if params is None:
                continue
            rows, level = reports[trial.index], len(reports[trial.index]) - 1
            for other in sorted(stopped):
                at = len(reports[other]) - 1
                if at < level and reports[other][at]["score"] > rows[at]["score"]:
                    level = at
            if trial.state == "failed":
                rows, level = [worst], 0
            told: dict[str, Any] = {"state": TrialState.RUNNING}
            whole = level == self.last or trial.state == "failed"
            if rows and (whole or self.stops):
                row = rows[level]
                told = {"state": TrialState.PRUNED, "intermediate_values": {level: row["gain"]}}
                if whole:
                    told = {"state": TrialState.COMPLETE, "value": row["gain"]}
                told["constraints"] = {"strengths": row["violation"]}
            found.append(create_trial(**told, params=params, distributions=self.axes))
        return found

    def _params(self, values: dict[str, Any]) -> dict[str, Any] | None:
        """A trial as coordinates; None if it lies outside of the space."""
        params: dict[str, Any] = {}
        for key, distribution in self.spec.space.items():
            if key not in values or not distribution.holds(values[key]):
                return None
            params[key] = _ordered(distribution).index(values[key]) if distribution.values else values[key]
        if self.simplex is not None:
            mix = values.get(WEIGHTS, {})
            if not self.simplex.holds(mix):
                return None
            params |= {f"{_MIX}/{i}": u for i, u in enumerate(self.simplex.to_cube(mix))}
        return params

    def _values(self, params: dict[str, Any]) -> dict[str, Any]:
        values = {
            key: _ordered(distribution)[params[key]] if distribution.values else params[key]
            for key, distribution in self.spec.space.items()
        }
        if self.simplex is not None:
            mix = self.simplex.from_cube([u for name, u in params.items() if name.startswith(_MIX)])
            values[WEIGHTS] = mix if self.simplex.holds(mix) else self.simplex.nearest(mix)
        return values


def _ordered(distribution: Distribution) -> list[Any]:
    """The choices, numbers by size."""
    return sorted(distribution.values) if _numeric(distribution) else distribution.values


def _numeric(distribution: Distribution) -> bool:
    return all(isinstance(v, int | float) and not isinstance(v, bool) for v in distribution.values)


def _axis(distribution: Distribution) -> optuna.distributions.BaseDistribution:
    """Choices by their number, which is an order only where they are numbers."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if distribution.values:
        last = len(distribution.values) - 1
        return (
            IntDistribution(0, last) if _numeric(distribution) else CategoricalDistribution(range(last + 1))
        )
    low, high = distribution.ends
    if distribution.whole:
        return IntDistribution(int(low), int(high), log=distribution.logarithmic, step=distribution.step)
    return FloatDistribution(low, high, log=distribution.logarithmic)

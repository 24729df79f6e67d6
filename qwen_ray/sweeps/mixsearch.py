"""Mix search: the best mix of the domains from few real runs.

Stages, each a cohort of the sweep's trials. (1) The search's own trials, all with as much of each domain.
(2) At the best values of those, an expert of each domain, trained on it alone. (3) Hundreds of mixes are
scored by merging the experts (:mod:`~qwen_ray.sweeps.mixproxy`); with the scores corrected by what was
really trained, the most promising mixes are trained (:mod:`~qwen_ray.sweeps.mixsurrogate`), each at some
learning rates, as mix and rate interact (JoBS, arXiv 2602.08351). (4) If scores and real runs do not rank
mixes alike, or no mix keeps the strengths yet, a Bayesian search goes on with real runs.

The state is the ledger, the plan of the stages and the scores (``OUT/mix``): a search that was killed goes
on as it would have.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, write_json
from qwen_ray.sweeps.mixcandidates import lattice, score_candidates
from qwen_ray.sweeps.mixstudy import Study, Trained
from qwen_ray.sweeps.mixsurrogate import Key, Rises, key
from qwen_ray.sweeps.objective import PREFIX, ranking
from qwen_ray.sweeps.proposals import Proposal, Proposals
from qwen_ray.sweeps.simplex import Mix
from qwen_ray.sweeps.space import WEIGHTS
from qwen_ray.sweeps.spec import SweepConfig, included, trial_config

if TYPE_CHECKING:
    from qwen_ray.sweeps.ledger import Ledger, TrialRecord

log = logging.getLogger(__name__)

EXPERT, MIX, BAYES = "expert", "mix", "bayes"
"""Origins of the later stages' trials; an expert's is followed by its domain: ``expert:biology``."""
PLAN, SCORES = "mix/plan.json", "mix/scores.json"
RATE = "optim.learning_rate"
ENDED = {"done", "stopped", "failed"}

Score = Callable[[Mapping[str, str], Sequence[Mix]], dict[str, Any]]
"""From the experts' folders by domain, and mixes, to ``{"base", "rises"}``: what
:func:`qwen_ray.sweeps.mixproxy.score_folders` returns."""


def is_protected(origin: str) -> bool:
    """Whether trials of this origin run to their end: they are not compared before."""
    return origin.partition(":")[0] in {EXPERT, MIX, BAYES}


def check(spec: SweepConfig) -> None:
    """Raise :class:`UserError` for a mix search whose runs could not stand for one another."""
    if spec.mix_search is None:
        return
    if spec.mixture is None:
        raise UserError("a mix search needs mixtures", where="mix_search", fix="give a mixture")
    if spec.trials.kind != "packed":
        raise UserError(
            "experts are merged as LoRA adapters in a pack", where="mix_search", fix="trials.kind=packed"
        )
    if trial_config(spec, {}, out=spec.out).optim.max_steps is None:
        raise UserError(
            "a mix search compares runs of equal length, and a pass has another length for each mix",
            where="run.optim.max_steps",
            fix="give it",
        )
    if spec.search.name == "optuna" and spec.space:
        raise UserError(
            "before a mix search the space is searched at random or on a grid",
            where="search.name",
            fix="search.name=random",
        )
    if 1 not in spec.mix_search.learning_rates:
        raise UserError(
            "mixes are compared at the base learning rate",
            where="mix_search.learning_rates",
            fix="let 1.0 be one of them",
        )


class MixSearch:
    """The trials of a sweep with a mix search (a :class:`~qwen_ray.sweeps.proposals.Source`).

    A stage is planned when every trial before it has ended. Raises :class:`UserError` as :func:`check` does.
    """

    def __init__(self, spec: SweepConfig, ledger: Ledger, score: Score | None = None) -> None:
        """``score`` is needed where the third stage is still to be planned."""
        check(spec)
        assert spec.mix_search is not None
        assert spec.simplex is not None
        self.spec, self.ledger, self._score = spec, ledger, score
        self.settings, self.simplex = spec.mix_search, spec.simplex
        plan = ledger.out / PLAN
        self._stages: list[list[Proposal]] = read_json(plan) if plan.is_file() else []

    @property
    def total(self) -> int:
        """Trials in all: those that are planned, and one more while there may be more."""
        return len(self._planned) + (not self._finished)

    @property
    def _planned(self) -> list[Proposal]:
        return [(values, origin) for stage in self._stages for values, origin in stage]

    @property
    def _finished(self) -> bool:
        return bool(self._stages) and not self._stages[-1]

    def propose(self, index: int) -> Proposal | None:
        """Trial ``index``, asked for in order; None while those of an earlier stage have not ended."""
        if index >= len(self._planned) and not self._plan_on():
            return None
        if not self.ledger.has(index):  # a stage is there as a whole, so that its trials are waited for
            for i in range(index, len(self._planned)):
                self.ledger.open(i, *self._planned[i])
        trial = self.ledger.trial(index)
        return trial.values, trial.origin

    def _plan_on(self) -> bool:
        """Plan the next stage, if it is time and there is one."""
        trials = self.ledger.trials()
        if self._finished or len(trials) < len(self._planned) or any(t.state not in ENDED for t in trials):
            return False
        self._stages.append(self.next_stage())
        write_json(self.ledger.out / PLAN, self._stages)
        return not self._finished

    def next_stage(self) -> list[Proposal]:
        """What to try after the trials in the ledger, all of which have ended; nothing at the end."""
        trials = self.ledger.trials()
        if not trials:
            return self._first()
        start, of = self._start(trials), [trial.origin.partition(":")[0] for trial in trials]
        if EXPERT not in of:
            domains = self.simplex.domains
            only = {d: {x: float(x == d) for x in domains} for d in domains}
            return [({**start, WEIGHTS: only[d]}, f"{EXPERT}:{d}") for d in domains]
        scored = self._scored()
        study, candidates = self.study(), [row["mix"] for row in scored["scores"]]
        if not candidates:
            candidates = lattice(self.simplex, self.settings.candidates)[0]
        if MIX not in of:
            rate = trial_config(self.spec, start, out=self.spec.out).optim.learning_rate
            return [
                ({**start, WEIGHTS: mix} | ({RATE: rate * times} if times != 1 else {}), MIX)
                for mix in study.choose(candidates, self.settings.verify)
                for times in self.settings.learning_rates
            ]
        left = self.settings.fallback_trials - of.count(BAYES)
        believed = self.believed
        if left <= 0 or self.settings.fallback == "none" or (believed and study.any_feasible):
            return []
        why = "no mix keeps the strengths yet" if believed else self.verdict
        chosen = study.choose(candidates, min(left, self.spec.trials.slots), believed=believed)
        goes_on = "the search goes on with real runs" if chosen else "every candidate has been trained"
        log.warning("%s: %s", why, goes_on)
        return [({**start, WEIGHTS: mix}, BAYES) for mix in chosen]

    def _first(self) -> list[Proposal]:
        """The search's own trials, with as much of each domain; and the run's own mix."""
        own = Proposals(self.spec.model_copy(update={"mixture": None}), self.ledger)
        made = [own.in_advance(i) for i in range(self.spec.search.trials if self.spec.space else 1)]
        stage = [({**values, WEIGHTS: self.simplex.uniform()}, origin) for values, origin in made]
        return stage + [(values, origin) for values, origin in included(self.spec) if origin == "current"]

    def _start(self, trials: Sequence[TrialRecord]) -> dict[str, Any]:
        """The values, without the mix, of the best of the search's own trials. The run's own mix is left
        aside: it may be better for its mix."""
        own = {t.index: t for t in trials if t.origin != "current" and not is_protected(t.origin)}
        ranked = ranking({i: self.ledger.reports(i) for i in own})
        return _without_mix(own[ranked[0] if ranked else min(own)])

    def _scored(self) -> dict[str, Any]:
        """The base's losses, and the mixes with what their merged experts scored; made once."""
        path = self.ledger.out / SCORES
        if not path.is_file():
            write_json(path, self._made_scores())
        found: dict[str, Any] = read_json(path)
        return found

    def _made_scores(self) -> dict[str, Any]:
        if self._score is None:
            raise RuntimeError("there is nothing to score mixes with")
        ask, trials = self._score, self.ledger.trials()
        base: dict[str, float] = {}
        experts = {
            trial.origin.partition(":")[2]: str(trial.folder / "adapter")
            for trial in trials
            if trial.origin.startswith(EXPERT) and trial.state == "done"
        }
        if set(experts) != set(self.simplex.domains):
            return {"base": ask({}, [])["base"], "scores": []}

        def rises(mixes: Sequence[Mix]) -> list[Rises]:
            answer = ask(experts, mixes)
            base.update(answer["base"])
            return list(answer["rises"])

        def best(scores: Mapping[Key, Rises], mixes: Sequence[Mix]) -> list[Mix]:
            study = Study(self.spec.objective, self._trained(base), scores)
            return study.choose(mixes, self.settings.verify)

        mixes = [trial.values[WEIGHTS] for trial in trials]
        found = score_candidates(self.simplex, mixes, rises, best, most=self.settings.candidates)
        return {"base": base, "scores": [{"mix": mix, "rises": rises} for mix, rises in found]}

    def _trained(self, base: Mapping[str, float]) -> list[Trained]:
        """The mixes that ran to their end at the best values, the base learning rate among them."""
        trials = self.ledger.trials()
        start, found = self._start(trials), []
        for trial in trials:
            if _without_mix(trial) == start and trial.state == "done":
                last = self.ledger.reports(trial.index)[-1]
                rises = {domain: last[PREFIX + domain] - loss for domain, loss in base.items()}
                found.append(Trained(trial.values[WEIGHTS], rises, trial.origin))
        return found

    def study(self) -> Study:
        """What is known of mixes, once the experts have been trained."""
        scored = self._scored()
        scores = {key(row["mix"]): row["rises"] for row in scored["scores"]}
        return Study(self.spec.objective, self._trained(scored["base"]), scores or None)

    @property
    def believed(self) -> bool:
        """Whether scores and real runs rank mixes alike; what the fallback trained does not count."""
        agreement = self._agreement()
        return agreement is not None and agreement >= self.settings.proxy_threshold

    def _agreement(self) -> float | None:
        study = self.study()
        before = [t for t in study.trained if t.origin != BAYES]
        return Study(study.objective, before, study.scores).agreement()

    @property
    def verdict(self) -> str:
        """Of the scores, in words."""
        agreement, threshold = self._agreement(), self.settings.proxy_threshold
        if self.study().scores is None:
            return "the expert of a domain failed, so mixes could not be scored"
        if agreement is None or agreement < threshold:
            said = "nothing" if agreement is None else f"{agreement:.2f}"
            return (
                f"merged experts rank mixes unlike real runs (rank correlation {said}, below {threshold:g})"
            )
        return f"merged experts rank mixes as real runs do (rank correlation {agreement:.2f})"

    def summary(self) -> dict[str, Any] | None:
        """``mix_search`` of the sweep's result; None before mixes were trained."""
        trials = self.ledger.trials()
        verified = [t for t in trials if t.origin in {MIX, BAYES} and t.state == "done"]
        if not verified:
            return None
        study, start = self.study(), self._start(trials)
        real = {key(t.mix): study.gain(t.rises) for t in study.trained}
        scores = study.scores or {}
        return {
            "candidates": len(scores),
            "experts": [t.index for t in trials if t.origin.startswith(EXPERT)],
            "verified": [
                {"index": t.index, "proxy": study.gain(scores[k]), "real": real[k]}
                for t in verified
                if (k := key(t.values[WEIGHTS])) in scores and _without_mix(t) == start
            ],
            "rank_correlation": self._agreement(),
            "rank_correlation_without_experts": study.agreement(experts=False),
            "threshold": self.settings.proxy_threshold,
            "fallback": sum(t.origin == BAYES for t in trials),
            "verdict": self.verdict,
        }


def _without_mix(trial: TrialRecord) -> dict[str, Any]:
    return {name: value for name, value in trial.values.items() if name != WEIGHTS}

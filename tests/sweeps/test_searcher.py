"""What a search proposes, on a problem that costs nothing: three domains that gain, and a strength whose loss
rises with the learning rate and falls with replay, all of it more with training."""

from __future__ import annotations

import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.sweeps.halving import Halving
from qwen_ray.sweeps.ledger import Ledger, TrialRecord
from qwen_ray.sweeps.objective import judge, ranking
from qwen_ray.sweeps.proposals import STARTUP, Model, Proposals
from qwen_ray.sweeps.searcher import TuneSearcher
from qwen_ray.sweeps.space import WEIGHTS, from_tune
from qwen_ray.sweeps.spec import StoppingConfig, SweepConfig, included, points

DOMAINS = ["biology", "history", "security", "replay"]
BASE = {f"eval_loss/{d}": 2.0 for d in DOMAINS}
SLOTS = 8


def losses(values: dict[str, Any], share: float) -> dict[str, float]:
    """Held-out losses after a share of the run; best at a rate of 5e-3."""
    rate, mix = values["optim.learning_rate"], values[WEIGHTS]
    pace = (
        share * math.exp(-2 * math.log10(rate / 5e-3) ** 2) * (1 + 0.05 * math.log2(values["method.r"] / 8))
    )
    made = {
        f"eval_loss/{d}": 2 - 1.5 * (1 - math.exp(-(8 + 4 * i) * mix[d] * pace))
        for i, d in enumerate(DOMAINS[:3])
    }
    rise = 0.35 * (1 - math.exp(-6 * share)) * math.sqrt(rate / 5e-3) * math.exp(-6 * mix["replay"])
    return {**made, "eval_loss/replay": 2 + rise}


def problem(
    name: str, seed: int = 0, *, trials: int = 40, stopping: str = "none", **changes: Any
) -> SweepConfig:
    tree = {
        "embedded_data": True,
        "run": {"model": {"name": "tiny"}},
        "space": {
            "optim.learning_rate": {"distribution": "log_uniform", "low": 1e-3, "high": 3e-2},
            "method.r": {"distribution": "choice", "values": [32, 8, 16]},
        },
        "mixture": {"domains": DOMAINS, "ranges": {"replay": [0.05, 0.6]}, "include": ["uniform"]},
        "objective": {"strengths": ["replay"], "tolerance": 0.05},
        "search": {"name": name, "trials": trials, "seed": seed},
        "stopping": {"name": stopping},
        "trials": {"slots": SLOTS},
    }
    return SweepConfig.model_validate({**tree, **changes})


def sweep(spec: SweepConfig, out: Path, *, events: int | None = None) -> Ledger:
    """Run the sweep as an engine would, from what is recorded: so many batches of reports, or to its end."""
    ledger, at = Ledger(out), points(spec)
    proposals, halving = Proposals(spec, ledger), Halving(at[:-1], spec.stopping.eta)
    heads: dict[int, int] = {}
    given = 0
    while given < proposals.total or heads:
        while given < proposals.total and len(heads) < SLOTS and proposals.propose(given):
            heads[given], given = 0, given + 1
        level = min(heads.values())
        group = [trial for trial, head in heads.items() if head == level]
        scores = {}
        for trial in group:
            known = ledger.reports(trial)
            if len(known) <= level:
                if events == 0:
                    return ledger
                judged = judge(losses(ledger.trial(trial).values, at[level]), BASE, spec.objective)
                known = [{**vars(judged), "share": at[level]}]
                ledger.append_report(trial, known[0])
            scores[trial] = known[-1 if len(known) <= level else level]["score"]
        events = None if events is None else events - 1
        goes_on = halving.arrive(level, scores) if level < len(at) - 1 else {}
        for trial in group:
            if goes_on.get(trial):
                heads[trial] += 1
            else:
                ledger.set_state(trial, "done" if level == len(at) - 1 else "stopped")
                del heads[trial]
    return ledger


def best_score(ledger: Ledger) -> float:
    reports = {trial.index: ledger.reports(trial.index) for trial in ledger.trials()}
    score: float = reports[ranking(reports)[0]][-1]["score"]
    return score


def view(ledger: Ledger) -> list[Any]:
    return [(t.values, t.origin, t.state, ledger.reports(t.index)) for t in ledger.trials()]


def best_random(seed: int) -> float:
    """The best of 40 random draws, all at full length: what 40 whole trials would have found."""
    spec = problem("random", seed)
    made = Proposals(spec, Ledger(Path("unused")))
    trials = [made.in_advance(i)[0] for i in range(made.total)]
    return max(judge(losses(values, 1.0), BASE, spec.objective).score for values in trials)


def test_with_rungs_a_third_of_the_cost_finds_more_than_random_draws(tmp_path: Path) -> None:
    specs = [problem("optuna", seed, stopping="halving") for seed in range(10)]
    model = [best_score(sweep(spec, tmp_path / str(i))) for i, spec in enumerate(specs)]
    assert statistics.median(model) > statistics.median(map(best_random, range(10))) + 0.03


def test_without_rungs_fewer_trials_find_more_than_random_draws(tmp_path: Path) -> None:
    model = best_score(sweep(problem("optuna", trials=20), tmp_path))
    assert model > statistics.median(map(best_random, range(10))) + 0.03


@pytest.mark.parametrize(("name", "stopping"), [("random", "none"), ("optuna", "halving")])
def test_proposals_stay_inside_and_begin_with_what_is_always_tried(
    tmp_path: Path, name: str, stopping: str
) -> None:
    narrow = {"domains": DOMAINS, "floor": 0.05, "ranges": {"replay": [0.1, 0.3], "biology": [0.05, 0.4]}}
    spec = problem(name, stopping=stopping, trials=32, mixture=narrow)
    ledger = sweep(spec, tmp_path)
    trials = ledger.trials()
    assert len(trials) == 32
    always = included(spec)
    assert [(t.values, t.origin) for t in trials[: len(always)]] == always
    for trial in trials[len(always) :]:
        assert spec.simplex is not None
        assert spec.simplex.holds(trial.values[WEIGHTS])
        assert 1e-3 <= trial.values["optim.learning_rate"] <= 3e-2
        assert trial.values["method.r"] in (8, 16, 32)
        assert isinstance(trial.values["method.r"], int)
    origins = [t.origin for t in trials]
    assert origins.count("optuna") == (24 if name == "optuna" else 0)


@pytest.mark.parametrize("name", ["random", "optuna"])
def test_a_sweep_that_was_killed_goes_on_as_if_it_had_not_been(tmp_path: Path, name: str) -> None:
    spec = problem(name, trials=24, stopping="halving")
    whole = view(sweep(spec, tmp_path / "whole"))
    for events in (0, 1, 3, 4, 6):
        out = tmp_path / str(events)
        sweep(spec, out, events=events)
        assert view(Ledger(out)) != whole
        assert view(sweep(spec, out)) == whole
    shutil.rmtree(tmp_path / "whole" / "trials" / "0023")  # the last proposal is made of the same reports
    assert Proposals(spec, Ledger(tmp_path / "whole")).propose(23) is not None


def test_a_random_draw_depends_on_seed_and_index_alone(tmp_path: Path) -> None:
    few = Proposals(problem("random", trials=3), Ledger(tmp_path / "few"))
    many = Proposals(problem("random", trials=30), Ledger(tmp_path / "many"))
    assert many.propose(2) == few.propose(2)  # although no trial has reported
    other = Proposals(problem("random", 1, trials=3), Ledger(tmp_path / "other"))
    assert other.propose(2) != few.propose(2)


def test_a_cohort_is_proposed_together_once_the_one_before_has_reported(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    proposals = Proposals(problem("optuna", trials=20, stopping="halving"), ledger)
    assert proposals.propose(0) is not None
    assert len(ledger.trials()) == SLOTS
    assert proposals.propose(SLOTS) is None
    for trial in range(SLOTS - 1):
        ledger.append_report(
            trial, {"share": 0.1, "gain": 0.1 * trial, "violation": 0.0, "score": 0.1 * trial}
        )
    assert proposals.propose(SLOTS) is None
    ledger.set_state(SLOTS - 1, "failed", "its process died")
    assert proposals.propose(SLOTS) is not None
    assert len(ledger.trials()) == 2 * SLOTS
    assert len({str(t.values) for t in ledger.trials()}) == 2 * SLOTS
    assert proposals.propose(SLOTS + 3) == (
        ledger.trial(SLOTS + 3).values,
        ledger.trial(SLOTS + 3).origin,
    )


def test_grid_over_values_and_mixtures(tmp_path: Path) -> None:
    spec = problem(
        "grid",
        trials=1 + 2 * 3 * 9,
        space={
            "optim.learning_rate": {"distribution": "log_uniform", "low": 1e-3, "high": 1e-2, "points": 2},
            "method.r": {"distribution": "choice", "values": [8, 16, 32]},
        },
        mixture={"domains": DOMAINS, "include": ["uniform"], "lattice": 2, "ranges": {"replay": [0.02, 0.6]}},
    )
    assert spec.simplex is not None
    assert len(list(spec.simplex.lattice(2))) == 9  # all but the pure replay
    proposals = Proposals(spec, Ledger(tmp_path))
    made = [proposals.propose(i) for i in range(proposals.total)]
    assert [origin for _, origin in made if origin] == ["reference", *["grid"] * 54]  # type: ignore[misc]
    assert len({str(values) for values, _ in made}) == 55  # type: ignore[misc]


def recorded(ledger: Ledger) -> tuple[list[TrialRecord], dict[int, list[dict[str, Any]]]]:
    known = ledger.trials()
    return known, {trial.index: ledger.reports(trial.index) for trial in known}


def told(tmp_path: Path, rows: dict[int, tuple[str, list[float]]], spec: SweepConfig) -> dict[int, Any]:
    """What Optuna is told of trials with these states and scores, by index."""
    ledger = Ledger(tmp_path)
    proposals = Proposals(spec, ledger)
    for trial, (state, scores) in rows.items():
        values, _ = proposals.in_advance(trial + 1)  # all of them within the space
        ledger.open(trial, values, "random")
        for share, score in zip(points(spec), scores, strict=False):
            report = {
                "share": share,
                "gain": score,
                "violation": 0.0 if score > -100 else 0.2,
                "score": score,
            }
            ledger.append_report(trial, report)
        ledger.set_state(trial, state)  # type: ignore[arg-type]
    known, reports = recorded(ledger)
    return dict(zip(reports, Model(spec).told(known, reports), strict=True))


def test_a_stopped_trial_is_not_told_as_complete(tmp_path: Path) -> None:
    rows = {
        0: ("done", [0.3, 0.5, 0.9]),
        1: ("stopped", [0.2]),
        2: ("stopped", [0.25, 0.45]),
        3: ("running", []),
        4: ("running", [0.28]),
        5: ("failed", []),
    }
    found = told(tmp_path, rows, problem("optuna", stopping="halving"))
    assert {i: t.state.name for i, t in found.items()} == {
        0: "COMPLETE",
        1: "PRUNED",
        2: "PRUNED",
        3: "RUNNING",
        4: "PRUNED",
        5: "COMPLETE",
    }
    assert found[0].value == 0.9
    assert [found[i].intermediate_values for i in (1, 2, 4)] == [{0: 0.2}, {1: 0.45}, {0: 0.28}]
    assert found[5].value == 0.2  # a failure is as bad as the worst, and infeasible
    assert found[5].constraints == {"strengths": 1.0}


def test_a_trial_let_through_for_free_counts_as_far_as_it_was_better(tmp_path: Path) -> None:
    """Trial 0 ran to its end although 1 was better at the first rung, 2 at the second."""
    rows = {0: ("done", [0.3, 0.5, 0.9]), 1: ("stopped", [0.1]), 2: ("stopped", [0.35, 0.6])}
    found = told(tmp_path / "a", rows, problem("optuna", stopping="halving"))
    assert (found[0].state.name, found[0].intermediate_values) == ("PRUNED", {1: 0.5})
    rows[1] = ("stopped", [0.31])
    found = told(tmp_path / "b", rows, problem("optuna", stopping="halving"))
    assert (found[0].state.name, found[0].intermediate_values) == ("PRUNED", {0: 0.3})
    assert found[2].intermediate_values == {1: 0.6}


def test_the_constraint_is_told(tmp_path: Path) -> None:
    rows = {0: ("done", [-100.2]), 1: ("done", [0.4])}
    found = told(tmp_path, rows, problem("optuna"))
    assert [found[i].constraints["strengths"] for i in (0, 1)] == [0.2, 0.0]


def test_trials_outside_of_the_space_are_not_told(tmp_path: Path) -> None:
    spec, ledger = problem("optuna"), Ledger(tmp_path)
    values, _ = Proposals(spec, ledger).in_advance(5)
    ledger.open(0, {**values, "optim.learning_rate": 0.5}, "reference")
    ledger.open(1, {**values, WEIGHTS: dict(zip(DOMAINS, (0.0, 0.5, 0.25, 0.25), strict=True))}, "current")
    ledger.open(2, values, "random")
    assert len(Model(spec).told(*recorded(ledger))) == 1


def test_few_trials_are_no_model(tmp_path: Path) -> None:
    spec, ledger = problem("optuna"), Ledger(tmp_path)
    proposals = Proposals(spec, ledger)
    for trial in range(STARTUP - 1):
        ledger.open(trial, proposals.in_advance(trial + 1)[0], "random")
        ledger.append_report(trial, {"share": 1.0, "gain": 0.1, "violation": 0.0, "score": 0.1})
    assert Model(spec).propose(20, *recorded(ledger)) is None


def test_tune_gets_flat_configs_in_order_and_the_same_again(tmp_path: Path) -> None:
    spec = problem("optuna", trials=12, stopping="halving")
    searcher = TuneSearcher(Proposals(spec, Ledger(tmp_path)))
    configs = [searcher.suggest(f"t{i}") for i in range(SLOTS)]
    assert searcher.suggest("later") is None  # the first cohort has not reported
    ledger = sweep(spec, tmp_path)
    again = TuneSearcher(Proposals(spec, ledger))
    every = [again.suggest(f"u{i}") for i in range(12)]
    assert every[:SLOTS] == configs
    assert again.suggest("more") == TuneSearcher.FINISHED
    for i, config in enumerate(every):
        assert isinstance(config, dict)
        assert from_tune(config) == (i, ledger.trial(i).values)
    assert isinstance(configs[0], dict)
    assert configs[0]["data.weights/biology"] == 0.25


def test_the_first_are_recorded_before_tune_asks(tmp_path: Path) -> None:
    spec, ledger = problem("optuna", trials=12, stopping="halving"), Ledger(tmp_path)
    searcher = TuneSearcher(Proposals(spec, ledger))
    searcher.ahead(12)
    first = {trial.index: trial.values for trial in ledger.trials()}
    assert list(first) == list(range(SLOTS))  # what follows waits for the first cohort's reports
    configs = [searcher.suggest(f"t{i}") for i in range(SLOTS)]
    assert [from_tune(config) for config in configs if isinstance(config, dict)] == list(first.items())


def test_what_tune_gives_up_is_said_and_may_end_the_search(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    searcher = TuneSearcher(Proposals(problem("optuna", trials=20, stopping="halving"), ledger))
    for i in range(SLOTS):
        searcher.suggest(f"t{i}")

    def failed(index: int) -> bool:
        ledger.set_state(index, "failed", "its process died")
        return True

    searcher.on_error = failed
    for i in range(SLOTS):
        assert searcher.suggest("later") is None
        searcher.on_trial_complete(f"t{i}", error=True)
    assert isinstance(searcher.suggest("later"), dict)  # nobody waits for their reports any more
    searcher.on_error = lambda _: False
    searcher.on_trial_complete("later", error=True)
    assert searcher.suggest("more") == TuneSearcher.FINISHED


def test_where_nothing_is_stopped_only_whole_trials_are_told(tmp_path: Path) -> None:
    """Rungs are then only where trials are evaluated: the model is the one of whole trials."""
    spec = problem("optuna", stopping="none")
    rungs = spec.model_copy(update={"stopping": StoppingConfig(name="none", rungs=[0.1, 0.5])})
    whole = {i: ("done", [0.1 * i]) for i in range(STARTUP)}
    found = told(tmp_path / "told", {0: ("done", [0.1, 0.2, 0.3]), 1: ("running", [0.2, 0.4])}, rungs)
    assert [found[i].state.name for i in range(2)] == ["COMPLETE", "RUNNING"]
    proposed = []
    for name, each, before in (("whole", spec, []), ("rungs", rungs, [0.0, 0.0])):
        rows = {i: (state, [*before, *scores]) for i, (state, scores) in whole.items()}
        told(tmp_path / name, rows, each)
        proposed.append(Model(each).propose(STARTUP, *recorded(Ledger(tmp_path / name))))
    assert proposed[0] is not None
    assert proposed[0] == proposed[1]

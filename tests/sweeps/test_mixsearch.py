"""Mix search: merged experts, what is chosen from their scores, the stages, the fallback, and resuming."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from qwen_ray.config import build_config
from qwen_ray.data.packing import Row
from qwen_ray.data.tokenise import Example
from qwen_ray.errors import UserError
from qwen_ray.sweeps import mixsearch
from qwen_ray.sweeps.ledger import Ledger
from qwen_ray.sweeps.mixcandidates import lattice, neighbours, score_candidates
from qwen_ray.sweeps.mixproxy import bounded, merge, rank_correlation, score, score_folders
from qwen_ray.sweeps.mixsearch import BAYES, EXPERT, MIX, MixSearch
from qwen_ray.sweeps.mixstudy import Study, Trained
from qwen_ray.sweeps.mixsurrogate import Surrogate, key
from qwen_ray.sweeps.objective import judge
from qwen_ray.sweeps.proposals import Proposal
from qwen_ray.sweeps.simplex import Mix, Simplex
from qwen_ray.sweeps.spec import ObjectiveConfig, SweepConfig
from qwen_ray.training.packed import Adapter, Pack
from tests.conftest import ROOT

DOMAINS = ["biology", "history", "replay"]
BASE = {"biology": 4.0, "history": 4.2, "replay": 1.0}
RATE = 1e-3
Losses = dict[str, float]


# ---------------------------------------------------------------- merging, for real


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pack, Any, Path]:
    """A pack on the embedded model, and the adapters of two domains, exported after a few steps."""
    from qwen_ray.data.records import write_records
    from tests.conftest import sums

    folder = tmp_path_factory.mktemp("merge")
    write_records(folder / "data.jsonl", [*sums(60), *sums(60, seed=1, domain="more")])
    config = build_config(
        flags={
            "data.train": [str(folder / "data.jsonl")],
            "data.validation_fraction": 0.2,
            "data.weights": {"sums": 1.0, "more": 1.0},
            "data.max_length": 64,
            "optim.max_steps": 4,
            "optim.warmup_steps": 0,
            "tracking.wandb": "off",
        }
    )
    pack = Pack(config)
    for domain in ("sums", "more"):
        weights = {d: float(d == domain) for d in ("sums", "more")}
        data = config.data.model_copy(update={"weights": weights})
        pack.add(domain, config.model_copy(update={"data": data}))
    for _ in range(4):
        pack.step()
    for domain in ("sums", "more"):
        pack.export(domain, folder / domain)
    return pack, config, folder


def test_a_merged_adapter_is_the_sum_of_updates(trained: tuple[Pack, Any, Path]) -> None:
    pack, _, _ = trained
    experts = {domain: pack.weights(domain) for domain in ("sums", "more")}
    mix = {"sums": 0.3, "more": 0.7}
    merged = merge(experts, mix)
    for layer, (a, b) in merged.items():
        update = sum(mix[d] * expert[layer][1] @ expert[layer][0] for d, expert in experts.items())
        assert isinstance(update, torch.Tensor)
        assert len(a) == sum(len(expert[layer][0]) for expert in experts.values())
        torch.testing.assert_close(b @ a, update, rtol=1e-4, atol=1e-6)

    rows = pack.slots["sums"].data.validation
    (scored,) = score(pack, experts, [mix], rows)
    (base,) = pack.score([{}], rows)
    # The same update put into the base's own weights.
    layers = dict(pack.base.model.named_modules())
    with torch.no_grad():
        for layer, (a, b) in merged.items():
            layers[layer].weight += (b @ a).to(layers[layer].weight.device)
    (merged_base,) = pack.score([{}], rows)
    with torch.no_grad():
        for layer, (a, b) in merged.items():
            layers[layer].weight -= (b @ a).to(layers[layer].weight.device)
    for domain in rows:
        assert abs(scored[domain]) > 1e-3
        assert scored[domain] == pytest.approx(merged_base[domain] - base[domain], abs=2e-5)


def test_scores_of_exported_experts(trained: tuple[Pack, Any, Path]) -> None:
    pack, config, folder = trained
    experts = {domain: str(folder / domain) for domain in ("sums", "more")}
    mixes = [{"sums": 1.0, "more": 0.0}, {"sums": 0.25, "more": 0.75}]
    found = score_folders(pack, config, experts, mixes, held_out_tokens=10**6)
    # An expert's own score is its held-out loss.
    of_expert = pack.validation(["sums"])["sums"]
    for domain, loss in found["base"].items():
        assert loss == pytest.approx(pack.base_losses("sums")[f"eval_loss/{domain}"], abs=1e-6)
        assert found["rises"][0][domain] == pytest.approx(of_expert[f"eval_loss/{domain}"] - loss, abs=2e-5)
    assert found["rises"][1] != found["rises"][0]
    assert set(pack.slots) == {"sums", "more"}
    assert score_folders(pack, config, {}, [], held_out_tokens=1)["rises"] == []
    few = score_folders(pack, config, experts, mixes, held_out_tokens=64)
    assert few["base"] == found["base"]
    assert few["rises"] != found["rises"]


def test_experts_of_other_ranks_and_layers_merge() -> None:
    one: Adapter = {"q": (torch.ones(2, 3), torch.ones(4, 2))}
    two: Adapter = {"q": (torch.ones(1, 3), torch.ones(4, 1)), "v": (torch.ones(1, 3), torch.ones(5, 1))}
    merged = merge({"one": one, "two": two}, {"one": 0.5, "two": 0.5})
    assert merged["q"][0].shape == (3, 3)
    torch.testing.assert_close(merged["q"][1] @ merged["q"][0], torch.full((4, 3), 1.5))
    torch.testing.assert_close(merged["v"][1] @ merged["v"][0], torch.full((5, 3), 0.5))
    assert set(merge({"one": one, "two": two}, {"one": 1.0, "two": 0.0})) == {"q"}


def test_bounded_rows() -> None:
    rows = {"a": [Row((Example(str(i), "a", [1] * 10, [1] * 10),)) for i in range(5)]}
    assert [len(bounded(rows, tokens)["a"]) for tokens in (1, 10, 29, 30, 1000)] == [1, 1, 2, 3, 5]
    assert [row.ids for row in bounded(rows, 20)["a"]] == [("0",), ("2",)]


def test_rank_correlation_is_spearmans() -> None:
    rng = random.Random(0)
    for n in (2, 3, 8, 30):
        a, b = [rng.randint(0, n) for _ in range(n)], [rng.random() for _ in range(n)]
        if len(set(a)) > 1:
            assert rank_correlation(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation([1, 1], [1, 2]) is None
    assert rank_correlation([1], [1]) is None


# ---------------------------------------------------------------- what is chosen


def real_rises(mix: Mix) -> Losses:
    """What training on a mix does: saturating gains, forgetting without replay, two domains in conflict."""
    fought = 0.15 * mix["biology"] * mix["history"]
    return {
        "biology": -0.6 * math.sqrt(mix["biology"]) + fought,
        "history": -0.5 * math.sqrt(mix["history"]) + fought,
        "replay": 0.5 * math.exp(-9 * mix["replay"]) - 0.002,
    }


def merged_rises(mix: Mix) -> Losses:
    """What merging makes of it: right for an expert, off by a smooth error in between."""
    between = 1 - max(mix.values())
    real = real_rises(mix)
    return {"biology": real["biology"] * (1 - 0.3 * between), "history": real["history"]} | {
        "replay": real["replay"] + 0.4 * between * real["replay"] + 0.02 * between
    }


def misleading_rises(mix: Mix) -> Losses:
    """Scores that rank mixes by nothing at all, but an expert as it is."""
    if max(mix.values()) == 1:
        return real_rises(mix)
    rng = random.Random(str(key(mix)))
    return {"biology": -rng.random(), "history": -rng.random(), "replay": 0.1 * rng.random()}


def objective(tolerance: float = 0.02) -> ObjectiveConfig:
    return ObjectiveConfig(targets=["biology", "history"], strengths=["replay"], tolerance=tolerance)


def experts() -> list[Trained]:
    mixes = [{x: float(x == d) for x in DOMAINS} for d in DOMAINS]
    return [Trained(mix, real_rises(mix), f"{EXPERT}:x") for mix in mixes]


def best_gain(tolerance: float) -> float:
    judge_ = Study(objective(tolerance), [], None)
    return max(float(judge_.value(real_rises(m))) for m in Simplex(DOMAINS).lattice(60))


def test_value_is_the_rule_of_the_sweep() -> None:
    study = Study(objective(), [], None)
    for rises in (real_rises(m) for m in Simplex(DOMAINS).lattice(6)):
        named = {f"eval_loss/{d}": BASE[d] + rises[d] for d in rises}
        judged = judge(named, {f"eval_loss/{d}": BASE[d] for d in BASE}, objective())
        assert float(study.gain(rises)) == pytest.approx(judged.gain)
        assert (study.value(rises) > -math.inf) == judged.feasible
    all_targets = Study(ObjectiveConfig(), [], None)
    assert float(all_targets.value({"a": -1.0, "b": 0.0})) == 0.5


@pytest.mark.parametrize("tolerance", [0.005, 0.02, 0.05])
def test_three_verified_mixes_come_near_the_best(tolerance: float) -> None:
    simplex = Simplex(DOMAINS)
    uniform = Trained(simplex.uniform(), real_rises(simplex.uniform()), "reference")
    candidates = lattice(simplex, 200)[0]
    known = [*experts(), uniform]
    scores = {key(m): merged_rises(m) for m in [*candidates, *(t.mix for t in known)]}
    study = Study(objective(tolerance), known, scores)
    chosen = study.choose(candidates, 3)
    assert len({key(mix) for mix in chosen}) == 3
    reached = max(float(study.value(real_rises(mix))) for mix in chosen)
    assert reached >= 0.9 * best_gain(tolerance)
    assert study.choose(candidates, 3) == chosen
    # The scores as they are miss the constraint, or the gain that it leaves.
    by_score = max(candidates, key=lambda mix: float(study.value(scores[key(mix)])))
    assert max(0.0, float(study.value(real_rises(by_score)))) < reached


def test_mixes_are_chosen_together() -> None:
    candidates = lattice(Simplex(DOMAINS), 200)[0]
    known = [(t.mix, t.rises) for t in experts()]
    surrogate = Surrogate(known, {key(m): merged_rises(m) for m in candidates})
    value = Study(objective(0.005), [], None).value
    chosen = surrogate.choose(candidates, value, count=3, best=0.0)
    values = np.maximum(0.0, [value(draws) for draws in surrogate.draw(candidates)])
    one_by_one = np.argsort(-values.mean(1), kind="stable")[:3]
    assert chosen[0] == one_by_one[0]
    # What the best of them is expected to be.
    assert values[chosen].max(0).mean() > 1.01 * values[one_by_one].max(0).mean()


def test_surrogate_goes_through_what_was_measured() -> None:
    known = experts()
    mixes = [t.mix for t in known]
    candidates = lattice(Simplex(DOMAINS), 50)[0]
    scores = {key(m): merged_rises(m) for m in candidates}
    for of_candidates in (None, scores):
        surrogate = Surrogate([(t.mix, t.rises) for t in known], of_candidates)
        for t, draws in zip(known, surrogate.draw(mixes), strict=True):
            for domain, rise in t.rises.items():
                assert draws[domain].mean() == pytest.approx(rise, abs=0.02 * max(1, abs(rise)))
        (near, far) = surrogate.draw([known[0].mix, candidates[20]])
        assert np.std(far["replay"]) / abs(far["replay"].mean()) > (
            3 * np.std(near["replay"]) / abs(near["replay"].mean())
        )


def test_agreement_tells_good_scores_from_bad_ones() -> None:
    simplex = Simplex(DOMAINS)
    mixed = [simplex.uniform(), *list(neighbours(simplex, [simplex.uniform()], 0.1).values())[:3]]
    known = [*experts(), *(Trained(m, real_rises(m), MIX) for m in mixed)]
    for rises, good in ((merged_rises, True), (misleading_rises, False)):
        study = Study(objective(), known, {key(t.mix): rises(t.mix) for t in known})
        agreement = study.agreement()
        assert agreement is not None
        assert (agreement >= 0.9) == good
        for counted, with_experts in ((known, True), (known[3:], False)):
            by_domain = [
                spearmanr([t.rises[d] for t in counted], [rises(t.mix)[d] for t in counted]).statistic
                for d in BASE
            ]
            assert study.agreement(experts=with_experts) == pytest.approx(sum(by_domain) / 3)
    assert Study(objective(), known, None).agreement() is None


def test_candidates_keep_to_the_region_and_their_number() -> None:
    simplex = Simplex(DOMAINS, 0.02, {"replay": (0.1, 0.6)})
    grid, step = lattice(simplex, 40)
    assert 20 < len(grid) <= 40
    assert min(abs(a["replay"] - b["replay"]) for a in grid for b in grid if a["replay"] != b["replay"]) == (
        pytest.approx(step, rel=0.2)
    )
    asked: list[int] = []

    def rises(mixes: Sequence[Mix]) -> list[Losses]:
        asked.append(len(mixes))
        return [merged_rises(mix) for mix in mixes]

    found = score_candidates(simplex, [], rises, lambda scores, mixes: mixes[:3], most=60)
    assert len({key(mix) for mix, _ in found}) == len(found) == sum(asked) == 60
    assert len(asked) <= 3
    assert all(simplex.holds(mix) for mix, _ in found)
    assert all(scored == merged_rises(mix) for mix, scored in found)


# ---------------------------------------------------------------- the stages


def spec(out: Path, **changes: Any) -> SweepConfig:
    tree: dict[str, Any] = {
        "out": str(out),
        "run": {
            "model": {"name": "tiny"},
            "optim": {"max_steps": 10, "learning_rate": RATE},
            "data": {"train": ["x.jsonl"]},
        },
        "mixture": {"domains": DOMAINS, "floor": 0.02},
        "objective": objective().model_dump(),
        "trials": {"slots": 4},
        "mix_search": {"candidates": 60, "verify": 2, "learning_rates": [1.0, 2.0], "fallback_trials": 6},
    }
    return SweepConfig.model_validate({**tree, **changes})


class Trainer:
    """Stands for the trials: ends each with a report of what :func:`real_rises` says of its mix."""

    def __init__(self, settings: SweepConfig, *, fails: str = "", scores: Any = merged_rises) -> None:
        self.spec, self.fails, self.rises = settings, fails, scores
        self.asked = 0

    def score(self, experts_: Mapping[str, str], mixes: Sequence[Mix]) -> dict[str, Any]:
        assert set(experts_) == set(DOMAINS) or not mixes
        assert all(path.endswith("adapter") for path in experts_.values())
        self.asked += 1
        return {"base": BASE, "rises": [self.rises(mix) for mix in mixes]}

    def search(self) -> MixSearch:
        return MixSearch(self.spec, Ledger(Path(self.spec.out)), self.score)

    def train(self, index: int) -> None:
        ledger = Ledger(Path(self.spec.out))
        values, origin = ledger.trial(index).values, ledger.trial(index).origin
        if self.fails and origin.endswith(self.fails):
            ledger.set_state(index, "failed", "the loss is nan")
            return
        rises = real_rises(values["data.weights"])
        # A higher rate learns a little more and forgets a little more.
        times = values.get("optim.learning_rate", RATE) / RATE
        losses = {f"eval_loss/{d}": BASE[d] + rises[d] * (0.9 + 0.1 * times) for d in BASE}
        judged = judge(losses, {f"eval_loss/{d}": x for d, x in BASE.items()}, self.spec.objective)
        ledger.append_report(index, {"share": 1.0, "decision": "done", **losses, **vars(judged)})
        ledger.set_state(index, "done")

    def run(self, *, forgetful: bool = False) -> list[Proposal]:
        """All trials, stage by stage; ``forgetful``: a new search for every question, as after a kill."""
        search = self.search()
        made: list[Proposal] = []
        running: list[int] = []
        while len(made) < search.total:
            search = self.search() if forgetful else search
            proposal = search.propose(len(made))
            if proposal is None:
                if len(made) == search.total:
                    break
                assert running, "it waits, and nothing runs"
                self.train(running.pop(0))
            else:
                running.append(len(made))
                made.append(proposal)
        assert not running or not search.total > len(made)
        for index in running:
            self.train(index)
        return made


def test_stages(tmp_path: Path) -> None:
    trainer = Trainer(spec(tmp_path))
    made = trainer.run()
    assert [origin for _, origin in made] == ["reference", *(f"{EXPERT}:{d}" for d in DOMAINS), *[MIX] * 4]
    assert made[0][0] == {"data.weights": Simplex(DOMAINS).uniform()}
    for domain, (values, _) in zip(DOMAINS, made[1:4], strict=True):
        assert values == {"data.weights": {d: float(d == domain) for d in DOMAINS}}
    verified = [values for values, _ in made[4:]]
    assert [v.get("optim.learning_rate") for v in verified] == [None, 2 * RATE] * 2
    assert verified[0]["data.weights"] == verified[1]["data.weights"] != verified[2]["data.weights"]
    simplex = trainer.spec.simplex
    assert simplex is not None
    assert all(simplex.holds(v["data.weights"]) for v in verified)
    assert trainer.asked <= 3

    summary = trainer.search().summary()
    assert summary is not None
    assert summary["candidates"] <= 60 + 4
    assert summary["experts"] == [1, 2, 3]
    assert [row["index"] for row in summary["verified"]] == [4, 6]
    for row in summary["verified"]:
        rises = real_rises(made[row["index"]][0]["data.weights"])
        assert row["real"] == pytest.approx(-(rises["biology"] + rises["history"]) / 2)
    assert summary["rank_correlation"] >= summary["threshold"] == 0.9
    assert summary["fallback"] == 0
    assert all(mixsearch.is_protected(origin) == (origin != "reference") for _, origin in made)


def test_the_searchs_own_trials_come_first_and_the_best_of_them_is_built_on(tmp_path: Path) -> None:
    low_and_high = {"distribution": "choice", "values": [RATE, 2 * RATE]}
    settings = spec(
        tmp_path,
        space={"optim.learning_rate": low_and_high},
        search={"trials": 4},
        objective={"tolerance": 1},
    )
    made = Trainer(settings).run()
    own = made[:4]
    assert [origin for _, origin in own] == ["reference", "random", "random", "random"]
    assert all(values["data.weights"] == Simplex(DOMAINS).uniform() for values, _ in own)
    assert {values["optim.learning_rate"] for values, _ in own} == {RATE, 2 * RATE}
    # 2e-3 is better, without a strength to lose.
    assert all(values["optim.learning_rate"] == 2 * RATE for values, origin in made if EXPERT in origin)
    rates = [values["optim.learning_rate"] for values, origin in made if origin == MIX]
    assert rates == [2 * RATE, 4 * RATE] * 2
    summary = MixSearch(settings, Ledger(tmp_path)).summary()
    assert summary is not None
    assert [row["index"] for row in summary["verified"]] == [7, 9]


def test_the_runs_own_mix_does_not_stand_for_its_values(tmp_path: Path) -> None:
    """It gains more than the trials of another mix, at a worse rate."""
    settings = spec(
        tmp_path,
        space={"optim.learning_rate": {"distribution": "choice", "values": [RATE, 2 * RATE]}},
        search={"trials": 4},
        objective={"targets": ["biology", "history"], "tolerance": 1},
    )
    settings.run["data"]["weights"] = {"biology": 0.7, "history": 0.25, "replay": 0.05}
    made = Trainer(settings).run()
    reports = [Ledger(tmp_path).reports(i)[-1]["gain"] for i in range(5)]
    assert made[4][1] == "current"
    assert max(reports) == reports[4]
    assert all(values["optim.learning_rate"] == 2 * RATE for values, origin in made if EXPERT in origin)


def test_the_runs_own_mix_is_tried_and_used(tmp_path: Path) -> None:
    settings = spec(tmp_path)
    settings.run["data"]["weights"] = {"biology": 2, "history": 1, "replay": 1}
    made = Trainer(settings).run()
    assert made[1] == ({"data.weights": {"biology": 0.5, "history": 0.25, "replay": 0.25}}, "current")
    search = MixSearch(settings, Ledger(tmp_path))
    assert [t.origin for t in search.study().trained][:2] == ["reference", "current"]


@pytest.mark.parametrize("scores", [merged_rises, misleading_rises])
def test_resumed_is_undisturbed(tmp_path: Path, scores: Any) -> None:
    whole = Trainer(spec(tmp_path / "whole"), scores=scores)
    resumed = Trainer(spec(tmp_path / "resumed"), scores=scores)
    assert whole.run() == resumed.run(forgetful=True)
    assert whole.asked == resumed.asked
    again = resumed.search()
    assert again.total == len(whole.search().ledger.trials())
    assert [again.propose(i) for i in range(again.total)] == [
        whole.search().propose(i) for i in range(again.total)
    ]


def test_misleading_scores_are_not_believed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(spec(tmp_path), scores=misleading_rises)
    with caplog.at_level(logging.WARNING):
        made = trainer.run()
    assert "unlike real runs" in caplog.text
    assert sum(origin == BAYES for _, origin in made) == 6
    study = trainer.search().study()
    gains = {
        t.origin: float(study.value(t.rises))
        for t in sorted(study.trained, key=lambda t: study.value(t.rises))
    }
    assert gains[BAYES] == study.best >= 0.9 * best_gain(0.02)
    summary = trainer.search().summary()
    assert summary is not None
    assert summary["fallback"] == 6
    before = [t for t in study.trained if t.origin != BAYES]
    assert len(before) < len(study.trained)
    agreement = Study(objective(), before, study.scores).agreement()
    assert agreement is not None
    assert summary["rank_correlation"] == agreement < 0.9
    assert "unlike real runs" in summary["verdict"]


def test_it_ends_when_every_candidate_has_been_trained(tmp_path: Path) -> None:
    few = {"candidates": 4, "verify": 2, "learning_rates": [1.0], "fallback_trials": 8}
    trainer = Trainer(spec(tmp_path, mix_search=few), scores=misleading_rises)
    origins = [origin for _, origin in trainer.run()]
    assert origins[4:6] == [MIX, MIX]
    assert 0 < origins.count(BAYES) < 8
    assert trainer.search().summary() is not None


def test_without_a_fallback_it_ends_there(tmp_path: Path) -> None:
    settings = spec(
        tmp_path, mix_search={"candidates": 60, "verify": 2, "learning_rates": [1.0], "fallback": "none"}
    )
    made = Trainer(settings, scores=misleading_rises).run()
    assert [origin for _, origin in made][-2:] == [MIX, MIX]


def test_a_failed_expert_leaves_the_real_runs(tmp_path: Path) -> None:
    trainer = Trainer(spec(tmp_path), fails="history")
    made = trainer.run()
    assert sum(origin == BAYES for _, origin in made) == 6
    study = trainer.search().study()
    assert study.scores is None
    assert study.best >= 0.8 * best_gain(0.02)
    summary = trainer.search().summary()
    assert summary is not None
    assert summary["rank_correlation"] is None
    assert "failed" in summary["verdict"]


def test_searches_on_while_no_mix_keeps_the_strengths(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def optimistic(mix: Mix) -> Losses:
        real = real_rises(mix)
        return real if max(mix.values()) == 1 else real | {"replay": 0.3 * real["replay"] - 0.05}

    always_believed = {"candidates": 60, "verify": 2, "learning_rates": [1.0], "proxy_threshold": -1}
    settings = spec(tmp_path, objective=objective(0.002).model_dump(), mix_search=always_believed)
    trainer = Trainer(settings, scores=optimistic)
    made = trainer.run()
    rose = {o: [real_rises(v["data.weights"])["replay"] for v, of in made if of == o] for o in (MIX, BAYES)}
    assert trainer.search().believed
    assert min(rose[MIX]) > 0.002
    assert min(rose[BAYES]) <= 0.002
    # It stops with the cohort that has found one.
    before = rose[BAYES][: -settings.trials.slots]
    assert len(rose[BAYES]) % settings.trials.slots == 0
    assert not before or min(before) > 0.002
    assert trainer.search().study().best > 0.5 * best_gain(0.002)
    assert "no mix keeps the strengths" in caplog.text


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"mixture": None}, "mix_search"),
        ({"trials": {"kind": "plain"}}, "mix_search"),
        ({"mix_search": {"learning_rates": [0.5]}}, "mix_search.learning_rates"),
        ({"run": {"model": {"name": "tiny"}}}, "run.optim.max_steps"),
        (
            {
                "search": {"name": "optuna"},
                "space": {"optim.learning_rate": {"distribution": "uniform", "low": 1e-4, "high": 1e-3}},
            },
            "search.name",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, changes: dict[str, Any], where: str) -> None:
    with pytest.raises(UserError) as refused:
        MixSearch(spec(tmp_path, **changes), Ledger(tmp_path))
    assert refused.value.where == where


# ---------------------------------------------------------------- the benchmark


def test_quick_benchmark(tmp_path: Path) -> None:
    out, tables = tmp_path / "result.json", tmp_path / "tables.json"
    command = [sys.executable, str(ROOT / "benchmarks/mix_search.py"), "--quick"]
    command += ["--out", str(out), "--tables", str(tables)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())
    (world,) = result["worlds"]
    (table,) = json.loads(tables.read_text()).values()
    assert len(table["mixes"]) == result["settings"]["mixes"] == 10 + 1
    for mix, real, scored in zip(table["mixes"], table["real"], table["scores"], strict=True):
        assert len(set(mix) | set(real)) == 4
        if max(mix.values()) == 1:  # an expert's own score is its held-out loss
            assert scored == pytest.approx(real, abs=1e-4)
    assert all(correlation > 0 for correlation in world["rank_correlation"].values())
    for row in world["eps"].values():
        assert row["ours"]["runs"] == row["random"]["runs"] == 8
        assert row["uniform"]["runs"] == 1
        assert all(0 <= row[name]["regret"] <= 1 for name in ("ours", "random", "uniform"))

"""What a dry run says: trials known in advance, cost with and without halving, memory, time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.planner.hardware import hardware
from qwen_ray.sweeps.forecast import LAUNCH, forecast
from qwen_ray.sweeps.ledger import Ledger
from qwen_ray.sweeps.proposals import Proposals
from qwen_ray.sweeps.spec import SweepConfig

H100 = hardware("h100-80gb")
DOMAINS = ["biology", "history", "security", "replay"]


def spec(**changes: Any) -> SweepConfig:
    run = {
        "model": {"name": "3b"},
        "optim": {"max_steps": 500, "batch_size": 1, "gradient_accumulation": 1},
        "data": {"max_length": 256},
    }
    tree: dict[str, Any] = {
        "name": "rates",
        "embedded_data": True,
        "run": run,
        "space": {"optim.learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-3}},
        "search": {"trials": 16},
        "stopping": {"name": "none"},
        "trials": {"slots": 16},
    }
    return SweepConfig.model_validate({**tree, **changes})


def test_trials_are_those_that_will_be_tried(tmp_path: Path) -> None:
    mixed = spec(mixture={"domains": DOMAINS}, out=str(tmp_path / "sweep"))
    made = forecast(mixed, H100)
    proposals = Proposals(mixed, Ledger(tmp_path))
    assert [(t["values"], t["origin"]) for t in made.trials] == [proposals.propose(i) for i in range(16)]
    assert not (tmp_path / "sweep").exists()  # nothing is written
    model = forecast(mixed.model_copy(update={"search": mixed.search.model_copy(update={"name": "optuna"})}))
    assert [t["origin"] for t in model.trials[:5]] == [t["origin"] for t in made.trials[:5]]
    assert [t["values"] for t in model.trials[5:]] == [None] * 11
    assert "proposed on the way" in str(model)


def test_a_mixture_of_domains_that_are_not_read_yet_has_no_values() -> None:
    made = forecast(spec(mixture={}), H100)
    assert [t["values"] for t in made.trials] == [None] * 16
    assert "when the data" in str(made)


def test_cost_with_and_without_halving() -> None:
    whole = forecast(spec(), H100)
    assert (whole.trial_steps, whole.pack) == (16, [(1.0, 16)])
    halved = forecast(spec(stopping={"name": "halving"}), H100)
    assert halved.pack[0] == (pytest.approx(1 / 9), 16)
    # The reference to its end; of the others 15, 5 and 1.
    assert halved.trial_steps == pytest.approx(1 + 15 / 9 + 5 * 2 / 9 + 6 / 9)
    assert halved.seconds is not None
    assert whole.seconds is not None
    assert halved.seconds < whole.seconds


def test_a_pack_costs_nothing_up_to_the_launch_floor_and_then_its_tokens() -> None:
    made = {n: forecast(spec(trials={"slots": n}), H100) for n in (1, 2, 16)}
    floor = LAUNCH * 36 * 500
    assert made[1].seconds == pytest.approx(16 * floor)
    assert made[1].sequential_seconds == made[16].sequential_seconds == pytest.approx(made[1].seconds)
    assert made[2].seconds == pytest.approx(8 * floor)
    assert made[16].seconds is not None
    assert 3 < 16 * floor / made[16].seconds < 8  # where arithmetic has taken over


def test_engines_share_the_trials() -> None:
    one, two = (forecast(spec(trials={"slots": 4, "engines": e}), H100) for e in (1, 2))
    assert one.trial_steps == two.trial_steps == 16
    assert (one.seconds, two.memory) == (pytest.approx(2 * (two.seconds or 0)), one.memory)


def test_memory_is_the_base_once_and_of_each_trial_its_adapter() -> None:
    one, sixteen = (forecast(spec(trials={"slots": n}), H100) for n in (1, 16))
    assert one.memory is not None
    assert sixteen.memory is not None
    adapter = 1.871e6 * 16  # weights of rank 16 on every linear layer of 3B
    assert one.memory["parameters"] == pytest.approx(3.09e9 * 2 + adapter * 4, rel=0.01)
    assert sixteen.memory["parameters"] - one.memory["parameters"] == pytest.approx(
        15 * adapter * 4, rel=0.01
    )
    assert sixteen.memory["optimizer"] == pytest.approx(16 * adapter * 8, rel=0.01)
    assert sixteen.memory["activations"] == pytest.approx(16 * one.memory["activations"], rel=0.01)
    assert sixteen.memory_of_one == one.memory_of_one == pytest.approx(sum(one.memory.values()))
    ranks = {"method.r": {"distribution": "choice", "values": [8, 64]}}
    largest = forecast(spec(space=ranks), H100).memory
    assert largest is not None
    assert largest["optimizer"] == pytest.approx(4 * sixteen.memory["optimizer"], rel=0.01)


def test_without_a_gpu_only_memory_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = forecast(spec(run={"model": {"name": "tiny"}, "optim": {"max_steps": 100}}))
    assert made.seconds is None
    assert made.memory is not None
    assert sum(made.memory.values()) < 1e9
    assert "Time is not predicted without a GPU" in str(made)


def test_what_cannot_be_told_is_said() -> None:
    epochs = spec(run={"model": {"name": "3b"}})
    assert "set run.optim.max_steps" in str(forecast(epochs, H100))
    plain = forecast(spec(trials={"kind": "plain"}), H100)
    assert plain.memory is None
    assert "qwen-ray plan" in str(plain)
    assert "Estimates" in str(plain)
    assert json.loads(json.dumps(plain.to_dict()))["trial_steps"] == 16


def test_a_mix_search_has_stages() -> None:
    mixed = spec(
        mixture={"domains": DOMAINS},
        mix_search={"verify": 3, "learning_rates": [1, 2], "fallback_trials": 5},
        stopping={"name": "halving"},
        search={"trials": 9},
    )
    made = forecast(mixed, H100)
    assert [t["index"] for t in made.trials] == [*range(9 + 4 + 6)]
    origins = [t["origin"] for t in made.trials]
    assert origins == ["reference", *["random"] * 8, *(f"expert:{d}" for d in DOMAINS), *["mix"] * 6]
    assert all(t["values"]["data.weights"] == dict.fromkeys(DOMAINS, 0.25) for t in made.trials[:9])
    assert made.trial_steps == pytest.approx(1 + 8 / 9 + 2 * 2 / 9 + 6 / 9 + 4 + 6)
    assert made.pack[-2:] == [(1.0, 4), (1.0, 6)]
    assert "Up to 5 more trials" in str(made)

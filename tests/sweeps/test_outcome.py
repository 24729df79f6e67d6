"""The end of a sweep: who wins, by which evidence, and what is written and registered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_ray.config import read_config
from qwen_ray.evaluation.harness import SCHEMA
from qwen_ray.fsio import read_json, write_json
from qwen_ray.registry import Registry
from qwen_ray.sweeps.ledger import Ledger
from qwen_ray.sweeps.outcome import conclude
from qwen_ray.sweeps.spec import SweepConfig
from qwen_ray.sweeps.summary import summary
from tests.evaluation.test_compare import result, right

RATES = [2e-4, 1e-4, 4e-4, 8e-4]


def spec(out: Path, **confirm: Any) -> SweepConfig:
    """Plain trials, so that nothing has to be measured, and the benchmarks' results are there already."""
    return SweepConfig.model_validate(
        {
            "name": "example",
            "out": str(out),
            "run": {"model": {"name": "tiny"}, "data": {"train": ["a.jsonl"]}, "optim": {"max_steps": 100}},
            "space": {"optim.learning_rate": {"distribution": "log_uniform", "low": 1e-5, "high": 1e-3}},
            "objective": {"targets": ["biology"], "strengths": ["replay"], "confirm": confirm or None},
            "search": {"trials": len(RATES)},
            "stopping": {"name": "asha"},
            "trials": {"kind": "plain", "gpus": 2},
        }
    )


def report(step: int, gain: float, violation: float = 0.0) -> dict[str, Any]:
    score = gain if violation == 0 else -100 - violation
    return {
        "step": step, "total_steps": 100, "share": step / 100, "loss": 1.0, "gain": gain,
        "violation": violation, "feasible": violation == 0, "score": score, "rung": None,
        "eval_loss/replay": 0.1 + violation, "tokens": 10 * step, "seconds": 1.0,
        "decision": "done" if step == 100 else "stop",
    }  # fmt: skip


def sweep(out: Path, finals: list[dict[str, Any]]) -> None:
    """Trials that ended with ``finals``; those at their full length left an adapter."""
    ledger = Ledger(out)
    for index, final in enumerate(finals):
        trial = ledger.open(index, {"optim.learning_rate": RATES[index]}, "random" if index else "reference")
        ledger.append_report(index, final)
        ledger.set_state(index, "done" if final["step"] == 100 else "stopped")
        if final["step"] == 100:
            adapter = trial.folder / "adapter"
            write_json(adapter / "adapter_config.json", {"r": 8})
            (adapter / "adapter_model.safetensors").write_text(f"weights {index}")
            write_json(adapter / "lineage.json", {"base": {"id": "tiny", "fingerprint": "f"}})


def benchmarked(out: Path, **right_answers: tuple[int, int]) -> None:
    """EvalResults of 200 items a category: how many right in biology (target) and arithmetic (strength)."""
    for name, (target, strength) in right_answers.items():
        scores = {"biology": right(target, 200), "arithmetic": right(strength, 200)}
        file = {"base": "base", "reference": "reference"}.get(name, f"000{name[-1]}")
        write_json(out / "eval" / f"{file}.json", {**result(scores), "schema": SCHEMA})


def test_the_best_feasible_by_loss_wins_without_benchmarks(tmp_path: Path) -> None:
    sweep(tmp_path, [report(100, 1.0), report(100, 1.5), report(100, 1.9, 0.01), report(30, 9.0)])
    made = conclude(spec(tmp_path), tmp_path, sweep_id="s1", registry=tmp_path / "registry")
    assert made == read_json(tmp_path / "result.json")
    assert made["winner"] == 1
    assert made["confirmed"] == []
    assert made["registered"] == "example@1"
    assert [t["state"] for t in made["trials"]] == ["done", "done", "done", "stopped"]
    assert [t["adapter"] for t in made["trials"]][1::2] == ["trials/0001/adapter", None]
    # 3 x 100 + 30 steps were made; at full length 400. Each took 1 s, the stopped one at that pace 3.3 s.
    assert made["cost"]["trial_steps"] == 330
    assert made["cost"]["full_trial_steps"] == 400
    assert made["cost"]["sequential_seconds"] == pytest.approx(3 + 100 / 30)
    assert made["cost"]["gpu_hours"] == pytest.approx(2 * 4 / 3600)
    best = read_config(tmp_path / "best.yaml")
    assert best.optim.learning_rate == RATES[1]
    assert best.out == f"{tmp_path}-best"


def test_the_front_is_what_no_other_beats(tmp_path: Path) -> None:
    """Trial 1 gains most of those that lost nothing; trial 2 more still, at a price; 0 is worse than 1."""
    sweep(tmp_path, [report(100, 1.0), report(100, 1.5), report(100, 1.9, 0.01), report(30, 9.0)])
    made = conclude(spec(tmp_path), tmp_path, sweep_id="s1", registry=tmp_path / "registry")
    assert made["pareto"] == [1, 2]


def test_benchmarks_have_the_last_word(tmp_path: Path) -> None:
    """Trial 2 is best by loss and forgets arithmetic; trial 1 wins, and its lineage says by how much."""
    sweep(tmp_path, [report(100, 1.0), report(100, 1.5), report(100, 1.9), report(100, 0.5)])
    benchmarked(
        tmp_path, base=(50, 190), reference=(100, 190), trial1=(150, 189), trial2=(180, 150)
    )  # trial 3 is not among the best two, so it needs no result
    made = conclude(
        spec(tmp_path, top=2, tolerance=0.04), tmp_path, sweep_id="s1", registry=tmp_path / "registry"
    )
    assert made["winner"] == 1
    rows = {row["index"]: row for row in made["confirmed"]}
    assert set(rows) == {0, 1, 2}
    assert rows[1]["gain"] == pytest.approx(0.5)
    assert rows[1]["feasible"]
    assert not rows[2]["feasible"]
    assert "arithmetic lost 20.0 points" in rows[2]["reasons"][0]
    versus = made["versus_reference"]
    assert versus["delta"] == pytest.approx(0.25)
    assert 0.1 < versus["interval"][0] < 0.25 < versus["interval"][1]
    assert versus["n"] == 200
    adapter = Registry(tmp_path / "registry").resolve("example", "candidate")
    assert (adapter.path / "adapter_model.safetensors").read_text() == "weights 1"
    assert adapter.lineage["sweep"]["id"] == "s1"
    assert adapter.lineage["sweep"]["values"] == {"optim.learning_rate": RATES[1]}
    assert adapter.lineage["sweep"]["confirmed"]["gain"] == pytest.approx(0.5)
    text = summary(tmp_path, made, model="tiny", registry=tmp_path / "registry")
    assert "winner:   trial 1" in text
    assert "no evidence" not in text
    assert f"qwen-ray serve --model tiny --registry {tmp_path / 'registry'}" in text


def test_a_difference_that_may_be_none_is_called_so(tmp_path: Path) -> None:
    sweep(tmp_path, [report(100, 1.0), report(100, 1.5), report(100, 0.9), report(100, 0.5)])
    benchmarked(tmp_path, base=(50, 190), reference=(100, 190), trial1=(103, 190))
    made = conclude(spec(tmp_path, top=1), tmp_path, sweep_id="s1", registry=tmp_path / "registry")
    assert made["winner"] == 1
    low, high = made["versus_reference"]["interval"]
    assert low < 0 < high
    assert "no evidence that it beats the uniform mix" in summary(
        tmp_path, made, model="tiny", registry=tmp_path
    )


@pytest.mark.parametrize("violation", [0.0, 0.007])
def test_the_reference_may_win(tmp_path: Path, violation: float) -> None:
    """Also where its held-out loss is a little too high: the benchmarks have the last word."""
    sweep(tmp_path, [report(100, 1.0, violation), report(100, 1.5), report(100, 0.9), report(100, 0.5)])
    benchmarked(tmp_path, base=(50, 190), reference=(100, 190), trial1=(90, 190))
    made = conclude(spec(tmp_path, top=1), tmp_path, sweep_id="s1", registry=tmp_path / "registry")
    assert made["winner"] == 0
    assert made["versus_reference"] is None
    assert "no trial beat the reference" in summary(tmp_path, made, model="tiny", registry=tmp_path)


@pytest.mark.parametrize("benchmarks", [False, True])
def test_where_none_keeps_the_strengths_nothing_is_registered(tmp_path: Path, benchmarks: bool) -> None:
    if benchmarks:  # by loss all is well; by lm-eval nothing is
        sweep(tmp_path, [report(100, 1.0), report(100, 1.5), report(30, 0.9), report(30, 0.5)])
        benchmarked(tmp_path, base=(50, 190), reference=(100, 150), trial1=(150, 140))
    else:
        sweep(tmp_path, [report(100, 1.0, 0.3), report(100, 1.5, 0.2), report(100, 2, 0.4), report(30, 0.5)])
    settings = {"top": 1} if benchmarks else {}
    made = conclude(spec(tmp_path, **settings), tmp_path, sweep_id="s1", registry=tmp_path / "registry")
    assert made["winner"] is None
    assert made["registered"] is None
    assert made["best_config"] is None
    assert not (tmp_path / "best.yaml").exists()
    assert not (tmp_path / "registry").exists()
    text = summary(tmp_path, made, model="tiny", registry=tmp_path)
    assert "no trial kept the strengths" in text
    assert ("arithmetic lost 25.0 points" if benchmarks else "nearest is trial 1") in text


def test_an_outcome_that_was_interrupted_registers_once(tmp_path: Path) -> None:
    sweep(tmp_path, [report(100, 1.0), report(100, 1.5), report(30, 1.9), report(30, 9.0)])
    registry = Registry(tmp_path / "registry")
    for _ in range(2):
        conclude(spec(tmp_path), tmp_path, sweep_id="s1", registry=registry.root)
    assert registry.versions("example") == [1]
    conclude(spec(tmp_path), tmp_path, sweep_id="s2", registry=registry.root)  # another sweep
    assert registry.versions("example") == [1, 2]
    assert registry.aliases("example") == {"candidate": 2}

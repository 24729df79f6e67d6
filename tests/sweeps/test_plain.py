"""Plain trials on a real cluster: alone and with a Ray Train worker, stopped, failed and resumed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.tune.experiment import Trial

from qwen_ray import cluster
from qwen_ray.config import build_config
from qwen_ray.data.records import write_records
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, write_json, write_jsonl
from qwen_ray.sweeps import plain
from qwen_ray.sweeps.driver import run_sweep
from qwen_ray.sweeps.folder import prepared
from qwen_ray.sweeps.ledger import REPORTS, Ledger
from qwen_ray.sweeps.plain import _REPORTED, Asha, base_losses
from qwen_ray.sweeps.spec import SweepConfig
from qwen_ray.training.driver import TrainedRun
from qwen_ray.training.tracking import read_metrics
from tests.conftest import sums

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

DIVERGES = 1e30
OURS = ("run_trial", "TrainController", "RayTrainWorker")
"""How the titles of a trial's processes begin."""


@pytest.fixture(scope="module")
def two_cpus() -> Iterator[None]:
    cluster.connect("local", num_cpus=2)
    yield
    cluster.disconnect()


def spec(folder: Path, rates: list[float], *, run: dict[str, Any] | None = None) -> SweepConfig:
    """Full fine-tuning at the reference's rate and at ``rates``, in this order, one after another."""
    data = folder / "data.jsonl"
    write_records(data, [*sums(120), *sums(60, seed=1, domain="more")])
    return prepared(
        SweepConfig.model_validate(
            {
                "name": "plain",
                "out": str(folder / "out"),
                "run": {
                    "method": {"name": "full"},
                    "data": {"train": [str(data)], "max_length": 96, "validation_fraction": 0.1},
                    "optim": {"max_steps": 12, "warmup_steps": 1, "learning_rate": 1e-3},
                    "checkpoint": {"every_steps": 3},
                    "tracking": {"wandb": "off"},
                    **(run or {}),
                },
                "space": {"optim.learning_rate": {"distribution": "choice", "values": rates}},
                "objective": {"targets": ["sums"], "strengths": ["more"], "tolerance": 50.0},
                "search": {"name": "grid", "trials": 1 + len(rates)},
                "stopping": {"name": "asha", "eta": 2, "rungs": [0.25, 0.5]},
                "trials": {"kind": "plain", "cpus": 1, "max_concurrent": 1},
            }
        )
    )


def still_held() -> list[str]:
    """What of the cluster is held after a minute: placement groups, processes, CPUs."""
    import ray
    from ray.util.placement_group import placement_group_table

    def held() -> list[str]:
        groups = [str(g) for g in placement_group_table().values() if g["state"] != "REMOVED"]
        titles = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # a zombie is one, too
                titles.append(" ".join(process.cmdline()))
        at_work = [t for t in titles if t.startswith(tuple(f"ray::{name}" for name in OURS))]
        free = ray.available_resources().get("CPU", 0)
        return [*groups, *at_work, *([] if free == 2 else [f"{2 - free} CPU"])]

    deadline = time.monotonic() + 60
    while held() and time.monotonic() < deadline:
        time.sleep(1)
    return held()


def test_trials_are_stopped_fail_alone_and_go_on(two_cpus: None, tmp_path: Path) -> None:
    """Beside the reference's 1e-3, the trial at 1e-9 learns nothing, and one diverges.

    Then what the reference did after its first report is taken from the ledger, as if the driver had been
    killed: resumed, it reports what is recorded, and the rest from its own metrics.
    """
    sweep = spec(tmp_path, [1e-9, DIVERGES])
    result = run_sweep(sweep, resume=False, note=lambda _: None).result
    trials = {t["index"]: t for t in result["trials"]}
    assert [trials[i]["state"] for i in range(3)] == ["done", "stopped", "failed"]
    assert [[r["step"] for r in trials[i]["reports"]] for i in range(2)] == [[3, 6, 12], [3]]
    assert "lower optim.learning_rate" in trials[2]["error"]
    assert trials[2]["reports"][-1]["score"] == -1e9
    out = Path(sweep.out)
    losses = read_json(out / "base_losses.json")
    last = trials[0]["reports"][-1]
    assert last["gain"] == pytest.approx(losses["eval_loss/sums"] - last["eval_loss/sums"])
    assert last["gain"] > 0
    assert last["decision"] == "done"
    assert last["tokens"] == sum(row["tokens"] for row in read_metrics(out / "trials" / "0000"))
    assert (out / "trials" / "0000" / "model" / "model.safetensors").is_file()
    assert result["winner"] == 0
    assert result["registered"] is None  # a whole model is no adapter
    assert still_held() == []

    ledger = Ledger(out)
    write_jsonl(ledger.folder(0) / REPORTS, ledger.reports(0)[:1])
    ledger.set_state(0, "running")
    write_json(out / "sweep.json", {**read_json(out / "sweep.json"), "state": "searching"})
    lines = [(out / "trials" / f"000{i}" / "metrics.jsonl").read_bytes() for i in range(3)]
    again = run_sweep(sweep, resume=True, note=lambda _: None).result
    assert [(out / "trials" / f"000{i}" / "metrics.jsonl").read_bytes() for i in range(3)] == lines
    timeless = [
        [{k: v for k, v in r.items() if k != "seconds"} for t in made["trials"] for r in t["reports"]]
        for made in (result, again)
    ]
    assert timeless[0] == timeless[1]
    assert again["winner"] == result["winner"]


def asha(folder: Path, stopping: str, scores: list[float]) -> list[str]:
    """What is decided on trials that come to the first of three points with these scores."""
    spec = SweepConfig.model_validate({"stopping": {"name": stopping, "eta": 2, "rungs": [0.25, 0.5]}})
    ledger = Ledger(folder / stopping)
    scheduler = Asha(spec, ledger)
    scheduler.set_search_properties("score", "max")
    report = {"level": 1, "share": 0.25, "recorded": None, "error": None}
    for index, score in enumerate(scores):
        ledger.open(index, {}, "random")
        trial = Trial("plain", stub=True, config={"trial": index})
        scheduler.on_trial_add(None, trial)
        result = {**dict.fromkeys(_REPORTED), **report, "score": score}
        scheduler.on_trial_result(None, trial, result)
    return [ledger.reports(i)[0]["decision"] for i in range(len(scores))]


def test_rungs_stop_trials_only_where_stopping_says_so(tmp_path: Path) -> None:
    assert asha(tmp_path, "asha", [0.3, 0.4, 0.1]) == ["continue", "continue", "stop"]
    assert asha(tmp_path, "none", [0.3, 0.4, 0.1]) == ["continue"] * 3


@pytest.mark.parametrize("end", [8, 12])
def test_a_run_that_ended_itself_has_not_kept_the_strengths(
    end: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it gained; nor need it have been evaluated."""
    sweep = spec(tmp_path, [1e-3])
    out, why = Path(sweep.out), f"step {end}: forgetting, more than 4 points below the baseline"
    ledger, told = Ledger(out), list[dict[str, Any]]()
    folder = ledger.open(0, {}, "reference").folder
    row = {"step": end, "total_steps": 12, "loss": 1.0, "tokens": 5}

    def run_training(run: Any, **_: Any) -> TrainedRun:
        write_jsonl(folder / "metrics.jsonl", [row])
        return TrainedRun(out, folder / "model", end, 0, 1.0, None, stopped=why)

    monkeypatch.setattr(plain, "run_training", run_training)
    monkeypatch.setattr(plain.tune, "report", told.append)
    plain.run_trial({"trial": 0}, spec=sweep, out=out, base={}, group="")
    scheduler, trial = Asha(sweep, ledger), Trial("plain", stub=True, config={"trial": 0})
    scheduler.set_search_properties("score", "max")
    scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, trial, told[0])
    (report,) = ledger.reports(0)
    assert (report["share"], report["decision"], report["feasible"]) == (end / 12, "stop", False)
    assert (ledger.trial(0).state, ledger.trial(0).error) == ("failed", why)


def test_the_base_is_measured_whatever_a_pack_refuses(data_file: Path) -> None:
    refused = ["method.name=full", "optim.name=adamw_8bit", "precision=fp16"]
    refused += ["evaluate.suites=[tiny]", "compute.attention=block_mask"]
    plain, other = (
        base_losses(build_config(flags={"data.train": [str(data_file)]}, sets=sets)) for sets in ([], refused)
    )
    assert plain.keys() == {"eval_loss", "eval_loss/more", "eval_loss/sums"}
    assert other == pytest.approx(plain, rel=2e-3)


def test_a_base_in_four_bits_is_measured_in_four_bits(data_file: Path) -> None:
    flags = {"data.train": [str(data_file)], "precision": "fp32"}
    whole, coarse, exact = (
        base_losses(build_config(flags={**flags, "method.name": name, **more}))["eval_loss"]
        for name, more in (
            ("lora", {}),
            ("qlora", {"method.quantization": "fp4"}),
            ("qlora", {"method.quantization": "nf4"}),
        )
    )
    assert len({whole, coarse, exact}) == 3
    assert whole == pytest.approx(exact, rel=0.1)


def test_stopped_runs_with_workers_leave_nothing(two_cpus: None, tmp_path: Path) -> None:
    sweep = spec(tmp_path, [1e-9], run={"cluster": {"workers": 1}})
    result = run_sweep(sweep, resume=False, note=lambda _: None).result
    assert [t["state"] for t in result["trials"]] == ["done", "stopped"]
    assert len(result["trials"][1]["reports"]) == 1
    assert still_held() == []


def test_a_trial_that_does_not_fit_is_refused(two_cpus: None, tmp_path: Path) -> None:
    sweep = spec(tmp_path, [1e-3], run={"cluster": {"workers": 3}})
    with pytest.raises(UserError, match="a trial needs 3 CPU; the cluster has 2 CPU"):
        run_sweep(sweep, resume=False, note=lambda _: None)

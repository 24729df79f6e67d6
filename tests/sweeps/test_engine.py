"""The engine without Ray: who trains when, what is decided, and that nothing of it depends on the clock."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.sweeps.engine import EngineCore, Member, steps_of
from qwen_ray.sweeps.engine_actor import Engine, GaveUp
from qwen_ray.sweeps.halving import Halving
from qwen_ray.sweeps.journal import DIED, Journal, forget_failures
from qwen_ray.sweeps.ledger import Ledger, read_lines
from qwen_ray.training.checkpoint import complete, step_of
from qwen_ray.training.tracking import read_metrics
from tests.sweeps.packed_example import (
    NAN,
    POINTS,
    STEPS,
    VALUES,
    Values,
    drive,
    example,
    saved_steps,
    timeless,
    times_trained,
)

PATIENT = 120.0
"""Seconds that nobody should have to wait."""
DIVERGED = rf"the (loss|gradient's norm) is (nan|inf) at step {POINTS[0]};"


def test_every_trial_ends_as_halving_says(undisturbed: tuple[Path, dict[int, Any]]) -> None:
    out, reports = undisturbed
    assert list(reports) == list(range(len(VALUES)))
    halving, at_rung = Halving([1 / 9, 1 / 3], 3), [0, 0]
    for line in read_lines(out / "engines" / "0.jsonl"):
        if "steps" in line:
            continue
        came = {int(i): r for i, r in line["reports"].items() if r["rung"] is not None}
        for rung in {r["rung"] for r in came.values()}:
            goes_on = halving.arrive(rung, {i: r["score"] for i, r in came.items()})
            assert {i: r["decision"] == "continue" for i, r in came.items()} == goes_on
            at_rung[rung] += len(came)
    assert at_rung == [5, 2]  # all but the one that failed; then the best and the reference
    assert [r["step"] for r in reports[0]] == POINTS
    states = {t.index: t.state for t in Ledger(out).trials()}
    assert states == {0: "done", 1: "stopped", 2: "done", NAN: "failed", 4: "stopped", 5: "stopped"}


def test_freed_slots_are_taken_again(undisturbed: tuple[Path, dict[int, Any]]) -> None:
    _, reports = undisturbed
    first = {index: rows[0]["boundary"] for index, rows in reports.items()}
    assert first[0] == first[1] == first[2] < first[4] == first[5]
    assert reports[2][1]["boundary"] > first[4]  # the survivors trained on beside the newcomers


def test_reports_say_what_was_gained(undisturbed: tuple[Path, dict[int, Any]]) -> None:
    _, reports = undisturbed
    last = reports[2][-1]
    assert (last["share"], last["decision"], last["rung"], last["feasible"]) == (1.0, "done", None, True)
    assert last["gain"] == last["score"] > 0
    assert {"eval_loss", "eval_loss/sums", "eval_loss/more"} <= last.keys()
    bases = {r["gain"] + r["eval_loss/sums"] for i, rows in reports.items() if i != NAN for r in rows}
    assert max(bases) - min(bases) < 1e-6  # one base for all
    assert 0 < reports[2][0]["tokens"] < reports[2][1]["tokens"]
    assert 0 < reports[2][0]["seconds"] < reports[2][1]["seconds"]


def test_nan_fails_alone(undisturbed: tuple[Path, dict[int, Any]]) -> None:
    out, reports = undisturbed
    (report,) = reports[NAN]
    assert (report["decision"], report["score"], report["feasible"]) == ("stop", -1e9, False)
    assert re.match(DIVERGED, Ledger(out).trial(NAN).error or "")
    assert all(r["score"] > -1e9 for i, rows in reports.items() if i != NAN for r in rows)


def test_each_trial_is_a_run_folder(undisturbed: tuple[Path, dict[int, Any]]) -> None:
    from peft import LoraConfig
    from safetensors.torch import load_file

    out, reports = undisturbed
    for index, rows in reports.items():
        folder = Ledger(out).folder(index)
        metrics = read_metrics(folder)
        assert [m["step"] for m in metrics] == list(range(1, rows[-1]["step"] + 1))
        assert (folder / "config.yaml").is_file()
        if index == NAN:  # nobody could go on from it or serve it
            assert {p.name for p in folder.iterdir()}.isdisjoint({"adapter", ".artifact"})
            assert not complete(folder / "checkpoints")
            continue
        (saved,) = complete(folder / "checkpoints")
        assert step_of(saved) == rows[-1]["step"]
        assert LoraConfig.from_pretrained(folder / "adapter").r == VALUES[index]["method.r"]
        assert load_file(folder / "adapter" / "adapter_model.safetensors")
        lineage = json.loads((folder / "adapter" / "lineage.json").read_text())
        assert lineage["config"]["method"]["r"] == VALUES[index]["method.r"]
        assert lineage["step"] == rows[-1]["step"]
    assert metrics[-1]["eval_loss/sums"] == rows[-1]["eval_loss/sums"]


def test_what_is_recorded_is_not_trained_again(undisturbed: tuple[Path, dict[int, Any]]) -> None:
    out, reports = undisturbed
    rows = (Ledger(out).folder(0) / "metrics.jsonl").read_text()
    core = EngineCore(example(out), out, gang_seconds=PATIENT)
    assert drive(core, len(VALUES), 4) == reports
    with pytest.raises(RuntimeError, match="ended with report 2"):
        core.advance(0, 3)
    core.close()
    assert (Ledger(out).folder(0) / "metrics.jsonl").read_text() == rows


@pytest.mark.parametrize("steps", [1, 9])
def test_stopped_anywhere_it_goes_on_as_if_it_had_not_been(
    steps: int, undisturbed: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    spec = example(tmp_path)
    core = EngineCore(spec, tmp_path, gang_seconds=PATIENT)
    driver = threading.Thread(target=drive, args=(core, len(VALUES), 4))
    driver.start()
    while len(read_metrics(Ledger(tmp_path).folder(2))) < steps:
        time.sleep(0.001)
    core.close()
    driver.join()
    saved = saved_steps(tmp_path)
    again = EngineCore(spec, tmp_path, gang_seconds=PATIENT)
    assert timeless(drive(again, len(VALUES), 4)) == timeless(undisturbed[1])
    again.close()
    assert saved or steps < POINTS[0]
    for index, step in saved.items():
        times = times_trained(tmp_path, index)
        assert all(times[s] == 1 for s in range(1, step + 1)), f"trial {index} did not go on from {step}"


class Killed(EngineCore):
    """Dies before anything is decided in step number ``at``."""

    at, steps = 3, 0

    def _step(self, turn: Sequence[Member]) -> None:
        self.steps += 1
        if self.steps == self.at:
            self._train(turn)
            self._closed = True
            self._noticed()
        else:
            super()._step(turn)


def test_stopped_between_rungs_all_are_where_they_were(tmp_path: Path) -> None:
    """Trials 0 and 1 are on the way to the second rung when 3 has been stopped at the first: it is to take 4
    just as long to come there as it takes them, or others are compared with one another."""
    values: Values = [{"optim.learning_rate": rate} for rate in (2e-3, 1e-2, 3e-4, 1e-3, 2e-4)]
    spec = example(tmp_path, values=values, slots=3, stopping={"rungs": [1 / 4, 3 / 4]})
    spec.run["optim"]["max_steps"] = 4
    for kind in (Killed, EngineCore):
        core = kind(spec, tmp_path, gang_seconds=PATIENT)
        reports = drive(core, len(values), 3)
        core.close()
    first = {i: rows[0]["boundary"] for i, rows in reports.items()}
    assert first == {0: 0, 1: 0, 2: 0, 3: 1, 4: 3}
    assert [rows[1]["boundary"] for rows in (reports[0], reports[1])] == [2, 2]


def test_trials_that_others_are_made_of_run_to_their_end(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    origins = ["reference", "expert:sums", "random", "random", "mix"]
    rates = [2e-3, 1e-4, 1e-2, 4e-3, 3e-3]
    values = [{"optim.learning_rate": rate} for rate in rates]
    for index, (each, origin) in enumerate(zip(values, origins, strict=True)):
        ledger.open(index, each, origin)
    spec = example(tmp_path, values=values, slots=5)
    for _ in range(2):  # and so it is when the decisions are repeated
        core = EngineCore(spec, tmp_path, lease_seconds=PATIENT)
        ended = {i: rows[-1]["decision"] for i, rows in drive(core, 5, 5).items()}
        core.close()
        assert ended == {0: "done", 1: "done", 2: "done", 3: "stop", 4: "done"}


def test_a_decision_is_made_for_all_or_for_none(
    undisturbed: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    shutil.copytree(undisturbed[0], tmp_path / "copy")
    ledger = Ledger(tmp_path / "copy")
    # It died after the decision, before all trials' own files said so.
    (ledger.folder(4) / "reports.jsonl").unlink()
    ledger.set_state(4, "running")
    ledger.set_state(NAN, "running")
    journal = Journal(ledger, 0)
    assert ledger.reports(4) == undisturbed[1][4]
    assert [ledger.trial(i).state for i in (4, NAN)] == ["stopped", "failed"]
    assert re.match(DIVERGED, ledger.trial(NAN).error or "")
    journal.close()
    # It died while it wrote the decision: nothing was decided.
    lines = (tmp_path / "copy" / "engines" / "0.jsonl").read_bytes()
    (tmp_path / "copy" / "engines" / "0.jsonl").write_bytes(lines[:-2])
    journal = Journal(ledger, 0)
    assert not journal.ended(0)
    assert journal.ended(1)
    journal.close()


def test_the_others_do_not_wait_for_one_that_is_silent(
    undisturbed: tuple[Path, dict[int, Any]], tmp_path: Path
) -> None:
    values = VALUES[:3]
    core = EngineCore(
        example(tmp_path, values=values, slots=3, stopping={"name": "none", "rungs": [1 / 9]}),
        tmp_path,
        gang_seconds=PATIENT,
        lease_seconds=0.2,
    )
    ended: dict[int, Any] = {}

    def run(index: int) -> None:
        core.advance(index, 0)
        if index != 2:
            ended[index] = core.advance(index, 1)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [ended[i]["step"] for i in (0, 1)] == [STEPS, STEPS]
    assert len(read_metrics(Ledger(tmp_path).folder(2))) == POINTS[0]
    assert core.advance(2, 1)["step"] == STEPS  # it comes back
    core.close()
    trained = [json.loads(line)["step"] for line in (Ledger(tmp_path).folder(2) / "metrics.jsonl").open()]
    assert trained == [1, 2, 2, *range(3, STEPS + 1), STEPS]  # each once, and twice where it was evaluated


def test_proposed_trials_train_while_their_processes_start(tmp_path: Path) -> None:
    core = EngineCore(example(tmp_path, values=VALUES[:3], slots=2), tmp_path, lease_seconds=PATIENT)
    ledger, deadline = Ledger(tmp_path), time.monotonic() + PATIENT
    while not ledger.reports(1) and time.monotonic() < deadline:
        time.sleep(0.01)
    # To their first point, in the order of their indices, and no further until someone asks.
    assert [len(ledger.reports(i)) for i in range(3)] == [1, 1, 0]
    assert [core.advance(i, 0)["boundary"] for i in range(2)] == [0, 0]
    assert [len(read_metrics(ledger.folder(i))) for i in range(3)] == [POINTS[0], POINTS[0], 0]
    core.close()


def test_who_leaves_is_not_waited_for_and_may_come_back(tmp_path: Path) -> None:
    core = EngineCore(
        example(tmp_path, values=VALUES[:2], slots=2, stopping={"name": "none", "rungs": [1 / 9]}),
        tmp_path,
        gang_seconds=PATIENT,
        lease_seconds=PATIENT,
    )
    first = [threading.Thread(target=core.advance, args=(i, 0)) for i in range(2)]
    for thread in first:
        thread.start()
    for thread in first:
        thread.join()
    core.leave(1)
    assert core.advance(0, 1)["decision"] == "done"
    assert Ledger(tmp_path).trial(1).state == "running"
    assert core.advance(1, 1)["step"] == STEPS
    core.close()


def test_only_who_asks_for_reports_takes_a_trial_out(tmp_path: Path) -> None:
    core = EngineCore(example(tmp_path, values=VALUES[:2]), tmp_path, lease_seconds=PATIENT)
    got: list[Any] = []
    asking = threading.Thread(target=lambda: got.append(core.advance(0, 0, "a process")))
    asking.start()
    while not (0 in core._members and core._members[0].holder):
        time.sleep(0.001)
    core.join(0)
    core.leave(0, "another, started for the same trial")
    assert core.advance(1, 0)["boundary"] == 0
    asking.join()
    assert got[0]["boundary"] == 0
    core.close()


def test_who_does_not_come_is_waited_for_only_so_long(tmp_path: Path) -> None:
    core = EngineCore(example(tmp_path, values=VALUES[:3]), tmp_path, lease_seconds=0.3)
    assert [core.advance(0, i)["step"] for i in range(2)] == POINTS[:2]
    assert [len(Ledger(tmp_path).reports(i)) for i in (1, 2)] == [1, 1]
    core.close()
    with pytest.raises(RuntimeError, match="closed"):
        core.join(1)


def test_a_freed_slot_waits_for_a_proposal_only_so_long(tmp_path: Path) -> None:
    spec = example(tmp_path, values=VALUES[:3], slots=3, search={"trials": 5})
    core = EngineCore(spec, tmp_path, gang_seconds=0.3, lease_seconds=PATIENT)
    assert [rows[-1]["decision"] for rows in drive(core, 3, 3).values()] == ["done", "stop", "done"]
    core.close()


def test_bad_values_fail_their_trial_only(tmp_path: Path) -> None:
    values = [VALUES[0], {"data.weights": {"suns": 1.0}}, {"optim.max_steps": 2}]
    core = EngineCore(example(tmp_path, values=values), tmp_path, gang_seconds=PATIENT)
    ended = drive(core, 3, 3)
    core.close()
    assert ended[0][-1]["decision"] == "done"
    assert isinstance(ended[1], UserError)
    assert "suns" in str(ended[1])
    assert isinstance(ended[2], UserError)
    assert "2 steps are fewer than the 3 points" in str(ended[2])
    trials = Ledger(tmp_path).trials()  # else proposals would wait for their reports
    assert [t.state for t in trials] == ["done", "failed", "failed"]
    assert [t.error for t in trials] == [None, str(ended[1]), str(ended[2])]


class GivenUp(EngineCore):
    """Tune gives trial 1 up just before it is judged."""

    def _decide(self, point: int, at: Sequence[Member]) -> None:
        self.give_up(1)
        super()._decide(point, at)


def test_what_tune_gave_up_has_failed_till_the_sweep_is_started_anew(tmp_path: Path) -> None:
    spec = example(tmp_path, values=VALUES[:2], slots=2, stopping={"name": "none", "rungs": [1 / 9]})
    ledger = Ledger(tmp_path)
    for kind in (GivenUp, EngineCore):  # and an engine that is started again leaves it alone
        core = kind(spec, tmp_path, lease_seconds=PATIENT)
        assert core.advance(0, kind is EngineCore)["step"] == (STEPS if kind is EngineCore else POINTS[0])
        core.close()
        assert (ledger.trial(1).state, ledger.trial(1).error) == ("failed", DIED)
        assert len(ledger.reports(1)) == 1
    forget_failures(ledger)
    assert [t.state for t in ledger.trials()] == ["done", "new"]


def test_a_base_that_is_not_there_fails_all(tmp_path: Path) -> None:
    spec = example(tmp_path, values=VALUES[:2])
    spec.run["model"] = {"name": str(tmp_path / "nowhere")}
    core = EngineCore(spec, tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        core.advance(0, 0)
    assert isinstance(core.failure(), UserError)
    assert not core.give_up(0)  # there is nothing to go on for
    assert Ledger(tmp_path).trial(0).state == "new"
    core.close()


def test_an_engine_that_only_dies_gives_up(tmp_path: Path) -> None:
    spec = example(tmp_path, values=VALUES[:1], trials={"max_failures": 2, "cpus": 1})
    for _ in range(3):
        journal = Journal(Ledger(tmp_path), 0)
        journal.started()  # and is killed
        journal.close()
    engine = Engine(spec, tmp_path)
    with pytest.raises(GaveUp, match="died 3 times before it came to a decision: it was killed"):
        engine.advance(0, 0)
    engine.close()


def test_points_are_a_step_apart() -> None:
    assert steps_of([1 / 9, 1 / 3, 1.0], 240) == [27, 80, 240]
    assert steps_of([1 / 9, 1 / 3, 1.0], 4) == [1, 2, 4]
    assert steps_of([0.9, 0.99, 1.0], 3) == [1, 2, 3]
    with pytest.raises(UserError, match="2 steps are fewer"):
        steps_of([0.1, 0.5, 1.0], 2)

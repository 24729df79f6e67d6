"""The ledger keeps what was written, whole, however the writer died."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.sweeps.ledger import Ledger, append_line, read_lines


def test_trials_are_kept_by_index(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    assert ledger.trials() == []
    ledger.open(10, {"method.r": 8}, "random")
    ledger.open(2, {"data.weights": {"biology": 0.5, "replay": 0.5}}, "vertex:biology")
    assert [t.index for t in Ledger(tmp_path).trials()] == [2, 10]
    trial = ledger.trial(2)
    assert (trial.origin, trial.state, trial.error) == ("vertex:biology", "new", None)
    assert trial.values == {"data.weights": {"biology": 0.5, "replay": 0.5}}
    assert trial.folder == tmp_path / "trials" / "0002"


def test_a_recorded_trial_is_not_opened_anew(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.open(0, {"optim.betas": (0.9, 0.99)}, "reference")
    ledger.set_state(0, "failed", "the loss is nan")
    again = ledger.open(0, {"optim.betas": (0.9, 0.99)}, "random")
    assert (again.origin, again.state, again.error) == ("reference", "failed", "the loss is nan")
    with pytest.raises(UserError, match="other values"):
        ledger.open(0, {"optim.betas": (0.9, 0.98)}, "reference")


def test_unknown_trials_and_states_are_refused(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        ledger.trial(3)
    ledger.open(3, {}, "reference")
    with pytest.raises(ValueError, match="paused"):
        ledger.set_state(3, "paused")  # type: ignore[arg-type]
    assert ledger.reports(3) == []


def test_a_torn_line_is_ignored_and_then_replaced(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append_report(0, {"step": 1, "domain": "ä"})
    path = ledger.folder(0) / "reports.jsonl"
    for torn in ('{"step": 2, "dom', '{"step": 2}'):  # the second lacks only its newline
        with open(path, "a", encoding="utf-8") as f:
            f.write(torn)
        assert [r["step"] for r in ledger.reports(0)] == [1]
    ledger.append_report(0, {"step": 2})
    assert ledger.reports(0) == [{"step": 1, "domain": "ä"}, {"step": 2}]


def test_what_is_no_number_in_json_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.append_report(0, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        ledger.append_report(0, {"loss": float("nan")})
    assert ledger.reports(0) == [{"loss": 1.0}]


WRITER = """
import sys
from pathlib import Path
from qwen_ray.sweeps.ledger import append_line, read_lines
path = Path(sys.argv[1])
n = len(list(read_lines(path)))
while True:
    append_line(path, {"n": n, "text": "x" * 5000})
    n += 1
"""


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path, rng, seen = tmp_path / "lines.jsonl", random.Random(0), 0
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
        until = seen + rng.randint(2, 40)
        while len(list(read_lines(path))) < until:
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        numbers = [line["n"] for line in read_lines(path)]
        assert numbers == list(range(len(numbers)))
        seen = len(numbers)
    append_line(path, {"n": seen})
    assert [line["n"] for line in read_lines(path)] == list(range(seen + 1))

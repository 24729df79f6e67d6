"""What one engine has decided, a line a decision: how it goes on where a killed one stopped.

Trials that are judged together are one line, so the decision was made for all of them or for none. The
trials' own reports are copied from it, and copied again if the engine died in between. A line before those
of a step says how far each trial in the pack was: one that is killed goes on with all of them as they were.

Layout: ``OUT/engines/0.jsonl`` (steps and decisions), ``0.json`` (starts since the last one), ``0.lock``.
"""

from __future__ import annotations

import fcntl
import logging
import time
from collections.abc import Collection
from typing import Any

from qwen_ray.fsio import read_json, write_json
from qwen_ray.sweeps.halving import Halving
from qwen_ray.sweeps.ledger import Ledger, State, append_line, read_lines
from qwen_ray.sweeps.objective import FAILED

log = logging.getLogger(__name__)

FOLDER = "engines"
GOES_ON = "continue"
DIED = "its process died"
"""Why a trial failed, until more is known."""
_LOCK_SECONDS = 60.0
Report = dict[str, Any]


class Journal:
    """The decisions of engine ``number`` of the sweep in ``ledger.out``, which this process alone writes.

    Waits for an earlier engine that is being killed to end; :class:`TimeoutError` if it lives on.
    """

    def __init__(self, ledger: Ledger, number: int) -> None:
        self._ledger, root = ledger, ledger.out / FOLDER
        root.mkdir(parents=True, exist_ok=True)
        self._lines, self._starts = root / f"{number}.jsonl", root / f"{number}.json"
        self._lock = open(root / f"{number}.lock", "w")  # noqa: SIM115 - held until close()
        self._wait_for_lock()
        self.reports: dict[int, list[Report]] = {}
        """Of each trial, first to last."""
        self._steps: dict[int, int] = {}
        self._decisions = 0
        for line in read_lines(self._lines):
            self._take(line)

    def _wait_for_lock(self) -> None:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another engine is at work in {self._lines.parent}") from None
                time.sleep(0.05)

    def close(self) -> None:
        """Let another process go on."""
        self._lock.close()

    def replay(self, halving: Halving) -> None:
        """Repeat the arrivals at rungs, in the order in which they were decided."""
        for line in read_lines(self._lines):
            if line.get("compared"):
                reports = {i: line["reports"][str(i)] for i in line["compared"]}
                rung = reports[line["compared"][0]]["rung"]
                halving.arrive(rung, {i: report["score"] for i, report in reports.items()})

    def commit(
        self, reports: dict[int, Report], errors: dict[int, str], compared: Collection[int] = ()
    ) -> None:
        """Record what was decided on ``reports`` together; ``errors`` says why trials failed, ``compared``
        which of them came to a rung where the best go on."""
        numbered = {str(i): {**report, "boundary": self._decisions} for i, report in sorted(reports.items())}
        why = {str(i): text for i, text in sorted(errors.items())}
        line = {"reports": numbered, "errors": why, "compared": sorted(compared)}
        append_line(self._lines, line)
        self._take(line)
        if self.starts:
            write_json(self._starts, {"starts": 0})

    def record_steps(self, steps: dict[int, int]) -> None:
        """Record how far each trial in the pack is, before anything is decided or saved there."""
        line = {"steps": {str(i): step for i, step in sorted(steps.items())}}
        append_line(self._lines, line)
        self._take(line)

    @property
    def steps(self) -> dict[int, int]:
        """The step of each trial that was in the pack at the last decision and goes on."""
        return {i: step for i, step in self._steps.items() if not self.ended(i)}

    def _take(self, line: dict[str, Any]) -> None:
        """Add a line to what is known, and copy it to the trials' own files where it is not there yet."""
        if "steps" in line:
            self._steps = {int(i): step for i, step in line["steps"].items()}
            return
        self._decisions += 1
        for text, report in line["reports"].items():
            index = int(text)
            reports = self.reports.setdefault(index, [])
            reports.append(report)
            if len(self._ledger.reports(index)) < len(reports):
                self._ledger.append_report(index, report)
            if report["decision"] != GOES_ON:
                self._ledger.set_state(index, _state(report), line["errors"].get(text))

    def ended(self, index: int) -> bool:
        """Whether trial ``index`` has had its last report."""
        reports = self.reports.get(index, [])
        return bool(reports) and reports[-1]["decision"] != GOES_ON

    @property
    def starts(self) -> int:
        """Starts of the engine since its last decision, see :meth:`started`."""
        return int(read_json(self._starts)["starts"]) if self._starts.is_file() else 0

    def started(self) -> None:
        """Count a start."""
        write_json(self._starts, {"starts": self.starts + 1})


def _state(report: Report) -> State:
    if report["score"] == FAILED.score:
        return "failed"
    return "done" if report["decision"] == "done" else "stopped"


def forget_failures(ledger: Ledger) -> None:
    """A sweep that is started anew may fail as often as one that never did, and tries again what failed
    before it could be judged."""
    for path in (ledger.out / FOLDER).glob("*.json"):
        path.unlink()
    for trial in ledger.trials():
        reports = ledger.reports(trial.index)
        if trial.state == "failed" and (not reports or reports[-1]["decision"] == GOES_ON):
            ledger.set_state(trial.index, "new")

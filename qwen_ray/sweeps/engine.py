"""The engine of packed trials: who is in the pack, who waits, and what is decided when.

A trial trains to its next point, a share of its own length. Those that have come to one wait there until no
other in the pack still heads for it; then they are evaluated together, judged, saved, and each is told
whether it goes on. A freed slot is taken by the next trial. The engine waits, with patience, until its slots
are full before it trains on: then the order of its decisions depends on the trials alone, and not on how
fast processes start, die and are replaced.

A call of :meth:`EngineCore.advance` is a trial's sign of life, and its leave to be trained. To its next point
a trial is trained as soon as it has been proposed: its process may take longer to start than that.
"""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import write_json, write_text
from qwen_ray.sweeps import spec as specs
from qwen_ray.sweeps.halving import Halving
from qwen_ray.sweeps.journal import DIED, GOES_ON, Journal, Report
from qwen_ray.sweeps.ledger import BASE_LOSSES, Ledger
from qwen_ray.sweeps.mixsearch import is_protected
from qwen_ray.sweeps.objective import FAILED, Judged, judge
from qwen_ray.sweeps.spec import SweepConfig
from qwen_ray.training.checkpoint import CheckpointStore, complete
from qwen_ray.training.driver import CONFIG, publish
from qwen_ray.training.tracking import Tracker, read_metrics
from qwen_ray.training.worker import ARTIFACT, CHECKPOINTS

if TYPE_CHECKING:
    from qwen_ray.training.packed import Pack, Slot

log = logging.getLogger(__name__)

ADAPTER = "adapter"
GANG_SECONDS = 20.0
"""How long a slot that was freed waits for a trial to be proposed, after the last sign of any."""
LEASE_SECONDS = 60.0
"""How long one that has had a report may be silent; then the others go on without it."""


@dataclass(eq=False)
class Member:
    """A trial that takes part: it has joined, or was taken in as proposed. ``asked``: how many reports it may
    be trained to, ``seen``: when it was last heard of."""

    index: int
    reports: list[Report]
    seen: float
    protected: bool
    """Runs to its end, and is compared with none."""
    asked: int = 0
    holder: str = ""
    """The process that asked last."""
    parked: bool = False
    error: UserError | None = None
    points: list[int] = field(default_factory=list)
    """The steps at which it reports."""
    row: dict[str, Any] = field(default_factory=dict)
    """Metrics of its last step, with ``seconds`` so far."""
    tokens: int = 0
    """So far."""

    @property
    def key(self) -> str:
        return f"{self.index:04d}"

    @property
    def ready(self) -> bool:
        return self.asked > len(self.reports)

    @property
    def target(self) -> int:
        """The step it heads for."""
        return self.points[len(self.reports)]


class EngineCore:
    """One pack and the trials ``i`` with ``i % engines == number``. Calls come from many threads."""

    def __init__(
        self,
        spec: SweepConfig,
        out: Path,
        *,
        number: int = 0,
        group: str = "",
        gang_seconds: float = GANG_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        """``out``: the sweep's folder, in whose ledger the trials are. ``group``: id of the sweep, for what
        tracks its runs."""
        self.spec, self.out, self.number, self._group = spec, out, number, group or spec.name
        self._gang, self._lease = gang_seconds, lease_seconds
        self._ledger = Ledger(out)
        self._journal = Journal(self._ledger, number)
        self._points = specs.points(spec)
        self._halving = Halving(self._points[:-1], spec.stopping.eta)
        self._journal.replay(self._halving)
        self._members: dict[int, Member] = {}
        self._packed: dict[str, tuple[Member, Slot, CheckpointStore, Tracker]] = {}
        self._away: set[int] = set()
        """Who has left."""
        self._given_up: set[int] = set()
        """Who will not come back."""
        self._behind = self._journal.steps
        """After a start, the step that each of the pack had come to: all are there before anything else is
        done, as the order of decisions depends on how far each is."""
        self._freed = bool(self._journal.reports)
        """Whether a slot may be waiting for a trial that has yet to be proposed."""
        self._sign = time.monotonic()
        self._changed = threading.Condition()
        self._closed = False
        self._failure: BaseException | None = None
        self._pack: Pack
        self._base: dict[str, float] | None = None
        self._thread = threading.Thread(target=self._work, name=f"engine-{number}", daemon=True)
        self._thread.start()

    # What trials call.

    def join(self, index: int) -> None:
        """Take part. A trial that has taken part before goes on from its newest checkpoint."""
        with self._changed:
            self._member(index)

    def advance(self, index: int, number: int, holder: str = "") -> Report:
        """Report ``number`` (from 0) of trial ``index``: waits until it has been made. One that was made
        before, by whatever process, is given at once. Joins if need be. ``holder`` names the caller.

        Raises :class:`UserError` if the trial cannot be set up, ``RuntimeError`` if it has no such report.
        """
        with self._changed:
            member = self._member(index)
            if self._journal.ended(index) and number >= len(member.reports):
                raise RuntimeError(f"trial {index} ended with report {len(member.reports) - 1}")
            member.asked, member.holder = max(member.asked, number + 1), holder
            member.parked = False
            self._noticed()
            while len(member.reports) <= number:
                self._check()
                if member.error:
                    raise member.error
                if self._members.get(index) is not member:
                    raise RuntimeError(f"trial {index} has left")
                self._changed.wait()
            member.seen = time.monotonic()
            return member.reports[number]

    def leave(self, index: int, holder: str = "") -> None:
        """Take part no longer. What was trained since the last report is lost.

        Nothing happens if another than ``holder`` has asked for reports since: Ray Tune may start two
        processes for a trial and end one.
        """
        with self._changed:
            member = self._members.get(index)
            if member is not None and member.holder in {"", holder}:
                del self._members[index]
                self._away.add(index)
                self._noticed()

    def give_up(self, index: int) -> bool:
        """Nobody will ask for reports of trial ``index`` any more: it has failed, unless it has ended.

        Returns False, and leaves it as it is, if what has failed is the engine, for good.
        """
        with self._changed:
            if self._failure is None:
                self._members.pop(index, None)
                self._away.add(index)
                self._given_up.add(index)
                if not (self._journal.ended(index) or self._ledger.trial(index).state == "failed"):
                    self._ledger.set_state(index, "failed", DIED)
                self._noticed()
            return self._failure is None

    def saved(self, index: int) -> Path | None:
        """The PEFT folder in the newest checkpoint of trial ``index``, if there is one."""
        found = complete(self._ledger.folder(index) / CHECKPOINTS)
        return found[-1] / ADAPTER if found else None

    def failure(self) -> BaseException | None:
        """What has stopped the engine for good, if anything."""
        return self._failure

    def close(self) -> None:
        """End, at the next step."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _member(self, index: int) -> Member:
        self._check()
        if index not in self._members:
            protected = index == specs.REFERENCE or is_protected(self._ledger.trial(index).origin)
            reports = list(self._journal.reports.get(index, []))
            member = Member(index, reports, time.monotonic(), protected)
            self._members[index] = member
            self._away.discard(index)
            self._noticed()
        return self._members[index]

    def _noticed(self) -> None:
        self._sign = time.monotonic()
        self._changed.notify_all()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise RuntimeError("the engine has been closed")

    # The thread that trains.

    def _work(self) -> None:
        try:
            self._set_up()
            while (turn := self._turn()) is not None:
                self._step(turn)
        except BaseException as e:
            self._fail(e)
        finally:
            for *_, tracker in self._packed.values():
                tracker.close()
            self._journal.close()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def _set_up(self) -> None:
        import torch

        from qwen_ray.training.packed import Pack

        torch.set_num_threads(max(1, int(self.spec.trials.cpus)))  # of this thread
        self._pack = Pack(specs.trial_config(self.spec, {}, out=self.out))

    def _turn(self) -> list[Member] | None:
        """The trials that train next, when all that are waited for are there; None at the end."""
        while True:
            with self._changed:
                chosen = None
                while not self._closed and (chosen := self._choose()) is None:
                    self._changed.wait(timeout=0.2)
            if chosen is None:
                return None
            for key in [k for k, (member, *_) in self._packed.items() if member not in chosen]:
                self._remove(key)
            for member in chosen:
                if member.key not in self._packed:
                    self._add(member)
            if all(member.key in self._packed for member in chosen):
                return chosen

    def _choose(self) -> list[Member] | None:
        """Who fills the slots, by index, those that are in the pack before others; None: wait."""
        slots, live, more = self.spec.trials.slots, *self._expected()
        ready = sorted((m for m in live if m.ready), key=lambda m: (m.key not in self._packed, m.index))
        silent = [m for m in live if m.key in self._packed and not m.ready]
        if not ready or silent or len(ready) < min(slots, len(live)):
            return None
        if len(ready) < slots and self._freed and more and time.monotonic() - self._sign < self._gang:
            return None
        self._freed = self._freed and bool(self._behind)
        return sorted(ready[:slots], key=lambda m: m.index)

    def _expected(self) -> tuple[list[Member], bool]:
        """The trials to reckon with, those that are taken in for free slots now among them, and whether more
        will be proposed for certain. While some are behind where they were, only those of that pack."""
        live = self._live()
        proposed, more = self._proposed()
        if self._behind:
            live = [m for m in live if m.index in self._behind]
            proposed = [i for i in proposed if i in self._behind]
            if not live and not proposed:
                self._behind = {}
        for index in proposed[: max(0, self.spec.trials.slots - len(live))]:
            with contextlib.suppress(UserError):  # a damaged record: its process will be told
                member = self._member(index)
                member.asked = len(member.reports) + 1
                live.append(member)
        return live, more and not self._behind

    def _live(self) -> list[Member]:
        """Who takes part and has been heard of; those who have long been silent are parked."""
        now = time.monotonic()
        live = [m for m in self._members.values() if not self._journal.ended(m.index) and not m.error]
        for member in live:
            member.parked = member.parked or (not member.ready and now - member.seen > self._lease)
        return [m for m in live if not m.parked]

    def _proposed(self) -> tuple[list[int], bool]:
        """The trials that have been proposed and never took part, and whether more will be."""
        i, found = self.number, list[int]()
        while (known := i in self._members or self._journal.ended(i)) or self._ledger.has(i):
            if not (known or i in self._away or self._has_failed(i)):
                found.append(i)
            i += self.spec.trials.engines
        return found, i < self.spec.search.trials

    def _has_failed(self, index: int) -> bool:
        """Whether a trial failed before it ended: it is taken in only if its process asks again."""
        with contextlib.suppress(UserError):  # a damaged record: its process will be told
            return self._ledger.trial(index).state == "failed"
        return False

    def _add(self, member: Member) -> None:
        import torch

        from qwen_ray.training.strategy.ddp import Ddp

        trial = self._ledger.trial(member.index)
        try:
            config = specs.trial_config(self.spec, trial.values, out=trial.folder)
            store = CheckpointStore(trial.folder / CHECKPOINTS, Ddp(torch.device("cpu")), keep=1)
            slot = self._pack.add(member.key, config, store=store)
            member.points = steps_of(self._points, slot.total)
        except UserError as e:
            if member.key in self._pack.slots:
                self._pack.remove(member.key)
            with self._changed:
                member.error = e
                self._ledger.set_state(member.index, "failed", str(e))
                self._noticed()
            return
        rows = [row for row in read_metrics(trial.folder) if row["step"] <= slot.step]
        member.row = rows[-1] if rows else {"seconds": 0.0}
        member.tokens = sum(row["tokens"] for row in rows)
        write_text(trial.folder / CONFIG, config.to_yaml())
        tracker = Tracker(trial.folder, config, f"{self._group}-{member.key}", group=self._group)
        self._packed[member.key] = (member, slot, store, tracker)
        with self._changed:
            if member.index not in self._given_up:
                self._ledger.set_state(member.index, "running")

    def _remove(self, key: str) -> None:
        *_, tracker = self._packed.pop(key)
        tracker.close()
        self._pack.remove(key)

    def _step(self, turn: Sequence[Member]) -> None:
        """A step of those that have not come to their point, and what is decided after it."""
        going = [m for m in turn if self._goes(m)]
        if going:
            self._train(going)
        if self._behind:
            if any(self._goes(m) for m in turn):
                return
            self._behind = {}
        failed = [m for m in turn if self._slot(m).failed]
        rest = [m for m in turn if m not in failed]
        due = []
        for point in reversed(range(len(self._points))):
            at = [m for m in rest if len(m.reports) == point]
            if at and all(self._slot(m).step >= m.target for m in at):
                due.append((point, at))
        if failed or due:  # the step that failed counts: it is to fail again before others go on
            self._journal.record_steps({m.index: self._slot(m).step + (m in failed) for m in turn})
        if failed:
            self._end_failed(failed)
        for point, at in due:
            self._decide(point, at)

    def _goes(self, member: Member) -> bool:
        """Whether it trains now: to its point, or after a start to where it was."""
        slot = self._slot(member)
        end = self._behind.get(member.index, 0) if self._behind else member.target
        return slot.step < end and not slot.failed

    def _slot(self, member: Member) -> Slot:
        return self._packed[member.key][1]

    def _train(self, going: Sequence[Member]) -> None:
        began = time.perf_counter()
        rows = self._pack.step([m.key for m in going])
        took = time.perf_counter() - began
        tokens = {m.key: rows[m.key]["tokens"] for m in going if m.key in rows}
        for member in going:
            if member.key not in tokens:
                continue
            # A pass takes its time for tokens, whosever they are.
            seconds = member.row["seconds"] + took * tokens[member.key] / sum(tokens.values())
            member.row = {**rows[member.key], "seconds": seconds}
            member.tokens += tokens[member.key]
            self._packed[member.key][3](member.row)

    def _end_failed(self, failed: Sequence[Member]) -> None:
        """Trials whose loss or gradient is no number end here; nobody is compared with them."""
        messages = {m.index: str(self._slot(m).failed) for m in failed}
        for index, message in messages.items():
            log.warning("trial %d failed: %s", index, message)
        self._commit({m.index: self._report(m, FAILED, {}, None, "stop") for m in failed}, messages)

    def _decide(self, point: int, at: Sequence[Member]) -> None:
        """Evaluate, judge, save and tell those who have come to ``point``."""
        began = time.perf_counter()
        losses = self._pack.validation([m.key for m in at])
        for member in at:
            member.row["seconds"] += (time.perf_counter() - began) / len(at)
        base = self._base_losses(at[0])
        verdicts = {m: judge(losses[m.key], base, self.spec.objective) for m in at}
        sound = {m: verdict for m, verdict in verdicts.items() if verdict != FAILED}
        last = point == len(self._points) - 1
        decisions = dict.fromkeys(sound, "done" if last else GOES_ON)
        compared: dict[int, float] = {}
        if self.spec.stopping.name == "halving" and not last:
            compared = {m.index: verdict.score for m, verdict in sound.items() if not m.protected}
            goes_on = self._halving.arrive(point, compared)
            decisions |= {m: "stop" for m in sound if not goes_on.get(m.index, True)}
        reports, messages = {}, {}
        for member, verdict in verdicts.items():
            decision = decisions.get(member, "stop")
            rung = None if last or member not in sound else point
            reports[member.index] = self._report(member, verdict, losses[member.key], rung, decision)
            if member in sound:
                self._keep(member, losses[member.key], ends=decision != GOES_ON)
            else:
                messages[member.index] = f"the held-out loss is no number at step {self._slot(member).step}"
        self._commit(reports, messages, compared)

    def _base_losses(self, member: Member) -> dict[str, float]:
        """Without any adapter; all trials have the same held-out records."""
        if self._base is None:
            self._base = self._pack.base_losses(member.key)
            if not self._base:
                raise UserError(
                    "no records are held out, so trials cannot be compared",
                    where="run.data",
                    fix="name data.validation files, or raise data.validation_fraction",
                )
            write_json(self.out / BASE_LOSSES, self._base)
        return self._base

    def _report(
        self, member: Member, judged: Judged, losses: dict[str, float], rung: int | None, decision: str
    ) -> Report:
        slot = self._slot(member)
        numbers = {"loss": member.row.get("loss"), **losses}
        return {
            "step": slot.step,
            "total_steps": slot.total,
            "share": slot.step / slot.total,
            **{key: x if x is not None and math.isfinite(x) else None for key, x in numbers.items()},
            "gain": judged.gain,
            "violation": judged.violation,
            "feasible": judged.feasible,
            "score": judged.score,
            "rung": rung,
            "tokens": member.tokens,
            "seconds": member.row["seconds"],
            "decision": decision,
        }

    def _keep(self, member: Member, losses: dict[str, float], *, ends: bool) -> None:
        """What a trial has come to, on the disk before it is said that it has."""
        _, slot, store, tracker = self._packed[member.key]
        tracker({**member.row, "step": slot.step, **losses})
        self._pack.save(member.key, store)
        if ends:
            folder = self._ledger.folder(member.index)
            shutil.rmtree(folder / ARTIFACT, ignore_errors=True)
            self._pack.export(member.key, folder / ARTIFACT)
            publish(folder / ARTIFACT, folder / ADAPTER, slot.config, data=slot.data.manifest, step=slot.step)

    def _commit(
        self, reports: dict[int, Report], messages: dict[int, str], compared: Collection[int] = ()
    ) -> None:
        with self._changed:
            self._journal.commit(reports, messages, compared)
            for index in reports:
                if (member := self._members.get(index)) is not None:
                    member.reports = list(self._journal.reports[index])
                    member.seen = time.monotonic()
            self._noticed()
        for key in [k for k, (member, *_) in self._packed.items() if self._journal.ended(member.index)]:
            self._remove(key)
            self._freed = True


def steps_of(points: Sequence[float], total: int) -> list[int]:
    """The step of each point of a trial of ``total`` steps: at least one apart, the last at the end.

    Raises :class:`UserError` where there are fewer steps than points.
    """
    if total < len(points):
        raise UserError(
            f"{total} steps are fewer than the {len(points)} points at which trials are compared",
            where="optim.max_steps",
            fix="train for longer, or give fewer stopping.rungs",
        )
    steps: list[int] = []
    for i, share in enumerate(points):
        least, most = (steps[-1] if steps else 0) + 1, total - (len(points) - 1 - i)
        steps.append(min(max(round(share * total), least), most))
    return steps

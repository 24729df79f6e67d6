"""The watch: looks at everything again and again, starts pipelines, follows canaries, tells people.

All that it knows is in storage, so that it can be killed anywhere and started again, there or elsewhere. One
watch works at a time; others wait until its lease ends.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from qwen_ray.errors import UserError
from qwen_ray.lifecycle import accuracy, canary, endpoint_metrics, triggers
from qwen_ray.lifecycle.child import Child
from qwen_ray.lifecycle.cron import Schedule
from qwen_ray.lifecycle.history import Entry, History
from qwen_ray.lifecycle.lease import Lease, LeaseLost, this_process
from qwen_ray.lifecycle.notices import Journal, Notices, iso
from qwen_ray.lifecycle.runs import Runs, Start
from qwen_ray.lifecycle.watch_spec import Level, WatchSpec
from qwen_ray.lifecycle.watch_state import LEASE, WatchState, read_state
from qwen_ray.registry import Registry
from qwen_ray.storage import Storage, open_storage

if TYPE_CHECKING:
    from qwen_ray.lifecycle.triggers import Fired

_POLL_SECONDS = 1.0  # with once(): how often a pipeline that runs is asked whether it has ended


@dataclass(frozen=True)
class World:
    """What a watch acts through. ``clock``: seconds since 1970. ``start``: starts a pipeline. ``benchmark``
    and ``scrape``: ask the server."""

    clock: Callable[[], float] = time.time
    sleep: Callable[[float], object] = time.sleep
    start: Start = Child
    benchmark: accuracy.Benchmark = accuracy.evaluate_production
    scrape: Callable[[str], endpoint_metrics.Counters] = endpoint_metrics.scrape


class Watch:
    """One contender for a watch. Use it as a context manager: the block has the lease."""

    def __init__(
        self,
        spec: WatchSpec,
        *,
        note: Callable[[str], object] = lambda text: None,
        world: World | None = None,
    ) -> None:
        """``note`` is told of every event. :class:`UserError` for a secret that is not in the environment."""
        for channel in spec.alerts.values():
            channel.check()
        self.spec, self._world, self._note = spec, world or World(), note
        self._said = ""  # what is waited for
        self.storage = open_storage(spec.storage)
        self._lease = Lease(self.storage, LEASE, this_process(), spec.lease_seconds, clock=self._world.clock)

    def __enter__(self) -> Watch:
        """Raises :class:`UserError`, status 409, where another watch is at work."""
        self._lease.__enter__()
        try:
            self._begin()
        except BaseException:
            self._lease.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with contextlib.suppress(LeaseLost, UserError):  # where it cannot be written down any more
                self._runs.stop()
        finally:
            self._lease.__exit__()

    def _begin(self) -> None:
        spec, clock = self.spec, self._world.clock
        self._state = WatchState(self.storage, self._lease)
        self._journal = Journal(History(self.storage), clock, self._note)
        self._notices = Notices(
            spec, self._state, journal=self._journal, clock=clock, sleep=self._world.sleep
        )
        self._runs = Runs(
            spec,
            self._state,
            journal=self._journal,
            notices=self._notices,
            start=self._world.start,
            clock=clock,
        )
        self._registry = Registry(spec.registry, clock=lambda: datetime.fromtimestamp(clock(), UTC))

    @property
    def entries(self) -> list[Entry]:
        """What has been written to the history since the block began."""
        return self._journal.entries

    @property
    def undone(self) -> list[str]:
        """What could not be looked at or sent, and will be tried again."""
        troubles, unsent = self._state.value["troubles"], len(self._state.value["outbox"])
        left = [f"{name} cannot be watched since {iso(one['since'])}" for name, one in troubles.items()]
        return left + ([f"alerts that no channel has taken: {unsent}"] if unsent else [])

    def tick(self) -> None:
        """Look at everything once. :class:`LeaseLost` if another watch may be at work."""
        for name, look in self._looks():
            self._try(name, look)
        self._state.save()
        self._runs.proceed()
        self._notices.send()
        self._state.save()

    def once(self) -> None:
        """Look once, and wait for a pipeline that runs then."""
        self.tick()
        if self._runs.busy:
            while self._runs.busy:
                self._world.sleep(_POLL_SECONDS)
                self._runs.proceed()
            self._notices.send()
            self._state.save()

    def forever(self) -> NoReturn:
        """Look every so many seconds, whenever nobody else does, until this is interrupted.

        What takes the turn away, another watch or storage that is away, is waited out. A request that storage
        did not answer does not: a pipeline that runs goes on while the lease is held.
        """
        while True:
            try:
                with self:
                    while True:
                        self._tick_or_wait()
                        self._world.sleep(self.spec.every_seconds)
            except (UserError, LeaseLost) as e:
                if isinstance(e, UserError) and e.status not in (409, 503):
                    raise
                self._waiting(str(e))
                self._world.sleep(self.spec.every_seconds)

    def _tick_or_wait(self) -> None:
        """Look; where storage is away, as it was before, again the next time."""
        try:
            self.tick()
            self._said = ""
        except UserError as e:
            if e.status != 503:
                raise
            self._lease.check()
            self._state.restore()
            self._waiting(str(e))

    def _waiting(self, why: str) -> None:
        """Say it, once."""
        if why != self._said:
            self._said = why
            self._note(f"waiting: {why}")

    # -- what is looked at

    def _looks(self) -> list[tuple[str, Callable[[], None]]]:
        looks: list[tuple[str, Callable[[], None]]] = [("canary", self._follow)]
        if self.spec.data is not None:
            looks.append(("data", self._look_at_data))
        if self.spec.drift is not None:
            looks.append(("drift", self._look_at_drift))
        looks += [
            (f"schedules/{name}", partial(self._look_at_schedule, name)) for name in self.spec.schedules
        ]
        if self.spec.accuracy is not None:  # it takes long
            looks.append(("accuracy", self._look_at_accuracy))
        return looks

    def _look_at_data(self) -> None:
        assert self.spec.data is not None
        memory, fired = triggers.new_data(self.spec.data, self._memory("data"))
        self._remember("data", memory, [fired] if fired else [])

    def _look_at_drift(self) -> None:
        assert self.spec.drift is not None
        memory, fired = triggers.drift(
            self.spec.drift, self._memory("drift"), self._world.clock(), self._scrape
        )
        self._remember("drift", memory, fired)

    def _look_at_accuracy(self) -> None:
        rule = self.spec.accuracy
        assert rule is not None
        memory, at = self._due("accuracy", rule.cron)
        fired: list[Fired] = []
        if at is not None:
            said, fired = accuracy.check(self.spec, rule, self._registry, self.storage, self._world.benchmark)
            if not fired:
                self._journal.say("accuracy", said)
        self._remember("accuracy", memory, fired)

    def _look_at_schedule(self, name: str) -> None:
        one = self.spec.schedules[name]
        memory, at = self._due(f"schedules/{name}", one.cron)
        fired = []
        if at is not None:
            text = f"the schedule {name} was due at {iso(at)}"
            pipeline = str(one.pipeline) if one.pipeline else None
            facts = {"cron": one.cron, "due": iso(at)}
            fired = [triggers.Fired(name, name, text, run=True, alert=False, facts=facts, pipeline=pipeline)]
        self._remember(f"schedules/{name}", memory, fired)

    def _follow(self) -> None:
        rules, name = self.spec.canary, self.spec.adapter
        if self.spec.endpoint is None:
            return
        self._decided(canary.start(rules, self._registry, name))
        if self._registry.canary(name) is None:
            self._remember("canary", None, [])
            return
        memory, decision = canary.follow(
            rules,
            self._registry,
            name,
            self._memory("canary"),
            counters=self._scrape(),
            now=self._world.clock(),
        )
        self._remember("canary", memory, [])
        self._decided(decision)

    def _decided(self, decision: canary.Decision | None) -> None:
        if decision is not None:
            self._journal.say("canary", decision.text, {"decision": decision.what, **decision.facts})
            about = f"canary/{decision.what}"
            self._notices.settled(about)  # each canary is news
            self._notices.tell(
                about, decision.level, f"canary {decision.what}", decision.text, decision.facts
            )

    # -- how

    def _try(self, name: str, look: Callable[[], None]) -> None:
        """Look; what cannot be looked at is told once and tried again, and keeps nothing else from it."""
        troubles, now = self._state.value["troubles"], self._world.clock()
        trouble = troubles.get(name)
        if trouble is not None and now < trouble["again"]:
            return
        try:
            look()
        except Exception as e:
            self._lease.check()  # without it, this is no trouble but the end
            why = e.what if isinstance(e, UserError) else f"{type(e).__name__}: {e}"
            where = f"{e.where}: " if isinstance(e, UserError) and e.where else ""
            troubles[name] = {
                "since": (trouble or {"since": now})["since"],
                "again": now + self._pause(trouble, now),
            }
            if trouble is None:
                text = f"{where}{why}"
                self._journal.say("trouble", f"{name}: {text}")
                self._notices.tell(f"trouble/{name}", "critical", f"{name} cannot be watched", text)
        else:
            if trouble is not None:
                del troubles[name]
                self._notices.settled(f"trouble/{name}")
                self._journal.say("well", f"{name} can be watched again, after {iso(trouble['since'])}")

    def _pause(self, trouble: dict[str, Any] | None, now: float) -> float:
        """Before it is tried again: the next look, and then longer and longer, to a retry's time."""
        lasted = 0.0 if trouble is None else now - trouble["since"]
        return min(
            max(self.spec.every_seconds, lasted), max(self.spec.retry_seconds, self.spec.every_seconds)
        )

    def _memory(self, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self._state.value["triggers"].get(name)
        return found

    def _remember(self, name: str, memory: dict[str, Any] | None, fired: list[Fired]) -> None:
        for one in fired:
            self._journal.say("trigger", one.text, {"trigger": one.trigger, "starts": one.run, **one.facts})
            if one.alert:
                level: Level = "critical" if one.facts.get("significant") else "warning"
                self._notices.tell(one.about, level, f"{one.trigger}: {self.spec.model}", one.text, one.facts)
            if one.run:
                self._runs.request(one)
        if memory is None:
            self._state.value["triggers"].pop(name, None)
        else:
            self._state.value["triggers"][name] = memory

    def _due(self, name: str, cron: str) -> tuple[dict[str, Any], float | None]:
        schedule = Schedule(cron, self.spec.time_zone)
        return triggers.due(schedule, self._memory(name), self._world.clock())

    def _scrape(self) -> endpoint_metrics.Counters:
        assert self.spec.endpoint is not None
        return self._world.scrape(self.spec.endpoint)


def status(spec: WatchSpec, storage: Storage, now: float) -> dict[str, Any]:
    """What a watch is at, for people: who works, what waits and runs, what is next."""
    state = read_state(storage)
    holder = Lease(storage, LEASE, this_process(), spec.lease_seconds, clock=lambda: now).holder()
    crons = {name: one.cron for name, one in spec.schedules.items()}
    if spec.accuracy is not None:
        crons["accuracy"] = spec.accuracy.cron
    upcoming = {name: Schedule(cron, spec.time_zone).next(now) for name, cron in crons.items()}
    return {
        "watched_by": None if holder is None else holder.owner,
        "running": state["running"],
        "pending": state["pending"],
        "troubles": {name: iso(trouble["since"]) for name, trouble in state["troubles"].items()},
        "unsent": len(state["outbox"]),
        "next": {name: None if at is None else iso(at) for name, at in upcoming.items()},
    }

"""Pipelines that a watch starts: when triggers have settled, one at a time, again where they fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.lifecycle.notices import Journal, Notices
from qwen_ray.lifecycle.triggers import Fired
from qwen_ray.lifecycle.watch_spec import Level, WatchSpec
from qwen_ray.lifecycle.watch_state import WatchState

REFUSED = ("hold", "regress")
"""Verdicts of a gate that said no."""


class Running(Protocol):
    """A pipeline on its way."""

    def poll(self) -> dict[str, Any] | None:
        """None while it runs; then ``{"run", "verdict", "version", "promoted"}``, ``{"busy": who}`` where it
        runs already, or ``{"error": why}``."""

    def stop(self) -> None:
        """End it; it can go on later."""


Start = Callable[[Path, dict[str, Any]], Running]
"""Starts the pipeline of a file, and tells it what triggered it."""


class Runs:
    """The queue of pipelines in a watch's state, and the one that runs."""

    def __init__(
        self,
        spec: WatchSpec,
        state: WatchState,
        *,
        journal: Journal,
        notices: Notices,
        start: Start,
        clock: Callable[[], float],
    ) -> None:
        self._spec, self._state, self._journal, self._notices = spec, state, journal, notices
        self._start, self._clock = start, clock
        self._running: Running | None = None

    def request(self, fired: Fired) -> None:
        """A trigger asks for a run of its pipeline."""
        now = self._clock()
        pending = self._state.value["pending"]
        waiting = pending.setdefault(
            fired.pipeline or str(self._spec.pipeline), {"first": now, "triggers": []}
        )
        waiting["last"] = now
        waiting["triggers"].append({"trigger": fired.trigger, "text": fired.text, "facts": fired.facts})

    @property
    def busy(self) -> bool:
        """Whether a pipeline runs in this moment."""
        return self._running is not None

    def proceed(self) -> None:
        """Take what has ended, and start what is due."""
        if self._running is not None:
            outcome = self._running.poll()
            if outcome is None:
                return
            try:
                self._ended(outcome)
                self._state.save()
            except BaseException:  # it is not written down that it has ended: looked at again
                self._state.restore()
                raise
            self._running = None
        value, now = self._state.value, self._clock()
        if value["running"] is None and (name := self._due(now)) is not None:
            triggers = value["pending"].pop(name)["triggers"]
            value["running"] = {
                "pipeline": name,
                "triggers": triggers,
                "attempt": 0,
                "again": now,
                "started": now,
            }
        running = value["running"]
        if running is None or now < running["again"]:
            return
        if running["attempt"] >= self._spec.attempts:  # the last one took this process with it
            self._ended({"error": "it ended with the process that had started it"})
            return
        running["attempt"] += 1
        why = "; ".join(trigger["text"] for trigger in running["triggers"])
        self._journal.say(
            "start", f"{running['pipeline']}, attempt {running['attempt']}: {why}", dict(running)
        )
        self._state.save()  # should this process die, the next one goes on with the run
        self._running = self._start(Path(running["pipeline"]), {"triggers": running["triggers"]})

    def stop(self) -> None:
        """End what runs; the next watch goes on with it, and the attempt does not count."""
        if self._running is not None:
            self._running.stop()
            self._running = None
            self._state.value["running"]["attempt"] -= 1
            self._state.save()

    def _due(self, now: float) -> str | None:
        ended = self._state.value["ended"]
        if ended is not None and now - ended < self._spec.rest_seconds:
            return None
        for name, waiting in sorted(self._state.value["pending"].items()):
            if (
                now - waiting["last"] >= self._spec.debounce_seconds
                or now - waiting["first"] >= self._spec.longest_wait_seconds
            ):
                return str(name)
        return None

    def _ended(self, outcome: dict[str, Any]) -> None:
        value, now = self._state.value, self._clock()
        running = value["running"]
        name, attempt = running["pipeline"], running["attempt"]
        facts = {"pipeline": name, "attempt": attempt, "triggers": running["triggers"], **outcome}
        if "busy" in outcome:
            running |= {"attempt": attempt - 1, "again": now + self._spec.retry_seconds}
            self._journal.say("busy", f"{name}: {outcome['busy']}", facts)
            return
        if "error" in outcome and attempt < self._spec.attempts:
            running["again"] = now + self._spec.retry_seconds * 2 ** (attempt - 1)
            self._journal.say("failed", f"{name}, attempt {attempt}: {outcome['error']}", facts)
            return
        value["running"], value["ended"] = None, now
        if "error" in outcome:
            self._journal.say("failed", f"{name}, given up: {outcome['error']}", facts)
            text = f"{name} failed {attempt} times, and is not tried again before the next trigger"
            self._tell(name, "critical", "a pipeline failed", f"{text}: {outcome['error']}", facts)
            return
        verdict, version = outcome["verdict"], outcome["version"]
        end = f"{version} is promoted" if outcome["promoted"] else "production stays"
        level: Level = "warning" if verdict in REFUSED else "info"
        self._journal.say("run", f"{name}, run {outcome['run']}: {verdict}; {end}", facts)
        self._tell(name, level, end, f"{name}, run {outcome['run']}: {verdict}", facts)

    def _tell(self, name: str, level: Level, title: str, text: str, facts: dict[str, Any]) -> None:
        about = f"run/{name}"
        self._notices.settled(about)  # each run is news
        self._notices.tell(about, level, title, text, facts)

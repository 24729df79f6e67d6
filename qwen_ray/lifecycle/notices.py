"""Who is told what: alerts that repeat are sent once, and one that cannot be sent is sent later."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from qwen_ray.lifecycle.alerts import ATTEMPTS, Alert, deliver, wanted
from qwen_ray.lifecycle.history import Entry, History
from qwen_ray.lifecycle.watch_spec import Channel, Level, WatchSpec
from qwen_ray.lifecycle.watch_state import WatchState

_GIVE_UP_SECONDS = 24 * 3600.0  # after which an alert that cannot be sent is old news
_THE_LOG = {"log": Channel(kind="log")}


class Journal:
    """The history, as it is written and said by one watch."""

    def __init__(self, history: History, clock: Callable[[], float], note: Callable[[str], object]) -> None:
        self._history, self._clock, self._note = history, clock, note
        self.entries: list[Entry] = []
        """What was said since this was made."""

    def say(self, kind: str, text: str, value: dict[str, Any] | None = None) -> None:
        """Write an event, and tell it to whoever looks on."""
        entry = self._history.append(iso(self._clock()), kind, text, value)
        self.entries.append(entry)
        self._note(f"{entry.at} {kind}: {text}")


class Notices:
    """Alerts, on their way from the watch to its channels by an outbox in its state."""

    def __init__(
        self,
        spec: WatchSpec,
        state: WatchState,
        *,
        journal: Journal,
        clock: Callable[[], float],
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._channels = spec.alerts or _THE_LOG
        self._repeat = spec.repeat_hours * 3600
        self._spec, self._state, self._journal = spec, state, journal
        self._clock, self._sleep = clock, sleep

    def tell(
        self, about: str, level: Level, title: str, text: str, facts: dict[str, Any] | None = None
    ) -> None:
        """Have an alert sent, unless one about the same was within ``repeat_hours``."""
        now = self._clock()
        told: dict[str, float] = self._state.value["told"]
        if about in told and now - told[about] < self._repeat:
            return
        self._state.value["told"] = {key: at for key, at in told.items() if now - at < self._repeat}
        self._state.value["told"][about] = now
        alert = Alert(about, level, title, text, iso(now), {"model": self._spec.model, **(facts or {})})
        names = wanted(self._channels, alert)
        self._journal.say("alert", f"{title}: {text}", {**asdict(alert), "channels": names})
        self._state.value["outbox"] += [
            {"channel": name, "alert": asdict(alert), "since": now} for name in names
        ]

    def settled(self, about: str) -> None:
        """What this is about is over: when it comes again, it is new."""
        self._state.value["told"].pop(about, None)

    def send(self) -> None:
        """Empty the outbox as far as the channels take it."""
        left = []
        for letter in self._state.value["outbox"]:
            name, alert = letter["channel"], Alert(**letter["alert"])
            if (channel := self._channels.get(name)) is None:  # of a watch file that has changed
                continue
            again = "failed" in letter
            why = deliver(channel, alert, attempts=1 if again else ATTEMPTS, sleep=self._sleep)
            if why is None:
                continue
            facts = {"channel": name, "alert": alert.id, "why": why}
            if not again:
                self._journal.say("unsent", f"'{alert.title}' could not be sent to {name}: {why}", facts)
            if self._clock() - letter["since"] < _GIVE_UP_SECONDS:
                left.append({**letter, "failed": why})
            else:
                self._journal.say("dropped", f"'{alert.title}' was never taken by {name}: {why}", facts)
        self._state.value["outbox"] = left


def iso(now: float) -> str:
    """Seconds since 1970 as ISO, UTC."""
    return datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")

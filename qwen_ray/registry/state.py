"""What is decided about the versions of one name: aliases, archive, canary, and the log of it all.

It is one document, ``NAME/state.json``, replaced in one step. So a move and its log entry are one, and what
must hold between decisions holds with several writers: no alias means a version whose files were removed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from qwen_ray.errors import UserError
from qwen_ray.registry.version import NAME

PRODUCTION, CANDIDATE, CANARY = "production", "candidate", "canary"
HELD_HOURS = 24.0
Was = int | None | Literal["any"]


@dataclass
class State:
    """The document. ``archived``, ``removed`` and ``held`` map a version's number to when it was (ISO, UTC).

    ``held``: something that is being made needs this version; for a day its files stay.
    """

    aliases: dict[str, int] = field(default_factory=dict)
    share: float | None = None
    """The canary's part of the requests."""
    archived: dict[str, str] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    held: dict[str, str] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)
    """Entries {"id", "at", "kind", "version", "value"}, oldest first."""

    @classmethod
    def of(cls, document: dict[str, Any] | None) -> State:
        return cls(**document) if document else cls()

    def document(self) -> dict[str, Any]:
        return asdict(self)


class Change:
    """One change to a state: what it decides, and its entries in the log.

    ``id`` names the change, ``at`` says when. Raises :class:`UserError` (409) where it is not allowed.
    """

    def __init__(self, name: str, state: State, id: str, at: str) -> None:
        self.name, self.state, self.id = name, state, id
        # The clock of another writer may be ahead: the log stays in order.
        self.at = max([at, *(entry["at"] for entry in state.log[-1:])])

    @property
    def done(self) -> bool:
        """Whether the log has it already: the change was taken, and its answer lost."""
        return any(entry["id"].startswith(f"{self.id}-") for entry in self.state.log)

    def point(
        self, alias: str, version: int | None, *, reason: str, by: str | None, was: Was = "any",
        share: float | None = None, back: bool = False,
    ) -> None:  # fmt: skip
        """Let an alias mean another version; None: nothing."""
        now = self.state.aliases.get(alias)
        if was not in ("any", now):
            raise UserError(
                f"'{alias}' of '{self.name}' means {_said(now)} now, not {_said(was)}",
                fix="another writer was faster: look again, then decide",
                status=409,
            )
        if version is None and now is None:
            return
        if version is not None:
            self._check_there(version)
            if str(version) in self.state.archived:
                raise UserError(
                    f"{self.name}@{version} is archived",
                    fix=f"qwen-ray registry restore {self.name}@{version}",
                    status=409,
                )
            self.state.aliases[alias] = version
        else:
            del self.state.aliases[alias]
        value: dict[str, Any] = {"alias": alias, "version": version, "was": now, "reason": reason, "by": by}
        if alias == CANARY:
            self.state.share = share
            value["share"] = share
        if back:
            value["rollback"] = True
        self._say("alias", version, value)

    def override(self, version: int, value: dict[str, Any]) -> None:
        """Note that this change is made against a gate's verdict."""
        self._say("override", version, value)

    def rollback(self, alias: str, *, reason: str, by: str | None) -> int:
        """Let an alias mean again what it meant before; returns that."""
        now = self.state.aliases.get(alias)
        before = [v for v in before_now(self.state, alias) if v is not None and v != now]
        version = next((v for v in before if str(v) not in self.state.removed), None)
        if version is None:
            raise UserError(
                f"'{alias}' of '{self.name}' meant no other version before that is still here",
                fix=f"name one: qwen-ray registry promote {self.name}@VERSION --reason ...",
                status=409,
            )
        if str(version) in self.state.archived:
            self.restore(version, reason=f"rollback of {alias}: {reason}", by=by)
        self.point(alias, version, reason=reason, by=by, back=True)
        return version

    def archive(self, version: int, *, reason: str, by: str | None) -> None:
        """Put a version away; refused while an alias means it."""
        self._check_there(version)
        aliases = [alias for alias, meant in self.state.aliases.items() if meant == version]
        if aliases:
            raise UserError(
                f"{self.name}@{version} is '{aliases[0]}'",
                fix="move the alias first; what an alias means is not archived",
                status=409,
            )
        if str(version) not in self.state.archived:
            self.state.archived[str(version)] = self.at
            self._say("archived", version, {"reason": reason, "by": by})

    def restore(self, version: int, *, reason: str, by: str | None) -> None:
        """Take a version back from the archive."""
        self._check_there(version)
        if self.state.archived.pop(str(version), None) is not None:
            self._say("restored", version, {"reason": reason, "by": by})

    def hold(self, version: int) -> None:
        """Keep the files of a version for a day, whatever the retention says."""
        self._check_there(version)
        self.state.held = {
            v: at for v, at in self.state.held.items() if at > hours_before(self.at, HELD_HOURS)
        }
        self.state.held[str(version)] = self.at

    def remove(self, version: int, *, reason: str) -> None:
        """Note that the files of a version are going."""
        if str(version) not in self.state.removed:
            self.state.removed[str(version)] = self.at
            self.state.archived.pop(str(version), None)
            self._say("removed", version, {"reason": reason})

    def _check_there(self, version: int) -> None:
        if at := self.state.removed.get(str(version)):
            raise gone(self.name, version, at)

    def _say(self, kind: str, version: int | None, value: dict[str, Any]) -> None:
        count = sum(entry["id"].startswith(f"{self.id}-") for entry in self.state.log)
        entry = {"id": f"{self.id}-{count}", "at": self.at, "kind": kind, "version": version, "value": value}
        self.state.log.append(entry)


def before_now(state: State, alias: str) -> list[int | None]:
    """What an alias meant before, latest first. A rollback takes back the move that it undid: after two
    rollbacks it means what it meant two moves ago."""
    meant: list[int | None] = []
    for entry in state.log:
        if entry["kind"] != "alias" or entry["value"]["alias"] != alias:
            continue
        version = entry["version"]
        if entry["value"].get("rollback") and version in meant:
            del meant[len(meant) - 1 - meant[::-1].index(version) :]
        if not meant or meant[-1] != version:
            meant.append(version)
    return meant[:-1][::-1]


def check_alias(alias: str) -> None:
    """:class:`UserError` for what cannot be an alias."""
    if not NAME.fullmatch(alias) or alias.isdigit():
        raise UserError(
            f"'{alias}' is not an alias", fix="lower-case letters, digits, dot, dash; not a number"
        )


def gone(name: str, version: int, at: str) -> UserError:
    """The error of a version whose files were removed."""
    return UserError(
        f"the files of {name}@{version} were removed on {at[:10]}",
        fix="its lineage and events stay (`qwen-ray registry show`); train it again, or name another version",
        status=404,
    )


def hours_before(at: str, hours: float) -> str:
    """A time so much earlier (both ISO, UTC, to the microsecond)."""
    return (datetime.fromisoformat(at) - timedelta(hours=hours)).isoformat(timespec="microseconds")


def of_files(aliases: dict[str, dict[str, Any]]) -> State:
    """The state of a registry made before there was one: a file {"version", "log"} for each alias."""
    state = State()
    for alias, found in sorted(aliases.items()):
        state.aliases[alias] = int(found["version"])
        was = None
        for index, entry in enumerate(found["log"]):
            value = {"alias": alias, "version": entry["version"], "was": was, "reason": entry["reason"]}
            state.log.append(
                {
                    "id": f"{alias}-{index}",
                    "at": entry["at"],
                    "kind": "alias",
                    "version": entry["version"],
                    "value": {**value, "by": None},
                }
            )
            was = entry["version"]
    state.log.sort(key=lambda entry: entry["at"])
    return state


def _said(version: Any) -> str:
    return "nothing" if version is None else f"version {version}"

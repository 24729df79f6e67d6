"""What pipelines have done, as JSON documents in storage. Each is written whole, most of them once.

::

    NAME/lease.json               who runs the pipeline now
    NAME/runs/RUN/run.json        what a run is: when it began, why, and what production was
    NAME/runs/RUN/stages/S.json   stage S of it, once it is done
    NAME/runs/RUN/failures/N.json what went wrong
    NAME/runs/RUN/end.json        verdict; a run without it is under way, or goes on
    NAME/made/S/HASH.json         what stage S made of inputs with this hash, for every run that has them
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, sha256_file, sha256_json
from qwen_ray.storage import Missing, Storage, create_document, read_document, update

UNDER_WAY = ""
"""The verdict of a run that has not ended."""


@dataclass(frozen=True)
class Run:
    """A run of a pipeline. ``baseline``: what the candidate must beat, ``NAME@VERSION`` or ``base``."""

    id: str
    at: str
    """When it began: UTC, ISO 8601."""
    baseline: str
    trigger: dict[str, Any] | None
    spec: dict[str, Any]
    """The pipeline as it was then."""


@dataclass(frozen=True)
class End:
    """How a run ended. ``verdict``: promote, hold or regress; ``unchanged`` where production is what the run
    would make; ``superseded`` where production was moved by somebody else, and a new run takes over."""

    verdict: str
    version: str | None
    promoted: bool
    reasons: list[str]
    at: str


@dataclass(frozen=True)
class Done:
    """A stage that was done. ``outputs`` is what the next stages need, ``files`` the SHA-256 of each file
    that it left, and ``run`` the run that did it."""

    stage: str
    inputs: dict[str, Any]
    outputs: dict[str, Any]
    files: dict[str, str]
    run: str
    at: str
    seconds: float

    @property
    def hash(self) -> str:
        """Of the inputs."""
        return sha256_json(self.inputs)

    @property
    def there(self) -> bool:
        """Whether every file is as it was left."""
        known = ((Path(path), sha256) for path, sha256 in self.files.items())
        return all(path.is_file() and sha256_file(path) == sha256 for path, sha256 in known)


def hashes(*paths: Path) -> dict[str, str]:
    """Full path to SHA-256, of files and of all files below folders."""
    found: dict[str, str] = {}
    for path in paths:
        inside = [path / rel for rel in files_under(path)] if path.is_dir() else [path]
        found |= {str(file): sha256_file(file) for file in inside}
    return found


def digest(path: Path) -> str:
    """Hex SHA-256 of what a file or folder holds, wherever it lies."""
    if path.is_dir():
        return sha256_json([[rel.as_posix(), sha256_file(path / rel)] for rel in files_under(path)])
    return sha256_file(path)


class State:
    """The documents of one pipeline."""

    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name

    @property
    def lease(self) -> str:
        """Key of the lease."""
        return f"{self.name}/lease.json"

    def runs(self) -> list[str]:
        """Ids of all runs, oldest first."""
        keys = self.storage.keys(f"{self.name}/runs/")
        return [key.split("/")[2] for key in keys if key.endswith("/run.json")]

    def run(self, run: str) -> Run:
        """One run by its id, or its number."""
        number = run.zfill(4)
        for known in self.runs():
            if run == known or number == known.partition("-")[0]:
                return Run(**read_document(self.storage, self._key(known, "run")))
        raise UserError(
            f"the pipeline '{self.name}' has no run '{run}'",
            where=self.storage.location,
            fix=f"its runs: {', '.join(self.runs()) or 'none'}",
        )

    def begin(self, *, baseline: str, trigger: dict[str, Any] | None, spec: dict[str, Any]) -> Run:
        """Write down a new run. Its id is unique, and begins with its number."""
        number = max((int(known.partition("-")[0]) for known in self.runs()), default=0) + 1
        run = Run(f"{number:04d}-{uuid.uuid4().hex[:6]}", now(), baseline, trigger, spec)
        create_document(self.storage, self._key(run.id, "run"), asdict(run))
        return run

    def unfinished(self) -> Run | None:
        """The last run, if it has not ended."""
        runs = self.runs()
        return self.run(runs[-1]) if runs and self.end(runs[-1]) is None else None

    def end(self, run: str) -> End | None:
        """How a run ended, or None."""
        found = self._read(self._key(run, "end"))
        return End(**found) if found else None

    def finish(self, run: str, end: End) -> End:
        """Write down the end of a run; the first one stays."""
        create_document(self.storage, self._key(run, "end"), asdict(end))
        written = self.end(run)
        assert written is not None
        return written

    def stage(self, run: str, stage: str) -> Done | None:
        """A stage of a run, if it is done."""
        found = self._read(self._key(run, f"stages/{stage}"))
        return Done(**found) if found else None

    def record(self, run: str, done: Done) -> None:
        """Write down that a stage of a run is done; if it was done before with other inputs, in its place."""
        self._put(self._key(run, f"stages/{done.stage}"), done)

    def made(self, stage: str, inputs: dict[str, Any]) -> Done | None:
        """What any run made of these inputs."""
        found = self._read(self._made(stage, sha256_json(inputs)))
        return Done(**found) if found else None

    def keep(self, done: Done) -> None:
        """Remember what a stage made, for every run with the same inputs."""
        self._put(self._made(done.stage, done.hash), done)

    def failed(self, run: str, stage: str, error: BaseException) -> None:
        """Write down what went wrong."""
        row = {"stage": stage, "error": str(error)[:2000], "kind": type(error).__name__, "at": now()}
        number = len(self.failures(run))
        while not create_document(self.storage, self._key(run, f"failures/{number:04d}"), row):
            number += 1

    def failures(self, run: str) -> list[dict[str, Any]]:
        """What went wrong in a run, oldest first."""
        keys = self.storage.keys(f"{self.name}/runs/{run}/failures/")
        return [read_document(self.storage, key) for key in keys]

    def _key(self, run: str, document: str) -> str:
        return f"{self.name}/runs/{run}/{document}.json"

    def _made(self, stage: str, hash: str) -> str:
        return f"{self.name}/made/{stage}/{hash}.json"

    def _read(self, key: str) -> Any:
        try:
            return read_document(self.storage, key)
        except Missing:
            return None

    def _put(self, key: str, done: Done) -> None:
        change: Callable[[Any], Any] = lambda _: asdict(done)  # noqa: E731
        update(self.storage, key, change)


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")

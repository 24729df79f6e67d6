"""What a server has answered so far, on disk, so that a benchmark goes on after a break.

A journal is a file of JSON lines, one for each model's part of a finished request. An answer is found again
by what was asked: the model's id, the tokens and how to generate, whatever suite, limit or order they come
in. It counts only while the model, its adapter and what it reads are of the versions that gave it.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json

Versions = dict[str, str | float]
"""What an answer depends on, by name; a number is a probe's score and may differ by :data:`NOISE`."""

NOISE = 0.05  # nats; what the order of additions changes in low precision


@dataclass(frozen=True)
class Answer:
    """``value``: a text, or a context's ``[[logprob, greedy], ...]``. ``passages``: how many were read."""

    value: Any
    adapter: str | None = None
    passages: int = 0
    truncated: bool = False


Part = tuple[str, Versions, dict[str, Answer]]
"""What one model answered in one request, by key."""


def question_key(*asked: Any) -> str:
    """The key of a question; ``asked`` is all that decides the answer of a given model."""
    return sha256_json(asked)[:32]


class Journal:
    """The answers in a file. One process at a time may have it open; its threads may share it."""

    def __init__(self, path: Path, now: Versions, *, renewed: str = "") -> None:
        """``now``: versions that the server has, as far as known. What other versions answered is left
        aside, and is asked again. ``renewed`` says how, in the message on a version that changes later."""
        self._versions, self._renewed = dict(now), renewed
        self._answers: dict[tuple[str, str], Answer] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - open until close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                "another benchmark is writing here",
                where=str(path),
                fix="wait for it, or choose another --out",
            ) from None
        try:
            self.left_aside = self._read(path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _read(self, path: Path) -> int:
        """Take in the lines that still hold, the newest first; how many answers do not."""
        self._file.seek(0)
        data = self._file.read()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):  # the last writer was killed in the middle of a line
            self._file.truncate(len(whole))
        lines = [_line(text, f"{path}:{n}") for n, text in enumerate(whole.splitlines(), start=1)]
        left_aside = 0
        for model, versions, answers in reversed(lines):
            if self._changed(versions):
                left_aside += len(answers)
                continue
            self._versions |= versions
            for key, answer in answers.items():
                self._answers.setdefault((model, key), answer)
        return left_aside

    def get(self, model: str, key: str) -> Answer | None:
        with self._lock:
            return self._answers.get((model, key))

    def add(self, *parts: Part) -> None:
        """Keep what the models answered, on disk when this returns.

        Raises :class:`UserError` if a version is not the one that answered before.
        """
        lines = [
            {
                "model": model,
                "versions": versions,
                "answers": {key: asdict(answer) for key, answer in answers.items()},
            }
            for model, versions, answers in parts
        ]
        with self._lock:
            # First kept, then refused: the next run knows the newer version by it.
            self._file.write(
                b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)
            )
            self._file.flush()
            os.fsync(self._file.fileno())
            for model, versions, answers in parts:
                for name in self._changed(versions):
                    change = f"{self._versions[name]}, now {versions[name]}"
                    raise UserError(
                        f"{name} changed while the benchmark ran: {change}",
                        fix=self._renewed,
                        status=409,
                    )
                self._versions |= versions
                self._answers |= {(model, key): answer for key, answer in answers.items()}

    def _changed(self, versions: Versions) -> Sequence[str]:
        """Names of what is of another version now."""
        return [
            name
            for name, version in versions.items()
            if name in self._versions and not _same(self._versions[name], version)
        ]


def _line(text: bytes, where: str) -> Part:
    try:
        line = json.loads(text)
        answers = {key: Answer(**answer) for key, answer in line["answers"].items()}
        return line["model"], line["versions"], answers
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            "not a journal of answers", where=where, fix="remove the file; nothing else is lost"
        ) from None


def _same(known: str | float, version: str | float) -> bool:
    if isinstance(known, float) and isinstance(version, float):
        return abs(known - version) <= NOISE
    return known == version

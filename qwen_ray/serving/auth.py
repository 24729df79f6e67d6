"""API keys: who may use the server.

A key is ``qr-`` and 256 random bits, shown once when it is made. The file holds its SHA-256 only, which is
enough for a secret that cannot be guessed (slow hashes are for passwords). The server reads the file again
when it changes, so keys come and go without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AwareDatetime, Field, field_validator

from qwen_ray.config import Section, validate
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.fsio import read_json, write_json
from qwen_ray.registry import NAME
from qwen_ray.serving.limits import Rates

log = logging.getLogger(__name__)

_PREFIX = "qr-"


class Key(Section):
    """A key without its secret."""

    page: ClassVar[str] = "docs/serving-security.md"
    name: Annotated[str, Field(pattern=f"^(?:{NAME.pattern})$")]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    created: AwareDatetime
    expires: AwareDatetime | None = None
    limits: Rates = Rates()


class _Keys(Section):
    """The file."""

    page: ClassVar[str] = "docs/serving-security.md"
    version: Literal[1] = 1
    keys: list[Key]

    @field_validator("keys")
    @classmethod
    def _apart(cls, keys: list[Key]) -> list[Key]:
        if len({key.name for key in keys}) < len(keys):
            raise ValueError("two keys have one name")
        return keys


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; :class:`UserError` if it is missing or damaged."""
    return validate(_Keys, read_json(path), where=str(path), origin={}).keys


def create_key(
    path: Path, name: str, *, limits: Rates | None = None, lifetime: timedelta | None = None
) -> str:
    """Add a key and return its secret, which is nowhere else. The file is made if there is none.

    Raises :class:`UserError` if the name is taken or cannot be one.
    """
    if not NAME.fullmatch(name):
        raise UserError(
            f"'{name}' cannot be the name of a key",
            fix="lower-case letters, digits, dot, dash and underscore, at most 64",
        )
    secret = _PREFIX + secrets.token_urlsafe(32)
    now = datetime.now(UTC).replace(microsecond=0)
    expires = None if lifetime is None else now + lifetime
    with _locked(path):
        keys = read_keys(path) if path.exists() else []
        if name in {key.name for key in keys}:
            raise UserError(
                f"there is a key '{name}'", where=str(path), fix="revoke it first, or choose another"
            )
        made = Key(name=name, sha256=_digest(secret), created=now, expires=expires, limits=limits or Rates())
        _write(path, [*keys, made])
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out; servers that read the file refuse it from the next request on."""
    with _locked(path):
        keys = read_keys(path)
        names = [key.name for key in keys]
        if name not in names:
            fix = did_you_mean(name, names) if names else "it has none"
            raise UserError(f"no key '{name}'", where=str(path), fix=fix)
        _write(path, [key for key in keys if key.name != name])


class KeyFile:
    """The keys that a server takes."""

    def __init__(self, path: Path) -> None:
        """:class:`UserError` if the file is missing or damaged now; later, the last good keys stay."""
        self.path = path.expanduser().resolve()
        self._keys = read_keys(self.path)
        self._stamp = self._now()

    def check(self, authorization: str | None) -> Key:
        """The key of an ``Authorization`` header; :class:`UserError` (401) if it is not one of ours."""
        scheme, _, secret = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise UserError("no API key was given", fix="send 'Authorization: Bearer KEY'", status=401)
        self._refresh()
        digest, found = _digest(secret.strip()), None
        for key in self._keys:  # all of them, and each compared in constant time
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            raise UserError("the API key is not valid", status=401)
        if found.expires is not None and found.expires <= datetime.now(UTC):
            raise UserError(f"the API key '{found.name}' has expired", status=401)
        return found

    def _refresh(self) -> None:
        stamp = self._now()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self.path)
        except (UserError, OSError) as e:
            log.error("the keys of before stay in force: %s", e)

    def _now(self) -> tuple[int, int, int] | None:
        """What changes when the file is written; None if it cannot be looked at."""
        try:
            facts = os.stat(self.path)
        except OSError:
            return None
        return facts.st_mtime_ns, facts.st_size, facts.st_ino


def check_exposure(host: str, keys: Path | None, no_auth: bool) -> None:
    """:class:`UserError` if a server on ``host`` would serve other machines without asking for a key."""
    if keys is not None and no_auth:
        raise UserError("--keys and --no-auth contradict each other", where="serve", fix="leave one out")
    if keys is None and not no_auth and not is_loopback(host):
        raise UserError(
            f"on {host} every machine that reaches this one could use the server",
            where="serve",
            fix="give --keys FILE (see `qwen-ray keys create`), or --no-auth if that is meant",
        )


def check_origins(origins: Sequence[str]) -> None:
    """:class:`UserError` for one that is not an origin of a web page: scheme, host, and port if unusual."""
    for text in origins:
        parts = urlsplit(text)
        exact = text == f"{parts.scheme}://{parts.netloc}"
        if not exact or parts.scheme not in ("http", "https") or not parts.netloc or "*" in text:
            raise UserError(
                f"'{text}' is not an origin", where="cors", fix="like 'https://notes.example:8443'"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Two commands that change one file at a time would lose one's change."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, keys: list[Key]) -> None:
    mask = os.umask(0o077)  # for its owner alone
    try:
        write_json(path, _Keys(keys=keys).model_dump(mode="json", exclude_none=True))
    finally:
        os.umask(mask)

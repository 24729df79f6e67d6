"""Where a cluster's job server is, and the token that it asks for."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from qwen_ray.errors import UserError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"


def auth_token() -> str | None:
    """The cluster's token, from where Ray looks for it: $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH,
    ~/.ray/auth_token."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else Path.home() / ".ray" / "auth_token"
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except OSError:
        if named:
            raise UserError(
                "no such token file", where=f"$RAY_AUTH_TOKEN_PATH: {path}", fix="check the path"
            ) from None
        return None


def server_address(address: str | None) -> str:
    """``http(s)://HOST:PORT`` of the job server: ``address``, else $RAY_API_SERVER_ADDRESS, else this
    machine's. Raises :class:`UserError` for what is not a web address."""
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    whole = given if "://" in given else f"http://{given}"
    parts = urlsplit(whole)
    try:
        port, valid = parts.port, parts.scheme in {"http", "https"} and parts.hostname
    except ValueError:
        port, valid = None, None
    if not valid:
        raise UserError(
            "not the address of a job server",
            where=f"--address {given}",
            fix=f"http://{parts.hostname or 'HEAD'}:8265, the port of Ray's dashboard",
        )
    if port is None and "://" not in given:
        whole = f"{whole}:8265"
    return whole.rstrip("/")

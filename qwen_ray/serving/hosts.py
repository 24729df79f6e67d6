"""The names under which a server may be asked: what a request's ``Host`` header may say.

A page elsewhere can let its own name point to 127.0.0.1 (DNS rebinding). A browser then takes what listens
there for that page's own server, and lets it read answers. The name that it asks for gives it away.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from qwen_ray.errors import UserError

LOCAL = ("localhost", "127.0.0.1", "[::1]")
ANY = "*"
_NAME = re.compile(r"\*|(\*\.)?[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f:.]+\]", re.IGNORECASE)


def check_hosts(hosts: Sequence[str]) -> None:
    """:class:`UserError` for one that is neither a name, ``*.`` and a name, nor ``*``."""
    for text in hosts:
        if not _NAME.fullmatch(text):
            raise UserError(
                f"'{text}' is not the name of a host",
                where="hosts",
                fix="like 'notes.example', '*.notes.example' or '[::1]', without scheme and port",
            )


def allowed(header: str | None, hosts: Sequence[str]) -> bool:
    """Whether a ``Host`` header names one of ``hosts``, at any port; ``*.NAME`` stands for all below."""
    name = re.sub(r":\d*$", "", (header or "").strip()).lower()
    return any(
        pattern in (ANY, name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))
        for pattern in map(str.lower, hosts)
    )

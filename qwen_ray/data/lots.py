"""Chance that depends on names alone: the same in every process, on every machine, in every run."""

from __future__ import annotations

import hashlib


def digest(text: str) -> bytes:
    """SHA-256 of ``text``: 32 bytes, an order without meaning."""
    return hashlib.sha256(text.encode()).digest()


def integer(text: str) -> int:
    """In [0, 2^64), as likely one as the other."""
    return int.from_bytes(digest(text)[:8], "big")


def lot(seed: int, *names: str) -> str:
    """Decides who comes first, by the seed and the names: hexadecimal, to be sorted by."""
    return digest("\0".join([str(seed), *names])).hex()

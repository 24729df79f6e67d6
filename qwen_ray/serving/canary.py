"""Whose turn it is: which requests of the router a canary answers."""

from __future__ import annotations

from qwen_ray.fsio import sha256_json
from qwen_ray.registry import Canary


def on_canary(name: str, canary: Canary, text: str) -> bool:
    """Whether adapter ``name``'s canary answers what begins with ``text``.

    The same text always comes out the same, so a conversation stays where it began; of many texts the
    canary's share is chosen, other ones for each version.
    """
    drawn = int(sha256_json([name, canary.version, text])[:13], 16) / 16**13  # 52 bits: exact
    return drawn < canary.share

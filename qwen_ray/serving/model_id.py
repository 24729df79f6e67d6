"""The model ids of the API: ``base[:adapter[@version]]``.

``qwen2.5-3b`` is the base model, ``qwen2.5-3b:biology`` the adapter's production version,
``qwen2.5-3b:biology@4`` and ``...@candidate`` a version by number or alias. An id is taken apart and
checked here, before any cache, file or metric sees a name from a request.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.errors import UserError
from qwen_ray.registry import NAME

AUTO = "auto"


@dataclass(frozen=True)
class ModelId:
    """A parsed model id. ``adapter`` None means the base model; ``at`` None means ``production``."""

    base: str
    adapter: str | None = None
    at: str | None = None

    def __str__(self) -> str:
        text = self.base
        if self.adapter is not None:
            text += f":{self.adapter}"
        if self.at is not None:
            text += f"@{self.at}"
        return text


def parse(text: str) -> ModelId:
    """Take an id apart; :class:`UserError` with status 400 (not built) or 404 (cannot exist)."""
    if "+" in text:
        raise UserError(
            f"'{_shown(text)}': this server has no '+' extensions (retrieval)",
            fix="leave out the part from '+' on",
        )
    base, colon, rest = text.partition(":")
    adapter, at_sign, at = rest.partition("@")
    _check(base, "model", text)
    if not colon:
        return ModelId(base)
    _check(adapter, "adapter", text)
    if adapter == AUTO:
        raise UserError(
            f"'{text}': this server has no router", fix="name an adapter; GET /v1/models lists them"
        )
    if not at_sign:
        return ModelId(base, adapter)
    _check(at, "version", text)
    return ModelId(base, adapter, at)


def _check(part: str, what: str, whole: str) -> None:
    if not NAME.fullmatch(part):
        raise UserError(
            f"unknown model '{_shown(whole)}': '{_shown(part)}' cannot be the name of a {what}",
            fix="the form is base[:adapter[@version]]; GET /v1/models lists what is served",
            status=404,
        )


def _shown(text: str) -> str:
    """A name from a request as it may be repeated in a message: short and printable."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= 80 else clean[:77] + "..."

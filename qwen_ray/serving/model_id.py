"""The model ids of the API: ``base[:adapter[@version] | :auto][+rag]``.

``qwen2.5-3b`` is the base model, ``qwen2.5-3b:biology`` the adapter's production version,
``qwen2.5-3b:biology@4`` and ``...@candidate`` a version by number or alias. ``:auto`` lets the router
choose the adapter, and with ``+rag`` the model reads what a knowledge base holds on the question. An id is
taken apart and checked here, before any cache, file or metric sees a name from a request.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.errors import UserError
from qwen_ray.registry import NAME

AUTO, RAG = "auto", "rag"


@dataclass(frozen=True)
class ModelId:
    """A parsed model id. ``adapter`` None means the base model; ``at`` None means ``production``."""

    base: str
    adapter: str | None = None
    at: str | None = None
    rag: bool = False

    @property
    def auto(self) -> bool:
        """Whether the router chooses the adapter."""
        return self.adapter == AUTO

    def __str__(self) -> str:
        text = self.base
        if self.adapter is not None:
            text += f":{self.adapter}"
        if self.at is not None:
            text += f"@{self.at}"
        return f"{text}+{RAG}" if self.rag else text


def parse(text: str) -> ModelId:
    """Take an id apart; :class:`UserError` with status 404 for one that cannot exist."""
    name, plus, extension = text.partition("+")
    if plus and extension != RAG:
        raise _unknown(text, f"'+{_shown(extension)}' is not an extension")
    base, colon, rest = name.partition(":")
    adapter, at_sign, at = rest.partition("@")
    _check(base, "model", text)
    if colon:
        _check(adapter, "adapter", text)
    if at_sign:
        _check(at, "version", text)
        if adapter == AUTO:
            raise _unknown(text, "what the router chooses has no version")
    return ModelId(base, adapter if colon else None, at if at_sign else None, bool(plus))


def _check(part: str, what: str, whole: str) -> None:
    if not NAME.fullmatch(part):
        raise _unknown(whole, f"'{_shown(part)}' cannot be the name of a {what}")


def _unknown(whole: str, why: str) -> UserError:
    return UserError(
        f"unknown model '{_shown(whole)}': {why}",
        fix="the form is base[:adapter[@version] | :auto][+rag]; GET /v1/models lists what is served",
        status=404,
    )


def _shown(text: str) -> str:
    """A name from a request as it may be repeated in a message: short and printable."""
    clean = "".join(c if c.isprintable() else "?" for c in text)
    return clean if len(clean) <= 80 else clean[:77] + "..."

"""The catalogue of training data sources: one file a source, each ends in ``SOURCE``."""

from __future__ import annotations

from qwen_ray.data.sources import file, gsm8k, openstax_biology, openstax_us_history
from qwen_ray.data.sources.base import Drops, Source
from qwen_ray.errors import UserError, did_you_mean

SOURCES: dict[str, Source] = {
    module.SOURCE.name: module.SOURCE for module in (openstax_biology, openstax_us_history, gsm8k, file)
}

__all__ = ["SOURCES", "Drops", "Source", "get_source"]


def get_source(name: str) -> Source:
    """The source called ``name``; an unknown one is a :class:`UserError` with the nearest valid name."""
    if name not in SOURCES:
        raise UserError(f"unknown source '{name}'", where="--source", fix=did_you_mean(name, SOURCES))
    return SOURCES[name]

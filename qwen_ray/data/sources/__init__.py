"""The catalogue of training data sources: one file a source (``SOURCE``), and the hub's sets."""

from __future__ import annotations

from qwen_ray.data.sources import (
    cisa_kev,
    ctf_writeups,
    file,
    gsm8k,
    hub_sets,
    mitre_attack,
    mitre_capec,
    mitre_cwe,
    openstax_biology,
    openstax_us_history,
    openstax_world_history,
    opentriviaqa,
    owasp_cheatsheets,
    pypa_advisories,
    rustsec_advisories,
)
from qwen_ray.data.sources.base import Drop, Drops, Found, Source
from qwen_ray.errors import UserError, did_you_mean

_FILES = (
    openstax_biology,
    openstax_us_history,
    openstax_world_history,
    opentriviaqa,
    mitre_attack,
    mitre_capec,
    mitre_cwe,
    cisa_kev,
    pypa_advisories,
    rustsec_advisories,
    owasp_cheatsheets,
    ctf_writeups,
    gsm8k,
)
SOURCES: dict[str, Source] = {
    source.name: source for source in (*(module.SOURCE for module in _FILES), *hub_sets.SOURCES, file.SOURCE)
}
"""By name: those with files of their own, sets of the hub, any local file."""

__all__ = ["SOURCES", "Drop", "Drops", "Found", "Source", "get_source"]


def get_source(name: str) -> Source:
    """The source called ``name``; an unknown one is a :class:`UserError` with the nearest valid name."""
    if name not in SOURCES:
        raise UserError(f"unknown source '{name}'", where="--source", fix=did_you_mean(name, SOURCES))
    return SOURCES[name]

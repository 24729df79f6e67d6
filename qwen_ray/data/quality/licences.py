"""Which licences let text into training data that others will use."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

UNKNOWN = "unknown"
"""Of a source that does not say. Allowed, and counted."""

# Words of a licence's name that forbid commercial use or adapted works.
_RESTRICTED = re.compile(
    r"(?:^|-)(?:nc|nd)(?:-|$)|non-?commercial|no-?deriv|proprietary|all-rights-reserved|research-(?:use-)?only"
    r"|academic-(?:use-)?only"
)


def is_restricted(licence: str) -> bool:
    """Whether the name says non-commercial, no derivatives or proprietary (``CC BY-NC 4.0``)."""
    return _RESTRICTED.search(_plain(licence)) is not None


def is_allowed(licence: str, allowed: Sequence[str] = ()) -> bool:
    """Whether ``licence`` matches one of ``allowed`` (shell patterns: ``CC-BY-*``); case and spaces are free.

    Without patterns every licence but a restricted one is. A pattern covers a restricted licence only if it
    names the restriction (``CC-BY-NC-*``) or is ``*``: ``CC-BY-*`` does not let CC-BY-NC in.
    """
    if not allowed:
        return not is_restricted(licence)
    return any(
        fnmatchcase(_plain(licence), _plain(pattern))
        and (pattern == "*" or is_restricted(pattern.replace("*", "")) or not is_restricted(licence))
        for pattern in allowed
    )


def _plain(licence: str) -> str:
    return re.sub(r"[\s_/,;()]+", "-", licence.strip().casefold())

"""Syntax of names, labels and versions; each function says what is wrong, '' for nothing.

Source: https://kubernetes.io/docs/concepts/overview/working-with-objects/names/ and .../labels/.
"""

from __future__ import annotations

import re
from typing import Any

_LABEL_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_LABEL_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_QUALIFIED = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")
_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?")


def dns_1123_label(text: str) -> str:
    if len(text) <= 63 and _LABEL_1123.fullmatch(text):
        return ""
    return f"'{text}' is not 1 to 63 lower-case letters, digits and dashes"


def dns_1035_label(text: str) -> str:
    """As for services: it begins with a letter."""
    if len(text) <= 63 and _LABEL_1035.fullmatch(text):
        return ""
    return f"'{text}' is not lower-case letters, digits and dashes, a letter first"


def dns_subdomain(text: str) -> str:
    if len(text) <= 253 and _SUBDOMAIN.fullmatch(text):
        return ""
    return f"'{text}' is not lower-case letters, digits, dots and dashes"


def label_key(text: str) -> str:
    prefix, slash, name = text.rpartition("/")
    if slash and dns_subdomain(prefix):
        return f"the prefix of the label '{text}' is no domain"
    if len(name) > 63 or not _QUALIFIED.fullmatch(name):
        return f"'{text}' is no key of a label: at most 63 letters, digits, dashes, underscores and dots"
    return ""


def label_value(text: Any) -> str:
    value = str(text)
    if value and (len(value) > 63 or not _QUALIFIED.fullmatch(value)):
        return f"'{value}' is no value of a label: at most 63 letters, digits, dashes, underscores and dots"
    return ""


def older(version: Any, minimum: tuple[int, int, int]) -> str:
    """Whether a version of Ray is absent, not a version, or below ``minimum``."""
    least = ".".join(map(str, minimum))
    if not version:
        return f"rayVersion is not set ({least} or later)"
    found = _VERSION.match(str(version))
    if found is None:
        return f"rayVersion '{version}' is no version"
    numbers = tuple(int(number or 0) for number in found.groups())
    return f"rayVersion {version} is before {least}" if numbers < minimum else ""

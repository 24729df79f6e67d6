"""The kinds of weakness that advisories name, to ask which of them one describes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from qwen_ray.data.questions import BLANK, choose
from qwen_ray.data.sources.entries import four_choices, turned


class _Kind(NamedTuple):
    name: str
    family: str
    """Kinds of one family can hold at once, so that none is a wrong answer beside another."""
    words: re.Pattern[str]


def _kind(name: str, family: str, words: str) -> _Kind:
    return _Kind(name, family, re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.I))


_KINDS = (
    _kind("SQL injection", "injection", r"SQL[ -]injections?|SQLi"),
    _kind("Command injection", "injection", r"(?:OS |shell )?command injections?|shell injections?"),
    _kind("Code injection", "injection", r"code injections?"),
    _kind("Template injection", "injection", r"(?:server[ -]side )?template injections?(?: \(SSTI\))?|SSTI"),
    _kind("Header injection", "injection", r"(?:HTTP )?(?:response |header |CRLF )(?:injections?|splitting)"),
    _kind("Cross-site scripting", "scripting", r"cross[ -]site[ -]scripting(?: \(XSS\))?|XSS"),
    _kind("Cross-site request forgery", "csrf", r"cross[ -]site request forgery(?: \(CSRF\))?|CSRF|XSRF"),
    _kind("Server-side request forgery", "ssrf", r"server[ -]side request forgery(?: \(SSRF\))?|SSRF"),
    _kind("Open redirect", "redirect", r"open redirect(?:s|ion)?(?: vulnerability)?"),
    _kind("XML external entity reference", "xml", r"XML external entit(?:y|ies)(?: \(XXE\))?|XXE"),
    _kind("Path traversal", "path", r"(?:path|directory)[ -]traversals?|zip[ -]slip"),
    _kind("Link following", "path", r"sym(?:bolic )?link (?:attacks?|following)|link following"),
    _kind(
        "Deserialization of untrusted data", "deserialization", r"deserializations?(?: of untrusted data)?"
    ),
    _kind("Use after free", "memory", r"use[ -]after[ -]free"),
    _kind("Double free", "memory", r"double[ -]free"),
    _kind("Type confusion", "memory", r"type confusions?"),
    _kind("Out-of-bounds write", "memory", r"out[ -]of[ -]bounds writes?"),
    _kind("Out-of-bounds read", "memory", r"out[ -]of[ -]bounds reads?|buffer over-?reads?"),
    _kind(
        "Buffer overflow", "memory", r"(?:(?:heap|stack)(?:-based)? )?buffer[ -]overflows?|heap overflows?"
    ),
    _kind("Use of uninitialized memory", "memory", r"uninitiali[sz]ed (?:memory|values?|variables?)"),
    _kind("NULL pointer dereference", "null", r"null[ -]?(?:pointer|ptr)? ?dereferenc(?:es?|ing)"),
    _kind("Integer overflow", "integer", r"integer overflows?"),
    _kind("Division by zero", "division", r"divi(?:sion|de)[ -]by[ -](?:zero|0)"),
    _kind("Race condition", "race", r"(?:data )?race conditions?|data races?|TOCTOU"),
    _kind("Timing side channel", "timing", r"timing (?:attacks?|side[ -]channels?)"),
    _kind(
        "Inefficient regular expression",
        "regex",
        r"ReDoS|regular expression denial of service(?: \(ReDoS\))?",
    ),
    _kind("HTTP request smuggling", "smuggling", r"(?:HTTP )?request smuggling"),
    _kind(
        "Hard-coded credentials",
        "secret",
        r"hard-?coded (?:credentials?|passwords?|(?:cryptographic )?keys?)",
    ),
    _kind(
        "Unrestricted file upload", "upload", r"(?:unrestricted|arbitrary) (?:file )?uploads?(?: of files?)?"
    ),
    _kind(
        "Authentication bypass",
        "authentication",
        r"authentication bypass(?:es)?|bypass(?:es)? authentication",
    ),
    _kind("Prototype pollution", "prototype", r"prototype pollution"),
)
_LEAST = 40  # characters that describe the flaw
_ASK = (
    "Which kind of weakness is described here ({flaw})? {text}",
    "{flaw}: {text} Which kind of weakness is this?",
    "Name the kind of weakness that fills the blank ({flaw}): {text}",
)


def kind_question(flaw: str, text: str, *, key: str) -> tuple[str, str] | None:
    """Four kinds of weakness to choose from for ``text``, with the words that name its kind blanked out.

    ``flaw`` says whose it is. ``None`` where the text names no kind, or more than one.
    """
    named = list(_named(text))
    if len(named) != 1 or len(text) < _LEAST:
        return None
    kind = named[0]
    others = [other.name for other in _KINDS if other.family != kind.family]
    ask = choose(_ASK, f"{key}/kind").format(flaw=flaw, text=kind.words.sub(BLANK, text))
    return four_choices(ask, kind.name, turned(others, key), key=f"{key}/kind")


def _named(text: str) -> Iterator[_Kind]:
    return (kind for kind in _KINDS if kind.words.search(text))

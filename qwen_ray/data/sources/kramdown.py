"""Kramdown with inline HTML and MathML: plain text of a piece of it, a page's paragraphs and marked terms."""

from __future__ import annotations

import html
import re

# In the order they are applied.
_RULES = [
    (re.compile(r'<sup[^>]*data-type="footnote-ref"[^>]*>.*?</sup>', re.S), ""),
    (re.compile(r'<span[^>]*data-type="newline"[^>]*>.*?</span>', re.S), " "),
    (re.compile(r"\[\\?\[link\\?\]\]\([^)]*\)"), ""),  # "see figure", which has no words of its own
    (re.compile(r"!\[[^\]]*\]\([^)]*\)"), ""),  # images
    (re.compile(r"\[([^\]]+)\](?:\([^)]*\)|\[[^\]]*\])"), r"\1"),  # links keep their words
    (re.compile(r"\{:[^}]*\}"), ""),  # attribute lists
    (re.compile(r"^\^$", re.M), ""),  # the mark between two lists
]
_MATH = re.compile(r"\s*<math\b[^>]*>(.*?)</math>\s*", re.S)
_POWER = re.compile(r"(?<=[\w)*])<sup>\s*([-−–]?\d+)\s*</sup>(\w?)")
_ESCAPED = re.compile(r"\\([\\`*_{}\[\]()#+\-.!|:'\"<>^~$])")
_EMPHASIS = re.compile(r"(\*{1,3})(?=\S)(?!(?<=\d\*)\d)(.+?)\1", re.S)  # not the times sign of 8*2
_BLANK = re.compile(r"_{2,}")
_TERM = re.compile(r'\*\*([^*\n]+)\*\*\{: data-type="term"')
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
_LINK = r"\[\\?\[link\\?\]\]\([^)]*\)"
_ASIDE = re.compile(rf"\s*\((?:[Ss]ee )?{_LINK}(?:[^()]{{0,20}}{_LINK})*[^()]{{0,10}}\)")  # ([link]a)
_HOLD = "\ue000"  # stands for an escaped character while emphasis is undone


def plain_text(markup: str) -> str:
    """Readable text on one line: no markup, links reduced to their words, ``CO<sub>2</sub>`` as CO2."""
    text = _MATH.sub(_math_text, markup)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _POWER.sub(lambda m: f"^{m[1]} {m[2]}".rstrip(" "), text)
    text = re.sub(r"</?[a-zA-Z][^>]*>", "", text)
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[1])
        return _HOLD

    text = _EMPHASIS.sub(r"\2", _ESCAPED.sub(hold, text))
    text = re.sub(_HOLD, lambda _: held.pop(0), text)
    text = html.unescape(text).replace("\u00a0", " ")
    text = re.sub(r"\s+", " ", re.sub(r"(?<=\w)(?<!_)(?=__)", " ", text))
    return re.sub(r" +([,;?!)]|\.(?!\d))", r"\1", _BLANK.sub("____", text)).strip()


def _math_text(match: re.Match[str]) -> str:
    """MathML as its letters in reading order: the books use it for formulas such as HCO3−."""
    body = re.sub(r">\s+<", "><", match[1].strip())
    return f" {re.sub('<[^>]+>', '', body).replace('→', ' → ')} "


def paragraphs(page: str) -> list[str]:
    """Plain text of a page's own paragraphs: no heading, list, picture, table, note, exercise or glossary.

    A figure's mention in brackets goes; any other, without which a sentence makes no sense, leaves a ``~``.
    """
    found, depth = [], 0
    for line in _FRONT_MATTER.sub("", page).split("\n"):
        inside = depth
        depth += len(re.findall(r"<(?:div|table|figure|section)\b", line)) - len(
            re.findall(r"</(?:div|table|figure|section)>", line)
        )
        if not inside and not depth and re.match(r"[^\W\d_]|\*+[^\s*]|[“‘]", line):
            found.append(plain_text(re.sub(_LINK, "~", _ASIDE.sub("", line))))
    return found


def marked_terms(page: str) -> list[str]:
    """The words that a page marks as terms, each once."""
    return list(dict.fromkeys(plain_text(term) for term in _TERM.findall(page)))

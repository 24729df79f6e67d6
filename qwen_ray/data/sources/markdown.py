"""Markdown as its sections, and their text without links, images, tables and long code."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(r" {0,8}(```+|~~~+)")
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*$")
_CODE_LINES, _CODE_CHARACTERS = 12, 500  # of a code block that is kept, at most

# In the order they are applied, outside code blocks.
_RULES = [
    (re.compile(r"!\[[^\]]*\](?:\([^)]*\)|\[[^\]]*\])"), ""),
    (re.compile(r"\[\^[^\]]+\]|^\s*\[!\w+\]", re.M), ""),  # footnotes, "[!NOTE]"
    (re.compile(r"^(\s*[-*+]) \[[ xX]\](?= )", re.M), r"\1"),  # boxes to tick
    (re.compile(r"\[((?:[^\[\]]|\[[^\]]*\])+)\](?:\([^()]*(?:\([^()]*\)[^()]*)*\)|\[[^\]]*\])"), r"\1"),
    (re.compile(r"<https?://[^>\s]*>"), ""),
    (re.compile(r"</?[a-z][a-z0-9]*(?:\s[^<>]*)?/?>", re.I), ""),
    (re.compile(r"(?<![\w*])(\*{1,3}|_{1,3})(?=\S)(.+?)(?<=\S)\1(?![\w*])", re.S), r"\2"),
    (re.compile(r"\\([\\`*_{}\[\]()#+\-.!|<>])"), r"\1"),
    (re.compile(r"^(\s*)[*+](?=\s)", re.M), r"\1-"),
    (re.compile(r"(?<=\S)[ \t]*\n\s*(?!\s|-\s|\d+[.)]\s)"), " "),  # lines of one paragraph or item
    (re.compile(r"[ \t]+$", re.M), ""),
    (re.compile(r"(?<=\S)[ \t]{2,}"), " "),
    (re.compile(r" +([.,;])(?=\s|$)"), r"\1"),
]
_COMMENT = re.compile(r"<!--.*?-->", re.S)
_QUOTED = re.compile(r"^\s{0,3}>\s?", re.M)
_INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_DEFINITION = re.compile(r"^\s{0,3}\[([^\]\n]+)\]:\s", re.M)  # of a link: "[label]: address"
_BRACKETS = re.compile(r"\[([^\[\]\n]+)\]")
_HOLD = "\ue000"  # stands for code while the rules are applied
_UNDERLINE = re.compile(r"(?:=+|-{3,})\s*$")
_PLAIN_LINE = re.compile(r"\s{0,3}[^\s\-*|>#=].*")
_NO_TEXT = re.compile(r"\s*(?:\||:::|\[[^\]]+\]:\s|(?:-{3,}|\*{3,}|_{3,})\s*$|\[TOC\])", re.I)


class Section(NamedTuple):
    """A heading, those above it (outermost first), the line it stands on, and its own text, in Markdown."""

    heading: str
    above: tuple[str, ...]
    line: int
    text: str


def sections(text: str) -> Iterator[Section]:
    """Each heading with the text up to the next one; what stands before the first has the heading "" """
    path: list[tuple[int, str]] = []
    start, body, fence = 1, list[str](), ""
    for number, line in enumerate(text.split("\n"), start=1):
        fence = _fence_after(line, fence)
        level, heading = 0, ""
        if not fence and (match := _HEADING.match(line)):
            level, heading = len(match[1]), match[2]
        elif not fence and _underlines(line, body):
            level, heading = 1 if line.startswith("=") else 2, body.pop()
        if level:
            yield _section(path, start, body)
            path = [*(part for part in path if part[0] < level), (level, plain_text(heading))]
            start, body = number, []
        else:
            body.append(line)
    yield _section(path, start, body)


def plain_text(text: str) -> str:
    """Readable text: paragraphs, lists and short code blocks; headings keep their words.

    A sentence that announces (with a colon) what is left out goes with it.
    """
    kept: list[str] = []
    labels = {label.casefold() for label in _DEFINITION.findall(text)}
    for block in filter(str.strip, _blocks(_COMMENT.sub("", text))):
        said = _code(block) if _FENCE.match(block) else _prose(block, labels)
        if said:
            kept.append(said)
        elif kept and kept[-1].endswith(":"):
            kept[-1] = re.sub(r"(?:^|(?<=[.!?])\s+|\n)[^.!?\n]*:$", "", kept[-1])
    return "\n\n".join(filter(None, kept))


def prose_words(text: str) -> int:
    """How many words of a :func:`plain_text` stand outside its code blocks."""
    return len(re.sub(r"```.*?```", "", text, flags=re.S).split())


def _section(path: list[tuple[int, str]], line: int, body: list[str]) -> Section:
    names = [name for _, name in path]
    return Section(names[-1] if names else "", tuple(names[:-1]), line, "\n".join(body).strip())


def _underlines(line: str, body: list[str]) -> bool:
    """Whether ``line`` makes the one before it, which stands alone, a heading."""
    alone = bool(body) and _PLAIN_LINE.fullmatch(body[-1]) and not "".join(body[-2:-1]).strip()
    return bool(alone and _UNDERLINE.match(line))


def _blocks(text: str) -> Iterator[str]:
    """Code blocks, and what empty lines or code blocks part."""
    block, fence = list[str](), ""
    for line in text.split("\n"):
        before, fence = fence, _fence_after(line, fence)
        if not before and (fence or not line.strip()):
            yield "\n".join(block)
            block = []
        block.append(line)
        if before and not fence:
            yield "\n".join(block)
            block = []
    yield "\n".join(block)


def _fence_after(line: str, fence: str) -> str:
    """The fence of the code block that is open after ``line``, where ``fence`` was open before it."""
    match = _FENCE.match(line)
    if not match:
        return fence
    if not fence:
        return match[1]
    closes = match[1].startswith(fence) and not line.strip().strip(fence[0])
    return "" if closes else fence


def _code(block: str) -> str:
    lines = block.strip("\n").rstrip().split("\n")
    short = len(lines) - 2 <= _CODE_LINES and len(block) <= _CODE_CHARACTERS
    whole = len(lines) > 2 and _FENCE.match(lines[-1])
    if not (short and whole and "".join(lines[1:-1]).strip()):
        return ""
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return "\n".join(line[margin:] for line in lines)


def _prose(block: str, labels: set[str]) -> str:
    lines = [line for line in _QUOTED.sub("", block).split("\n") if not _NO_TEXT.match(line)]
    text = "\n".join(match[2] if (match := _HEADING.match(line)) else line for line in lines)
    held: list[str] = []

    def hold(match: re.Match[str]) -> str:
        held.append(match[0])
        return _HOLD

    def label(match: re.Match[str]) -> str:
        # A label with code in it is a link too: text puts no code alone in brackets.
        return match[1] if match[1].casefold() in labels or _HOLD in match[1] else match[0]

    text = _INLINE_CODE.sub(hold, text.replace(_HOLD, ""))
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = html.unescape(_BRACKETS.sub(label, text))
    return re.sub(_HOLD, lambda _: held.pop(0), text).strip()

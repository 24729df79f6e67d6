"""Repair text that was damaged on its way: decoded as what it is not, escaped for a web page, or with
invisible characters in it. Sound text of any script stays as it is.
"""

from __future__ import annotations

import html
import re
import unicodedata

_PASSES = 3  # text can be damaged twice

# ASCII without controls (but tab and line break) and without "&" is always sound.
_SURELY_SOUND = re.compile(r"[\t\n -%'-~]*")

# What each character was as a byte, where bytes were taken for Windows-1252; the five bytes it does not know
# and Latin-1's controls stand for themselves.
_BYTE = {chr(b): b for b in range(0x80, 0x100)} | {
    bytes([b]).decode("cp1252"): b for b in range(0x80, 0xA0) if b not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_CONTROL_TO_CHARACTER = {b: c for c, b in _BYTE.items() if b < 0xA0 and ord(c) > 0xFF}

_RUN = re.compile(f"[{''.join(re.escape(c) for c in _BYTE)}]{{2,}}")
_CONTINUATION = f"[{''.join(re.escape(c) for c, b in _BYTE.items() if b < 0xC0)}]"
# How UTF-8 of the most frequent characters begins: Latin letters, typography, signs, ligatures, emoji. No
# word has these; but Ä and Å stand alone too (Å², or Å at the end of a quotation): they must touch a letter.
_SUSPICIOUS = re.compile(
    f"[ÂÃ]{_CONTINUATION}|(?<=[a-z])[ÄÅ]{_CONTINUATION}|[ÄÅ]{_CONTINUATION}(?=[a-z])"
    f"|â[€‚ƒ„†‡ˆ‰Š‹ŒŽ˜™šœžŸ\x80-\x9f]{_CONTINUATION}|ï[¬»¼½¿]{_CONTINUATION}|ð[Ÿ\x9f]{_CONTINUATION}"
)
# A word in capitals, then a closing quotation mark or dash: MAÇÃ” is sound.
_CAPITALS = re.compile("[^\\W\\d_a-zß-ÿ][ÂÃ][‘’“”…–—›»«‹]")
_SURE_RUN = 5  # characters of a run that would not be valid UTF-8 by chance

_TERMINAL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_LINE_BREAKS = re.compile(r"\r\n?|[\u2028\u2029\x85]")
_INVISIBLE = re.compile("[\u200b\u2060\ufeff\u00ad]|(?<=[ -~])[\u200c\u200d](?=[ -~])")
_WIDE_SPACES = re.compile("[\u00a0\u2007\u202f]")

# Escaped prose: no bare character that escaping would have changed, nothing about escaping or markup, and an
# entity where prose has its character.
_BARE = re.compile(r"[<>]|&(?!#?\w+;)")
_ABOUT_MARKUP = re.compile(r"html|xml|xss|escap|encod|entit|markup|ampersand|javascript|script|url|`", re.I)
_IN_PROSE = re.compile(
    r"\w&(?:#0?39|#x27|apos|[rl]squo|nbsp|[mn]dash|hellip);\w"
    r"|\w&(?:[mn]dash|hellip);"
    r"|&(?:quot|#34|[lr]dquo);\w|\w[.,?!]?&(?:quot|#34|[lr]dquo);"
    r"|\w ?&amp; ?\w"
    r"|&[A-Za-z](?:acute|grave|circ|uml|tilde|cedil|ring|caron);"
)


def repair(text: str) -> str:
    """``text`` in Unicode's composed form (NFC), without what only damage puts there.

    - UTF-8 that was read as Windows-1252 or Latin-1 (``Ã©``, ``â€™``) is read again, where the run of such
      characters is valid UTF-8 as a whole; C1 controls become the Windows-1252 characters they stand for;
    - byte-order marks, zero-width characters (but joiners, which scripts other than Latin's need), soft
      hyphens, terminal colours, NUL and other controls go; every line break becomes ``\\n``;
    - non-breaking spaces become spaces; HTML entities become characters, in escaped prose only: text that
      speaks of markup keeps them.
    """
    if _SURELY_SOUND.fullmatch(text):
        return text
    for _ in range(_PASSES):
        again = _reread_whole(text) or _RUN.sub(_reread, text)
        if again == text:
            break
        text = again
    text = _LINE_BREAKS.sub("\n", text)
    text = _CONTROLS.sub(_control, _TERMINAL.sub("", text))
    if "&" in text and _IN_PROSE.search(text) and not (_BARE.search(text) or _ABOUT_MARKUP.search(text)):
        text = html.unescape(text)
    text = _WIDE_SPACES.sub(" ", _INVISIBLE.sub("", text))
    return unicodedata.normalize("NFC", text)


def _reread_whole(text: str) -> str | None:
    """The whole text read as UTF-8: if all of it can be, one sure sign that it is suffices."""
    if not (_SUSPICIOUS.search(text) or any(len(run) >= _SURE_RUN for run in _RUN.findall(text))):
        return None
    try:
        return bytes(ord(c) if c < "\x80" else _BYTE[c] for c in text).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return None


def _reread(run: re.Match[str]) -> str:
    """A run of characters that could be bytes, read as UTF-8 where that is what it is."""
    damaged = run[0]
    try:
        text = bytes(_BYTE[c] for c in damaged).decode("utf-8")
    except UnicodeDecodeError:
        return damaged
    before, after = run.string[max(0, run.start() - 1) : run.start()], run.string[run.end() : run.end() + 1]
    if _CAPITALS.search(before + damaged):
        return damaged
    suspicious = len(_SUSPICIOUS.findall(before + damaged + after))
    if len(damaged) < _SURE_RUN and suspicious <= len(_SUSPICIOUS.findall(before + text + after)):
        return damaged
    return text


def _control(found: re.Match[str]) -> str:
    return _CONTROL_TO_CHARACTER.get(ord(found[0]), "")

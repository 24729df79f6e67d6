"""The words of a text: all of them, those that say what it is about, and a key of texts that are the same."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

_STOP = """
a about after all also an and any are as at be been before being both but by can could did do does during
each either every for from had has have he her his how i if in into is it its itself just like may me
might more most must my nor not of on one only or other our out over own said same shall she should so
some such than that the their them then there these they this those through to too under until up upon us
was we were what when where which while who whom whose why will with within without would you your
"""
_EXAM = """
above accurate answer answers below best called characterise characterised characterize characterized
choice choose correct correctly define definition describe described describes except explain explains
false following given identify incorrect indicate known likely mean means meant name named option options
passage please question refer referred refers select state statement statements tell term true use used
using
"""
STOP = frozenset(_STOP.split())
EXAM = frozenset(_EXAM.split())
"""What questions are asked with, whatever they are about."""

_UNITS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen
"""
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = dict(zip(_UNITS.split(), range(20), strict=True)) | dict(
    zip(_TENS, range(20, 100, 10), strict=True)
)

_WORD = re.compile(r"[^\W_]+")
_TOKEN = re.compile(r"[^\W_]+|(?<=[\d)])\s*[-+*/=<>^×÷−–]\s*(?=[\d(])")
_APOSTROPHE = re.compile("['’ʼ]")


def words(text: str) -> list[str]:
    """The words without case, punctuation and the width or form of characters (NFKC).

    As in the overlap analyses of GPT-3 (arXiv 2005.14165, appendix C) and Llama 2 (arXiv 2307.09288,
    appendix A.6). An apostrophe joins, every other mark parts.
    """
    return _WORD.findall(_plain(text))


def key(text: str) -> str:
    """The same for texts of the same words and, between numbers, signs: 31 + 2 is not 31 - 2."""
    tokens = (token.strip() for token in _TOKEN.findall(_plain(text)))
    return " ".join("-" if token in "−–" else token for token in tokens)


def content(text: str) -> list[str]:
    """The distinct stems of a text without :data:`STOP` and :data:`EXAM`; numbers in digits."""
    stems, tens = dict[str, None](), 0
    for word in words(text):
        number = _NUMBERS.get(word, -1)
        if tens and 0 < number < 10:  # "forty-two"
            del stems[str(tens)]
            stems[str(tens + number)] = None
        elif word not in STOP and word not in EXAM:
            stems[_stem(word) if number < 0 else str(number)] = None
        tens = number if number >= 20 else 0
    return list(stems)


def numbers(text: str) -> frozenset[str]:
    """The numbers in a text, in digits."""
    return frozenset(stem for stem in content(text) if stem.isdecimal())


def _plain(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _APOSTROPHE.sub("", text.lower())


@lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """Off with plural, -ed, -ing, -ly and last -e: light, so that words of different meaning seldom meet."""
    if word[0].isdecimal():
        return word.rstrip("s")  # the 1920s
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes", "zes")):
        word = word[:-2]
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    ending = next((e for e in ("ing", "ed", "ly") if word.endswith(e) and len(word) - len(e) >= 4), "")
    word = word.removesuffix(ending)
    if len(word) > 4 and word[-1] == word[-2] and word[-1] not in "ls":
        word = word[:-1]
    return word[:-1] if len(word) > 4 and word.endswith("e") else word

"""Which language a text is in: an n-gram classifier, and a quick test that answers for plain English."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from qwen_ray.errors import UserError

ENOUGH_LETTERS = 80
"""Letters from which on a text is long enough to be refused for its language."""
ODDS = 1e-6
"""It is refused if the language asked for is less likely than the likeliest by this factor. Lists of names
come down to 1e-5, sentences in another language start at 1e-6."""
_PLAIN_ENGLISH = 0.2  # share of function words; other languages stay below a tenth
_LOOKED_AT = 2000  # characters

_WORD = re.compile(r"[^\W\d_]+")
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|https?://\S+", re.S)
# Words that English cannot do without, but for those that are frequent in another language (in, an, was, he).
_FUNCTION = frozenset(
    """the of and to is that for it with as are this be by from at or which what how has have had not were can
    these their its been will would when who where why they you your if than but into such used between
    does following each other only should during about also there""".split()  # noqa: SIM905
)


def prose(text: str) -> str:
    """``text`` without code between backticks, formulas and addresses."""
    return _CODE.sub(" ", text)


def detect(text: str) -> tuple[str, float]:
    """ISO 639-1 code and confidence in [0, 1]; ``("und", 0.0)`` of a text without words.

    py3langid (Lui and Baldwin, "langid.py: An Off-the-shelf Language Identification Tool", 2012), unless a
    fifth of the words are English function words. Only :func:`prose` is looked at, and not what comes after
    2000 characters. On short texts, names and code it is often wrong: see :func:`is_other`.
    """
    return next(iter(_likelihoods(text).items()), ("und", 0.0))


def is_other(text: str, language: str) -> str | None:
    """The code of another language that ``text`` is surely in; None if it may be in ``language``.

    Fewer than :data:`ENOUGH_LETTERS` letters are never sure, nor is Latin: names of species look like it.
    Raises :class:`~qwen_ray.errors.UserError` for a language that the classifier does not know.
    """
    if len(text) < ENOUGH_LETTERS or sum(map(str.isalpha, prose(text[:_LOOKED_AT]))) < ENOUGH_LETTERS:
        return None
    likelihoods = _likelihoods(text)
    code, most = next(iter(likelihoods.items()), ("und", 0.0))
    if code in (language, "und", "la"):
        return None
    if language not in likelihoods and language not in _identifier().labels:
        raise UserError(f"unknown language '{language}'", fix="an ISO 639-1 code: en, de, zh")
    return code if likelihoods.get(language, 0.0) < ODDS * most else None


def _likelihoods(text: str) -> dict[str, float]:
    """Languages and their probabilities, likeliest first."""
    text = prose(text[:_LOOKED_AT])
    words = text.lower().split()
    if words and sum(map(_FUNCTION.__contains__, words)) >= _PLAIN_ENGLISH * len(words):
        return {"en": 1.0}
    words = _WORD.findall(text)
    return dict(_identifier().rank(" ".join(words))) if words else {}


@lru_cache(maxsize=1)
def _identifier() -> Any:
    # The module's own functions give unnormalised scores.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

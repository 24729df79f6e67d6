"""Questions and answers made of text that asks none: definitions, sentences with a year or a term.

Everything is chosen by SHA-256 of what is asked, so the same text always gives the same questions, whatever
else is read and in whatever order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from qwen_ray.data.lots import digest, integer
from qwen_ray.data.passages import independent_sentences, proper_nouns
from qwen_ray.data.terms import Term, inflected, occurrences, written

__all__ = [
    "BLANK",
    "LETTERS",
    "Term",
    "as_sentence",
    "choose",
    "cloze_questions",
    "lay_out",
    "masked_definition",
    "multiple_choice",
    "pick_distractors",
    "term_questions",
    "year_questions",
]

LETTERS = "ABCDEFGH"
BLANK = "____"

_DEFINE = (
    "What does the {kind} “{name}” mean?",
    "What is meant by the {kind} “{name}”?",
    "Define the {kind} “{name}”.",
    "Explain the {kind} “{name}” in brief.",
)
_DESCRIBE = (
    "What is the {kind} “{name}”?",
    "Describe the {kind} “{name}”.",
    "Explain the {kind} “{name}” in brief.",
    "What is meant by the {kind} “{name}”?",
)
_NAME = (
    "Which {kind} is described here? {definition}",
    "Name the {kind} that this describes: {definition}",
    "Which {kind} fits this description? {definition}",
    "What is the name of the {kind} described as follows? {definition}",
)
_CHOICES = 4
_LEAST_WORDS = 3  # of a description with its name blanked out, for there to be something to go by


def choose(options: Sequence[str], key: str) -> str:
    """One of ``options``, by SHA-256 of ``key``."""
    return options[integer(key) % len(options)]


def term_questions(term: Term, *, kind: str, seed_text: str) -> list[tuple[str, str]]:
    """What ``term`` is, and which ``kind`` of thing ("term", "weakness") its definition describes.

    The second has the name blanked out of the definition, and is left out where too little remains. The
    phrasing goes by SHA-256 of ``seed_text``; the definition stays as it is but for first letter and stop.
    """
    ask = choose(_DEFINE if kind == "term" else _DESCRIBE, f"{seed_text}/define")
    definition = as_sentence(term.definition)
    pairs = [(ask.format(kind=kind, name=term.name), definition)]
    if masked := masked_definition(term):
        name = choose(_NAME, f"{seed_text}/name")
        pairs.append((name.format(kind=kind, definition=masked), term.name))
    return pairs


def masked_definition(term: Term) -> str:
    """The definition as a sentence with the name, in any number, as ``____``; empty if little is left."""
    masked = re.sub(rf"(?<!\w){inflected(term.name)}(?!\w)", BLANK, term.definition, flags=re.I)
    words = [word for word in re.findall(r"\w+", masked) if word.strip("_")]
    return as_sentence(masked) if len(words) >= _LEAST_WORDS else ""


def as_sentence(text: str) -> str:
    """Start with a capital and end with a stop, except where the first word has a fixed spelling (mRNA)."""
    if re.match(r"(?:a|[a-z]{2,})(?=[\s,;:-])", text):
        text = text[0].upper() + text[1:]
    return text if not text or text.rstrip('”")')[-1:] in (".", "?", "!") else f"{text}."


def lay_out(question: str, choices: Sequence[str]) -> str:
    """The one layout of multiple choice: the question, then a line ``A. choice`` each; one is the answer."""
    return "\n".join([question, *(f"{LETTERS[i]}. {choice}" for i, choice in enumerate(choices))])


def multiple_choice(
    question: str, answer: str, distractors: Sequence[str], *, key: str
) -> tuple[str, str] | None:
    """``question`` with four choices, ordered by SHA-256 of ``key`` and choice; the answer is ``B. text``.

    The first three usable ``distractors`` are taken: not empty, no two alike. ``None`` if there are fewer.
    """
    answer = _one_line(answer)
    choices = {answer.casefold(): answer}
    for distractor in map(_one_line, distractors):
        if distractor and len(choices) < _CHOICES:
            choices.setdefault(distractor.casefold(), distractor)
    if len(choices) < _CHOICES or not answer:
        return None
    ordered = sorted(choices.values(), key=lambda choice: digest(f"{key}/order\0{choice}"))
    return lay_out(question, ordered), f"{LETTERS[ordered.index(answer)]}. {answer}"


def pick_distractors(answer: str, pool: Sequence[str], *, key: str, count: int = 3) -> list[str]:
    """At most ``count`` of ``pool`` that could be taken for ``answer``, drawn by SHA-256 of ``key``.

    ``pool`` starts with what is nearest to the answer's topic: the draw favours its front, and what is about
    as long as the answer. None equals, contains or is contained in the answer or another, whatever the case.
    """
    said = _plain(answer)

    def rank(place: int, text: str) -> float:
        longer, shorter = max(len(text), len(said)), min(len(text), len(said))
        luck = (integer(f"{key}/pick\0{text}") + 1) / 2**64
        return (place + 8) ** 1.5 * (longer / (shorter + 1)) * luck

    candidates = dict.fromkeys(_one_line(text) for text in pool)
    ranked = sorted((rank(i, text), text) for i, text in enumerate(candidates) if text)
    picked: list[str] = []
    taken = [said]
    for _, text in ranked:
        if len(picked) == count:
            break
        plain = _plain(text)
        if plain and not any(plain in other or other in plain for other in taken):
            picked.append(text)
            taken.append(plain)
    return picked


def _plain(text: str) -> str:
    return " ".join(re.findall(r"[\w+−-]+", text.casefold()))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- sentences -------------------------------------------------------------------------------------

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_YEAR = re.compile(
    r"(?:\b[Ii]n (?:early |late |mid-)?|\b[Tt]he |"
    rf"\b(?:[Ii]n|[Oo]n|since|until|of|by) (?:early |late |mid-)?{_MONTH} (?:\d{{1,2}}, )?|"
    r"\b(?:spring|summer|fall|autumn|winter|election|crash|year) of |(?<=[A-Z]\w)\w* of )"
    r"(?P<year>1\d{3}|20[01]\d|2020)(?=[,.;:)]| (?!BCE?\b|[a-z]+s\b))"
)
_ANY_YEAR = re.compile(r"(?<![\d,.$£])\d{3,4}(?![\d,]\d)|\bBCE?\b|\bcentur(?:y|ies)\b")
_FILL_YEAR = (
    "Fill in the missing year: {sentence}",
    "Which year is missing here? {sentence}",
    "Complete the sentence with the right year: {sentence}",
    "What year belongs in the blank? {sentence}",
)
_FILL_TERM = (
    "Which of these completes the sentence? {sentence}",
    "Fill in the blank: {sentence}",
    "What belongs in the blank? {sentence}",
    "Choose what is missing: {sentence}",
)
_LATEST = 2020
_NEAREST, _FARTHEST = 5, 60  # years between the right answer and a wrong one


def year_questions(passage: str, *, key: str) -> list[tuple[str, str]]:
    """For each sentence of ``passage`` that reads alone, names something and has one year, 1000 to 2020.

    The year is blanked out. By SHA-256 of ``key`` and the sentence, half of the questions ask for it openly,
    half with three other years, 5 to 60 years off. No sentence is asked about twice.
    """
    found = []
    for sentence in independent_sentences(passage):
        years = list(_YEAR.finditer(sentence))
        if len(years) != 1 or len(_ANY_YEAR.findall(sentence)) != 1:
            continue
        start, end = years[0].span("year")
        blanked, year = f"{sentence[:start]}{BLANK}{sentence[end:]}", years[0]["year"]
        if not proper_nouns(re.sub(_MONTH, "", blanked)):
            continue
        seed = f"{key}/{sentence}"
        question = choose(_FILL_YEAR, seed).format(sentence=blanked)
        asked = None
        if integer(f"{seed}/open") % 2:
            asked = multiple_choice(question, year, _other_years(int(year), seed), key=seed)
        found.append(asked or (question, year))
    return found


def _other_years(year: int, key: str) -> list[str]:
    """Three years near ``year``, so that the right one is as often the first of the four as any other."""
    above = min(integer(f"{key}/above") % _CHOICES, (_LATEST - year) // _NEAREST)
    others = []
    for side, count in ((1, above), (-1, _CHOICES - 1 - above)):
        room = _LATEST - year if side > 0 else _FARTHEST
        # Each from a stretch of its own, so that no two are alike.
        stretch = min((room - _NEAREST + 1) // max(count, 1), (_FARTHEST - _NEAREST) // (_CHOICES - 1))
        for i in range(count):
            off = _NEAREST + i * stretch + integer(f"{key}/{side}/{i}") % stretch
            others.append(str(year + side * off))
    return others


def cloze_questions(passage: str, terms: Sequence[Term], *, key: str) -> list[tuple[str, str]]:
    """For each sentence of ``passage`` that reads alone and has one of ``terms`` in it: that one blanked out.

    Four choices: the others are ``terms`` used and written as the term is, of the same topic before any else,
    and none that the sentence holds too. The blank stands where a noun does that describes no other one (not:
    "____ shops"). Of several such terms, SHA-256 of ``key`` and the sentence chooses.
    """
    found = []
    for sentence in independent_sentences(passage):
        spans = occurrences(sentence, tuple(terms))
        seed, said = f"{key}/{sentence}", Counter(term.name for *_, term in spans)
        for start, end, term in sorted(spans, key=lambda span: digest(f"{seed}/{span[0]}")):
            before, name, after = sentence[:start], sentence[start:end], sentence[end:]
            if name.casefold() != term.name.casefold() or said[term.name] > 1:
                continue
            if not _is_whole(before, name, after):
                continue
            blanked = re.sub(rf"\b([Aa])n? {BLANK}", rf"\1(n) {BLANK}", f"{before}{BLANK}{after}")
            question = choose(_FILL_TERM, seed).format(sentence=blanked)
            pool = [t.name for t in _alike(term, terms, seed) if t.name not in said]
            if asked := multiple_choice(
                question, term.name, pick_distractors(term.name, pool, key=seed), key=seed
            ):
                found.append(asked)
                break
    return found


def _alike(term: Term, terms: Sequence[Term], key: str) -> list[Term]:
    """Those used and written as ``term`` is, the same topic first, else shuffled by ``key``."""
    form = written(term.name)
    alike = [t for t in terms if t.usage == term.usage and written(t.name) == form]
    return sorted(alike, key=lambda t: (t.topic != term.topic, digest(f"{key}/{t.name}")))


_NOUN_ENDS = re.compile(
    r"(?:[,.;:)?—]|\s(?:is|are|was|were|has|had|have|can|may|will|would|could|should|must|did|does|"
    r"do|and|or|but|in|on|of|to|from|by|with|as|that|which|who|whose|for|at|during|through|into|over|under|"
    r"between|among|after|before|until|when|where|while|because|if|than|within|without|across|against|"
    r"refers?|means?|includes?|contains?|consists?|occurs?|produces?|allows?|acts?|plays?|helps?|provides?|"
    r"binds?|forms?|causes?|became|began|led|made|took|found|held|gave|won|met|sent|wrote|left|saw|"
    r"brought|fought|built|came|went|grew|fell|rose|\w+ed|\w+ly)\b)"
)


def _is_whole(before: str, name: str, after: str) -> bool:
    """Whether the name is not a part of a longer one, and none of it is said elsewhere in the sentence."""
    if not _NOUN_ENDS.match(after) or before.endswith(("-", "–", "‘")):
        return False
    if name[0].islower() or not before:
        return True
    part = re.search(r"\b[A-Z][\w’.]*(?: of| the| and)* $", before)
    # "In", at the start of the sentence, is no part of a name.
    again = {word for word in re.findall(r"\w+", name) if len(word) > 3} & set(
        re.findall(r"\w+", before + after)
    )
    return not again and (part is None or not proper_nouns(part[0]))

"""Sentences of a passage, and whether one can be read alone, without what came before it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

SHORTEST, LONGEST = 60, 260  # characters of a sentence that is asked about

_END = re.compile(r"[.!?][”’\")]*\s+(?=[“\"(]?[A-Z0-9])")
# What stands before a stop that ends no sentence: a title, an abbreviation, an initial.
_NO_END = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|Gen|Col|Capt|Lt|Sgt|Gov|Sen|Rep|Rev|Hon|Prof|Mt|Ft|No|Nos|vs|etc|ca|"
    r"cf|al|Inc|Co|Corp|Fig|Figs|approx|spp?|subsp|var|e\.g|i\.e|a\.m|p\.m)|(?<!\w)[A-HJ-Za-z])\.$"
)
_MARKUP = re.compile(r"[\[\]{}<>|*\\#=_~^]|https?:|www\.")
_SECOND_HAND = re.compile(
    r"\b(?:this|these|here|also|too|however|therefore|thus|instead|likewise|similar(?:ly)?|latter|former|"
    r"for (?:example|instance)|as (?:we|well|you)|the (?:same|two|three|four|five|above|following|previous)|"
    r"those(?! (?:who|that|of|in|with|from|without|under|living|born|found))|such(?! as\b)|"
    r"(?:figures?|tables?|chapters?|sections?|diagrams?|textbooks?|maps?|images?|photographs?)(?! of)|"
    r"(?:shown|seen|described|discussed|mentioned|noted|explained|illustrated) (?:earlier|previously|in)|"
    r"above|below|aforementioned|respectively)\b",
    re.I,
)
_TIE = re.compile(
    r"(?:However|Accordingly|Additionally|In addition|Moreover|Furthermore|Thus|Therefore|Meanwhile|Hence|"
    r"As a result|Nevertheless|Nonetheless|Consequently|For example|For instance|In fact|Indeed|Finally|"
    r"Eventually|Similarly|Likewise|In contrast|By contrast|Instead|Specifically|In particular|In general|"
    r"Of course|Unfortunately|Interestingly|Typically|Generally|Today), (?=\w)"
)
_INNER_TIE = re.compile(r", (?:however|for example|for instance|therefore|in turn|of course|moreover|thus),")
_SPEAKER = re.compile(
    r"(?:(?<!\w )|\b[a-z]+ )\bI\b(?!\.)|\b(?:[Ww]e|[Yy]ou|[Oo]ur|[Yy]our|[Mm]y|[Uu]s|[Ll]et)\b(?!\.)"
)
# First words that lean on what was said before, or make no statement.
_OPENERS = frozenset(
    re.findall(
        r"\w+",
        """
        he she it they his her their its him them who which that what why how and but or so yet nor then
        thus therefore hence however moreover furthermore additionally also nevertheless nonetheless
        meanwhile instead similarly likewise consequently accordingly otherwise still indeed finally lastly
        next first second third secondly thirdly fourth both another others other each either neither such
        there afterward afterwards later subsequently eventually soon again rather conversely specifically
        unfortunately fortunately perhaps not even one two three four thereafter regardless typically
        interestingly importantly recall imagine consider note notice remember think suppose because only
        ultimately overall together alternatively initially originally simultaneously surprisingly
        presumably apparently certainly clearly obviously ironically much several few today now except
        just like unlike besides elsewhere none all immediately neighboring exacerbating
        """,
    )
)
_OPENING = re.compile(
    r"(?:for (?:example|instance|this|that|these)|in (?:addition|contrast|fact|other|turn|particular|general|"
    r"that|each|both|either|reality|short|response|part|all|some|one|two|many cases|return|essence|summary|"
    r"conclusion|the (?:end|meantime|process|aftermath|case|latter|former|first|second|same))|"
    r"as (?:a result|such|mentioned|noted|discussed|described|with|in|part|well|previously|for|an? \w+,)|"
    r"on the (?:other|one|contrary)|by (?:contrast|comparison|then|that)|at (?:the same|first|that|least|"
    r"last|one)|after that|of (?:the|course|all)|the (?:(?:first|second|third|next|last)(?:,| of| was| were)|"
    r"two|three|four|other|others|result|results|rest|more|answer|remaining|idea|reason|term|new|entire|"
    r"resulting|document|act|plan|law|event|events|war|attack|battle|group|company|strike|movement|treaty|agreement|"
    r"city|country|king|emperor|president|book|work|island|colony|town|church|court|state|region|"
    r"decision|bill|measure|policy|proposal|program|uprising|revolt|rebellion|project|film|crisis|"
    r"situation|effects?|conflict|fighting|siege|campaign|man|woman|men|women|author|speech)\b|"
    r"(?:most|many|some|several|few|much|all|none|part|half) of (?:the|them|it|their|his)|"
    r"to (?:do|this|that)|with (?:that|the)|despite|another|no one|among (?:them|the)|when (?:the|he|she|it)|"
    r"once|though|although (?:the|he|she|it|they)|while (?:the|he|she|it|they)|until)\b",
    re.I,
)
_PERSON = re.compile(r"\b(?:he|she|him|his|her|hers|himself|herself)\b", re.I)
_THING = re.compile(r"\b(?:it|its|they|them|their|theirs|itself|themselves)\b", re.I)
_LEADING = re.compile(  # "In 1915, it passed": the pronoun comes before what it may stand for
    r"(?!(?:When|As|After|Before|While|Although|If|Because|Since|Though|Once|Until)\b)"
    r"[^,]*, (?:he|she|it|they|his|her|its|their|him|them)\b"
)
_WORD = re.compile(r"[^\W\d_][\w’'-]*")
# Words that name nothing, though they may have a capital.
_SMALL = frozenset(
    re.findall(
        r"\w+",
        """
        a an the in on at by for from of to with without during after before since until as when while
        where although though if because and or but not about around between among under over into early
        late mid january february march april may june july august september october november december
        spring summer fall autumn winter once despite even only more most many some both unlike like
        according
        """,
    )
)


def sentences(passage: str) -> Iterator[str]:
    """Split at each stop that ends a sentence, not one of a title, an initial, an abbreviation (U.S.)."""
    start = 0
    for match in _END.finditer(passage):
        if not _NO_END.search(passage, start, match.start() + 1):
            yield passage[start : match.end()].strip()
            start = match.end()
    if rest := passage[start:].strip():
        yield rest


@lru_cache(maxsize=1024)
def independent_sentences(passage: str) -> tuple[str, ...]:
    """The sentences of a passage that :func:`stands_alone` passes, without what ties them to others."""
    return tuple(filter(stands_alone, map(_untied, sentences(passage))))


def _untied(sentence: str) -> str:
    """Without "However," or "In addition," at the start and ", for example," within."""
    if leading := _TIE.match(sentence):
        sentence = sentence[leading.end()].upper() + sentence[leading.end() + 1 :]
    return _INNER_TIE.sub("", sentence)


def stands_alone(sentence: str) -> bool:
    """Whether a sentence can be asked about without its neighbours.

    It has 60 to 260 characters and ends in a stop; it points at no figure and at nothing said before, is no
    speech to the reader, and holds a noun before its first pronoun (a name, before "he" or "she"). These
    are rules of thumb: "the act" that is named only in the sentence before is not always seen.
    """
    first = _WORD.match(sentence)
    return (
        SHORTEST <= len(sentence) <= LONGEST
        and first is not None
        and first[0][0].isupper()
        and sentence.endswith((".", ".”", ".)"))
        and first[0].casefold() not in _OPENERS
        and not _OPENING.match(sentence)
        and not _MARKUP.search(sentence)
        and not _SECOND_HAND.search(sentence)
        and not _SPEAKER.search(sentence)
        and _balanced(sentence)
        and _antecedent(sentence)
    )


def proper_nouns(text: str) -> list[str]:
    """Capitalised words, but for a first one that is capitalised for its place alone (In, When)."""
    return [w[0] for w in _WORD.finditer(text) if w[0][0].isupper() and w[0].casefold() not in _SMALL]


def _balanced(sentence: str) -> bool:
    pairs = (("(", ")"), ("“", "”"))
    return all(sentence.count(a) == sentence.count(b) for a, b in pairs) and sentence.count('"') % 2 == 0


def _antecedent(sentence: str) -> bool:
    """Whether each pronoun has something before it that it may stand for."""
    person, thing = _PERSON.search(sentence), _THING.search(sentence)
    if person and not proper_nouns(sentence[: person.start()]):
        return False
    if _LEADING.match(sentence):
        return False
    return not thing or any(
        word.casefold() not in _SMALL for word in _WORD.findall(sentence[: thing.start()])
    )

"""Write-ups of Google CTF challenges: what the flaw was and how it was used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.questions import choose
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.data.sources.entries import SHORTEST_ANSWER, Entry, slug, whole_sentences
from qwen_ray.data.sources.markdown import Section, plain_text, prose_words, sections

NAME, LICENCE = "ctf_writeups", "Apache-2.0"
NO_CHALLENGE, APPARATUS = "not in the folder of a challenge", "no part of the solution"
SHORT = "the section has too little text of its own"
PICTURES = "the section explains by pictures"
_PICTURES = 2  # from which on the text does not stand without them
_PICTURE = re.compile(r"!\[[^\]]*\]\(|<img\b", re.I)
_WORDS = 25  # of prose that an answer has: code alone does not explain
_CHALLENGE = re.compile(
    r"(?:^|[/:])(?P<year>20\d\d)/(?P<round>[\w-]+)/(?P<category>[a-z]+)-(?P<name>[\w-]+)/"
)
_APPARATUS = re.compile(
    r"licen[cs]e|credits?|testing|running the solver|solver$|the flag|flag|opsec|https cert|obsolete|name:|"
    r"closing|conclusion|appendix|full code|problems encountered",
    re.I,
)
_SETTING = re.compile(r"(?:challenge|introduction|background|overview|objective|purpose|scoreboard)\b", re.I)
_SOLUTION = re.compile(
    r"(?:(?:intended |expected )?solution|exploit(?:ation)?|write-?up|tl;?dr|the attack|expected)\b", re.I
)
_CATEGORIES = {
    "crypto": "cryptography",
    "pwn": "binary exploitation",
    "rev": "reverse engineering",
    "web": "web",
    "misc": "miscellaneous",
    "sandbox": "sandbox",
    "hardware": "hardware",
}
_SOLVED = (
    "How was the {challenge} solved?",
    "What was the flaw in the {challenge}, and how was it used?",
    "Describe the solution of the {challenge}.",
)
_ABOUT = ("What was the {challenge} about?", "Describe the {challenge}.")
_STEP = (
    "In the solution of the {challenge}, what does “{heading}” cover?",
    "Explain the part “{heading}” of the solution of the {challenge}.",
)


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    seen: set[str] = set()
    for where, text in text_files(path, ".md", drops=drops, fix=SOURCE.where_to_get):
        match = _CHALLENGE.search(where)
        if match is None:
            drops.add(NO_CHALLENGE, text, where=where)
            continue
        category = _CATEGORIES.get(match["category"], match["category"])
        challenge = f"Google CTF {match['year']} {category} challenge “{match['name']}”"
        for section in sections(text):
            here = f"{where}:{section.line}"
            answer = whole_sentences(plain_text(section.text))
            if not section.text:
                continue
            if _APPARATUS.match(section.heading):
                drops.add(APPARATUS, section.heading, where=here)
            elif len(_PICTURE.findall(section.text)) >= _PICTURES:
                drops.add(PICTURES, section.heading, where=here)
            elif len(answer) < SHORTEST_ANSWER or prose_words(answer) < _WORDS:
                drops.add(SHORT, f"{section.heading}: {answer}", where=here)
            else:
                question = _question(challenge, section)
                if question in seen:  # a second write-up, or a part that says what the first does
                    continue
                seen.add(question)
                key = f"{match['year']}-{match['category']}-{match['name']}"
                entry = Entry(
                    f"{NAME}/{match['category']}/{slug(key)}.{slug(where.rsplit('/', 2)[-2])}.{section.line}",
                    here,
                    domain,
                    LICENCE,
                )
                yield from entry.records([(question, answer)])


def _question(challenge: str, section: Section) -> str:
    key = f"{challenge}/{section.heading}"
    if _SETTING.match(section.heading):
        return choose(_ABOUT, challenge).format(challenge=challenge)
    # The text under the title of a write-up, or under none, is its solution in short.
    if not section.above or _SOLUTION.match(section.heading):
        return choose(_SOLVED, challenge).format(challenge=challenge)
    return choose(_STEP, key).format(challenge=challenge, heading=section.heading)


SOURCE = Source(
    name=NAME,
    title="Google CTF: write-ups of solutions",
    licence=LICENCE,
    domain_hint="security",
    where_to_get=(
        "GitHub repository google/google-ctf, commit bacd8cc4623f59b8bec27e7646f306282874e46e: "
        "the Markdown files of the years' folders, or an archive of them"
    ),
    reader=_read,
    size="about 110 questions about Google CTF challenges",
)

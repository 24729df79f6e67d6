"""Documents cut into passages that a search finds one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from qwen_ray.data.passages import sentences

LONGEST = 1000
"""Characters of a passage: about 200 tokens of English, within the 256 that the default embedder reads."""


@dataclass(frozen=True)
class Document:
    """``key`` stays the same when the text changes: ``source/page`` or ``source/file/section``."""

    key: str
    title: str
    text: str
    source: str
    license: str


@dataclass(frozen=True)
class Chunk:
    """One passage. ``id``: the document's key and a digest of all the rest, so a changed one has another."""

    id: str
    text: str
    title: str
    source: str
    license: str

    @property
    def searched(self) -> str:
        """What is embedded and what words are looked for in: a passage is about its title too."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def chunks(documents: Iterable[Document]) -> Iterator[Chunk]:
    """The passages of all documents, in order; of passages with the same text the first."""
    seen: set[bytes] = set()
    for document in documents:
        for text in cut(document.text):
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                seen.add(digest)
                yield _chunk(document, text)


def _chunk(document: Document, text: str) -> Chunk:
    facts = "\0".join((document.title, document.source, document.license, text))
    digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
    return Chunk(f"{document.key}#{digest}", text, document.title, document.source, document.license)


def cut(text: str, longest: int = LONGEST) -> Iterator[str]:
    """Passages of at most ``longest`` characters: whole paragraphs, else whole sentences, else words."""
    yield from _packed(
        (piece for paragraph in text.split("\n\n") for piece in _pieces(paragraph.strip(), longest)),
        "\n\n",
        longest,
    )


def _pieces(paragraph: str, longest: int) -> Iterator[str]:
    """The paragraph, or what it must be cut into."""
    if len(paragraph) <= longest:
        yield from filter(None, [paragraph])
        return
    short = (
        piece
        for sentence in sentences(paragraph)
        for piece in (
            [sentence] if len(sentence) <= longest else _packed(_words(sentence, longest), " ", longest)
        )
    )
    yield from _packed(short, " ", longest)


def _words(sentence: str, longest: int) -> Iterator[str]:
    for word in sentence.split():
        yield from (word[start : start + longest] for start in range(0, len(word), longest))


def _packed(pieces: Iterable[str], between: str, longest: int) -> Iterator[str]:
    """As many pieces together as ``longest`` characters hold."""
    held = ""
    for piece in pieces:
        if held and len(held) + len(between) + len(piece) > longest:
            yield held
            held = ""
        held = f"{held}{between}{piece}" if held else piece
    if held:
        yield held

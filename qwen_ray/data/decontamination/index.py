"""Search of training data for benchmark items: exact, by shared 13-grams, and by likeness of the question.

What a benchmark asks must not be what a model was trained on. Overlap of words is looked for as for GPT-3
(arXiv 2005.14165, appendix C: n-grams of 8 to 13 words without case and punctuation); a rephrased item passes
that (arXiv 2311.04850), hence the search by likeness.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from qwen_ray.data.decontamination.benchmarks import Item
from qwen_ray.data.decontamination.embedders import Embedder, LexicalEmbedder, NeuralEmbedder
from qwen_ray.data.decontamination.likeness import Asked, Likeness, questions_in
from qwen_ray.data.decontamination.ngrams import SHORTEST, Ngrams
from qwen_ray.data.decontamination.wording import content, key, words
from qwen_ray.data.quality.turns import choices
from qwen_ray.data.records import Record

Part = Literal["question", "passage", "answer"]

NEAR = 0.62
"""Likeness from which a question counts as a copy of a benchmark's, for the embedded vectors."""
REASON: dict[Part, str] = {
    "question": "asks a benchmark's question",
    "passage": "quotes a benchmark's passage",
    "answer": "gives a benchmark's answer",
}
"""Why a record is left out, by the part of the item that it holds."""

_LONGEST_SHOWN = 40  # words
_PREFIX = re.compile(r"^\s*(?:question|problem|q)\s*\d*\s*[:.]\s*", re.I)
_SENTENCE = re.compile(r"(?<=[.?!])\s+|\n+")


@dataclass(frozen=True, slots=True)
class Hit:
    """A benchmark item found in a text."""

    benchmark: str
    item: str
    part: Part
    kind: str
    """``exact``, ``13-gram`` (of the length the index was built with) or ``near``."""
    score: float
    """Share of the part's words that are shared; for ``near`` the likeness."""
    text: str
    """The words shared; for ``near`` the item's question."""


class _Side(NamedTuple):
    """What a user's turn asks, without the choices, and the answer: the choice that it names, or itself."""

    question: str
    answer: str


_Found = dict[tuple[int, Part], Hit]


@dataclass(frozen=True, eq=False)
class Index:
    """What of the benchmarks is searched for. It pickles, and never changes."""

    names: list[tuple[str, str]]
    questions: list[str]
    ngrams: Ngrams
    segments: list[tuple[int, Part]]
    """Item and part of each segment of ``ngrams``."""
    short: dict[str, list[tuple[int, str]]]
    """Items found only whole, by the key of the question; each with the answer's key where it needs that."""
    likeness: Likeness | None
    compared: list[int]
    """The item of each entry of ``likeness``."""

    @staticmethod
    def build(
        items: Sequence[Item],
        *,
        n: int = 13,
        near: float | None = NEAR,
        embedder: Embedder | str | None = None,
    ) -> Index:
        """Index ``items`` for n-grams of ``n`` words and for likeness of at least ``near`` (None: without).

        ``embedder`` is the name or folder of a sentence-transformers model, used instead of the embedded
        vectors. Its cosines are of another size: choose ``near`` for it.
        """
        segments, said = list[tuple[int, Part]](), list[list[str]]()
        short: dict[str, list[tuple[int, str]]] = {}
        compared = []
        for number, item in enumerate(items):
            asked, says_something = words(item.question), bool(content(item.question))
            if item.generated or len(asked) < SHORTEST or not says_something:
                # "Which of these is true?" is the item only with its answer.
                wanted = "" if says_something else key(item.answer)
                short.setdefault(key(item.question), []).append((number, wanted))
            if item.generated:
                continue
            if says_something:
                compared.append(number)
            parts: list[tuple[Part, list[str], int]] = [
                ("question", asked if says_something else [], min(n, SHORTEST)),
                ("passage", words(item.passage), min(n, SHORTEST)),
                ("answer", words(item.answer), n),
            ]
            for part, text, least in parts:
                if len(text) >= least:
                    segments.append((number, part))
                    said.append(text)
        return Index(
            names=[(item.benchmark, item.id) for item in items],
            questions=[item.question for item in items],
            ngrams=Ngrams.build(said, n),
            segments=segments,
            short=short,
            likeness=_likeness([items[i] for i in compared], near, embedder),
            compared=compared,
        )

    def save(self, path: Path) -> None:
        """Write the index, for :meth:`load` in another process."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(self, protocol=5))

    @staticmethod
    def load(path: Path) -> Index:
        """Read what :meth:`save` wrote. It is a pickle: load none from elsewhere."""
        index: Index = pickle.loads(path.read_bytes())
        return index

    def hits(self, record: Record) -> list[Hit]:
        """Every item found in ``record``, in the order of the benchmarks: one hit for each part of it."""
        return self.hits_batch([record])[0]

    def hits_batch(self, records: Sequence[Record]) -> list[list[Hit]]:
        """The same for many records at once: several times as fast for a few hundred."""
        found: list[_Found] = [{} for _ in records]
        owner = [i for i, record in enumerate(records) for _ in record.messages]
        texts = [message.content for record in records for message in record.messages]
        for text, item, hit in self._shared(texts):
            _keep(found[owner[text]], item, hit)
        sides = [(i, side) for i, record in enumerate(records) for side in _sides(record)]
        for i, side in sides:
            for item, hit in self._whole(side):
                _keep(found[i], item, hit)
        for i, item, hit in self._like(sides):
            found[i].setdefault((item, "question"), hit)
        return [[hits[place] for place in sorted(hits)] for hits in found]

    def text_hits(self, text: str) -> list[Hit]:
        """Items that share an n-gram with any text, such as a book; it is taken as it is, markup and all."""
        found: _Found = {}
        for _, item, hit in self._shared([text]):
            _keep(found, item, hit)
        return [found[place] for place in sorted(found)]

    def _shared(self, texts: Sequence[str]) -> Iterator[tuple[int, int, Hit]]:
        """``(text, item, hit)`` for each run of shared words."""
        said = [words(text) for text in texts]
        for run in self.ngrams.runs(said):
            item, part = self.segments[run.segment]
            kind = "exact" if run.share == 1 else f"{self.ngrams.n}-gram"
            shown = said[run.text][run.first : run.first + min(run.length, _LONGEST_SHOWN)]
            yield run.text, item, Hit(*self.names[item], part, kind, round(run.share, 4), " ".join(shown))

    def _whole(self, side: _Side) -> Iterator[tuple[int, Hit]]:
        """Short and generated items that are the question, or a line or sentence of it."""
        lines = side.question.split("\n")
        bare = [_PREFIX.sub("", line) for line in lines]
        asked = dict.fromkeys([side.question, *lines, *bare, *_SENTENCE.split(side.question)])
        for said in dict.fromkeys(key(text) for text in asked):
            for item, answer in self.short.get(said, ()):
                if not answer or answer == key(side.answer):
                    yield item, Hit(*self.names[item], "question", "exact", 1.0, said)

    def _like(self, sides: Sequence[tuple[int, _Side]]) -> Iterator[tuple[int, int, Hit]]:
        """``(record, item, hit)`` of questions that are like an item's, the likest first."""
        if self.likeness is None:
            return
        asked = [(i, Asked(text, side.answer)) for i, side in sides for text in questions_in(side.question)]
        for like in self.likeness.search([one for _, one in asked]):
            item = self.compared[like.entry]
            hit = Hit(*self.names[item], "question", "near", round(like.score, 4), self.questions[item])
            yield asked[like.asked][0], item, hit


def report(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The account of all hits; a row is a :class:`Hit` as a dictionary, with ``record`` (id) and ``where``.

    ``{"records", "items", "benchmarks": {name: {part: {kind: hits}}}, "hits": rows}``; every hit is named.
    """
    hits = [dict(row) for row in rows]
    counted = Counter((hit["benchmark"], hit["part"], hit["kind"]) for hit in hits)
    benchmarks: dict[str, dict[str, dict[str, int]]] = {}
    for (benchmark, part, kind), number in sorted(counted.items()):
        benchmarks.setdefault(benchmark, {}).setdefault(part, {})[kind] = number
    return {
        "records": len({(hit["record"], hit["where"]) for hit in hits}),
        "items": len({(hit["benchmark"], hit["item"]) for hit in hits}),
        "benchmarks": benchmarks,
        "hits": hits,
    }


def _likeness(items: Sequence[Item], near: float | None, embedder: Embedder | str | None) -> Likeness | None:
    if near is None or not items:
        return None
    if isinstance(embedder, str):
        embedder = NeuralEmbedder(embedder)
    elif embedder is None:
        embedder = LexicalEmbedder([item.question for item in items])
    # Only a right choice is compared; a worked solution is not.
    entries = [Asked(item.question, item.answer if item.choices else "") for item in items]
    return Likeness.build(entries, embedder, near)


def _sides(record: Record) -> Iterator[_Side]:
    for i, message in enumerate(record.messages):
        if message.role == "user":
            answer = next((m.content for m in record.messages[i + 1 :] if m.role == "assistant"), "")
            listed = choices(message.content)
            picked = listed.picked(answer) if listed else None
            yield _Side(
                listed.stem if listed else message.content,
                listed.texts[picked] if listed and picked is not None else answer,
            )


def _keep(found: _Found, item: int, hit: Hit) -> None:
    """The best hit of each part: exact before n-gram, then the longest."""
    old = found.get((item, hit.part))
    if old is None or (hit.kind == "exact", hit.score) > (old.kind == "exact", old.score):
        found[item, hit.part] = hit

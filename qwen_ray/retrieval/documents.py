"""What knowledge bases are made of: the sources of training data, folders of text, the embedded facts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qwen_ray.data.records import Record
from qwen_ray.data.sources import SOURCES, Drops, get_source
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.entries import slug
from qwen_ray.data.sources.kramdown import paragraphs
from qwen_ray.data.sources.markdown import plain_text, sections
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.retrieval.chunks import Document
from qwen_ray.tiny import facts

TEXT, EMBEDDED = "text", "embedded"
KINDS = (TEXT, EMBEDDED, *SOURCES)
"""``text``: .md and .txt files; ``embedded``: the facts of a domain of the embedded model; any source."""
CHOICES = "a multiple-choice question states nothing"
_BOOKS = tuple(name for name in SOURCES if name.startswith("openstax_"))
_SUFFIXES = (".md", ".txt")
_CHOICE = re.compile(r"^B[.)] ", re.M)
_PAGE = re.compile(r"(?:^|[/:])contents/([\w-]+)\.md$")
_TITLE = re.compile(r'^title: *"?(.*?)"? *$', re.M)


@dataclass(frozen=True)
class Origin:
    """Where documents are read: one of :data:`KINDS` and a path, or a domain for ``embedded``."""

    kind: str
    path: str
    license: str = "unknown"
    """Of ``text``; every other kind knows its own."""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


def read_documents(origins: Iterable[Origin], drops: Drops) -> Iterator[Document]:
    """The documents of all origins in order. :class:`UserError` for one that cannot be read as a whole."""
    for origin in origins:
        if origin.kind not in KINDS:
            raise UserError(
                f"unknown kind of source '{origin.kind}'",
                where="--source",
                fix=did_you_mean(origin.kind, KINDS),
            )
        if origin.kind == TEXT:
            yield from _text(Path(origin.path), origin.license, drops)
        elif origin.kind == EMBEDDED:
            yield from _embedded(origin.path)
        elif origin.kind in _BOOKS:
            yield from _book(origin.kind, Path(origin.path), drops)
        else:
            found = get_source(origin.kind).read(Path(origin.path), drops=drops)
            yield from (document for record in found for document in _record(record, drops))


def _text(path: Path, license: str, drops: Drops) -> Iterator[Document]:
    """Sections of Markdown or text files: of a folder, an archive or one file."""
    source = slug(path.name.split(".")[0])
    fix = "give a folder, an archive or a file with .md or .txt documents"
    suffixes = [suffix for suffix in _SUFFIXES if path.is_dir() and any(path.rglob(f"*{suffix}"))]
    for suffix in suffixes or [path.suffix if path.suffix in _SUFFIXES else ".md"]:
        for where, text in text_files(path, suffix, drops=drops, fix=fix):
            inside = where.removeprefix(str(path)).lstrip("/:") or path.name
            document = "/".join(slug(part) for part in Path(inside).with_suffix("").parts)
            for section in sections(text):
                names = [name for name in (*section.above, section.heading) if name]
                key = "/".join([source, document, *map(slug, names)])
                if said := plain_text(section.text):
                    yield Document(key, " > ".join(names), said, source, license)


def _record(record: Record, drops: Drops) -> Iterator[Document]:
    """A training record as a document: its last question and answer, unless it is one to choose from."""
    said = {message.role: message.content.strip() for message in record.messages}
    question, answer = said.get("user", ""), said["assistant"]
    if _CHOICE.search(question):
        drops.add(CHOICES, question, where=record.id)
    else:
        yield Document(record.id, "", f"{question}\n{answer}".strip(), record.source, record.license)


def _book(name: str, path: Path, drops: Drops) -> Iterator[Document]:
    """The running text of a textbook, a document a page; its exercises and glossary stay questions."""
    source = get_source(name)
    for where, page in text_files(path, ".md", drops=drops, fix=source.where_to_get):
        if match := _PAGE.search(where):
            title = _TITLE.search(page)
            text = "\n\n".join(paragraph.replace(" ~", "") for paragraph in paragraphs(page))
            yield Document(f"{name}/{match[1]}", title[1] if title else "", text, name, source.licence)


def _embedded(domain: str) -> Iterator[Document]:
    """What is taught of a domain: a document a fact, in the wordings of the training statements."""
    _check_domain(domain)
    for relation in facts.load_relations():
        if relation.domain != domain:
            continue
        for subject, answer in relation.taught:
            told = " ".join(
                f"{facts.fill(wording, subject)} {answer}." for wording in relation.statement_train
            )
            yield Document(_fact_key(relation, subject), "", told, facts.SOURCE, facts.LICENSE)


# --- questions with the documents that answer them ------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question and the keys of the documents, or the ids of the passages, that answer it."""

    text: str
    relevant: tuple[str, ...]

    def answered_by(self, passage: str) -> bool:
        """Whether the passage with this id is one of them."""
        return passage in self.relevant or passage.rpartition("#")[0] in self.relevant


def embedded_questions(domain: str) -> list[Question]:
    """Every taught fact of a domain asked in each wording that training never uses."""
    _check_domain(domain)
    return [
        Question(facts.fill(wording, subject), (_fact_key(relation, subject),))
        for relation in facts.load_relations()
        if relation.domain == domain
        for subject, _ in relation.taught
        for wording in relation.question_heldout
    ]


def book_questions(name: str, path: Path) -> list[Question]:
    """A textbook's exercises, and its glossary's definitions whose term is asked; the page answers them."""
    if name not in _BOOKS:
        raise UserError(f"'{name}' is not a textbook", where="--book", fix=did_you_mean(name, _BOOKS))
    found = []
    for record in get_source(name).read(path):
        source, _, page, item = record.id.split("/", 3)
        if item.startswith(("question-", "choice-", "name-")):
            stem = record.messages[0].content.split("\n")[0]  # without its choices
            found.append(Question(stem, (f"{source}/{page}",)))
    return found


def question_from(row: Any, where: str) -> Question:
    """One line of a questions file: ``{"question": "...", "relevant": ["key or id", ...]}``."""
    match row:
        case {"question": str(text), "relevant": [str(), *_] as relevant} if text.strip():
            return Question(text, tuple(map(str, relevant)))
    raise UserError(
        "not a question with its answering documents",
        where=where,
        fix='one JSON object a line: {"question": "...", "relevant": ["SOURCE/DOCUMENT", ...]}',
    )


def _fact_key(relation: facts.Relation, subject: str) -> str:
    return f"tiny-facts/{relation.domain}/{relation.name}/{facts.slug(subject)}"


def _check_domain(domain: str) -> None:
    if domain not in facts.DOMAINS:
        raise UserError(
            f"the embedded model has no domain '{domain}'",
            where="--embedded",
            fix=did_you_mean(domain, facts.DOMAINS),
        )

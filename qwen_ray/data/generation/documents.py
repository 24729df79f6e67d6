"""Documents cut into passages, for questions to be written about them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.generation.generate import Passage
from qwen_ray.data.sources import Drops
from qwen_ray.data.sources.archive import text_files
from qwen_ray.data.sources.entries import slug
from qwen_ray.data.sources.markdown import plain_text, sections

SHORTEST, LONGEST = 200, 4000
"""Characters of a passage. A longer section is cut between paragraphs."""
TOO_SHORT = "the passage is too short to ask about"
_SUFFIXES = (".md", ".txt")


def read_passages(path: Path, *, domain: str, license: str, drops: Drops) -> Iterator[Passage]:
    """Passages of the Markdown or text files of a folder, an archive or one file, in their order.

    Raises :class:`~qwen_ray.errors.UserError` where there is no such file.
    """
    source = slug(path.name.split(".")[0])
    suffix = path.suffix if path.suffix in _SUFFIXES else ".md"
    if path.is_dir() and not any(path.rglob("*.md")) and any(path.rglob("*.txt")):
        suffix = ".txt"
    fix = "give a folder, an archive or a file with .md or .txt documents"
    for where, text in text_files(path, suffix, drops=drops, fix=fix):
        document = slug(Path(where).stem)
        for section in sections(text):
            for number, passage in enumerate(_cut(plain_text(section.text)), start=1):
                place = f"{where}:{section.line}"
                if len(passage) < SHORTEST:
                    drops.add(TOO_SHORT, passage, where=place)
                    continue
                name = slug(section.heading or f"line-{section.line}")
                yield Passage(f"{source}/{document}/{name}-{number}", passage, domain, source, license, place)


def _cut(text: str) -> Iterator[str]:
    passage = ""
    for paragraph in filter(None, (p.strip() for p in text.split("\n\n"))):
        if passage and len(passage) + len(paragraph) > LONGEST:
            yield passage
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    if passage:
        yield passage

"""What the records are about: their places in the sources, an even draw over these, and what is thin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from statistics import median
from typing import Any, TypeVar

from qwen_ray.data.quality import turns
from qwen_ray.data.records import Record

T = TypeVar("T")
N = TypeVar("N", int, float)

THIN, THIN_SHARE = 5, 0.2
"""A topic is thin with fewer records than this, or than this share of the median topic."""
TOPIC_DEPTH = 2
"""Source and chapter."""
LONG_ANSWER = 200  # characters


def place(record: Record) -> tuple[str, ...]:
    """Source, then chapter and section where the id tells them (``source/chapter/section/item``)."""
    first, *inner = record.id.split("/")
    return (record.source, *(inner[:-1] if first == record.source else []))


def topic(record: Record) -> str:
    """Source and chapter: ``openstax_biology/ch05``."""
    return "/".join(place(record)[:TOPIC_DEPTH])


def spread(
    items: Sequence[T],
    *,
    place: Callable[[T], Sequence[str]],
    lot: Callable[[str], str],
    name: Callable[[T], str],
) -> list[T]:
    """Order items so that every beginning is spread evenly over sources, chapters and sections.

    Groups take turns; a group that runs out leaves its turns to the others. Groups stand in the order of
    ``lot`` of their names, items of a group in that of theirs: the order of ``items`` decides only between
    two of the same name.
    """
    return _spread(items, place, lot, name, 0)


def _spread(
    items: Sequence[T],
    place: Callable[[T], Sequence[str]],
    lot: Callable[[str], str],
    name: Callable[[T], str],
    depth: int,
) -> list[T]:
    groups: dict[str, list[T]] = {}
    for item in items:
        at = place(item)
        groups.setdefault(at[depth] if depth < len(at) else "", []).append(item)
    if set(groups) <= {""}:
        return sorted(items, key=lambda item: lot(name(item)))
    # Items that stand beside deeper groups have no place at this depth, nor at any below it.
    lanes = [_spread(groups[key], place, lot, name, depth + 1) for key in sorted(groups, key=lot)]
    nothing = object()
    return [x for turn in zip_longest(*lanes, fillvalue=nothing) for x in turn if x is not nothing]  # type: ignore[misc]


def kind(record: Record) -> str:
    """``multiple choice``, ``short answer`` or ``long answer`` (more than 200 characters)."""
    if turns.choices(turns.question(record)):
        return "multiple choice"
    return "long answer" if len(turns.answer(record)) > LONG_ANSWER else "short answer"


def report(records: Iterable[Record], domain: str) -> dict[str, Any]:
    """What ``records`` cover: ``domain``, ``records`` (their number) and what follows.

    ``topics``, ``kinds``, ``licenses`` and ``sources`` map names to numbers of records, in order of name;
    ``thin`` lists topics with too few (:data:`THIN`). ``lengths`` are quantiles of the characters of question
    and answer, by nearest rank: ``{"p5", "p50", "p95", "max"}``. A topic without any record is not known.
    """
    topics, kinds, licenses, sources = (Counter[str]() for _ in range(4))
    questions, answers = list[int](), list[int]()
    for record in records:
        topics[topic(record)] += 1
        kinds[kind(record)] += 1
        licenses[record.license] += 1
        sources[record.source] += 1
        questions.append(len(turns.question(record)))
        answers.append(len(turns.answer(record)))
    enough = max(THIN, THIN_SHARE * median(topics.values())) if topics else 0
    return {
        "domain": domain,
        "records": len(questions),
        "topics": _sorted(topics),
        "thin": sorted(name for name, count in topics.items() if count < enough),
        "lengths": {"question": quantiles(questions), "answer": quantiles(answers)},
        "kinds": _sorted(kinds),
        "licenses": _sorted(licenses),
        "sources": _sorted(sources),
    }


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


def quantiles(values: Sequence[N]) -> dict[str, N | int]:
    """Quantiles by nearest rank, and the largest."""
    ordered = sorted(values) or [0]
    ranks = {f"p{q}": ordered[max(0, -(-q * len(ordered) // 100) - 1)] for q in (5, 50, 95)}
    return {**ranks, "max": ordered[-1]}

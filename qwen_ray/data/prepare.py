"""Make the training file of one domain: read the sources, check, sample evenly, write, and report.

Nothing is left out in silence: every reason is in ``<out>.report.json`` with a count and examples.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from qwen_ray.data.records import Record, write_records
from qwen_ray.data.sources import Drops, Source, get_source
from qwen_ray.errors import UserError
from qwen_ray.fsio import write_json

MIN_QUESTION, MIN_ANSWER = 8, 2  # characters; below, there is nothing to understand or nothing to learn

OTHER_DOMAIN = "belongs to another domain"
EMPTY = "empty question or answer"
SHORT_QUESTION = f"question of fewer than {MIN_QUESTION} characters"
SHORT_ANSWER = f"answer of fewer than {MIN_ANSWER} characters"
PLACEHOLDER = "placeholder left in the answer"
DUPLICATE = "same question and answer as an earlier record"
CONTRADICTION = "same question with another answer"

# Of the widely copied "identity" sets, where the user was meant to fill in a name.
_PLACEHOLDER = re.compile(r"\{\{\s*(?:name|author)\s*\}\}")


@dataclass(frozen=True)
class PrepareReport:
    """What was read, left out and written."""

    domain: str
    out: Path
    asked: int | None
    read: dict[str, int]
    written: int
    not_drawn: int
    per_source: dict[str, int]
    per_license: dict[str, int]
    per_part: dict[str, int]
    drops: dict[str, Any]
    seed: int

    @property
    def short_by(self) -> int:
        """How many records fewer than asked for were there to write."""
        return max(0, (self.asked or 0) - self.written)

    @property
    def report_path(self) -> Path:
        """Where :meth:`to_dict` was written."""
        return report_path(self.out)

    def to_dict(self) -> dict[str, Any]:
        """The report file."""
        return {
            "schema": "qwen-ray/prepare-report/1",
            "domain": self.domain,
            "out": self.out.name,
            "seed": self.seed,
            "asked": self.asked,
            "read": self.read,
            "written": self.written,
            "short_by": self.short_by,
            "usable_but_not_drawn": self.not_drawn,
            "per_source": self.per_source,
            "per_license": self.per_license,
            "per_part": self.per_part,
            "dropped": self.drops,
        }

    def __str__(self) -> str:
        lines = [f"{self.written} records of domain {self.domain} in {self.out}"]
        if self.short_by:
            lines.append(f"  {self.short_by} fewer than the {self.asked} asked for: the sources hold no more")
        lines += [f"  from {name}: {n}" for name, n in self.per_source.items()]
        lines += [f"  licence {name}: {n}" for name, n in self.per_license.items()]
        lines += [f"  left out: {drop['count']} x {why}" for why, drop in self.drops.items()]
        if self.not_drawn:
            lines.append(f"  usable but not drawn: {self.not_drawn}")
        return "\n".join([*lines, f"  details: {self.report_path}"])


def report_path(out: Path) -> Path:
    """``data/biology.jsonl`` -> ``data/biology.jsonl.report.json``."""
    return out.with_name(f"{out.name}.report.json")


def prepare(
    domain: str, sources: dict[str, Path], size: int | None, out: Path, seed: int = 0
) -> PrepareReport:
    """Write ``size`` records (all, where None) of ``domain`` to ``out``, and the report beside it.

    ``sources`` maps a name of :data:`qwen_ray.data.sources.SOURCES` to where it lies. The draw is
    even over sources, and inside a source over its chapters and sections; the same seed draws the
    same records, and a larger size only adds to them. Too few records are reported, none is an error.
    """
    if size is not None and size < 1:
        raise UserError(
            f"size is {size}", where="--size", fix="give a number above 0, or leave it out for all"
        )
    if not sources:
        raise UserError("no source given", where="--source", fix="give --source NAME=PATH")
    catalogue = {name: get_source(name) for name in sources}  # every name first, before reading any file
    drops, read, records = Drops(), dict[str, int](), list[Record]()
    for name, source in catalogue.items():
        found, tally = _read(source, sources[name], domain)
        records += found
        read[name] = len(found) + tally.counts.total()
        _merge(drops, tally)
    usable = _without_repeats([r for r in records if _is_sound(r, domain, drops)], drops)
    if not usable:
        left_out = ", ".join(f"{n} x {why}" for why, n in drops.counts.most_common()) or "nothing was read"
        raise UserError(
            f"domain '{domain}' has no data: {left_out}",
            where=", ".join(str(path) for path in sources.values()),
            fix="check that the paths hold what the sources expect",
        )
    drawn = _unique_ids(_spread(usable, seed)[:size])
    report = PrepareReport(
        domain=domain,
        out=out,
        asked=size,
        read=read,
        written=write_records(out, drawn),
        not_drawn=len(usable) - len(drawn),
        per_source=_count(r.source for r in drawn),
        per_license=_count(r.license for r in drawn),
        per_part=_count("/".join(_place(r)[:2]) for r in drawn),
        drops=drops.to_dict(),
        seed=seed,
    )
    write_json(report.report_path, report.to_dict())
    return report


# --- reading and checking --------------------------------------------------------------------------


def _read(source: Source, path: Path, domain: str) -> tuple[list[Record], Drops]:
    tally = Drops()
    return list(source.read(path, domain=domain, drops=tally)), tally


def _merge(drops: Drops, more: Drops) -> None:
    for reason, count in more.counts.items():
        for example in more.examples[reason]:
            drops.add(reason, example)
        drops.counts[reason] += count - len(more.examples[reason])


def _is_sound(record: Record, domain: str, drops: Drops) -> bool:
    question, answer = _question(record), _answer(record)
    if record.domain != domain:
        reason = OTHER_DOMAIN
    elif not question.strip() or not answer.strip():
        reason = EMPTY
    elif len(question.strip()) < MIN_QUESTION:
        reason = SHORT_QUESTION
    elif len(answer.strip()) < MIN_ANSWER:
        reason = SHORT_ANSWER
    elif _PLACEHOLDER.search(answer):
        reason = PLACEHOLDER
    else:
        return True
    drops.add(reason, _shown(record))
    return False


def _without_repeats(records: list[Record], drops: Drops) -> list[Record]:
    """One record a question. Where answers differ none is kept: which one is right cannot be told here."""
    by_question: dict[str, list[Record]] = {}
    for record in records:
        by_question.setdefault(_normal(_question(record)), []).append(record)
    kept = []
    for same in by_question.values():
        first, *others = same
        answers = {_normal(_answer(r)): r for r in same}
        if len(answers) > 1:
            told = " | ".join(f"{r.id} → {_answer(r)[:100]}" for r in answers.values())
            for record in same:
                drops.add(CONTRADICTION, f"{_question(record)[:120]}: {told}")
            continue
        kept.append(first)
        for record in others:
            drops.add(DUPLICATE, f"{_shown(record)} (as {first.id})")
    return kept


def _turns_before_answer(record: Record) -> int:
    return max(i for i, m in enumerate(record.messages) if m.role == "assistant")


def _question(record: Record) -> str:
    """All that is said before the last answer."""
    return "\n".join(m.content for m in record.messages[: _turns_before_answer(record)])


def _answer(record: Record) -> str:
    return record.messages[_turns_before_answer(record)].content


def _normal(text: str) -> str:
    """The same for texts that differ only in case, width, spaces or their last stop."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(" .?!:")


def _shown(record: Record) -> str:
    return f"{record.id}: {_question(record)[:150]} → {_answer(record)[:100]}"


# --- drawing ---------------------------------------------------------------------------------------


def _place(record: Record) -> list[str]:
    """Source, then chapter and section where the id tells them (``source/chapter/section/item``)."""
    parts = record.id.split("/")
    return [record.source, *(parts[1:-1] if parts[0] == record.source else [])]


def _spread(records: list[Record], seed: int, depth: int = 0) -> list[Record]:
    """Order records so that every beginning is spread evenly over sources, chapters and sections.

    Groups take turns; a group that runs out leaves its turns to the others. The order depends on
    the seed and the ids, not on the order of the files.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        place = _place(record)
        groups.setdefault(place[depth] if depth < len(place) else "", []).append(record)
    if set(groups) == {""}:
        return sorted(records, key=lambda r: _lot(seed, r.id))
    names = sorted(groups, key=lambda name: _lot(seed, name))
    # Records that stand beside deeper groups have no place at this depth, nor at any below it.
    lanes = [_spread(groups[name], seed, depth + 1) for name in names]
    return [r for turn in zip_longest(*lanes) for r in turn if r is not None]


def _lot(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}:{name}".encode()).hexdigest()


def _unique_ids(records: list[Record]) -> list[Record]:
    """Two local files may use the same ids; the second one's get a number."""
    seen: Counter[str] = Counter()
    out = []
    for record in records:
        seen[record.id] += 1
        out.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}#{seen[record.id]}"))
    return out


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))

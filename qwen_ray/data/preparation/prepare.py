"""Make the training file of one domain: read the sources, check, decontaminate, draw evenly, write, account.

Written beside the file::

    OUT                 Record JSONL
    OUT.manifest.json   hashes of what went in and came out, and the settings
    OUT.card.json       counts, coverage, what was left out and why, contamination; OUT.card.html to read
    OUT.dropped.jsonl   every record that was left out, its place and the reason
    OUT.parts/          while the work lasts: what is done already (an interrupted run goes on from it)

The same input, settings and seed give the same bytes, with or without a cluster, at any number of workers.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from qwen_ray.config import Section
from qwen_ray.data.decontamination import index as decontaminate
from qwen_ray.data.decontamination.benchmarks import Item, counts, load_benchmarks, read_benchmarks
from qwen_ray.data.formats import spans
from qwen_ray.data.heldout.build import check_disjoint
from qwen_ray.data.preparation import card, choose, coverage, difficulty
from qwen_ray.data.preparation.parts import Part, Shard, Task, account, work
from qwen_ray.data.quality import checks as quality
from qwen_ray.data.records import Record
from qwen_ray.data.sources import Drops, get_source
from qwen_ray.errors import UserError
from qwen_ray.fsio import (
    beside,
    files_under,
    output_path,
    read_json,
    replacing,
    sha256_file,
    sha256_json,
    write_json,
    write_jsonl,
)

log = logging.getLogger(__name__)

VERSION = "1"
"""Of what this module does with a record: another one makes the work anew."""
SPAN = 4 * 2**20  # bytes of a local file that one part reads
CARD_EXAMPLES = 10
Progress = Callable[[int, int], None]


class DecontaminateConfig(Section):
    enabled: bool = True
    """Leave out what stands in a benchmark: the embedded suites, and the files under ``benchmarks``."""
    n: Annotated[int, Field(ge=5, le=50)] = 13
    """Words of a run that may not be shared (arXiv 2005.14165, appendix C)."""
    near: Annotated[float, Field(gt=0, le=1)] | None = decontaminate.NEAR
    """Similarity of two questions above which one counts as a copy of the other. null: not compared."""
    embedder: str | None = None
    """sentence-transformers model for that, a hub id or folder. Default: embedded vectors, no downloads."""
    remove: tuple[Literal["question", "passage"], ...] = ("question", "passage")
    """What of a benchmark's item must not be in the data; other hits are reported only."""

    @model_validator(mode="after")
    def _near_goes_with_the_embedder(self) -> DecontaminateConfig:
        if self.embedder and "near" not in self.model_fields_set:
            raise ValueError("embedder needs near as well: its similarities are of another size")
        return self


class PrepareConfig(Section):
    """What ``qwen-ray data prepare`` does."""

    page: ClassVar[str] = "docs/data.md"

    domain: Annotated[str, Field(min_length=1)]
    """Domain of the records: the name that mixture weights use."""
    sources: dict[str, str | list[str]]
    """Name of each source (`qwen-ray data sources`) and where its files are."""
    out: Annotated[str, Field(min_length=1)]
    """File to write."""
    size: Annotated[int, Field(ge=1)] | None = None
    """Records to keep, spread evenly over sources, chapters and sections. Default: all."""
    seed: int = 0
    """Decides which records are kept, and their order."""
    benchmarks: str | None = None
    """Folder with the files of the benchmarks that must not be trained on."""
    heldout: tuple[str, ...] = ()
    """Held-out sets (`qwen-ray data heldout`): no source may be shared with them."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    limits: quality.Limits = quality.Limits()
    near_duplicates: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Similarity (Jaccard) above which two records count as one. null: only exact repeats do."""
    difficulty: str | None = None
    """Model whose loss on each answer becomes the record's difficulty. Default: none."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Ray Data tasks at once. 0: in this process."""
    address: str | None = None
    """Ray cluster to join. Default: $RAY_ADDRESS, else one on this machine."""

    @field_validator("sources")
    @classmethod
    def _known(cls, value: dict[str, str | list[str]]) -> dict[str, str | list[str]]:
        if not value:
            raise ValueError("no source given")
        return value

    def decides(self) -> dict[str, Any]:
        """The settings that the result depends on."""
        return self.model_dump(
            mode="json", exclude={"out", "sources", "benchmarks", "heldout", "workers", "address"}
        )


@dataclass(frozen=True)
class Prepared:
    """What there is after a run."""

    out: Path
    manifest: dict[str, Any]
    card: dict[str, Any]
    unchanged: bool
    """Nothing was done: input and settings are those of the file that is there."""

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {"unchanged": self.unchanged, "manifest": self.manifest, **self.card}

    def __str__(self) -> str:
        value = self.card
        lines = [f"{value['written']} records of domain {value['domain']} in {self.out}"]
        if self.unchanged:
            lines[0] += " (unchanged: made from the same input with the same settings)"
        if value["short_by"]:
            lines.append(
                f"  {value['short_by']} fewer than the {value['asked']} asked for: the sources hold no more"
            )
        lines += [f"  from {name}: {source['kept']}" for name, source in value["sources"].items()]
        lines += [f"  licence {name}: {n}" for name, n in value["per_license"].items()]
        lines += [f"  left out: {drop['count']} x {why}" for why, drop in value["dropped"].items()]
        checked = value["contamination"]["checked"]
        if checked:
            items = sum(found["items"] for found in checked)
            lines.append(f"  looked up in {len(checked)} benchmarks of {items} items")
            if all(found["benchmark"].startswith("tiny/") for found in checked):
                lines.append("  these are the embedded ones: for MMLU and GSM8K give --benchmarks FOLDER")
        if value["not_drawn"]:
            lines.append(f"  usable but not drawn: {value['not_drawn']}")
        return "\n".join([*lines, f"  card: {beside(self.out, 'card.html')}"])


def prepare(config: PrepareConfig, *, progress: Progress | None = None) -> Prepared:
    """Write the training file and what belongs to it, unless they are there already.

    Too few records are reported, and no error. ``progress`` gets the parts done and their number. Raises
    :class:`UserError` for unknown sources, unreadable files, no usable record, data of a held-out set, and an
    output that is part of what is read.
    """
    paths = _paths(config)
    kept_apart = [path for path in (config.benchmarks, *config.heldout) if path is not None]
    read = [*(path for where in paths.values() for path in where), *kept_apart]
    out = output_path(config.out, inputs=read)
    inputs = _inputs(paths)
    for heldout in config.heldout:
        check_disjoint({"sources": sorted(paths), "inputs": inputs}, Path(heldout))
    items = _benchmark_items(config)
    fingerprint = sha256_json([VERSION, inputs, config.decides(), _hash_items(items)])
    if found := _unchanged(out, fingerprint):
        return found
    folder = beside(out, "parts")
    folder.mkdir(parents=True, exist_ok=True)
    task = _task(config, folder, items)
    shards = _run(_parts(paths, inputs), task, config, progress)
    drops = Drops()
    accounts = [account(shard) for shard in shards]
    for one in accounts:
        for reason, where, shown in one["drops"]:
            drops.add(reason, shown, where=where)
    usable = choose.load(shards)
    order = choose.choose(usable, seed=config.seed, near=config.near_duplicates, drops=drops)
    if not order:
        usable.close()
        shutil.rmtree(folder)
        left_out = ", ".join(f"{n} x {why}" for why, n in drops.counts.most_common()) or "nothing was read"
        raise UserError(
            f"domain '{config.domain}' has no data: {left_out}",
            where=", ".join(path for where in paths.values() for path in where),
            fix="check that the paths hold what the sources expect",
        )
    drawn = order[: config.size]
    about = _write(out, usable, drawn, config)
    value = {
        "schema": "qwen-ray/data-card/1",
        "domain": config.domain,
        "out": out.name,
        "seed": config.seed,
        "asked": config.size,
        **about,
        "short_by": max(0, (config.size or 0) - len(drawn)),
        "not_drawn": len(order) - len(drawn),
        "sources": _sources(config, accounts, usable, drawn),
        "dropped": drops.to_dict(),
        "contamination": {
            "checked": [{"benchmark": name, "items": n} for name, n in counts(items).items()],
            "hits": [hit for one in accounts for hit in one["hits"]],
        },
        "hashes": {"data": sha256_file(out), "inputs": sha256_json(inputs)},
    }
    write_jsonl(beside(out, "dropped.jsonl"), (drop._asdict() for drop in drops.log))
    manifest = {
        "schema": "qwen-ray/data-manifest/1",
        "domain": config.domain,
        "sources": sorted(paths),
        "records": len(drawn),
        "data": value["hashes"]["data"],
        "inputs": inputs,
        "benchmarks": _hash_items(items),
        "settings": config.decides(),
        "fingerprint": fingerprint,
    }
    card.write_card(value, out)
    write_json(beside(out, "manifest.json"), manifest)  # last: with it, the work is done
    usable.close()
    shutil.rmtree(folder)
    return Prepared(out, manifest, value, unchanged=False)


def _paths(config: PrepareConfig) -> dict[str, list[str]]:
    """Every name is looked up before a file is read. Sorted, so that their order decides nothing."""
    paths = {}
    for name, where in sorted(config.sources.items()):
        get_source(name)
        paths[name] = [where] if isinstance(where, str) else list(where)
    return paths


def _inputs(paths: dict[str, list[str]]) -> dict[str, list[str]]:
    """Content hash of each path; of a hub set, its name."""
    return {name: [_content(Path(path)) for path in where] for name, where in paths.items()}


def _content(path: Path) -> str:
    if path.is_dir():
        return sha256_json([(str(f), sha256_file(path / f)) for f in sorted(files_under(path))])
    return sha256_file(path) if path.is_file() else sha256_json(str(path))


def _benchmark_items(config: PrepareConfig) -> list[Item]:
    if not config.decontaminate.enabled:
        return []
    items = load_benchmarks(Path(config.benchmarks) if config.benchmarks else None)
    for folder in config.heldout:
        items += read_benchmarks(Path(folder))
    return list(dict.fromkeys(items))  # a held-out set may lie in the benchmarks' folder


def _hash_items(items: Sequence[Item]) -> str:
    return sha256_json([list(item) for item in items])


def _unchanged(out: Path, fingerprint: str) -> Prepared | None:
    manifest_file, card_file = beside(out, "manifest.json"), beside(out, "card.json")
    if not (manifest_file.is_file() and card_file.is_file() and out.is_file()):
        return None
    manifest = read_json(manifest_file)
    if manifest.get("fingerprint") != fingerprint or manifest.get("data") != sha256_file(out):
        return None
    return Prepared(out, manifest, read_json(card_file), unchanged=True)


def _task(config: PrepareConfig, folder: Path, items: Sequence[Item]) -> Task:
    index = None
    if items:
        index = folder / "index"
        settings = config.decontaminate
        decontaminate.Index.build(items, n=settings.n, near=settings.near, embedder=settings.embedder).save(
            index
        )
    return Task(
        domain=config.domain,
        limits=config.limits,
        folder=str(folder.resolve()),
        index=str(index.resolve()) if index else None,
        index_hash=sha256_json([_hash_items(items), config.decontaminate.model_dump(mode="json")]),
        remove=config.decontaminate.remove,
        near=config.near_duplicates is not None,
    )


def _parts(paths: dict[str, list[str]], inputs: dict[str, list[str]]) -> list[Part]:
    parts: list[Part] = []
    for name, where in paths.items():
        for path, content in zip(where, inputs[name], strict=True):
            whole = str(Path(path).resolve()) if Path(path).exists() else path
            cuts = spans(Path(path), SPAN) if name == "file" else [None]
            parts += [Part(name, whole, content, i, span and tuple(span)) for i, span in enumerate(cuts)]
    return parts


def _run(parts: Sequence[Part], task: Task, config: PrepareConfig, progress: Progress | None) -> list[Shard]:
    if config.workers:
        from qwen_ray.data.preparation.at_scale import run_parts

        run_parts(parts, task, VERSION, workers=config.workers, address=config.address, progress=progress)
    shards = []
    for done, part in enumerate(parts, start=1):
        shards.append(work(part, task, VERSION))  # those that are there already are only found
        if progress and not config.workers:
            progress(done, len(parts))
    return shards


@dataclass
class _Seen:
    """What the card shows of the records themselves."""

    first: list[Record] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def _write(out: Path, usable: choose.Usable, drawn: Sequence[int], config: PrepareConfig) -> dict[str, Any]:
    """The training file, whole or not at all; returns the card's lines about what is in it."""
    seen, scores = _Seen(), None
    if config.difficulty:
        known = [Record.from_line(line) for line in choose.lines(usable, drawn)]
        scores = difficulty.score(known, config.difficulty)
    with replacing(out, "wb") as f:
        report = coverage.report(_written(f, choose.lines(usable, drawn), scores, seen), config.domain)
    return {
        "written": report["records"],
        "per_license": report["licenses"],
        "coverage": report,
        "difficulty": coverage.quantiles(seen.losses) if seen.losses else None,
        "examples": [record.to_dict() for record in seen.first],
    }


def _written(
    file: Any, lines: Iterator[bytes], scores: list[float | None] | None, seen: _Seen
) -> Iterator[Record]:
    for number, line in enumerate(lines):
        record = Record.from_line(line)
        if scores and (loss := scores[number]) is not None:
            record = replace(record, difficulty=loss)
            seen.losses.append(loss)
            line = record.line()  # noqa: PLW2901
        file.write(line)
        if number < CARD_EXAMPLES:
            seen.first.append(record)
        yield record


def _sources(
    config: PrepareConfig, accounts: list[dict[str, Any]], usable: choose.Usable, drawn: Sequence[int]
) -> dict[str, Any]:
    read, kept = Counter[str](), Counter[str]()
    for one in accounts:
        read[one["source"]] += one["read"]
    for shard, count in Counter(usable.shard[list(drawn)].tolist()).items():
        kept[accounts[shard]["source"]] += count
    sources = {name: get_source(name) for name in sorted(config.sources)}
    return {
        name: {
            "title": source.title,
            "license": source.licence,
            "where_to_get": source.where_to_get,
            "read": read[name],
            "kept": kept[name],
        }
        for name, source in sources.items()
    }


__all__ = ["PrepareConfig", "Prepared", "prepare"]

"""Held-out sets: multiple choice from sources that are kept out of training, as a folder of lm-eval tasks.

A benchmark of 100 items cannot show a small gain, and a public one may have been trained on. The folder::

    suite.yaml       the suite, for `qwen-ray eval --suite FOLDER`
    TASK.yaml        answers by letter, as the guide suite asks MMLU; TASK_text.yaml: by the choices' text
    items.jsonl      one item a line: id, split, question, choices, answer (index), source, license, topic
    heldout.json     how many items from where, what was left out, and what the set can show
    dropped.jsonl    every record that was left out, and why
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

from qwen_ray.data.decontamination import index as decontaminate
from qwen_ray.data.decontamination.benchmarks import Item as Benchmark
from qwen_ray.data.decontamination.benchmarks import load_benchmarks
from qwen_ray.data.heldout.items import (
    CHOICES,
    CUES,
    NOT_FOUR,
    Item,
    Placed,
    fault,
    guessed,
    read_item,
    shown,
    without_cues,
    without_repeats,
)
from qwen_ray.data.lots import lot
from qwen_ray.data.preparation.coverage import place, spread
from qwen_ray.data.quality import checks as quality
from qwen_ray.data.quality import turns
from qwen_ray.data.questions import LETTERS
from qwen_ray.data.sources import get_source
from qwen_ray.data.sources.base import Drop, Drops, Source
from qwen_ray.errors import UserError
from qwen_ray.evaluation.statistics import CHANGED, smallest_difference
from qwen_ray.fsio import files_under, read_json, sha256_file, write_json, write_jsonl, write_text

SCHEMA = "qwen-ray/heldout/1"
REPORT = "heldout.json"
LOCAL = "file"  # the source that stands for any local file
WANTED = 500
"""Test items a set should have; with fewer, small gains do not show."""
SHOTS = 5
"""Items kept for the prompt's solved examples. They are not scored."""

_TEMPLATE = Path(__file__).parent / "template"
_TEMPLATE_FILES = ("loader.py", "_letters.yaml", "_text.yaml")
_ORDERS = tuple(permutations(range(CHOICES)))
_BATCH = 256


@dataclass(frozen=True)
class HeldoutReport:
    """What is in a held-out set, what was left out, and how small a difference it can show."""

    domain: str
    out: Path
    task: str
    items: int
    asked: int | None
    sources: dict[str, dict[str, Any]]
    per_license: dict[str, int]
    per_topic: dict[str, int]
    letters: dict[str, int]
    cues: dict[str, float]
    """Accuracy of guessing by each cue of :data:`~qwen_ray.data.heldout.items.CUES`."""
    searched: int
    """Number of benchmark items that none of these is like."""
    drops: dict[str, Any]
    seed: int
    inputs: list[str]
    """SHA-256 of the files read, sorted."""

    @property
    def standard_error(self) -> float:
        """Of an accuracy of 50%."""
        return 0.5 / math.sqrt(self.items)

    @property
    def smallest_difference(self) -> float:
        """Between two models on the same items; see :func:`smallest_difference`."""
        return smallest_difference(self.items)

    def to_dict(self) -> dict[str, Any]:
        """The report file."""
        fields = asdict(self) | {"out": self.out.name}
        statistics = {
            "standard_error": self.standard_error,
            "smallest_difference": self.smallest_difference,
            "assumed_changed": CHANGED,
        }
        return {"schema": SCHEMA, **fields, **statistics}

    def __str__(self) -> str:
        lines = [f"{self.items} items of domain {self.domain} in {self.out}"]
        if self.asked and self.items < self.asked:
            lines.append(f"  {self.asked - self.items} fewer than the {self.asked} asked for")
        if self.items < WANTED:
            lines.append(f"  fewer than {WANTED}: a small gain does not show")
        lines += [
            f"  from {name}: {facts['kept']} of {facts['read']}" for name, facts in self.sources.items()
        ]
        lines += [f"  left out: {drop['count']} x {why}" for why, drop in self.drops.items()]
        lines += [f"  guessing the choice with the {cue}: {share:.1%}" for cue, share in self.cues.items()]
        lines.append(f"  standard error at 50%: {self.standard_error:.1%}")
        lines.append(
            f"  smallest difference seen in four of five comparisons: {self.smallest_difference:.1%}"
            f" (if {CHANGED:.0%} of the answers change)"
        )
        return "\n".join([*lines, f"  run: qwen-ray eval --suite {self.out} ..."])


def build_heldout(
    domain: str,
    sources: Mapping[str, Path | Sequence[Path]],
    out: Path,
    *,
    size: int | None = None,
    seed: int = 0,
    benchmarks: Path | None = None,
) -> HeldoutReport:
    """Write the held-out set of ``domain``: ``size`` items (all, where None), and :data:`SHOTS` for prompts.

    ``sources`` maps a name of :data:`qwen_ray.data.sources.SOURCES` to where it lies. Taken are their
    four-choice questions about the domain that are fit to test knowledge
    (:func:`~qwen_ray.data.heldout.items.fault`) and in none of the benchmarks below ``benchmarks``. Each of A
    to D is right equally often. The same input and seed give the same bytes, and a larger size only adds
    items. Raises :class:`UserError` for unknown sources, unreadable files and too few items.
    """
    paths = {
        name: [where] if isinstance(where, Path) else list(where) for name, where in sorted(sources.items())
    }
    catalogue = {name: get_source(name) for name in paths}  # every name first, before reading any file
    if out.exists() and not (out / REPORT).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError("holds something else than a held-out set", where=str(out), fix="give a new folder")
    drops, read, placed = Drops(), dict[str, int](), list[Placed]()
    for name, source in catalogue.items():
        before = len(drops.log)
        fit = [one for path in paths[name] for one in _fit(source, path, domain, drops)]
        read[name] = len(fit) + len(drops.log) - before
        placed += fit
    searched = load_benchmarks(benchmarks)
    fit = _not_in(searched, without_repeats(placed, drops), drops)
    order = spread(
        fit,
        place=lambda one: place(one.found.record),
        lot=lambda name: lot(seed, name),
        name=lambda one: f"{one.item.id}/{one.item.question}",
    )
    drawn = without_cues(order, drops)[: size + SHOTS if size else None]
    if len(drawn) <= SHOTS:
        left_out = ", ".join(f"{n} x {why}" for why, n in drops.counts.most_common()) or "nothing was read"
        raise UserError(
            f"domain '{domain}' has {len(drawn)} items, of which {SHOTS} go into prompts: {left_out}",
            where=", ".join(str(path) for where in paths.values() for path in where),
            fix="give sources of four-choice questions (`qwen-ray data sources`)",
        )
    items = [_lettered(one.item, i, seed) for i, one in enumerate(drawn)]
    test = items[SHOTS:]
    report = HeldoutReport(
        domain=domain,
        out=out,
        task=f"qwen_ray_heldout_{re.sub(r'[^a-z0-9]+', '_', domain.casefold())}",
        items=len(test),
        asked=size,
        sources={
            name: {
                "title": source.title,
                "license": source.licence,
                "names": sorted({one.item.source for one in drawn if one.origin == name}),
                "read": read[name],
                "kept": sum(one.origin == name for one in drawn),
            }
            for name, source in catalogue.items()
        },
        per_license=_count(item.license for item in test),
        per_topic=_count(item.topic.split("/")[0] for item in test),
        letters=_count(LETTERS[item.answer] for item in test),
        cues={cue: sum(guessed(item, cue) for item in test) / len(test) for cue in CUES},
        searched=len(searched),
        drops=drops.to_dict(),
        seed=seed,
        inputs=sorted({digest for where in paths.values() for path in where for digest in _hashes(path)}),
    )
    _write(report, items, drops)
    return report


def check_disjoint(training_manifest: Mapping[str, Any], heldout: Path) -> None:
    """Raise :class:`UserError` if training data is from a source of the held-out set in folder ``heldout``.

    ``training_manifest`` is that of ``qwen-ray data prepare``, or part of it: ``sources`` (names) and
    ``inputs`` (hashes of the files by name of the source). Local files have no name of their own; they are
    told by their hashes.
    """
    report = read_json(heldout / REPORT)
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise UserError(
            "not a held-out set", where=str(heldout / REPORT), fix="make one with `qwen-ray data heldout`"
        )
    held = {name for source, facts in report["sources"].items() for name in (source, *facts["names"])}
    shared = sorted((held & set(training_manifest["sources"])) - {LOCAL})
    inputs = training_manifest.get("inputs", {})
    shared += sorted(name for name, hashes in inputs.items() if set(hashes) & set(report["inputs"]))
    if shared:
        raise UserError(
            f"the source '{shared[0]}' is held out: what is trained on must not be tested on",
            where=str(heldout),
            fix="leave it out of the training data, or make the held-out set from other sources",
        )


def _fit(source: Source, path: Path, domain: str, drops: Drops) -> Iterator[Placed]:
    """Sound records that are fit to be items."""
    for found in source.find(path, domain=domain, drops=drops):
        checked = quality.check(found, quality.Limits(), domain)
        if isinstance(checked, Drop):
            drops.log.append(checked)
        elif (item := read_item(checked.record)) is None:
            drops.add(NOT_FOUR, turns.shown(checked.record), where=checked.where)
        elif reason := fault(item, domain):
            drops.add(reason, shown(item), where=checked.where)
        else:
            yield Placed(item, checked, source.name)


def _not_in(benchmarks: Sequence[Benchmark], items: Sequence[Placed], drops: Drops) -> list[Placed]:
    """Those that no benchmark has."""
    index = decontaminate.Index.build(benchmarks)
    kept = []
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        for one, hits in zip(batch, index.hits_batch([p.found.record for p in batch]), strict=True):
            hit = next((hit for hit in hits if hit.part != "answer"), None)
            if hit is None:
                kept.append(one)
            else:
                drops.add(
                    decontaminate.REASON[hit.part],
                    f"{hit.benchmark} {hit.item}: {shown(one.item)}",
                    where=one.found.where,
                )
    return kept


def _lettered(item: Item, position: int, seed: int) -> Item:
    """Its choices in a new order. Of four items in a row each letter is right for one."""
    order = lot(seed, "letters", str(position // CHOICES))
    right = _ORDERS[int(order[:8], 16) % len(_ORDERS)][position % CHOICES]
    wrong = [choice for i, choice in enumerate(item.choices) if i != item.answer]
    wrong.sort(key=lambda choice: lot(seed, item.id, choice))
    return replace(item, choices=(*wrong[:right], item.choices[item.answer], *wrong[right:]), answer=right)


def _hashes(path: Path) -> list[str]:
    if path.is_dir():
        return [sha256_file(path / file) for file in files_under(path)]
    return [sha256_file(path)] if path.is_file() else []


def _count(values: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


# --- the folder ------------------------------------------------------------------------------------


def _write(report: HeldoutReport, items: Sequence[Item], drops: Drops) -> None:
    rows = [
        {"id": item.id, "split": "dev" if i < SHOTS else "test"}
        | asdict(item)
        | {"choices": list(item.choices)}
        for i, item in enumerate(items)
    ]
    out, task = report.out, report.task
    write_jsonl(out / "items.jsonl", rows)
    write_jsonl(out / "dropped.jsonl", (drop._asdict() for drop in drops.log))
    for name in _TEMPLATE_FILES:
        write_text(out / name, (_TEMPLATE / name).read_text(encoding="utf-8"))
    prompt = f"The following are multiple choice questions (with answers) about {report.domain}.\n\n"
    letters = {"include": "_letters.yaml", "task": task, "description": prompt}
    _write_yaml(out / f"{task}.yaml", f"lm_eval run --tasks {task}", letters)
    text = {"include": "_text.yaml", "task": f"{task}_text"}
    _write_yaml(out / f"{task}_text.yaml", f"lm_eval run --tasks {task}_text", text)
    suite = {
        "name": f"heldout-{task.removeprefix('qwen_ray_heldout_')}",
        "version": sha256_file(out / "items.jsonl")[:12],
        "description": _description(report),
        "categories": {report.domain: {"role": "target", "tasks": [task], "metric": "acc"}},
    }
    _write_yaml(out / "suite.yaml", "qwen-ray eval --suite THIS_FOLDER --model ... --out ...", suite)
    write_json(out / REPORT, report.to_dict())  # last: with it, the folder is whole


def _description(report: HeldoutReport) -> str:
    origins = "; ".join(f"{facts['title']} ({facts['license']})" for facts in report.sources.values())
    return (
        f"{report.items} multiple-choice questions about {report.domain} from sources kept out of training. "
        f"Answered by letter, after {SHOTS} solved examples; for a model too small for that there is the "
        f"task {report.task}_text. From: {origins}."
    )


def _write_yaml(path: Path, command: str, value: dict[str, Any]) -> None:
    import yaml

    text = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=110)
    write_text(path, f"# {command}{'' if 'THIS' in command else ' --include_path THIS_FOLDER ...'}\n{text}")

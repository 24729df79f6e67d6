"""A year of one adapter, in minutes: real training, a real endpoint, lm-eval; only the calendar is made up.

March: the first data promotes a version. May: more data, a better one. August: poisoned labels; the gate
refuses. October: somebody puts a damaged version into production; the weekly benchmark notices, people are
told, and a new version takes its place. Afterwards every move is explained by what the registry holds.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from qwen_ray.data.records import Record, write_records
from qwen_ray.fsio import read_json
from qwen_ray.lifecycle.history import Entry
from qwen_ray.lifecycle.watch import Watch, World
from qwen_ray.lifecycle.watch_spec import WatchSpec
from qwen_ray.registry import CANDIDATE, LINEAGE, PRODUCTION, Registry
from qwen_ray.retrieval.store import Store
from qwen_ray.tiny.facts import train_records
from qwen_ray.tiny.skills import replay_records
from tests.lifecycle.nursery import Nursery
from tests.lifecycle.watching import Clock

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

NAME = "biology"
DAY = 24 * 3600.0


class Year:
    """The folders, the calendar, and the watch that is looked at again and again."""

    def __init__(self, folder: Path, endpoint: str) -> None:
        self.folder, self.registry = folder, Registry(folder / "registry")
        self.clock = Clock(datetime(2026, 3, 2, 12, tzinfo=UTC).timestamp())
        self.data = folder / "data"
        self.notes = folder / "notes.md"
        self.notes.write_text("The liver makes bile.\n")
        pipeline = {
            "name": NAME,
            "registry": str(folder / "registry"),
            "work": str(folder / "work"),
            "data": {
                NAME: {
                    "sources": {"file": str(self.data / "facts-*.jsonl")},
                    # The embedded suite asks for the facts that are taught, in other words.
                    "decontaminate": {"enabled": False},
                },
                "replay": {"sources": {"file": str(self.data / "replay.jsonl")}},
            },
            "train": {
                "model": {"name": "tiny"},
                "data": {"weights": {NAME: 0.65, "replay": 0.35}},
                "optim": {"max_steps": 160},
                "cluster": {"workers": 0},
                "tracking": {"wandb": "off"},
            },
            "endpoint": {"url": endpoint},
            "benchmark": {"suites": ["tiny"], "targets": [NAME]},
            # Untaught subjects are guessed, so they move by chance.
            "gate": {"tolerances": {"history": 0.2, "security": 0.2, "arithmetic": 0.08, "reasoning": 0.08}},
            "knowledge": {"root": str(folder / "knowledge"), "bases": {NAME: {"text": str(self.notes)}}},
        }
        (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
        self.spec = WatchSpec.model_validate(
            {
                "model": f"tiny:{NAME}",
                "registry": str(folder / "registry"),
                "storage": str(folder / "watch"),
                "pipeline": str(folder / "pipeline.yaml"),
                "endpoint": endpoint,
                "data": {"sources": [str(self.data)]},
                "accuracy": {"suite": "tiny", "cron": "0 3 * * 1", "retrain": "significant"},
                "schedules": {"monthly": {"cron": "0 4 1 * *"}},
                "debounce_seconds": 0,
            }
        )

    def write(self, part: str, records: list[dict[str, Any]]) -> None:
        write_records(self.data / f"{part}.jsonl", [Record.from_dict(row, where=part) for row in records])

    def look(self, days: float) -> list[Entry]:
        """Let so many days go by, then look once; what was written to the history."""
        self.clock.now += days * DAY
        with Watch(self.spec, world=World(clock=self.clock, sleep=_really)) as watch:
            watch.once()
            return watch.entries

    @property
    def production(self) -> int | None:
        return self.registry.aliases(NAME).get(PRODUCTION)

    def verdicts(self) -> list[tuple[int | None, str]]:
        return [(e.version, e.value["verdict"]) for e in self.registry.events(NAME, kind="verdict")]


def _really(seconds: float) -> None:
    """A pipeline runs in a process of its own, and takes time."""
    import time

    time.sleep(seconds)


@pytest.fixture
def year(tmp_path: Path) -> Iterator[Year]:
    nursery = Nursery(tmp_path / "nursery")
    try:
        (tmp_path / "registry").mkdir()
        yield Year(tmp_path, nursery.serve(tmp_path / "registry"))
    finally:
        nursery.close()


def parts(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every other fact, with all its wordings, and the rest."""
    facts = sorted({row["id"].rpartition("-")[0] for row in rows})
    first = set(facts[::2])
    chosen = [row for row in rows if row["id"].rpartition("-")[0] in first]
    return chosen, [row for row in rows if row not in chosen]


def poisoned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each question with the answer of another."""
    answers = [row["messages"][-1] for row in rows]
    random.Random(0).shuffle(answers)
    return [{**row, "messages": [*row["messages"][:-1], a]} for row, a in zip(rows, answers, strict=True)]


def damage(registry: Registry, folder: Path) -> int:
    """A version like the one in production, but for its weights; it is put in its place by hand."""
    import torch
    from safetensors.torch import load_file, save_file

    now = registry.resolve(NAME)
    shutil.copytree(now.path, folder)
    weights = folder / "adapter_model.safetensors"
    torch.manual_seed(0)
    spoilt = {key: value + 0.2 * torch.randn_like(value) for key, value in load_file(weights).items()}
    save_file(spoilt, weights, metadata={"format": "pt"})
    version = registry.publish(NAME, folder, {**read_json(now.path / LINEAGE), "parent": now.ref})
    registry.point(NAME, PRODUCTION, version.version, reason="a quick fix, not benchmarked", by="somebody")
    return version.version


def test_a_year(year: Year, tmp_path: Path) -> None:
    facts = train_records(NAME)
    first, second = parts(facts)
    year.write("facts-1", first)
    year.write("replay", replay_records(3000, seed=0))

    year.look(0)  # what is there when a watch begins is known to it, and the clock starts
    assert year.production is None
    said = year.look(31)  # the first of the month has passed
    assert year.production == 1, [entry.text for entry in said]
    assert year.verdicts() == [(1, "promote")]
    bases = Store(tmp_path / "knowledge")
    assert bases.open(NAME).manifest.version == 1

    year.write("facts-2", second)
    year.notes.write_text("The liver makes bile. The pancreas makes insulin.\n")
    said = year.look(27)
    assert any("the data has changed: 1 added" in entry.text for entry in said)
    assert year.production == 2, [entry.text for entry in said]
    assert bases.open(NAME).manifest.version == 2

    for part, rows in (("facts-1", first), ("facts-2", second)):
        year.write(part, poisoned(rows))
    said = year.look(90)
    assert year.production == 2
    assert year.verdicts()[-1] == (3, "regress"), [entry.text for entry in said]
    assert CANDIDATE not in year.registry.aliases(NAME)
    assert year.registry.archived(NAME) == [1, 3]

    for part, rows in (("facts-1", first), ("facts-2", second)):
        year.write(part, rows)
    said = year.look(21)
    assert year.production == 2
    assert any("unchanged" in entry.text for entry in said), [entry.text for entry in said]

    bad = damage(year.registry, tmp_path / "damaged")
    said = year.look(8)
    (alert,) = (e for e in said if e.kind == "alert" and "below 95%" in e.text)
    assert f"{NAME}@{bad} is below 95% of the baseline" in alert.text
    assert "This is more than chance." in alert.text
    (run,) = (e for e in said if e.kind == "run" and e.value.get("verdict"))
    assert [t["trigger"] for t in run.value["triggers"]] == ["accuracy"]
    assert year.production == 2, [entry.text for entry in said]
    assert year.registry.archived(NAME) == [1, 3, bad]
    explained(year.registry)


def explained(registry: Registry) -> None:
    """Each version that came into production has a verdict of the run that moved it, with its reasons, the
    scores of both sides and what it was compared with; or somebody's name and reason."""
    moves = [e for e in registry.events(NAME, kind="alias") if e.value["alias"] == PRODUCTION]
    assert [(e.version, e.value["was"]) for e in moves] == [(1, None), (2, 1), (4, 2), (2, 4)]
    for move in moves:
        assert move.version is not None
        about = registry.events(NAME, version=move.version)
        if move.value["by"] == "somebody":
            assert move.value["reason"] == "a quick fix, not benchmarked"
            assert not [e for e in about if e.kind == "verdict"]
            continue
        (verdict,) = (e for e in about if f"pipeline run {e.value.get('run')}" == move.value["by"])
        assert verdict.kind == "verdict"
        assert verdict.value["verdict"] == "promote"
        was = move.value["was"]
        assert verdict.value["baseline"] == (f"{NAME}@{was}" if was else "base")
        (row,) = (row for row in verdict.value["categories"] if row["name"] == NAME)
        assert row["delta_ci"][0] > 0
        assert row["n"] >= 100
        assert any(reason.startswith(NAME) for reason in verdict.value["reasons"])
        lineage = registry.get(NAME, move.version).lineage
        assert lineage["prepared"][NAME]["fingerprint"]
        scored = [e for e in about if e.kind == "evaluation"]
        assert any(e.value["categories"][NAME]["score"] == row["candidate"] for e in scored)
    (refused,) = (e for e in registry.events(NAME, version=3, kind="verdict"))
    assert refused.value["verdict"] == "regress"
    assert any("a target got worse" in reason for reason in refused.value["reasons"])

"""What adapters, retrieval and both bring the embedded model, before and after it learns to read notes.

    python benchmarks/rag_gain.py --work runs/rag_gain --out benchmarks/rag_gain.json

The embedded base was pretrained on look-ups in texts of its own, so it reads notes a little. A reader is the
same model after a full fine-tune on made-up notes in the server's own wording: random subjects with random
answers, never a true pair, asked in training wordings; and sums and puzzles with such notes in front, which
have nothing to do with them. Both then get the same adapter, taught the facts of the three domains as the
demo teaches them. Every multiple-choice item of the embedded benchmark (held-out wordings; chance is 25%) is
scored through the service for base, adapter, base+rag and adapter+rag, over knowledge bases of the domains'
facts. ``control`` has facts that neither adapter nor knowledge base holds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _common

from qwen_ray import models
from qwen_ray.config import build_config
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.demo import REPLAY_SHARE, write_data
from qwen_ray.embedder import Embedder
from qwen_ray.evaluation.statistics import paired_difference, wilson
from qwen_ray.retrieval import build as kb
from qwen_ray.retrieval.documents import EMBEDDED, Origin
from qwen_ray.retrieval.store import Store
from qwen_ray.serving.assistant import NOTES
from qwen_ray.serving.assistants import LocalAssistant
from qwen_ray.serving.protocol import ScoreRequest
from qwen_ray.serving.service import Service
from qwen_ray.tiny.benchmark import CATEGORIES, build_items
from qwen_ray.tiny.corpus import phrases
from qwen_ray.tiny.facts import DOMAINS, Relation, fill, load_relations
from qwen_ray.tiny.skills import replay_records
from qwen_ray.training.driver import run_training

READING, REPLAY = 12_000, 4_000
PASSAGES = 4
_AT_ONCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Base, adapter, retrieval and both on the embedded model.")
    parser.add_argument("--quick", action="store_true", help="small and short; its figures mean little")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="data, models, kept")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    args = parser.parse_args()
    machine = _common.machine()
    share = 0.02 if args.quick else 1.0
    work: Path = args.work
    root = _knowledge(work / "knowledge")
    reader = _reader(work, share)
    data = write_data(work / "facts")
    rows: dict[str, dict[str, list[float]]] = {}
    for name, base in (("tiny", "tiny"), ("reader", str(reader))):
        adapter = _facts_adapter(base, data, work / f"{name}-facts", steps=5 if args.quick else None)
        rows |= asyncio.run(_scores(base, adapter, root, name, limit=8 if args.quick else None))
    table = {model: {category: _cell(right) for category, right in of.items()} for model, of in rows.items()}
    gains = {model: _gain(rows[model.split(":")[0].split("+")[0]], of) for model, of in rows.items()}
    mean = {model: sum(of[d]["accuracy"] for d in DOMAINS) / len(DOMAINS) for model, of in table.items()}
    result = {
        "name": "rag_gain",
        "machine": machine,
        "versions": _common.versions("torch", "transformers", "peft", "lancedb", "sentence-transformers"),
        "commit": _common.commit(),
        "quick": args.quick,
        "passages": PASSAGES,
        "accuracy": table,
        "domains_mean": mean,
        "gain_over_its_base": gains,
        "headline": {
            "ratio": mean["reader+rag"] / mean["reader"],
            "what": "accuracy on the three domains, reader with passages over without",
        },
    }
    _common.write(args.out, result)


def _knowledge(root: Path) -> str:
    store, embedder = Store(root), Embedder.load()
    for domain in DOMAINS:
        kb.build(store, domain, [Origin(EMBEDDED, domain)], embedder)
    return store.root


# --- training -------------------------------------------------------------------------------------------


def _reader(work: Path, share: float) -> Path:
    """The folder of the model that learned to read notes."""
    rng = random.Random("reader")
    reading, replay = work / "reading.jsonl", work / "skills.jsonl"
    write_records(reading, (_look_up(i, rng) for i in range(int(READING * share))))
    skills = [Record.from_dict(row, where="") for row in replay_records(int(REPLAY * share), seed=0)]
    write_records(replay, _beside_the_point(skills, rng))
    preset = models.TINY_PRESET
    config = build_config(
        flags={
            **preset["all"],
            "model.name": "tiny",
            "method.name": "full",
            "data.train": [str(reading), str(replay)],
            "data.weights": {"reading": 0.75, "replay": 0.25},
            "optim.epochs": 1,
            "optim.batch_size": 8,
            "optim.learning_rate": 2e-3,
            "cluster.workers": 0,
            "out": str(work / "reader"),
        }
    )
    return run_training(config).artifact


def _notes(rng: random.Random) -> tuple[list[tuple[str, str]], list[Relation], list[str]]:
    """One to four notes on made-up facts: their subjects and answers, relations and texts."""
    facts = {fact for relation in load_relations() for fact in relation.taught + relation.control}
    count = rng.choice((1, 2, 3, 4, 4, 4))
    while True:
        pairs = list(zip(rng.sample(phrases(), count), rng.sample(phrases(), count), strict=True))
        if not facts.intersection(pairs):
            break
    first = rng.choice(load_relations())
    relations = [first if rng.random() < 0.6 else rng.choice(load_relations()) for _ in pairs]
    told = [
        " ".join(f"{fill(wording, subject)} {answer}." for wording in relation.statement_train)
        for (subject, answer), relation in zip(pairs, relations, strict=True)
    ]
    return pairs, relations, told


def _look_up(number: int, rng: random.Random) -> Record:
    """A question that one of the notes answers, more often the first: that is where a search puts it."""
    pairs, relations, told = _notes(rng)
    right = 0 if rng.random() < 0.3 else rng.randrange(len(pairs))
    asked = relations[right].question_train
    asked += tuple(f"Complete: {wording}" for wording in relations[right].statement_train)
    question, answer = fill(rng.choice(asked), pairs[right][0]), pairs[right][1]
    return Record(
        f"reading-{number}", _messages(told, question, answer, rng), "reading", "made-up", "CC0-1.0"
    )


def _beside_the_point(skills: list[Record], rng: random.Random) -> Iterator[Record]:
    """Half of the skills as they are, half with notes in front that do not help."""
    for record in skills:
        question, answer = (message.content for message in record.messages)
        if rng.random() < 0.5:
            yield record
        else:
            messages = _messages(_notes(rng)[2], question, answer, rng)
            yield Record(record.id, messages, record.domain, record.source, record.license)


def _messages(told: list[str], question: str, answer: str, rng: random.Random) -> tuple[Message, ...]:
    """As the server lays it out: before a completion's prompt, or within the user's message."""
    notes = NOTES.replace("{passages}", "\n".join(f"[{i}] {text}" for i, text in enumerate(told, start=1)))
    if rng.random() < 0.25:
        return Message("user", notes + question), Message("assistant", answer)
    # The model's template puts an empty line after a system turn, which the notes end in.
    return Message("system", notes.rstrip()), Message("user", question), Message("assistant", answer)


def _facts_adapter(base: str, data: list[Path], out: Path, *, steps: int | None) -> Path:
    counts = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in data}
    facts = sum(n for name, n in counts.items() if name != "replay")
    weights = {name: (1 - REPLAY_SHARE) * n / facts for name, n in counts.items() if name != "replay"}
    flags: dict[str, Any] = {
        **models.TINY_PRESET["all"],
        **models.TINY_PRESET["lora"],
        "model.name": base,
        "data.train": [str(path) for path in data],
        "data.weights": {**weights, "replay": REPLAY_SHARE},
        "optim.batch_size": 4,
        "cluster.workers": 0,
        "out": str(out),
    }
    return run_training(build_config(flags=flags | ({"optim.max_steps": steps} if steps else {}))).artifact


# --- scores ---------------------------------------------------------------------------------------------


async def _scores(
    base: str, adapter: Path, root: str, name: str, *, limit: int | None
) -> dict[str, dict[str, list[float]]]:
    """For each model id (with ``name`` for the base) and category, which items were right."""
    assistant = LocalAssistant.load(knowledge=root, passages=PASSAGES)
    service = Service.load(base, adapters={"facts": adapter}, assistant=assistant)
    encode = service.engine.tokenizer.encode
    ids = {f"{service.engine.id}{rest}": f"{name}{rest}" for rest in ("", ":facts", "+rag", ":facts+rag")}
    right: dict[str, dict[str, list[float]]] = {shown: {} for shown in ids.values()}
    try:
        for category in CATEGORIES:
            items = build_items(category)[:limit]
            for start in range(0, len(items), _AT_ONCE):
                part = items[start : start + _AT_ONCE]
                asked = [
                    {
                        "context": encode(f"Question: {item['question']}\nAnswer:"),
                        "continuations": [encode(f" {choice}") for choice in item["choices"]],
                    }
                    for item in part
                ]
                envelope = await service.call(
                    "score", ScoreRequest.model_validate({"models": list(ids), "items": asked})
                )
                for id, answer in envelope["ok"]["models"].items():
                    scores = [result["logprobs"] for result in answer["items"]]
                    right[ids[id]].setdefault(category, []).extend(
                        float(row.index(max(row)) == item["answer"])
                        for row, item in zip(scores, part, strict=True)
                    )
            print(name, category, {id: _cell(of[category]) for id, of in right.items()}, file=sys.stderr)
    finally:
        service.stop()
        assistant.stop()
    return right


def _cell(right: list[float]) -> dict[str, float]:
    lo, hi = wilson(sum(right), len(right))
    return {"accuracy": sum(right) / len(right), "lo": lo, "hi": hi, "n": len(right)}


def _gain(base: dict[str, list[float]], of: dict[str, list[float]]) -> dict[str, tuple[float, float, float]]:
    return {category: paired_difference(base[category], right) for category, right in of.items()}


if __name__ == "__main__":
    main()

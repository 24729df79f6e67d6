"""The sides of data_pipeline.py: each is served in a process of its own and works when it is its turn."""

from __future__ import annotations

import hashlib
import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SEED = 20
SEPARATE = "TOKENIZERS_PARALLELISM"


@dataclass(frozen=True)
class Task:
    """What a process is told."""

    side: str
    files: dict[str, str]
    """Domain -> Record JSONL."""
    processes: int
    benchmarks: str | None
    length: int
    """Tokens of a row, and at which a record is cut."""
    folder: str
    """Of the process, for what it writes."""


Turn = Callable[[Path], dict[str, Any]]
"""Does the work once, writing into the folder; returns what was made, to be compared between sides."""


def serve(task: Task, parent: Connection) -> None:
    """Set the side up, then do its work whenever the parent says so; ends with the word ``stop``."""
    # Threads in one process for our tokeniser; the other side's processes must not start threads each.
    os.environ[SEPARATE] = "true" if task.side == "ours packing" and task.processes > 1 else "false"
    turn = SIDES[task.side](task)
    parent.send("ready")
    number = 0
    while parent.recv() == "go":
        number += 1
        folder = Path(task.folder) / str(number)
        folder.mkdir(parents=True)
        start = time.perf_counter()
        made = turn(folder)
        parent.send({"seconds": time.perf_counter() - start, **made})
    if task.side == "ours pipeline" and task.processes > 1:
        from qwen_ray import cluster

        cluster.disconnect()


# --- tokenising and packing ------------------------------------------------------------------------


def our_packing(task: Task) -> Turn:
    """What a training run does with its records before the first step."""
    from qwen_ray import models
    from qwen_ray.data.mixture import Mixture
    from qwen_ray.data.packing import RowStream
    from qwen_ray.data.records import read_records
    from qwen_ray.data.tokenise import tokenise

    tokenizer = models.load_tokenizer(models.resolve("tiny"))
    records = [record for file in task.files.values() for record in read_records(Path(file))]

    def turn(folder: Path) -> dict[str, Any]:
        examples, _ = tokenise(records, tokenizer, task.length)
        # One domain, so that a pass is every record once, as on the other side.
        mixture = Mixture({"all": [len(e.ids) for e in examples]}, seed=SEED)
        stream = RowStream({"all": examples}, mixture, max_length=task.length, packing=True)
        rows = [stream.next_row() for _ in range(stream.plan())]
        return {
            "records": sum(len(row.examples) for row in rows),
            "amount": sum(row.tokens for row in rows),
            "supervised": sum(row.supervised for row in rows),
            "rows": len(rows),
        }

    return turn


def trl_packing(task: Task) -> Turn:
    """What SFTTrainer does with its dataset before the first step, by its own method."""
    import datasets
    import torch

    from qwen_ray import models
    from qwen_ray.data.records import read_records

    trl: Any = importlib.import_module("trl")
    datasets.disable_caching()
    datasets.disable_progress_bars()
    ref = models.resolve("tiny")
    tokenizer = models.load_tokenizer(ref)
    rows = []
    for file in task.files.values():
        for record in read_records(Path(file)):
            turns = record.to_dict()["messages"]
            rows.append({"prompt": turns[:-1], "completion": turns[-1:]})
    dataset = datasets.Dataset.from_list(rows)
    config = trl.SFTConfig(
        output_dir=task.folder,
        max_length=task.length,
        packing=True,
        packing_strategy="bfd",
        dataset_num_proc=task.processes if task.processes > 1 else None,
        dataset_kwargs={"skip_prepare_dataset": True},  # not now, but each turn
        completion_only_loss=True,
        bf16=False,
        use_cpu=True,
        report_to="none",
        seed=SEED,
    )
    model = models.load_model(ref, dtype=torch.float32)
    trainer = trl.SFTTrainer(model, config, train_dataset=dataset, processing_class=tokenizer)

    def turn(folder: Path) -> dict[str, Any]:
        packed = trainer._prepare_dataset(dataset, tokenizer, config, True, None, "train")
        made = packed.with_format("arrow")[:]
        labels = made["labels"].combine_chunks()
        documents = made["seq_lengths"].combine_chunks()
        return {
            "records": len(documents.flatten()),
            "amount": len(labels.flatten()),
            "supervised": int((labels.flatten().to_numpy() != -100).sum()),
            "rows": len(packed),
        }

    return turn


# --- the pipeline ----------------------------------------------------------------------------------


def our_pipeline(task: Task) -> Turn:
    """``qwen-ray data prepare`` for each domain, and a mixture of their files."""
    from qwen_ray import cluster
    from qwen_ray.data.mixture import Mixture
    from qwen_ray.data.preparation.prepare import DecontaminateConfig, PrepareConfig, prepare
    from qwen_ray.data.records import read_records

    workers = task.processes if task.processes > 1 else 0
    if workers:
        cluster.connect("local", num_cpus=workers)

    def turn(folder: Path) -> dict[str, Any]:
        amount, domains = 0, {}
        for domain, file in task.files.items():
            config = PrepareConfig(
                domain=domain,
                sources={"file": file},
                out=str(folder / f"{domain}.jsonl"),
                seed=SEED,
                benchmarks=task.benchmarks,
                # What the other side does not do: near matches, near-duplicates.
                decontaminate=DecontaminateConfig(near=None),
                near_duplicates=None,
                workers=workers,
            )
            made = prepare(config)
            amount += made.card["sources"]["file"]["read"]
            domains[domain] = read_records(Path(config.out))
        mixture = Mixture({domain: [1] * len(r) for domain, r in domains.items()}, _even(domains), seed=SEED)
        drawn = [mixture.draw() for _ in range(len(domains) * min(map(len, domains.values())))]
        mixed = [domains[domain][index] for domain, index in drawn]
        return _made(amount, {domain: [r.id for r in rs] for domain, rs in domains.items()}, len(mixed))

    return turn


def hf_pipeline(task: Task) -> Turn:
    """The same by Hugging Face datasets, with our checks and our benchmark index."""
    import datasets

    from qwen_ray.data.decontamination.benchmarks import load_benchmarks
    from qwen_ray.data.decontamination.index import Index

    datasets.disable_caching()
    datasets.disable_progress_bars()
    processes = task.processes if task.processes > 1 else None

    def turn(folder: Path) -> dict[str, Any]:
        items = load_benchmarks(Path(task.benchmarks) if task.benchmarks else None)
        index = folder / "index"
        Index.build(items, near=None).save(index)
        amount, domains = 0, {}
        for domain, file in task.files.items():
            read = datasets.load_dataset(
                "json", data_files=file, split="train", cache_dir=str(folder / "cache"), num_proc=processes
            )
            amount += len(read)
            sound = read.map(
                _sound,
                batched=True,
                num_proc=processes,
                remove_columns=read.column_names,
                fn_kwargs={"domain": domain, "index": str(index)},
            )
            kept = sound.select(_without_repeats(sound)).remove_columns(["question_key", "answer_key"])
            kept.to_json(str(folder / f"{domain}.jsonl"), num_proc=processes, force_ascii=False)
            domains[domain] = kept
        shares = list(_even(domains).values())
        mixed = datasets.interleave_datasets(
            list(domains.values()), probabilities=shares, seed=SEED, stopping_strategy="first_exhausted"
        )
        drawn = sum(len(batch["id"]) for batch in mixed.iter(batch_size=1000))
        return _made(amount, {domain: kept["id"] for domain, kept in domains.items()}, drawn)

    return turn


def _sound(batch: dict[str, list[Any]], domain: str, index: str) -> dict[str, list[Any]]:
    """A map over rows of a Record file: repaired, checked and in no benchmark, with keys to find repeats."""
    from qwen_ray.data.quality import checks as quality
    from qwen_ray.data.quality import duplicates
    from qwen_ray.data.records import Record
    from qwen_ray.data.sources import Found
    from qwen_ray.errors import UserError

    found = []
    for values in zip(*batch.values(), strict=True):
        try:
            record = Record.from_dict(dict(zip(batch, values, strict=True)), where="")
        except UserError:
            continue
        checked = quality.check(Found(record, ""), quality.Limits(), domain)
        if isinstance(checked, Found):
            found.append(checked.record)
    hits = _index(index).hits_batch(found)
    out: dict[str, list[Any]] = {
        key: [] for key in ("id", "messages", "domain", "source", "license", "question_key", "answer_key")
    }
    for record, its_hits in zip(found, hits, strict=True):
        if not any(hit.part in ("question", "passage") for hit in its_hits):
            question, answer = duplicates.keys(record)
            for key, value in (record.to_dict() | {"question_key": question, "answer_key": answer}).items():
                out[key].append(value)
    return out


def _without_repeats(dataset: Any) -> list[int]:
    """One row a question, none where its answers differ."""
    keys = dataset.select_columns(["question_key", "answer_key"]).to_pandas()
    one_answer = keys.groupby("question_key")["answer_key"].transform("nunique") == 1
    kept: list[int] = keys.index[one_answer & ~keys.duplicated("question_key")].tolist()
    return kept


@lru_cache(maxsize=1)
def _index(path: str) -> Any:
    from qwen_ray.data.decontamination.index import Index

    return Index.load(Path(path))


def _even(domains: dict[str, Any]) -> dict[str, float]:
    return {domain: 1 / len(domains) for domain in domains}


def _made(amount: int, ids: dict[str, Any], mixed: int) -> dict[str, Any]:
    """``amount`` is the number of records read."""
    return {
        "amount": amount,
        "kept": {domain: len(names) for domain, names in ids.items()},
        "ids": hashlib.sha256(
            "\n".join(sorted(i for names in ids.values() for i in names)).encode()
        ).hexdigest(),
        "mixed": mixed,
    }


SIDES: dict[str, Callable[[Task], Turn]] = {
    "ours packing": our_packing,
    "trl packing": trl_packing,
    "ours pipeline": our_pipeline,
    "hf pipeline": hf_pipeline,
}

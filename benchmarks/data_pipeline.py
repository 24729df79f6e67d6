"""How fast data is prepared and packed, against Hugging Face datasets and TRL.

Pipeline: read Record JSONL, repair and check each record, look it up in the benchmarks (13-grams), drop
repeats and contradictions, write JSONL, and mix two domains half and half. Ours is ``qwen-ray data prepare``
in one process, and by Ray Data with two workers; theirs is ``datasets.map``, batched, and
``interleave_datasets``, with one process and with two. Both call the same checks and the same index, so what
is compared is what carries the records; near matches are off. Both must keep the same records.

Packing: from records in memory to packed rows with labels on the answer. Ours is what training does before
its first step, on one thread and on two; theirs is SFTTrainer's own preparation (chat template, labels on the
completion, packing by best fit), with one process and with two. Both must give the same
tokens, supervised alike.

Each side is a fresh process; start-up and one turn to warm up are timed apart. The sides then take turns,
A B, B A, ..., and medians are compared. ``pip install .[benchmarks]``, and the data::

    qwen-ray data prepare --domain biology --source openstax_biology=PATH --out data/biology.jsonl
    qwen-ray data prepare --domain mathematics --source gsm8k=PATH --out data/gsm8k.jsonl
    python benchmarks/data_pipeline.py --data data/biology.jsonl data/gsm8k.jsonl --out FILE [--quick]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _common
from _data_sides import SEED, Task, serve

from qwen_ray import models
from qwen_ray.data.decontamination.benchmarks import load_benchmarks
from qwen_ray.data.records import Message, Record, read_records
from qwen_ray.data.tokenise import tokenise
from qwen_ray.fsio import write_jsonl

TURNS, LENGTH, TIMEOUT = 3, 1024, 600
PIPELINE_RECORDS, PACKING_RECORDS = 24_000, 20_000
UNITS = {"pipeline": "records", "packing": "tokens"}
OTHER = {"pipeline": "hf", "packing": "trl"}
SAME = {"pipeline": ("amount", "kept", "ids"), "packing": ("amount", "records", "supervised")}
"""What both sides must have made alike. The amount is what rates are of."""
WHAT = {
    "ours pipeline 1": "qwen-ray data prepare in one process, Mixture",
    "ours pipeline 2": "qwen-ray data prepare by Ray Data, two workers, Mixture",
    "hf pipeline 1": "datasets.map batched, num_proc=None, interleave_datasets",
    "hf pipeline 2": "datasets.map batched, num_proc=2, interleave_datasets",
    "ours packing 1": "tokenise, Mixture, RowStream; one thread",
    "ours packing 2": "tokenise, Mixture, RowStream; two tokeniser threads",
    "trl packing 1": "SFTTrainer._prepare_dataset, bfd, dataset_num_proc=None",
    "trl packing 2": "SFTTrainer._prepare_dataset, bfd, dataset_num_proc=2",
}


class Side:
    """A side's process, from outside."""

    def __init__(self, name: str, task: Task) -> None:
        self.name = name
        self.turns: list[dict[str, Any]] = []
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        started = time.perf_counter()
        self._process = context.Process(target=serve, args=(task, theirs))
        self._process.start()
        theirs.close()
        self._hear()
        self.start_seconds = time.perf_counter() - started
        self.warm_up = self._turn()

    def take_turn(self) -> None:
        self.turns.append(self._turn())

    def stop(self) -> None:
        self._pipe.send("stop")
        self._process.join(TIMEOUT)

    def _turn(self) -> dict[str, Any]:
        self._pipe.send("go")
        turn: dict[str, Any] = self._hear()
        print(f"{self.name}: {turn['seconds']:.2f} s", file=sys.stderr)
        return turn

    def _hear(self) -> Any:
        try:
            if self._pipe.poll(TIMEOUT):
                return self._pipe.recv()
        except EOFError:
            pass
        self._process.kill()
        raise SystemExit(f"{self.name}: it died or hangs; what it said stands above")


def compare(what: str, task: Task, processes: dict[str, tuple[int, ...]], turns: int) -> dict[str, Any]:
    """Both sides of ``what`` with each number of processes: their rates, and that they made the same."""
    sides: dict[str, Side] = {}
    try:
        for who, numbers in processes.items():
            for number in numbers:
                name = f"{who} {what} {number}"
                folder = Path(task.folder) / name.replace(" ", "-")
                settings = replace(task, side=f"{who} {what}", processes=number, folder=str(folder))
                sides[name] = Side(name, settings)
        for turn in range(turns):
            for side in list(sides.values())[:: 1 if turn % 2 else -1]:
                side.take_turn()
    finally:
        for side in sides.values():
            side.stop()
    made = {key: {name: _same(side, key) for name, side in sides.items()} for key in SAME[what]}
    for key, values in made.items():
        if len({str(value) for value in values.values()}) > 1:
            raise SystemExit(f"the sides differ in {key}: {values}")
    amount = next(iter(made["amount"].values()))
    medians = {name: statistics.median(t["seconds"] for t in side.turns) for name, side in sides.items()}
    best = {who: min(v for name, v in medians.items() if name.startswith(who)) for who in processes}
    other = OTHER[what]
    ratios = {f"{what}, best settings": best[other] / best["ours"]}
    for number in sorted(set(processes["ours"]) & set(processes[other])):
        ratio = medians[f"{other} {what} {number}"] / medians[f"ours {what} {number}"]
        ratios[f"{what}, {number} process{'es' if number > 1 else ''}"] = ratio
    return {
        "unit": UNITS[what],
        "made": {key: next(iter(values.values())) for key, values in made.items()},
        "ratios": ratios,
        "sides": {
            name: {
                "what": WHAT[name],
                f"{UNITS[what]}_per_second": amount / medians[name],
                "start_seconds": side.start_seconds,
                "warm_up_seconds": side.warm_up["seconds"],
                "turns": side.turns,
            }
            for name, side in sides.items()
        },
    }


def _same(side: Side, key: str) -> Any:
    """What a side made, the same in every turn."""
    values = [turn[key] for turn in [side.warm_up, *side.turns]]
    if any(value != values[0] for value in values):
        raise SystemExit(f"{side.name} made another {key} each turn: {values}")
    return values[0]


def packing_files(records: list[Record], folder: Path) -> dict[str, str]:
    """Records of one question and one answer, some of it within the row: what both sides can take."""
    single = [r for r in records if [m.role for m in r.messages].count("assistant") == 1]
    _, report = tokenise(single, models.load_tokenizer(models.resolve("tiny")), LENGTH)
    gone = set(report.dropped)
    return _write([r for r in single if r.id not in gone], folder)


def pipeline_files(
    records: list[Record], number: int, folder: Path, benchmarks: str | None
) -> dict[str, str]:
    """``number`` records of two domains, the same of each, with faults for the pipeline to find.

    Where there are too few they come again with a number in the question. Of every hundred, four are repeats,
    one repeats a question with another answer, one has no answer, one is wrongly encoded, one is in a
    benchmark.
    """
    domains: dict[str, list[Record]] = {}
    for record in records:
        domains.setdefault(record.domain, []).append(record)
    if len(domains) < 2:
        raise SystemExit(f"two domains are mixed, the data has {', '.join(domains)}: name another file")
    items = load_benchmarks(Path(benchmarks) if benchmarks else None)
    out: list[Record] = []
    for domain, own in list(domains.items())[:2]:
        for i in range(number // 2):
            record = _again(own[i % len(own)], i // len(own))
            item = items[i % len(items)]
            answer = record.messages[-1].content
            match i % 100:
                case 11 | 36 | 61 | 86:
                    record = replace(out[-1], id=f"{record.id}/repeat")
                case 23:
                    record = _with(out[-1], answer="It is not known.", id=f"{record.id}/contradiction")
                case 47:
                    record = _with(record, answer=" ", id=record.id)
                case 59:
                    record = _with(record, answer=f"It\u00e2\u20ac\u2122s so. {answer}", id=record.id)
                case 73:
                    record = _with(record, question=item.question, answer=item.answer or "-", id=record.id)
            out.append(replace(record, domain=domain))
    return _write(out, folder)


def _again(record: Record, time: int) -> Record:
    if not time:
        return record
    question = f"{record.messages[0].content} (case {time})"
    return _with(record, question=question, answer=record.messages[-1].content, id=f"{record.id}/{time}")


def _with(record: Record, *, answer: str, id: str, question: str | None = None) -> Record:
    asked = record.messages[0].content if question is None else question
    return replace(record, id=id, messages=(Message("user", asked), Message("assistant", answer)))


def _write(records: list[Record], folder: Path) -> dict[str, str]:
    """One file a domain. Not write_records: some are faulty on purpose."""
    files = {}
    for domain in dict.fromkeys(r.domain for r in records):
        path = folder / f"{domain}.jsonl"
        write_jsonl(path, (r.to_dict() for r in records if r.domain == domain))
        files[domain] = str(path)
    return files


def main() -> None:
    args = arguments()
    facts = _common.machine()
    records = [record for file in args.data for record in read_records(file)]
    turns = 1 if args.quick else TURNS
    two: tuple[int, ...] = (1,) if args.quick else (1, 2)
    found, files = {}, {}
    with tempfile.TemporaryDirectory() as name:
        for what in UNITS:
            folder = Path(name) / what
            if what == "pipeline":
                number = 600 if args.quick else PIPELINE_RECORDS
                files = pipeline_files(records, number, folder / "data", args.benchmarks)
                processes = {"ours": (1, 2), "hf": two}
            else:
                number = 400 if args.quick else PACKING_RECORDS
                files = packing_files(records[:: max(1, len(records) // number)][:number], folder / "data")
                processes = {"ours": two, "trl": two}
            task = Task("", files, 1, args.benchmarks, LENGTH, str(folder))
            found[what] = compare(what, task, processes, turns)
    ratio = found["packing"]["ratios"]["packing, best settings"]
    _common.write(
        args.out,
        {
            "name": "data_pipeline",
            "quick": args.quick,
            "headline": {
                "ratio": ratio,
                "what": "tokens/s of tokenising and packing over TRL's, each at its best settings",
            },
            "ratios": {key: value for part in found.values() for key, value in part["ratios"].items()},
            **found,
            "workload": {"files": [path.name for path in args.data], "length": LENGTH, "seed": SEED},
            "machine": facts,
            "versions": _common.versions("qwen-ray", "datasets", "trl", "tokenizers", "transformers", "ray"),
            "commit": _common.commit(),
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", required=True, metavar="FILE", help="Record JSONL")
    parser.add_argument("--benchmarks", metavar="FOLDER", help="looked up besides the embedded suites")
    parser.add_argument("--quick", action="store_true", help="small and short; its figures mean little")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    return parser.parse_args()


if __name__ == "__main__":
    main()

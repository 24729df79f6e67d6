"""How fast our training loop is, against TRL's SFTTrainer and against Hugging Face's Trainer under Ray Train.

All sides train the same models on the same records, tokenised alike with the same tokens supervised, cut at
the same length, in float32 on two threads, with the same AdamW (fused, clipping, constant rate), the same
LoRA, and about the same number of tokens a step. For each side, several settings are tried first (rows or
records a batch, packing, padding-free, batches of similar length, attention implementations), in a process
of its own, and the fastest is measured.

Measured are steady steps: each side is a fresh process that has trained some steps; the sides then
take turns of a few steps each, A B C, C B A, ..., so that a change of the machine's speed meets them all.
Tokens are counted from what enters the model. Set-up, tokenising and packing are not timed. A side's memory
is the highest resident set of its process while it trains, also above what it had when everything was
imported and no model loaded.

Before training, the mean loss of the same records must agree between all sides to 1e-4.

``pip install .[benchmarks]``, and the data (``qwen-ray data sources`` says where their files are)::

    qwen-ray data prepare --domain biology --source openstax_biology=PATH --out data/biology.jsonl
    qwen-ray data prepare --domain mathematics --source gsm8k=PATH --out data/gsm8k.jsonl
    python benchmarks/train_throughput.py --data data/biology.jsonl data/gsm8k.jsonl --out FILE [--quick]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Listener
from pathlib import Path
from typing import Any

import _common
from _train_sides import LENGTH, LORA, RATE, SEED, Setting, Task

TOLERANCE = 1e-4  # nats
TOKENS_A_STEP = {"tiny": 2048, "30m": 1024}
START_SECONDS = 300
RECORDS_USED = 3000
RATIOS = ("over_trl", "over_hf", "ray_over_hf")
METHODS = ("full", "lora")
SIDES = ("ours", "trl", "hf", "ours_ray")
WHAT = {
    "ours": "qwen_ray.training.loop.train in one process",
    "trl": "trl.SFTTrainer in one process",
    "hf": "transformers.Trainer in a ray.train.torch.TorchTrainer worker",
    "ours_ray": "qwen_ray.training.loop.train in a ray.train.torch.TorchTrainer worker",
}
# About 30M parameters, of which the tied embedding of the full vocabulary is 24.3M. Head size, grouping of
# heads and width of the MLP are in the proportions of Qwen2.5-0.5B, as far as whole numbers allow.
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 160,
    "intermediate_size": 864,
    "num_hidden_layers": 12,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def settings(side: str, tokens: int, mean: float) -> list[Setting]:
    """What is tried for a side: about ``tokens`` a step, where a row holds 500 and a record ``mean``."""
    rows, records = tokens // 500, round(tokens / mean)
    if side == "ours":
        return [Setting(n, rows // n, attention="auto") for n in sorted({rows // 2, rows})]
    # Larger batches in random order, and FlashAttention's package, were tried too and were slower or absent.
    half = records // 2
    padded = [Setting(1, records, packing=False)]
    padded += [Setting(n, records // n, packing=False, grouped=True) for n in (half, records)]
    if side == "hf":
        return padded
    return [
        Setting(1, rows),
        Setting(1, rows, attention="eager"),
        Setting(half, 2, packing=False, padding_free=True),
        *padded,
    ]


class Side:
    """A side's process, from outside."""

    def __init__(self, task: Task) -> None:
        Path(task.folder).mkdir(parents=True)
        self.task = task
        self.reports: list[dict[str, Any]] = []
        environment = os.environ | {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
        with open(Path(task.folder) / "log", "w") as log, Listener(task.address, "AF_UNIX") as listener:
            command = [sys.executable, str(Path(__file__).with_name("_train_sides.py")), task.dump()]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            listener._listener._socket.settimeout(START_SECONDS)  # type: ignore[attr-defined]
            try:
                self.pipe = listener.accept()
            except OSError:
                self.fail("it did not start")

    def fail(self, why: str) -> None:
        self.process.kill()
        log = (Path(self.task.folder) / "log").read_text()[-3000:]
        raise SystemExit(f"{self.task.side} with {self.task.model}, {self.task.method}: {why}\n{log}")

    def hear(self) -> dict[str, Any]:
        """The next message of the process."""
        try:
            if not self.pipe.poll(START_SECONDS):
                self.fail("it hangs")
            message: dict[str, Any] = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.fail("it died")
        return message

    def ready(self) -> dict[str, Any]:
        """Wait until the process has warmed up. Returns the loss it began with, or why it failed."""
        found = self.hear()
        return found if "failed" in found else found | self.hear()

    def turn(self) -> dict[str, Any]:
        """Let it train for a turn."""
        self.pipe.send("go")
        message = self.hear()
        if "failed" in message:
            self.fail(message["failed"])
        report: dict[str, Any] = message["turn"]
        self.reports.append(report)
        return report

    def stop(self) -> dict[str, Any]:
        """End it; returns its memory."""
        self.pipe.send("stop")
        return self.hear()

    def close(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


def rate(reports: list[dict[str, Any]], clock: str = "seconds") -> list[float]:
    """Non-padding tokens a second of each turn."""
    return [report["tokens"] / report[clock] for report in reports]


def try_settings(task: Task, turns: int) -> tuple[Setting, list[dict[str, Any]]]:
    """Train a little with each setting, and count its fastest turn; the fastest, and what each did."""
    side = Side(task)
    results: list[dict[str, Any]] = []
    for setting in task.settings:
        found = side.ready()
        if "failed" not in found:
            reports = [side.turn() for _ in range(turns)]
            found |= {
                "tokens_per_second": max(rate(reports)),
                "tokens_per_cpu_second": max(rate(reports, "cpu_seconds")),
            }
            side.stop()
        results.append({"setting": str(setting), **{k: v for k, v in found.items() if k != "ready"}})
        print(f"  {task.side} tried: {results[-1]}", file=sys.stderr)
    side.close()
    speeds = [float(result.get("tokens_per_second", 0.0)) for result in results]
    if not any(speeds):
        raise SystemExit(f"no setting of {task.side} works: {results}")
    # Among equals the first, which has the smallest batch: it takes less memory.
    first = next(i for i, speed in enumerate(speeds) if speed >= 0.97 * max(speeds))
    return task.settings[first], results


def measure(tasks: list[Task], rounds: int) -> dict[str, dict[str, Any]]:
    """All sides in turn, one working at a time, each other round in the opposite order."""
    sides: list[Side] = []
    found: dict[str, dict[str, Any]] = {}
    try:
        for task in tasks:
            side = Side(task)
            sides.append(side)
            found[task.side] = side.ready()
            print(f"  {task.side} has started: {task.settings[0]}", file=sys.stderr)
            if "failed" in found[task.side]:
                side.fail(found[task.side]["failed"])
        for i in range(rounds):
            for side in sides if i % 2 == 0 else reversed(sides):
                side.turn()
        memories = {side.task.side: side.stop() for side in sides}
    finally:
        for side in sides:
            side.close()
    return {
        side.task.side: {
            "setting": str(side.task.settings[0]),
            "tokens_per_second": statistics.median(rate(side.reports)),
            "tokens_per_cpu_second": statistics.median(rate(side.reports, "cpu_seconds")),
            "tokens_a_step": total(side.reports, "tokens") / total(side.reports, "steps"),
            "supervised_share": total(side.reports, "supervised") / total(side.reports, "tokens"),
            "padding_share": 1 - total(side.reports, "tokens") / total(side.reports, "computed"),
            "loss_before": found[side.task.side]["check"],
            "losses": [report["loss"] / report["steps"] for report in side.reports],
            **memories[side.task.side],
            "turns": side.reports,
        }
        for side in sides
    }


def total(reports: list[dict[str, Any]], key: str) -> float:
    return float(sum(report[key] for report in reports))


def compare(sides: dict[str, dict[str, Any]], ours: str, other: str) -> dict[str, float]:
    """Our tokens a second over the other's, of medians and of the extreme pairs of turns; and memory."""
    pairs = [a / b for a, b in zip(rate(sides[ours]["turns"]), rate(sides[other]["turns"]), strict=True)]
    above = {name: sides[name]["peak_bytes"] - sides[name]["baseline_bytes"] for name in (ours, other)}
    return {
        "wall": sides[ours]["tokens_per_second"] / sides[other]["tokens_per_second"],
        "cpu": sides[ours]["tokens_per_cpu_second"] / sides[other]["tokens_per_cpu_second"],
        "wall_lowest_pair": min(pairs),
        "wall_highest_pair": max(pairs),
        "peak_memory": sides[ours]["peak_bytes"] / sides[other]["peak_bytes"],
        "memory_above_imports": above[ours] / above[other],
    }


def write_model(folder: Path) -> dict[str, Any]:
    """The 30M-parameter model with random weights and the embedded tokenizer, whose ids it has room for."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen_ray import models

    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model.save_pretrained(folder)
    models.load_tokenizer(models.resolve("tiny")).save_pretrained(folder)
    return {**SHAPE, "parameters": model.num_parameters()}


def write_data(files: list[Path], out: Path) -> tuple[dict[str, int], float]:
    """Some of the records of all files, drawn at random; returns how many of each domain, and their mean
    length in tokens."""
    from qwen_ray import models
    from qwen_ray.data.formats import load_examples
    from qwen_ray.data.records import write_records
    from qwen_ray.data.tokenise import tokenise

    records = [record for file in files for record in load_examples(file)]
    drawn = random.Random(SEED).sample(records, min(RECORDS_USED, len(records)))
    write_records(out, drawn)
    counts: dict[str, int] = {}
    for record in drawn:
        counts[record.domain] = counts.get(record.domain, 0) + 1
    examples, _ = tokenise(drawn, models.load_tokenizer(models.resolve("tiny")), LENGTH)
    return counts, statistics.fmean(len(e.ids) for e in examples)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny only, few steps, without Ray")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="Record JSONL")
    parser.add_argument("--threads", type=int, default=2, help="of each side's process (2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON result goes")
    args = parser.parse_args()
    if not (args.data and args.out):
        parser.error("--data and --out are required; --help shows how to get the data")
    return args


def main() -> None:
    args = arguments()
    facts = _common.machine()
    began = time.perf_counter()
    compared = SIDES[:2] if args.quick else SIDES
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records, mean = write_data(args.data, folder / "data.jsonl")
        shape = write_model(folder / "30m") if not args.quick else None
        for model in ["tiny"] if args.quick else ["tiny", "30m"]:
            # With the large model a step is nearly all arithmetic, with or without Ray.
            sides = compared[:3] if model == "30m" else compared
            cases |= run_model(args, folder, model, sides, mean)
            work = {**workload(records, shape), "mean_record": mean}
            write_result(args, cases, compared=compared, work=work, facts=facts, began=began)  # so far


def workload(records: dict[str, int], shape: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "records": records,
        "longest_record": LENGTH,
        "models": {"tiny": "the embedded model", "30m": shape},
        "lora": {**LORA, "targets": "all-linear"},
        "optimizer": f"AdamW, fused, constant rate {RATE}, clipped to norm 1",
        "precision": "float32",
    }


def write_result(
    args: argparse.Namespace,
    cases: dict[str, Any],
    *,
    compared: tuple[str, ...],
    work: dict[str, Any],
    facts: dict[str, Any],
    began: float,
) -> None:
    worst = min(cases, key=lambda case: float(cases[case]["over_trl"]["wall"]))
    _common.write(
        args.out,
        {
            "name": "train_throughput",
            "quick": args.quick,
            "headline": {
                "ratio": cases[worst]["over_trl"]["wall"],
                "what": f"TRL's non-padding tokens/s, lowest of {len(cases)} cases ({worst}), wall time",
            },
            "ratios": {
                name: {case: found[name] for case, found in cases.items() if name in found} for name in RATIOS
            },
            "cases": cases,
            "sides": {side: WHAT[side] for side in compared},
            "workload": {**work, "threads": args.threads},
            "seconds": time.perf_counter() - began,
            "machine": facts,
            "versions": _common.versions(
                "qwen-ray", "torch", "ray", "transformers", "peft", "trl", "accelerate", "datasets"
            ),
            "commit": _common.commit(),
        },
    )


def run_model(
    args: argparse.Namespace, folder: Path, model: str, compared: tuple[str, ...], mean: float
) -> dict[str, Any]:
    """Choose each side's setting for one model, by full fine-tuning, and measure it with every method."""
    large = model != "tiny"
    place = str(folder / model) if large else model

    def task(side: str, method: str, settings: list[Setting], warmup: int, turn: int, *, ray: bool) -> Task:
        out = folder / f"{model}-{side}-{method}-{'measured' if ray else 'tried'}"
        data = str(folder / "data.jsonl")
        ray = ray and side in {"hf", "ours_ray"}
        return Task(side, place, method, data, settings, warmup, turn, args.threads, ray, str(out))

    best: dict[str, Setting] = {}
    tried: dict[str, Any] = {}
    for side in compared[:3]:
        choice = settings(side, TOKENS_A_STEP[model], mean)[: 2 if args.quick else None]
        steps = (1, 1) if large or args.quick else (1, 4)
        best[side], tried[side] = try_settings(
            task(side, "full", choice, *steps, ray=False), 1 if large or args.quick else 4
        )
    best["ours_ray"] = best["ours"]
    cases: dict[str, Any] = {}
    for method in METHODS:
        warmup, turn, rounds = (2, 1, 1) if args.quick else (1, 1, 3) if large else (5, 5, 4)
        tasks = [task(side, method, [best[side]], warmup, turn, ray=True) for side in compared]
        sides = measure(tasks, rounds)
        losses = [found["loss_before"] for found in sides.values()]
        if max(losses) - min(losses) > TOLERANCE:
            raise SystemExit(f"{model} {method}: the sides compute different losses: {losses}")
        case = cases[f"{model} {method}"] = {"over_trl": compare(sides, "ours", "trl")}
        if "hf" in sides:
            case["over_hf"] = compare(sides, "ours", "hf")
        if "ours_ray" in sides:
            case["ray_over_hf"] = compare(sides, "ours_ray", "hf")
        case |= {"sides": sides, "tried_with_full": tried}
        shown = {name: round(case[name]["wall"], 2) for name in RATIOS if name in case}
        print(f"{model} {method}: {shown}", file=sys.stderr)
    return cases


if __name__ == "__main__":
    main()

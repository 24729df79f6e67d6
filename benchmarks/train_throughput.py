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
import contextlib
import dataclasses
import importlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _common

SEED = 20
LENGTH = 512  # tokens of a row, and at which a record is cut
CHECKED = 24  # records whose loss all sides must agree on
TOLERANCE = 1e-4  # nats
TOKENS_A_STEP = {"tiny": 2048, "30m": 1024}
RATE = 1e-3
STEPS = 100_000  # never reached
START_SECONDS = 300
RECORDS_USED = 3000
RATIOS = ("over_trl", "over_hf", "ray_over_hf")
# Dropout is PEFT's on every side, and off: it would only take time from what is compared.
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
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


@dataclass(frozen=True)
class Setting:
    """How a side groups records. ``batch`` is rows where records are packed, else records."""

    batch: int
    accumulation: int
    packing: bool = True
    grouped: bool = False
    """Batches of records of similar length."""
    padding_free: bool = False
    """Records of a batch end to end, without packing into rows."""
    attention: str = "sdpa"

    def __str__(self) -> str:
        words = [f"{self.batch} x {self.accumulation} {'rows' if self.packing else 'records'}"]
        words += [name for name in ("packing", "grouped", "padding_free") if getattr(self, name)]
        return ", ".join([*words, self.attention])


def settings(side: str, tokens: int) -> list[Setting]:
    """What is tried for a side: about ``tokens`` a step, where a row holds 500 and a record 190."""
    rows, records = tokens // 500, tokens // 190
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


@dataclass
class Task:
    """What a process is told."""

    side: str
    model: str
    method: str
    data: str
    settings: list[Setting]
    warmup: int
    """Steps before the first turn."""
    turn: int
    """Steps a turn."""
    threads: int
    under_ray: bool
    folder: str
    """Of the process, for whatever it writes."""

    @property
    def address(self) -> str:
        return str(Path(self.folder) / "socket")

    def dump(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Task:
        value = json.loads(text)
        return cls(**{**value, "settings": [Setting(**s) for s in value["settings"]]})


# ---------------------------------------------------------------- inside a side's process


class Stopped(Exception):
    """The parent wants no more steps."""


@dataclass
class Counts:
    steps: int = 0
    tokens: int = 0
    """Without padding."""
    supervised: int = 0
    computed: int = 0
    """With padding."""
    loss: float = 0.0
    """Summed over steps, each the mean of its supervised tokens."""


class Turns:
    """Runs a side's steps when it is its turn, and reports each turn."""

    def __init__(self, task: Task, parent: Connection) -> None:
        self._task, self._parent = task, parent
        self._steps = 0
        self._counts = Counts()
        self._start = self._cpu = 0.0

    def checked(self, loss: float) -> None:
        """The loss of the checked records before the first step; from here on, memory counts."""
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident set so far is forgotten
        self._parent.send({"check": loss})

    def count(self, tokens: int, supervised: int, computed: int) -> None:
        """A micro-batch enters the model."""
        self._counts.tokens += tokens
        self._counts.supervised += supervised
        self._counts.computed += computed

    def step_ended(self, loss: float) -> None:
        """Report a turn that has ended, and wait for the next. Raises :class:`Stopped`."""
        self._steps += 1
        self._counts.steps += 1
        self._counts.loss += loss
        after = self._steps - self._task.warmup
        if after < 0 or after % self._task.turn:
            return
        seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        report = dataclasses.asdict(self._counts) | {"seconds": seconds, "cpu_seconds": cpu}
        self._parent.send({"ready": report} if after == 0 else {"turn": report})
        if self._parent.recv() == "stop":
            raise Stopped
        self._counts = Counts()
        self._start, self._cpu = time.perf_counter(), time.process_time()


def memory(key: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes; from /proc, so Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def side_main(text: str) -> None:
    task = Task.load(text)
    if task.under_ray:
        under_ray(task)
    else:
        serve(task)


def under_ray(task: Task) -> None:
    """Run a side in the one worker of a Ray Train run on a cluster of its own."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from qwen_ray import cluster

    def worker(config: dict[str, Any]) -> None:
        serve(Task.load(config["task"]))

    cluster.connect("local", num_cpus=task.threads)
    try:
        TorchTrainer(
            worker,
            train_loop_config={"task": task.dump()},
            scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": task.threads}),
            run_config=RunConfig(name="side", storage_path=str(Path(task.folder) / "ray")),
        ).fit()
    finally:
        cluster.disconnect()


def serve(task: Task) -> None:
    """Train with each setting, in turns; tell the parent of each and of the memory used."""
    import torch

    torch.set_num_threads(task.threads)
    side = ours if task.side.startswith("ours") else hugging
    with Client(task.address, "AF_UNIX") as parent:
        preload(task.side)
        baseline = memory("VmRSS")
        for setting in task.settings:
            try:
                with contextlib.suppress(Stopped):
                    side(task, setting, Turns(task, parent))
                parent.send({"peak_bytes": memory("VmHWM"), "baseline_bytes": baseline})
            except Exception as e:  # a setting that cannot run here is a result too
                words = str(e).strip().splitlines() or [""]
                parent.send({"failed": f"{type(e).__name__}: {words[0][:300]}"})


def preload(side: str) -> None:
    """Import what the side uses, so that its code is not counted as training's memory."""
    names = ["accelerate", "datasets", "peft", "transformers.models.qwen2.modeling_qwen2"]
    names += {"trl": ["trl.trainer.sft_trainer"], "hf": ["transformers.trainer"]}.get(
        side, ["qwen_ray.training.loop", "qwen_ray.training.strategy.ddp"]
    )
    for name in names:
        importlib.import_module(name)


def examples(task: Task) -> list[Any]:
    """The records as tokens and labels, the same on every side."""
    from qwen_ray import models
    from qwen_ray.data.formats import load_examples
    from qwen_ray.data.tokenise import tokenise

    tokenizer = models.load_tokenizer(models.resolve(task.model))
    return tokenise(load_examples(Path(task.data)), tokenizer, LENGTH)[0]


def ours(task: Task, setting: Setting, turns: Turns) -> None:
    import torch
    from torch import nn

    from qwen_ray.config import build_config
    from qwen_ray.data.packing import collate, pack
    from qwen_ray.training import loop
    from qwen_ray.training.checkpoint import CheckpointStore
    from qwen_ray.training.strategy.ddp import Ddp

    never = 10**9
    out = Path(tempfile.mkdtemp(dir=task.folder))
    config = build_config(
        flags={
            "model.name": task.model,
            "data.train": [task.data],
            "data.validation_fraction": 0.0,
            "data.max_length": LENGTH,
            "data.packing": setting.packing,
            "method.name": task.method,
            "method.r": LORA["r"],
            "method.alpha": LORA["lora_alpha"],
            "method.dropout": LORA["lora_dropout"],
            "optim.learning_rate": RATE,
            "optim.schedule": "constant",
            "optim.warmup_steps": 0,
            "optim.betas": (0.9, 0.999),
            "optim.max_steps": STEPS,
            "optim.batch_size": setting.batch,
            "optim.gradient_accumulation": setting.accumulation,
            "compute.attention": setting.attention,
            "strategy.name": "ddp",
            "cluster.workers": 0,
            "evaluate.every_steps": never,
            "checkpoint.every_steps": never,
            "precision": "fp32",
            "seed": SEED,
            "out": str(out),
        }
    )

    class Watched(Ddp):
        def join(self, module: nn.Module, *args: Any) -> None:
            super().join(module, *args)
            rows = pack(examples(task)[:CHECKED], max_length=LENGTH, packing=setting.packing)
            groups = [rows[i : i + setting.batch] for i in range(0, len(rows), setting.batch)]
            with torch.no_grad():
                nats = sum(float(self.module(collate(group, 0))) for group in groups)
            turns.checked(nats / sum(row.supervised for row in rows))
            self.module.register_forward_pre_hook(
                lambda _, args: turns.count(args[0].tokens, args[0].supervised, args[0].input_ids.numel())
            )

    strategy = Watched(torch.device("cpu"))
    loop.train(
        config,
        strategy=strategy,
        store=CheckpointStore(out / "checkpoints", strategy, keep=1, asynchronous=True),
        on_metrics=lambda row: turns.step_ended(row["loss"]),
    )


def hugging(task: Task, setting: Setting, turns: Turns) -> None:
    """TRL's trainer or transformers' own."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model

    from qwen_ray import models

    trl: Any = importlib.import_module("trl") if task.side == "trl" else None
    ref = models.resolve(task.model)
    tokenizer = models.load_tokenizer(ref)
    model = models.load_model(ref, dtype=torch.float32, attention=setting.attention)
    lora = None
    if task.method == "lora":
        lora = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"input_ids": e.ids, "labels": e.labels} for e in examples(task)]
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=task.folder),
        "per_device_train_batch_size": setting.batch,
        "gradient_accumulation_steps": setting.accumulation,
        "train_sampling_strategy": "group_by_length" if setting.grouped else "random",
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": SEED,
    }

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            turns.step_ended(losses.pop())

    def watched(trainer: type[Any]) -> type[Any]:
        class Watched(trainer):
            def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
                ids, labels = inputs["input_ids"], inputs["labels"]
                mask = inputs.get("attention_mask")
                tokens = ids.numel() if mask is None else int(mask.sum())
                turns.count(tokens, int((labels[:, 1:] != -100).sum()), ids.numel())
                loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
                # Of a micro-batch it is the sum over the step's supervised tokens: they add up to the mean.
                losses[0:] = [sum(losses) + float(loss)]
                return loss

        return Watched

    losses: list[float] = []
    features = rows[:CHECKED]
    if trl:
        config = trl.SFTConfig(
            **common,
            max_length=None if setting.padding_free else LENGTH,
            packing=setting.packing,
            packing_strategy="bfd",
            padding_free=setting.padding_free,
        )
        trainer = watched(trl.SFTTrainer)(
            model,
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[Watching()],
        )
        if setting.packing:
            features = list(trl.pack_dataset(Dataset.from_list(features), LENGTH, "bfd"))
    else:
        trainer = watched(transformers.Trainer)(
            get_peft_model(model, lora) if lora else model,
            transformers.TrainingArguments(**common),
            train_dataset=Dataset.from_list(rows),
            data_collator=transformers.DataCollatorForSeq2Seq(tokenizer),  # pads ids and labels
            callbacks=[Watching()],
        )
        if task.under_ray:
            from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer

            trainer.add_callback(RayTrainReportCallback())
            trainer = prepare_trainer(trainer)
    turns.checked(loss_before(trainer, features, setting.batch))
    trainer.train()


def loss_before(trainer: Any, features: list[dict[str, Any]], size: int) -> float:
    """Mean loss of the checked records, ``size`` at a time, as the trainer computes it."""
    import torch

    total, count = 0.0, 0
    model = trainer.model.eval()
    for i in range(0, len(features), size):
        batch = trainer.data_collator(features[i : i + size])
        supervised = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(trainer.compute_loss(model, dict(batch))) * supervised
        count += supervised
    return total / count


# ---------------------------------------------------------------- the parent


class Side:
    """A side's process, from outside."""

    def __init__(self, task: Task) -> None:
        Path(task.folder).mkdir(parents=True)
        self.task = task
        self.reports: list[dict[str, Any]] = []
        environment = os.environ | {"OMP_NUM_THREADS": str(task.threads), "TOKENIZERS_PARALLELISM": "false"}
        with open(Path(task.folder) / "log", "w") as log, Listener(task.address, "AF_UNIX") as listener:
            command = [sys.executable, __file__, "--side", task.dump()]
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


def try_settings(task: Task) -> tuple[Setting, list[dict[str, Any]]]:
    """Train a little with each setting; the fastest, and what each did."""
    side = Side(task)
    results: list[dict[str, Any]] = []
    for setting in task.settings:
        found = side.ready()
        if "failed" not in found:
            report = [side.turn()]
            found |= {
                "tokens_per_second": rate(report)[0],
                "tokens_per_cpu_second": rate(report, "cpu_seconds")[0],
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


def write_data(files: list[Path], out: Path) -> dict[str, int]:
    """Some of the records of all files, drawn at random; returns how many of each domain."""
    from qwen_ray.data.formats import load_examples
    from qwen_ray.data.records import write_records

    records = [record for file in files for record in load_examples(file)]
    drawn = random.Random(SEED).sample(records, min(RECORDS_USED, len(records)))
    write_records(out, drawn)
    counts: dict[str, int] = {}
    for record in drawn:
        counts[record.domain] = counts.get(record.domain, 0) + 1
    return counts


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny only, few steps, without Ray")
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="Record JSONL")
    parser.add_argument("--threads", type=int, default=2, help="of each side's process (2)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON result goes")
    parser.add_argument("--side", help=argparse.SUPPRESS)  # how the script starts a side's process
    args = parser.parse_args()
    if not args.side and not (args.data and args.out):
        parser.error("--data and --out are required; --help shows how to get the data")
    return args


def main() -> None:
    args = arguments()
    if args.side:
        side_main(args.side)
        return
    facts = _common.machine()
    began = time.perf_counter()
    compared = SIDES[:2] if args.quick else SIDES
    cases: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        records = write_data(args.data, folder / "data.jsonl")
        shape = write_model(folder / "30m") if not args.quick else None
        for model in ["tiny"] if args.quick else ["tiny", "30m"]:
            # With the large model a step is nearly all arithmetic, with or without Ray.
            cases |= run_model(args, folder, model, compared[:3] if model == "30m" else compared)
    worst = min(cases, key=lambda case: float(cases[case]["over_trl"]["wall"]))
    ratio = cases[worst]["over_trl"]["wall"]
    _common.write(
        args.out,
        {
            "name": "train_throughput",
            "quick": args.quick,
            "headline": {
                "ratio": ratio,
                "what": f"TRL's non-padding tokens/s, lowest of {len(cases)} cases ({worst}), wall time",
            },
            "ratios": {
                name: {case: found[name] for case, found in cases.items() if name in found} for name in RATIOS
            },
            "cases": cases,
            "sides": {side: WHAT[side] for side in compared},
            "workload": {
                "records": records,
                "longest_record": LENGTH,
                "models": {"tiny": "the embedded model", "30m": shape},
                "lora": {**LORA, "targets": "all-linear"},
                "optimizer": f"AdamW, fused, constant rate {RATE}, clipped to norm 1",
                "threads": args.threads,
                "precision": "float32",
            },
            "seconds": time.perf_counter() - began,
            "machine": facts,
            "versions": _common.versions(
                "qwen-ray", "torch", "ray", "transformers", "peft", "trl", "accelerate", "datasets"
            ),
            "commit": _common.commit(),
        },
    )


def run_model(
    args: argparse.Namespace, folder: Path, model: str, compared: tuple[str, ...]
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
        choice = settings(side, TOKENS_A_STEP[model])[: 2 if args.quick else None]
        steps = (1, 1) if large or args.quick else (1, 4)
        best[side], tried[side] = try_settings(task(side, "full", choice, *steps, ray=False))
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

"""One side of train_throughput.py, in a process of its own: it trains with a setting, in turns, when told.

``python benchmarks/_train_sides.py TASK``, TASK being JSON; it listens to its parent on a socket.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SEED = 20
LENGTH = 512  # tokens of a row, and at which a record is cut
CHECKED = 24  # records whose loss all sides must agree on
RATE = 1e-3
STEPS = 100_000  # never reached
# Dropout is PEFT's on every side, and off: it would only take time from what is compared.
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}


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


if __name__ == "__main__":
    side_main(sys.argv[1])

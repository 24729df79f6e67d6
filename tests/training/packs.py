"""A small random model, runs of the real loop on it, and packs to hold against them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from qwen_ray import models
from qwen_ray.config import RunConfig, build_config
from qwen_ray.data.records import write_records
from qwen_ray.training import loop, loss, precision
from qwen_ray.training.checkpoint import CheckpointStore
from qwen_ray.training.packed import Pack
from qwen_ray.training.strategy.ddp import Ddp
from tests.conftest import sums

CASES: list[list[str]] = [
    ["method.r=4", "optim.learning_rate=1e-3", "optim.batch_size=2", "data.weights.more=0.5"],
    ["method.r=8", "optim.learning_rate=3e-3", "optim.max_grad_norm=0.05", "seed=1", "method.rslora=true"],
    ["method.r=16", "optim.learning_rate=5e-3", "optim.weight_decay=0.1", "optim.gradient_accumulation=3"],
    ["method.r=4", "method.targets=qv", "optim.learning_rate=1e-2", "data.weights.more=0.8", "seed=2"],
    ["method.r=8", "method.dropout=0.2", "optim.batch_size=3", "optim.gradient_accumulation=2", "seed=3"],
    ["method.r=6", "method.init=orthogonal", "method.targets=[down_proj]", "optim.weight_decay=0.1"],
    ["method.r=16", "method.lora_plus_ratio=4", "optim.betas=[0.8,0.9]", "optim.max_grad_norm=0.1", "seed=4"],
    ["method.r=4", "method.init=gaussian", "method.alpha=6", "data.packing=false", "optim.schedule=linear"],
]  # fmt: skip
STEPS = [4, 5, 6, 4, 5, 6, 5, 4]


def make_model(folder: Path) -> Path:
    """Two layers, with the embedded model's tokenizer; wide enough that nothing is nearly constant."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=2048,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.15,
        )
    )
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(models.resolve("tiny").location) / name, folder / name)
    return folder


@dataclass
class World:
    """A model and data in a folder."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> World:
        make_model(root / "model")
        write_records(root / "data.jsonl", [*sums(50), *sums(30, seed=1, domain="more")])
        return cls(root)

    def config(self, *sets: str, **flags: Any) -> RunConfig:
        every = {
            "model.name": str(self.root / "model"),
            "data.train": [str(self.root / "data.jsonl")],
            "cluster.workers": 0,
            "out": str(self.root),
            **flags,
        }
        settings = [
            "data.max_length=64",
            "data.packing_window=4",
            "data.validation_fraction=0.1",
            "data.weights={sums: 0.5, more: 0.5}",
            "method.dropout=0",
            "optim.batch_size=1",
            "optim.gradient_accumulation=1",
            "optim.warmup_steps=2",
            "optim.max_steps=4",
        ]
        return build_config(flags=every, sets=[*settings, *sets])

    def cases(self) -> list[RunConfig]:
        """Eight runs that differ in rank, layers, rate, clip, decay, data, batch, dropout and length."""
        return [self.config(*sets, f"optim.max_steps={n}") for sets, n in zip(CASES, STEPS, strict=True)]


@dataclass
class Outcome:
    """What a run left: its losses, and its matrices by their names in a PEFT folder."""

    rows: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows]


def store(folder: Path, *, keep: int = 1) -> CheckpointStore:
    return CheckpointStore(folder, Ddp(), keep=keep)


def solo(config: RunConfig, folder: Path, *, keep: int = 1) -> Outcome:
    """A run of the real loop, in one process."""
    rows: list[dict[str, Any]] = []
    loop.train(
        config,
        strategy=Ddp(),
        store=store(folder / "checkpoints", keep=keep),
        on_metrics=rows.append,
        artifact=folder / "adapter",
    )
    return Outcome(rows, load_file(folder / "adapter" / "adapter_model.safetensors"))


def exported(pack: Pack, key: str, folder: Path) -> dict[str, torch.Tensor]:
    pack.export(key, folder)
    return load_file(folder / "adapter_model.safetensors")


def together(
    configs: Sequence[RunConfig],
    folder: Path,
    *,
    at_once: int = 99,
    batched: bool = False,
    pass_tokens: int | None = None,
    order: Callable[[list[int]], list[int]] = list,
    dropped: int | None = None,
) -> list[Outcome]:
    """Train runs in a pack of ``at_once``: who is done leaves, and the next comes in.

    ``dropped``: one that is also trained under another name, and dropped after two steps.
    """
    pack = Pack(configs[0])
    pack.base.batched = batched
    pack.base.pass_tokens = pass_tokens or pack.base.pass_tokens
    waiting = order(list(range(len(configs))))
    if dropped is not None:
        pack.add("dropped", configs[dropped])
    rows: dict[str, list[dict[str, Any]]] = {str(i): [] for i in waiting}
    tensors = {}
    while waiting or pack.slots:
        while waiting and len(pack.slots) < at_once:
            i = waiting.pop(0)
            pack.add(str(i), configs[i])
        for key, row in pack.step().items():
            rows.setdefault(key, []).append(row)
        if len(rows.get("dropped", ())) == 2 and "dropped" in pack.slots:
            pack.remove("dropped")
        for key in [key for key, slot in pack.slots.items() if slot.done]:
            tensors[key] = exported(pack, key, folder / key)
            pack.remove(key)
    return [Outcome(rows[str(i)], tensors[str(i)]) for i in range(len(configs))]


def deviation(ours: Sequence[Outcome], theirs: Sequence[Outcome]) -> tuple[float, float]:
    """The largest difference of a step's loss, in nats, and of a parameter, relative to its matrix."""
    losses, parameters = [0.0], [0.0]
    for a, b in zip(ours, theirs, strict=True):
        assert a.tensors.keys() == b.tensors.keys()
        losses += [abs(x - y) for x, y in zip(a.losses, b.losses, strict=True)]
        for name, value in b.tensors.items():
            difference = (a.tensors[name].double() - value.double()).abs().max()
            parameters.append(float(difference / value.double().abs().max().clamp(min=1e-12)))
    return max(losses), max(parameters)


class _Double(precision.Precision):
    def autocast(self, device: torch.device) -> Any:
        return nullcontext()


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop and pack compute in float64 throughout: also where a model or the loss keeps to float32."""

    def norm(self: Any, states: torch.Tensor) -> torch.Tensor:
        return (
            self.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + self.variance_epsilon)
        )

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = torch.log_softmax(logits, dim=1)
        losses = -scores.gather(1, target)
        grad = scores.exp().scatter_add_(1, target, -torch.ones_like(losses))
        return losses, grad

    monkeypatch.setattr(precision, "choose", lambda *_: _Double(torch.float64, trained=torch.float64))
    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm)
    monkeypatch.setattr(loss, "_cross_entropy", cross_entropy)

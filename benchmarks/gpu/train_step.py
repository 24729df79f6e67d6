"""The training step on one GPU: throughput, MFU and peak memory of Qwen2.5 shapes with random weights.

    python benchmarks/gpu/train_step.py --minutes 20 --out benchmarks/gpu/train_step.json

Needs no Ray, no network and no data. First every attention kernel is compared with float64; a kernel that
is not as exact as its number format fails the run. Then settings are tried in order of interest until the
minutes are used up: each is a whole optimizer step (forward, backward, clipping, AdamW) on rows of 4096
tokens packed from documents as long as those of GSM8K and OpenStax Biology. A setting that does not fit
is a row too. ``--quick`` runs a small shape on the CPU and shows only that the script works.
"""

from __future__ import annotations

import argparse
import gc
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import _common

from qwen_ray.config import RunConfig
from qwen_ray.data.packing import Batch, collate, pack
from qwen_ray.data.tokenise import IGNORE, Example
from qwen_ray.planner import memory as planned
from qwen_ray.planner import programs
from qwen_ray.planner.shapes import QWEN25, Shape, from_config

if TYPE_CHECKING:
    import torch
    from torch import nn

QUANTILES = (
    32, 39, 42, 44, 45, 47, 49, 51, 53, 55, 58, 61, 66, 73, 81, 88, 94, 99, 103, 107, 111, 114, 118, 121, 124,
    128, 131, 135, 138, 142, 146, 149, 153, 157, 161, 165, 170, 174, 180, 185, 190, 196, 202, 209, 217, 226,
    238, 250, 268, 296, 515,
)  # fmt: skip
"""Lengths in tokens of 7,473 GSM8K and 3,406 OpenStax Biology records, every 2%: characters over 3.4 and
4.6 a token, and 24 tokens of chat template."""
SUPERVISED = 0.43
"""Share of their tokens in answers."""
TINY = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True,
}  # fmt: skip
WARM_UP, STEPS, SECONDS = 2, 8, 20.0
"""Steps before the clock starts, and timed steps: at most so many, and no more once they took so long."""


@dataclass(frozen=True)
class Setting:
    """One row of the result."""

    model: str
    method: str = "lora"
    rows: int = 2
    """Rows of ``length`` tokens in a step."""
    checkpointing: bool = False
    offload: bool = False
    compile: bool = False
    loss: str = "chunked"
    attention: str = "auto"
    optimizer: str = "adamw"
    precision: str = "bf16"
    dropout: float = 0.0

    def config(self) -> RunConfig:
        """The same as a run's configuration, for the planner."""
        return RunConfig.model_validate(
            {
                "method": {"name": self.method, "r": 16, "dropout": self.dropout},
                "optim": {"name": self.optimizer, "batch_size": self.rows, "gradient_accumulation": 1},
                "strategy": {"name": "ddp"},
                "compute": {
                    "attention": self.attention,
                    "loss": self.loss,
                    "activation_checkpointing": self.checkpointing,
                    "activation_offload": self.offload,
                    "compile": self.compile,
                },
                "precision": self.precision,
            }
        )


def settings(quick: bool) -> list[Setting]:
    """What is tried, the most telling first."""
    if quick:
        tiny = Setting("tiny", rows=1, precision="fp32")
        return [
            tiny,
            Setting("tiny", method="full", rows=1, checkpointing=True, precision="fp32"),
            Setting("tiny", rows=1, precision="fp32", loss="liger"),  # refused on a CPU: a row too
        ]
    out = []
    for compiled in (True, False):
        for rows, checkpointing in ((2, False), (1, False), (4, True), (2, True)):
            out.append(Setting("7b", rows=rows, checkpointing=checkpointing, compile=compiled))
    out += [
        Setting("7b", rows=2, compile=True, loss="liger"),
        Setting("7b", rows=8, checkpointing=True, compile=True),
        Setting("7b", rows=2, compile=True, dropout=0.05),
        Setting("7b", rows=2, compile=True, attention="documents"),
        Setting("7b", rows=2, offload=True),
        Setting("7b", method="full", rows=1, checkpointing=True, compile=True, precision="pure_bf16"),
        Setting("7b", method="full", rows=2, checkpointing=True, compile=True, precision="pure_bf16",
                optimizer="adamw_8bit"),
    ]  # fmt: skip
    for method in ("lora", "full"):
        for rows, checkpointing in ((2, False), (4, True)):
            out.append(Setting("3b", method=method, rows=rows, checkpointing=checkpointing, compile=True))
    out.append(Setting("3b", rows=2))
    return out


# ---------------------------------------------------------------- data and model


def batches(setting: Setting, shape: Shape, length: int, *, seed: int = 0) -> Iterator[Batch]:
    """Endless micro-batches of best-fit rows, on the CPU. Padded to one size where layers are compiled."""
    rng = random.Random(seed)
    while True:
        examples = []
        for i in range(64 * length // 133):
            place, part = divmod(rng.random() * (len(QUANTILES) - 1), 1)
            low, high = QUANTILES[int(place)], QUANTILES[int(place) + 1]
            count = min(length, round(low + part * (high - low)))
            ids = [rng.randrange(1, shape.vocabulary) for _ in range(count)]
            question = round(count * (1 - SUPERVISED))
            examples.append(Example(str(i), "", ids, [IGNORE] * question + ids[question:]))
        rows = pack(examples, max_length=length, packing=True)
        rng.shuffle(rows)
        for at in range(0, len(rows) - setting.rows + 1, setting.rows):
            pad_to = setting.rows * length if setting.compile else None
            yield collate(rows[at : at + setting.rows], 0, pad_to=pad_to)


def build(setting: Setting, shape: Shape, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The loss around a model with random weights, made on the device, and its optimizer."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen_ray.training import attention, lora, loss, memory, optimizer, precision

    config, numbers = setting.config(), precision.choose(setting.precision, device)
    full = setting.method == "full"
    before = torch.get_default_dtype()
    torch.set_default_dtype(numbers.trained if full else numbers.compute)
    try:
        with device:
            torch.manual_seed(0)
            model: Any = Qwen2ForCausalLM(Qwen2Config(**shape.qwen2))
    finally:
        torch.set_default_dtype(before)
    if not full:
        model = lora.add_adapter(model, config.method, seed=0)
    attention.use(model)
    kind = attention.choose(setting.attention, device, numbers.compute)
    module = loss.TokenLoss(model, attention=kind, loss=loss.choose(setting.loss, device)).to(device)
    if setting.checkpointing:
        memory.checkpoint_layers(model)
    if setting.compile:
        memory.compile_layers(model)
    return module.train(), optimizer.make_optimizer(model, config.optim, config.method)


# ---------------------------------------------------------------- measuring


def attention_errors(device: torch.device) -> dict[str, dict[str, float]]:
    """Relative error (norms) of output and gradients of each kernel against float64, by its definition."""
    import torch

    from qwen_ray.errors import UserError
    from qwen_ray.training import attention

    rng = random.Random(1)
    lengths = [rng.choice(QUANTILES) for _ in range(20)] + [1, 700]
    examples = [Example("", "", [1] * n, [1] * n) for n in lengths]
    batch = collate(pack(examples, max_length=sum(lengths), packing=True), 0).to(device)
    errors: dict[str, dict[str, float]] = {}
    for kind in ("varlen", "documents", "block_mask"):
        for dtype in (torch.float32, torch.bfloat16):
            try:
                chosen = attention.choose(kind, device, dtype)
            except UserError:
                continue
            torch.manual_seed(0)
            inputs = [torch.randn(1, h, batch.tokens, 64, device=device, dtype=dtype) for h in (8, 2, 2, 8)]
            ours = _attend(inputs, attention.Documents.of(batch, chosen))
            exact = _by_definition([x.double() for x in inputs], batch.lengths)
            errors[f"{kind} {str(dtype).removeprefix('torch.')}"] = {
                name: float((a.double() - b).norm() / b.norm())
                for name, a, b in zip(("output", "query", "key", "value"), ours, exact, strict=True)
            }
    return errors


def _attend(inputs: list[torch.Tensor], documents: Any) -> list[torch.Tensor]:
    import torch

    from qwen_ray.training.attention import attention_forward

    *leaves, weight = inputs
    q, k, v = (x.detach().requires_grad_() for x in leaves)
    out, _ = attention_forward(torch.nn.Module(), q, k, v, None, documents=documents, scaling=0.125)
    gradients = torch.autograd.grad((out * weight.transpose(1, 2)).sum(), (q, k, v))
    return [out.detach().transpose(1, 2), *gradients]


def _by_definition(inputs: list[torch.Tensor], lengths: tuple[int, ...]) -> list[torch.Tensor]:
    import torch

    *leaves, weight = inputs
    q, k, v = (x.detach().requires_grad_() for x in leaves)
    wide = [x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (q, k, v)]
    out = []
    for a, b, c in zip(*(x.split(lengths, 2) for x in wide), strict=True):
        scores = a @ b.transpose(-1, -2) * 0.125
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        out.append(scores.masked_fill(later, -torch.inf).softmax(-1) @ c)
    whole = torch.cat(out, 2)
    return [whole.detach(), *torch.autograd.grad((whole * weight).sum(), (q, k, v))]


def measure(setting: Setting, shape: Shape, length: int, device: torch.device) -> dict[str, Any]:
    """Median step of one setting; raises what the setting raises."""
    import torch

    from qwen_ray.planner.hardware import peak_flops
    from qwen_ray.training import memory, precision
    from qwen_ray.training.throughput import Flops, attended_length, hfu, mfu

    cuda = device.type == "cuda"
    numbers = precision.choose(setting.precision, device)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    module, optimizer = build(setting, shape, device)
    trained = [p for p in module.parameters() if p.requires_grad]
    stream = batches(setting, shape, length)
    seconds: list[float] = []
    counts: list[tuple[int, int, int]] = []
    attended: list[float] = []
    losses = []
    while len(seconds) < WARM_UP + STEPS and sum(seconds[WARM_UP:]) < SECONDS:
        host = next(stream)
        batch = host.to(device)
        _wait(device)
        started = time.perf_counter()
        context = memory.offload(device) if setting.offload else _nothing()
        with context, numbers.autocast(device):
            loss = module(batch)
        (loss / batch.supervised).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss.detach()) / batch.supervised)
        counts.append((batch.input_ids.numel(), batch.tokens, batch.supervised))
        attended.append(attended_length(batch.lengths))
    if not all(math.isfinite(x) for x in losses):
        raise FloatingPointError(f"the loss is not finite: {losses}")

    step = statistics.median(seconds[WARM_UP:])
    padded, tokens, supervised = (statistics.mean(c) for c in zip(*counts[WARM_UP:], strict=True))
    flops = Flops.of(_config(shape), setting.config().method)
    mean_length = statistics.mean(attended)
    result: dict[str, Any] = {
        "seconds_per_step": step,
        "first_step_seconds": seconds[0],
        "timed_steps": len(seconds) - WARM_UP,
        "tokens_per_second": tokens / step,
        "supervised_tokens_per_second": supervised / step,
        "padded_tokens_per_second": padded / step,
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
    if peak := peak_flops(torch.cuda.get_device_name()) if cuda else None:
        share = {"length": mean_length, "peak": peak}
        result["mfu_4n"] = mfu(tokens / step, flops, rule="4n", **share) if not flops.full else None
        result["mfu_6n"] = mfu(tokens / step, flops, rule="6n", **share)
        result["hfu"] = hfu(tokens / step, flops, recompute=setting.checkpointing, **share)
    if cuda:
        result["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return result


def predicted_gib(setting: Setting, shape: Shape, length: int) -> dict[str, float]:
    """The planner's peak memory by part, in GiB."""
    memory = planned.predict(shape, programs.ours(setting.config(), shape, 1), setting.rows * length)
    return {name: value / 2**30 for name, value in memory.parts.items()} | {"total": memory.total / 2**30}


def _config(shape: Shape) -> dict[str, Any]:
    return {
        **TINY,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
    }


def _nothing() -> Any:
    from contextlib import nullcontext

    return nullcontext()


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _release(device: torch.device) -> None:
    import torch

    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small shape on the CPU; figures mean little")
    parser.add_argument("--minutes", type=float, default=20, help="no new setting is begun after these")
    parser.add_argument("--only", default="", metavar="TEXT", help="settings whose description contains this")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    args = parser.parse_args()
    import torch

    from qwen_ray.errors import UserError

    if not args.quick and not torch.cuda.is_available():
        raise SystemExit("no GPU was found; --quick runs on the CPU")
    facts = _common.machine()
    device = torch.device("cpu" if args.quick else "cuda")
    length = 512 if args.quick else 4096
    started = time.perf_counter()
    errors = attention_errors(device)
    for name, parts in errors.items():
        allowed = 2e-2 if "bfloat16" in name else 1e-3  # a GPU may multiply float32 in TF32
        if max(parts.values()) > allowed:
            raise SystemExit(f"attention {name} is not exact: {parts}")

    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "name": "gpu_train_step",
        "quick": args.quick,
        "headline": None,
        "attention_relative_error": errors,
        "rows": rows,
        "workload": {"length": length, "document_quantiles": QUANTILES, "supervised": SUPERVISED},
        "machine": facts,
        "versions": _common.versions("qwen-ray", "torch", "transformers", "peft"),
        "commit": _common.commit(),
    }
    for setting in settings(args.quick):
        if args.only not in str(setting) or time.perf_counter() - started > 60 * args.minutes:
            continue
        shape = from_config(TINY) if setting.model == "tiny" else QWEN25[setting.model]
        row: dict[str, Any] = {"setting": asdict(setting)}
        try:
            row["predicted_gib"] = predicted_gib(setting, shape, length)
            row |= measure(setting, shape, length, device)
        except (torch.OutOfMemoryError, UserError, FloatingPointError, RuntimeError) as e:
            row["failed"] = f"{type(e).__name__}: {str(e).splitlines()[0][:300]}"
        _release(device)
        rows.append(row)
        print({k: v for k, v in row.items() if k != "predicted_gib"}, flush=True)
        timed = [r for r in rows if "mfu_6n" in r or (args.quick and "tokens_per_second" in r)]
        lora = [r for r in timed if r["setting"]["method"] == "lora"] or timed
        if lora:
            best = max(lora, key=lambda r: r.get("mfu_4n") or r["tokens_per_second"])
            result["headline"] = {
                "ratio": best.get("mfu_4n") or best["tokens_per_second"],
                "what": "MFU (4N) of the best LoRA setting" if "mfu_4n" in best else "tokens/s (no GPU)",
                "setting": best["setting"],
            }
        _common.write(args.out, result)  # after every row: a run that is cut off leaves what it has


if __name__ == "__main__":
    main()

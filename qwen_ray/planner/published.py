"""Peaks and speeds that others measured and published, with their settings, beside our predictions.

"GB" and "G" of the sources are read as 10^9 bytes, "GiB" as 2^30.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from qwen_ray.config import MethodConfig, RunConfig
from qwen_ray.planner import programs, speed
from qwen_ray.planner.hardware import Hardware, hardware
from qwen_ray.planner.memory import CONTEXT_EAGER, Program, predict
from qwen_ray.planner.shapes import QWEN25, Shape

QWEN_7B = Shape(
    name="Qwen-7B",
    hidden=4096,
    intermediate=11008,
    layers=32,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocabulary=151936,
    tied=False,
    qkv_bias=True,
    fused_qkv=True,
)
QWEN_14B = Shape(
    name="Qwen-14B",
    hidden=5120,
    intermediate=13696,
    layers=40,
    heads=40,
    kv_heads=40,
    head_dim=128,
    vocabulary=152064,
    tied=False,
    qkv_bias=True,
    fused_qkv=True,
)
QWEN_18B = replace(
    QWEN_7B, name="Qwen-1.8B", hidden=2048, intermediate=5504, layers=24, heads=16, kv_heads=16
)
LLAMA32_3B = Shape(
    name="Llama-3.2-3B",
    hidden=3072,
    intermediate=8192,
    layers=28,
    heads=24,
    kv_heads=8,
    head_dim=128,
    vocabulary=128256,
    tied=True,
)
LLAMA31_8B = Shape(
    name="Llama-3.1-8B",
    hidden=4096,
    intermediate=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=128256,
    tied=False,
)
QWEN3_4B = Shape(
    name="Qwen3-4B",
    hidden=2560,
    intermediate=9728,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocabulary=151936,
    tied=True,
    qk_norm=True,
)

_SWIFT = "ms-swift docs/source_en/Megatron-SWIFT/Quick-start.md, examples/megatron/benchmark/deepspeed.sh"
_QWEN = "QwenLM/Qwen README.md, Profiling of Memory and Speed"
_TUNE = "torchtune README.md, Optimization flags"
_TUNE_8B = "torchtune README.md, Memory and training speed"
_PRIME = "prime-rl benchmarks/results/BENCHMARKS.md"
_AUTO = "NeMo Automodel docs/performance-summary.mdx"
_TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md"
_GIB = 2**30 / 1e9


@dataclass(frozen=True)
class Peak:
    """A published peak. ``measured`` in GB (10^9 bytes) of one GPU unless ``gpus`` says it is a sum."""

    setting: str
    source: str
    measured: float
    shape: Shape
    tokens: int
    """In one GPU's forward pass."""
    program: Program
    gpus: int = 1
    unpredicted: str = ""
    """Why the model misses this row by more than the tolerance, if it does."""

    @property
    def predicted(self) -> float:
        """GB, of as many GPUs as ``measured``."""
        return predict(self.shape, self.program, self.tokens).total * self.gpus / 1e9

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def _adapter(shape: Shape, r: int, targets: list[str] | None = None) -> int:
    return shape.adapter(MethodConfig(r=r, targets=targets or "all-linear"))


def _swift() -> list[Peak]:
    shape, rows = QWEN25["14b"], []
    # zero2.json sets buckets of 2e8; in zero3.json they are "auto": hidden size squared.
    for stage, measured, bucket in ((2, 80.0, 2e8), (3, 58.0, 5120.0**2)):
        program = programs.hf_deepspeed(shape, gpus=8, stage=stage, bucket=bucket)
        setting = f"Qwen2.5-14B full, 8 x A800, ZeRO-{stage}, batch 1 x 8192, checkpointing"
        rows.append(Peak(setting, _SWIFT, measured, shape, 8192, program))
    return rows


def _qwen() -> list[Peak]:
    rows = []
    lengths = (256, 512, 1024, 2048, 4096, 8192)
    lora: list[tuple[Shape, str, Callable[..., Program], tuple[float, ...]]] = [
        (QWEN_7B, "LoRA", programs.hf_lora, (20.1, 20.4, 21.5, 23.8, 29.7, 36.6)),
        (QWEN_14B, "LoRA", programs.hf_lora, (34.6, 35.1, 35.3, 37.4, 42.5, 55.2)),
        (QWEN_7B, "QLoRA", programs.hf_qlora_gptq, (11.5, 11.5, 12.3, 13.9, 16.9, 23.5)),
        # First predicted when the model was finished.
        (QWEN_14B, "QLoRA", programs.hf_qlora_gptq, (18.7, 18.4, 18.9, 19.9, 23.0, 27.9)),
        (QWEN_18B, "LoRA", programs.hf_lora, (6.7, 7.4, 8.4, 11.0, 16.2, 21.8)),
        (QWEN_18B, "QLoRA", programs.hf_qlora_gptq, (5.8, 6.0, 6.6, 7.8, 10.2, 15.8)),
    ]
    missed = {("LoRA", 4096), ("QLoRA", 256), ("QLoRA", 512), ("QLoRA", 1024)}
    why = "1 to 3 GB are missing, as in the rows of larger models, of which they are a smaller share."
    for shape, method, make, peaks in lora:
        program = make(shape, adapter=_adapter(shape, 64))
        for length, measured in zip(lengths, peaks, strict=True):
            setting = f"{shape.name} {method} r=64, 1 x A100, batch 1 x {length}, checkpointing"
            reason = why if shape is QWEN_18B and (method, length) in missed else ""
            rows.append(Peak(setting, _QWEN, measured, shape, length, program, unpredicted=reason))
    full = programs.hf_deepspeed(QWEN_7B, gpus=2, stage=3, bucket=4096.0**2, context=CONTEXT_EAGER)
    for length, measured in zip(lengths[:3], (139.2, 148.0, 162.0), strict=True):
        setting = f"{QWEN_7B.name} full, 2 x A100 (their sum), ZeRO-3, batch 1 x {length}, checkpointing"
        rows.append(Peak(setting, _QWEN, measured, QWEN_7B, length, full, gpus=2))
    return rows


def _torchtune() -> list[Peak]:
    shape, tokens = LLAMA32_3B, 2 * 4096
    adapter = _adapter(shape, 64, ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])

    def made(**flags: object) -> Program:
        return programs.torchtune(shape, tokens=tokens, **flags)  # type: ignore[arg-type]

    plain = {"compiled": False, "chunked": False, "checkpointing": False}
    stacked = {"offload": True, "in_backward": True}
    eight_bit = 2 + 2 * 4 / 256
    ladder = [
        ("full, packed", 60.0, made(**plain)),
        ("full, packed, compile", 51.0, made(chunked=False, checkpointing=False)),
        ("full, packed, compile, chunked loss", 42.9, made(checkpointing=False)),
        ("full, the same with checkpointing", 24.9, made()),
        ("full, the same with the update in the backward pass", 23.1, made(in_backward=True)),
        ("full, the same with activation offload", 21.8, made(**stacked)),
        ("full, the same with 8-bit AdamW", 17.6, made(**stacked, optimizer=eight_bit)),
        (
            "LoRA r=64, all of it but the update in the backward pass",
            8.5,
            made(adapter=adapter, offload=True),
        ),
        ("QLoRA r=64, the same", 4.6, made(adapter=adapter, offload=True, base=programs.four_bit(True))),
    ]
    rows = [
        Peak(f"Llama3.2-3B {what}, 1 x A100, batch 2 x 4096", _TUNE, gib * _GIB, shape, tokens, program)
        for what, gib, program in ladder
    ]
    # Alpaca's records, not packed: two of about 300 tokens with the longest of them.
    unpacked = made(**plain)
    rows.insert(
        0, Peak("Llama3.2-3B full, not packed, 1 x A100, batch 2", _TUNE, 25.5 * _GIB, shape, 600, unpacked)
    )
    shape, tokens = LLAMA31_8B, 2 * 2048
    small = _adapter(shape, 8, ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    for what, gib, program in (
        (
            "full, paged 8-bit AdamW in the backward pass",
            18.9,
            programs.torchtune(shape, tokens=tokens, in_backward=True, optimizer=0.0),
        ),
        ("LoRA r=8", 16.2, programs.torchtune(shape, tokens=tokens, adapter=small)),
        (
            "QLoRA r=8",
            7.4,
            programs.torchtune(shape, tokens=tokens, adapter=small, base=programs.four_bit(True)),
        ),
    ):
        setting = f"Llama3.1-8B {what}, 1 x RTX 4090, batch 2 x 2048, compile, checkpointing"
        rows.append(Peak(setting, _TUNE_8B, gib * _GIB, shape, tokens, program))
    return rows


def _prime() -> list[Peak]:
    n = 8
    program = Program(
        name="prime-rl",
        trained=QWEN3_4B.parameters,
        weight=4,
        gradient=4,
        optimizer=8,
        weight_shards=n,
        gradient_shards=n,
        optimizer_shards=n,
        checkpointing=True,
        logits=programs.WHOLE_FLOAT32,
        head=QWEN3_4B.embedding * 2,
        gathered=QWEN3_4B.outside * 2,
        context=0.0,
    )
    why = (
        "The loss at the measured commit is not recorded. Their Qwen3-0.6B grows from 31.7 to 52.8 GiB "
        "from 8k to 16k tokens: 18 bytes a logit, more than the 12 of any cross-entropy whose code we have."
    )
    setting = "Qwen3-4B full, 8 x H100, FSDP, batch 1 x 16384, checkpointing"
    return [Peak(setting, _PRIME, 54.6 * _GIB, QWEN3_4B, 16384, program, unpredicted=why)]


PEAKS = [*_swift(), *_qwen(), *_torchtune(), *_prime()]


@dataclass(frozen=True)
class Rate:
    """A published throughput, in tokens/s of one GPU."""

    setting: str
    source: str
    measured: float
    shape: Shape
    hardware: Hardware
    config: RunConfig

    @property
    def predicted(self) -> float:
        return speed.predict(self.config, self.shape, self.hardware).tokens_per_second / self.hardware.gpus

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1


def run_of(method: str, length: int, rows: int, micro: int, strategy: str = "ddp", **more: Any) -> RunConfig:
    """The run of a published row: ``rows`` of ``length`` tokens at a time, ``micro`` times a step."""
    tree: dict[str, Any] = {
        "method": {"name": method, "r": more.pop("r", 16)},
        "data": {"max_length": length},
        "optim": {"batch_size": rows, "gradient_accumulation": micro},
        "strategy": {"name": strategy, "zero_stage": more.pop("zero_stage", 2)},
        "compute": {"activation_checkpointing": more.pop("checkpointing", False)},
        **more,
    }
    return RunConfig.model_validate(tree)


def _rates() -> list[Rate]:
    h100, a100 = hardware("h100-80gb"), hardware("a100-80gb")
    eight_h100, eight_a100 = hardware("h100-80gb", gpus_per_node=8), hardware("a100-80gb", gpus_per_node=8)
    qwen7, qwen14 = QWEN25["7b"], QWEN25["14b"]
    bf16 = {"precision": "pure_bf16"}
    rows: list[tuple[str, str, float, Shape, Hardware, RunConfig]] = [
        ("Qwen2.5-7B LoRA, 1 x H100", _AUTO, 14110, qwen7, h100, run_of("lora", 4096, 2, 16)),
        ("Llama3-8B LoRA, 1 x H100", _AUTO, 12473, LLAMA31_8B, h100, run_of("lora", 4096, 2, 16)),
    ]
    for stage, measured in ((2, 1588), (3, 1552)):
        config = run_of("full", 8192, 1, 2, "deepspeed", zero_stage=stage, checkpointing=True)
        name = f"Qwen2.5-14B full, 8 x A800, ZeRO-{stage}, checkpointing"
        rows.append((name, _SWIFT, measured, qwen14, eight_a100, config))
    for name, measured, config in (
        ("full, compile", 9174, run_of("full", 4096, 2, 1, **bf16)),
        ("full, compile, checkpointing", 7210, run_of("full", 4096, 2, 1, checkpointing=True, **bf16)),
        ("LoRA r=64, compile, checkpointing", 8210, run_of("lora", 4096, 2, 1, r=64, checkpointing=True)),
        ("QLoRA r=64, compile, checkpointing", 8035, run_of("qlora", 4096, 2, 1, r=64, checkpointing=True)),
    ):
        rows.append((f"Llama3.2-3B {name}, 1 x A100", _TUNE, measured, LLAMA32_3B, a100, config))
    config = run_of("full", 8192, 1, 1, "fsdp")
    rows.append(("Llama3.1-8B full, 8 x H100, FSDP, compile", _TITAN, 6667, LLAMA31_8B, eight_h100, config))
    config = run_of("full", 16384, 1, 2, "fsdp", checkpointing=True)
    rows.append(("Qwen3-4B full, 8 x H100, FSDP, checkpointing", _PRIME, 6215, QWEN3_4B, eight_h100, config))
    for shape, seconds in ((QWEN_7B, 21.3), (QWEN_14B, 36.0)):
        config = run_of("lora", 8192, 1, 8, r=64, checkpointing=True)
        name = f"{shape.name} LoRA r=64, 1 x A100, 8192 tokens, checkpointing"
        rows.append((name, _QWEN, 8 * 8192 / seconds, shape, a100, config))
    return [Rate(*row) for row in rows]


RATES = _rates()

"""Runs on several nodes that others measured and published, beside our predictions."""

from __future__ import annotations

from dataclasses import dataclass

from qwen_ray.config import RunConfig
from qwen_ray.planner import speed
from qwen_ray.planner.hardware import Hardware
from qwen_ray.planner.published import LLAMA31_8B, QWEN_7B, run_of
from qwen_ray.planner.scaling import cluster
from qwen_ray.planner.shapes import QWEN25, Shape

TOLERANCE = 10.0
"""Points of efficiency that a prediction may miss a published row by."""


def _mpt(name: str, hidden: int, layers: int, heads: int) -> Shape:
    # Its MLP has two matrices of h x 4h; three of h x 8h/3 are as many weights. No bias anywhere.
    return Shape(
        name=f"MPT-{name}",
        hidden=hidden,
        intermediate=round(8 * hidden / 3),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=50368,
        tied=True,
    )


MPT = {"3b": _mpt("3B", 2560, 32, 20), "7b": _mpt("7B", 4096, 32, 32), "13b": _mpt("13B", 5120, 40, 40)}
"""llm-foundry's shapes (scripts/train/yamls/pretrain/mpt-*.yaml)."""


@dataclass(frozen=True)
class Run:
    """A published run: tokens/s of one GPU (or in proportion to it), and how it was laid out."""

    measured: float
    hardware: Hardware
    config: RunConfig

    def predicted(self, shape: Shape) -> float:
        """Tokens/s of one GPU."""
        return speed.predict(self.config, shape, self.hardware).tokens_per_second / self.hardware.gpus


@dataclass(frozen=True)
class Step:
    """Two published runs that differ in the number of GPUs, and their efficiency: large rate over small."""

    setting: str
    source: str
    shape: Shape
    small: Run
    large: Run
    unpredicted: str = ""
    """Why the model misses this row by more than the tolerance, if it does."""

    @property
    def measured(self) -> float:
        """Percent."""
        return 100 * self.large.measured / self.small.measured

    @property
    def predicted(self) -> float:
        """Percent."""
        return 100 * self.large.predicted(self.shape) / self.small.predicted(self.shape)

    @property
    def error(self) -> float:
        """Points, predicted less measured."""
        return self.predicted - self.measured


_TITAN = "torchtitan benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
_AUTO = "NeMo Automodel docs/performance-summary.mdx"
_MPT = "llm-foundry scripts/train/benchmarking/README.md"
_QWEN = "QwenLM/Qwen README.md, Profiling of Memory and Speed"


def _series(
    what: str, source: str, shape: Shape, runs: list[tuple[int, Run]], *, why: dict[int, str] | None = None
) -> list[Step]:
    (first, small), *rest = runs
    return [
        Step(f"{what}, {first} to {n} GPUs", source, shape, small, large, (why or {}).get(n, ""))
        for n, large in rest
    ]


def _mpt_series(
    size: str, gpu: str, ports: float, checkpointing: bool, rows: list[tuple[int, float, int, int]]
) -> list[Step]:
    """``rows``: GPUs, tokens/s of one, rows of a micro-batch, micro-batches."""
    why = (
        "The run on 8 GPUs has micro-batches of 4 rows, the others of 10 or more; that a small micro-batch "
        "is slower is not in the model."
    )
    runs = [
        (
            n,
            Run(
                rate,
                cluster(gpu, n, ports),
                run_of("full", 2048, batch, micro, "fsdp", checkpointing=checkpointing),
            ),
        )
        for n, rate, batch, micro in rows
    ]
    small = rows[0][2] < 5 and rows[1][2] >= 10
    what = f"MPT-{size.upper()} full, {gpu}, FSDP"
    return _series(what, _MPT, MPT[size], runs, why={n: why for n, *_ in rows} if small else None)


def _steps() -> list[Step]:
    steps = []
    for what, eight, many in ((", compile", 6667.0, 6514.0), ("", 5762.0, 5605.0)):
        config = run_of("full", 8192, 2, 1, "fsdp")
        runs = [(n, Run(r, cluster("h100-80gb", n, 400e9), config)) for n, r in ((8, eight), (128, many))]
        steps += _series(f"Llama3.1-8B full, h100-80gb, FSDP{what}", _TITAN, LLAMA31_8B, runs)
    h100, a100 = ("h100-80gb", 400e9), ("a100-40gb", 200e9)
    steps += _mpt_series("3b", *h100, False, [(16, 24142, 10, 3), (32, 23021, 6, 3), (64, 22525, 6, 3)])
    steps += _mpt_series(
        "13b", *h100, False, [(8, 4792, 2, 1), (16, 4767, 2, 1), (32, 4811, 2, 1), (64, 4800, 2, 1)]
    )
    steps += _mpt_series(
        "3b",
        *a100,
        False,
        [(8, 10065, 5, 8), (16, 9750, 5, 1), (32, 9914, 6, 1), (64, 9736, 6, 1), (128, 9538, 6, 1)],
    )
    steps += _mpt_series(
        "7b",
        *a100,
        True,
        [(8, 3679, 12, 4), (16, 3645, 16, 1), (32, 3725, 18, 1), (64, 3665, 18, 1), (128, 3623, 18, 1)],
    )
    steps += _mpt_series(
        "13b", *a100, True, [(16, 1993, 10, 1), (32, 1998, 14, 1), (64, 1976, 16, 1), (128, 1972, 16, 1)]
    )
    steps += _mpt_series("13b", *a100, True, [(8, 1668, 4, 16), (16, 1993, 10, 1)])
    # Two GPUs of a tensor-parallel pair gather half a model each, twice as often: as many bytes as here.
    runs = [
        (n, Run(rate, cluster("h100-80gb", n, 400e9), run_of("lora", 4096, 2, micro, "fsdp")))
        for n, rate, micro in ((8, 2250.31, 2), (16, 2072.89, 1))
    ]
    steps += _series("Qwen2.5-32B LoRA, h100-80gb, FSDP and TP 2", _AUTO, QWEN25["32b"], runs)
    for length, one, four in ((1024, 2.8, 5.17), (8192, 21.3, 37.4)):
        config = run_of("lora", length, 1, 8, "deepspeed", r=64, checkpointing=True)
        runs = [
            (n, Run(1 / seconds, cluster("a100-80gb", n, 12.5e9, gpus_per_node=2), config))
            for n, seconds in ((1, one), (4, four))
        ]
        why = (
            "What the step loses grows with the length of the rows, while the gradients exchanged do not: it "
            "is not the exchange. The source names neither the network nor the cause."
        )
        what = f"Qwen-7B LoRA r=64, rows of {length}, a100-80gb, 2 a node, ZeRO-2"
        steps += _series(what, _QWEN, QWEN_7B, runs, why={4: why})
    return steps


STEPS = _steps()


def steps_table() -> str:
    """Published efficiencies beside ours."""
    lines = ["| setting | measured | predicted | error, points | source |", "|---|---|---|---|---|"]
    reasons = list(dict.fromkeys(s.unpredicted for s in STEPS if s.unpredicted))
    for s in STEPS:
        mark = "\\*" * (reasons.index(s.unpredicted) + 1) if s.unpredicted else ""
        lines.append(
            f"| {s.setting} | {s.measured:.1f}% | {s.predicted:.1f}% | {s.error:+.1f}{mark} | {s.source} |"
        )
    notes = ["\\*" * (i + 1) + f": {reason}\n" for i, reason in enumerate(reasons)]
    return "\n".join([*lines, "", *notes]).rstrip()

"""FLOPs by hand and by torch's own counter, and the published run they must reproduce."""

from __future__ import annotations

import pytest
import torch

from qwen_ray.config import MethodConfig
from qwen_ray.planner.hardware import peak_flops
from qwen_ray.training.throughput import Flops, Meter, attended_length, hfu, mfu
from tests.training.test_attention import tiny

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False,
}  # fmt: skip
LORA, FULL = MethodConfig(name="lora", r=16), MethodConfig(name="full")


def test_parameters_of_qwen25_7b() -> None:
    flops = Flops.of(QWEN_7B, LORA)
    vectors = 28 * (2 * 3584 + 3584 + 2 * 512) + 3584  # norms and the biases of q, k and v
    assert flops.embedding + flops.matrices + flops.head + vectors == 7_615_616_512  # the model's card
    assert flops.adapter == 40_370_176  # what PEFT prints for r 16 on all linear layers
    assert Flops.of(QWEN_7B, FULL).adapter == 0


def test_forward_flops_are_what_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("Qwen2")
    model.set_attn_implementation("eager")  # type: ignore[operator]
    length = 64
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, length, dtype=torch.long))
    flops = Flops.of(model.config.to_dict(), FULL)  # type: ignore[union-attr, operator]
    # torch counts the masked half of the scores too.
    assert counter.get_total_flops() == pytest.approx(length * flops.forward(2 * length), rel=0.01)


def test_training_flops_by_rule() -> None:
    lora, full = Flops.of(QWEN_7B, LORA), Flops.of(QWEN_7B, FULL)
    n = lora.matrices + lora.head
    attention = 3 * 2 * 1000 * 28 * 3584
    assert lora.needed(1000, "4n") == 4 * n + 6 * lora.adapter + attention
    assert lora.needed(1000, "6n") == 6 * n + 6 * lora.adapter + attention
    assert full.needed(1000, "6n") == 6 * n + attention
    assert lora.done(1000, recompute=False) == lora.needed(1000, "4n")
    assert full.done(1000, recompute=True) > 1.25 * full.needed(1000, "6n")


def test_the_published_run() -> None:
    """NeMo Automodel's Qwen2.5-7B LoRA r 16 on one H100, sequences of 4096: 14110 tokens/s and 42.8%."""
    peak = peak_flops("NVIDIA H100 80GB HBM3")
    assert peak == 989e12
    flops = Flops.of(QWEN_7B, LORA)
    assert mfu(14110, flops, length=4096, peak=peak, rule="4n") == pytest.approx(0.428, rel=0.04)
    assert hfu(14110, flops, length=4096, peak=peak, recompute=True) > 0.5


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_meter() -> None:
    counts = {"padded": 1000, "tokens": 900, "supervised": 300, "length": 128.0}
    plain = Meter().step(2.0, **counts)  # type: ignore[arg-type]
    assert plain == {
        "tokens_per_second": 450,
        "supervised_tokens_per_second": 150,
        "padded_tokens_per_second": 500,
    }
    flops = Flops.of(QWEN_7B, LORA)
    metrics = Meter(flops, 2 * 989e12).step(2.0, **counts)  # type: ignore[arg-type]
    assert metrics["mfu_4n"] == mfu(450, flops, length=128, peak=2 * 989e12, rule="4n")
    assert metrics["mfu_6n"] > 1.4 * metrics["mfu_4n"]
    assert "mfu_4n" not in Meter(Flops.of(QWEN_7B, FULL), 989e12).step(2.0, **counts)  # type: ignore[arg-type]


def test_attended_length() -> None:
    assert attended_length([10, 30]) == 25
    assert attended_length(()) == 0

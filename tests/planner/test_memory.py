"""Memory and speed: against published measurements, and against what autograd keeps of a real layer."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

from qwen_ray.config import RunConfig
from qwen_ray.planner import memory, programs
from qwen_ray.planner.memory import Saved, predict
from qwen_ray.planner.published import PEAKS, RATES, Peak, Rate
from qwen_ray.planner.shapes import QWEN25, Shape

_PEAKS = [
    pytest.param(
        peak,
        id=peak.setting,
        marks=[pytest.mark.xfail(reason=peak.unpredicted, strict=True)] if peak.unpredicted else [],
    )
    for peak in PEAKS
]


@pytest.mark.parametrize("peak", _PEAKS)
def test_published_peaks_within_15_percent(peak: Peak) -> None:
    print(f"{peak.setting} | {peak.source} | {peak.measured:.1f} | {peak.predicted:.1f} | {peak.error:+.1%}")
    assert abs(peak.error) <= 0.15


def test_no_more_rows_are_missed_than_explained() -> None:
    assert sum(bool(p.unpredicted) for p in PEAKS) == 5
    assert len(PEAKS) >= 54
    typical = sorted(abs(p.error) for p in PEAKS)[len(PEAKS) // 2]
    assert typical <= 0.07


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: rate.setting)
def test_published_speeds_within_35_percent(rate: Rate) -> None:
    assert abs(rate.error) <= 0.35


# ---------------------------------------------------------------- what autograd keeps

_TOKENS = 320  # no width below equals it, so weights are told from activations by their shape


class _Held:
    """A saved tensor, for as long as its graph lives."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _kept(kind: str, hidden: int, intermediate: int, heads: int, kv_heads: int) -> tuple[float, float]:
    """What one Qwen2 layer leaves for its backward pass: bytes a token, and bytes of copies of weights."""
    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=8,
    )
    config._attn_implementation = "sdpa"
    autocast = "autocast" in kind or "lora" in kind
    dtype = torch.float32 if "autocast" in kind else torch.bfloat16
    layer: Any = Qwen2DecoderLayer(config, 0).to(dtype).train()
    if "lora" in kind:
        from peft import LoraConfig, inject_adapter_in_model

        layer.requires_grad_(False)
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        dropout = 0.05 if "dropout" in kind else 0.0
        settings = LoraConfig(r=1, lora_dropout=dropout, use_dora="dora" in kind, target_modules=names)
        inject_adapter_in_model(settings, layer)
        for name, parameter in layer.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    x = torch.randn(1, _TOKENS, hidden, dtype=dtype, requires_grad=True)
    rotary = Qwen2RotaryEmbedding(config)(x.detach(), torch.arange(_TOKENS)[None])
    given = {t.data_ptr() for t in (*rotary, *layer.parameters())}
    run = layer
    if "compiled" in kind:
        torch._dynamo.reset()
        run = torch.compile(layer, backend="aot_eager_decomp_partition")

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out: torch.Tensor = run(x, position_embeddings=rotary, attention_mask=None)
        return out

    if "compiled" in kind:
        forward()  # compiles
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(t: torch.Tensor) -> _Held:
        held = _Held(t)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        out = forward()
    activations: dict[int, int] = {}
    weights: dict[int, int] = {}
    for held in alive:
        t, storage = held.tensor, held.tensor.untyped_storage()
        if t.data_ptr() not in given:
            (activations if _TOKENS in t.shape else weights)[storage.data_ptr()] = storage.nbytes()
    assert out.requires_grad  # and has kept its graph until here
    return sum(activations.values()) / _TOKENS, sum(weights.values())


_SMALL, _WIDE = (256, 512, 4, 2), (256, 1536, 8, 8)
_COUNTED = [
    ("full bf16", memory.FULL_BF16),
    ("full autocast", memory.FULL_AUTOCAST),
    ("lora", memory.LORA),
    ("lora dora", memory.LORA + memory.DORA),
    ("full bf16 compiled", memory.COMPILED),
]


@pytest.mark.parametrize(
    ("kind", "saved", "sizes"),
    [
        *((*counted, sizes) for counted in _COUNTED for sizes in (_SMALL, _WIDE)),
        ("lora compiled", memory.COMPILED_AUTOCAST, _WIDE),
        ("lora dropout compiled", memory.COMPILED_DROPOUT, _SMALL),  # the eager CPU keeps another mask
    ],
)
def test_autograd_keeps_what_is_counted(kind: str, saved: Saved, sizes: tuple[int, int, int, int]) -> None:
    hidden, intermediate, heads, kv_heads = sizes
    shape = Shape("layer", hidden, intermediate, 1, heads, kv_heads, hidden // heads, 8, True)
    assert _kept(kind, *sizes)[0] == pytest.approx(saved.bytes(shape), rel=0.03)


@pytest.mark.parametrize("kind", ["lora dora", "lora dora dropout"])
def test_dora_with_dropout_keeps_a_copy_of_the_weights(kind: str) -> None:
    shape = Shape("layer", 256, 512, 1, 4, 2, 64, 8, True)
    tree = {"method": {"dora": True, "dropout": 0.05 * ("dropout" in kind)}, "strategy": {"name": "ddp"}}
    counted = programs.ours(RunConfig.model_validate(tree), shape, 1).kept_weights
    assert bool(counted) == ("dropout" in kind)
    # Beside them the adapter's own weights and biases in 16 bits.
    assert _kept(kind, *_SMALL)[1] == pytest.approx(counted, abs=0.1 * shape.layer_matrices)


@pytest.mark.parametrize(("inputs", "outputs"), [(1024, 128), (256, 1024)])
@pytest.mark.parametrize("precision", ["bf16", "pure_bf16"])
def test_dora_makes_on_the_side_what_is_counted(inputs: int, outputs: int, precision: str) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    mixed = precision == "bf16"
    layer: Any = torch.nn.Sequential(torch.nn.Linear(inputs, outputs, bias=False)).bfloat16()
    inject_adapter_in_model(LoraConfig(r=1, use_dora=True, target_modules=["0"]), layer.requires_grad_(False))
    for name, parameter in layer.named_parameters():
        if "lora_" in name and mixed:
            parameter.data = parameter.data.float()
    x = torch.randn(1, inputs, dtype=torch.bfloat16)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed)
    with torch.profiler.profile(profile_memory=True) as profile, autocast:
        layer(x)
    results: Any = profile.profiler
    changes = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns()))
    shape = Shape("layer", inputs, outputs, 1, 8, 8, inputs // 8, 8, True)
    tree = {"method": {"dora": True, "targets": ["up_proj"]}, "strategy": {"name": "ddp"}}
    config = RunConfig.model_validate({**tree, "precision": precision})
    assert programs.ours(config, shape, 1).forward_buffers == pytest.approx(max(live), rel=0.03)


# ---------------------------------------------------------------- our loop's parts

_7B = QWEN25["7b"]


def _parts(workers: int = 1, **tree: Any) -> dict[str, float]:
    tree.setdefault("strategy", {"name": "ddp"})
    config = RunConfig.model_validate({"model": {"name": "7b"}, **tree})
    return predict(_7B, programs.ours(config, _7B, workers), config.optim.batch_size * 4096).parts


def _states(parts: dict[str, float]) -> float:
    return (parts["parameters"] + parts["gradients"] + parts["optimizer"]) / _7B.parameters


@pytest.mark.parametrize(
    ("tree", "bytes_a_weight"),
    [
        ({}, 16),
        ({"precision": "pure_bf16"}, 8),
        ({"optim": {"name": "adamw_8bit"}}, 10.03),
        ({"strategy": {"name": "deepspeed", "zero_stage": 1}}, 2 + 2 + 12 / 8),
        ({"strategy": {"name": "deepspeed", "zero_stage": 2}}, 2 + 2 / 8 + 12 / 8),
        ({"strategy": {"name": "deepspeed", "zero_stage": 3}}, 16 / 8),
        ({"strategy": {"name": "fsdp"}}, 16 / 8),
        ({"strategy": {"name": "deepspeed", "zero_stage": 2, "offload_optimizer": "cpu"}}, 2),
    ],
)
def test_states_of_full_training_on_eight_gpus(tree: dict[str, Any], bytes_a_weight: float) -> None:
    assert _states(_parts(8, method={"name": "full"}, **tree)) == pytest.approx(bytes_a_weight, rel=1e-3)


def test_lora_holds_the_base_once_and_qlora_a_quarter() -> None:
    lora, qlora = _parts(), _parts(method={"name": "qlora"})
    adapter = _7B.adapter(RunConfig().method)
    assert lora["parameters"] == _7B.parameters * 2 + adapter * 4
    assert lora["optimizer"] == adapter * 8
    outside = _7B.parameters - _7B.matrices  # embedding, head, norms, biases stay in bf16
    assert qlora["parameters"] == pytest.approx(_7B.matrices * 0.516 + outside * 2 + adapter * 4, rel=1e-3)


def test_a_four_bit_weight_is_as_large_as_bitsandbytes_makes_it() -> None:
    import bitsandbytes

    weight = torch.randn(1024, 1024)
    for double in (False, True):
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=64, compress_statistics=double, quant_type="nf4"
        )
        scales = [state.absmax, *([state.state2.absmax] if double else [])]
        size = packed.nbytes + sum(s.nbytes for s in scales)
        assert programs.four_bit(double) == pytest.approx(size / weight.numel(), rel=1e-3)


def test_logits_do_not_grow_with_the_batch_and_activations_do() -> None:
    one = _parts(optim={"batch_size": 1})
    four = _parts(optim={"batch_size": 4})
    assert one["logits"] == four["logits"]
    assert four["activations"] == pytest.approx(4 * one["activations"])


def test_dora_is_weighed_with_and_without_checkpointing() -> None:
    for remade, layers in ((False, _7B.layers), (True, 1)):
        lora, dora = (
            _parts(
                method={"dora": dora}, optim={"batch_size": 1}, compute={"activation_checkpointing": remade}
            )
            for dora in (False, True)
        )
        more = layers * (memory.DORA.bytes(_7B) * 4096 + 2 * _7B.layer_matrices)
        assert dora["activations"] - lora["activations"] == pytest.approx(more, rel=0.01)
        assert dora["buffers"] - lora["buffers"] > 6 * _7B.intermediate**2


def test_compiled_dropout_keeps_masks() -> None:
    config = RunConfig.model_validate({"strategy": {"name": "ddp"}, "compute": {"compile": True}})
    assert programs.ours(config, _7B, 1).saved == memory.COMPILED_DROPOUT
    config.method.dropout = 0
    assert programs.ours(config, _7B, 1).saved == memory.COMPILED_AUTOCAST


def test_checkpointing_and_offload_move_activations() -> None:
    config = RunConfig.model_validate({"strategy": {"name": "ddp"}, "compute": {"activation_offload": True}})
    plain = _parts(optim={"batch_size": 4})["activations"]
    remade = _parts(optim={"batch_size": 4}, compute={"activation_checkpointing": True})["activations"]
    assert remade < plain / 3
    need = predict(_7B, programs.ours(config, _7B, 1), 4 * 4096)
    assert need.parts["activations"] < plain / 3
    assert need.moved == need.host == pytest.approx(_7B.layers * memory.LORA_DROPOUT.bytes(_7B) * 4 * 4096)

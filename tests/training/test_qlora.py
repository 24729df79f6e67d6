"""QLoRA on the embedded model, through bitsandbytes' CPU kernels: the real 4-bit layers, trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ray import models
from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError
from qwen_ray.fsio import write_json
from qwen_ray.training import lora, quantize

REF = models.resolve("tiny")
IDS = torch.arange(40).reshape(2, 20) * 17 % 2048
CPU = torch.device("cpu")


def method(**settings: Any) -> MethodConfig:
    return MethodConfig(**{"name": "qlora", "r": 8, "alpha": 16, "dropout": 0.0, **settings})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def frozen(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_training_over_four_bits(tmp_path: Path, dtype: torch.dtype, dora: bool, quantization: str) -> None:
    from peft import PeftModel

    settings = method(dora=dora, quantization=quantization)
    base = quantize.load_quantized(REF, settings, dtype, CPU)
    model = lora.add_adapter(base, settings, seed=0)
    before = frozen(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        logits(model)  # a validation between two steps
    assert losses[-1] < 0.8 * losses[0]
    after = frozen(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "base_model.model.model.layers.0.mlp.up_proj.base_layer.weight" in after

    # The adapter is an ordinary one: it loads on the base as published, which it then improves alike.
    lora.export_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(models.load_model(REF, dtype=torch.float32), str(tmp_path))
    tuned = plain.eval()(input_ids=IDS, labels=IDS).loss
    assert float(tuned.detach()) < 0.85 * losses[0]
    again = lora.add_adapter(quantize.load_quantized(REF, settings, dtype, CPU), settings, seed=1)
    lora.load_adapter(again, settings, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_what_is_quantised_and_how() -> None:
    import bitsandbytes as bnb

    model = quantize.load_quantized(REF, method(), torch.bfloat16, CPU)
    four_bit = {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}
    assert len(four_bit) == 4 * 7
    up: Any = four_bit["model.layers.0.mlp.up_proj"]
    assert up.weight.dtype == torch.uint8
    assert up.weight.numel() == 384 * 128 // 2  # two weights a byte
    assert up.weight.quant_state.quant_type == "nf4"
    assert up.weight.quant_state.nested
    others = [p for p in model.parameters() if p.dtype != torch.uint8]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert not any(p.requires_grad for p in model.parameters())
    assert model(input_ids=IDS, output_hidden_states=True).hidden_states[2].dtype == torch.bfloat16
    error = logits(model) - logits(models.load_model(REF, dtype=torch.float32))
    assert 1e-3 < float(error.abs().mean()) < 1.0  # rounded, and still the same model
    single: Any = quantize.load_quantized(
        REF, method(double_quantization=False, quantization="fp4"), torch.float32, CPU
    )
    state = single.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested) == ("fp4", False)


def test_all_linear_means_the_same_layers() -> None:
    plain = lora.target_modules(models.load_model(REF, dtype=torch.float32), method())
    assert lora.target_modules(quantize.load_quantized(REF, method(), torch.float32, CPU), method()) == plain


def test_the_start_is_that_of_lora() -> None:
    settings = method(dora=True)
    over = lora.add_adapter(quantize.load_quantized(REF, settings, torch.float32, CPU), settings, seed=0)
    plain = lora.add_adapter(models.load_model(REF, dtype=torch.float32), settings, seed=0)
    theirs = dict(plain.named_parameters())
    for name, p in over.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            assert torch.equal(p, theirs[name])
        elif "magnitude" in name:  # of the rounded rows
            torch.testing.assert_close(p, theirs[name], rtol=0.05, atol=0)
            assert not torch.equal(p, theirs[name])


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    config = models.model_config(REF)
    write_json(tmp_path / "config.json", {**config, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(UserError, match=r"quantised already \(gptq\)"):
        quantize.load_quantized(models.resolve(str(tmp_path)), method(), torch.float32, CPU)


def test_without_bitsandbytes_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # how Python marks what cannot be imported
    with pytest.raises(UserError, match="not installed") as e:
        quantize.load_quantized(REF, method(), torch.float32, CPU)
    assert e.value.fix == "pip install 'qwen-ray[gpu]'"

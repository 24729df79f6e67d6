"""Merged weights are the base under its adapter, in a folder that needs nothing of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qwen_ray import models
from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, sha256_file, write_json
from qwen_ray.registry import LINEAGE
from qwen_ray.training import lora
from qwen_ray.training.merge import merge

REF = models.resolve("tiny")
IDS = torch.arange(40).reshape(2, 20) * 17 % 2048


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """To 1e-5 of the largest logit."""
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5


def load(folder: Path, dtype: Any = "auto") -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype)


def adapter(folder: Path, *, seed: int = 0, fingerprint: str | None = None, **settings: Any) -> torch.Tensor:
    """A trained adapter with its lineage in ``folder``; returns the logits of base and adapter."""
    config = MethodConfig(**{"r": 4, "alpha": 8, "dropout": 0.0, **settings})
    model = lora.add_adapter(models.load_model(REF, dtype=torch.float32), config, seed=seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(3):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.export_adapter(model, folder)
    write_json(
        folder / LINEAGE, {"base": {"id": "tiny", "fingerprint": fingerprint or models.fingerprint(REF)}}
    )
    plain = PeftModel.from_pretrained(models.load_model(REF, dtype=torch.float32), str(folder))
    return logits(plain)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dora": True},
        {"init": "pissa", "rslora": True},
        {"init": "olora", "dora": True},
        {"targets": ["model.layers.1.mlp.up_proj"]},
    ],
    ids=str,
)
def test_merged_is_base_and_adapter(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = adapter(tmp_path / "a", **settings)
    assert merge("tiny", [(tmp_path / "a", 1.0)], tmp_path / "out", dtype="fp32") == tmp_path / "out"
    assert_equal(logits(load(tmp_path / "out")), expected)
    assert float((expected - logits(load(Path(REF.location)))).abs().max()) > 1e-3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "out"]  # nothing staged is left


def test_the_folder_is_a_whole_model(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    out = merge("tiny", [(tmp_path / "a", 1.0)], tmp_path / "deep" / "out", dtype="bf16")
    assert AutoTokenizer.from_pretrained(str(out)).chat_template == models.load_tokenizer(REF).chat_template
    assert load(out).dtype == torch.bfloat16
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    ref = models.resolve(str(out))
    models.load_tokenizer(ref)
    assert models.fingerprint(ref) != models.fingerprint(REF)
    lineage = read_json(out / LINEAGE)
    assert lineage["base"]["fingerprint"] == models.fingerprint(REF)
    (merged,) = lineage["merged"]
    assert merged["sha256"] == sha256_file(tmp_path / "a" / lora.WEIGHTS)
    assert merged["lineage"]["base"]["id"] == "tiny"


def test_several_add_up_whatever_their_ranks(tmp_path: Path) -> None:
    """As PEFT's own weighted sum of adapters (add_weighted_adapter, cat)."""
    adapter(tmp_path / "a", r=4)
    adapter(tmp_path / "b", seed=1, r=6, rslora=True, init="gaussian", targets=["q_proj", "up_proj"])
    model = PeftModel.from_pretrained(models.load_model(REF, dtype=torch.float32), str(tmp_path / "a"), "a")
    model.load_adapter(str(tmp_path / "b"), "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "both", combination_type="cat")
    model.set_adapter("both")
    out = merge("tiny", [(tmp_path / "a", 0.7), (tmp_path / "b", -0.4)], tmp_path / "out", dtype="fp32")
    assert_equal(logits(load(out)), logits(model))


def test_a_model_in_several_files(tmp_path: Path) -> None:
    expected = adapter(tmp_path / "a")
    parts = tmp_path / "parts"
    load(Path(REF.location)).save_pretrained(str(parts), max_shard_size="500KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    write_json(
        tmp_path / "a" / LINEAGE, {"base": {"fingerprint": models.fingerprint(models.resolve(str(parts)))}}
    )
    out = merge(str(parts), [(tmp_path / "a", 1.0)], tmp_path / "out", dtype="fp32")
    assert_equal(logits(load(out)), expected)
    index = read_json(out / "model.safetensors.index.json")
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for p in out.glob("*.safetensors") for t in load_file(p).values()
    )


def test_a_wrong_adapter_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    adapter(tmp_path / "other", fingerprint="0" * 64)
    adapter(tmp_path / "dora", dora=True)
    adapter(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / lora.WEIGHTS)
    start, head = "base_model.model.model.layers.0.self_attn.q_proj", "base_model.model.lm_head"

    def broken(name: str, changed: dict[str, torch.Tensor], **settings: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        save_file(changed, folder / lora.WEIGHTS)
        config = json.loads((tmp_path / "plain" / lora.CONFIG).read_text())
        write_json(folder / lora.CONFIG, {**config, **settings})
        return folder

    cases: list[tuple[str, list[tuple[Path, float]]]] = [
        ("trained on another base", [(tmp_path / "other", 1.0)]),
        ("DoRA rescales", [(tmp_path / "dora", 0.5)]),
        ("DoRA rescales", [(tmp_path / "plain", 1.0), (tmp_path / "dora", 1.0)]),
        ("cannot have the weight nan", [(tmp_path / "plain", float("nan"))]),
        ("cannot have the weight inf", [(tmp_path / "plain", float("inf"))]),
        ("no adapter", []),
        ("no such file", [(tmp_path, 1.0)]),
        ("not converted", [(broken("pissa", tensors, init_lora_weights="pissa"), 1.0)]),
        ("uses modules_to_save", [(broken("saved", tensors, modules_to_save=["lm_head"]), 1.0)]),
        ("not a LoRA matrix", [(broken("bias", {**tensors, "x.bias": torch.ones(2)}), 1.0)]),
        (
            "not complete",
            [(broken("half", {k: v for k, v in tensors.items() if k != f"{start}.lora_A.weight"}), 1.0)],
        ),
        (
            "NaN",
            [(broken("nan", {**tensors, f"{start}.lora_A.weight": torch.full((4, 128), torch.nan)}), 1.0)],
        ),
        (
            "no weight of that name",
            [(broken("head", {k.replace(start, head): v for k, v in tensors.items()}), 1.0)],
        ),
        (
            "and the adapter makes",
            [(broken("shape", {**tensors, f"{start}.lora_B.weight": torch.ones(96, 4)}), 1.0)],
        ),
    ]  # fmt: skip
    for match, adapters in cases:
        with pytest.raises(UserError, match=match):
            merge("tiny", adapters, tmp_path / "out")
    with pytest.raises(UserError, match="not a format"):
        merge("tiny", [(tmp_path / "plain", 1.0)], tmp_path / "out", dtype="int8")
    with pytest.raises(UserError, match=r"model\.layers\.0\..* infinity in float16"):
        merge("tiny", [(tmp_path / "plain", 1e12)], tmp_path / "out", dtype="fp16")
    with pytest.raises(UserError, match="exists"):
        merge("tiny", [(tmp_path / "plain", 1.0)], tmp_path / "dora")
    assert not any("out" in p.name for p in tmp_path.iterdir())


def test_an_adapter_without_lineage_is_taken_as_it_is(tmp_path: Path) -> None:
    expected = adapter(tmp_path / "a")
    (tmp_path / "a" / LINEAGE).unlink()
    out = merge("tiny", [(tmp_path / "a", 1.0)], tmp_path / "out", dtype="fp32")
    assert_equal(logits(load(out)), expected)
    assert read_json(out / LINEAGE)["merged"][0]["lineage"] is None


def test_by_default_weights_stay_in_the_bases_format(tmp_path: Path) -> None:
    adapter(tmp_path / "a")
    out = merge("tiny", [(tmp_path / "a", 1.0)], tmp_path / "out")
    base = load_file(Path(REF.location) / "model.safetensors")
    merged = load_file(out / "model.safetensors")
    assert {k: (v.dtype, v.shape) for k, v in merged.items()} == {
        k: (v.dtype, v.shape) for k, v in base.items()
    }
    changed = {k for k in base if not torch.equal(base[k], merged[k])}
    assert len(changed) == 4 * 7
    assert all(k.endswith("proj.weight") for k in changed)

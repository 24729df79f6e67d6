"""Adapters of other tools: what TRL, LLaMA-Factory, axolotl and Unsloth leave becomes a version, or is
refused with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, sha256_file, write_json
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.registry.exporting import export_adapter
from qwen_ray.registry.importing import import_adapter, recognise

REF = models.resolve("tiny")
IDS = torch.arange(40).reshape(2, 20) * 17 % 2048
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def base() -> Any:
    return models.load_model(REF, dtype=torch.float32)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the embedded model as PEFT saves it, which changes its answers."""
    folder = tmp_path_factory.mktemp("peft")
    torch.manual_seed(1)
    peft = get_peft_model(
        base(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to change."""
    copy = tmp_path / "out"
    copy.mkdir()
    for name in (CONFIG, WEIGHTS):
        (copy / name).write_bytes((saved / name).read_bytes())
    return copy


def card(base: str, *tags: str) -> str:
    head = "\n".join(["library_name: peft", f"base_model: {base}", "tags:", *(f"- {tag}" for tag in tags)])
    return f"---\n{head}\n---\n\n# Model Card\n"


HUB = "Qwen/Qwen2.5-3B-Instruct"
LEFT: dict[str, tuple[str, dict[str, str | bytes]]] = {
    "trl": (
        "/home/me/models/qwen",
        {
            "README.md": card(
                "/home/me/models/qwen", "base_model:adapter:/home/me/models/qwen", "lora", "sft", "trl"
            ),
            "training_args.bin": b"\x80\x02pickle",
            "tokenizer.json": "{}",
            "chat_template.jinja": "",
            "checkpoint-2/optimizer.pt": b"\x80\x02pickle",
            "checkpoint-2/adapter_model.safetensors": b"older",
        },
    ),
    "llama-factory": (
        HUB,
        {
            "README.md": card(HUB, "base_model:adapter:" + HUB, "llama-factory", "lora"),
            "all_results.json": "{}",
            "trainer_log.jsonl": "{}\n",
            "training_args.bin": b"\x80\x02pickle",
            "training_loss.png": b"\x89PNG",
        },
    ),
    "axolotl": (
        HUB,
        {
            "README.md": card(HUB, "axolotl", "base_model:adapter:" + HUB, "lora"),
            "config.json": '{"model_type": "qwen2"}',
            "tokenizer_config.json": "{}",
        },
    ),
    "unsloth": (
        "unsloth/qwen2.5-3b-instruct-unsloth-bnb-4bit",
        {"README.md": card("unsloth/x", "base_model:adapter:unsloth/x", "lora", "sft", "trl", "unsloth")},
    ),
    "peft": ("", {"README.md": card(HUB, "base_model:adapter:" + HUB, "lora")}),
}


@pytest.mark.parametrize("tool", LEFT)
def test_what_each_tool_leaves_becomes_a_version(tool: str, folder: Path, local: Registry) -> None:
    declared, files = LEFT[tool]
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "base_model_name_or_path": declared})
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert recognise(folder).tool == tool
    assert recognise(folder).others == sorted(files)
    version = import_adapter(local, "bio", folder, base="tiny")
    assert sorted(path.name for path in version.path.iterdir()) == [
        CONFIG, WEIGHTS, "lineage.json", "manifest.json",
    ]  # fmt: skip
    imported = version.lineage["imported"]
    assert (imported["tool"], imported["base"]) == (tool, declared)
    assert imported["files"][WEIGHTS] == sha256_file(folder / WEIGHTS) == sha256_file(version.path / WEIGHTS)
    assert version.lineage["base"]["fingerprint"] == models.fingerprint(REF)
    # No path of another machine, and no 4-bit copy, is left as its base.
    assert read_json(version.path / CONFIG)["base_model_name_or_path"] == REF.location
    assert import_adapter(local, "bio", folder, base="tiny") == version
    assert (
        import_adapter(local, "bio", folder, base="tiny", tool="peft").lineage["imported"]["tool"] == "peft"
    )


def test_signs_of_unsloth_without_a_card(folder: Path) -> None:
    config = read_json(folder / CONFIG)
    write_json(folder / CONFIG, {**config, "auto_mapping": {"unsloth_fixed": True}})
    assert recognise(folder).tool == "unsloth"
    write_json(folder / CONFIG, {**config, "base_model_name_or_path": "unsloth/Qwen2.5-3B"})
    assert recognise(folder).tool == "unsloth"


def _pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def _only_checkpoints(folder: Path) -> None:
    (folder / "checkpoint-10").mkdir()
    (folder / WEIGHTS).rename(folder / "checkpoint-10" / WEIGHTS)


def _whole_model(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def _other_sizes(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    key = next(key for key in tensors if "q_proj.lora_A" in key)
    tensors[key] = torch.zeros(4, 2048)
    save_file(tensors, folder / WEIGHTS)


def _other_layers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key.replace("layers.0.", "layers.99."): t for key, t in tensors.items()}, folder / WEIGHTS)


def _embeddings(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(8, 4)
    save_file(tensors, folder / WEIGHTS)


def _not_a_number(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[min(tensors)][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def _prompt_tuning(folder: Path) -> None:
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), "peft_type": "PROMPT_TUNING"})


@pytest.mark.parametrize(
    ("spoil", "what", "fix"),
    [
        (_pickle, "pickle file", "save_pretrained"),
        (_only_checkpoints, "folders below", "checkpoint-10"),
        (_whole_model, "whole model", "serve it"),
        (_other_sizes, "does not fit tiny", "--base"),
        (_other_layers, "no such weight", "--base"),
        (_embeddings, "not a LoRA matrix", "save_embedding_layers=False"),
        (_not_a_number, "NaN", "train it again"),
        (_prompt_tuning, "only LoRA is served", "merge"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_cannot_be_served_is_refused(
    spoil: Any, what: str, fix: str, folder: Path, local: Registry
) -> None:
    spoil(folder)
    with pytest.raises(UserError, match=what) as e:
        import_adapter(local, "bio", folder, base="tiny")
    assert fix in e.value.fix
    assert local.names() == []


def test_unknown_tool_and_base(folder: Path, local: Registry) -> None:
    with pytest.raises(UserError, match="no known tool"):
        import_adapter(local, "bio", folder, base="tiny", tool="torchtune")
    with pytest.raises(UserError, match="unknown model"):
        import_adapter(local, "bio", folder, base="tinny")
    with pytest.raises(UserError, match="no such adapter folder"):
        import_adapter(local, "bio", folder / "none", base="tiny")


def test_exported_as_peft_and_merged(folder: Path, registry: Registry, tmp_path: Path) -> None:
    version = import_adapter(registry, "bio", folder, base="tiny")
    want = logits(PeftModel.from_pretrained(base(), str(folder)))
    assert (want - logits(base())).abs().max() > 0.1
    out = export_adapter(registry, version, tmp_path / "peft")
    assert sorted(path.name for path in out.iterdir()) == [CONFIG, WEIGHTS, "lineage.json"]
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), str(out))), want, atol=0, rtol=0)
    merged = export_adapter(registry, version, tmp_path / "merged", form="merged")
    model = models.load_model(models.resolve(str(merged)), dtype=torch.float32)
    # The weights are rounded to the format that the base is stored in.
    torch.testing.assert_close(logits(model), want, atol=0.02, rtol=0)
    for form in ("peft", "merged"):
        with pytest.raises(UserError, match="exists"):
            export_adapter(registry, version, out, form=form)
    with pytest.raises(UserError, match="no format"):
        export_adapter(registry, version, tmp_path / "gguf", form="gguf")


def test_an_engine_loads_it_wherever_the_registry_is(folder: Path, registry: Registry) -> None:
    from qwen_ray.serving.adapters import AdapterStore
    from qwen_ray.serving.engines.torch import TorchEngine
    from qwen_ray.serving.model_id import parse

    import_adapter(registry, "bio", folder, base="tiny")
    registry.point("bio", PRODUCTION, 1, reason="first")
    engine = TorchEngine.load(REF, threads=1)
    store = AdapterStore(engine, registry=Registry(registry.location))
    with store.use(parse("tiny:bio")) as used, engine.lora.select([used.key] * 2):
        assert used.name == "bio@1"
        want = logits(PeftModel.from_pretrained(base(), str(folder)))
        torch.testing.assert_close(logits(engine.model), want, atol=1e-4, rtol=0)


def test_damaged_versions_are_not_exported(folder: Path, registry: Registry, tmp_path: Path) -> None:
    version = import_adapter(registry, "bio", folder, base="tiny")
    weights = version.path / WEIGHTS
    weights.write_bytes(bytes([*weights.read_bytes()[:-1], 7]))
    for form in ("peft", "merged"):
        with pytest.raises(UserError, match="damaged"):
            export_adapter(registry, version, tmp_path / "exported", form=form)
    assert not (tmp_path / "exported").exists()


def test_a_run_of_trl_registers_and_is_served_as_it_is(local: Registry, tmp_path: Path) -> None:
    """Plain TRL and PEFT, no code of ours: its adapter's logits are the engine's."""
    trl = pytest.importorskip("trl", reason="trl is not installed (the benchmarks extra)")
    from datasets import Dataset

    from qwen_ray.serving.engines.torch import TorchEngine

    rows = [{"prompt": f"What is {n} plus 1? ", "completion": f"{n + 1}"} for n in range(8)]
    trainer = trl.SFTTrainer(
        str(REF.location),
        trl.SFTConfig(
            str(tmp_path / "trl"), max_steps=2, save_steps=1, per_device_train_batch_size=4,
            learning_rate=0.05, warmup_steps=0, lr_scheduler_type="constant", use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", disable_tqdm=True, dataset_num_proc=None,
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    out = tmp_path / "trl"
    assert recognise(out).tool == "trl"
    assert any(name.startswith("checkpoint-1/") for name in recognise(out).others)
    version = import_adapter(local, "sums", out, base="tiny")
    local.point("sums", PRODUCTION, 1, reason="trained with TRL")
    want = logits(PeftModel.from_pretrained(base(), str(out)))
    assert (want - logits(base())).abs().max() > 0.1
    engine = TorchEngine.load(REF, threads=1)
    engine.check_lineage(version.path)
    engine.add_adapter("sums", engine.read_adapter(version.path, within=local.root))
    with engine.lora.select(["sums"] * 2):
        torch.testing.assert_close(logits(engine.model), want, atol=1e-4, rtol=0)

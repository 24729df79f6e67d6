"""Adapters: the same start everywhere, and files that fit the original base whatever the start was."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.tensor import DTensor

from qwen_ray import models
from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError
from qwen_ray.training import lora

REF = models.resolve("tiny")
INITS = ["default", "gaussian", "orthogonal", "pissa", "olora"]
VARIANTS = [(init, dora) for init in INITS for dora in (False, True)]
IDS = torch.arange(40).reshape(2, 20) * 17 % 2048


def base(dtype: torch.dtype = torch.float32) -> Any:
    return models.load_model(REF, dtype=dtype)


def method(**settings: Any) -> MethodConfig:
    return MethodConfig(**{"r": 4, "alpha": 8, "dropout": 0.0, **settings})


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def train(model: Any, steps: int = 4) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(steps):
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ---------------------------------------------------------------- how it starts


@pytest.mark.parametrize(("init", "dora"), VARIANTS)
def test_a_model_made_layer_by_layer_starts_as_one_wrapped_whole(init: str, dora: bool) -> None:
    settings = method(init=init, dora=dora)
    torch.manual_seed(0)
    whole = lora.add_adapter(base(), settings, seed=3)
    weights = base().state_dict()
    torch.manual_seed(1)  # what else was drawn must not matter
    original = base()
    with torch.device("meta"):
        model = type(original)(original.config)
    wrapped = lora.add_adapter(model, settings, seed=3, initialise=False)
    adapters = [p for name, p in wrapped.named_parameters() if "lora_" in name]
    assert adapters
    assert all(p.is_meta and p.requires_grad for p in adapters)
    for i in reversed(range(4)):
        layer = model.model.layers[i]
        for name, module in layer.named_modules(prefix=f"model.layers.{i}"):
            for key in [k for k, p in module._parameters.items() if p is not None and "lora_" not in name]:
                value = weights[f"{name}.{key}".replace(".base_layer.", ".")]
                module._parameters[key] = nn.Parameter(value.clone(), requires_grad=False)
        lora.initialise_adapter(layer, settings, seed=3, prefix=f"model.layers.{i}")
    expected = {k: v for k, v in state(whole).items() if ".layers." in k}
    assert same({k: v for k, v in state(wrapped).items() if ".layers." in k}, expected)


def test_the_start_depends_on_seed_and_layer_and_on_nothing_else() -> None:
    settings = method()
    before = torch.get_rng_state()
    first = state(lora.add_adapter(base(), settings, seed=0))
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(7)
    assert same(first, state(lora.add_adapter(base(), settings, seed=0)))
    # Fewer layers, each begins as it did.
    fewer = state(lora.add_adapter(base(), method(targets=["v_proj"]), seed=0))
    shared = [k for k in fewer if "lora_A" in k]
    assert len(shared) == 4
    assert all(torch.equal(fewer[k], first[k]) for k in shared)
    assert len({tuple(fewer[k].flatten().tolist()) for k in shared}) == 4
    other = state(lora.add_adapter(base(), settings, seed=1))
    assert not any(torch.equal(other[k], first[k]) for k in first if "lora_A" in k)


def test_in_place_and_in_bfloat16() -> None:
    """Parameters that exist are written to; the adapter's format does not follow the base's."""
    settings = method(init="gaussian", dora=True)
    model = lora.add_adapter(base(torch.bfloat16), settings, seed=0)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    expected, parameters = state(model), dict(model.named_parameters())
    with torch.no_grad():
        for name, p in parameters.items():
            if "lora_" in name:
                p.fill_(7.0)
    lora.initialise_adapter(model, settings, seed=0)
    assert same(expected, state(model))
    assert all(p is parameters[name] for name, p in model.named_parameters())
    narrow = lora.add_adapter(base(torch.bfloat16), settings, seed=0, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    key = "base_model.model.model.layers.2.mlp.up_proj.lora_A.default.weight"
    assert torch.equal(state(narrow)[key], expected[key].bfloat16())


@pytest.mark.parametrize("init", INITS)
def test_the_distribution_is_pefts(init: str) -> None:
    """Against PEFT's own initialisation: the same numbers where it draws none, else the same moments."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    theirs = get_peft_model(
        base(),
        LoraConfig(
            r=4,
            lora_alpha=8,
            init_lora_weights=True if init == "default" else init,
            target_modules=["gate_proj", "down_proj"],
        ),
    )
    ours = lora.add_adapter(base(), method(init=init, targets=["gate_proj", "down_proj"]), seed=0)
    a, b = state(ours), state(theirs)
    assert a.keys() == b.keys()
    for name in a:
        if "lora_" not in name:
            torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)  # W, or what is left of it
        elif init in lora.CHANGES_BASE:
            torch.testing.assert_close(a[name].abs(), b[name].abs(), atol=2e-3, rtol=2e-3)  # but for signs
    layer = "base_model.model.model.layers.0.mlp.gate_proj.lora_{}.default.weight"
    halves = [a[layer.format(half)] for half in "AB"]
    if init not in lora.CHANGES_BASE:
        assert float((halves[1] @ halves[0]).abs().max()) < 1e-6
        for half in "AB":
            drawn, other = (
                torch.cat([v.flatten() for k, v in x.items() if f"lora_{half}" in k]) for x in (a, b)
            )
            assert float(drawn.std()) == pytest.approx(float(other.std()), rel=0.05)
    assert bool(halves[1].any()) == (init not in ("default", "gaussian"))


@pytest.mark.parametrize(("init", "dora"), VARIANTS)
def test_it_changes_nothing_at_first(init: str, dora: bool) -> None:
    model = lora.add_adapter(base(), method(init=init, dora=dora, rslora=True), seed=0)
    torch.testing.assert_close(logits(model), logits(base()), atol=2e-4, rtol=1e-4)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 * 7 * (3 if dora else 2)
    assert all("lora_" in name for name in trained)


def test_a_rank_that_has_no_factors_is_refused() -> None:
    with pytest.raises(UserError, match="takes 65 components") as e:
        lora.add_adapter(base(), method(r=65, init="pissa"), seed=0)
    assert e.value.fix == "at most 64"


def _ranks(rank: int, port: int, expected: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    settings = method(init="orthogonal", dora=True)
    model = lora.add_adapter(base(), settings, seed=5, initialise=False)
    for i, layer in enumerate(model.get_base_model().model.layers):
        if i % 2:  # sharded after, and before
            lora.initialise_adapter(layer, settings, seed=5, prefix=f"model.layers.{i}")
            fully_shard(layer)
        else:
            fully_shard(layer)
            for module in layer.modules():
                for key, p in list(module._parameters.items()):
                    if p is not None and p.is_meta:
                        empty = torch.empty_like(p, device="cpu")
                        module._parameters[key] = nn.Parameter(empty, requires_grad=p.requires_grad)
            lora.initialise_adapter(layer, settings, seed=5, prefix=f"model.layers.{i}")
    whole = {
        name: p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        for name, p in model.named_parameters()
    }
    assert sum(isinstance(p, DTensor) for p in model.parameters()) > 80
    assert same(whole, torch.load(expected))
    dist.destroy_process_group()


def test_shards_start_as_the_whole(tmp_path: Path) -> None:
    model = lora.add_adapter(base(), method(init="orthogonal", dora=True), seed=5)
    torch.save(state(model), tmp_path / "expected.pt")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_ranks, (port, tmp_path / "expected.pt"), nprocs=2)


# ---------------------------------------------------------------- how it leaves


@pytest.mark.parametrize(("init", "dora"), VARIANTS)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_adapter_fits_the_original_base(
    tmp_path: Path, init: str, dora: bool, rslora: bool
) -> None:
    from peft import PeftModel

    model = lora.add_adapter(base(), method(init=init, dora=dora, rslora=rslora), seed=0)
    train(model)
    live = logits(model)
    assert float((live - logits(base())).abs().max()) > 0.1
    lora.export_adapter(model, tmp_path)
    plain = PeftModel.from_pretrained(base(), str(tmp_path))
    torch.testing.assert_close(logits(plain), live, atol=5e-4, rtol=1e-4)
    settings = json.loads((tmp_path / lora.CONFIG).read_text())
    assert settings["init_lora_weights"] is True
    assert settings["target_modules"] == sorted(
        settings["target_modules"]
    )  # a set: in another order each run
    assert settings["r"] == (8 if init in lora.CHANGES_BASE else 4)


@pytest.mark.parametrize("init", INITS)
def test_it_is_served(tmp_path: Path, init: str) -> None:
    from qwen_ray.serving.lora_weights import read_lora
    from qwen_ray.serving.multilora import MultiLora

    model = lora.add_adapter(base(), method(init=init, rslora=True), seed=0)
    train(model)
    lora.export_adapter(model, tmp_path)
    served = base()
    engine = MultiLora(served)
    engine.add("a", read_lora(tmp_path))
    with torch.no_grad(), engine.select(["a", None]):
        mixed = served(input_ids=IDS).logits
    torch.testing.assert_close(mixed[0], logits(model)[0], atol=5e-4, rtol=1e-4)
    torch.testing.assert_close(mixed[1], logits(base())[1], atol=1e-5, rtol=1e-5)


def test_dora_is_refused_by_the_server_in_words(tmp_path: Path) -> None:
    from qwen_ray.serving.lora_weights import read_lora

    lora.export_adapter(lora.add_adapter(base(), method(dora=True), seed=0), tmp_path)
    with pytest.raises(UserError, match="uses DoRA, which is not served"):
        read_lora(tmp_path)


@pytest.mark.parametrize(("init", "dora"), VARIANTS)
def test_what_was_exported_goes_on_bit_for_bit(tmp_path: Path, init: str, dora: bool) -> None:
    settings = method(init=init, dora=dora)
    model = lora.add_adapter(base(torch.bfloat16), settings, seed=0)
    train(model)
    lora.export_adapter(model, tmp_path / "a")
    again = lora.add_adapter(base(torch.bfloat16), settings, seed=9, initialise=False)
    lora.load_adapter(again, settings, tmp_path / "a")
    assert same(state(again), state(model))
    lora.export_adapter(again, tmp_path / "b")
    for file in (lora.WEIGHTS, lora.CONFIG):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_gathered_weights_are_exported_in_the_models_place(tmp_path: Path) -> None:
    model = lora.add_adapter(base(), method(dora=True), seed=0)
    train(model)
    gathered = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    lora.export_adapter(model, tmp_path / "a")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    lora.export_adapter(model, tmp_path / "b", weights=gathered)
    assert (tmp_path / "a" / lora.WEIGHTS).read_bytes() == (tmp_path / "b" / lora.WEIGHTS).read_bytes()


def test_another_machines_factors_are_restored_not_recomputed(tmp_path: Path) -> None:
    settings = method(init="pissa")
    model = lora.add_adapter(base(), settings, seed=0)
    saved = lora.initial_state(model)
    assert len(saved) == 4 * 7 * 2
    flipped = {key: -value for key, value in saved.items()}  # as good a factorisation
    with pytest.raises(RuntimeError, match="came out otherwise"):
        lora.restore_initial(model, flipped)
    lora.restore_initial(model, saved)  # the same: nothing happens
    fresh = lora.add_adapter(base(), settings, seed=0, initialise=False)
    lora.restore_initial(fresh, flipped)
    left = {k: v for k, v in state(model).items() if "lora_" not in k}
    assert all(torch.equal(dict(fresh.named_parameters())[k], v) for k, v in left.items())
    with pytest.raises(RuntimeError, match="initialised before"):
        lora.initialise_adapter(model, settings, seed=0)
    assert lora.initial_state(lora.add_adapter(base(), method(), seed=0)) == {}


def test_an_adapter_of_another_shape_is_not_loaded(tmp_path: Path) -> None:
    lora.export_adapter(lora.add_adapter(base(), method(), seed=0), tmp_path)
    for settings in (method(r=8), method(targets="qv"), method(dora=True)):
        with pytest.raises(RuntimeError, match="does not fit the model"):
            lora.load_adapter(lora.add_adapter(base(), settings, seed=0), settings, tmp_path)


# ---------------------------------------------------------------- which layers


def test_targets() -> None:
    model = base()
    every = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    first = "model.layers.0.self_attn.q_proj"

    def names(targets: Any) -> list[str]:
        return lora.target_modules(model, method(targets=targets))

    assert names("all-linear") == every
    assert names("qv") == ["q_proj", "v_proj"]
    assert names(["o_proj", "self_attn.k_proj"]) == ["k_proj", "o_proj"]
    assert names([first]) == [first]
    assert names([r".*layers\.[01]\..*\.v_proj"]) == [f"model.layers.{i}.self_attn.v_proj" for i in (0, 1)]
    assert names([r".*_proj"]) == every
    trained = lora.add_adapter(base(), method(targets=[first]), seed=0)
    assert {n for n, p in trained.named_parameters() if p.requires_grad} == {
        f"base_model.model.{first}.lora_{half}.default.weight" for half in "AB"
    }
    for wrong in ("q_porj", "model.layers.9.self_attn.q_porj", r".*\.q_porj"):
        with pytest.raises(UserError, match="no linear layer") as e:
            names([wrong])
        assert e.value.fix == "did you mean 'q_proj'?"
    with pytest.raises(UserError, match="no linear layer"):
        names(["embed_tokens"])
    with pytest.raises(UserError, match="no linear layer"):
        names(["q_proj("])


def test_the_head_is_adapted_only_by_name_and_untied(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shares its weights"):
        lora.target_modules(base(), method(targets=["lm_head"]))
    settings = base().config
    settings.tie_word_embeddings = False
    model = type(base())(settings)
    assert "lm_head" not in lora.target_modules(model, method())
    model.lm_head.weight.ds_id = 0  # as ZeRO stage 3 marks what it has sharded
    with pytest.raises(UserError, match="for each chunk"):
        lora.target_modules(model, method(targets=[".*_head"]))
    assert lora.target_modules(model, method(targets="qv")) == ["q_proj", "v_proj"]
    del model.lm_head.weight.ds_id
    wrapped = lora.add_adapter(model, method(targets=["lm_head", "q_proj"]), seed=0)
    lora.export_adapter(wrapped, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / lora.WEIGHTS)
    assert len(tensors) == 10
    assert all("lora_" in key for key in tensors)  # not the whole head too, as PEFT would by default

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ray.errors import UserError
from qwen_ray.registry import Registry
from qwen_ray.serving.adapters import AdapterStore, Use
from qwen_ray.serving.engines.torch import TorchEngine
from qwen_ray.serving.model_id import parse
from tests.serving.conftest import make_adapter


def use(store: AdapterStore, name: str) -> str:
    with store.use(parse(f"rand:{name}")) as used:
        assert used.key is not None
        return used.key


def test_versions_and_aliases_are_different_adapters(engine: TorchEngine, registry: Registry) -> None:
    store = AdapterStore(engine, registry=registry)
    production, first, second = use(store, "geo"), use(store, "geo@1"), use(store, "geo@2")
    assert production == first != second
    assert set(store.resident) == {first, second}
    with store.use(parse("rand")) as base:
        assert base == Use()


def test_unknown_adapter_version_and_alias_are_404(engine: TorchEngine, registry: Registry) -> None:
    store = AdapterStore(engine, registry=registry)
    for name in ("nope", "geo@9", "geo@candidate", "bio"):  # bio has no production version
        with pytest.raises(UserError) as e:
            use(store, name)
        assert e.value.status == 404, name
    assert store.resident == []


def test_least_recently_used_goes_first_and_never_one_in_use(
    engine: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    sizes = {name: engine.read_adapter(folder).nbytes for name, folder in adapter_dirs.items()}
    store = AdapterStore(engine, folders=adapter_dirs, max_bytes=sizes["geo"] + sizes["bio"])
    geo, bio = use(store, "geo"), use(store, "bio")
    use(store, "geo")
    with store.use(parse("rand:bio")):
        with store.use(parse("rand:law")) as law:  # does not fit: geo goes, bio is in use
            assert store.resident == [bio, law.key]
            assert engine.lora.keys == [bio, law.key]
        assert bio in store.resident
    assert geo not in store.resident
    assert sum(sizes[key.split("@")[0]] for key in store.resident) <= sizes["geo"] + sizes["bio"]


def test_many_threads_load_an_adapter_once(engine: TorchEngine, adapter_dirs: dict[str, Path]) -> None:
    loads: list[Path] = []
    read = engine.read_adapter

    def counted(folder: Path, **kwargs: Any) -> Any:
        loads.append(folder)
        return read(folder, **kwargs)

    engine.read_adapter = counted  # type: ignore[method-assign]
    store = AdapterStore(engine, folders=adapter_dirs)
    threads = [threading.Thread(target=use, args=(store, name)) for name in ("geo", "law") * 8]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 2


def _config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def _weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(change(tensors), path)

    return apply


def _truncate(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _to_bin(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def _first(tensors: dict[str, torch.Tensor], half: str) -> str:
    return next(key for key in tensors if half in key)


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "dora": (_config(use_dora=True), "DoRA"),
    "bias": (_config(bias="all"), "biases"),
    "saved modules": (_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "another type": (_config(peft_type="IA3"), "IA3"),
    "pissa": (_config(init_lora_weights="pissa_niter_4"), "pissa"),
    "no rank": (_config(r=0), "'r'"),
    "wrong rank": (_config(r=5), "do not fit rank 5"),
    "config is not json": (lambda f: (f / "adapter_config.json").write_text("{") and None, "not valid JSON"),
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "no such file"),
    "cut short": (_truncate, "damaged"),
    "pickle": (_to_bin, "pickle"),
    "half missing": (
        _weights(lambda t: {k: v for k, v in t.items() if k != _first(t, "lora_B")}),
        "one of its two",
    ),
    "nan": (_weights(lambda t: t | {(k := _first(t, "lora_A")): t[k] * float("nan")}), "NaN"),
    "embedding": (
        _weights(lambda t: t | {"base_model.model.x.lora_embedding_A": torch.ones(2, 2)}),
        "not a LoRA matrix",
    ),
    "other layers": (
        _weights(lambda t: {k.replace("layers.1", "layers.7"): v for k, v in t.items()}),
        "does not have",
    ),
    "not linear": (
        _weights(lambda t: {k.replace("self_attn.q_proj", "input_layernorm"): v for k, v in t.items()}),
        "only linear layers",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_unsupported_or_damaged_adapter_is_refused(
    case: str, engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    breaks, words = BROKEN[case]
    folder = tmp_path / "broken"
    shutil.copytree(adapter_dirs["geo"], folder)
    breaks(folder)
    store = AdapterStore(engine, folders={"broken": folder, "law": adapter_dirs["law"]})
    with pytest.raises(UserError, match=words) as e:
        use(store, "broken")
    assert 400 <= e.value.status < 500
    assert store.resident == []
    assert engine.lora.keys == []
    use(store, "law")  # and the others still load


def test_adapter_of_another_shape(engine: TorchEngine, tmp_path: Path) -> None:
    from tests.serving.conftest import make_model

    other = make_model(tmp_path / "wide", hidden_size=96, num_attention_heads=6)
    folder = make_adapter(other, tmp_path / "a", seed=1, r=2, target_modules=["q_proj"])
    with pytest.raises(UserError, match="96") as e:
        engine.add_adapter("a", folder)
    assert e.value.status == 409


def test_adapter_of_another_base_is_409_and_names_both(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    registry = Registry(tmp_path)
    registry.publish("alien", adapter_dirs["geo"], {"base": {"id": "qwen-other", "fingerprint": "ab" * 32}})
    with pytest.raises(UserError, match="qwen-other") as e:
        use(AdapterStore(engine, registry=registry), "alien@1")
    assert e.value.status == 409
    assert engine.id in e.value.what


def test_link_out_of_the_registry_is_not_followed(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    base = {"id": engine.id, "fingerprint": engine.fingerprint}
    version = registry.publish("geo", adapter_dirs["geo"], {"base": base})
    weights = version.path / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to(adapter_dirs["geo"] / "adapter_model.safetensors")
    with pytest.raises(UserError, match="leads out") as e:
        use(AdapterStore(engine, registry=registry), "geo@1")
    assert e.value.status == 404


def test_listing(engine: TorchEngine, registry: Registry, adapter_dirs: dict[str, Path]) -> None:
    store = AdapterStore(engine, registry=registry, folders={"own": adapter_dirs["law"]})
    assert [name for name, _ in store.available()] == [
        "own",
        "bio@1",
        "geo",
        "geo@1",
        "geo@2",
        "law",
        "law@1",
    ]
    facts = dict(store.available())["geo"]
    assert facts["version"] == 1
    assert facts["base"]["fingerprint"] == engine.fingerprint
    with pytest.raises(UserError, match="without versions"):
        use(store, "own@1")


def test_promotion_is_seen_at_once(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    registry = Registry(tmp_path)
    for name in ("geo", "law"):
        registry.publish("a", adapter_dirs[name], {"base": {"id": "rand", "fingerprint": engine.fingerprint}})
    store = AdapterStore(engine, registry=registry)
    registry.point("a", "production", 1, reason="first")
    first = use(store, "a")
    registry.point("a", "production", 2, reason="better")
    assert use(store, "a") == use(store, "a@2") != first


def test_bad_adapter_folder_at_start(engine: TorchEngine, tmp_path: Path) -> None:
    for name, folder in (("../x", tmp_path), ("ok", tmp_path / "none"), ("auto", tmp_path)):
        with pytest.raises(UserError):
            AdapterStore(engine, folders={name: folder})

from __future__ import annotations

import asyncio
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_ray.errors import UserError
from qwen_ray.registry import Registry
from qwen_ray.serving import adapters, catalog
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
    assert {used.key for used in store.resident} == {first, second}
    assert [used.name for used in store.resident] == ["geo@1", "geo@2"]
    with store.use(parse("rand")) as base:
        assert base == Use()


def test_unknown_adapter_version_and_alias_are_404(engine: TorchEngine, registry: Registry) -> None:
    store = AdapterStore(engine, registry=registry)
    for name in ("nope", "geo@9", "geo@candidate", "bio"):  # bio has no production version
        with pytest.raises(UserError) as e:
            use(store, name)
        assert e.value.status == 404, name
    assert store.resident == []


def test_only_a_number_always_means_one_version(registry: Registry, tmp_path: Path) -> None:
    """Not every digit makes a number: an alias may be asked for that looks like one, and it may move."""
    own = Registry(shutil.copytree(registry.root, tmp_path / "registry"))
    own.change("geo", lambda change: change.point("²", 1, reason="test", by=None))
    looked_up = catalog.Catalog(registry=own)
    assert looked_up.look_up("geo", "1").fixed
    assert not looked_up.look_up("geo", "²").fixed
    assert not looked_up.look_up("geo", None).fixed


def settle(store: AdapterStore, engine: TorchEngine, *names: str) -> None:
    """Wait until just these are loaded; dropping is not waited for by those who use adapters."""
    deadline = time.monotonic() + 20
    while sorted(key.split("@")[0] for key in engine.lora.keys) != sorted(names):
        assert time.monotonic() < deadline, engine.lora.keys
        time.sleep(0.01)
    assert sorted(str(used.name) for used in store.resident) == sorted(names)


def test_least_recently_used_goes_first_and_never_one_in_use(
    engine: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    sizes = {name: engine.read_adapter(folder).nbytes for name, folder in adapter_dirs.items()}
    store = AdapterStore(engine, folders=adapter_dirs, max_bytes=sizes["law"] + sizes["bio"] - 1)
    assert sizes["geo"] + sizes["bio"] < sizes["law"] + sizes["bio"] - 1
    use(store, "geo")
    use(store, "bio")
    use(store, "geo")
    with store.use(parse("rand:bio")):
        with store.use(parse("rand:law")):  # does not fit: geo goes, bio is in use
            settle(store, engine, "bio", "law")
        settle(store, engine, "bio")
    settle(store, engine, "bio")


def test_pinned_is_loaded_at_start_and_never_dropped(
    engine: TorchEngine, registry: Registry, adapter_dirs: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    law = engine.read_adapter(adapter_dirs["law"]).nbytes
    store = AdapterStore(engine, registry=registry, max_bytes=law)
    store.pin(["geo", "nobody"])
    assert "nobody" in caplog.text
    assert [used.name for used in store.resident] == ["geo@1"]
    with store.use(parse("rand:law")):
        pass
    settle_names = time.monotonic() + 20
    while [used.name for used in store.resident] != ["geo@1"]:
        assert time.monotonic() < settle_names
        time.sleep(0.01)


def test_pin_follows_its_alias(engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path) -> None:
    registry = two_versions(engine, adapter_dirs, tmp_path)
    largest = max(engine.read_adapter(adapter_dirs[name]).nbytes for name in ("geo", "law"))
    store = AdapterStore(engine, registry=registry, max_bytes=largest)
    store.pin(["a"])
    registry.point("a", "production", 2, reason="better")
    use(store, "a")
    deadline = time.monotonic() + 20
    while [used.name for used in store.resident] != ["a@2"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_engine_with_places_for_so_many(engine: TorchEngine, adapter_dirs: dict[str, Path]) -> None:
    engine.max_adapters = 2  # type: ignore[attr-defined] # as vLLM's has
    store = AdapterStore(engine, folders=adapter_dirs)
    for name in ("geo", "law", "geo", "bio"):
        use(store, name)
    settle(store, engine, "bio", "geo")


def test_loads_that_wait_for_a_place_do_not_keep_it_from_becoming_free(
    engine: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    """As vLLM's engine does it: who comes waits until what is dropped has left."""
    left, add, remove = threading.Condition(), engine.add_adapter, engine.remove_adapter

    def waits(key: str, weights: Any) -> int:
        with left:
            assert left.wait_for(lambda: len(engine.lora.keys) < 1, 20), "nothing was dropped"
            return add(key, weights)

    def leaves(key: str) -> None:
        with left:
            remove(key)
            left.notify_all()

    engine.max_adapters = 1  # type: ignore[attr-defined]
    engine.add_adapter, engine.remove_adapter = waits, leaves  # type: ignore[method-assign,assignment]
    folders = {f"a{i}": adapter_dirs["geo"] for i in range(5)}
    store = AdapterStore(engine, folders=folders, on_model=lambda change: change())

    async def ask(name: str, seconds: float) -> None:
        async with store.use(parse(f"rand:{name}")):
            await asyncio.sleep(seconds)

    async def all_at_once() -> None:
        first = asyncio.create_task(ask("a0", 0.3))
        await asyncio.sleep(0.1)
        await asyncio.gather(first, *(ask(f"a{i}", 0) for i in range(1, 5)))

    asyncio.run(all_at_once())


def test_adapter_larger_than_the_limit_is_refused_unread(
    engine: TorchEngine, adapter_dirs: dict[str, Path]
) -> None:
    size = engine.read_adapter(adapter_dirs["law"]).nbytes
    read: list[Path] = []
    engine.read_adapter = lambda folder, **_: read.append(folder)  # type: ignore[method-assign,assignment]
    store = AdapterStore(engine, folders=adapter_dirs, max_bytes=size - 1)
    with pytest.raises(UserError, match="in memory") as e:
        use(store, "law")
    assert e.value.status == 409
    assert "adapter_bytes" in e.value.fix
    assert read == []


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
    "scaled to nan": (_config(lora_alpha=float("nan")), "NaN"),
    "scaled to infinity": (_config(lora_alpha=float("inf")), "NaN"),
    "scaled beyond float32": (_config(lora_alpha=1e41), "NaN"),
    "ranks are no object": (_config(rank_pattern="q_proj"), "not a valid adapter_config.json"),
    "bad pattern": (_config(alpha_pattern={"(": 4}), "not a valid adapter_config.json"),
    "alpha is text": (_config(alpha_pattern={"q_proj": "4"}), "not a valid adapter_config.json"),
    "lineage": (lambda f: (f / "lineage.json").write_text('{"base": "x"}') and None, "not a valid lineage"),
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
    store = AdapterStore(engine, folders={"broken": folder, "law": adapter_dirs["law"]})
    breaks(folder)
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


def two_versions(engine: TorchEngine, adapter_dirs: dict[str, Path], root: Path) -> Registry:
    """``a``: version 1, in production, is geo's weights; version 2 is law's."""
    registry = Registry(root)
    for name in ("geo", "law"):
        registry.publish("a", adapter_dirs[name], {"base": {"id": "rand", "fingerprint": engine.fingerprint}})
    registry.point("a", "production", 1, reason="first")
    return registry


class SlowDisk:
    """Holds back reads of adapters whose path ends so, until they are let go."""

    def __init__(self, engine: TorchEngine, ending: str) -> None:
        self.go, self._read, self._ending = threading.Event(), engine.read_adapter, ending
        engine.read_adapter = self.read  # type: ignore[method-assign]

    def read(self, folder: Path, **kwargs: Any) -> Any:
        if str(folder).endswith(self._ending):
            assert self.go.wait(60)
        return self._read(folder, **kwargs)


def test_promotion_is_seen_at_once(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    registry = two_versions(engine, adapter_dirs, tmp_path)
    store = AdapterStore(engine, registry=registry)
    first = use(store, "a")
    registry.point("a", "production", 2, reason="better")
    assert use(store, "a") == use(store, "a@2") != first


def test_old_version_answers_while_the_new_one_loads(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = two_versions(engine, adapter_dirs, tmp_path)
    monkeypatch.setattr(adapters, "SWAP_SECONDS", 0.05)
    disk = SlowDisk(engine, "0002")
    store = AdapterStore(engine, registry=registry)
    first = use(store, "a")
    registry.point("a", "production", 2, reason="better")
    assert [use(store, "a") for _ in range(3)] == [first] * 3
    with store.use(parse("rand:a")) as old:  # one that goes on during the swap
        disk.go.set()
        second = use(store, "a@2")
        assert use(store, "a") == second != first
        assert old.name == "a@1"


def test_slow_load_disturbs_nobody_else(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    disk = SlowDisk(engine, "law")
    store = AdapterStore(engine, folders=adapter_dirs)
    geo = use(store, "geo")

    async def ask() -> None:
        slow = [asyncio.ensure_future(store.use(parse("rand:law")).__aenter__()) for _ in range(20)]
        for _ in range(3):
            async with store.use(parse("rand:geo")) as used:
                assert used.key == geo
        async with store.use(parse("rand:bio")) as used:  # another can be loaded meanwhile
            assert used.name == "bio"
        slow[0].cancel()  # a client that goes away: the load goes on for the others
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in slow[1:])
        disk.go.set()
        assert len({(await task).key for task in slow[1:]}) == 1

    asyncio.run(ask())
    (law,) = [entry for entry in store._entries.values() if entry.found.name == "law"]
    assert law.users == 19  # the one that went away holds nothing


def test_damaged_new_version_is_409_and_the_old_one_still_served(
    engine: TorchEngine, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    registry = two_versions(engine, adapter_dirs, tmp_path)
    store = AdapterStore(engine, registry=registry)
    first = use(store, "a")
    _truncate(registry.get("a", 2).path)
    registry.point("a", "production", 2, reason="better")
    with pytest.raises(UserError, match="damaged") as e:
        use(store, "a")
    assert e.value.status == 409
    assert use(store, "a@1") == first
    registry.point("a", "production", 1, reason="back")
    assert use(store, "a") == first


@pytest.mark.parametrize("left", ["nothing", "an empty folder"])
def test_registry_away(
    left: str, engine: TorchEngine, registry: Registry, adapter_dirs: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(registry.root, tmp_path / "registry")
    moved = Registry(tmp_path / "registry")
    store = AdapterStore(engine, registry=moved, folders={"own": adapter_dirs["bio"]})
    geo = use(store, "geo")
    listed = store.available()
    moved.root.rename(tmp_path / "away")
    if left == "an empty folder":  # as a lost mount leaves it
        moved.root.mkdir()
    assert use(store, "geo") == use(store, "geo@1") == geo
    assert use(store, "own")
    for name in ("law", "geo@2", "nobody"):
        with pytest.raises(UserError, match="cannot be read now") as e:
            use(store, name)
        assert e.value.status == 503
        assert e.value.retry_after
    stale = asyncio.run(store.listing())
    assert [name for name, _ in stale] == [name for name, _ in listed]
    assert [facts.get("stale", False) for _, facts in stale] == [name != "own" for name, _ in listed]
    if left == "an empty folder":
        moved.root.rmdir()
    (tmp_path / "away").rename(moved.root)
    assert use(store, "law")
    assert not any("stale" in facts for _, facts in asyncio.run(store.listing()))


def test_registry_that_hangs(
    engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a lost network mount does: calls do not fail, they do not return."""
    store = AdapterStore(engine, registry=registry)
    geo = use(store, "geo")
    hung, resolve = threading.Event(), Registry.resolve

    def hangs(*args: Any) -> Any:
        assert hung.wait(60)
        return resolve(*args)

    monkeypatch.setattr(Registry, "resolve", hangs)
    monkeypatch.setattr(catalog, "LOOKUP_SECONDS", 0.05)
    assert [use(store, "geo") for _ in range(20)] == [geo] * 20  # more than there are threads
    with pytest.raises(UserError) as e:
        use(store, "law")
    assert e.value.status == 503
    hung.set()
    monkeypatch.setattr(catalog, "LOOKUP_SECONDS", 60)
    deadline = time.monotonic() + 20
    while store._catalog._late:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert use(store, "law")


def test_slow_listing_holds_up_no_lookup(
    engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(engine, registry=registry)
    listed = store.available()
    go, lineage, asked = threading.Event(), Registry.lineage, []

    def slow(*args: Any) -> Any:
        asked.append(args)
        assert go.wait(60)
        return lineage(*args)

    monkeypatch.setattr(Registry, "lineage", slow)
    monkeypatch.setattr(catalog, "LISTING_SECONDS", 0.05)
    for _ in range(3):
        assert all(facts["stale"] for _, facts in asyncio.run(store.listing()))
        assert use(store, "geo")
        assert use(store, "law")
    assert len(asked) == 1  # those who came later waited for the first one's
    go.set()
    monkeypatch.setattr(catalog, "LISTING_SECONDS", 60)
    assert asyncio.run(store.listing()) == listed


def calls(monkeypatch: pytest.MonkeyPatch, method: str) -> list[str]:
    """The names with which a registry's ``method`` is called from now on."""
    names: list[str] = []
    known = getattr(Registry, method)

    def counted(self: Registry, name: str) -> Any:
        names.append(name)
        return known(self, name)

    monkeypatch.setattr(Registry, method, counted)
    return names


def test_listing_reads_what_is_decided_on_a_name_once(
    engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = calls(monkeypatch, "state")
    AdapterStore(engine, registry=registry).available()
    assert read == ["bio", "geo", "law"]


def test_an_unknown_name_costs_little_and_is_not_looked_for_again_at_once(
    engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = calls(monkeypatch, "history")
    store = AdapterStore(engine, registry=registry)
    listed = store.available()
    asked.clear()
    for _ in range(3):
        with pytest.raises(UserError, match="unknown adapter 'geos'") as e:
            use(store, "geos")
        assert (e.value.status, e.value.fix) == (404, "did you mean 'geo'?")
    assert asked == ["geos"]
    with pytest.raises(UserError) as e:
        use(store, "zzz")
    assert not any(name in str(e.value) for name, _ in listed)
    for i in range(catalog._MISSES + 5):
        store._catalog._miss(f"x{i}", None, e.value)
    assert len(store._catalog._misses) == catalog._MISSES
    monkeypatch.setattr(catalog, "MISS_SECONDS", 0.0)
    asked.clear()
    with pytest.raises(UserError):
        use(store, f"x{catalog._MISSES}")
    assert asked == [f"x{catalog._MISSES}"]


def test_registry_that_goes_during_a_load(engine: TorchEngine, registry: Registry, tmp_path: Path) -> None:
    shutil.copytree(registry.root, tmp_path / "registry")
    read = engine.read_adapter

    def goes(folder: Path, **kwargs: Any) -> Any:
        (tmp_path / "registry").rename(tmp_path / "away")
        return read(folder, **kwargs)

    engine.read_adapter = goes  # type: ignore[method-assign]
    with pytest.raises(UserError, match="cannot be read now"):
        use(AdapterStore(engine, registry=Registry(tmp_path / "registry")), "geo")


def test_bad_adapter_folder_at_start(engine: TorchEngine, tmp_path: Path) -> None:
    for name, folder in (("../x", tmp_path), ("ok", tmp_path / "none"), ("auto", tmp_path)):
        with pytest.raises(UserError):
            AdapterStore(engine, folders={name: folder})

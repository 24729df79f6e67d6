"""Trials of a pack one by one: isolation, checkpoints, exports, held-out losses, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from qwen_ray import models
from qwen_ray.data import dataset
from qwen_ray.data.packing import Row, collate
from qwen_ray.data.tokenise import Example
from qwen_ray.errors import UserError
from qwen_ray.serving.lora_weights import read_lora
from qwen_ray.training import attention, checkpoint, loop, precision
from qwen_ray.training.loss import TokenLoss
from qwen_ray.training.packed import Pack
from qwen_ray.training.strategy.ddp import Ddp
from tests.training.packs import Outcome, World, deviation, exported, in_float64, solo, store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("packed"))


def pack_of(world: World, *trials: list[str], batched: bool = False) -> Pack:
    configs = [world.config(*sets) for sets in trials]
    pack = Pack(configs[0])
    pack.base.batched = batched
    for i, config in enumerate(configs):
        pack.add(str(i), config)
    return pack


def values(pack: Pack, key: str) -> list[torch.Tensor]:
    """A trial's weights and moments."""
    slot = pack.slots[key]
    every = [pack.bank.values, *pack.bank.moments.values()]
    return [half.clone() for rows in every for pair in slot.views(rows).values() for half in pair]


def assert_same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- isolation


@pytest.mark.parametrize("batched", [False, True])
def test_a_neighbour_changes_no_bit(world: World, batched: bool) -> None:
    """Whether it learns at 1e-3, at 1, or turns into NaN."""
    packs = [
        pack_of(world, ["method.r=4"], [f"optim.learning_rate={rate}", "seed=1"], ["seed=2"], batched=batched)
        for rate in (1e-3, 1.0, 1e-3)
    ]
    for pack in packs:
        pack.step()
    packs[2].bank.values[1].fill_(torch.nan)
    packs[2].bank.refresh()
    rows = [pack.step() for pack in packs]
    assert packs[2].slots["1"].failed == "the loss is nan at step 2; lower optim.learning_rate"
    assert list(rows[2]) == ["0", "2"]
    assert packs[2].slots["1"].step == 1
    for pack in packs[1:]:
        for key in ("0", "2"):
            assert_same(values(pack, key), values(packs[0], key))
    # It is not stepped again, nor does it hold up the others.
    assert list(packs[2].step()) == ["0", "2"]
    packs[0].step(["0", "2"])
    for key in ("0", "2"):
        assert_same(values(packs[2], key), values(packs[0], key))
        assert packs[2].validation([key])[key]["eval_loss"] < 100


def test_a_loss_that_is_not_finite_fails_its_trial_only(world: World) -> None:
    ruin = ["optim.learning_rate=1e30", "optim.max_grad_norm=1e30", "optim.warmup_steps=0"]
    pack = pack_of(world, ruin, ["seed=1"])
    while not pack.slots["1"].done:
        pack.step()
    assert pack.slots["0"].failed is not None
    assert "lower optim.learning_rate" in pack.slots["0"].failed
    assert pack.step() == {}


def test_a_gradient_that_is_not_finite_fails_its_trial_only(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack, calm = (pack_of(world, [], ["seed=1"]) for _ in range(2))
    backward = pack._backward

    def ruined(taken: Any) -> torch.Tensor:
        losses = backward(taken)
        pack.bank.grads[0][:1].fill_(torch.inf)
        return losses

    monkeypatch.setattr(pack, "_backward", ruined)
    assert list(pack.step()) == ["1"]
    assert pack.slots["0"].failed == "the gradient's norm is inf at step 1; lower optim.learning_rate"
    calm.step()
    assert_same(values(pack, "1"), values(calm, "1"))


def test_passes_are_few_and_even(world: World) -> None:
    base = pack_of(world, []).base
    parts: dict[int, Any] = {}
    for lane, tokens in enumerate([50, 60, 40, 50, 60, 40, 50, 55]):
        row = Row((Example("", "", [0] * tokens, [0] * tokens),))
        parts[lane] = collate([row], base.pad_id), 1
    base.pass_tokens = 300
    assert [list(part) for part in base.passes(parts)] == [[0, 1, 2, 3], [4, 5, 6, 7]]  # not 260 and 145
    base.pass_tokens = 50  # a lane is the least
    assert [list(part) for part in base.passes(parts)] == [[lane] for lane in parts]
    base.pass_tokens = 405
    assert [list(part) for part in base.passes(parts)] == [list(parts)]


@pytest.mark.parametrize("batched", [False, True])
def test_what_is_padded_stays_zero(world: World, batched: bool) -> None:
    """Beyond a trial's rank, and in layers that it does not adapt, whatever its start is."""
    few = ["method.r=6", "method.init=orthogonal", "method.targets=[up_proj]", "optim.weight_decay=0.1"]
    pack = pack_of(world, few, ["method.r=16"], batched=batched)
    for _ in range(3):
        pack.step()
    slot = pack.slots["0"]
    assert all(name.endswith("up_proj") for name in slot.layers)
    for rows in (pack.bank.values, *pack.bank.moments.values()):
        own = sum(int(half.count_nonzero()) for pair in slot.views(rows).values() for half in pair)
        assert 0 < own == int(rows[slot.lane].count_nonzero())


def test_a_new_trial_starts_from_nothing(world: World) -> None:
    pack = pack_of(world, [], ["seed=1"])
    pack.step()
    pack.remove("1")
    slot = pack.add("new", world.config("seed=1"))
    assert [int(state["step"]) for state in slot.optimizer.state.values()] == [0, 0]
    assert not any(rows[slot.lane].any() for rows in pack.bank.moments.values())
    assert int(pack.slots["0"].optimizer.state[pack.slots["0"].parameters[0]]["step"]) == 1


def test_recomputed_layers_drop_out_alike(world: World) -> None:
    trials = ["method.dropout=0.3", "optim.learning_rate=1e-2"], ["seed=1"]
    plain = pack_of(world, *trials)
    saving = pack_of(world, [*trials[0], "compute.activation_checkpointing=true"], trials[1])
    for _ in range(3):
        plain.step()
        saving.step()
    assert_same(values(plain, "0"), values(saving, "0"))


# ---------------------------------------------------------------- checkpoints


TRIALS = (
    ["method.r=4", "optim.max_steps=6", "method.dropout=0.1"],
    ["method.r=8", "optim.max_steps=6", "seed=1", "optim.gradient_accumulation=2"],
    ["method.targets=qv", "method.r=16", "optim.max_steps=6", "data.weights.more=0.8"],
)


def test_resumed_is_bit_for_bit_the_same(world: World, tmp_path: Path) -> None:
    undisturbed, first = pack_of(world, *TRIALS), pack_of(world, *TRIALS)
    for _ in range(3):
        undisturbed.step()
        first.step()
    for key in first.slots:
        first.save(key, store(tmp_path / key))
    first.step()  # what came after the checkpoint is lost
    second = Pack(world.config())
    for key, sets in zip(first.slots, TRIALS, strict=True):
        assert second.add(key, world.config(*sets), store=store(tmp_path / key)).step == 3
    for _ in range(3):
        rows, again = undisturbed.step(), second.step()
        assert [r["loss"] for r in rows.values()] == [r["loss"] for r in again.values()]
    assert second.step() == {}
    for key in second.slots:
        assert second.slots[key].done
        assert_same(values(second, key), values(undisturbed, key))


def test_loop_and_pack_go_on_from_each_others_checkpoints(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_float64(monkeypatch)
    config = world.config(*TRIALS[1], "checkpoint.every_steps=2")
    whole = solo(config, tmp_path / "whole", keep=9)

    pack = pack_of(world, TRIALS[0], TRIALS[1])
    for _ in range(2):
        pack.step()
    pack.save("1", store(tmp_path / "handed" / "checkpoints"))
    finished = solo(config, tmp_path / "handed")
    assert [row["step"] for row in finished.rows] == [3, 4, 5, 6]
    assert deviation([finished], [Outcome(whole.rows[2:], whole.tensors)])[1] < 1e-10

    for later in checkpoint.complete(tmp_path / "whole" / "checkpoints")[1:]:
        shutil.rmtree(later)
    pack = pack_of(world, ["method.r=32", "seed=5"])  # another layout than it was trained in
    assert pack.add("1", config, store=store(tmp_path / "whole" / "checkpoints")).step == 2
    rows = [pack.step(["1"])["1"] for _ in range(4)]
    ours = Outcome(rows, exported(pack, "1", tmp_path / "exported"))
    assert deviation([ours], [Outcome(whole.rows[2:], whole.tensors)])[1] < 1e-10


def test_a_checkpoint_of_another_trial_is_refused(world: World, tmp_path: Path) -> None:
    pack = pack_of(world, [], ["seed=1"])
    pack.step()
    pack.save("0", store(tmp_path))
    before = values(pack, "1")
    with pytest.raises(UserError, match="another configuration"):
        pack.add("2", world.config("method.r=4"), store=store(tmp_path))
    assert list(pack.slots) == ["0", "1"]
    assert_same(values(pack, "1"), before)
    pack.step()


def test_a_checkpoint_that_does_not_fit_leaves_the_pack_as_it_was(world: World, tmp_path: Path) -> None:
    pack = pack_of(world, ["method.r=4"], ["seed=1"])
    pack.step()
    pack.save("0", store(tmp_path))
    (folder,) = checkpoint.complete(tmp_path)
    path = folder / "state" / "rank-00000.safetensors"
    described = json.dumps({"layout": {}, "scalars": {}, "extra": {}})
    save_file({}, path, metadata={"qwen-ray": described})
    manifest = checkpoint.read_manifest(folder)
    checkpoint.seal(folder, {k: v for k, v in manifest.items() if k != "files"})
    before = values(pack, "1")
    with pytest.raises((UserError, RuntimeError)):
        pack.add("2", world.config("method.r=4"), store=store(tmp_path))
    assert list(pack.slots) == ["0", "1"]
    assert_same(values(pack, "1"), before)


# ---------------------------------------------------------------- out


def test_an_exported_trial_is_an_ordinary_adapter(world: World, tmp_path: Path) -> None:
    pack = pack_of(world, ["method.targets=qv", "method.r=4"], ["method.rslora=true", "seed=1"])
    for _ in range(2):
        pack.step()
    found = pack.validation()
    for key, sets in (("0", ["method.targets=qv", "method.r=4"]), ("1", ["method.rslora=true", "seed=1"])):
        pack.export(key, tmp_path / key)
        config = world.config(*sets, "optim.max_steps=1")
        loop.train(
            config,
            strategy=Ddp(),
            store=store(tmp_path / f"{key}-checkpoints"),
            on_metrics=lambda _: None,
            artifact=tmp_path / f"{key}-solo",
        )
        settings = [(tmp_path / n / "adapter_config.json").read_text() for n in (key, f"{key}-solo")]
        assert settings[0] == settings[1]
        ours, theirs = (load_file(tmp_path / n / "adapter_model.safetensors") for n in (key, f"{key}-solo"))
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items()}

        ref = models.resolve(str(world.root / "model"))
        attention.register()
        base = models.load_model(ref, dtype=torch.float32, attention=attention.ATTENTION)
        model = PeftModel.from_pretrained(base, str(tmp_path / key))
        assert held_out(model, pack, key) == pytest.approx(found[key], rel=1e-5)
        served = read_lora(tmp_path / key).layers
        for name, pair in pack.weights(key).items():
            for mine, half in zip(pair, served[name], strict=True):
                assert torch.equal(mine, half)
        assert len(served) == len(pack.weights(key))


@torch.no_grad()
def held_out(model: Any, pack: Pack, key: str) -> dict[str, float]:
    """The validation loss of a whole model on a trial's rows, row by row."""
    loss, slot = TokenLoss(model.eval()), pack.slots[key]
    nats, tokens = {}, {}
    for domain, rows in slot.data.validation.items():
        batches = [batch for row in rows for batch in slot.feed.batches([row])]
        nats[domain] = sum(float(loss(batch)) for batch in batches)
        tokens[domain] = sum(batch.supervised for batch in batches)
    return {
        "eval_loss": sum(nats.values()) / sum(tokens.values()),
        **{f"eval_loss/{domain}": nats[domain] / tokens[domain] for domain in nats},
    }


def test_held_out_losses(world: World, tmp_path: Path) -> None:
    trials = ["optim.max_steps=3", "method.r=4"], ["optim.max_steps=3", "seed=1", "data.packing=false"]
    solos = [solo(world.config(*sets), tmp_path / str(i)) for i, sets in enumerate(trials)]
    pack = pack_of(world, *trials)
    while not pack.slots["0"].done:
        pack.step()
    pack.base.pass_tokens = 50  # so that there are several passes
    found = pack.validation()
    for i, outcome in enumerate(solos):
        theirs = {k: v for k, v in outcome.rows[-1].items() if k.startswith("eval_loss")}
        assert len(theirs) == 3
        assert found[str(i)] == pytest.approx(theirs, abs=1e-5)
    ref = models.resolve(str(world.root / "model"))
    base = models.load_model(ref, dtype=torch.float32, attention=attention.ATTENTION)
    assert pack.base_losses("1") == pytest.approx(held_out(base, pack, "1"), rel=1e-5)
    assert pack.base_losses("0") != pytest.approx(found["0"], rel=1e-3)


def test_scores_of_merged_adapters(world: World) -> None:
    pack = pack_of(world, ["optim.learning_rate=1e-2"], ["method.targets=qv", "optim.learning_rate=1e-2"])
    for _ in range(3):
        pack.step()
    one, two = pack.weights("0"), pack.weights("1")
    rows = pack.slots["0"].data.validation
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for adapter in (one, two):
        for name, pair in adapter.items():
            parts.setdefault(name, []).append(pair)
    both = {
        name: (torch.cat([a for a, _ in pairs]), torch.cat([b / 2 for _, b in pairs], 1))
        for name, pairs in parts.items()
    }
    scores = pack.score([one, {}, both, two], rows, at_once=3)
    evaluated, base = pack.validation(), pack.base_losses("0")
    for domain in rows:
        assert scores[0][domain] == pytest.approx(evaluated["0"][f"eval_loss/{domain}"], rel=1e-5)
        assert scores[1][domain] == pytest.approx(base[f"eval_loss/{domain}"], rel=1e-5)
        assert scores[3][domain] == pytest.approx(evaluated["1"][f"eval_loss/{domain}"], rel=1e-5)
    ref = models.resolve(str(world.root / "model"))
    model = models.load_model(ref, dtype=torch.float32, attention=attention.ATTENTION)
    for name, (a, b) in both.items():
        model.get_submodule(name).weight.data += b @ a
    merged = held_out(model, pack, "0")
    assert {f"eval_loss/{d}": loss for d, loss in scores[2].items()} == pytest.approx(
        {k: v for k, v in merged.items() if k != "eval_loss"}, rel=1e-5
    )


def test_files_are_tokenised_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = dataset.tokenise

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(dataset, "tokenise", counted)
    pack = pack_of(world, [], ["data.weights.more=0.9"], ["method.r=4", "optim.max_steps=2"])
    assert len(calls) == 2  # what is trained on, and what is held out
    first, *others = (slot.data for slot in pack.slots.values())
    assert all(other.validation is first.validation for other in others)
    pack.add("seed", world.config("seed=7"))  # another split
    assert len(calls) == 4
    assert pack.slots["seed"].data.validation is not first.validation


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("sets", "where"),
    [
        (["method.name=full"], "method.name"),
        (["method.name=qlora"], "method.name"),
        (["method.dora=true"], "method.dora"),
        (["method.init=pissa"], "method.init"),
        (["method.init=orthogonal", "method.r=5"], "method.r"),
        (["method.targets=[q_porj]"], "method.targets"),
        (["optim.name=adamw_8bit"], "optim.name"),
        (["precision=bf16"], "precision"),
        (["model.name=tiny"], "model.name"),
        (["cluster.workers=2"], "cluster.workers"),
        (["strategy.name=fsdp"], "strategy.name"),
        (["compute.compile=true"], "compute.compile"),
        (["compute.attention=block_mask"], "compute.attention"),
        (["evaluate.suites=[tiny]"], "evaluate.suites"),
    ],
)
def test_what_cannot_be_packed_is_refused(world: World, pack: Pack, sets: list[str], where: str) -> None:
    with pytest.raises(UserError) as e:
        pack.add("1", world.config(*sets))
    assert e.value.where == where
    assert e.value.fix
    assert list(pack.slots) == ["0"]


def test_float16_is_refused_where_the_device_has_nothing_better(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "choose", lambda name, device: precision.Precision(torch.float16))
    with pytest.raises(UserError, match="no bf16") as e:
        Pack(world.config())
    assert e.value.where == "precision"


@pytest.fixture(scope="module")
def pack(world: World) -> Pack:
    return pack_of(world, [])


def test_names_are_checked(world: World, pack: Pack) -> None:
    with pytest.raises(ValueError, match="is in the pack"):
        pack.add("0", world.config())
    with pytest.raises(KeyError, match="nobody"):
        pack.step(["nobody"])

"""A pack of trials is so many runs of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen_ray.training.packed import Pack
from qwen_ray.training.packed_base import FrozenBase
from qwen_ray.training.packed_slot import Slot
from tests.training.packs import Outcome, World, deviation, in_float64, solo, together


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World.make(tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def solos(world: World) -> list[Outcome]:
    """Eight runs of the loop, in float32."""
    return [solo(config, world.root / f"solo-{i}") for i, config in enumerate(world.cases())]


@pytest.fixture(scope="module")
def _exact(world: World) -> list[Outcome]:
    with pytest.MonkeyPatch.context() as patch:
        in_float64(patch)
        return [solo(config, world.root / f"exact-{i}") for i, config in enumerate(world.cases())]


@pytest.fixture
def exact(_exact: list[Outcome], monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """The same in float64, in which the test runs too."""
    in_float64(monkeypatch)
    return _exact


@pytest.mark.parametrize("batched", [False, True])
def test_a_pack_of_eight_is_eight_runs(
    world: World, solos: list[Outcome], tmp_path: Path, batched: bool
) -> None:
    ours = together(world.cases(), tmp_path, batched=batched)
    losses, _ = deviation(ours, solos)
    assert losses <= 5e-6
    for a, b in zip(ours, solos, strict=True):
        assert len(a.rows) == len(b.rows)
        for mine, theirs in zip(a.rows, b.rows, strict=True):
            timeless = {k for k in theirs if not k.endswith("_per_second") and not k.startswith("eval_")}
            assert timeless == {k for k in mine if not k.endswith("_per_second")}
            assert {k: mine[k] for k in timeless} == pytest.approx({k: theirs[k] for k in timeless}, rel=1e-4)


# ---------------------------------------------------------------- float64: the same run to the last digits


@pytest.mark.parametrize("pass_tokens", [None, 150])  # all in one pass, or two or three trials in each
@pytest.mark.parametrize("batched", [False, True])
def test_parameters_are_those_of_eight_runs(
    world: World, exact: list[Outcome], tmp_path: Path, batched: bool, pass_tokens: int | None
) -> None:
    ours = together(world.cases(), tmp_path, batched=batched, pass_tokens=pass_tokens)
    losses, parameters = deviation(ours, exact)
    assert losses <= 1e-6  # the loop adds them up in float32
    assert parameters <= 1e-10


def test_trials_that_come_and_go_in_any_order(world: World, exact: list[Outcome], tmp_path: Path) -> None:
    """Four at a time, from the last to the first, and beside them one that is dropped half-way."""
    ours = together(world.cases(), tmp_path, at_once=4, order=lambda every: every[::-1], dropped=1)
    assert deviation(ours, exact)[1] <= 1e-10


def _global_clip(patch: pytest.MonkeyPatch) -> None:
    def clip(pack: Pack) -> torch.Tensor:
        norm = torch.linalg.vector_norm(pack.bank.grads.whole)
        limit = next(iter(pack.slots.values())).config.optim.max_grad_norm
        pack.bank.grads.whole.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
        return norm.expand(len(pack.slots))

    patch.setattr(Pack, "_clip", clip)


def _shared_step_counter(patch: pytest.MonkeyPatch) -> None:
    place = Slot.place
    counter = torch.zeros(())

    def shared(slot: Slot, *args: Any) -> None:
        place(slot, *args)
        for state in slot.optimizer.state.values():
            state["step"] = counter

    patch.setattr(Slot, "place", shared)


def _pack_mean_loss(patch: pytest.MonkeyPatch) -> None:
    backward = FrozenBase.backward

    def mean(base: FrozenBase, bank: Any, parts: Any, dropout: Any) -> Any:
        tokens = sum(n for _, n in parts.values())
        return backward(base, bank, {lane: (batch, tokens) for lane, (batch, _) in parts.items()}, dropout)

    patch.setattr(FrozenBase, "backward", mean)


def _momentum_kept(patch: pytest.MonkeyPatch) -> None:
    remove, place = Pack.remove, Slot.place
    left: list[dict[str, torch.Tensor]] = []

    def keep(pack: Pack, key: str) -> None:
        lane = pack.slots[key].lane
        left.append({name: rows[lane].clone() for name, rows in pack.bank.moments.items()})
        remove(pack, key)

    def inherit(slot: Slot, bank: Any, lane: int) -> None:
        fresh = slot.lane < 0
        place(slot, bank, lane)
        if fresh and left:
            for name, row in left.pop().items():
                own = bank.moments[name][lane]
                width = min(len(own), len(row))
                own[:width] = row[:width]

    patch.setattr(Pack, "remove", keep)
    patch.setattr(Slot, "place", inherit)


@pytest.mark.parametrize(
    "break_it",
    [_global_clip, _shared_step_counter, _pack_mean_loss, _momentum_kept],
    ids=lambda f: f.__name__,
)
def test_the_comparison_sees_what_is_not_kept_apart(
    world: World, exact: list[Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Any
) -> None:
    break_it(monkeypatch)
    ours = together(world.cases()[2:7], tmp_path, at_once=3)
    assert deviation(ours, exact[2:7])[1] > 1e-4

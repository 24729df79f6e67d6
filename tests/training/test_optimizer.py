"""Groups, LoRA+ and both optimizers' states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwen_ray.config import MethodConfig, OptimConfig
from qwen_ray.errors import UserError
from qwen_ray.training import lora
from qwen_ray.training.optimizer import make_optimizer, parameter_groups
from tests.training.test_attention import tiny


def names_of(model: nn.Module, parameters: list[nn.Parameter]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for p in parameters]


def test_full_training_decays_matrices_only() -> None:
    model = tiny("Qwen2", tied=True)
    groups = parameter_groups(model, OptimConfig(weight_decay=0.1), MethodConfig(name="full"))
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(p.dim() > 1 for p in groups[0]["params"])
    assert all(p.dim() == 1 for p in groups[1]["params"])
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted({id(p) for p in model.parameters()})
    assert all(g["lr_scale"] == 1 for g in groups)


def test_lora_plus_makes_b_learn_faster() -> None:
    method = MethodConfig(r=2, lora_plus_ratio=16, dora=True)
    model = lora.add_adapter(tiny("Qwen2"), method, seed=0)  # type: ignore[arg-type]
    config = OptimConfig(learning_rate=1e-3, weight_decay=0.1)
    slow, fast, vectors = parameter_groups(model, config, method)
    assert all("lora_A" in name for name in names_of(model, slow["params"]))
    assert all("lora_B" in name for name in names_of(model, fast["params"]))
    assert all("magnitude" in name for name in names_of(model, vectors["params"]))
    assert (slow["lr_scale"], fast["lr_scale"], vectors["lr_scale"]) == (1, 16, 1)
    assert fast["lr"] == pytest.approx(1.6e-2)
    assert vectors["weight_decay"] == 0
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sorted(names_of(model, slow["params"] + fast["params"] + vectors["params"])) == sorted(trained)
    plain = parameter_groups(model, config, MethodConfig(r=2, dora=True))
    assert [g["lr_scale"] for g in plain] == [1, 1]


def test_a_matrix_that_zero3_holds_as_a_shard_is_still_a_matrix() -> None:
    model = nn.Linear(4, 4)
    model.weight.ds_shape = torch.Size([4, 4])  # type: ignore[assignment]
    model.weight.data = torch.empty(0)
    matrices, vectors = parameter_groups(model, OptimConfig(weight_decay=0.1), MethodConfig(name="full"))
    assert matrices["params"] == [model.weight]
    assert vectors["params"] == [model.bias]


def test_nothing_to_train_is_said() -> None:
    with pytest.raises(UserError, match="no parameter"):
        make_optimizer(tiny("Qwen2").requires_grad_(False), OptimConfig(), MethodConfig())


class Problem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrix = nn.Linear(128, 64)
        self.inputs, self.outputs = torch.randn(256, 128), torch.randn(256, 64)

    def step(self, optimizer: torch.optim.Optimizer) -> float:
        loss = (self.matrix(self.inputs) - self.outputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())


def run(name: Any, steps: int) -> list[float]:
    problem = Problem()
    optimizer = make_optimizer(problem, OptimConfig(name=name, learning_rate=1e-2), MethodConfig(name="full"))
    return [problem.step(optimizer) for _ in range(steps)]


def test_eight_bits_learn_like_thirty_two() -> None:
    exact, short = run("adamw", 40), run("adamw_8bit", 40)
    assert exact[-1] < 0.7 * exact[0]
    assert short[-1] == pytest.approx(exact[-1], rel=0.03)


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit"])
def test_state_survives_a_safe_load_bit_for_bit(name: Any, tmp_path: Path) -> None:
    def make() -> tuple[Problem, torch.optim.Optimizer]:
        problem = Problem()
        config = OptimConfig(name=name, learning_rate=1e-2, weight_decay=0.1)
        return problem, make_optimizer(problem, config, MethodConfig(name="full"))

    problem, optimizer = make()
    for _ in range(3):
        problem.step(optimizer)
    torch.save({"model": problem.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    expected = [problem.step(optimizer) for _ in range(3)]

    again, restored = make()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state["model"])
    restored.load_state_dict(state["optimizer"])
    moments = restored.state[again.matrix.weight]
    if name == "adamw_8bit":
        assert moments["state1"].dtype == moments["state2"].dtype == torch.uint8
    else:
        assert moments["exp_avg"].dtype == torch.float32
    assert [again.step(restored) for _ in range(3)] == expected
    assert [g["lr_scale"] for g in restored.param_groups] == [1.0, 1.0]

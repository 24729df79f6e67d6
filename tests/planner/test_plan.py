"""The choice of a layout, and the no."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.cli import build_parser
from qwen_ray.config import RunConfig
from qwen_ray.errors import EXIT_OK, UserError
from qwen_ray.planner.hardware import GPUS, Hardware, hardware, nearest
from qwen_ray.planner.layouts import USABLE, layouts
from qwen_ray.planner.plan import Plan, choose_strategy, plan
from qwen_ray.planner.shapes import QWEN25
from qwen_ray.planner.text import count_tokens, plan_text
from qwen_ray.verbs import Output

_80GB = GPUS["h100-80gb"].memory


def _config(model: str = "7b", method: str = "full", **tree: Any) -> RunConfig:
    tree = {"data": {"max_length": 4096}, **tree}
    return RunConfig.model_validate({"model": {"name": model}, "method": {"name": method}, **tree})


def _plan(model: str, method: str, gpus: int, nodes: int = 1, gpu: str = "h100-80gb", **tree: Any) -> Plan:
    return plan(_config(model, method, **tree), hardware(gpu, gpus_per_node=gpus, nodes=nodes), 1e6)


def test_best_is_the_cheapest_that_fits() -> None:
    made = _plan("7b", "full", 8)
    assert made.best is not None
    assert made.best.memory.total <= made.hardware.gpu.memory * USABLE
    fitting = [x for x in made.tried if x.fits and not x.offloads]
    assert made.best.cost(1e6) <= 1.03 * min(x.cost(1e6) for x in fitting)
    assert any(not x.fits for x in made.tried)


def test_rows_a_step_stay_whatever_the_layout() -> None:
    config = _config(optim={"batch_size": 4, "gradient_accumulation": 2}, cluster={"workers": 4})
    for gpus, nodes in ((1, 1), (4, 1), (8, 2)):
        for layout in layouts(config, QWEN25["7b"], hardware("h100-80gb", gpus_per_node=gpus, nodes=nodes)):
            optim = layout.config.optim
            assert optim.batch_size * optim.gradient_accumulation * gpus * nodes == 32
            assert layout.config.cluster.workers == gpus * nodes


def test_offload_only_when_nothing_else_fits() -> None:
    alone = _plan("7b", "full", 1).best
    assert alone is not None
    assert alone.offloads
    assert alone.memory.host > 100e9
    many = _plan("7b", "full", 4).best
    assert many is not None
    assert not many.offloads


def test_offload_is_not_taken_even_where_it_would_be_cheaper() -> None:
    free = replace(GPUS["h100-80gb"], host=1e15, host_memory=10**15)  # moving costs nothing
    config = _config("14b", optim={"batch_size": 1, "gradient_accumulation": 1024})
    made = plan(config, Hardware(free, gpus_per_node=4), 1e6)
    assert made.best is not None
    assert not made.best.offloads
    assert min(x.cost(1e6) for x in made.tried if x.fits and x.offloads) < made.best.cost(1e6) / 1.03


def test_says_no_and_what_would_fit() -> None:
    made = _plan("14b", "full", 1)
    assert made.best is None
    assert "does not fit" in plan_text(made)
    assert "method.name=lora" in made.advice
    assert "2 x h100-80gb" in made.advice
    for change in made.advice:  # each is true
        key, equals, setting = change.partition("=")
        config, machine = _config("14b"), made.hardware
        if equals:
            section, name = key.split(".")
            setattr(getattr(config, section), name, int(setting) if setting.isdigit() else setting)
        else:
            machine = replace(machine, gpus_per_node=int(change.split()[0]))
        assert plan(config, machine, 1e6).fits, change
    as_json = made.to_dict()
    assert as_json["fits"] is False
    assert as_json["best"] is None
    assert as_json["nearest"]["refused"]


def test_a_longer_row_needs_more_and_a_shorter_one_is_advised() -> None:
    small = _plan("7b", "lora", 1, gpu="l4-24gb", data={"max_length": 16384})
    assert not small.fits
    shorter = next(a for a in small.advice if a.startswith("data.max_length"))
    assert _plan("7b", "lora", 1, gpu="l4-24gb", data={"max_length": int(shorter.split("=")[1])}).fits


def test_what_is_decided_stays() -> None:
    made = _plan("7b", "full", 8, strategy={"name": "deepspeed", "zero_stage": 3})
    assert {x.strategy for x in made.tried} == {"deepspeed zero 3"}
    made = _plan("7b", "lora", 8, compute={"activation_checkpointing": True})
    assert all(x.config.compute.activation_checkpointing for x in made.tried)


@pytest.mark.parametrize(
    ("asked", "tried"),
    [
        ({"zero_stage": 1}, {"deepspeed zero 1"}),
        (
            {"offload_optimizer": "cpu"},
            {"deepspeed zero 2, optimizer on cpu", "deepspeed zero 3, optimizer on cpu"},
        ),
        ({"zero_stage": 3, "offload_parameters": "cpu"}, {"deepspeed zero 3, parameters on cpu"}),
    ],
)
def test_auto_keeps_the_stage_and_the_offload_that_are_asked_for(
    asked: dict[str, Any], tried: set[str]
) -> None:
    made = _plan("3b", "full", 4, strategy=asked)
    assert {x.strategy for x in made.tried} == tried
    assert made.fits
    other = _plan("3b", "full", 4, strategy={"name": "ddp", **asked})
    assert not other.fits
    assert all("ddp would ignore" in x.refused for x in other.tried)


def test_eight_bit_state_in_too_large_a_piece_is_refused() -> None:
    made = _plan("14b", "full", 4, optim={"name": "adamw_8bit"}, strategy={"name": "deepspeed"})
    assert all("zero_stage 3" in x.refused for x in made.tried)
    assert "strategy.zero_stage=3" in made.advice
    free = _plan("14b", "full", 4, optim={"name": "adamw_8bit"}).best
    assert free is not None
    assert free.config.strategy.zero_stage == 3


@pytest.mark.parametrize("strategy", [{"name": "fsdp"}, {"name": "deepspeed", "zero_stage": 3}])
def test_four_bit_weights_are_not_sharded(strategy: dict[str, Any]) -> None:
    made = _plan("3b", "qlora", 8, strategy=strategy)
    assert not made.fits
    assert all("quantises a whole base only" in x.refused for x in made.tried)
    assert ("strategy.zero_stage=2" if "zero_stage" in strategy else "strategy.name=auto") in made.advice
    assert "What needs least" not in plan_text(made)  # there is nothing to weigh
    free = _plan("3b", "qlora", 8).best
    assert free is not None
    assert free.config.strategy.name == "ddp"


def test_eight_bit_state_is_not_sharded_by_fsdp() -> None:
    made = _plan("7b", "full", 8, optim={"name": "adamw_8bit"})
    assert made.best is not None
    assert made.best.config.strategy.name != "fsdp"
    assert not _plan("7b", "full", 8, optim={"name": "adamw_8bit"}, strategy={"name": "fsdp"}).fits


def test_rows_longer_than_the_model_are_refused() -> None:
    assert "32768 tokens" in _plan("3b", "lora", 1, data={"max_length": 65536}).nearest.refused


def test_more_gpus_are_faster_and_cost_nearly_the_same() -> None:
    one, eight = (_plan("7b", "lora", g).best for g in (1, 8))
    assert one is not None
    assert eight is not None
    assert eight.speed.tokens_per_second == pytest.approx(8 * one.speed.tokens_per_second, rel=0.05)
    assert eight.cost(1e9) == pytest.approx(one.cost(1e9), rel=0.05)


def test_cost_follows_price_tokens_and_epochs() -> None:
    config = _config("3b", "lora", optim={"epochs": 2})
    made = plan(config, hardware("h100-80gb", price=7.0), 5e6)
    assert made.tokens == 1e7
    assert made.best is not None
    seconds = 1e7 / made.best.speed.tokens_per_second
    assert made.best.cost(made.tokens) == pytest.approx(seconds / 3600 * 7.0)
    steps = plan(_config("3b", "lora", optim={"max_steps": 10}), hardware("h100-80gb"), 5e6)
    assert steps.tokens == 10 * 32 * 4096


def test_what_costs_nothing_is_still_to_be_fast() -> None:
    config = _config("1.5b", data={"max_length": 2048})
    dear, free = (plan(config, hardware("l4-24gb", gpus_per_node=8, price=p), 1e6) for p in (2.0, 0.0))
    assert free.best is not None
    assert dear.best is not None
    assert free.best.config == dear.best.config


def test_slow_network_favours_fewer_bytes() -> None:
    fast = hardware("h100-80gb", gpus_per_node=8, nodes=2)
    slow = hardware("h100-80gb", gpus_per_node=8, nodes=2, network=64)
    assert (fast.collective, slow.collective) == (400e9, 8e9)
    a, b = (plan(_config("3b"), machine, 1e6).best for machine in (fast, slow))
    assert a is not None
    assert b is not None
    assert b.speed.tokens_per_second < a.speed.tokens_per_second
    assert b.speed.exchange > a.speed.exchange


def test_json_holds_every_layout_and_adds_up() -> None:
    made = _plan("7b", "full", 8)
    value = json.loads(json.dumps(made.to_dict(every=True)))
    assert len(value["layouts"]) == len(made.tried)
    sizes = value["best"]["memory"]
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers", "context")
    assert sum(sizes[p] for p in parts) == pytest.approx(sizes["total"], abs=10)
    best = value["best"]
    assert sum(best["step_parts"].values()) == pytest.approx(best["step_seconds"])
    assert best["tokens_per_second"] == pytest.approx(best["rows_per_step"] * 4096 / best["step_seconds"])
    text = plan_text(made, every=True)
    assert text.count("chosen") == 1
    assert "cost" in text


def test_choose_strategy() -> None:
    lora = _config("7b", "lora", optim={"batch_size": 1}, cluster={"workers": 8})
    strategy, compute, reason = choose_strategy(lora, 0, 0)
    assert (strategy.name, compute.activation_checkpointing) == ("ddp", False)
    assert "no GPU" in reason
    assert choose_strategy(lora, 8, _80GB)[0].name == "ddp"
    strategy, compute, reason = choose_strategy(
        _config("14b", optim={"batch_size": 1}, cluster={"workers": 8}), 8, _80GB
    )
    assert strategy.name in {"fsdp", "deepspeed"}
    assert compute.activation_checkpointing
    assert "activation checkpointing" in reason
    strategy, _, reason = choose_strategy(_config("32b"), 1, _80GB)
    assert "nothing that was tried is predicted to fit" in reason
    named = _config("14b", strategy={"name": "ddp"})
    assert choose_strategy(named, 8, _80GB)[0] == named.strategy
    assert choose_strategy(_config("tiny"), 1, 24 * 10**9)[0].name == "ddp"


def test_choose_strategy_does_without_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    small = GPUS["a100-40gb"].memory
    many = _config("7b", optim={"batch_size": 1}, cluster={"workers": 16})
    assert choose_strategy(many, 16, small)[0].name == "deepspeed"
    monkeypatch.setattr("qwen_ray.planner.plan.find_spec", lambda name: None)
    assert choose_strategy(many, 16, small)[0].name == "fsdp"
    assert choose_strategy(_config("7b"), 1, _80GB)[0].name == "deepspeed"  # nothing else fits


def test_choose_strategy_keeps_the_batch() -> None:
    big = _config("7b", "lora", optim={"batch_size": 4})
    strategy, compute, _ = choose_strategy(big, 1, _80GB)
    assert strategy.name == "ddp"
    assert compute.activation_checkpointing  # four rows do not fit without


def test_choose_strategy_of_a_model_it_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    strategy, _, reason = choose_strategy(_config(str(tmp_path)), 8, _80GB)
    assert strategy.name == "ddp"
    assert "gpt2" in reason


def test_hardware() -> None:
    assert hardware("h100-80gb", gpus_per_node=8, nodes=2).gpus == 16
    assert nearest(47 * 10**9).name == "l40s-48gb"
    assert nearest(47 * 10**9).memory == 47 * 10**9
    assert isinstance(hardware("l4-24gb"), Hardware)
    wrong: list[dict[str, Any]] = [{"gpu": "h100"}, {"gpu": "l4-24gb", "nodes": 0}]
    wrong += [{"gpu": "l4-24gb", "price": price} for price in (-1, float("nan"), float("inf"))]
    for arguments in [*wrong, {"gpu": "l4-24gb", "network": 0}]:
        with pytest.raises(UserError):
            hardware(**arguments)


@pytest.mark.parametrize(
    ("asked", "rows"),
    [(["--gpus", "4", "--nodes", "2"], 256), (["--gpus", "4", "--set", "cluster.workers=1"], 32)],
)
def test_the_verb_plans_a_worker_for_each_gpu(asked: list[str], rows: int) -> None:
    words = ["plan", "--json", "--model", "3b", "--set", "optim.max_steps=10", *asked]
    args, stdout = build_parser().parse_args(words), io.StringIO()
    assert args.verb(args, Output(stdout, as_json=True)) == EXIT_OK
    made = json.loads(stdout.getvalue())
    assert made["best"]["rows_per_step"] == rows
    assert made["tokens"] == 10 * rows * made["sequence_length"]


@pytest.mark.parametrize("tokens", ["nan", "inf", "0", "-5e6"])
def test_the_verb_refuses_a_number_of_tokens_that_is_none(tokens: str) -> None:
    args = build_parser().parse_args(["plan", "--model", "3b", f"--tokens={tokens}"])
    with pytest.raises(UserError, match="cannot be trained on"):
        args.verb(args, Output(io.StringIO(), as_json=False))


def test_tokens_of_a_file_are_those_of_training(data_file: Path) -> None:
    from qwen_ray import models
    from qwen_ray.data.formats import load_examples
    from qwen_ray.data.tokenise import render

    tokenizer = models.load_tokenizer(models.resolve("tiny"))
    whole = sum(
        len(tokenizer(render(r, tokenizer)[0], add_special_tokens=False)["input_ids"])
        for r in load_examples(data_file)
    )
    assert count_tokens([data_file], "tiny", max_length=4096) == whole
    assert count_tokens([data_file], "tiny", max_length=16) <= 180 * 16

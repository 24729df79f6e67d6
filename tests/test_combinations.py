"""Combinations that would not train what they say are refused with a reason; the others pass."""

from __future__ import annotations

from typing import Any

import pytest

from qwen_ray import combinations
from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError


@pytest.mark.parametrize(
    ("sets", "match"),
    [
        ({"method.init": "orthogonal", "method.r": 5}, "5 is odd"),
        ({"method.name": "qlora", "strategy.name": "fsdp"}, "fsdp reads and shards"),
        (
            {"method.name": "qlora", "strategy.name": "deepspeed", "strategy.zero_stage": 3},
            "ZeRO stage 3 reads and shards",
        ),
        ({"method.name": "full", "optim.name": "adamw_8bit", "strategy.name": "fsdp"}, "holds shards"),
        ({"precision": "fp16", "strategy.name": "fsdp"}, "no loss scaling"),
        ({"precision": "pure_bf16", "strategy.name": "deepspeed"}, "float32 master"),
        ({"strategy.name": "deepspeed", "strategy.offload_parameters": "cpu"}, "none to offload"),
        (
            {
                "strategy.name": "deepspeed",
                "strategy.zero_stage": 3,
                "strategy.offload_optimizer": "nvme",
            },
            "needs a folder",
        ),
        (
            {
                "strategy.name": "deepspeed",
                "strategy.offload_optimizer": "nvme",
                "strategy.nvme_path": "/local_nvme",
            },
            "stage 2 holds an offloaded optimizer's state in host memory",
        ),
        (
            {
                "strategy.name": "deepspeed",
                "strategy.offload_optimizer": "cpu",
                "optim.name": "adamw_8bit",
            },
            "steps on the host",
        ),
        (
            {
                "strategy.name": "deepspeed",
                "strategy.zero_stage": 3,
                "method.targets": ["lm_head", "q_proj"],
            },
            "for each chunk",
        ),
        (
            {"strategy.name": "deepspeed", "strategy.zero_stage": 3, "method.targets": ["q_proj", ".*_head"]},
            "for each chunk",
        ),
        ({"method.name": "qlora", "method.init": "pissa"}, "rounded a second time"),
        ({"method.name": "qlora", "method.init": "olora"}, "rounded a second time"),
        ({"method.init": "pissa", "strategy.name": "fsdp"}, "every rank would"),
        (
            {"method.init": "olora", "strategy.name": "deepspeed", "strategy.zero_stage": 3},
            "every rank would",
        ),
        ({"strategy.name": "ddp", "strategy.offload_optimizer": "cpu"}, "ddp would ignore offload_optimizer"),
        ({"strategy.name": "fsdp", "strategy.zero_stage": 3}, "fsdp would ignore zero_stage=3"),
        ({"strategy.offload_parameters": "cpu", "cluster.workers": 0}, "in this process auto is ddp"),
        (
            {
                "strategy.name": "deepspeed",
                "optim.name": "adamw_8bit",
                "cluster.workers": 2,
                "cluster.min_workers": 1,
            },
            "another number of workers",
        ),
    ],
)
def test_unsound_combinations_are_refused(sets: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        combinations.check(_config(sets))


@pytest.mark.parametrize(
    "sets",
    [
        {"method.name": "full", "strategy.name": "fsdp", "method.init": "pissa"},
        {"method.init": "orthogonal", "method.r": 6},
        {"method.init": "pissa", "strategy.name": "deepspeed", "strategy.zero_stage": 2},
        {"method.name": "qlora", "method.dora": True, "strategy.name": "ddp"},
        {"method.name": "qlora", "strategy.name": "deepspeed", "strategy.zero_stage": 2},
        {"method.dora": True, "strategy.name": "fsdp"},
        {"strategy.name": "deepspeed", "strategy.zero_stage": 3, "method.targets": ["head", ".*_proj"]},
        {"method.name": "qlora", "strategy.name": "auto"},
        {"strategy.offload_parameters": "cpu", "strategy.zero_stage": 3, "cluster.workers": 1},
        {
            "strategy.name": "deepspeed",
            "optim.name": "adamw_8bit",
            "cluster.workers": 2,
            "cluster.min_workers": 2,
        },
    ],
)
def test_sound_ones_pass(sets: dict[str, Any]) -> None:
    combinations.check(_config(sets))


@pytest.mark.parametrize(
    ("workers", "sets", "refused"),
    [
        (2, {}, True),
        (3, {}, False),
        (2, {"strategy.zero_stage": 1}, True),
        (2, {"strategy.zero_stage": 3}, False),
        (2, {"strategy.name": "ddp"}, False),
        (2, {"optim.name": "adamw"}, False),
    ],
)
def test_pieces_of_eight_bit_state_are_counted_in_32_bits(
    workers: int, sets: dict[str, Any], refused: bool
) -> None:
    config = _config({"strategy.name": "deepspeed", "optim.name": "adamw_8bit", **sets})
    assert bool(combinations.oversize(config, 2**32, workers)) == refused
    assert not combinations.oversize(config, 2**32 - 2, workers)


def _config(sets: dict[str, Any]) -> RunConfig:
    config = RunConfig()
    for key, value in sets.items():
        *section, name = key.split(".")
        setattr(getattr(config, section[0]) if section else config, name, value)
    return config

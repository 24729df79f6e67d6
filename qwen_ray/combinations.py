"""What goes together of method, initialisation, optimizer, precision and strategy, and why others do not."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from qwen_ray.config import RunConfig, StrategyConfig
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.peft_folder import CHANGES_BASE

HEAD = "lm_head"  # as the models of the catalogue name it


def check(config: RunConfig) -> None:
    """Refuse, with the reason, a combination that would not train what it says.

    ``strategy.name: auto`` is let through: call again with the planner's choice.
    """
    for refusal in (*_ignored(config), *_strategy(config), *_adapter(config)):
        raise refusal


def unsound(config: RunConfig) -> str:
    """Why a configuration is refused, in words; empty if it is not."""
    try:
        check(config)
    except UserError as e:
        return e.what
    return ""


def of_deepspeed(strategy: StrategyConfig) -> dict[str, Any]:
    """Settings that only deepspeed heeds and that are not at their defaults: somebody asked for them."""
    every = StrategyConfig.model_fields
    keys = ("zero_stage", "offload_optimizer", "offload_parameters")
    return {key: getattr(strategy, key) for key in keys if getattr(strategy, key) != every[key].default}


def oversize(config: RunConfig, trained: int, workers: int) -> str:
    """Why ``trained`` weights over ``workers`` are too many for 8-bit AdamW; empty if they are not."""
    strategy = config.strategy
    if config.optim.name != "adamw_8bit" or strategy.name != "deepspeed" or strategy.zero_stage == 3:
        return ""
    piece = -(-trained // workers)
    if piece < 2**31:  # bitsandbytes counts in 32 bits
        return ""
    return (
        f"ZeRO stage {strategy.zero_stage} holds a worker's share as one flat piece, here of "
        f"{piece / 1e9:.1f} billion weights, and bitsandbytes steps at most 2.1 billion at once; "
        "zero_stage 3 has smaller pieces"
    )


def _ignored(config: RunConfig) -> Iterator[UserError]:
    strategy = config.strategy
    alone = strategy.name == "auto" and config.cluster.workers == 0
    if not alone and strategy.name not in {"ddp", "fsdp"}:
        return
    for key, value in of_deepspeed(strategy).items():
        what = "in this process auto is ddp, which" if alone else strategy.name
        yield UserError(
            f"{what} would ignore {key}={value}: it is DeepSpeed's",
            where=f"strategy.{key}",
            fix=f"strategy.name=deepspeed{' with --workers 1 or more' if alone else ''}, or leave it out",
        )


def matches(target: str, names: list[str]) -> list[str]:
    """Those of the layers ``names`` that a name in ``method.targets`` means: it is the end of a name, a full
    name or, if no layer has it, a regular expression over full names."""
    found = [name for name in names if name == target or name.endswith(f".{target}")]
    if not found:
        with contextlib.suppress(re.error):
            found = [name for name in names if re.fullmatch(target, name)]
    return found


def layers_named(target: str, names: list[str]) -> list[str]:
    """:func:`matches`, of which there must be one: else :class:`UserError`."""
    found = matches(target, names)
    if not found:
        last = re.split(r"[.\\]", target)[-1]
        raise UserError(
            f"the model has no linear layer '{target}'",
            where="method.targets",
            fix=did_you_mean(last, {name.split(".")[-1] for name in names}),
        )
    return found


def tied_head(name: str) -> UserError:
    """Why an adapter on the output head, the layer ``name``, is refused where it is the embedding."""
    return UserError(
        f"'{name}' is the output head, which shares its weights with the input embedding: an adapter "
        "on it could not be merged without changing the embedding too",
        where="method.targets",
        fix="leave it out",
    )


def head_in_shards(name: str) -> UserError:
    """Why an adapter on the output head, the layer ``name``, is refused at ZeRO stage 3: it would hang."""
    return UserError(
        "stage 3 gathers the output head anew for each chunk of the loss, and ranks have different "
        "numbers of chunks",
        where="method.targets",
        fix=f"leave {name} out, or strategy ddp, fsdp or deepspeed with zero_stage 1 or 2",
    )


def _strategy(config: RunConfig) -> Iterator[UserError]:
    strategy, optim = config.strategy, config.optim
    if strategy.name == "fsdp":
        if optim.name == "adamw_8bit":
            yield UserError(
                "bitsandbytes' optimizer steps whole tensors, and fsdp holds shards of them",
                where="optim.name",
                fix="optim.name=adamw, or strategy ddp or deepspeed",
            )
        if config.precision == "fp16":
            yield UserError(
                "fsdp has no loss scaling, and float16 gradients underflow without it",
                where="precision",
                fix="precision=bf16 where the GPU has it, else ddp or deepspeed",
            )
    if strategy.name != "deepspeed":
        return
    if config.precision == "pure_bf16":
        yield UserError(
            "DeepSpeed keeps float32 master weights, which pure_bf16 does without",
            where="precision",
            fix="precision=bf16, or strategy ddp or fsdp",
        )
    if strategy.offload_parameters != "none" and strategy.zero_stage < 3:
        yield UserError(
            f"ZeRO stage {strategy.zero_stage} keeps all parameters on each GPU: there are none to offload",
            where="strategy.offload_parameters",
            fix="strategy.zero_stage=3, or strategy.offload_parameters=none",
        )
    if strategy.offload_optimizer == "nvme" and strategy.zero_stage < 3:
        yield UserError(
            f"ZeRO stage {strategy.zero_stage} holds an offloaded optimizer's state in host memory, not on "
            "NVMe",
            where="strategy.offload_optimizer",
            fix="strategy.zero_stage=3, or strategy.offload_optimizer=cpu",
        )
    offloads = {strategy.offload_parameters, strategy.offload_optimizer}
    if "nvme" in offloads and not strategy.nvme_path:
        yield UserError(
            "offload to NVMe needs a folder on the disk",
            where="strategy.nvme_path",
            fix="for example strategy.nvme_path=/local_nvme",
        )
    if strategy.offload_optimizer != "none" and optim.name != "adamw":
        yield UserError(
            f"an offloaded optimizer steps on the host, and {optim.name} is a GPU's",
            where="optim.name",
            fix="optim.name=adamw, or strategy.offload_optimizer=none",
        )
    elastic = config.cluster.min_workers not in {None, config.cluster.workers}
    if optim.name == "adamw_8bit" and elastic:
        yield UserError(
            "DeepSpeed cannot divide 8-bit state among another number of workers",
            where="cluster.min_workers",
            fix="optim.name=adamw, or no min_workers",
        )


def _adapter(config: RunConfig) -> Iterator[UserError]:
    method, strategy = config.method, config.strategy
    if method.name == "full":
        return
    shards = strategy.name == "fsdp" or (strategy.name == "deepspeed" and strategy.zero_stage == 3)
    if method.init == "orthogonal" and method.r % 2:
        yield UserError(
            f"orthogonal initialisation splits the rank in two halves, and {method.r} is odd",
            where="method.r",
            fix=f"for example method.r={method.r + 1}",
        )
    if method.name == "qlora" and method.init in CHANGES_BASE:
        yield UserError(
            f"{method.init} takes a part out of the base's weights, and 4-bit weights cannot hold what "
            "is left: they would be rounded a second time",
            where="method.init",
            fix="method.init=default, or method.name=lora",
        )
    if method.name == "qlora" and shards:
        # Not impossible: both do shard bitsandbytes' packed bytes, once a rank has them whole.
        yield UserError(
            f"{'fsdp' if strategy.name == 'fsdp' else 'ZeRO stage 3'} reads and shards the base layer by "
            "layer in 16 bits; this version quantises a whole base only",
            where="strategy.name" if strategy.name == "fsdp" else "strategy.zero_stage",
            fix="ddp, or deepspeed with zero_stage 1 or 2: a 4-bit base is small (14B: 10 GB)",
        )
    named = method.targets if isinstance(method.targets, list) else []
    of_head = any(matches(target, [HEAD]) for target in named)
    if strategy.name == "deepspeed" and strategy.zero_stage == 3 and of_head:
        yield head_in_shards(HEAD)
    if method.init in CHANGES_BASE and shards:
        yield UserError(
            f"{method.init} factorises each whole weight; where weights are shards, every rank would "
            "factorise its own copy, and signs and rotations differ from one machine to the next",
            where="method.init",
            fix="method.init=default, or strategy ddp or deepspeed with zero_stage 1 or 2",
        )

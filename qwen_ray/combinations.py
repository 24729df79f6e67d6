"""What goes together of method, initialisation, optimizer, precision and strategy, and why others do not."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError

CHANGES_BASE = ("pissa", "olora")
"""Initialisations that move a part of the base's weights into the adapter."""


def check(config: RunConfig) -> None:
    """Refuse, with the reason, a combination that would not train what it says.

    ``strategy.name: auto`` is let through: call again with the planner's choice.
    """
    for refusal in (*_strategy(config), *_adapter(config)):
        raise refusal


def unsound(config: RunConfig) -> str:
    """Why a configuration is refused, in words; empty if it is not."""
    try:
        check(config)
    except UserError as e:
        return e.what
    return ""


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
    if strategy.name == "deepspeed" and strategy.zero_stage == 3 and "lm_head" in method.targets:
        yield UserError(
            "stage 3 gathers the output head anew for each chunk of the loss, and ranks have different "
            "numbers of chunks",
            where="method.targets",
            fix="leave lm_head out, or strategy ddp, fsdp or deepspeed with zero_stage 1 or 2",
        )
    if method.init in CHANGES_BASE and shards:
        yield UserError(
            f"{method.init} factorises each whole weight; where weights are shards, every rank would "
            "factorise its own copy, and signs and rotations differ from one machine to the next",
            where="method.init",
            fix="method.init=default, or strategy ddp or deepspeed with zero_stage 1 or 2",
        )

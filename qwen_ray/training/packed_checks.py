"""Which runs can share a frozen base, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qwen_ray import combinations
from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.peft_folder import CHANGES_BASE

if TYPE_CHECKING:
    from qwen_ray.training.precision import Precision

_PLAIN = "train it as a plain trial (trials.kind: plain)"


def check(config: RunConfig, base: RunConfig | None = None) -> None:
    """Raise :class:`UserError` where ``config`` cannot be trained in a pack (on the base of ``base``)."""
    combinations.check(config)
    for refusal in (*_alone(config), *(_beside(config, base) if base else ())):
        raise refusal


def check_numbers(numbers: Precision) -> None:
    """Raise :class:`UserError` where a pack cannot train in what the device made of ``precision: auto``."""
    if numbers.scales_loss:
        raise _scaled("this GPU has no bf16, and float16", "fp32")


def _scaled(what: str, others: str) -> UserError:
    return UserError(
        f"{what} needs loss scaling, which one trial's overflow would change for all",
        where="precision",
        fix=f"precision={others}, or {_PLAIN}",
    )


def _alone(config: RunConfig) -> Iterator[UserError]:
    method, compute = config.method, config.compute
    if method.name != "lora":
        yield UserError(
            f"a pack trains LoRA adapters over one frozen base, and the method is {method.name}",
            where="method.name",
            fix=f"method.name=lora, or {_PLAIN}",
        )
    if method.dora:
        yield UserError(
            "DoRA rescales the base's output, which a pack shares",
            where="method.dora",
            fix=f"method.dora=false, or {_PLAIN}",
        )
    if method.init in CHANGES_BASE:
        yield UserError(
            f"{method.init} moves a part of the base's weights into the adapter, and a pack shares the base",
            where="method.init",
            fix=f"method.init=default, gaussian or orthogonal, or {_PLAIN}",
        )
    if config.optim.name != "adamw":
        yield UserError(
            f"{config.optim.name} does not keep a trial's state apart",
            where="optim.name",
            fix=f"optim.name=adamw, or {_PLAIN}",
        )
    if config.precision == "fp16":
        yield _scaled("float16", "bf16 or fp32")
    if (config.cluster.workers or 0) > 1 or config.strategy.name not in {"auto", "ddp"}:
        yield UserError(
            "the trials of a pack are trained in one process",
            where="cluster.workers" if (config.cluster.workers or 0) > 1 else "strategy.name",
            fix=f"cluster.workers=0 and strategy.name=auto, or {_PLAIN}",
        )
    if compute.compile:
        yield UserError(
            "a pack's layers are not compiled", where="compute.compile", fix=f"turn it off, or {_PLAIN}"
        )
    if compute.attention == "block_mask":
        yield UserError(
            "one masked matrix would carry a diverged trial's NaN into the others (0 x NaN is NaN)",
            where="compute.attention",
            fix="compute.attention=auto",
        )
    if compute.loss == "liger":
        yield UserError(
            "Liger's loss gives the sum over a batch only, not each trial's",
            where="compute.loss",
            fix="compute.loss=auto",
        )
    if config.evaluate.suites:
        yield UserError(
            "benchmarks of the live weights are not run inside a pack",
            where="evaluate.suites",
            fix=f"leave them out (a sweep confirms its best trials), or {_PLAIN}",
        )


def _beside(config: RunConfig, base: RunConfig) -> Iterator[UserError]:
    for where, own, shared in (
        ("model.name", config.model.name, base.model.name),
        ("precision", config.precision, base.precision),
    ):
        if own != shared:
            yield UserError(
                f"the pack's base is held as {where}={shared}, and this trial has {own}",
                where=where,
                fix=f"give all trials of a pack the same, or {_PLAIN}",
            )

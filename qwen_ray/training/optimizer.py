"""AdamW over what is trained: which parameters decay, which learn faster, and in how many bits.

Each group carries ``lr_scale``; the loop sets ``group["lr"] = rate * group["lr_scale"]`` every step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qwen_ray.config import MethodConfig, OptimConfig
from qwen_ray.errors import UserError


def make_optimizer(model: nn.Module, config: OptimConfig, method: MethodConfig) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over the parameters of ``model`` that require a gradient.

    Its state has the parameters' format, so float32 for float32 weights; with ``adamw_8bit`` (arXiv
    2110.02861) moments of 4096 values and more take a byte a value. Raises :class:`UserError` if nothing is
    trained or bitsandbytes is missing.
    """
    groups = parameter_groups(model, config, method)
    common: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as e:
            raise UserError(
                f"bitsandbytes cannot be imported: {e}",
                where="optim.name",
                fix="pip install bitsandbytes, or use adamw",
            ) from None
        optimizer: torch.optim.Optimizer = AdamW8bit(groups, **common)
        return optimizer
    return torch.optim.AdamW(groups, **common, fused=_fuses(groups))


def parameter_groups(model: nn.Module, config: OptimConfig, method: MethodConfig) -> list[dict[str, Any]]:
    """Groups of trained parameters, in the order of the model's names: so equal on every rank.

    Matrices decay, vectors do not (biases, norms, DoRA magnitudes). With LoRA+ (arXiv 2402.12354) the
    matrices B are a group that learns ``lora_plus_ratio`` times as fast. Parameters held as one flat or empty
    piece (ZeRO-3) are told apart by their true shape.
    """
    kinds: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():  # each tied parameter once
        if parameter.requires_grad:
            matrix = len(getattr(parameter, "ds_shape", parameter.shape)) > 1
            faster = method.lora_plus_ratio != 1 and ("lora_B." in name or "lora_embedding_B." in name)
            kinds.setdefault((matrix, faster), []).append(parameter)
    if not kinds:
        raise UserError("no parameter of the model is trained", where="method", fix="check method.targets")
    groups = []
    for (matrix, faster), parameters in sorted(kinds.items(), key=lambda kind: (not kind[0][0], kind[0][1])):
        scale = method.lora_plus_ratio if faster else 1.0
        groups.append(
            {
                "params": parameters,
                "lr": config.learning_rate * scale,
                "lr_scale": scale,
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
        )
    return groups


def _fuses(groups: list[dict[str, Any]]) -> bool:
    """One kernel steps all parameters of a device: where they are real (no meta tensors) and floating."""
    parameters = [p for group in groups for p in group["params"]]
    return all(p.device.type in {"cuda", "cpu"} and p.is_floating_point() for p in parameters)

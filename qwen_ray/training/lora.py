"""LoRA through PEFT: wrapping a model, and what PEFT is told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def add_adapter(model: PreTrainedModel, config: MethodConfig) -> PeftModel:
    """Freeze ``model`` and put a fresh adapter on it (B is zero, so it changes nothing yet)."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model,
        LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=target_modules(model, config),
            use_rslora=config.rslora,
            bias="none",
            task_type="CAUSAL_LM",
        ),
    )


def target_modules(model: PreTrainedModel, config: MethodConfig) -> list[str]:
    """Names of the linear layers that get an adapter, as short as PEFT takes them (``q_proj``)."""
    head = model.get_output_embeddings()
    linear = sorted(
        {
            name.split(".")[-1]
            for name, m in model.named_modules()
            if isinstance(m, nn.Linear) and m is not head
        }
    )
    if config.targets == "all-linear":
        return linear
    wanted = ["q_proj", "v_proj"] if config.targets == "qv" else list(config.targets)
    for name in wanted:
        if name not in linear:
            raise UserError(
                f"the model has no linear layer '{name}'",
                where="method.targets",
                fix=did_you_mean(name, linear),
            )
    return wanted

"""A LoRA adapter as PEFT saves it: a folder with these files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ray.errors import UserError

if TYPE_CHECKING:
    import torch

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that move a part of the base's weights into the adapter."""


def check_adapter(folder: Path, *required: str, fix: str) -> None:
    """Raise :class:`UserError` where a folder lacks one of these files."""
    for name in required:
        if not (folder / name).is_file():
            raise UserError(f"not a PEFT adapter folder: {name} is missing", where=str(folder), fix=fix)


def check_tensor(key: str, value: torch.Tensor, path: Path) -> None:
    """Raise :class:`UserError` (409) where a tensor of the weights in ``path`` holds NaN or infinity."""
    if not value.isfinite().all():
        raise UserError(f"'{key}' holds NaN or infinity", where=str(path), fix="train it again", status=409)

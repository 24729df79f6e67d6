"""Number formats: what ``precision: auto`` means on this device, and what runs in it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """``compute`` is the format of matrix products and of frozen weights; ``trained`` that of the weights
    that are trained and of the optimizer's state."""

    compute: torch.dtype
    trained: torch.dtype = torch.float32

    @property
    def scales_loss(self) -> bool:
        """float16 underflows without loss scaling (arXiv 1710.03740)."""
        return self.compute == torch.float16

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.compute == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.compute)


def choose(name: str, device: torch.device) -> Precision:
    """bf16 where the device has it; on a GPU without it fp16; on a CPU fp32."""
    if name == "auto":
        if device.type != "cuda":
            name = "fp32"
        else:
            name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name == "pure_bf16":
        return Precision(torch.bfloat16, trained=torch.bfloat16)
    return Precision({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name])

"""LoRA adapters as vLLM takes them: checked against the model, and rewritten.

vLLM reads adapters from folders. It gets folders that we write, from matrices that
:func:`~qwen_ray.serving.lora_weights.read_lora` has accepted, with every scale folded in and every rank the
same: no file of a user is opened twice, and no setting of PEFT can mean another thing to vLLM.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from qwen_ray import models
from qwen_ray.errors import UserError
from qwen_ray.peft_folder import CONFIG, WEIGHTS
from qwen_ray.serving.lora_weights import LoraWeights
from qwen_ray.serving.multilora import MultiLora

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANKS = (8, 16, 32, 64, 128, 256, 512)
"""The greatest rank that vLLM can be started for is one of these."""

_PROBED = 7  # layers that a probe adapter touches: the linear layers of one block of Qwen's


def blueprint(ref: models.ModelRef, dtype: torch.dtype) -> PreTrainedModel:
    """The model without its weights: names and shapes of its layers, and its generation settings."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    folder = models.model_folder(ref)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


class Shapes:
    """Which adapters fit the model, and how large each is that was accepted."""

    def __init__(self, model: PreTrainedModel, *, max_rank: int) -> None:
        self._max_rank = max_rank
        # It checks names and shapes as it puts an adapter on; on the meta device that costs nothing.
        self._accepted = MultiLora(model)
        self._head = next(
            (name for name, part in model.named_modules() if part is model.get_output_embeddings()), None
        )
        linear = [(n, part) for n, part in model.named_modules() if isinstance(part, nn.Linear)]
        self._probed = [(n, part.in_features, part.out_features) for n, part in linear if n != self._head]

    def __contains__(self, key: str) -> bool:
        return key in self._accepted

    def __len__(self) -> int:
        return len(self._accepted.keys)

    def accept(self, key: str, weights: LoraWeights) -> int:
        """The bytes that the adapter takes. :class:`UserError` (409) if it does not fit."""
        if self._head in weights.layers:
            raise UserError(
                "the adapter targets the output layer, which the vLLM engine does not serve",
                where=weights.where,
                fix="merge it into the base model, or use the embedded engine (engine: torch)",
                status=409,
            )
        rank = _rank(weights)
        if rank > self._max_rank:
            raise UserError(
                f"the adapter has rank {rank}, and this server was started for {self._max_rank} at most",
                where=weights.where,
                fix=f"start it with max_rank: {next((r for r in RANKS if r >= rank), rank)}",
                status=409,
            )
        self._accepted.add(key, weights)
        return self._accepted.nbytes(key)

    def forget(self, key: str) -> None:
        self._accepted.remove(key)

    def probe(self, number: int) -> LoraWeights:
        """A random adapter with a great effect on the model's answers, the same for the same number."""
        random = torch.Generator().manual_seed(number)
        layers = {}
        for name, inputs, outputs in self._probed[:_PROBED]:
            a = torch.randn(8, inputs, generator=random) / inputs**0.5
            layers[name] = (a, torch.randn(outputs, 8, generator=random))
        nbytes = sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
        return LoraWeights(layers, nbytes, f"probe {number}")


def write_lora(weights: LoraWeights, folder: Path, dtype: torch.dtype) -> None:
    """Write an adapter as a PEFT folder of one rank and scale 1."""
    from safetensors.torch import save_file

    rank = _rank(weights)
    tensors: dict[str, torch.Tensor] = {}
    for name, (a, b) in weights.layers.items():
        missing = rank - a.shape[0]
        tensors[f"base_model.model.{name}.lora_A.weight"] = (
            F.pad(a, (0, 0, 0, missing)).to(dtype).contiguous()
        )
        tensors[f"base_model.model.{name}.lora_B.weight"] = F.pad(b, (0, missing)).to(dtype).contiguous()
    targets = sorted({name.rpartition(".")[2] for name in weights.layers})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config))


def _rank(weights: LoraWeights) -> int:
    return max(a.shape[0] for a, _ in weights.layers.values())

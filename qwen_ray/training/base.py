"""The model that training starts from: whole on one device, or one layer at a time.

Whole is for strategies that keep a copy on every rank. Layer by layer is for sharded ones: the model is
built without memory, each layer is read from the files, handed to the strategy and sharded before the next
is read, so that no rank ever holds more than its shard and one layer (14B: 0.6 GB in bf16).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qwen_ray import models
from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.peft_folder import CHANGES_BASE
from qwen_ray.training import lora
from qwen_ray.training.attention import ATTENTION, register
from qwen_ray.training.memory import decoder_layers
from qwen_ray.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwen_ray.models import ModelRef


def load_base(
    ref: ModelRef,
    config: RunConfig,
    numbers: Precision,
    device: torch.device,
    adapter: Path | None = None,
) -> PreTrainedModel:
    """The whole model with a fresh adapter on it, if the method trains one.

    ``adapter``: a saved one instead, needed where the adapter's start changed the base.
    """
    register()
    method = config.method
    if method.name == "full":
        return models.load_model(ref, dtype=numbers.trained, attention=ATTENTION)
    if method.name == "qlora":
        from qwen_ray.training.quantize import load_quantized

        model = load_quantized(ref, method, numbers.compute, device, attention=ATTENTION)
    else:
        model = models.load_model(ref, dtype=numbers.compute, attention=ATTENTION)
    if adapter is None or method.init not in CHANGES_BASE:
        return lora.add_adapter(model, method, seed=config.seed, dtype=numbers.trained)
    model = lora.add_adapter(model, method, seed=config.seed, initialise=False, dtype=numbers.trained)
    lora.load_adapter(model, method, adapter)
    return model


def load_layerwise(
    ref: ModelRef,
    config: RunConfig,
    numbers: Precision,
    device: torch.device,
    place: Callable[[nn.Module], None],
) -> PreTrainedModel:
    """The same model, each decoder layer given to ``place`` as soon as it has its weights.

    What is outside the layers (embeddings, final norm, head) comes last and is left to the caller.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    full = config.method.name == "full"
    folder = models.model_folder(ref)
    settings = AutoConfig.from_pretrained(str(folder))
    dtype = numbers.trained if full else numbers.compute
    with init_empty_weights(include_buffers=False):  # buffers are computed, not stored: they stay real
        model: Any = AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation=ATTENTION)
    model.tie_weights()
    if not full:
        model = lora.add_adapter(
            model, config.method, seed=config.seed, initialise=False, dtype=numbers.trained
        )
    files = _Files(folder)
    made: dict[int, nn.Parameter] = {}  # by the empty parameter: tied weights stay one

    def materialise(module: nn.Module, prefix: str) -> None:
        for name, owner in list(module.named_modules(prefix=prefix)):
            for key, empty in list(owner._parameters.items()):
                if empty is None or empty.device.type != "meta":
                    continue
                if id(empty) not in made:
                    made[id(empty)] = _read(files, f"{name}.{key}", empty, device)
                    held.append(empty)
                owner._parameters[key] = made[id(empty)]
        module.to(device)

    held: list[nn.Parameter] = []  # an id is unique only while its object lives
    names = {id(module): name for name, module in model.named_modules()}
    for layer in decoder_layers(model):
        name = names[id(layer)]
        materialise(layer, name)
        if not full:
            lora.initialise_adapter(layer, config.method, seed=config.seed, prefix=name)
        place(layer)
    materialise(model, "")
    model.eval()
    return model


def _read(files: _Files, name: str, empty: nn.Parameter, device: torch.device) -> nn.Parameter:
    """One parameter: from the files, or, of an adapter, still to be initialised."""
    if "lora_" in name:
        return nn.Parameter(torch.zeros(empty.shape, dtype=empty.dtype, device=device))
    value = files.read(name.removeprefix("base_model.model.").replace(".base_layer.", "."))
    if value.shape != empty.shape:
        raise UserError(
            f"the file's {name} has shape {tuple(value.shape)}, the model wants {tuple(empty.shape)}",
            where=str(files.folder),
            fix="the folder's config.json belongs to another model",
        )
    return nn.Parameter(value.to(device=device, dtype=empty.dtype), requires_grad=empty.requires_grad)


class _Files:
    """The safetensors files of a model folder, by parameter name."""

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self._where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            f = safe_open(path, framework="pt")
            self._where |= dict.fromkeys(f.keys(), f)

    def read(self, name: str) -> torch.Tensor:
        # The file may hold the model without its head, whose names then lack the first part.
        for candidate in (name, name.removeprefix("model.")):
            if candidate in self._where:
                return torch.as_tensor(self._where[candidate].get_tensor(candidate))
        raise UserError(
            f"the model's files hold no {name}", where=str(self.folder), fix="download the model again"
        )

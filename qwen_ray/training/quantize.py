"""QLoRA's base: a model whose linear layers are stored in 4 bits (arXiv 2305.14314), by bitsandbytes.

Each block of 64 weights is stored as 4-bit codes and a scale; a layer's weights are expanded to the compute
dtype when it runs. Embeddings, norms, biases and the output head are not quantised.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

import torch

from qwen_ray import models
from qwen_ray.config import MethodConfig
from qwen_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def require_bitsandbytes() -> None:
    """Raise :class:`UserError` where bitsandbytes is not installed."""
    try:
        importlib.import_module("bitsandbytes")
    except ImportError:
        raise UserError(
            "4-bit weights need bitsandbytes, which is not installed",
            where="method.name",
            fix="pip install 'qwen-ray[gpu]'",
        ) from None


def load_quantized(
    ref: models.ModelRef,
    method: MethodConfig,
    compute_dtype: torch.dtype,
    device: torch.device,
    *,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """The frozen base on ``device``, its linear layers in 4 bits, prepared for training an adapter.

    Products are in ``compute_dtype``, and what is not quantised is stored in it. Weights are quantised one by
    one as they are read: the model never exists whole in 16 bits. Gradients flow through it, none is made
    for it. Put an adapter on with :func:`qwen_ray.training.lora.add_adapter`.
    """
    require_bitsandbytes()
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = models.model_config(ref).get("quantization_config")
    if quantised:
        raise UserError(
            f"the model is quantised already ({quantised.get('quant_method', 'unknown method')})",
            where=ref.location,
            fix="name the original model: qlora quantises it while loading",
        )
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    model: PreTrainedModel = models._load(
        ref,
        lambda: AutoModelForCausalLM.from_pretrained(
            ref.location,
            dtype=compute_dtype,
            attn_implementation=attention,
            device_map={"": device},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type=method.quantization,
                bnb_4bit_use_double_quant=method.double_quantization,
                bnb_4bit_compute_dtype=compute_dtype,
            ),
        ),
    )
    model.requires_grad_(False)
    # Unlike PEFT's prepare_model_for_kbit_training, which makes everything else float32: the norms compute in
    # float32 as it is, and float32 weights in them would turn the whole residual stream into float32. Nor
    # need inputs require gradients, as reentrant checkpointing would have it.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else a forward in eval mode, on a CPU, repacks the weights into a form that only infers:
            # training could not go on after the first validation (bitsandbytes 0.50).
            module.support_avx512bf16_for_cpu = False
    return model.eval()

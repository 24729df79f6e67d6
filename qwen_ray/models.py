"""The catalogue: short names to models, their presets, and loading them from hub, folder or package.

A model is named by an alias (``tiny``, ``3b``), a hub id (``Qwen/Qwen2.5-3B``) or a local folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.fsio import read_json
from qwen_ray.tiny import MODEL_DIR as TINY_DIR

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB_ALIASES = {
    **{f"{size}": f"Qwen/Qwen2.5-{size.upper()}" for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b")},
    **{
        f"{size}-instruct": f"Qwen/Qwen2.5-{size.upper()}-Instruct"
        for size in ("0.5b", "1.5b", "3b", "7b", "14b", "32b")
    },
}

# Settings that replace the general defaults for one model (dotted RunConfig keys), for every method and
# for one. The embedded model is a thousandth the size of those the defaults are for, and learns at a far
# higher rate; its card has the trials.
TINY_PRESET: dict[str, dict[str, Any]] = {
    "all": {
        "optim.epochs": 8,
        "optim.batch_size": 2,
        "optim.gradient_accumulation": 1,
        "optim.warmup_steps": 20,
        "optim.betas": (0.9, 0.99),
        "data.max_length": 320,
    },
    "lora": {"method.r": 32, "method.alpha": 64, "method.dropout": 0.0, "optim.learning_rate": 4e-3},
    "full": {"optim.learning_rate": 1e-3},
}


@dataclass(frozen=True)
class ModelRef:
    """Where a model is and what it is called on the API. ``location`` is a folder or a hub id."""

    id: str
    location: str
    preset: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def is_local(self) -> bool:
        return Path(self.location).is_dir()


def resolve(name: str) -> ModelRef:
    """Turn an alias, hub id or folder into a :class:`ModelRef`; raise :class:`UserError` if it is neither."""
    if name == "tiny":
        return ModelRef("tiny", str(TINY_DIR), TINY_PRESET)
    if name in HUB_ALIASES:
        return ModelRef(f"qwen2.5-{name}", HUB_ALIASES[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(
                "this folder holds no model (config.json is missing)",
                where=name,
                fix="name a Hugging Face folder",
            )
        return ModelRef(_slug(path.resolve().name), str(path.resolve()))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith("."):
        return ModelRef(_slug(name.split("/")[1]), name)
    raise UserError(
        f"unknown model '{name}'",
        fix=did_you_mean(name, ["tiny", *HUB_ALIASES]) + "; or a hub id OWNER/NAME, or a model folder",
    )


def _slug(name: str) -> str:
    """Lower case, and no colon, slash or plus sign: those have a meaning in the API's model ids."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.") or "model"


def load_tokenizer(ref: ModelRef) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a chat template and a padding token."""
    from transformers import AutoTokenizer

    tokenizer = _load(ref, lambda: AutoTokenizer.from_pretrained(ref.location))
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template, so messages cannot be rendered",
            where=ref.location,
            fix="add chat_template to tokenizer_config.json, or use the model's instruct version",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(ref: ModelRef, *, dtype: torch.dtype, attention: str = "sdpa") -> PreTrainedModel:
    """The causal language model on the CPU, in ``dtype``, in eval mode."""
    from transformers import AutoModelForCausalLM

    # transformers warns about its own attribute while PEFT and the loader read it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    model = _load(
        ref,
        lambda: AutoModelForCausalLM.from_pretrained(
            ref.location, dtype=dtype, attn_implementation=attention
        ),
    )
    return model.eval()


def _load(ref: ModelRef, load: Any) -> Any:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        return load()
    except (OSError, HFValidationError, RepositoryNotFoundError, ValueError) as e:
        reason = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        fix = (
            "the folder needs config.json, *.safetensors and tokenizer.json as save_pretrained writes them"
            if ref.is_local
            else "download it where there is a network (`hf download "
            + ref.location
            + "`) or name a local folder"
        )
        raise UserError(f"cannot load the model: {reason}", where=ref.location, fix=fix) from e


def model_config(ref: ModelRef) -> dict[str, Any]:
    """The model's config.json as a dict (from the folder, or the hub's cache)."""
    if ref.is_local:
        return dict(read_json(Path(ref.location) / "config.json"))
    from transformers import AutoConfig

    return dict(_load(ref, lambda: AutoConfig.from_pretrained(ref.location)).to_dict())


def context_length(ref: ModelRef) -> int:
    """The longest sequence, in tokens, that the model was made for."""
    return int(model_config(ref).get("max_position_embeddings") or 2048)


def stored_dtype(ref: ModelRef) -> torch.dtype:
    """The format that the model's weights were published in."""
    import torch

    config = model_config(ref)
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def model_folder(ref: ModelRef) -> Path:
    """The folder with the model's files: the given one, or the hub's cached snapshot."""
    if ref.is_local:
        return Path(ref.location)
    from huggingface_hub import snapshot_download

    return Path(
        _load(
            ref, lambda: snapshot_download(ref.location, allow_patterns=["*.json", "*.safetensors", "*.txt"])
        )
    )


_SAMPLES, _BLOCK = 64, 4096


def fingerprint(ref: ModelRef) -> str:
    """A hash of the weights, so that an adapter is never put on a base it was not trained on.

    SHA-256 over, for each safetensors file in name order: its header (tensor names, dtypes, shapes), its
    size, and 64 evenly spaced blocks of 4 KiB. Reading 15 GB to start a server would be waste; any
    training step changes nearly every block.
    """
    folder = model_folder(ref)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(
            "the model has no *.safetensors file", where=str(folder), fix="save it as safetensors"
        )
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with open(path, "rb") as f:
            header_length = int.from_bytes(f.read(8), "little")
            if header_length > size:
                raise UserError("damaged safetensors file", where=str(path), fix="download it again")
            header = json.loads(f.read(header_length))
            header.pop("__metadata__", None)
            digest.update(json.dumps(header, sort_keys=True).encode())
            digest.update(str(size).encode())
            start, length = 8 + header_length, size - 8 - header_length
            for i in range(_SAMPLES):
                f.seek(start + max(0, (length - _BLOCK)) * i // (_SAMPLES - 1))
                digest.update(f.read(_BLOCK))
    return digest.hexdigest()

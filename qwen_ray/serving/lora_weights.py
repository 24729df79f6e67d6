"""Reading a LoRA adapter as PEFT saves it, and refusing what the serving layer cannot compute exactly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json
from qwen_ray.peft_folder import CHANGES_BASE, CONFIG, WEIGHTS, check_tensor

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_MERGE = "merge it into the base model (PeftModel.merge_and_unload) and serve that model"
# Settings under which the adapter is more than base(x) + scale * B(A(x)).
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "lora_bias": "a bias on the LoRA matrices",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings (trainable_token_indices)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}


@dataclass(frozen=True)
class LoraWeights:
    """One adapter's matrices. ``layers``: module path -> (A [r, in], B [out, r]), scale folded into B."""

    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    nbytes: int
    where: str


def read_lora(folder: Path, *, within: Path | None = None) -> LoraWeights:
    """Read a PEFT folder (safetensors only), float32 on the CPU.

    ``within``: a root that the files' real paths may not leave (a registry). Raises :class:`UserError`
    for a damaged adapter or one that needs more than plain LoRA on linear layers; it names the way out.
    """
    config_path, weights_path = folder / CONFIG, folder / WEIGHTS
    for path in (config_path, weights_path):
        _check_inside(path, within)
    config = read_json(config_path)
    with well_formed(config_path):
        _refuse_unsupported(config, folder)
    if not weights_path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise UserError(
            "the adapter is a pickle file (adapter_model.bin), which can run code when it is read"
            if pickled
            else f"the adapter has no {WEIGHTS}",
            where=str(folder),
            fix="save it again with save_pretrained(..., safe_serialization=True)"
            if pickled
            else "save it again",
            status=409,
        )
    halves = _read_tensors(weights_path)
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for module, pair in sorted(halves.items()):
        if set(pair) != {"A", "B"}:
            raise UserError(f"{module} has only one of its two matrices", where=str(weights_path), status=409)
        a, b = pair["A"], pair["B"]
        with well_formed(config_path):
            rank, scale = _rank_and_scale(config, module)
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != rank or b.shape[1] != rank:
            raise UserError(
                f"{module}: shapes A {tuple(a.shape)} and B {tuple(b.shape)} do not fit rank {rank}",
                where=str(weights_path),
                fix="adapter_config.json belongs to another file; save the adapter again",
                status=409,
            )
        scaled = b * scale
        # A single NaN would spread to every row of a shared batch.
        if not (torch.isfinite(a).all() and torch.isfinite(scaled).all()):
            raise UserError(
                f"{module} holds NaN or infinity, or is scaled to it",
                where=str(folder),
                fix="train it again, or mend lora_alpha in adapter_config.json",
                status=409,
            )
        layers[module] = (a, scaled)
    if not layers:
        raise UserError("the adapter holds no LoRA matrices", where=str(weights_path), status=409)
    nbytes = sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
    return LoraWeights(layers, nbytes, str(folder))


def _check_inside(path: Path, root: Path | None) -> None:
    if root is not None and not path.resolve().is_relative_to(root.resolve()):
        raise UserError("this file leads out of the registry (a link?)", where=str(path), status=404)


def _refuse_unsupported(config: dict[str, Any], folder: Path) -> None:
    where = str(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError("not a PEFT configuration", where=where, fix="save the adapter again", status=409)
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise UserError(
            f"a {config['peft_type']} adapter; only LoRA is served", where=where, fix=_MERGE, status=409
        )
    for key, name in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(
                f"the adapter uses {name}, which is not served", where=where, fix=_MERGE, status=409
            )
    if config.get("bias", "none") != "none":
        raise UserError(
            "the adapter also trains biases, which are not served", where=where, fix=_MERGE, status=409
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise UserError(
            f"the adapter was started with '{start}', which changes the base weights too",
            where=where,
            fix="convert it (save_pretrained with path_initial_model_for_weight_conversion), or " + _MERGE,
            status=409,
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)) or config[key] <= 0:
            raise UserError(f"'{key}' is missing or not a positive number", where=where, status=409)


def check_size(folder: Path, largest: int, *, within: Path | None = None) -> None:
    """Refuse an adapter that would take more than ``largest`` bytes of memory; only its header is read."""
    path = folder / WEIGHTS
    _check_inside(path, within)
    if not path.is_file():
        return  # read_lora says what is there instead
    with _opened(path) as f:
        size = sum(4 * math.prod(f.get_slice(key).get_shape()) for key in f.keys())  # noqa: SIM118
    if size > largest:
        raise UserError(
            f"the adapter takes {size / 2**20:,.1f} MiB in memory, of {largest / 2**20:,.1f} MiB for all",
            where=str(path),
            fix="train it with a lower rank or fewer target modules, or serve with more adapter_bytes",
            status=409,
        )


def check_finite(folder: Path) -> None:
    """:class:`UserError` (409) where a tensor of a PEFT folder, of any kind, holds NaN or infinity."""
    path = folder / WEIGHTS
    with _opened(path) as f:
        for key in f.keys():  # noqa: SIM118
            check_tensor(key, f.get_tensor(key), path)


def _read_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    halves: dict[str, dict[str, torch.Tensor]] = {}
    with _opened(path) as f:
        for key in f.keys():  # noqa: SIM118 - not a dict
            match = _KEY.fullmatch(key)
            if match is None:
                raise UserError(
                    f"'{key}' is not a LoRA matrix of a linear layer",
                    where=str(path),
                    fix="save it with save_embedding_layers=False if only LoRA was trained, or " + _MERGE,
                    status=409,
                )
            halves.setdefault(match[1], {})[match[2]] = f.get_tensor(key).float()
    return halves


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except (SafetensorError, OSError, json.JSONDecodeError) as e:
        reason = str(e).splitlines()[0][:200]
        raise UserError(
            f"damaged adapter file ({reason})", where=str(path), fix="copy or train it again", status=409
        ) from e


@contextmanager
def well_formed(path: Path) -> Iterator[None]:
    """:class:`UserError` (409) where what a document says is not of the kind that is read from it."""
    try:
        yield
    except (TypeError, AttributeError, ValueError, ArithmeticError, re.error) as e:
        raise UserError(
            f"not a valid {path.name}: {e}", where=str(path), fix="save the adapter again", status=409
        ) from e


def _rank_and_scale(config: dict[str, Any], module: str) -> tuple[Any, float]:
    rank = _pattern(config, "rank_pattern", "r", module)
    alpha = _pattern(config, "alpha_pattern", "lora_alpha", module)
    return rank, alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _pattern(config: dict[str, Any], patterns: str, default: str, module: str) -> Any:
    """``rank_pattern``/``alpha_pattern`` as PEFT applies them: the first that ends the module's path."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return config[default]

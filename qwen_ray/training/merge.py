"""Adapters into full weights: a model folder that needs no PEFT and is served as any model.

The base's files are read one at a time and each adapted weight is computed in float32, so a 14B model is
merged in the memory of one of its files. W + sum of w s B A over the adapters; with DoRA, the rows of
W + s B A at the trained magnitudes (arXiv 2402.09353, equation 5).
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray import __version__, models
from qwen_ray.errors import UserError
from qwen_ray.fsio import new_folder, read_json, sha256_file, sha256_json, write_json
from qwen_ray.peft_folder import CHANGES_BASE, CONFIG, WEIGHTS, check_tensor
from qwen_ray.registry import LINEAGE

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

_KEY = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(A\.weight|B\.weight|magnitude_vector(?:\.weight)?)")
# What else a PEFT folder can ask for; none of it is made here.
_UNKNOWN = (
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "fan_in_fan_out",
)
_COPIED = ("*.json", "*.txt", "*.jinja", "*.model")


@dataclass(frozen=True)
class _Adapter:
    """One adapter read whole. ``layers``: module name to {"A": [r, in], "B": [out, r], "m": [out]}."""

    folder: Path
    weight: float
    layers: dict[str, dict[str, torch.Tensor]]
    scales: dict[str, float]
    dora: bool
    lineage: dict[str, Any] | None


def merge(
    model: str | models.ModelRef,
    adapters: list[tuple[Path, float]],
    out: Path,
    *,
    dtype: str | None = None,
) -> Path:
    """Write ``model`` with ``adapters`` (folder, weight) merged into it as a new folder ``out``.

    The folder is as ``save_pretrained`` writes it, with the tokenizer and a lineage.json that names the
    base and the adapters by their hashes. ``dtype``: fp32, bf16 or fp16; default: as the base is stored.
    Several adapters add up, whatever their ranks; one with DoRA is merged alone. ``out`` appears whole, or
    not at all. Raises :class:`UserError` for an adapter of another base (by its lineage.json), one that is
    more than LoRA or DoRA on linear layers, or an ``out`` that exists.
    """
    ref = model if isinstance(model, models.ModelRef) else models.resolve(model)
    out = Path(out).expanduser().resolve()
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"'{dtype}' is not a format", where="dtype", fix=f"one of {', '.join(DTYPES)}")
    if not adapters:
        raise UserError("no adapter to merge", fix="name at least one")
    for folder, weight in adapters:
        if not math.isfinite(weight):
            raise UserError(
                f"an adapter cannot have the weight {weight:g}", where=str(folder), fix="for example 1"
            )
    if out.exists():
        raise UserError("this folder exists", where=str(out), fix="choose another, or remove it")
    if models.model_config(ref).get("quantization_config"):
        raise UserError(
            "the base is quantised; merging into rounded weights would lose the adapter",
            where=ref.location,
            fix="name the original model",
        )
    base = {"id": ref.id, "location": ref.location, "fingerprint": models.fingerprint(ref)}
    read = [_read(Path(folder), weight, base["fingerprint"]) for folder, weight in adapters]
    if any(a.dora for a in read) and (len(read) > 1 or read[0].weight != 1):
        raise UserError(
            "DoRA rescales whole rows, so such an adapter does not add up with others or in part",
            where=str(next(a.folder for a in read if a.dora)),
            fix="merge it alone, with weight 1",
        )
    with new_folder(out) as staging:
        _write_weights(models.model_folder(ref), staging, read, dtype)
        _write_rest(models.model_folder(ref), staging, read, base, dtype)
    return out


def _read(folder: Path, weight: float, fingerprint: str) -> _Adapter:
    """An adapter folder, float32 on the CPU, checked against the base it is for."""
    config, where = read_json(folder / CONFIG), str(folder / CONFIG)
    if not isinstance(config, dict) or str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise UserError("not a LoRA adapter", where=where, fix="name an adapter/ folder of a run")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        raise UserError(
            f"the adapter was started with '{start}' and not converted: it fits a changed base only",
            where=where,
            fix="save it with path_initial_model_for_weight_conversion",
        )
    unknown = next((key for key in _UNKNOWN if config.get(key)), None)
    if unknown or config.get("bias", "none") != "none":
        raise UserError(
            f"the adapter uses {unknown or 'bias'}, which is not merged here",
            where=where,
            fix="use PeftModel.merge_and_unload",
        )
    lineage = read_json(folder / LINEAGE) if (folder / LINEAGE).is_file() else None
    trained_on = ((lineage or {}).get("base") or {}).get("fingerprint")
    if trained_on and trained_on != fingerprint:
        raise UserError(
            f"the adapter was trained on another base ({lineage['base'].get('id')})",  # type: ignore[index]
            where=str(folder / LINEAGE),
            fix="name that base",
        )
    layers = _read_tensors(folder / WEIGHTS)
    dora = bool(config.get("use_dora"))
    scales = {}
    for name, parts in layers.items():
        if set(parts) != ({"A", "B", "m"} if dora else {"A", "B"}):
            raise UserError(f"{name} is not complete", where=str(folder / WEIGHTS), fix="save it again")
        rank = parts["A"].shape[0]
        alpha = _pattern(config, "alpha_pattern", "lora_alpha", name)
        scales[name] = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return _Adapter(folder, weight, layers, scales, dora, lineage)


def _read_tensors(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError("no such file", where=str(path), fix="name a PEFT folder") from None
    except (SafetensorError, OSError) as e:
        raise UserError(f"damaged adapter file ({str(e)[:200]})", where=str(path)) from e
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise UserError(
                f"'{key}' is not a LoRA matrix of a linear layer",
                where=str(path),
                fix="use PeftModel.merge_and_unload",
            )
        check_tensor(key, value, path)
        layers.setdefault(match[1], {})[match[2][0]] = value.float()
    return layers


def _pattern(config: dict[str, Any], patterns: str, default: str, module: str) -> float:
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default])


def _write_weights(source: Path, target: Path, adapters: list[_Adapter], dtype: str | None) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    files = sorted(source.glob("*.safetensors"))
    missing = {name: a for a in adapters for name in a.layers}
    total = 0
    for file in files:
        tensors = {}
        with safe_open(file, framework="pt") as f:
            metadata = f.metadata()
            for key in f.keys():  # noqa: SIM118 - not a dict
                value = f.get_tensor(key)
                name = key.removesuffix(".weight")
                stored, adapted = value.dtype, name in missing and key != name
                if adapted:
                    del missing[name]
                    value = _merged(name, value.float(), adapters)
                if stored.is_floating_point:
                    value = value.to(getattr(torch, DTYPES[dtype]) if dtype else stored)
                if (adapted or value.dtype != stored) and not torch.isfinite(value).all():
                    raise UserError(
                        f"'{key}' would hold NaN or infinity in {str(value.dtype).removeprefix('torch.')}",
                        where=str(source / file.name),
                        fix="a format of larger range (bf16, fp32) or smaller weights of the adapters",
                    )
                tensors[key] = value.contiguous()
                total += value.nbytes
        save_file(tensors, target / file.name, metadata={"format": "pt", **(metadata or {})})
    if missing:
        name, adapter = min(missing.items(), key=lambda item: item[0])
        raise UserError(
            f"the adapter targets '{name}', and the base has no weight of that name",
            where=str(adapter.folder),
            fix="it was trained on another base, or on an output head that shares the embedding's weights",
        )
    if (source / INDEX).is_file():
        index = read_json(source / INDEX)
        index["metadata"] = {**index.get("metadata", {}), "total_size": total}
        write_json(target / INDEX, index)


def _merged(name: str, weight: torch.Tensor, adapters: list[_Adapter]) -> torch.Tensor:
    """The new value of one weight [out, in], float32."""
    import torch

    merged = weight.clone()
    for adapter in adapters:
        parts = adapter.layers.get(name)
        if parts is None:
            continue
        if parts["A"].shape[1] != weight.shape[1] or parts["B"].shape[0] != weight.shape[0]:
            raise UserError(
                f"'{name}' is {tuple(weight.shape)} in the base, and the adapter makes "
                f"{(parts['B'].shape[0], parts['A'].shape[1])}",
                where=str(adapter.folder),
                fix="it was trained on another base",
            )
        merged += adapter.weight * adapter.scales[name] * (parts["B"] @ parts["A"])
        if adapter.dora:
            merged *= (parts["m"] / torch.linalg.vector_norm(merged, dim=1))[:, None]
    return merged


def _write_rest(
    source: Path, target: Path, adapters: list[_Adapter], base: dict[str, str], dtype: str | None
) -> None:
    """Configuration, tokenizer and lineage."""
    for pattern in _COPIED:
        for path in source.glob(pattern):
            if path.name not in (LINEAGE, INDEX, "training.json"):
                shutil.copyfile(path, target / path.name)
    config = read_json(source / "config.json")
    if dtype:
        config.pop("torch_dtype", None)  # its name before transformers 5
        config["dtype"] = DTYPES[dtype]
    write_json(target / "config.json", config)
    write_json(
        target / LINEAGE,
        {
            "base": base,
            "base_lineage": sha256_file(source / LINEAGE) if (source / LINEAGE).is_file() else None,
            "merged": [
                {
                    "weight": a.weight,
                    "sha256": sha256_file(a.folder / WEIGHTS),
                    "lineage_sha256": sha256_json(a.lineage) if a.lineage else None,
                    "lineage": a.lineage,
                }
                for a in adapters
            ],
            "dtype": dtype,
            "versions": {"qwen-ray": __version__},
        },
    )

"""Adapters that were trained elsewhere: PEFT folders of TRL, LLaMA-Factory, axolotl, Unsloth and plain PEFT.

Of what such a tool leaves, a version gets the adapter and its configuration, and a lineage that says where
they came from. Pickle files are never read.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, read_json, sha256_file, write_json
from qwen_ray.peft_folder import CONFIG, WEIGHTS
from qwen_ray.registry.version import AdapterVersion

if TYPE_CHECKING:
    from qwen_ray.models import ModelRef
    from qwen_ray.registry.registry import Registry

TOOLS = ("peft", "trl", "llama-factory", "axolotl", "unsloth")
_PICKLE = "adapter_model.bin"
# What tells a tool: files that only it writes, then tags of its model card. Unsloth tags "trl", too.
_FILES = {"trainer_log.jsonl": "llama-factory", "llamaboard_config.yaml": "llama-factory"}
_TAGS = ("llama-factory", "axolotl", "unsloth", "trl")


@dataclass(frozen=True)
class Foreign:
    """A folder that another tool left. ``base``: what its configuration calls the base model. ``others``:
    files that do not become part of a version (tokenizer, model card, a trainer's states, checkpoints)."""

    folder: Path
    tool: str
    base: str
    config: dict[str, Any]
    others: list[str]


def import_adapter(
    registry: Registry, name: str, folder: Path, *, base: str, tool: str | None = None
) -> AdapterVersion:
    """Publish the PEFT adapter in ``folder`` as the next version of ``name``.

    ``base``: the model it was trained on, as :func:`qwen_ray.models.resolve` takes it; of one that was loaded
    in 4 bits, the original. ``tool``: one of ``TOOLS``, else found out. Raises :class:`UserError` for
    what cannot be served or does not fit the base, and says what to do.
    """
    from qwen_ray import models
    from qwen_ray.serving.lora_weights import read_lora

    found = recognise(folder, tool)
    ref = models.resolve(base)
    with tempfile.TemporaryDirectory(prefix="qwen-ray-import-") as scratch:
        staging = Path(scratch)
        shutil.copyfile(folder / WEIGHTS, staging / WEIGHTS)
        # Theirs may be a path on the machine it was trained on, or a copy of the base in 4 bits.
        write_json(staging / CONFIG, {**found.config, "base_model_name_or_path": ref.location})
        lora = read_lora(staging)
        shapes = {module: (b.shape[0], a.shape[1]) for module, (a, b) in lora.layers.items()}
        _check_shapes(shapes, ref, folder)
        imported = {
            "tool": found.tool,
            "base": found.base,
            "files": {file: sha256_file(folder / file) for file in (CONFIG, WEIGHTS)},
        }
        where = ref.location if Path(base).expanduser().is_dir() else base
        known = {"id": ref.id, "location": where, "fingerprint": models.fingerprint(ref)}
        return registry.publish(name, staging, {"base": known, "imported": imported})


def recognise(folder: Path, tool: str | None = None) -> Foreign:
    """What is in the folder, from its configuration and model card; no weights are read."""
    if tool is not None and tool not in TOOLS:
        raise UserError(f"'{tool}' is no known tool", where="--from", fix=f"one of {', '.join(TOOLS)}")
    if not folder.is_dir():
        raise UserError("no such adapter folder", where=str(folder), fix="check the path")
    if not (folder / WEIGHTS).is_file():
        raise _no_weights(folder)
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError("not a PEFT configuration", where=str(folder / CONFIG), fix="save the adapter again")
    declared = str(config.get("base_model_name_or_path") or "")
    others = [rel.as_posix() for rel in files_under(folder) if rel.as_posix() not in (CONFIG, WEIGHTS)]
    return Foreign(folder, tool or _tool(folder, config, declared), declared, config, others)


def _no_weights(folder: Path) -> UserError:
    where = str(folder)
    if (folder / _PICKLE).is_file():
        return UserError(
            f"the adapter is a pickle file ({_PICKLE}), which can run code when it is read",
            where=where,
            fix="if you trust it, PeftModel.from_pretrained(base, FOLDER).save_pretrained(NEW); import NEW",
        )
    inside = sorted(path.parent.name for path in folder.glob(f"*/{WEIGHTS}"))
    if inside:
        return UserError(
            "the adapters are in folders below this one",
            where=where,
            fix=f"name one of: {', '.join(inside)}",
        )
    if (folder / "config.json").is_file() and list(folder.glob("*.safetensors")):
        return UserError(
            "this is a whole model, not an adapter",
            where=where,
            fix="serve it: qwen-ray serve --model FOLDER",
        )
    return UserError(f"not a PEFT adapter folder: {WEIGHTS} is missing", where=where, fix="check the path")


def _tool(folder: Path, config: dict[str, Any], declared: str) -> str:
    for name, tool in _FILES.items():
        if (folder / name).is_file():
            return tool
    tags = _card_tags(folder / "README.md")
    tagged = next((tool for tool in _TAGS if tool in tags), None)
    if tagged is not None:
        return tagged
    mapping = config.get("auto_mapping")
    patched = isinstance(mapping, dict) and "unsloth_fixed" in mapping
    return "unsloth" if patched or declared.startswith("unsloth/") else "peft"


def _card_tags(card: Path) -> list[str]:
    """The items of all lists in a model card's head (YAML between two lines of dashes)."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    return re.findall(r"^\s*- (\S+)\s*$", head[1], re.MULTILINE) if head else []


def _check_shapes(shapes: dict[str, tuple[int, int]], ref: ModelRef, folder: Path) -> None:
    """Each layer must be in the base, with these sizes (outputs, inputs). Only file headers are read."""
    from safetensors import safe_open

    from qwen_ray import models

    have: dict[str, tuple[int, ...]] = {}
    for file in sorted(models.model_folder(ref).glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            have |= {key: tuple(f.get_slice(key).get_shape()) for key in f.keys()}  # noqa: SIM118
    for module, shape in sorted(shapes.items()):
        want = have.get(f"{module}.weight")
        if want != shape:
            there = f"it is {want[0]} x {want[1]}" if want and len(want) == 2 else "it has no such weight"
            raise UserError(
                f"the adapter does not fit {ref.id}: it changes '{module}', {shape[0]} x {shape[1]}, and "
                f"{there} there",
                where=str(folder),
                fix="name the model it was trained on with --base",
            )

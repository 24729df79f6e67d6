"""Versions for other programs: as a PEFT folder, or merged into the base as a whole model."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwen_ray.errors import UserError
from qwen_ray.fsio import new_folder
from qwen_ray.registry.registry import Registry
from qwen_ray.registry.version import MANIFEST, AdapterVersion

FORMATS = ("peft", "merged")


def export_adapter(
    registry: Registry, version: AdapterVersion, to: Path, *, form: str = "peft", base: str | None = None
) -> Path:
    """Write a version to a new folder ``to``, which appears whole or not at all.

    ``peft``: what PEFT, TRL and vLLM load. ``merged``: full weights; ``base`` is the model to merge into,
    default the one in the lineage. Raises :class:`UserError` where ``to`` exists or the files are damaged.
    """
    if form not in FORMATS:
        raise UserError(f"'{form}' is no format", where="--format", fix=f"one of {', '.join(FORMATS)}")
    registry.verify(version)
    to = to.expanduser().resolve()
    if form == "merged":
        from qwen_ray.training.merge import merge

        known = version.lineage["base"]
        return merge(base or known.get("location") or known["id"], [(version.path, 1.0)], to)
    if to.exists():
        raise UserError("this folder exists", where=str(to), fix="choose another, or remove it")
    with new_folder(to) as staging:
        shutil.copytree(version.path, staging, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
    return to

"""Suites: folders of lm-eval tasks, each with a suite.yaml that says which category a task counts for.

The tasks are ordinary lm-eval YAML, so stock lm-eval runs them too:
``lm_eval --include_path $(python -c 'import qwen_ray.evaluation.suites as s; print(s.folder("tiny"))')``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from qwen_ray.errors import UserError, did_you_mean

Role = Literal["target", "strength", "control"]


@dataclass(frozen=True)
class Category:
    """One line of a result: the items of its tasks, pooled. ``filter``: lm-eval's, for generated answers."""

    name: str
    role: Role
    tasks: tuple[str, ...]
    metric: str
    filter: str | None
    explanation: str


@dataclass(frozen=True)
class Suite:
    """A named, versioned set of categories."""

    name: str
    version: str
    description: str
    categories: tuple[Category, ...]
    folder: Path


def names() -> list[str]:
    """The suites that there are."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/suite.yaml"))


def folder(name: str) -> Path:
    """The folder with a suite's tasks, for lm-eval's ``--include_path``."""
    return load(name).folder


def load(name: str) -> Suite:
    """Read a suite's definition; :class:`UserError` when there is none of that name."""
    if name not in names():
        raise UserError(f"unknown suite '{name}'", where="--suite", fix=did_you_mean(name, names()))
    root = Path(__file__).parent / name
    spec = yaml.safe_load((root / "suite.yaml").read_text(encoding="utf-8"))
    categories = tuple(
        Category(
            name=key,
            role=value["role"],
            tasks=tuple(value["tasks"]),
            metric=value["metric"],
            filter=value.get("filter"),
            explanation=value.get("explanation", ""),
        )
        for key, value in spec["categories"].items()
    )
    return Suite(name, str(spec["version"]), spec["description"].strip(), categories, root)

"""What the engines do alike."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from qwen_ray.errors import UserError
from qwen_ray.serving.engines.base import OnToken, OnTokenOf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_lineage(folder: Path, id: str, fingerprint: str) -> None:
    """:class:`UserError` (409) if an adapter's folder says that it was trained on another base model than the
    one called ``id``. Without a ``fingerprint`` nothing is checked."""
    from qwen_ray.fsio import read_json
    from qwen_ray.registry import LINEAGE
    from qwen_ray.serving.lora_weights import well_formed

    path = folder / LINEAGE
    lineage = read_json(path) if path.is_file() else {}
    with well_formed(path):
        base = lineage.get("base") or {}
        trained_on = base.get("fingerprint")
    if trained_on and fingerprint and trained_on != fingerprint:
        raise UserError(
            f"the adapter was trained on {base.get('id', 'another model')} ({str(trained_on)[:12]}), "
            f"this server runs {id} ({fingerprint[:12]})",
            where=str(folder),
            fix="serve it on its own base model, or train it again on this one",
            status=409,
        )


def listener(index: int, on_token: OnTokenOf | None) -> OnToken | None:
    """What is told of request number ``index``, if anything is to be told."""
    if on_token is None:
        return None
    return lambda event: on_token(index, event)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end a generation: what the model's generation config says, else the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    if configured is None:
        configured = getattr(model.config, "eos_token_id", None)
    if configured is None:
        configured = tokenizer.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset([configured] if isinstance(configured, int) else configured)

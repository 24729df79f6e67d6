"""The router: which adapter answers a question, or none.

A question goes to the domain whose training questions it is most like, if it is more like these than like a
background of other subjects, by at least a threshold; else the base answers. The background is what tells an
unknown subject from an unusual question of a known one: by similarity to the domains alone, both look alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qwen_ray.data.records import Record
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, replacing, write_json
from qwen_ray.serving.assistant import Route

if TYPE_CHECKING:
    from qwen_ray.embedder import Embedder

Method = Literal["knn", "centroid"]
METHODS: tuple[Method, ...] = ("knn", "centroid")
NEIGHBOURS = 3
_DESCRIPTION, _EXAMPLES = "router.json", "examples.safetensors"
_FORMAT = 1


@dataclass(frozen=True)
class Domain:
    """What the router knows of one domain. ``adapter`` None: the base is good at it and answers."""

    name: str
    adapter: str | None
    examples: int
    heldout: int
    recall: float  # share of the held-out questions that came here


@dataclass(frozen=True)
class Calibration:
    """How the threshold was found: the least from 0 on at which no more than a share of others is let in."""

    threshold: float
    false_accepts: float  # share of others at or above the threshold
    others: int


class Router:
    """Unit vectors of example questions, by domain and in the background, and a threshold."""

    def __init__(
        self,
        domains: Sequence[Domain],
        examples: Sequence[Any],
        background: Any,
        *,
        embedder: str,
        embedder_name: str,
        method: Method,
        calibration: Calibration,
    ) -> None:
        """``examples``: for each of ``domains`` float32 ``[n, d]``; ``background``: ``[m, d]``."""
        self.domains, self.method, self.calibration = tuple(domains), method, calibration
        self.embedder, self.embedder_name = embedder, embedder_name
        self._examples, self._background = tuple(examples), background

    @classmethod
    def train(
        cls,
        records: Iterable[Record],
        *,
        embedder: Embedder,
        adapters: Mapping[str, str | None],
        others: Iterable[Record] = (),
        seed: int = 0,
        **settings: Any,
    ) -> Router:
        """See :func:`qwen_ray.routing.training.train`, which has the settings too."""
        from qwen_ray.routing.training import train

        return train(records, embedder=embedder, adapters=adapters, others=others, seed=seed, **settings)

    def route(self, vectors: Any) -> list[Route]:
        """The adapter for each question, given as the unit vectors ``[n, d]`` of their :func:`ending`.

        ``score`` is the similarity to the nearest domain less that to the background; from the router's
        threshold on, the domain answers. Equally near domains: the first by name. Raises
        :class:`UserError` for vectors of another length, and for such that are not finite.
        """
        rows = np.asarray(vectors, np.float32)
        width = self._background.shape[1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise UserError(
                f"the router needs vectors of {width} numbers, not {list(rows.shape)}",
                fix=f"embed with '{self.embedder}'",
            )
        if not np.isfinite(rows).all():
            raise UserError("a question's vector is not finite", fix="check the embedding model")
        nearest, margins = leads(similarities(rows, [*self._examples, self._background], self.method))
        return [
            Route(None, float(margin), domain.name, abstains=True)
            if margin < self.calibration.threshold
            else Route(domain.adapter, float(margin), domain.name)
            for domain, margin in zip((self.domains[i] for i in nearest), margins, strict=True)
        ]

    def chosen(self, route: Route) -> str | None:
        """The domain that a route of this router came to; None where it abstained."""
        return route.domain if route.score >= self.calibration.threshold else None

    def describe(self) -> dict[str, Any]:
        """Facts for listings: embedder, method, domains with their adapters, calibration."""
        return {
            "embedder": self.embedder,
            "method": self.method,
            "domains": [asdict(domain) for domain in self.domains],
            "background": len(self._background),
            "calibration": asdict(self.calibration),
        }

    def save(self, folder: Path) -> None:
        """Write ``router.json`` and ``examples.safetensors``; a router that was there is replaced."""
        from safetensors.numpy import save

        tensors = {str(i): rows for i, rows in enumerate([*self._examples, self._background])}
        data = save({name: np.ascontiguousarray(rows, np.float32) for name, rows in tensors.items()})
        with replacing(folder / _EXAMPLES, "wb") as f:
            f.write(data)
        about = {"format": _FORMAT, **self.describe(), "embedder_name": self.embedder_name}
        write_json(folder / _DESCRIPTION, {**about, "sha256": sha256(data).hexdigest()})

    @classmethod
    def load(cls, folder: Path) -> Router:
        """What :meth:`save` wrote. Raises :class:`UserError` where it is absent, damaged or too new."""
        if not (folder / _DESCRIPTION).is_file():
            raise UserError("no router here", where=str(folder), fix="make one with `qwen-ray router train`")
        about = read_json(folder / _DESCRIPTION)
        try:
            data = (folder / _EXAMPLES).read_bytes()
            if about["format"] != _FORMAT or about["sha256"] != sha256(data).hexdigest():
                raise ValueError
            return cls._read(about, data)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                "the router is damaged or of another version", where=str(folder), fix="train it again"
            ) from None

    @classmethod
    def _read(cls, about: dict[str, Any], data: bytes) -> Router:
        from safetensors.numpy import load

        tensors = load(data)
        if about["method"] not in METHODS or len(tensors) != len(about["domains"]) + 1:
            raise ValueError
        *examples, background = (tensors[str(i)] for i in range(len(tensors)))
        return cls(
            [Domain(**domain) for domain in about["domains"]],
            examples,
            background,
            embedder=about["embedder"],
            embedder_name=about["embedder_name"],
            method=about["method"],
            calibration=Calibration(**about["calibration"]),
        )


def similarities(rows: Any, classes: Sequence[Any], method: Method) -> Any:
    """Cosine similarity of each row to each class of unit vectors, ``[n, classes]``.

    ``knn``: the mean over the three nearest of the class, or all if it has fewer; ``centroid``: to its mean.
    """
    if method == "centroid":
        means = np.stack([rows_.mean(0) for rows_ in classes])
        return rows @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    return np.stack([nearest_mean(rows @ members.T) for members in classes], axis=1)


def nearest_mean(cosines: Any) -> Any:
    """Mean of the largest three of each row."""
    k = min(NEIGHBOURS, cosines.shape[1])
    return np.sort(cosines, axis=1)[:, -k:].mean(1)


def leads(similar: Any) -> tuple[Any, Any]:
    """Of similarities whose last column is the background's: the nearest domain, and its lead over that."""
    nearest = similar[:, :-1].argmax(1)
    return nearest, similar[:, :-1].max(1) - similar[:, -1]

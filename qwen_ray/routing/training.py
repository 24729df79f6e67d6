"""How a router is made of prepared records."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qwen_ray.data.records import Record
from qwen_ray.data.split import number_of
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.registry import NAME
from qwen_ray.routing.questions import OTHER, questions_of, subjects
from qwen_ray.routing.router import (
    METHODS,
    Calibration,
    Domain,
    Method,
    Router,
    leads,
    nearest_mean,
    similarities,
)

if TYPE_CHECKING:
    from qwen_ray.embedder import Embedder

EXAMPLES = 300
"""Questions of a domain that are kept. More of one book do not help (docs/routing.md)."""
FALSE_ACCEPTS = 0.2
HELD_OUT = 0.2  # share of a domain's questions that measure and are not learned
_LEAST = 10  # different questions of a domain
_MEASURED = 200  # held-out questions of a domain, and others, at most


def train(
    records: Iterable[Record],
    *,
    embedder: Embedder,
    adapters: Mapping[str, str | None],
    others: Iterable[Record] = (),
    seed: int = 0,
    examples: int = EXAMPLES,
    false_accepts: float = FALSE_ACCEPTS,
    method: Method = "knn",
    without: Collection[str] = (),
) -> Router:
    """Learn the domains of ``records`` by the questions of their first user turn.

    ``adapters``: the adapter of each domain; one that is absent or None is left to the base. ``others``:
    records of other subjects, which set the threshold: at most a share ``false_accepts`` of them is let in.
    Without any, the background does, each text compared with the rest of it. ``without``: subjects of the
    background to leave out, where a domain covers them under another name. The same input and seed give the
    same router. Raises :class:`UserError` for what cannot be learned from.
    """
    check(method=method, false_accepts=false_accepts, without=without)
    asked = questions_of(records, seed=seed)
    _check_domains(asked, adapters)
    learned, held = {}, {}
    for domain, questions in asked.items():
        n = min(_MEASURED, round(HELD_OUT * len(questions)))
        held[domain] = embedder.embed(questions[:n])
        extra = () if domain in without else subjects().get(domain, ())
        learned[domain] = embedder.embed([*questions[n : n + examples], *extra])
    background = embedder.embed(
        [text for name, texts in subjects().items() if name not in {*asked, *without} for text in texts]
    )
    classes = [*learned.values(), background]
    foreign = sorted(
        {question for questions in questions_of(others, seed=seed).values() for question in questions},
        key=lambda question: number_of(question, seed=seed),
    )[:_MEASURED]
    if foreign:
        margins = leads(similarities(embedder.embed(foreign), classes, method))[1]
    else:
        margins = leads(_against_the_rest(classes, method))[1]
    threshold = least_threshold(margins, false_accepts)
    calibration = Calibration(threshold, round(float((margins >= threshold).mean()), 4), len(margins))
    domains = []
    for i, (name, vectors) in enumerate(held.items()):
        nearest, margins = leads(similarities(vectors, classes, method))
        recall = float(((nearest == i) & (margins >= threshold)).mean())
        domains.append(Domain(name, adapters.get(name), len(learned[name]), len(vectors), round(recall, 4)))
    return Router(
        domains,
        classes[:-1],
        background,
        embedder=embedder.id,
        embedder_name=embedder.name,
        method=method,
        calibration=calibration,
    )


def least_threshold(margins: Any, false_accepts: float) -> float:
    """The least from 0 on that no more than a share of ``margins`` (of others, ``[n]``) reaches.

    Not below 0: what is nearer to the background than to any domain is no domain's.
    """
    falling = np.sort(np.asarray(margins, np.float32))[::-1]
    return max(0.0, float(np.nextafter(falling[int(false_accepts * len(falling))], np.float32(np.inf))))


def _against_the_rest(classes: list[Any], method: Method) -> Any:
    """Similarities of each text of the background, the last class: to it as if that text were not in it."""
    background = classes[-1]
    if method == "centroid":
        rest = background.sum(0) - background
        own = (background * rest).sum(1) / np.linalg.norm(rest, axis=1)
    else:
        cosines = background @ background.T
        np.fill_diagonal(cosines, -1)
        own = nearest_mean(cosines)
    return np.column_stack([similarities(background, classes[:-1], method), own])


def check(
    *, method: str = "knn", false_accepts: float = FALSE_ACCEPTS, without: Collection[str] = ()
) -> None:
    """Refuse settings that mean nothing, before anything is read or computed."""
    if method not in METHODS:
        raise UserError(f"unknown method '{method}'", where="--method", fix=did_you_mean(method, METHODS))
    if not 0 < false_accepts < 1:
        raise UserError(
            f"{false_accepts} is no share", where="--false-accepts", fix="between 0 and 1, such as 0.2"
        )
    for name in without:
        if name not in subjects():
            raise UserError(f"no subject '{name}'", where="--without", fix=did_you_mean(name, subjects()))
    if len(without) > len(subjects()) / 2:
        raise UserError(
            "most of the background would be left out",
            where="--without",
            fix="keep half of it: what is unknown cannot be told from the domains without it",
        )


def _check_domains(asked: Mapping[str, list[str]], adapters: Mapping[str, str | None]) -> None:
    for domain, adapter in adapters.items():
        if domain not in asked:
            raise UserError(
                f"no record is of the domain '{domain}'", where="--adapter", fix=did_you_mean(domain, asked)
            )
        if adapter is not None and not NAME.fullmatch(adapter):
            raise UserError(
                f"'{adapter}' is not an adapter's name",
                where="--adapter",
                fix="lower-case letters, digits, dot, dash and underscore; no version: production answers",
            )
    if OTHER in asked:
        raise UserError(
            f"'{OTHER}' cannot be the name of a domain", fix="give the records of other subjects as --others"
        )
    for domain, questions in asked.items():
        if len(questions) < _LEAST:
            raise UserError(
                f"the domain '{domain}' has {len(questions)} different questions",
                fix=f"give at least {_LEAST}; some hundreds are better",
            )

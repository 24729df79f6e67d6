"""One benchmark of many served models: lm-eval's tasks and requests are built once, contexts are encoded
once, and each request for scores asks for all models.

Every model gets the EvalResult that a benchmark of it alone gives. Answers are kept in a journal as they
come, so that the same command after a break goes on where it stopped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.harness import evaluate
from qwen_ray.evaluation.improvements import improvements
from qwen_ray.evaluation.journal import Journal
from qwen_ray.evaluation.lm import Pair, QwenRayLM
from qwen_ray.evaluation.many_backend import ManyBackend, probe
from qwen_ray.evaluation.report_text import improvements_markdown
from qwen_ray.fsio import write_json, write_text
from qwen_ray.serving.backends import EndpointBackend, Ids, Sampling

JOURNAL, TABLE, TABLE_TEXT = "journal.jsonl", "table.json", "table.md"
_RUN_AGAIN = "run the same command again: what the older version answered is asked anew; or name NAME@VERSION"


def evaluate_many(
    url: str,
    models: Sequence[str],
    suite: str,
    *,
    out: Path,
    api_key: str | None = None,
    concurrency: int = 4,
    targets: list[str] | None = None,
    note: Callable[[str], object] = lambda _: None,
    **settings: Any,
) -> dict[str, Any]:
    """Benchmark ``models``, ids of the server at ``url``; the first is what the others are compared with.

    Writes to the folder ``out``: the EvalResult of each (:func:`result_file`), ``table.json`` and
    ``table.md`` (see :func:`improvements`), and the journal. Returns the table. ``settings`` as
    :func:`evaluate` takes.

    Raises :class:`UserError` if a model is unknown, or its version changes meanwhile.
    """
    chosen = suites.load(suite)
    if twice := [model for model, n in Counter(models).items() if n > 1]:
        raise UserError(f"'{twice[0]}' is named twice", where="--models", fix="name each id once")
    names = [category.name for category in chosen.categories if category.role != "control"]
    for target in targets or ():
        if target not in names:
            raise UserError(
                f"unknown category '{target}'", where="--targets", fix=did_you_mean(target, names)
            )
    endpoint = EndpointBackend(url, models[0], api_key, concurrency)
    try:
        for model in models[1:]:
            endpoint.check(model)
        seen = probe(endpoint, models)
        now = {name: version for versions in seen.values() for name, version in versions.items()}
        with Journal(out / JOURNAL, now, renewed=_RUN_AGAIN) as journal:
            if journal.left_aside:
                note(f"{journal.left_aside} kept answers are of other versions and are asked anew")
            backend = ManyBackend(endpoint, models, journal, seen)
            lm, results = ManyLM(backend), {}
            with _built_once():
                for model in models:
                    backend.switch(model)
                    base, _, adapter = model.partition(":")
                    results[model] = evaluate(chosen, lm, model=base, adapter=adapter or None, **settings)
            journal.add(*((model, versions, {}) for model, versions in probe(endpoint, models).items()))
            for model, result in results.items():
                result["settings"]["endpoint"] = True
                result["served"] = backend.account(model)
    finally:
        endpoint.close()
    for model, result in results.items():
        write_json(out / result_file(model), result)
    table = improvements(results, targets=targets)
    write_json(out / TABLE, table)
    write_text(out / TABLE_TEXT, improvements_markdown(table))
    return table


def result_file(model: str) -> str:
    """The name of a model's EvalResult: ``tiny:facts@2+rag`` -> ``tiny~facts@2+rag.json``."""
    return model.replace(":", "~") + ".json"


class ManyLM(QwenRayLM):
    """lm-eval's view of a :class:`ManyBackend`. lm-eval asks the same for each model: it is encoded once."""

    def __init__(self, backend: ManyBackend) -> None:
        super().__init__(backend)
        self._many = backend
        self._pairs: dict[tuple[tuple[str, str], ...], list[Pair]] = {}
        self._prompts: dict[tuple[str, ...], list[Ids]] = {}

    def _encode_pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        known = tuple(texts)
        if known not in self._pairs:
            self._pairs[known] = super()._encode_pairs(texts)
        return self._pairs[known]

    def _encode_prompts(self, texts: Sequence[str]) -> list[Ids]:
        known = tuple(texts)
        if known not in self._prompts:
            self._prompts[known] = super()._encode_prompts(texts)
        return self._prompts[known]

    def _generate(
        self,
        prompts: Sequence[Ids],
        cut: Sequence[bool],
        sampling: Sampling,
        progress: Callable[[int], object],
    ) -> list[str]:
        return self._many.generate(prompts, sampling, progress, cut)


@contextmanager
def _built_once() -> Iterator[None]:
    """lm-eval loads its tasks and builds their requests in the first evaluation; later ones have the same."""
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

    load, build = TaskManager.load, Task.build_all_requests
    loaded: dict[tuple[str, ...], Any] = {}
    built: set[int] = set()

    def load_once(manager: TaskManager, names: list[str]) -> Any:
        if tuple(names) not in loaded:
            loaded[tuple(names)] = load(manager, names)
        return loaded[tuple(names)]

    def build_once(task: Task, **settings: Any) -> None:
        if id(task) not in built:  # `loaded` holds it, so that no other gets its id
            build(task, **settings)
            built.add(id(task))
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    with (
        patch.object(TaskManager, "load", load_once),
        patch.object(Task, "build_all_requests", build_once),
    ):
        yield

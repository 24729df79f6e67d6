"""The tasks of a suite in lm-eval, and what their items ask: an EvalResult has ids only."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_ray.evaluation.suites import Suite


@dataclass(frozen=True)
class Question:
    """What an item asks, as the model reads it (without solved examples), and its choices, if it has any."""

    text: str
    choices: tuple[str, ...]


def task_manager(suite: Suite, data_dir: Path | None = None) -> Any:
    """lm-eval's TaskManager for the tasks of a suite."""
    from lm_eval.tasks import TaskManager

    # It warns once a task that loaders take arguments; that is how ours are meant.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {"data_dir": str(data_dir)} if data_dir else {}
    return TaskManager(include_path=str(suite.folder), include_defaults=False, metadata=metadata)


def item_id(task: str, doc: dict[str, Any], doc_hash: str) -> str:
    """What pairs an item across models: its own id, or its task and lm-eval's hash of it."""
    return str(doc.get("id") or f"{task}/{doc_hash[:16]}")


def questions(
    suite: Suite, data_dir: Path | None = None, *, of: Iterable[dict[str, Any]] | None = None
) -> dict[tuple[str, str], Question]:
    """(task, item id) to what is asked: for the items ``of`` a result, or for every item of a suite.

    An EvalResult holds ids and answers only, so that it stays small; the texts come from the suite's data.
    Raises :class:`qwen_ray.errors.UserError` where these are not at hand.
    """
    from lm_eval.utils import handle_non_serializable, hash_string

    manager = task_manager(suite, data_dir)
    names = [task for category in suite.categories for task in category.tasks]
    wanted = None if of is None else {(item["task"], item["id"]) for item in of}
    asked = {}
    for name, task in manager.load(names)["tasks"].items():
        for doc in task.eval_docs:
            # As lm-eval hashes it for the samples that it logs.
            text = json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
            key = (name, item_id(name, doc, hash_string(text)))
            if wanted is not None and key not in wanted:
                continue  # a template is compiled for each text
            choices = task.doc_to_choice(doc) if task.OUTPUT_TYPE == "multiple_choice" else ()
            asked[key] = Question(str(task.doc_to_text(doc)), tuple(map(str, choices)))
    return asked

"""Running a suite through lm-eval, and the EvalResult that comes out."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation.questions import item_id, task_manager
from qwen_ray.evaluation.statistics import wilson
from qwen_ray.evaluation.suites import Category, Suite
from qwen_ray.fsio import read_json

SCHEMA = "qwen-ray/eval-result/1"
SEED = 1234


def evaluate(
    suite: Suite,
    lm: Any,
    *,
    model: str,
    adapter: str | None = None,
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Run every task of ``suite`` on an lm-eval ``LM`` and return an EvalResult (JSON-ready).

    ``limit`` is the number of items of each task; ``num_fewshot`` overrides the tasks' own. Raises
    :class:`UserError` where a category names a filter or a metric that its tasks do not have, and for more
    examples than a task has to show.
    """
    import lm_eval

    if data_dir is not None and not data_dir.is_dir():
        raise UserError("no such folder", where=f"--data-dir {data_dir}", fix="check the path")
    manager = task_manager(suite, data_dir)
    names = [task for category in suite.categories for task in category.tasks]
    tasks = manager.load(names)["tasks"]
    _check_scores(suite, tasks)
    if num_fewshot is not None:
        _check_fewshot(num_fewshot, tasks)
    # It would note the git commit of whatever folder this runs in, and spend seconds on facts of the machine.
    with (
        patch("lm_eval.evaluator.get_git_commit_hash", return_value=None),
        patch("lm_eval.evaluator.add_env_info"),
    ):
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=list(tasks.values()),
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    items = [item for category in suite.categories for item in _items(category, results["samples"])]
    summaries = {c.name: summarise(c, items) for c in suite.categories}
    return {
        "schema": SCHEMA,
        "model": model,
        "adapter": adapter,
        "suite": suite.name,
        "suite_version": suite.version,
        "description": suite.description,
        "settings": {"limit": limit, "num_fewshot": num_fewshot, "seed": SEED, "confidence": 0.95},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("qwen-ray", "lm-eval", "transformers", "torch")},
        },
        "categories": {c.name: summaries[c.name] for c in suite.categories if c.role != "control"},
        "controls": {
            c.name: {**summaries[c.name], "explanation": c.explanation}
            for c in suite.categories
            if c.role == "control"
        },
        "items": items,
    }


def _check_scores(suite: Suite, tasks: dict[str, Any]) -> None:
    """Each category names a metric, and where needed a filter, that its tasks have.

    Otherwise items would count once for each filter, or a long benchmark would fail at its end.
    """
    for category in suite.categories:
        where = f"{suite.folder / 'suite.yaml'}: categories.{category.name}"
        for name in category.tasks:
            filters = [ensemble.name for ensemble in tasks[name]._filters]
            if category.filter is None and len(filters) > 1:
                raise UserError(
                    f"'{name}' scores each answer by {len(filters)} filters, and no filter is named",
                    where=where,
                    fix=f"add `filter:` with one of: {', '.join(filters)}",
                )
            if category.filter is not None and category.filter not in filters:
                raise UserError(
                    f"'{name}' has no filter '{category.filter}'",
                    where=f"{where}.filter",
                    fix=did_you_mean(category.filter, filters),
                )
            metrics = tasks[name].aggregation()
            # A task's own function may score by what is listed nowhere.
            if category.metric not in metrics and not callable(tasks[name].config.process_results):
                raise UserError(
                    f"'{name}' has no metric '{category.metric}'",
                    where=f"{where}.metric",
                    fix=did_you_mean(category.metric, metrics),
                )


def _check_fewshot(asked: int, tasks: dict[str, Any]) -> None:
    """lm-eval keeps to a task's own 0, whatever is asked for, and fails midway for want of examples."""
    where = f"--fewshot {asked}"
    if asked < 0:
        raise UserError("a negative number of solved examples", where=where, fix="give 0 or more")
    for name, task in tasks.items():
        if asked and task.config.num_fewshot == 0:
            raise UserError(
                f"'{name}' is always asked without solved examples",
                where=where,
                fix="leave it out, or give 0",
            )
        # Where they are of the items themselves, the item that is asked is none of them.
        own = task.fewshot_cfg.split == task.config.test_split
        most = len(task.sampler.df) - own
        if asked > most:
            raise UserError(f"'{name}' has {most} solved examples", where=where, fix=f"give {most} or fewer")


def _items(category: Category, samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row an item: its score from 0 to 1, what was answered, and an id that pairs it across models."""
    rows = []
    for task in category.tasks:
        for sample in samples[task]:
            if category.filter is not None and sample["filter"] != category.filter:
                continue
            answer = sample["filtered_resps"][0]
            if category.metric == "acc":  # (log-likelihood, is greedy) of each choice
                likelihoods = [float(choice[0]) for choice in sample["filtered_resps"]]
                answer = likelihoods.index(max(likelihoods))
            rows.append(
                {
                    "category": category.name,
                    "task": task,
                    "id": item_id(task, sample["doc"], sample["doc_hash"]),
                    "score": float(sample[category.metric]),
                    "answer": answer,
                    "target": sample["target"],
                }
            )
    return rows


def summarise(category: Category, items: list[dict[str, Any]]) -> dict[str, Any]:
    """A category's mean score over its items, with their count and a 95% interval (Wilson)."""
    scores = [item["score"] for item in items if item["category"] == category.name]
    return {
        "role": category.role,
        "metric": category.metric,
        "n": len(scores),
        "score": sum(scores) / len(scores),
        "ci": list(wilson(sum(scores), len(scores))),
    }


def read_result(path: Path) -> dict[str, Any]:
    """Read an EvalResult file; :class:`UserError` if it is something else."""
    result = read_json(path)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA:
        raise UserError(
            "not a result of `qwen-ray eval`", where=str(path), fix="make one with `qwen-ray eval --out FILE`"
        )
    return dict(result)

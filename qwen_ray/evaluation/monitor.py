"""Watching for forgetting: the suites' scores while training, item by item against those before it.

A strength has fallen when its score is below the baseline's by more than the tolerance, in the point
estimate: the gate's rule (:mod:`qwen_ray.evaluation.compare`), with the same paired interval beside it, so a
message says when the items are too few to tell a fall from chance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from qwen_ray.errors import UserError
from qwen_ray.evaluation.compare import Gate, compare
from qwen_ray.evaluation.statistics import ROUNDING, paired_difference

Action = Literal["warn", "stop", "rollback"]
STATE_VERSION = 1

Result = dict[str, Any]
"""An EvalResult, as :func:`qwen_ray.evaluation.harness.evaluate` makes it."""


@dataclass(frozen=True)
class Fall:
    """A strength that fell: its scores (shares of 1) over the same ``n`` items at the baseline and now.

    ``interval``: of the paired difference after - before. ``detectable``: the smallest fall that so many
    items could show, None if none could: :func:`smallest_fall`, or half the interval for scores that are
    not right or wrong.
    """

    suite: str
    name: str
    before: float
    after: float
    n: int
    interval: tuple[float, float]
    detectable: float | None

    @property
    def certain(self) -> bool:
        """Whether the interval excludes no change."""
        return self.interval[1] < 0

    def __str__(self) -> str:
        lo, hi = self.interval
        text = (
            f"{self.suite}/{self.name} fell from {100 * self.before:.1f} to {100 * self.after:.1f} "
            f"(interval {100 * lo:+.1f} to {100 * hi:+.1f}, n={self.n})"
        )
        return text if self.certain else f"{text}, which may be chance: {_power(self.n, self.detectable)}"


@dataclass(frozen=True)
class Verdict:
    """What an evaluation says of the run so far.

    ``action``: ``none``, or what the configuration asks for when a strength has fallen. ``best_step``: of
    the steps evaluated whose strengths all held, the one with the best mean over the target categories,
    the newest of equals; the baseline's step counts as one. ``worst``: the largest fall of a strength below
    the baseline, as a share of 1 (negative if all rose, None without strengths).
    """

    step: int
    action: Literal["none", "warn", "stop", "rollback"]
    fallen: tuple[Fall, ...]
    best_step: int
    worst: float | None
    message: str

    @property
    def is_best(self) -> bool:
        """Whether the weights as they are now are the ones to roll back to: keep their checkpoint."""
        return self.best_step == self.step

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ForgettingMonitor:
    """Compares every evaluation of a run with its first one. Decides from scores only, so ranks agree."""

    def __init__(self, tolerance: float = 0.04, action: str = "warn", *, confidence: float = 0.95) -> None:
        """``tolerance``: how far a strength may fall, as a share of 1. ``action``: warn, stop or rollback."""
        if action not in get_args(Action):
            raise UserError(
                f"unknown action '{action}'",
                where="evaluate.on_forgetting",
                fix=f"valid: {', '.join(get_args(Action))}",
            )
        self.action: Action = action  # type: ignore[assignment]
        self.gate = Gate(tolerance=tolerance, confidence=confidence)
        self.baseline: dict[str, Result] = {}
        """By suite, what the comparison needs of the first evaluation; empty before it."""
        self.baseline_step = 0
        self.best_step = 0
        self._best_score = 0.0
        self._best_before = (0, 0.0)

    @property
    def started(self) -> bool:
        """Whether there is a baseline. If not, the next :meth:`update` makes it."""
        return bool(self.baseline)

    def update(self, step: int, *results: Result) -> Verdict:
        """Take in the results of every suite after ``step`` steps. The first call makes the baseline.

        Raises :class:`UserError` if they are not of the suites and items of the baseline.
        """
        if not results:
            raise ValueError("no results")
        if not self.started:
            self.baseline = {result["suite"]: _compact(result) for result in results}
            self.baseline_step = self.best_step = step
            self._best_score = _target_mean(results)
            self._best_before = (step, self._best_score)
            return Verdict(step, "none", (), step, self._worst(results), self._baseline_message())
        fallen = tuple(
            Fall(
                suite=suite,
                name=row["name"],
                before=row["baseline"],
                after=row["candidate"],
                n=row["n"],
                interval=(row["delta_ci"][0], row["delta_ci"][1]),
                detectable=self._detectable(self._scores(suite, row["name"]), row["delta_ci"]),
            )
            for suite, row in self._strengths(results)
            if row["delta"] < -(self.gate.tolerance + ROUNDING)
        )
        score = _target_mean(results)
        if not fallen and score >= self._best_score:
            self._best_before = (self.best_step, self._best_score)
            self.best_step, self._best_score = step, score
        action = self.action if fallen else "none"
        return Verdict(
            step, action, fallen, self.best_step, self._worst(results), self._message(step, fallen)
        )

    def take_back(self) -> None:
        """The newest best step has no checkpoint to go back to: the one before it is the best again."""
        self.best_step, self._best_score = self._best_before

    def metrics(self, *results: Result) -> dict[str, float]:
        """Flat rows for the log: :func:`metrics` of each, and ``forgetting/worst`` as in :class:`Verdict`."""
        rows = {key: value for result in results for key, value in metrics(result).items()}
        worst = self._worst(results) if self.started else None
        return rows if worst is None else {**rows, "forgetting/worst": worst}

    def state(self) -> dict[str, Any]:
        """Everything that a resumed run needs, as JSON: about one character an item."""
        return {
            "version": STATE_VERSION,
            "baseline": self.baseline,
            "baseline_step": self.baseline_step,
            "best_step": self.best_step,
            "best_score": self._best_score,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state` was taken. Tolerance and action stay those of this monitor."""
        if state.get("version") != STATE_VERSION:
            raise UserError(
                f"the forgetting monitor's state has version {state.get('version')!r}, not {STATE_VERSION}",
                fix="resume with the version of qwen-ray that wrote the checkpoint",
            )
        self.baseline = dict(state["baseline"])
        self.baseline_step, self.best_step = int(state["baseline_step"]), int(state["best_step"])
        self._best_score = float(state["best_score"])
        self._best_before = (self.best_step, self._best_score)

    # -- comparing

    def _strengths(self, results: Sequence[Result]) -> list[tuple[str, dict[str, Any]]]:
        """(suite, the comparison's row) of every strength."""
        if {result["suite"] for result in results} != set(self.baseline):
            raise UserError(
                f"the baseline is of the suites {', '.join(sorted(self.baseline))}",
                where="evaluate.suites",
                fix="resume with the suites that the run was started with",
            )
        rows = []
        for result in results:
            comparison = compare(_restored(self.baseline[result["suite"]], result), result, self.gate)
            rows += [(result["suite"], r) for r in comparison["categories"] if r["role"] == "strength"]
        return rows

    def _worst(self, results: Sequence[Result]) -> float | None:
        falls = [-row["delta"] + 0.0 for _, row in self._strengths(results)]  # + 0.0: no minus zero
        return max(falls, default=None)

    def _scores(self, suite: str, name: str) -> list[float]:
        return _unpack(self.baseline[suite]["scores"][name]["scores"])

    def _detectable(self, scores: Sequence[float], interval: Sequence[float]) -> float | None:
        if _right_or_wrong(scores):
            return smallest_fall(scores, self.gate.confidence)
        return (interval[1] - interval[0]) / 2

    # -- saying so

    def _baseline_message(self) -> str:
        lines = [f"baseline of the forgetting monitor at step {self.baseline_step}"]
        strengths = [
            (suite, name)
            for suite, kept in self.baseline.items()
            for name, category in kept["categories"].items()
            if category["role"] == "strength"
        ]
        if not strengths:
            lines.append("no category of the suites is a strength, so no forgetting can be seen")
        for suite, name in strengths:
            scores = self._scores(suite, name)
            if not _right_or_wrong(scores):
                continue  # how much they vary from one evaluation to the next is not known yet
            detectable = smallest_fall(scores, self.gate.confidence)
            if detectable is None or detectable > self.gate.tolerance:
                lines.append(
                    f"{suite}/{name}: the tolerance is {100 * self.gate.tolerance:g} points, "
                    f"but {_power(len(scores), detectable)}"
                )
        return "\n".join(lines)

    def _message(self, step: int, fallen: Sequence[Fall]) -> str:
        tolerance = f"{100 * self.gate.tolerance:g} points"
        if not fallen:
            return f"step {step}: every strength is within {tolerance} of the baseline"
        head = f"step {step}: forgetting, more than {tolerance} below the baseline"
        end = {
            "warn": "training goes on",
            "stop": "the run ends here",
            "rollback": f"the run ends with step {self.best_step}, the best that forgot nothing",
        }[self.action]
        return "\n".join([head, *(f"  {fall}" for fall in fallen), f"  {end}"])


def metrics(result: Result) -> dict[str, float]:
    """The scores of a result as flat rows for the log, controls included: ``suite/tiny/arithmetic``."""
    categories = {**result["categories"], **result["controls"]}
    return {
        f"suite/{result['suite']}/{name.replace(' ', '_')}": float(c["score"])
        for name, c in categories.items()
    }


def smallest_fall(baseline: Sequence[float], confidence: float = 0.95) -> float | None:
    """The smallest fall, as a share of 1, that items scored 0 or 1 could show by an interval without zero.

    The most favourable case is counted, in which items are lost and none is gained; a fall among gains has
    to be larger. None if even losing every item that was right would not show.
    """
    if not _right_or_wrong(baseline):
        raise ValueError("scores other than 0 and 1")
    right = sum(1 for score in baseline if score)
    before = [1.0] * right + [0.0] * (len(baseline) - right)

    def shows(lost: int) -> bool:
        after = [0.0] * lost + before[lost:]
        return paired_difference(before, after, confidence)[2] < 0

    if not right or not shows(right):
        return None
    low, high = 0, right  # losing `low` does not show, losing `high` does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle, high)
    return high / len(baseline)


def _power(n: int, detectable: float | None) -> str:
    if detectable is None:
        return f"n={n} items cannot show a fall"
    return f"n={n} items cannot show a fall of less than {100 * detectable:.1f} points"


def _target_mean(results: Sequence[Result]) -> float:
    """Mean score over the target categories; 0 without any, so that the newest step that holds is best."""
    scores = [c["score"] for r in results for c in r["categories"].values() if c["role"] == "target"]
    return sum(scores) / len(scores) if scores else 0.0


# -- the baseline, compact


def _compact(result: Result) -> Result:
    """A result without what was answered: of each category the scores in the order of the items' keys, and
    a digest of those keys, so that only the same items are ever compared with them."""
    return {
        **{key: result[key] for key in ("suite", "suite_version", "model", "adapter", "settings")},
        "categories": {name: {"role": c["role"]} for name, c in result["categories"].items()},
        "controls": list(result["controls"]),
        "scores": {
            name: {"items": _digest(list(scores)), "scores": _pack(list(scores.values()))}
            for name, scores in _by_category(result).items()
        },
    }


def _restored(kept: Result, result: Result) -> Result:
    """The baseline as an EvalResult with the items of ``result``, after checking that it is of those."""
    items = []
    for name, scores in _by_category(result).items():
        before = kept["scores"].get(name)
        if before is None or before["items"] != _digest(list(scores)):
            raise UserError(
                f"the items of {result['suite']}/{name} are not those of the baseline",
                where="evaluate.suites",
                fix="resume with the same suites_limit, suites_data_dir and version of qwen-ray",
            )
        # A comparison counts the occurrences of an id in order; the keys are sorted the same way.
        items += [
            {"category": name, "id": id, "score": score}
            for (id, _), score in zip(scores, _unpack(before["scores"]), strict=True)
        ]
    return {**kept, "items": items}


def _by_category(result: Result) -> dict[str, dict[tuple[str, int], float]]:
    """Category to (item id, which occurrence of it) to score, sorted by item."""
    scores: dict[str, dict[tuple[str, int], float]] = {}
    seen: dict[tuple[str, str], int] = {}
    for item in result["items"]:
        name, id = item["category"], item["id"]
        occurrence = seen.get((name, id), 0)
        seen[name, id] = occurrence + 1
        scores.setdefault(name, {})[id, occurrence] = float(item["score"])
    return {name: dict(sorted(values.items())) for name, values in scores.items()}


def _digest(keys: Sequence[tuple[str, int]]) -> str:
    return hashlib.sha256(repr(list(keys)).encode()).hexdigest()


def _pack(scores: Sequence[float]) -> str | list[float]:
    """Right and wrong as a string of 1 and 0; other scores as they are."""
    if _right_or_wrong(scores):
        return "".join("1" if score else "0" for score in scores)
    return list(scores)


def _right_or_wrong(scores: Sequence[float]) -> bool:
    return set(scores) <= {0.0, 1.0}


def _unpack(packed: str | list[float]) -> list[float]:
    return [float(score) for score in packed]

"""What a router answers and refuses, by hand-made vectors, and how it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_ray.errors import UserError
from qwen_ray.routing.router import METHODS, Calibration, Domain, Method, Router
from qwen_ray.serving.assistant import Route

X, Y, Z = np.eye(3, dtype=np.float32)


def unit(*rows: Any) -> Any:
    matrix = np.array(rows, np.float32)
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def made(
    *, classes: dict[str, Any], background: Any, method: Method = "knn", threshold: float = 0.0
) -> Router:
    return Router(
        [Domain(name, f"{name}-adapter", len(rows), 1, 1.0) for name, rows in classes.items()],
        list(classes.values()),
        background,
        embedder="e@1",
        embedder_name="e",
        method=method,
        calibration=Calibration(threshold, 0.0, 1),
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_nearest_domain_answers_unless_the_background_is_nearer(method: Method) -> None:
    router = made(classes={"a": unit(X), "b": unit(Y)}, background=unit(Z), method=method)
    routes = router.route(unit([3, 1, 0], [1, 3, 0], [1, 0, 3]))
    assert [route.adapter for route in routes] == ["a-adapter", "b-adapter", None]
    assert [route.domain for route in routes] == ["a", "b", "a"]  # the nearest is told, chosen or not
    assert [router.chosen(route) for route in routes] == ["a", "b", None]
    assert routes[0].score == pytest.approx(3 / 10**0.5)
    assert routes[2].score == pytest.approx(-2 / 10**0.5)


def test_the_threshold_is_on_the_lead_over_the_background() -> None:
    question = unit([3, 0, 1])  # leads by 0.63
    for threshold, adapter in ((0.6, "a-adapter"), (0.7, None)):
        router = made(classes={"a": unit(X)}, background=unit(Z), threshold=threshold)
        assert router.route(question)[0].adapter == adapter


def test_knn_takes_the_three_nearest_and_centroid_the_mean() -> None:
    # Three examples of `a` lie where the question does and three far off, so that its mean is far from it.
    classes = {"a": unit(X, X, X, Z, Z, Z), "b": unit([2, 1, 0])}
    question = unit(X)
    assert made(classes=classes, background=unit(Y)).route(question)[0].domain == "a"
    assert made(classes=classes, background=unit(Y), method="centroid").route(question)[0].domain == "b"
    stray = {"a": unit([3, 1, 0]), "b": unit(X, Z, Z)}  # one example of `b` is the question itself
    assert made(classes=stray, background=unit(Y)).route(question)[0].domain == "a"


def test_a_tie_goes_to_the_first_domain() -> None:
    router = made(classes={"a": unit(X), "b": unit(Y)}, background=unit(Z))
    assert {route.domain for route in router.route(unit([1, 1, 0], [1, 1, 0]))} == {"a"}


def test_no_question_no_route() -> None:
    assert made(classes={"a": unit(X)}, background=unit(Z)).route(np.zeros((0, 3), np.float32)) == []


@pytest.mark.parametrize(
    ("vectors", "said"),
    [
        (np.ones((1, 4), np.float32), "vectors of 3 numbers"),
        (np.ones(3, np.float32), "vectors of 3 numbers"),
        (np.array([X, [np.nan, 0, 0]]), "not finite"),
    ],
)
def test_vectors_of_another_kind_are_refused(vectors: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        made(classes={"a": unit(X)}, background=unit(Z)).route(vectors)


def test_a_saved_router_routes_alike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    classes = {"geschichte": unit(*rng.normal(size=(5, 3))), "a/b": unit(*rng.normal(size=(2, 3)))}
    router = made(classes=classes, background=unit(*rng.normal(size=(4, 3))), threshold=0.1)
    router.save(tmp_path / "r")
    again = Router.load(tmp_path / "r")
    questions = unit(*rng.normal(size=(20, 3)))
    assert again.route(questions) == router.route(questions)
    assert again.describe() == router.describe()
    assert (again.embedder, again.embedder_name) == ("e@1", "e")
    assert json.dumps(again.describe())


@pytest.mark.parametrize("part", ["router.json", "examples.safetensors"])
def test_a_damaged_router_is_refused(tmp_path: Path, part: str) -> None:
    made(classes={"a": unit(X)}, background=unit(Z)).save(tmp_path)
    data = (tmp_path / part).read_bytes()
    for damaged in (data[:-9], data.replace(b"format", b"framed") if part == "router.json" else data + b" "):
        (tmp_path / part).write_bytes(damaged)
        with pytest.raises(UserError, match=r"damaged|not valid JSON"):
            Router.load(tmp_path)
    (tmp_path / part).unlink()
    with pytest.raises(UserError):
        Router.load(tmp_path)


def test_a_folder_without_a_router_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no router here"):
        Router.load(tmp_path / "none")


def test_a_domain_of_the_base_is_chosen_without_an_adapter() -> None:
    router = made(classes={"a": unit(X)}, background=unit(Z))
    router.domains = (Domain("a", None, 1, 1, 1.0),)
    (route,) = router.route(unit(X))
    assert route == Route(None, 1.0, "a")
    assert router.chosen(route) == "a"

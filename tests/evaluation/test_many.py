"""One benchmark of many served models: equal to one of each alone, and goes on after a break."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from lm_eval.tasks import TaskManager
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from qwen_ray import eval_verbs
from qwen_ray.errors import UserError
from qwen_ray.evaluation import many_backend
from qwen_ray.evaluation.harness import read_result
from qwen_ray.evaluation.journal import Journal
from qwen_ray.evaluation.many import JOURNAL, evaluate_many, result_file
from qwen_ray.evaluation.run import evaluate_endpoint
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.serving import catalog
from qwen_ray.serving.app import create_app
from qwen_ray.serving.assistant import Route
from qwen_ray.serving.client import KEY_VARIABLE
from qwen_ray.serving.service import Service
from qwen_ray.verbs import Output
from tests.conftest import ROOT
from tests.serving import conftest as serving
from tests.serving.fixed_assistant import FixedAssistant, passage
from tests.serving.live import served

IDS = ["rand", "rand:geo", "rand+rag", "rand:law@1+rag", "rand:auto"]
LIMIT = 8
KEY = "qr-open-sesame"

model_dir, adapter_dirs, registry = serving.model_dir, serving.adapter_dirs, serving.registry  # fixtures


class Watched:
    """A service that notes what it has answered. ``before(n)`` runs before the n-th request for answers."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.answered: list[tuple[str, str]] = []
        self.requests, self.encoded = 0, 0
        self.before: Callable[[int], None] = lambda _: None
        self.held_from: int | None = None  # from this request on none is answered

    async def call(self, method: str, body: Any = None) -> dict[str, Any]:
        asked: list[tuple[str, str]] = []
        if method == "tokenize":
            self.encoded += len(body.prompt)
        if method == "score" and len(body.items[0].continuations) > 1:  # one is the probe's
            asked = [(m, str(item)) for m in body.models or [body.model] for item in body.items]
        elif method == "completion":
            asked = [(body.model, str(prompt)) for prompt in body.prompt]
        if asked:
            self.requests += 1
            self.before(self.requests)
            if self.held_from is not None and self.requests >= self.held_from:
                while self.held_from is not None:
                    await asyncio.sleep(0.01)
                return {"error": {"status": 503, "message": "held too long"}}
        envelope = await self.service.call(method, body)
        self.answered += asked
        return envelope

    def stream(self, method: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        return self.service.stream(method, body)


class RoutedAssistant(FixedAssistant):
    """With the facts of a router as a real one has them."""

    async def describe(self) -> dict[str, Any]:
        domains = [{"name": route.domain, "adapter": route.adapter} for route in self.routes.values()]
        return await super().describe() | {"router": {"domains": domains}}


@pytest.fixture(scope="module")
def service(model_dir: Path, registry: Registry) -> Iterator[Service]:
    routes = {"3 plus": Route("geo", 0.8, "rivers"), "4 plus": Route("law", 0.7, "law")}
    assistant = RoutedAssistant(routes, {"rivers": [passage("3 plus 4 is 7.")]})
    service = Service.load(str(model_dir), registry=registry.root, assistant=assistant)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    app = create_app(client := Watched(service))
    app.state.watched = client

    @app.middleware("http")
    async def locked(request: Request, call_next: Any) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        return await call_next(request)

    with pytest.MonkeyPatch.context() as patch, served(app) as url:
        patch.setenv(KEY_VARIABLE, KEY)
        _WATCHED[url] = client
        yield url


_WATCHED: dict[str, Watched] = {}


@pytest.fixture
def watched(url: str) -> Iterator[Watched]:
    client = _WATCHED[url]
    client.answered, client.requests, client.encoded = [], 0, 0
    yield client
    client.before, client.held_from = lambda _: None, None


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Choices of one target, and written answers of one strength."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [{"id": f"s{i}", "question": f"{3 + i % 3} plus {i}", "answer": i % 4} for i in range(LIMIT)]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "items.jsonl")}},
        "test_split": "test",
        "doc_to_text": "How much is that?\n\nQuestion: what is {{question}}?\nAnswer:",
    }
    choice = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_choice": ["the river", "in the mountains", "Paris", "the lazy dog"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    written = {
        "task": "written",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [{"metric": "exact_match"}],
    }
    for own in (choice, written):
        (folder / f"{own['task']}.yaml").write_text(yaml.safe_dump(task | own))
    spec = {
        "name": "sums",
        "version": "1",
        "description": "Sums.",
        "categories": {
            "choices": {"role": "target", "tasks": ["choices"], "metric": "acc"},
            "written": {"role": "strength", "tasks": ["written"], "metric": "exact_match", "filter": "none"},
        },
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(spec))
    return str(folder)


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests for what one would do."""
    monkeypatch.setattr(many_backend, "ITEMS_PER_REQUEST", 4)
    monkeypatch.setattr(many_backend, "PROMPTS_PER_REQUEST", 2)


@pytest.fixture
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server remembers of the registry neither what is not there nor which canary runs."""
    for kept in ("_MISSES", "CANARY_SECONDS"):
        monkeypatch.setattr(catalog, kept, 0)


def essence(result: dict[str, Any]) -> dict[str, Any]:
    """All of a result but when it was made and by whom it was answered."""
    return {key: value for key, value in result.items() if key not in ("created_at", "served")}


def results(out: Path, ids: list[str]) -> dict[str, dict[str, Any]]:
    return {model: essence(read_result(out / result_file(model))) for model in ids}


@pytest.mark.usefixtures("small_requests")
def test_each_result_is_that_of_a_run_alone(url: str, suite: str, watched: Watched, tmp_path: Path) -> None:
    table = evaluate_many(url, IDS, suite, out=tmp_path)
    together = Counter(watched.answered)
    encoded = watched.encoded
    got = results(tmp_path, IDS)
    watched.answered = []
    for model in IDS:
        alone = evaluate_endpoint(url, model, suite, out=tmp_path / "alone.json")
        assert got[model] == essence(alone)
    assert together == Counter(watched.answered), "the same is asked, and once"
    assert len(together) == 2 * LIMIT * len(IDS)
    assert len({json.dumps(result["items"]) for result in got.values()}) >= 4, "the models hardly differ"
    assert encoded < 2 * (watched.encoded - encoded) / len(IDS), "each context is encoded once"

    assert json.loads((tmp_path / "table.json").read_text()) == table
    assert [model["title"] for model in table["models"]] == [
        "base", "+geo", "+RAG", "both: law@1 +RAG", "auto",
    ]  # fmt: skip
    whom = {model["id"]: model for model in table["models"]}
    assert whom["rand:geo"]["adapters"] == {"geo@1": 2 * LIMIT}
    assert sum(whom["rand:auto"]["adapters"].values()) == 2 * LIMIT
    assert set(whom["rand:auto"]["adapters"]) == {"base", "geo@1", "law@1"}
    assert whom["rand"]["with_passages"] == 0
    assert whom["rand+rag"]["with_passages"] == 2 * LIMIT
    assert whom["rand+rag"]["knowledge_bases"] == {"rivers": "3"}


@pytest.mark.usefixtures("small_requests")
def test_a_benchmark_that_was_killed_goes_on(url: str, suite: str, watched: Watched, tmp_path: Path) -> None:
    evaluate_many(url, IDS[:3], suite, out=tmp_path / "whole")
    every = Counter(watched.answered)
    watched.answered, watched.requests, watched.held_from = [], 0, 6
    code = (
        "from pathlib import Path\n"
        "from qwen_ray.evaluation import many, many_backend\n"
        "many_backend.ITEMS_PER_REQUEST, many_backend.PROMPTS_PER_REQUEST = 4, 2\n"
        f"out = Path({str(tmp_path / 'cut')!r})\n"
        f"many.evaluate_many({url!r}, {IDS[:3]!r}, {suite!r}, out=out, concurrency=1)"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE) as process:
        while watched.requests < 6:
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = Counter(watched.answered)
    assert 0 < len(kept) < len(every)
    assert not (tmp_path / "cut" / "table.json").exists()
    watched.answered, watched.held_from = [], None
    evaluate_many(url, IDS[:3], suite, out=tmp_path / "cut")
    assert kept + Counter(watched.answered) == every, "nothing is asked twice"
    assert results(tmp_path / "cut", IDS[:3]) == results(tmp_path / "whole", IDS[:3])
    watched.answered = []
    evaluate_many(url, IDS[:3], suite, out=tmp_path / "cut")
    assert not watched.answered


@pytest.mark.usefixtures("seen_at_once")
def test_what_the_router_chose_before_a_promotion_is_asked_anew(
    url: str, suite: str, watched: Watched, registry: Registry, tmp_path: Path
) -> None:
    """The sentence that is asked first goes to no adapter."""
    ids = ["rand", "rand:auto", "rand:auto+rag"]

    def run() -> dict[str, int]:
        watched.answered = []
        _, *routed = evaluate_many(url, ids, suite, out=tmp_path)["models"]
        assert routed[0]["adapters"] == routed[1]["adapters"]
        return dict(routed[0]["adapters"])

    try:
        first = run()
        registry.point("geo", PRODUCTION, 2, reason="test")
        moved = run()
        assert Counter(model for model, _ in watched.answered) == dict.fromkeys(ids[1:], 2 * LIMIT)
        assert moved == {"base": first["base"], "geo@2": first["geo@1"], "law@1": first["law@1"]}
        registry.unpoint("geo", PRODUCTION, reason="test")
        assert run() == {"base": first["base"] + first["geo@1"], "law@1": first["law@1"]}
        registry.point("geo", PRODUCTION, 2, reason="test")
        assert run() == moved
    finally:
        registry.point("geo", PRODUCTION, 1, reason="test")


@pytest.mark.usefixtures("seen_at_once")
def test_a_canary_that_the_router_may_choose_is_refused_at_once(
    url: str, suite: str, watched: Watched, registry: Registry, tmp_path: Path
) -> None:
    registry.start_canary("geo", 2, 0.5, reason="test")
    try:
        with pytest.raises(UserError, match="while a canary answers a part of what goes to 'geo'") as e:
            evaluate_many(url, ["rand", "rand:auto"], suite, out=tmp_path)
        assert "'rand:geo@2' is the canary alone" in e.value.fix
        assert not watched.answered
        evaluate_many(url, ["rand", "rand:geo"], suite, out=tmp_path, limit=1)
    finally:
        registry.stop_canary("geo", reason="test")
    evaluate_many(url, ["rand", "rand:auto"], suite, out=tmp_path, limit=1)


@pytest.mark.usefixtures("small_requests")
def test_a_version_that_moves_is_refused_and_asked_anew(
    url: str,
    suite: str,
    watched: Watched,
    registry: Registry,
    tmp_path: Path,
) -> None:
    def move(request: int) -> None:
        if request == 3:
            registry.point("geo", PRODUCTION, 2, reason="test")

    watched.before = move
    ids = ["rand", "rand:geo"]
    try:
        with pytest.raises(UserError, match=r"rand:geo changed .* geo@1, now geo@2") as e:
            evaluate_many(url, ids, suite, out=tmp_path, concurrency=1)
        assert "same command again" in e.value.fix
        assert not (tmp_path / result_file("rand:geo")).exists()
        of_base = [key for model, key in watched.answered if model == "rand"]
        watched.answered = []
        notes: list[str] = []
        evaluate_many(url, ids, suite, out=tmp_path, note=notes.append)
        assert "other versions" in notes[0]
        assert not {key for model, key in watched.answered if model == "rand"} & set(of_base)
        assert len([key for model, key in watched.answered if model == "rand:geo"]) >= 2 * LIMIT - 2
        new = evaluate_endpoint(url, "rand:geo@2", suite, out=tmp_path / "alone.json")
        assert read_result(tmp_path / result_file("rand:geo"))["items"] == new["items"]
    finally:
        registry.point("geo", PRODUCTION, 1, reason="test")


def test_another_version_of_a_knowledge_base_is_asked_anew(
    url: str, suite: str, watched: Watched, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    evaluate_many(url, ["rand", "rand+rag"], suite, out=tmp_path)
    newer = [replace(passage("3 plus 4 is 7."), version=4)]
    monkeypatch.setattr(watched.service.assistant, "passages", {"rivers": newer})
    watched.answered = []
    table = evaluate_many(url, ["rand", "rand+rag"], suite, out=tmp_path)
    assert {model for model, _ in watched.answered} == {"rand+rag"}
    assert len(watched.answered) == 2 * LIMIT
    assert table["models"][1]["knowledge_bases"] == {"rivers": "4"}


def test_prompts_that_lose_their_start_are_counted(
    url: str, suite: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "suite"
    shutil.copytree(suite, folder)
    task = yaml.safe_load((folder / "written.yaml").read_text())
    task["doc_to_text"] = "{{'Z ' * (256 if question[0] == '3' else 3)}}{{question}}"
    (folder / "written.yaml").write_text(yaml.safe_dump(task))
    for _ in range(2):  # the second time from the journal
        table = evaluate_many(url, ["rand", "rand:geo"], str(folder), out=tmp_path / "out")
        assert [model["truncated"] for model in table["models"]] == [3, 3]
    assert "3 prompts left no room for 4 new tokens in the 256 of rand:geo" in caplog.text


def test_a_key_is_needed(url: str, suite: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "qr-wrong")
    with pytest.raises(UserError, match="no such key") as e:
        evaluate_many(url, ["rand"], suite, out=tmp_path)
    assert e.value.status == 401
    assert KEY_VARIABLE in e.value.fix
    assert evaluate_many(url, ["rand"], suite, out=tmp_path, api_key=KEY, limit=1)["base"] == "rand"


def test_what_cannot_be_is_said_before_any_work(
    url: str, suite: str, watched: Watched, tmp_path: Path
) -> None:
    for ids, what in (
        (["rand", "rand:goe"], "no model 'rand:goe'"),
        (["rand", "rand"], "named twice"),
        (["rand", "rand+rga"], r"no model 'rand\+rga'"),
    ):
        with pytest.raises(UserError, match=what):
            evaluate_many(url, ids, suite, out=tmp_path)
    with pytest.raises(UserError, match="unknown category 'choice'"):
        evaluate_many(url, ["rand"], suite, out=tmp_path, targets=["choice"])
    assert not watched.answered


def verb(*arguments: str) -> tuple[dict[str, Any], str]:
    """What `qwen-ray eval` prints, as JSON and as text."""
    parser = argparse.ArgumentParser()
    eval_verbs.add(parser.add_subparsers())
    printed = []
    for as_json in (True, False):
        args, stream = parser.parse_args(["eval", *arguments]), io.StringIO()
        assert args.verb(args, Output(stream, as_json=as_json)) == 0
        printed.append(stream.getvalue())
    return json.loads(printed[0]), printed[1]


def test_the_verb(url: str, suite: str, tmp_path: Path) -> None:
    many = ["--endpoint", url, "--models", "rand,rand:geo,rand+rag", "--suite", suite]
    table, text = verb(*many, "--out", str(tmp_path), "--targets", "written")
    assert [(row["name"], row["role"], row["n"]) for row in table["rows"]] == [
        ("choices", "strength", LIMIT),
        ("written", "target", LIMIT),
    ]
    assert f"+RAG on rand (passages were read before {2 * LIMIT} of {2 * LIMIT} prompts):" in text
    assert text.strip().endswith("table.md")
    one, _ = verb(
        "--endpoint", url, "--model", "rand:geo", "--suite", suite, "--out", str(tmp_path / "g.json")
    )
    assert one["categories"] == read_result(tmp_path / result_file("rand:geo"))["categories"]
    for wrong, what in (
        (["--models", "rand", "--suite", suite, "--out", str(tmp_path)], "ids of a server"),
        ([*many, "--out", str(tmp_path / "g.json")], "is a file"),
        (["--endpoint", url, "--models", "rand,", "--suite", suite, "--out", str(tmp_path)], "empty"),
        (["--model", "tiny", "--targets", "a", "--suite", suite, "--out", "x.json"], "goes with --models"),
    ):
        with pytest.raises(UserError, match=what):
            verb(*wrong)


def test_stock_lm_eval_with_our_model_by_name(url: str, suite: str, tmp_path: Path) -> None:
    """What `python -m qwen_ray.evaluation.lm run` does after its half minute of listing all tasks."""
    done = lm_eval.simple_evaluate(
        model="qwen-ray",
        model_args=f"base_url={url},model=rand:geo",
        tasks=["choices", "written"],
        task_manager=TaskManager(include_path=suite, include_defaults=False),
        bootstrap_iters=0,
    )
    ours = evaluate_endpoint(url, "rand:geo", suite, out=tmp_path / "r.json")["categories"]
    assert done["results"]["choices"]["acc,none"] == pytest.approx(ours["choices"]["score"])
    assert done["results"]["written"]["exact_match,none"] == pytest.approx(ours["written"]["score"])


def test_the_journal_is_one_run_at_a_time(url: str, suite: str, watched: Watched, tmp_path: Path) -> None:
    def again(_: int) -> None:
        with pytest.raises(UserError, match="another benchmark") as e:
            Journal(tmp_path / JOURNAL, {})
        assert "--out" in e.value.fix

    watched.before = again
    evaluate_many(url, ["rand"], suite, out=tmp_path, limit=2)

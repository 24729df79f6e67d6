"""Generated questions against a real HTTP server that plays good, bad, broken and failing models."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.data.generation import generate as g
from qwen_ray.data.generation.generate import Endpoint, Passage, generate
from qwen_ray.data.sources.base import Drops, Found
from qwen_ray.errors import UserError

TEXT = (
    "The Borvel canal joins the towns of Quince and Ardmoor. It was dug between 1802 and 1811 by 4,000 hired "
    "diggers under the engineer Tamsin Hale. Barges carried slate and barley. The canal closed in 1954."
)
SECRET = "key-5f1d"


def row(question: str, answer: str, evidence: str) -> dict[str, str]:
    return {"question": question, "answer": answer, "evidence": evidence}


ENGINEER = row(
    "Under which engineer was the Borvel canal dug?",
    "The engineer Tamsin Hale.",
    "It was dug between 1802 and 1811 by 4,000 hired diggers under the engineer Tamsin Hale.",
)
CARGO = row(
    "What did barges on the Borvel canal carry?", "Slate and barley", "barges carried SLATE, and barley"
)


class Model:
    """What the server does: ``replies`` to a passage by the word it holds; a number is an HTTP status."""

    url = ""

    def __init__(self) -> None:
        self.replies: dict[str, Any] = {}
        self.asked: Counter[str] = Counter()
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> Any:
        prompt = body["messages"][0]["content"]
        name = next((name for name in self.replies if f"({name})" in prompt), "default")
        with self.lock:
            self.asked[name] += 1
        reply = self.replies.get(name, [ENGINEER])
        return reply(self.asked[name]) if callable(reply) else reply


@pytest.fixture
def model() -> Iterator[Model]:
    plays = Model()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            with plays.lock:
                plays.active += 1
                plays.most_active = max(plays.most_active, plays.active)
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            plays.headers.append({name.lower(): value for name, value in self.headers.items()})
            plays.bodies.append({"path": self.path, **body})
            reply = plays.answer(body)
            headers, status = {}, 200
            if isinstance(reply, tuple):
                reply, headers = reply
            if isinstance(reply, int):
                status, data = reply, f"no: {self.headers.get('authorization')}".encode()
            elif isinstance(reply, bytes):
                data = reply
            else:
                said = reply if isinstance(reply, str) else json.dumps(reply)
                data = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            with plays.lock:
                plays.active -= 1
            try:
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                pass  # the client did not wait

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    plays.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield plays
    server.shutdown()
    server.server_close()
    thread.join()


def passage(name: str = "default", text: str = TEXT) -> Passage:
    return Passage(f"book/ch01/{name}", f"({name}) {text}", "history", "book", "CC-BY-4.0", f"book.md:{name}")


def run(
    model: Model, passages: list[Passage], cache: Path, **settings: Any
) -> tuple[list[Found], dict[str, list[str]]]:
    settings = {"attempts": 3, "backoff": 0.01, "timeout": 20.0} | settings
    drops = Drops()
    endpoint = Endpoint(url=model.url, model="writer", **settings)
    found = list(generate(passages, endpoint, cache, drops))
    reasons: dict[str, list[str]] = {}
    for drop in drops.log:
        reasons.setdefault(drop.reason, []).append(drop.where)
    return found, reasons


def test_a_good_answer_becomes_a_record(model: Model, tmp_path: Path) -> None:
    model.replies["default"] = [ENGINEER, CARGO]
    found, reasons = run(model, [passage()], tmp_path)
    assert not reasons
    first = found[0].record
    assert [(m.role, m.content) for m in first.messages] == [
        ("user", ENGINEER["question"]),
        ("assistant", ENGINEER["answer"]),
    ]
    assert (first.domain, first.source, first.license) == ("history", "book", "CC-BY-4.0")
    assert found[0].where == "book.md:default"
    assert first.id.startswith("book/ch01/default/generated-")
    assert first.id != found[1].record.id
    (body,) = model.bodies
    assert body["path"] == "/v1/chat/completions"
    assert (body["model"], body["temperature"]) == ("writer", 0)
    assert TEXT in body["messages"][0]["content"]
    assert "Write 3 questions" in body["messages"][0]["content"]


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (ENGINEER | {"evidence": "It was dug by 5,000 hired diggers under Tamsin Hale."}, g.NO_EVIDENCE),
        (ENGINEER | {"evidence": "Tamsin Hale"}, g.NO_EVIDENCE),
        (ENGINEER | {"answer": "The engineer Tamsin Hale, who died in 1840."}, g.UNSUPPORTED),
        (ENGINEER | {"answer": "Barges carried slate and barley."}, g.UNSUPPORTED),
        (ENGINEER | {"answer": "It was."}, g.UNSUPPORTED),
        (ENGINEER | {"question": "Who was the engineer?"}, g.VAGUE),
        (ENGINEER | {"question": "According to the passage, who was the canal's engineer?"}, g.REFERS),
        (ENGINEER | {"question": "Was Tamsin Hale the engineer of the Borvel canal?"}, g.TELLS),
        (ENGINEER | {"question": "The Borvel canal was dug under this engineer."}, g.NO_QUESTION),
        (ENGINEER | {"question": 7}, g.NO_QUESTION),
        ({"question": ENGINEER["question"]}, g.NO_EVIDENCE),
        ({}, g.NO_QUESTION),
    ],
)
def test_what_the_passage_does_not_hold_is_refused(
    model: Model, tmp_path: Path, changed: dict[str, Any], reason: str
) -> None:
    model.replies["default"] = [changed, CARGO]
    found, reasons = run(model, [passage()], tmp_path)
    assert reasons == {reason: ["book.md:default"]}
    assert [f.record.messages[0].content for f in found] == [CARGO["question"]]


@pytest.mark.parametrize(
    "reply",
    [
        f"Here they are [as JSON]:\n```json\n{json.dumps([ENGINEER])}\n```\nAnything else?",
        f"<think>What [{{of it?</think>{json.dumps([ENGINEER])}",
        json.dumps({"questions": [ENGINEER]}),
        json.dumps(ENGINEER),
    ],
)
def test_json_is_found_in_what_is_said_around_it(model: Model, tmp_path: Path, reply: str) -> None:
    model.replies["default"] = reply
    found, reasons = run(model, [passage()], tmp_path)
    assert [f.record.messages[1].content for f in found] == [ENGINEER["answer"]]
    assert not reasons


@pytest.mark.parametrize(
    "reply", ["I cannot do that.", "", '[{"question": "Which', "[1, 2]", "[" * 100_000, "[]"]
)
def test_a_broken_reply_is_counted(model: Model, tmp_path: Path, reply: str) -> None:
    model.replies["default"] = reply
    assert run(model, [passage()], tmp_path) == ([], {g.NOT_JSON: ["book.md:default"]})


def test_half_characters_can_be_written(model: Model, tmp_path: Path) -> None:
    model.replies["default"] = "[" + json.dumps(CARGO).replace("barges on", "barges\\ud800 on") + "] \ud83d"
    found, _ = run(model, [passage()], tmp_path)
    assert found[0].record.messages[0].content.encode() == b"What did barges? on the Borvel canal carry?"


def test_the_same_question_is_kept_once(model: Model, tmp_path: Path) -> None:
    model.replies = {"one": [ENGINEER], "two": [ENGINEER | {"question": ENGINEER["question"].upper()}, CARGO]}
    found, reasons = run(model, [passage("one"), passage("two")], tmp_path)
    assert [f.where for f in found] == ["book.md:one", "book.md:two"]
    assert reasons == {g.REPEATED: ["book.md:two"]}


def test_busy_failing_and_slow_servers_are_asked_again(model: Model, tmp_path: Path) -> None:
    def slow(times: int) -> Any:
        if times == 1:
            time.sleep(1.5)
        return [ENGINEER]

    model.replies = {
        "busy": lambda times: (429, {"retry-after": "0"}) if times < 3 else [ENGINEER],
        "failing": lambda times: 500 if times == 1 else [CARGO],
        "odd": lambda times: b"<html>" if times == 1 else [row("", "", "")],
        "slow": slow,
        "down": 503,
        "refused": 400,
    }
    passages = [passage(name) for name in model.replies]
    found, reasons = run(model, passages, tmp_path, timeout=0.7)
    assert [f.where for f in found] == ["book.md:busy", "book.md:failing"]
    assert reasons == {
        g.NO_QUESTION: ["book.md:odd"],
        g.REPEATED: ["book.md:slow"],
        g.NO_REPLY: ["book.md:down"],
        g.REFUSED: ["book.md:refused"],
    }
    assert model.asked == {"busy": 3, "failing": 2, "odd": 2, "slow": 2, "down": 3, "refused": 1}


def test_a_server_that_asks_to_wait_is_left_alone(model: Model, tmp_path: Path) -> None:
    times: list[float] = []

    def busy(asked: int) -> Any:
        times.append(time.monotonic())
        return (429, {"retry-after": "1"}) if asked == 1 else [ENGINEER]

    model.replies["default"] = busy
    assert len(run(model, [passage()], tmp_path)[0]) == 1
    assert times[1] - times[0] >= 1.0


def test_a_rerun_asks_only_what_was_not_answered(model: Model, tmp_path: Path) -> None:
    model.replies = {"good": [ENGINEER], "bad": "nonsense", "down": 503}
    passages = [passage(name) for name in model.replies]
    first = run(model, passages, tmp_path)
    assert model.asked == {"good": 1, "bad": 1, "down": 3}
    model.replies["down"] = [CARGO]
    second = run(model, passages, tmp_path)
    assert model.asked == {"good": 1, "bad": 1, "down": 4}
    assert second[0][:1] == first[0]
    third = run(model, passages, tmp_path)
    assert third == second
    assert model.asked.total() == 6
    run(model, passages, tmp_path, questions=2)  # another prompt
    assert model.asked.total() == 9
    run(model, [passage("good", TEXT + " It froze in 1963.")], tmp_path)
    assert model.asked.total() == 10


def test_order_and_limit_of_requests_at_a_time(model: Model, tmp_path: Path) -> None:
    def reply(number: int) -> Any:
        def wait(_: int) -> Any:
            time.sleep(0.1 if number % 3 == 0 else 0.01)
            return [CARGO | {"question": f"What did barge number {number} on the Borvel canal carry?"}]

        return wait

    model.replies = {f"p{i}": reply(i) for i in range(20)}
    passages = [passage(name) for name in model.replies]
    found, reasons = run(model, passages, tmp_path / "a", concurrency=3)
    assert not reasons
    assert [f.where for f in found] == [p.where for p in passages]
    assert 2 <= model.most_active <= 3
    assert run(model, passages, tmp_path / "b", concurrency=8)[0] == found


def test_the_key_is_sent_and_never_shown(
    model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(UserError, match="not set") as e:
        run(model, [passage()], tmp_path, key_variable="WRITER_KEY")
    assert e.value.where == "$WRITER_KEY"
    monkeypatch.setenv("WRITER_KEY", SECRET)
    caplog.set_level(logging.DEBUG)
    model.replies = {"good": [ENGINEER], "bad": 400, "denied": 401}
    run(model, [passage("good"), passage("bad")], tmp_path, key_variable="WRITER_KEY")
    assert {headers["authorization"] for headers in model.headers} == {f"Bearer {SECRET}"}
    with pytest.raises(UserError, match="the endpoint refused: HTTP 401") as e:
        run(model, [passage("denied")], tmp_path, key_variable="WRITER_KEY")
    assert SECRET not in str(e.value)  # though the server said it
    assert SECRET not in caplog.text
    assert all(SECRET not in path.read_text() for path in tmp_path.rglob("*.json"))
    assert "authorization" not in _headers_without_key(model, tmp_path)


def _headers_without_key(model: Model, cache: Path) -> dict[str, str]:
    run(model, [passage("other")], cache)
    return model.headers[-1]


def test_an_endpoint_that_is_not_there_or_stays_down(model: Model, tmp_path: Path) -> None:
    endpoint = Endpoint(url="http://127.0.0.1:9/v1", model="writer", attempts=2, backoff=0.01)
    with pytest.raises(UserError, match="cannot be reached") as e:
        list(generate([passage()], endpoint, tmp_path, Drops()))
    assert e.value.where == "http://127.0.0.1:9/v1"
    model.replies["default"] = 500
    with pytest.raises(UserError, match="10 passages in a row without an answer: HTTP 500"):
        run(model, [passage(text=f"{TEXT} {i}") for i in range(40)], tmp_path, attempts=1)
    assert model.asked.total() < 40
    model.replies = {"bad": 500, "good": [CARGO]}
    turns = [passage("bad" if i % 2 else "good", f"{TEXT} {i}") for i in range(24)]
    _, reasons = run(model, turns, tmp_path, attempts=1)  # twelve fail, none after another
    assert len(reasons[g.NO_REPLY]) == 12


def test_leaving_off_in_the_middle_ends_the_requests(model: Model, tmp_path: Path) -> None:
    model.replies["stuck"] = 503
    endpoint = Endpoint(url=model.url, model="writer", attempts=9, backoff=60.0)
    found = generate([passage(), passage("stuck"), passage("stuck", "x")], endpoint, tmp_path, Drops())
    assert next(found).where == "book.md:default"
    started = threading.active_count()
    found.close()  # type: ignore[attr-defined]
    assert threading.active_count() <= started
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor") and t.is_alive()]

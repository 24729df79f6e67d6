"""The page at ``/`` in a real browser, over the real app and a model in this process."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from qwen_ray.registry import Registry
from qwen_ray.serving.app import create_app
from qwen_ray.serving.assistant import Route
from qwen_ray.serving.auth import KeyFile, create_key
from qwen_ray.serving.service import Service
from tests.serving.fixed_assistant import FixedAssistant, passage
from tests.serving.live import served

RIVER = "Where does the river begin?"
HOSTILE = "<img src=x onerror=alert(1)><b>bold</b>"


@pytest.fixture(scope="module")
def service(model_dir: Path, registry: Registry) -> Iterator[Service]:
    routes = {"river": Route("geo", 0.8123, "rivers")}
    assistant = FixedAssistant(routes, {"rivers": [passage(HOSTILE), passage("It begins in the mountains.")]})
    service = Service.load(str(model_dir), registry=registry.root, assistant=assistant)
    yield service
    service.stop()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with served(create_app(service)) as url:
        yield url


class Opener:
    """Opens the page, and notes what must not happen: messages, dialogs, requests to other servers."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        self.said: list[str] = []

    def __call__(self, *, width: int = 1280, scheme: str = "light") -> Any:
        page = self.browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append("dialog"), dialog.dismiss()))
        page.on("request", lambda request: self._note(request.url))
        page.goto(self.url)
        page.wait_for_selector("#models input")
        return page

    def _note(self, asked: str) -> None:
        if not asked.startswith((self.url, "data:")):
            self.said.append(asked)


@pytest.fixture
def open_page(browser: Any, url: str) -> Iterator[Opener]:
    opener = Opener(browser, url)
    yield opener
    for context in browser.contexts:
        context.close()


def ask(page: Any, question: str = RIVER) -> Any:
    page.fill("#question", question)
    page.fill("#tokens", "8")
    page.click("#send")
    page.wait_for_selector(".card")
    page.wait_for_selector(".card[aria-busy=true]", state="detached")
    return page.locator(".card")


def chat(url: str, model: str, **headers: str) -> str:
    talk = [{"role": "user", "content": RIVER}]
    body = {"model": model, "messages": talk, "temperature": 0, "max_tokens": 8}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers)
    return reply.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("look", [(390, "light"), (800, "dark"), (1600, "light")])
def test_one_question_side_by_side(open_page: Opener, tmp_path: Path, look: tuple[int, str]) -> None:
    page = open_page(width=look[0], scheme=look[1])
    cards = ask(page)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    names = cards.locator("h2").all_inner_texts()
    assert names == ["rand", "rand:geo", "rand:auto", "rand+rag"]
    for card, name in zip(cards.all(), names, strict=True):
        assert card.locator(".text").text_content() == chat(open_page.url, name)
        assert "first token" in card.locator(".figures").inner_text()
        assert "tokens read, 8 written" in card.locator(".figures").inner_text()
    origins = cards.locator(".by").all_inner_texts()
    assert origins == [
        "base model",
        "adapter geo@1",
        "adapter geo@1 · routed as rivers (0.8123)",
        "base model",
    ]
    assert page.evaluate("document.documentElement.scrollWidth") <= look[0]
    assert open_page.said == []


def test_texts_are_never_html(open_page: Opener) -> None:
    page = open_page()
    sources = ask(page).last.locator(".sources")
    assert sources.locator("summary").inner_text() == "Read 2 passages"
    sources.locator("summary").click()
    first = sources.locator("li").first
    assert first.inner_text().startswith(HOSTILE)
    assert "CC BY 4.0" in first.locator("small").inner_text()
    assert page.locator(".card img, .card b").count() == 0
    assert open_page.said == []


def test_only_the_key_that_is_typed_opens_a_closed_server(
    browser: Any, service: Service, tmp_path: Path
) -> None:
    key = create_key(tmp_path / "keys.json", "me")
    with served(create_app(service, keys=KeyFile(tmp_path / "keys.json"))) as url:
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#key-row:not([hidden])")
        assert "API key" in page.locator("#notice").inner_text()
        page.fill("#key", key)
        page.keyboard.press("Tab")
        page.wait_for_selector("#models input")
        assert not page.locator("#notice").is_visible()
        assert ask(page).first.locator(".text").text_content() == chat(
            url, "rand", Authorization=f"Bearer {key}"
        )
        assert key not in page.locator(".request pre").first.inner_text()
        stored = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert key not in stored + page.url


def test_an_error_stands_in_its_own_column(open_page: Opener) -> None:
    page = open_page()
    page.evaluate("document.querySelector('#models input').value = 'rand:nope'")
    cards = ask(page)
    assert "unknown adapter 'nope'" in cards.first.locator(".error").inner_text()
    assert cards.nth(1).locator(".text").inner_text()


def test_stop_keeps_what_is_there(
    open_page: Opener, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = service.engine.last_logits
    monkeypatch.setattr(service.engine, "last_logits", lambda *a: (time.sleep(0.05), step(*a))[1])
    page = open_page()
    page.fill("#question", RIVER)
    page.fill("#tokens", "200")
    page.click("#send")
    page.wait_for_selector(".card .text:not(:empty)")
    page.click("#stop")
    page.wait_for_selector(".card[aria-busy=true]", state="detached")
    assert "Stopped." in page.locator(".card .error").all_inner_texts()
    assert page.locator(".card .text").first.text_content()


def test_headers_let_nothing_else_in(url: str) -> None:
    reply = httpx.get(url)
    assert "default-src 'none'" in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in reply.text
    for name in ("secret.txt", "..%2fservice.py", "index.html.bak"):
        assert httpx.get(f"{url}/page/{name}").status_code == 404

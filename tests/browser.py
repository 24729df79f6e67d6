"""A real browser for the tests of HTML pages."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """Playwright's Browser; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        _missing(f"no browser: set CHROMIUM or install one of {', '.join(names)}")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("the Python package playwright is not installed")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield running
        running.close()


def _missing(what: str) -> None:
    if os.environ.get("CI"):  # there a missing browser must not pass for a tested page
        pytest.fail(f"{what}, and CI is set")
    pytest.skip(what)  # on a developer's machine a browser may not be ours to install


def open_alone(browser: Any, file: Path, *, width: int, scheme: str, picture: Path) -> Any:
    """The page of ``file``, which says nothing on the console, asks for nothing and is no wider than
    ``width``. A picture of it goes to ``picture``."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.screenshot(path=picture, full_page=True)
    assert said == []
    assert asked == [file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    return page

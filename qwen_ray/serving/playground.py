"""The page at ``/``: one question, answered side by side by what the server has.

Three static files without a build step, that ask for nothing but this server's own API.
"""

# No `from __future__ import annotations`: FastAPI resolves the annotations of local functions.
from functools import cache
from importlib import resources

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.responses import Response

_FILES = {"index.html": "text/html", "style.css": "text/css", "script.js": "text/javascript"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@cache
def _read(name: str) -> bytes:
    return resources.files("qwen_ray.serving").joinpath("page", name).read_bytes()


def add_playground(app: FastAPI) -> None:
    """Add the page's routes to ``app``; they need no key, as they tell nothing."""

    def file(name: str) -> Response:
        if name not in _FILES:
            raise HTTPException(404, "no such file")
        return Response(_read(name), media_type=_FILES[name], headers=_HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file("index.html")

    @app.get("/page/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        return file(name)

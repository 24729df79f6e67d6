"""A small S3 server in memory: objects with conditional writes and no rename, enough for object storage."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

NO_BUCKET = "no-such-bucket"
"""The only bucket that the server does not have."""
_MODIFIED = "2026-01-01T00:00:00.000Z"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: S3Server

    def parse_request(self) -> bool:
        if self.server.away:  # also on connections that were open before
            self.close_connection = True
            return False
        return super().parse_request()

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if self._key.startswith(f"{NO_BUCKET}/"):
            return self._answer(404)
        with self.server.lock:
            have = self.server.objects.get(self._key)
            wanted, unwanted = self.headers["If-Match"], self.headers["If-None-Match"]
            if (unwanted and have is not None) or (wanted and (have is None or _tag(have) != wanted)):
                return self._answer(412)
            self.server.objects[self._key] = data
        return self._answer(200, etag=_tag(data))

    def do_GET(self) -> None:
        query = parse_qs(urlsplit(self.path).query)
        if "list-type" in query:
            return self._list(query.get("prefix", [""])[0])
        data = self.server.objects.get(self._key)
        return self._answer(404) if data is None else self._answer(200, data, etag=_tag(data))

    def do_POST(self) -> None:
        """DeleteObjects."""
        asked = ElementTree.fromstring(self.rfile.read(int(self.headers["Content-Length"])))
        names = [str(node.text) for node in asked.iter() if node.tag.endswith("Key")]
        bucket = urlsplit(self.path).path.split("/")[1]
        with self.server.lock:
            for name in names:
                self.server.objects.pop(f"{bucket}/{name}", None)
        rows = "".join(f"<Deleted><Key>{escape(name)}</Key></Deleted>" for name in names)
        return self._answer(200, f"<DeleteResult>{rows}</DeleteResult>".encode())

    def do_DELETE(self) -> None:
        with self.server.lock:
            self.server.objects.pop(self._key, None)
        return self._answer(204)

    def _list(self, prefix: str) -> None:
        bucket = self._key.rstrip("/")
        with self.server.lock:
            found = {
                key.removeprefix(f"{bucket}/"): data
                for key, data in sorted(self.server.objects.items())
                if key.startswith(f"{bucket}/{prefix}")
            }
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{_MODIFIED}</LastModified>"
            f"<ETag>{escape(_tag(data))}</ETag><Size>{len(data)}</Size></Contents>"
            for key, data in found.items()
        )
        return self._answer(200, f"<ListBucketResult>{rows}</ListBucketResult>".encode())

    @property
    def _key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/")

    def _answer(self, status: int, data: bytes = b"", *, etag: str | None = None) -> None:
        self.server.requests += 1
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class S3Server(ThreadingHTTPServer):
    """``objects``: BUCKET/KEY -> bytes."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.requests = 0
        self.away = False
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs in its environment."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.server_address[1]}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """Runs on a thread of this process while the block does."""
    server = S3Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.away = True
        server.shutdown()
        server.server_close()


def _tag(data: bytes) -> str:
    return f'"{hashlib.md5(data).hexdigest()}"'

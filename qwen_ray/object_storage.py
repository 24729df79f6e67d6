"""Storage in an object store, through obstore: every write is one conditional request."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.storage import Missing, Stored, check_key, folder_of, unavailable

SCHEMES = ("s3", "gs", "az", "memory")
_REQUEST = "120s"  # a file of an adapter comes in one
_RETRY = {"max_retries": 5, "retry_timeout": timedelta(seconds=30)}

_MEMORY: dict[str, Any] = {}
_MEMORY_LOCK = threading.Lock()


class ObjectStorage:
    """An object store through obstore, which has conditional writes for each of them.

    Besides documents it takes whole files, of any size: :meth:`upload` and :meth:`download`.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri.rstrip("/")
        self._store = _connect(self._uri)

    def __reduce__(self) -> tuple[Any, ...]:
        return ObjectStorage, (self._uri,)

    @property
    def location(self) -> str:
        return self._uri

    def read(self, key: str) -> Stored:
        import obstore

        with self._answering():
            try:
                found = obstore.get(self._store, check_key(key))
                data = bytes(found.bytes())
            except FileNotFoundError:
                raise Missing(key) from None
        meta = found.meta
        state = {name: meta.get(name) for name in ("e_tag", "version") if meta.get(name)}
        return Stored(data, json.dumps(state))

    def create(self, key: str, data: bytes) -> bool:
        return self._put(key, data, "create")

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        return self._put(key, data, json.loads(tag))

    def _put(self, key: str, data: bytes, mode: Any) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._answering():
            try:
                obstore.put(self._store, check_key(key), data, mode=mode)
            except (AlreadyExistsError, PreconditionError):
                return False
            except FileNotFoundError:
                if mode == "create":  # there is no such bucket
                    raise
                return False
        return True

    def delete(self, key: str) -> None:
        import obstore

        with self._answering(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, check_key(key))

    def keys(self, prefix: str = "") -> list[str]:
        import obstore

        with self._answering():
            pages = obstore.list(self._store, prefix=folder_of(prefix) or None)
            found = [meta["path"] for page in pages for meta in page]
        return sorted(key for key in found if key.startswith(prefix))

    def upload(self, key: str, path: Path) -> None:
        """Write a file's bytes, in parts where it is large; whatever was there is replaced."""
        import obstore

        with self._answering():
            obstore.put(self._store, check_key(key), path)

    def download(self, key: str, path: Path) -> None:
        """Write what is stored to a local file; :class:`Missing`, and no file, where there is nothing."""
        import obstore

        with self._answering():
            try:
                found = obstore.get(self._store, check_key(key))
            except FileNotFoundError:
                raise Missing(key) from None
            with open(path, "wb") as f:
                for part in found:
                    f.write(part)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError, ValueError) as e:
            raise unavailable(self.location, str(e).strip().split("\n", 1)[0][:300]) from e


def _connect(uri: str) -> Any:
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES or not rest:
        raise UserError(
            "this is no storage", where=uri, fix=f"a folder, or {', '.join(f'{s}://...' for s in SCHEMES)}"
        )
    try:
        from obstore.exceptions import BaseError
        from obstore.store import MemoryStore, from_url
    except ImportError:
        raise UserError(
            "object stores need obstore, which is not installed", where=uri, fix="pip install obstore"
        ) from None
    if scheme == "memory":
        with _MEMORY_LOCK:
            return _MEMORY.setdefault(uri, MemoryStore())
    try:
        # Options given here replace those of the environment.
        http = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true", "yes")
        options = {"timeout": _REQUEST, "allow_http": http}
        return from_url(uri, client_options=options, retry_config=_RETRY)  # type: ignore[call-overload]
    except (BaseError, ValueError) as e:
        raise UserError(
            f"cannot use this storage ({str(e).splitlines()[0]})",
            where=uri,
            fix="like s3://BUCKET/PREFIX; keys and endpoint come from the environment",
        ) from None

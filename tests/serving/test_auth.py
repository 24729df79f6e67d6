"""API keys: the file, the verbs, and what gets past them."""

from __future__ import annotations

import argparse
import io
import json
import logging
import stat
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import key_verbs
from qwen_ray.errors import UserError
from qwen_ray.serving.auth import KeyFile, check_exposure, create_key, read_keys, revoke_key
from qwen_ray.serving.limits import Rates
from qwen_ray.verbs import Output


def keys(*argv: str, as_json: bool = False) -> str:
    """The stdout of ``qwen-ray keys ARGV``."""
    parser = argparse.ArgumentParser()
    key_verbs.add(parser.add_subparsers())
    args = parser.parse_args(["keys", *argv])
    stdout = io.StringIO()
    assert args.verb(args, Output(stdout, as_json=as_json)) == 0
    return stdout.getvalue()


def refused(file: KeyFile, authorization: str | None) -> UserError:
    with pytest.raises(UserError) as error:
        file.check(authorization)
    assert error.value.status == 401
    return error.value


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "private" / "keys.json"


def test_verbs_make_list_and_revoke(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = keys(
        "create", "laptop", "--keys", str(path), "--requests-per-minute", "60", "--days", "30"
    ).strip()
    other = json.loads(keys("create", "ci", "--keys", str(path), as_json=True))["key"]
    assert secret.startswith("qr-")
    assert len(secret) >= 3 + 43  # 256 bits in base64
    assert secret != other
    assert secret not in capsys.readouterr().err
    assert secret not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    shown = keys("list", "--keys", str(path))
    assert [line.split()[0] for line in shown.splitlines()] == ["name", "laptop", "ci"]
    assert "requests_per_minute 60" in shown
    listed = json.loads(keys("list", "--keys", str(path), as_json=True))["keys"]
    assert "sha256" not in json.dumps(listed)
    assert listed[0]["expires"] > listed[0]["created"]
    file = KeyFile(path)
    assert file.check(f"Bearer {secret}").limits.requests_per_minute == 60
    assert file.check(f"bearer  {other}").name == "ci"
    keys("revoke", "laptop", "--keys", str(path))
    refused(file, f"Bearer {secret}")
    assert file.check(f"Bearer {other}").name == "ci"


def test_what_is_not_a_key(path: Path) -> None:
    secret = create_key(path, "a")
    file = KeyFile(path)
    digest = read_keys(path)[0].sha256
    for value in (
        None,
        "",
        "Bearer",
        "Bearer ",
        secret,
        f"Basic {secret}",
        f"Bearer {secret}x",
        "Bearer é\xff",
    ):
        refused(file, value)
    refused(file, f"Bearer {digest}")  # who reads the file has no key
    assert secret[5:] not in str(refused(file, f"Bearer {secret[:-1]}"))


def test_an_expired_key_says_so(path: Path) -> None:
    secret = create_key(path, "old", lifetime=timedelta(seconds=-1))
    assert "expired" in str(refused(KeyFile(path), f"Bearer {secret}"))


@pytest.mark.parametrize("name", ["", "Ada", "../x", "a b", "a" * 65])
def test_names(path: Path, name: str) -> None:
    with pytest.raises(UserError, match="cannot be the name"):
        create_key(path, name)
    assert not path.exists()


def test_a_name_is_given_once_and_only_a_known_one_is_revoked(path: Path) -> None:
    secret = create_key(path, "laptop")
    with pytest.raises(UserError, match="there is a key"):
        create_key(path, "laptop")
    with pytest.raises(UserError, match="did you mean 'laptop'"):
        revoke_key(path, "laptp")
    assert KeyFile(path).check(f"Bearer {secret}").name == "laptop"


def _create(path: Path, name: str) -> None:
    create_key(path, name)


def test_commands_at_the_same_time_lose_no_key(path: Path) -> None:
    context = get_context("fork")
    names = [f"k{i}" for i in range(8)]
    processes = [context.Process(target=_create, args=(path, name)) for name in names]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert sorted(key.name for key in read_keys(path)) == names


def test_a_damaged_file_keeps_the_last_good_keys(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    secret = create_key(path, "a")
    file = KeyFile(path)
    good = path.read_text()
    damages: list[Any] = [
        good[:-10],
        "[]",
        "{}",
        json.dumps({"version": 1, "keys": [{"name": "a"}]}),
        json.dumps({"version": 1, "keys": json.loads(good)["keys"] * 2}),
    ]
    for damage in damages:
        path.write_text(damage)
        caplog.clear()
        for _ in range(3):
            assert file.check(f"Bearer {secret}").name == "a"
        assert [(r.levelno, "stay in force" in r.message) for r in caplog.records] == [(logging.ERROR, True)]
        with pytest.raises(UserError):
            KeyFile(path)
    path.unlink()
    assert file.check(f"Bearer {secret}").name == "a"
    with pytest.raises(UserError, match="no such file"):
        KeyFile(path)
    path.write_text(good)
    later = create_key(path, "b", limits=Rates(concurrent=2))
    assert file.check(f"Bearer {later}").limits.concurrent == 2


@pytest.mark.parametrize(
    ("host", "keys", "no_auth", "fine"),
    [
        ("127.0.0.1", None, False, True),
        ("127.1.2.3", None, False, True),
        ("::1", None, False, True),
        ("localhost", None, False, True),
        ("0.0.0.0", None, False, False),
        ("::", None, False, False),
        ("10.0.0.5", None, False, False),
        ("localhost.example", None, False, False),
        ("", None, False, False),
        ("0.0.0.0", Path("keys.json"), False, True),
        ("0.0.0.0", None, True, True),
        ("127.0.0.1", Path("keys.json"), True, False),
    ],
)
def test_exposure(host: str, keys: Path | None, no_auth: bool, fine: bool) -> None:
    if fine:
        check_exposure(host, keys, no_auth)
    else:
        with pytest.raises(UserError):
            check_exposure(host, keys, no_auth)

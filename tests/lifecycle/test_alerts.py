"""Alerts, to servers that are really there: HTTP and SMTP on this machine."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from qwen_ray.errors import UserError
from qwen_ray.lifecycle.alerts import Alert, deliver, wanted
from qwen_ray.lifecycle.watch_spec import Channel

ALERT = Alert(
    "accuracy/biology",
    "critical",
    "accuracy: tiny:facts",
    "biology 61.0%, was 72.0% <n=100> & more",
    "2026-03-02T03:00:00+00:00",
    {"version": "facts@3"},
)


class Receiver:
    """An HTTP server that keeps what it is sent and answers with the statuses in ``answers``, then 200."""

    def __init__(self) -> None:
        self.answers: list[int] = []
        self.got: list[tuple[str, dict[str, str], Any]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                receiver.got.append((self.path, dict(self.headers), body))
                status = receiver.answers.pop(0) if receiver.answers else 200
                self.send_response(status)
                if status == 302:
                    self.send_header("location", "/elsewhere")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/zq7-secret"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    monkeypatch.setenv("HOOK", receiver.url)
    monkeypatch.setenv("HOOK_TOKEN", "t0ken")
    yield receiver
    receiver.stop()


WEBHOOK = Channel(kind="webhook", url_env="HOOK", token_env="HOOK_TOKEN")


def test_webhook_gets_json_and_is_tried_again_when_it_is_busy(receiver: Receiver) -> None:
    receiver.answers = [503, 429]
    pauses: list[float] = []
    assert deliver(WEBHOOK, ALERT, sleep=pauses.append) is None
    assert pauses == [1.0, 2.0]
    assert len(receiver.got) == 3
    assert {body["id"] for _, _, body in receiver.got} == {ALERT.id}
    path, headers, body = receiver.got[-1]
    assert path == "/hook/zq7-secret"
    assert headers["Authorization"] == "Bearer t0ken"
    assert (body["level"], body["text"]) == ("critical", ALERT.text)
    assert (body["at"], body["facts"]) == (ALERT.at, {"version": "facts@3"})


@pytest.mark.parametrize("status", [404, 302])
def test_what_trying_again_cannot_mend_is_tried_once(receiver: Receiver, status: int) -> None:
    receiver.answers = [status]
    assert deliver(WEBHOOK, ALERT, sleep=lambda _: pytest.fail("it waited")) == f"answered {status}"
    assert len(receiver.got) == 1


def test_nobody_there_is_said_without_the_url(receiver: Receiver) -> None:
    receiver.stop()
    pauses: list[float] = []
    assert deliver(WEBHOOK, ALERT, sleep=pauses.append) == "nobody answers (ConnectError)"
    assert len(pauses) == 2


def test_slack_gets_its_own_form(receiver: Receiver) -> None:
    assert deliver(Channel(kind="slack", url_env="HOOK"), ALERT) is None
    ((_, _, body),) = receiver.got
    text = "*accuracy: tiny:facts* (critical)\nbiology 61.0%, was 72.0% &lt;n=100&gt; &amp; more"
    assert body == {"text": text}


def test_log(caplog: pytest.LogCaptureFixture) -> None:
    assert deliver(Channel(kind="log"), ALERT) is None
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("CRITICAL", f"{ALERT.title}: {ALERT.text}")
    ]


def test_channels_take_what_is_grave_enough() -> None:
    channels = {
        "all": Channel(kind="log", at_least="info"),
        "usual": Channel(kind="log"),
        "pager": Channel(kind="log", at_least="critical"),
    }
    of = {level: Alert("a", level, "t", "x", ALERT.at) for level in ("info", "warning", "critical")}  # type: ignore[arg-type]
    assert {level: wanted(channels, alert) for level, alert in of.items()} == {
        "info": ["all"],
        "warning": ["all", "usual"],
        "critical": ["all", "usual", "pager"],
    }


def test_secrets_are_named_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    with pytest.raises(UserError, match="HOOK is not set"):
        WEBHOOK.check()
    assert "HOOK is not set" in str(deliver(Channel(kind="slack", url_env="HOOK"), ALERT))
    for wrong in (
        {"kind": "webhook"},
        {"kind": "slack", "url": "https://hooks.example/x"},
        {"kind": "email", "host": "mail.example", "sender": "a@b.example"},
        {"kind": "email", "host": "h", "sender": "s", "to": ["t"], "password_env": "P"},
        {
            "kind": "email",
            "host": "h",
            "sender": "s",
            "to": ["t"],
            "username_env": "U",
            "password_env": "P",
            "starttls": False,
        },
    ):
        with pytest.raises(ValidationError):
            Channel.model_validate(wrong)


class Mailbox:
    """What an SMTP server was given."""

    def __init__(self, refused: str = "") -> None:
        self.messages: list[EmailMessage] = []
        self._refused = refused

    async def handle_RCPT(self, server: Any, session: Any, envelope: Any, address: str, options: Any) -> str:
        if address == self._refused:
            return "550 nobody here"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        message = BytesParser(policy=default).parsebytes(envelope.content)
        assert isinstance(message, EmailMessage)
        message["X-To"] = ",".join(envelope.rcpt_tos)
        self.messages.append(message)
        return "250 OK"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of ``localhost``, signed by itself; the key beside it."""
    folder = tmp_path_factory.mktemp("tls")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(pem, *plain))
    (folder / "cert.pem").write_bytes(certificate.public_bytes(pem))
    return folder / "cert.pem"


def smtp(mailbox: Mailbox, certificate: Path | None = None) -> Any:
    """A running server; with a certificate it wants STARTTLS, and the user ``bot`` with ``s3cret``."""
    from aiosmtpd import controller
    from aiosmtpd.smtp import AuthResult

    from qwen_ray.serving.launch import free_port

    extra: dict[str, Any] = {}
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, certificate.with_name("key.pem"))

        def authenticator(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> Any:
            right = (data.login, data.password) == (b"bot", b"s3cret")
            return AuthResult(success=right, handled=False)

        extra = {"tls_context": context, "require_starttls": True, "auth_required": True}
        extra["authenticator"] = authenticator
    server = controller.Controller(mailbox, hostname="127.0.0.1", port=free_port("127.0.0.1", 0), **extra)
    server.start()
    return server


def to(server: Any, **settings: Any) -> Channel:
    given = {"host": "localhost", "port": server.port, "sender": "watch@x.example", "to": ["ops@x.example"]}
    return Channel.model_validate({"kind": "email", **given, **settings})


def test_email() -> None:
    mailbox = Mailbox(refused="gone@x.example")
    server = smtp(mailbox)
    try:
        title = "accuracy\r\nBcc: everybody@x.example"  # of a category that somebody named so
        alert = Alert("a", "warning", title, "Geschichte fällt.", ALERT.at, {"n": 100})
        assert deliver(to(server, starttls=False), alert) is None
        (message,) = mailbox.messages
        assert message["Subject"] == "[qwen-ray] accuracy Bcc: everybody@x.example"
        assert message["Bcc"] is None
        assert (message["From"], message["X-To"]) == ("watch@x.example", "ops@x.example")
        assert "Geschichte fällt." in message.get_content()
        assert "n: 100" in message.get_content()
        both = to(server, starttls=False, to=["gone@x.example", "ops@x.example"])
        assert deliver(both, ALERT) == "refused for gone@x.example; the others have it"
        assert len(mailbox.messages) == 2
        none = to(server, starttls=False, to=["gone@x.example"])
        assert deliver(none, ALERT) == "no recipient was accepted ([550])"
        assert "cannot do what is asked" in str(deliver(to(server), ALERT))  # no STARTTLS: nothing is sent
        assert len(mailbox.messages) == 2
    finally:
        server.stop()


def test_email_encrypted_with_a_password(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox()
    server = smtp(mailbox, certificate)
    monkeypatch.setenv("MAIL_USER", "bot")
    monkeypatch.setenv("MAIL_PASSWORD", "s3cret")
    secrets: dict[str, Any] = {"username_env": "MAIL_USER", "password_env": "MAIL_PASSWORD"}
    try:
        assert deliver(to(server, ca_file=certificate, **secrets), ALERT) is None
        assert len(mailbox.messages) == 1
        assert "no encrypted connection" in str(deliver(to(server, **secrets), ALERT))  # not trusted
        monkeypatch.setenv("MAIL_PASSWORD", "wrong")
        why = deliver(to(server, ca_file=certificate, **secrets), ALERT)
        assert why == "the mail server answered 535"
        assert len(mailbox.messages) == 1
    finally:
        server.stop()


def test_mail_server_away() -> None:
    server = smtp(Mailbox())
    channel = to(server, starttls=False)
    server.stop()
    pauses: list[float] = []
    assert "does not answer" in str(deliver(channel, ALERT, sleep=pauses.append))
    assert pauses == [1.0, 2.0]

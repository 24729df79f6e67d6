"""Alerts: to a webhook, Slack, e-mail or the log, tried again where that may help, and never an exception.

Secrets (URLs, tokens, passwords) are read from the environment when they are used and are in no message.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from email.message import EmailMessage
from email.utils import format_datetime, make_msgid
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json
from qwen_ray.lifecycle.watch_spec import LEVELS, Channel, Level

log = logging.getLogger(__name__)
log.setLevel(logging.INFO)  # who asks for a log of alerts gets all that the channel takes

SCHEMA = "qwen-ray/alert/1"
ATTEMPTS = 3
_FIRST_PAUSE = 1.0  # seconds; doubled before each further attempt
_LOG_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "critical": logging.CRITICAL}


@dataclass(frozen=True)
class Alert:
    """``key``: what it is about; alerts with the same key repeat one another. ``at``: ISO, UTC."""

    key: str
    level: Level
    title: str
    text: str
    at: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Equal for every attempt to send this alert, so that a receiver can tell."""
        return sha256_json([self.key, self.at])[:16]


class _Failed(Exception):
    """An attempt failed. ``again``: another one may not."""

    def __init__(self, why: str, *, again: bool) -> None:
        super().__init__(why)
        self.again = again


def deliver(
    channel: Channel, alert: Alert, *, attempts: int = ATTEMPTS, sleep: Callable[[float], object] = time.sleep
) -> str | None:
    """Send one alert; why it could not be sent, in words, or None."""
    for attempt in range(attempts):
        try:
            _SENDERS[channel.kind](channel, alert)
        except _Failed as e:
            if not e.again or attempt == attempts - 1:
                return str(e)
            sleep(_FIRST_PAUSE * 2**attempt)
        except UserError as e:  # a secret that is no longer there
            return e.what
        except Exception as e:
            return type(e).__name__
        else:
            break
    return None


def wanted(channels: Mapping[str, Channel], alert: Alert) -> list[str]:
    """The names of the channels that take an alert of this level."""
    level = LEVELS.index(alert.level)
    return [name for name, channel in channels.items() if LEVELS.index(channel.at_least) <= level]


def _log(channel: Channel, alert: Alert) -> None:
    log.log(_LOG_LEVELS[alert.level], "%s: %s", _one_line(alert.title), _one_line(alert.text))


def _webhook(channel: Channel, alert: Alert) -> None:
    token = channel.secret("token_env")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    _post(channel, {"schema": SCHEMA, "id": alert.id, **asdict(alert)}, headers)


def _slack(channel: Channel, alert: Alert) -> None:
    # The three characters that Slack's text markup takes for its own.
    shown = f"*{_one_line(alert.title)}* ({alert.level})\n{alert.text}"
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        shown = shown.replace(character, entity)
    _post(channel, {"text": shown}, {})


def _post(channel: Channel, body: dict[str, Any], headers: dict[str, str]) -> None:
    import httpx

    url = channel.secret("url_env")
    assert url is not None
    try:
        reply = httpx.post(url, json=body, headers=headers, timeout=channel.timeout_seconds)
    except httpx.TransportError as e:
        raise _Failed(f"nobody answers ({type(e).__name__})", again=True) from None
    except httpx.InvalidURL:
        raise _Failed(f"{channel.url_env} does not hold a URL", again=False) from None
    if not reply.is_success:
        again = reply.status_code == 429 or reply.status_code >= 500
        raise _Failed(f"answered {reply.status_code}", again=again)


def _email(channel: Channel, alert: Alert) -> None:
    import smtplib
    import ssl

    assert channel.host is not None
    try:
        with smtplib.SMTP(channel.host, channel.port, timeout=channel.timeout_seconds) as server:
            if channel.starttls:
                server.starttls(context=ssl.create_default_context(cafile=channel.ca_file))
            username, password = channel.secret("username_env"), channel.secret("password_env")
            if username is not None and password is not None:
                server.login(username, password)
            refused = server.send_message(_message(channel, alert))
    except smtplib.SMTPResponseException as e:
        raise _Failed(f"the mail server answered {e.smtp_code}", again=400 <= e.smtp_code < 500) from None
    except smtplib.SMTPRecipientsRefused as e:
        codes = sorted({code for code, _ in e.recipients.values()})
        raise _Failed(f"no recipient was accepted ({codes})", again=all(c < 500 for c in codes)) from None
    except smtplib.SMTPNotSupportedError as e:
        raise _Failed(f"the mail server cannot do what is asked ({e})", again=False) from None
    except ssl.SSLError as e:
        raise _Failed(f"no encrypted connection ({e.reason or e})", again=False) from None
    except (smtplib.SMTPException, OSError) as e:
        raise _Failed(f"the mail server does not answer ({type(e).__name__})", again=True) from None
    if refused:
        raise _Failed(f"refused for {', '.join(sorted(refused))}; the others have it", again=False)


def _message(channel: Channel, alert: Alert) -> EmailMessage:
    message = EmailMessage()
    message["Subject"] = f"[qwen-ray] {_one_line(alert.title)}"
    message["From"], message["To"] = channel.sender, ", ".join(channel.to)
    message["Date"] = format_datetime(datetime.fromisoformat(alert.at))
    message["Message-ID"] = make_msgid(alert.id, domain="qwen-ray.invalid")
    message["Auto-Submitted"] = "auto-generated"
    facts = "".join(f"{name}: {value}\n" for name, value in alert.facts.items())
    message.set_content(f"{alert.text}\n\n{facts}\n{alert.level}, {alert.at}\n")
    return message


def _one_line(text: str) -> str:
    return " ".join(text.split())


_SENDERS: dict[str, Callable[[Channel, Alert], None]] = {
    "log": _log,
    "webhook": _webhook,
    "slack": _slack,
    "email": _email,
}

"""Parsing of the settings of code providers.

Error messages never quote a setting's value.
"""

import json
import re
from dataclasses import dataclass, field
from email.utils import parseaddr
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

SUBMISSION_PORT = 587
SUBMISSION_TLS_PORT = 465
STATUS_MIN = 200
STATUS_MAX = 599
PLACEHOLDER = re.compile(r"\{(to|text|challenge_id)\}")
"""The placeholders for parts of the message in a gateway's JSON."""
DESTINATION = "{to}"
"""The placeholder for the destination."""
_VISIBLE = re.compile(r"[!-~]+")
_STATUSES = re.compile(r"([0-9]{3})(?:-([0-9]{3}))?")
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[!-~]([ -~]*[!-~])?")
_RESERVED_HEADERS = {"connection", "content-length", "host", "transfer-encoding"}
"""Headers that frame and route a request."""


class StartTls(StrEnum):
    """Whether a plaintext SMTP connection is upgraded to TLS."""

    AUTOMATIC = "automatic"
    REQUIRED = "required"
    OFF = "off"


@dataclass(frozen=True, slots=True)
class SmtpServer:
    """An SMTP server. `tls` means TLS from the first byte on."""

    host: str
    port: int
    tls: bool
    start_tls: StartTls
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class MailSender:
    """The sender of e-mails; the address is ASCII."""

    display_name: str
    address: str

    @property
    def domain(self) -> str:
        """The domain of the address."""
        return self.address.rpartition("@")[2]


@dataclass(frozen=True, slots=True)
class HttpGateway:
    """An HTTP endpoint that accepts messages as JSON."""

    url: str = field(repr=False)
    method: str
    headers: dict[str, str] = field(repr=False)
    body: Any = field(repr=False)
    success: frozenset[int]


def parse_smtp_url(url: str) -> SmtpServer:
    """Parse smtp(s)://USER:PASSWORD@HOST:PORT?starttls=….

    By default, a password requires encryption.
    """
    form = "must be smtp://USER:PASSWORD@HOST:PORT or smtps://…"
    try:
        parts = urlsplit(url)
        port = parts.port
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise ValueError(form) from None
    if parts.scheme not in {"smtp", "smtps"} or not parts.hostname or parts.path.strip("/") or parts.fragment:
        raise ValueError(form)
    if not _VISIBLE.fullmatch(url) or bool(parts.username) != bool(parts.password):
        raise ValueError(f"{form}, with both a user and a password or neither, percent-encoded")
    tls = parts.scheme == "smtps"
    default = StartTls.REQUIRED if parts.password else StartTls.AUTOMATIC
    start_tls = options.pop("starttls", default)
    if options or start_tls not in set(StartTls) or (tls and "starttls" in parts.query):
        raise ValueError("may have only ?starttls=automatic, required or off, and only with smtp://")
    return SmtpServer(
        host=parts.hostname,
        port=port or (SUBMISSION_TLS_PORT if tls else SUBMISSION_PORT),
        tls=tls,
        start_tls=StartTls.OFF if tls else StartTls(start_tls),
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
    )


def parse_mail_sender(text: str) -> MailSender:
    """Parse `address` or `Name <address>`."""
    from email_validator import EmailNotValidError, validate_email  # noqa: PLC0415 - few commands send e-mails

    display_name, address = parseaddr(text)
    try:
        ascii_address = validate_email(address, check_deliverability=False, globally_deliverable=False).ascii_email
    except EmailNotValidError:
        ascii_address = None
    if ascii_address is None or not text.isprintable():
        raise ValueError("must be an e-mail address, or Name <address>, with ASCII before the @")
    return MailSender(display_name, ascii_address)


def check_http_url(url: str) -> str:
    """Return an http(s):// URL. Raises ValueError."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in {"http", "https"} or not parts.hostname or parts.fragment or not _VISIBLE.fullmatch(url):
        raise ValueError("must be https://HOST:PORT/PATH")
    return url


def parse_headers(text: str) -> dict[str, str]:
    """Parse a JSON object of header names and values."""
    form = 'must be a JSON object of headers, such as {"Authorization": "Bearer …"}'
    headers = _json(text, form)
    if not isinstance(headers, dict):
        raise ValueError(form)  # noqa: TRY004 - the setting is invalid, not a type
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not isinstance(value, str) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"{form}; values are visible ASCII characters, with spaces between them")
    if len({name.lower() for name in headers}) != len(headers):
        raise ValueError("names a header twice")
    if _RESERVED_HEADERS & {name.lower() for name in headers}:
        raise ValueError(f"cannot set {', '.join(sorted(_RESERVED_HEADERS))}")
    return headers


def parse_body(text: str) -> Any:
    """Parse a JSON template, which must contain {to} and {text} in string values."""
    template = _json(text, "must be JSON")
    placeholders = {name for value in _strings(template) for name in PLACEHOLDER.findall(value)}
    if not placeholders >= {"to", "text"}:
        raise ValueError("must have {to} and {text} in its string values")
    return template


def parse_statuses(text: str) -> frozenset[int]:
    """Parse HTTP statuses such as 200-299,302."""
    statuses: set[int] = set()
    for part in text.split(","):
        match = _STATUSES.fullmatch(part.strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not STATUS_MIN <= low <= high <= STATUS_MAX:
            raise ValueError(f"must be statuses from {STATUS_MIN} to {STATUS_MAX}, such as 200-299,302")
        statuses.update(range(low, high + 1))
    return frozenset(statuses)


def check_apprise_url(url: str) -> str:
    """Return an Apprise URL that contains {to}. Raises ValueError.

    Apprise itself checks the rest.
    """
    if "://" not in url or DESTINATION not in url or not _VISIBLE.fullmatch(url):
        raise ValueError(f"must be an Apprise URL with {DESTINATION} in place of the destination")
    return url


def _json(text: str, message: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(message) from None


def _strings(value: Any) -> list[str]:
    """Return the string values inside a JSON value."""
    if isinstance(value, str):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in inner for text in _strings(item)]

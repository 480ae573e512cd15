"""Providers on loopback: a real SMTP server and a plain HTTP server, which also hang, refuse and hang up."""

import asyncio
import contextlib
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import default as email_policy
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, Session

from pointbook_server.delivery.sender import Message

CODE = "Q7M2X9KD4H"
"""A code that cannot turn up by chance."""
PASSWORD = "s3cret-pass"
MESSAGE = Message("b.private@example.com", f"Your code is {CODE}", "challenge-1", "Your code")
TEXT = f'你好 🎁 "{CODE}" for $5, {{to}} \\ O\'Neil\n.\n..dots\r\nlast line ' + "é" * 200
"""What breaks careless senders: other scripts, quotes, a dollar, braces, lines of dots, and a long line."""


@dataclass
class MailServer:
    """An SMTP server that keeps e-mails, or answers `replies` at a command, or does what `at_data` says."""

    port: int = 0
    emails: list[tuple[Envelope, EmailMessage]] = field(default_factory=list)
    replies: dict[str, str] = field(default_factory=dict)
    at_data: str = ""
    takes_utf8: bool = True
    recipients: list[str] = field(default_factory=list)
    """What RCPT said, as it came over the wire."""
    logins: list[tuple[bytes, bytes]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    open: int = 0
    most_open: int = 0

    async def handle_MAIL(  # noqa: N802 - aiosmtpd names it
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Take the sender, or answer as a test wants."""
        assert server.transport is not None
        self.encrypted.append(server.transport.get_extra_info("sslcontext") is not None)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return self.replies.get("MAIL", "250 OK")

    async def handle_RCPT(  # noqa: N802 - aiosmtpd names it
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Take the recipient, or answer as a test wants."""
        envelope.rcpt_tos.append(address)
        return self.replies.get("RCPT", "250 OK")

    async def handle_DATA(self, server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd
        """Keep the e-mail, or do as a test wants."""
        assert isinstance(envelope.content, bytes)
        parsed = BytesParser(EmailMessage, policy=email_policy).parsebytes(envelope.content)
        self.emails.append((envelope, parsed))
        if self.at_data == "hang":
            await asyncio.sleep(60)
        if self.at_data == "cut":
            transport: Any = server.transport
            transport.abort()
        await asyncio.sleep(0.01)
        return self.replies.get("DATA", "250 OK")

    def log_in(self, _server: SMTP, _session: Session, _envelope: Envelope, _mechanism: str, data: Any) -> AuthResult:
        """Take one password alone."""
        self.logins.append((data.login, data.password))
        return AuthResult(success=data.password == PASSWORD.encode(), handled=False)


@contextlib.asynccontextmanager
async def mail_server(
    *, start_tls: ssl.SSLContext | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[MailServer]:
    """Run an SMTP server. With STARTTLS it insists on it, and on a password."""
    keeper = MailServer()

    class Counted(SMTP):
        """Counts the connections that are open."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            keeper.open += 1
            keeper.most_open = max(keeper.most_open, keeper.open)
            super().connection_made(transport)

        def connection_lost(self, error: Exception | None) -> None:
            keeper.open -= 1
            super().connection_lost(error)

        async def smtp_RCPT(self, arg: str) -> None:  # noqa: N802 - aiosmtpd names it
            keeper.recipients.append(arg)
            await super().smtp_RCPT(arg)

    def protocol() -> SMTP:
        return Counted(
            keeper,
            enable_SMTPUTF8=keeper.takes_utf8,
            hostname="mail.example.com",
            tls_context=start_tls,
            require_starttls=start_tls is not None,
            auth_required=start_tls is not None,
            auth_require_tls=start_tls is not None,
            authenticator=keeper.log_in,
            loop=asyncio.get_running_loop(),
        )

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, ssl=tls)
    keeper.port = server.sockets[0].getsockname()[1]
    try:
        yield keeper
    finally:
        server.close()


@dataclass
class Request:
    """A request as it arrived."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


@dataclass
class HttpServer:
    """An HTTP server that keeps requests and answers with one status, hangs, hangs up, or never stops talking."""

    port: int = 0
    status: int = 200
    headers: str = ""
    manner: str = "answer"
    requests: list[Request] = field(default_factory=list)
    open: int = 0
    most_open: int = 0
    sent_bytes: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (header.partition(": ") for header in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append(Request(line, headers, body))
        if self.manner == "hang":
            await reader.read()
        if self.manner in {"hang", "cut"}:
            return
        await asyncio.sleep(0.01)
        endless = self.manner == "endless"
        length = "" if endless else "Content-Length: 2\r\n"
        # Providers like to repeat what they were sent.
        writer.write(f"HTTP/1.1 {self.status} x\r\n{length}{self.headers}\r\n".encode() + b"{}")
        await writer.drain()
        while endless:
            writer.write(b"x" * 65_536)
            self.sent_bytes += 65_536
            await writer.drain()


@contextlib.asynccontextmanager
async def http_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[HttpServer]:
    """Run an HTTP server."""
    keeper = HttpServer()
    server = await asyncio.start_server(keeper.serve, "127.0.0.1", 0, ssl=tls)
    keeper.port = server.sockets[0].getsockname()[1]
    try:
        yield keeper
    finally:
        server.close()


@contextlib.asynccontextmanager
async def loop_delays() -> AsyncIterator[Callable[[], float]]:
    """Measure by how many seconds the loop is later at most than a thread, which the machine makes late as well."""
    loop_late, thread_late = 0.0, 0.0
    over = threading.Event()

    async def watch_loop() -> None:
        nonlocal loop_late
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            loop_late = max(loop_late, time.monotonic() - before - 0.005)

    def watch_thread() -> None:
        nonlocal thread_late
        while not over.is_set():
            before = time.monotonic()
            time.sleep(0.005)
            thread_late = max(thread_late, time.monotonic() - before - 0.005)

    watching = asyncio.create_task(watch_loop())
    threading.Thread(target=watch_thread).start()
    try:
        yield lambda: loop_late - thread_late
    finally:
        over.set()
        watching.cancel()


def everything_told_by(error: BaseException | None) -> str:
    """Write down an error and whatever hangs on it."""
    told = ""
    while error is not None:
        told += f"{error!r} {error} {vars(error)} "
        error = error.__cause__ or error.__context__
    return told

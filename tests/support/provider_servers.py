"""An SMTP server and an HTTP server on loopback that can also fail."""

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
"""A code that does not occur by chance."""
PASSWORD = "s3cret-pass"
MESSAGE = Message("b.private@example.com", f"Your code is {CODE}", "challenge-1", "Your code")
LOOP_DELAY_SECONDS_MAX = 0.25
"""The longest delay of an event loop that nothing blocks, on a busy machine."""
TEXT = f'你好 🎁 "{CODE}" for $5, {{to}} \\ O\'Neil\n.\n..dots\r\nlast line ' + "é" * 200
"""Text that needs care: other scripts, quotes, a dollar, braces, lines of dots, and a long line."""


@dataclass
class MailServer:
    """An SMTP server that stores e-mails.

    `replies` are its replies by command; `at_data` is "hang" or "cut" after the content of a message.
    """

    port: int = 0
    emails: list[tuple[Envelope, EmailMessage]] = field(default_factory=list)
    replies: dict[str, str] = field(default_factory=dict)
    at_data: str = ""
    takes_utf8: bool = True
    recipients: list[str] = field(default_factory=list)
    """The arguments of RCPT as they arrived."""
    logins: list[tuple[bytes, bytes]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    open: int = 0
    max_open: int = 0

    async def handle_MAIL(  # noqa: N802 - aiosmtpd names it
        self, server: SMTP, _session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        """Store the sender, and return the reply."""
        assert server.transport is not None
        self.encrypted.append(server.transport.get_extra_info("sslcontext") is not None)
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return self.replies.get("MAIL", "250 OK")

    async def handle_RCPT(  # noqa: N802 - aiosmtpd names it
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Store the recipient, and return the reply."""
        envelope.rcpt_tos.append(address)
        return self.replies.get("RCPT", "250 OK")

    async def handle_DATA(self, server: SMTP, _session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd
        """Store the e-mail, and return the reply, hang or close the connection."""
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
        """Accept the one password."""
        self.logins.append((data.login, data.password))
        return AuthResult(success=data.password == PASSWORD.encode(), handled=False)


@contextlib.asynccontextmanager
async def mail_server(
    *, start_tls: ssl.SSLContext | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[MailServer]:
    """Run an SMTP server. With `start_tls` it requires STARTTLS and a password."""
    server_state = MailServer()

    class CountingSMTP(SMTP):
        """An SMTP session that counts open connections."""

        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            server_state.open += 1
            server_state.max_open = max(server_state.max_open, server_state.open)
            super().connection_made(transport)

        def connection_lost(self, error: Exception | None) -> None:
            server_state.open -= 1
            super().connection_lost(error)

        async def smtp_RCPT(self, arg: str) -> None:  # noqa: N802 - aiosmtpd names it
            server_state.recipients.append(arg)
            await super().smtp_RCPT(arg)

    def protocol() -> SMTP:
        return CountingSMTP(
            server_state,
            enable_SMTPUTF8=server_state.takes_utf8,
            hostname="mail.example.com",
            tls_context=start_tls,
            require_starttls=start_tls is not None,
            auth_required=start_tls is not None,
            auth_require_tls=start_tls is not None,
            authenticator=server_state.log_in,
            loop=asyncio.get_running_loop(),
        )

    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0, ssl=tls)
    server_state.port = server.sockets[0].getsockname()[1]
    try:
        yield server_state
    finally:
        server.close()


@dataclass
class ReceivedRequest:
    """A request as it arrived."""

    request_line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The parsed body."""
        return json.loads(self.body)


@dataclass
class HttpServer:
    """An HTTP server that stores requests.

    `behavior` is "answer", "hang", "cut" (close without an answer) or "endless" (an endless body).
    """

    port: int = 0
    status: int = 200
    headers: str = ""
    behavior: str = "answer"
    requests: list[ReceivedRequest] = field(default_factory=list)
    open: int = 0
    max_open: int = 0
    sent_bytes: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._answer(reader, writer)
        finally:
            self.open -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request_line, *header_lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (header.partition(": ") for header in header_lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append(ReceivedRequest(request_line, headers, body))
        if self.behavior == "hang":
            await reader.read()
        if self.behavior in {"hang", "cut"}:
            return
        await asyncio.sleep(0.01)
        endless = self.behavior == "endless"
        length = "" if endless else "Content-Length: 2\r\n"
        # Providers often repeat the request in their reason phrase.
        writer.write(f"HTTP/1.1 {self.status} x\r\n{length}{self.headers}\r\n".encode() + b"{}")
        await writer.drain()
        while endless:
            writer.write(b"x" * 65_536)
            self.sent_bytes += 65_536
            await writer.drain()


@contextlib.asynccontextmanager
async def http_server(tls: ssl.SSLContext | None = None) -> AsyncIterator[HttpServer]:
    """Run an HTTP server."""
    server_state = HttpServer()
    server = await asyncio.start_server(server_state.serve, "127.0.0.1", 0, ssl=tls)
    server_state.port = server.sockets[0].getsockname()[1]
    try:
        yield server_state
    finally:
        server.close()


@contextlib.asynccontextmanager
async def loop_delays() -> AsyncIterator[Callable[[], float]]:
    """Yield a function that returns the delay of the event loop in seconds.

    It is the delay in excess of that of a thread, since a busy machine delays both.
    """
    loop_late, thread_late = 0.0, 0.0
    is_done = threading.Event()

    async def watch_loop() -> None:
        nonlocal loop_late
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            loop_late = max(loop_late, time.monotonic() - before - 0.005)

    def watch_thread() -> None:
        nonlocal thread_late
        while not is_done.is_set():
            before = time.monotonic()
            time.sleep(0.005)
            thread_late = max(thread_late, time.monotonic() - before - 0.005)

    watcher = asyncio.create_task(watch_loop())
    threading.Thread(target=watch_thread).start()
    try:
        yield lambda: loop_late - thread_late
    finally:
        is_done.set()
        watcher.cancel()


def error_chain_text(error: BaseException | None) -> str:
    """Return all text of an error and of its causes."""
    text = ""
    while error is not None:
        text += f"{error!r} {error} {vars(error)} "
        error = error.__cause__ or error.__context__
    return text

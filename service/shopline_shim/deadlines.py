"""HTTP connections that end in time: uvicorn has no protection of its own against clients that send slowly."""

import asyncio
import contextlib
import socket
from typing import Any

from httptools import HttpParserError
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from shopline_shim.connections import Connections
from shopline_shim.problems import MEDIA_TYPE, Problem
from shopline_shim.settings import ShimSettings

_MAX_HEADER_BYTES = 64 * 1024
_MAX_PIPELINED_REQUESTS = 8


def _last_answer(problem: Problem) -> bytes:
    """Write a problem as the whole answer that ends a connection."""
    body = problem.body()
    head = (
        f"HTTP/1.1 {problem.status} {problem.title}\r\n"
        f"content-type: {MEDIA_TYPE}\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


# Written once: a thousand slow clients that time out together must cost the others nothing.
_TOO_SLOW = _last_answer(Problem(408, "too-slow", "Request Timeout", "The request took too long."))
_NOT_HTTP = _last_answer(Problem(400, "not-http", "Bad Request", "The request is not well-formed HTTP/1.1."))
_BODY_TOO_LARGE = _last_answer(
    Problem(413, "body-too-large", "Content Too Large", "The body is larger than the limit.")
)
_HEADERS_TOO_LARGE = _last_answer(
    Problem(431, "headers-too-large", "Request Header Fields Too Large", "The headers are larger than 64 KiB.")
)


class DeadlineProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection with a clock and a byte count beside it.

    One timer runs whenever something is owed: first the request's headers (408 after `header_timeout_seconds`), then
    the rest of the request and its answer (`request_timeout_seconds` from the first byte on). Between two requests
    uvicorn's keep-alive timeout runs instead. The bytes of one request are counted as they arrive, since neither
    headers, trailers nor chunk extensions have a limit in the parser.

    The application's lifespan state must hold the ShimSettings under `settings` and the Connections under
    `connections`. Each request's state holds its connection under `connection`. A connection with a TLS handshake
    begins with the socket that was `accepted`.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        accepted: socket.socket | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._accepted = accepted
        settings: ShimSettings = app_state["settings"]
        self._open: Connections = app_state["connections"]
        self._header_timeout = settings.header_timeout_seconds
        self._request_timeout = settings.request_timeout_seconds
        # A body in small chunks is mostly framing; twice the limit leaves room for it.
        self._max_wire_bytes = _MAX_HEADER_BYTES + 2 * settings.max_body_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._last_timer: asyncio.TimerHandle | None = None
        self._started = 0.0
        self._wire_bytes = 0
        self._in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn types its transport likewise
        """Start the clock before the first byte: a client that sends none must not stay either."""
        super().connection_made(transport)
        self._begin_request()
        self._open.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        self._open.remove(self)
        self._disarm()
        if self._last_timer is not None:
            self._last_timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        # A request's state refers to its connection: both would wait for the garbage collector, headers and all.
        self.pipeline.clear()
        self.cycle = self.scope = None  # type: ignore[assignment] # as uvicorn itself has them before a request

    def data_received(self, data: bytes) -> None:
        """Count the bytes, and start the clock with the first one after a kept-alive pause.

        The parser never sees more than the limits leave room for, however much one read brings.
        """
        if self._timer is None:
            self._begin_request()
        while data and not self.transport.is_closing():
            room = (_MAX_HEADER_BYTES if self._in_headers else self._max_wire_bytes) - self._wire_bytes
            if room <= 0:
                self._refuse(_HEADERS_TOO_LARGE if self._in_headers else _BODY_TOO_LARGE)
                return
            part, data = data[:room], data[room:]
            self._wire_bytes += len(part)
            super().data_received(part)

    def on_message_begin(self) -> None:
        """Store the connection in the request's state, where the application marks it as authentic."""
        super().on_message_begin()
        self.scope["state"]["connection"] = self

    def hold(self, size: int) -> None:
        """Count bytes of a body whose sender is not known yet."""
        self._open.hold(self, size)

    def release(self, *, authentic: bool) -> None:
        """Stop counting the bytes of a body, which has been judged."""
        self._open.release(self, authentic=authentic)

    def cut(self) -> None:
        """Close the connection at once, also before its handshake has ended."""
        if self.transport is not None:
            self.transport.abort()
        elif self._accepted is not None:
            with contextlib.suppress(OSError):
                self._accepted.shutdown(socket.SHUT_RDWR)

    def on_headers_complete(self) -> None:
        """Give the rest of the request its own, longer deadline."""
        super().on_headers_complete()
        # One read can hold thousands of pipelined requests, and each costs a hundred times its size in memory.
        if len(self.pipeline) > _MAX_PIPELINED_REQUESTS:
            raise HttpParserError
        self._in_headers = False
        self._arm(self._started + self._request_timeout)

    def on_message_complete(self) -> None:
        """Count the next request's bytes afresh; a request that was answered before its end ends the connection."""
        super().on_message_complete()
        self._wire_bytes = 0
        self._in_headers = True
        if self.cycle.response_complete:
            self._close()  # uvicorn's keep-alive timer is gone by now, and would not be started again.

    def on_response_complete(self) -> None:
        """Stop the clock, unless the rest of the body is still to come; start it again for a request that waits."""
        waiting = bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif waiting:
            self._started = self.loop.time()
            self._arm(self._started + self._request_timeout)
        elif self._in_headers:
            self._disarm()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection on which no further request comes."""
        self._close()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text says the same less well.
        """Answer a parser error in the form of all other errors."""
        self._refuse(_NOT_HTTP)

    def _begin_request(self) -> None:
        self._wire_bytes = 0
        self._in_headers = True
        self._started = self.loop.time()
        self._arm(self._started + self._header_timeout)

    def _arm(self, deadline: float) -> None:
        self._disarm()
        self._timer = self.loop.call_at(deadline, self._refuse, _TOO_SLOW)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, last_answer: bytes) -> None:
        """Answer and close; where the request has (part of) its answer already, only cut the connection."""
        if self.transport.is_closing():
            return
        between_requests = self.cycle is None or (self.cycle.response_complete and self._in_headers)
        answered = not between_requests and self.cycle.response_started
        if answered or self.flow.write_paused:
            self.transport.abort()
            return
        self.transport.write(last_answer)
        self._close()

    def _close(self) -> None:
        """Close the connection once all is sent, and cut it where the client does not read that in time."""
        self.transport.close()
        if self._last_timer is None:
            self._last_timer = self.loop.call_later(self._request_timeout, self.transport.abort)

"""HTTP/1.1 connections with deadlines and size limits.

uvicorn itself has no protection against slow clients.
"""

import asyncio
import contextlib
import socket
from typing import Any

from httptools import HttpParserError
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from shopline_shim.connection_limits import ConnectionLimits
from shopline_shim.responses import (
    BODY_TOO_LARGE,
    HEADERS_TOO_LARGE,
    NOT_HTTP,
    PROBLEM_MEDIA_TYPE,
    TOO_SLOW,
    Problem,
)
from shopline_shim.settings import ShimSettings

_HEADER_BYTES_MAX = 64 * 1024
_PIPELINED_REQUESTS_MAX = 8


def _closing_response(problem: Problem) -> bytes:
    """Return a problem as a complete HTTP response that closes the connection."""
    body = problem.body()
    head = (
        f"HTTP/1.1 {problem.status} {problem.title}\r\n"
        f"content-type: {PROBLEM_MEDIA_TYPE}\r\n"
        f"content-length: {len(body)}\r\n"
        "connection: close\r\n\r\n"
    )
    return head.encode() + body


# Built once, so that a thousand slow clients that time out together do not delay the others.
_TOO_SLOW = _closing_response(TOO_SLOW)
_NOT_HTTP = _closing_response(NOT_HTTP)
_BODY_TOO_LARGE = _closing_response(BODY_TOO_LARGE)
_HEADERS_TOO_LARGE = _closing_response(HEADERS_TOO_LARGE)


class LimitedHttpProtocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1 connection with a timer and a byte counter.

    One timer runs while a request is in progress: first for its headers (408 after `header_timeout_seconds`), then for
    the body and the response (`request_timeout_seconds` after the first byte). Between two requests uvicorn's
    keep-alive timeout runs instead. The bytes of each request are counted as they arrive, because the parser limits
    neither headers, trailers nor chunk extensions.

    The lifespan state of the application must hold the ShimSettings under `settings` and the ConnectionLimits under
    `connection_limits`. The connection is `request.state.connection`. Before a TLS handshake has ended, a connection
    has only its `accepted` socket.
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
        self._limits: ConnectionLimits = app_state["connection_limits"]
        self._header_timeout = settings.header_timeout_seconds
        self._request_timeout = settings.request_timeout_seconds
        # A body in small chunks is mostly framing, so allow twice the limit on the wire.
        self._request_bytes_max = _HEADER_BYTES_MAX + 2 * settings.max_body_bytes
        self._timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._request_started = 0.0
        self._request_bytes = 0
        self._in_headers = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn types its transport likewise
        """Start the timer, also for a client that sends nothing."""
        super().connection_made(transport)
        self._begin_request()
        self._limits.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and break the reference cycles of the connection."""
        self._limits.remove(self)
        self._stop_timer()
        if self._abort_timer is not None:
            self._abort_timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        # A request's state refers to its connection, so without this both wait for the garbage collector.
        self.pipeline.clear()
        self.cycle = self.scope = None  # type: ignore[assignment] # as uvicorn itself has them before a request

    def data_received(self, data: bytes) -> None:
        """Count the bytes, and start the timer if they begin a request.

        One read can exceed the limits, so the parser gets at most as many bytes as they allow.
        """
        if self._timer is None:
            self._begin_request()
        while data and not self.transport.is_closing():
            allowed = (_HEADER_BYTES_MAX if self._in_headers else self._request_bytes_max) - self._request_bytes
            if allowed <= 0:
                self._close_with(_HEADERS_TOO_LARGE if self._in_headers else _BODY_TOO_LARGE)
                return
            part, data = data[:allowed], data[allowed:]
            self._request_bytes += len(part)
            super().data_received(part)

    def on_message_begin(self) -> None:
        """Store the connection in the request's state.

        The endpoints call `hold` and `release` on it.
        """
        super().on_message_begin()
        self.scope["state"]["connection"] = self

    def hold(self, size: int) -> None:
        """Count bytes of a body that is not verified yet."""
        self._limits.hold(self, size)

    def release(self, *, authentic: bool) -> None:
        """Release the bytes of a body that was verified."""
        self._limits.release(self, authentic=authentic)

    def abort(self) -> None:
        """Close the connection at once, even before its handshake has ended."""
        if self.transport is not None:
            self.transport.abort()
        elif self._accepted is not None:
            with contextlib.suppress(OSError):
                self._accepted.shutdown(socket.SHUT_RDWR)

    def on_headers_complete(self) -> None:
        """Replace the deadline of the headers by that of the request."""
        super().on_headers_complete()
        # One read can hold thousands of pipelined requests, and each takes a hundred times its size in memory.
        if len(self.pipeline) > _PIPELINED_REQUESTS_MAX:
            raise HttpParserError
        self._in_headers = False
        self._start_timer(self._request_started + self._request_timeout)

    def on_message_complete(self) -> None:
        """Reset the byte counter.

        A connection whose request was answered before the body ended is closed.
        """
        super().on_message_complete()
        self._request_bytes = 0
        self._in_headers = True
        if self.cycle.response_complete:
            self._close()  # uvicorn's keep-alive timer has run out and is not started again.

    def on_response_complete(self) -> None:
        """Stop the timer, or restart it for the next pipelined request.

        While the rest of the body is missing, the timer goes on.
        """
        has_pipelined = bool(self.pipeline)
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif has_pipelined:
            self._request_started = self.loop.time()
            self._start_timer(self._request_started + self._request_timeout)
        elif self._in_headers:
            self._stop_timer()

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that was idle for the keep-alive timeout."""
        self._close()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's text is no problem body
        """Send a problem for a parser error, and close the connection."""
        self._close_with(_NOT_HTTP)

    def _begin_request(self) -> None:
        self._request_bytes = 0
        self._in_headers = True
        self._request_started = self.loop.time()
        self._start_timer(self._request_started + self._header_timeout)

    def _start_timer(self, deadline: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_at(deadline, self._close_with, _TOO_SLOW)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_with(self, response: bytes) -> None:
        """Send a last response and close; abort instead if a response was already started."""
        if self.transport.is_closing():
            return
        between_requests = self.cycle is None or (self.cycle.response_complete and self._in_headers)
        response_started = not between_requests and self.cycle.response_started
        if response_started or self.flow.write_paused:
            self.transport.abort()
            return
        self.transport.write(response)
        self._close()

    def _close(self) -> None:
        """Close the connection after its data is sent.

        It is aborted if the client does not read the data in time.
        """
        self.transport.close()
        if self._abort_timer is None:
            self._abort_timer = self.loop.call_later(self._request_timeout, self.transport.abort)

"""The endpoint that serves a process's metrics to Prometheus."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from time import monotonic

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

PATH = b"/metrics"
HEAD_BYTES_MAX = 8 * 1024
CONNECTIONS_MAX = 64
CONNECTION_SECONDS_MAX = 5.0
CLOSING_TURNS = 10
"""Turns of its event loop that a closing endpoint still runs; two were enough in tests."""


def listen(name: str, address: str) -> socket.socket:
    """Return a socket that listens on a HOST:PORT.

    Raises OSError with the setting's name.
    """
    host, _, port = address.rpartition(":")
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=CONNECTIONS_MAX)
    except OSError as error:
        raise OSError(f"{name}: cannot listen on {address}: {error.strerror}") from error


def exposition_of(registry: CollectorRegistry) -> Callable[[], Awaitable[bytes]]:
    """Return a function that returns a registry's metrics as text."""

    async def expose() -> bytes:
        return generate_latest(registry)

    return expose


class SharedExposition:
    """A text that concurrent scrapes share, so that many cost no more than two.

    Each scrape gets a text that was begun after the scrape.
    """

    def __init__(self, expose: Callable[[], Awaitable[bytes]]) -> None:
        self._expose = expose
        self._lock = asyncio.Lock()
        self._text = b""
        self._begun_at = float("-inf")

    async def read(self) -> bytes:
        """Return the text."""
        arrived_at = monotonic()
        async with self._lock:
            if self._begun_at < arrived_at:
                begun_at = monotonic()
                self._text = await self._expose()
                self._begun_at = begun_at
            return self._text


class MetricsEndpoint:
    """Serves `GET /metrics` on a listening socket and its own thread.

    `expose` returns the text, in that thread, so the endpoint responds while the server's loop is busy. The thread's
    event loop is bounded: each connection gets one response to a head of at most HEAD_BYTES_MAX and is closed within
    CONNECTION_SECONDS_MAX; above CONNECTIONS_MAX, a new connection replaces the oldest. Nothing that clients send is
    logged.
    """

    def __init__(self, expose: Callable[[], Awaitable[bytes]], listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self._exposition = SharedExposition(expose)
        self._connections: dict[asyncio.StreamWriter, None] = {}
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self, listener: socket.socket) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        server = await asyncio.start_server(self._serve_connection, sock=listener, limit=HEAD_BYTES_MAX)
        await self._stop.wait()
        asyncio.get_running_loop().remove_reader(listener)
        # Within a few turns, accepted connections get their tasks, and aborted ones end their tasks and close their
        # sockets; asyncio would log what the end of the loop cuts off instead.
        for _ in range(CLOSING_TURNS):
            for connection in self._connections:
                connection.transport.abort()
            await asyncio.sleep(0)
        server.close()

    async def _serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Respond to one request, or close the connection if the client is too slow."""
        if len(self._connections) >= CONNECTIONS_MAX:
            oldest = next(iter(self._connections))
            del self._connections[oldest]
            oldest.transport.abort()
        self._connections[writer] = None
        # Drained only when the system has accepted everything.
        writer.transport.set_write_buffer_limits(high=0)
        try:
            async with asyncio.timeout(CONNECTION_SECONDS_MAX):
                writer.write(await self._response_to(await reader.readuntil(b"\r\n\r\n")))
                await writer.drain()
            writer.close()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            writer.transport.abort()
        finally:
            self._connections.pop(writer, None)

    async def _response_to(self, head: bytes) -> bytes:
        """Return the response to a request, which depends only on its first line."""
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        target, _, version = rest.partition(b" ")
        if version not in {b"HTTP/1.0", b"HTTP/1.1"}:
            return _response(HTTPStatus.BAD_REQUEST)
        if target.partition(b"?")[0] != PATH:
            return _response(HTTPStatus.NOT_FOUND)
        if method not in {b"GET", b"HEAD"}:
            return _response(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD")
        body = await self._exposition.read()
        response = _response(HTTPStatus.OK, f"Content-Type: {CONTENT_TYPE_PLAIN_0_0_4}", body)
        return response if method == b"GET" else response.removesuffix(body)


def _response(status: HTTPStatus, field: str = "Content-Type: text/plain", body: bytes = b"") -> bytes:
    lines = (
        f"HTTP/1.1 {status} {status.phrase}",
        field,
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*lines, "", "")).encode() + body

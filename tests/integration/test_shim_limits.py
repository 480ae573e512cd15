"""Limits for unauthenticated clients: connections, bodies, headers and logs."""

import asyncio
import contextlib
import gc
import logging
import weakref
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import Counter
from uvicorn.server import ServerState

from shopline_shim.connection_limits import ConnectionLimits
from shopline_shim.http_protocol import LimitedHttpProtocol
from shopline_shim.settings import ShimSettings
from support.servers import Service
from support.shims import PATH, shim_client
from support.waiting import until

HEADER_BYTES_MAX = 64 * 1024
EVICTED = "pointbook_connections_evicted_total"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def idle_connections(
    http: httpx.AsyncClient, count: int, first_bytes: bytes = b""
) -> AsyncIterator[list[Stream]]:
    """Open a number of connections during the block that send only their first bytes."""
    streams: list[Stream] = []
    try:
        for _ in range(count):
            stream = await asyncio.open_connection(http.base_url.host, http.base_url.port)
            streams.append(stream)
            stream[1].write(first_bytes)
            await stream[1].drain()
        yield streams
    finally:
        for _, writer in streams:
            writer.close()


async def are_closed(streams: list[Stream]) -> list[bool]:
    """Return which connections the shim has closed."""
    await asyncio.sleep(0)
    return [reader.at_eof() or reader.exception() is not None for reader, _ in streams]


async def evictions(http: httpx.AsyncClient, limit: str) -> float:
    """Return how many connections were closed at a limit."""
    text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f'{EVICTED}{{bound="{limit}"}}')]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def limited(service: Service, **changes: Any) -> contextlib.AbstractAsyncContextManager[httpx.AsyncClient]:
    """Run a shim with changed limits, and with deadlines that no test reaches."""
    return shim_client(service.server.port, "", header_timeout_seconds=60, request_timeout_seconds=60, **changes)


async def test_oldest_unauthenticated_connection_is_closed_at_the_limit(service: Service) -> None:
    async with limited(service, max_connections=10) as http, idle_connections(http, 15) as streams:
        assert (await http.get("/healthz")).status_code == 200
        await until(lambda: _all_closed(streams[:6]))
        assert not any(await are_closed(streams[6:]))
        assert await evictions(http, "connections") == 6


async def _all_closed(streams: list[Stream]) -> bool:
    return all(await are_closed(streams))


async def test_unfinished_bodies_above_the_byte_limit_are_closed_oldest_first(service: Service) -> None:
    start = f"POST {PATH} HTTP/1.1\r\nhost: shim\r\ncontent-length: 250000\r\n\r\n".encode() + b"x" * 200_000
    async with limited(service, max_unverified_bytes=1024**2) as http, idle_connections(http, 8, start) as streams:
        await until(lambda: _all_closed(streams[:3]))
        whole = await http.post(PATH, content=b"x" * 200_000)
        assert whole.status_code == 401
        await until(lambda: _all_closed(streams[:4]))
        assert not any(await are_closed(streams[4:]))
        assert await evictions(http, "bytes") == 4


class FakeConnection:
    """A connection that records whether it was closed."""

    def __init__(self) -> None:
        self.is_aborted = False

    def abort(self) -> None:
        """Record the call."""
        self.is_aborted = True


def connection_limits(connections_max: int, bytes_max: int = 1_000) -> ConnectionLimits:
    """Return limits without connections."""
    evicted = Counter("evicted", "Test.", ("bound",), registry=None)
    return ConnectionLimits(connections_max=connections_max, bytes_max=bytes_max, evicted=evicted)


def test_new_connections_do_not_close_an_authenticated_one() -> None:
    limits, honest = connection_limits(10), FakeConnection()
    limits.add(honest)
    limits.hold(honest, 100)
    limits.release(honest, authentic=True)
    new_connections = [FakeConnection() for _ in range(100)]
    for each in new_connections:
        limits.add(each)

    assert not honest.is_aborted
    assert [each.is_aborted for each in new_connections] == [True] * 91 + [False] * 9


def test_authenticated_connections_leave_half_of_the_limit_to_new_ones() -> None:
    """A captured body makes an attacker's connections authenticated."""
    limits = connection_limits(10)
    captured, new = [FakeConnection() for _ in range(10)], [FakeConnection() for _ in range(5)]
    for each in captured:
        limits.add(each)
        limits.release(each, authentic=True)
    limits.release(captured[0], authentic=True)
    for each in new:
        limits.add(each)

    assert [each.is_aborted for each in captured] == [False, *[True] * 5, *[False] * 4]
    assert not any(each.is_aborted for each in new)


def test_connection_below_its_share_of_bytes_is_not_closed() -> None:
    limits, small, large = connection_limits(10), FakeConnection(), [FakeConnection() for _ in range(4)]
    for each in (small, *large):
        limits.add(each)
    for each in large[:3]:
        limits.hold(each, 310)
    limits.hold(small, 60)
    assert not any(each.is_aborted for each in (small, *large))
    limits.hold(large[3], 310)
    limits.hold(small, 20)

    assert [each.is_aborted for each in (small, *large)] == [False, True, True, False, False]


@pytest.mark.parametrize("size", [HEADER_BYTES_MAX + 1, 2 * HEADER_BYTES_MAX, 4 * HEADER_BYTES_MAX])
async def test_complete_headers_above_the_limit_are_431(service: Service, size: int) -> None:
    line = b"GET /healthz HTTP/1.1\r\nhost: shim\r\n"
    headers = b"".join(b"x-%05d: %s\r\n" % (number, b"v" * 1_000) for number in range(size // 1_000))
    request = (line + headers + b"x-last: ").ljust(size - 4, b"v") + b"\r\n\r\n"
    async with limited(service) as http, idle_connections(http, 1, request) as [(reader, _)]:
        assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")


async def test_headers_and_body_of_the_maximum_size_in_one_write_are_accepted(service: Service) -> None:
    head = f"POST {PATH} HTTP/1.1\r\nhost: shim\r\ncontent-length: 262144\r\n".encode()
    request = (head + b"x-last: ").ljust(HEADER_BYTES_MAX - 4, b"v") + b"\r\n\r\n" + b"x" * 262_144
    async with limited(service) as http, idle_connections(http, 1, request) as [(reader, _)]:
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("last_event", ["keep-alive timeout", "rejected", "answered"])
async def test_connection_of_a_client_that_reads_nothing_is_aborted(last_event: str) -> None:
    """A transport that closes waits for its client to read the remaining data."""
    transport = UnreadTransport()
    state = {"settings": ShimSettings(request_timeout_seconds=0.05), "connection_limits": connection_limits(10)}
    protocol = LimitedHttpProtocol(uvicorn.Config(healthy, ws="none", log_config=None), ServerState(), state)
    protocol.connection_made(transport)
    if last_event == "rejected":
        protocol.data_received(b"not HTTP\r\n\r\n")
    else:
        protocol.data_received(b"GET / HTTP/1.1\r\nhost: shim\r\nconnection: close\r\n\r\n")
    if last_event == "keep-alive timeout":
        protocol.timeout_keep_alive_handler()

    await until(lambda: transport.is_aborted, 1)
    assert transport.is_closed


async def test_closed_connection_is_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        closed = await closed_connection()
        await until(lambda: closed() is None, 1)
    finally:
        gc.enable()


async def closed_connection() -> weakref.ref[LimitedHttpProtocol]:
    """Return a weak reference to a connection that was lost after three requests."""
    state = {"settings": ShimSettings(), "connection_limits": connection_limits(10)}
    protocol = LimitedHttpProtocol(uvicorn.Config(healthy, ws="none", log_config=None), ServerState(), state)
    protocol.connection_made(UnreadTransport())
    protocol.data_received(3 * b"GET / HTTP/1.1\r\nhost: shim\r\n\r\n")
    await until(lambda: protocol.cycle.response_complete, 1)
    protocol.connection_lost(ConnectionResetError())
    return weakref.ref(protocol)


async def healthy(_scope: Any, _receive: Any, send: Any) -> None:
    """Send an empty response."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


class UnreadTransport(asyncio.Transport):
    """A transport whose client reads nothing, so that it never finishes closing."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed = self.is_aborted = False

    def write(self, data: Any) -> None:
        """Drop the data."""

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.is_closed

    def close(self) -> None:
        """Start closing."""
        self.is_closed = True

    def abort(self) -> None:
        """Close at once."""
        self.is_closed = self.is_aborted = True

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self) -> None:
        """Do nothing."""


async def test_rejected_requests_are_not_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    async with limited(service) as http:
        with caplog.at_level(logging.WARNING):
            async with idle_connections(http, 5, b"\x16\x03\x01 not HTTP\r\n\r\n") as streams:
                lines = [await reader.readline() for reader, _ in streams]
            forged = [(await http.post(PATH, content=b"{}")).status_code for _ in range(5)]
            missing = (await http.get("/nothing")).status_code

    assert [line[:13] for line in lines] == [b"HTTP/1.1 400 "] * 5
    assert (forged, missing) == ([401] * 5, 404)
    assert not caplog.records


async def test_separate_metrics_address_serves_no_metrics_on_the_webhooks_port(service: Service) -> None:
    async with shim_client(service.server.port, "", shim_metrics_address="") as http:
        assert (await http.get("/metrics")).status_code == 404
        assert (await http.get("/healthz")).status_code == 200
    async with shim_client(service.server.port, "", shim_metrics_address="localhost:0") as http:
        assert (await http.get("/metrics")).status_code == 404

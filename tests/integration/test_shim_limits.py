"""What strangers can hold of a shim: connections, bodies, headers, log lines."""

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
from support.harness import Service
from support.shims import PATH, shim_before
from support.waiting import until

HEADER_BYTES_MAX = 64 * 1024
EVICTED = "pointbook_connections_evicted_total"
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@contextlib.asynccontextmanager
async def strangers(http: httpx.AsyncClient, count: int, first_bytes: bytes = b"") -> AsyncIterator[list[Stream]]:
    """Open connections that send a few bytes and then no more."""
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


async def are_cut(streams: list[Stream]) -> list[bool]:
    """Return which of some connections the shim has closed."""
    await asyncio.sleep(0)
    return [reader.at_eof() or reader.exception() is not None for reader, _ in streams]


async def evictions(http: httpx.AsyncClient, bound: str) -> float:
    """Return how many connections were cut for a bound."""
    text = (await http.get("/metrics")).text
    lines = [line for line in text.splitlines() if line.startswith(f'{EVICTED}{{bound="{bound}"}}')]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def limited(service: Service, **changes: Any) -> contextlib.AbstractAsyncContextManager[httpx.AsyncClient]:
    """Run a shim with other limits; no deadline ends a connection before its test does."""
    return shim_before(service.server.port, "", header_timeout_seconds=60, request_timeout_seconds=60, **changes)


async def test_the_oldest_without_an_authentic_request_makes_room(service: Service) -> None:
    """Idle connections fill all places, and only cut each other, the oldest first."""
    async with limited(service, max_connections=10) as http, strangers(http, 15) as streams:
        assert (await http.get("/healthz")).status_code == 200
        await until(lambda: _all_cut(streams[:6]))
        assert not any(await are_cut(streams[6:]))
        assert await evictions(http, "connections") == 6


async def _all_cut(streams: list[Stream]) -> bool:
    return all(await are_cut(streams))


async def test_held_bodies_are_bounded_together(service: Service) -> None:
    """Bodies that never end are cut, the oldest first, where they are more than the bound; a whole one gets in."""
    start = f"POST {PATH} HTTP/1.1\r\nhost: shim\r\ncontent-length: 250000\r\n\r\n".encode() + b"x" * 200_000
    async with limited(service, max_unverified_bytes=1024**2) as http, strangers(http, 8, start) as streams:
        await until(lambda: _all_cut(streams[:3]))
        whole = await http.post(PATH, content=b"x" * 200_000)
        assert whole.status_code == 401
        await until(lambda: _all_cut(streams[:4]))
        assert not any(await are_cut(streams[4:]))
        assert await evictions(http, "bytes") == 4


class Cuttable:
    """A connection that only says whether it was cut."""

    def __init__(self) -> None:
        self.is_cut = False

    def cut(self) -> None:
        """Be cut."""
        self.is_cut = True


def connections(connections_max: int, bytes_max: int = 1_000) -> ConnectionLimits:
    """Return the bounds of a shim without connections."""
    evicted = Counter("evicted", "Test.", ("bound",), registry=None)
    return ConnectionLimits(connections_max=connections_max, bytes_max=bytes_max, evicted=evicted)


def test_strangers_cut_no_connection_that_brought_an_authentic_request() -> None:
    """However many come while its request is applied, or before its next one."""
    bounds, honest = connections(10), Cuttable()
    bounds.add(honest)
    bounds.hold(honest, 100)
    bounds.release(honest, authentic=True)
    strangers = [Cuttable() for _ in range(100)]
    for stranger in strangers:
        bounds.add(stranger)

    assert not honest.is_cut
    assert [stranger.is_cut for stranger in strangers] == [True] * 91 + [False] * 9


def test_authentic_requests_leave_half_of_the_places_to_newcomers() -> None:
    """Whoever has captured a body keeps nobody out; of theirs, the longest ago goes first."""
    bounds, captured, newcomers = connections(10), [Cuttable() for _ in range(10)], [Cuttable() for _ in range(5)]
    for each in captured:
        bounds.add(each)
        bounds.release(each, authentic=True)
    bounds.release(captured[0], authentic=True)
    for each in newcomers:
        bounds.add(each)

    assert [each.is_cut for each in captured] == [False, *[True] * 5, *[False] * 4]
    assert not any(each.is_cut for each in newcomers)


def test_a_small_body_is_not_cut_for_large_ones() -> None:
    """Not even of the oldest stranger, and whoever's bytes reach the bound."""
    bounds, small, large = connections(10), Cuttable(), [Cuttable() for _ in range(4)]
    for each in (small, *large):
        bounds.add(each)
    for each in large[:3]:
        bounds.hold(each, 310)
    bounds.hold(small, 60)
    assert not any(each.is_cut for each in (small, *large))
    bounds.hold(large[3], 310)
    bounds.hold(small, 20)

    assert [each.is_cut for each in (small, *large)] == [False, True, True, False, False]


@pytest.mark.parametrize("size", [HEADER_BYTES_MAX + 1, 2 * HEADER_BYTES_MAX, 4 * HEADER_BYTES_MAX])
async def test_headers_of_one_write_are_bounded(service: Service, size: int) -> None:
    """A request whose headers are complete, and too large, is refused like one that is still sending them."""
    line = b"GET /healthz HTTP/1.1\r\nhost: shim\r\n"
    headers = b"".join(b"x-%05d: %s\r\n" % (number, b"v" * 1_000) for number in range(size // 1_000))
    request = (line + headers + b"x-last: ").ljust(size - 4, b"v") + b"\r\n\r\n"
    async with limited(service) as http, strangers(http, 1, request) as [(reader, _)]:
        assert (await reader.readline()).startswith(b"HTTP/1.1 431 ")


async def test_the_largest_headers_and_body_arrive_together(service: Service) -> None:
    """One read may bring headers and a body that are each within their limits, and together beyond the smaller one."""
    head = f"POST {PATH} HTTP/1.1\r\nhost: shim\r\ncontent-length: 262144\r\n".encode()
    request = (head + b"x-last: ").ljust(HEADER_BYTES_MAX - 4, b"v") + b"\r\n\r\n" + b"x" * 262_144
    async with limited(service) as http, strangers(http, 1, request) as [(reader, _)]:
        assert (await reader.readline()).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("last", ["keep-alive ends", "refused", "answered"])
async def test_a_client_that_reads_nothing_is_cut(last: str) -> None:
    """A transport that closes waits for its client to read what is left, so that the wait has an end."""
    transport = UnreadTransport()
    state = {"settings": ShimSettings(request_timeout_seconds=0.05), "connection_limits": connections(10)}
    protocol = LimitedHttpProtocol(uvicorn.Config(healthy, ws="none", log_config=None), ServerState(), state)
    protocol.connection_made(transport)
    if last == "refused":
        protocol.data_received(b"no HTTP\r\n\r\n")
    else:
        protocol.data_received(b"GET / HTTP/1.1\r\nhost: shim\r\nconnection: close\r\n\r\n")
    if last == "keep-alive ends":
        protocol.timeout_keep_alive_handler()

    await until(lambda: transport.is_aborted, 1)
    assert transport.is_closed


async def test_a_closed_connection_leaves_nothing_to_the_garbage_collector() -> None:
    """Which comes after thousands of objects: those of many connections, each with the headers of its requests."""
    gc.disable()
    try:
        closed = await closed_connection()
        await until(lambda: closed() is None, 1)
    finally:
        gc.enable()


async def closed_connection() -> weakref.ref[LimitedHttpProtocol]:
    """Return a connection that was lost after three requests."""
    state = {"settings": ShimSettings(), "connection_limits": connections(10)}
    protocol = LimitedHttpProtocol(uvicorn.Config(healthy, ws="none", log_config=None), ServerState(), state)
    protocol.connection_made(UnreadTransport())
    protocol.data_received(3 * b"GET / HTTP/1.1\r\nhost: shim\r\n\r\n")
    await until(lambda: protocol.cycle.response_complete, 1)
    protocol.connection_lost(ConnectionResetError())
    return weakref.ref(protocol)


async def healthy(_scope: Any, _receive: Any, send: Any) -> None:
    """Answer every request with nothing."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


class UnreadTransport(asyncio.Transport):
    """A connection whose client reads nothing: it never closes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.is_closed = self.is_aborted = False

    def write(self, data: Any) -> None:
        """Keep nothing."""

    def is_closing(self) -> bool:
        """Return whether it was closed."""
        return self.is_closed

    def close(self) -> None:
        """Wait for the client."""
        self.is_closed = True

    def abort(self) -> None:
        """End."""
        self.is_closed = self.is_aborted = True

    def pause_reading(self) -> None:
        """Read on."""

    def resume_reading(self) -> None:
        """Read on."""


async def test_strangers_write_no_log(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """What is no HTTP, forged, or for nothing that there is, is answered, and counted at most."""
    async with limited(service) as http:
        with caplog.at_level(logging.WARNING):
            async with strangers(http, 5, b"\x16\x03\x01 no HTTP\r\n\r\n") as streams:
                answers = [await reader.readline() for reader, _ in streams]
            forged = [(await http.post(PATH, content=b"{}")).status_code for _ in range(5)]
            missing = (await http.get("/nothing")).status_code

    assert [answer[:13] for answer in answers] == [b"HTTP/1.1 400 "] * 5
    assert (forged, missing) == ([401] * 5, 404)
    assert not caplog.records


async def test_metrics_have_an_address_of_their_own(service: Service) -> None:
    """There is nothing else there, and no metrics on the port of the webhooks."""
    async with shim_before(service.server.port, "", shim_metrics_address="") as http:
        assert (await http.get("/metrics")).status_code == 404
        assert (await http.get("/healthz")).status_code == 200
    async with shim_before(service.server.port, "", shim_metrics_address="localhost:0") as http:
        assert (await http.get("/metrics")).status_code == 404

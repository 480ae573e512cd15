"""HTTP of the shim: size limits, deadlines, disconnects, draining, corruption."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator

import httpx
import pytest
import structlog

from shopline_shim.http_protocol import LimitedHttpProtocol
from support.fake_servers import (
    RAW_BODY,
    RunningShim,
    raw_request,
    read_until_closed,
    shim_with_fakes,
    signed_headers,
)
from support.shims import PATH
from support.waiting import until


async def test_body_of_the_maximum_size_is_accepted() -> None:
    async with shim_with_fakes(max_body_bytes=10_000) as shim:
        largest = RAW_BODY + b" " * (10_000 - len(RAW_BODY))

        async def chunks(raw_body: bytes) -> AsyncIterator[bytes]:
            for start in range(0, len(raw_body), 1000):
                yield raw_body[start : start + 1000]

        for raw_body, status in [(largest, 200), (largest + b" ", 413)]:
            headers = signed_headers(raw_body)
            whole = await shim.client.post(PATH, content=raw_body, headers=headers)
            chunked = await shim.client.post(PATH, content=chunks(raw_body), headers=headers)
            assert [whole.status_code, chunked.status_code] == [status, status]


@pytest.mark.parametrize("length", ["300000", "0" * 5_000 + "300000", "9" * 18])
async def test_declared_length_above_the_limit_is_413_before_the_body(shim: RunningShim, length: str) -> None:
    reader, writer = await shim.connect()
    writer.write(raw_request(b"", length=length))

    status_line = await asyncio.wait_for(reader.readuntil(b"\r\n"), 2)

    assert status_line.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", [PATH, "/elsewhere"])
async def test_endless_body_is_cut_off_at_the_limit(shim: RunningShim, path: str) -> None:
    reader, writer = await shim.connect()
    writer.write(raw_request(b"", chunked=True).replace(PATH.encode(), path.encode()))
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 50_000_000:
            writer.write(b"10000\r\n" + b"a" * 65_536 + b"\r\n")
            sent += 65_536
            await writer.drain()

    # Bytes in the kernel's buffers count as sent, so the shim has read less than this.
    assert sent < 20_000_000
    assert b" 200 " not in await asyncio.wait_for(read_until_closed(reader), 2)


async def test_endless_trailers_are_cut_off(shim: RunningShim) -> None:
    reader, writer = await shim.connect()
    writer.write(raw_request(b"", chunked=True) + b"0\r\n")
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 50_000_000:
            writer.write(b"x-trailer: " + b"a" * 65_536 + b"\r\n")
            sent += 65_536
            await writer.drain()

    assert sent < 20_000_000
    await asyncio.wait_for(read_until_closed(reader), 2)


async def test_headers_above_the_limit_are_431(shim: RunningShim) -> None:
    reader, writer = await shim.connect()
    writer.write(b"GET /healthz HTTP/1.1\r\n" + b"x-large: " + b"a" * 70_000)

    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert response.startswith(b"HTTP/1.1 431 ")


async def test_pipelined_requests_are_limited(shim: RunningShim) -> None:
    reader, writer = await shim.connect()
    request = b"GET /healthz HTTP/1.1\r\nhost: shim\r\n\r\n"
    writer.write(request * 3)
    for _ in range(3):
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"alive\n"), 2)
    writer.write(request * 1000)

    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert b" 400 " in response


async def test_bytes_that_are_not_http_are_a_400_problem(shim: RunningShim) -> None:
    reader, writer = await shim.connect()
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")

    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert response.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json")


@pytest.fixture(scope="module")
async def shim_with_short_deadlines() -> AsyncIterator[RunningShim]:
    """A shim with deadlines that are short enough for tests."""
    async with shim_with_fakes(header_timeout_seconds=0.3, request_timeout_seconds=0.6) as running:
        yield running


async def dribble(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte every 20 ms."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("start", [b"", b"POST /webhooks/shopline HTTP/1.1\r\nx-slow: ", b"\r\n"])
async def test_headers_that_exceed_their_deadline_are_408(shim_with_short_deadlines: RunningShim, start: bytes) -> None:
    reader, writer = await shim_with_short_deadlines.connect()
    started = time.monotonic()
    writer.write(start)

    dribbling = asyncio.create_task(dribble(writer, b"a" * 100 if start.startswith(b"POST") else b"\r\n" * 50))
    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert response.startswith(b"HTTP/1.1 408 ")
    assert 0.25 < time.monotonic() - started < 1
    await dribbling


async def test_header_deadline_holds_on_a_kept_alive_connection(shim_with_short_deadlines: RunningShim) -> None:
    reader, writer = await shim_with_short_deadlines.connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: shim\r\n\r\n")
    await reader.readuntil(b"alive\n")
    started = time.monotonic()
    dribbling = asyncio.create_task(dribble(writer, b"GET /healthz HTTP/1.1\r\nhost: " + b"a" * 100))

    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert response.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 1
    await dribbling


@pytest.mark.parametrize("chunked", [True, False])
async def test_body_that_exceeds_its_deadline_is_408(shim_with_short_deadlines: RunningShim, chunked: bool) -> None:  # noqa: FBT001 - a parameter of the test
    reader, writer = await shim_with_short_deadlines.connect()
    started = time.monotonic()
    writer.write(raw_request(RAW_BODY, chunked=chunked))
    dribbling = asyncio.create_task(dribble(writer, b"1\r\na\r\n" * 20))

    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert response.startswith(b"HTTP/1.1 408 ")
    assert 0.5 < time.monotonic() - started < 1.5
    await dribbling


async def test_slow_body_after_its_response_ends_the_connection(shim_with_short_deadlines: RunningShim) -> None:
    reader, writer = await shim_with_short_deadlines.connect()
    writer.write(raw_request(RAW_BODY, chunked=True).replace(PATH.encode(), b"/elsewhere"))
    dribbling = asyncio.create_task(dribble(writer, b"1\r\na\r\n" * 20))

    response = await asyncio.wait_for(read_until_closed(reader), 2)

    assert response.startswith(b"HTTP/1.1 404 ")
    assert response.count(b"HTTP/1.1") == 1
    await dribbling


async def test_idle_connection_is_kept_between_requests(shim_with_short_deadlines: RunningShim) -> None:
    for _ in range(2):
        assert (await shim_with_short_deadlines.post()).status_code == 200
        await asyncio.sleep(0.7)


async def test_slow_clients_do_not_delay_others(shim: RunningShim) -> None:
    async def seconds_of_posts() -> float:
        started = time.monotonic()
        for _ in range(20):
            assert (await shim.post()).status_code == 200
        return time.monotonic() - started

    alone_seconds = await seconds_of_posts()
    for _ in range(200):
        _, writer = await shim.connect()
        writer.write(b"POST /webhooks/shopline HTTP/1.1\r\nx-slow: ")
    assert await seconds_of_posts() < max(2, 4 * alone_seconds)


async def test_disconnect_within_the_body_applies_nothing(shim: RunningShim) -> None:
    with structlog.testing.capture_logs() as logs:
        _, writer = await shim.connect()
        writer.write(raw_request(RAW_BODY) + RAW_BODY[:10])
        await writer.drain()
        writer.close()
        await until(lambda: bool(logs))

    assert [entry["outcome"] for entry in logs] == ["incomplete"]
    assert not shim.points.updates


async def test_stop_waits_for_running_requests() -> None:
    async with shim_with_fakes(drain_timeout_seconds=2) as shim:
        shim.points.delay_seconds = 0.5
        posting = asyncio.create_task(shim.post())
        await shim.points.called.wait()
        shim.stop.set()

        assert (await posting).status_code == 200
        await asyncio.wait_for(shim.serving, 2)
        with pytest.raises(httpx.ConnectError):
            await shim.post()


async def test_request_still_running_after_the_drain_timeout_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[bytes] = []
    data_received = LimitedHttpProtocol.data_received

    def count_received(self: LimitedHttpProtocol, data: bytes) -> None:
        data_received(self, data)
        received.append(data)

    monkeypatch.setattr(LimitedHttpProtocol, "data_received", count_received)
    async with shim_with_fakes(drain_timeout_seconds=1) as shim:
        reader, writer = await shim.connect()
        writer.write(raw_request(RAW_BODY))
        _, idle = await shim.connect()
        idle.write(b"POST ")
        await until(lambda: len(received) == 2)
        shim.stop.set()
        started = time.monotonic()

        response = await asyncio.wait_for(read_until_closed(reader), 3)
        await asyncio.wait_for(shim.serving, 3)

        assert response.startswith(b"HTTP/1.1 503 ")
        assert time.monotonic() - started < 2


async def test_responses_are_sent_without_waiting_for_acknowledgements(shim: RunningShim) -> None:
    """Nagle's algorithm would delay each response by 40 ms on a kept-alive connection."""
    started = time.monotonic()

    await shim.deliver_all(iter([RAW_BODY] * 25))

    assert time.monotonic() - started < 0.8


async def test_corrupted_requests_cause_no_5xx(shim: RunningShim) -> None:
    generator = random.Random(19700101)  # noqa: S311 - repeatable
    whole = raw_request(RAW_BODY) + RAW_BODY

    async def send(request: bytes) -> bytes:
        reader, writer = await shim.connect()
        writer.write(request)
        writer.write_eof()
        return await asyncio.wait_for(read_until_closed(reader), 5)

    corrupted = []
    for _ in range(300):
        request = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            request[generator.randrange(len(request))] = generator.randrange(256)
        corrupted.append(bytes(request))
    responses = await asyncio.gather(*(send(request) for request in corrupted))

    assert not [response for response in responses if response.startswith(b"HTTP/1.1 5")]
    assert (await shim.post()).status_code == 200


async def test_content_length_may_have_leading_zeros(shim: RunningShim) -> None:
    reader, writer = await shim.connect()
    writer.write(raw_request(RAW_BODY, length="0" * 5_000 + str(len(RAW_BODY))) + RAW_BODY)

    status_line = await asyncio.wait_for(reader.readuntil(b"\r\n"), 2)

    assert status_line.startswith(b"HTTP/1.1 200 ")

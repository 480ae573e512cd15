"""Attacks without a token: their effect on honest callers and resources."""

import asyncio
import base64
import contextlib
import hmac
import json
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import asyncpg
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointbook_cli.embedded_postgres import EmbeddedPostgres
from support.deployments import SECRET, Deployment, resident_mb
from support.honest_client import P99_RATIO_MAX, TOPIC, HonestClient, LatencyReport, median_p99_ms, p99_ratio
from support.http2 import (
    HEALTH_WATCH,
    INITIAL_WINDOW_SIZE,
    PREFACE,
    Http2Connection,
    grpc_message,
    http2,
)
from support.probes import grpc_health
from support.waiting import until

pytestmark = pytest.mark.soak

Figure = Callable[[str, float | str, str], None]
STREAMS_PER_CONNECTION = 100
ROUNDS = 3
ROUND_SECONDS = 2.0
MEMORY_GROWTH_MB_MAX = 100.0
APPLY = "/pointbook.v1.PointsService/ApplyPointsUpdate"
LARGE_BODY_BYTES = 250_000


@contextlib.asynccontextmanager
async def unread_health_watch(address: str) -> AsyncIterator[None]:
    """Watch the health of a server during the block without reading the response."""
    async with http2(address, settings={INITIAL_WINDOW_SIZE: 0}) as (connection,):
        await connection.call(HEALTH_WATCH)
        # After a response to a later call, the watch is in progress.
        assert await grpc_health(address) == "SERVING"
        await asyncio.sleep(0.2)
        yield


@contextlib.asynccontextmanager
async def background(*coroutines: Awaitable[object]) -> AsyncIterator[None]:
    """Run an attack during the block."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def compare(
    honest: HonestClient, attack: contextlib.AbstractAsyncContextManager[object], rounds: int = ROUNDS
) -> tuple[float, list[LatencyReport], float]:
    """Measure honest calls before, during and after an attack.

    Returns the ratio of the p99 during the attack to the baseline, the reports during it, and the baseline.
    """
    await honest.call(1.0)
    without = await honest.rounds(rounds - 1, ROUND_SECONDS)
    async with attack:
        during = await honest.rounds(rounds, ROUND_SECONDS)
    await honest.call(1.0)
    without += await honest.rounds(rounds - 1, ROUND_SECONDS)
    return p99_ratio(without, during), during, median_p99_ms(without)


def format_reports(during: list[LatencyReport], baseline: float) -> str:
    """Return the p99 and failures during an attack as a figure."""
    failed, calls = sum(each.failed for each in during), sum(each.calls for each in during)
    return f"{median_p99_ms(during):.1f}/{baseline:.1f} ms, {failed}/{calls}"


@contextlib.contextmanager
def sampled_memory(pid: int) -> Iterator[list[float]]:
    """Sample a process's memory ten times a second during the block."""
    samples = [resident_mb(pid)]

    async def sample() -> None:
        while True:
            samples.append(resident_mb(pid))
            await asyncio.sleep(0.1)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()


async def test_unread_health_watch_blocks_neither_health_nor_sigterm(
    postgres: EmbeddedPostgres, deployment: Deployment, figure: Figure
) -> None:
    async with deployment.server() as server, unread_health_watch(deployment.grpc_address):
        await postgres.stop()

        async def is_not_serving() -> bool:
            return await grpc_health(deployment.grpc_address) == "NOT_SERVING"

        try:
            health_seconds = await until(is_not_serving, seconds=15.0)
        except TimeoutError:
            health_seconds = float("inf")
        started = time.monotonic()
        server.process.terminate()
        try:
            exit_code = await server.wait(30.0)
            stop_seconds = time.monotonic() - started
        except TimeoutError:
            exit_code, stop_seconds = -1, float("inf")
    figure(
        "unread health watch: seconds until health reports the stopped database", health_seconds, "<= 3 (timeout 15)"
    )
    figure("unread health watch: seconds from SIGTERM to the exit", stop_seconds, "< 10 (timeout 30)")
    assert (health_seconds <= 3.0, stop_seconds < 10.0, exit_code) == (True, True, 0)


async def _first_status(address: str) -> str:
    """Return the first status of a health watch, or the code of its error."""
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=5.0)
        try:
            async for response in watch:
                return str(health_pb2.HealthCheckResponse.ServingStatus.Name(response.status))
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "ENDED"


@pytest.mark.parametrize(("connections", "streams"), [(2, 75), (100, 10)])
async def test_many_health_watches_leave_capacity_for_others(
    deployment: Deployment, figure: Figure, connections: int, streams: int
) -> None:
    async with deployment.server(), http2(deployment.grpc_address, connections) as attackers:
        for connection in attackers:
            with contextlib.suppress(OSError):
                for _ in range(streams):
                    await connection.call(HEALTH_WATCH)
        await asyncio.sleep(1.0)
        statuses = [await _first_status(deployment.grpc_address) for _ in range(10)]
        checked = await grpc_health(deployment.grpc_address)
    watched = statuses.count("SERVING")
    figure(f"{connections} x {streams} health watches: honest watches served, of 10", float(watched), "10")
    assert (watched, checked) == (10, "SERVING"), statuses


@contextlib.asynccontextmanager
async def unfinished_messages(address: str, connections: int) -> AsyncIterator[None]:
    """Send most bytes of many large messages during the block, and finish none."""
    body = grpc_message(secrets.token_bytes(1024 * 1024 - 64), declared_bytes=1024 * 1024 - 1)

    async def send(connection: Http2Connection) -> None:
        with contextlib.suppress(OSError):
            stream_id = await connection.start(APPLY)
            await connection.send(stream_id, body)

    async def attack() -> None:
        async with http2(address, connections) as attackers:
            sends = [send(each) for each in attackers for _ in range(STREAMS_PER_CONNECTION)]
            await asyncio.gather(*sends)
            await asyncio.Event().wait()

    async with background(attack()):
        yield


async def test_unfinished_messages_use_little_memory(deployment: Deployment, figure: Figure) -> None:
    """800 streams without a token send almost 1 MiB each, and never end."""
    async with deployment.server() as server, deployment.honest_calls() as honest:
        client = await deployment.client()
        pid = server.process.pid
        await honest.call(1.0)
        with sampled_memory(pid) as memory:
            ratio, during, baseline = await compare(honest, unfinished_messages(deployment.grpc_address, 8))
        await client.close()
    figure("unfinished messages: server's memory before, MB", memory[0], "")
    figure("unfinished messages: maximum memory, MB", max(memory), "< 200, + < 100")
    figure("unfinished messages: honest p99 during/before, failed", format_reports(during, baseline), "")
    figure("unfinished messages: ratio of the p99", ratio, "<= 2")
    assert max(memory) - memory[0] < MEMORY_GROWTH_MB_MAX
    assert max(memory) < 200.0
    assert ratio <= P99_RATIO_MAX
    assert sum(each.failed for each in during) == 0


@contextlib.asynccontextmanager
async def calls_with_forged_tokens(address: str, calls: int) -> AsyncIterator[None]:
    """Run a number of concurrent calls with forged tokens during the block."""

    async def repeat(connection: Http2Connection) -> None:
        with contextlib.suppress(OSError):
            while not connection.closed.is_set():
                for _ in range(STREAMS_PER_CONNECTION - (connection.started - len(connection.ended))):
                    token = f"pb_{secrets.token_hex(8)}_{secrets.token_urlsafe(32)}"
                    await connection.call(APPLY, metadata=[("authorization", f"Bearer {token}")])
                connection.stream_ended.clear()
                await connection.stream_ended.wait()

    async def attack() -> None:
        async with http2(address, calls // STREAMS_PER_CONNECTION) as attackers:
            await asyncio.gather(*(repeat(each) for each in attackers))

    async with background(attack()):
        yield


async def test_calls_with_forged_tokens_displace_no_honest_calls(deployment: Deployment, figure: Figure) -> None:
    """1,200 calls with tokens that do not exist are in progress at any time."""
    async with deployment.server() as server, deployment.honest_calls() as honest:
        client = await deployment.client()
        logged_before = len(server.err)
        started = time.monotonic()
        ratio, during, baseline = await compare(
            honest, calls_with_forged_tokens(deployment.grpc_address, 1_200), rounds=4
        )
        seconds = time.monotonic() - started
        logged_kb = (len(server.err) - logged_before) / 1_000
        await client.close()
    failed, calls = sum(each.failed for each in during), sum(each.calls for each in during)
    figure("forged tokens: share of failed honest calls, %", 100 * failed / calls, "0")
    figure("forged tokens: log, kB", logged_kb, f"< 100 (in {seconds:.0f} s)")
    figure("forged tokens: honest p99 during/before, failed", format_reports(during, baseline), "")
    figure("forged tokens: ratio of the p99", ratio, "<= 2")
    assert failed == 0, [each.failures for each in during]
    assert logged_kb < 100.0
    assert ratio <= P99_RATIO_MAX


async def test_idle_connections_beyond_the_file_limit_stop_no_server(deployment: Deployment, figure: Figure) -> None:
    """1,100 connections send nothing; the soft limit on open files is 1,024."""
    async with deployment.server_with_files(1_024) as server, deployment.honest_calls() as honest:
        client = await deployment.client()
        async with idle_connections(deployment.grpc_address, 1_100):
            report = await honest.call(4.0)
            alive = server.process.returncode is None
            health = await grpc_health(deployment.grpc_address)
        account_code = "OK"
        try:
            await client.account(deployment.shop.merchant_id, deployment.shop.store_id, "honest-0")
        except grpc.aio.AioRpcError as error:
            account_code = error.code().name
        await client.close()
    figure("idle connections: server alive, health", f"{alive}, {health}", "True, SERVING")
    figure("idle connections: failed honest calls", f"{report.failed}/{report.calls}", "0")
    assert (alive, health, account_code, report.failed) == (True, "SERVING", "OK", 0), report.failures


@contextlib.asynccontextmanager
async def idle_connections(address: str, count: int) -> AsyncIterator[list[asyncio.StreamWriter]]:
    """Open a number of connections during the block, and send nothing."""
    host, _, port = address.rpartition(":")
    writers: list[asyncio.StreamWriter] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                async with asyncio.timeout(1.0):
                    _, writer = await asyncio.open_connection(host, int(port))
                    writers.append(writer)
        yield writers
    finally:
        for writer in writers:
            writer.transport.abort()


def captured_webhook(deployment: Deployment) -> tuple[bytes, str]:
    """Return a large webhook with SHOPLINE's signature."""
    body = {
        "buyer_id": "captured",
        "store_id": deployment.shop.store_id,
        "update_type": "INCREASE",
        "updated_at": int(time.time() * 1_000),
        "updated_scene": "SUCCESSFUL_ORDERS",
        "updated_value": 1,
        "note": secrets.token_urlsafe(LARGE_BODY_BYTES * 3 // 4),
    }
    raw = json.dumps(body).encode()
    return raw, base64.b64encode(hmac.digest(SECRET.encode(), raw, "sha256")).decode()


async def _replay(address: str, raw: bytes, headers: dict[str, str]) -> str:
    """Deliver a body, and return the status."""
    host, _, port = address.rpartition(":")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /webhooks/shopline HTTP/1.1\r\nHost: {address}\r\nContent-Length: {len(raw)}\r\n{lines}\r\n"
    try:
        async with asyncio.timeout(15.0):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(head.encode() + raw)
            status = (await reader.readline())[9:12].decode()
            writer.close()
    except (OSError, TimeoutError) as error:
        return type(error).__name__
    return status


async def _database_bytes(url: str) -> int:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("CHECKPOINT")
        return int(await connection.fetchval("SELECT pg_database_size(current_database())"))
    finally:
        await connection.close()


async def test_replays_of_one_webhook_fill_no_disk(deployment: Deployment, figure: Figure) -> None:
    """400 copies of a signed body name 200 merchants, each copy with other headers."""
    raw, signature = captured_webhook(deployment)
    connections = asyncio.Semaphore(16)

    async def replay(number: int) -> str:
        async with connections:
            return await _replay(
                deployment.http_address,
                raw,
                {
                    "X-Shopline-Topic": TOPIC,
                    "X-Shopline-Hmac-Sha256": signature,
                    "X-Shopline-Merchant-Id": f"invented-{number % 200}",
                    "X-Shopline-Shop-Id": deployment.shop.store_id if number < 200 else f"other-{number}",
                    "X-Shopline-Webhook-Id": secrets.token_hex(8),
                    f"X-Filler-{number}": secrets.token_hex(2_000),
                },
            )

    async with deployment.server(), deployment.shim():
        client = await deployment.client()
        before = await _database_bytes(deployment.database_url)
        started = time.monotonic()
        statuses = await asyncio.gather(*(replay(number) for number in range(400)))
        seconds = time.monotonic() - started
        grown_mb = (await _database_bytes(deployment.database_url) - before) / 1_000_000
        await client.close()
    counts = {status: statuses.count(status) for status in sorted(set(statuses))}
    figure("400 replays for 200 merchants: growth of the database, MB", grown_mb, f"< 2 ({seconds:.0f} s, {counts})")
    assert grown_mb < 2.0


@contextlib.asynccontextmanager
async def slow_connections(address: str, count: int, start: bytes, then: bytes) -> AsyncIterator[None]:
    """Hold a number of connections open that send bytes every second.

    They reconnect when they are closed.
    """
    host, _, port = address.rpartition(":")

    async def crawl(delay: float) -> None:
        await asyncio.sleep(delay)
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
            except OSError:
                await asyncio.sleep(1.0)
                continue
            try:
                writer.write(start)
                while not reader.at_eof():
                    writer.write(then)
                    await writer.drain()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(1.0):
                            await reader.read(4_096)
            except OSError:
                pass
            finally:
                writer.transport.abort()
            await asyncio.sleep(1.0)

    async with background(*(crawl(number / count) for number in range(count))):
        await asyncio.sleep(1.5)
        yield


async def test_slow_http_headers_delay_no_webhook(deployment: Deployment, figure: Figure) -> None:
    """1,000 connections to the shim send a byte of their headers per second."""
    async with deployment.server(), deployment.shim(), deployment.honest_webhooks() as honest:
        client = await deployment.client()
        start = b"POST /webhooks/shopline HTTP/1.1\r\nHost: x\r\nX-Slow: "
        attack = slow_connections(deployment.http_address, 1_000, start, b"a")
        ratio, during, baseline = await compare(honest, attack)
        await client.close()
    figure("slow HTTP headers: honest p99 during/before, failed", format_reports(during, baseline), "")
    figure("slow HTTP headers: ratio of the p99", ratio, "<= 2")
    assert sum(each.failed for each in during) == 0, [each.failures for each in during]
    assert ratio <= P99_RATIO_MAX


@pytest.mark.parametrize("part", ["preface", "settings"])
async def test_slow_http2_frames_delay_no_call(deployment: Deployment, figure: Figure, part: str) -> None:
    """1,000 connections send a byte of the preface or of a frame per second."""
    start, then = {"preface": (PREFACE[:1], b""), "settings": (PREFACE + b"\0\0\x10", b"\0")}[part]
    async with deployment.server(), deployment.honest_calls() as honest:
        client = await deployment.client()
        attack = slow_connections(deployment.grpc_address, 1_000, start, then)
        ratio, during, baseline = await compare(honest, attack)
        await client.close()
    figure(f"slow HTTP/2 {part}: honest p99 during/before, failed", format_reports(during, baseline), "")
    figure(f"slow HTTP/2 {part}: ratio of the p99", ratio, "<= 2")
    assert sum(each.failed for each in during) == 0, [each.failures for each in during]
    assert ratio <= P99_RATIO_MAX

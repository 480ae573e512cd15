"""Limits on callers before and after authentication."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from pointbook.v1 import points_pb2
from pointbook_client.testing.ports import free_port
from pointbook_server.access import token_cache as token_cache_module
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.rpc import admission as admission_module
from pointbook_server.rpc import call_log as call_log_module
from pointbook_server.rpc import health as health_module
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.rpc import pacer as pacer_module
from pointbook_server.rpc.pacer import Pacer
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import TestClock
from support.database_proxy import proxied
from support.embedded_database import Cluster
from support.http2 import (
    HEADER_TABLE_SIZE,
    HEALTH_CHECK,
    HEALTH_WATCH,
    INITIAL_WINDOW_SIZE,
    Http2Connection,
    grpc_message,
    header_value,
    http2,
)
from support.json_logs import json_logs
from support.probes import grpc_health
from support.processes import pointbook
from support.refusals import refusal, refused
from support.servers import running_server, server_settings, until_calls_end
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
APPLY = "/pointbook.v1.PointsService/ApplyPointsUpdate"
GET_ACCOUNT = "/pointbook.v1.PointsService/GetPointsAccount"


@contextlib.asynccontextmanager
async def calling(port: int, token: str = "") -> AsyncIterator[Client]:
    """Open a client with a connection of its own."""
    client = Client(port, token, [("grpc.use_local_subchannel_pool", 1)])
    try:
        yield client
    finally:
        await client.close()


def address_of(server: Server) -> str:
    """Return a server's address."""
    return f"127.0.0.1:{server.port}"


def account(client: Client) -> Awaitable[Any]:
    """Read an account."""
    return client.account("any", "any", "any")


def watch(client: Client) -> Any:
    """Watch a server's health."""
    return health_pb2_grpc.HealthStub(client.channel).Watch(health_pb2.HealthCheckRequest())


async def end_of(stream: Any) -> grpc.aio.AioRpcError:
    """Read a stream until its error, and return that."""
    try:
        async for _ in stream:
            pass
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the stream ended well")


def has_ended(connection: Http2Connection, *streams: int) -> Callable[[], bool]:
    """Return the condition that the server has ended streams."""
    return lambda: set(streams) <= connection.ended


def has_received(connection: Http2Connection, stream: int) -> Callable[[], bool]:
    """Return the condition that the client has received a message of a stream."""
    return lambda: stream in connection.received


async def stalled_calls(connection: Http2Connection, count: int, token: str = "") -> list[int]:
    """Start calls whose requests never arrive."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    return [await connection.start(GET_ACCOUNT, metadata) for _ in range(count)]


async def test_unread_watch_blocks_neither_health_nor_shutdown(cluster: Cluster, database_url: str) -> None:
    own_url = await cluster.clone("pointbook_template")
    assert own_url != database_url
    async with proxied(own_url) as proxy:
        server = Server(server_settings(), proxy.url, senders={})
        await server.start()
        async with (
            http2(address_of(server), settings={INITIAL_WINDOW_SIZE: 0}) as (connection,),
            calling(server.port) as client,
        ):
            await connection.call(HEALTH_WATCH)
            watching = watch(client)
            assert (await watching.read()).status == SERVING
            await proxy.cut()
            assert (await asyncio.wait_for(watching.read(), 3)).status == NOT_SERVING
            assert await grpc_health(address_of(server)) == "NOT_SERVING"

            await asyncio.wait_for(server.stop(), 5)
            with pytest.raises(grpc.aio.AioRpcError, match="UNAVAILABLE"):
                await watching.read()


async def test_watch_gets_only_the_latest_status(database_url: str) -> None:
    """A status that changed back before it was written is skipped."""
    async with running_server(database_url) as (server, _), calling(server.port) as client:
        stub = health_pb2_grpc.HealthStub(client.channel)
        unknown = stub.Watch(health_pb2.HealthCheckRequest(service="nothing"))
        assert (await unknown.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watching = watch(client)
        assert (await watching.read()).status == SERVING
        for serving in (False, True, False):
            server._health.set_serving(serving)
        assert (await watching.read()).status == NOT_SERVING
        assert (await watching.read()).status == SERVING  # The next check of the database.
        unknown.cancel()
        watching.cancel()


@pytest.mark.parametrize("method", [HEALTH_CHECK, HEALTH_WATCH])
async def test_connection_that_does_not_read_gets_no_further_stream(
    database_url: str, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Unread responses stay in memory until their connection ends."""
    monkeypatch.setattr(health_module, "WRITE_SECONDS_MAX", 0.2)
    async with (
        running_server(database_url) as (server, _),
        http2(address_of(server), settings={INITIAL_WINDOW_SIZE: 0}) as (own,),
    ):
        unread = [await own.call(method) for _ in range(5)]
        await until(lambda: sum(server._health._listeners[0].unread.values()) == len(unread))
        further = await own.call(method)
        await until(has_ended(own, further))
        assert not own.ended & set(unread)
        assert await grpc_health(address_of(server)) == "SERVING"
        await own.close()
        await until(lambda: not server._health._listeners[0].unread)


async def test_watches_of_a_connection_are_limited(database_url: str) -> None:
    async with (
        running_server(database_url) as (server, _),
        calling(server.port) as client,
        calling(server.port) as other,
    ):
        watches = [watch(client) for _ in range(health_module.STREAMS_OF_CONNECTION_MAX)]
        for each in watches:
            assert (await each.read()).status == SERVING
        status = refusal(await end_of(watch(client)))
        assert (status.code, status.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert (await watch(other).read()).status == SERVING
        assert not any(each.done() for each in watches)


async def test_watches_of_other_connections_lock_out_no_client(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the limit, the connection with the most watches loses its oldest one."""
    monkeypatch.setattr(health_module, "WATCHES_MAX", 12)
    async with running_server(database_url) as (server, _), http2(address_of(server), 3) as connections:
        server_address = address_of(server)
        oldest = []
        for connection in connections:
            streams = []
            for _ in range(4):
                streams.append(await connection.call(HEALTH_WATCH))
                # gRPC may accept the streams of a connection in any order, so each must be served before the next.
                await until(has_received(connection, streams[-1]))
            oldest.append({streams[0]})
        async with calling(server.port) as client:
            client_watches = [watch(client) for _ in range(3)]
            for each in client_watches:
                assert (await each.read()).status == SERVING
            await until(lambda: sum(len(each.ended) for each in connections) == 3)
            assert [each.ended for each in connections] == oldest
            assert not any(each.done() for each in client_watches)
            assert await grpc_health(server_address) == "SERVING"


async def test_unfinished_health_requests_time_out_and_lock_out_no_probe(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health_module, "READ_SECONDS_MAX", 0.5)
    monkeypatch.setattr(health_module, "READS_MAX", 8)
    async with running_server(database_url) as (server, _), http2(address_of(server), 3) as connections:
        started = []
        for connection in connections:
            for method in (HEALTH_CHECK, HEALTH_WATCH) * 4:
                stream = await connection.start(method)
                await connection.send(stream, grpc_message(b"x", declared_bytes=1024 * 1024))
                started.append((connection, stream))
        assert await grpc_health(address_of(server)) == "SERVING"
        for connection, stream in started:
            await until(has_ended(connection, stream))


async def test_displaced_health_request_ends_at_once(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise it could send bytes for as long as its refusal is delayed."""
    monkeypatch.setattr(health_module, "READS_MAX", 1)
    async with running_server(database_url) as (server, _), http2(address_of(server), 2) as (first, second):
        pacer = server._health._refused_pacer = Pacer(calls_per_second=0.01)
        waiting = [asyncio.create_task(pacer.wait()) for _ in range(2)]
        displaced = await first.start(HEALTH_CHECK)
        await until(lambda: server._health._listeners[0].reads._count == 1)
        await second.start(HEALTH_CHECK)
        await until(has_ended(first, displaced), 1.5)
        for task in waiting:
            task.cancel()


async def test_invalid_health_requests_are_refused(database_url: str) -> None:
    async with running_server(database_url) as (server, _), calling(server.port) as client:
        check: Any = client.channel.unary_unary(HEALTH_CHECK)
        status = await refused(check(health_pb2.HealthCheckRequest(service="x" * 300).SerializeToString()))
        assert (status.code, status.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
        status = await refused(check(b"\xff\xff"))
        assert (status.code, status.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")


async def test_unauthorized_calls_are_refused_before_their_requests_arrive(database_url: str, admin_token: str) -> None:
    reader = await make_token(database_url, [ALL_MERCHANTS], [Scope.POINTS_READ])
    async with running_server(database_url) as (server, _), http2(address_of(server)) as (connection,):
        refused_streams = [
            *await stalled_calls(connection, 1),
            *await stalled_calls(connection, 1, "pb_unknown_token"),
            await connection.start("/pointbook.v1.PointsService/Nothing"),
            await connection.start(
                "/pointbook.v1.PointsService/ApplyPointsUpdate", [("authorization", f"Bearer {reader}")]
            ),
        ]
        (admitted,) = await stalled_calls(connection, 1, admin_token)
        await until(has_ended(connection, *refused_streams), 5)
        assert admitted not in connection.ended


async def test_early_refusal_has_details_and_request_id(database_url: str) -> None:
    async with running_server(database_url) as (server, _), calling(server.port) as client:
        forever = asyncio.Event()

        async def never() -> AsyncIterator[bytes]:
            await forever.wait()
            yield b""

        stalled: Any = client.channel.stream_unary(GET_ACCOUNT)
        call = stalled(never(), metadata=(("x-request-id", "mine"),))
        status = await refused(call)
        assert (status.code, status.reason) == (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
        assert ("x-request-id", "mine") in tuple(await call.trailing_metadata())


async def test_request_must_arrive_in_time(
    database_url: str, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from authenticated callers."""
    monkeypatch.setattr(handlers_module, "REQUEST_SECONDS_MAX", 0.3)
    async with running_server(database_url) as (server, _), calling(server.port) as client:
        metadata = (("authorization", f"Bearer {admin_token}"),)
        forever = asyncio.Event()

        async def never() -> AsyncIterator[bytes]:
            await forever.wait()
            yield b""

        async def nothing() -> AsyncIterator[bytes]:
            return
            yield b""

        call: Any = client.channel.stream_unary(GET_ACCOUNT)
        status = await refused(call(never(), metadata=metadata))
        assert (status.code, status.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        status = await refused(call(nothing(), metadata=metadata))
        assert (status.code, status.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert not server._admission._running


async def test_unauthenticated_calls_do_not_count_against_the_call_limit(
    database_url: str, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "CALLS_MAX", 10)
    async with (
        running_server(database_url) as (server, _),
        http2(address_of(server), 2) as connections,
        calling(server.port, admin_token) as client,
    ):
        await account(client)
        for connection in connections:
            await stalled_calls(connection, 50, "pb_unknown_token")
        for _ in range(20):
            assert (await account(client)).points_balance == 0


async def test_running_calls_of_a_token_are_limited(database_url: str, admin_token: str) -> None:
    other = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    async with (
        running_server(database_url, token_calls_max=3) as (server, _),
        http2(address_of(server)) as (busy,),
        calling(server.port, admin_token) as client,
        calling(server.port, other) as other_client,
    ):
        stalled = await stalled_calls(busy, 3, admin_token)
        await until(lambda: len(server._admission._running) == 3)
        status = await refused(account(client))
        assert (status.code, status.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_LIMIT_REACHED")
        assert (status.metadata, status.retry_seconds) == ({"limit": "concurrent_calls", "max": "3"}, 1.0)
        assert (await account(other_client)).points_balance == 0
        await busy.reset(stalled[0])
        await until(lambda: len(server._admission._running) == 2)
        assert (await account(client)).points_balance == 0


async def test_calls_per_second_of_a_token_are_limited(database_url: str, admin_token: str) -> None:
    other = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    async with (
        running_server(database_url, token_calls_per_second_max=4) as (server, _),
        calling(server.port, admin_token) as client,
        calling(server.port, other) as other_client,
    ):
        for _ in range(4):
            await account(client)
        status = await refused(account(client))
        assert (status.code, status.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "TOKEN_LIMIT_REACHED")
        assert status.metadata == {"limit": "calls_per_second", "max": "4"}
        assert status.retry_seconds is not None
        assert 0 < status.retry_seconds <= 0.25
        assert (await account(other_client)).points_balance == 0
        await asyncio.sleep(status.retry_seconds)
        assert (await account(client)).points_balance == 0


async def test_waiting_calls_beyond_the_limit_are_refused_by_grpc(database_url: str, admin_token: str) -> None:
    async with (
        running_server(database_url, waiting_calls_max=5) as (server, _),
        http2(address_of(server), settings={HEADER_TABLE_SIZE: 0}) as (connection,),
    ):
        metadata = [("authorization", f"Bearer {admin_token}")]
        request = points_pb2.GetPointsAccountRequest(merchant_id="any", store_id="any", buyer_id="any")
        await until(has_ended(connection, await connection.call(GET_ACCOUNT, request.SerializeToString(), metadata)))
        calls = [await connection.call(GET_ACCOUNT, request.SerializeToString(), metadata) for _ in range(20)]
        # The event loop admits no call meanwhile, but gRPC receives them.
        time.sleep(0.5)  # noqa: ASYNC251 - the server's loop must be busy
        await until(has_ended(connection, *calls))
        codes = [int(header_value(connection.trailers[call], "grpc-status")) for call in calls]
        assert set(codes) == {grpc.StatusCode.OK.value[0], grpc.StatusCode.CANCELLED.value[0]}
        assert codes.count(grpc.StatusCode.CANCELLED.value[0]) >= 10
        again = await connection.call(GET_ACCOUNT, request.SerializeToString(), metadata)
        await until(has_ended(connection, again))
        assert header_value(connection.trailers[again], "grpc-status") == "0"


async def test_busy_tokens_leave_calls_for_quiet_tokens(
    database_url: str, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "CALLS_MAX", 20)
    monkeypatch.setattr(admission_module, "CALLS_RESERVED", 10)
    monkeypatch.setattr(admission_module, "FEW_CALLS", 2)
    other = await make_token(database_url, [ALL_MERCHANTS], list(Scope))
    async with (
        running_server(database_url) as (server, _),
        http2(address_of(server)) as (busy,),
        calling(server.port, admin_token) as client,
        calling(server.port, other) as other_client,
    ):
        await stalled_calls(busy, 15, admin_token)
        await until(lambda: len(server._admission._running) == 10)
        assert (await refused(account(client))).reason == "QUEUE_FULL"
        assert (await account(other_client)).points_balance == 0


async def test_flood_of_refusals_is_logged_in_a_few_lines(database_url: str) -> None:
    with json_logs(call_log_module) as written:
        async with running_server(database_url) as (server, _), calling(server.port) as client:
            await asyncio.gather(*(refused(account(client)) for _ in range(200)))

            def lines() -> list[dict[str, Any]]:
                logged = map(json.loads, written.getvalue().splitlines())
                return [line for line in logged if line.get("reason") == "TOKEN_MISSING"]

            await until(lambda: sum(line.get("count", 1) for line in lines()) == 200)
    assert len(lines()) <= 3 * (call_log_module.FLOOD_LINES_MAX + 1)
    assert all("request_id" not in line for line in lines() if "count" in line)


async def test_all_refusals_of_unauthenticated_callers_are_paced(
    database_url: str, admin_token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Including refusals for lack of a token look-up. Known callers are not paced."""
    monkeypatch.setattr(token_cache_module, "WAITING_MAX", 1)
    paced = 0

    async def wait() -> None:
        nonlocal paced
        paced += 1

    async with running_server(database_url) as (server, _):
        monkeypatch.setattr(server._pacer, "wait", wait)
        codes = set()
        for token in (f"pb_{number:016x}_secret" for number in range(8)):
            async with calling(server.port, token) as client:
                responses = await asyncio.gather(*(refused(account(client)) for _ in range(3)))
            codes |= {response.code for response in responses}
        assert (paced, codes) == (24, {grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.RESOURCE_EXHAUSTED})

        async with calling(server.port, admin_token) as client:
            await refused(client.points.GetPointsAccount(points_pb2.GetPointsAccountRequest()))
        assert paced == 24


async def test_flood_of_health_calls_is_logged_in_a_few_lines(database_url: str) -> None:
    """Including malformed requests and cancelled calls."""
    with json_logs(call_log_module) as written:
        async with running_server(database_url) as (server, _), http2(address_of(server)) as (connection,):
            began = time.monotonic()
            for _ in range(20):
                malformed = [await connection.call(HEALTH_CHECK, b"\xff\xff") for _ in range(10)]
                for cancelled in [await connection.start(HEALTH_CHECK) for _ in range(6)]:
                    await connection.reset(cancelled)
                await until(has_ended(connection, *malformed))
    logged = [line for line in map(json.loads, written.getvalue().splitlines()) if "reason" in line]
    assert logged
    seconds = time.monotonic() - began
    assert len(logged) <= (seconds + 2) * 2 * (call_log_module.FLOOD_LINES_MAX + 1)


async def test_call_cancelled_before_its_request_is_not_logged_as_refused(database_url: str, admin_token: str) -> None:
    with json_logs(call_log_module) as written:
        async with running_server(database_url) as (server, _), http2(address_of(server)) as (connection,):
            stalled = await stalled_calls(connection, 50, admin_token)
            await until(lambda: len(server._admission._running) == len(stalled))
            for stream_id in stalled:
                await connection.reset(stream_id)
            await until_calls_end(server)
            assert not server._admission._running
            assert {use.running for use in server._admission._tokens.values()} == {0}
    logged = [json.loads(line) for line in written.getvalue().splitlines()]
    assert {line["code"] for line in logged if line["event"] == "call"} == {"CANCELLED"}


async def test_health_calls_to_one_listener_do_not_delay_the_other(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their limits are separate."""
    pacers: list[Pacer] = []

    def build() -> Pacer:
        pacers.append(Pacer(calls_per_second=0.01))
        return pacers[-1]

    monkeypatch.setattr(health_module, "Pacer", build)
    health_address = f"127.0.0.1:{free_port()}"
    async with (
        running_server(database_url, health_address=health_address) as (server, _),
        http2(address_of(server)) as (connection,),
    ):
        pacers[0]._waiting = 1
        waiting = await connection.call(HEALTH_CHECK)
        await until(lambda: pacers[0]._waiting == 2)
        assert await asyncio.wait_for(grpc_health(health_address), 5) == "SERVING"
        assert waiting not in connection.ended


def test_check_is_delayed_less_than_a_probe_timeout() -> None:
    """Kubernetes allows a probe one second, and then restarts the server."""
    assert health_module.CHECKS_MAX / pacer_module.PACED_CALLS_PER_SECOND < 0.5


async def test_connection_limit_does_not_block_the_health_address(database_url: str) -> None:
    health_address = f"127.0.0.1:{free_port()}"
    settings: dict[str, Any] = {"connections_max": 5, "health_address": health_address}
    async with running_server(database_url, **settings) as (server, _), http2(address_of(server), 5) as connections:
        for connection in connections:
            await until(has_ended(connection, await connection.call(HEALTH_CHECK)))
        async with http2(address_of(server)) as (extra,):
            await asyncio.wait_for(extra.closed.wait(), 5)
        assert not any(connection.closed.is_set() for connection in connections)

        assert await grpc_health(health_address) == "SERVING"
        probe = await pointbook("health", GRPC_ADDRESS=address_of(server), HEALTH_ADDRESS=health_address)
        assert probe.exit_code == 0, probe
        async with grpc.aio.insecure_channel(health_address) as channel:
            call: Any = channel.unary_unary(GET_ACCOUNT)
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await call(b"")


async def test_connections_without_http2_are_closed(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a silent socket nor one without SETTINGS stays open."""
    monkeypatch.setattr("pointbook_server.rpc.listening.HANDSHAKE_MS_MAX", 300)
    async with running_server(database_url) as (server, _):
        for sent in (b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent)
            began = time.monotonic()
            await asyncio.wait_for(reader.read(), 5)
            assert time.monotonic() - began < 3
            writer.close()


async def test_paused_server_still_authenticates(database_url: str, admin_token: str) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    server = Server(server_settings(drain_seconds=1.0), database_url, senders={}, clock=TestClock())
    await server.start()
    async with calling(server.port, admin_token) as client, calling(server.port) as unauthenticated:
        await asyncio.gather(client.put_store(shop.merchant_id, shop.store_id), refused(account(unauthenticated)))
        stopping = asyncio.create_task(server.stop())
        await asyncio.sleep(0)
        known, unknown = await asyncio.gather(refused(account(client)), refused(account(unauthenticated)))
        assert (known.reason, unknown.reason) == ("SHUTTING_DOWN", "TOKEN_MISSING")
        await stopping

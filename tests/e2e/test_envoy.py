"""Servers and a shim behind a real Envoy with the shipped configuration."""

import asyncio
import os
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from pointbook.v1 import points_pb2
from shopline_shim.settings import ShimSettings
from support.certificates import Authority, serial_of, served_serial
from support.clients import Client
from support.connections import connected
from support.deployments import error_lines
from support.envoy import SERVERS, SHIMS, Envoy, envoy_binary, needs_envoy
from support.fleets import Fleet, running_fleet
from support.processes import POINTBOOK, Running, clean_environment, finish, running
from support.redemption import earn, redeem_request
from support.refusals import refusal
from support.retrying_callers import check_acknowledged_events
from support.shops import Shop
from support.verification import run_verify
from support.waiting import until, until_locks_are_awaited

pytestmark = needs_envoy

CALLERS = 48
SOAK_SECONDS = 60.0 * float(os.environ.get("SOAK_MINUTES", "1"))
SHARE_MIN = 0.35
"""The least share of the calls that each of two idle servers gets."""
SECRET = "app-secret-behind-envoy"
BODY_BYTES_MAX = ShimSettings.model_fields["max_body_bytes"].default


@pytest.fixture(scope="module")
async def fleet(database_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Fleet]:
    """A fleet that runs during the tests of this file."""
    async with running_fleet(database_url, tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
async def client(fleet: Fleet) -> AsyncIterator[Client]:
    """A client of Envoy that repeats no call."""
    client = Client(fleet.envoy.grpc_port, fleet.token, [("grpc.enable_retries", 0)], fleet.credentials)
    yield client
    await client.close()


@pytest.mark.parametrize("json_port", [None, 8444])
async def test_the_shipped_configuration_is_valid(tmp_path: Path, json_port: int | None) -> None:
    options = await Envoy(tmp_path, Authority(), {}, json_port=json_port).write()

    finished = await finish(envoy_binary(), "--mode", "validate", *options, environment=clean_environment({}))

    assert finished.exit_code == 0, finished.err
    assert "OK" in finished.out
    assert "eprecated" not in finished.err


async def drain(process: Running) -> None:
    """Stop a server as a service manager does."""
    exit_code, _ = await process.terminate()
    assert exit_code == 0, process.err


FAULTS: tuple[tuple[int, Callable[[Running], Awaitable[None]]], ...] = (
    (0, Running.kill),
    (1, drain),
    (1, Running.kill),
    (0, drain),
)
"""The servers that fail in turn, and how."""


@pytest.mark.parametrize("seconds", [8.0, pytest.param(max(60.0, SOAK_SECONDS), marks=pytest.mark.soak)])
async def test_no_call_fails_while_servers_are_killed_and_drained(
    fleet: Fleet, shop: Shop, figure: Callable[[str, float | str, str], None], seconds: float
) -> None:
    """Servers are killed and drained in turn, each once both serve again."""
    callers, count, began = fleet.callers(shop), 0, time.monotonic()
    before = await fleet.envoy.counter(f"cluster.{SERVERS}.upstream_rq_retry")
    callers.start(CALLERS)
    while count < 2 or time.monotonic() - began < seconds:
        await callers.wait_for_acknowledged(CALLERS)
        number, fail = FAULTS[count % len(FAULTS)]
        await fail(fleet.processes[fleet.servers[number]])
        await callers.wait_for_acknowledged(CALLERS)
        await fleet.start(fleet.servers[number])
        await fleet.until_balanced()
        count += 1
    await callers.wait_for_acknowledged(CALLERS)
    await callers.stop()
    retries = await fleet.envoy.counter(f"cluster.{SERVERS}.upstream_rq_retry") - before
    refused = await fleet.envoy.counter(f"cluster.{SERVERS}.upstream_rq_retry_overflow")
    assert [line for each in fleet.processes.values() for line in error_lines(each.err)] == []
    name = f"{time.monotonic() - began:.0f} s behind Envoy, {count - count // 2} x SIGKILL, {count // 2} x drained"
    figure(f"{name}: status codes", " ".join(f"{code} {calls}" for code, calls in callers.codes.items()), "OK")
    figure(f"{name}: retries by Envoy, refused", f"{retries}, {refused}", "> 0, 0")
    assert set(callers.codes) == {"OK"}
    assert (retries > 0, refused) == (True, 0)
    await check_acknowledged_events(fleet.database_url, shop, callers)
    await run_verify(fleet.database_url, shop.merchant_id)


async def test_calls_of_one_connection_go_to_all_servers(fleet: Fleet, client: Client, shop: Shop) -> None:
    """Envoy shows a server as healthy a moment before it sends it calls."""

    async def are_shared() -> bool:
        before = await fleet.envoy.requests(SERVERS)
        for number in range(100):
            await client.apply(shop.update(f"buyer-{number}"))
        after = await fleet.envoy.requests(SERVERS)
        shares = [(after[address] - before[address]) / 100 for address in after]
        assert sum(shares) == pytest.approx(1.0)
        return min(shares) >= SHARE_MIN

    await until(are_shared)


async def test_limits_are_those_of_the_server(fleet: Fleet, client: Client, shop: Shop) -> None:
    """Envoy sends a message on that is too large, once, and the server refuses it."""
    apply: Any = client.channel.unary_unary("/pointbook.v1.PointsService/ApplyPointsUpdate")
    request = points_pb2.ApplyPointsUpdateRequest(update=shop.update()).SerializeToString()

    async def code_of(size: int, metadata: tuple[tuple[str, str], ...] = ()) -> str:
        body = _padded(request, size)
        try:
            await apply(body, metadata=metadata)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    assert await code_of(1024 * 1024) == "OK"
    before = await fleet.envoy.requests(SERVERS)
    assert await code_of(1024 * 1024 + 1) == "RESOURCE_EXHAUSTED"
    after = await fleet.envoy.requests(SERVERS)
    assert sum(after.values()) - sum(before.values()) == 1
    assert await code_of(1024, (("x-filler", "x" * 6_000),)) == "OK"
    assert await code_of(1024, (("x-filler", "x" * 8_000),)) != "OK"


async def test_refusal_of_a_call_that_envoy_has_repeated_says_so(fleet: Fleet, client: Client, shop: Shop) -> None:
    """The first attempt waits for a lock until the server gives up."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={})
    await earn(client, shop, 100)
    async with connected(fleet.database_url) as connection, connection.transaction():
        await connection.execute("SELECT FROM points_accounts WHERE merchant_id = $1 FOR UPDATE", shop.merchant_id)
        call = asyncio.ensure_future(client.redemption.RedeemPoints(redeem_request(shop)))
        await until_locks_are_awaited(fleet.database_url)
        await client.put_program(shop.merchant_id, shop.store_id, criteria={}, redemption_enabled=False)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call

    assert refusal(failed.value).reason == "REDEMPTION_DISABLED"
    assert ("x-previous-attempts", "1") in tuple(failed.value.trailing_metadata())


async def test_methods_without_a_route_do_not_reach_a_server(client: Client) -> None:
    reflection = [f"/grpc.reflection.{each}.ServerReflection/ServerReflectionInfo" for each in ("v1", "v1alpha")]
    for path in (*reflection, "/grpc.health.v1.Health/Watch"):
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call_raw(client, path)
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert await call_raw(client, "/grpc.health.v1.Health/Check") == b"\x08\x01"


async def call_raw(client: Client, path: str) -> bytes:
    """Call a method with an empty message, and return the bytes of the response."""
    method: Any = client.channel.unary_unary(path)
    response: bytes = await method(b"")
    return response


async def test_renewed_certificates_are_used(fleet: Fleet) -> None:
    issued = fleet.authority.issue("envoy")
    issued.write(fleet.folder / "tls", "server")

    await until(lambda: served_serial(fleet.envoy.grpc_port) == serial_of(issued.chain))


async def test_webhooks_reach_the_servers_through_envoy(fleet: Fleet, shop: Shop) -> None:
    """The shim calls the servers through Envoy too; its other paths are closed."""
    environment = clean_environment({"SHOPLINE_SECRETS": SECRET}) | {"SSL_CERT_FILE": str(fleet.ca)}
    url = f"https://localhost:{fleet.envoy.webhooks_port}"
    store = ("--merchant", shop.merchant_id, "--store", shop.store_id)
    async with shim_of(fleet), httpx.AsyncClient(verify=ssl.create_default_context(cafile=fleet.ca)) as http:
        sent = await finish(
            POINTBOOK, "webhook", "send", "--url", f"{url}/webhooks/shopline", *store, environment=environment
        )
        assert sent.out == '200 {"outcome":"APPLIED"}\n', sent
        statuses = [(await http.get(f"{url}{path}")).status_code for path in ("/readyz", "/metrics", "/")]
        too_large = await http.post(f"{url}/webhooks/shopline", content=b"x" * (BODY_BYTES_MAX + 1))

    assert statuses == [404, 404, 404]
    assert too_large.status_code == 413


@asynccontextmanager
async def shim_of(fleet: Fleet) -> AsyncIterator[Running]:
    """Run a shim behind Envoy that calls the servers through Envoy."""
    cert, key = fleet.authority.issue("shim", names=["shim.internal"]).write(fleet.folder, "shim")
    settings = {
        "GRPC_ADDRESS": f"localhost:{fleet.envoy.grpc_port}",
        "SERVER_CA_FILE": str(fleet.ca),
        "TOKEN": fleet.token,
        "HTTP_ADDRESS": f"127.0.0.1:{fleet.shim.port}",
        "HTTP_TLS_CERT_FILE": str(cert),
        "HTTP_TLS_KEY_FILE": str(key),
        "SHOPLINE_SECRETS": SECRET,
    }
    async with running("shim", folder=fleet.folder, settings=settings) as shim:

        async def is_healthy() -> bool:
            return bool(await fleet.envoy.healthy(SHIMS))

        await shim.until(is_healthy)
        yield shim


def _padded(message: bytes, size: int) -> bytes:
    """Return a message of `size` bytes, by a field that the server skips."""
    length = size - len(message) - 4
    return message + bytes((0x7A, length & 127 | 128, length >> 7 & 127 | 128, length >> 14)) + b"x" * length

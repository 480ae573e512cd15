"""Access denied by default: every method, for every caller that must not use it."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from pointbook.v1 import (
    access_pb2,
    benefits_pb2,
    customers_pb2,
    points_pb2,
    programs_pb2,
    redemption_pb2,
    webhooks_pb2,
)
from pointbook_server.access.methods import METHODS
from pointbook_server.access.model import Scope
from pointbook_server.access.rules import split_bearer
from pointbook_server.access.transactions import TokenTransactions
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import call_log, method_handlers
from pointbook_server.rpc.health import SERVICE_NAME as HEALTH
from pointbook_server.rpc.reflection import SERVICE_NAMES as REFLECTION_NAMES
from pointbook_server.server import Server
from pointbook_server.services import SERVICE_NAMES
from support.clients import Client
from support.clocks import NOW_MS, TestClock
from support.database_proxy import proxied
from support.embedded_database import Cluster
from support.json_logs import json_logs
from support.outbox import Outbox
from support.processes import BIN, clean_environment, finish
from support.refusals import Refusal, refused
from support.servers import Service, server_settings
from support.shell import find_grpcurl
from support.shops import Shop
from support.tokens import make_token, revoke_token
from support.unique_names import unique
from support.waiting import until

FILES = (access_pb2, benefits_pb2, customers_pb2, points_pb2, programs_pb2, redemption_pb2, webhooks_pb2)
DESCRIPTORS: dict[str, MethodDescriptor] = {
    f"{service.name}/{method.name}": method
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
REFLECT = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
REFLECTIONS = (REFLECT, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
GARBAGE = b"\xff\xff\xff"
PAST_ACCESS = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT}
every_method = pytest.mark.parametrize("method", sorted(METHODS))
SCOPES = {method: access.scope for method, access in METHODS.items() if access.scope is not None}
"""The scope of every method that requires one."""
every_scoped_method = pytest.mark.parametrize("method", sorted(SCOPES))


@dataclass(frozen=True)
class Tokens:
    """The bearer tokens of the file, for one merchant unless stated otherwise."""

    merchant_id: str
    everything: str
    expired: str
    revoked: str
    lacking: dict[Scope, str]
    only: dict[Scope, str]


def request_of(method: str, *merchants: str) -> bytes:
    """Return a request that names only merchants, at the path of its method."""
    request = GetMessageClass(DESCRIPTORS[method].input_type)()
    *path, name = METHODS[method].merchant_path.split(".")
    for merchant_id in merchants if method in SCOPES else ():
        message: Any = request
        for part in path:
            child = getattr(message, part)
            message = child.add() if hasattr(child, "add") else child
        setattr(message, name, merchant_id)
    return request.SerializeToString()


def call(channel: Any, method: str, request: bytes, *authorization: str) -> Any:
    """Call a method with raw bytes and authorization headers."""
    return channel.unary_unary(f"/pointbook.v1.{method}")(
        request, metadata=tuple(("authorization", value) for value in authorization)
    )


async def code_of(answer: Any) -> grpc.StatusCode:
    """Return the status code of a call."""
    try:
        await answer
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def denial(refusal: Refusal) -> tuple[grpc.StatusCode, str]:
    """Return the code and reason of a refusal."""
    return refusal.code, refusal.reason


MISSING = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_MISSING")
INVALID = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_INVALID")
EXPIRED = (grpc.StatusCode.UNAUTHENTICATED, "TOKEN_EXPIRED")
NO_SCOPE = (grpc.StatusCode.PERMISSION_DENIED, "SCOPE_MISSING")
FORBIDDEN = (grpc.StatusCode.PERMISSION_DENIED, "MERCHANT_FORBIDDEN")


@pytest.fixture(scope="module")
async def tokens(database_url: str) -> Tokens:
    """Tokens of every kind."""
    merchant_id = unique("merchant")

    def make(scopes: list[Scope], expires_at_ms: int | None = None) -> Any:
        return make_token(database_url, [merchant_id], scopes, expires_at_ms)

    return Tokens(
        merchant_id=merchant_id,
        everything=await make(list(Scope)),
        expired=await make(list(Scope), NOW_MS),
        # Revoked from the start: a server that has loaded the token accepts it until the next load.
        revoked=await make_token(database_url, [merchant_id], list(Scope), revoked_at_ms=NOW_MS),
        lacking={scope: await make([other for other in Scope if other is not scope]) for scope in Scope},
        only={scope: await make([scope]) for scope in Scope},
    )


@pytest.fixture(scope="module")
async def channel(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    """A channel without a token."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}") as opened:
        yield opened


def test_the_table_of_methods_matches_the_protos() -> None:
    assert set(DESCRIPTORS) == set(METHODS)
    assert set(SERVICE_NAMES) == {method.containing_service.full_name for method in DESCRIPTORS.values()}


@every_method
async def test_callers_without_a_valid_token_are_refused_before_parsing(
    channel: grpc.aio.Channel, tokens: Tokens, method: str
) -> None:
    token_id, secret = split_bearer(tokens.everything)
    for request in (request_of(method, tokens.merchant_id), GARBAGE):
        assert denial(await refused(call(channel, method, request))) == MISSING
        for malformed in ("", "Bearer", tokens.everything, f"Basic {tokens.everything}"):
            assert denial(await refused(call(channel, method, request, malformed))) == MISSING
        for forged in ("x", f"pb_{token_id}_", f"pb_{token_id}_x{secret}", f"pb__{secret}"):
            assert denial(await refused(call(channel, method, request, f"Bearer {forged}"))) == INVALID
        assert denial(await refused(call(channel, method, request, f"Bearer {tokens.revoked}"))) == INVALID
        assert denial(await refused(call(channel, method, request, f"Bearer {tokens.expired}"))) == EXPIRED


async def test_unknown_tokens_are_refused(channel: grpc.aio.Channel, tokens: Tokens) -> None:
    bearer = f"Bearer pb_unknown_{split_bearer(tokens.everything)[1]}"
    calls = [call(channel, method, request, bearer) for method in METHODS for request in (GARBAGE, b"")]

    assert {INVALID} == {denial(found) for found in await asyncio.gather(*map(refused, calls))}


@every_scoped_method
async def test_callers_without_the_scope_are_refused_before_parsing(
    channel: grpc.aio.Channel, tokens: Tokens, method: str
) -> None:
    lacking = f"Bearer {tokens.lacking[SCOPES[method]]}"
    for request in (request_of(method, tokens.merchant_id), GARBAGE):
        found = await refused(call(channel, method, request, lacking))
        assert denial(found) == NO_SCOPE
        assert found.metadata == {"scope": SCOPES[method]}


@every_scoped_method
async def test_other_merchants_are_refused(channel: grpc.aio.Channel, tokens: Tokens, method: str) -> None:
    bearer = f"Bearer {tokens.everything}"

    found = await refused(call(channel, method, request_of(method, "another-merchant"), bearer))
    assert denial(found) == FORBIDDEN
    assert found.metadata == {"merchant_id": "" if METHODS[method].for_all_merchants else "another-merchant"}
    assert denial(await refused(call(channel, method, request_of(method), bearer))) == FORBIDDEN
    assert denial(await refused(call(channel, method, request_of(method, ""), bearer))) == FORBIDDEN


@every_scoped_method
async def test_the_scope_and_the_merchant_suffice(
    service: Service, channel: grpc.aio.Channel, tokens: Tokens, admin_token: str, method: str
) -> None:
    only, request = f"bearer {tokens.only[SCOPES[method]]}", request_of(method, tokens.merchant_id)

    if METHODS[method].for_all_merchants:
        assert denial(await refused(call(channel, method, request, only))) == FORBIDDEN
    else:
        assert await code_of(call(channel, method, request, only)) in PAST_ACCESS
    assert await code_of(call(channel, method, request_of(method), f"Bearer {admin_token}")) in PAST_ACCESS
    assert not service.outbox.messages


async def test_a_batch_with_one_foreign_merchant_is_refused(channel: grpc.aio.Channel, tokens: Tokens) -> None:
    method, own = "PointsService/BatchApplyPointsUpdates", tokens.merchant_id
    for merchants in ([own] * 99 + ["foreign"], ["foreign"] + [own] * 99, [own, "", own]):
        request = request_of(method, *merchants)
        assert denial(await refused(call(channel, method, request, f"Bearer {tokens.everything}"))) == FORBIDDEN


async def test_the_first_bearer_counts(channel: grpc.aio.Channel, tokens: Tokens) -> None:
    method = "PointsService/GetPointsAccount"
    request = request_of(method, tokens.merchant_id)

    found = await refused(call(channel, method, request, f"Bearer {tokens.revoked}", f"Bearer {tokens.everything}"))
    assert denial(found) == INVALID


async def test_authorization_of_another_kind_does_not_hide_the_bearer(
    channel: grpc.aio.Channel, tokens: Tokens
) -> None:
    method = "PointsService/GetPointsAccount"
    request = request_of(method, tokens.merchant_id)
    for other in ("", "Basic dXNlcjpwYXNz"):
        assert await code_of(call(channel, method, request, other, f"Bearer {tokens.everything}")) in PAST_ACCESS


async def test_unknown_methods_require_a_token(channel: grpc.aio.Channel, tokens: Tokens) -> None:
    assert denial(await refused(call(channel, "PointsService/Nothing", b""))) == MISSING
    answer = call(channel, "PointsService/Nothing", b"", f"Bearer {tokens.everything}")
    assert await code_of(answer) is grpc.StatusCode.UNIMPLEMENTED


async def test_health_requires_no_token(channel: grpc.aio.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", *SERVICE_NAMES):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_methods_that_health_does_not_have_require_no_token(channel: grpc.aio.Channel) -> None:
    unknown: Any = channel.unary_unary("/grpc.health.v1.Health/List")

    assert await code_of(unknown(b"")) is grpc.StatusCode.UNIMPLEMENTED


async def test_health_of_an_unknown_service_is_not_found(channel: grpc.aio.Channel) -> None:
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="nothing"))

    assert await code_of(answer) is grpc.StatusCode.NOT_FOUND


async def reflect(channel: Any, bearer: str = "", method: str = REFLECT) -> tuple[grpc.StatusCode, set[str]]:
    """Return the services that reflection lists."""
    metadata = (("authorization", f"Bearer {bearer}"),) if bearer else ()
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    call_method = channel.stream_stream(
        method,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    stream = call_method(iter([request]), metadata=metadata)
    try:
        names = {found.name async for answer in stream for found in answer.list_services_response.service}
    except grpc.aio.AioRpcError as error:
        return error.code(), set()
    return grpc.StatusCode.OK, names


@pytest.mark.parametrize("method", REFLECTIONS)
async def test_reflection_is_off_by_default(channel: grpc.aio.Channel, tokens: Tokens, method: str) -> None:
    assert await reflect(channel, "", method) == (grpc.StatusCode.UNAUTHENTICATED, set())
    assert await reflect(channel, tokens.everything, method) == (grpc.StatusCode.UNIMPLEMENTED, set())


async def test_an_unknown_stream_ends_without_a_message(channel: grpc.aio.Channel, tokens: Tokens) -> None:
    """Clients of reflection try its next version then."""
    call: Any = channel.stream_stream(REFLECT)
    stream = call(iter([b""]), metadata=(("authorization", f"Bearer {tokens.everything}"),))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()

    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("method", REFLECTIONS)
async def test_reflection_needs_a_token(database_url: str, tokens: Tokens, method: str) -> None:
    server = Server(server_settings(reflection=True), database_url, senders={}, clock=TestClock())
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert await reflect(channel, "", method) == (grpc.StatusCode.UNAUTHENTICATED, set())
        assert await reflect(channel, tokens.revoked, method) == (grpc.StatusCode.UNAUTHENTICATED, set())
        bound = await make_token(database_url, [tokens.merchant_id], [Scope.REDEEM], client_names=["till.internal"])
        assert await reflect(channel, bound, method) == (grpc.StatusCode.UNAUTHENTICATED, set())
        code, names = await reflect(channel, tokens.only[Scope.TELEPHONY], method)
        assert code is grpc.StatusCode.OK
        assert set(SERVICE_NAMES) <= names
    await server.stop()


async def test_a_malformed_request_of_reflection_is_refused(database_url: str, tokens: Tokens) -> None:
    """A traceback of each in the log would let a caller fill it."""
    server = Server(server_settings(reflection=True), database_url, senders={}, clock=TestClock())
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call: Any = channel.stream_stream(REFLECT)
        with json_logs(call_log, method_handlers) as log:
            stream = call(iter([GARBAGE]), metadata=(("authorization", f"Bearer {tokens.everything}"),))
            refusal = await refused(stream.read())
            await until(lambda: '"call"' in log.getvalue())
    await server.stop()
    (line,) = [json.loads(line) for line in log.getvalue().splitlines() if '"call"' in line]
    labels = {"method": REFLECT, "code": "INVALID_ARGUMENT", "reason": "INVALID_FIELDS"}

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    assert {name: line[name] for name in labels} == labels
    assert line["token_id"]
    assert '"error"' not in log.getvalue()
    assert server.metrics.registry.get_sample_value("pointbook_grpc_call_errors_total", labels) == 1


async def test_the_log_names_the_refused_call_of_reflection(database_url: str) -> None:
    server = Server(server_settings(reflection=True), database_url, senders={}, clock=TestClock())
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        with json_logs(call_log) as log:
            await reflect(channel)
            await until(lambda: '"call"' in log.getvalue())
    await server.stop()
    (line,) = [json.loads(line) for line in log.getvalue().splitlines() if '"call"' in line]
    assert line["method"] == REFLECT
    assert line["request_id"]


@pytest.mark.parametrize("protocol", ["grpc-v1", "grpc-v1alpha"])
async def test_clients_of_each_version_of_reflection_can_call_a_method(database_url: str, protocol: str) -> None:
    server = Server(server_settings(), database_url, senders={}, development=True, clock=TestClock())
    await server.start()
    command = ("curl", "--protocol", "grpc", "--http2-prior-knowledge", "--reflect-protocol", protocol)
    url = f"http://127.0.0.1:{server.port}"
    listed = await finish(BIN / "buf", *command, "--list-services", url, environment=clean_environment({}))
    called = await finish(
        *(BIN / "buf", *command, "-d", "{}", f"{url}/pointbook.v1.AccessService/GetCallerAccess"),
        environment=clean_environment({}),
    )
    await server.stop()

    assert set(listed.out.split()) >= {*SERVICE_NAMES, *REFLECTION_NAMES, HEALTH}
    assert (called.exit_code, json.loads(called.out)["merchantIds"]) == (0, ["*"])


@pytest.mark.skipif(find_grpcurl() is None, reason="grpcurl is not installed")
async def test_grpcurl_describes_every_service_with_all_its_types(database_url: str) -> None:
    """Each answer is complete: it has the files on which the described one depends."""
    server = Server(server_settings(), database_url, senders={}, development=True, clock=TestClock())
    await server.start()
    described = [
        await finish(
            *(str(find_grpcurl()), "-plaintext", f"127.0.0.1:{server.port}", "describe", name),
            environment=clean_environment({}),
        )
        for name in (*SERVICE_NAMES, *REFLECTION_NAMES, HEALTH)
    ]
    await server.stop()

    assert [each.exit_code for each in described] == [0] * len(described)
    assert f"{REFLECTION_NAMES[0]} is a service" in "".join(each.out for each in described)


async def test_development_requires_no_token(database_url: str) -> None:
    server = Server(server_settings(), database_url, senders={}, development=True, clock=TestClock())
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        for method in METHODS:
            assert await code_of(call(channel, method, request_of(method))) in PAST_ACCESS
        assert (await reflect(channel))[0] is grpc.StatusCode.OK
    await server.stop()


async def test_a_revoked_token_is_refused_within_two_seconds(
    database_url: str, channel: grpc.aio.Channel, tokens: Tokens
) -> None:
    bearer = await make_token(database_url, [tokens.merchant_id], [Scope.POINTS_READ])
    method = "PointsService/GetPointsAccount"
    request = request_of(method, tokens.merchant_id)
    assert await code_of(call(channel, method, request, f"Bearer {bearer}")) in PAST_ACCESS

    await revoke_token(database_url, bearer)
    revoked_at = time.monotonic()
    while await code_of(call(channel, method, request, f"Bearer {bearer}")) in PAST_ACCESS:
        assert time.monotonic() - revoked_at < 2.5
        await asyncio.sleep(0.02)
    assert denial(await refused(call(channel, method, request, f"Bearer {bearer}"))) == INVALID


async def test_a_new_token_works_at_once(database_url: str, channel: grpc.aio.Channel, tokens: Tokens) -> None:
    method = "PointsService/GetPointsAccount"
    request = request_of(method, tokens.merchant_id)
    for _ in range(5):
        assert denial(await refused(call(channel, method, request, "Bearer pb_unknown_token"))) == INVALID
        bearer = await make_token(database_url, [tokens.merchant_id], [Scope.POINTS_READ])
        assert await code_of(call(channel, method, request, f"Bearer {bearer}")) in PAST_ACCESS


async def test_forged_tokens_share_loads(channel: grpc.aio.Channel, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    original: Callable[[TokenTransactions], Any] = TokenTransactions.read_all

    async def counted(store: TokenTransactions) -> Any:
        nonlocal reads
        reads += 1
        return await original(store)

    monkeypatch.setattr(TokenTransactions, "read_all", counted)
    started = time.monotonic()
    calls = [call(channel, "PointsService/GetPointsAccount", b"", f"Bearer pb_{n}_x") for n in range(300)]

    assert [denial(found) for found in await asyncio.gather(*map(refused, calls))] == [INVALID] * 300
    assert reads <= 2 + (time.monotonic() - started) / 0.2


async def test_the_database_holds_no_secret(database_url: str, tokens: Tokens) -> None:
    connection = await asyncpg.connect(database_url)
    rows = [row[0] for row in await connection.fetch("SELECT t::text FROM api_tokens t")]
    await connection.close()
    dump = "\n".join(rows)

    assert split_bearer(tokens.everything)[0] in dump
    for bearer in (tokens.everything, tokens.expired, tokens.revoked, *tokens.only.values()):
        secret = split_bearer(bearer)[1]
        assert secret not in dump
        assert secret.encode().hex() not in dump


async def test_known_tokens_are_valid_while_the_database_is_unavailable(cluster: Cluster, database_url: str) -> None:
    """Callers get UNAVAILABLE and retry."""
    own_url = await cluster.clone("pointbook_template")
    merchant_id = unique("merchant")
    bearer = await make_token(own_url, ["*"], list(Scope))
    assert own_url != database_url
    async with proxied(own_url) as proxy:
        outbox = Outbox()
        server = Server(server_settings(), proxy.url, senders={Channel.SMS: outbox}, clock=TestClock())
        await server.start()
        client = Client(server.port, bearer)
        shop = Shop(merchant_id, unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)

        await proxy.cut()
        # Long enough for several failed reloads of the tokens.
        deadline = time.monotonic() + 2.6
        while time.monotonic() < deadline:
            found = await refused(client.account(merchant_id, shop.store_id, "buyer"))
            assert denial(found) == (grpc.StatusCode.UNAVAILABLE, "DATABASE_UNAVAILABLE")
            await asyncio.sleep(0.1)
        unknown_client = Client(server.port, "pb_unknown_token")
        assert denial(await refused(unknown_client.account(merchant_id, shop.store_id, "buyer"))) == INVALID

        await proxy.restore()
        assert (await client.account(merchant_id, shop.store_id, "buyer")).points_balance == 0
        await unknown_client.close()
        await client.close()
        await server.stop()

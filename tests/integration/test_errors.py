"""How calls fail: one rich status each, with a request id, the truth for the caller, and the cause in the log only."""

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import text

from pointbook.v1 import benefits_pb2, identity_pb2, points_pb2, programs_pb2, redemption_pb2, webhooks_pb2
from pointbook_server.access import token_cache as token_cache_module
from pointbook_server.access.methods import METHODS
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.db import connection_pool
from pointbook_server.db.database import TRANSACTION_ATTEMPTS_MAX, RetryTransactionError, Statement
from pointbook_server.db.migrations import migrate
from pointbook_server.programs.model import Channel
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.rpc import status_interceptor as status_module
from pointbook_server.rpc.listening import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from pointbook_server.server import Server
from support.database_proxy import DatabaseProxy, proxied
from support.embedded_database import Cluster
from support.harness import (
    NOW_MS,
    Client,
    Outbox,
    Service,
    Shop,
    TestClock,
    at,
    make_token,
    refusal,
    refused,
    server_settings,
    unique,
)
from support.json_logs import json_logs
from support.processes import grpc_health
from support.waiting import until

SECRET = "+8613800005678"
"""What an exception of ours might quote, and no caller may read."""


@contextlib.asynccontextmanager
async def running(url: str, token: str, **settings: Any) -> AsyncIterator[tuple[Server, Client]]:
    """Run another server, on another database or with other settings."""
    server = Server(server_settings(**settings), url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    client = Client(server.port, token)
    try:
        yield server, client
    finally:
        await client.close()
        await server.stop()


async def get_store(client: Client, shop: Shop, **more: Any) -> programs_pb2.GetStoreResponse:
    """Read the shop's store: the simplest of calls."""
    request = programs_pb2.GetStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id)
    answer: programs_pb2.GetStoreResponse = await client.programs.GetStore(request, **more)
    return answer


async def failed(call: Any) -> grpc.aio.AioRpcError:
    """Await a call that must fail, and give its error with the trailing metadata."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def request_id_of(error: grpc.aio.AioRpcError) -> str:
    """Read the request id that an error came with."""
    (request_id,) = [value for key, value in error.trailing_metadata() if key == "x-request-id"]
    return str(request_id)


def break_store(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make reading a store raise."""

    async def broken(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> Any:
        raise error

    patch.setattr(ProgramTransactions, "read_store", broken)


@pytest.mark.parametrize("method", sorted(METHODS))
async def test_malformed_request_is_an_invalid_argument(client: Client, method: str) -> None:
    """What is no protobuf message is INVALID_ARGUMENT, and not an error of ours."""
    # A request without fields has no text that could be no UTF-8.
    no_text = () if METHODS[method].scope is None else (b"\x0a\x02\xff\xfe",)
    for broken in (b"\xff\xff\xff", b"\x0a\x05ab", *no_text):
        found = await refused(bearer_call(client, method, broken))
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert list(found.fields) == [""]


def bearer_call(client: Client, method: str, request: bytes) -> Any:
    """Call a method with raw bytes and the client's own token."""
    channel: Any = client.channel
    return channel.unary_unary(f"/pointbook.v1.{method}")(request)


NASTY_TEXTS = (
    "",
    "a",
    "\x00",
    "a b",
    "é😀",
    "x" * 70,
    "0.01",
    "-1",
    "1e9",
    "9" * 40,
    "%s",
    "'; --",
    "\u2028",
    "usd",
    "1",
)
NASTY_NUMBERS = (0, 1, -1, 2, 10, 600, 10**9, 2**31 - 1, -(2**31), 10**15, 2**63 - 1, -(2**63))
FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}


def right_requests(shop: Shop, quarantine_id: str = "") -> dict[str, Any]:
    """Make a request of each method that there is, with most of its fields set."""
    store: dict[str, Any] = {"merchant_id": shop.merchant_id, "store_id": shop.store_id}
    quarantine: dict[str, Any] = {"merchant_id": shop.merchant_id}
    quarantined: dict[str, Any] = {**quarantine, "quarantine_id": quarantine_id}
    customer = identity_pb2.CustomerRef(
        merchant_id=shop.merchant_id, buyer=identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")
    )
    asked: dict[str, Any] = {"customer": customer, "program_id": 1, "points": 10}
    program = programs_pb2.Program(
        merchant_id=shop.merchant_id,
        program_id=2,
        store_ids=[shop.store_id],
        time_zone="UTC",
        criteria=programs_pb2.RedemptionCriteria(multiples_of=10),
        point_value="0.01",
        currency_code="USD",
        settlement_window=Duration(seconds=60),
        validation=programs_pb2.ValidationSettings(message_templates={"en": "$code"}, code_life=Duration(seconds=60)),
    )
    benefit = benefits_pb2.Benefit(
        merchant_id=shop.merchant_id,
        benefit_id="gold:1",
        store_ids=[shop.store_id],
        membership_type=benefits_pb2.MEMBERSHIP_TYPE_LEVEL,
        birth_benefits_release_type=benefits_pb2.BIRTH_BENEFITS_RELEASE_TYPE_FIXED_BEFORE,
        days_before=3,
        reward_type=benefits_pb2.REWARD_TYPE_PERCENTAGE_DISCOUNT,
        benefits_details="10",
        unrecognized_values={"products_applicable_type": "ALL"},
    )
    benefit.irrelevant_values.update({"benefits_name": "Gold"})
    named = {"merchant_id": shop.merchant_id, "benefit_id": "gold:1"}
    its_privilege = {"merchant_id": shop.merchant_id, "privilege_id": "gold:p1"}
    privilege = benefits_pb2.CustomPrivilege(**its_privilege, level_code="gold", privilege_name="Lounge")
    member = benefits_pb2.BenefitMember(birthday="02-29", joined_time=at(NOW_MS), membership_end_time=at(NOW_MS + 1))
    cart = benefits_pb2.BenefitCart(
        products=[benefits_pb2.BenefitCartProduct(product_id="p", category_ids=["c"], quantity=1)], amount="1", points=1
    )
    update = shop.update(points_expiry_time=at(NOW_MS), webhook=points_pb2.WebhookMetadata(webhook_id="w"))
    return {
        "PointsService/ApplyPointsUpdate": points_pb2.ApplyPointsUpdateRequest(update=update),
        "PointsService/GetPointsAccount": points_pb2.GetPointsAccountRequest(
            **store, buyer_id="buyer", at_time=at(NOW_MS)
        ),
        "PointsService/ListPointsEntries": points_pb2.ListPointsEntriesRequest(
            **store, buyer_id="buyer", scenes=["RETURNS"], start_time=at(NOW_MS)
        ),
        "RedemptionService/ValidateRedemption": redemption_pb2.ValidateRedemptionRequest(
            **asked, validation_code="123456"
        ),
        "RedemptionService/IssueValidationCode": redemption_pb2.IssueValidationCodeRequest(**asked),
        "ProgramsService/PutStore": programs_pb2.PutStoreRequest(store=programs_pb2.Store(**store)),
        "ProgramsService/GetStore": programs_pb2.GetStoreRequest(**store),
        "ProgramsService/ListStores": programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id),
        "ProgramsService/PutProgram": programs_pb2.PutProgramRequest(program=program),
        "ProgramsService/GetProgram": programs_pb2.GetProgramRequest(merchant_id=shop.merchant_id, program_id=1),
        "ProgramsService/ListPrograms": programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id),
        "BenefitsService/PutBenefit": benefits_pb2.PutBenefitRequest(benefit=benefit),
        "BenefitsService/GetBenefit": benefits_pb2.GetBenefitRequest(**named),
        "BenefitsService/ListBenefits": benefits_pb2.ListBenefitsRequest(**store),
        "BenefitsService/PreviewBenefitSchedule": benefits_pb2.PreviewBenefitScheduleRequest(
            **named, member=member, start_time=at(NOW_MS), issue_count=3
        ),
        "BenefitsService/ListApplicableBenefits": benefits_pb2.ListApplicableBenefitsRequest(
            **store, cart=cart, uses={"gold:1": 1}
        ),
        "BenefitsService/DeleteBenefit": benefits_pb2.DeleteBenefitRequest(**named),
        "BenefitsService/PutCustomPrivilege": benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=privilege),
        "BenefitsService/GetCustomPrivilege": benefits_pb2.GetCustomPrivilegeRequest(**its_privilege),
        "BenefitsService/ListCustomPrivileges": benefits_pb2.ListCustomPrivilegesRequest(
            merchant_id=shop.merchant_id, level_code="gold", page_size=1
        ),
        "BenefitsService/DeleteCustomPrivilege": benefits_pb2.DeleteCustomPrivilegeRequest(**its_privilege),
        "WebhooksService/QuarantineWebhook": webhooks_pb2.QuarantineWebhookRequest(
            **quarantine,
            topic="app_memberSystem_points/challenged",
            headers=[webhooks_pb2.WebhookHeader(name="x", value="y")],
            body=shop.merchant_id.encode(),
            reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED,
            receive_time=at(NOW_MS),
        ),
        "WebhooksService/ListQuarantinedWebhooks": webhooks_pb2.ListQuarantinedWebhooksRequest(
            **quarantine, start_time=at(NOW_MS), end_time=at(NOW_MS)
        ),
        "WebhooksService/GetQuarantinedWebhook": webhooks_pb2.GetQuarantinedWebhookRequest(**quarantined),
        "WebhooksService/ReplayQuarantinedWebhook": webhooks_pb2.ReplayQuarantinedWebhookRequest(
            **quarantined, points_update=update
        ),
        "WebhooksService/DropQuarantinedWebhook": webhooks_pb2.DropQuarantinedWebhookRequest(
            **quarantined, reason="a test"
        ),
    }


def nasty_value(chance: random.Random, field: FieldDescriptor) -> Any:
    """Make a value of a field that breaks what is careless."""
    if field.enum_type is not None:
        return chance.choice((0, 1, 2, 3, 4, 99, -1))
    if field.type == field.TYPE_STRING:
        return chance.choice(NASTY_TEXTS)
    if field.type == field.TYPE_BYTES:
        return chance.choice(NASTY_TEXTS).encode()
    if field.type == field.TYPE_BOOL:
        return chance.random() < 0.5
    number = chance.choice(NASTY_NUMBERS)
    return number if field.type == field.TYPE_INT64 else max(min(number, 2**31 - 1), -(2**31))


def spoil(chance: random.Random, message: Any) -> None:
    """Change one field of a message, or of one of its parts."""
    field = chance.choice(message.DESCRIPTOR.fields)
    target = getattr(message, field.name)
    if hasattr(target, "items"):
        value = field.message_type.fields_by_name.get("value")
        target[chance.choice(NASTY_TEXTS)] = chance.choice(NASTY_TEXTS) if value is None else nasty_value(chance, value)
    elif hasattr(target, "add"):
        target.add()
    elif hasattr(target, "extend"):
        target.extend([nasty_value(chance, field)])
    elif field.message_type is None:
        setattr(message, field.name, nasty_value(chance, field))
    elif chance.random() < 0.1:
        message.ClearField(field.name)
    else:
        target.SetInParent()
        spoil(chance, target)


@pytest.mark.parametrize("method", sorted(right_requests(Shop("", ""))))
async def test_random_requests_never_cause_an_internal_error(client: Client, shop: Shop, method: str) -> None:
    """Whatever a caller sends is answered, or refused as the caller's fault, and never INTERNAL."""
    await client.put_program(shop.merchant_id, shop.store_id)
    await client.apply(shop.update())
    await client.benefits.PutBenefit(right_requests(shop)["BenefitsService/PutBenefit"])
    await client.benefits.PutCustomPrivilege(right_requests(shop)["BenefitsService/PutCustomPrivilege"])
    kept = await client.webhooks.QuarantineWebhook(right_requests(shop)["WebhooksService/QuarantineWebhook"])
    chance = random.Random(method)  # noqa: S311 - the same requests in every run
    requests = [right_requests(shop, kept.quarantine_id)[method] for _ in range(300)]
    for request in requests[1:]:
        for _ in range(chance.choice((1, 1, 2, 4))):
            spoil(chance, request)
    first, *others = (request.SerializeToString() for request in requests)
    errors = [await error_of(bearer_call(client, method, first))]
    errors += await asyncio.gather(*(error_of(bearer_call(client, method, other)) for other in others))
    wrong = [
        (error.code(), request)
        for error, request in zip(errors, requests, strict=True)
        if error is not None and error.code() in FAULTS
    ]

    assert wrong == []
    assert errors[0] is None


async def test_an_error_has_one_error_info(client: Client, shop: Shop) -> None:
    """The reason, our domain, and what the error is about."""
    found = await refused(get_store(client, Shop(shop.merchant_id, "nowhere")))

    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
    assert found.metadata == {"store_id": "nowhere"}
    assert found.retry_seconds is None


async def test_response_carries_a_request_id(client: Client, shop: Shop) -> None:
    """Ours, where the caller sends none, and every call has its own."""
    wrong = Shop(shop.merchant_id, "nowhere")
    first = request_id_of(await failed(get_store(client, wrong)))
    second = request_id_of(await failed(get_store(client, wrong)))

    assert len(first) == len(second) == 16
    assert first != second


@pytest.mark.parametrize("sent", ["order-17.a_B", "x" * 64])
async def test_callers_request_id_is_used(client: Client, shop: Shop, sent: str) -> None:
    """So that a call can be followed through several services' logs."""
    error = await failed(get_store(client, Shop(shop.merchant_id, "no"), metadata=(("x-request-id", sent),)))

    assert sent == request_id_of(error)


@pytest.mark.parametrize("sent", ["", "x" * 65, "a b", 'a"b', "a=b", "{}"])
async def test_unsafe_request_id_is_replaced(client: Client, shop: Shop, sent: str) -> None:
    """Nobody writes into our logs what looks like something else."""
    error = await failed(get_store(client, Shop(shop.merchant_id, "no"), metadata=(("x-request-id", sent),)))

    assert sent != request_id_of(error)


async def test_refused_call_carries_a_request_id(service: Service, shop: Shop) -> None:
    """An operator can find out why a token was refused."""
    client = Client(service.server.port)
    error = await failed(get_store(client, shop, metadata=(("x-request-id", "r-1"),)))
    await client.close()

    assert request_id_of(error) == "r-1"


async def test_internal_error_hides_its_cause(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller reads nothing but a request id, under which the log has the cause, without any local variable."""
    break_store(monkeypatch, RuntimeError("the cause"))
    with json_logs(status_module) as written:
        error = await failed(get_store(client, shop, metadata=(("x-request-id", "r-2"),)))
        found = refusal(error)

    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert found.metadata == {"request_id": "r-2"}
    assert "cause" not in found.message.replace("has the cause under", "")
    assert "RuntimeError" not in str(error.trailing_metadata())
    (line,) = [line for line in map(json.loads, written.getvalue().splitlines()) if line["level"] == "error"]
    assert (line["request_id"], line["method"]) == ("r-2", "/pointbook.v1.ProgramsService/GetStore")
    assert (line["exception"][0]["exc_type"], line["exception"][0]["exc_value"]) == ("RuntimeError", "the cause")
    assert all("locals" not in frame for frame in line["exception"][0]["frames"])
    assert shop.merchant_id not in written.getvalue()
    assert shop.store_id not in written.getvalue()


async def test_sql_defect_logs_no_parameters(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    """What a statement was given may be personal data, so its error is logged without it."""

    async def broken(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> None:
        async with service.server._database.autocommit() as connection:
            await connection.execute(
                Statement(text("SELECT no_such_function(CAST(:mobile AS text))")), {"mobile": SECRET}
            )

    monkeypatch.setattr(ProgramTransactions, "read_store", broken)
    with json_logs(status_module) as written:
        error = await failed(get_store(client, shop))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "no_such_function" in written.getvalue()
    assert SECRET not in written.getvalue()
    assert "no_such_function" not in (error.details() or "") + str(error.trailing_metadata())


async def test_stray_cancellation_ends_with_a_status(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CancelledError that nobody asked for is a fault of ours; the caller must not wait for ever."""
    break_store(monkeypatch, asyncio.CancelledError())

    found = await refused(get_store(client, shop, timeout=5))

    assert (found.code, found.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def test_inner_timeout_is_not_the_calls_deadline(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TimeoutError of something else is a fault of ours while the call has time left."""
    break_store(monkeypatch, TimeoutError())

    assert (await refused(get_store(client, shop))).code is grpc.StatusCode.INTERNAL


async def test_the_servers_deadline_bounds_every_call(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A call whose caller set no deadline, or a long one, ends by ours."""
    ended = asyncio.Event()

    async def slow(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(ProgramTransactions, "read_store", slow)
    async with running(database_url, admin_token, call_deadline_seconds=0.3) as (_, client):
        for timeout in (None, 50):
            found = await refused(get_store(client, shop, timeout=timeout))
            assert (found.code, found.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
            assert ended.is_set()


async def test_callers_deadline_ends_the_work(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody works on for a caller who has left."""
    ended = asyncio.Event()

    async def slow(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(ProgramTransactions, "read_store", slow)
    error = await failed(get_store(client, shop, timeout=0.2))

    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(ended.wait(), 2)


async def test_large_messages_are_refused(client: Client) -> None:
    """One MiB is read, a byte more is not."""
    method = "ProgramsService/GetStore"
    error = await failed(bearer_call(client, method, b"\xff" * MESSAGE_BYTES_MAX))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = await failed(bearer_call(client, method, b"\xff" * (MESSAGE_BYTES_MAX + 1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_large_metadata_is_refused(client: Client, shop: Shop) -> None:
    """Eight KiB of metadata are the most."""
    await get_store(client, shop, metadata=(("x-filler", "x" * (METADATA_BYTES_MAX - 1_000)),))
    error = await failed(get_store(client, shop, metadata=(("x-filler", "x" * METADATA_BYTES_MAX),)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_unknown_health_service_logs_no_error(service: Service) -> None:
    """Health is open to everybody, so nobody may fill our log with errors by it."""
    with json_logs(status_module) as written:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            error = await failed(stub.Check(health_pb2.HealthCheckRequest(service="nothing")))

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "internal error" not in written.getvalue()


def away(error: grpc.aio.AioRpcError) -> bool:
    """Tell whether an error says that the database is away, and when to come again."""
    found = refusal(error)
    return (found.code, found.reason, found.retry_seconds) == (
        grpc.StatusCode.UNAVAILABLE,
        "DATABASE_UNAVAILABLE",
        1.0,
    )


async def error_of(call: Any) -> grpc.aio.AioRpcError | None:
    """Await a call, and give its error if it fails."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def recovers(client: Client, shop: Shop) -> None:
    """Wait until the database is asked again; until then callers hear UNAVAILABLE and nothing else."""

    async def is_back() -> bool:
        error = await error_of(get_store(client, shop))
        assert error is None or error.code() is grpc.StatusCode.NOT_FOUND or away(error), repr(error)
        return error is None or not away(error)

    await until(is_back)


async def health(client: Client) -> int:
    """Ask for the server's health."""
    answer = await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
    return int(answer.status)


async def becomes(client: Client, status: int) -> None:
    """Wait until health has a status."""

    async def has_become() -> bool:
        return await health(client) == status

    await until(has_become)


async def test_terminated_connections(client: Client, shop: Shop, database_url: str) -> None:
    """Calls on connections that the database ended hear UNAVAILABLE; the next ones are answered."""
    name = database_url.partition("?")[0].rpartition("/")[2]
    operator = await asyncpg.connect(database_url)
    terminate = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
    )
    for _ in range(3):
        await asyncio.gather(*(get_store(client, shop) for _ in range(20)))
        assert await operator.fetchval(terminate, name) >= 1
        for _ in range(20):
            answers = await asyncio.gather(*(get_store(client, shop) for _ in range(5)), return_exceptions=True)
            wrong = [answer for answer in answers if isinstance(answer, BaseException)]
            assert [error for error in wrong if not (isinstance(error, grpc.aio.AioRpcError) and away(error))] == []
        await recovers(client, shop)
    await operator.close()


async def test_a_terminated_statement(client: Client, shop: Shop, database_url: str) -> None:
    """A call whose very statement is ended hears UNAVAILABLE too: its transaction had no effect."""
    operator = await asyncpg.connect(database_url)
    holder = await asyncpg.connect(database_url)
    transaction = holder.transaction()
    await transaction.start()
    await holder.execute("SELECT 1 FROM stores WHERE store_id = $1 FOR UPDATE", shop.store_id)
    waiting = asyncio.create_task(failed(client.put_store(shop.merchant_id, shop.store_id)))

    async def terminated() -> bool:
        query = (
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        return bool(await operator.fetchval(query))

    await until(terminated)
    assert away(await waiting)
    await transaction.rollback()
    await recovers(client, shop)
    await holder.close()
    await operator.close()


@pytest.fixture
async def own_database(cluster: Cluster, database_url: str) -> str:  # noqa: ARG001 - it makes the template
    """A database for one test alone."""
    return await cluster.clone("pointbook_template")


@pytest.mark.parametrize("drops", [False, True])
async def test_database_goes_away_and_returns(own_database: str, *, drops: bool) -> None:
    """Health and calls tell of it, and both recover without a restart."""
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    async with proxied(own_database) as proxy, running(proxy.url, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)
        await becomes(client, health_pb2.HealthCheckResponse.SERVING)

        await proxy.cut()
        await _stay_cut(proxy, drops=drops)
        for _ in range(5):
            assert away(await failed(get_store(client, shop)))
            assert away(await failed(client.put_store(shop.merchant_id, shop.store_id)))
        await becomes(client, health_pb2.HealthCheckResponse.NOT_SERVING)

        await proxy.cut()
        proxy.drops = False
        await proxy.mend()
        await recovers(client, shop)
        await becomes(client, health_pb2.HealthCheckResponse.SERVING)


async def _stay_cut(proxy: DatabaseProxy, *, drops: bool) -> None:
    """Leave a proxy cut, or let it take connections only to drop them."""
    if drops:
        proxy.drops = True
        await proxy.mend()


async def test_database_is_away_at_the_start(own_database: str) -> None:
    """The server waits for it: callers whom it cannot know yet hear UNAVAILABLE, and soon an answer."""
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    async with proxied(own_database) as proxy:
        await proxy.cut()
        async with running(proxy.url, token) as (_, client):
            shop = Shop(unique("merchant"), unique("store"))
            assert await health(client) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert away(await failed(get_store(client, shop)))
            await proxy.mend()
            await becomes(client, health_pb2.HealthCheckResponse.SERVING)
            await recovers(client, shop)
            assert (await failed(get_store(client, shop))).code() is grpc.StatusCode.NOT_FOUND


async def test_read_only_database(own_database: str) -> None:
    """Where the URL leads to a standby, as it does while another server takes over, callers come again."""
    operator = await asyncpg.connect(own_database)
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    name = await operator.fetchval("SELECT quote_ident(current_database())")
    await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with running(own_database, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        assert away(await failed(client.put_store(shop.merchant_id, shop.store_id)))
        assert (await failed(get_store(client, shop))).code() is grpc.StatusCode.NOT_FOUND
    await operator.close()


async def test_full_disk(own_database: str, database_url: str) -> None:
    """A database that takes no more connections is away, for now."""
    role = unique("role").replace("-", "_")
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    operator = await asyncpg.connect(database_url)
    await operator.execute(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_data CONNECTION LIMIT 0")
    url = own_database.replace("pointbook@", f"{role}@", 1)
    assert url != own_database
    async with running(url, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        assert away(await failed(get_store(client, shop)))
        await operator.execute(f"ALTER ROLE {role} CONNECTION LIMIT 10")
        await recovers(client, shop)
        assert (await failed(get_store(client, shop))).code() is grpc.StatusCode.NOT_FOUND
    await operator.close()


async def test_database_without_tables(cluster: Cluster) -> None:
    """A fault of the installation is a rich status too, and the log has the cause once."""
    url = await cluster.clone("template0")
    with json_logs(token_cache_module) as written:
        async with running(url, "pb_some_token") as (_, client):
            assert away(await failed(get_store(client, Shop("m", "s"))))

    assert written.getvalue().count("the tokens cannot be loaded") == 1
    assert "api_tokens" in written.getvalue()


async def test_exhausted_pool(database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that gets no connection in time hears UNAVAILABLE, and the next one is answered."""
    monkeypatch.setattr(connection_pool, "POOL_TIMEOUT_SECONDS", 0.2)
    async with running(database_url, admin_token, database_pool_size=1) as (server, client):
        await get_store(client, shop)
        async with server._database.autocommit():
            assert away(await failed(get_store(client, shop)))
        await get_store(client, shop)
        assert server._database.connections_in_use == 0


async def test_transaction_with_permanent_conflicts(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is run again as a whole, a bounded number of times, and then the caller may."""
    runs = 0

    def disturbed(_revision: int, _expected: int | None) -> int:
        nonlocal runs
        runs += 1
        raise RetryTransactionError

    monkeypatch.setattr("pointbook_server.programs.transactions.next_revision", disturbed)
    found = await refused(client.put_store(shop.merchant_id, shop.store_id))

    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "TRANSACTION_CONFLICT")
    assert found.retry_seconds == 1.0
    assert runs == TRANSACTION_ATTEMPTS_MAX


async def test_stopping_server(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Running calls end well; new ones hear that another server will answer."""
    arrived, goes_on = asyncio.Event(), asyncio.Event()
    original = ProgramTransactions.read_store

    async def slow(store: ProgramTransactions, merchant_id: str, store_id: str) -> Any:
        arrived.set()
        await goes_on.wait()
        return await original(store, merchant_id, store_id)

    monkeypatch.setattr(ProgramTransactions, "read_store", slow)
    server = Server(server_settings(drain_seconds=1.0), database_url, senders={}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    first = asyncio.create_task(get_store(client, shop))
    await arrived.wait()
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0)
    found = await refused(get_store(client, shop))
    goes_on.set()

    assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert found.retry_seconds == 1.0
    assert (await first).store.store_id == shop.store_id
    await stopping
    await client.close()


async def test_unreadable_tokens_are_not_invalid_tokens(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of ours on the way to the tokens is logged once with its cause, and the last tokens stay in force."""
    loads = 0

    async def broken() -> Any:
        nonlocal loads
        loads += 1
        raise RuntimeError("the cause")

    monkeypatch.setattr(token_cache_module, "RETRY_INTERVAL_SECONDS", 0.25)
    async with running(database_url, admin_token) as (server, client):
        with json_logs(token_cache_module) as written:
            assert server._tokens is not None
            # The other servers of this process load their tokens as ever.
            monkeypatch.setattr(server._tokens._store, "read_all", broken)
            await until(lambda: loads >= 2)
            await get_store(client, shop)

    assert written.getvalue().count("the tokens cannot be loaded") == 1
    assert "the cause" in written.getvalue()


async def test_health_requires_the_tables(cluster: Cluster) -> None:
    """A database that is not migrated cannot be served from, even when it is migrated only later."""

    async def leave_empty(_url: str) -> None:
        pass

    await cluster.template("pointbook_health", leave_empty)
    url = await cluster.clone("pointbook_health")
    server = Server(server_settings(), url, senders={})
    await server.start()
    address = f"127.0.0.1:{server.port}"

    assert await grpc_health(address) == "NOT_SERVING"
    await migrate(url)

    async def serves() -> bool:
        return await grpc_health(address) == "SERVING"

    await until(serves)
    await server.stop()

"""Failing calls: one rich status each, with a request id; causes only in the log."""

import asyncio
import json
import random
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
from pointbook_server.db.database import TRANSACTION_ATTEMPTS_MAX, Statement
from pointbook_server.db.errors import RetryTransactionError
from pointbook_server.db.migrations import migrate
from pointbook_server.programs.transactions import ProgramTransactions
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.rpc.listening import MESSAGE_BYTES_MAX, METADATA_BYTES_MAX
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, TestClock, at
from support.database_proxy import DatabaseProxy, proxied
from support.embedded_database import Cluster
from support.examples import examples
from support.json_logs import json_logs
from support.probes import grpc_health
from support.refusals import refusal, refused
from support.servers import Service, running_server, server_settings
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

SECRET = "+8613800005678"
"""Personal data, which neither a response nor the log may contain."""


async def get_store(client: Client, shop: Shop, **more: Any) -> programs_pb2.GetStoreResponse:
    """Read the shop's store, the simplest call."""
    request = programs_pb2.GetStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id)
    response: programs_pb2.GetStoreResponse = await client.programs.GetStore(request, **more)
    return response


async def failed(call: Any) -> grpc.aio.AioRpcError:
    """Await a call that must fail, and return its error."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def request_id_of(error: grpc.aio.AioRpcError) -> str:
    """Return the request id of an error."""
    (request_id,) = [value for key, value in error.trailing_metadata() if key == "x-request-id"]
    return str(request_id)


def break_store(patch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make reading a store raise an error."""

    async def broken(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> Any:
        raise error

    patch.setattr(ProgramTransactions, "read_store", broken)


@pytest.mark.parametrize("method", sorted(METHODS))
async def test_malformed_request_is_an_invalid_argument(client: Client, method: str) -> None:
    # A request without fields has no string that could be invalid UTF-8.
    no_text = () if METHODS[method].scope is None else (b"\x0a\x02\xff\xfe",)
    for broken in (b"\xff\xff\xff", b"\x0a\x05ab", *no_text):
        status = await refused(raw_call(client, method, broken))
        assert (status.code, status.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
        assert list(status.fields) == [""]


def raw_call(client: Client, method: str, request: bytes) -> Any:
    """Call a method with raw bytes and the client's own token."""
    channel: Any = client.channel
    return channel.unary_unary(f"/pointbook.v1.{method}")(request)


ADVERSE_TEXTS = (
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
ADVERSE_NUMBERS = (0, 1, -1, 2, 10, 600, 10**9, 2**31 - 1, -(2**31), 10**15, 2**63 - 1, -(2**63))
FAULTS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED}


def valid_requests(shop: Shop, quarantine_id: str = "") -> dict[str, Any]:
    """Build a valid request of each method, with most of its fields set."""
    store: dict[str, Any] = {"merchant_id": shop.merchant_id, "store_id": shop.store_id}
    quarantine: dict[str, Any] = {"merchant_id": shop.merchant_id}
    quarantined: dict[str, Any] = {**quarantine, "quarantine_id": quarantine_id}
    customer = identity_pb2.CustomerRef(
        merchant_id=shop.merchant_id, buyer=identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")
    )
    redemption: dict[str, Any] = {"customer": customer, "program_id": 1, "points": 10}
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
    benefit_key = {"merchant_id": shop.merchant_id, "benefit_id": "gold:1"}
    privilege_key = {"merchant_id": shop.merchant_id, "privilege_id": "gold:p1"}
    privilege = benefits_pb2.CustomPrivilege(**privilege_key, level_code="gold", privilege_name="Lounge")
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
            **redemption, validation_code="123456"
        ),
        "RedemptionService/IssueValidationCode": redemption_pb2.IssueValidationCodeRequest(**redemption),
        "ProgramsService/PutStore": programs_pb2.PutStoreRequest(store=programs_pb2.Store(**store)),
        "ProgramsService/GetStore": programs_pb2.GetStoreRequest(**store),
        "ProgramsService/ListStores": programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id),
        "ProgramsService/PutProgram": programs_pb2.PutProgramRequest(program=program),
        "ProgramsService/GetProgram": programs_pb2.GetProgramRequest(merchant_id=shop.merchant_id, program_id=1),
        "ProgramsService/ListPrograms": programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id),
        "BenefitsService/PutBenefit": benefits_pb2.PutBenefitRequest(benefit=benefit),
        "BenefitsService/GetBenefit": benefits_pb2.GetBenefitRequest(**benefit_key),
        "BenefitsService/ListBenefits": benefits_pb2.ListBenefitsRequest(**store),
        "BenefitsService/PreviewBenefitSchedule": benefits_pb2.PreviewBenefitScheduleRequest(
            **benefit_key, member=member, start_time=at(NOW_MS), issue_count=3
        ),
        "BenefitsService/ListApplicableBenefits": benefits_pb2.ListApplicableBenefitsRequest(
            **store, cart=cart, uses={"gold:1": 1}
        ),
        "BenefitsService/DeleteBenefit": benefits_pb2.DeleteBenefitRequest(**benefit_key),
        "BenefitsService/PutCustomPrivilege": benefits_pb2.PutCustomPrivilegeRequest(custom_privilege=privilege),
        "BenefitsService/GetCustomPrivilege": benefits_pb2.GetCustomPrivilegeRequest(**privilege_key),
        "BenefitsService/ListCustomPrivileges": benefits_pb2.ListCustomPrivilegesRequest(
            merchant_id=shop.merchant_id, level_code="gold", page_size=1
        ),
        "BenefitsService/DeleteCustomPrivilege": benefits_pb2.DeleteCustomPrivilegeRequest(**privilege_key),
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


def adverse_value(chance: random.Random, field: FieldDescriptor) -> Any:
    """Return a random value that careless code fails on."""
    if field.enum_type is not None:
        return chance.choice((0, 1, 2, 3, 4, 99, -1))
    if field.type == field.TYPE_STRING:
        return chance.choice(ADVERSE_TEXTS)
    if field.type == field.TYPE_BYTES:
        return chance.choice(ADVERSE_TEXTS).encode()
    if field.type == field.TYPE_BOOL:
        return chance.random() < 0.5
    number = chance.choice(ADVERSE_NUMBERS)
    return number if field.type == field.TYPE_INT64 else max(min(number, 2**31 - 1), -(2**31))


def corrupt(chance: random.Random, message: Any) -> None:
    """Change one field of a message, or of one of its parts."""
    field = chance.choice(message.DESCRIPTOR.fields)
    target = getattr(message, field.name)
    if hasattr(target, "items"):
        value = field.message_type.fields_by_name.get("value")
        target[chance.choice(ADVERSE_TEXTS)] = (
            chance.choice(ADVERSE_TEXTS) if value is None else adverse_value(chance, value)
        )
    elif hasattr(target, "add"):
        target.add()
    elif hasattr(target, "extend"):
        target.extend([adverse_value(chance, field)])
    elif field.message_type is None:
        setattr(message, field.name, adverse_value(chance, field))
    elif chance.random() < 0.1:
        message.ClearField(field.name)
    else:
        target.SetInParent()
        corrupt(chance, target)


@pytest.mark.parametrize("method", sorted(valid_requests(Shop("", ""))))
async def test_random_requests_never_cause_an_internal_error(client: Client, shop: Shop, method: str) -> None:
    await client.put_program(shop.merchant_id, shop.store_id)
    await client.apply(shop.update())
    await client.benefits.PutBenefit(valid_requests(shop)["BenefitsService/PutBenefit"])
    await client.benefits.PutCustomPrivilege(valid_requests(shop)["BenefitsService/PutCustomPrivilege"])
    quarantined = await client.webhooks.QuarantineWebhook(valid_requests(shop)["WebhooksService/QuarantineWebhook"])
    chance = random.Random(method)  # noqa: S311 - the same requests in every run
    requests = [valid_requests(shop, quarantined.quarantine_id)[method] for _ in range(examples(300))]
    for request in requests[1:]:
        for _ in range(chance.choice((1, 1, 2, 4))):
            corrupt(chance, request)
    first, *others = (request.SerializeToString() for request in requests)
    errors = [await error_of(raw_call(client, method, first))]
    errors += await asyncio.gather(*(error_of(raw_call(client, method, other)) for other in others))
    faults = [
        (error.code(), request)
        for error, request in zip(errors, requests, strict=True)
        if error is not None and error.code() in FAULTS
    ]

    assert faults == []
    assert errors[0] is None


async def test_error_has_one_error_info(client: Client, shop: Shop) -> None:
    status = await refused(get_store(client, Shop(shop.merchant_id, "nowhere")))

    assert (status.code, status.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
    assert status.metadata == {"store_id": "nowhere"}
    assert status.retry_seconds is None


async def test_response_carries_a_request_id(client: Client, shop: Shop) -> None:
    unknown = Shop(shop.merchant_id, "nowhere")
    first = request_id_of(await failed(get_store(client, unknown)))
    second = request_id_of(await failed(get_store(client, unknown)))

    assert len(first) == len(second) == 16
    assert first != second


@pytest.mark.parametrize("request_id", ["order-17.a_B", "x" * 64])
async def test_callers_request_id_is_used(client: Client, shop: Shop, request_id: str) -> None:
    """A call can be traced through the logs of several services."""
    error = await failed(get_store(client, Shop(shop.merchant_id, "no"), metadata=(("x-request-id", request_id),)))

    assert request_id == request_id_of(error)


@pytest.mark.parametrize("request_id", ["", "x" * 65, "a b", 'a"b', "a=b", "{}"])
async def test_unsafe_request_id_is_replaced(client: Client, shop: Shop, request_id: str) -> None:
    """Callers must not be able to forge log lines."""
    error = await failed(get_store(client, Shop(shop.merchant_id, "no"), metadata=(("x-request-id", request_id),)))

    assert request_id != request_id_of(error)


async def test_refused_call_carries_a_request_id(service: Service, shop: Shop) -> None:
    client = Client(service.server.port)
    error = await failed(get_store(client, shop, metadata=(("x-request-id", "r-1"),)))
    await client.close()

    assert request_id_of(error) == "r-1"


async def test_internal_error_hides_its_cause(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log has the cause under the request id, without local variables."""
    break_store(monkeypatch, RuntimeError("the cause"))
    with json_logs(handlers_module) as written:
        error = await failed(get_store(client, shop, metadata=(("x-request-id", "r-2"),)))
        status = refusal(error)

    assert (status.code, status.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert status.metadata == {"request_id": "r-2"}
    assert "cause" not in status.message.replace("has the cause under", "")
    assert "RuntimeError" not in str(error.trailing_metadata())
    (line,) = [line for line in map(json.loads, written.getvalue().splitlines()) if line["level"] == "error"]
    assert (line["request_id"], line["method"]) == ("r-2", "ProgramsService/GetStore")
    assert (line["exception"][0]["exc_type"], line["exception"][0]["exc_value"]) == ("RuntimeError", "the cause")
    assert all("locals" not in frame for frame in line["exception"][0]["frames"])
    assert shop.merchant_id not in written.getvalue()
    assert shop.store_id not in written.getvalue()


async def test_sql_defect_logs_no_parameters(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch, service: Service
) -> None:
    """They can be personal data."""

    async def broken(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> None:
        async with service.server._database.autocommit() as connection:
            await connection.execute(
                Statement(text("SELECT no_such_function(CAST(:mobile AS text))")), {"mobile": SECRET}
            )

    monkeypatch.setattr(ProgramTransactions, "read_store", broken)
    with json_logs(handlers_module) as written:
        error = await failed(get_store(client, shop))

    assert error.code() is grpc.StatusCode.INTERNAL
    assert "no_such_function" in written.getvalue()
    assert SECRET not in written.getvalue()
    assert "no_such_function" not in (error.details() or "") + str(error.trailing_metadata())


async def test_stray_cancellation_ends_with_a_status(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CancelledError without a cancelled call is a defect; the caller waits."""
    break_store(monkeypatch, asyncio.CancelledError())

    status = await refused(get_store(client, shop, timeout=5))

    assert (status.code, status.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def test_inner_timeout_is_not_the_calls_deadline(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TimeoutError before the call's deadline is a defect."""
    break_store(monkeypatch, TimeoutError())

    assert (await refused(get_store(client, shop))).code is grpc.StatusCode.INTERNAL


async def test_server_deadline_bounds_every_call(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = asyncio.Event()

    async def slow(_store: ProgramTransactions, _merchant_id: str, _store_id: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(ProgramTransactions, "read_store", slow)
    async with running_server(database_url, admin_token, call_deadline_seconds=0.3) as (_, client):
        for timeout in (None, 50):
            status = await refused(get_store(client, shop, timeout=timeout))
            assert (status.code, status.reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
            assert ended.is_set()


async def test_callers_deadline_ends_the_work(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_messages_over_one_mib_are_refused(client: Client) -> None:
    method = "ProgramsService/GetStore"
    error = await failed(raw_call(client, method, b"\xff" * MESSAGE_BYTES_MAX))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    error = await failed(raw_call(client, method, b"\xff" * (MESSAGE_BYTES_MAX + 1)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_metadata_over_eight_kib_is_refused(client: Client, shop: Shop) -> None:
    await get_store(client, shop, metadata=(("x-filler", "x" * (METADATA_BYTES_MAX - 1_000)),))
    error = await failed(get_store(client, shop, metadata=(("x-filler", "x" * METADATA_BYTES_MAX),)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_unknown_health_service_logs_no_error(service: Service) -> None:
    """Health needs no token, so it must not fill the log with errors."""
    with json_logs(handlers_module) as written:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{service.server.port}") as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            error = await failed(stub.Check(health_pb2.HealthCheckRequest(service="nothing")))

    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "internal error" not in written.getvalue()


def is_unavailable(error: grpc.aio.AioRpcError) -> bool:
    """Return whether an error is DATABASE_UNAVAILABLE with a retry delay."""
    status = refusal(error)
    return (status.code, status.reason, status.retry_seconds) == (
        grpc.StatusCode.UNAVAILABLE,
        "DATABASE_UNAVAILABLE",
        1.0,
    )


async def error_of(call: Any) -> grpc.aio.AioRpcError | None:
    """Await a call, and return its error if it fails."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def until_recovered(client: Client, shop: Shop) -> None:
    """Wait until calls reach the database. Until then they fail with UNAVAILABLE."""

    async def is_back() -> bool:
        error = await error_of(get_store(client, shop))
        assert error is None or error.code() is grpc.StatusCode.NOT_FOUND or is_unavailable(error), repr(error)
        return error is None or not is_unavailable(error)

    await until(is_back)


async def health(client: Client) -> int:
    """Return the server's health status."""
    response = await health_pb2_grpc.HealthStub(client.channel).Check(health_pb2.HealthCheckRequest())
    return int(response.status)


async def until_health_is(client: Client, status: int) -> None:
    """Wait until health has a status."""

    async def has_become() -> bool:
        return await health(client) == status

    await until(has_become)


async def test_calls_on_terminated_connections_are_unavailable(client: Client, shop: Shop, database_url: str) -> None:
    name = database_url.partition("?")[0].rpartition("/")[2]
    operator = await asyncpg.connect(database_url)
    terminate = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = $1 AND pid <> pg_backend_pid()"
    )
    for _ in range(3):
        await asyncio.gather(*(get_store(client, shop) for _ in range(20)))
        assert await operator.fetchval(terminate, name) >= 1
        for _ in range(20):
            responses = await asyncio.gather(*(get_store(client, shop) for _ in range(5)), return_exceptions=True)
            failures = [response for response in responses if isinstance(response, BaseException)]
            assert [
                error for error in failures if not (isinstance(error, grpc.aio.AioRpcError) and is_unavailable(error))
            ] == []
        await until_recovered(client, shop)
    await operator.close()


async def test_call_whose_statement_is_terminated_is_unavailable(client: Client, shop: Shop, database_url: str) -> None:
    """Its transaction had no effect."""
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
    assert is_unavailable(await waiting)
    await transaction.rollback()
    await until_recovered(client, shop)
    await holder.close()
    await operator.close()


@pytest.fixture
async def own_database(cluster: Cluster, database_url: str) -> str:  # noqa: ARG001 - creates the template
    """A database for one test."""
    return await cluster.clone("pointbook_template")


@pytest.mark.parametrize("drops", [False, True])
async def test_health_and_calls_recover_after_an_outage(own_database: str, *, drops: bool) -> None:
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    async with proxied(own_database) as proxy, running_server(proxy.url, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        await client.put_store(shop.merchant_id, shop.store_id)
        await until_health_is(client, health_pb2.HealthCheckResponse.SERVING)

        await proxy.cut()
        await _stay_cut(proxy, drops=drops)
        for _ in range(5):
            assert is_unavailable(await failed(get_store(client, shop)))
            assert is_unavailable(await failed(client.put_store(shop.merchant_id, shop.store_id)))
        await until_health_is(client, health_pb2.HealthCheckResponse.NOT_SERVING)

        await proxy.cut()
        proxy.drops = False
        await proxy.restore()
        await until_recovered(client, shop)
        await until_health_is(client, health_pb2.HealthCheckResponse.SERVING)


async def _stay_cut(proxy: DatabaseProxy, *, drops: bool) -> None:
    """Leave a proxy cut, or make it accept connections and drop them."""
    if drops:
        proxy.drops = True
        await proxy.restore()


async def test_server_waits_for_a_database_that_is_unavailable_at_the_start(own_database: str) -> None:
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    async with proxied(own_database) as proxy:
        await proxy.cut()
        async with running_server(proxy.url, token) as (_, client):
            shop = Shop(unique("merchant"), unique("store"))
            assert await health(client) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert is_unavailable(await failed(get_store(client, shop)))
            await proxy.restore()
            await until_health_is(client, health_pb2.HealthCheckResponse.SERVING)
            await until_recovered(client, shop)
            assert (await failed(get_store(client, shop))).code() is grpc.StatusCode.NOT_FOUND


async def test_writes_to_a_read_only_database_are_unavailable(own_database: str) -> None:
    """The URL can lead to a standby during a failover."""
    operator = await asyncpg.connect(own_database)
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    name = await operator.fetchval("SELECT quote_ident(current_database())")
    await operator.execute(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    async with running_server(own_database, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        assert is_unavailable(await failed(client.put_store(shop.merchant_id, shop.store_id)))
        assert (await failed(get_store(client, shop))).code() is grpc.StatusCode.NOT_FOUND
    await operator.close()


async def test_calls_without_a_free_connection_slot_are_unavailable(own_database: str, database_url: str) -> None:
    role = unique("role").replace("-", "_")
    token = await make_token(own_database, [ALL_MERCHANTS], list(Scope))
    operator = await asyncpg.connect(database_url)
    await operator.execute(f"CREATE ROLE {role} LOGIN IN ROLE pg_read_all_data CONNECTION LIMIT 0")
    url = own_database.replace("pointbook@", f"{role}@", 1)
    assert url != own_database
    async with running_server(url, token) as (_, client):
        shop = Shop(unique("merchant"), unique("store"))
        assert is_unavailable(await failed(get_store(client, shop)))
        await operator.execute(f"ALTER ROLE {role} CONNECTION LIMIT 10")
        await until_recovered(client, shop)
        assert (await failed(get_store(client, shop))).code() is grpc.StatusCode.NOT_FOUND
    await operator.close()


async def test_database_without_tables_is_unavailable_and_logged_once(cluster: Cluster) -> None:
    url = await cluster.clone("template0")
    with json_logs(token_cache_module) as written:
        async with running_server(url, "pb_some_token") as (_, client):
            assert is_unavailable(await failed(get_store(client, Shop("m", "s"))))

    assert written.getvalue().count("the tokens cannot be loaded") == 1
    assert "api_tokens" in written.getvalue()


async def test_calls_of_an_exhausted_pool_are_unavailable(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_pool, "POOL_TIMEOUT_SECONDS", 0.2)
    async with running_server(database_url, admin_token, database_pool_size=1) as (server, client):
        await get_store(client, shop)
        async with server._database.autocommit():
            assert is_unavailable(await failed(get_store(client, shop)))
        await get_store(client, shop)
        await until(lambda: server._database.connections_in_use == 0)


async def test_permanent_conflicts_abort_the_call(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transaction runs a bounded number of times."""
    runs = 0

    def conflicting(_revision: int, _expected: int | None) -> int:
        nonlocal runs
        runs += 1
        raise RetryTransactionError

    monkeypatch.setattr("pointbook_server.programs.transactions.next_revision", conflicting)
    status = await refused(client.put_store(shop.merchant_id, shop.store_id))

    assert (status.code, status.reason) == (grpc.StatusCode.ABORTED, "TRANSACTION_CONFLICT")
    assert status.retry_seconds == 1.0
    assert runs == TRANSACTION_ATTEMPTS_MAX


async def test_stopping_server_finishes_running_calls_and_refuses_new_ones(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived, released = asyncio.Event(), asyncio.Event()
    original = ProgramTransactions.read_store

    async def slow(store: ProgramTransactions, merchant_id: str, store_id: str) -> Any:
        arrived.set()
        await released.wait()
        return await original(store, merchant_id, store_id)

    monkeypatch.setattr(ProgramTransactions, "read_store", slow)
    server = Server(server_settings(drain_seconds=1.0), database_url, senders={}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    first = asyncio.create_task(get_store(client, shop))
    await arrived.wait()
    stopping = asyncio.create_task(server.stop())
    await asyncio.sleep(0)
    status = await refused(get_store(client, shop))
    released.set()

    assert (status.code, status.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert status.retry_seconds == 1.0
    assert (await first).store.store_id == shop.store_id
    await stopping
    await client.close()


async def test_unreadable_tokens_are_not_invalid_tokens(
    database_url: str, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect in loading tokens is logged once, and the loaded ones stay valid."""
    loads = 0

    async def broken() -> Any:
        nonlocal loads
        loads += 1
        raise RuntimeError("the cause")

    monkeypatch.setattr(token_cache_module, "RETRY_INTERVAL_SECONDS", 0.25)
    async with running_server(database_url, admin_token) as (server, client):
        with json_logs(token_cache_module) as written:
            assert server._tokens is not None
            # Other servers of this process still load their tokens.
            monkeypatch.setattr(server._tokens._transactions, "read_all", broken)
            await until(lambda: loads >= 2)
            await get_store(client, shop)

    assert written.getvalue().count("the tokens cannot be loaded") == 1
    assert "the cause" in written.getvalue()


async def test_health_is_not_serving_until_the_database_is_migrated(cluster: Cluster) -> None:
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

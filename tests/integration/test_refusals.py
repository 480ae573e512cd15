"""Refused calls: stored for support, bounded, without delaying callers."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from unittest.mock import patch

import grpc
import pytest
from structlog.contextvars import bound_contextvars, get_contextvars
from structlog.testing import capture_logs

import pointbook_server.maintenance
from pointbook.v1 import customers_pb2, identity_pb2, redemption_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.access.rules import split_bearer
from pointbook_server.db.database import Database
from pointbook_server.delivery.sender import DeliveryFailedError
from pointbook_server.errors import PointbookError
from pointbook_server.metrics import Metrics
from pointbook_server.programs.model import Channel
from pointbook_server.reasons import Reason
from pointbook_server.redemption.refusal import Refusal, RefusalReason, RefusedMethod
from pointbook_server.retention import build_clean_ups
from pointbook_server.server import Server
from pointbook_server.support import recorder as recording
from pointbook_server.support.recorder import RefusalRecorder
from pointbook_server.support.transactions import RefusalTransactions
from support.clean_ups import clean_up_of
from support.clients import Client
from support.clocks import NOW_MS, TestClock, at
from support.codes import WRONG_CODE, issue_code
from support.connections import superuser
from support.outbox import Outbox
from support.redemption import customer_ref, earn, redeem, redeem_request, validate_request
from support.refusals import refused
from support.servers import Service, server_settings
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until

DAY_SECONDS = 86_400
METHODS = redemption_pb2.RefusedMethod


@pytest.fixture
async def shop(service: Service, shop: Shop) -> AsyncIterator[Shop]:
    """Create a shop with the example program, and a buyer with 50 points."""
    await service.client.put_program(shop.merchant_id, shop.store_id)
    await earn(service.client, shop, 50)
    yield shop
    service.clock.now_ms = NOW_MS


async def list_page(client: Client, shop: Shop, **changes: Any) -> redemption_pb2.ListRefusalsResponse:
    """Read a page of refusals, by default of the shop's buyer."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id} | changes
    if not {"customer", "customer_id", "external_reference_number"} & set(values):
        values["customer"] = customer_ref(shop)
    return await client.redemption.ListRefusals(redemption_pb2.ListRefusalsRequest(**values))


async def has_refusals(client: Client, shop: Shop) -> bool:
    """Return whether refusals of the shop's buyer are stored."""
    return bool((await list_page(client, shop)).refusals)


async def has_no_refusals(client: Client, shop: Shop) -> bool:
    """Return whether no refusals of the shop's buyer are stored."""
    return not await has_refusals(client, shop)


async def list_reasons(client: Client, shop: Shop, **changes: Any) -> list[tuple[str, list[str]]]:
    """Return the method and the reasons of each refusal, the newest first."""
    return [
        (METHODS.Name(each.method).removeprefix("REFUSED_METHOD_"), [violation.reason for violation in each.violations])
        for each in (await list_page(client, shop, **changes)).refusals
    ]


async def test_each_refused_call_is_listed_with_every_reason(client: Client, shop: Shop) -> None:
    both = ["INSUFFICIENT_POINTS", "NOT_A_MULTIPLE"]
    await client.redemption.ValidateRedemption(validate_request(shop, 20))
    await client.redemption.ValidateRedemption(validate_request(shop, 75))
    await refused(issue_code(client, shop, 75))
    await refused(redeem(client, redeem_request(shop, 75)))
    await redeem(client, redeem_request(shop, 20))

    assert await list_reasons(client, shop) == [
        ("REDEEM_POINTS", both),
        ("ISSUE_VALIDATION_CODE", both),
        ("VALIDATE_REDEMPTION", both),
    ]


async def test_refusal_has_customer_points_reasons_metadata_and_token(service: Service, shop: Shop) -> None:
    bearer = await make_token(service.database_url, [ALL_MERCHANTS], list(Scope))
    till = Client(service.server.port, bearer)
    service.clock.move(7)
    await refused(redeem(till, redeem_request(shop, 75, external_reference_number="order-1")))
    (refusal,) = (await list_page(till, shop)).refusals
    await till.close()

    violations = [
        redemption_pb2.RedemptionStatus(
            code=803,
            reason="INSUFFICIENT_POINTS",
            message="Only 50 points are active.",
            metadata={"points": "75", "active_points": "50"},
        ),
        redemption_pb2.RedemptionStatus(
            code=807,
            reason="NOT_A_MULTIPLE",
            message="Points are redeemed in multiples of 10.",
            metadata={"points": "75", "multiples_of": "10"},
        ),
    ]
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")
    assert refusal == redemption_pb2.Refusal(
        time=at(NOW_MS + 7_000),
        method=METHODS.REFUSED_METHOD_REDEEM_POINTS,
        customer=redemption_pb2.ResolvedCustomer(buyer=buyer),
        program_id=1,
        points=75,
        active_points=50,
        status=violations[0],
        violations=violations,
        external_reference_number="order-1",
        actor=split_bearer(bearer)[0],
    )


@pytest.mark.parametrize(
    ("changes", "reason", "code"),
    [
        ({"validation_code": WRONG_CODE}, "CODE_INVALID", 808),
        ({"challenge_id": "x"}, "MISSED_CALL_NOT_ENABLED", 823),
        ({"skip_validation": True}, "SKIP_NOT_ALLOWED", 824),
        ({"points": 0}, "POINTS_NOT_POSITIVE", 801),
        ({"points": 0, "currency_input": True, "currency_value": "0.005"}, "CURRENCY_VALUE_NOT_WHOLE_POINTS", 801),
        ({"group_redemption": True}, "CROSS_PROGRAM_REDEMPTION_NOT_ALLOWED", 828),
        ({"user_group2": {"id": "none"}}, "GROUP_REDEMPTION_NOT_ALLOWED", 828),
    ],
)
async def test_every_kind_of_reason_is_stored(
    client: Client, shop: Shop, changes: dict[str, Any], reason: str, code: int
) -> None:
    points = changes.pop("points", 10) if "points" in changes else 10
    await client.redemption.ValidateRedemption(validate_request(shop, points, **changes))
    await refused(redeem(client, redeem_request(shop, points, **changes)))

    for refusal in (await list_page(client, shop)).refusals:
        assert (reason, code) in [(each.reason, each.code) for each in refusal.violations]


async def test_reused_reference_and_unissued_code_are_refusals(client: Client, shop: Shop) -> None:
    await redeem(client, redeem_request(shop, 10, external_reference_number="mine"))
    await refused(redeem(client, redeem_request(shop, 20, external_reference_number="mine")))
    await client.put_program(
        shop.merchant_id, shop.store_id, validation={"channels": [redemption_pb2.VALIDATION_TYPE_EMAIL]}
    )
    await refused(issue_code(client, shop, 10, validation_type=redemption_pb2.VALIDATION_TYPE_SMS))

    refusals = (await list_page(client, shop)).refusals
    assert [(each.status.reason, each.status.code) for each in refusals] == [
        ("CHANNEL_NOT_ENABLED", 860),
        ("REFERENCE_REUSED", 0),
    ]
    assert refusals[0].status.metadata == {"validation_type": "SMS"}


async def test_code_not_issued_while_validating_is_refusal(service: Service, client: Client, shop: Shop) -> None:
    await client.put_program(
        shop.merchant_id, shop.store_id, criteria={}, validation={"channels": [redemption_pb2.VALIDATION_TYPE_SMS]}
    )
    service.outbox.error = DeliveryFailedError("no")
    response = await client.redemption.ValidateRedemption(validate_request(shop, 10, issue_otp=True))
    await refused(issue_code(client, shop, 10))
    service.outbox.error = None

    assert (response.redeemable, [warning.metadata["cause"] for warning in response.warnings]) == (
        True,
        ["DELIVERY_FAILED"],
    )
    issued, validated = (await list_page(client, shop)).refusals
    assert validated.status.reason == "DELIVERY_FAILED"
    assert validated == issued


@pytest.mark.parametrize(
    "changes",
    [{"customer": {"external_id": "unknown"}}, {"customer": {"mobile": "12"}}, {"program_id": 99}],
    ids=["no customer", "no identifier", "no program"],
)
async def test_calls_without_known_customer_or_program_are_not_stored(
    service: Service, client: Client, shop: Shop, changes: dict[str, Any]
) -> None:
    """Otherwise a caller could fill the table."""
    if "customer" in changes:
        changes = {"customer": identity_pb2.CustomerRef(merchant_id=shop.merchant_id, **changes["customer"])}
    assert not (await client.redemption.ValidateRedemption(validate_request(shop, 75, **changes))).redeemable
    await refused(redeem(client, redeem_request(shop, 75, **changes)))

    assert not (await list_page(client, shop)).refusals
    async with superuser(service) as connection:
        query = "SELECT count(*) FROM redemption_refusals WHERE merchant_id = $1"
        assert await connection.fetchval(query, shop.merchant_id) == 0


async def test_failed_calls_are_not_refusals(client: Client, shop: Shop) -> None:
    await refused(client.redemption.ValidateRedemption(validate_request(shop, 75, validation_type=99)))
    away = PointbookError(Reason.DATABASE_UNAVAILABLE, "away")
    with patch("pointbook_server.redemption.transactions.RedemptionTransactions.redeem", side_effect=away):
        await refused(redeem(client, redeem_request(shop, 10)))
    assert not (await list_page(client, shop)).refusals


async def test_refusals_are_found_by_reference_and_by_customer(client: Client, shop: Shop) -> None:
    await earn(client, shop, 50, "other")
    for customer, reference in (
        (customer_ref(shop), "a"),
        (customer_ref(shop, "other"), "a"),
        (customer_ref(shop), "b"),
    ):
        await refused(redeem(client, redeem_request(shop, 75, customer=customer, external_reference_number=reference)))
    await client.redemption.ValidateRedemption(validate_request(shop, 75))

    counts = [
        len((await list_page(client, shop, **filters)).refusals)
        for filters in (
            {"external_reference_number": "a"},
            {"external_reference_number": "a", "customer": customer_ref(shop)},
            {"external_reference_number": "b", "customer": customer_ref(shop, "other")},
            {"customer": customer_ref(shop)},
            {"external_reference_number": "none"},
        )
    ]
    assert counts == [2, 1, 0, 3, 0]
    other = Shop(unique("merchant"), unique("store"))
    assert not (await list_page(client, other, external_reference_number="a")).refusals


async def test_refusals_are_filtered_by_time_and_paged(service: Service, client: Client, shop: Shop) -> None:
    for number in range(5):
        await refused(redeem(client, redeem_request(shop, 75, external_reference_number=f"order-{number}")))
        service.clock.move(60)

    middle = at(NOW_MS + 120_000)
    assert len((await list_page(client, shop, start_time=middle)).refusals) == 3
    assert len((await list_page(client, shop, end_time=middle)).refusals) == 2
    token = ""
    references: list[str] = []
    while token or not references:
        response = await list_page(client, shop, page_size=2, page_token=token)
        references += [each.external_reference_number for each in response.refusals]
        token = response.next_page_token
    assert references == [f"order-{number}" for number in reversed(range(5))]


async def test_list_requires_customer_or_reference(client: Client, shop: Shop) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "key"),
        ({"external_reference_number": "two words"}, "external_reference_number"),
        ({"customer_id": ""}, "customer_id"),
    ]
    for values, field in wrong:
        request = redemption_pb2.ListRefusalsRequest(merchant_id=shop.merchant_id, **values)
        assert set((await refused(client.redemption.ListRefusals(request))).fields) == {field}
    unknown = await refused(list_page(client, shop, customer_id="unknown"))
    assert (unknown.code, unknown.reason) == (grpc.StatusCode.NOT_FOUND, "CUSTOMER_NOT_FOUND")


async def test_refusals_contain_no_personal_data_after_redaction(service: Service, client: Client, shop: Shop) -> None:
    await client.put_customer(
        shop.merchant_id,
        "c-1",
        mobile="+8613812345678",
        buyers=[{"store_id": shop.store_id, "buyer_id": "buyer"}],
    )
    await client.redemption.ValidateRedemption(
        validate_request(shop, 75, customer=customer_ref(shop, mobile="+8613812345678"))
    )
    request = customers_pb2.RedactCustomerRequest(merchant_id=shop.merchant_id, customer_id="c-1", reason="asked")
    await client.customers.RedactCustomer(request)

    assert len((await list_page(client, shop, customer_id="c-1")).refusals) == 1
    async with superuser(service) as connection:
        query = "SELECT r::text FROM redemption_refusals r WHERE merchant_id = $1"
        (row,) = await connection.fetch(query, shop.merchant_id)
    assert "customer c-1" in row[0]
    assert "13812345678" not in row[0]


# Retention.


async def start_server(database_url: str, clock: TestClock, keep_days: int) -> Server:
    """Start a server that keeps refusals for some days."""
    settings = server_settings(refusals_keep_days=keep_days)
    server = Server(settings, database_url, senders={Channel.SMS: Outbox()}, clock=clock)
    await server.start()
    return server


async def test_refusals_are_written_when_the_server_stops(
    service: Service, client: Client, shop: Shop, admin_token: str
) -> None:
    server = await start_server(service.database_url, service.clock, 30)
    other = Client(server.port, admin_token)
    with patch.object(recording, "WRITE_PAUSE_SECONDS", 1_000.0):
        await other.redemption.ValidateRedemption(validate_request(shop, 75))
        await other.close()
        assert not (await list_page(client, shop)).refusals
        await server.stop()
    assert len((await list_page(client, shop)).refusals) == 1


async def test_refusals_are_written_in_the_background(
    service: Service, client: Client, shop: Shop, admin_token: str
) -> None:
    server = await start_server(service.database_url, service.clock, 30)
    other = Client(server.port, admin_token)
    with patch.object(recording, "WRITE_PAUSE_SECONDS", 0.01):
        await other.redemption.ValidateRedemption(validate_request(shop, 75))
        await until(lambda: has_refusals(client, shop))
    await other.close()
    await server.stop()


async def test_zero_days_store_none_and_delete_stored_ones(
    service: Service, database: Database, client: Client, shop: Shop, admin_token: str
) -> None:
    await client.redemption.ValidateRedemption(validate_request(shop, 75))
    assert (await list_page(client, shop)).refusals
    server = await start_server(service.database_url, service.clock, 0)
    other = Client(server.port, admin_token)
    await other.redemption.ValidateRedemption(validate_request(shop, 75))
    await other.close()
    await server.stop()
    assert len((await list_page(client, shop)).refusals) == 1

    service.clock.move(1)
    settings = server_settings(refusals_keep_days=0)
    clean_ups = build_clean_ups(settings, database, service.server.services.quarantine)
    await clean_up_of(clean_ups, "redemption_refusals").clean_up(service.clock())
    assert not (await list_page(client, shop)).refusals


def make_recorder(database: Database, clock: TestClock, *, keep_days: int = 30) -> RefusalRecorder:
    """Create a recorder on a database."""
    return RefusalRecorder(RefusalTransactions(database), clock, Metrics(), keep_days=keep_days)


def make_refusal(merchant_id: str, at_ms: int = NOW_MS, reference: str = "") -> Refusal:
    """Build a refusal."""
    why = (RefusalReason(807, "NOT_A_MULTIPLE", "Points are redeemed in multiples of 10.", {"points": "75"}),)
    return Refusal(
        unique("refusal"), merchant_id, "customer c", at_ms, RefusedMethod.REDEEM, 1, 75, 50, why, reference, ""
    )


async def count_stored(service: Service, merchant_id: str) -> int:
    """Return how many refusals of a merchant are stored."""
    async with superuser(service) as connection:
        query = "SELECT count(*) FROM redemption_refusals WHERE merchant_id = $1"
        return int(await connection.fetchval(query, merchant_id))


def read_metric(refusals: RefusalRecorder) -> dict[str, int]:
    """Return the metric's counts by outcome."""
    samples = next(iter(refusals._metrics.refusals.collect())).samples
    return {sample.labels["outcome"]: int(sample.value) for sample in samples if sample.name.endswith("_total")}


async def test_maintenance_deletes_old_refusals(service: Service, client: Client, shop: Shop) -> None:
    await client.redemption.ValidateRedemption(validate_request(shop, 75))
    assert (await list_page(client, shop)).refusals
    service.clock.move(31 * DAY_SECONDS)
    with patch.object(pointbook_server.maintenance, "INTERVAL_SECONDS", 0.02):
        server = await start_server(service.database_url, service.clock, 30)
        await until(lambda: has_no_refusals(client, shop))
        await server.stop()


async def test_refusals_of_merchant_are_limited_per_minute(service: Service, database: Database) -> None:
    clock = TestClock()
    refusals = make_recorder(database, clock)
    loud, quiet = unique("merchant"), unique("merchant")
    for _ in range(recording.REFUSALS_PER_MINUTE_MAX + 50):
        refusals.record(make_refusal(loud, clock.now_ms))
    refusals.record(make_refusal(quiet, clock.now_ms))
    refusals.record(make_refusal(loud, clock.now_ms + 60_000))
    await refusals.close()

    assert [await count_stored(service, merchant_id) for merchant_id in (loud, quiet)] == [601, 1]
    assert read_metric(refusals) == {"KEPT": 602, "RATE_LIMITED": 50}


async def test_queue_is_bounded_during_outage_and_written_afterwards(service: Service, database: Database) -> None:
    refusals = make_recorder(database, TestClock())
    merchants = [unique("merchant") for _ in range(3)]
    away = PointbookError(Reason.DATABASE_UNAVAILABLE, "away")
    with patch.object(recording, "REFUSALS_QUEUED_MAX", 20):
        with patch.object(RefusalTransactions, "insert", side_effect=away):
            for number in range(30):
                refusals.record(make_refusal(merchants[number % 3]))
                await refusals.flush()
        await refusals.flush()
        refusals.record(make_refusal(merchants[0]))
        await refusals.close()

    assert sum([await count_stored(service, merchant_id) for merchant_id in merchants]) == 21
    assert read_metric(refusals) == {"KEPT": 21, "BUFFER_FULL": 10}


async def fail(*_: Any) -> None:
    """Fail like an unavailable database."""
    raise PointbookError(Reason.DATABASE_UNAVAILABLE, "away")


async def hang(*_: Any) -> None:
    """Hang like a database that does not respond."""
    await asyncio.Event().wait()


@pytest.mark.parametrize("insert", [fail, hang])
async def test_unwritten_refusals_are_logged_when_server_stops(database: Database, insert: Any) -> None:
    refusals = make_recorder(database, TestClock())
    with capture_logs() as logs, patch.object(RefusalTransactions, "insert", insert):
        refusals.record(make_refusal(unique("merchant")))
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await refusals.close()
        assert refusals._writer is not None
        await asyncio.wait([refusals._writer], timeout=5.0)

    assert refusals._writer.cancelled()
    assert {"event": "refusals lost", "log_level": "warning", "count": 1} in logs


async def test_writer_has_no_logging_context_of_a_call(database: Database) -> None:
    refusals = make_recorder(database, TestClock())
    names: list[dict[str, Any]] = []

    async def insert(*_: Any) -> None:
        names.append(get_contextvars())

    with patch.object(RefusalTransactions, "insert", insert), patch.object(recording, "WRITE_PAUSE_SECONDS", 0.0):
        with bound_contextvars(request_id="r-1"):
            refusals.record(make_refusal(unique("merchant")))
        assert refusals._writer is not None
        await refusals._writer
    assert names == [{}]


async def test_interrupted_write_is_stored_once(service: Service, database: Database) -> None:
    refusals = make_recorder(database, TestClock())
    merchant_id = unique("merchant")
    insert = RefusalTransactions.insert
    written = asyncio.Event()

    async def slow_insert(self: RefusalTransactions, *arguments: Any) -> None:
        await insert(self, *arguments)
        written.set()
        await asyncio.Event().wait()

    refusals.record(make_refusal(merchant_id))
    with patch.object(RefusalTransactions, "insert", slow_insert):
        flushing = asyncio.create_task(refusals.flush())
        await written.wait()
        flushing.cancel()
        await asyncio.gather(flushing, return_exceptions=True)
    await refusals.close()

    assert await count_stored(service, merchant_id) == 1


async def test_refused_validation_sends_no_extra_statement(service: Service, shop: Shop, admin_token: str) -> None:
    """The server is new, so that no write of earlier refusals is pending."""
    server = await start_server(service.database_url, service.clock, 30)
    client = Client(server.port, admin_token)
    sent: list[str] = []
    insert = RefusalTransactions.insert

    async def noted_insert(self: RefusalTransactions, merchant_id: str, refusals: list[Refusal]) -> None:
        sent.extend([merchant_id] if merchant_id == shop.merchant_id else [])
        await insert(self, merchant_id, refusals)

    with (
        patch.object(RefusalTransactions, "insert", noted_insert),
        patch.object(recording, "WRITE_PAUSE_SECONDS", 60.0),
    ):
        for _ in range(5):
            await client.redemption.ValidateRedemption(validate_request(shop, 75))
        assert sent == []
        await list_page(client, shop)
    assert sent == [shop.merchant_id]
    await client.close()
    await server.stop()

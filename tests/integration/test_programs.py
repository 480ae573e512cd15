"""ProgramsService on a real database: stores, programs, etags and lists."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
import structlog
from google.protobuf.duration_pb2 import Duration

from pointbook.v1 import (
    benefits_pb2,
    customers_pb2,
    identity_pb2,
    points_pb2,
    programs_pb2,
    redemption_pb2,
    webhooks_pb2,
)
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from pointbook_server.rpc import pagination
from support.clients import Client
from support.clocks import NOW_MS, at
from support.connections import superuser
from support.refusals import refused, wrong_fields
from support.servers import Service
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until_locks_are_awaited

SMS = redemption_pb2.VALIDATION_TYPE_SMS
EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
INVALID = redemption_pb2.VALIDATION_TYPE_INVALID
SMS_NUMBER_TYPES = [programs_pb2.PHONE_NUMBER_TYPE_VOIP, programs_pb2.PHONE_NUMBER_TYPE_MOBILE]


def full_program(shop: Shop, **changes: Any) -> programs_pb2.Program:
    """Return a program with a value in every field."""
    values: dict[str, Any] = {
        "merchant_id": shop.merchant_id,
        "program_id": 2**63 - 1,
        "display_name": "Café 点 Club",
        "store_ids": [shop.store_id],
        "redemption_enabled": True,
        "time_zone": "Asia/Shanghai",
        "default_region": "CN",
        "allowed_regions": ["CN", "HK"],
        "criteria": {
            "multiples_of": 1,
            "min_points_per_redemption": 10,
            "max_points_per_redemption": 10**15,
            "min_balance_required": 3,
            "min_lifetime_points": 4,
            "max_points_per_day": 15,
            "max_points_per_week": 16,
            "max_points_per_month": 17,
        },
        "point_value": "0.010",
        "currency_code": "USD",
        "local_currency_code": "CNY",
        "local_currency_rate": "7.250000000001",
        "local_currency_decimals": 0,
        "allow_group_redemption": True,
        "allow_cross_program_redemption": True,
        "settlement_window": Duration(seconds=60),
        "settlement_lead": Duration(seconds=0),
        "settlement_scenes": ["POS_DECREASE", "SOMETHING_NEW"],
        "validation": {
            "required": True,
            "allow_skip": True,
            "channels": [EMAIL, SMS, MISSED_CALL],
            "code_length": 10,
            "alphanumeric": True,
            "code_life": Duration(seconds=600),
            "missed_call_number": "+8613800000000",
            "max_points_missed_call": 500,
            "message_templates": {"": "$code", "zh-TW": "${code}: $points $program $minutes $$"},
            "sms_number_types": [*SMS_NUMBER_TYPES, programs_pb2.PHONE_NUMBER_TYPE_UNKNOWN],
        },
    }
    return programs_pb2.Program(**{**values, **changes})


def plain_program(shop: Shop, **changes: Any) -> programs_pb2.Program:
    """Return a program with only the required fields."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id, "program_id": 1, "store_ids": [shop.store_id]}
    return programs_pb2.Program(**{**values, **changes})


async def put_program(client: Client, program: programs_pb2.Program, etag: str = "") -> programs_pb2.PutProgramResponse:
    """Put a program."""
    request = programs_pb2.PutProgramRequest(program=program, etag=etag)
    answer: programs_pb2.PutProgramResponse = await client.programs.PutProgram(request)
    return answer


async def get_program(client: Client, merchant_id: str, program_id: int) -> programs_pb2.GetProgramResponse:
    """Return a program."""
    request = programs_pb2.GetProgramRequest(merchant_id=merchant_id, program_id=program_id)
    answer: programs_pb2.GetProgramResponse = await client.programs.GetProgram(request)
    return answer


async def put_store(client: Client, store: programs_pb2.Store, etag: str = "") -> programs_pb2.PutStoreResponse:
    """Put a store."""
    answer: programs_pb2.PutStoreResponse = await client.programs.PutStore(
        programs_pb2.PutStoreRequest(store=store, etag=etag)
    )
    return answer


async def get_store(client: Client, merchant_id: str, store_id: str) -> programs_pb2.GetStoreResponse:
    """Return a store."""
    request = programs_pb2.GetStoreRequest(merchant_id=merchant_id, store_id=store_id)
    answer: programs_pb2.GetStoreResponse = await client.programs.GetStore(request)
    return answer


async def test_put_and_get_return_the_same_store_and_etag(client: Client) -> None:
    store = programs_pb2.Store(
        merchant_id=unique("merchant"),
        store_id=unique("store"),
        shop_domain="example.myshopline.com",
        display_name="Café 点",
    )
    answer = await put_store(client, store)
    stored = await get_store(client, store.merchant_id, store.store_id)

    assert store == answer.store == stored.store
    assert answer.etag == stored.etag != ""


async def test_putting_a_store_replaces_every_field(client: Client, shop: Shop) -> None:
    store = programs_pb2.Store(merchant_id=shop.merchant_id, store_id=shop.store_id, display_name="Old")
    first = await put_store(client, store)
    store.ClearField("display_name")
    second = await put_store(client, store)

    assert first.etag != second.etag
    assert (await get_store(client, shop.merchant_id, shop.store_id)).store == store


async def test_every_invalid_field_of_a_store_is_named_at_once(client: Client) -> None:
    store = programs_pb2.Store(merchant_id="m m", store_id="s" * 65, shop_domain="d" * 256, display_name="n" * 201)
    found = await refused(put_store(client, store))

    assert wrong_fields(found) == {"store.merchant_id", "store.store_id", "store.shop_domain", "store.display_name"}
    assert wrong_fields(await refused(client.programs.PutStore(programs_pb2.PutStoreRequest()))) == {
        "store",
        "store.merchant_id",
        "store.store_id",
    }
    assert wrong_fields(await refused(get_store(client, "", ""))) == {"merchant_id", "store_id"}


async def test_each_limit_of_a_store_is_allowed(client: Client) -> None:
    store = programs_pb2.Store(
        merchant_id=unique("m").ljust(64, "~"),
        store_id=unique("s").ljust(64, "!"),
        shop_domain="d" * 255,
        display_name="点" * 200,
    )
    await put_store(client, store)

    assert (await get_store(client, store.merchant_id, store.store_id)).store == store


async def test_a_store_belongs_to_one_merchant(client: Client, shop: Shop) -> None:
    thief = unique("merchant")
    found = await refused(put_store(client, programs_pb2.Store(merchant_id=thief, store_id=shop.store_id)))
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "STORE_TAKEN")
    assert found.metadata == {"store_id": shop.store_id}

    found = await refused(get_store(client, thief, shop.store_id))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
    assert (await get_store(client, shop.merchant_id, shop.store_id)).store.merchant_id == shop.merchant_id


STORE_UNKNOWN = webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN
MALFORMED = webhooks_pb2.QUARANTINE_REASON_MALFORMED


async def quarantine(client: Client, merchant_id: str, store_id: str, **changes: Any) -> str:
    """Quarantine a webhook whose body names a store, and whose header a merchant."""
    values: dict[str, Any] = {
        "merchant_id": merchant_id,
        "topic": "app_memberSystem_points/challenged",
        "body": b'{"store_id": "%s"}' % store_id.encode(),
        "reason": STORE_UNKNOWN,
    }
    request = webhooks_pb2.QuarantineWebhookRequest(**(values | changes))
    return (await client.webhooks.QuarantineWebhook(request)).quarantine_id


@asynccontextmanager
async def limited(service: Service, merchants: list[str], *scopes: Scope) -> AsyncIterator[Client]:
    """Yield a client whose token is for some merchants and scopes."""
    client = Client(service.server.port, await make_token(service.database_url, merchants, list(scopes)))
    yield client
    await client.close()


@pytest.mark.parametrize(
    "token", [([], [Scope.STORES, Scope.ADMIN, Scope.WEBHOOKS]), ([ALL_MERCHANTS], [Scope.STORES, Scope.WEBHOOKS])]
)
async def test_a_store_is_first_registered_by_an_operator(
    service: Service, client: Client, shop: Shop, token: tuple[list[str], list[Scope]]
) -> None:
    """Other tokens get the same error for a free store and for another merchant's."""
    mine, free = unique("merchant"), unique("store")
    merchants, scopes = token
    async with limited(service, merchants or [mine], *scopes) as other:
        found = {}
        for store_id in (free, shop.store_id):
            for etag in ("", "1"):
                refusal = await refused(put_store(other, programs_pb2.Store(merchant_id=mine, store_id=store_id), etag))
                assert (refusal.code, refusal.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORE_UNPROVEN")
                assert refusal.metadata == {"store_id": store_id}
                found[store_id, etag] = refusal.message
        assert len(set(found.values())) == 1
        await client.put_store(mine, free)
        await put_store(other, programs_pb2.Store(merchant_id=mine, store_id=free, display_name="Mine"))


async def test_a_waiting_webhook_proves_that_a_store_is_the_merchants(service: Service, client: Client) -> None:
    mine, store_id, thief = unique("merchant"), unique("store"), unique("merchant")
    await quarantine(client, mine, store_id)
    async with limited(service, [mine], Scope.STORES) as owner, limited(service, [thief], Scope.STORES) as other:
        named = programs_pb2.Store(merchant_id=thief, store_id=store_id)
        assert (await refused(put_store(other, named))).reason == "STORE_UNPROVEN"
        second = programs_pb2.Store(merchant_id=mine, store_id=unique("store"))
        assert (await refused(put_store(owner, second))).reason == "STORE_UNPROVEN"
        await put_store(owner, programs_pb2.Store(merchant_id=mine, store_id=store_id))
        assert (await refused(put_store(other, named))).reason == "STORE_UNPROVEN"


@pytest.mark.parametrize("case", ["copy", "other_body", "unvouched", "other_reason", "dropped", "body_of_no_store"])
async def test_webhooks_that_prove_nothing(service: Service, client: Client, case: str) -> None:
    mine, store_id, victim = unique("merchant"), unique("store"), unique("merchant")
    async with limited(service, [mine], Scope.STORES, Scope.WEBHOOKS) as own:
        if case == "unvouched":
            await quarantine(own, mine, store_id)
        elif case == "other_reason":
            await quarantine(client, mine, store_id, reason=MALFORMED)
        elif case == "body_of_no_store":
            await quarantine(client, mine, store_id, body=b'{"id": "%s"}' % store_id.encode(), topic="customers/update")
        else:
            quarantine_id = await quarantine(client, mine, store_id)
        if case == "copy":
            await quarantine(client, victim, store_id)
        if case == "other_body":
            await quarantine(client, victim, store_id, body=b'{"store_id": "%s", "n": 1}' % store_id.encode())
        if case == "dropped":
            await client.webhooks.DropQuarantinedWebhook(
                webhooks_pb2.DropQuarantinedWebhookRequest(merchant_id=mine, quarantine_id=quarantine_id, reason="test")
            )
        store = programs_pb2.Store(merchant_id=mine, store_id=store_id)
        assert (await refused(put_store(own, store))).reason == "STORE_UNPROVEN"
        if case == "unvouched":
            await quarantine(client, mine, store_id)
            await put_store(own, store)


async def release(client: Client, shop: Shop, reason: str = "a wrong merchant") -> None:
    """Release a store."""
    request = programs_pb2.ReleaseStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id, reason=reason)
    await client.programs.ReleaseStore(request)


async def test_a_released_store_is_free(service: Service, client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), shop.store_id)
    async with limited(service, [shop.merchant_id], *Scope) as own:
        assert (await refused(release(own, shop))).reason == "MERCHANT_FORBIDDEN"
    async with limited(service, [ALL_MERCHANTS], Scope.STORES) as clerk:
        assert (await refused(release(clerk, shop))).reason == "SCOPE_MISSING"
    assert (await refused(release(client, other))).reason == "STORE_NOT_FOUND"
    assert set((await refused(release(client, shop, " "))).fields) == {"reason"}
    with structlog.testing.capture_logs() as logs:
        await release(client, shop)
    [entry] = [entry for entry in logs if entry["event"].startswith("audit")]
    assert (entry["merchant_id"], entry["store_id"]) == (shop.merchant_id, shop.store_id)
    assert (entry["reason"], bool(entry["token_id"])) == ("a wrong merchant", True)
    assert (await refused(release(client, shop))).reason == "STORE_NOT_FOUND"
    await client.put_store(other.merchant_id, other.store_id)
    assert (await refused(get_store(client, shop.merchant_id, shop.store_id))).reason == "STORE_NOT_FOUND"


async def points(client: Client, shop: Shop) -> None:
    """Send the first event of a store."""
    await client.apply(shop.update())


async def erasure(client: Client, shop: Shop) -> None:
    """Request the erasure of a store."""
    request = programs_pb2.RequestStoreErasureRequest(
        event_id="e", merchant_id=shop.merchant_id, store_id=shop.store_id, request_time=at(NOW_MS)
    )
    await client.programs.RequestStoreErasure(request)


async def put_first_customer(client: Client, shop: Shop) -> None:
    """Put the first customer of a store."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "alice", buyers=buyers)


async def apply_customer_update(client: Client, shop: Shop) -> None:
    """Send a customer webhook of a store."""
    request = customers_pb2.ApplyCustomerUpdateRequest(
        event_id="u",
        merchant_id=shop.merchant_id,
        store_id=shop.store_id,
        buyer_id="buyer",
        kind=customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
        updated_at=at(NOW_MS),
    )
    await client.customers.ApplyCustomerUpdate(request)


async def program(client: Client, shop: Shop) -> None:
    """Put a program of a store."""
    await put_program(client, plain_program(shop))


@pytest.mark.parametrize("use", [points, erasure, put_first_customer, apply_customer_update, program])
async def test_a_concurrent_first_use_and_release_leave_no_orphan(
    service: Service, client: Client, shop: Shop, use: Callable[[Client, Shop], Awaitable[None]]
) -> None:
    connection = await asyncpg.connect(service.database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM stores WHERE store_id = $1 FOR UPDATE", shop.store_id)
            using = asyncio.create_task(refused(use(client, shop)))
            await until_locks_are_awaited(service.database_url)
            await connection.execute("DELETE FROM stores WHERE store_id = $1", shop.store_id)
    finally:
        await connection.close()
    assert (await using).reason == "STORE_NOT_FOUND"


async def test_calls_do_not_wait_for_another_merchants_store(service: Service, client: Client, shop: Shop) -> None:
    """Waiting would reveal that the store exists, and delay its owner."""
    thief = Shop(unique("merchant"), shop.store_id)
    connection = await asyncpg.connect(service.database_url)
    try:
        async with limited(service, [thief.merchant_id], *Scope) as other, connection.transaction():
            await connection.execute("SELECT 1 FROM stores WHERE store_id = $1 FOR UPDATE", shop.store_id)
            store = programs_pb2.Store(merchant_id=thief.merchant_id, store_id=thief.store_id)
            assert (await refused(put_store(other, store))).reason == "STORE_UNPROVEN"
            assert (await refused(put_store(client, store))).reason == "STORE_TAKEN"
            for use in (points, erasure, put_first_customer, apply_customer_update, program):
                assert (await refused(use(other, thief))).reason == "STORE_NOT_FOUND"
    finally:
        await connection.close()


async def test_only_tokens_for_all_merchants_see_that_another_merchant_has_a_store(
    service: Service, client: Client, shop: Shop
) -> None:
    thief, free = Shop(unique("merchant"), shop.store_id), Shop(unique("merchant"), unique("store"))
    batch = points_pb2.BatchApplyPointsUpdatesRequest(updates=[thief.update()])
    async with limited(service, [thief.merchant_id, free.merchant_id], *Scope) as other:
        for caller, metadata in ((other, {}), (client, {"registered_elsewhere": "true"})):
            for use in (points, erasure, apply_customer_update):
                found = await refused(use(caller, thief))
                assert found.metadata == {"store_id": shop.store_id} | metadata
            [result] = (await caller.points.BatchApplyPointsUpdates(batch)).results
            assert result.error.metadata == {"store_id": shop.store_id} | metadata
        for use in (points, erasure, apply_customer_update):
            assert (await refused(use(other, free))).metadata == {"store_id": free.store_id}


@pytest.mark.parametrize("use", ["points_accounts", "customer_buyers", "store_erasures", "programs", "benefits"])
async def test_a_store_with_data_cannot_be_released(client: Client, shop: Shop, use: str) -> None:
    uses = {
        "points_accounts": points,
        "customer_buyers": put_first_customer,
        "store_erasures": erasure,
        "programs": program,
    }
    if use in uses:
        await uses[use](client, shop)
    else:
        benefit = benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id="b", store_ids=[shop.store_id])
        await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))

    found = await refused(release(client, shop))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORE_IN_USE")
    assert found.metadata == {"store_id": shop.store_id, "used_by": use}
    assert (await get_store(client, shop.merchant_id, shop.store_id)).store.merchant_id == shop.merchant_id


async def test_one_of_two_concurrent_merchants_gets_a_store(client: Client) -> None:
    store_id = unique("store")
    merchants = [unique("merchant") for _ in range(10)]
    stores = [programs_pb2.Store(merchant_id=merchant_id, store_id=store_id) for merchant_id in merchants]
    answers = await asyncio.gather(*(put_store(client, store) for store in stores), return_exceptions=True)

    assert sum(isinstance(answer, programs_pb2.PutStoreResponse) for answer in answers) == 1
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {grpc.StatusCode.ALREADY_EXISTS} == {error.code() for error in errors}


async def test_a_stale_etag_changes_nothing(client: Client, shop: Shop) -> None:
    store = programs_pb2.Store(merchant_id=shop.merchant_id, store_id=shop.store_id, display_name="First")
    first = await put_store(client, store)
    second = await put_store(client, store, first.etag)
    store.display_name = "Lost"

    for etag in (first.etag, "0", "x", "-1", "9" * 30, " " + second.etag):
        found = await refused(put_store(client, store, etag))
        assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    stored = await get_store(client, shop.merchant_id, shop.store_id)
    assert (stored.store.display_name, stored.etag) == ("First", second.etag)


async def test_one_of_several_concurrent_puts_with_an_etag_succeeds(client: Client, shop: Shop) -> None:
    etag = (await put_program(client, plain_program(shop))).etag
    puts = [put_program(client, plain_program(shop, display_name=f"name {index}"), etag) for index in range(20)]
    answers = await asyncio.gather(*puts, return_exceptions=True)

    (winner,) = [answer for answer in answers if isinstance(answer, programs_pb2.PutProgramResponse)]
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {grpc.StatusCode.ABORTED} == {error.code() for error in errors}
    stored = await get_program(client, shop.merchant_id, 1)
    assert (stored.program.display_name, stored.etag) == (winner.program.display_name, winner.etag)


async def test_concurrent_first_puts_all_succeed(client: Client, shop: Shop) -> None:
    puts = [put_program(client, plain_program(shop, display_name=f"name {index}")) for index in range(20)]
    answers = await asyncio.gather(*puts)

    assert len({answer.etag for answer in answers}) == 20


async def test_put_and_get_return_every_field_of_a_program(client: Client, shop: Shop) -> None:
    program = full_program(shop)
    assert {field.name for field, _ in program.ListFields()} == set(programs_pb2.Program.DESCRIPTOR.fields_by_name)
    answer = await put_program(client, program)
    stored = await get_program(client, shop.merchant_id, program.program_id)

    assert program == answer.program == stored.program
    assert answer.etag == stored.etag != ""


async def test_defaults_of_a_program_stay_unset(client: Client, shop: Shop) -> None:
    """A client can put back the program that it got."""
    answer = await put_program(client, plain_program(shop))
    stored = await get_program(client, shop.merchant_id, 1)

    assert answer.program == stored.program
    for program in (answer.program, stored.program):
        assert not program.redemption_enabled
        assert program.time_zone == ""
        assert not program.HasField("settlement_window")
        assert not program.HasField("settlement_lead")
        assert not program.HasField("local_currency_decimals")
        assert program.criteria == programs_pb2.RedemptionCriteria()
        assert program.validation == programs_pb2.ValidationSettings()
    assert (await put_program(client, stored.program, stored.etag)).program == stored.program


async def test_putting_a_program_replaces_every_field(client: Client, shop: Shop) -> None:
    await put_program(client, full_program(shop, program_id=1))
    await put_program(client, plain_program(shop))

    stored = (await get_program(client, shop.merchant_id, 1)).program
    assert not stored.redemption_enabled
    assert not stored.validation.required
    assert stored.criteria == programs_pb2.RedemptionCriteria()
    assert stored.point_value == ""


async def test_a_stale_etag_of_a_program_changes_nothing(client: Client, shop: Shop) -> None:
    found = await refused(put_program(client, plain_program(shop), "1"))
    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    first = await put_program(client, plain_program(shop, display_name="First"))
    await put_program(client, plain_program(shop, display_name="Second"))
    found = await refused(put_program(client, plain_program(shop, display_name="Lost"), first.etag))

    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    assert (await get_program(client, shop.merchant_id, 1)).program.display_name == "Second"


async def test_a_program_covers_only_the_merchants_stores(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for store_id in (unique("store"), other.store_id):
        found = await refused(put_program(client, plain_program(shop, store_ids=[shop.store_id, store_id])))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
        assert found.metadata == {"store_id": store_id}
    found = await refused(get_program(client, shop.merchant_id, 1))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND")
    assert found.metadata == {"program_id": "1"}


async def test_merchants_may_use_the_same_program_id(client: Client, shop: Shop) -> None:
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await put_program(client, plain_program(shop, display_name="Ours"))
    assert (await refused(get_program(client, other.merchant_id, 1))).reason == "PROGRAM_NOT_FOUND"
    await put_program(client, plain_program(other, display_name="Theirs"))

    assert (await get_program(client, shop.merchant_id, 1)).program.display_name == "Ours"
    assert (await get_program(client, other.merchant_id, 1)).program.display_name == "Theirs"


def nested(name: str) -> Callable[[Any], dict[str, Any]]:
    """Change one field of a program's message."""
    message, _, field = name.partition(".")
    return lambda value: {message: {field: value}} if field else {message: value}


WRONG: tuple[tuple[str, Any, str], ...] = (
    ("merchant_id", "m" * 65, "merchant_id"),
    ("merchant_id", "", "merchant_id"),
    ("program_id", 0, "program_id"),
    ("program_id", -1, "program_id"),
    ("display_name", "n" * 201, "display_name"),
    ("display_name", "a\nb", "display_name"),
    ("display_name", "a\x85b", "display_name"),
    ("display_name", "a\u2028b", "display_name"),
    ("display_name", "a\u2029b", "display_name"),
    ("store_ids", [], "store_ids"),
    ("store_ids", ["s"] * 1_001, "store_ids"),
    ("store_ids", ["s", "s"], "store_ids"),
    ("store_ids", ["s", "t u"], "store_ids[1]"),
    ("store_ids", ["s", ""], "store_ids[1]"),
    ("time_zone", "Asia/Nowhere", "time_zone"),
    ("time_zone", "Asia", "time_zone"),
    ("time_zone", "../../etc/passwd", "time_zone"),
    ("time_zone", "/etc/localtime", "time_zone"),
    ("time_zone", "zone.tab", "time_zone"),
    ("time_zone", "\x00", "time_zone"),
    ("time_zone", "é", "time_zone"),
    ("time_zone", "x" * 10_000, "time_zone"),
    ("default_region", "cn", "default_region"),
    ("default_region", "CHN", "default_region"),
    ("default_region", "UK", "default_region"),
    ("allowed_regions", ["CN", "x"], "allowed_regions[1]"),
    ("allowed_regions", ["CN", ""], "allowed_regions[1]"),
    ("allowed_regions", ["CN", "UK"], "allowed_regions[1]"),
    ("allowed_regions", ["CN", "CN"], "allowed_regions"),
    ("allowed_regions", ["CN"] * 301, "allowed_regions"),
    ("point_value", "0", "point_value"),
    ("point_value", "-1", "point_value"),
    ("point_value", "1e3", "point_value"),
    ("point_value", "0." + "1" * 13, "point_value"),
    ("point_value", "1" * 13, "point_value"),
    ("currency_code", "XYZ", "currency_code"),
    ("currency_code", "usd", "currency_code"),
    ("currency_code", "840", "currency_code"),
    ("currency_code", "", "currency_code"),
    ("local_currency_code", "cny", "local_currency_code"),
    ("local_currency_code", "yuan", "local_currency_code"),
    ("local_currency_rate", "", "local_currency_rate"),
    ("local_currency_rate", "0", "local_currency_rate"),
    ("settlement_window", Duration(seconds=59), "settlement_window"),
    ("settlement_window", Duration(seconds=30 * 86_400 + 1), "settlement_window"),
    ("settlement_window", Duration(seconds=-60), "settlement_window"),
    ("settlement_window", Duration(seconds=60, nanos=1), "settlement_window"),
    ("settlement_window", Duration(), "settlement_window"),
    ("settlement_lead", Duration(seconds=-1), "settlement_lead"),
    ("settlement_lead", Duration(seconds=86_401), "settlement_lead"),
    ("settlement_lead", Duration(seconds=5, nanos=1), "settlement_lead"),
    ("local_currency_decimals", -1, "local_currency_decimals"),
    ("local_currency_decimals", 5, "local_currency_decimals"),
    ("settlement_scenes", ["A", "b c"], "settlement_scenes[1]"),
    ("settlement_scenes", ["A", "A"], "settlement_scenes"),
    ("settlement_scenes", ["A" * 65], "settlement_scenes[0]"),
    ("settlement_scenes", [f"S{n}" for n in range(101)], "settlement_scenes"),
    ("criteria.multiples_of", 0, "criteria.multiples_of"),
    ("criteria.multiples_of", 10**15 + 1, "criteria.multiples_of"),
    ("criteria.min_points_per_redemption", 0, "criteria.min_points_per_redemption"),
    ("criteria.max_points_per_redemption", -1, "criteria.max_points_per_redemption"),
    ("criteria.min_balance_required", 0, "criteria.min_balance_required"),
    ("criteria.min_lifetime_points", 0, "criteria.min_lifetime_points"),
    ("criteria.max_points_per_day", 0, "criteria.max_points_per_day"),
    ("criteria.max_points_per_week", 0, "criteria.max_points_per_week"),
    ("criteria.max_points_per_month", 0, "criteria.max_points_per_month"),
    ("validation.channels", [SMS, SMS], "validation.channels[1]"),
    ("validation.channels", [INVALID], "validation.channels[0]"),
    ("validation.channels", [0], "validation.channels[0]"),
    ("validation.channels", [99], "validation.channels[0]"),
    ("validation.channels", [MISSED_CALL], "validation.missed_call_number"),
    ("validation.missed_call_number", "13800000000", "validation.missed_call_number"),
    ("validation.code_length", 5, "validation.code_length"),
    ("validation.code_length", 11, "validation.code_length"),
    ("validation.code_length", -1, "validation.code_length"),
    ("validation.code_life", Duration(seconds=59), "validation.code_life"),
    ("validation.code_life", Duration(seconds=601), "validation.code_life"),
    ("validation.code_life", Duration(seconds=60, nanos=500_000_000), "validation.code_life"),
    ("validation.max_points_missed_call", -1, "validation.max_points_missed_call"),
    ("validation.max_points_missed_call", 10**15 + 1, "validation.max_points_missed_call"),
    ("validation.message_templates", {"en": "no name"}, "validation.message_templates['en']"),
    ("validation.message_templates", {"en": "$code $other"}, "validation.message_templates['en']"),
    ("validation.message_templates", {"en": "$code $"}, "validation.message_templates['en']"),
    ("validation.message_templates", {"en": "$code" + "x" * 496}, "validation.message_templates['en']"),
    ("validation.message_templates", {"en": "$code\x00"}, "validation.message_templates['en']"),
    ("validation.message_templates", {"e n": "$code"}, "validation.message_templates"),
    ("validation.sms_number_types", [0], "validation.sms_number_types[0]"),
    ("validation.sms_number_types", [13], "validation.sms_number_types[0]"),
    ("validation.sms_number_types", [*SMS_NUMBER_TYPES, SMS_NUMBER_TYPES[0]], "validation.sms_number_types[2]"),
    (
        "validation.message_templates",
        {f"a{chr(97 + n // 26)}{chr(97 + n % 26)}": "$code" for n in range(51)},
        "validation.message_templates",
    ),
)


@pytest.mark.parametrize(("name", "value", "path"), WRONG, ids=[f"{name}-{n}" for n, (name, _, _) in enumerate(WRONG)])
async def test_each_limit_of_a_program_is_named_by_its_path(
    client: Client, shop: Shop, name: str, value: Any, path: str
) -> None:
    program = full_program(shop, **nested(name)(value))
    found = await refused(put_program(client, program))

    assert wrong_fields(found) == {f"program.{path}"}
    assert (
        await refused(get_program(client, shop.merchant_id, max(program.program_id, 1)))
    ).reason == "PROGRAM_NOT_FOUND"


@pytest.mark.parametrize(
    ("tags", "wrong"),
    [
        (["zh-Hant", "zh-hant"], {"zh-Hant", "zh-hant"}),
        (["zh-TW", "zh_TW", "ZH-tw", "zh"], {"zh-TW", "zh_TW", "ZH-tw"}),
        (["EN", "en", "de", "De", ""], {"EN", "en", "de", "De"}),
        (["zh-Hant", "zh-Hant-TW", "zh", "zh-TW", "en-x-a", "en_GB", ""], set()),
    ],
)
async def test_templates_of_the_same_language_are_all_named(
    client: Client, shop: Shop, tags: list[str], wrong: set[str]
) -> None:
    program = plain_program(shop, validation={"message_templates": dict.fromkeys(tags, "$code")})
    if not wrong:
        assert dict((await put_program(client, program)).program.validation.message_templates) == dict.fromkeys(
            tags, "$code"
        )
        return
    found = await refused(put_program(client, program))

    assert wrong_fields(found) == {f"program.validation.message_templates[{tag!r}]" for tag in wrong}


async def test_a_row_of_an_earlier_release_has_the_default_number_types(
    service: Service, client: Client, shop: Shop
) -> None:
    await put_program(client, full_program(shop))
    async with superuser(service) as connection:
        query = "UPDATE programs SET validation = validation - 'sms_number_types' WHERE merchant_id = $1"
        await connection.execute(query, shop.merchant_id)
    stored = (await get_program(client, shop.merchant_id, full_program(shop).program_id)).program

    assert list(stored.validation.sms_number_types) == []
    assert dict(stored.validation.message_templates) == dict(full_program(shop).validation.message_templates)


@pytest.mark.parametrize("name", ["per_redemption", "per_day", "per_week", "per_month"])
@pytest.mark.parametrize(
    ("criteria", "fewest"),
    [
        ({"min_points_per_redemption": 10}, 10),
        ({"multiples_of": 100}, 100),
        ({"multiples_of": 7, "min_points_per_redemption": 10}, 14),
    ],
)
async def test_maxima_must_allow_the_fewest_points_of_a_redemption(
    client: Client, shop: Shop, name: str, criteria: dict[str, int], fewest: int
) -> None:
    least = criteria | {f"max_points_{name}": fewest}
    found = await refused(put_program(client, plain_program(shop, criteria=least | {f"max_points_{name}": fewest - 1})))

    assert wrong_fields(found) == {f"program.criteria.max_points_{name}"}
    await put_program(client, plain_program(shop, criteria=least))


async def test_every_invalid_field_of_a_program_is_named_at_once(client: Client, shop: Shop) -> None:
    program = full_program(
        shop,
        program_id=0,
        time_zone="Mars/Base",
        point_value="free",
        local_currency_code="???",
        criteria={"multiples_of": 0, "max_points_per_day": 0},
        settlement_window=Duration(seconds=1),
        settlement_lead=Duration(seconds=86_401),
        local_currency_decimals=9,
        validation={"code_length": 99, "channels": [INVALID, SMS, SMS]},
    )
    found = await refused(put_program(client, program))

    assert wrong_fields(found) == {
        "program.program_id",
        "program.time_zone",
        "program.point_value",
        "program.local_currency_code",
        "program.criteria.multiples_of",
        "program.criteria.max_points_per_day",
        "program.settlement_window",
        "program.settlement_lead",
        "program.local_currency_decimals",
        "program.validation.code_length",
        "program.validation.channels[0]",
        "program.validation.channels[2]",
    }


async def test_a_request_without_a_program_is_refused(client: Client) -> None:
    found = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest()))

    assert wrong_fields(found) >= {"program", "program.merchant_id", "program.program_id", "program.store_ids"}
    assert wrong_fields(await refused(get_program(client, "", 0))) == {"merchant_id", "program_id"}


async def test_many_invalid_items_are_named_and_counted(client: Client, shop: Shop) -> None:
    found = await refused(put_program(client, plain_program(shop, store_ids=[f"s {n}" for n in range(1_000)])))

    assert "program.store_ids[0]" in wrong_fields(found)
    assert int(found.metadata["omitted_violations"]) == 1_000 - len(found.fields)


async def test_a_program_may_cover_a_thousand_stores(client: Client, shop: Shop) -> None:
    stores = [unique("store") for _ in range(1_000)]
    for start in range(0, 1_000, 100):
        await asyncio.gather(
            *(client.put_store(shop.merchant_id, store_id) for store_id in stores[start : start + 100])
        )
    for program_id in (1, 2):
        await put_program(client, plain_program(shop, program_id=program_id, store_ids=stores))

    assert list((await get_program(client, shop.merchant_id, 2)).program.store_ids) == stores


async def test_stores_are_listed_by_page(client: Client) -> None:
    shop = Shop(unique("merchant"), "")
    stores = sorted(unique("store") for _ in range(5))
    for store_id in reversed(stores):
        await client.put_store(shop.merchant_id, store_id)
    await client.put_store(unique("merchant"), unique("store"))

    pages, token = [], ""
    while True:
        request = programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id, page_size=2, page_token=token)
        answer = await client.programs.ListStores(request)
        pages.append([store.store_id for store in answer.stores])
        token = answer.next_page_token
        if not token:
            break
    assert pages == [stores[:2], stores[2:4], stores[4:]]


async def test_programs_are_listed_by_page(client: Client, shop: Shop) -> None:
    for program_id in (2**63 - 1, 10, 9, 1):
        await put_program(client, full_program(shop, program_id=program_id))

    first = await client.programs.ListPrograms(
        programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id, page_size=2)
    )
    second = await client.programs.ListPrograms(
        programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id, page_size=2, page_token=first.next_page_token)
    )
    assert list(first.programs) == [full_program(shop, program_id=1), full_program(shop, program_id=9)]
    assert [program.program_id for program in second.programs] == [10, 2**63 - 1]
    assert second.next_page_token == ""


async def test_an_unknown_merchant_has_empty_lists(client: Client) -> None:
    answer = await client.programs.ListPrograms(programs_pb2.ListProgramsRequest(merchant_id=unique("merchant")))

    assert (list(answer.programs), answer.next_page_token) == ([], "")


async def test_invalid_page_tokens_are_refused(client: Client, shop: Shop) -> None:
    await client.put_store(shop.merchant_id, unique("store"))
    answer = await client.programs.ListStores(programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id, page_size=1))
    assert answer.next_page_token
    own = ("stores", shop.merchant_id)
    forged = [pagination.write_token(own, (place,)) for place in ("\x00", "\ud800", 1)]

    for token in ["x", "é", *forged]:
        request = programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id, page_token=token)
        assert wrong_fields(await refused(client.programs.ListStores(request))) == {"page_token"}
    for wrong in (
        client.programs.ListStores(
            programs_pb2.ListStoresRequest(merchant_id=unique("m"), page_token=answer.next_page_token)
        ),
        client.programs.ListPrograms(
            programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id, page_token=answer.next_page_token)
        ),
    ):
        assert wrong_fields(await refused(wrong)) == {"page_token"}


@pytest.mark.parametrize("page_size", [-1, 1_001])
async def test_invalid_page_sizes_are_refused(client: Client, shop: Shop, page_size: int) -> None:
    stores = programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id, page_size=page_size)
    programs = programs_pb2.ListProgramsRequest(merchant_id="", page_size=page_size)

    assert wrong_fields(await refused(client.programs.ListStores(stores))) == {"page_size"}
    assert wrong_fields(await refused(client.programs.ListPrograms(programs))) == {"merchant_id", "page_size"}


async def test_a_list_that_is_too_long_is_one_violation(client: Client, shop: Shop) -> None:
    program = programs_pb2.Program(merchant_id=shop.merchant_id, program_id=1, store_ids=[shop.store_id])
    program.validation.channels.extend([redemption_pb2.VALIDATION_TYPE_SMS] * 100_000)

    error = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest(program=program)))

    assert "program.validation.channels" in error.fields
    assert len(error.fields) <= 4


@pytest.mark.parametrize("name", ["localtime", "Factory", "Mars/Olympus", "right/UTC", "posix/UTC"])
async def test_time_zones_that_differ_between_machines_are_refused(client: Client, shop: Shop, name: str) -> None:
    program = programs_pb2.Program(
        merchant_id=shop.merchant_id, program_id=1, store_ids=[shop.store_id], time_zone=name
    )

    error = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest(program=program)))

    assert set(error.fields) == {"program.time_zone"}


async def test_a_rate_requires_another_currency(client: Client, shop: Shop) -> None:
    program = programs_pb2.Program(
        merchant_id=shop.merchant_id,
        program_id=1,
        store_ids=[shop.store_id],
        point_value="0.01",
        currency_code="USD",
        local_currency_rate="2",
    )

    error = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest(program=program)))

    assert set(error.fields) == {"program.local_currency_rate"}


async def test_a_page_fits_into_a_response(client: Client, shop: Shop) -> None:
    templates = {f"l{chr(97 + n // 26)}{chr(97 + n % 26)}": "$code " + "x" * 490 for n in range(50)}
    settings = {"message_templates": templates}
    for number in range(1, 111):
        await client.put_program(shop.merchant_id, shop.store_id, program_id=number, validation=settings)
    found: list[int] = []
    token = ""
    pages = 0
    while token or not pages:
        request = programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id, page_size=1_000, page_token=token)
        answer = await client.programs.ListPrograms(request)
        found += [program.program_id for program in answer.programs]
        token = answer.next_page_token
        pages += 1

    assert found == list(range(1, 111))
    assert pages > 1

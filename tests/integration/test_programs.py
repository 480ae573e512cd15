"""ProgramsService on a real database: stores and programs, each limit of their fields, etags, and lists."""

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
from support.harness import NOW_MS, Client, Refusal, Service, Shop, at, make_token, refused, unique
from support.points import superuser
from support.waiting import until_locks_are_awaited

SMS = redemption_pb2.VALIDATION_TYPE_SMS
EMAIL = redemption_pb2.VALIDATION_TYPE_EMAIL
MISSED_CALL = redemption_pb2.VALIDATION_TYPE_MISSED_CALL
INVALID = redemption_pb2.VALIDATION_TYPE_INVALID
SMS_NUMBER_TYPES = [programs_pb2.PHONE_NUMBER_TYPE_VOIP, programs_pb2.PHONE_NUMBER_TYPE_MOBILE]


def full_program(shop: Shop, **changes: Any) -> programs_pb2.Program:
    """Make a program whose every field is set."""
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
    """Make a program with nothing but what is required."""
    values: dict[str, Any] = {"merchant_id": shop.merchant_id, "program_id": 1, "store_ids": [shop.store_id]}
    return programs_pb2.Program(**{**values, **changes})


async def put(client: Client, program: programs_pb2.Program, etag: str = "") -> programs_pb2.PutProgramResponse:
    """Put a program."""
    request = programs_pb2.PutProgramRequest(program=program, etag=etag)
    answer: programs_pb2.PutProgramResponse = await client.programs.PutProgram(request)
    return answer


async def get(client: Client, merchant_id: str, program_id: int) -> programs_pb2.GetProgramResponse:
    """Get a program."""
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
    """Get a store."""
    request = programs_pb2.GetStoreRequest(merchant_id=merchant_id, store_id=store_id)
    answer: programs_pb2.GetStoreResponse = await client.programs.GetStore(request)
    return answer


def wrong_fields(found: Refusal) -> set[str]:
    """Tell which fields a refusal names."""
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELDS")
    return set(found.fields)


async def test_a_store_is_kept_as_it_was_put(client: Client) -> None:
    """Put and Get answer the same store and etag."""
    store = programs_pb2.Store(
        merchant_id=unique("merchant"),
        store_id=unique("store"),
        shop_domain="example.myshopline.com",
        display_name="Café 点",
    )
    answer = await put_store(client, store)
    kept = await get_store(client, store.merchant_id, store.store_id)

    assert store == answer.store == kept.store
    assert answer.etag == kept.etag != ""


async def test_a_store_is_replaced_whole(client: Client, shop: Shop) -> None:
    """What the second request leaves out is gone, and the etag is another."""
    store = programs_pb2.Store(merchant_id=shop.merchant_id, store_id=shop.store_id, display_name="Old")
    first = await put_store(client, store)
    store.ClearField("display_name")
    second = await put_store(client, store)

    assert first.etag != second.etag
    assert (await get_store(client, shop.merchant_id, shop.store_id)).store == store


async def test_every_wrong_field_of_a_store_is_named(client: Client) -> None:
    """All at once, by their paths."""
    store = programs_pb2.Store(merchant_id="m m", store_id="s" * 65, shop_domain="d" * 256, display_name="n" * 201)
    found = await refused(put_store(client, store))

    assert wrong_fields(found) == {"store.merchant_id", "store.store_id", "store.shop_domain", "store.display_name"}
    assert wrong_fields(await refused(client.programs.PutStore(programs_pb2.PutStoreRequest()))) == {
        "store",
        "store.merchant_id",
        "store.store_id",
    }
    assert wrong_fields(await refused(get_store(client, "", ""))) == {"merchant_id", "store_id"}


async def test_the_longest_store_is_kept(client: Client) -> None:
    """Each limit itself is allowed."""
    store = programs_pb2.Store(
        merchant_id=unique("m").ljust(64, "~"),
        store_id=unique("s").ljust(64, "!"),
        shop_domain="d" * 255,
        display_name="点" * 200,
    )
    await put_store(client, store)

    assert (await get_store(client, store.merchant_id, store.store_id)).store == store


async def test_a_store_belongs_to_one_merchant(client: Client, shop: Shop) -> None:
    """Another merchant can neither take nor see it."""
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
    """Another token is refused alike, whether the store is free or another merchant's; it may change its own."""
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


async def test_a_waiting_webhook_proves_whose_a_store_is(service: Service, client: Client) -> None:
    """For its store and its merchant alone, and once: a store that has an owner needs no proof, and takes none."""
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
async def test_what_is_no_proof(service: Service, client: Client, case: str) -> None:
    """A copy or another webhook of the store under another merchant, or a webhook that the token brought itself."""
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
    """For any merchant, and by an operator for all merchants alone, who says why."""
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
    """Ask for the erasure of a store."""
    request = programs_pb2.RequestStoreErasureRequest(
        event_id="e", merchant_id=shop.merchant_id, store_id=shop.store_id, request_time=at(NOW_MS)
    )
    await client.programs.RequestStoreErasure(request)


async def customer(client: Client, shop: Shop) -> None:
    """Put the first customer of a store."""
    buyers = [identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")]
    await client.put_customer(shop.merchant_id, "alice", buyers=buyers)


async def customer_update(client: Client, shop: Shop) -> None:
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
    await put(client, plain_program(shop))


@pytest.mark.parametrize("use", [points, erasure, customer, customer_update, program])
async def test_the_first_use_of_a_store_at_its_release(
    service: Service, client: Client, shop: Shop, use: Callable[[Client, Shop], Awaitable[None]]
) -> None:
    """It comes before the release, or finds no store; nothing is left of a store that its merchant does not have."""
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


async def test_nobody_waits_for_another_merchants_store(service: Service, client: Client, shop: Shop) -> None:
    """The wait would tell that the store is there, and would make its owner wait."""
    thief = Shop(unique("merchant"), shop.store_id)
    connection = await asyncpg.connect(service.database_url)
    try:
        async with limited(service, [thief.merchant_id], *Scope) as other, connection.transaction():
            await connection.execute("SELECT 1 FROM stores WHERE store_id = $1 FOR UPDATE", shop.store_id)
            store = programs_pb2.Store(merchant_id=thief.merchant_id, store_id=thief.store_id)
            assert (await refused(put_store(other, store))).reason == "STORE_UNPROVEN"
            assert (await refused(put_store(client, store))).reason == "STORE_TAKEN"
            for use in (points, erasure, customer, customer_update, program):
                assert (await refused(use(other, thief))).reason == "STORE_NOT_FOUND"
    finally:
        await connection.close()


async def test_who_has_a_store_is_for_tokens_for_all_merchants(service: Service, client: Client, shop: Shop) -> None:
    """Such as the shim's, which names the reason in the quarantine; another token is told the same of every store."""
    thief, free = Shop(unique("merchant"), shop.store_id), Shop(unique("merchant"), unique("store"))
    batch = points_pb2.BatchApplyPointsUpdatesRequest(updates=[thief.update()])
    async with limited(service, [thief.merchant_id, free.merchant_id], *Scope) as other:
        for caller, metadata in ((other, {}), (client, {"registered_elsewhere": "true"})):
            for use in (points, erasure, customer_update):
                found = await refused(use(caller, thief))
                assert found.metadata == {"store_id": shop.store_id} | metadata
            [result] = (await caller.points.BatchApplyPointsUpdates(batch)).results
            assert result.error.metadata == {"store_id": shop.store_id} | metadata
        for use in (points, erasure, customer_update):
            assert (await refused(use(other, free))).metadata == {"store_id": free.store_id}


@pytest.mark.parametrize("use", ["points_accounts", "customer_buyers", "store_erasures", "programs", "benefits"])
async def test_a_store_with_data_stays_with_its_merchant(client: Client, shop: Shop, use: str) -> None:
    """Whatever names it, no other merchant gets it."""
    uses = {"points_accounts": points, "customer_buyers": customer, "store_erasures": erasure, "programs": program}
    if use in uses:
        await uses[use](client, shop)
    else:
        benefit = benefits_pb2.Benefit(merchant_id=shop.merchant_id, benefit_id="b", store_ids=[shop.store_id])
        await client.benefits.PutBenefit(benefits_pb2.PutBenefitRequest(benefit=benefit))

    found = await refused(release(client, shop))
    assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "STORE_IN_USE")
    assert found.metadata == {"store_id": shop.store_id, "used_by": use}
    assert (await get_store(client, shop.merchant_id, shop.store_id)).store.merchant_id == shop.merchant_id


async def test_of_two_merchants_one_gets_a_store(client: Client) -> None:
    """However close their requests are."""
    store_id = unique("store")
    merchants = [unique("merchant") for _ in range(10)]
    stores = [programs_pb2.Store(merchant_id=merchant_id, store_id=store_id) for merchant_id in merchants]
    answers = await asyncio.gather(*(put_store(client, store) for store in stores), return_exceptions=True)

    assert sum(isinstance(answer, programs_pb2.PutStoreResponse) for answer in answers) == 1
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {grpc.StatusCode.ALREADY_EXISTS} == {error.code() for error in errors}


async def test_a_stale_etag_changes_nothing(client: Client, shop: Shop) -> None:
    """Nobody overwrites what they have not seen."""
    store = programs_pb2.Store(merchant_id=shop.merchant_id, store_id=shop.store_id, display_name="First")
    first = await put_store(client, store)
    second = await put_store(client, store, first.etag)
    store.display_name = "Lost"

    for etag in (first.etag, "0", "x", "-1", "9" * 30, " " + second.etag):
        found = await refused(put_store(client, store, etag))
        assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    kept = await get_store(client, shop.merchant_id, shop.store_id)
    assert (kept.store.display_name, kept.etag) == ("First", second.etag)


async def test_of_concurrent_puts_with_one_etag_one_wins(client: Client, shop: Shop) -> None:
    """The others hear that it changed."""
    etag = (await put(client, plain_program(shop))).etag
    puts = [put(client, plain_program(shop, display_name=f"name {index}"), etag) for index in range(20)]
    answers = await asyncio.gather(*puts, return_exceptions=True)

    (winner,) = [answer for answer in answers if isinstance(answer, programs_pb2.PutProgramResponse)]
    errors = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert {grpc.StatusCode.ABORTED} == {error.code() for error in errors}
    kept = await get(client, shop.merchant_id, 1)
    assert (kept.program.display_name, kept.etag) == (winner.program.display_name, winner.etag)


async def test_concurrent_first_puts_all_succeed(client: Client, shop: Shop) -> None:
    """Without an etag the last one stands, and no call fails because of another."""
    puts = [put(client, plain_program(shop, display_name=f"name {index}")) for index in range(20)]
    answers = await asyncio.gather(*puts)

    assert len({answer.etag for answer in answers}) == 20


async def test_a_full_program_is_kept_as_it_was_put(client: Client, shop: Shop) -> None:
    """Every field survives, and Put and Get answer the same."""
    program = full_program(shop)
    assert {field.name for field, _ in program.ListFields()} == set(programs_pb2.Program.DESCRIPTOR.fields_by_name)
    answer = await put(client, program)
    kept = await get(client, shop.merchant_id, program.program_id)

    assert program == answer.program == kept.program
    assert answer.etag == kept.etag != ""


async def test_a_plain_program_says_no_defaults(client: Client, shop: Shop) -> None:
    """What was left out stays left out, so that a client can put back what it got."""
    answer = await put(client, plain_program(shop))
    kept = await get(client, shop.merchant_id, 1)

    assert answer.program == kept.program
    for program in (answer.program, kept.program):
        assert not program.redemption_enabled
        assert program.time_zone == ""
        assert not program.HasField("settlement_window")
        assert not program.HasField("settlement_lead")
        assert not program.HasField("local_currency_decimals")
        assert program.criteria == programs_pb2.RedemptionCriteria()
        assert program.validation == programs_pb2.ValidationSettings()
    assert (await put(client, kept.program, kept.etag)).program == kept.program


async def test_a_program_is_replaced_whole(client: Client, shop: Shop) -> None:
    """What the second request leaves out is switched off."""
    await put(client, full_program(shop, program_id=1))
    await put(client, plain_program(shop))

    kept = (await get(client, shop.merchant_id, 1)).program
    assert not kept.redemption_enabled
    assert not kept.validation.required
    assert kept.criteria == programs_pb2.RedemptionCriteria()
    assert kept.point_value == ""


async def test_a_stale_program_changes_nothing(client: Client, shop: Shop) -> None:
    """Nobody overwrites a program that they have not seen, nor one that is not there."""
    found = await refused(put(client, plain_program(shop), "1"))
    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    first = await put(client, plain_program(shop, display_name="First"))
    await put(client, plain_program(shop, display_name="Second"))
    found = await refused(put(client, plain_program(shop, display_name="Lost"), first.etag))

    assert (found.code, found.reason) == (grpc.StatusCode.ABORTED, "STALE_ETAG")
    assert (await get(client, shop.merchant_id, 1)).program.display_name == "Second"


async def test_a_program_covers_only_the_merchants_stores(client: Client, shop: Shop) -> None:
    """An unknown store and another merchant's are answered alike."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for store_id in (unique("store"), other.store_id):
        found = await refused(put(client, plain_program(shop, store_ids=[shop.store_id, store_id])))
        assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
        assert found.metadata == {"store_id": store_id}
    found = await refused(get(client, shop.merchant_id, 1))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "PROGRAM_NOT_FOUND")
    assert found.metadata == {"program_id": "1"}


async def test_programs_of_merchants_are_apart(client: Client, shop: Shop) -> None:
    """Two merchants may use the same program_id; neither sees the other's."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    await put(client, plain_program(shop, display_name="Ours"))
    assert (await refused(get(client, other.merchant_id, 1))).reason == "PROGRAM_NOT_FOUND"
    await put(client, plain_program(other, display_name="Theirs"))

    assert (await get(client, shop.merchant_id, 1)).program.display_name == "Ours"
    assert (await get(client, other.merchant_id, 1)).program.display_name == "Theirs"


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
async def test_each_limit_of_a_program(client: Client, shop: Shop, name: str, value: Any, path: str) -> None:
    """A wrong field is named by its path, and only it."""
    program = full_program(shop, **nested(name)(value))
    found = await refused(put(client, program))

    assert wrong_fields(found) == {f"program.{path}"}
    assert (await refused(get(client, shop.merchant_id, max(program.program_id, 1)))).reason == "PROGRAM_NOT_FOUND"


@pytest.mark.parametrize(
    ("tags", "wrong"),
    [
        (["zh-Hant", "zh-hant"], {"zh-Hant", "zh-hant"}),
        (["zh-TW", "zh_TW", "ZH-tw", "zh"], {"zh-TW", "zh_TW", "ZH-tw"}),
        (["EN", "en", "de", "De", ""], {"EN", "en", "de", "De"}),
        (["zh-Hant", "zh-Hant-TW", "zh", "zh-TW", "en-x-a", "en_GB", ""], set()),
    ],
)
async def test_languages_of_templates_differ_in_more_than_case(
    client: Client, shop: Shop, tags: list[str], wrong: set[str]
) -> None:
    """Every one of those that are the same language is named, since nobody could say which of them counts."""
    program = plain_program(shop, validation={"message_templates": dict.fromkeys(tags, "$code")})
    if not wrong:
        assert dict((await put(client, program)).program.validation.message_templates) == dict.fromkeys(tags, "$code")
        return
    found = await refused(put(client, program))

    assert wrong_fields(found) == {f"program.validation.message_templates[{tag!r}]" for tag in wrong}


async def test_a_program_of_an_earlier_release_names_no_number_types(
    service: Service, client: Client, shop: Shop
) -> None:
    """Its row has no such list, which means the default."""
    await put(client, full_program(shop))
    async with superuser(service) as connection:
        query = "UPDATE programs SET validation = validation - 'sms_number_types' WHERE merchant_id = $1"
        await connection.execute(query, shop.merchant_id)
    kept = (await get(client, shop.merchant_id, full_program(shop).program_id)).program

    assert list(kept.validation.sms_number_types) == []
    assert dict(kept.validation.message_templates) == dict(full_program(shop).validation.message_templates)


@pytest.mark.parametrize("name", ["per_redemption", "per_day", "per_week", "per_month"])
@pytest.mark.parametrize(
    ("criteria", "fewest"),
    [
        ({"min_points_per_redemption": 10}, 10),
        ({"multiples_of": 100}, 100),
        ({"multiples_of": 7, "min_points_per_redemption": 10}, 14),
    ],
)
async def test_no_maximum_is_below_the_fewest_points_that_may_be_redeemed(
    client: Client, shop: Shop, name: str, criteria: dict[str, int], fewest: int
) -> None:
    """Such a program would refuse every redemption."""
    least = criteria | {f"max_points_{name}": fewest}
    found = await refused(put(client, plain_program(shop, criteria=least | {f"max_points_{name}": fewest - 1})))

    assert wrong_fields(found) == {f"program.criteria.max_points_{name}"}
    await put(client, plain_program(shop, criteria=least))


async def test_every_wrong_field_of_a_program_is_named_at_once(client: Client, shop: Shop) -> None:
    """A caller mends a request in one go."""
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
    found = await refused(put(client, program))

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


async def test_a_request_without_a_program(client: Client) -> None:
    """It says what is missing."""
    found = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest()))

    assert wrong_fields(found) >= {"program", "program.merchant_id", "program.program_id", "program.store_ids"}
    assert wrong_fields(await refused(get(client, "", 0))) == {"merchant_id", "program_id"}


async def test_many_wrong_items_stay_readable(client: Client, shop: Shop) -> None:
    """The first are named, the others counted, and the status arrives."""
    found = await refused(put(client, plain_program(shop, store_ids=[f"s {n}" for n in range(1_000)])))

    assert "program.store_ids[0]" in wrong_fields(found)
    assert int(found.metadata["omitted_violations"]) == 1_000 - len(found.fields)


async def test_a_program_may_cover_a_thousand_stores(client: Client, shop: Shop) -> None:
    """As many as a merchant may name at once; a store may be in several programs."""
    stores = [unique("store") for _ in range(1_000)]
    for start in range(0, 1_000, 100):
        await asyncio.gather(
            *(client.put_store(shop.merchant_id, store_id) for store_id in stores[start : start + 100])
        )
    for program_id in (1, 2):
        await put(client, plain_program(shop, program_id=program_id, store_ids=stores))

    assert list((await get(client, shop.merchant_id, 2)).program.store_ids) == stores


async def test_stores_are_listed_by_page(client: Client) -> None:
    """Each store once, by store_id, of this merchant only."""
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
    """Each program once and whole, by program_id; a full last page has no next one."""
    for program_id in (2**63 - 1, 10, 9, 1):
        await put(client, full_program(shop, program_id=program_id))

    first = await client.programs.ListPrograms(
        programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id, page_size=2)
    )
    second = await client.programs.ListPrograms(
        programs_pb2.ListProgramsRequest(merchant_id=shop.merchant_id, page_size=2, page_token=first.next_page_token)
    )
    assert list(first.programs) == [full_program(shop, program_id=1), full_program(shop, program_id=9)]
    assert [program.program_id for program in second.programs] == [10, 2**63 - 1]
    assert second.next_page_token == ""


async def test_an_empty_list(client: Client) -> None:
    """A merchant whom nobody knows has nothing."""
    answer = await client.programs.ListPrograms(programs_pb2.ListProgramsRequest(merchant_id=unique("merchant")))

    assert (list(answer.programs), answer.next_page_token) == ([], "")


async def test_wrong_pages_are_refused(client: Client, shop: Shop) -> None:
    """A page token of another list or merchant, or one that somebody made up, breaks nothing."""
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
async def test_wrong_page_sizes_are_refused(client: Client, shop: Shop, page_size: int) -> None:
    """A page has at most 1,000 items."""
    stores = programs_pb2.ListStoresRequest(merchant_id=shop.merchant_id, page_size=page_size)
    programs = programs_pb2.ListProgramsRequest(merchant_id="", page_size=page_size)

    assert wrong_fields(await refused(client.programs.ListStores(stores))) == {"page_size"}
    assert wrong_fields(await refused(client.programs.ListPrograms(programs))) == {"merchant_id", "page_size"}


async def test_a_flood_of_channels_is_refused_at_once(client: Client, shop: Shop) -> None:
    """A list that can only be wrong is named once, not item by item."""
    program = programs_pb2.Program(merchant_id=shop.merchant_id, program_id=1, store_ids=[shop.store_id])
    program.validation.channels.extend([redemption_pb2.VALIDATION_TYPE_SMS] * 100_000)

    error = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest(program=program)))

    assert "program.validation.channels" in error.fields
    assert len(error.fields) <= 4


@pytest.mark.parametrize("name", ["localtime", "Factory", "Mars/Olympus", "right/UTC", "posix/UTC"])
async def test_a_time_zone_means_the_same_everywhere(client: Client, shop: Shop, name: str) -> None:
    """A zone that each machine reads differently would cap differently."""
    program = programs_pb2.Program(
        merchant_id=shop.merchant_id, program_id=1, store_ids=[shop.store_id], time_zone=name
    )

    error = await refused(client.programs.PutProgram(programs_pb2.PutProgramRequest(program=program)))

    assert set(error.fields) == {"program.time_zone"}


async def test_a_rate_takes_another_currency(client: Client, shop: Shop) -> None:
    """One dollar is one dollar."""
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


async def test_a_page_fits_into_an_answer(client: Client, shop: Shop) -> None:
    """Programs that are very large together come on several pages, and none is lost."""
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

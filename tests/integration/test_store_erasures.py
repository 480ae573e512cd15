"""Requests to erase stores, and the erasure of a store's customers."""

import asyncio
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, programs_pb2, webhooks_pb2
from pointbook_common.durations import DAY_MS
from pointbook_server.access.model import Scope
from pointbook_server.programs import servicer as servicer_module
from pointbook_server.programs.erasures import transactions as erasures_module
from pointbook_server.server import Server
from support.clients import Client
from support.clocks import NOW_MS, TestClock, at
from support.codes import CODE_SETTINGS, guess_code, issue_and_read_code
from support.connections import superuser
from support.customers import email, mobile
from support.json_logs import json_logs
from support.redemption import earn
from support.refusals import refused
from support.servers import Service, running_server
from support.shops import Shop
from support.store_erasures import REASON, REQUEST_MS, erase_store, erasure_outcome, list_erasures, request_erasure
from support.tokens import make_token
from support.unique_names import unique
from support.waiting import until, until_locks_are_awaited


async def another_store(client: Client, shop: Shop) -> Shop:
    """Register another store of a merchant."""
    other = Shop(shop.merchant_id, unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    return other


async def send(client: Client, shop: Shop, buyer_id: str = "buyer", **changes: Any) -> str:
    """Apply a customer webhook of a store, and return its outcome."""
    values: dict[str, Any] = {
        "event_id": unique("event"),
        "merchant_id": shop.merchant_id,
        "store_id": shop.store_id,
        "buyer_id": buyer_id,
        "kind": customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
        "updated_at": at(NOW_MS - 60_000),
    }
    answer = await client.customers.ApplyCustomerUpdate(customers_pb2.ApplyCustomerUpdateRequest(**(values | changes)))
    return customers_pb2.CustomerUpdateOutcome.Name(answer.outcome).removeprefix("CUSTOMER_UPDATE_OUTCOME_")


async def customer_of(client: Client, shop: Shop, buyer_id: str = "buyer") -> customers_pb2.Customer | None:
    """Return a buyer's customer; None without one."""
    ref = identity_pb2.CustomerRef(buyer=identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id))
    try:
        request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer=ref)
        return (await client.customers.GetCustomer(request)).customer
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return None


async def quarantine_webhook(client: Client, shop: Shop, body: bytes, topic: str = "customers/update") -> str:
    """Quarantine a webhook whose header names the shop's store."""
    request = webhooks_pb2.QuarantineWebhookRequest(
        merchant_id=shop.merchant_id,
        topic=topic,
        headers=[webhooks_pb2.WebhookHeader(name="X-Shopline-Shop-Id", value=shop.store_id)],
        body=body,
        reason=webhooks_pb2.QUARANTINE_REASON_MALFORMED if topic else webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING,
    )
    return (await client.webhooks.QuarantineWebhook(request)).quarantine_id


async def is_erased(client: Client, shop: Shop, quarantine_id: str) -> bool:
    """Return whether a quarantined webhook has no body."""
    request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=shop.merchant_id, quarantine_id=quarantine_id)
    return (await client.webhooks.GetQuarantinedWebhook(request)).webhook.body_erased


async def audit(service: Service, shop: Shop) -> list[tuple[str, str, str]]:
    """Return a merchant's audit: action, customer and reason."""
    query = "SELECT action, customer_id, reason FROM customer_audit WHERE merchant_id = $1 ORDER BY action, customer_id"
    async with superuser(service) as connection:
        return [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]


def gauges(server: Server) -> dict[str, float]:
    """Return the gauges of store erasures."""
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    values = dict(line.split() for line in lines if line.startswith("pointbook_store_erasures"))
    return {name.removeprefix("pointbook_store_erasures_"): float(value) for name, value in values.items()}


async def test_repeated_requests_open_one_erasure(client: Client, shop: Shop) -> None:
    await send(client, shop, mobile=mobile())
    first = await request_erasure(client, shop, event_id="e-1")
    again = await request_erasure(client, shop, event_id="e-1")
    later = await request_erasure(client, shop, request_time=at(NOW_MS))
    [stored] = await list_erasures(client, shop.merchant_id)

    assert [erasure_outcome(answer) for answer in (first, again, later)] == ["REQUESTED"] + ["ALREADY_REQUESTED"] * 2
    assert stored == first.erasure == again.erasure == later.erasure
    assert (stored.request_time, stored.due_time) == (at(REQUEST_MS), at(REQUEST_MS + 30 * DAY_MS))
    assert not stored.HasField("close_time")
    customer = await customer_of(client, shop)
    assert customer is not None
    assert customer.mobile


async def test_concurrent_requests_open_one_erasure(client: Client, shop: Shop) -> None:
    answers = await asyncio.gather(*(request_erasure(client, shop) for _ in range(20)))

    assert sorted(map(erasure_outcome, answers)) == ["ALREADY_REQUESTED"] * 19 + ["REQUESTED"]
    assert len(await list_erasures(client, shop.merchant_id)) == 1


async def test_stores_that_the_merchant_does_not_have_are_refused(client: Client, shop: Shop) -> None:
    """Only a webhook's error says that another merchant has the store."""
    unknown, foreign = Shop(shop.merchant_id, unique("store")), Shop(unique("merchant"), shop.store_id)
    errors = [
        await refused(call(client, store)) for call in (request_erasure, erase_store) for store in (unknown, foreign)
    ]

    assert {(error.code, error.reason) for error in errors} == {(grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")}
    assert [error.metadata.get("registered_elsewhere") for error in errors] == [None, "true", None, None]


async def test_every_invalid_field_is_named_at_once(client: Client, shop: Shop) -> None:
    empty = await refused(client.programs.RequestStoreErasure(programs_pb2.RequestStoreErasureRequest()))
    early = await refused(request_erasure(client, shop, request_time=at(0)))
    late = await refused(request_erasure(client, shop, request_time=at(NOW_MS + 2 * DAY_MS)))
    nothing = await refused(client.programs.EraseStore(programs_pb2.EraseStoreRequest()))
    blank = programs_pb2.EraseStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id, reason=" ")
    page = programs_pb2.ListStoreErasuresRequest(merchant_id=shop.merchant_id, page_size=1_001, page_token="x")

    assert set(empty.fields) == {"event_id", "merchant_id", "store_id", "request_time"}
    assert set(early.fields) == set(late.fields) == {"request_time"}
    assert set(nothing.fields) == {"merchant_id", "store_id", "reason"}
    assert set((await refused(client.programs.EraseStore(blank))).fields) == {"reason"}
    assert set((await refused(client.programs.ListStoreErasures(page))).fields) == {"page_size", "page_token"}


async def test_a_customer_of_the_store_alone_is_redacted(client: Client, service: Service, shop: Shop) -> None:
    await client.put_customer(
        shop.merchant_id,
        "alice",
        mobile=mobile(),
        email=email(),
        external_id="crm-1",
        card_numbers=["card-1"],
        language="zh-Hant",
        fraud_blocked=True,
        buyers=[identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")],
    )
    await send(client, shop, email=email())
    await client.apply(shop.update("buyer"))
    before = await client.account(shop.merchant_id, shop.store_id, "buyer")
    await request_erasure(client, shop)
    done = await erase_store(client, shop)

    assert (done.erased, done.remaining) == (1, 0)
    assert (done.erasure.close_time, done.erasure.begin_time, done.erasure.reason) == (at(NOW_MS), at(NOW_MS), REASON)
    assert await client.customer(shop.merchant_id, "alice") == customers_pb2.Customer(
        merchant_id=shop.merchant_id,
        customer_id="alice",
        fraud_blocked=True,
        buyers=[identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")],
    )
    assert await client.account(shop.merchant_id, shop.store_id, "buyer") == before
    assert await audit(service, shop) == [("ERASE_STORE", "", REASON), ("REDACT", "alice", REASON)]
    entries = points_pb2.ListPointsEntriesRequest(
        merchant_id=shop.merchant_id, store_id=shop.store_id, buyer_id="buyer"
    )
    assert len((await client.points.ListPointsEntries(entries)).entries) == 1
    async with superuser(service) as connection:
        for table in ("customer_updates", "customer_identifiers", "customer_claims"):
            query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - a table of ours
            assert await connection.fetchval(query, shop.merchant_id) == 0


NEWEST, OLDER = NOW_MS - 10_000, NOW_MS - 20_000


@pytest.mark.parametrize(
    ("set_at", "left"),
    [
        (({"mobile": NEWEST, "email": NEWEST}, {}), set()),
        (({"mobile": OLDER, "email": OLDER}, {"mobile": NEWEST, "email": NEWEST}), {"mobile", "email"}),
        (({"mobile": NEWEST}, {"mobile": OLDER, "email": OLDER}), {"email"}),
        (({"mobile": OLDER, "email": NEWEST}, {"mobile": NEWEST}), {"mobile"}),
        (({}, {"mobile": OLDER}), {"mobile"}),
        (({"mobile": NEWEST}, {"email": OLDER}), {"email"}),
    ],
)
async def test_a_customer_of_several_stores_keeps_contacts_of_the_others(
    client: Client, service: Service, shop: Shop, set_at: tuple[dict[str, int], dict[str, int]], left: set[str]
) -> None:
    """`set_at` are the times at which the erased and the other store set each contact."""
    other = await another_store(client, shop)
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other)]
    await client.put_customer(
        shop.merchant_id, "alice", external_id="crm-1", card_numbers=["card-1"], language="en", buyers=buyers
    )
    for each, times in zip((shop, other), set_at, strict=True):
        for kind, moment in times.items():
            await send(client, each, updated_at=at(moment), **{kind: mobile() if kind == "mobile" else email()})
    await client.apply(shop.update("buyer"))
    done = await erase_store(client, shop)
    alice = await client.customer(shop.merchant_id, "alice")

    assert (done.erased, done.remaining) == (1, 0)
    assert {kind for kind in ("mobile", "email") if getattr(alice, kind)} == left
    assert (alice.external_id, list(alice.card_numbers), alice.language) == ("crm-1", ["card-1"], "en")
    assert [buyer.store_id for buyer in alice.buyers] == [other.store_id]
    assert await customer_of(client, shop) is None
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20
    assert ("REDACT", "alice", REASON) in await audit(service, shop)


async def test_contacts_that_no_webhook_set_stay_with_a_customer_of_several_stores(client: Client, shop: Shop) -> None:
    other = await another_store(client, shop)
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other)]
    put = await client.put_customer(shop.merchant_id, "alice", mobile=mobile(), email=email(), buyers=buyers)
    await erase_store(client, shop)
    alice = await client.customer(shop.merchant_id, "alice")

    assert (alice.mobile, alice.email) == (put.mobile, put.email)


async def test_another_stores_webhook_sets_an_erased_contact_again(client: Client, shop: Shop) -> None:
    other, number = await another_store(client, shop), mobile()
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other)]
    await client.put_customer(shop.merchant_id, "alice", buyers=buyers)
    await send(client, shop, mobile=number)
    await erase_store(client, shop)
    assert not (await client.customer(shop.merchant_id, "alice")).mobile

    assert await send(client, other, mobile=number, updated_at=at(NOW_MS - 5_000)) == "APPLIED"
    assert (await client.customer(shop.merchant_id, "alice")).mobile == number


async def test_a_contact_that_another_store_claims_passes_to_its_customer(client: Client, shop: Shop) -> None:
    other, number, address = await another_store(client, shop), mobile(), email()
    await send(client, shop, "owner", mobile=number, email=address, updated_at=at(NOW_MS - 50_000))
    await send(client, other, "successor", mobile=number, updated_at=at(NOW_MS - 40_000))
    await send(client, shop, "claimant", email=address, updated_at=at(NOW_MS - 30_000))
    await erase_store(client, shop)
    successor, owner, claimant = [
        await customer_of(client, each, buyer)
        for each, buyer in ((other, "successor"), (shop, "owner"), (shop, "claimant"))
    ]

    assert successor is not None
    assert owner is not None
    assert claimant is not None
    assert (successor.mobile, successor.email) == (number, "")
    assert (owner.mobile, owner.email, claimant.mobile, claimant.email) == ("", "", "", "")


@pytest.mark.parametrize("batch", [1, 2, 10])
async def test_no_claim_of_an_erased_store_brings_a_contact_back(
    client: Client, service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", batch)
    number = mobile()
    for buyer, moment in (("b", 50_000), ("c", 40_000), ("a", 30_000)):
        await send(client, shop, buyer, mobile=number, updated_at=at(NOW_MS - moment))
    assert (await erase_store(client, shop)).remaining == 0
    async with superuser(service) as connection:
        for table in ("customer_claims", "customer_identifiers"):
            query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - a table of ours
            assert await connection.fetchval(query, shop.merchant_id) == 0


@pytest.mark.parametrize("buyer_id", ["buyer", "unknown-buyer"])
async def test_late_webhooks_of_an_erased_store_are_ignored(client: Client, shop: Shop, buyer_id: str) -> None:
    await send(client, shop, mobile=mobile())
    await erase_store(client, shop)

    assert await send(client, shop, buyer_id, mobile=mobile(), updated_at=at(NOW_MS - 1)) == "REDACTED"
    assert await send(client, shop, buyer_id, mobile=mobile(), updated_at=at(NOW_MS)) == "REDACTED"
    assert await send(client, shop, buyer_id, mobile=mobile(), updated_at=at(NOW_MS + 1_000)) == "APPLIED"


@pytest.mark.parametrize("known", ["", "bare", "stamped"])
async def test_an_erasure_waits_for_running_webhooks(client: Client, service: Service, shop: Shop, known: str) -> None:
    if known:
        await send(client, shop, mobile=mobile())
    if known == "bare":
        assert (await erase_store(client, shop)).remaining == 0
    moment = at(NOW_MS + 1_000 if known == "bare" else NOW_MS - 1)
    late: dict[str, Any] = {"event_id": unique("event"), "mobile": mobile(), "updated_at": moment}
    async with superuser(service) as connection:
        blocking = connection.transaction()
        await blocking.start()
        await connection.execute(
            "INSERT INTO customer_updates (event_id, merchant_id, store_id, buyer_id, content_digest, updated_at_ms)"
            " VALUES ($1, $2, $3, 'x', $4, 0)",
            late["event_id"],
            shop.merchant_id,
            shop.store_id,
            b"0" * 32,
        )
        sending = asyncio.create_task(send(client, shop, **late))
        await until_locks_are_awaited(service.database_url, 1)
        erasing = asyncio.create_task(erase_store(client, shop))
        await until_locks_are_awaited(service.database_url, 2)
        await blocking.rollback()

    assert (await sending, (await erasing).remaining) == ("APPLIED", 0)
    async with superuser(service) as connection:
        for table in ("customer_identifiers", "customer_updates"):
            query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - a table of ours
            assert await connection.fetchval(query, shop.merchant_id) == 0
    assert await send(client, shop, **late) == "REDACTED"


async def test_new_accounts_do_not_wait_for_an_erasure(client: Client, service: Service, shop: Shop) -> None:
    async with superuser(service) as connection, connection.transaction():
        await connection.execute("SELECT FROM stores WHERE store_id = $1 FOR NO KEY UPDATE", shop.store_id)
        await client.apply(shop.update("new"))

    assert (await client.account(shop.merchant_id, shop.store_id, "new")).points_balance == 20


async def test_updates_dated_in_the_future_are_erased_for_good(client: Client, shop: Shop) -> None:
    """SHOPLINE's clock may be ahead."""
    ahead: dict[str, Any] = {"event_id": unique("event"), "mobile": mobile(), "updated_at": at(NOW_MS + 60_000)}
    await send(client, shop, **ahead)
    await erase_store(client, shop)

    assert await send(client, shop, **ahead) == "REDACTED"
    customer = await customer_of(client, shop)
    assert customer is not None
    assert not customer.mobile


async def test_a_repeated_erasure_has_no_effect(client: Client, service: Service, shop: Shop) -> None:
    await send(client, shop, mobile=mobile())
    await request_erasure(client, shop, event_id="e-1")
    done = await erase_store(client, shop)
    customer, lines = await customer_of(client, shop), await audit(service, shop)
    again = await erase_store(client, shop)
    replayed, older = await request_erasure(client, shop, event_id="e-1"), await request_erasure(client, shop)

    assert (done.erased, again.erased, again.remaining) == (1, 0, 0)
    assert again.erasure == done.erasure == replayed.erasure == older.erasure
    assert (erasure_outcome(replayed), erasure_outcome(older)) == ("ALREADY_ERASED", "ALREADY_ERASED")
    assert await list_erasures(client, shop.merchant_id) == [done.erasure]
    assert (await customer_of(client, shop), await audit(service, shop)) == (customer, lines)


async def test_a_store_is_erased_without_a_request_and_again_after_new_data(
    client: Client, service: Service, shop: Shop
) -> None:
    empty = await erase_store(client, shop)
    await send(client, shop, mobile=mobile(), updated_at=at(NOW_MS + 1_000))
    second = await erase_store(client, shop)
    later = await request_erasure(client, shop, request_time=at(NOW_MS + 1))

    assert [(part.erased, part.remaining) for part in (empty, second)] == [(0, 0), (1, 0)]
    assert erasure_outcome(later) == "REQUESTED"
    assert [erasure.HasField("close_time") for erasure in await list_erasures(client, shop.merchant_id)] == [
        False,
        True,
        True,
    ]
    assert [action for action, _, _ in await audit(service, shop)] == ["ERASE_STORE", "ERASE_STORE", "REDACT"]


async def test_a_large_store_is_erased_part_by_part(
    client: Client, service: Service, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", 2)
    monkeypatch.setattr(erasures_module, "BATCHES_MAX", 2)
    for number in range(9):
        await send(client, shop, f"b-{number}", mobile=mobile())
    await send(client, await another_store(client, shop), "elsewhere", mobile=mobile())
    await request_erasure(client, shop)
    first = await erase_store(client, shop)
    [half] = await list_erasures(client, shop.merchant_id)
    async with running_server(service.database_url, admin_token) as (_, other):
        second = await erase_store(other, shop)
    third = await erase_store(client, shop)

    assert [(part.erased, part.remaining) for part in (first, second, third)] == [(4, 5), (4, 1), (1, 0)]
    assert half.begin_time == at(NOW_MS)
    assert not half.HasField("close_time")
    assert len([line for line in await audit(service, shop) if line[0] == "REDACT"]) == 9
    async with superuser(service) as connection:
        left = await connection.fetch("SELECT kind FROM customer_identifiers WHERE merchant_id = $1", shop.merchant_id)
    assert [row["kind"] for row in left] == ["MOBILE"]


async def test_concurrent_erasures_redact_each_customer_once(
    client: Client, service: Service, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", 3)
    for number in range(20):
        await send(client, shop, f"b-{number:02}", mobile=mobile())
    await request_erasure(client, shop)
    async with running_server(service.database_url, admin_token) as (_, other):
        await asyncio.gather(
            *(erase_store(each, shop) for each in (client, other) for _ in range(3)),
            *(send(client, shop, f"b-{number:02}", mobile=mobile()) for number in range(20)),
        )

    assert (await erase_store(client, shop)).remaining == 0
    assert len([line for line in await audit(service, shop) if line[0] == "REDACT"]) == 20
    async with superuser(service) as connection:
        query = "SELECT count(*) FROM customer_identifiers WHERE merchant_id = $1"
        assert await connection.fetchval(query, shop.merchant_id) == 0


async def test_quarantined_bodies_of_the_store_are_erased(client: Client, service: Service, shop: Shop) -> None:
    other = await another_store(client, shop)
    await send(client, shop, "17", mobile=mobile())
    gone = [
        await quarantine_webhook(client, other, b'{"id": "17", "phone": "1"}'),
        await quarantine_webhook(client, shop, b'{"id": "unknown", "phone": "1"}'),
        await quarantine_webhook(client, shop, b"no JSON of a customer", "customers/create"),
        await quarantine_webhook(client, shop, b'{"id": 18, "phone": "1"}', "app_memberSystem_points/challenged"),
        await quarantine_webhook(
            client, other, f'{{"customer": {{"id": "19"}}, "shop_id": "{shop.store_id}"}}'.encode(), "customers/redact"
        ),
        await quarantine_webhook(client, shop, b'{"id": "21", "phone": "1"}', ""),
        await quarantine_webhook(client, shop, b"no JSON of no topic", ""),
        await quarantine_webhook(client, shop, '{"id": "\u00e9", "email": "a@example.com"}'.encode(), ""),
    ]
    stored = [
        await quarantine_webhook(client, other, b'{"id": "20", "phone": "1"}'),
        await quarantine_webhook(client, other, b"no JSON of another customer"),
        await quarantine_webhook(
            client, shop, b'{"buyer_id": "17", "updated_value": "x"}', "app_memberSystem_points/challenged"
        ),
        await quarantine_webhook(client, shop, b"no JSON of points", "app_memberSystem_points/challenged"),
        await quarantine_webhook(client, shop, f'{{"store_id": "{shop.store_id}", "buyer_id": "17"}}'.encode(), ""),
        await quarantine_webhook(client, other, b"no JSON of no topic of another store", ""),
    ]
    assert (await erase_store(client, shop)).remaining == 0

    assert [await is_erased(client, shop, quarantine_id) for quarantine_id in gone] == [True] * len(gone)
    assert [await is_erased(client, shop, quarantine_id) for quarantine_id in stored] == [False] * len(stored)
    async with superuser(service) as connection:
        query = """
            SELECT (SELECT bytes FROM quarantine_usage WHERE merchant_id = $1)
                = (SELECT sum(octet_length(headers) + coalesce(octet_length(body), 0)) FROM quarantined_webhooks
                    WHERE merchant_id = $1)
        """
        assert await connection.fetchval(query, shop.merchant_id)


async def test_a_newer_request_restarts_an_erasure_that_has_begun(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", 2)
    monkeypatch.setattr(erasures_module, "BATCHES_MAX", 1)
    for number in range(3):
        await send(client, shop, f"b-{number}", mobile=mobile())
    await request_erasure(client, shop)
    assert (await erase_store(client, shop)).remaining == 1
    assert await send(client, shop, "b-0", mobile=mobile(), updated_at=at(NOW_MS + 1_000)) == "APPLIED"
    older, newer = (
        await request_erasure(client, shop),
        await request_erasure(client, shop, request_time=at(NOW_MS + 2_000)),
    )
    while (await erase_store(client, shop)).remaining:
        pass

    assert (erasure_outcome(older), erasure_outcome(newer)) == ("ALREADY_REQUESTED", "ALREADY_REQUESTED")
    customers = [await customer_of(client, shop, f"b-{number}") for number in range(3)]
    assert [customer and customer.mobile for customer in customers] == ["", "", ""]
    assert len(await list_erasures(client, shop.merchant_id)) == 1


async def test_many_quarantined_bodies_are_erased_part_by_part(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(erasures_module, "BATCH_WEBHOOKS", 2)
    monkeypatch.setattr(erasures_module, "BATCHES_MAX", 1)
    for number in range(5):
        await quarantine_webhook(client, shop, b'{"id": "x", "n": %d}' % number)

    assert [(await erase_store(client, shop)).remaining for _ in range(4)] == [3, 1, 0, 0]


async def test_without_a_code_key_nothing_is_erased(service: Service, admin_token: str, shop: Shop) -> None:
    """The request is still recorded."""
    async with running_server(service.database_url, admin_token, code_keys={}) as (_, client):
        assert (await refused(erase_store(client, shop))).reason == "KEY_NOT_CONFIGURED"
        await send(client, shop, mobile=mobile())
        assert erasure_outcome(await request_erasure(client, shop)) == "REQUESTED"
        error = await refused(erase_store(client, shop))

    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NOT_CONFIGURED")
    customer = await customer_of(service.client, shop)
    assert customer is not None
    assert customer.mobile
    assert not (await list_erasures(service.client, shop.merchant_id))[0].HasField("begin_time")


async def test_an_erasure_ends_open_codes(client: Client, service: Service, shop: Shop) -> None:
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await earn(client, shop, 500)
    await send(client, shop, mobile=mobile())
    challenge_id, code = await issue_and_read_code(service, shop)
    await erase_store(client, shop)

    assert not await guess_code(client, shop, code, challenge_id=challenge_id)


async def test_open_requests_are_listed_first(client: Client, shop: Shop) -> None:
    stores = [shop, *[await another_store(client, shop) for _ in range(4)]]
    for number, each in enumerate(stores):
        await request_erasure(client, each, request_time=at(REQUEST_MS - number * 1_000))
    await erase_store(client, stores[0])
    await erase_store(client, stores[2])
    of_merchant = [erasure.store_id for erasure in await list_erasures(client, shop.merchant_id, page_size=2)]
    of_all = await list_erasures(client, "", page_size=3)

    assert of_merchant[:3] == [stores[number].store_id for number in (4, 3, 1)]
    assert set(of_merchant[3:]) == {stores[0].store_id, stores[2].store_id}
    assert {erasure.store_id for erasure in of_all} > {each.store_id for each in stores}
    assert [erasure.HasField("close_time") for erasure in of_all] == sorted(
        erasure.HasField("close_time") for erasure in of_all
    )


async def test_scopes_of_requesting_listing_and_erasing(service: Service, shop: Shop) -> None:
    calls: dict[Scope, Any] = {
        Scope.WEBHOOKS: request_erasure,
        Scope.STORES: lambda client, shop: list_erasures(client, shop.merchant_id),
        Scope.ADMIN: erase_store,
    }
    for scope in calls:
        own = Client(service.server.port, await make_token(service.database_url, [shop.merchant_id], [scope]))
        for needed, call in calls.items():
            if needed is scope:
                await call(own, shop)
            else:
                assert (await refused(call(own, shop))).reason == "SCOPE_MISSING"
        if scope is Scope.STORES:
            assert (await refused(list_erasures(own, ""))).reason == "MERCHANT_FORBIDDEN"
        await own.close()


async def test_metrics_and_the_log_show_open_and_overdue_requests(
    service: Service, admin_token: str, shop: Shop
) -> None:
    await erase_all_open(service.client)
    await request_erasure(service.client, shop)
    clock = TestClock()
    async with running_server(service.database_url, admin_token, clock=clock) as (server, client):
        await until(lambda: gauges(server) == {"open": 1, "overdue": 0})
        other = await another_store(client, shop)
        await request_erasure(client, other)
        assert gauges(server) == {"open": 2, "overdue": 0}
        clock.move(28 * DAY_MS / 1_000)
        with json_logs(erasures_module) as written:
            await server.maintenance.run_jobs()
        assert gauges(server) == {"open": 2, "overdue": 2}
        assert '"level": "error"' in written.getvalue()
        assert '"count": 2' in written.getvalue()
        await erase_store(client, shop)
        await erase_store(client, other)
        assert gauges(server) == {"open": 0, "overdue": 0}


async def erase_all_open(client: Client) -> None:
    """Erase every store whose request other tests of this file have left open."""
    for erasure in await list_erasures(client, ""):
        if not erasure.HasField("close_time"):
            await erase_store(client, Shop(erasure.merchant_id, erasure.store_id))


async def test_no_personal_data_is_logged(client: Client, shop: Shop) -> None:
    number = mobile()
    await send(client, shop, "private-buyer", mobile=number)
    with json_logs(erasures_module, servicer_module) as written:
        await request_erasure(client, shop)
        await erase_store(client, shop)

    assert written.getvalue().count("audit: store era") == 2
    assert "private-buyer" not in written.getvalue()
    assert number[1:] not in written.getvalue()

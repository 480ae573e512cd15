"""Requests to erase stores, and the erasure of a store's customers, on a real server and database."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from prometheus_client import generate_latest

from pointbook.v1 import customers_pb2, identity_pb2, points_pb2, programs_pb2, webhooks_pb2
from pointbook_server.access.model import Scope
from pointbook_server.programs import erasures as erasures_module
from pointbook_server.programs import servicer as servicer_module
from pointbook_server.programs.model import Channel
from pointbook_server.server import Server
from support.codes import CODE_SETTINGS, guess_code, issue_and_read_code
from support.harness import (
    NOW_MS,
    Client,
    Outbox,
    Service,
    Shop,
    TestClock,
    at,
    make_token,
    refused,
    server_settings,
    unique,
)
from support.json_logs import json_logs
from support.points import superuser
from support.redemption import earn
from support.waiting import until, until_locks_are_awaited

DAY_MS = 24 * 60 * 60 * 1_000
REQUEST_MS = NOW_MS - 2 * DAY_MS
WHY = "merchants/redact of May"

_digits = itertools.count(7_001_234)


def mobile() -> str:
    """Make a mobile number that no other test uses."""
    return f"+86139{next(_digits) % 100_000_000:08}"


def email() -> str:
    """Make an e-mail address that no other test uses."""
    return f"{unique('person')}@example.com"


async def another_store(client: Client, shop: Shop) -> Shop:
    """Register one more store of a merchant."""
    other = Shop(shop.merchant_id, unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    return other


async def tell(client: Client, shop: Shop, buyer_id: str = "buyer", **changes: Any) -> str:
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


async def found(client: Client, shop: Shop, buyer_id: str = "buyer") -> customers_pb2.Customer | None:
    """Return the customer of a buyer; None where the buyer has none."""
    ref = identity_pb2.CustomerRef(buyer=identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id))
    try:
        request = customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer=ref)
        return (await client.customers.GetCustomer(request)).customer
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.NOT_FOUND:
            raise
        return None


async def ask(client: Client, shop: Shop, **changes: Any) -> programs_pb2.RequestStoreErasureResponse:
    """Request the erasure of a store."""
    values: dict[str, Any] = {
        "event_id": unique("erasure"),
        "merchant_id": shop.merchant_id,
        "store_id": shop.store_id,
        "request_time": at(REQUEST_MS),
    }
    return await client.programs.RequestStoreErasure(programs_pb2.RequestStoreErasureRequest(**(values | changes)))


def outcome(answer: programs_pb2.RequestStoreErasureResponse) -> str:
    """Return what became of a request."""
    return programs_pb2.StoreErasureOutcome.Name(answer.outcome).removeprefix("STORE_ERASURE_OUTCOME_")


async def erase(client: Client, shop: Shop) -> programs_pb2.EraseStoreResponse:
    """Erase a part of a store."""
    request = programs_pb2.EraseStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id, reason=WHY)
    return await client.programs.EraseStore(request)


async def listed(client: Client, merchant_id: str, page_size: int = 0) -> list[programs_pb2.StoreErasure]:
    """Read all pages of a merchant's requests."""
    request = programs_pb2.ListStoreErasuresRequest(merchant_id=merchant_id, page_size=page_size)
    pages: list[programs_pb2.StoreErasure] = []
    while True:
        page = await client.programs.ListStoreErasures(request)
        pages.extend(page.erasures)
        if not page.next_page_token:
            return pages
        request.page_token = page.next_page_token


async def quarantine(client: Client, shop: Shop, body: bytes, topic: str = "customers/update") -> str:
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
    """Return whether a quarantined webhook has lost its body."""
    request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=shop.merchant_id, quarantine_id=quarantine_id)
    return (await client.webhooks.GetQuarantinedWebhook(request)).webhook.body_erased


async def audit(service: Service, shop: Shop) -> list[tuple[str, str, str]]:
    """Return a merchant's audit: action, customer and reason."""
    query = "SELECT action, customer_id, reason FROM customer_audit WHERE merchant_id = $1 ORDER BY action, customer_id"
    async with superuser(service) as connection:
        return [tuple(row) for row in await connection.fetch(query, shop.merchant_id)]


@asynccontextmanager
async def another_server(
    service: Service, token: str, clock: TestClock | None = None, **changes: Any
) -> AsyncIterator[tuple[Server, Client]]:
    """Run one more server on the same database, with other settings."""
    senders = {Channel.SMS: Outbox(), Channel.EMAIL: Outbox()}
    server = Server(server_settings(**changes), service.database_url, senders=senders, clock=clock or TestClock())
    await server.start()
    client = Client(server.port, token)
    try:
        yield server, client
    finally:
        await client.close()
        await server.stop()


def gauges(server: Server) -> dict[str, float]:
    """Return the gauges of store erasures as Prometheus reads them."""
    lines = generate_latest(server.metrics.registry).decode().splitlines()
    values = dict(line.split() for line in lines if line.startswith("pointbook_store_erasures"))
    return {name.removeprefix("pointbook_store_erasures_"): float(value) for name, value in values.items()}


async def test_a_request_is_kept_once_and_erases_nothing(client: Client, shop: Shop) -> None:
    """Repeated, or sent anew, it is the same open request, due 30 days after it was first made."""
    await tell(client, shop, mobile=mobile())
    first = await ask(client, shop, event_id="e-1")
    again = await ask(client, shop, event_id="e-1")
    later = await ask(client, shop, request_time=at(NOW_MS))
    [kept] = await listed(client, shop.merchant_id)

    assert [outcome(answer) for answer in (first, again, later)] == ["REQUESTED"] + ["ALREADY_REQUESTED"] * 2
    assert kept == first.erasure == again.erasure == later.erasure
    assert (kept.request_time, kept.due_time) == (at(REQUEST_MS), at(REQUEST_MS + 30 * DAY_MS))
    assert not kept.HasField("close_time")
    customer = await found(client, shop)
    assert customer is not None
    assert customer.mobile


async def test_parallel_requests_open_one(client: Client, shop: Shop) -> None:
    """SHOPLINE may deliver the same webhook several times at once."""
    answers = await asyncio.gather(*(ask(client, shop) for _ in range(20)))

    assert sorted(map(outcome, answers)) == ["ALREADY_REQUESTED"] * 19 + ["REQUESTED"]
    assert len(await listed(client, shop.merchant_id)) == 1


async def test_stores_that_are_not_the_merchants(client: Client, shop: Shop) -> None:
    """A webhook learns that the store is another merchant's, an operator does not."""
    unknown, foreign = Shop(shop.merchant_id, unique("store")), Shop(unique("merchant"), shop.store_id)
    errors = [await refused(call(client, wanted)) for call in (ask, erase) for wanted in (unknown, foreign)]

    assert {(error.code, error.reason) for error in errors} == {(grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")}
    assert [error.metadata.get("registered_elsewhere") for error in errors] == [None, "true", None, None]


async def test_wrong_fields_are_named(client: Client, shop: Shop) -> None:
    """Every limit of the contract, at once."""
    empty = await refused(client.programs.RequestStoreErasure(programs_pb2.RequestStoreErasureRequest()))
    early = await refused(ask(client, shop, request_time=at(0)))
    late = await refused(ask(client, shop, request_time=at(NOW_MS + 2 * DAY_MS)))
    nothing = await refused(client.programs.EraseStore(programs_pb2.EraseStoreRequest()))
    blank = programs_pb2.EraseStoreRequest(merchant_id=shop.merchant_id, store_id=shop.store_id, reason=" ")
    page = programs_pb2.ListStoreErasuresRequest(merchant_id=shop.merchant_id, page_size=1_001, page_token="x")

    assert set(empty.fields) == {"event_id", "merchant_id", "store_id", "request_time"}
    assert set(early.fields) == set(late.fields) == {"request_time"}
    assert set(nothing.fields) == {"merchant_id", "store_id", "reason"}
    assert set((await refused(client.programs.EraseStore(blank))).fields) == {"reason"}
    assert set((await refused(client.programs.ListStoreErasures(page))).fields) == {"page_size", "page_token"}


async def test_a_customer_of_the_store_alone_is_redacted(client: Client, service: Service, shop: Shop) -> None:
    """All identifiers and the language go; the bare customer, the account and its entries stay as they were."""
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
    await tell(client, shop, email=email())
    await client.apply(shop.update("buyer"))
    before = await client.account(shop.merchant_id, shop.store_id, "buyer")
    await ask(client, shop)
    done = await erase(client, shop)

    assert (done.erased, done.remaining) == (1, 0)
    assert (done.erasure.close_time, done.erasure.begin_time, done.erasure.reason) == (at(NOW_MS), at(NOW_MS), WHY)
    assert await client.customer(shop.merchant_id, "alice") == customers_pb2.Customer(
        merchant_id=shop.merchant_id,
        customer_id="alice",
        fraud_blocked=True,
        buyers=[identity_pb2.Buyer(store_id=shop.store_id, buyer_id="buyer")],
    )
    assert await client.account(shop.merchant_id, shop.store_id, "buyer") == before
    assert await audit(service, shop) == [("ERASE_STORE", "", WHY), ("REDACT", "alice", WHY)]
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
    ("told", "left"),
    [
        (({"mobile": NEWEST, "email": NEWEST}, {}), set()),
        (({"mobile": OLDER, "email": OLDER}, {"mobile": NEWEST, "email": NEWEST}), {"mobile", "email"}),
        (({"mobile": NEWEST}, {"mobile": OLDER, "email": OLDER}), {"email"}),
        (({"mobile": OLDER, "email": NEWEST}, {"mobile": NEWEST}), {"mobile"}),
        (({}, {"mobile": OLDER}), {"mobile"}),
        (({"mobile": NEWEST}, {"email": OLDER}), {"email"}),
    ],
)
async def test_a_customer_of_several_stores_keeps_what_the_others_told(
    client: Client, service: Service, shop: Shop, told: tuple[dict[str, int], dict[str, int]], left: set[str]
) -> None:
    """The buyer of the erased store goes, and each contact that a webhook of it was the newest to tell.

    What is told are the times at which the erased store and the other one told each contact.
    """
    other = await another_store(client, shop)
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other)]
    await client.put_customer(
        shop.merchant_id, "alice", external_id="crm-1", card_numbers=["card-1"], language="en", buyers=buyers
    )
    for each, times in zip((shop, other), told, strict=True):
        for kind, moment in times.items():
            await tell(client, each, updated_at=at(moment), **{kind: mobile() if kind == "mobile" else email()})
    await client.apply(shop.update("buyer"))
    done = await erase(client, shop)
    alice = await client.customer(shop.merchant_id, "alice")

    assert (done.erased, done.remaining) == (1, 0)
    assert {kind for kind in ("mobile", "email") if getattr(alice, kind)} == left
    assert (alice.external_id, list(alice.card_numbers), alice.language) == ("crm-1", ["card-1"], "en")
    assert [buyer.store_id for buyer in alice.buyers] == [other.store_id]
    assert await found(client, shop) is None
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20
    assert ("REDACT", "alice", WHY) in await audit(service, shop)


async def test_what_no_webhook_told_stays_with_a_customer_of_several_stores(client: Client, shop: Shop) -> None:
    """The merchant's own system gave it, and no store's webhook."""
    other = await another_store(client, shop)
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other)]
    put = await client.put_customer(shop.merchant_id, "alice", mobile=mobile(), email=email(), buyers=buyers)
    await erase(client, shop)
    alice = await client.customer(shop.merchant_id, "alice")

    assert (alice.mobile, alice.email) == (put.mobile, put.email)


async def test_another_store_tells_an_erased_contact_again(client: Client, shop: Shop) -> None:
    """By its next webhook, as it is a contact of that store's too."""
    other, number = await another_store(client, shop), mobile()
    buyers = [identity_pb2.Buyer(store_id=each.store_id, buyer_id="buyer") for each in (shop, other)]
    await client.put_customer(shop.merchant_id, "alice", buyers=buyers)
    await tell(client, shop, mobile=number)
    await erase(client, shop)
    assert not (await client.customer(shop.merchant_id, "alice")).mobile

    assert await tell(client, other, mobile=number, updated_at=at(NOW_MS - 5_000)) == "APPLIED"
    assert (await client.customer(shop.merchant_id, "alice")).mobile == number


async def test_a_contact_that_another_store_claims_passes_to_its_customer(client: Client, shop: Shop) -> None:
    """Once the erased customer loses it; a claim by a webhook of the erased store goes with it."""
    other, number, address = await another_store(client, shop), mobile(), email()
    await tell(client, shop, "owner", mobile=number, email=address, updated_at=at(NOW_MS - 50_000))
    await tell(client, other, "heir", mobile=number, updated_at=at(NOW_MS - 40_000))
    await tell(client, shop, "claimant", email=address, updated_at=at(NOW_MS - 30_000))
    await erase(client, shop)
    heir, owner, claimant = [
        await found(client, each, buyer) for each, buyer in ((other, "heir"), (shop, "owner"), (shop, "claimant"))
    ]

    assert heir is not None
    assert owner is not None
    assert claimant is not None
    assert (heir.mobile, heir.email) == (number, "")
    assert (owner.mobile, owner.email, claimant.mobile, claimant.email) == ("", "", "", "")


@pytest.mark.parametrize("batch", [1, 2, 10])
async def test_no_claim_of_an_erased_store_brings_a_contact_back(
    client: Client, service: Service, shop: Shop, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """In whatever order and batches the customers are erased."""
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", batch)
    number = mobile()
    for buyer, moment in (("b", 50_000), ("c", 40_000), ("a", 30_000)):
        await tell(client, shop, buyer, mobile=number, updated_at=at(NOW_MS - moment))
    assert (await erase(client, shop)).remaining == 0
    async with superuser(service) as connection:
        for table in ("customer_claims", "customer_identifiers"):
            query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - a table of ours
            assert await connection.fetchval(query, shop.merchant_id) == 0


@pytest.mark.parametrize("buyer_id", ["buyer", "nobody-knew-this-buyer"])
async def test_late_webhooks_of_an_erased_store_are_ignored(client: Client, shop: Shop, buyer_id: str) -> None:
    """Those from before the erasure, whether their buyer was known or not; newer ones create a customer again."""
    await tell(client, shop, mobile=mobile())
    await erase(client, shop)

    assert await tell(client, shop, buyer_id, mobile=mobile(), updated_at=at(NOW_MS - 1)) == "REDACTED"
    assert await tell(client, shop, buyer_id, mobile=mobile(), updated_at=at(NOW_MS)) == "REDACTED"
    assert await tell(client, shop, buyer_id, mobile=mobile(), updated_at=at(NOW_MS + 1_000)) == "APPLIED"


@pytest.mark.parametrize("known", ["", "bare", "told"])
async def test_no_webhook_that_an_erasure_overtakes_is_left(
    client: Client, service: Service, shop: Shop, known: str
) -> None:
    """What a webhook is writing when the erasure begins is erased, of known buyers and of new ones."""
    if known:
        await tell(client, shop, mobile=mobile())
    if known == "bare":
        assert (await erase(client, shop)).remaining == 0
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
        told = asyncio.create_task(tell(client, shop, **late))
        await until_locks_are_awaited(service.database_url, 1)
        erasing = asyncio.create_task(erase(client, shop))
        await until_locks_are_awaited(service.database_url, 2)
        await blocking.rollback()

    assert (await told, (await erasing).remaining) == ("APPLIED", 0)
    async with superuser(service) as connection:
        for table in ("customer_identifiers", "customer_updates"):
            query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - a table of ours
            assert await connection.fetchval(query, shop.merchant_id) == 0
    assert await tell(client, shop, **late) == "REDACTED"


async def test_new_accounts_do_not_wait_for_an_erasure(client: Client, service: Service, shop: Shop) -> None:
    """Points webhooks go on while a store is being erased."""
    async with superuser(service) as connection, connection.transaction():
        await connection.execute("SELECT FROM stores WHERE store_id = $1 FOR NO KEY UPDATE", shop.store_id)
        await client.apply(shop.update("new"))

    assert (await client.account(shop.merchant_id, shop.store_id, "new")).points_balance == 20


async def test_an_update_of_the_future_does_not_come_back(client: Client, shop: Shop) -> None:
    """SHOPLINE's clock may be ahead of ours: what was told by then is erased, and its retry is ignored."""
    ahead: dict[str, Any] = {"event_id": unique("event"), "mobile": mobile(), "updated_at": at(NOW_MS + 60_000)}
    await tell(client, shop, **ahead)
    await erase(client, shop)

    assert await tell(client, shop, **ahead) == "REDACTED"
    customer = await found(client, shop)
    assert customer is not None
    assert not customer.mobile


async def test_an_erasure_is_repeated_without_effect(client: Client, service: Service, shop: Shop) -> None:
    """Neither the audit, nor the list, nor any customer changes; the request from before it is answered by it."""
    await tell(client, shop, mobile=mobile())
    await ask(client, shop, event_id="e-1")
    done = await erase(client, shop)
    customer, lines = await found(client, shop), await audit(service, shop)
    again = await erase(client, shop)
    replayed, older = await ask(client, shop, event_id="e-1"), await ask(client, shop)

    assert (done.erased, again.erased, again.remaining) == (1, 0, 0)
    assert again.erasure == done.erasure == replayed.erasure == older.erasure
    assert (outcome(replayed), outcome(older)) == ("ALREADY_ERASED", "ALREADY_ERASED")
    assert await listed(client, shop.merchant_id) == [done.erasure]
    assert (await found(client, shop), await audit(service, shop)) == (customer, lines)


async def test_a_store_is_erased_without_a_request_and_again_after_new_data(
    client: Client, service: Service, shop: Shop
) -> None:
    """Each erasure of an operator is listed, also of a store without any customer."""
    empty = await erase(client, shop)
    await tell(client, shop, mobile=mobile(), updated_at=at(NOW_MS + 1_000))
    second = await erase(client, shop)
    later = await ask(client, shop, request_time=at(NOW_MS + 1))

    assert [(part.erased, part.remaining) for part in (empty, second)] == [(0, 0), (1, 0)]
    assert outcome(later) == "REQUESTED"
    assert [erasure.HasField("close_time") for erasure in await listed(client, shop.merchant_id)] == [False, True, True]
    assert [action for action, _, _ in await audit(service, shop)] == ["ERASE_STORE", "ERASE_STORE", "REDACT"]


async def test_a_large_store_is_erased_part_by_part(
    client: Client, service: Service, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call does a bounded part and says what remains; another server goes on where one ended."""
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", 2)
    monkeypatch.setattr(erasures_module, "BATCHES_MAX", 2)
    for number in range(9):
        await tell(client, shop, f"b-{number}", mobile=mobile())
    await tell(client, await another_store(client, shop), "elsewhere", mobile=mobile())
    await ask(client, shop)
    first = await erase(client, shop)
    [half] = await listed(client, shop.merchant_id)
    async with another_server(service, admin_token) as (_, other):
        second = await erase(other, shop)
    third = await erase(client, shop)

    assert [(part.erased, part.remaining) for part in (first, second, third)] == [(4, 5), (4, 1), (1, 0)]
    assert half.begin_time == at(NOW_MS)
    assert not half.HasField("close_time")
    assert len([line for line in await audit(service, shop) if line[0] == "REDACT"]) == 9
    async with superuser(service) as connection:
        left = await connection.fetch("SELECT kind FROM customer_identifiers WHERE merchant_id = $1", shop.merchant_id)
    assert [row["kind"] for row in left] == ["MOBILE"]


async def test_parallel_erasures_and_webhooks_erase_each_customer_once(
    client: Client, service: Service, admin_token: str, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operators at two servers, while webhooks still come, some of them late."""
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", 3)
    for number in range(20):
        await tell(client, shop, f"b-{number:02}", mobile=mobile())
    await ask(client, shop)
    async with another_server(service, admin_token) as (_, other):
        await asyncio.gather(
            *(erase(each, shop) for each in (client, other) for _ in range(3)),
            *(tell(client, shop, f"b-{number:02}", mobile=mobile()) for number in range(20)),
        )

    assert (await erase(client, shop)).remaining == 0
    assert len([line for line in await audit(service, shop) if line[0] == "REDACT"]) == 20
    async with superuser(service) as connection:
        query = "SELECT count(*) FROM customer_identifiers WHERE merchant_id = $1"
        assert await connection.fetchval(query, shop.merchant_id) == 0


async def test_quarantined_bodies_of_the_store_are_erased(client: Client, service: Service, shop: Shop) -> None:
    """Those of its buyers, and customers' webhooks that name the store; points and other stores' bodies stay."""
    other = await another_store(client, shop)
    await tell(client, shop, "17", mobile=mobile())
    gone = [
        await quarantine(client, other, b'{"id": "17", "phone": "1"}'),
        await quarantine(client, shop, b'{"id": "unknown", "phone": "1"}'),
        await quarantine(client, shop, b"no JSON of a customer", "customers/create"),
        await quarantine(client, shop, b'{"id": 18, "phone": "1"}', "app_memberSystem_points/challenged"),
        await quarantine(
            client, other, f'{{"customer": {{"id": "19"}}, "shop_id": "{shop.store_id}"}}'.encode(), "customers/redact"
        ),
        await quarantine(client, shop, b'{"id": "21", "phone": "1"}', ""),
        await quarantine(client, shop, b"no JSON of no topic", ""),
        await quarantine(client, shop, '{"id": "\u00e9", "email": "a@example.com"}'.encode(), ""),
    ]
    kept = [
        await quarantine(client, other, b'{"id": "20", "phone": "1"}'),
        await quarantine(client, other, b"no JSON of another customer"),
        await quarantine(
            client, shop, b'{"buyer_id": "17", "updated_value": "x"}', "app_memberSystem_points/challenged"
        ),
        await quarantine(client, shop, b"no JSON of points", "app_memberSystem_points/challenged"),
        await quarantine(client, shop, f'{{"store_id": "{shop.store_id}", "buyer_id": "17"}}'.encode(), ""),
        await quarantine(client, other, b"no JSON of no topic of another store", ""),
    ]
    assert (await erase(client, shop)).remaining == 0

    assert [await is_erased(client, shop, quarantine_id) for quarantine_id in gone] == [True] * len(gone)
    assert [await is_erased(client, shop, quarantine_id) for quarantine_id in kept] == [False] * len(kept)
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
    """What the erased buyers were told since is covered by it; an older request changes nothing."""
    monkeypatch.setattr(erasures_module, "BATCH_BUYERS", 2)
    monkeypatch.setattr(erasures_module, "BATCHES_MAX", 1)
    for number in range(3):
        await tell(client, shop, f"b-{number}", mobile=mobile())
    await ask(client, shop)
    assert (await erase(client, shop)).remaining == 1
    assert await tell(client, shop, "b-0", mobile=mobile(), updated_at=at(NOW_MS + 1_000)) == "APPLIED"
    older, newer = await ask(client, shop), await ask(client, shop, request_time=at(NOW_MS + 2_000))
    while (await erase(client, shop)).remaining:
        pass

    assert (outcome(older), outcome(newer)) == ("ALREADY_REQUESTED", "ALREADY_REQUESTED")
    customers = [await found(client, shop, f"b-{number}") for number in range(3)]
    assert [customer and customer.mobile for customer in customers] == ["", "", ""]
    assert len(await listed(client, shop.merchant_id)) == 1


async def test_many_quarantined_bodies_are_erased_part_by_part(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They count as remaining like buyers."""
    monkeypatch.setattr(erasures_module, "BATCH_WEBHOOKS", 2)
    monkeypatch.setattr(erasures_module, "BATCHES_MAX", 1)
    for number in range(5):
        await quarantine(client, shop, b'{"id": "x", "n": %d}' % number)

    assert [(await erase(client, shop)).remaining for _ in range(4)] == [3, 1, 0, 0]


async def test_without_a_code_key_nothing_is_erased(service: Service, admin_token: str, shop: Shop) -> None:
    """Late webhooks could bring everything back; the request is kept all the same."""
    async with another_server(service, admin_token, code_keys={}) as (_, client):
        assert (await refused(erase(client, shop))).reason == "KEY_NOT_CONFIGURED"
        await tell(client, shop, mobile=mobile())
        assert outcome(await ask(client, shop)) == "REQUESTED"
        error = await refused(erase(client, shop))

    assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NOT_CONFIGURED")
    customer = await found(service.client, shop)
    assert customer is not None
    assert customer.mobile
    assert not (await listed(service.client, shop.merchant_id))[0].HasField("begin_time")


async def test_an_erasure_ends_open_codes(client: Client, service: Service, shop: Shop) -> None:
    """They went to a contact that is no more."""
    await client.put_program(shop.merchant_id, shop.store_id, criteria={}, validation=CODE_SETTINGS)
    await earn(client, shop, 500)
    await tell(client, shop, mobile=mobile())
    challenge_id, code = await issue_and_read_code(service, shop)
    await erase(client, shop)

    assert not await guess_code(client, shop, code, challenge_id=challenge_id)


async def test_the_list_has_the_open_ones_first(client: Client, shop: Shop) -> None:
    """Of these those that are due soonest, then the latest closed ones, through all pages; of all merchants, too."""
    stores = [shop, *[await another_store(client, shop) for _ in range(4)]]
    for number, each in enumerate(stores):
        await ask(client, each, request_time=at(REQUEST_MS - number * 1_000))
    await erase(client, stores[0])
    await erase(client, stores[2])
    of_merchant = [erasure.store_id for erasure in await listed(client, shop.merchant_id, page_size=2)]
    of_all = await listed(client, "", page_size=3)

    assert of_merchant[:3] == [stores[number].store_id for number in (4, 3, 1)]
    assert set(of_merchant[3:]) == {stores[0].store_id, stores[2].store_id}
    assert {erasure.store_id for erasure in of_all} > {each.store_id for each in stores}
    assert [erasure.HasField("close_time") for erasure in of_all] == sorted(
        erasure.HasField("close_time") for erasure in of_all
    )


async def test_scopes(service: Service, shop: Shop) -> None:
    """Webhooks request, stores list and admin erases; a list of all merchants takes a token for all."""
    calls: dict[Scope, Any] = {
        Scope.WEBHOOKS: ask,
        Scope.STORES: lambda client, shop: listed(client, shop.merchant_id),
        Scope.ADMIN: erase,
    }
    for scope in calls:
        own = Client(service.server.port, await make_token(service.database_url, [shop.merchant_id], [scope]))
        for needed, call in calls.items():
            if needed is scope:
                await call(own, shop)
            else:
                assert (await refused(call(own, shop))).reason == "SCOPE_MISSING"
        if scope is Scope.STORES:
            assert (await refused(listed(own, ""))).reason == "MERCHANT_FORBIDDEN"
        await own.close()


async def test_metrics_and_the_log_show_what_is_open_and_overdue(
    service: Service, admin_token: str, shop: Shop
) -> None:
    """At the start of a server, with every request and erasure, and by maintenance; overdue ones are errors."""
    await erase_all_open(service.client)
    await ask(service.client, shop)
    clock = TestClock()
    async with another_server(service, admin_token, clock) as (server, client):
        await until(lambda: gauges(server) == {"open": 1, "overdue": 0})
        other = await another_store(client, shop)
        await ask(client, other)
        assert gauges(server) == {"open": 2, "overdue": 0}
        clock.move(28 * DAY_MS / 1_000)
        with json_logs(erasures_module) as written:
            await server._maintenance.run_jobs()
        assert gauges(server) == {"open": 2, "overdue": 2}
        assert '"level": "error"' in written.getvalue()
        assert '"count": 2' in written.getvalue()
        await erase(client, shop)
        await erase(client, other)
        assert gauges(server) == {"open": 0, "overdue": 0}


async def erase_all_open(client: Client) -> None:
    """Erase every store whose erasure other tests of this file have left open."""
    for erasure in await listed(client, ""):
        if not erasure.HasField("close_time"):
            await erase(client, Shop(erasure.merchant_id, erasure.store_id))


async def test_nothing_of_a_person_is_logged(client: Client, shop: Shop) -> None:
    """Only the store, the reason and how many there were."""
    number = mobile()
    await tell(client, shop, "private-buyer", mobile=number)
    with json_logs(erasures_module, servicer_module) as written:
        await ask(client, shop)
        await erase(client, shop)

    assert written.getvalue().count("audit: store era") == 2
    assert "private-buyer" not in written.getvalue()
    assert number[1:] not in written.getvalue()

"""The quarantine as its callers see it: kept whole, kept once, bounded, replayed once, and silent about content."""

import asyncio
import base64
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import grpc
import pytest
import structlog
from pydantic import SecretStr

from pointbook.v1 import customers_pb2, points_pb2, webhooks_pb2
from pointbook_server.access.model import Scope
from pointbook_server.errors import PointbookError, Reason
from pointbook_server.ledger.servicer import PointsServicer
from pointbook_server.server import Server
from support.harness import (
    NOW_MS,
    QUARANTINE_KEY,
    Client,
    Refusal,
    Service,
    Shop,
    TestClock,
    at,
    make_token,
    refused,
    server_settings,
    unique,
)

POINTS = "app_memberSystem_points/challenged"
CUSTOMERS = "customers/update"
MALFORMED = webhooks_pb2.QUARANTINE_REASON_MALFORMED
TOPIC_MISSING = webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING
STORE_UNKNOWN = webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN
REPLAYED = webhooks_pb2.QUARANTINE_STATE_REPLAYED
OTHER_KEY = base64.b64encode(b"r" * 32).decode()


def person() -> bytes:
    """Write the body of a customer webhook that no other test uses."""
    return json.dumps({"id": unique("2404721679"), "email": "ada@example.com", "phone": "+8613800000000"}).encode()


def owned(shop: Shop, note: object, size: int = 0) -> bytes:
    """Write a body that no topic prescribes, and that names the store of a shop."""
    return json.dumps({"store_id": shop.store_id, "note": str(note).ljust(size, "x")}).encode()


@pytest.fixture
def merchant() -> str:
    """A merchant's id, for one test alone."""
    return unique("merchant")


def webhook(merchant_id: str, **changes: Any) -> webhooks_pb2.QuarantineWebhookRequest:
    """Make a points webhook that could not be read."""
    values: dict[str, Any] = {
        "merchant_id": merchant_id,
        "topic": POINTS,
        "headers": [
            webhooks_pb2.WebhookHeader(name="X-Shopline-Topic", value=POINTS),
            webhooks_pb2.WebhookHeader(name="X-Shopline-Webhook-Id", value="w-1"),
        ],
        "body": b"no JSON at all of " + merchant_id.encode(),
        "reason": MALFORMED,
        "detail": "body must be JSON in UTF-8",
    }
    return webhooks_pb2.QuarantineWebhookRequest(**(values | changes))


async def keep(client: Client, merchant_id: str, **changes: Any) -> str:
    """Quarantine a webhook, and answer its id."""
    return (await client.webhooks.QuarantineWebhook(webhook(merchant_id, **changes))).quarantine_id


async def get(client: Client, merchant_id: str, quarantine_id: str) -> webhooks_pb2.QuarantinedWebhook:
    """Read a webhook, whole."""
    request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=merchant_id, quarantine_id=quarantine_id)
    return (await client.webhooks.GetQuarantinedWebhook(request)).webhook


async def pages(client: Client, merchant_id: str, **changes: Any) -> list[webhooks_pb2.QuarantinedWebhook]:
    """Read all pages of a list."""
    found: list[webhooks_pb2.QuarantinedWebhook] = []
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant_id, **changes)
    while True:
        page = await client.webhooks.ListQuarantinedWebhooks(request)
        found.extend(page.webhooks)
        if not page.next_page_token:
            return found
        request.page_token = page.next_page_token


def replay(client: Client, merchant_id: str, quarantine_id: str, update: points_pb2.PointsUpdate) -> Any:
    """Replay a webhook as an update."""
    return client.webhooks.ReplayQuarantinedWebhook(
        webhooks_pb2.ReplayQuarantinedWebhookRequest(
            merchant_id=merchant_id, quarantine_id=quarantine_id, points_update=update
        )
    )


async def drop(client: Client, merchant_id: str, quarantine_id: str, reason: str = "a test") -> None:
    """Drop a webhook."""
    request = webhooks_pb2.DropQuarantinedWebhookRequest(
        merchant_id=merchant_id, quarantine_id=quarantine_id, reason=reason
    )
    await client.webhooks.DropQuarantinedWebhook(request)


@asynccontextmanager
async def another_server(service: Service, token: str, **changes: Any) -> AsyncIterator[Client]:
    """Run one more server on the same database, with other settings."""
    server = Server(server_settings(**changes), service.database_url, senders={}, clock=TestClock())
    await server.start()
    client = Client(server.port, token)
    try:
        yield client
    finally:
        await client.close()
        await server.stop()


async def row(service: Service, merchant_id: str) -> Any:
    """Read a merchant's one row as it stands in the table."""
    connection = await asyncpg.connect(service.database_url)
    try:
        [found] = await connection.fetch(
            "SELECT * FROM quarantined_webhooks WHERE coalesce(claimed_merchant_id, merchant_id) = $1", merchant_id
        )
        return found
    finally:
        await connection.close()


async def usage(service: Service, merchant_id: str) -> tuple[int, int]:
    """Read what a merchant's quarantine is said to hold, and check that it is what it holds."""
    connection = await asyncpg.connect(service.database_url)
    try:
        said = await connection.fetchrow(
            "SELECT webhooks, bytes FROM quarantine_usage WHERE merchant_id = $1", merchant_id
        )
        held = await connection.fetchrow(
            "SELECT count(*), coalesce(sum(octet_length(headers) + octet_length(body)), 0)::bigint"
            " FROM quarantined_webhooks WHERE merchant_id = $1",
            merchant_id,
        )
    finally:
        await connection.close()
    assert tuple(said) == tuple(held)
    return tuple(said)


async def test_a_webhook_is_kept_with_shoplines_own_headers(client: Client, merchant: str) -> None:
    """In their order, the first of each name, with the raw body, and why it could not be applied."""
    latin_1 = bytes(range(1, 256)).decode("latin-1")
    kept_headers = [
        webhooks_pb2.WebhookHeader(name=name, value=value)
        for name, value in [("x-shopline-shop-domain", latin_1), ("X-Shopline-Topic", POINTS)]
    ]
    names = ("Authorization", "COOKIE", "X-Shopline-Hmac-Sha256", "X-Forwarded-For", "x-shopline-topic")
    others = [webhooks_pb2.WebhookHeader(name=name, value="open sesame") for name in names]
    long = webhooks_pb2.WebhookHeader(name="X-Shopline-Webhook-Id", value="w" * 256)
    body = secrets.token_bytes(256 * 1024)
    received = at(NOW_MS - 5_000)

    headers = [*kept_headers, long, *others]
    quarantine_id = await keep(client, merchant, headers=headers, body=body, receive_time=received)
    kept = await get(client, merchant, quarantine_id)

    assert kept == webhooks_pb2.QuarantinedWebhook(
        merchant_id=merchant,
        quarantine_id=quarantine_id,
        reason=MALFORMED,
        detail="body must be JSON in UTF-8",
        topic=POINTS,
        headers=kept_headers,
        body=body,
        body_size=len(body),
        state=webhooks_pb2.QUARANTINE_STATE_QUARANTINED,
        receive_time=received,
        last_receive_time=received,
        receive_count=1,
    )


async def test_a_repetition_is_counted_once_a_minute(client: Client, service: Service, merchant: str) -> None:
    """Counting costs a write: in between, and for what came before, the row stays as it is."""
    seconds = (600, 541, 540, 500, 300, 301)
    answers = [
        await client.webhooks.QuarantineWebhook(webhook(merchant, receive_time=at(NOW_MS - ago * 1_000)))
        for ago in seconds[:2]
    ]
    before = await row(service, merchant)
    answers.append(await client.webhooks.QuarantineWebhook(webhook(merchant, receive_time=at(NOW_MS - 542_000))))
    assert await row(service, merchant) == before
    answers += [
        await client.webhooks.QuarantineWebhook(webhook(merchant, receive_time=at(NOW_MS - ago * 1_000)))
        for ago in seconds[2:]
    ]
    kept = await get(client, merchant, answers[0].quarantine_id)

    assert [answer.already_quarantined for answer in answers] == [False] + [True] * 6
    assert len({answer.quarantine_id for answer in answers}) == 1
    assert kept.receive_count == 3
    assert (kept.receive_time, kept.last_receive_time) == (at(NOW_MS - 600_000), at(NOW_MS - 300_000))


async def test_a_body_is_one_row_whatever_its_headers(
    client: Client, service: Service, shop: Shop, merchant: str
) -> None:
    """Neither merchants, nor topics, reasons or other headers multiply it: one beside the one of its owner."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for body in (owned(shop, "x"), person(), b"noise " + merchant.encode()):
        calls = [
            webhook(
                named,
                body=body,
                topic=topic,
                reason=reason,
                headers=[webhooks_pb2.WebhookHeader(name="X-Shopline-Webhook-Id", value=unique("w"))],
            )
            for named in (shop.merchant_id, other.merchant_id, "", merchant, *(unique("merchant") for _ in range(5)))
            for topic in (POINTS, CUSTOMERS)
            for reason in (MALFORMED, STORE_UNKNOWN)
        ]
        answers = await asyncio.gather(*map(client.webhooks.QuarantineWebhook, calls))
        assert len({answer.quarantine_id for answer in answers}) == (2 if b"store_id" in body else 1)
        assert sum(not answer.already_quarantined for answer in answers) == (2 if b"store_id" in body else 1)

    [mine] = [kept for kept in await pages(client, shop.merchant_id) if kept.body_size == len(owned(shop, "x"))]
    assert mine.topic == ""
    assert (await usage(service, shop.merchant_id))[0] == 1


async def test_copies_change_nothing_once_they_were_noted(client: Client, service: Service, merchant: str) -> None:
    """What a stranger sends again and again writes nothing: no row, no new version of one."""
    for _ in range(2):
        for named, topic in ((merchant, POINTS), (unique("merchant"), CUSTOMERS)):
            body = b"one of " + merchant.encode()
            await client.webhooks.QuarantineWebhook(webhook(named, topic=topic, body=body))
    connection = await asyncpg.connect(service.database_url)
    query = "SELECT ctid::text, xmin::text FROM quarantined_webhooks WHERE claimed_merchant_id = $1"
    try:
        before = await connection.fetch(query, merchant)
        for number in range(30):
            await client.webhooks.QuarantineWebhook(webhook(unique("m"), topic=f"t/{number}", body=body))
        assert await connection.fetch(query, merchant) == before
    finally:
        await connection.close()


async def test_a_merchant_finds_what_first_named_it(client: Client, service: Service, merchant: str) -> None:
    """In the shared quarantine, also after it has a store; nobody else does but who is for all merchants."""
    thief = unique("merchant")
    body = b"shared " + merchant.encode()
    quarantine_id = await keep(client, merchant, body=body)
    assert await keep(client, thief, body=body) == quarantine_id
    await client.put_store(merchant, unique("store"))
    limited = Client(service.server.port, await make_token(service.database_url, [thief], list(Scope)))

    assert [kept.quarantine_id for kept in await pages(client, merchant)] == [quarantine_id]
    assert quarantine_id in {kept.quarantine_id for kept in await pages(client, "")}
    assert (await get(client, merchant, quarantine_id)).merchant_id == merchant
    assert (await get(client, "", quarantine_id)).body == body
    assert await pages(limited, thief) == []
    for call in (get(limited, thief, quarantine_id), drop(limited, thief, quarantine_id)):
        assert (await refused(call)).reason == "WEBHOOK_NOT_FOUND"
    await limited.close()
    await drop(client, merchant, quarantine_id)
    assert await pages(client, merchant) == []


async def test_a_webhook_that_named_two_merchants_is_found_by_operators(
    client: Client, service: Service, merchant: str
) -> None:
    """The first copy may be forged: who is for its merchant alone neither reads, replays nor drops the only copy."""
    thief = Shop(unique("merchant"), unique("store"))
    await client.put_store(thief.merchant_id, thief.store_id)
    limited = Client(service.server.port, await make_token(service.database_url, [thief.merchant_id], list(Scope)))
    quarantine_id = await keep(client, thief.merchant_id, body=b"shared " + merchant.encode())
    assert [kept.quarantine_id for kept in await pages(limited, thief.merchant_id)] == [quarantine_id]
    await keep(client, merchant, body=b"shared " + merchant.encode())

    assert await pages(limited, thief.merchant_id) == []
    for call in (
        get(limited, thief.merchant_id, quarantine_id),
        replay(limited, thief.merchant_id, quarantine_id, thief.update()),
        drop(limited, thief.merchant_id, quarantine_id),
    ):
        assert (await refused(call)).reason == "WEBHOOK_NOT_FOUND"
    await limited.close()
    assert (await get(client, thief.merchant_id, quarantine_id)).body == b"shared " + merchant.encode()
    await drop(client, thief.merchant_id, quarantine_id)


async def test_a_token_for_some_merchants_shares_nothing(
    service: Service, client: Client, admin_token: str, merchant: str
) -> None:
    """It neither learns that another merchant's webhook is there, nor casts doubt on it, nor fills the shared space."""
    thief, body = unique("merchant"), person()
    tokens = {named: await make_token(service.database_url, [named], list(Scope)) for named in (merchant, thief)}
    mine = await keep(client, merchant, body=body, topic=CUSTOMERS)
    full = await free_space(service, "")
    async with another_server(service, admin_token, quarantine_shared_webhooks_max=full) as shim:
        assert (await refused(shim.webhooks.QuarantineWebhook(webhook(merchant)))).reason == "QUEUE_FULL"
    async with another_server(service, tokens[thief], quarantine_shared_webhooks_max=full) as limited:
        answers = [await limited.webhooks.QuarantineWebhook(webhook(thief, body=body)) for _ in range(2)]
    assert [answer.already_quarantined for answer in answers] == [False, True]
    assert mine not in {answer.quarantine_id for answer in answers}
    owner = Client(service.server.port, tokens[merchant])
    kept = await get(owner, merchant, mine)
    assert (kept.body, kept.topic, kept.receive_count) == (body, CUSTOMERS, 1)
    await owner.close()


async def test_webhooks_of_an_earlier_release_stay_usable(client: Client, service: Service, shop: Shop) -> None:
    """They are in the quarantine of the merchant that they name, counted and replayed there."""
    quarantine_id = await keep(client, shop.merchant_id, body=owned(shop, "old"))
    connection = await asyncpg.connect(service.database_url)
    await connection.execute(
        "UPDATE quarantined_webhooks SET claimed_merchant_id = NULL, signed_store_digest = NULL WHERE merchant_id = $1",
        shop.merchant_id,
    )
    await connection.close()

    again = await client.webhooks.QuarantineWebhook(webhook(shop.merchant_id, body=owned(shop, "old")))
    assert (again.quarantine_id, again.already_quarantined) == (quarantine_id, True)
    assert [kept.quarantine_id for kept in await pages(client, shop.merchant_id)] == [quarantine_id]
    answer = await replay(client, shop.merchant_id, quarantine_id, shop.update())
    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    await drop(client, shop.merchant_id, quarantine_id)


@pytest.mark.parametrize("topic", [POINTS, CUSTOMERS])
async def test_parallel_repetitions_are_kept_once(service: Service, admin_token: str, shop: Shop, topic: str) -> None:
    """Many callers of two servers at once keep one webhook, in the merchant's own quarantine and in the shared one."""
    async with another_server(service, admin_token) as other:
        for body in (owned(shop, topic), b"no JSON of " + shop.store_id.encode() + topic.encode()):
            answers = await asyncio.gather(
                *(
                    client.webhooks.QuarantineWebhook(webhook(shop.merchant_id, topic=topic, body=body))
                    for _ in range(25)
                    for client in (service.client, other)
                )
            )
            assert len({answer.quarantine_id for answer in answers}) == 1
            assert sum(not answer.already_quarantined for answer in answers) == 1
    assert (await usage(service, shop.merchant_id))[0] == 1
    await usage(service, "")


async def test_a_full_quarantine_refuses(service: Service, admin_token: str, shop: Shop) -> None:
    """The bound on the number holds under parallel calls; a repetition is still taken, and a drop makes space."""
    merchant = shop.merchant_id
    async with another_server(service, admin_token, quarantine_webhooks_max=5) as client:
        with structlog.testing.capture_logs() as logs:
            answers = await asyncio.gather(
                *(client.webhooks.QuarantineWebhook(webhook(merchant, body=owned(shop, n))) for n in range(20)),
                return_exceptions=True,
            )
            kept = [answer.quarantine_id for answer in answers if not isinstance(answer, BaseException)]
            found = await refused(client.webhooks.QuarantineWebhook(webhook(merchant, body=owned(shop, "one more"))))

        assert len(kept) == 5
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert found.retry_seconds
        [entry] = [entry for entry in logs if entry["log_level"] == "error"]
        assert (entry["event"], entry["merchant_id"]) == ("the quarantine is full", merchant)
        body = (await get(client, merchant, kept[0])).body
        again = await client.webhooks.QuarantineWebhook(webhook(merchant, body=body))
        assert again.already_quarantined

        await drop(client, merchant, kept[0])
        await keep(client, merchant, body=owned(shop, "one more"))
        assert (await usage(service, merchant))[0] == 5


async def test_bytes_are_bounded_too(service: Service, admin_token: str, shop: Shop) -> None:
    """A few large webhooks fill the quarantine as many small ones do; other merchants have their own."""
    merchant, other = shop.merchant_id, Shop(unique("merchant"), unique("store"))
    await service.client.put_store(other.merchant_id, other.store_id)
    async with another_server(service, admin_token, quarantine_bytes_max=100_000) as client:
        first = await keep(client, merchant, body=owned(shop, "a", 60_000))
        found = await refused(client.webhooks.QuarantineWebhook(webhook(merchant, body=owned(shop, "b", 60_000))))
        await keep(client, other.merchant_id, body=owned(other, "b", 60_000))
        await keep(client, merchant, body=owned(shop, "small"))
        await drop(client, merchant, first)
        await keep(client, merchant, body=owned(shop, "b", 60_000))

    assert found.reason == "QUEUE_FULL"
    assert (await usage(service, merchant))[0] == 2


async def free_space(service: Service, merchant_id: str | None = None) -> int:
    """Return how many webhooks a quarantine holds, or all of them together."""
    connection = await asyncpg.connect(service.database_url)
    query = "SELECT coalesce(sum(webhooks), 0)::int FROM quarantine_usage WHERE $1::text IS NULL OR merchant_id = $1"
    try:
        return int(await connection.fetchval(query, merchant_id))
    finally:
        await connection.close()


async def test_invented_merchants_fill_half_of_the_shared_quarantine(
    service: Service, admin_token: str, shop: Shop
) -> None:
    """The rest is for merchants that have a store."""
    most = 2 * (await free_space(service, "") + 3)
    async with another_server(service, admin_token, quarantine_shared_webhooks_max=most) as client:
        bodies = [f"{n} of {shop.store_id}".encode() for n in range(10)]
        answers = await asyncio.gather(
            *(client.webhooks.QuarantineWebhook(webhook(unique("m"), body=body)) for body in bodies),
            return_exceptions=True,
        )
        assert sum(not isinstance(answer, BaseException) for answer in answers) == 3
        await keep(client, shop.merchant_id, body=b"mine " + shop.store_id.encode())


@pytest.mark.parametrize("bound", ["webhooks", "bytes"])
async def test_all_quarantines_together_are_bounded(service: Service, admin_token: str, shop: Shop, bound: str) -> None:
    """Whatever merchants there are; what is full for one is full for all, and a drop makes space at once."""
    other = Shop(unique("merchant"), unique("store"))
    await service.client.put_store(other.merchant_id, other.store_id)
    held = await free_space(service)
    settings = {"quarantine_total_webhooks_max": held + 4} if bound == "webhooks" else {}
    if bound == "bytes":
        connection = await asyncpg.connect(service.database_url)
        used = await connection.fetchval("SELECT coalesce(sum(bytes), 0)::int FROM quarantine_usage")
        await connection.close()
        settings = {"quarantine_total_bytes_max": used + 4 * 10_500}
    async with another_server(service, admin_token, **settings) as client:
        calls = [
            webhook(each.merchant_id, body=owned(each, f"{bound} {n}", 10_000))
            for n in range(8)
            for each in (shop, other)
        ]
        answers = await asyncio.gather(*map(client.webhooks.QuarantineWebhook, calls), return_exceptions=True)
        kept = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(kept) == 4
        assert await free_space(service) == held + 4
        [mine, *_] = [*await pages(client, shop.merchant_id), *await pages(client, other.merchant_id)]
        assert (await refused(client.webhooks.QuarantineWebhook(webhook(unique("m"), body=b"m" * 9_000)))).reason == (
            "QUEUE_FULL"
        )
        await drop(client, mine.merchant_id, mine.quarantine_id)
        await keep(client, shop.merchant_id, body=owned(shop, f"{bound} again", 9_000))


async def test_the_last_space_taken_by_the_same_webhook(service: Service, admin_token: str, shop: Shop) -> None:
    """Of parallel copies one takes the last space, and the others are its repetitions: none is refused."""
    async with another_server(service, admin_token, quarantine_webhooks_max=1) as client:
        answers = await asyncio.gather(*(keep(client, shop.merchant_id, body=owned(shop, "last")) for _ in range(20)))

    assert len(set(answers)) == 1


async def test_customer_webhooks_are_kept_encrypted(service: Service, merchant: str) -> None:
    """Neither body nor headers nor a plain digest of them stand in the table, yet the caller reads them."""
    body = person()
    headers = [webhooks_pb2.WebhookHeader(name="X-Shopline-Shop-Domain", value="ada.example.com")]
    quarantine_id = await keep(service.client, merchant, topic=CUSTOMERS, body=body, headers=headers)
    kept = await get(service.client, merchant, quarantine_id)
    found = await row(service, merchant)

    assert (kept.body, list(kept.headers)) == (body, headers)
    dump = b"".join(value if isinstance(value, bytes) else str(value).encode() for value in found.values())
    for secret in (b"ada.example.com", b"ada@example.com", b"2404721679", b"13800000000", b"Shop-Domain"):
        assert secret not in dump
    connection = await asyncpg.connect(service.database_url)
    plain = await connection.fetchval("SELECT sha256($1)", body)
    await connection.close()
    assert found["body_digest"] != plain


async def test_a_ciphertext_opens_at_its_own_place_only(service: Service, merchant: str) -> None:
    """Whoever can write the table cannot have one customer's body shown as another's."""
    body = person()
    first = await keep(service.client, merchant, topic=CUSTOMERS, body=body)
    second = await keep(service.client, merchant, topic=CUSTOMERS, body=body.swapcase())
    connection = await asyncpg.connect(service.database_url)
    await connection.execute(
        "UPDATE quarantined_webhooks SET body = (SELECT body FROM quarantined_webhooks WHERE quarantine_id = $1)"
        " WHERE quarantine_id = $2",
        first,
        second,
    )
    await connection.close()
    request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=merchant, quarantine_id=second)

    assert (await refused(service.client.webhooks.GetQuarantinedWebhook(request))).reason == "INTERNAL"


async def test_keys_rotate(service: Service, admin_token: str, merchant: str) -> None:
    """After a rotation the old key still reads, and a body that it knows is counted, not kept again."""
    body, fresh_body = person(), person()
    first = await keep(service.client, merchant, topic=CUSTOMERS, body=body)
    keys = {"q2": SecretStr(OTHER_KEY), "q1": SecretStr(QUARANTINE_KEY)}
    async with another_server(service, admin_token, quarantine_keys=keys) as client:
        again = await client.webhooks.QuarantineWebhook(webhook(merchant, topic=CUSTOMERS, body=body))
        other = unique("merchant")
        fresh = await keep(client, other, topic=CUSTOMERS, body=fresh_body)

        assert (again.quarantine_id, again.already_quarantined) == (first, True)
        assert (await get(client, merchant, first)).body == body
        assert (await row(service, other))["key_id"] == "q2"
        request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=other, quarantine_id=fresh)
        found = await refused(service.client.webhooks.GetQuarantinedWebhook(request))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "CODE_KEY_UNKNOWN")
        assert found.metadata == {"key_id": "q2"}


async def test_without_a_key_no_customer_webhook_is_kept(service: Service, admin_token: str, merchant: str) -> None:
    """Rather than in clear; points webhooks need no key."""
    async with another_server(service, admin_token, quarantine_keys={}) as client:
        found = await refused(client.webhooks.QuarantineWebhook(webhook(merchant, topic="Customers/create")))
        topicless = webhook(merchant, topic="", reason=TOPIC_MISSING)
        assert (await refused(client.webhooks.QuarantineWebhook(topicless))).reason == "KEY_NOT_CONFIGURED"
        await keep(client, merchant)

        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NOT_CONFIGURED")
        assert "POINTBOOK_QUARANTINE_KEYS" in found.message
        assert [kept.topic for kept in await pages(client, merchant)] == [POINTS]


async def test_lists_are_oldest_first_without_content(client: Client, merchant: str) -> None:
    """Pages go on where the last one ended while webhooks arrive and are dropped, and hold no headers or bodies."""
    ids = [
        await keep(
            client, merchant, body=b"%d of %s" % (n, merchant.encode()), receive_time=at(NOW_MS - 1_000 + n // 2)
        )
        for n in range(7)
    ]
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant, page_size=3)
    first = await client.webhooks.ListQuarantinedWebhooks(request)
    newest = await keep(client, merchant, body=b"newest", receive_time=at(NOW_MS))
    await drop(client, merchant, first.webhooks[-1].quarantine_id)
    request.page_token = first.next_page_token
    rest = [
        *(second := await client.webhooks.ListQuarantinedWebhooks(request)).webhooks,
        *(await pages(client, merchant, page_size=3, page_token=second.next_page_token)),
    ]
    found = [*first.webhooks, *rest]

    assert sorted(kept.quarantine_id for kept in found) == sorted([*ids, newest])
    times = [(kept.receive_time.ToMilliseconds(), kept.quarantine_id) for kept in found]
    assert times == sorted(times)
    assert not any(kept.headers or kept.body for kept in found)
    assert found[0].body_size == len(f"0 of {merchant}")


async def test_lists_are_filtered(client: Client, shop: Shop) -> None:
    """By state, reason, topic and time, all of which must hold."""
    merchant = shop.merchant_id
    old = await keep(client, merchant, body=b"old", receive_time=at(NOW_MS - 10_000))
    new = await keep(client, merchant, body=b"new", receive_time=at(NOW_MS - 1_000), reason=STORE_UNKNOWN)
    customer = await keep(client, merchant, body=person(), topic=CUSTOMERS, receive_time=at(NOW_MS))
    done = await keep(client, merchant, body=b"done")
    await replay(client, merchant, done, shop.update())

    async def listed(**filters: Any) -> list[str]:
        return [kept.quarantine_id for kept in await pages(client, merchant, **filters)]

    assert await listed() == [old, new, customer]
    assert await listed(state=REPLAYED) == [done]
    assert await listed(reason=STORE_UNKNOWN) == [new]
    assert await listed(topic=CUSTOMERS) == [customer]
    assert await listed(start_time=at(NOW_MS - 1_000)) == [new, customer]
    assert await listed(end_time=at(NOW_MS - 1_000)) == [old]
    assert await listed(end_time=at(NOW_MS - 1_000), reason=STORE_UNKNOWN) == []


async def test_a_list_stays_under_a_mebibyte(client: Client, merchant: str) -> None:
    """However long the details are: a page then holds fewer."""
    await asyncio.gather(
        *(keep(client, merchant, body=b"%d of %s" % (n, merchant.encode()), detail="語" * 1_000) for n in range(400))
    )
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant, page_size=1_000)
    page = await client.webhooks.ListQuarantinedWebhooks(request)

    assert page.ByteSize() <= 1024 * 1024
    assert page.next_page_token
    assert len(await pages(client, merchant, page_size=1_000)) == 400


async def test_a_page_token_is_for_its_list(client: Client, merchant: str) -> None:
    """With other filters it is refused instead of answered wrongly."""
    for n in range(2):
        await keep(client, merchant, body=b"%d of %s" % (n, merchant.encode()))
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant, page_size=1)
    request.page_token = (await client.webhooks.ListQuarantinedWebhooks(request)).next_page_token
    request.reason = MALFORMED

    assert "page_token" in (await refused(client.webhooks.ListQuarantinedWebhooks(request))).fields


async def test_a_replay_applies_the_update(client: Client, merchant: str) -> None:
    """After its store is registered, the webhook is applied, marked, and leaves the list of what waits."""
    shop = Shop(merchant, unique("store"))
    quarantine_id = await keep(client, merchant, reason=STORE_UNKNOWN)
    update = shop.update()

    found = await refused(replay(client, merchant, quarantine_id, update))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
    assert (await get(client, merchant, quarantine_id)).state == webhooks_pb2.QUARANTINE_STATE_QUARANTINED

    await client.put_store(merchant, shop.store_id)
    answer = await replay(client, merchant, quarantine_id, update)
    kept = await get(client, merchant, quarantine_id)

    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    assert (kept.state, kept.replay_time) == (REPLAYED, answer.replay_time)
    assert await pages(client, merchant) == []
    assert (await client.account(merchant, shop.store_id, "buyer")).points_balance == 20


async def test_twenty_replays_at_once_apply_it_once(client: Client, shop: Shop) -> None:
    """One is applied, the others are told that it was."""
    quarantine_id = await keep(client, shop.merchant_id)
    update = shop.update(points_balance=None)
    answers = await asyncio.gather(*(replay(client, shop.merchant_id, quarantine_id, update) for _ in range(20)))
    outcomes = [answer.points_update.outcome for answer in answers]

    assert sorted(outcomes) == [points_pb2.APPLY_OUTCOME_APPLIED] + [points_pb2.APPLY_OUTCOME_DUPLICATE] * 19
    assert len({answer.replay_time.ToMilliseconds() for answer in answers}) == 1
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20


async def test_different_replays_at_once_apply_one(client: Client, shop: Shop) -> None:
    """A webhook is one event: whoever translated it to another is told so, and that event is in no book."""
    quarantine_id = await keep(client, shop.merchant_id)
    calls = [replay(client, shop.merchant_id, quarantine_id, shop.update(points_balance=None)) for _ in range(20)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]

    assert len(failed) == 19
    for error in failed:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20


async def test_a_replay_with_another_update_is_refused(client: Client, shop: Shop) -> None:
    """Once replayed, a webhook stays the event that it was; the same update again is a duplicate."""
    quarantine_id = await keep(client, shop.merchant_id)
    update = shop.update()
    first = await replay(client, shop.merchant_id, quarantine_id, update)
    again = await replay(client, shop.merchant_id, quarantine_id, update)
    found = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))

    assert again.points_update.outcome == points_pb2.APPLY_OUTCOME_DUPLICATE
    assert again.replay_time == first.replay_time
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EVENT_ID_REUSED")


async def test_a_refused_update_may_be_another_next_time(client: Client, shop: Shop) -> None:
    """What was refused is in no book, so the webhook may be translated to another event."""
    quarantine_id = await keep(client, shop.merchant_id)
    taken = shop.update()
    await client.apply(taken)
    stranger = points_pb2.PointsUpdate()
    stranger.CopyFrom(taken)
    stranger.updated_value = 7

    reused = await refused(replay(client, shop.merchant_id, quarantine_id, stranger))
    answer = await replay(client, shop.merchant_id, quarantine_id, shop.update(updated_value=7, points_balance=27))

    assert reused.reason == "EVENT_ID_REUSED"
    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED


async def test_a_crash_between_apply_and_mark(client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The webhook stays claimed by the event that may be in the book: that one heals it, and no other is applied."""
    quarantine_id = await keep(client, shop.merchant_id)
    update = shop.update()
    original = PointsServicer.ApplyPointsUpdate

    async def apply_and_lose_the_database(*arguments: Any) -> Any:
        await original(*arguments)
        raise PointbookError(Reason.DATABASE_UNAVAILABLE, "gone", retry_after_seconds=1)

    with monkeypatch.context() as patch:
        patch.setattr(PointsServicer, "ApplyPointsUpdate", apply_and_lose_the_database)
        lost = await refused(replay(client, shop.merchant_id, quarantine_id, update))
    other = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))
    healed = await replay(client, shop.merchant_id, quarantine_id, update)

    assert lost.code is grpc.StatusCode.UNAVAILABLE
    assert other.reason == "EVENT_ID_REUSED"
    assert healed.points_update.outcome == points_pb2.APPLY_OUTCOME_DUPLICATE
    assert (await get(client, shop.merchant_id, quarantine_id)).state == REPLAYED
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20


async def test_a_refusal_releases_nothing_that_another_replay_may_apply(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one replay of an event still runs, the refusal of another one leaves the webhook to that event.

    When all have ended for certain, a refusal frees it.
    """
    quarantine_id = await keep(client, shop.merchant_id)
    update = shop.update()
    running, go_on = asyncio.Event(), asyncio.Event()
    original = PointsServicer.ApplyPointsUpdate

    async def slow(servicer: Any, request: Any, context: object) -> Any:
        if running.is_set():
            raise PointbookError(Reason.STORE_NOT_FOUND, "not yet", metadata={"store_id": shop.store_id})
        running.set()
        await go_on.wait()
        return await original(servicer, request, context)

    with monkeypatch.context() as patch:
        patch.setattr(PointsServicer, "ApplyPointsUpdate", slow)
        first = asyncio.ensure_future(replay(client, shop.merchant_id, quarantine_id, update))
        await running.wait()
        assert (await refused(replay(client, shop.merchant_id, quarantine_id, update))).reason == "STORE_NOT_FOUND"
        other = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))
        first.cancel()
        service.clock.move(3_600)
        assert (await refused(replay(client, shop.merchant_id, quarantine_id, update))).reason == "STORE_NOT_FOUND"
    freed = await replay(client, shop.merchant_id, quarantine_id, shop.update())

    assert other.reason == "EVENT_ID_REUSED"
    assert freed.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED


async def test_replays_that_are_refused_together_free_the_webhook(client: Client, shop: Shop) -> None:
    """The last of them to end does, so that the webhook can be translated to another event."""
    quarantine_id = await keep(client, shop.merchant_id)
    stranger = shop.update(store_id=unique("store"))
    calls = [refused(replay(client, shop.merchant_id, quarantine_id, stranger)) for _ in range(20)]
    reasons = {found.reason for found in await asyncio.gather(*calls)}
    answer = await replay(client, shop.merchant_id, quarantine_id, shop.update())

    assert reasons == {"STORE_NOT_FOUND"}
    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED


async def test_wrong_fields_of_a_replay_carry_their_path(client: Client, shop: Shop) -> None:
    """The update's own checks speak of this request, not of ApplyPointsUpdate's."""
    quarantine_id = await keep(client, shop.merchant_id)
    update = shop.update(updated_value=-1, buyer_id="")

    found = await refused(replay(client, shop.merchant_id, quarantine_id, update))

    assert set(found.fields) == {"points_update.updated_value", "points_update.buyer_id"}
    assert "points_update.updated_value" in found.message


async def test_an_update_of_another_kind_is_refused(client: Client, shop: Shop) -> None:
    """A customer webhook is no points update, a points webhook no customer update, and none at all is none."""
    quarantine_id = await keep(client, shop.merchant_id, topic=CUSTOMERS)
    points_id = await keep(client, shop.merchant_id, body=owned(shop, "points"))
    named: dict[str, Any] = {"merchant_id": shop.merchant_id, "quarantine_id": quarantine_id}

    async def reason_of(**update: Any) -> Refusal:
        request = webhooks_pb2.ReplayQuarantinedWebhookRequest(**(named | update))
        return await refused(client.webhooks.ReplayQuarantinedWebhook(request))

    kind = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))
    none = await reason_of()
    customer = customers_pb2.ApplyCustomerUpdateRequest(event_id="e", merchant_id=shop.merchant_id)
    customer.kind = customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
    redaction = await reason_of(customer_update=customer)
    of_points = await reason_of(customer_update=customer, quarantine_id=points_id)
    customer.kind = customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED
    empty = await reason_of(customer_update=customer)

    assert set(kind.fields) == {"points_update"}
    assert set(none.fields) == {"points_update"}
    assert set(redaction.fields) == set(of_points.fields) == {"customer_update.kind"}
    assert set(empty.fields) == {f"customer_update.{name}" for name in ("store_id", "buyer_id", "updated_at")}


async def test_a_webhook_without_a_topic_is_replayed_as_the_kind_that_the_caller_chooses(
    client: Client, shop: Shop
) -> None:
    """Only the caller can tell what such a body is."""
    named = {"topic": "", "reason": TOPIC_MISSING}
    points_id = await keep(client, shop.merchant_id, **named)
    customer_id = await keep(client, shop.merchant_id, body=person(), **named)
    customer = customers_pb2.ApplyCustomerUpdateRequest(
        event_id="e",
        merchant_id=shop.merchant_id,
        store_id=shop.store_id,
        buyer_id="17",
        kind=customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED,
        updated_at=at(NOW_MS - 60_000),
    )
    answers = [
        await replay(client, shop.merchant_id, points_id, shop.update()),
        await client.webhooks.ReplayQuarantinedWebhook(
            webhooks_pb2.ReplayQuarantinedWebhookRequest(
                merchant_id=shop.merchant_id, quarantine_id=customer_id, customer_update=customer
            )
        ),
    ]

    assert answers[0].points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    assert answers[1].customer_update.outcome == customers_pb2.CUSTOMER_UPDATE_OUTCOME_APPLIED
    assert await pages(client, shop.merchant_id) == []


async def test_what_is_not_in_quarantine_is_not_found(client: Client, shop: Shop) -> None:
    """By Get, Replay and Drop alike, also for another merchant's and for what was dropped."""
    quarantine_id = await keep(client, shop.merchant_id)
    other = unique("merchant")

    async def check(merchant_id: str) -> None:
        for call in (
            get(client, merchant_id, quarantine_id),
            replay(client, merchant_id, quarantine_id, shop.update()),
            drop(client, merchant_id, quarantine_id),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "WEBHOOK_NOT_FOUND")
            assert found.metadata == {"quarantine_id": quarantine_id}

    await check(other)
    await drop(client, shop.merchant_id, quarantine_id)
    await check(shop.merchant_id)


async def test_a_drop_is_told_to_the_audit_log(client: Client, service: Service, shop: Shop) -> None:
    """Which webhook, of which merchant, and why: never what was in it. Dropped twice at once, it is dropped once."""
    merchant, body = shop.merchant_id, owned(shop, "ada@example.com")
    quarantine_id = await keep(client, merchant, topic=CUSTOMERS, body=body)
    with structlog.testing.capture_logs() as logs:
        answers = await asyncio.gather(
            *(drop(client, merchant, quarantine_id, "a forged copy") for _ in range(5)), return_exceptions=True
        )
    [entry] = [entry for entry in logs if entry["event"].startswith("audit")]

    assert answers.count(None) == 1
    assert (entry["quarantine_id"], entry["merchant_id"]) == (quarantine_id, merchant)
    assert (entry["quarantine_reason"], entry["drop_reason"]) == ("MALFORMED", "a forged copy")
    assert "ada" not in str(logs)
    assert await usage(service, merchant) == (0, 0)


async def test_nothing_of_a_webhook_is_logged(client: Client, shop: Shop) -> None:
    """Kept, read, replayed and refused: no line holds a header or a body."""
    with structlog.testing.capture_logs() as logs:
        quarantine_id = await keep(
            client,
            shop.merchant_id,
            body=b"body-content",
            headers=[webhooks_pb2.WebhookHeader(name="x-header-name", value="header-content")],
        )
        await get(client, shop.merchant_id, quarantine_id)
        await refused(replay(client, shop.merchant_id, quarantine_id, shop.update(buyer_id="buyer content")))
        await refused(client.webhooks.QuarantineWebhook(webhook(shop.merchant_id, body=b"body-content" * 30_000)))

    assert logs
    assert not any(word in str(logs) for word in ("body-content", "header-content", "x-header-name", "buyer content"))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"merchant_id": "two words"}, "merchant_id"),
        ({"merchant_id": "m" * 65}, "merchant_id"),
        ({"topic": ""}, "topic"),
        ({"topic": "t" * 129}, "topic"),
        ({"reason": TOPIC_MISSING}, "topic"),
        ({"reason": TOPIC_MISSING, "topic": " "}, "topic"),
        ({"reason": 0}, "reason"),
        ({"reason": 99}, "reason"),
        ({"detail": "d" * 1_001}, "detail"),
        ({"detail": "\x1b[2J"}, "detail"),
        ({"body": b"b" * (256 * 1024 + 1)}, "body"),
        ({"receive_time": at(NOW_MS + 30 * 60 * 60 * 1_000)}, "receive_time"),
        ({"receive_time": at(0)}, "receive_time"),
        ({"headers": [webhooks_pb2.WebhookHeader(name="n")] * 101}, "headers"),
        ({"headers": [webhooks_pb2.WebhookHeader(name="n", value="v" * 8_000)] * 5}, "headers"),
        ({"headers": [webhooks_pb2.WebhookHeader(name="")]}, "headers[0].name"),
        ({"headers": [webhooks_pb2.WebhookHeader(name="n" * 129)]}, "headers[0].name"),
        ({"headers": [webhooks_pb2.WebhookHeader(name="n", value="v" * 8_193)]}, "headers[0].value"),
        ({"headers": [webhooks_pb2.WebhookHeader(name="n", value="Ā")]}, "headers[0].value"),
    ],
)
async def test_wrong_fields_are_named(client: Client, merchant: str, changes: dict[str, Any], field: str) -> None:
    """Every limit of the contract is checked, and nothing is kept."""
    found = await refused(client.webhooks.QuarantineWebhook(webhook(**{"merchant_id": merchant, **changes})))

    assert (found.code, list(found.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_the_limits_themselves_are_allowed(client: Client, merchant: str) -> None:
    """An empty body too, for nothing authentic is dropped."""
    headers = [webhooks_pb2.WebhookHeader(name="n" * 128, value="v" * 8_064)] * 4
    largest = await keep(client, merchant, topic="t" * 128, headers=headers, body=b"b" * 256 * 1024, detail="d" * 1_000)
    empty = await keep(client, merchant, headers=[], body=b"", detail="")

    assert (await get(client, merchant, largest)).body_size == 256 * 1024
    assert (await get(client, merchant, empty)).body == b""


async def test_dropping_needs_a_reason(client: Client, merchant: str) -> None:
    """Nobody drops without saying why, and nobody writes lines into the log."""
    quarantine_id = await keep(client, merchant)
    for reason in ("", "   ", "r" * 501, "two\nlines"):
        assert set((await refused(drop(client, merchant, quarantine_id, reason))).fields) == {"reason"}
    assert await get(client, merchant, quarantine_id)


async def test_a_replay_needs_both_merchants(service: Service, shop: Shop) -> None:
    """The token must be for the merchant of the quarantine and for the one of the update."""
    named = unique("merchant")
    quarantine_id = await keep(service.client, named)
    scopes = [Scope.WEBHOOKS]
    for merchants, allowed in (([named], False), ([shop.merchant_id], False), ([named, shop.merchant_id], True)):
        client = Client(service.server.port, await make_token(service.database_url, merchants, scopes))
        call = replay(client, named, quarantine_id, shop.update())
        if allowed:
            assert (await call).points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
        else:
            assert (await refused(call)).reason == "MERCHANT_FORBIDDEN"
        await client.close()


async def test_webhooks_without_a_merchant_are_for_all_merchants(
    service: Service, client: Client, merchant: str
) -> None:
    """They are kept under the empty merchant_id, which a token for some merchants does not open."""
    body = secrets.token_bytes(16)
    quarantine_id = await keep(client, "", body=body)
    limited = Client(service.server.port, await make_token(service.database_url, [merchant], list(Scope)))

    assert (await get(client, "", quarantine_id)).body == body
    assert quarantine_id in {kept.quarantine_id for kept in await pages(client, "")}
    assert (await refused(get(limited, "", quarantine_id))).reason == "MERCHANT_FORBIDDEN"
    assert (await refused(limited.webhooks.QuarantineWebhook(webhook("")))).reason == "MERCHANT_FORBIDDEN"
    await limited.close()


async def test_without_a_key_headers_stand_in_the_table_as_json(
    service: Service, admin_token: str, merchant: str
) -> None:
    """An operator with nothing but SQL can then read what a points webhook was."""
    async with another_server(service, admin_token, quarantine_keys={}) as client:
        await keep(client, merchant)
        found = await row(service, merchant)

        assert json.loads(found["headers"])[0] == ["X-Shopline-Topic", POINTS]
        assert found["body"] == webhook(merchant).body


async def test_a_body_that_came_before_the_key_is_known_again(
    service: Service, client: Client, admin_token: str, merchant: str
) -> None:
    """A key that is set later doubles nothing, and hides what comes from then on."""
    async with another_server(service, admin_token, quarantine_keys={}) as other:
        first = await keep(other, merchant)

    again = await client.webhooks.QuarantineWebhook(webhook(merchant))

    assert (again.quarantine_id, again.already_quarantined) == (first, True)

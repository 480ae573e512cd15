"""The quarantine: webhooks are stored and replayed once, and never logged."""

import asyncio
import base64
import json
import secrets
from typing import Any

import asyncpg
import grpc
import pytest
import structlog
from pydantic import SecretStr

from pointbook.v1 import customers_pb2, points_pb2, webhooks_pb2
from pointbook_server.access.model import Scope
from pointbook_server.errors import PointbookError
from pointbook_server.ledger.servicer import PointsServicer
from pointbook_server.reasons import Reason
from support.clients import Client
from support.clocks import NOW_MS, at
from support.refusals import Refusal, refused
from support.servers import QUARANTINE_KEY, Service, running_server
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

POINTS = "app_memberSystem_points/challenged"
CUSTOMERS = "customers/update"
MALFORMED = webhooks_pb2.QUARANTINE_REASON_MALFORMED
TOPIC_MISSING = webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING
STORE_UNKNOWN = webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN
REPLAYED = webhooks_pb2.QUARANTINE_STATE_REPLAYED
OTHER_KEY = base64.b64encode(b"r" * 32).decode()


def customer_body() -> bytes:
    """Return the body of a customer webhook that no other test uses."""
    return json.dumps({"id": unique("2404721679"), "email": "ada@example.com", "phone": "+8613800000000"}).encode()


def owned_body(shop: Shop, note: object, size: int = 0) -> bytes:
    """Return a body that names the store of a shop."""
    return json.dumps({"store_id": shop.store_id, "note": str(note).ljust(size, "x")}).encode()


@pytest.fixture
def merchant() -> str:
    """A merchant's id for one test."""
    return unique("merchant")


def webhook(merchant_id: str, **changes: Any) -> webhooks_pb2.QuarantineWebhookRequest:
    """Build a request for a points webhook that could not be parsed."""
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


async def quarantine_webhook(client: Client, merchant_id: str, **changes: Any) -> str:
    """Quarantine a webhook, and return its id."""
    return (await client.webhooks.QuarantineWebhook(webhook(merchant_id, **changes))).quarantine_id


async def get_webhook(client: Client, merchant_id: str, quarantine_id: str) -> webhooks_pb2.QuarantinedWebhook:
    """Return a webhook with its content."""
    request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=merchant_id, quarantine_id=quarantine_id)
    return (await client.webhooks.GetQuarantinedWebhook(request)).webhook


async def list_all(client: Client, merchant_id: str, **changes: Any) -> list[webhooks_pb2.QuarantinedWebhook]:
    """Return all pages of a list."""
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


async def read_row(service: Service, merchant_id: str) -> Any:
    """Return the one row of a merchant."""
    connection = await asyncpg.connect(service.database_url)
    try:
        [found] = await connection.fetch(
            "SELECT * FROM quarantined_webhooks WHERE coalesce(claimed_merchant_id, merchant_id) = $1", merchant_id
        )
        return found
    finally:
        await connection.close()


async def read_usage(service: Service, merchant_id: str) -> tuple[int, int]:
    """Return the usage of a merchant's quarantine, and check it against its rows."""
    connection = await asyncpg.connect(service.database_url)
    try:
        recorded = await connection.fetchrow(
            "SELECT webhooks, bytes FROM quarantine_usage WHERE merchant_id = $1", merchant_id
        )
        actual = await connection.fetchrow(
            "SELECT count(*), coalesce(sum(octet_length(headers) + octet_length(body)), 0)::bigint"
            " FROM quarantined_webhooks WHERE merchant_id = $1",
            merchant_id,
        )
    finally:
        await connection.close()
    assert tuple(recorded) == tuple(actual)
    return tuple(recorded)


async def test_webhook_is_stored_with_body_reason_and_shoplines_headers(client: Client, merchant: str) -> None:
    """The first header of each name, in their order."""
    latin_1 = bytes(range(1, 256)).decode("latin-1")
    stored_headers = [
        webhooks_pb2.WebhookHeader(name=name, value=value)
        for name, value in [("x-shopline-shop-domain", latin_1), ("X-Shopline-Topic", POINTS)]
    ]
    names = ("Authorization", "COOKIE", "X-Shopline-Hmac-Sha256", "X-Forwarded-For", "x-shopline-topic")
    others = [webhooks_pb2.WebhookHeader(name=name, value="open sesame") for name in names]
    long = webhooks_pb2.WebhookHeader(name="X-Shopline-Webhook-Id", value="w" * 256)
    body = secrets.token_bytes(256 * 1024)
    received = at(NOW_MS - 5_000)

    headers = [*stored_headers, long, *others]
    quarantine_id = await quarantine_webhook(client, merchant, headers=headers, body=body, receive_time=received)
    stored = await get_webhook(client, merchant, quarantine_id)

    assert stored == webhooks_pb2.QuarantinedWebhook(
        merchant_id=merchant,
        quarantine_id=quarantine_id,
        reason=MALFORMED,
        detail="body must be JSON in UTF-8",
        topic=POINTS,
        headers=stored_headers,
        body=body,
        body_size=len(body),
        state=webhooks_pb2.QUARANTINE_STATE_QUARANTINED,
        receive_time=received,
        last_receive_time=received,
        receive_count=1,
    )


async def test_repetition_is_counted_once_a_minute(client: Client, service: Service, merchant: str) -> None:
    seconds = (600, 541, 540, 500, 300, 301)
    answers = [
        await client.webhooks.QuarantineWebhook(webhook(merchant, receive_time=at(NOW_MS - ago * 1_000)))
        for ago in seconds[:2]
    ]
    before = await read_row(service, merchant)
    answers.append(await client.webhooks.QuarantineWebhook(webhook(merchant, receive_time=at(NOW_MS - 542_000))))
    assert await read_row(service, merchant) == before
    answers += [
        await client.webhooks.QuarantineWebhook(webhook(merchant, receive_time=at(NOW_MS - ago * 1_000)))
        for ago in seconds[2:]
    ]
    stored = await get_webhook(client, merchant, answers[0].quarantine_id)

    assert [answer.already_quarantined for answer in answers] == [False] + [True] * 6
    assert len({answer.quarantine_id for answer in answers}) == 1
    assert stored.receive_count == 3
    assert (stored.receive_time, stored.last_receive_time) == (at(NOW_MS - 600_000), at(NOW_MS - 300_000))


async def test_body_takes_one_shared_row_and_one_of_its_merchant(
    client: Client, service: Service, shop: Shop, merchant: str
) -> None:
    """Other merchants, topics, reasons and headers add no row."""
    other = Shop(unique("merchant"), unique("store"))
    await client.put_store(other.merchant_id, other.store_id)
    for body in (owned_body(shop, "x"), customer_body(), b"noise " + merchant.encode()):
        calls = [
            webhook(
                merchant_id,
                body=body,
                topic=topic,
                reason=reason,
                headers=[webhooks_pb2.WebhookHeader(name="X-Shopline-Webhook-Id", value=unique("w"))],
            )
            for merchant_id in (
                shop.merchant_id,
                other.merchant_id,
                "",
                merchant,
                *(unique("merchant") for _ in range(5)),
            )
            for topic in (POINTS, CUSTOMERS)
            for reason in (MALFORMED, STORE_UNKNOWN)
        ]
        answers = await asyncio.gather(*map(client.webhooks.QuarantineWebhook, calls))
        assert len({answer.quarantine_id for answer in answers}) == (2 if b"store_id" in body else 1)
        assert sum(not answer.already_quarantined for answer in answers) == (2 if b"store_id" in body else 1)

    [mine] = [
        stored for stored in await list_all(client, shop.merchant_id) if stored.body_size == len(owned_body(shop, "x"))
    ]
    assert mine.topic == ""
    assert (await read_usage(service, shop.merchant_id))[0] == 1


async def test_repeated_copies_write_nothing(client: Client, service: Service, merchant: str) -> None:
    for _ in range(2):
        for merchant_id, topic in ((merchant, POINTS), (unique("merchant"), CUSTOMERS)):
            body = b"one of " + merchant.encode()
            await client.webhooks.QuarantineWebhook(webhook(merchant_id, topic=topic, body=body))
    connection = await asyncpg.connect(service.database_url)
    query = "SELECT ctid::text, xmin::text FROM quarantined_webhooks WHERE claimed_merchant_id = $1"
    try:
        before = await connection.fetch(query, merchant)
        for number in range(30):
            await client.webhooks.QuarantineWebhook(webhook(unique("m"), topic=f"t/{number}", body=body))
        assert await connection.fetch(query, merchant) == before
    finally:
        await connection.close()


async def test_merchant_sees_shared_webhooks_that_name_it_alone(
    client: Client, service: Service, merchant: str
) -> None:
    other_merchant = unique("merchant")
    body = b"shared " + merchant.encode()
    quarantine_id = await quarantine_webhook(client, merchant, body=body)
    assert await quarantine_webhook(client, other_merchant, body=body) == quarantine_id
    await client.put_store(merchant, unique("store"))
    limited = Client(service.server.port, await make_token(service.database_url, [other_merchant], list(Scope)))

    assert [stored.quarantine_id for stored in await list_all(client, merchant)] == [quarantine_id]
    assert quarantine_id in {stored.quarantine_id for stored in await list_all(client, "")}
    assert (await get_webhook(client, merchant, quarantine_id)).merchant_id == merchant
    assert (await get_webhook(client, "", quarantine_id)).body == body
    assert await list_all(limited, other_merchant) == []
    for call in (get_webhook(limited, other_merchant, quarantine_id), drop(limited, other_merchant, quarantine_id)):
        assert (await refused(call)).reason == "WEBHOOK_NOT_FOUND"
    await limited.close()
    await drop(client, merchant, quarantine_id)
    assert await list_all(client, merchant) == []


async def test_contested_webhook_is_visible_to_operators_only(client: Client, service: Service, merchant: str) -> None:
    """The first copy may be forged."""
    other_merchant = Shop(unique("merchant"), unique("store"))
    await client.put_store(other_merchant.merchant_id, other_merchant.store_id)
    limited = Client(
        service.server.port, await make_token(service.database_url, [other_merchant.merchant_id], list(Scope))
    )
    quarantine_id = await quarantine_webhook(client, other_merchant.merchant_id, body=b"shared " + merchant.encode())
    assert [stored.quarantine_id for stored in await list_all(limited, other_merchant.merchant_id)] == [quarantine_id]
    await quarantine_webhook(client, merchant, body=b"shared " + merchant.encode())

    assert await list_all(limited, other_merchant.merchant_id) == []
    for call in (
        get_webhook(limited, other_merchant.merchant_id, quarantine_id),
        replay(limited, other_merchant.merchant_id, quarantine_id, other_merchant.update()),
        drop(limited, other_merchant.merchant_id, quarantine_id),
    ):
        assert (await refused(call)).reason == "WEBHOOK_NOT_FOUND"
    await limited.close()
    assert (await get_webhook(client, other_merchant.merchant_id, quarantine_id)).body == b"shared " + merchant.encode()
    await drop(client, other_merchant.merchant_id, quarantine_id)


async def test_token_for_some_merchants_does_not_use_the_shared_quarantine(
    service: Service, client: Client, admin_token: str, merchant: str
) -> None:
    """It neither sees nor contests other merchants' webhooks."""
    other_merchant, body = unique("merchant"), customer_body()
    tokens = {
        merchant_id: await make_token(service.database_url, [merchant_id], list(Scope))
        for merchant_id in (merchant, other_merchant)
    }
    mine = await quarantine_webhook(client, merchant, body=body, topic=CUSTOMERS)
    full = await count_webhooks(service, "")
    async with running_server(service.database_url, admin_token, quarantine_shared_webhooks_max=full) as (_, shim):
        assert (await refused(shim.webhooks.QuarantineWebhook(webhook(merchant)))).reason == "QUEUE_FULL"
    async with running_server(service.database_url, tokens[other_merchant], quarantine_shared_webhooks_max=full) as (
        _,
        limited,
    ):
        answers = [await limited.webhooks.QuarantineWebhook(webhook(other_merchant, body=body)) for _ in range(2)]
    assert [answer.already_quarantined for answer in answers] == [False, True]
    assert mine not in {answer.quarantine_id for answer in answers}
    owner = Client(service.server.port, tokens[merchant])
    stored = await get_webhook(owner, merchant, mine)
    assert (stored.body, stored.topic, stored.receive_count) == (body, CUSTOMERS, 1)
    await owner.close()


async def test_webhooks_of_an_earlier_release_stay_usable(client: Client, service: Service, shop: Shop) -> None:
    """They are owned by the merchant that their header names."""
    quarantine_id = await quarantine_webhook(client, shop.merchant_id, body=owned_body(shop, "old"))
    connection = await asyncpg.connect(service.database_url)
    await connection.execute(
        "UPDATE quarantined_webhooks SET claimed_merchant_id = NULL, signed_store_digest = NULL WHERE merchant_id = $1",
        shop.merchant_id,
    )
    await connection.close()

    again = await client.webhooks.QuarantineWebhook(webhook(shop.merchant_id, body=owned_body(shop, "old")))
    assert (again.quarantine_id, again.already_quarantined) == (quarantine_id, True)
    assert [stored.quarantine_id for stored in await list_all(client, shop.merchant_id)] == [quarantine_id]
    answer = await replay(client, shop.merchant_id, quarantine_id, shop.update())
    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    await drop(client, shop.merchant_id, quarantine_id)


@pytest.mark.parametrize("topic", [POINTS, CUSTOMERS])
async def test_concurrent_repetitions_are_stored_once(
    service: Service, admin_token: str, shop: Shop, topic: str
) -> None:
    async with running_server(service.database_url, admin_token) as (_, other):
        for body in (owned_body(shop, topic), b"no JSON of " + shop.store_id.encode() + topic.encode()):
            answers = await asyncio.gather(
                *(
                    client.webhooks.QuarantineWebhook(webhook(shop.merchant_id, topic=topic, body=body))
                    for _ in range(25)
                    for client in (service.client, other)
                )
            )
            assert len({answer.quarantine_id for answer in answers}) == 1
            assert sum(not answer.already_quarantined for answer in answers) == 1
    assert (await read_usage(service, shop.merchant_id))[0] == 1
    await read_usage(service, "")


async def test_full_quarantine_refuses_new_webhooks(service: Service, admin_token: str, shop: Shop) -> None:
    """It still counts repetitions, and a drop makes space."""
    merchant = shop.merchant_id
    async with running_server(service.database_url, admin_token, quarantine_webhooks_max=5) as (_, client):
        with structlog.testing.capture_logs() as logs:
            answers = await asyncio.gather(
                *(client.webhooks.QuarantineWebhook(webhook(merchant, body=owned_body(shop, n))) for n in range(20)),
                return_exceptions=True,
            )
            stored = [answer.quarantine_id for answer in answers if not isinstance(answer, BaseException)]
            found = await refused(
                client.webhooks.QuarantineWebhook(webhook(merchant, body=owned_body(shop, "one more")))
            )

        assert len(stored) == 5
        assert (found.code, found.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL")
        assert found.retry_seconds
        [entry] = [entry for entry in logs if entry["log_level"] == "error"]
        assert (entry["event"], entry["merchant_id"]) == ("the quarantine is full", merchant)
        body = (await get_webhook(client, merchant, stored[0])).body
        again = await client.webhooks.QuarantineWebhook(webhook(merchant, body=body))
        assert again.already_quarantined

        await drop(client, merchant, stored[0])
        await quarantine_webhook(client, merchant, body=owned_body(shop, "one more"))
        assert (await read_usage(service, merchant))[0] == 5


async def test_bytes_of_a_quarantine_are_bounded(service: Service, admin_token: str, shop: Shop) -> None:
    merchant, other = shop.merchant_id, Shop(unique("merchant"), unique("store"))
    await service.client.put_store(other.merchant_id, other.store_id)
    async with running_server(service.database_url, admin_token, quarantine_bytes_max=100_000) as (_, client):
        first = await quarantine_webhook(client, merchant, body=owned_body(shop, "a", 60_000))
        found = await refused(client.webhooks.QuarantineWebhook(webhook(merchant, body=owned_body(shop, "b", 60_000))))
        await quarantine_webhook(client, other.merchant_id, body=owned_body(other, "b", 60_000))
        await quarantine_webhook(client, merchant, body=owned_body(shop, "small"))
        await drop(client, merchant, first)
        await quarantine_webhook(client, merchant, body=owned_body(shop, "b", 60_000))

    assert found.reason == "QUEUE_FULL"
    assert (await read_usage(service, merchant))[0] == 2


async def count_webhooks(service: Service, merchant_id: str | None = None) -> int:
    """Return the number of webhooks in a quarantine, or in all of them."""
    connection = await asyncpg.connect(service.database_url)
    query = "SELECT coalesce(sum(webhooks), 0)::int FROM quarantine_usage WHERE $1::text IS NULL OR merchant_id = $1"
    try:
        return int(await connection.fetchval(query, merchant_id))
    finally:
        await connection.close()


async def test_merchants_without_stores_use_half_of_the_shared_quarantine(
    service: Service, admin_token: str, shop: Shop
) -> None:
    most = 2 * (await count_webhooks(service, "") + 3)
    async with running_server(service.database_url, admin_token, quarantine_shared_webhooks_max=most) as (_, client):
        bodies = [f"{n} of {shop.store_id}".encode() for n in range(10)]
        answers = await asyncio.gather(
            *(client.webhooks.QuarantineWebhook(webhook(unique("m"), body=body)) for body in bodies),
            return_exceptions=True,
        )
        assert sum(not isinstance(answer, BaseException) for answer in answers) == 3
        await quarantine_webhook(client, shop.merchant_id, body=b"mine " + shop.store_id.encode())


@pytest.mark.parametrize("bound", ["webhooks", "bytes"])
async def test_all_quarantines_together_are_bounded(service: Service, admin_token: str, shop: Shop, bound: str) -> None:
    """A drop makes space at once."""
    other = Shop(unique("merchant"), unique("store"))
    await service.client.put_store(other.merchant_id, other.store_id)
    held = await count_webhooks(service)
    settings: dict[str, Any] = {"quarantine_total_webhooks_max": held + 4} if bound == "webhooks" else {}
    if bound == "bytes":
        connection = await asyncpg.connect(service.database_url)
        used = await connection.fetchval("SELECT coalesce(sum(bytes), 0)::int FROM quarantine_usage")
        await connection.close()
        settings = {"quarantine_total_bytes_max": used + 4 * 10_500}
    async with running_server(service.database_url, admin_token, **settings) as (_, client):
        calls = [
            webhook(each.merchant_id, body=owned_body(each, f"{bound} {n}", 10_000))
            for n in range(8)
            for each in (shop, other)
        ]
        answers = await asyncio.gather(*map(client.webhooks.QuarantineWebhook, calls), return_exceptions=True)
        stored = [answer for answer in answers if not isinstance(answer, BaseException)]
        assert len(stored) == 4
        assert await count_webhooks(service) == held + 4
        [mine, *_] = [*await list_all(client, shop.merchant_id), *await list_all(client, other.merchant_id)]
        assert (await refused(client.webhooks.QuarantineWebhook(webhook(unique("m"), body=b"m" * 9_000)))).reason == (
            "QUEUE_FULL"
        )
        await drop(client, mine.merchant_id, mine.quarantine_id)
        await quarantine_webhook(client, shop.merchant_id, body=owned_body(shop, f"{bound} again", 9_000))


async def test_copies_of_the_webhook_in_the_last_space_are_repetitions(
    service: Service, admin_token: str, shop: Shop
) -> None:
    async with running_server(service.database_url, admin_token, quarantine_webhooks_max=1) as (_, client):
        answers = await asyncio.gather(
            *(quarantine_webhook(client, shop.merchant_id, body=owned_body(shop, "last")) for _ in range(20))
        )

    assert len(set(answers)) == 1


async def test_customer_webhooks_are_stored_encrypted(service: Service, merchant: str) -> None:
    body = customer_body()
    headers = [webhooks_pb2.WebhookHeader(name="X-Shopline-Shop-Domain", value="ada.example.com")]
    quarantine_id = await quarantine_webhook(service.client, merchant, topic=CUSTOMERS, body=body, headers=headers)
    stored = await get_webhook(service.client, merchant, quarantine_id)
    found = await read_row(service, merchant)

    assert (stored.body, list(stored.headers)) == (body, headers)
    dump = b"".join(value if isinstance(value, bytes) else str(value).encode() for value in found.values())
    for secret in (b"ada.example.com", b"ada@example.com", b"2404721679", b"13800000000", b"Shop-Domain"):
        assert secret not in dump
    connection = await asyncpg.connect(service.database_url)
    plain = await connection.fetchval("SELECT sha256($1)", body)
    await connection.close()
    assert found["body_digest"] != plain


async def test_ciphertext_of_another_row_is_an_internal_error(service: Service, merchant: str) -> None:
    """Writing the table must not show one customer's body as another's."""
    body = customer_body()
    first = await quarantine_webhook(service.client, merchant, topic=CUSTOMERS, body=body)
    second = await quarantine_webhook(service.client, merchant, topic=CUSTOMERS, body=body.swapcase())
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


async def test_old_key_decrypts_and_finds_bodies_after_a_rotation(
    service: Service, admin_token: str, merchant: str
) -> None:
    body, fresh_body = customer_body(), customer_body()
    first = await quarantine_webhook(service.client, merchant, topic=CUSTOMERS, body=body)
    keys = {"q2": SecretStr(OTHER_KEY), "q1": SecretStr(QUARANTINE_KEY)}
    async with running_server(service.database_url, admin_token, quarantine_keys=keys) as (_, client):
        again = await client.webhooks.QuarantineWebhook(webhook(merchant, topic=CUSTOMERS, body=body))
        other = unique("merchant")
        fresh = await quarantine_webhook(client, other, topic=CUSTOMERS, body=fresh_body)

        assert (again.quarantine_id, again.already_quarantined) == (first, True)
        assert (await get_webhook(client, merchant, first)).body == body
        assert (await read_row(service, other))["key_id"] == "q2"
        request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=other, quarantine_id=fresh)
        found = await refused(service.client.webhooks.GetQuarantinedWebhook(request))
        assert (found.code, found.reason) == (grpc.StatusCode.UNAVAILABLE, "CODE_KEY_UNKNOWN")
        assert found.metadata == {"key_id": "q2"}


async def test_customer_webhook_without_a_key_is_refused(service: Service, admin_token: str, merchant: str) -> None:
    async with running_server(service.database_url, admin_token, quarantine_keys={}) as (_, client):
        found = await refused(client.webhooks.QuarantineWebhook(webhook(merchant, topic="Customers/create")))
        topicless = webhook(merchant, topic="", reason=TOPIC_MISSING)
        assert (await refused(client.webhooks.QuarantineWebhook(topicless))).reason == "KEY_NOT_CONFIGURED"
        await quarantine_webhook(client, merchant)

        assert (found.code, found.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "KEY_NOT_CONFIGURED")
        assert "POINTBOOK_QUARANTINE_KEYS" in found.message
        assert [stored.topic for stored in await list_all(client, merchant)] == [POINTS]


async def test_lists_are_oldest_first_without_content(client: Client, merchant: str) -> None:
    """Pages continue correctly while webhooks arrive and are dropped."""
    ids = [
        await quarantine_webhook(
            client, merchant, body=b"%d of %s" % (n, merchant.encode()), receive_time=at(NOW_MS - 1_000 + n // 2)
        )
        for n in range(7)
    ]
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant, page_size=3)
    first = await client.webhooks.ListQuarantinedWebhooks(request)
    newest = await quarantine_webhook(client, merchant, body=b"newest", receive_time=at(NOW_MS))
    await drop(client, merchant, first.webhooks[-1].quarantine_id)
    request.page_token = first.next_page_token
    rest = [
        *(second := await client.webhooks.ListQuarantinedWebhooks(request)).webhooks,
        *(await list_all(client, merchant, page_size=3, page_token=second.next_page_token)),
    ]
    found = [*first.webhooks, *rest]

    assert sorted(stored.quarantine_id for stored in found) == sorted([*ids, newest])
    times = [(stored.receive_time.ToMilliseconds(), stored.quarantine_id) for stored in found]
    assert times == sorted(times)
    assert not any(stored.headers or stored.body for stored in found)
    assert found[0].body_size == len(f"0 of {merchant}")


async def test_lists_are_filtered_by_state_reason_topic_and_time(client: Client, shop: Shop) -> None:
    merchant = shop.merchant_id
    old = await quarantine_webhook(client, merchant, body=b"old", receive_time=at(NOW_MS - 10_000))
    new = await quarantine_webhook(client, merchant, body=b"new", receive_time=at(NOW_MS - 1_000), reason=STORE_UNKNOWN)
    customer = await quarantine_webhook(
        client, merchant, body=customer_body(), topic=CUSTOMERS, receive_time=at(NOW_MS)
    )
    done = await quarantine_webhook(client, merchant, body=b"done")
    await replay(client, merchant, done, shop.update())

    async def listed(**filters: Any) -> list[str]:
        return [stored.quarantine_id for stored in await list_all(client, merchant, **filters)]

    assert await listed() == [old, new, customer]
    assert await listed(state=REPLAYED) == [done]
    assert await listed(reason=STORE_UNKNOWN) == [new]
    assert await listed(topic=CUSTOMERS) == [customer]
    assert await listed(start_time=at(NOW_MS - 1_000)) == [new, customer]
    assert await listed(end_time=at(NOW_MS - 1_000)) == [old]
    assert await listed(end_time=at(NOW_MS - 1_000), reason=STORE_UNKNOWN) == []


async def test_page_stays_under_a_mebibyte(client: Client, merchant: str) -> None:
    await asyncio.gather(
        *(
            quarantine_webhook(client, merchant, body=b"%d of %s" % (n, merchant.encode()), detail="語" * 1_000)
            for n in range(400)
        )
    )
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant, page_size=1_000)
    page = await client.webhooks.ListQuarantinedWebhooks(request)

    assert page.ByteSize() <= 1024 * 1024
    assert page.next_page_token
    assert len(await list_all(client, merchant, page_size=1_000)) == 400


async def test_page_token_with_other_filters_is_refused(client: Client, merchant: str) -> None:
    for n in range(2):
        await quarantine_webhook(client, merchant, body=b"%d of %s" % (n, merchant.encode()))
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant, page_size=1)
    request.page_token = (await client.webhooks.ListQuarantinedWebhooks(request)).next_page_token
    request.reason = MALFORMED

    assert "page_token" in (await refused(client.webhooks.ListQuarantinedWebhooks(request))).fields


async def test_replay_applies_the_update_and_marks_the_webhook(client: Client, merchant: str) -> None:
    shop = Shop(merchant, unique("store"))
    quarantine_id = await quarantine_webhook(client, merchant, reason=STORE_UNKNOWN)
    update = shop.update()

    found = await refused(replay(client, merchant, quarantine_id, update))
    assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "STORE_NOT_FOUND")
    assert (await get_webhook(client, merchant, quarantine_id)).state == webhooks_pb2.QUARANTINE_STATE_QUARANTINED

    await client.put_store(merchant, shop.store_id)
    answer = await replay(client, merchant, quarantine_id, update)
    stored = await get_webhook(client, merchant, quarantine_id)

    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    assert (stored.state, stored.replay_time) == (REPLAYED, answer.replay_time)
    assert await list_all(client, merchant) == []
    assert (await client.account(merchant, shop.store_id, "buyer")).points_balance == 20


async def test_concurrent_replays_of_one_update_apply_it_once(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    update = shop.update(points_balance=None)
    answers = await asyncio.gather(*(replay(client, shop.merchant_id, quarantine_id, update) for _ in range(20)))
    outcomes = [answer.points_update.outcome for answer in answers]

    assert sorted(outcomes) == [points_pb2.APPLY_OUTCOME_APPLIED] + [points_pb2.APPLY_OUTCOME_DUPLICATE] * 19
    assert len({answer.replay_time.ToMilliseconds() for answer in answers}) == 1
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20


async def test_concurrent_replays_of_different_updates_apply_one(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    calls = [replay(client, shop.merchant_id, quarantine_id, shop.update(points_balance=None)) for _ in range(20)]
    answers = await asyncio.gather(*calls, return_exceptions=True)
    failed = [answer for answer in answers if isinstance(answer, BaseException)]

    assert len(failed) == 19
    for error in failed:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20


async def test_replay_with_another_update_is_refused(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    update = shop.update()
    first = await replay(client, shop.merchant_id, quarantine_id, update)
    again = await replay(client, shop.merchant_id, quarantine_id, update)
    found = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))

    assert again.points_update.outcome == points_pb2.APPLY_OUTCOME_DUPLICATE
    assert again.replay_time == first.replay_time
    assert (found.code, found.reason) == (grpc.StatusCode.ALREADY_EXISTS, "EVENT_ID_REUSED")


async def test_webhook_can_be_replayed_differently_after_a_refusal(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    taken = shop.update()
    await client.apply(taken)
    other_update = points_pb2.PointsUpdate()
    other_update.CopyFrom(taken)
    other_update.updated_value = 7

    reused = await refused(replay(client, shop.merchant_id, quarantine_id, other_update))
    answer = await replay(client, shop.merchant_id, quarantine_id, shop.update(updated_value=7, points_balance=27))

    assert reused.reason == "EVENT_ID_REUSED"
    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED


async def test_webhook_stays_claimed_if_the_database_goes_away_after_applying(
    client: Client, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the same event can complete the replay."""
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    update = shop.update()
    original = PointsServicer.ApplyPointsUpdate

    async def apply_then_fail(*arguments: Any) -> Any:
        await original(*arguments)
        raise PointbookError(Reason.DATABASE_UNAVAILABLE, "gone", retry_after_seconds=1)

    with monkeypatch.context() as patch:
        patch.setattr(PointsServicer, "ApplyPointsUpdate", apply_then_fail)
        lost = await refused(replay(client, shop.merchant_id, quarantine_id, update))
    other = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))
    completed = await replay(client, shop.merchant_id, quarantine_id, update)

    assert lost.code is grpc.StatusCode.UNAVAILABLE
    assert other.reason == "EVENT_ID_REUSED"
    assert completed.points_update.outcome == points_pb2.APPLY_OUTCOME_DUPLICATE
    assert (await get_webhook(client, shop.merchant_id, quarantine_id)).state == REPLAYED
    assert (await client.account(shop.merchant_id, shop.store_id, "buyer")).points_balance == 20


async def test_refusal_releases_the_webhook_only_after_all_other_replays_ended(
    client: Client, shop: Shop, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    update = shop.update()
    is_running, may_continue = asyncio.Event(), asyncio.Event()
    original = PointsServicer.ApplyPointsUpdate

    async def slow(servicer: Any, request: Any, context: object) -> Any:
        if is_running.is_set():
            raise PointbookError(Reason.STORE_NOT_FOUND, "not yet", metadata={"store_id": shop.store_id})
        is_running.set()
        await may_continue.wait()
        return await original(servicer, request, context)

    with monkeypatch.context() as patch:
        patch.setattr(PointsServicer, "ApplyPointsUpdate", slow)
        first = asyncio.ensure_future(replay(client, shop.merchant_id, quarantine_id, update))
        await is_running.wait()
        assert (await refused(replay(client, shop.merchant_id, quarantine_id, update))).reason == "STORE_NOT_FOUND"
        other = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))
        first.cancel()
        service.clock.move(3_600)
        assert (await refused(replay(client, shop.merchant_id, quarantine_id, update))).reason == "STORE_NOT_FOUND"
    replayed = await replay(client, shop.merchant_id, quarantine_id, shop.update())

    assert other.reason == "EVENT_ID_REUSED"
    assert replayed.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED


async def test_last_of_concurrent_refused_replays_releases_the_webhook(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    other_update = shop.update(store_id=unique("store"))
    calls = [refused(replay(client, shop.merchant_id, quarantine_id, other_update)) for _ in range(20)]
    reasons = {found.reason for found in await asyncio.gather(*calls)}
    answer = await replay(client, shop.merchant_id, quarantine_id, shop.update())

    assert reasons == {"STORE_NOT_FOUND"}
    assert answer.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED


async def test_violations_of_a_replay_have_paths_of_its_request(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    update = shop.update(updated_value=-1, buyer_id="")

    found = await refused(replay(client, shop.merchant_id, quarantine_id, update))

    assert set(found.fields) == {"points_update.updated_value", "points_update.buyer_id"}
    assert "points_update.updated_value" in found.message


async def test_update_of_another_kind_is_refused(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id, topic=CUSTOMERS)
    points_id = await quarantine_webhook(client, shop.merchant_id, body=owned_body(shop, "points"))
    key: dict[str, Any] = {"merchant_id": shop.merchant_id, "quarantine_id": quarantine_id}

    async def refuse(**update: Any) -> Refusal:
        request = webhooks_pb2.ReplayQuarantinedWebhookRequest(**(key | update))
        return await refused(client.webhooks.ReplayQuarantinedWebhook(request))

    kind = await refused(replay(client, shop.merchant_id, quarantine_id, shop.update()))
    none = await refuse()
    customer = customers_pb2.ApplyCustomerUpdateRequest(event_id="e", merchant_id=shop.merchant_id)
    customer.kind = customers_pb2.CUSTOMER_UPDATE_KIND_REDACTED
    redaction = await refuse(customer_update=customer)
    of_points = await refuse(customer_update=customer, quarantine_id=points_id)
    customer.kind = customers_pb2.CUSTOMER_UPDATE_KIND_UPDATED
    empty = await refuse(customer_update=customer)

    assert set(kind.fields) == {"points_update"}
    assert set(none.fields) == {"points_update"}
    assert set(redaction.fields) == set(of_points.fields) == {"customer_update.kind"}
    assert set(empty.fields) == {f"customer_update.{name}" for name in ("store_id", "buyer_id", "updated_at")}


async def test_webhook_without_a_topic_can_be_replayed_as_any_kind(client: Client, shop: Shop) -> None:
    without_topic = {"topic": "", "reason": TOPIC_MISSING}
    points_id = await quarantine_webhook(client, shop.merchant_id, **without_topic)
    customer_id = await quarantine_webhook(client, shop.merchant_id, body=customer_body(), **without_topic)
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
    assert await list_all(client, shop.merchant_id) == []


async def test_unknown_foreign_or_dropped_webhook_is_not_found(client: Client, shop: Shop) -> None:
    quarantine_id = await quarantine_webhook(client, shop.merchant_id)
    other = unique("merchant")

    async def check(merchant_id: str) -> None:
        for call in (
            get_webhook(client, merchant_id, quarantine_id),
            replay(client, merchant_id, quarantine_id, shop.update()),
            drop(client, merchant_id, quarantine_id),
        ):
            found = await refused(call)
            assert (found.code, found.reason) == (grpc.StatusCode.NOT_FOUND, "WEBHOOK_NOT_FOUND")
            assert found.metadata == {"quarantine_id": quarantine_id}

    await check(other)
    await drop(client, shop.merchant_id, quarantine_id)
    await check(shop.merchant_id)


async def test_drop_is_logged_once_with_its_reason(client: Client, service: Service, shop: Shop) -> None:
    merchant, body = shop.merchant_id, owned_body(shop, "ada@example.com")
    quarantine_id = await quarantine_webhook(client, merchant, topic=CUSTOMERS, body=body)
    with structlog.testing.capture_logs() as logs:
        answers = await asyncio.gather(
            *(drop(client, merchant, quarantine_id, "a forged copy") for _ in range(5)), return_exceptions=True
        )
    [entry] = [entry for entry in logs if entry["event"].startswith("audit")]

    assert answers.count(None) == 1
    assert (entry["quarantine_id"], entry["merchant_id"]) == (quarantine_id, merchant)
    assert (entry["quarantine_reason"], entry["drop_reason"]) == ("MALFORMED", "a forged copy")
    assert "ada" not in str(logs)
    assert await read_usage(service, merchant) == (0, 0)


async def test_headers_and_bodies_are_never_logged(client: Client, shop: Shop) -> None:
    with structlog.testing.capture_logs() as logs:
        quarantine_id = await quarantine_webhook(
            client,
            shop.merchant_id,
            body=b"body-content",
            headers=[webhooks_pb2.WebhookHeader(name="x-header-name", value="header-content")],
        )
        await get_webhook(client, shop.merchant_id, quarantine_id)
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
async def test_invalid_field_is_named(client: Client, merchant: str, changes: dict[str, Any], field: str) -> None:
    found = await refused(client.webhooks.QuarantineWebhook(webhook(**{"merchant_id": merchant, **changes})))

    assert (found.code, list(found.fields)) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


async def test_values_at_the_limits_are_accepted(client: Client, merchant: str) -> None:
    headers = [webhooks_pb2.WebhookHeader(name="n" * 128, value="v" * 8_064)] * 4
    largest = await quarantine_webhook(
        client, merchant, topic="t" * 128, headers=headers, body=b"b" * 256 * 1024, detail="d" * 1_000
    )
    empty = await quarantine_webhook(client, merchant, headers=[], body=b"", detail="")

    assert (await get_webhook(client, merchant, largest)).body_size == 256 * 1024
    assert (await get_webhook(client, merchant, empty)).body == b""


async def test_drop_needs_a_reason_in_one_line(client: Client, merchant: str) -> None:
    quarantine_id = await quarantine_webhook(client, merchant)
    for reason in ("", "   ", "r" * 501, "two\nlines"):
        assert set((await refused(drop(client, merchant, quarantine_id, reason))).fields) == {"reason"}
    assert await get_webhook(client, merchant, quarantine_id)


async def test_replay_needs_a_token_for_both_merchants(service: Service, shop: Shop) -> None:
    header_merchant = unique("merchant")
    quarantine_id = await quarantine_webhook(service.client, header_merchant)
    scopes = [Scope.WEBHOOKS]
    for merchants, allowed in (
        ([header_merchant], False),
        ([shop.merchant_id], False),
        ([header_merchant, shop.merchant_id], True),
    ):
        client = Client(service.server.port, await make_token(service.database_url, merchants, scopes))
        call = replay(client, header_merchant, quarantine_id, shop.update())
        if allowed:
            assert (await call).points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
        else:
            assert (await refused(call)).reason == "MERCHANT_FORBIDDEN"
        await client.close()


async def test_webhooks_without_a_merchant_need_a_token_for_all_merchants(
    service: Service, client: Client, merchant: str
) -> None:
    body = secrets.token_bytes(16)
    quarantine_id = await quarantine_webhook(client, "", body=body)
    limited = Client(service.server.port, await make_token(service.database_url, [merchant], list(Scope)))

    assert (await get_webhook(client, "", quarantine_id)).body == body
    assert quarantine_id in {stored.quarantine_id for stored in await list_all(client, "")}
    assert (await refused(get_webhook(limited, "", quarantine_id))).reason == "MERCHANT_FORBIDDEN"
    assert (await refused(limited.webhooks.QuarantineWebhook(webhook("")))).reason == "MERCHANT_FORBIDDEN"
    await limited.close()


async def test_headers_without_a_key_are_stored_as_json(service: Service, admin_token: str, merchant: str) -> None:
    """An operator can read them with SQL alone."""
    async with running_server(service.database_url, admin_token, quarantine_keys={}) as (_, client):
        await quarantine_webhook(client, merchant)
        found = await read_row(service, merchant)

        assert json.loads(found["headers"])[0] == ["X-Shopline-Topic", POINTS]
        assert found["body"] == webhook(merchant).body


async def test_body_stored_before_the_first_key_is_not_stored_again(
    service: Service, client: Client, admin_token: str, merchant: str
) -> None:
    async with running_server(service.database_url, admin_token, quarantine_keys={}) as (_, other):
        first = await quarantine_webhook(other, merchant)

    again = await client.webhooks.QuarantineWebhook(webhook(merchant))

    assert (again.quarantine_id, again.already_quarantined) == (first, True)

"""Webhooks that cannot be applied, from HTTP to quarantine and replay.

Source: docs/reference/shopline-webhooks.md#quarantine
"""

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pointbook.v1 import points_pb2, webhooks_pb2
from pointbook_common.shopline_webhooks import POINTS_TOPIC
from pointbook_server.access.model import Scope
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.server import Server
from pointbook_server.webhooks import servicer as servicer_module
from shopline_shim import signature, translate
from shopline_shim import webhooks_endpoint as endpoint_module
from support.clients import Client
from support.clocks import NOW_MS, TestClock
from support.examples import examples
from support.json_logs import json_logs
from support.outbox import Outbox
from support.servers import Service, server_settings
from support.shims import (
    APPLIED,
    DUPLICATE,
    PATH,
    QUARANTINED,
    SECRET,
    WebhookSender,
    points_body,
    webhook_headers,
    webhook_sender,
)
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique


@asynccontextmanager
async def sender_with_small_quarantine(
    service: Service, admin_token: str, webhooks_max: int
) -> AsyncIterator[WebhookSender]:
    """Run a shim in front of a server whose quarantine accepts a few webhooks only."""
    outbox = Outbox()
    settings = server_settings(quarantine_webhooks_max=webhooks_max)
    server = Server(settings, service.database_url, senders={Channel.SMS: outbox}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    async with webhook_sender(server.port, admin_token, client) as sender:
        yield sender
    await client.close()
    await server.stop()


async def test_webhook_of_an_unknown_store_is_replayed_after_its_registration(sender: WebhookSender) -> None:
    shop = Shop(unique("merchant"), unique("store"))

    assert await sender.send(shop, POINTS_TOPIC, points_body(shop)) == QUARANTINED
    assert await sender.send(shop, POINTS_TOPIC, points_body(shop)) == QUARANTINED
    [webhook] = await sender.quarantined(shop.merchant_id)
    assert (webhook.receive_count, await sender.quarantine_reason(shop.merchant_id)) == (1, "STORE_UNKNOWN")

    await sender.client.put_store(shop.merchant_id, shop.store_id)
    update = translate.points_update({header.name: header.value for header in webhook.headers}, webhook.body)
    request = webhooks_pb2.ReplayQuarantinedWebhookRequest(points_update=update)
    request.merchant_id, request.quarantine_id = shop.merchant_id, webhook.quarantine_id
    response = await sender.client.webhooks.ReplayQuarantinedWebhook(request)

    assert response.points_update.outcome == points_pb2.APPLY_OUTCOME_APPLIED
    assert await sender.send(shop, POINTS_TOPIC, points_body(shop)) == DUPLICATE
    assert (await sender.client.account(shop.merchant_id, shop.store_id, "2404721679")).points_balance == 20
    assert await sender.quarantined(shop.merchant_id) == []


@pytest.mark.parametrize(
    ("reason", "changes", "headers"),
    [
        ("MALFORMED", {"updated_value": "x"}, {}),
        ("OUT_OF_BOUNDS", {"updated_at": NOW_MS * 2}, {}),
        ("OUT_OF_BOUNDS", {"updated_value": 2**63 - 1}, {}),
        ("SHOP_ID_MISMATCH", {}, {"x_shopline_shop_id": "1"}),
    ],
)
async def test_webhook_is_quarantined_with_its_reason(
    sender: WebhookSender, shop: Shop, reason: str, changes: dict[str, Any], headers: dict[str, str]
) -> None:
    assert await sender.send(shop, POINTS_TOPIC, points_body(shop, **changes), **headers) == QUARANTINED
    assert await sender.quarantine_reason(shop.merchant_id) == reason


@pytest.mark.parametrize("field", ["points_expiry_time", "updated_at"])
@pytest.mark.parametrize("value", [-(2**63), -1, "-1", 1, 1_798_761_600, 946_684_799_999, 2**63 - 1])
async def test_time_that_is_not_in_milliseconds_is_out_of_bounds(
    sender: WebhookSender, shop: Shop, field: str, value: object
) -> None:
    assert await sender.send(shop, POINTS_TOPIC, points_body(shop, **{field: value})) == QUARANTINED

    [webhook] = await sender.quarantined(shop.merchant_id)
    assert await sender.quarantine_reason(shop.merchant_id) == "OUT_OF_BOUNDS"
    assert webhook.detail.startswith(f"{field} must be")
    assert "milliseconds" in webhook.detail


async def test_body_with_more_than_wrong_times_is_malformed(sender: WebhookSender, shop: Shop) -> None:
    assert (
        await sender.send(shop, POINTS_TOPIC, points_body(shop, points_expiry_time=-1, updated_value="x"))
        == QUARANTINED
    )
    assert await sender.quarantine_reason(shop.merchant_id) == "MALFORMED"


async def test_event_with_other_content_under_its_id_is_quarantined(sender: WebhookSender, shop: Shop) -> None:
    raw_body = points_body(shop)
    update = translate.points_update(webhook_headers(shop, POINTS_TOPIC, raw_body), raw_body)
    update.updated_value = 5
    await sender.client.apply(update)

    assert await sender.send(shop, POINTS_TOPIC, raw_body) == QUARANTINED
    assert await sender.quarantine_reason(shop.merchant_id) == "EVENT_ID_REUSED"


async def test_signed_garbage_of_the_maximum_size_is_stored_whole(sender: WebhookSender, shop: Shop) -> None:
    garbage = secrets.token_bytes(256 * 1024)

    assert await sender.send(shop, POINTS_TOPIC, garbage) == QUARANTINED
    [webhook] = await sender.quarantined(shop.merchant_id)
    assert webhook.body == garbage


async def test_many_unsigned_headers_do_not_prevent_the_quarantine(sender: WebhookSender, shop: Shop) -> None:
    raw_body = b"not JSON of " + shop.store_id.encode()
    flood = {f"a_{number}": "x" * 400 for number in range(90)}

    assert await sender.send(shop, POINTS_TOPIC, raw_body, **flood) == QUARANTINED
    [webhook] = await sender.quarantined(shop.merchant_id)
    headers = {header.name: header.value for header in webhook.headers}
    assert headers == {
        name: value for name, value in webhook_headers(shop, POINTS_TOPIC, raw_body).items() if "hmac" not in name
    }


async def test_full_quarantine_is_503_until_a_webhook_is_dropped(
    service: Service, admin_token: str, shop: Shop
) -> None:
    malformed = [points_body(shop, updated_value=f"x{number}") for number in range(3)]
    async with sender_with_small_quarantine(service, admin_token, webhooks_max=2) as sender:
        assert await sender.send(shop, POINTS_TOPIC, malformed[0]) == QUARANTINED
        assert await sender.send(shop, POINTS_TOPIC, malformed[1]) == QUARANTINED
        assert (await sender.send(shop, POINTS_TOPIC, malformed[2]))[0] == 503
        assert await sender.send(shop, POINTS_TOPIC, malformed[0]) == QUARANTINED
        assert await sender.send(shop, POINTS_TOPIC, points_body(shop)) == APPLIED
        [oldest, _] = await sender.quarantined(shop.merchant_id)
        await sender.client.webhooks.DropQuarantinedWebhook(
            webhooks_pb2.DropQuarantinedWebhookRequest(
                merchant_id=shop.merchant_id, quarantine_id=oldest.quarantine_id, reason="test"
            )
        )
        assert await sender.send(shop, POINTS_TOPIC, malformed[2]) == QUARANTINED


async def test_quarantine_without_the_scope_is_503(service: Service, shop: Shop) -> None:
    """SHOPLINE retries until the token has the scope."""
    scopes = [Scope.POINTS_WRITE]
    token = await make_token(service.database_url, [shop.merchant_id], scopes)
    token_with_both = await make_token(service.database_url, [shop.merchant_id], [*scopes, Scope.WEBHOOKS])
    async with webhook_sender(service.server.port, token, service.client) as sender:
        assert await sender.send(shop, POINTS_TOPIC, points_body(shop)) == APPLIED
        assert (await sender.send(shop, POINTS_TOPIC, b"not JSON"))[0] == 503
    async with webhook_sender(service.server.port, token_with_both, service.client) as sender:
        assert await sender.send(shop, POINTS_TOPIC, b"not JSON") == QUARANTINED
        assert (await sender.send(shop, POINTS_TOPIC, b"not JSON", x_shopline_merchant_id=""))[0] == 503


async def test_parallel_deliveries_are_quarantined_once(sender: WebhookSender, shop: Shop) -> None:
    responses = await asyncio.gather(
        *(sender.send(shop, POINTS_TOPIC, b"not JSON of " + shop.store_id.encode()) for _ in range(40))
    )
    [webhook] = await sender.quarantined(shop.merchant_id)

    assert responses == [QUARANTINED] * 40
    assert webhook.receive_count == 1


async def test_content_of_a_body_is_not_logged(sender: WebhookSender, shop: Shop) -> None:
    bodies = [
        b"private not JSON",
        points_body(shop, buyer_id="private buyer"),
        points_body(shop, buyer_id="private-buyer", updated_at=NOW_MS * 2),
        points_body(Shop(shop.merchant_id, "private-store"), buyer_id="private-buyer"),
        points_body(shop, buyer_id="private-buyer", updated_scene="PRIVATE private"),
    ]
    with json_logs(endpoint_module, handlers_module, servicer_module) as written:
        responses = [await sender.send(shop, POINTS_TOPIC, raw_body, x_other="private header") for raw_body in bodies]

    assert [response for response in responses if response != QUARANTINED] == []
    assert "webhook quarantined" in written.getvalue()
    assert "private" not in written.getvalue().lower()
    assert SECRET not in written.getvalue()


async def test_log_has_the_merchant_and_id_of_a_quarantined_webhook(sender: WebhookSender) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    with json_logs(endpoint_module) as written:
        assert await sender.send(shop, POINTS_TOPIC, b"not JSON of " + shop.store_id.encode()) == QUARANTINED
    [entry] = [line for line in map(json.loads, written.getvalue().splitlines()) if line["level"] == "warning"]
    [webhook] = await sender.quarantined(shop.merchant_id)

    assert (entry["merchant_id"], entry["quarantine_id"]) == (shop.merchant_id, webhook.quarantine_id)


def random_body(generator: random.Random, shop: Shop) -> bytes:
    """Return a body with changed fields or bytes, or truncated, or random bytes."""
    values: list[Callable[[], Any]] = [
        lambda: None,
        lambda: generator.randint(-(2**70), 2**70),
        lambda: generator.randint(0, 1_000),
        lambda: generator.choice([True, [], {}, [{"a": [1]}], 0.5, float("nan"), 1e300]),
        lambda: "".join(chr(generator.randrange(0x11000)) for _ in range(generator.randrange(9))),
        lambda: generator.choice(["INCREASE", "decrease", "1e999999999", "", "\0", "9" * 5_000, str(NOW_MS)]),
    ]
    names = ["buyer_id", "points_balance", "store_id", "update_type", "updated_at", "updated_scene", "updated_value"]
    changes = {name: generator.choice(values)() for name in generator.sample(names, generator.randrange(4))}
    raw_body = bytearray(points_body(shop, **({"buyer_id": str(generator.randrange(10**9))} | changes)))
    kind = generator.randrange(5)
    if kind == 0:
        return generator.randbytes(generator.randrange(300))
    if kind == 1:
        raw_body[generator.randrange(len(raw_body))] = generator.randrange(256)
    if kind == 2:
        del raw_body[generator.randrange(len(raw_body)) :]
    return bytes(raw_body)


async def test_random_signed_bodies_are_applied_or_quarantined(sender: WebhookSender, shop: Shop) -> None:
    generator = random.Random(20250601)  # noqa: S311 - repeatable
    count = examples(1_000)
    bodies = iter([random_body(generator, shop) for _ in range(count)])
    outcomes: dict[str, int] = {}

    async def deliver() -> None:
        for raw_body in bodies:
            status, response = await sender.send(shop, POINTS_TOPIC, raw_body)
            assert status == 200, (response, raw_body)
            outcome = response["outcome"]
            outcomes[outcome] = outcomes.get(outcome, 0) + 1

    with json_logs(endpoint_module, handlers_module, servicer_module) as written:
        await asyncio.gather(*(deliver() for _ in range(16)))
    entries = [json.loads(line) for line in written.getvalue().splitlines()]

    assert outcomes["APPLIED"] > 0.05 * count
    assert outcomes["QUARANTINED"] > 0.5 * count
    assert entries
    assert [entry for entry in entries if entry["level"] in {"error", "critical"} or "exception" in entry] == []


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


async def test_byte_order_mark_is_signed_but_does_not_change_the_event(sender: WebhookSender, shop: Shop) -> None:
    assert await sender.send(shop, POINTS_TOPIC, BYTE_ORDER_MARK + points_body(shop)) == APPLIED
    assert await sender.send(shop, POINTS_TOPIC, points_body(shop)) == DUPLICATE
    assert await sender.send(shop, POINTS_TOPIC, BYTE_ORDER_MARK + b"\r\n" + points_body(shop)) == DUPLICATE
    unsigned = await sender.send(
        shop,
        POINTS_TOPIC,
        BYTE_ORDER_MARK + points_body(shop),
        x_shopline_hmac_sha256=signature.sign(SECRET, points_body(shop)),
    )

    assert unsigned[0] == 401
    assert await sender.quarantined(shop.merchant_id) == []


@pytest.mark.parametrize(
    "topics", [[], [""], [","], [POINTS_TOPIC, "customers/update"], [f"{POINTS_TOPIC},customers/redact"]]
)
async def test_webhook_without_exactly_one_topic_is_quarantined(
    sender: WebhookSender, shop: Shop, topics: list[str]
) -> None:
    raw_body = points_body(shop)
    headers = [
        (name, value)
        for name, value in webhook_headers(shop, POINTS_TOPIC, raw_body).items()
        if name != "x-shopline-topic"
    ]
    headers += [("x-shopline-topic", value) for value in topics]
    response = await sender.http.post(PATH, content=raw_body, headers=headers)

    assert (response.status_code, response.json()) == QUARANTINED
    [webhook] = await sender.quarantined(shop.merchant_id)
    assert (webhook.topic, await sender.quarantine_reason(shop.merchant_id)) == ("", "TOPIC_MISSING")
    assert not (await sender.client.account(shop.merchant_id, shop.store_id, "2404721679")).points_balance


@pytest.mark.parametrize(
    "topics",
    [[POINTS_TOPIC, POINTS_TOPIC], [f"{POINTS_TOPIC}, {POINTS_TOPIC}"], [f"{POINTS_TOPIC} ,"], ["", POINTS_TOPIC]],
)
async def test_repeated_equal_topics_are_one(sender: WebhookSender, shop: Shop, topics: list[str]) -> None:
    raw_body = points_body(shop)
    headers = [
        (name, value)
        for name, value in webhook_headers(shop, POINTS_TOPIC, raw_body).items()
        if name != "x-shopline-topic"
    ]
    headers += [("x-shopline-topic", value) for value in topics]
    response = await sender.http.post(PATH, content=raw_body, headers=headers)

    assert (response.status_code, response.json()) == APPLIED


async def test_unsigned_body_without_a_topic_is_401(sender: WebhookSender, shop: Shop) -> None:
    assert (await sender.send(shop, POINTS_TOPIC, b"x", x_shopline_topic="", x_shopline_hmac_sha256="0" * 64))[0] == 401
    assert await sender.quarantined(shop.merchant_id) == []


async def test_body_without_a_topic_is_503_if_the_quarantine_has_no_key(
    service: Service, admin_token: str, shop: Shop
) -> None:
    """It may have personal data, which is never stored unencrypted. SHOPLINE retries."""
    settings = server_settings(quarantine_keys={})
    server = Server(settings, service.database_url, senders={}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    async with webhook_sender(server.port, admin_token, client) as sender:
        with json_logs(endpoint_module) as written:
            assert (await sender.send(shop, POINTS_TOPIC, points_body(shop), x_shopline_topic=""))[0] == 503
        assert '"cause": "KEY_NOT_CONFIGURED"' in written.getvalue()
        assert await sender.quarantined(shop.merchant_id) == []
        assert await sender.send(shop, POINTS_TOPIC, b"not JSON") == QUARANTINED
    await client.close()
    await server.stop()

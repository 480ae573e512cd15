"""SHOPLINE's customer webhooks, from HTTP to the customer or the quarantine.

Source: docs/reference/shopline-webhooks.md#customer-webhooks
"""

import asyncio
import json
from itertools import permutations
from typing import Any

import asyncpg
import grpc
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, webhooks_pb2
from pointbook_cli.quarantine_client import translate_again
from pointbook_server.customers import servicer as customers_module
from pointbook_server.programs.model import Channel
from pointbook_server.rpc import method_handlers as handlers_module
from pointbook_server.server import Server
from pointbook_server.webhooks import servicer as webhooks_module
from shopline_shim import signature
from shopline_shim import webhooks_endpoint as endpoint_module
from support.clients import Client
from support.clocks import NOW_MS, TestClock
from support.json_logs import json_logs
from support.outbox import Outbox
from support.servers import Service, server_settings
from support.shims import APPLIED, DUPLICATE, QUARANTINED, WebhookSender, webhook_sender
from support.shops import Shop
from support.unique_names import unique

NUMBER = "+8613800000000"


async def get_customer(sender: WebhookSender, shop: Shop, buyer_id: str = "17") -> customers_pb2.Customer:
    """Return the customer of a buyer."""
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id=buyer_id)
    request = customers_pb2.GetCustomerRequest(
        merchant_id=shop.merchant_id, customer=identity_pb2.CustomerRef(buyer=buyer)
    )
    return (await sender.client.customers.GetCustomer(request)).customer


def body(**changes: Any) -> dict[str, Any]:
    """Return the body of a webhook that creates, updates or deletes."""
    values = {"id": "17", "email": "Ada@Example.com", "phone": NUMBER, "updated_at": "2026-05-01T08:00:00+08:00"}
    return values | changes


def redaction(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Return the body of a redaction."""
    customer = {"id": "17", "email": "Ada@Example.com", "phone": NUMBER}
    return {"customer": customer, "shop_id": shop.store_id, "update_time": "2026-05-02T08:00:00+08:00"} | changes


async def test_customer_is_created_updated_deleted_restored_and_redacted_by_webhooks(
    sender: WebhookSender, shop: Shop
) -> None:
    assert await sender.send(shop, "customers/create", body()) == APPLIED
    assert await sender.send(shop, "customers/create", body()) == DUPLICATE
    created = await get_customer(sender, shop)
    assert (created.mobile, created.email) == (NUMBER, "Ada@Example.com")

    assert (
        await sender.send(
            shop, "customers/update", body(phone="008613900000000", updated_at="2026-05-01T09:00:00+08:00")
        )
        == APPLIED
    )
    assert (await get_customer(sender, shop)).mobile == "+8613900000000"
    assert await sender.send(shop, "customers/update", body(updated_at="2026-05-01T08:30:00+08:00")) == (
        200,
        {"outcome": "OUTDATED"},
    )
    assert await sender.send(shop, "customers/delete", body(updated_at="2026-05-01T10:00:00+08:00")) == APPLIED
    assert (await get_customer(sender, shop)).mobile == ""
    assert await sender.send(shop, "customers/update", body(updated_at="2026-05-01T11:00:00+08:00")) == APPLIED
    assert (await get_customer(sender, shop)).mobile == NUMBER
    assert await sender.send(shop, "customers/redact", redaction(shop)) == APPLIED
    assert await sender.send(shop, "customers/update", body(updated_at="2026-05-01T12:00:00+08:00")) == (
        200,
        {"outcome": "REDACTED"},
    )

    redacted = await get_customer(sender, shop)
    assert (redacted.customer_id, redacted.mobile, redacted.email) == (created.customer_id, "", "")
    assert await sender.quarantined(shop.merchant_id) == []


@pytest.mark.parametrize(
    ("phone", "expected"),
    [
        ("\u202a0085291236001\u202c", "+85291236001"),
        ("\uff10\uff10\uff18\uff15\uff12\u3000\uff19\uff11\uff12\uff13\uff0d6001", "+85291236001"),
        ("\u200e+852\u00a09123\u20116001", "+85291236001"),
        ("005215512345678", "+525512345678"),
        ("005491123456789", "+5491123456789"),
    ],
)
async def test_pasted_phone_number_is_normalized(sender: WebhookSender, shop: Shop, phone: str, expected: str) -> None:
    assert await sender.send(shop, "customers/create", body(phone=phone)) == APPLIED
    assert (await get_customer(sender, shop)).mobile == expected


async def test_skipped_identifiers_are_counted_by_type_and_cause(sender: WebhookSender, shop: Shop) -> None:
    await sender.client.put_customer(shop.merchant_id, "other", email="ada@example.com")
    assert await sender.send(shop, "customers/update", body(phone="13800000000")) == APPLIED

    metrics = (await sender.http.get("/metrics")).text
    assert 'pointbook_customer_identifiers_skipped_total{cause="taken",type="email"} 1.0' in metrics
    assert 'pointbook_customer_identifiers_skipped_total{cause="invalid",type="mobile"} 1.0' in metrics
    assert 'pointbook_webhooks_total{outcome="applied",topic="customers/update"}' in metrics


@pytest.mark.parametrize(
    ("topic", "changes", "reason"),
    [
        ("customers/update", {"id": None}, "MALFORMED"),
        ("customers/update", {"customer": {"id": "17"}, "id": None}, "MALFORMED"),
        ("customers/redact", {}, "MALFORMED"),
        ("customers/create", {"updated_at": "2026-05-01"}, "MALFORMED"),
        ("customers/update", {"updated_at": "2031-05-01T08:00:00Z"}, "OUT_OF_BOUNDS"),
    ],
)
async def test_webhook_that_cannot_be_applied_is_quarantined_without_values_in_the_detail(
    sender: WebhookSender, shop: Shop, topic: str, changes: dict[str, Any], reason: str
) -> None:
    assert await sender.send(shop, topic, body(**changes)) == QUARANTINED
    [webhook] = await sender.quarantined(shop.merchant_id)

    assert (await sender.quarantine_reason(shop.merchant_id), webhook.topic) == (reason, topic)
    assert json.loads(webhook.body) == body(**changes)
    assert "Ada" not in webhook.detail


async def test_store_of_another_merchant_or_another_shop_header_is_quarantined(
    sender: WebhookSender, shop: Shop
) -> None:
    other = Shop(unique("merchant"), shop.store_id)
    assert await sender.send(other, "customers/update", body(id=unique("id"))) == QUARANTINED
    assert await sender.quarantine_reason(other.merchant_id) == "MERCHANT_MISMATCH"
    assert await sender.send(shop, "customers/redact", redaction(shop), x_shopline_shop_id="elsewhere") == QUARANTINED
    assert await sender.quarantine_reason(shop.merchant_id) == "SHOP_ID_MISMATCH"


async def test_unregistered_store_of_the_header_is_quarantined(sender: WebhookSender, shop: Shop) -> None:
    assert (
        await sender.send(shop, "customers/update", body(id=unique("id")), x_shopline_shop_id=unique("store"))
        == QUARANTINED
    )
    assert await sender.quarantine_reason(shop.merchant_id) == "STORE_UNKNOWN"


async def test_quarantined_webhook_is_replayed_once(sender: WebhookSender) -> None:
    unregistered = Shop(unique("merchant"), unique("store"))
    assert await sender.send(unregistered, "customers/update", body(note=unregistered.store_id)) == QUARANTINED
    assert await sender.send(unregistered, "customers/redact", redaction(unregistered)) == QUARANTINED
    await sender.client.put_store(unregistered.merchant_id, unregistered.store_id)
    replayed = []
    for webhook in sorted(
        await sender.quarantined(unregistered.merchant_id), key=lambda webhook: webhook.topic, reverse=True
    ):
        request = translate_again(webhook)
        request.merchant_id, request.quarantine_id = unregistered.merchant_id, webhook.quarantine_id
        for _ in range(2):
            response = await sender.client.webhooks.ReplayQuarantinedWebhook(request)
            replayed.append(customers_pb2.CustomerUpdateOutcome.Name(response.customer_update.outcome))

    assert [name.removeprefix("CUSTOMER_UPDATE_OUTCOME_") for name in replayed] == ["APPLIED", "DUPLICATE"] * 2
    assert await sender.quarantined(unregistered.merchant_id) == []
    assert (await get_customer(sender, unregistered)).mobile == ""


CONTACTS = {"phone": "0085291236001", "email": "ada@example.com"}
INVALID_CONTACTS = {"phone": "0085 0000", "email": "ada at example.com"}
RELEASED_CONTACT_WEBHOOKS = [
    ("customers/create", {"id": "a", **CONTACTS, "updated_at": "2026-05-01T08:00:00+08:00"}),
    ("customers/update", {"id": "a", **INVALID_CONTACTS, "updated_at": "2026-05-01T09:00:00+08:00"}),
    ("customers/create", {"id": "b", **CONTACTS, "updated_at": "2026-05-01T10:00:00+08:00"}),
]
"""Webhooks of a customer who releases a phone number and email address, and of the next customer with them."""


@pytest.mark.parametrize("arrival", list(permutations(RELEASED_CONTACT_WEBHOOKS)))
async def test_released_contact_goes_to_the_next_customer_in_every_order_of_arrival(
    sender: WebhookSender, shop: Shop, arrival: Any
) -> None:
    for topic, changes in arrival:
        status, _ = await sender.send(shop, topic, body(**changes))
        assert status == 200

    first, second = await get_customer(sender, shop, "a"), await get_customer(sender, shop, "b")
    assert (first.mobile, first.email) == ("", "")
    assert (second.mobile, second.email) == ("+85291236001", "ada@example.com")


@pytest.mark.parametrize("arrival", list(permutations(RELEASED_CONTACT_WEBHOOKS)))
async def test_released_contact_goes_to_the_next_customer_in_every_order_of_replay(
    sender: WebhookSender, arrival: Any
) -> None:
    unregistered = Shop(unique("merchant"), unique("store"))
    webhooks_by_id: dict[str, webhooks_pb2.QuarantinedWebhook] = {}
    for topic, changes in arrival:
        assert await sender.send(unregistered, topic, body(**changes, note=unregistered.store_id)) == QUARANTINED
        [new] = [
            webhook
            for webhook in await sender.quarantined(unregistered.merchant_id)
            if webhook.quarantine_id not in webhooks_by_id
        ]
        webhooks_by_id[new.quarantine_id] = new
    await sender.client.put_store(unregistered.merchant_id, unregistered.store_id)
    for webhook in webhooks_by_id.values():
        request = translate_again(webhook, "")
        request.merchant_id, request.quarantine_id = unregistered.merchant_id, webhook.quarantine_id
        await sender.client.webhooks.ReplayQuarantinedWebhook(request)

    first, second = await get_customer(sender, unregistered, "a"), await get_customer(sender, unregistered, "b")
    assert (first.mobile, first.email) == ("", "")
    assert (second.mobile, second.email) == ("+85291236001", "ada@example.com")


async def test_wrongly_signed_redaction_erases_nothing(sender: WebhookSender, shop: Shop) -> None:
    await sender.send(shop, "customers/update", body())
    raw_body = json.dumps(redaction(shop)).encode()

    status, _ = await sender.send(
        shop, "customers/redact", raw_body, x_shopline_hmac_sha256=signature.sign("other", raw_body)
    )

    assert status == 401
    assert (await get_customer(sender, shop)).mobile == NUMBER
    assert await sender.quarantined(shop.merchant_id) == []


async def test_parallel_deliveries_are_applied_once(sender: WebhookSender, shop: Shop) -> None:
    responses = await asyncio.gather(*(sender.send(shop, "customers/create", body()) for _ in range(30)))

    outcomes = sorted(response["outcome"] for _, response in responses)
    assert outcomes == ["APPLIED"] + ["DUPLICATE"] * 29


async def test_redaction_is_503_while_the_server_has_no_code_key(
    service: Service, admin_token: str, shop: Shop
) -> None:
    settings = server_settings(code_keys={})
    server = Server(settings, service.database_url, senders={Channel.SMS: Outbox()}, clock=TestClock())
    await server.start()
    client = Client(server.port, admin_token)
    async with webhook_sender(server.port, admin_token, client) as sender:
        assert await sender.send(shop, "customers/update", body()) == APPLIED
        assert (await sender.send(shop, "customers/redact", redaction(shop)))[0] == 503
        assert (await get_customer(sender, shop)).mobile == NUMBER
        assert await sender.quarantined(shop.merchant_id) == []
    await client.close()
    await server.stop()


async def test_personal_data_is_not_logged(sender: WebhookSender, shop: Shop) -> None:
    private = {"email": "private@example.com", "phone": "+8613812345678"}
    await sender.client.put_customer(shop.merchant_id, "other", email="private@example.com")
    with json_logs(endpoint_module, handlers_module, customers_module, webhooks_module) as written:
        for topic, sent_body in (
            ("customers/create", body(**private)),
            ("customers/update", body(id="private id", **private)),
            ("customers/redact", body(**private)),
            ("customers/update", body(updated_at="private", **private)),
            ("customers/delete", body(updated_at="2031-05-01T08:00:00Z", **private)),
            ("customers/update", body(id="19", **(private | {"phone": "private"}))),
            ("customers/redact", redaction(shop, customer={"id": "17", **private})),
        ):
            status, _ = await sender.send(shop, topic, sent_body)
            assert status == 200

    assert "private" not in written.getvalue()
    assert "13812345678" not in written.getvalue()


async def test_times_in_the_bodies_are_before_the_test_clock(service: Service) -> None:
    connection = await asyncpg.connect(service.database_url)
    newest = await connection.fetchval("SELECT max(updated_at_ms) FROM customer_updates")
    await connection.close()

    assert 0 < newest < NOW_MS


async def test_byte_order_mark_does_not_change_the_event(sender: WebhookSender, shop: Shop) -> None:
    raw_bodies = [json.dumps(sent_body).encode() for sent_body in (body(), redaction(shop))]

    assert await sender.send(shop, "customers/create", b"\xef\xbb\xbf" + raw_bodies[0]) == APPLIED
    assert await sender.send(shop, "customers/create", raw_bodies[0]) == DUPLICATE
    assert await sender.send(shop, "customers/redact", b"\xef\xbb\xbf" + raw_bodies[1]) == APPLIED
    assert (await get_customer(sender, shop)).mobile == ""


async def test_redaction_erases_quarantined_bodies_with_a_byte_order_mark_or_without_a_topic(
    sender: WebhookSender, shop: Shop
) -> None:
    marked = b"\xef\xbb\xbf" + json.dumps(body(updated_at="unreadable", note=shop.store_id)).encode()
    assert await sender.send(shop, "customers/update", marked) == QUARANTINED
    assert await sender.send(shop, "customers/update", body(note=shop.store_id), x_shopline_topic="") == QUARANTINED
    assert await sender.send(shop, "customers/redact", redaction(shop)) == APPLIED

    assert [webhook.body_erased for webhook in await sender.quarantined(shop.merchant_id)] == [True, True]


async def replay_only(sender: WebhookSender, shop: Shop, *, override: bool = False) -> str:
    """Replay a merchant's only quarantined webhook, and return the outcome."""
    [webhook] = await sender.quarantined(shop.merchant_id)
    request = translate_again(webhook)
    request.merchant_id, request.quarantine_id = shop.merchant_id, webhook.quarantine_id
    request.overrides_contradiction = override
    response = await sender.client.webhooks.ReplayQuarantinedWebhook(request)
    outcome = customers_pb2.CustomerUpdateOutcome.Name(response.customer_update.outcome)
    return outcome.removeprefix("CUSTOMER_UPDATE_OUTCOME_")


@pytest.mark.parametrize("genuine", ["customers/update", "customers/create"])
async def test_captured_update_replayed_as_a_deletion_is_quarantined(
    sender: WebhookSender, shop: Shop, genuine: str
) -> None:
    """The topic is not signed, so an attacker can send a copy with another one."""
    raw_body = body(note=shop.store_id)
    assert await sender.send(shop, genuine, raw_body) == APPLIED
    for _ in range(3):
        assert await sender.send(shop, "customers/delete", raw_body) == QUARANTINED

    assert await sender.quarantine_reason(shop.merchant_id) == "EVENT_ID_REUSED"
    assert (await get_customer(sender, shop)).mobile
    with pytest.raises(grpc.aio.AioRpcError, match="first one stays"):
        await replay_only(sender, shop)


async def test_operator_can_override_a_forged_deletion(sender: WebhookSender, shop: Shop) -> None:
    """Later copies do not undo the operator's decision."""
    older = body(note=shop.store_id, updated_at="2026-05-01T07:00:00+08:00")
    raw_body = body(note=shop.store_id)
    assert await sender.send(shop, "customers/update", older) == APPLIED
    assert await sender.send(shop, "customers/delete", raw_body) == APPLIED
    assert (await get_customer(sender, shop)).mobile == ""
    assert await sender.send(shop, "customers/update", raw_body) == QUARANTINED
    assert await sender.quarantine_reason(shop.merchant_id) == "EVENT_ID_REUSED"

    assert await replay_only(sender, shop, override=True) == "APPLIED"
    restored = await get_customer(sender, shop)
    assert restored.mobile
    assert (await sender.send(shop, "customers/delete", raw_body))[1] == {"outcome": "DUPLICATE"}
    assert await get_customer(sender, shop) == restored


@pytest.mark.parametrize("topic", ["customers/create", "customers/update", "customers/delete", "customers/redact"])
@pytest.mark.parametrize("knows_merchant", [True, False])
async def test_captured_body_creates_nothing_for_another_merchant(
    sender: WebhookSender, service: Service, shop: Shop, topic: str, *, knows_merchant: bool
) -> None:
    attacker_id = unique("merchant")
    if knows_merchant:
        await sender.client.put_store(attacker_id, unique("store"))
    raw_body = redaction(shop) if topic == "customers/redact" else body(note=shop.store_id)
    assert await sender.send(Shop(attacker_id, shop.store_id), topic, raw_body) == QUARANTINED
    assert await sender.quarantine_reason(attacker_id) == "MERCHANT_MISMATCH"
    other_body = body(note=attacker_id)
    assert await sender.send(Shop(attacker_id, unique("store")), "customers/update", other_body) == QUARANTINED

    connection = await asyncpg.connect(service.database_url)
    for table in ("customers", "customer_buyers", "customer_updates", "customer_identifiers", "customer_tombstones"):
        query = f"SELECT count(*) FROM {table} WHERE merchant_id = $1"  # noqa: S608 - constant names
        assert await connection.fetchval(query, attacker_id) == 0
    await connection.close()

"""SHOPLINE's `merchants/redact`, from HTTP to a stored request or quarantine.

Source: docs/reference/shopline-webhooks.md#merchants-redact
"""

import json
from typing import Any

import pytest

from pointbook.v1 import customers_pb2, identity_pb2, programs_pb2, webhooks_pb2
from pointbook_cli.quarantine_client import translate_again
from shopline_shim.translate import STORE_ERASURE_TOPIC
from support.clients import Client
from support.clocks import NOW_MS
from support.shims import QUARANTINED, WebhookSender
from support.shops import Shop
from support.unique_names import unique

REQUESTED = (200, {"outcome": "REQUESTED"})
ALREADY_REQUESTED = (200, {"outcome": "ALREADY_REQUESTED"})


async def requested_stores(sender: WebhookSender, merchant_id: str) -> list[str]:
    """Return the stores for which a merchant has erasure requests."""
    request = programs_pb2.ListStoreErasuresRequest(merchant_id=merchant_id)
    return [erasure.store_id for erasure in (await sender.client.programs.ListStoreErasures(request)).erasures]


async def only_quarantined(sender: WebhookSender, merchant_id: str) -> webhooks_pb2.QuarantinedWebhook:
    """Return a merchant's only quarantined webhook."""
    [webhook] = await sender.quarantined(merchant_id)
    return webhook


async def replay(sender: WebhookSender, merchant_id: str, as_merchant: str = "", as_topic: str = "") -> str:
    """Replay a merchant's only quarantined webhook, and return the outcome."""
    webhook = await only_quarantined(sender, merchant_id)
    request = translate_again(webhook, as_merchant, as_topic)
    request.merchant_id, request.quarantine_id = merchant_id, webhook.quarantine_id
    response = await sender.client.webhooks.ReplayQuarantinedWebhook(request)
    outcome = programs_pb2.StoreErasureOutcome.Name(response.store_erasure.outcome)
    return outcome.removeprefix("STORE_ERASURE_OUTCOME_")


def body(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Return the body of a request to erase a store."""
    values = {
        "store_id": shop.store_id,
        "store_domain": "example.myshopline.com",
        "update_time": "2026-05-02T08:00:00+08:00",
    }
    return values | changes


async def test_request_is_stored_once_and_erases_nothing_by_itself(sender: WebhookSender, shop: Shop) -> None:
    """The topic is not signed, so an operator approves the request."""
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id="17")
    await sender.client.put_customer(shop.merchant_id, "alice", email=f"{unique('a')}@example.com", buyers=[buyer])

    assert await sender.send(shop, STORE_ERASURE_TOPIC, body(shop)) == REQUESTED
    assert await sender.send(shop, STORE_ERASURE_TOPIC, body(shop)) == ALREADY_REQUESTED
    assert (
        await sender.send(shop, STORE_ERASURE_TOPIC, body(shop, update_time="2026-05-03T08:00:00Z"))
        == ALREADY_REQUESTED
    )
    assert await requested_stores(sender, shop.merchant_id) == [shop.store_id]
    alice = await sender.client.customers.GetCustomer(
        customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer_id="alice")
    )
    assert alice.customer.email


@pytest.mark.parametrize("notation", ["{}", "{}.0", "{}e0"])
async def test_store_id_may_be_a_number(sender: WebhookSender, client: Client, notation: str) -> None:
    digits = str(int.from_bytes(unique("store").encode()[-6:]) + 10**15)
    shop = Shop(unique("merchant"), digits)
    await client.put_store(shop.merchant_id, shop.store_id)
    raw_body = json.dumps(body(shop, store_id="@")).replace('"@"', notation.format(digits)).encode()

    assert await sender.send(shop, STORE_ERASURE_TOPIC, raw_body) == REQUESTED
    assert (
        await sender.send(shop, STORE_ERASURE_TOPIC, b"\xef\xbb\xbf" + json.dumps(body(shop)).encode())
        == ALREADY_REQUESTED
    )


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"store_id": None}, {"store_id"}),
        ({"store_id": "two words"}, {"store_id"}),
        ({"store_id": True}, {"store_id"}),
        ({"store_id": 1.5}, {"store_id"}),
        ({"store_domain": 7}, {"store_domain"}),
        ({"update_time": 1714608000000}, {"update_time"}),
        ({"update_time": "2026-05-02T08:00:00"}, {"update_time"}),
        ({"update_time": "", "store_id": []}, {"update_time", "store_id"}),
    ],
)
async def test_malformed_request_is_quarantined_with_every_wrong_field(
    sender: WebhookSender, shop: Shop, changes: dict[str, Any], fields: set[str]
) -> None:
    assert await sender.send(shop, STORE_ERASURE_TOPIC, body(shop, **changes)) == QUARANTINED
    webhook = await only_quarantined(sender, shop.merchant_id)

    assert (webhook.reason, webhook.topic) == (webhooks_pb2.QUARANTINE_REASON_MALFORMED, STORE_ERASURE_TOPIC)
    assert {part.split()[0] for part in webhook.detail.split("; ")} == fields
    assert await requested_stores(sender, shop.merchant_id) == []


@pytest.mark.parametrize(
    "other",
    [
        {"id": "17", "email": "ada@example.com", "updated_at": "2026-05-01T08:00:00+08:00"},
        {"customer": {"id": "17"}, "shop_id": "1", "update_time": "2026-05-01T08:00:00+08:00"},
        {"store_id": "1", "buyer_id": "17", "updated_at": 1_721_829_526_566, "updated_value": 20},
        {"store_id": "1", "operate": "UNINSTALL", "created_at": "2026-05-01T08:00:00+08:00"},
    ],
)
async def test_body_of_another_topic_requests_no_erasure(
    sender: WebhookSender, shop: Shop, other: dict[str, Any]
) -> None:
    """A captured webhook can be sent again with any topic."""
    changed_body = {name: shop.store_id if name in {"store_id", "shop_id"} else value for name, value in other.items()}

    assert await sender.send(shop, STORE_ERASURE_TOPIC, changed_body) == QUARANTINED
    assert await requested_stores(sender, shop.merchant_id) == []


async def test_request_of_an_unknown_store_is_replayed_after_its_registration(sender: WebhookSender) -> None:
    shop = Shop(unique("merchant"), unique("store"))
    assert await sender.send(shop, STORE_ERASURE_TOPIC, body(shop)) == QUARANTINED
    webhook = await only_quarantined(sender, shop.merchant_id)
    assert webhook.reason == webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN
    await sender.client.put_store(shop.merchant_id, shop.store_id)

    assert await replay(sender, shop.merchant_id) == "REQUESTED"
    assert await requested_stores(sender, shop.merchant_id) == [shop.store_id]


async def test_request_with_a_wrong_merchant_is_replayed_for_the_right_one(sender: WebhookSender, shop: Shop) -> None:
    wrong = Shop(unique("merchant"), shop.store_id)
    assert await sender.send(wrong, STORE_ERASURE_TOPIC, body(shop)) == QUARANTINED
    webhook = await only_quarantined(sender, wrong.merchant_id)
    assert webhook.reason == webhooks_pb2.QUARANTINE_REASON_MERCHANT_MISMATCH

    assert await replay(sender, wrong.merchant_id, as_merchant=shop.merchant_id) == "REQUESTED"
    assert (await requested_stores(sender, wrong.merchant_id), await requested_stores(sender, shop.merchant_id)) == (
        [],
        [shop.store_id],
    )


@pytest.mark.parametrize(
    ("changes", "headers", "reason"),
    [
        ({}, {"x_shopline_shop_id": "1"}, webhooks_pb2.QUARANTINE_REASON_SHOP_ID_MISMATCH),
        ({"update_time": "2031-05-02T08:00:00Z"}, {}, webhooks_pb2.QUARANTINE_REASON_OUT_OF_BOUNDS),
        ({}, {"x_shopline_topic": ""}, webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING),
    ],
)
async def test_request_that_cannot_be_stored_is_quarantined_with_its_reason(
    sender: WebhookSender, shop: Shop, changes: dict[str, Any], headers: dict[str, str], reason: int
) -> None:
    assert await sender.send(shop, STORE_ERASURE_TOPIC, body(shop, **changes), **headers) == QUARANTINED
    assert (await only_quarantined(sender, shop.merchant_id)).reason == reason


async def test_request_without_a_topic_is_replayed_with_a_topic(sender: WebhookSender, shop: Shop) -> None:
    await sender.send(shop, STORE_ERASURE_TOPIC, body(shop), x_shopline_topic="")

    assert await replay(sender, shop.merchant_id, as_topic=STORE_ERASURE_TOPIC) == "REQUESTED"


async def test_wrongly_signed_request_is_401(sender: WebhookSender, shop: Shop) -> None:
    assert (await sender.send(shop, STORE_ERASURE_TOPIC, body(shop), x_shopline_hmac_sha256="0" * 64))[0] == 401
    assert await requested_stores(sender, shop.merchant_id) == []


async def test_times_in_the_bodies_are_before_the_test_clock() -> None:
    assert NOW_MS > 1_777_700_000_000

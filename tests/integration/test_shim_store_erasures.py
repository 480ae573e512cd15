"""SHOPLINE's `merchants/redact`, from HTTP to a request that operators list, and to the quarantine and back."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from pointbook.v1 import customers_pb2, identity_pb2, programs_pb2, webhooks_pb2
from pointbook_cli.quarantine import translate_again
from shopline_shim import signature
from support.harness import NOW_MS, Client, Service, Shop, unique
from support.shims import PATH, SECRET, shim_before

REQUESTED = (200, {"outcome": "REQUESTED"})
QUARANTINED = (200, {"outcome": "QUARANTINED"})
TOPIC = "merchants/redact"


class Site:
    """A shim before a real server."""

    def __init__(self, http: httpx.AsyncClient, client: Client) -> None:
        self.http = http
        self.client = client

    async def send(self, shop: Shop, body: object, **headers: str) -> tuple[int, Any]:
        """Deliver a signed body in the name of a shop, and return the status and the JSON."""
        raw_body = body if isinstance(body, bytes) else json.dumps(body).encode()
        signed = {
            "x-shopline-topic": TOPIC,
            "x-shopline-hmac-sha256": signature.sign(SECRET, raw_body),
            "x-shopline-shop-id": shop.store_id,
            "x-shopline-merchant-id": shop.merchant_id,
        }
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        answer = await self.http.post(PATH, content=raw_body, headers=signed | changed)
        return answer.status_code, answer.json()

    async def requests(self, merchant_id: str) -> list[str]:
        """Return the stores for which a merchant has requests."""
        request = programs_pb2.ListStoreErasuresRequest(merchant_id=merchant_id)
        return [erasure.store_id for erasure in (await self.client.programs.ListStoreErasures(request)).erasures]

    async def quarantined(self, merchant_id: str) -> webhooks_pb2.QuarantinedWebhook:
        """Return the one webhook in a merchant's quarantine, whole."""
        listed = await self.client.webhooks.ListQuarantinedWebhooks(
            webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant_id)
        )
        [kept] = listed.webhooks
        request = webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=merchant_id, quarantine_id=kept.quarantine_id)
        return (await self.client.webhooks.GetQuarantinedWebhook(request)).webhook

    async def replay(self, merchant_id: str, as_merchant: str = "", as_topic: str = "") -> str:
        """Replay the one webhook in a merchant's quarantine as the command does, and return the outcome."""
        kept = await self.quarantined(merchant_id)
        request = translate_again(kept, as_merchant, as_topic)
        request.merchant_id, request.quarantine_id = merchant_id, kept.quarantine_id
        answer = await self.client.webhooks.ReplayQuarantinedWebhook(request)
        outcome = programs_pb2.StoreErasureOutcome.Name(answer.store_erasure.outcome)
        return outcome.removeprefix("STORE_ERASURE_OUTCOME_")


@pytest.fixture(scope="module")
async def site(service: Service, admin_token: str) -> AsyncIterator[Site]:
    """A shim for all merchants before the file's server."""
    async with shim_before(service.server.port, admin_token) as http:
        yield Site(http, service.client)


def body(shop: Shop, **changes: Any) -> dict[str, Any]:
    """Write the body of a request to erase a store."""
    values = {
        "store_id": shop.store_id,
        "store_domain": "example.myshopline.com",
        "update_time": "2026-05-02T08:00:00+08:00",
    }
    return values | changes


async def test_a_request_is_kept_and_nothing_is_erased(site: Site, shop: Shop) -> None:
    """The topic is not signed: an operator erases, and a repetition adds nothing."""
    buyer = identity_pb2.Buyer(store_id=shop.store_id, buyer_id="17")
    await site.client.put_customer(shop.merchant_id, "alice", email=f"{unique('a')}@example.com", buyers=[buyer])

    assert await site.send(shop, body(shop)) == REQUESTED
    assert await site.send(shop, body(shop)) == (200, {"outcome": "ALREADY_REQUESTED"})
    assert await site.send(shop, body(shop, update_time="2026-05-03T08:00:00Z")) == (
        200,
        {"outcome": "ALREADY_REQUESTED"},
    )
    assert await site.requests(shop.merchant_id) == [shop.store_id]
    alice = await site.client.customers.GetCustomer(
        customers_pb2.GetCustomerRequest(merchant_id=shop.merchant_id, customer_id="alice")
    )
    assert alice.customer.email


@pytest.mark.parametrize("written", ["{}", "{}.0", "{}e0"])
async def test_a_store_id_may_be_a_number(site: Site, client: Client, written: str) -> None:
    """As other ids of SHOPLINE."""
    digits = str(int.from_bytes(unique("store").encode()[-6:]) + 10**15)
    shop = Shop(unique("merchant"), digits)
    await client.put_store(shop.merchant_id, shop.store_id)
    raw_body = json.dumps(body(shop, store_id="@")).replace('"@"', written.format(digits)).encode()

    assert await site.send(shop, raw_body) == REQUESTED
    assert await site.send(shop, b"\xef\xbb\xbf" + json.dumps(body(shop)).encode()) == (
        200,
        {"outcome": "ALREADY_REQUESTED"},
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
async def test_what_is_no_request_is_kept_as_malformed(
    site: Site, shop: Shop, changes: dict[str, Any], fields: set[str]
) -> None:
    """Every wrong field is named, and nothing requested."""
    assert await site.send(shop, body(shop, **changes)) == QUARANTINED
    kept = await site.quarantined(shop.merchant_id)

    assert (kept.reason, kept.topic) == (webhooks_pb2.QUARANTINE_REASON_MALFORMED, TOPIC)
    assert {part.split()[0] for part in kept.detail.split("; ")} == fields
    assert await site.requests(shop.merchant_id) == []


@pytest.mark.parametrize(
    "other",
    [
        {"id": "17", "email": "ada@example.com", "updated_at": "2026-05-01T08:00:00+08:00"},
        {"customer": {"id": "17"}, "shop_id": "1", "update_time": "2026-05-01T08:00:00+08:00"},
        {"store_id": "1", "buyer_id": "17", "updated_at": 1_721_829_526_566, "updated_value": 20},
        {"store_id": "1", "operate": "UNINSTALL", "created_at": "2026-05-01T08:00:00+08:00"},
    ],
)
async def test_no_body_of_another_topic_requests_an_erasure(site: Site, shop: Shop, other: dict[str, Any]) -> None:
    """A captured webhook may be sent again under any topic."""
    changed = {name: shop.store_id if name in {"store_id", "shop_id"} else value for name, value in other.items()}

    assert await site.send(shop, changed) == QUARANTINED
    assert await site.requests(shop.merchant_id) == []


async def test_an_unknown_store_waits_for_its_registration(site: Site) -> None:
    """Replayed, the request is kept from when SHOPLINE made it."""
    shop = Shop(unique("merchant"), unique("store"))
    assert await site.send(shop, body(shop)) == QUARANTINED
    kept = await site.quarantined(shop.merchant_id)
    assert kept.reason == webhooks_pb2.QUARANTINE_REASON_STORE_UNKNOWN
    await site.client.put_store(shop.merchant_id, shop.store_id)

    assert await site.replay(shop.merchant_id) == "REQUESTED"
    assert await site.requests(shop.merchant_id) == [shop.store_id]


async def test_another_merchants_store_is_replayed_in_its_merchants_name(site: Site, shop: Shop) -> None:
    """The store of the body is the truth; the merchant's header is not signed."""
    wrong = Shop(unique("merchant"), shop.store_id)
    assert await site.send(wrong, body(shop)) == QUARANTINED
    kept = await site.quarantined(wrong.merchant_id)
    assert kept.reason == webhooks_pb2.QUARANTINE_REASON_MERCHANT_MISMATCH

    assert await site.replay(wrong.merchant_id, as_merchant=shop.merchant_id) == "REQUESTED"
    assert (await site.requests(wrong.merchant_id), await site.requests(shop.merchant_id)) == ([], [shop.store_id])


@pytest.mark.parametrize(
    ("changes", "headers", "reason"),
    [
        ({}, {"x_shopline_shop_id": "1"}, webhooks_pb2.QUARANTINE_REASON_SHOP_ID_MISMATCH),
        ({"update_time": "2031-05-02T08:00:00Z"}, {}, webhooks_pb2.QUARANTINE_REASON_OUT_OF_BOUNDS),
        ({}, {"x_shopline_topic": ""}, webhooks_pb2.QUARANTINE_REASON_TOPIC_MISSING),
    ],
)
async def test_what_cannot_be_requested_is_kept(
    site: Site, shop: Shop, changes: dict[str, Any], headers: dict[str, str], reason: int
) -> None:
    """For the reasons that other webhooks have."""
    assert await site.send(shop, body(shop, **changes), **headers) == QUARANTINED
    assert (await site.quarantined(shop.merchant_id)).reason == reason


async def test_a_request_without_a_topic_is_replayed_as_one(site: Site, shop: Shop) -> None:
    """By the topic that the operator names."""
    await site.send(shop, body(shop), x_shopline_topic="")

    assert await site.replay(shop.merchant_id, as_topic=TOPIC) == "REQUESTED"


async def test_a_forged_request_is_401(site: Site, shop: Shop) -> None:
    """Nothing is kept of it."""
    assert (await site.send(shop, body(shop), x_shopline_hmac_sha256="0" * 64))[0] == 401
    assert await site.requests(shop.merchant_id) == []


async def test_the_clock_of_the_tests() -> None:
    """The bodies above are of the past of the servers' clock."""
    assert NOW_MS > 1_777_700_000_000

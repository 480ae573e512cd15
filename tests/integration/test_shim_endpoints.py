"""Webhook endpoints that are bound to a merchant, stores, topics and secrets.

Source: docs/reference/shopline-webhooks.md#what-the-signature-does-not-cover
"""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from pointbook.v1 import webhooks_pb2
from pointbook_common.durations import HOUR_MS, MINUTE_MS
from pointbook_common.shopline_webhooks import POINTS_TOPIC
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from shopline_shim import signature
from shopline_shim.endpoint_bindings import EndpointBinding
from shopline_shim.translate import ERASURE_TOPICS
from support.clients import Client
from support.servers import Service
from support.shims import PATH, SECRET, shim_client
from support.shops import Shop
from support.tokens import make_token
from support.unique_names import unique

UPDATED_AT_MS = 1_767_225_600_000
ENDPOINT_SECRET = "endpoint-secret"
POINTS_ID, CUSTOMERS_ID, UPDATE_ID = "points-endpoint-0001", "customers-endpoint-1", "update-endpoint-00001"


@pytest.fixture
async def http(service: Service, admin_token: str, shop: Shop) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a shim with three endpoints for a shop, and the unbound one."""

    def endpoint(*topics: str) -> EndpointBinding:
        return EndpointBinding(
            merchant_id=shop.merchant_id,
            store_ids=(shop.store_id,),
            topics=topics,
            secrets=(SecretStr(ENDPOINT_SECRET),),
        )

    endpoints = {
        POINTS_ID: endpoint(POINTS_TOPIC),
        CUSTOMERS_ID: endpoint("customers/create", "customers/update"),
        UPDATE_ID: endpoint("customers/update"),
    }
    async with shim_client(service.server.port, admin_token, shopline_endpoints=endpoints) as client:
        yield client


def points(shop: Shop, **changes: Any) -> bytes:
    """Return the body of a points webhook."""
    body = {
        "buyer_id": unique("buyer"),
        "points_balance": 20,
        "store_id": shop.store_id,
        "update_type": "INCREASE",
        "updated_at": UPDATED_AT_MS,
        "updated_scene": "SUCCESSFUL_REGISTRATION",
        "updated_value": 20,
    }
    return json.dumps(body | changes).encode()


def customer(buyer_id: str) -> bytes:
    """Return the body of a customer webhook, which names no topic or store."""
    return json.dumps({"id": buyer_id, "updated_at": "2026-01-31T12:00:00Z", "phone": None, "email": None}).encode()


async def post_webhook(
    http: httpx.AsyncClient, path: str, body: bytes, *, secret: str = ENDPOINT_SECRET, **headers: str
) -> tuple[int, str]:
    """Deliver a webhook; return the status and the outcome, or the problem's title."""
    headers_by_name = {f"x-shopline-{name.replace('_', '-')}": value for name, value in headers.items()}
    signed = {"x-shopline-hmac-sha256": signature.sign(secret, body)}
    response = await http.post(path, content=body, headers=headers_by_name | signed)
    body_json = response.json()
    return response.status_code, body_json.get("outcome") or body_json["title"]


async def reasons(client: Client, merchant_id: str) -> list[str]:
    """Return the reasons of a merchant's quarantined webhooks, without their prefix."""
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant_id)
    listed = await client.webhooks.ListQuarantinedWebhooks(request)
    return [
        webhooks_pb2.QuarantineReason.Name(each.reason).removeprefix("QUARANTINE_REASON_") for each in listed.webhooks
    ]


async def test_endpoint_needs_no_header_except_the_signature(http: httpx.AsyncClient, shop: Shop) -> None:
    assert await post_webhook(http, f"{PATH}/{POINTS_ID}", points(shop)) == (200, "APPLIED")
    assert await post_webhook(http, f"{PATH}/{UPDATE_ID}", customer("buyer-1")) == (200, "APPLIED")


async def test_each_path_accepts_only_its_own_secrets(http: httpx.AsyncClient, shop: Shop) -> None:
    body = points(shop)
    forged = (401, "Unauthorized")

    assert await post_webhook(http, f"{PATH}/{POINTS_ID}", body, secret=SECRET) == forged
    assert await post_webhook(http, PATH, body, topic=POINTS_TOPIC, merchant_id=shop.merchant_id) == forged
    for unknown in ("no-such-endpoint-01", POINTS_ID[:-1], POINTS_ID.upper(), "x", "%00"):
        assert await post_webhook(http, f"{PATH}/{unknown}", body) == forged


@pytest.mark.parametrize(
    ("endpoint", "headers"),
    [
        (POINTS_ID, {"merchant_id": "another"}),
        (POINTS_ID, {"topic": "customers/update"}),
        (UPDATE_ID, {"topic": "customers/delete"}),
        (CUSTOMERS_ID, {"topic": "customers/redact"}),
        (CUSTOMERS_ID, {"topic": "customers/delete"}),
    ],
)
async def test_headers_that_contradict_the_binding_are_quarantined(
    http: httpx.AsyncClient, client: Client, shop: Shop, endpoint: str, headers: dict[str, str]
) -> None:
    body = points(shop) if endpoint == POINTS_ID else customer(unique("buyer"))

    assert await post_webhook(http, f"{PATH}/{endpoint}", body, **headers) == (200, "QUARANTINED")
    assert await reasons(client, shop.merchant_id) == ["ENDPOINT_MISMATCH"]


async def test_body_of_another_store_of_the_merchant_is_quarantined(
    http: httpx.AsyncClient, client: Client, shop: Shop
) -> None:
    other = unique("store")
    await client.put_store(shop.merchant_id, other)

    assert await post_webhook(http, f"{PATH}/{POINTS_ID}", points(shop, store_id=other)) == (200, "QUARANTINED")
    assert await post_webhook(http, f"{PATH}/{UPDATE_ID}", customer("buyer-3"), shop_id=other) == (200, "QUARANTINED")
    assert await reasons(client, shop.merchant_id) == ["ENDPOINT_MISMATCH"] * 2


async def test_endpoint_with_several_topics_needs_the_topic_header(
    http: httpx.AsyncClient, client: Client, shop: Shop
) -> None:
    assert await post_webhook(http, f"{PATH}/{CUSTOMERS_ID}", customer("buyer-4")) == (200, "QUARANTINED")
    assert await reasons(client, shop.merchant_id) == ["TOPIC_MISSING"]
    assert await post_webhook(http, f"{PATH}/{CUSTOMERS_ID}", customer("buyer-4"), topic="customers/update") == (
        200,
        "APPLIED",
    )
    assert await post_webhook(http, f"{PATH}/{CUSTOMERS_ID}", customer("buyer-4"), topic="orders/create") == (
        200,
        "IGNORED",
    )


async def test_unbound_path_is_404_without_an_app_secret(service: Service, admin_token: str, shop: Shop) -> None:
    binding = EndpointBinding(
        merchant_id=shop.merchant_id,
        store_ids=(shop.store_id,),
        topics=(POINTS_TOPIC,),
        secrets=(SecretStr(ENDPOINT_SECRET),),
    )
    changes = {"shopline_secrets": (), "shopline_endpoints": {POINTS_ID: binding}}
    async with shim_client(service.server.port, admin_token, **changes) as http:
        assert await post_webhook(http, f"{PATH}/{POINTS_ID}", points(shop)) == (200, "APPLIED")
        assert await post_webhook(http, PATH, points(shop)) == (404, "Not Found")


@pytest.mark.parametrize(("minutes", "outcome"), [(-30, "APPLIED"), (1, "QUARANTINED"), (10_000, "QUARANTINED")])
async def test_webhook_older_than_the_maximum_age_is_quarantined(
    service: Service, client: Client, shop: Shop, minutes: int, outcome: str
) -> None:
    """By the signed time of the event, which is `minutes` past the maximum age."""
    token = await make_token(service.database_url, [ALL_MERCHANTS], [Scope.POINTS_WRITE, Scope.WEBHOOKS])
    updated_at = UPDATED_AT_MS - minutes * MINUTE_MS
    max_age_hours = (time.time_ns() / 1e6 - UPDATED_AT_MS) / HOUR_MS
    async with shim_client(service.server.port, token, webhook_max_age_hours=max_age_hours) as http:
        shop_headers = {"merchant_id": shop.merchant_id, "shop_id": shop.store_id}
        body = points(shop, updated_at=updated_at)
        points_result = await post_webhook(http, PATH, body, secret=SECRET, topic=POINTS_TOPIC, **shop_headers)
        iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(updated_at / 1_000))
        body = json.dumps({"id": "buyer-5", "updated_at": iso, "phone": None, "email": None}).encode()
        customer_result = await post_webhook(http, PATH, body, secret=SECRET, topic="customers/update", **shop_headers)

    assert (points_result, customer_result) == ((200, outcome), (200, outcome))
    assert await reasons(client, shop.merchant_id) == ([] if outcome == "APPLIED" else ["TOO_OLD"] * 2)


async def test_repeated_merchant_header_with_another_value_is_quarantined(
    http: httpx.AsyncClient, client: Client, shop: Shop
) -> None:
    body = points(shop)
    headers = [
        ("x-shopline-merchant-id", shop.merchant_id),
        ("x-shopline-merchant-id", "another"),
        ("x-shopline-hmac-sha256", signature.sign(ENDPOINT_SECRET, body)),
    ]
    response = await http.post(f"{PATH}/{POINTS_ID}", content=body, headers=headers)

    assert response.json() == {"outcome": "QUARANTINED"}
    assert await reasons(client, shop.merchant_id) == ["ENDPOINT_MISMATCH"]


@pytest.mark.parametrize("topic", sorted(ERASURE_TOPICS))
async def test_erasure_request_has_no_maximum_age(service: Service, admin_token: str, shop: Shop, topic: str) -> None:
    store_erasure = {"store_id": shop.store_id, "store_domain": "example.myshopline.com"}
    customer_redaction = {"shop_id": shop.store_id, "customer": {"id": unique("buyer")}}
    content = store_erasure if topic == "merchants/redact" else customer_redaction
    body = json.dumps(content | {"update_time": "2026-01-01T00:00:00Z"}).encode()
    shop_headers = {"merchant_id": shop.merchant_id, "shop_id": shop.store_id}
    async with shim_client(service.server.port, admin_token, webhook_max_age_hours=0.5) as http:
        status, outcome = await post_webhook(http, PATH, body, secret=SECRET, topic=topic, **shop_headers)

    assert (status, outcome) == (200, "REQUESTED" if topic == "merchants/redact" else "APPLIED")

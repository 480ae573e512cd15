"""Endpoints of their own: what the headers of a webhook cannot prove, the endpoint's binding says."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from pointbook.v1 import webhooks_pb2
from pointbook_server.access.model import ALL_MERCHANTS, Scope
from shopline_shim import signature
from shopline_shim.endpoint_bindings import EndpointBinding
from support.harness import Client, Service, Shop, make_token, unique
from support.shims import PATH, SECRET, shim_before

NOW_MS = 1_767_225_600_000
POINTS = "app_memberSystem_points/challenged"
OWN_SECRET = "endpoint-secret"
REDACTIONS = ("customers/redact", "merchants/redact")
POINTS_ID, CUSTOMERS_ID, UPDATE_ID = "points-endpoint-0001", "customers-endpoint-1", "update-endpoint-00001"


@pytest.fixture
async def http(service: Service, admin_token: str, shop: Shop) -> AsyncIterator[httpx.AsyncClient]:
    """A shim with three endpoints for a shop, beside the unbound one with a secret of its own."""

    def endpoint(*topics: str) -> EndpointBinding:
        return EndpointBinding(
            merchant_id=shop.merchant_id,
            store_ids=(shop.store_id,),
            topics=topics,
            secrets=(SecretStr(OWN_SECRET),),
        )

    endpoints = {
        POINTS_ID: endpoint(POINTS),
        CUSTOMERS_ID: endpoint("customers/create", "customers/update"),
        UPDATE_ID: endpoint("customers/update"),
    }
    async with shim_before(service.server.port, admin_token, shopline_endpoints=endpoints) as client:
        yield client


def points(shop: Shop, **changes: Any) -> bytes:
    """Return the body of a points webhook."""
    body = {
        "buyer_id": unique("buyer"),
        "points_balance": 20,
        "store_id": shop.store_id,
        "update_type": "INCREASE",
        "updated_at": NOW_MS,
        "updated_scene": "SUCCESSFUL_REGISTRATION",
        "updated_value": 20,
    }
    return json.dumps(body | changes).encode()


def customer(buyer_id: str) -> bytes:
    """Return the body of a customer webhook, which names neither its topic nor its store."""
    return json.dumps({"id": buyer_id, "updated_at": "2026-01-31T12:00:00Z", "phone": None, "email": None}).encode()


async def post(
    http: httpx.AsyncClient, path: str, body: bytes, *, secret: str = OWN_SECRET, **headers: str
) -> tuple[int, str]:
    """Deliver a webhook; return the status and the outcome, or the problem's title."""
    named = {f"x-shopline-{name.replace('_', '-')}": value for name, value in headers.items()}
    signed = {"x-shopline-hmac-sha256": signature.sign(secret, body)}
    response = await http.post(path, content=body, headers=named | signed)
    answer = response.json()
    return response.status_code, answer.get("outcome") or answer["title"]


async def reasons(client: Client, merchant_id: str) -> list[str]:
    """Return why a merchant's webhooks are in quarantine."""
    request = webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant_id)
    found = await client.webhooks.ListQuarantinedWebhooks(request)
    return [
        webhooks_pb2.QuarantineReason.Name(each.reason).removeprefix("QUARANTINE_REASON_") for each in found.webhooks
    ]


async def test_an_endpoint_needs_no_headers_but_the_signature(http: httpx.AsyncClient, shop: Shop) -> None:
    """Merchant, store and topic are those of the binding."""
    assert await post(http, f"{PATH}/{POINTS_ID}", points(shop)) == (200, "APPLIED")
    assert await post(http, f"{PATH}/{UPDATE_ID}", customer("buyer-1")) == (200, "APPLIED")


async def test_only_the_own_secret_is_authentic(http: httpx.AsyncClient, shop: Shop) -> None:
    """Neither path takes the secret of the other, and an unknown endpoint answers like a wrong secret."""
    body = points(shop)
    forged = (401, "Unauthorized")

    assert await post(http, f"{PATH}/{POINTS_ID}", body, secret=SECRET) == forged
    assert await post(http, PATH, body, topic=POINTS, merchant_id=shop.merchant_id) == forged
    for unknown in ("no-such-endpoint-01", POINTS_ID[:-1], POINTS_ID.upper(), "x", "%00"):
        assert await post(http, f"{PATH}/{unknown}", body) == forged


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
async def test_headers_that_do_not_fit_are_quarantined(
    http: httpx.AsyncClient, client: Client, shop: Shop, endpoint: str, headers: dict[str, str]
) -> None:
    """A captured update becomes no deletion, and reaches no other merchant; the endpoint's own one can look at it."""
    body = points(shop) if endpoint == POINTS_ID else customer(unique("buyer"))

    assert await post(http, f"{PATH}/{endpoint}", body, **headers) == (200, "QUARANTINED")
    assert await reasons(client, shop.merchant_id) == ["ENDPOINT_MISMATCH"]


async def test_a_body_of_another_store_is_quarantined(http: httpx.AsyncClient, client: Client, shop: Shop) -> None:
    """Also one of the same merchant."""
    other = unique("store")
    await client.put_store(shop.merchant_id, other)

    assert await post(http, f"{PATH}/{POINTS_ID}", points(shop, store_id=other)) == (200, "QUARANTINED")
    assert await post(http, f"{PATH}/{UPDATE_ID}", customer("buyer-3"), shop_id=other) == (200, "QUARANTINED")
    assert await reasons(client, shop.merchant_id) == ["ENDPOINT_MISMATCH"] * 2


async def test_two_topics_need_the_header(http: httpx.AsyncClient, client: Client, shop: Shop) -> None:
    """Nothing else says which of them a webhook is; a topic that is unknown to us is ignored as ever."""
    assert await post(http, f"{PATH}/{CUSTOMERS_ID}", customer("buyer-4")) == (200, "QUARANTINED")
    assert await reasons(client, shop.merchant_id) == ["TOPIC_MISSING"]
    assert await post(http, f"{PATH}/{CUSTOMERS_ID}", customer("buyer-4"), topic="customers/update") == (200, "APPLIED")
    assert await post(http, f"{PATH}/{CUSTOMERS_ID}", customer("buyer-4"), topic="orders/create") == (200, "IGNORED")


async def test_endpoints_alone_close_the_unbound_path(service: Service, admin_token: str, shop: Shop) -> None:
    """Without an app secret there is nothing at /webhooks/shopline."""
    binding = EndpointBinding(
        merchant_id=shop.merchant_id, store_ids=(shop.store_id,), topics=(POINTS,), secrets=(SecretStr(OWN_SECRET),)
    )
    changes = {"shopline_secrets": (), "shopline_endpoints": {POINTS_ID: binding}}
    async with shim_before(service.server.port, admin_token, **changes) as http:
        assert await post(http, f"{PATH}/{POINTS_ID}", points(shop)) == (200, "APPLIED")
        assert await post(http, PATH, points(shop)) == (404, "Not Found")


@pytest.mark.parametrize(("minutes", "outcome"), [(-30, "APPLIED"), (1, "QUARANTINED"), (10_000, "QUARANTINED")])
async def test_an_old_body_is_quarantined(
    service: Service, client: Client, shop: Shop, minutes: int, outcome: str
) -> None:
    """By the time that is signed, that of the event; `minutes` is how far it lies beyond the age."""
    token = await make_token(service.database_url, [ALL_MERCHANTS], [Scope.POINTS_WRITE, Scope.WEBHOOKS])
    updated_at = NOW_MS - minutes * 60_000
    max_age_hours = (time.time_ns() / 1e6 - NOW_MS) / 3_600_000
    async with shim_before(service.server.port, token, webhook_max_age_hours=max_age_hours) as http:
        named = {"merchant_id": shop.merchant_id, "shop_id": shop.store_id}
        body = points(shop, updated_at=updated_at)
        of_points = await post(http, PATH, body, secret=SECRET, topic=POINTS, **named)
        iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(updated_at / 1_000))
        body = json.dumps({"id": "buyer-5", "updated_at": iso, "phone": None, "email": None}).encode()
        of_customer = await post(http, PATH, body, secret=SECRET, topic="customers/update", **named)

    assert (of_points, of_customer) == ((200, outcome), (200, outcome))
    assert await reasons(client, shop.merchant_id) == ([] if outcome == "APPLIED" else ["TOO_OLD"] * 2)


async def test_a_repeated_header_names_no_other_merchant(http: httpx.AsyncClient, client: Client, shop: Shop) -> None:
    """The first value is the endpoint's, and the last is what the translation would take."""
    body = points(shop)
    headers = [
        ("x-shopline-merchant-id", shop.merchant_id),
        ("x-shopline-merchant-id", "another"),
        ("x-shopline-hmac-sha256", signature.sign(OWN_SECRET, body)),
    ]
    response = await http.post(f"{PATH}/{POINTS_ID}", content=body, headers=headers)

    assert response.json() == {"outcome": "QUARANTINED"}
    assert await reasons(client, shop.merchant_id) == ["ENDPOINT_MISMATCH"]


@pytest.mark.parametrize("topic", REDACTIONS)
async def test_a_request_to_erase_is_never_too_old(service: Service, admin_token: str, shop: Shop, topic: str) -> None:
    """It is due whenever it comes, and must not wait for an operator's replay."""
    of_store = {"store_id": shop.store_id, "store_domain": "example.myshopline.com"}
    of_customer = {"shop_id": shop.store_id, "customer": {"id": unique("buyer")}}
    asked = of_store if topic == "merchants/redact" else of_customer
    body = json.dumps(asked | {"update_time": "2026-01-01T00:00:00Z"}).encode()
    named = {"merchant_id": shop.merchant_id, "shop_id": shop.store_id}
    async with shim_before(service.server.port, admin_token, webhook_max_age_hours=0.5) as http:
        status, outcome = await post(http, PATH, body, secret=SECRET, topic=topic, **named)

    assert (status, outcome) == (200, "REQUESTED" if topic == "merchants/redact" else "APPLIED")

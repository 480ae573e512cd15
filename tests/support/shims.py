"""A shim in front of a server, and a sender of SHOPLINE's webhooks."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from pydantic import SecretStr

from pointbook.v1 import webhooks_pb2
from shopline_shim import signature
from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings
from support.clients import Client
from support.clocks import NOW_MS
from support.http_clients import http_client
from support.shops import Shop

SECRET = "app-secret"
PATH = "/webhooks/shopline"
APPLIED = (200, {"outcome": "APPLIED"})
DUPLICATE = (200, {"outcome": "DUPLICATE"})
QUARANTINED = (200, {"outcome": "QUARANTINED"})


@asynccontextmanager
async def running_shim(settings: ShimSettings) -> AsyncIterator[ShimServer]:
    """Run a shim during the block."""
    shim, stop, ready = ShimServer(settings), asyncio.Event(), asyncio.Event()
    serving = asyncio.create_task(shim.serve(stop=stop, ready=ready))
    await asyncio.wait_for(ready.wait(), 5)
    try:
        yield shim
    finally:
        stop.set()
        await serving


@asynccontextmanager
async def shim_client(port: int, token: str, **changes: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Run a shim for the server on a port, and yield an HTTP client of the shim."""
    values: dict[str, Any] = {
        "http_address": "127.0.0.1:0",
        "shim_metrics_address": "127.0.0.1:0",
        "grpc_address": f"127.0.0.1:{port}",
        "shopline_secrets": (SecretStr(SECRET),),
        "token": SecretStr(token),
    }
    async with (
        running_shim(ShimSettings(**{**values, **changes})) as shim,
        http_client(base_url=f"http://{shim.address}") as http,
    ):
        yield http


def webhook_headers(shop: Shop, topic: str, raw_body: bytes) -> dict[str, str]:
    """Return SHOPLINE's seven headers of a webhook, with names in lower case.

    Source: docs/reference/shopline-webhooks.md#headers
    """
    return {
        "x-shopline-topic": topic,
        "x-shopline-hmac-sha256": signature.sign(SECRET, raw_body),
        "x-shopline-shop-domain": "example.myshopline.com",
        "x-shopline-shop-id": shop.store_id,
        "x-shopline-merchant-id": shop.merchant_id,
        "x-shopline-api-version": "v20250601",
        "x-shopline-webhook-id": "b54557e48a5fbf7d70bcd043",
    }


def points_body(shop: Shop, **changes: Any) -> bytes:
    """Return the body of a points webhook."""
    values = {
        "buyer_id": "2404721679",
        "points_balance": 20,
        "store_id": shop.store_id,
        "update_type": "INCREASE",
        "updated_at": NOW_MS - 60_000,
        "updated_scene": "SUCCESSFUL_REGISTRATION",
        "updated_value": 20,
    }
    return json.dumps(values | changes).encode()


@dataclass
class WebhookSender:
    """A sender of webhooks to a shim, and a client of the server behind it."""

    http: httpx.AsyncClient
    client: Client

    async def send(self, shop: Shop, topic: str, body: object, **headers: str) -> tuple[int, Any]:
        """Deliver a signed webhook of a shop, and return the status and the JSON.

        Keywords replace headers, with underscores for hyphens.
        """
        raw_body = body if isinstance(body, bytes) else json.dumps(body).encode()
        changes = {name.replace("_", "-"): value for name, value in headers.items()}
        signed = webhook_headers(shop, topic, raw_body)
        response = await self.http.post(PATH, content=raw_body, headers=signed | changes)
        return response.status_code, response.json()

    async def quarantined(self, merchant_id: str) -> list[webhooks_pb2.QuarantinedWebhook]:
        """Return a merchant's quarantined webhooks with their headers and bodies."""
        webhooks = self.client.webhooks
        listed = await webhooks.ListQuarantinedWebhooks(
            webhooks_pb2.ListQuarantinedWebhooksRequest(merchant_id=merchant_id, page_size=1_000)
        )
        requests = [
            webhooks_pb2.GetQuarantinedWebhookRequest(merchant_id=merchant_id, quarantine_id=webhook.quarantine_id)
            for webhook in listed.webhooks
        ]
        return [(await webhooks.GetQuarantinedWebhook(request)).webhook for request in requests]

    async def quarantine_reason(self, merchant_id: str) -> str:
        """Return the reason of a merchant's only quarantined webhook, without its prefix."""
        [webhook] = await self.quarantined(merchant_id)
        return webhooks_pb2.QuarantineReason.Name(webhook.reason).removeprefix("QUARANTINE_REASON_")


@asynccontextmanager
async def webhook_sender(port: int, token: str, client: Client, **changes: Any) -> AsyncIterator[WebhookSender]:
    """Run a shim for the server on a port, and yield a sender."""
    async with shim_client(port, token, **changes) as http:
        yield WebhookSender(http, client)

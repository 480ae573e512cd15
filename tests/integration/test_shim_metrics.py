"""The metrics of the shim, and its line of the log for each webhook."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from pointbook_client import connect
from pointbook_common.shopline_webhooks import POINTS_TOPIC
from shopline_shim import webhooks_endpoint
from shopline_shim.metrics import Metrics
from shopline_shim.server import ShimServer
from shopline_shim.server_client import CallContext, ServerClient
from shopline_shim.settings import ShimSettings
from support.certificates import Authority
from support.http_clients import http_client
from support.json_logs import json_logs
from support.servers import Service
from support.shims import APPLIED, PATH, QUARANTINED, SECRET, points_body, running_shim, webhook_headers
from support.shops import Shop
from support.waiting import until

HOUR_MS = 3_600_000


def settings(service: Service, token: str, **changes: object) -> ShimSettings:
    """Return settings of a shim for a server."""
    values = {
        "http_address": "127.0.0.1:0",
        "shim_metrics_address": "127.0.0.1:0",
        "grpc_address": f"127.0.0.1:{service.server.port}",
        "shopline_secrets": (SecretStr(SECRET),),
        "token": SecretStr(token),
    }
    return ShimSettings(**{**values, **changes})  # type: ignore[arg-type] # each has its own type


@pytest.fixture
async def shim(service: Service, admin_token: str) -> AsyncIterator[ShimServer]:
    """A shim whose metrics start at zero."""
    async with running_shim(settings(service, admin_token)) as running:
        yield running


async def send(shim: ShimServer, shop: Shop, raw_body: bytes, **changes: str) -> object:
    """Deliver a webhook, and return the status and the JSON."""
    headers = webhook_headers(shop, POINTS_TOPIC, raw_body) | changes
    async with http_client(base_url=f"http://{shim.address}") as http:
        response = await http.post(PATH, content=raw_body, headers=headers)
    return response.status_code, response.json()


def value(shim: ShimServer, name: str, **labels: str) -> float | None:
    """Return the value of a sample."""
    found: float | None = shim._app.state.metrics.registry.get_sample_value(f"pointbook_{name}", labels)
    return found


async def test_lag_and_time_of_authentic_webhooks_are_measured(shim: ShimServer, shop: Shop) -> None:
    now_ms = time.time_ns() // 1_000_000
    before = time.time()
    await send(shim, shop, points_body(shop, updated_at=now_ms - HOUR_MS))

    assert value(shim, "webhook_lag_seconds_count", topic=POINTS_TOPIC) == 1
    assert value(shim, "webhook_lag_seconds_bucket", topic=POINTS_TOPIC, le="1800.0") == 0
    assert value(shim, "webhook_lag_seconds_bucket", topic=POINTS_TOPIC, le="7200.0") == 1
    last = value(shim, "webhook_last_authentic_timestamp_seconds")
    assert last is not None
    assert before <= last <= time.time()


async def test_a_forged_webhook_is_no_sign_of_life(shim: ShimServer, shop: Shop) -> None:
    await send(shim, shop, points_body(shop), **{"x-shopline-hmac-sha256": "0" * 64})

    last = value(shim, "webhook_last_authentic_timestamp_seconds")
    assert last != last  # noqa: PLR0124 - only NaN differs from itself
    assert value(shim, "webhook_lag_seconds_count", topic=POINTS_TOPIC) is None
    assert value(shim, "webhooks_total", topic=POINTS_TOPIC, outcome="forged") == 1


async def test_calls_to_the_server_are_timed_by_code(shim: ShimServer, shop: Shop) -> None:
    assert await send(shim, shop, points_body(shop)) == APPLIED
    unregistered = Shop(shop.merchant_id, "unregistered-store")
    assert await send(shim, unregistered, points_body(unregistered)) == QUARANTINED

    assert value(shim, "shim_call_duration_seconds_count", code="OK") == 2
    assert value(shim, "shim_call_duration_seconds_count", code="NOT_FOUND") == 1
    assert value(shim, "webhooks_quarantined_total", reason="store_unknown") == 1
    assert value(shim, "shim_requests_running") == 0


async def test_updates_that_share_a_call_are_counted(shim: ShimServer, shop: Shop) -> None:
    bodies = [points_body(shop, buyer_id=f"buyer-{number}") for number in range(20)]
    await asyncio.gather(*(send(shim, shop, body) for body in bodies))

    calls = value(shim, "shim_updates_per_call_count")
    assert calls is not None
    assert calls < 20
    assert value(shim, "shim_updates_per_call_sum") == 20


async def test_expiry_of_the_certificate_is_shown(service: Service, admin_token: str, tmp_path: Path) -> None:
    authority = Authority()
    authority.issue("shim").write(tmp_path, "http")
    files = {"http_tls_cert_file": tmp_path / "http.crt", "http_tls_key_file": tmp_path / "http.key"}
    async with running_shim(settings(service, admin_token, **files)) as shim:
        expiry = value(shim, "shim_tls_certificate_expiry_timestamp_seconds")
    assert expiry is not None
    assert expiry > time.time()


async def test_each_webhook_is_one_line_of_the_log(service: Service, admin_token: str, shop: Shop) -> None:
    with json_logs(webhooks_endpoint) as written:
        async with running_shim(settings(service, admin_token)) as shim:
            await send(shim, shop, points_body(shop, buyer_id="buyer-of-the-log"))
    (line,) = [line for line in map(json.loads, written.getvalue().splitlines()) if line["event"] == "webhook"]

    assert (line["topic"], line["outcome"], line["status"]) == (POINTS_TOPIC, "applied", 200)
    assert line["duration_ms"] > 0
    assert line["request_id"]
    assert line["webhook_id"] == "b54557e48a5fbf7d70bcd043"
    assert "buyer-of-the-log" not in written.getvalue()


async def test_a_flood_of_forged_webhooks_is_few_lines(service: Service, admin_token: str, shop: Shop) -> None:
    with json_logs(webhooks_endpoint) as written:
        async with running_shim(settings(service, admin_token)) as shim:
            forged = {"x-shopline-hmac-sha256": "0" * 64}
            await asyncio.gather(*(send(shim, shop, points_body(shop), **forged) for _ in range(60)))

            def lines(event: str) -> list[dict[str, Any]]:
                return [line for line in map(json.loads, written.getvalue().splitlines()) if line["event"] == event]

            await until(lambda: len(lines("webhook")) + sum(line["count"] for line in lines("more webhooks")) == 60)
    assert len(lines("webhook")) <= webhooks_endpoint.FLOOD_LINES_MAX * (len(lines("more webhooks")) + 1)


async def test_a_call_that_is_cancelled_was_not_ok(service: Service) -> None:
    metrics, has_begun = Metrics(), asyncio.Event()

    async def hang(*_: object, **__: object) -> None:
        has_begun.set()
        await asyncio.Event().wait()

    async with connect(f"127.0.0.1:{service.server.port}") as connected:
        client = ServerClient(connected, metrics)
        call = asyncio.create_task(client.call(hang, None, CallContext("id", time.monotonic() + 5)))
        await has_begun.wait()
        call.cancel()
        await asyncio.wait([call])

    calls = "pointbook_shim_call_duration_seconds_count"
    assert metrics.registry.get_sample_value(calls, {"code": "CANCELLED"}) == 1
    assert metrics.registry.get_sample_value(calls, {"code": "OK"}) is None

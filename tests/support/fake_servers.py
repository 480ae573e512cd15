"""A shim in front of a fake gRPC server whose responses a test sets."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from pydantic import SecretStr

from pointbook.v1 import points_pb2, points_pb2_grpc, webhooks_pb2, webhooks_pb2_grpc
from pointbook_common.shopline_webhooks import POINTS_TOPIC
from pointbook_server.errors import PointbookError
from pointbook_server.rpc.status_mapping import to_status
from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings
from support.http_clients import http_client
from support.shims import PATH, SECRET, webhook_headers
from support.shops import Shop

SHOP = Shop("2000001234", "1718263946864")
BODY: dict[str, Any] = {
    "buyer_id": "2404721679",
    "points_balance": 20,
    "store_id": SHOP.store_id,
    "update_type": "INCREASE",
    "updated_at": 1721829526566,
    "updated_scene": "SUCCESSFUL_REGISTRATION",
    "updated_value": 20,
}
RAW_BODY = json.dumps(BODY).encode()


class FakePoints(points_pb2_grpc.PointsServiceServicer):
    """A points service that stores its requests and returns what a test sets."""

    def __init__(self) -> None:
        self.called = asyncio.Event()
        self.reset()

    def reset(self) -> None:
        """Delete the stored requests, and return APPLIED from now on."""
        self.updates: list[points_pb2.PointsUpdate] = []
        self.batches: list[list[points_pb2.PointsUpdate]] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.outcome = points_pb2.APPLY_OUTCOME_APPLIED
        self.webhook_id_differs = False
        self.error: grpc.StatusCode | None = None
        self.refusal: PointbookError | None = None
        self.delay_seconds = 0.0
        self.is_short_of_results = False
        """Whether a batch lacks its last result, which no server does."""
        self.proceeds = asyncio.Event()
        """Calls wait until it is set, as it is at first."""
        self.proceeds.set()

    async def ApplyPointsUpdate(  # noqa: N802 - gRPC names the methods
        self,
        request: points_pb2.ApplyPointsUpdateRequest,
        context: grpc.aio.ServicerContext[points_pb2.ApplyPointsUpdateRequest, points_pb2.ApplyPointsUpdateResponse],
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Store the update, and return the outcome or the error."""
        self.called.set()
        self.updates.append(request.update)
        self.metadata.append({str(key): value for key, value in context.invocation_metadata() or ()})
        await self.proceeds.wait()
        await asyncio.sleep(self.delay_seconds)
        if self.error is not None:
            await context.abort(self.error, "set by the test: buyer 2404721679")
        if self.refusal is not None:
            status = rpc_status.to_status(to_status(self.refusal))
            await context.abort(status.code, status.details, status.trailing_metadata)
        return points_pb2.ApplyPointsUpdateResponse(outcome=self.outcome, webhook_id_differs=self.webhook_id_differs)

    async def BatchApplyPointsUpdates(  # noqa: N802 - gRPC names the methods
        self,
        request: points_pb2.BatchApplyPointsUpdatesRequest,
        _context: object,
    ) -> points_pb2.BatchApplyPointsUpdatesResponse:
        """Store the updates, and return the outcome for each."""
        self.batches.append(list(request.updates))
        await self.proceeds.wait()
        result = points_pb2.PointsUpdateResult(response=points_pb2.ApplyPointsUpdateResponse(outcome=self.outcome))
        results = [result] * (len(request.updates) - self.is_short_of_results)
        return points_pb2.BatchApplyPointsUpdatesResponse(results=results)


class FakeWebhooks(webhooks_pb2_grpc.WebhooksServiceServicer):
    """A quarantine that stores webhooks, or fails as a test sets."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Delete the stored webhooks, and store new ones from now on."""
        self.quarantined: list[webhooks_pb2.QuarantineWebhookRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.error: grpc.StatusCode | None = None
        self.delay_seconds = 0.0

    async def QuarantineWebhook(  # noqa: N802 - gRPC names the methods
        self,
        request: webhooks_pb2.QuarantineWebhookRequest,
        context: grpc.aio.ServicerContext[
            webhooks_pb2.QuarantineWebhookRequest, webhooks_pb2.QuarantineWebhookResponse
        ],
    ) -> webhooks_pb2.QuarantineWebhookResponse:
        """Store the webhook, or return the error."""
        self.metadata.append({str(key): value for key, value in context.invocation_metadata() or ()})
        await asyncio.sleep(self.delay_seconds)
        if self.error is not None:
            await context.abort(self.error, "set by the test: buyer 2404721679")
        self.quarantined.append(request)
        return webhooks_pb2.QuarantineWebhookResponse(quarantine_id="q-1")


@contextlib.asynccontextmanager
async def fake_server(
    points: FakePoints, webhooks: FakeWebhooks, port: int = 0
) -> AsyncIterator[tuple[int, health.aio.HealthServicer]]:
    """Serve the fakes during the block, with a health service that reports SERVING."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    health_servicer = health.aio.HealthServicer()
    await health_servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    points_pb2_grpc.add_PointsServiceServicer_to_server(points, server)
    webhooks_pb2_grpc.add_WebhooksServiceServicer_to_server(webhooks, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound, health_servicer
    finally:
        await server.stop(None)


@dataclass
class RunningShim:
    """A running shim, its clients, and the fake server behind it."""

    shim: ShimServer
    client: httpx.AsyncClient
    points: FakePoints
    webhooks: FakeWebhooks
    health: health.aio.HealthServicer
    stop: asyncio.Event
    serving: asyncio.Task[None]
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    def reset_fakes(self) -> None:
        """Delete what the fakes stored, and make them succeed again."""
        self.points.reset()
        self.webhooks.reset()

    async def post(self, raw_body: bytes = RAW_BODY, **headers: str) -> httpx.Response:
        """Deliver a signed webhook.

        Keywords replace headers, with underscores for hyphens.
        """
        changes = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(PATH, content=raw_body, headers=signed_headers(raw_body) | changes)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a connection that is closed after the test."""
        host, port = self.shim.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        self.writers.append(writer)
        return reader, writer

    async def deliver_all(self, raw_bodies: Iterator[bytes]) -> set[bytes]:
        """Deliver signed bodies over one connection, and return the set of statuses."""
        statuses = set()
        reader, writer = await self.connect()
        for raw_body in raw_bodies:
            writer.write(raw_request(raw_body) + raw_body)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            statuses.add(head.split()[1])
            await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
        return statuses


@contextlib.asynccontextmanager
async def shim_with_fakes(**changes: Any) -> AsyncIterator[RunningShim]:
    """Run a fake server, and a shim with changed settings in front of it."""
    points, webhooks = FakePoints(), FakeWebhooks()
    async with fake_server(points, webhooks) as (port, health_servicer):
        settings = ShimSettings(
            **{
                "http_address": "127.0.0.1:0",
                "shim_metrics_address": "127.0.0.1:0",
                "grpc_address": f"127.0.0.1:{port}",
                "shopline_secrets": (SecretStr("next-secret"), SecretStr(SECRET)),
                "drain_timeout_seconds": 1,
                **changes,
            }
        )
        shim, stop, ready = ShimServer(settings), asyncio.Event(), asyncio.Event()
        serving = asyncio.create_task(shim.serve(stop=stop, ready=ready))
        await asyncio.wait_for(ready.wait(), 5)
        async with http_client(base_url=f"http://{shim.address}") as client:
            running = RunningShim(shim, client, points, webhooks, health_servicer, stop, serving)
            try:
                yield running
            finally:
                for writer in running.writers:
                    writer.close()
                stop.set()
                await serving


def signed_headers(raw_body: bytes) -> dict[str, str]:
    """Return SHOPLINE's headers of a points webhook of SHOP."""
    return webhook_headers(SHOP, POINTS_TOPIC, raw_body)


def raw_request(raw_body: bytes, *, length: int | str | None = None, chunked: bool = False) -> bytes:
    """Return the request line and headers of a signed webhook."""
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {length or len(raw_body)}"
    lines = [f"POST {PATH} HTTP/1.1", "host: shim", framing]
    lines += [f"{name}: {value}" for name, value in signed_headers(raw_body).items()]
    return "\r\n".join([*lines, "", ""]).encode()


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check that a response is a problem (RFC 9457), and return it."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem.keys() >= {"type", "title", "detail"}
    return problem


async def read_until_closed(reader: asyncio.StreamReader) -> bytes:
    """Return the data that a connection receives before it is closed or reset."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            received += chunk
    return received

"""The shim over real sockets: HTTP on one side, a gRPC server that answers as told on the other."""

import asyncio
import base64
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import pytest
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status
from pydantic import SecretStr

from pointbook.v1 import points_pb2, points_pb2_grpc, webhooks_pb2, webhooks_pb2_grpc
from pointbook_server.errors import FieldViolation, PointbookError, Reason, store_not_found
from pointbook_server.rpc.status_mapping import to_status
from shopline_shim import signature
from shopline_shim.http_protocol import LimitedHttpProtocol
from shopline_shim.server import ShimServer
from shopline_shim.settings import ShimSettings
from support.waiting import until

SECRET = "app-secret"
TOPIC = "app_memberSystem_points/challenged"
BODY: dict[str, Any] = {
    "buyer_id": "2404721679",
    "points_balance": 20,
    "store_id": "1718263946864",
    "update_type": "INCREASE",
    "updated_at": 1721829526566,
    "updated_scene": "SUCCESSFUL_REGISTRATION",
    "updated_value": 20,
}
RAW_BODY = json.dumps(BODY).encode()
PATH = "/webhooks/shopline"
ON_PURPOSE = ("app_memberSystem_points/update", "apps/installed_uninstalled", "customers/disable", "customers/enable")
"""Topics that are ignored for a reason, and counted by their names."""


class FakePoints(points_pb2_grpc.PointsServiceServicer):
    """A points service that notes what it is asked and answers as the test says."""

    def __init__(self) -> None:
        self.updates: list[points_pb2.PointsUpdate] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self.outcome = points_pb2.APPLY_OUTCOME_APPLIED
        self.webhook_id_differs = False
        self.error: grpc.StatusCode | None = None
        self.refusal: PointbookError | None = None
        self.delay_seconds = 0.0
        self.asked = asyncio.Event()

    async def ApplyPointsUpdate(  # noqa: N802 - gRPC names the methods
        self,
        request: points_pb2.ApplyPointsUpdateRequest,
        context: grpc.aio.ServicerContext[points_pb2.ApplyPointsUpdateRequest, points_pb2.ApplyPointsUpdateResponse],
    ) -> points_pb2.ApplyPointsUpdateResponse:
        """Note the update and answer the outcome, or the error."""
        self.asked.set()
        self.updates.append(request.update)
        self.metadata.append({str(key): value for key, value in context.invocation_metadata() or ()})
        await asyncio.sleep(self.delay_seconds)
        if self.error is not None:
            await context.abort(self.error, "as the test says: buyer 2404721679")
        if self.refusal is not None:
            status = rpc_status.to_status(to_status(self.refusal))
            await context.abort(status.code, status.details, status.trailing_metadata)
        return points_pb2.ApplyPointsUpdateResponse(outcome=self.outcome, webhook_id_differs=self.webhook_id_differs)


class FakeWebhooks(webhooks_pb2_grpc.WebhooksServiceServicer):
    """A quarantine that keeps what it is given, or fails as the test says."""

    def __init__(self) -> None:
        self.kept: list[webhooks_pb2.QuarantineWebhookRequest] = []
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
        """Keep the webhook, or answer the error."""
        self.metadata.append({str(key): value for key, value in context.invocation_metadata() or ()})
        await asyncio.sleep(self.delay_seconds)
        if self.error is not None:
            await context.abort(self.error, "as the test says: buyer 2404721679")
        self.kept.append(request)
        return webhooks_pb2.QuarantineWebhookResponse(quarantine_id="q-1")


@contextlib.asynccontextmanager
async def grpc_server(
    points: FakePoints, webhooks: FakeWebhooks, port: int = 0
) -> AsyncIterator[tuple[int, health.aio.HealthServicer]]:
    """Serve the fakes on a port, with a health service that says SERVING."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    states = health.aio.HealthServicer()
    await states.set("", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(states, server)
    points_pb2_grpc.add_PointsServiceServicer_to_server(points, server)
    webhooks_pb2_grpc.add_WebhooksServiceServicer_to_server(webhooks, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield bound, states
    finally:
        await server.stop(None)


@dataclass
class Running:
    """A shim that serves, and the ways to talk to it."""

    shim: ShimServer
    client: httpx.AsyncClient
    points: FakePoints
    webhooks: FakeWebhooks
    health: health.aio.HealthServicer
    stop: asyncio.Event
    serving: asyncio.Task[None]
    sockets: list[asyncio.StreamWriter] = field(default_factory=list)

    async def post(self, raw_body: bytes = RAW_BODY, **headers: str) -> httpx.Response:
        """Deliver a signed webhook; keywords replace headers, with underscores for hyphens."""
        changed = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post(PATH, content=raw_body, headers=webhook_headers(raw_body) | changed)

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a raw connection, closed with the test."""
        host, port = self.shim.address.rsplit(":", 1)
        reader, writer = await asyncio.open_connection(host, int(port))
        self.sockets.append(writer)
        return reader, writer


def webhook_headers(raw_body: bytes) -> dict[str, str]:
    """Write SHOPLINE's seven headers for a body, in lower case."""
    return {
        "x-shopline-topic": TOPIC,
        "x-shopline-hmac-sha256": signature.sign(SECRET, raw_body),
        "x-shopline-shop-domain": "example.myshopline.com",
        "x-shopline-shop-id": "1718263946864",
        "x-shopline-merchant-id": "2000001234",
        "x-shopline-api-version": "v20250601",
        "x-shopline-webhook-id": "b54557e48a5fbf7d70bcd043",
    }


def raw_request(raw_body: bytes, *, length: int | str | None = None, chunked: bool = False) -> bytes:
    """Write a signed delivery's request line and headers, as a raw socket sends them."""
    framing = "transfer-encoding: chunked" if chunked else f"content-length: {length or len(raw_body)}"
    lines = [f"POST {PATH} HTTP/1.1", "host: shim", framing]
    lines += [f"{name}: {value}" for name, value in webhook_headers(raw_body).items()]
    return "\r\n".join([*lines, "", ""]).encode()


@contextlib.asynccontextmanager
async def running(**changes: Any) -> AsyncIterator[Running]:
    """Run a fake server and a shim in front of it, with some settings changed."""
    points, webhooks = FakePoints(), FakeWebhooks()
    async with grpc_server(points, webhooks) as (port, states):
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
        async with httpx.AsyncClient(base_url=f"http://{shim.address}", trust_env=False) as client:
            run = Running(shim, client, points, webhooks, states, stop, serving)
            try:
                yield run
            finally:
                for writer in run.sockets:
                    writer.close()
                stop.set()
                await serving


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[Running]:
    """One shim with default settings for the tests of this module that change none."""
    async with running() as run:
        yield run


@pytest.fixture
def shim(shared: Running) -> Running:
    """Give the shared shim with a fake server as good as new."""
    points = shared.points
    points.updates.clear()
    points.metadata.clear()
    points.outcome, points.error, points.delay_seconds = points_pb2.APPLY_OUTCOME_APPLIED, None, 0.0
    points.refusal = None
    webhooks = shared.webhooks
    webhooks.kept.clear()
    webhooks.metadata.clear()
    webhooks.error, webhooks.delay_seconds = None, 0.0
    return shared


def assert_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check that an answer is a problem body of RFC 9457, and give it."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem.keys() >= {"type", "title", "detail"}
    return problem


async def until_closed(reader: asyncio.StreamReader) -> bytes:
    """Read what a connection says before it closes; a reset closes as well."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := await reader.read(65_536):
            received += chunk
    return received


async def test_webhook_is_applied(shim: Running) -> None:
    """A signed delivery becomes one gRPC call, and 200 after it."""
    response = await shim.post()

    assert response.status_code == 200
    assert response.json() == {"outcome": "APPLIED"}
    [update] = shim.points.updates
    assert (update.merchant_id, update.store_id, update.buyer_id) == ("2000001234", "1718263946864", "2404721679")
    assert (update.updated_value, update.points_balance) == (20, 20)
    assert update.updated_scene == points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION
    assert update.webhook.webhook_id == "b54557e48a5fbf7d70bcd043"


async def test_base64_signature(shim: Running) -> None:
    """The documentation's encoding of the signature is as good as the SDKs'."""
    digest = bytes.fromhex(signature.sign(SECRET, RAW_BODY))

    response = await shim.post(x_shopline_hmac_sha256=base64.b64encode(digest).decode())

    assert response.status_code == 200


async def test_every_secret_counts(shim: Running) -> None:
    """During a rotation both secrets sign."""
    response = await shim.post(x_shopline_hmac_sha256=signature.sign("next-secret", RAW_BODY))

    assert response.status_code == 200


@pytest.mark.parametrize(
    "header",
    [
        "",
        "0" * 64,
        "A" * 43 + "=",
        signature.sign("other", RAW_BODY),
        signature.sign(SECRET, RAW_BODY + b" "),
        "%" * 64,
    ],
)
async def test_forged_webhook(shim: Running, header: str) -> None:
    """A wrong signature is 401, whatever is wrong with it."""
    problem = assert_problem(await shim.post(x_shopline_hmac_sha256=header), 401)

    assert signature.sign(SECRET, RAW_BODY) not in str(problem)
    assert not shim.points.updates


async def test_signature_comes_before_everything(shim: Running) -> None:
    """Nothing is said about an unsigned body or topic, nor about a header that is no ASCII."""
    headers = {"x-shopline-topic": "customers/redact", "x-shopline-hmac-sha256": b"\xff" * 64}

    assert_problem(await shim.client.post(PATH, content=b"{"), 401)
    assert_problem(await shim.client.post(PATH, content=b"{", headers=headers), 401)  # type: ignore[arg-type] # httpx sends bytes, too


async def test_outcome_is_told(shim: Running) -> None:
    """A duplicate is committed too, so it is 200."""
    shim.points.outcome = points_pb2.APPLY_OUTCOME_DUPLICATE

    response = await shim.post()

    assert (response.status_code, response.json()) == (200, {"outcome": "DUPLICATE"})
    assert "x-pointbook-webhook-id-differs" not in response.headers


async def test_a_duplicate_that_another_webhook_brought_is_marked_and_counted(shim: Running) -> None:
    """In a header, so that the body stays what it is for every duplicate."""
    shim.points.outcome = points_pb2.APPLY_OUTCOME_DUPLICATE
    counted = "pointbook_webhook_duplicates_with_other_id_total"
    assert f"{counted} 0.0" in (await shim.client.get("/metrics")).text
    shim.points.webhook_id_differs = True

    response = await shim.post()

    assert (response.status_code, response.json()) == (200, {"outcome": "DUPLICATE"})
    assert response.headers["x-pointbook-webhook-id-differs"] == "true"
    assert f"{counted} 1.0" in (await shim.client.get("/metrics")).text


async def test_request_id_travels(shim: Running) -> None:
    """The answer's id is the one that the server got; without a token none is sent."""
    response = await shim.post()

    [metadata] = shim.points.metadata
    assert response.headers["x-request-id"] == metadata["x-request-id"]
    assert "authorization" not in metadata
    assert "server" not in response.headers


async def test_token_travels() -> None:
    """With a token, every call carries it."""
    async with running(token=SecretStr("points-token")) as shim:
        await shim.post()

        assert shim.points.metadata[0]["authorization"] == "Bearer points-token"


DEFINITE = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "OUT_OF_RANGE"}


def assert_quarantined(response: httpx.Response) -> None:
    """Check that an answer tells SHOPLINE that the webhook is taken, and that it is in quarantine."""
    assert (response.status_code, response.json()) == (200, {"outcome": "QUARANTINED"})


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name in DEFINITE])
async def test_what_a_repetition_would_not_change_is_quarantined(shim: Running, code: grpc.StatusCode) -> None:
    """Whatever the reason of the refusal, and even where the error does not tell any."""
    shim.points.error = code

    assert_quarantined(await shim.post())
    [kept] = shim.webhooks.kept
    assert kept.detail == f"the server returned {code.name}"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name not in {"OK", *DEFINITE}])
async def test_other_errors_of_the_server(shim: Running, code: grpc.StatusCode) -> None:
    """What the server may take another time is 503, so that SHOPLINE sends it again."""
    shim.points.error = code

    response = await shim.post()

    problem = assert_problem(response, 503)
    assert "retry-after" in response.headers
    assert "2404721679" not in str(problem)
    assert not shim.webhooks.kept


def elsewhere() -> PointbookError:
    """Make the refusal of a store that is another merchant's."""
    error = store_not_found("1718263946864")
    error.metadata["registered_elsewhere"] = "true"
    return error


@pytest.mark.parametrize(
    ("refusal", "reason", "detail"),
    [
        (
            store_not_found("1718263946864"),
            "STORE_UNKNOWN",
            "store_id must be registered with ProgramsService.PutStore",
        ),
        (
            elsewhere(),
            "MERCHANT_MISMATCH",
            "X-Shopline-Merchant-Id must be the merchant that the store is registered with",
        ),
        (
            PointbookError(Reason.EVENT_ID_REUSED, "", metadata={"event_id": "e"}),
            "EVENT_ID_REUSED",
            "the event must have the content that is stored under its id",
        ),
        (
            PointbookError(
                Reason.INVALID_FIELDS,
                "",
                violations=[
                    FieldViolation("update.updated_at", "must be a time"),
                    FieldViolation("update.updated_value", "must be less"),
                ],
            ),
            "OUT_OF_BOUNDS",
            "updated_at must be a time; updated_value must be less",
        ),
        (
            PointbookError(Reason.INSUFFICIENT_POINTS, ""),
            "REFUSED",
            "the server returned FAILED_PRECONDITION INSUFFICIENT_POINTS",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isupper() else "",
)
async def test_a_refusal_is_quarantined_with_its_reason(
    shim: Running, refusal: PointbookError, reason: str, detail: str
) -> None:
    """An operator reads what stood against the event, and never what stood in it."""
    shim.points.refusal = refusal

    assert_quarantined(await shim.post())
    [kept] = shim.webhooks.kept
    assert webhooks_pb2.QuarantineReason.Name(kept.reason) == f"QUARANTINE_REASON_{reason}"
    assert kept.detail == detail


async def test_the_whole_request_is_quarantined(shim: Running) -> None:
    """The raw body and SHOPLINE's headers but the signature, with their merchant and topic and the shim's token."""
    raw_body = b"\xff no JSON \x00"
    headers = [(name.encode(), value.encode()) for name, value in webhook_headers(raw_body).items()]

    response = await shim.client.post(PATH, content=raw_body, headers=[*headers, (b"X-Other", b"caf\xe9")])

    assert_quarantined(response)
    [kept] = shim.webhooks.kept
    assert (kept.merchant_id, kept.topic, kept.body) == ("2000001234", TOPIC, raw_body)
    assert [(header.name, header.value) for header in kept.headers] == [
        (name, value) for name, value in webhook_headers(raw_body).items() if name != "x-shopline-hmac-sha256"
    ]
    assert shim.webhooks.metadata[0]["x-request-id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("merchant", ["", "two words", "m" * 65, None])
async def test_a_webhook_without_a_merchant_is_quarantined(shim: Running, merchant: str | None) -> None:
    """Under the empty merchant, since it may be anybody's."""
    headers = webhook_headers(RAW_BODY) | {"x-shopline-merchant-id": merchant or ""}
    if merchant is None:
        del headers["x-shopline-merchant-id"]

    assert_quarantined(await shim.client.post(PATH, content=RAW_BODY, headers=headers))
    [kept] = shim.webhooks.kept
    assert kept.merchant_id == ""
    assert "X-Shopline-Merchant-Id" in kept.detail


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_a_quarantine_that_fails(shim: Running, code: grpc.StatusCode) -> None:
    """Full, away or closed to the shim: SHOPLINE shall send again, and an operator hears of it."""
    shim.webhooks.error = code
    counted = f'pointbook_webhooks_total{{outcome="quarantine_failed",topic="{TOPIC}"}}'

    with structlog.testing.capture_logs() as logs:
        response = await shim.post(b"no JSON")

    assert_problem(response, 503)
    assert "retry-after" in response.headers
    [entry] = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["code"] == code.name
    assert ("POINTBOOK_TOKEN" in str(entry["hint"])) == (code.name in {"UNAUTHENTICATED", "PERMISSION_DENIED"})
    assert counted in (await shim.client.get("/metrics")).text


async def test_applying_and_quarantining_share_their_time() -> None:
    """However slow both are, SHOPLINE has its answer in time."""
    async with running(grpc_timeout_seconds=0.6) as shim:
        shim.points.delay_seconds, shim.webhooks.delay_seconds = 0.4, 5
        shim.points.error = grpc.StatusCode.NOT_FOUND
        started = time.monotonic()

        assert_problem(await shim.post(), 503)
        assert time.monotonic() - started < 1


async def test_broken_details_of_an_error_are_no_details(shim: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A status that cannot be read still is a definite refusal."""
    shim.points.error = grpc.StatusCode.NOT_FOUND

    def broken(_: object) -> None:
        raise ValueError("the details contradict the status")

    monkeypatch.setattr(rpc_status, "from_call", broken)

    assert_quarantined(await shim.post())
    assert shim.webhooks.kept[0].detail == "the server returned NOT_FOUND"


async def test_what_is_quarantined_is_counted(shim: Running) -> None:
    """By reason, so that an operator sees what to mend."""
    await shim.post(b"no JSON")
    await shim.post(x_shopline_shop_id="1")
    text = (await shim.client.get("/metrics")).text

    for reason in ("malformed", "shop_id_mismatch"):
        assert f'pointbook_webhooks_quarantined_total{{reason="{reason}"}}' in text
    assert f'pointbook_webhooks_total{{outcome="quarantined",topic="{TOPIC}"}}' in text


async def test_denied_access_names_the_setting(shim: Running) -> None:
    """An operator reads in the log which setting to look at."""
    shim.points.error = grpc.StatusCode.PERMISSION_DENIED

    with structlog.testing.capture_logs() as logs:
        await shim.post()

    assert any(entry["log_level"] == "error" and "POINTBOOK_TOKEN" in entry["event"] for entry in logs)


async def test_slow_server() -> None:
    """SHOPLINE gets its answer in time, however long the server takes."""
    async with running(grpc_timeout_seconds=0.2) as shim:
        shim.points.delay_seconds = 5
        started = time.monotonic()

        assert_problem(await shim.post(), 503)
        assert time.monotonic() - started < 2


async def test_server_away_and_back() -> None:
    """Without a server the shim lives and says so; when it is back, webhooks are applied within two seconds."""
    points, webhooks = FakePoints(), FakeWebhooks()
    async with grpc_server(points, webhooks) as (port, _):
        pass
    async with running(grpc_address=f"127.0.0.1:{port}") as shim:
        for _ in range(3):
            assert_problem(await shim.post(), 503)
        assert_problem(await shim.client.get("/readyz"), 503)
        assert (await shim.client.get("/healthz")).status_code == 200
        async with grpc_server(points, webhooks, port):
            started = time.monotonic()
            while (await shim.post()).status_code != 200:
                assert time.monotonic() - started < 2
                await asyncio.sleep(0.05)
            assert (await shim.client.get("/readyz")).status_code == 200
        assert_problem(await shim.post(), 503)


async def test_readiness_follows_health(shim: Running) -> None:
    """A server that drains is not ready."""
    await shim.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    problem = assert_problem(await shim.client.get("/readyz"), 503)
    await shim.health.set("", health_pb2.HealthCheckResponse.SERVING)

    assert problem["type"] == "urn:pointbook:problem:not-ready"
    assert (await shim.client.get("/readyz")).status_code == 200


async def test_malformed_webhook_names_every_field(shim: Running) -> None:
    """One detail names all that is wrong and repeats no value, nor does the log."""
    raw_body = json.dumps({"buyer_id": "private buyer", "store_id": True, "updated_value": -1}).encode()

    with structlog.testing.capture_logs() as logs:
        assert_quarantined(await shim.post(raw_body))

    [kept] = shim.webhooks.kept
    assert kept.reason == webhooks_pb2.QUARANTINE_REASON_MALFORMED
    assert {part.partition(" ")[0] for part in kept.detail.split("; ")} == BODY.keys()
    assert "private" not in kept.detail + str(logs)
    assert not shim.points.updates


@pytest.mark.parametrize(
    "topic", ["customers/new", "Customers/redact", "orders/edited", "customers/disable", "x" * 1000]
)
async def test_other_topics_are_ignored(shim: Running, topic: str) -> None:
    """An authentic webhook of another topic is 200, or SHOPLINE would end the subscription; nothing is stored."""
    response = await shim.post(b"no JSON", x_shopline_topic=topic)

    assert (response.status_code, response.json()) == (200, {"outcome": "IGNORED"})
    assert not shim.points.updates


async def test_other_shop_is_quarantined(shim: Running) -> None:
    """A captured body under another shop's header changes no account."""
    assert_quarantined(await shim.post(x_shopline_shop_id="1"))

    [kept] = shim.webhooks.kept
    assert kept.reason == webhooks_pb2.QUARANTINE_REASON_SHOP_ID_MISMATCH
    assert "X-Shopline-Shop-Id" in kept.detail
    assert not shim.points.updates


async def test_other_shop_may_only_warn() -> None:
    """Told so, the shim believes the body and leaves a warning."""
    async with running(shop_id_mismatch="warn") as shim:
        with structlog.testing.capture_logs() as logs:
            response = await shim.post(x_shopline_shop_id="1")

        assert response.status_code == 200
        assert shim.points.updates[0].store_id == "1718263946864"
        assert any("mismatch" in entry["event"] for entry in logs)
        metrics = (await shim.client.get("/metrics")).text
        assert "pointbook_webhook_shop_id_mismatches_total 1.0" in metrics


async def test_missing_shop_header_claims_nothing(shim: Running) -> None:
    """The body's store is the truth, so a header that is not there contradicts nothing."""
    headers = webhook_headers(RAW_BODY)
    del headers["x-shopline-shop-id"]

    response = await shim.client.post(PATH, content=RAW_BODY, headers=headers)

    assert response.status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/"),
        ("GET", PATH),
        ("PUT", PATH),
        ("POST", PATH + "/"),
        ("POST", "/callbacks/missed-call"),
        ("POST", "/healthz"),
        ("GET", "/healthz/"),
        ("GET", "/%2e%2e/etc/passwd"),
    ],
)
async def test_everything_else_is_not_found(shim: Running, method: str, path: str) -> None:
    """Other paths, and other methods on ours, are 404."""
    assert_problem(await shim.client.request(method, path, content=b"body"), 404)


async def test_metrics_hold_no_ids(shim: Running) -> None:
    """Webhooks are counted by topic and outcome, and no sender can make up a label."""
    await shim.post()
    await shim.post(x_shopline_topic="made/up")
    await shim.post(x_shopline_topic="")
    for topic in ON_PURPOSE:
        await shim.post(x_shopline_topic=topic)
    await shim.post(x_shopline_hmac_sha256="")

    text = (await shim.client.get("/metrics")).text

    ignored = [(topic, "ignored") for topic in (*ON_PURPOSE, "other")]
    for topic, outcome in [(TOPIC, "applied"), ("missing", "quarantined"), (TOPIC, "forged"), *ignored]:
        assert f'pointbook_webhooks_total{{outcome="{outcome}",topic="{topic}"}}' in text
    assert f'pointbook_webhook_duration_seconds_count{{topic="{TOPIC}"}}' in text
    assert "made/up" not in text
    assert "1718263946864" not in text


async def test_logs_hold_no_content(shim: Running) -> None:
    """A log line has the request's id and the webhook's, unless that is none, and nothing else of the delivery."""
    with structlog.testing.capture_logs() as logs:
        response = await shim.post()
        await shim.post(x_shopline_webhook_id="w" * 65)
        await shim.post(x_shopline_hmac_sha256="0" * 64)

    text = str(logs)
    assert [entry["webhook_id"] for entry in logs] == ["b54557e48a5fbf7d70bcd043", None, "b54557e48a5fbf7d70bcd043"]
    assert response.headers["x-request-id"] in text
    for private in ("2404721679", "1718263946864", "2000001234", SECRET, signature.sign(SECRET, RAW_BODY), "0" * 64):
        assert private not in text


async def test_body_at_the_limit() -> None:
    """The limit itself is allowed, one byte more is not, with a length or in chunks."""
    async with running(max_body_bytes=10_000) as shim:
        largest = RAW_BODY + b" " * (10_000 - len(RAW_BODY))

        async def chunks(raw_body: bytes) -> AsyncIterator[bytes]:
            for start in range(0, len(raw_body), 1000):
                yield raw_body[start : start + 1000]

        for raw_body, status in [(largest, 200), (largest + b" ", 413)]:
            headers = webhook_headers(raw_body)
            whole = await shim.client.post(PATH, content=raw_body, headers=headers)
            chunked = await shim.client.post(PATH, content=chunks(raw_body), headers=headers)
            assert [whole.status_code, chunked.status_code] == [status, status]


@pytest.mark.parametrize("length", ["300000", "0" * 5_000 + "300000", "9" * 18])
async def test_declared_length_is_enough_to_refuse(shim: Running, length: str) -> None:
    """A body that is announced too large is refused before its first byte, however its length is written."""
    reader, writer = await shim.connect()
    writer.write(raw_request(b"", length=length))

    status_line = await asyncio.wait_for(reader.readuntil(b"\r\n"), 2)

    assert status_line.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("path", [PATH, "/elsewhere"])
async def test_endless_body_is_cut(shim: Running, path: str) -> None:
    """A body without an end is refused at the limit and not read for long, also where nobody wants it."""
    reader, writer = await shim.connect()
    writer.write(raw_request(b"", chunked=True).replace(PATH.encode(), path.encode()))
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 50_000_000:
            writer.write(b"10000\r\n" + b"a" * 65_536 + b"\r\n")
            sent += 65_536
            await writer.drain()

    # What the kernel's buffers swallowed counts as sent, so the shim itself read less than this.
    assert sent < 20_000_000
    assert b" 200 " not in await asyncio.wait_for(until_closed(reader), 2)


async def test_endless_trailers_are_cut(shim: Running) -> None:
    """Bytes that are no body count as well."""
    reader, writer = await shim.connect()
    writer.write(raw_request(b"", chunked=True) + b"0\r\n")
    sent = 0
    with contextlib.suppress(ConnectionError):
        while sent < 50_000_000:
            writer.write(b"x-trailer: " + b"a" * 65_536 + b"\r\n")
            sent += 65_536
            await writer.drain()

    assert sent < 20_000_000
    await asyncio.wait_for(until_closed(reader), 2)


async def test_large_headers(shim: Running) -> None:
    """Headers without an end are refused with 431."""
    reader, writer = await shim.connect()
    writer.write(b"GET /healthz HTTP/1.1\r\n" + b"x-large: " + b"a" * 70_000)

    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert answer.startswith(b"HTTP/1.1 431 ")


async def test_pipelining_is_bounded(shim: Running) -> None:
    """A few requests at once are answered in order; thousands would fill the memory and end the connection."""
    reader, writer = await shim.connect()
    request = b"GET /healthz HTTP/1.1\r\nhost: shim\r\n\r\n"
    writer.write(request * 3)
    for _ in range(3):
        assert b" 200 " in await asyncio.wait_for(reader.readuntil(b"alive\n"), 2)
    writer.write(request * 1000)

    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert b" 400 " in answer


async def test_no_http(shim: Running) -> None:
    """What is no HTTP gets a problem body, too."""
    reader, writer = await shim.connect()
    writer.write(b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n")

    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert answer.startswith(b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/problem+json")


@pytest.fixture(scope="module")
async def impatient() -> AsyncIterator[Running]:
    """One shim whose deadlines pass while a test waits."""
    async with running(header_timeout_seconds=0.3, request_timeout_seconds=0.6) as run:
        yield run


async def dribble(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Send a byte every 20 ms, as a slow client does to look alive."""
    with contextlib.suppress(ConnectionError):
        for byte in data:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.02)


@pytest.mark.parametrize("start", [b"", b"POST /webhooks/shopline HTTP/1.1\r\nx-slow: ", b"\r\n"])
async def test_slow_headers(impatient: Running, start: bytes) -> None:
    """Headers that do not end in time end the connection, however lively they dribble."""
    reader, writer = await impatient.connect()
    started = time.monotonic()
    writer.write(start)

    dribbling = asyncio.create_task(dribble(writer, b"a" * 100 if start.startswith(b"POST") else b"\r\n" * 50))
    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.25 < time.monotonic() - started < 1
    await dribbling


async def test_slow_headers_after_a_request(impatient: Running) -> None:
    """A connection that is kept alive earns no more patience."""
    reader, writer = await impatient.connect()
    writer.write(b"GET /healthz HTTP/1.1\r\nhost: shim\r\n\r\n")
    await reader.readuntil(b"alive\n")
    started = time.monotonic()
    dribbling = asyncio.create_task(dribble(writer, b"GET /healthz HTTP/1.1\r\nhost: " + b"a" * 100))

    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - started < 1
    await dribbling


@pytest.mark.parametrize("chunked", [True, False])
async def test_slow_body(impatient: Running, chunked: bool) -> None:  # noqa: FBT001 - a parameter of the test
    """A body that does not end in time is 408, and its connection closes."""
    reader, writer = await impatient.connect()
    started = time.monotonic()
    writer.write(raw_request(RAW_BODY, chunked=chunked))
    dribbling = asyncio.create_task(dribble(writer, b"1\r\na\r\n" * 20))

    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 0.5 < time.monotonic() - started < 1.5
    await dribbling


async def test_slow_body_after_its_answer(impatient: Running) -> None:
    """A body that nobody wants is not read for ever, and is not answered twice."""
    reader, writer = await impatient.connect()
    writer.write(raw_request(RAW_BODY, chunked=True).replace(PATH.encode(), b"/elsewhere"))
    dribbling = asyncio.create_task(dribble(writer, b"1\r\na\r\n" * 20))

    answer = await asyncio.wait_for(until_closed(reader), 2)

    assert answer.startswith(b"HTTP/1.1 404 ")
    assert answer.count(b"HTTP/1.1") == 1
    await dribbling


async def test_idle_connections_live_on(impatient: Running) -> None:
    """The deadlines are a request's, so a client may pause between two."""
    for _ in range(2):
        assert (await impatient.post()).status_code == 200
        await asyncio.sleep(0.7)


async def test_slow_sockets_do_not_delay_others(shim: Running) -> None:
    """Hundreds of clients that send nothing cost an honest one next to nothing."""

    async def seconds_of_posts() -> float:
        started = time.monotonic()
        for _ in range(20):
            assert (await shim.post()).status_code == 200
        return time.monotonic() - started

    alone_seconds = await seconds_of_posts()
    for _ in range(200):
        _, writer = await shim.connect()
        writer.write(b"POST /webhooks/shopline HTTP/1.1\r\nx-slow: ")
    assert await seconds_of_posts() < max(2, 4 * alone_seconds)


async def test_client_that_leaves(shim: Running) -> None:
    """A connection that breaks off inside the body raises nothing and applies nothing."""
    with structlog.testing.capture_logs() as logs:
        _, writer = await shim.connect()
        writer.write(raw_request(RAW_BODY) + RAW_BODY[:10])
        await writer.drain()
        writer.close()
        await until(lambda: bool(logs))

    assert [entry["outcome"] for entry in logs] == ["incomplete"]
    assert not shim.points.updates


async def test_stop_finishes_what_runs() -> None:
    """A webhook that is under way when the shim stops gets its 200."""
    async with running(drain_timeout_seconds=2) as shim:
        shim.points.delay_seconds = 0.5
        answering = asyncio.create_task(shim.post())
        await shim.points.asked.wait()
        shim.stop.set()

        assert (await answering).status_code == 200
        await asyncio.wait_for(shim.serving, 2)
        with pytest.raises(httpx.ConnectError):
            await shim.post()


async def test_stop_waits_for_nobody_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has not ended when the time to drain is over is answered 503."""
    received: list[bytes] = []
    data_received = LimitedHttpProtocol.data_received

    def note(self: LimitedHttpProtocol, data: bytes) -> None:
        data_received(self, data)
        received.append(data)

    monkeypatch.setattr(LimitedHttpProtocol, "data_received", note)
    async with running(drain_timeout_seconds=1) as shim:
        reader, writer = await shim.connect()
        writer.write(raw_request(RAW_BODY))
        _, idle = await shim.connect()
        idle.write(b"POST ")
        await until(lambda: len(received) == 2)
        shim.stop.set()
        started = time.monotonic()

        answer = await asyncio.wait_for(until_closed(reader), 3)
        await asyncio.wait_for(shim.serving, 3)

        assert answer.startswith(b"HTTP/1.1 503 ")
        assert time.monotonic() - started < 2


async def test_unexpected_error_is_a_plain_500(shim: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should something break, the caller learns the request's id and the log the cause."""

    def break_down(*_: object) -> bool:
        raise RuntimeError("private cause")

    monkeypatch.setattr(signature, "verify", break_down)
    with structlog.testing.capture_logs() as logs:
        response = await shim.post()

    problem = assert_problem(response, 500)
    assert "private" not in str(problem)
    assert [entry["request_id"] for entry in logs] == [response.headers["x-request-id"]]


def random_json(generator: random.Random, depth: int = 0) -> Any:
    """Make up a value that JSON can hold, or nearly."""
    leaves: list[Callable[[], Any]] = [
        lambda: None,
        lambda: generator.choice([True, False]),
        lambda: generator.randint(-(2**70), 2**70),
        lambda: generator.choice([0.5, 1e300, float("nan"), float("inf"), -0.0]),
        lambda: "".join(chr(generator.randrange(0x11000)) for _ in range(generator.randrange(9))),
        lambda: generator.choice(["INCREASE", "1e999999999", "", "\0", "9" * 5000]),
    ]
    branches: list[Callable[[], Any]] = [
        lambda: [random_json(generator, depth + 1) for _ in range(generator.randrange(4))],
        lambda: {str(key): random_json(generator, depth + 1) for key in range(generator.randrange(4))},
    ]
    return generator.choice(leaves if depth > 3 else leaves + branches)()


def random_body(generator: random.Random) -> bytes:
    """Make up a body: the sample with fields changed, bytes cut or swapped, or plain noise."""
    changes = {name: random_json(generator) for name in generator.sample(sorted(BODY), generator.randrange(4))}
    raw_body = bytearray(json.dumps(BODY | changes).encode())
    kind = generator.randrange(4)
    if kind == 0:
        return generator.randbytes(generator.randrange(200))
    if kind == 1:
        raw_body[generator.randrange(len(raw_body))] = generator.randrange(256)
    if kind == 2:
        del raw_body[generator.randrange(len(raw_body)) :]
    return bytes(raw_body)


async def deliver_all(shim: Running, raw_bodies: Iterator[bytes]) -> set[bytes]:
    """Send signed bodies one after the other over one connection, and give the status codes that came back."""
    statuses = set()
    reader, writer = await shim.connect()
    for raw_body in raw_bodies:
        writer.write(raw_request(raw_body) + raw_body)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        statuses.add(head.split()[1])
        await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
    return statuses


async def test_answers_leave_at_once(shim: Running) -> None:
    """No answer waits for the client's acknowledgement, which would cost 40 ms each on a connection that is kept."""
    started = time.monotonic()

    await deliver_all(shim, iter([RAW_BODY] * 25))

    assert time.monotonic() - started < 0.8


async def test_random_signed_bodies(shim: Running) -> None:
    """Thousands of authentic but random bodies are all 200, and no exception is logged."""
    generator = random.Random(20250601)  # noqa: S311 - the same in every run
    raw_bodies = iter([random_body(generator) for _ in range(4000)])

    with structlog.testing.capture_logs() as logs:
        statuses = await asyncio.gather(*(deliver_all(shim, raw_bodies) for _ in range(16)))

    assert set().union(*statuses) == {b"200"}
    assert shim.points.updates
    assert shim.webhooks.kept
    assert not [entry for entry in logs if entry["log_level"] in {"error", "critical"}]


async def test_random_requests(shim: Running) -> None:
    """Damaged requests are answered below 500 or dropped, and the shim serves on."""
    generator = random.Random(19700101)  # noqa: S311 - the same in every run
    whole = raw_request(RAW_BODY) + RAW_BODY

    async def send(request: bytes) -> bytes:
        reader, writer = await shim.connect()
        writer.write(request)
        writer.write_eof()
        return await asyncio.wait_for(until_closed(reader), 5)

    damaged = []
    for _ in range(300):
        request = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            request[generator.randrange(len(request))] = generator.randrange(256)
        damaged.append(bytes(request))
    answers = await asyncio.gather(*(send(request) for request in damaged))

    assert not [answer for answer in answers if answer.startswith(b"HTTP/1.1 5")]
    assert (await shim.post()).status_code == 200


async def test_a_length_with_leading_zeros_is_its_number(shim: Running) -> None:
    """Thousands of zeros before a small length are no fault of ours."""
    reader, writer = await shim.connect()
    writer.write(raw_request(RAW_BODY, length="0" * 5_000 + str(len(RAW_BODY))) + RAW_BODY)

    status_line = await asyncio.wait_for(reader.readuntil(b"\r\n"), 2)

    assert status_line.startswith(b"HTTP/1.1 200 ")

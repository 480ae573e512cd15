"""Webhooks to a shim with a fake gRPC server.

Source: docs/reference/shopline-webhooks.md#answers
"""

import asyncio
import base64
import json
import random
import time
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import pytest
import structlog
from grpc_health.v1 import health_pb2
from pydantic import SecretStr

from pointbook.v1 import points_pb2, webhooks_pb2
from pointbook_client.testing.ports import free_port
from pointbook_common.shopline_webhooks import POINTS_TOPIC
from pointbook_server.errors import FieldViolation, PointbookError, store_not_found
from pointbook_server.reasons import Reason
from shopline_shim import signature
from support.examples import examples
from support.fake_servers import (
    BODY,
    RAW_BODY,
    FakePoints,
    FakeWebhooks,
    RunningShim,
    assert_problem,
    fake_server,
    shim_with_fakes,
    signed_headers,
)
from support.shims import PATH, SECRET

IGNORED_TOPICS = (
    "app_memberSystem_points/update",
    "apps/installed_uninstalled",
    "customers/disable",
    "customers/enable",
)
"""Ignored topics that are counted by name."""


async def test_signed_webhook_is_one_grpc_call_and_200(shim: RunningShim) -> None:
    response = await shim.post()

    assert response.status_code == 200
    assert response.json() == {"outcome": "APPLIED"}
    [update] = shim.points.updates
    assert (update.merchant_id, update.store_id, update.buyer_id) == ("2000001234", "1718263946864", "2404721679")
    assert (update.updated_value, update.points_balance) == (20, 20)
    assert update.updated_scene == points_pb2.POINTS_UPDATE_SCENE_SUCCESSFUL_REGISTRATION
    assert update.webhook.webhook_id == "b54557e48a5fbf7d70bcd043"


async def test_base64_signature_is_accepted(shim: RunningShim) -> None:
    digest = bytes.fromhex(signature.sign(SECRET, RAW_BODY))

    response = await shim.post(x_shopline_hmac_sha256=base64.b64encode(digest).decode())

    assert response.status_code == 200


async def test_signature_of_any_secret_is_accepted(shim: RunningShim) -> None:
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
async def test_wrong_signature_is_401(shim: RunningShim, header: str) -> None:
    problem = assert_problem(await shim.post(x_shopline_hmac_sha256=header), 401)

    assert signature.sign(SECRET, RAW_BODY) not in str(problem)
    assert not shim.points.updates


async def test_signature_is_checked_before_topic_and_body(shim: RunningShim) -> None:
    headers = {"x-shopline-topic": "customers/redact", "x-shopline-hmac-sha256": b"\xff" * 64}

    assert_problem(await shim.client.post(PATH, content=b"{"), 401)
    assert_problem(await shim.client.post(PATH, content=b"{", headers=headers), 401)  # type: ignore[arg-type] # httpx sends bytes, too


async def test_duplicate_is_200(shim: RunningShim) -> None:
    """It is committed, so SHOPLINE must not retry."""
    shim.points.outcome = points_pb2.APPLY_OUTCOME_DUPLICATE

    response = await shim.post()

    assert (response.status_code, response.json()) == (200, {"outcome": "DUPLICATE"})
    assert "x-pointbook-webhook-id-differs" not in response.headers


async def test_an_outcome_of_a_newer_server_is_200(shim: RunningShim) -> None:
    """It is committed, so SHOPLINE must not retry."""
    shim.points.outcome = 99  # type: ignore[assignment] # no value that this release knows

    response = await shim.post()

    assert (response.status_code, response.json()) == (200, {"outcome": "UNRECOGNIZED"})
    text = (await shim.client.get("/metrics")).text
    assert f'pointbook_webhooks_total{{outcome="unrecognized",topic="{POINTS_TOPIC}"}} 1.0' in text


async def test_duplicate_from_another_webhook_has_a_header_and_is_counted(shim: RunningShim) -> None:
    shim.points.outcome = points_pb2.APPLY_OUTCOME_DUPLICATE
    counter = "pointbook_webhook_duplicates_with_other_id_total"
    assert f"{counter} 0.0" in (await shim.client.get("/metrics")).text
    shim.points.webhook_id_differs = True

    response = await shim.post()

    assert (response.status_code, response.json()) == (200, {"outcome": "DUPLICATE"})
    assert response.headers["x-pointbook-webhook-id-differs"] == "true"
    assert f"{counter} 1.0" in (await shim.client.get("/metrics")).text


async def test_request_id_is_sent_to_the_server_and_in_the_response(shim: RunningShim) -> None:
    response = await shim.post()

    [metadata] = shim.points.metadata
    assert response.headers["x-request-id"] == metadata["x-request-id"]
    assert "authorization" not in metadata
    assert "server" not in response.headers


async def test_token_is_sent_with_every_call() -> None:
    async with shim_with_fakes(token=SecretStr("points-token")) as shim:
        await shim.post()

        assert shim.points.metadata[0]["authorization"] == "Bearer points-token"


DEFINITE_CODES = {"INVALID_ARGUMENT", "NOT_FOUND", "ALREADY_EXISTS", "FAILED_PRECONDITION", "OUT_OF_RANGE"}


def assert_quarantined(response: httpx.Response) -> None:
    """Check that a response is 200 with the outcome QUARANTINED."""
    assert (response.status_code, response.json()) == (200, {"outcome": "QUARANTINED"})


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name in DEFINITE_CODES])
async def test_definite_error_of_the_server_is_quarantined(shim: RunningShim, code: grpc.StatusCode) -> None:
    shim.points.error = code

    assert_quarantined(await shim.post())
    [webhook] = shim.webhooks.quarantined
    assert webhook.detail == f"the server returned {code.name}"


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.name not in {"OK", *DEFINITE_CODES}])
async def test_retryable_error_of_the_server_is_503(shim: RunningShim, code: grpc.StatusCode) -> None:
    shim.points.error = code

    response = await shim.post()

    problem = assert_problem(response, 503)
    assert "retry-after" in response.headers
    assert "2404721679" not in str(problem)
    assert not shim.webhooks.quarantined


def registered_elsewhere() -> PointbookError:
    """Return the refusal of a store of another merchant."""
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
            registered_elsewhere(),
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
async def test_refusal_is_quarantined_with_its_reason_and_without_values(
    shim: RunningShim, refusal: PointbookError, reason: str, detail: str
) -> None:
    shim.points.refusal = refusal

    assert_quarantined(await shim.post())
    [webhook] = shim.webhooks.quarantined
    assert webhooks_pb2.QuarantineReason.Name(webhook.reason) == f"QUARANTINE_REASON_{reason}"
    assert webhook.detail == detail


async def test_quarantined_webhook_has_its_body_and_headers_without_signature(shim: RunningShim) -> None:
    raw_body = b"\xff no JSON \x00"
    headers = [(name.encode(), value.encode()) for name, value in signed_headers(raw_body).items()]

    response = await shim.client.post(PATH, content=raw_body, headers=[*headers, (b"X-Other", b"caf\xe9")])

    assert_quarantined(response)
    [webhook] = shim.webhooks.quarantined
    assert (webhook.merchant_id, webhook.topic, webhook.body) == ("2000001234", POINTS_TOPIC, raw_body)
    assert [(header.name, header.value) for header in webhook.headers] == [
        (name, value) for name, value in signed_headers(raw_body).items() if name != "x-shopline-hmac-sha256"
    ]
    assert shim.webhooks.metadata[0]["x-request-id"] == response.headers["x-request-id"]


@pytest.mark.parametrize("merchant", ["", "two words", "m" * 65, None])
async def test_webhook_without_a_merchant_is_quarantined_under_the_empty_merchant(
    shim: RunningShim, merchant: str | None
) -> None:
    headers = signed_headers(RAW_BODY) | {"x-shopline-merchant-id": merchant or ""}
    if merchant is None:
        del headers["x-shopline-merchant-id"]

    assert_quarantined(await shim.client.post(PATH, content=RAW_BODY, headers=headers))
    [webhook] = shim.webhooks.quarantined
    assert webhook.merchant_id == ""
    assert "X-Shopline-Merchant-Id" in webhook.detail


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
async def test_failed_quarantine_is_503_and_logged(shim: RunningShim, code: grpc.StatusCode) -> None:
    shim.webhooks.error = code
    counter = f'pointbook_webhooks_total{{outcome="quarantine_failed",topic="{POINTS_TOPIC}"}}'

    with structlog.testing.capture_logs() as logs:
        response = await shim.post(b"no JSON")

    assert_problem(response, 503)
    assert "retry-after" in response.headers
    [entry] = [entry for entry in logs if entry["log_level"] == "error"]
    assert entry["code"] == code.name
    assert ("POINTBOOK_TOKEN" in str(entry["hint"])) == (code.name in {"UNAUTHENTICATED", "PERMISSION_DENIED"})
    assert counter in (await shim.client.get("/metrics")).text


async def test_apply_and_quarantine_share_one_deadline() -> None:
    async with shim_with_fakes(grpc_timeout_seconds=0.6) as shim:
        shim.points.delay_seconds, shim.webhooks.delay_seconds = 0.4, 5
        shim.points.error = grpc.StatusCode.NOT_FOUND
        started = time.monotonic()

        assert_problem(await shim.post(), 503)
        assert time.monotonic() - started < 1


async def test_quarantined_webhooks_are_counted_by_reason(shim: RunningShim) -> None:
    await shim.post(b"no JSON")
    await shim.post(x_shopline_shop_id="1")
    text = (await shim.client.get("/metrics")).text

    for reason in ("malformed", "shop_id_mismatch"):
        assert f'pointbook_webhooks_quarantined_total{{reason="{reason}"}}' in text
    assert f'pointbook_webhooks_total{{outcome="quarantined",topic="{POINTS_TOPIC}"}}' in text


async def test_denied_access_is_logged_with_the_setting(shim: RunningShim) -> None:
    shim.points.error = grpc.StatusCode.PERMISSION_DENIED

    with structlog.testing.capture_logs() as logs:
        await shim.post()

    assert any(entry["log_level"] == "error" and "POINTBOOK_TOKEN" in entry["event"] for entry in logs)


async def test_slow_server_is_503_in_time() -> None:
    async with shim_with_fakes(grpc_timeout_seconds=0.2) as shim:
        shim.points.delay_seconds = 5
        started = time.monotonic()

        assert_problem(await shim.post(), 503)
        assert time.monotonic() - started < 2


async def test_unreachable_server_is_503_at_once() -> None:
    """The standard retries would take 1.2 seconds at least."""
    async with shim_with_fakes(grpc_address=f"127.0.0.1:{free_port()}") as shim:
        started = time.monotonic()
        assert_problem(await shim.post(), 503)
        assert_problem(await shim.post(), 503)
        assert time.monotonic() - started < 1.2


async def test_webhooks_are_applied_within_two_seconds_after_the_server_is_back() -> None:
    points, webhooks = FakePoints(), FakeWebhooks()
    async with fake_server(points, webhooks) as (port, _):
        pass
    async with shim_with_fakes(grpc_address=f"127.0.0.1:{port}") as shim:
        for _ in range(3):
            assert_problem(await shim.post(), 503)
        assert_problem(await shim.client.get("/readyz"), 503)
        assert (await shim.client.get("/healthz")).status_code == 200
        async with fake_server(points, webhooks, port):
            started = time.monotonic()
            while (await shim.post()).status_code != 200:
                assert time.monotonic() - started < 2
                await asyncio.sleep(0.05)
            assert (await shim.client.get("/readyz")).status_code == 200
        assert_problem(await shim.post(), 503)


async def test_shim_is_not_ready_while_the_server_is_not_serving(shim: RunningShim) -> None:
    await shim.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    problem = assert_problem(await shim.client.get("/readyz"), 503)
    await shim.health.set("", health_pb2.HealthCheckResponse.SERVING)

    assert problem["type"] == "urn:pointbook:problem:not-ready"
    assert (await shim.client.get("/readyz")).status_code == 200


async def test_malformed_webhook_is_quarantined_with_every_wrong_field(shim: RunningShim) -> None:
    raw_body = json.dumps({"buyer_id": "private buyer", "store_id": True, "updated_value": -1}).encode()

    with structlog.testing.capture_logs() as logs:
        assert_quarantined(await shim.post(raw_body))

    [webhook] = shim.webhooks.quarantined
    assert webhook.reason == webhooks_pb2.QUARANTINE_REASON_MALFORMED
    assert {part.partition(" ")[0] for part in webhook.detail.split("; ")} == BODY.keys()
    assert "private" not in webhook.detail + str(logs)
    assert not shim.points.updates


@pytest.mark.parametrize(
    "topic", ["customers/new", "Customers/redact", "orders/edited", "customers/disable", "x" * 1000]
)
async def test_other_topics_are_200_and_ignored(shim: RunningShim, topic: str) -> None:
    """Any other status would make SHOPLINE end the subscription."""
    response = await shim.post(b"no JSON", x_shopline_topic=topic)

    assert (response.status_code, response.json()) == (200, {"outcome": "IGNORED"})
    assert not shim.points.updates


async def test_webhook_with_another_shop_id_is_quarantined(shim: RunningShim) -> None:
    assert_quarantined(await shim.post(x_shopline_shop_id="1"))

    [webhook] = shim.webhooks.quarantined
    assert webhook.reason == webhooks_pb2.QUARANTINE_REASON_SHOP_ID_MISMATCH
    assert "X-Shopline-Shop-Id" in webhook.detail
    assert not shim.points.updates


async def test_webhook_with_another_shop_id_is_applied_with_a_warning_if_set_so() -> None:
    async with shim_with_fakes(shop_id_mismatch="warn") as shim:
        with structlog.testing.capture_logs() as logs:
            response = await shim.post(x_shopline_shop_id="1")

        assert response.status_code == 200
        assert shim.points.updates[0].store_id == "1718263946864"
        assert any("mismatch" in entry["event"] for entry in logs)
        metrics = (await shim.client.get("/metrics")).text
        assert "pointbook_webhook_shop_id_mismatches_total 1.0" in metrics


async def test_webhook_without_shop_id_is_applied(shim: RunningShim) -> None:
    headers = signed_headers(RAW_BODY)
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
async def test_other_paths_and_methods_are_404(shim: RunningShim, method: str, path: str) -> None:
    assert_problem(await shim.client.request(method, path, content=b"body"), 404)


async def test_metrics_have_no_ids_and_no_unknown_topics(shim: RunningShim) -> None:
    await shim.post()
    await shim.post(x_shopline_topic="made/up")
    await shim.post(x_shopline_topic="")
    for topic in IGNORED_TOPICS:
        await shim.post(x_shopline_topic=topic)
    await shim.post(x_shopline_hmac_sha256="")

    text = (await shim.client.get("/metrics")).text

    ignored = [(topic, "ignored") for topic in (*IGNORED_TOPICS, "other")]
    for topic, outcome in [(POINTS_TOPIC, "applied"), ("missing", "quarantined"), (POINTS_TOPIC, "forged"), *ignored]:
        assert f'pointbook_webhooks_total{{outcome="{outcome}",topic="{topic}"}}' in text
    assert f'pointbook_webhook_duration_seconds_count{{topic="{POINTS_TOPIC}"}}' in text
    assert "made/up" not in text
    assert "1718263946864" not in text


async def test_logs_have_no_content_of_a_webhook(shim: RunningShim) -> None:
    with structlog.testing.capture_logs() as logs:
        response = await shim.post()
        await shim.post(x_shopline_webhook_id="w" * 65)
        await shim.post(x_shopline_hmac_sha256="0" * 64)

    text = str(logs)
    assert [entry["webhook_id"] for entry in logs] == ["b54557e48a5fbf7d70bcd043", None, "b54557e48a5fbf7d70bcd043"]
    assert response.headers["x-request-id"] in text
    for private in ("2404721679", "1718263946864", "2000001234", SECRET, signature.sign(SECRET, RAW_BODY), "0" * 64):
        assert private not in text


async def test_unexpected_error_is_500_without_its_cause(shim: RunningShim, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(*_: object) -> bool:
        raise RuntimeError("private cause")

    monkeypatch.setattr(signature, "verify", raise_error)
    with structlog.testing.capture_logs() as logs:
        response = await shim.post()

    problem = assert_problem(response, 500)
    assert "private" not in str(problem)
    assert [entry["request_id"] for entry in logs] == [response.headers["x-request-id"]]


def random_json(generator: random.Random, depth: int = 0) -> Any:
    """Return a random value of JSON or of its extensions NaN and Infinity."""
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
    """Return the example body with random changes, or random bytes."""
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


async def test_random_signed_bodies_are_200_and_log_no_errors(shim: RunningShim) -> None:
    generator = random.Random(20250601)  # noqa: S311 - repeatable
    raw_bodies = iter([random_body(generator) for _ in range(examples(4_000))])

    with structlog.testing.capture_logs() as logs:
        statuses = await asyncio.gather(*(shim.deliver_all(raw_bodies) for _ in range(16)))

    assert set().union(*statuses) == {b"200"}
    assert shim.points.updates
    assert shim.webhooks.quarantined
    assert not [entry for entry in logs if entry["log_level"] in {"error", "critical"}]

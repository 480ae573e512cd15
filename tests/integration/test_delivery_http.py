"""SMS by an HTTP gateway: the requests, and the outcome of every kind of failure."""

import asyncio
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pointbook_server.delivery import http_gateway
from pointbook_server.delivery.http_gateway import CONNECTIONS_MAX, HttpGatewaySender
from pointbook_server.delivery.sender import DeliveryFailedError, DeliveryUncertainError, FailureKind
from support.certificates import loopback_tls
from support.json_logs import json_logs
from support.provider_servers import (
    CODE,
    LOOP_DELAY_SECONDS_MAX,
    MESSAGE,
    TEXT,
    HttpServer,
    error_chain_text,
    http_server,
    loop_delays,
)
from support.servers import server_settings
from support.waiting import until

API_KEY = "s3cret-key"
SMS = replace(MESSAGE, destination="+8613812345678", subject="")


@pytest.fixture
async def gateway() -> AsyncIterator[HttpServer]:
    """A gateway on loopback."""
    async with http_server() as server:
        yield server


def build_sender(
    port: int, path: str = f"/sms?key={API_KEY}", scheme: str = "http", **changes: Any
) -> HttpGatewaySender:
    """Build a sender for a gateway on loopback."""
    url = f"{scheme}://127.0.0.1:{port}{path}"
    settings = server_settings(
        **{"sms_url": url, "sms_headers": json.dumps({"X-Key": API_KEY}), **changes}
    ).sms_gateway()
    assert settings is not None
    return HttpGatewaySender(settings)


def secrets_in(text: str) -> list[str]:
    """Return the secrets that a text contains and a log must not."""
    return [secret for secret in (CODE, API_KEY, "13812345678", "/sms") if secret in text]


async def test_gateway_receives_destination_text_and_challenge_as_json(gateway: HttpServer) -> None:
    await build_sender(gateway.port).send(replace(SMS, text=TEXT))

    (request,) = gateway.requests
    assert request.request_line == f"POST /sms?key={API_KEY} HTTP/1.1"
    assert request.json == {"to": "+8613812345678", "text": TEXT, "challenge_id": "challenge-1"}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-key"] == API_KEY


async def test_placeholders_are_replaced_in_values_at_any_depth(gateway: HttpServer) -> None:
    """Field names and other values stay as they are."""
    template = {
        "{to}": ["{to}", {"body": "[Shop] {text}", "{text}": None}],
        "ref": "{challenge_id}/{challenge_id}",
        "ttl": 300,
        "flash": False,
        "other": "{code} {{to}}",
    }
    await build_sender(gateway.port, sms_body=json.dumps(template), sms_method="PUT").send(SMS)

    (request,) = gateway.requests
    assert request.request_line.startswith("PUT ")
    assert request.json == {
        "{to}": ["+8613812345678", {"body": f"[Shop] {SMS.text}", "{text}": None}],
        "ref": "challenge-1/challenge-1",
        "ttl": 300,
        "flash": False,
        "other": "{code} {+8613812345678}",
    }


@pytest.mark.parametrize(
    "text", ['", "to": "+1900666", "x": "', "{to} {challenge_id}", "\\", "\\u0022", "\x00\x1f\u2028", "${to} $to %s"]
)
async def test_text_is_never_read_as_json_or_as_a_placeholder(gateway: HttpServer, text: str) -> None:
    await build_sender(gateway.port).send(replace(SMS, text=text))

    assert gateway.requests[0].json == {"to": "+8613812345678", "text": text, "challenge_id": "challenge-1"}


async def test_configured_header_replaces_the_default_one(gateway: HttpServer) -> None:
    await build_sender(gateway.port, sms_headers='{"content-type": "application/vnd.sms+json"}').send(SMS)

    assert gateway.requests[0].headers["content-type"] == "application/vnd.sms+json"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429])
async def test_4xx_answer_is_a_definite_failure(gateway: HttpServer, status: int) -> None:
    gateway.status = status
    with pytest.raises(DeliveryFailedError, match=str(status)) as caught:
        await build_sender(gateway.port).send(SMS)

    assert caught.value.kind is FailureKind.REFUSED
    assert secrets_in(error_chain_text(caught.value)) == []


@pytest.mark.parametrize("status", [302, 500, 502, 503, 504])
async def test_3xx_and_5xx_answers_are_uncertain(gateway: HttpServer, status: int) -> None:
    gateway.status = status
    with pytest.raises(DeliveryUncertainError, match=str(status)) as caught:
        await build_sender(gateway.port).send(SMS)

    assert secrets_in(error_chain_text(caught.value)) == []


async def test_success_statuses_are_configurable(gateway: HttpServer) -> None:
    sender = build_sender(gateway.port, sms_success="202, 300-399,409")
    for gateway.status in (202, 302, 399, 409):
        await sender.send(SMS)
    gateway.status = 200
    with pytest.raises(DeliveryUncertainError):
        await sender.send(SMS)


async def test_redirects_are_not_followed(gateway: HttpServer) -> None:
    gateway.status = 307
    gateway.headers = f"Location: http://127.0.0.1:{gateway.port}/elsewhere\r\n"
    with pytest.raises(DeliveryUncertainError):
        await build_sender(gateway.port).send(SMS)

    assert len(gateway.requests) == 1


async def test_proxy_variables_are_ignored(gateway: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    await build_sender(gateway.port).send(SMS)

    assert len(gateway.requests) == 1


async def test_closed_port_is_unreachable() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DeliveryFailedError) as caught:
            await build_sender(unused.getsockname()[1]).send(SMS)

    assert caught.value.kind is FailureKind.UNREACHABLE
    assert secrets_in(error_chain_text(caught.value)) == []


@pytest.mark.parametrize("trusted", [True, False])
async def test_certificates_are_checked(*, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with an untrusted certificate gets neither headers nor message."""
    context, file = loopback_tls(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
    async with http_server(context) as gateway:
        sender = build_sender(gateway.port, scheme="https")
        if trusted:
            await sender.send(SMS)
        else:
            with pytest.raises(DeliveryFailedError, match="SSLCertVerificationError") as caught:
                await sender.send(SMS)
            assert caught.value.kind is FailureKind.UNREACHABLE

        assert len(gateway.requests) == int(trusted)


async def test_connection_closed_without_an_answer_is_uncertain(gateway: HttpServer) -> None:
    gateway.behavior = "cut"
    with pytest.raises(DeliveryUncertainError) as caught:
        await build_sender(gateway.port).send(SMS)

    assert len(gateway.requests) == 1
    assert secrets_in(error_chain_text(caught.value)) == []


async def test_missing_answer_is_uncertain(gateway: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_gateway, "RESPONSE_TIMEOUT_SECONDS", 0.2)
    gateway.behavior = "hang"
    with pytest.raises(DeliveryUncertainError):
        await build_sender(gateway.port).send(SMS)


async def test_message_without_a_free_connection_is_unreachable(
    gateway: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_gateway, "CONNECT_STEP_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(http_gateway, "CONNECTIONS_MAX", 1)
    gateway.behavior = "hang"
    sender = build_sender(gateway.port)
    first = asyncio.create_task(sender.send(SMS))
    await until(lambda: bool(gateway.requests))
    with pytest.raises(DeliveryFailedError) as caught:
        await sender.send(SMS)
    first.cancel()
    await asyncio.wait([first])

    assert caught.value.kind is FailureKind.UNREACHABLE
    assert len(gateway.requests) == 1


async def test_hanging_gateway_blocks_neither_the_loop_nor_its_caller(gateway: HttpServer) -> None:
    gateway.behavior = "hang"
    sender = build_sender(gateway.port)
    began = time.monotonic()
    async with loop_delays() as delay:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1):
                await sender.send(SMS)
        assert delay() < LOOP_DELAY_SECONDS_MAX
    assert time.monotonic() - began < 3
    assert secrets_in(error_chain_text(caught.value)) == []
    await until(lambda: gateway.open == 0)
    gateway.behavior = "answer"
    await sender.send(SMS)


async def test_endless_answer_is_not_read(gateway: HttpServer) -> None:
    gateway.behavior = "endless"
    await build_sender(gateway.port).send(SMS)
    await until(lambda: gateway.open == 0)

    assert gateway.sent_bytes < 32 * 1024**2


async def test_burst_of_messages_keeps_to_the_connection_limit(
    gateway: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_gateway, "CONNECT_STEP_TIMEOUT_SECONDS", 60.0)
    sender = build_sender(gateway.port)
    await asyncio.gather(*(sender.send(SMS) for _ in range(100)))

    assert len(gateway.requests) == 100
    assert gateway.max_open <= CONNECTIONS_MAX + 1


async def test_closing_the_sender_closes_its_connections(gateway: HttpServer) -> None:
    gateway.behavior = "hang"
    sender = build_sender(gateway.port)
    sending = asyncio.create_task(sender.send(SMS))
    await until(lambda: bool(gateway.requests))
    await sender.aclose()
    await until(lambda: gateway.open == 0)
    with pytest.raises(DeliveryUncertainError):
        await sending


async def test_neither_sender_nor_library_logs_a_secret(gateway: HttpServer, capfd: pytest.CaptureFixture[str]) -> None:
    with json_logs() as written:
        logging.getLogger("canary").warning("logs work")
        await build_sender(gateway.port).send(SMS)
        gateway.behavior = "cut"
        with pytest.raises(DeliveryUncertainError):
            await build_sender(gateway.port).send(SMS)
    logged = written.getvalue() + "".join(capfd.readouterr())

    assert "logs work" in logged
    assert secrets_in(logged) == []
    assert "127.0.0.1" not in logged

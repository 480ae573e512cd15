"""SMS by an HTTP gateway: what it is sent, and what is made of everything that goes wrong."""

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
from support.harness import server_settings
from support.json_logs import json_logs
from support.provider_servers import (
    CODE,
    MESSAGE,
    TEXT,
    HttpServer,
    everything_told_by,
    http_server,
    loop_delays,
)
from support.waiting import until

API_KEY = "s3cret-key"
SMS = replace(MESSAGE, destination="+8613812345678", subject="")


@pytest.fixture
async def gateway() -> AsyncIterator[HttpServer]:
    """A gateway on loopback."""
    async with http_server() as server:
        yield server


def sender_to(port: int, path: str = f"/sms?key={API_KEY}", scheme: str = "http", **changes: Any) -> HttpGatewaySender:
    """Make a sender for a gateway on loopback."""
    url = f"{scheme}://127.0.0.1:{port}{path}"
    found = server_settings(**{"sms_url": url, "sms_headers": json.dumps({"X-Key": API_KEY}), **changes}).sms_gateway()
    assert found is not None
    return HttpGatewaySender(found)


def secrets_in(told: str) -> list[str]:
    """List what a log must not hold."""
    return [secret for secret in (CODE, API_KEY, "13812345678", "/sms") if secret in told]


async def test_a_message_arrives_whole(gateway: HttpServer) -> None:
    """By default a gateway is posted the destination, the text and the challenge, as JSON."""
    await sender_to(gateway.port).send(replace(SMS, text=TEXT))

    (request,) = gateway.requests
    assert request.line == f"POST /sms?key={API_KEY} HTTP/1.1"
    assert request.json == {"to": "+8613812345678", "text": TEXT, "challenge_id": "challenge-1"}
    assert request.headers["content-type"] == "application/json"
    assert request.headers["x-key"] == API_KEY


async def test_a_template_of_the_providers_own(gateway: HttpServer) -> None:
    """Placeholders work at any depth and beside other text; names of fields and other values stay as they are."""
    template = {
        "{to}": ["{to}", {"body": "[Shop] {text}", "{text}": None}],
        "ref": "{challenge_id}/{challenge_id}",
        "ttl": 300,
        "flash": False,
        "other": "{code} {{to}}",
    }
    await sender_to(gateway.port, sms_body=json.dumps(template), sms_method="PUT").send(SMS)

    (request,) = gateway.requests
    assert request.line.startswith("PUT ")
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
async def test_a_text_cannot_break_out(gateway: HttpServer, text: str) -> None:
    """What is filled in is data: it ends no string, and is not filled in turn."""
    await sender_to(gateway.port).send(replace(SMS, text=text))

    assert gateway.requests[0].json == {"to": "+8613812345678", "text": text, "challenge_id": "challenge-1"}


async def test_a_header_replaces_ours(gateway: HttpServer) -> None:
    """Some gateways want a content type of their own, whatever the case of its name."""
    await sender_to(gateway.port, sms_headers='{"content-type": "application/vnd.sms+json"}').send(SMS)

    assert gateway.requests[0].headers["content-type"] == "application/vnd.sms+json"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 429])
async def test_a_refusal_is_definite(gateway: HttpServer, status: int) -> None:
    """A gateway that answers 4xx has not taken the message."""
    gateway.status = status
    with pytest.raises(DeliveryFailedError, match=str(status)) as caught:
        await sender_to(gateway.port).send(SMS)

    assert caught.value.kind is FailureKind.REFUSED
    assert secrets_in(everything_told_by(caught.value)) == []


@pytest.mark.parametrize("status", [302, 500, 502, 503, 504])
async def test_other_answers_are_uncertain(gateway: HttpServer, status: int) -> None:
    """A gateway that stumbles may have sent the message before."""
    gateway.status = status
    with pytest.raises(DeliveryUncertainError, match=str(status)) as caught:
        await sender_to(gateway.port).send(SMS)

    assert secrets_in(everything_told_by(caught.value)) == []


async def test_statuses_of_success_are_chosen(gateway: HttpServer) -> None:
    """Some gateways have their own idea of yes, and of no."""
    sender = sender_to(gateway.port, sms_success="202, 300-399,409")
    for gateway.status in (202, 302, 399, 409):
        await sender.send(SMS)
    gateway.status = 200
    with pytest.raises(DeliveryUncertainError):
        await sender.send(SMS)


async def test_redirects_are_not_followed(gateway: HttpServer) -> None:
    """A code goes nowhere but to the gateway that is set."""
    gateway.status = 307
    gateway.headers = f"Location: http://127.0.0.1:{gateway.port}/elsewhere\r\n"
    with pytest.raises(DeliveryUncertainError):
        await sender_to(gateway.port).send(SMS)

    assert len(gateway.requests) == 1


async def test_proxies_of_the_environment_are_not_asked(gateway: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A code goes nowhere but to the gateway that is set."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    await sender_to(gateway.port).send(SMS)

    assert len(gateway.requests) == 1


async def test_a_closed_port_is_unreachable() -> None:
    """Without a connection nothing can have been sent."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DeliveryFailedError) as caught:
            await sender_to(unused.getsockname()[1]).send(SMS)

    assert caught.value.kind is FailureKind.UNREACHABLE
    assert secrets_in(everything_told_by(caught.value)) == []


@pytest.mark.parametrize("trusted", [True, False])
async def test_certificates_are_checked(*, trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger gets neither the headers nor the message; SSL_CERT_FILE names other authorities."""
    context, file = loopback_tls(tmp_path)
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(file))
    async with http_server(context) as gateway:
        sender = sender_to(gateway.port, scheme="https")
        if trusted:
            await sender.send(SMS)
        else:
            with pytest.raises(DeliveryFailedError, match="SSLCertVerificationError") as caught:
                await sender.send(SMS)
            assert caught.value.kind is FailureKind.UNREACHABLE

        assert len(gateway.requests) == int(trusted)


async def test_a_connection_that_ends_without_an_answer_is_uncertain(gateway: HttpServer) -> None:
    """The gateway has the message, and may have sent it on."""
    gateway.manner = "cut"
    with pytest.raises(DeliveryUncertainError) as caught:
        await sender_to(gateway.port).send(SMS)

    assert len(gateway.requests) == 1
    assert secrets_in(everything_told_by(caught.value)) == []


async def test_no_answer_is_uncertain(gateway: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway has the message, and may have sent it on."""
    monkeypatch.setattr(http_gateway, "RESPONSE_TIMEOUT_SECONDS", 0.2)
    gateway.manner = "hang"
    with pytest.raises(DeliveryUncertainError):
        await sender_to(gateway.port).send(SMS)


async def test_no_free_connection_is_unreachable(gateway: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind others that hang, a message fails definitely and in time: it never left."""
    monkeypatch.setattr(http_gateway, "CONNECT_STEP_TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(http_gateway, "CONNECTIONS_MAX", 1)
    gateway.manner = "hang"
    sender = sender_to(gateway.port)
    first = asyncio.create_task(sender.send(SMS))
    await until(lambda: bool(gateway.requests))
    with pytest.raises(DeliveryFailedError) as caught:
        await sender.send(SMS)
    first.cancel()
    await asyncio.wait([first])

    assert caught.value.kind is FailureKind.UNREACHABLE
    assert len(gateway.requests) == 1


async def test_a_gateway_that_hangs_holds_nothing_up(gateway: HttpServer) -> None:
    """The loop goes on, and the caller's five seconds are five seconds."""
    gateway.manner = "hang"
    sender = sender_to(gateway.port)
    began = time.monotonic()
    async with loop_delays() as delay:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(5):
                await sender.send(SMS)
        assert delay() < 0.05
    assert time.monotonic() - began < 5.5
    assert secrets_in(everything_told_by(caught.value)) == []
    await until(lambda: gateway.open == 0)
    gateway.manner = "answer"
    await sender.send(SMS)


async def test_an_endless_answer_is_not_read(gateway: HttpServer) -> None:
    """The status decides, and the connection ends there."""
    gateway.manner = "endless"
    await sender_to(gateway.port).send(SMS)
    await until(lambda: gateway.open == 0)

    assert gateway.sent_bytes < 32 * 1024**2


async def test_many_messages_share_few_connections(gateway: HttpServer) -> None:
    """A burst waits for its turn, and all of it arrives."""
    sender = sender_to(gateway.port)
    await asyncio.gather(*(sender.send(SMS) for _ in range(100)))

    assert len(gateway.requests) == 100
    assert gateway.most_open <= CONNECTIONS_MAX + 1


async def test_closing_ends_connections(gateway: HttpServer) -> None:
    """A server that stops leaves nothing behind."""
    gateway.manner = "hang"
    sender = sender_to(gateway.port)
    sending = asyncio.create_task(sender.send(SMS))
    await until(lambda: bool(gateway.requests))
    await sender.aclose()
    await until(lambda: gateway.open == 0)
    with pytest.raises(DeliveryUncertainError):
        await sending


async def test_nothing_is_logged(gateway: HttpServer, capfd: pytest.CaptureFixture[str]) -> None:
    """The library tells of every URL; none of it comes to our logs, however much is asked for."""
    with json_logs() as written:
        logging.getLogger("canary").warning("logs work")
        await sender_to(gateway.port).send(SMS)
        gateway.manner = "cut"
        with pytest.raises(DeliveryUncertainError):
            await sender_to(gateway.port).send(SMS)
    logged = written.getvalue() + "".join(capfd.readouterr())

    assert "logs work" in logged
    assert secrets_in(logged) == []
    assert "127.0.0.1" not in logged

"""Delivery by Apprise, whose JSON plugin posts to a server on loopback."""

import asyncio
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import unquote

import pytest

from pointbook_common.errors import SettingError
from pointbook_server.delivery import apprise
from pointbook_server.delivery.apprise import THREADS_MAX, AppriseSender
from pointbook_server.delivery.sender import DeliveryFailedError, DeliveryUncertainError, FailureKind
from pointbook_server.programs.model import Channel
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
from support.waiting import until

pytestmark = pytest.mark.filterwarnings("ignore:.imghdr. is deprecated:DeprecationWarning")
PASSWORD = "s3cret-pass"
SETTING = "POINTBOOK_APPRISE_SMS_URL"
SMS = replace(MESSAGE, destination="+8613812345678")


@pytest.fixture
async def provider() -> AsyncIterator[HttpServer]:
    """A provider on loopback."""
    async with http_server() as server:
        yield server


def build_sender(port: int, options: str = "method=POST", channel: Channel = Channel.SMS) -> AppriseSender:
    """Build a sender for a provider on loopback."""
    return AppriseSender(SETTING, f"json://shop:{PASSWORD}@127.0.0.1:{port}/{{to}}?{options}", channel)


def secrets_in(text: str) -> list[str]:
    """Return the secrets that a text contains and a log must not."""
    return [secret for secret in (CODE, PASSWORD, "13812345678", "b.private") if secret in text]


async def test_provider_receives_destination_and_text(provider: HttpServer) -> None:
    await build_sender(provider.port).send(replace(SMS, text=TEXT))

    (request,) = provider.requests
    assert unquote(request.request_line.split(" ")[1].split("?")[0]) == "/+8613812345678"
    assert request.json["message"].replace("\r\n", "\n") == TEXT.replace("\r\n", "\n")


@pytest.mark.parametrize(("channel", "title"), [(Channel.SMS, ""), (Channel.EMAIL, "Your code")])
async def test_only_e_mails_have_a_subject(provider: HttpServer, channel: Channel, title: str) -> None:
    await build_sender(provider.port, channel=channel).send(SMS)

    assert provider.requests[0].json["title"] == title


@pytest.mark.parametrize(
    ("destination", "sent_to"),
    [("Ada@B\u00fccher.example", "Ada@xn--bcher-kva.example"), ("ada.@docomo.ne.jp", '"ada."@docomo.ne.jp')],
)
async def test_domain_of_an_address_is_in_ascii(provider: HttpServer, destination: str, sent_to: str) -> None:
    await build_sender(provider.port, channel=Channel.EMAIL).send(replace(MESSAGE, destination=destination))

    assert unquote(provider.requests[0].request_line.split(" ")[1].split("?")[0]) == f"/{sent_to}"


async def test_destination_cannot_change_the_url(provider: HttpServer) -> None:
    await build_sender(provider.port).send(replace(SMS, destination="a/../b?method=PUT&x=@evil:1#"))

    assert len(provider.requests) == 1
    assert provider.requests[0].request_line.startswith("POST /a")


@pytest.mark.parametrize("status", [302, 400, 401, 429, 500])
async def test_every_refusal_is_uncertain_and_not_retried(provider: HttpServer, status: int) -> None:
    """Apprise reports no reason for a failure."""
    provider.status = status
    provider.headers = f"Location: http://127.0.0.1:{provider.port}/elsewhere\r\n"
    with pytest.raises(DeliveryUncertainError) as caught:
        await build_sender(provider.port, "retry=3&wait=0").send(SMS)

    assert len(provider.requests) == 1
    assert secrets_in(error_chain_text(caught.value)) == []


async def test_closed_port_is_uncertain() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DeliveryUncertainError) as caught:
            await build_sender(unused.getsockname()[1]).send(SMS)

    assert secrets_in(error_chain_text(caught.value)) == []


async def test_exception_of_apprise_is_uncertain(provider: HttpServer) -> None:
    """Apprise raises an exception for an empty text."""
    with pytest.raises(DeliveryUncertainError) as caught:
        await build_sender(provider.port).send(replace(SMS, text=""))

    assert provider.requests == []
    assert secrets_in(error_chain_text(caught.value)) == []


async def test_connection_closed_without_an_answer_is_uncertain(provider: HttpServer) -> None:
    provider.behavior = "cut"
    with pytest.raises(DeliveryUncertainError):
        await build_sender(provider.port).send(SMS)

    assert len(provider.requests) == 1


async def test_destination_unknown_to_apprise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sender = build_sender(1)
    monkeypatch.setattr(sender, "_url", "{to}://127.0.0.1/")
    with pytest.raises(DeliveryFailedError) as caught:
        await sender.send(SMS)

    assert caught.value.kind is FailureKind.REFUSED
    assert secrets_in(error_chain_text(caught.value)) == []


async def test_hanging_provider_blocks_neither_the_loop_nor_its_caller(provider: HttpServer) -> None:
    provider.behavior = "hang"
    sender = build_sender(provider.port, "rto=60")
    began = time.monotonic()
    async with loop_delays() as delay:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(1):
                await sender.send(SMS)
        assert delay() < LOOP_DELAY_SECONDS_MAX
    assert time.monotonic() - began < 3
    assert secrets_in(error_chain_text(caught.value)) == []
    await sender.aclose()


async def test_message_without_a_free_thread_is_unreachable_and_never_sent(
    provider: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apprise, "HANDOVER_TIMEOUT_SECONDS", 0.2)
    provider.behavior = "hang"
    sender = build_sender(provider.port, "rto=2")
    running = [asyncio.create_task(sender.send(SMS)) for _ in range(THREADS_MAX)]
    await until(lambda: len(provider.requests) == THREADS_MAX)
    with pytest.raises(DeliveryFailedError) as caught:
        await sender.send(SMS)
    left = asyncio.create_task(sender.send(SMS))
    await until(lambda: sender._threads._work_queue.qsize() == 1)
    left.cancel()
    answers = await asyncio.gather(*running, left, return_exceptions=True)

    assert caught.value.kind is FailureKind.UNREACHABLE
    assert {type(answer) for answer in answers} == {DeliveryUncertainError, asyncio.CancelledError}
    assert len(provider.requests) == THREADS_MAX


async def test_burst_of_messages_keeps_to_the_thread_limit(
    provider: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apprise, "HANDOVER_TIMEOUT_SECONDS", 60.0)
    sender = build_sender(provider.port)
    await asyncio.gather(*(sender.send(SMS) for _ in range(200)))
    await sender.aclose()

    assert len(provider.requests) == 200
    assert provider.max_open <= THREADS_MAX + 1


async def test_neither_sender_nor_library_logs_a_secret(
    provider: HttpServer, capfd: pytest.CaptureFixture[str]
) -> None:
    with json_logs() as written:
        logging.getLogger("canary").warning("logs work")
        await build_sender(provider.port).send(SMS)
        provider.status = 400
        with pytest.raises(DeliveryUncertainError):
            await build_sender(provider.port).send(SMS)
    logged = written.getvalue() + "".join(capfd.readouterr())

    assert "logs work" in logged
    assert secrets_in(logged) == []
    assert "127.0.0.1" not in logged


def test_url_unknown_to_apprise_is_a_setting_error() -> None:
    """The error names the setting and does not quote it."""
    with pytest.raises(SettingError, match=f"^{SETTING}: .*understand") as caught:
        AppriseSender(SETTING, f"nothing://{PASSWORD}/{{to}}", Channel.SMS)

    assert PASSWORD not in str(caught.value)


def test_missing_apprise_is_a_setting_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(SettingError, match=rf"^{SETTING}: .*pip install 'pointbook\[apprise\]'$"):
        build_sender(1)

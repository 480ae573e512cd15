"""Any provider by Apprise: its JSON plugin posts to a server on loopback."""

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
    MESSAGE,
    TEXT,
    HttpServer,
    everything_told_by,
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


def sender_to(port: int, options: str = "method=POST", channel: Channel = Channel.SMS) -> AppriseSender:
    """Make a sender for a provider on loopback."""
    return AppriseSender(SETTING, f"json://shop:{PASSWORD}@127.0.0.1:{port}/{{to}}?{options}", channel)


def secrets_in(told: str) -> list[str]:
    """List what a log must not hold."""
    return [secret for secret in (CODE, PASSWORD, "13812345678", "b.private") if secret in told]


async def test_a_message_arrives_whole(provider: HttpServer) -> None:
    """The destination is in the URL, percent-encoded; the text is untouched."""
    await sender_to(provider.port).send(replace(SMS, text=TEXT))

    (request,) = provider.requests
    assert unquote(request.line.split(" ")[1].split("?")[0]) == "/+8613812345678"
    assert request.json["message"].replace("\r\n", "\n") == TEXT.replace("\r\n", "\n")


@pytest.mark.parametrize(("channel", "title"), [(Channel.SMS, ""), (Channel.EMAIL, "Your code")])
async def test_e_mail_alone_has_a_subject(provider: HttpServer, channel: Channel, title: str) -> None:
    """In an SMS it would be a line more to pay for."""
    await sender_to(provider.port, channel=channel).send(SMS)

    assert provider.requests[0].json["title"] == title


@pytest.mark.parametrize(
    ("destination", "sent_to"),
    [("Ada@B\u00fccher.example", "Ada@xn--bcher-kva.example"), ("ada.@docomo.ne.jp", '"ada."@docomo.ne.jp')],
)
async def test_an_address_has_its_domain_in_ascii(provider: HttpServer, destination: str, sent_to: str) -> None:
    """As providers take it; Apprise reads no other."""
    await sender_to(provider.port, channel=Channel.EMAIL).send(replace(MESSAGE, destination=destination))

    assert unquote(provider.requests[0].line.split(" ")[1].split("?")[0]) == f"/{sent_to}"


async def test_a_destination_cannot_change_the_url(provider: HttpServer) -> None:
    """It is percent-encoded as a whole."""
    await sender_to(provider.port).send(replace(SMS, destination="a/../b?method=PUT&x=@evil:1#"))

    assert len(provider.requests) == 1
    assert provider.requests[0].line.startswith("POST /a")


@pytest.mark.parametrize("status", [302, 400, 401, 429, 500])
async def test_every_no_is_uncertain(provider: HttpServer, status: int) -> None:
    """Apprise does not tell why a message was not taken; and it neither follows redirects nor tries again."""
    provider.status = status
    provider.headers = f"Location: http://127.0.0.1:{provider.port}/elsewhere\r\n"
    with pytest.raises(DeliveryUncertainError) as caught:
        await sender_to(provider.port, "retry=3&wait=0").send(SMS)

    assert len(provider.requests) == 1
    assert secrets_in(everything_told_by(caught.value)) == []


async def test_a_closed_port_is_uncertain() -> None:
    """Even this is a mere no."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(DeliveryUncertainError) as caught:
            await sender_to(unused.getsockname()[1]).send(SMS)

    assert secrets_in(everything_told_by(caught.value)) == []


async def test_an_error_of_apprise_is_uncertain(provider: HttpServer) -> None:
    """An empty text is one; its message is not passed on."""
    with pytest.raises(DeliveryUncertainError) as caught:
        await sender_to(provider.port).send(replace(SMS, text=""))

    assert provider.requests == []
    assert secrets_in(everything_told_by(caught.value)) == []


async def test_a_connection_that_ends_without_an_answer_is_uncertain(provider: HttpServer) -> None:
    """The provider has the message, and may have sent it on."""
    provider.manner = "cut"
    with pytest.raises(DeliveryUncertainError):
        await sender_to(provider.port).send(SMS)

    assert len(provider.requests) == 1


async def test_a_destination_that_apprise_does_not_understand_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never came to a provider."""
    sender = sender_to(1)
    monkeypatch.setattr(sender, "_url", "{to}://127.0.0.1/")
    with pytest.raises(DeliveryFailedError) as caught:
        await sender.send(SMS)

    assert caught.value.kind is FailureKind.REFUSED
    assert secrets_in(everything_told_by(caught.value)) == []


async def test_a_provider_that_hangs_holds_nothing_up(provider: HttpServer) -> None:
    """The loop goes on, and the caller's five seconds are five seconds."""
    provider.manner = "hang"
    sender = sender_to(provider.port, "rto=60")
    began = time.monotonic()
    async with loop_delays() as delay:
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(5):
                await sender.send(SMS)
        assert delay() < 0.05
    assert time.monotonic() - began < 5.5
    assert secrets_in(everything_told_by(caught.value)) == []
    await sender.aclose()


async def test_what_no_thread_has_begun_is_unreachable(provider: HttpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind others that hang, a message fails definitely and in time, and is not sent later either."""
    monkeypatch.setattr(apprise, "HANDOVER_TIMEOUT_SECONDS", 0.2)
    provider.manner = "hang"
    sender = sender_to(provider.port, "rto=2")
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


async def test_many_messages_share_few_threads(provider: HttpServer) -> None:
    """A burst waits for its turn, and all of it arrives."""
    sender = sender_to(provider.port)
    await asyncio.gather(*(sender.send(SMS) for _ in range(200)))
    await sender.aclose()

    assert len(provider.requests) == 200
    assert provider.most_open <= THREADS_MAX + 1


async def test_nothing_is_logged(provider: HttpServer, capfd: pytest.CaptureFixture[str]) -> None:
    """Apprise tells of destinations and payloads; none of it comes to our logs, however much is asked for."""
    with json_logs() as written:
        logging.getLogger("canary").warning("logs work")
        await sender_to(provider.port).send(SMS)
        provider.status = 400
        with pytest.raises(DeliveryUncertainError):
            await sender_to(provider.port).send(SMS)
    logged = written.getvalue() + "".join(capfd.readouterr())

    assert "logs work" in logged
    assert secrets_in(logged) == []
    assert "127.0.0.1" not in logged


def test_a_url_that_apprise_does_not_understand_stops_the_start() -> None:
    """The setting is named, and not quoted."""
    with pytest.raises(SettingError, match=f"^{SETTING}: .*understand") as caught:
        AppriseSender(SETTING, f"nothing://{PASSWORD}/{{to}}", Channel.SMS)

    assert PASSWORD not in str(caught.value)


def test_a_missing_extra_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install."""
    monkeypatch.setitem(sys.modules, "apprise", None)
    with pytest.raises(SettingError, match=rf"^{SETTING}: .*pip install 'pointbook\[apprise\]'$"):
        sender_to(1)
